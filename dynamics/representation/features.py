"""What a layer of a flax module reads or returns: hidden features, in evaluation mode."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, cast

import jax
from flax import linen as nn
from jaxtyping import Array, Num, Shaped

from dynamics.task import by_value
from dynamics.types import Batch, PyTree, Task, TrainState

COLLECTION, NAME = "hidden_features", "captured"
EVALUATION: Mapping[str, Any] = MappingProxyType({"train": False})
Side = Literal["input", "output"]


def features(
    module: nn.Module,
    params: PyTree,
    extras: PyTree,
    x: Num[Array, "b ..."],
    layer: str,
    *,
    side: Side = "input",
    arguments: Mapping[str, Any] = EVALUATION,
) -> Shaped[Array, "b ..."]:
    """The ``side`` of a layer: what it reads (its first argument) or what it returns.

    ``layer`` is the path of a submodule as in ``params``, parts joined by "/" ("" is the module
    itself): the input of "head" is the penultimate layer of every model of ``dynamics.models``, of
    a Transformer one row a token. The module is called as ``module.apply(variables, x,
    **arguments)``; entries of extras that are no collections (a task's table of targets) are left
    out. Cost: one forward pass. ValueError lists the layers: no such layer is called, or it is
    called more than once; those inside a loop (``nn.scan``) are not among them.
    """
    if side not in ("input", "output"):
        raise ValueError(f"side must be 'input' or 'output', got {side!r}")
    called: list[str] = []

    def capture(call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        inside: nn.Module = context.module
        name = "/".join(inside.path)
        # a loop whose body is traced once (nn.scan) hands nothing out unless it declares it
        if context.method_name != "__call__" or not inside.is_mutable_collection(COLLECTION):
            return call(*args, **kwargs)
        called.append(name)
        out = call(*args, **kwargs)
        if name == layer:
            inside.sow(COLLECTION, NAME, _first(args, kwargs) if side == "input" else out)
        return out

    collections = {name: tree for name, tree in extras.items() if isinstance(tree, Mapping)}
    with nn.intercept_methods(capture):
        _, kept = cast(
            tuple[Any, Mapping[str, Any]],
            module.apply({"params": params, **collections}, x, **arguments, mutable=[COLLECTION]),
        )
    if called.count(layer) != 1:
        layers = list(dict.fromkeys(name for name in called if name))
        raise ValueError(
            f"layer must be one that {type(module).__name__} calls once, got {layer!r}, which it "
            f"calls {called.count(layer)} times: it calls {layers}"
        )
    found = jax.tree.leaves(kept)
    if len(found) != 1:
        raise ValueError(f"the {side} of {layer!r} must be one array, got {len(found)}")
    return found[0]


def of_layer(
    module: nn.Module,
    layer: str,
    *,
    side: Side = "input",
    arguments: Mapping[str, Any] = EVALUATION,
) -> Callable[[Task, TrainState, Batch], Shaped[Array, "b ..."]]:
    """``features`` as a function (task, state, batch), for ``scores.over_examples`` and
    ``probes.Score``: f32[N, ...] in the order of the dataset, of one state or of a population.

    ``module`` is the one that the task was made of, whose weights the task's ``network`` gives.
    Equal modules, layers and arguments give equal functions.
    """
    given = tuple(sorted(arguments.items()))
    return by_value(functools.partial(_hidden, module, layer, side, given))


def _hidden(
    module: nn.Module,
    layer: str,
    side: Side,
    arguments: tuple[tuple[str, Any], ...],
    task: Task,
    state: TrainState,
    batch: Batch,
) -> Shaped[Array, "b ..."]:
    weights = task.network(state.params, state.extras)
    return features(module, *weights, batch.x, layer, side=side, arguments=dict(arguments))


def _first(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call, however it was given."""
    return args[0] if args else next(iter(kwargs.values()))

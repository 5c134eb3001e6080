"""A walk through a function's jaxpr that notes the uses of its weights, and can add taps there."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from dynamics.ghost.uses import CONSTANT, EXAMPLE, Mixed, Site, Weight, kind_of, moved

# Primitives that are opened: their insides are walked, too.
OPENED = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
CHEAP = ("add", "sub", "mul", "div", "add_any", "concatenate")  # as biases, norms, positions do
SUMMED = ("reduce_sum", "dot_general")  # what comes of these may be smaller than the weight


class Walk:
    """Evaluates a jaxpr and notes the uses of its weights.

    ``taps`` (by the number of the site) are added to the results of uses; ``captured`` are then
    the other operands and the weights' factors there. Without taps everything is only noted:
    ``sites``, and ``direct``: leaves that are used in another way, with the reason.
    """

    def __init__(self, taps: dict[tuple[int, ...], jax.Array] | None = None, depth: int = 0):
        """Nothing is noted yet. ``depth``: the loops around the jaxpr."""
        self.taps = taps or {}
        self.captured: dict[tuple[int, ...], tuple[jax.Array, jax.Array]] = {}
        self.sites: list[Site] = []
        self.direct: dict[int, str] = {}
        self._count, self._depth = 0, depth

    def run(
        self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any], origins: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """The outputs of a jaxpr and where they come from."""
        known: dict[Any, Any] = {
            v: (c, CONSTANT) for v, c in zip(jaxpr.constvars, consts, strict=True)
        }
        known |= {v: pair for v, *pair in zip(jaxpr.invars, values, origins, strict=True)}

        def read(v: Any) -> Any:
            return (v.val, CONSTANT) if isinstance(v, Literal) else known[v]

        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            inner = eqn.params.get("jaxpr") if eqn.primitive.name in OPENED else None
            if inner is not None:
                outs = self.run(*opened(inner), [v for v, _ in ins], [o for _, o in ins])
            else:
                outs = self._equation(eqn, [v for v, _ in ins], [o for _, o in ins])
            known |= {v: pair for v, *pair in zip(eqn.outvars, *outs, strict=True)}
        found = [read(v) for v in jaxpr.outvars]
        return [v for v, _ in found], [o for _, o in found]

    def _equation(
        self, eqn: Any, values: list[Any], origins: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        ours = [i for i, o in enumerate(origins) if isinstance(o, Weight | Mixed)]
        if ours and eqn.primitive.name == "scan":
            return self._scan(eqn, values, origins)
        outs = _bind(eqn, values)
        seen = any(o is EXAMPLE for o in origins)
        if not ours:
            return outs, [EXAMPLE if seen else CONSTANT] * len(outs)
        kind = kind_of(eqn, origins, ours)
        if not seen and (kind is None or outs[0].size >= values[ours[0]].size):
            origin = moved(eqn, values, origins, ours)
            return outs, [origin] * len(outs)
        if kind is None:
            for i in ours:
                self.note(eqn.primitive.name, origins[i])
            return outs, [EXAMPLE] * len(outs)
        weight, other, out = origins[ours[0]], values[1 - ours[0]], outs[0]
        number, self._count = (self._count,), self._count + 1
        self.sites.append(Site(number, weight, kind, out.shape, out.dtype))
        if number in self.taps:
            self.captured[number] = other, jnp.asarray(weight.factor, jnp.float32)
            out = out + self.taps[number]
        return [out], [EXAMPLE]

    def _scan(self, eqn: Any, values: list[Any], origins: list[Any]) -> tuple[list[Any], list[Any]]:
        """A loop: taps go in as another sequence, captured operands come out as one."""
        body, n, m = loop(eqn)
        length, number, self._count = eqn.params["length"], self._count, self._count + 1
        sliced = {i for i in range(m, len(origins)) if getattr(origins[i], "axes", None)}
        for i in {*range(n, len(origins))} - sliced:
            self.note("scan", origins[i])
        inside = [o if i < n else EXAMPLE for i, o in enumerate(origins)]
        for i in sliced:
            first, *axes = origins[i].axes
            step = (*origins[i].history, ("slice", self._depth, first))
            inside[i] = origins[i]._replace(axes=tuple(axes), history=step)
        taps = {k[1:]: tap for k, tap in self.taps.items() if k[0] == number and len(k) > 1}
        walks: list[Walk] = []

        def turn(carry: list[Any], given: tuple[list[Any], dict]) -> tuple[list[Any], Any]:
            walks.append(walk := Walk(given[1], self._depth + 1))
            outs, ends = walk.run(*body, [*values[:n], *carry, *given[0]], inside)
            for origin in ends:
                walk.note("scan", origin)
            return outs[: m - n], (outs[m - n :], walk.captured)

        options = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
        carry, (ys, captured) = jax.lax.scan(turn, values[n:m], (values[m:], taps), **options)
        self.captured |= {(number, *k): found for k, found in captured.items()}
        for site in walks[-1].sites:
            apart = any(step[:2] == ("slice", self._depth) for step in site.weight.history)
            place, shape, loops = (number, *site.number), (length, *site.shape), site.loops
            self.sites.append(site._replace(number=place, shape=shape, loops=(apart, *loops)))
        for leaf, reason in walks[-1].direct.items():
            self.direct[leaf] = self.direct.get(leaf) or reason
        return [*carry, *ys], [EXAMPLE] * (len(carry) + len(ys))

    def note(self, name: str, origin: Any) -> None:
        """The gradients of these leaves must be made: they enter ``name`` as they are."""
        leaves, through = frozenset(), ""
        if isinstance(origin, Weight):
            leaves = {origin.leaf}
        if isinstance(origin, Mixed):
            leaves, through = origin.leaves, f" through {origin.by}"
        cheap = name in CHEAP and not through.endswith(SUMMED)
        for leaf in sorted(leaves):
            self.direct[leaf] = self.direct.get(leaf) or (
                "" if cheap else f"it enters {name}{through}"
            )


def live(closed: Any) -> Any:
    """The jaxpr of a traced function, without the equations its one output does not need."""
    return partial_eval.dce_jaxpr(closed.jaxpr, [True], instantiate=True)[0]


def loop(eqn: Any) -> tuple[tuple[Any, Sequence[Any]], int, int]:
    """Of a scan: jaxpr and constants of its body; where its carry begins, and its sequences."""

    def whole(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        return sum(v.aval.ndim == w.aval.ndim for v, w in zip(outer, inner, strict=True))

    body = opened(eqn.params["jaxpr"])
    m = whole(eqn.invars, body[0].invars)
    return body, m - whole(eqn.outvars, body[0].outvars), m


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants, closed or not."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _bind(eqn: Any, values: list[Any]) -> list[Any]:
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]

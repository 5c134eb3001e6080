"""What probes share: programs between equal ones, a context with the run's data."""

import dataclasses
import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dynamics import fit, mesh, models, optim, population, probes, scores, task, watch
from dynamics import representation as rep
from dynamics.data.stream import resident
from dynamics.types import Aux, Batch, Task, TrainState

TRACED: Counter[str] = Counter()  # how often a function of the user was traced
COMPILED: Counter[str] = Counter()
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: COMPILED.update([event.rsplit("/", 1)[-1]])
)
PROGRAMS = "backend_compile_duration"
N = 40


@dataclasses.dataclass(frozen=True)
class Counting:
    """A task that counts how often each of its functions is traced."""

    inner: Task

    def init(self, key: Any, hyperparameters: Any) -> Any:
        return self.inner.init(key, hyperparameters)

    def loss(self, *arguments: Any) -> Any:
        TRACED["loss"] += 1
        return self.inner.loss(*arguments)

    def evaluate(self, *arguments: Any) -> Aux:
        TRACED["evaluate"] += 1
        return self.inner.evaluate(*arguments)


@dataclasses.dataclass(frozen=True)
class Seen:
    """A StepProbe: how many examples were seen."""

    every: Any = 2
    name: str = "seen"

    def init(self, state: TrainState) -> Any:
        TRACED["init"] += 1
        return jnp.float32(0)

    def fold(self, carry: Any, aux: Aux) -> Any:
        TRACED["fold"] += 1
        return carry + aux.loss.shape[0], {"total": carry + aux.loss.shape[0]}


def margin(task: Task, state: TrainState, batch: Batch, *, scale: float = 1.0) -> jax.Array:
    TRACED["margin"] += 1
    return scale * scores.logit_margin(task, state, batch)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A score that is a method."""

    by: float

    def score(self, task: Task, state: TrainState, batch: Batch) -> jax.Array:
        TRACED["scaled"] += 1
        return self.by * scores.el2n(task, state, batch)


def norm(task: Task, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    TRACED["norm"] += 1
    return {"norm": sum(jnp.sum(x**2) for x in jax.tree.leaves(state.params)) ** 0.5}


def anew(every: Any = 2) -> list[Any]:
    """Every kind of probe, made anew of parts that are made anew."""
    y = np.asarray(tiny.images().y)
    labels, module = np.stack([(y + 1) % 4] * 2), models.make(models.MLP(width=8, depth=2), 4)
    rule = optim.SGD(learning_rate=0.02, weight_decay=1e-3)
    return [
        Seen(every),
        probes.AreaUnderMargin(N, every),
        probes.Forgetting(N, every),
        probes.Cartography(N, every),
        probes.Evaluate(every),
        probes.Measure(norm, every, "norm"),
        probes.Score(margin, every, "margin"),
        probes.Score(functools.partial(margin, scale=2.0), every, "twice"),
        probes.Score(Scaled(3.0).score, every, "scaled"),
        probes.Score(rep.of_layer(module, "head"), every, "hidden"),
        probes.VarianceOfGradients(every),
        probes.Memorisation(every, labels, y),
        probes.Path(every, points=3),
        probes.KernelVelocity(every, np.array([[0, 1], [5, 6]])),
        probes.Sharpness(every, rule=rule, num_steps=4, cold=3, warm=2),
        probes.BatchSharpness(every, 4, num_batches=2),
        probes.Spectrum(every, k=2, num=2),
    ]


def problem() -> tiny.Problem:
    p = tiny.problem("mlp", num_steps=4)
    return p._replace(task=task.of_methods(Counting(p.task)))


@pytest.mark.parametrize("how", ["map", "dispatch"])
def test_a_second_identical_run_traces_and_compiles_nothing_of_its_probes(how: Any) -> None:
    """Tasks, probes and scores are made anew; all of them are found again by what they are."""
    here, stream = mesh.make(), tiny.batches(problem(), 2)  # the batches are others' to find again

    def run() -> Any:
        p = problem()
        return tiny.run(p, here, 2, probes=anew(), stream=stream, how=how)

    first = run()
    before, compiled = Counter(TRACED), COMPILED[PROGRAMS]
    assert {"evaluate", "fold", "init", "margin", "scaled", "norm"} <= before.keys() and compiled
    second = run()
    for name in before.keys() - {"loss"}:  # of the step
        assert TRACED[name] == before[name], name
    tiny.assert_equal(first, second)


def test_measurements_of_a_run_share_their_programs() -> None:
    """A run that measures more often compiles no more."""
    here, p = mesh.make(), problem()
    stream = tiny.batches(p, 2)
    tiny.run(p, here, 2, probes=anew((0, 2, 4)), stream=stream, how="map")  # a cold and a warm one
    before = Counter(TRACED)
    tiny.run(p, here, 2, probes=anew((0, 1, 2, 3, 4)), stream=stream, how="map")
    again = {name: TRACED[name] - n for name, n in before.items()}
    # folds are of probes that are equal, with their cadence
    assert {name: n for name, n in again.items() if n}.keys() <= {"fold", "init", "loss"}


def test_equal_functions_compile_once() -> None:
    """Also for one state, without a population; other numbers are other functions."""
    p, here = problem(), mesh.make()
    state = tiny.start(p, here, 2)
    each = watch.each_member(here, "map")
    one = population.take(state, 0)
    for call in (
        lambda score: scores.over_examples(score, p.task, state, p.data, each=each),
        lambda score: scores.over_examples(score, p.task, one, p.data),
    ):
        found = []
        for by in (2.0, 2.0, 5.0):
            before = TRACED["scaled"]
            call(Scaled(by).score)
            found.append(TRACED["scaled"] - before)
        assert found[0] > 0 and found[1] == 0 and found[2] > 0
    compiled = COMPILED[PROGRAMS]
    scores.over_examples(Scaled(2.0).score, problem().task, state, p.data, each=each)
    assert COMPILED[PROGRAMS] == compiled


def test_a_probe_may_list_its_steps() -> None:
    """Such a probe has no hash, and its program is its own."""
    found = tiny.run(problem(), mesh.make(), 2, probes=[Seen([1, 3])])
    seen = found.measured["seen"]
    assert seen["step"].to_list() == [1, 1, 3, 3]
    assert seen["total"].to_list() == [tiny.BATCH] * 2 + [3 * tiny.BATCH] * 2


# ---- the context --------------------------------------------------------------------------------


def test_data_that_a_run_was_not_given_is_an_error_that_says_so() -> None:
    context = watch.context(problem().task, mesh.make(), {"train": tiny.images()})
    assert len(context.examples("train")) == N
    message = (
        r"a probe looks at the data 'test', fit was given \['train'\]: pass data=\{'test': ...\}"
    )
    with pytest.raises(ValueError, match=message):
        context.examples("test")


@pytest.mark.parametrize("index", range(4, 17), ids=lambda i: anew()[i].name)
def test_a_probe_says_at_its_start_what_data_it_lacks(index: int) -> None:
    """Also one that measures at a later step only."""
    p, probe = problem(), dataclasses.replace(anew((4,))[index], on="elsewhere")
    with pytest.raises(ValueError, match=r"looks at the data 'elsewhere', fit was given \['x'\]"):
        tiny.run(p, mesh.make(), 2, probes=[probe], data={"x": p.data})


def test_outside_a_run_a_probe_measures_what_it_does_inside() -> None:
    p, here = problem(), mesh.make(2)
    results = tiny.run(p, here, 2, probes=[probes.Evaluate((4,)), probes.Measure(norm, (4,), "n")])
    context = watch.context(p.task, here, {"train": p.data, "test": p.data})
    for probe in (probes.Evaluate(1), probes.Measure(norm, 1, "n")):
        carry, found = probe.measure(context, probe.start(context, results.state), results.state)
        assert carry == ()
        for name, values in found.items():
            np.testing.assert_array_equal(results.measured[probe.name][name], values)


def test_what_a_probe_takes_from_the_state_is_not_overwritten() -> None:
    """The step that follows is given the state's memory."""

    @dataclasses.dataclass(frozen=True)
    class Bias:
        every: int = 1
        name: str = "bias"

        def start(self, context: Any, state: TrainState) -> Any:
            return state.params

        def measure(self, context: Any, carry: Any, state: TrainState) -> Any:
            last = max(state.params)
            return state.params, {"head": state.params[last]["bias"], "was": carry[last]["bias"]}

    p = problem()
    arrays = tiny.run(p, mesh.make(), 2, probes=[Bias()]).arrays
    found, before = arrays["bias", "head"], arrays["bias", "was"]
    assert found.dims == before.dims == ("step", "member", "axis_0")
    np.testing.assert_array_equal(before.values[1:], found.values[:-1])
    np.testing.assert_array_equal(before.values[0], found.values[0])
    for step in range(5):
        part = tiny.run(p._replace(num_steps=step), mesh.make(), 2) if step else None
        state = tiny.start(p, mesh.make(), 2) if part is None else part.state
        wanted = state.params[max(state.params)]["bias"]
        np.testing.assert_array_equal(found.at(step=step).values, wanted)
    assert np.abs(np.diff(found.values, axis=0)).max(axis=(1, 2)).min() > 0


def test_fit_needs_no_data_without_probes() -> None:
    p = problem()
    state = tiny.start(p, mesh.make(), 2)
    results = fit.fit(p.task, p.optimizer, state, resident(p.data, 8, 2), 2, mesh.make())
    assert results.measured == {} and results.arrays == {} and len(results.rows) == 4

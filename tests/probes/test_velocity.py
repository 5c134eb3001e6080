"""Kernel velocity in a run: against kernels of the states it saw, and that it can be continued."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tiny
from references import ghost as reference
from references import kept

from dynamics import mesh, models, task
from dynamics.data.rows import take
from dynamics.probes.velocity import KernelVelocity
from dynamics.record import Recorder
from dynamics.types import Results

AT = (0, 4, 9, 12)
GROUPS = np.array([[0, 7, 3], [11, 2, 30]])
OWN = np.stack([GROUPS, GROUPS[::-1] + 5])


def problem(kind: str = "mlp") -> Any:
    p = tiny.problem(kind, num_steps=12)
    if kind == "mlp":  # small: every logit is differentiated
        net = task.of_dataset(models.make(models.MLP(width=4, depth=1), 4), p.data)
        p = p._replace(task=net)
    return p


def probes() -> list[Any]:
    return [KernelVelocity(AT, GROUPS), KernelVelocity(AT, OWN, name="own"), kept.Kept(AT)]


def velocities(results: Results, name: str = "kernel") -> dict[int, np.ndarray]:
    """Step -> f32[K, G]."""
    array = results.arrays[name, "velocity"]
    assert array.dims == ("step", "member", "group")
    return dict(zip(array.coords["step"].tolist(), array.values, strict=True))


@functools.cache
def watched(kind: str = "mlp") -> tuple[Any, Results]:
    p = problem(kind)
    return p, tiny.run(p, mesh.make(), 2, probes=probes())


@functools.cache
def jacobian(kind: str) -> Any:
    net = problem(kind).task

    def of_logits(state: Any, batch: Any) -> Any:
        logits = lambda p: net.evaluate(p, state.extras, batch, {}).logits.reshape(-1)  # noqa: E731
        return jax.jacrev(logits)(state.params)

    return reference.jit(of_logits)


def kernel(kind: str, results: Results, at: int, replica: int, rows: np.ndarray) -> np.ndarray:
    """J J^T in float64."""
    batch = take(jax.tree.map(jnp.asarray, problem(kind).data), jnp.asarray(rows))
    found = jax.tree.leaves(jacobian(kind)(kept.state(results, at, replica), batch))
    flat = [np.asarray(j, np.float64).reshape(len(j), -1) for j in found]
    return sum(j @ j.T for j in flat)


@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_against_kernels_of_the_states_it_saw(kind: str) -> None:
    _, results = watched(kind)
    for name, groups in (("kernel", np.stack([GROUPS, GROUPS])), ("own", OWN)):
        found = velocities(results, name)
        assert [*found] == [*AT[1:]]  # the first has nothing before it
        assert all(v.shape == (2, 2) for v in found.values())
        for replica in range(2):
            for g in range(2):
                kernels = [kernel(kind, results, at, replica, groups[replica, g]) for at in AT]
                for before, now, at in zip(kernels, kernels[1:], AT[1:], strict=False):
                    cosine = (before * now).sum() / np.linalg.norm(before) / np.linalg.norm(now)
                    np.testing.assert_allclose(found[at][replica, g], 1 - cosine, rtol=1e-4)
                    assert found[at][replica, g] > 0


def test_watching_changes_no_bit() -> None:
    p, expected = watched()
    unwatched = tiny.run(p, mesh.make(), 2)
    for x, y in zip(tiny.leaves(unwatched), tiny.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_run_cut_and_continued_has_the_same_bits(tmp_path: Any) -> None:
    """The kernel before is carried over: also when it was measured in the part before the cut."""
    p, expected = watched()
    for cut in (2, 6, 12):
        store, part = Recorder(tmp_path, ()), p._replace(num_steps=cut)
        results = tiny.run(part, mesh.make(), 2, checkpoint_every=1, store=store, probes=probes())
    assert results.arrays.keys() == expected.arrays.keys()
    for name, value in expected.arrays.items():
        tiny.assert_array(results.arrays[name], value, str(name))


@pytest.mark.parametrize(("shape", "how"), [((2, 1, 1), "dispatch"), ((1, 1, 1), "map")])
def test_meshes_and_ways_agree(shape: Any, how: Any) -> None:
    p, expected = watched()
    results = tiny.run(p, mesh.make(*shape), 2, how=how, probes=probes()[:2])
    for name in ("kernel", "own"):
        found, wanted = results.arrays[name, "velocity"], expected.arrays[name, "velocity"]
        np.testing.assert_array_equal(found.coords["step"], AT[1:])
        np.testing.assert_allclose(found.values, wanted.values, rtol=1e-3)


def test_the_kernel_of_a_linear_model_stands_still() -> None:
    """E10."""
    p = problem()
    p = p._replace(task=task.of_dataset(models.make(models.Linear(), 4), p.data))
    results = tiny.run(p, mesh.make(), 2, probes=[KernelVelocity(6, GROUPS)])
    assert [*velocities(results)] == [6, 12]
    for found in velocities(results).values():
        assert found.max() <= 1e-12


@pytest.fixture
def unchecked() -> Any:
    """Without the type checks of the tests, as a user of the library meets it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (np.stack([GROUPS] * 3), r"k the number of members, 2, got \[3, 2, 3\]"),
        (GROUPS[0], r"groups must be rows \[g, m\], or \[k, g, m\] .* got \[3\]"),
        (GROUPS + 30, "groups must hold rows 0 to 39 of the data"),
        (GROUPS - 1, "groups must hold rows 0 to 39 of the data"),
    ],
)
def test_refusals(groups: Any, message: str, unchecked: Any) -> None:
    p = problem()
    with pytest.raises(ValueError, match=message):
        tiny.run(p, mesh.make(), 2, probes=[KernelVelocity(6, groups)])


def test_tokens() -> None:
    """A net that reads tokens has a kernel; one with logits at every place does not."""
    p = problem("transformer")
    probe = [KernelVelocity((0, 2), GROUPS)]
    with pytest.raises(
        ValueError, match=r"the kernel is of logits \[b, classes\], got \[3, 6, 8\]"
    ):
        tiny.run(p, mesh.make(), 2, probes=probe)
    data = p.data.replace(y=p.data.y[:, 0])
    net = task.of_dataset(models.make(models.RNN(width=3, num_tokens=8), 8), data)
    p = p._replace(task=net, data=data, num_steps=2)
    found = velocities(tiny.run(p, mesh.make(), 2, probes=probe))[2]
    assert (0 < found).all() and (found < 1).all()

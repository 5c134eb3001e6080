"""Whether the examples of a batch depend on each other, read off the traced program.

An array that depends on the batch either has an axis made of it, recognised by its length, or it
is a *piece*: some rows, or a number made of them. Examples meet where an equation sums, sorts or
shifts along the axis, where a piece meets an array that has the axis, or one piece other rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

from dynamics.ghost.walk import live, loop, opened
from dynamics.types import PyTree

SIZES = (10007, 10009, 10037)  # primes: an axis of such a length is the batch, or made of it
COUPLING = ("reduce", "arg", "cum", "sort", "top_k", "approx_top_k", "fft", "rev")
JOINING = ("concatenate", "dynamic_update_slice", "scatter", "slice")  # make wholes of pieces
INNER = ("jaxpr", "call_jaxpr")  # of equations that only call it

NONE, ALL, SOME = "no rows", "all rows", "some rows"  # or these: (start, limit)
Rows = str | tuple[int, int]


def check_independent(
    losses: Callable[[PyTree, PyTree], jax.Array], state: PyTree, batch: PyTree
) -> None:
    """ValueError if an example's ``losses(state, batch)`` [b] depend on another example.

    Batch norm in training mode makes them, and so does a mean loss; then the gradient of one
    example is not defined by that example. Traced only, for a batch of prime size: nothing is
    computed. Not seen: examples that meet through places that are computed (``x[i, j]``, writing
    to a row) or after one array has two axes made of the batch.
    """
    sizes = {n for x in jax.tree.leaves((state, batch)) for n in x.shape}
    size = next(s for s in SIZES if not any(n % s == 0 for n in sizes if n))
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), batch)
    closed = jax.make_jaxpr(losses)(state, many)
    shape = closed.out_avals[0].shape
    what = "" if shape == (size,) else f"losses of {size} examples are {shape}"
    rows = [NONE for _ in jax.tree.leaves(state)] + [ALL for _ in jax.tree.leaves(many)]
    try:
        _Search(size).follow(live(closed), rows)
    except _Coupled as found:
        what = f"{found} runs over the batch"
    if what:
        raise ValueError(
            f"the examples of a batch must not depend on each other, but {what}: score in "
            "evaluation mode (batch norm with its running statistics), with one loss for each "
            "example"
        )


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...]]:
    return [v.aval.shape for v in variables]


class _Coupled(Exception):
    """The name of an equation in which examples meet."""


class _Search:
    """Follows the rows of a batch of this size through a jaxpr."""

    def __init__(self, size: int):
        """An axis is of the batch if ``size`` divides its length."""
        self._size = size

    def follow(self, jaxpr: Any, rows: Sequence[Rows]) -> list[Rows]:
        """What outputs depend on, given what inputs do. Coupled: examples meet."""
        known: dict[Any, Rows] = dict(zip(jaxpr.invars, rows, strict=True))

        def read(v: Any) -> Rows:
            return NONE if isinstance(v, Literal) else known.get(v, NONE)

        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            if any(r != NONE for r in ins):
                known |= zip(eqn.outvars, self._equation(eqn, ins), strict=True)
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, ins: list[Rows]) -> list[Rows]:
        name, p = eqn.primitive.name, eqn.params
        if name == "scan":
            return self._scan(eqn, ins)
        if name == "while":
            n, m = p["cond_nconsts"], p["body_nconsts"]
            carry = self._loop(opened(p["body_jaxpr"])[0], ins[n : n + m], ins[n + m :], [])
            self.follow(opened(p["cond_jaxpr"])[0], [*ins[:n], *carry])
            return carry
        if name == "cond":
            self._check(eqn, ins[:1])
            each = [self.follow(opened(branch)[0], ins[1:]) for branch in p["branches"]]
            return [self._joined(v, rows) for v, *rows in zip(eqn.outvars, *each, strict=True)]
        inner = opened(next((p[key] for key in INNER if key in p), None))[0]
        if _shapes(getattr(inner, "invars", ())) == _shapes(eqn.invars):  # else of its elements
            return self.follow(inner, ins)
        self._check(eqn, ins)
        cut = self._cut(eqn, ins[0]) if name == "slice" else None
        return [self._joined(v, ins if cut is None else [cut]) for v in eqn.outvars]

    def _scan(self, eqn: Any, ins: list[Rows]) -> list[Rows]:
        (body, _), n, m = loop(eqn)
        xs = [self._joined(v, [r]) for v, r in zip(body.invars[m:], ins[m:], strict=True)]
        carry = self._loop(body, ins[:n], ins[n:m], xs)
        if eqn.params["length"] % self._size == 0 and any(r not in (NONE, ALL) for r in carry):
            raise _Coupled("scan")
        ys = self.follow(body, [*ins[:n], *carry, *xs])[len(carry) :]
        outs = eqn.outvars[len(carry) :]
        return [*carry, *(self._joined(v, [r]) for v, r in zip(outs, ys, strict=True))]

    def _loop(self, body: Any, consts: list[Rows], carry: list[Rows], xs: list[Rows]) -> list[Rows]:
        """The carry of a loop, when another round adds nothing to it."""
        invars = body.invars[len(consts) : len(consts) + len(carry)]
        while True:
            after = self.follow(body, [*consts, *carry, *xs])[: len(carry)]
            pairs = zip(invars, carry, after, strict=True)
            joined = [self._joined(v, [a, b]) for v, a, b in pairs]
            if joined == carry:
                return carry
            carry = joined

    def _joined(self, v: Any, rows: Sequence[Rows]) -> Rows:
        """What an array depends on, made of arrays that depend on these."""
        found = {r for r in rows if r != NONE}
        if not found:
            return NONE
        if any(n and n % self._size == 0 for n in v.aval.shape):
            return ALL
        (only,) = found if len(found) == 1 else (SOME,)
        return SOME if only == ALL else only

    def _cut(self, eqn: Any, rows: Rows) -> Rows | None:
        """The rows in a slice, None for those of its operand."""
        p, shape = eqn.params, eqn.invars[0].aval.shape
        strides = p["strides"] or (1,) * len(shape)
        bounds = zip(shape, p["start_indices"], p["limit_indices"], strides, strict=True)
        cut = [(n, (a, b), by) for n, a, b, by in bounds if (a, b, by) != (0, n, 1)]
        if rows == ALL:
            along = [(at, by) for n, at, by in cut if n % self._size == 0]
            return along[0][0] if len(along) == 1 and along[0][1] == 1 else SOME if along else None
        counts = () if isinstance(rows, str) else (rows[1] - rows[0],)
        return SOME if any(n in counts for n, *_ in cut) else None

    def _check(self, eqn: Any, ins: list[Rows]) -> None:
        """Coupled, if the equation couples examples by itself."""
        name = eqn.primitive.name
        whole = any(self._axes(v) for v in eqn.outvars)
        known = [r for r in ins if isinstance(r, tuple)]
        if name == "concatenate":
            meet = any(a[1] != b[0] for a, b in zip(known, known[1:], strict=False) if a != b)
        else:
            meet = len(set(known)) > 1
        broadcast = (
            whole and not name.startswith(JOINING) and any(r not in (NONE, ALL) for r in ins)
        )
        if meet or broadcast or self._runs_over(eqn) or self._moves(eqn):
            raise _Coupled(name)

    def _axes(self, v: Any) -> list[int]:
        return [i for i, n in enumerate(v.aval.shape) if n and n % self._size == 0]

    def _runs_over(self, eqn: Any) -> bool:
        """Whether a sum, maximum, sort, window or product of matrices takes the batch's axis."""
        name, p, axes = eqn.primitive.name, eqn.params, [self._axes(v) for v in eqn.invars]
        if name == "dot_general":
            return any(i in axes[j] for j in (0, 1) for i in p["dimension_numbers"][0][j])
        if name == "conv_general_dilated":
            each = p["feature_group_count"] * p["batch_group_count"] % self._size == 0
            specs = p["dimension_numbers"][:2]
            return any(i in axes[j] for j in (0, 1) for i in specs[j][2 if each else 1 :])
        if "window_dimensions" in p:
            return any(p["window_dimensions"][i] > 1 for i in axes[0])
        if not name.startswith(COUPLING) or name == "reduce_precision":
            return False
        ndim = len(eqn.invars[0].aval.shape)
        last = tuple(range(ndim - len(p.get("fft_lengths", (1,))), ndim))
        keys = ("axes", "axis", "dimension", "dimensions", "reduction_dimension")
        taken = next((p[key] for key in keys if key in p), last)
        return any(i % ndim in axes[0] for i in (taken if isinstance(taken, tuple) else (taken,)))

    def _moves(self, eqn: Any) -> bool:
        """Whether rows come to other places of an axis made of the batch."""
        name, p = eqn.primitive.name, eqn.params
        if name not in ("gather", "slice", "dynamic_slice", "pad", "reshape"):
            return False
        before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        here, there = self._axes(eqn.invars[0]), self._axes(eqn.outvars[0])
        if name == "gather":
            return p["dimension_numbers"].start_index_map in [(i,) for i in here]
        if name == "pad":
            return any(p["padding_config"][i][0] or p["padding_config"][i][2] for i in here)
        if name == "reshape":  # as many numbers lie between two examples as before
            alone = len(here) == len(there) == 1 and before[here[0]] == after[there[0]]
            return alone and math.prod(before[here[0] :]) != math.prod(after[there[0] :])
        cut = [i for i in there if before[i] != after[i]]
        return (
            bool(cut)
            if name == "dynamic_slice"
            else any(p["start_indices"][i] % self._size for i in cut)
        )

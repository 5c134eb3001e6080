"""A member that diverged is no result: in arrays, studies, exports, on the command line."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamics import record, training
from dynamics.record import Array, Findings
from dynamics.types import Results
from experiments import early_learning
from experiments.experiment import Experiment
from runner import command, export

ONCE = settings(max_examples=25, deadline=None, derandomize=True)
STEPS = (0, 2, 5)
gone = st.lists(st.none() | st.integers(0, 6), min_size=3, max_size=3)


@given(gone=gone, dtype=st.sampled_from([np.float32, np.int32, np.float64]))
@ONCE
def test_arrays_have_no_number_of_a_member_after_it_diverged(gone: Any, dtype: Any) -> None:
    given = np.arange(3 * 3 * 2).reshape(3, 3, 2).astype(dtype)
    array = Array(given.copy(), ("step", "member", "example"), {"step": np.array(STEPS)})
    status = pl.DataFrame(
        {
            "member": range(3),
            "status": ["finished" if at is None else "diverged" for at in gone],
            "step": [7 if at is None else at for at in gone],
        }
    )
    rows = pl.DataFrame({"step": [0], "member": [0], "loss": [1.0]})
    results = Results(rows, {}, {("score", "el2n"): array}, status, None)  # pyright: ignore
    trained = training.joined(pl.DataFrame({"member": range(3)}), results)
    found = trained.arrays["score", "el2n"].values
    assert trained.members["diverged"].to_list() == gone
    assert found.dtype == dtype and np.array_equal(array.values, given)
    for i, step in enumerate(STEPS):
        for member, at in enumerate(gone):
            lost = at is not None and step > at
            none = np.full(2, np.nan if np.issubdtype(dtype, np.floating) else -1)
            wanted = none if lost else given[i, member]
            np.testing.assert_array_equal(found[i, member], wanted)


@given(gone=gone.filter(lambda some: None in some), poison=st.floats(-1e6, 1e6))
@ONCE
def test_exported_scores_are_those_of_runs_that_did_not_diverge(gone: Any, poison: float) -> None:
    score = np.arange(12.0).reshape(3, 4)
    whole = [at is None for at in gone]
    wanted, kept = score[whole].mean(axis=0), sum(whole)
    score[np.logical_not(whole)] = poison
    frames = {"scored": pl.DataFrame({"draw": 0, "replica": range(3), "diverged": gone})}
    arrays = {
        "el2n": Array(score, ("replica", "example")),
        "labels": Array(np.zeros((1, 4), np.int32), ("draw", "example")),
    }
    run = record.Run(Path("runs/a/b"), "b", {}, {}, frames, arrays, done=True)
    mean = export.averages(run)["el2n"]
    np.testing.assert_allclose(mean.value, wanted, rtol=1e-12)
    assert mean.replicas == kept
    assert export._lost(run) == {"diverged": [k for k, at in enumerate(gone) if at is not None]}


def test_a_study_that_does_not_say_who_diverged_is_refused() -> None:
    def study(job: Any) -> Findings:
        return Findings({"mine": pl.DataFrame({"point": [0], "replica": [0], "loss": [1.0]})})

    mine = Experiment("mine", lambda config, folder: None, study)
    wanted = r"mine: frames with replicas must say .* 'diverged' of one of \['mine'\]"
    with pytest.raises(ValueError, match=wanted):
        mine.run(early_learning.Config(), None)


def test_there_is_no_result_if_every_member_diverged() -> None:
    def frame(*gone: int | None) -> pl.DataFrame:
        return pl.DataFrame({"replica": range(len(gone)), "diverged": gone})

    assert record.all_diverged({"a": frame(1, 2), "scored": frame(None)})
    assert not record.all_diverged({"a": frame(1, None)}) and not record.all_diverged({})
    assert record.all_diverged({"scored": frame(1)}) and not record.all_diverged({"a": frame()})


@pytest.mark.parametrize(
    ("gone", "status", "said"),
    [
        ((None, None), 0, ""),
        ((3, None), 0, "1 of 2 seeds diverged, and no figure or claim has them: runs/"),
        ((3, 1), command.DIVERGED, "no result: every member diverged in runs/"),
    ],
)
def test_the_command_line_says_who_diverged(
    gone: Any, status: int, said: str, monkeypatch: Any, capsys: Any
) -> None:
    frames = {"rates": pl.DataFrame({"replica": [0, 1], "diverged": gone})}
    run = record.Run(Path("runs"), "b", {}, {}, frames, {}, done=True)
    monkeypatch.setattr(record, "read", lambda path: run)
    where = command.Where(runs=Path("runs"))
    found = command._say_diverged("early_learning", (early_learning.Config(),), where)
    text = capsys.readouterr().err
    assert found == status and text.startswith(said) and len(text.splitlines()) == bool(said)

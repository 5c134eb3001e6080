"""The command line of the gallery: which runs it finds, draws together, skips and lacks."""

import contextlib
import json
import re
import subprocess
import sys
import types

import polars as pl
import pytest

from dynamics import record
from dynamics.statistics import Claim
from paper_figures import __main__ as gallery
from paper_figures import draw

CLAIM = Claim(
    figure="f",
    paper="Nobody 2000, arXiv 0000.00000",
    statement="Made-up numbers go up.",
    effect=2.104,
    interval=(1.4, 2.8),
    seeds=10,
    scale="made-up data, MLP 1 x 2",
    holds=True,
    kind="claim",
    unit="points",
)


def stored(runs, number, **config):
    """A finished run whose fingerprint is a number."""
    path = runs / "made_up" / f"{number:016x}"
    recorder = record.Recorder(path, {"kind": "Config", "value": number, **config})
    recorder.finish(record.Findings({"one": pl.DataFrame({"x": [1.0]})}))
    return path


def drawn(runs, folder, *, name):
    if any(run.config["value"] == 13 for run in runs):
        raise ValueError("made_up run 13 has no luck")
    claims = [CLAIM._replace(effect=float(run.config["value"])) for run in runs]
    with draw.style("half"):
        fig = draw.figure("half", height=1.0)
        fig.subplots().plot([0, 1], [0, 1])
    fingerprints = [run.fingerprint for run in runs]
    paths = draw.save(fig, folder, name, table={"x": [1]}, claims=claims, fingerprints=fingerprints)
    return paths, claims


def module_of(**attributes):
    module = types.ModuleType("made_up_figure")
    vars(module).update({"EXPERIMENT": "made_up", "PRESET": "tiny", "draw": drawn, **attributes})
    return module


@pytest.fixture
def made_up(monkeypatch):
    """A gallery of one figure, of runs with one number; 13 is a run that can't be drawn."""
    monkeypatch.setattr(gallery, "figures", lambda: {"made_up_figure": module_of()})


@pytest.fixture
def studies(monkeypatch):
    """A gallery of two figures, of two studies, the first of which shows noise together."""
    known = {
        "one": module_of(STUDY="One", TOGETHER=("noise",)),
        "other": module_of(STUDY="Other", TOGETHER=()),
    }
    monkeypatch.setattr(gallery, "figures", lambda: known)


def main(tmp_path, *names):
    return gallery.main([*names, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])


def fingerprints(tmp_path):
    """What was drawn: the runs of each figure, by their numbers."""
    files = sorted((tmp_path / "out").glob("*.json"))
    return {f.stem: [int(p, 16) for p in json.loads(f.read_text())["fingerprints"]] for f in files}


@pytest.mark.parametrize("names", [(), ("made_up_figure",), ("made_up",)])
def test_the_newest_run_has_the_plain_name(tmp_path, made_up, capsys, names):
    stored(tmp_path / "runs", 7)
    newer = stored(tmp_path / "runs", 5)
    assert main(tmp_path, *names) == 0
    out = tmp_path / "out"
    assert fingerprints(tmp_path) == {"made_up_figure": [5], "made_up_figure-00000000": [7]}
    assert len(list(out.iterdir())) == 8
    text = capsys.readouterr().out
    assert f"{out / 'made_up_figure.pdf'} .png .csv .json  from {newer}\nclaims on" in text
    assert text.index("= +5.00 points") < text.index("= +7.00 points")  # the newest first


def test_a_run_that_cannot_be_drawn_does_not_stop_the_others(tmp_path, made_up, capsys):
    stored(tmp_path / "runs", 13)
    stored(tmp_path / "runs", 5)
    assert main(tmp_path) == 1
    captured = capsys.readouterr()
    assert captured.err == "made_up_figure-00000000: not drawn: made_up run 13 has no luck\n"
    assert "= +5.00 points" in captured.out


@pytest.mark.parametrize("names", [(), ("made_up_figure",), ("made_up",)])
def test_no_runs_is_one_line_that_says_how_to_make_one(tmp_path, made_up, capsys, names):
    assert main(tmp_path, *names) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "python -m experiments made_up configs/made_up/tiny.py\n" in captured.err


def test_an_unknown_name_is_one_line_with_the_known_ones(tmp_path, made_up, capsys):
    assert main(tmp_path, "mad_up") == 2
    assert capsys.readouterr().err == "error: no figure 'mad_up'; perhaps made_up\n"


def test_runs_are_drawn_together_that_differ_in_that_alone(tmp_path, studies, capsys):
    one, runs = {"study": {"kind": "One", "kept": 0.3}}, tmp_path / "runs"
    one["value"] = 5  # a field as well: let it not differ
    stored(runs, 1, **one, noise=0.2, seed=0)
    stored(runs, 2, **one, noise=0.1, seed=1)
    stored(runs, 3, **one, noise=0.0, seed=0)
    stored(runs, 4, **one, noise=0.1, seed=0)
    assert main(tmp_path, "one") == 0
    assert fingerprints(tmp_path) == {"one": [3, 4, 1], "one-00000000": [2]}  # by noise
    names = ",".join(f"{number:016x}" for number in (3, 4, 1))
    assert f"one.pdf .png .csv .json  from {runs / 'made_up'}/{{{names}}}\n" in (
        capsys.readouterr().out
    )


def test_each_figure_is_of_its_own_study(tmp_path, studies):
    stored(tmp_path / "runs", 1, study={"kind": "One"}, noise=0.0)
    stored(tmp_path / "runs", 2, study={"kind": "Other"}, noise=0.0)
    assert main(tmp_path) == 0
    assert fingerprints(tmp_path) == {"one": [1], "other": [2]}


def test_an_experiment_stands_for_the_figures_that_have_a_run(tmp_path, studies, capsys):
    stored(tmp_path / "runs", 1, study={"kind": "One"}, noise=0.0)
    assert main(tmp_path) == main(tmp_path, "made_up") == 0
    assert capsys.readouterr().err == ""
    assert main(tmp_path, "made_up", "other") == 1
    where = tmp_path / "runs" / "made_up"
    assert capsys.readouterr().err == (
        f"other: no finished run of Other in {where}; make one with: "
        "python -m experiments made_up configs/made_up/tiny.py --study other\n"
    )


def test_what_has_no_study_and_what_was_changed_is_skipped_with_one_line(tmp_path, studies, capsys):
    older = stored(tmp_path / "runs", 1, prune={"kind": "Prune"}, noise=0.0)
    broken = stored(tmp_path / "runs", 2, study={"kind": "One"}, noise=0.0)
    (broken / "config.json").write_text("{")
    stored(tmp_path / "runs", 3, study={"kind": "One"}, noise=0.0)
    assert main(tmp_path) == 0
    assert fingerprints(tmp_path) == {"one": [3]}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"skipped: {older}") and "KeyError: 'study'" in lines[0]
    assert lines[1].startswith(f"skipped: {broken / 'config.json'} was changed after it was")


@pytest.mark.parametrize("number", [None, 1, 3])
def test_runs_of_another_format_are_skipped_with_the_sentence_that_names_it(
    number, tmp_path, studies, capsys
):
    other = stored(tmp_path / "runs", 1, study={"kind": "One"}, noise=0.0)
    made = json.loads((other / "provenance.json").read_text())
    made.pop("format")
    made |= {} if number is None else {"format": number}
    (other / "provenance.json").write_text(json.dumps(made))
    stored(tmp_path / "runs", 3, study={"kind": "One"}, noise=0.0)
    assert main(tmp_path) == 0
    assert fingerprints(tmp_path) == {"one": [3]}
    assert capsys.readouterr().err == (
        f"skipped: {other} has format {number or 1}, this version reads format {record.FORMAT}: "
        "compute it again, in another folder or after removing it\n"
    )


def test_every_figure_in_the_folder_is_found():
    found = gallery.figures()
    assert {"data_diet_pruning", "data_diet_timing", "data_diet_window"} <= set(found)
    assert not {"draw", "panels", "data_diet"} & set(found)
    for module in found.values():
        assert re.fullmatch(r"\w+", module.EXPERIMENT)
        assert re.fullmatch(r"[A-Z]\w+", module.STUDY)
        assert isinstance(module.TOGETHER, tuple)
        assert module.__doc__ and module.measure.__doc__


def test_neither_jax_nor_pyplot_is_imported(tmp_path):
    code = (
        "import sys\n"
        "from paper_figures import __main__ as gallery\n"
        f"status = gallery.main(['--runs', {str(tmp_path)!r}])\n"
        "loaded = [name for name in ('jax', 'matplotlib.pyplot') if name in sys.modules]\n"
        "sys.exit(f'{status} {loaded}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "1 []"
    assert done.stderr.count("python -m experiments") == len(gallery.figures())


def test_the_module_runs_and_explains_itself(capsys):
    with contextlib.suppress(SystemExit):
        gallery.main(["--help"])
    assert "data_diet_pruning" in capsys.readouterr().out

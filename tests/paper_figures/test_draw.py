"""Files that are whole and the same twice; a report a person can read; the command line."""

import contextlib
import csv
import json
import math
import re
import subprocess
import sys
import types

import matplotlib
import numpy as np
import polars as pl
import pytest

from dynamics import record
from dynamics.statistics import Claim
from paper_figures import __main__ as gallery
from paper_figures import draw

MADE_UP = Claim(
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
    quantity="one - other",
    gate=">= +0.5",
)
TABLE = {"series": ["a", "b"], "x": [1.0, math.nan], "n": [np.int32(3), None]}


def plotted():
    with draw.style("half"):
        fig = draw.figure("half", height=1.5)
        axes = fig.subplots()
        draw.letter(axes, "a", "note")
        axes.plot([0, 1], [0, 1], label="up")
        axes.hexbin([0, 1, 1], [0, 1, 1], gridsize=3)
        axes.legend()
        draw.caption(fig, "words " * 40)
    return fig


def save(folder, claims=(MADE_UP,), table=TABLE):
    return draw.save(
        plotted(), folder, "name", table=table, claims=list(claims), fingerprints=["ab12"]
    )


def test_the_same_input_gives_the_same_bytes(tmp_path):
    one, other = save(tmp_path / "one"), save(tmp_path / "other")
    for suffix in ("pdf", "png", "csv", "json"):
        assert one[suffix].name == f"name.{suffix}"
        assert one[suffix].read_bytes() == other[suffix].read_bytes()
    assert b"CreationDate" not in one["pdf"].read_bytes()
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(
        p.name for p in one.values()
    )


def test_the_callers_settings_neither_matter_nor_change(tmp_path):
    expected = {k: p.read_bytes() for k, p in save(tmp_path / "plain").items()}
    odd = {"font.size": 30, "lines.linewidth": 9, "savefig.dpi": 7, "axes.facecolor": "red"}
    with matplotlib.rc_context(odd):
        before = dict(matplotlib.rcParams)
        got = {k: p.read_bytes() for k, p in save(tmp_path / "odd").items()}
        assert dict(matplotlib.rcParams) == before
    assert got == expected


def test_a_figure_is_as_wide_as_its_column_and_sharp(tmp_path):
    data = save(tmp_path)["png"].read_bytes()
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (int(3.25 * 300), int(1.5 * 300))
    assert draw.figure("full", height=2.0).get_size_inches().tolist() == [6.75, 2.0]


def test_the_table_and_the_claims_read_back(tmp_path):
    paths = save(tmp_path)
    with paths["csv"].open() as f:
        assert list(csv.reader(f)) == [["series", "x", "n"], ["a", "1.0", "3"], ["b", "", ""]]
    about = json.loads(paths["json"].read_text())
    assert about["figure"] == "name"
    assert about["fingerprints"] == ["ab12"]
    assert about["claims"] == [{**MADE_UP._asdict(), "interval": [1.4, 2.8]}]


def test_what_is_not_finite_is_null_in_json(tmp_path):
    claim = MADE_UP._replace(effect=np.float64(math.nan), interval=(-math.inf, math.inf))
    text = save(tmp_path, [claim])["json"].read_text()
    got = json.loads(text, parse_constant=lambda name: pytest.fail(name))["claims"][0]
    assert (got["effect"], got["interval"]) == (None, [None, None])


def test_a_polars_table_gives_the_same_csv(tmp_path):
    columns = {"series": ["a", "b"], "x": [1.5, 2.0]}
    one = save(tmp_path / "one", table=columns)["csv"].read_text()
    other = save(tmp_path / "other", table=pl.DataFrame(columns))["csv"].read_text()
    assert one == other == "series,x\na,1.5\nb,2.0\n"


def test_nothing_is_written_when_a_part_fails(tmp_path):
    with pytest.raises(ValueError, match=r"equally long, got {'x': 2, 'y': 1}"):
        save(tmp_path / "new", table={"x": [1, 2], "y": [1]})
    assert not (tmp_path / "new").exists()


def test_every_method_looks_different():
    colors = [look.color for look in draw.LOOKS.values()]
    markers = [look.marker for look in draw.LOOKS.values()]
    assert len(set(colors)) == len(set(markers)) == len(draw.LOOKS)
    assert draw.LOOKS["random"].line == "--"
    assert draw.LOOKS["all data"].color == "#000000"


def test_report_of_one_claim():
    assert draw.report([MADE_UP]) == (
        "claims on made-up data, MLP 1 x 2:\n"
        "holds          one - other = +2.10 points [+1.40, +2.80], 10 seeds (gate >= +0.5)\n"
        "               Made-up numbers go up. (Nobody 2000, arXiv 0000.00000)"
    )


def test_report_says_plainly_what_does_not_hold():
    claim = MADE_UP._replace(
        effect=-0.3, interval=(-math.inf, math.inf), seeds=1, holds=False, kind="control"
    )
    lines = draw.report([claim, MADE_UP]).splitlines()
    assert lines[0] == "claims on made-up data, MLP 1 x 2:"
    assert lines[3:5] == ["", "controls on made-up data, MLP 1 x 2:"]  # after the claims
    assert lines[5] == "does not hold  one - other = -0.30 points, 1 seed (gate >= +0.5)"
    assert draw.report([]) == ""


def test_report_keeps_to_its_width_and_breaks_no_number():
    long = MADE_UP._replace(statement="many words " * 30, quantity="a rather long quantity " * 3)
    correlation = long._replace(unit="Spearman", effect=0.99812, interval=(0.9971, 1.0))
    text = draw.report([long, correlation])
    assert max(map(len, text.splitlines())) <= 100
    assert "\N{NO-BREAK SPACE}" not in text
    for whole in ("+2.10 points [+1.40, +2.80],", "(gate >= +0.5)", "arXiv 0000.00000",
                  "0.998 Spearman [0.997, 1.000],"):  # fmt: skip
        assert whole in text


# The command line


def stored(runs, value, experiment="made_up"):
    """A finished run whose config is one number."""
    path = runs / experiment / f"{value:016x}"
    recorder = record.Recorder(path, {"kind": "Config", "value": value})
    recorder.finish(record.Table({"x": np.array([1.0])}, {}))
    return path


@pytest.fixture
def made_up(monkeypatch):
    """A gallery of one figure, of runs with one number; 13 is a run that can't be drawn."""

    def drawn(run, folder, *, name):
        if run.config["value"] == 13:
            raise ValueError("made_up run 13 has no luck")
        claims = [MADE_UP._replace(effect=float(run.config["value"]))]
        paths = draw.save(
            plotted(), folder, name, table=TABLE, claims=claims, fingerprints=[run.fingerprint]
        )
        return paths, claims

    module = types.ModuleType("made_up_figure")
    vars(module).update(EXPERIMENT="made_up", PRESET="tiny", draw=drawn)
    monkeypatch.setattr(gallery, "figures", lambda: {"made_up_figure": module})


def main(tmp_path, *names):
    return gallery.main([*names, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("names", [(), ("made_up_figure",), ("made_up",)])
def test_the_newest_run_has_the_plain_name(tmp_path, made_up, capsys, names):
    older, newer = stored(tmp_path / "runs", 7), stored(tmp_path / "runs", 5)
    assert main(tmp_path, *names) == 0
    out = tmp_path / "out"
    for name, path in {"made_up_figure": newer, "made_up_figure-00000000": older}.items():
        about = json.loads((out / f"{name}.json").read_text())
        assert about["fingerprints"] == [path.name]
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


@pytest.mark.parametrize("names", [(), ("made_up_figure",)])
def test_no_runs_is_one_line_that_says_how_to_make_one(tmp_path, made_up, capsys, names):
    assert main(tmp_path, *names) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "python -m experiments made_up configs/made_up/tiny.py" in captured.err


def test_an_unknown_name_is_one_line_with_the_known_ones(tmp_path, made_up, capsys):
    assert main(tmp_path, "mad_up") == 2
    assert capsys.readouterr().err == "no figure 'mad_up'; there are: made_up_figure\n"


def test_every_figure_in_the_folder_is_found():
    found = gallery.figures()
    assert "data_diet_pruning" in found
    assert "draw" not in found
    for module in found.values():
        assert re.fullmatch(r"\w+", module.EXPERIMENT)
        assert module.__doc__


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

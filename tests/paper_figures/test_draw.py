"""Files that are whole and the same twice; a report a person can read."""

import csv
import json
import math

import matplotlib
import numpy as np
import polars as pl
import pytest

from dynamics.statistics import Claim
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
    whole = {k: v for k, v in MADE_UP._asdict().items() if k != "diverged"}
    assert about["claims"] == [{**whole, "interval": [1.4, 2.8]}]


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


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (-0.004, "points", "+0.00"),
        (-0.006, "points", "-0.01"),
        (2.0, "points", "+2.00"),
        (-0.0001, "Spearman", "0.000"),
        (-1.0, "Spearman", "-1.000"),
    ],
)
def test_a_number_has_no_minus_before_a_zero(value, unit, text):
    assert draw.number(value, unit) == text

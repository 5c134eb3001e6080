"""Means and intervals where they belong; labels that do not run into each other."""

import math

import numpy as np
import pytest

from dynamics.statistics import Estimate
from paper_figures import draw, panels


@pytest.fixture
def axes():
    with draw.style("half"):
        return draw.figure("half", height=2.0).subplots()


def test_a_line_has_its_means_and_its_band(axes):
    panels.line(axes, [1, 2], [Estimate(5, 4, 7), Estimate(6, 5, 8)], "random", label="chance")
    (line,), (band,) = axes.lines, axes.collections
    np.testing.assert_array_equal(line.get_xydata(), [[1, 5], [2, 6]])
    assert (line.get_label(), line.get_color()) == ("chance", draw.LOOKS["random"].color)
    vertices = {tuple(vertex) for vertex in band.get_paths()[0].vertices.tolist()}
    assert {(1, 4), (1, 7), (2, 5), (2, 8)} <= vertices


def test_some_markers_are_hollow(axes):
    points = [Estimate(y, y, y) for y in (5, 6, 7)]
    panels.line(axes, [1, 2, 3], points, "random", hollow=[False, True, True])
    line, hollow = axes.lines
    np.testing.assert_array_equal(hollow.get_xydata(), [[2, 6], [3, 7]])
    assert hollow.get_markerfacecolor() == "white" != line.get_markerfacecolor()
    assert axes.get_legend_handles_labels()[1] == ["random"]
    panels.bar(axes, 4, points[0], "random", hollow=True)
    assert axes.containers[0].lines[0].get_markerfacecolor() == "white"


@pytest.mark.parametrize("horizontal", [False, True])
def test_a_bar_ends_at_its_interval(axes, horizontal):
    panels.bar(axes, 3, Estimate(5, 4, 7), "EL2N (hardest)", horizontal=horizontal)
    ((_, _, (bars,)),) = axes.containers
    ends = bars.get_segments()[0]
    assert ends.tolist() == ([[4, 3], [7, 3]] if horizontal else [[3, 4], [3, 7]])


def test_one_seed_has_no_interval(axes):
    one = Estimate(5, -math.inf, math.inf)
    panels.line(axes, [1, 2], [one, one], "random")
    panels.level(axes, one, "all data")
    panels.bar(axes, 1, one, "random")
    assert not axes.collections and not axes.patches
    assert np.isfinite(axes.dataLim.bounds).all()


def test_tick_texts_keep_their_distance(axes):
    axes.set_xscale("log")
    axes.set_xlim(1, 100)
    values = [1.0, 10.0, 10.5, 100.0]
    panels.xticks(axes, values, [f"{v:g}" for v in values])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "10", "100"]
    assert axes.get_xticks(minor=True).tolist() == [10.5]


def test_points_are_signed_and_zero_is_in_the_middle(axes):
    panels.points_axis(axes)
    axes.set_ylim(-30, 3)
    form = axes.yaxis.get_major_formatter()
    texts = [form(v, 0) for v in (-30.0, 0.0, 3.0)]
    assert texts == ["\N{MINUS SIGN}30", "0", "+3"]


def test_shifts_are_around_zero():
    assert panels.aside(1, 0.1) == [0]
    assert panels.aside(4, 2.0) == [-3, -1, 1, 3]

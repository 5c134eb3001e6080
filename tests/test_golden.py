"""The script that compares figures with earlier ones: on stored numbers, and its commands."""

import json
import runpy
from pathlib import Path

import golden
import pytest

CSV = "panel,series,x,y\na,one,0,1.5\na,two,1,{}\n"


def stored(folder: Path, name: str, y: float = 2.5, effect: float = 2.0) -> None:
    """A figure of two numbers and one claim."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.csv").write_text(CSV.format(y))
    claim = {"figure": name, "quantity": "a - b", "effect": effect, "holds": effect > 1}
    text = json.dumps({"figure": name, "fingerprints": [name], "claims": [claim]})
    (folder / f"{name}.json").write_text(text)


def test_equal_figures_have_no_differences_whatever_their_fingerprints(tmp_path: Path) -> None:
    for folder, older in ((tmp_path / "then", "0123abcd"), (tmp_path / "now", "fedc9876")):
        stored(folder, "window")
        stored(folder, f"window-{older}", y=3.5)
    assert list(golden.differences(tmp_path / "then", tmp_path / "now")) == []
    stored(tmp_path / "now", "window", y=3.5)  # the other of the two is the newer one
    stored(tmp_path / "now", "window-fedc9876")
    assert list(golden.differences(tmp_path / "then", tmp_path / "now")) == []


def test_each_difference_is_a_line(tmp_path: Path) -> None:
    then, now = tmp_path / "then", tmp_path / "now"
    stored(then, "window")
    stored(now, "window", y=2.5000000000000004, effect=0.5)
    assert list(golden.differences(then, now)) == [
        "window row 1 y: 2.5 -> 2.5000000000000004",
        "window claim 0 effect: 2.0 -> 0.5",
        "window claim 0 holds: True -> False",
    ]
    (now / "window.csv").write_text(CSV.format(2.5).replace("two,1,", "two,1.0,"))
    stored(then, "window", effect=0.5)
    assert list(golden.differences(then, now)) == []  # the same numbers
    stored(then, "window")
    stored(now, "other")
    stored(now, "window")
    assert list(golden.differences(then, now)) == ["other: there were 0 figures, now 1"]
    (now / "window.csv").write_text(CSV.format(2.5) + "b,three,2,1\n")
    found = list(golden.differences(then, now))
    assert "window row 2 series: nothing -> three" in found and len(found) == 5


def test_the_exit_status_says_whether_something_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(golden, "drawn", lambda item, folder: item != "mnist")
    stored(tmp_path / "then" / "early" / "out", "rates")
    stored(tmp_path / "now" / "early" / "out", "rates")
    command = [str(tmp_path / "now"), "--earlier", str(tmp_path / "then"), "--items"]
    assert golden.main([*command, "early"]) == 0
    stored(tmp_path / "now" / "early" / "out", "rates", y=1.0)
    assert golden.main([*command, "early"]) == 1
    assert "rates row 1 y: 2.5 -> 1.0" in capsys.readouterr().out
    assert golden.main([*command, "early", "mnist"]) == 2


@pytest.mark.parametrize("item", golden.ITEMS)
def test_items_are_presets_of_their_experiment(item: str) -> None:
    words = golden.ITEMS[item].split()
    name, preset = words[1:3] if words[0] == "sweep" else words[:2]
    values = runpy.run_path(str(golden.ROOT / preset))
    assert type(values["config"]).__module__ == f"experiments.{name}.config"
    assert "sweep" in values or words[0] != "sweep"

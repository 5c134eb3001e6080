"""Wrong command lines: each is refused in one line before anything is trained or compiled."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wrong_command_lines import FIGURES, PRESETS, WRONG

from dynamics import record, training
from paper_figures import __main__ as gallery
from runner import command, errors, flags, machine

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def untrained(monkeypatch: Any) -> None:
    """A command that would compute fails the test; data are the digits alone."""

    def computed(*arguments: Any, **options: Any) -> None:
        pytest.fail("something would have been computed")

    monkeypatch.setattr(record, "completed", computed)
    monkeypatch.setattr(training, "train", computed)
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("DYNAMICS_DATA", raising=False)
    monkeypatch.setenv("DYNAMICS_CACHE", "off")


@pytest.fixture(scope="module")
def presets(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("presets")
    for name, text in PRESETS.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def one_line(status: int, capsys: Any) -> str:
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1, printed
    assert printed.err.startswith("error: ")
    assert status == 2
    return printed.err


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_line_is_refused(
    words: str, presets: Path, untrained: None, capsys: Any
) -> None:
    argv = [word.replace("{T}", str(presets)) for word in words.split()]
    assert WRONG[words] in one_line(command.main(argv), capsys)


@pytest.mark.parametrize("words", FIGURES)
def test_a_wrong_command_line_of_figures_is_refused(
    words: str, untrained: None, capsys: Any
) -> None:
    assert FIGURES[words] in one_line(gallery.main(words.split()), capsys)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JAX_NUM_CPU_DEVICES", "two", "JAX_NUM_CPU_DEVICES must be a whole number, at least 1"),
        ("JAX_NUM_CPU_DEVICES", "0", "at least 1, got '0'"),
        ("JAX_NUM_CPU_DEVICES", "", "at least 1, got ''"),
        ("JAX_NUM_PROCESSES", "1.5", "at least 1, got '1.5'"),
        ("JAX_PROCESS_ID", "-1", "at least 0, got '-1'"),
        ("DYNAMICS_PATIENCE", "long", "must be seconds, above 0, got 'long'"),
        ("DYNAMICS_PATIENCE", "nan", "must be seconds, above 0, got 'nan'"),
    ],
)
def test_numbers_of_the_environment_are_checked(
    name: str, value: str, message: str, untrained: None, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv(name, value)
    assert message in one_line(command.main(["early_learning_theory"]), capsys)


def test_a_platform_that_is_not_there_is_one_line(untrained: None, capsys: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "early_learning_theory"],
        env=os.environ | {"JAX_PLATFORMS": "nothing", "TF_CPP_MIN_LOG_LEVEL": "3"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "no devices that jax can use with JAX_PLATFORMS='nothing'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("package", "module", "words"),
    [
        (
            "matplotlib",
            "paper_figures.__main__",
            "matplotlib is not installed: pip install -e",
        ),
        ("sklearn", "runner.command", "the package sklearn is not installed"),
    ],
)
def test_a_package_that_is_missing_is_one_line(package: str, module: str, words: str) -> None:
    argv = ["stability"] if module == "runner.command" else []
    code = f"import sys; sys.modules[{package!r}] = None\nfrom {module} import main\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(main({argv}))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr


# ---- what is right ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["--model convnet", "--model=convnet", "--model=Convnet"])
def test_a_kind_is_chosen_with_and_without_an_equals_sign(kind: str) -> None:
    from experiments.data_diet import Config

    given = flags.words([*kind.split(), "--model.channels", "4", "8", "--noise=.1"])
    config = flags.single(Config(), given)
    assert type(config.model).__name__ == "Convnet"
    assert config.model.channels == (4, 8) and config.noise == 0.1  # pyright: ignore


@pytest.mark.parametrize("words", [["0", "2.5"], ["[0, 2.5]"], ["[0]", "2.5"]])
def test_a_list_is_given_as_values_or_as_a_list(words: list[str]) -> None:
    from experiments.data_diet import Config, Ranking

    config = Config(study=Ranking(scored_at=0.0))
    made = flags.single(config, {"score.epochs": words})
    assert made.score.epochs == (0.0, 2.5)
    (swept,) = flags.several(config, {"score.epochs": ["[0, 2.5]"]})
    assert swept == made


def test_texts_stay_texts_and_none_is_none() -> None:
    from experiments.data_diet import Config

    given = {"data.source": ["npz"], "data.file": ["1e3"], "data.num_train": ["None"]}
    data = flags.single(Config(), given).data
    assert data.file == "1e3" and data.num_train is None


# ---- faults of the program ----------------------------------------------------------------------


def own() -> None:
    raise ValueError("count must be at least 1,\ngot 0")


def library() -> None:
    int("three")


@pytest.mark.parametrize(
    ("raising", "known"),
    [
        (own, False),  # of a test, which is no part of the program
        (library, False),
        (lambda: {}["key"], False),
        (lambda: flags.words(["x"]), True),
        (machine.check, True),
        (lambda: record.read("nowhere"), True),
        (lambda: Path("/nowhere/at/all").read_text(), True),
        (lambda: __import__("nothing_here"), True),
    ],
)
def test_only_what_the_program_raised_is_an_answer(
    raising: Any, known: bool, monkeypatch: Any
) -> None:
    monkeypatch.setenv("JAX_PROCESS_ID", "x")
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011
        raising()
    text = errors.answer(caught.value)
    assert (text is not None) == known and "\n" not in (text or "")


@pytest.mark.parametrize("verbose", [False, True])
def test_a_fault_is_one_line_with_the_command_and_a_file_with_the_traceback(
    verbose: bool, capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    def broken(*arguments: Any) -> None:
        raise KeyError("a b")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(flags, "chosen", broken)
    monkeypatch.setattr(errors, "OURS", ("runner",))
    argv = ["stability", *(["--verbose"] * verbose), "--data.file", "a b"]
    assert command.main(argv) == errors.FAULT
    *above, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a fault of this program, please report it: KeyError: 'a b'")
    assert line.endswith(f"stability {'--verbose ' * verbose}--data.file 'a b'")
    files = list(tmp_path.iterdir())
    assert len(files) == (not verbose) and bool(above) == verbose
    text = "\n".join(above) if verbose else files[0].read_text()
    assert "Traceback" in text and "in broken" in text

"""What a person is told when a command can't be carried out: one line, and where the rest is.

An error is either an answer, made by a ``raise`` of this project or by the machine (a disk, a
permission, a package that is not installed), and its text is all that is needed; or a fault of the
program, and then the traceback is written to a file that the one line names.
"""

import argparse
import difflib
import functools
import linecache
import platform
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dynamics.stopping import interruptible

REFUSED, FAULT = 2, 70  # exit statuses: what was asked can't be had; this program is wrong
ROOT = Path(__file__).resolve().parent.parent
OURS = ("dynamics", "experiments", "runner", "configs", "paper_figures")
EXTRAS = {  # package -> what brings it
    **dict.fromkeys(("matplotlib", "tueplots"), "figures"),
    **dict.fromkeys(("grain", "PIL"), "data"),
    "submitit": "cluster",
    "libtpu": "tpu",
}


class Refused(Exception):
    """A command that can't be carried out; its text is all that a person needs."""


class Parser(argparse.ArgumentParser):
    """Argparse's, with its complaints as ``Refused``; it takes no abbreviations."""

    def error(self, message: str) -> NoReturn:
        """Refused: what is wrong, and the nearest flag where there is no such one."""
        _, unknown, words = message.partition("unrecognized arguments: ")
        name = words.split("=")[0].split()[:1]
        near = difflib.get_close_matches(name[0], self._option_string_actions, 1) if unknown else []
        perhaps = f"; perhaps {near[0]}" if near else f"; {self.prog} --help says what there is"
        raise Refused(f"{message}{perhaps}")


def answered(program: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """The ``main(argv)`` of a program, so that no exception leaves it: one line says what it was.

    The exit status is then REFUSED or FAULT, and 143 or 130 after SIGTERM or SIGINT. With
    ``--verbose`` the traceback is shown, too.
    """

    def around(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def answering(argv: Sequence[str] | None = None) -> int:
            argv = sys.argv[1:] if argv is None else argv
            with interruptible() as asked:
                try:
                    return main(argv)
                except KeyboardInterrupt as error:
                    print(str(error) or "stopped; the same command goes on", file=sys.stderr)
                    return asked.status if asked.is_set() else 130
                except Exception as error:
                    return _tell(error, shlex.join([*program.split(), *argv]), "--verbose" in argv)

        return answering

    return around


def _tell(error: Exception, command: str, verbose: bool) -> int:
    text = answer(error)
    if verbose:
        traceback.print_exception(error)
    if text is not None:
        print(f"error: {text}", file=sys.stderr)
        return REFUSED
    where = "above" if verbose else f"in {_written(error, command)}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    print(
        f"error: a fault of this program, please report it: {in_one_line(error)} "
        f"({Path(frame.filename).name}, line {frame.lineno}); its traceback is {where}; "
        f"the command was: {command}",
        file=sys.stderr,
    )
    return FAULT


def answer(error: BaseException) -> str | None:
    """The text of an error that is an answer, in one line; None for a fault of the program."""
    if isinstance(error, ModuleNotFoundError) and (package := _missing(error)):
        how = f": pip install -e '.[{EXTRAS[package]}]'" if package in EXTRAS else ""
        return f"the package {package} is not installed{how}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    ours = type(error).__module__.split(".")[0] in OURS or _raised_here(error)
    if not str(error) or not (ours or isinstance(error, OSError)):
        return None
    return " ".join(str(error).split())


def _missing(error: ModuleNotFoundError) -> str:
    """The package that is not there, unless it is our own."""
    package = (error.name or "").split(".")[0]
    return "" if package in OURS else package


def _raised_here(error: BaseException) -> bool:
    """Whether a ``raise`` of this project made the error, not a library that it gave too much."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    last = frames[-1]
    path = Path(last.filename).resolve()
    ours = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS
    text = linecache.getline(last.filename, last.lineno or 0).split()
    return ours and text[:1] in ([], ["raise"])


def in_one_line(error: BaseException) -> str:
    """The kind of an error and its text."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _written(error: Exception, command: str) -> str:
    """The file that the traceback is written to, or if there is none, where it is."""
    text = "".join(traceback.format_exception(error))
    head = f"{command}\nin {Path.cwd()}, Python {platform.python_version()}\n\n"
    name = f"training-dynamics-{time.strftime('%Y%m%d-%H%M%S')}-"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix=name, suffix=".txt", delete=False, errors="replace"
        ) as file:
            file.write(head + text)
        return file.name
    except OSError:
        sys.stderr.write(text)
        return "what is above"

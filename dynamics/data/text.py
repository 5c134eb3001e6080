"""Text as bytes: windows of tokens, each with the byte that follows it as its label.

Tokens are not normalised. A std of size 0 (mean and std of shape [0]) is the convention that says
so: whoever normalises passes integer inputs of such a dataset through as they are.
"""

import ast
import hashlib
import sysconfig
from pathlib import Path

import numpy as np

from dynamics.data.files import DataError, read_bytes
from dynamics.data.sources import Splits, locate
from dynamics.types import Dataset

# Rich in prose and present in every Python from 3.11 on.
_MODULES = (
    "argparse", "ast", "bisect", "calendar", "cmd", "codecs", "collections", "configparser",
    "contextlib", "csv", "difflib", "dis", "doctest", "fractions", "ftplib", "functools", "heapq",
    "http.client", "http.cookiejar", "imaplib", "inspect", "ipaddress", "json", "logging",
    "logging.handlers", "mailbox", "optparse", "os", "pdb", "pickle", "plistlib", "pprint",
    "profile", "random", "sched", "selectors", "shelve", "shutil", "smtplib", "socket",
    "socketserver", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap",
    "threading", "timeit", "tokenize", "traceback", "types", "typing", "unittest.case",
    "unittest.mock", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "zipfile",
)  # fmt: skip


def load_text(
    path: Path | str | None,
    *,
    context: int,
    test_fraction: float = 0.1,
    folder: Path | str | None = None,
) -> tuple[Splits, bytes]:
    """Windows of ``context`` bytes to predict the next byte from, and the vocabulary.

    Window i begins at byte i * context; x: uint8 [n context] are its tokens, y: uint8 [n context]
    the tokens one byte further on, file_row: int32 [n] is i. Training windows are the first part of
    the text, test windows the rest. Token t is the byte ``vocabulary[t]``: the bytes that occur
    anywhere in the text, ascending.

    ``path`` is relative to the data folder or absolute. None is Python's own documentation
    (``docstrings``), there on any machine but different from one Python version to another: the
    name of the splits ends in its hash.
    """
    if context < 1:
        raise ValueError(f"context must be >= 1, got {context}")
    if path is None:
        text = docstrings()
        name = f"docstrings-{hashlib.blake2b(text, digest_size=4).hexdigest()}"
    else:
        file = locate(path, folder, str(path))
        text = read_bytes(file, "name a text file, or None for Python's own documentation")
        name = file.stem
    values = np.frombuffer(text, np.uint8)
    occurring, tokens = np.unique(values, return_inverse=True)
    train, test = _windows(tokens.astype(np.uint8), context, test_fraction)
    return Splits(train, test, name, len(occurring)), occurring.tobytes()


def _windows(tokens: np.ndarray, context: int, test_fraction: float) -> tuple[Dataset, Dataset]:
    n = (len(tokens) - 1) // context  # the last byte of the last window has a successor too
    first = n - round(test_fraction * n)
    if not 0 < first < n:
        raise ValueError(
            "context and test_fraction must leave windows to train on and to test on, got context "
            f"{context} and test_fraction {test_fraction:g} for {len(tokens)} bytes: "
            f"{first} of {n} windows to train on"
        )
    x = tokens[: n * context].reshape(n, context)
    y = tokens[1 : n * context + 1].reshape(n, context)
    place = np.arange(n, dtype=np.int32)
    none = np.zeros(0, np.float32)
    parts = (slice(0, first), slice(first, n))
    train, test = (Dataset(x[p], y[p], none, none, file_row=place[p]) for p in parts)
    return train, test


def docstrings() -> bytes:
    """The docstrings of a fixed list of standard modules in the order of their sources.

    Parsed, not imported, so that neither -OO nor a module of the same name elsewhere matters.
    """
    library, texts = Path(sysconfig.get_path("stdlib")), []
    for name in _MODULES:
        module = library.joinpath(*name.split("."))
        source = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        content = read_bytes(source, "install Python with its sources, or name a text file")
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError) as error:
            raise DataError(
                f"{source}: expected Python, found {error}; name a text file"
            ) from error
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
        texts += [text for node in nodes if (text := ast.get_docstring(node))]
    return "\n\n".join(texts).encode()

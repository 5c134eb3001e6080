"""Windows of text: every byte but the last is an input once, and its label is the next byte."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamics.data import DataError
from dynamics.data.text import docstrings, load_text


def decode(tokens, vocabulary):
    return bytes(vocabulary[t] for t in tokens.ravel())


@settings(derandomize=True, deadline=None, max_examples=50)
@given(text=st.binary(min_size=40, max_size=300), context=st.integers(1, 12))
def test_windows_spell_the_text(tmp_path_factory, text, context):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text)
    (train, test, name, num_classes), vocabulary = load_text(
        path, context=context, test_fraction=0.4
    )
    n = (len(text) - 1) // context
    x, y = (np.concatenate([getattr(part, f) for part in (train, test)]) for f in "xy")
    assert x.shape == y.shape == (n, context) and x.dtype == y.dtype == np.uint8
    assert decode(x, vocabulary) == text[: n * context]
    assert decode(y, vocabulary) == text[1 : n * context + 1]
    assert len(text) - 1 - n * context < context  # no whole window is left out
    assert train.file_row.tolist() + test.file_row.tolist() == list(range(n))
    assert vocabulary == bytes(sorted(set(text))) and num_classes == len(vocabulary)
    assert name == "any" and train.file_row.dtype == np.int32


def test_tokens_are_marked_as_not_normalised(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"to be or not to be")
    splits, vocabulary = load_text("a.txt", context=2, folder=tmp_path)
    assert vocabulary == b" benort"
    for part in splits[:2]:
        assert part.std.shape == part.mean.shape == (0,) and part.std.dtype == np.float32
    assert len(splits.train) == 7 and len(splits.test) == 1
    assert splits.test.x.tolist() == [[4, 0]] and splits.test.y.tolist() == [[0, 1]]  # o_, _b
    assert splits.test.file_row.tolist() == [7]


def test_pythons_documentation_is_there():
    (train, test, name, num_classes), vocabulary = load_text(None, context=64)
    assert len(train) > 5000 and 0.09 < len(test) / (len(train) + len(test)) < 0.11
    assert name.startswith("docstrings-") and num_classes == len(vocabulary) < 200
    assert decode(train.x[:1], vocabulary).startswith(b"Command-line parsing library")
    assert len(docstrings()) // 64 == len(train) + len(test)


def test_bad_arguments(tmp_path, monkeypatch):
    monkeypatch.delenv("DYNAMICS_DATA", raising=False)
    path = tmp_path / "a.txt"
    path.write_bytes(b"abcdef")
    with pytest.raises(ValueError, match="context must be >= 1, got 0"):
        load_text(path, context=0)
    with pytest.raises(ValueError, match="context 5 and .* for 6 bytes: 1 of 1 windows"):
        load_text(path, context=5)
    with pytest.raises(ValueError, match="test_fraction 1 for 6 bytes: 0 of 5 windows"):
        load_text(path, context=1, test_fraction=1.0)
    with pytest.raises(DataError, match="nowhere.txt: expected a file, found none"):
        load_text(tmp_path / "nowhere.txt", context=5)
    with pytest.raises(DataError, match="set DYNAMICS_DATA .* a folder that holds a.txt"):
        load_text("a.txt", context=5)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="a.txt: expected a file that holds something, found 0"):
        load_text(path, context=5)


@pytest.mark.skipif(not os.environ.get("DYNAMICS_DATA"), reason="DYNAMICS_DATA is not set")
def test_tinyshakespeare():
    splits, vocabulary = load_text("text/tinyshakespeare.txt", context=128)
    assert splits.num_classes == 65 and splits.name == "tinyshakespeare"
    assert decode(splits.train.x[:1], vocabulary).startswith(b"First Citizen:\nBefore we proceed")
    assert len(splits.train) + len(splits.test) == (1_115_394 - 1) // 128

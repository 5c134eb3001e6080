"""Bytes to arrays: the formats small image datasets come in, each checked to the last byte.

A reader either returns what the file says or raises a ``DataError``. No file can run code: npz
files are read without pickle, and CIFAR's pickles by an unpickler that builds nothing but numbers,
text, containers and arrays of numbers.
"""

import gzip
import math
import pickle
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Num, UInt8

Images = UInt8[np.ndarray, "n 32 32 3"]
Labels = Int32[np.ndarray, "n"]
Pair = tuple[np.ndarray, np.ndarray]

_IDX = "fetch the dataset's four files again (*-idx3-ubyte and *-idx1-ubyte, .gz or not)"
_BINARY = "unpack cifar-10-binary.tar.gz or cifar-100-binary.tar.gz again"
_PICKLE = "unpack cifar-10-python.tar.gz or cifar-100-python.tar.gz again"
_NPZ = (
    "write it with numpy.savez(file, x=x, y=y), or with x_train, y_train, x_test, y_test; "
    "x numbers [n, ...], y integers [n] from 0"
)
_IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}  # type byte -> dtype
_NUMBERS = ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
_PIXELS = 3 * 32 * 32


class DataError(Exception):
    """A file is missing, damaged or not what it is taken for; says which, and what to do."""


def wrong(path: Path | str, expected: str, found: str, remedy: str) -> DataError:
    """The error in its one form: file, expectation, what was found, what to do."""
    return DataError(f"{path}: expected {expected}, found {found}; {remedy}")


def read_bytes(path: Path | str, remedy: str) -> bytes:
    """The content of a file that must be there and hold something."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise wrong(path, "a file", "none", remedy) from None
    except OSError as error:
        raise wrong(path, "a readable file", f"{error.strerror!r}", remedy) from error
    if not content:
        raise wrong(path, "a file that holds something", "0 bytes", remedy)
    return content


def read_idx(path: Path | str, rank: int) -> Num[np.ndarray, "..."]:
    """The array of an idx file of the given rank (3 for images, 1 for labels), gzipped or not.

    Layout: two zero bytes, a type byte, the rank, the sizes as big-endian int32, the values.
    """
    content = _unzipped(path, read_bytes(path, _IDX))
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_TYPES:
        raise wrong(path, "an idx file (bytes 00 00 TYPE RANK)", _head(content), _IDX)
    if content[3] != rank:
        raise wrong(path, f"rank {_ranked(rank)}", f"rank {_ranked(content[3])}", _IDX)
    start = 4 + 4 * rank
    if len(content) < start:
        raise wrong(path, f"a header of {start} bytes", f"{len(content)} bytes", _IDX)
    dims = tuple(np.frombuffer(content, ">u4", count=rank, offset=4).tolist())
    dtype, shape = np.dtype(_IDX_TYPES[content[2]]), " x ".join(map(str, dims))
    if 0 in dims:
        raise wrong(path, "at least one value", f"an array of {shape}", _IDX)
    length = start + math.prod(dims) * dtype.itemsize
    if len(content) != length:
        expected = f"{length} bytes (a header of {start}, {shape} values of {dtype.itemsize})"
        raise wrong(path, expected, f"{len(content)} bytes", _IDX)
    values = np.frombuffer(content, dtype, offset=start).reshape(dims)
    return values.astype(dtype.newbyteorder("="), copy=False)


def _ranked(rank: int) -> str:
    return f"{rank} ({ {1: 'labels', 3: 'images'}.get(rank, 'neither labels nor images') })"


def _head(content: bytes) -> str:
    return f"{len(content)} bytes that begin {content[:4].hex(' ')} ({content[:16]!r})"


def _unzipped(path: Path | str, content: bytes) -> bytes:
    zipped = content[:2] == b"\x1f\x8b"
    if not zipped and Path(path).suffix != ".gz":
        return content
    if not zipped:
        raise wrong(path, "a gzip file (bytes 1f 8b)", _head(content), _IDX)
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        found = f"{len(content)} bytes that do not unzip ({error})"
        raise wrong(path, "an intact gzip file", found, _IDX) from error


def read_cifar_binary(
    paths: Sequence[Path | str], label_bytes: Literal[1, 2]
) -> tuple[Images, Labels]:
    """Records of a label byte (CIFAR-10) or a coarse and a fine one (CIFAR-100) and 3072 pixels.

    The pixels are three 32 x 32 planes, red first; of two labels the fine one is returned.
    """
    record, num_classes = label_bytes + _PIXELS, {1: 10, 2: 100}[label_bytes]
    parts = []
    for path in paths:
        content = read_bytes(path, _BINARY)
        whole, rest = divmod(len(content), record)
        if rest:
            found = f"{len(content)} bytes ({whole} records and {rest} bytes)"
            raise wrong(path, f"records of {record} bytes", found, _BINARY)
        records = np.frombuffer(content, np.uint8).reshape(-1, record)
        labels = records[:, label_bytes - 1].astype(np.int32)
        _check_labels(path, labels, num_classes, _BINARY)
        parts.append((records[:, label_bytes:], labels))
    return _joined(paths, parts, _BINARY)


def read_cifar_pickle(
    paths: Sequence[Path | str], label_key: Literal["labels", "fine_labels"]
) -> tuple[Images, Labels]:
    """CIFAR's Python batches: a dict of ``data`` uint8 [n, 3072] and of a list of n labels.

    The key is ``labels`` in CIFAR-10 and ``fine_labels`` in CIFAR-100; keys may be bytes or text.
    """
    parts = []
    for path in paths:
        batch = _unpickled(path)
        if not {"data", label_key} <= batch.keys():
            expected = f"a dict with keys 'data' and {label_key!r}"
            raise wrong(path, expected, f"{sorted(batch)}", _PICKLE)
        pixels, values = batch["data"], batch[label_key]
        if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8):
            found = str(getattr(pixels, "dtype", type(pixels).__name__))
            raise wrong(path, "data to be an array of uint8", found, _PICKLE)
        if pixels.ndim != 2 or pixels.shape[1] != _PIXELS or not len(pixels):
            raise wrong(path, f"data of shape (n, {_PIXELS})", f"{pixels.shape}", _PICKLE)
        values = values.tolist() if isinstance(values, np.ndarray) else values
        if not isinstance(values, list) or len(values) != len(pixels):
            found = f"a {type(values).__name__}"
            found += f" of {len(values)}" if isinstance(values, list) else ""
            raise wrong(path, f"a list of {len(pixels)} {label_key}", found, _PICKLE)
        if bad := [v for v in values if type(v) is not int or abs(v) >= 2**31]:
            raise wrong(path, f"{label_key} to be small integers", f"{bad[0]!r}", _PICKLE)
        labels = np.asarray(values, np.int32)
        _check_labels(path, labels, {"labels": 10, "fine_labels": 100}[label_key], _PICKLE)
        parts.append((pixels, labels))
    return _joined(paths, parts, _PICKLE)


def _check_labels(path: Path | str, labels: Labels, num_classes: int, remedy: str) -> None:
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        expected = f"labels from 0 to {num_classes - 1}"
        raise wrong(path, expected, f"{labels[bad[0]]} in record {bad[0]}", remedy)


def _joined(paths: Sequence[Path | str], parts: list[Pair], remedy: str) -> tuple[Images, Labels]:
    """All batches in one array; equally long, or a cut one would shift every later place."""
    first = len(parts[0][1])
    for path, (_, labels) in zip(paths, parts, strict=True):
        if len(labels) != first:
            expected = f"{first} images, as many as in {Path(paths[0]).name}"
            raise wrong(path, expected, f"{len(labels)}", remedy)
    planes = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([labels for _, labels in parts])
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


class _Dtype:
    """Stands for a dtype of numbers while a pickle is read."""

    def __init__(self, value: np.dtype):
        self.value = value

    def __setstate__(self, state: Any) -> None:
        self.value = self.value.newbyteorder(_text(state[1]))


class _Array:
    """Stands for an array while a pickle is read, so that none of numpy's own unpickling runs."""

    def __init__(self):
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        flat = np.frombuffer(content, dtype.value)
        self.value = flat.reshape(shape, order="F" if fortran else "C")


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


class _Unpickler(pickle.Unpickler):
    """Knows five names, answers each with a stand-in of its own, and refuses every other.

    The stand-ins take without a warning what Python 2 wrote: the module's old name, and integers
    for the flags of a dtype (deprecated by numpy 2.4).
    """

    def __init__(self, path: Path | str, content: BytesIO):
        super().__init__(content, encoding="bytes")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "numpy.core.multiarray._reconstruct": self._array,
            "numpy._core.multiarray._reconstruct": self._array,
            "numpy.ndarray": "ndarray",  # only ever an argument of _reconstruct
            "numpy.dtype": self._dtype,
            "_codecs.encode": self._bytes,
        }
        if f"{module}.{name}" not in known:
            expected = "a pickle of dicts, lists, bytes, text, integers and arrays of numbers"
            found = f"the global {module}.{name}, which is refused and was not called"
            raise wrong(self.path, expected, found, _PICKLE)
        stand_in = known[f"{module}.{name}"]
        # A pickle may set attributes of a function: of this lambda then, of nothing that stays.
        return (lambda *args: stand_in(*args)) if callable(stand_in) else stand_in

    def _array(self, *_: Any) -> _Array:
        return _Array()

    def _dtype(self, name: Any, *_: Any) -> _Dtype:
        if _text(name) not in _NUMBERS:
            raise wrong(self.path, "arrays of numbers", f"dtype {_text(name)!r}", _PICKLE)
        return _Dtype(np.dtype(_text(name)))

    def _bytes(self, text: str, encoding: Any) -> bytes:
        if _text(encoding) != "latin1":
            raise wrong(self.path, "bytes kept as latin1", f"{_text(encoding)!r}", _PICKLE)
        return text.encode("latin1")


def _unpickled(path: Path | str) -> dict[str, Any]:
    """The pickled dict with its keys as text and its arrays as arrays."""
    stream = BytesIO(read_bytes(path, _PICKLE))
    try:
        value = _Unpickler(path, stream).load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        found = f"{len(stream.getvalue())} bytes that do not unpickle ({error!r})"
        raise wrong(path, "an intact pickle", found, _PICKLE) from error
    if rest := len(stream.read()):
        raise wrong(path, "nothing after the pickle", f"{rest} more bytes", _PICKLE)
    if not isinstance(value, dict):
        raise wrong(path, "a pickled dict", f"a {type(value).__name__}", _PICKLE)
    return {str(_text(k)): v.value if isinstance(v, _Array) else v for k, v in value.items()}


def read_npz(path: Path | str) -> tuple[Pair, Pair | None]:
    """``(x, y), None`` for arrays x, y; ``(x_train, y_train), (x_test, y_test)`` where given.

    x: numbers [n ...]; uint8 stays, other integers become int32 and floats float32.
    y: integers [n] from 0, returned as int32. Other arrays in the file are not read.
    """
    content = read_bytes(path, _NPZ)
    if content[:2] != b"PK":
        raise wrong(path, "an npz file (bytes 50 4b)", _head(content), _NPZ)
    try:
        with np.load(BytesIO(content), allow_pickle=False) as archive:
            names = sorted({"x", "y", "x_train", "y_train", "x_test", "y_test"} & {*archive.files})
            arrays = {name: archive[name] for name in names}
            found = f"arrays {sorted(archive.files)}"
    except Exception as error:  # so can a damaged archive
        raise wrong(path, "an npz file of arrays of numbers", repr(error), _NPZ) from error
    train = "" if "x" in arrays else "_train"
    expected = {f"x{train}", f"y{train}"}
    test = expected | {"x_test", "y_test"} if train else expected
    if set(arrays) not in (expected, test):
        raise wrong(path, "arrays x, y or x_train, y_train[, x_test, y_test]", found, _NPZ)
    pairs = [_pair(path, arrays, end) for end in (train, "_test") if f"x{end}" in arrays]
    shapes = [f"{x.dtype}{list(x.shape[1:])}" for x, _ in pairs]
    if shapes[-1] != shapes[0]:
        raise wrong(path, f"x_test of {shapes[0]} each, as x_train", shapes[-1], _NPZ)
    return pairs[0], pairs[1] if len(pairs) > 1 else None


def read_groups(path: Path | str) -> np.ndarray | None:
    """The array ``group`` [n] beside x and y, integers or text; None if there is none."""
    with np.load(path, allow_pickle=False) as archive:
        if not {"x", "group"} <= set(archive.files):
            return None
        groups, n = archive["group"], len(archive["y"])
    if groups.dtype.kind not in "iuU" or groups.shape != (n,):
        expected = f"group to be integers or text of shape ({n},), one for each example"
        raise wrong(path, expected, f"{groups.dtype} {groups.shape}", _NPZ)
    return groups


def _pair(path: Path | str, arrays: dict[str, np.ndarray], end: str) -> Pair:
    x, y = arrays[f"x{end}"], arrays[f"y{end}"]
    if x.dtype.kind not in "biuf" or x.ndim < 2 or not x.size:
        found = f"{x.dtype} {x.shape}"
        raise wrong(path, f"x{end} to be numbers of shape (n, ...)", found, _NPZ)
    if x.ndim == 4 and x.shape[1] in (1, 3, 4) and x.shape[3] > 4 and x.shape[2] == x.shape[3]:
        expected = f"images x{end} with channels last, (n, height, width, channels)"
        remedy = f"write x{end}.transpose(0, 2, 3, 1)"
        raise wrong(path, expected, f"{x.shape}, which has them first", remedy)
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        expected = f"y{end} to be integers of shape ({len(x)},) as x{end} has {len(x)} examples"
        raise wrong(path, expected, f"{y.dtype} {y.shape}", _NPZ)
    if y.min() < 0 or y.max() >= 2**31:
        raise wrong(path, f"labels y{end} from 0", f"{y.min()}..{y.max()}", _NPZ)
    kind = np.float32 if x.dtype.kind == "f" else np.uint8 if x.dtype.kind == "b" else np.int32
    with np.errstate(over="ignore", invalid="ignore"):
        stored = x if x.dtype == np.uint8 else x.astype(kind)
    bad = ~np.isfinite(stored) if kind is np.float32 else stored != x
    if bad.any():
        value = x[bad][0]
        raise wrong(path, f"x{end} to fit {np.dtype(kind)}", f"{value} and others", _NPZ)
    return stored, y.astype(np.int32)

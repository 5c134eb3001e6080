"""A config to datasets: which files, which of their rows, and what they are normalised with.

An example keeps its place for ever: ``file_row`` counts the rows of the file it came from (for
CIFAR those of data_batch_1..5 one after the other), whatever subset is loaded. Every random choice
ranks the raw output of PCG64, whose stream numpy guarantees, unlike that of its Generator or of
scikit-learn's splitters: one seed chooses the same rows on every machine and version.
"""

import hashlib
import logging
import math
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Integer, Num, Shaped

from dynamics.config import Count, Fraction, Seed, frozen
from dynamics.data import files
from dynamics.data.files import Pair
from dynamics.data.rows import as_inputs, as_labels
from dynamics.types import IGNORED, Dataset

Rows = Int[np.ndarray, "n"]

log = logging.getLogger(__name__)

ENVIRONMENT = "DYNAMICS_DATA"
APART = 1e4  # ratio of the spreads of columns beyond which a table is warned of


class _Layout(NamedTuple):
    names: tuple[str, ...]  # the files, training first
    endings: tuple[str, ...]  # each name ends in one of these
    places: tuple[str, ...]  # below the data folder; the first that holds any of the files is taken
    home: str  # where to fetch them


_IDX = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
_CIFAR10 = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_CVDF = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_ZALANDO = "https://github.com/zalandoresearch/fashion-mnist"
_KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CIFAR10_PLACES = (
    "cifar-10-batches-py",
    "cifar-10-batches-bin",
    "cifar10/cifar-10-batches-py",
    "cifar10/cifar-10-batches-bin",
    ".",
)
_CIFAR100_PLACES = (
    "cifar-100-python",
    "cifar-100-binary",
    "cifar100/cifar-100-python",
    "cifar100/cifar-100-binary",
    ".",
)
_LAYOUTS = {
    "mnist": _Layout(_IDX, ("", ".gz"), ("mnist", "MNIST/raw", "."), _CVDF),
    "fashion_mnist": _Layout(
        _IDX, ("", ".gz"), ("fashion_mnist", "FashionMNIST/raw", "."), _ZALANDO
    ),
    "cifar10": _Layout(_CIFAR10, ("", ".bin"), _CIFAR10_PLACES, _KRIZHEVSKY),
    "cifar100": _Layout(("train", "test"), ("", ".bin"), _CIFAR100_PLACES, _KRIZHEVSKY),
}
# Both have the same file names and shapes; only the content tells a mix-up.
_FIRST_LABELS = {
    "mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
    "fashion_mnist": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5],
}


@frozen
class DataConfig:
    """Which examples are trained and tested on."""

    source: Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "npz"] = "digits"
    """Where the examples come from; digits needs no files, the others the data folder."""
    file: str = ""
    """For npz: the file, relative to the data folder or absolute."""
    num_train: Count | None = None
    """Training examples, a random choice in the order of the file; None: all."""
    num_test: Count | None = None
    """Test examples, likewise; None: all."""
    test_fraction: Fraction = 0.25
    """Part of each class that is tested on where the source has no test set (digits, some npz); of
    an npz file with groups, the part of all examples, in whole groups."""
    split_seed: Seed = 0
    """Seed of the split and of the choices of num_train and num_test."""

    def __post_init__(self):
        if (self.source == "npz") != bool(self.file):
            raise ValueError(
                "DataConfig.file must name a file for source 'npz' and be empty for the others, "
                f"got {self.file!r} with source {self.source!r}"
            )


class Splits(NamedTuple):
    """What a run trains and tests on; both are normalised with the statistics of ``train``."""

    train: Dataset
    test: Dataset
    name: str
    num_classes: int


def load(config: DataConfig, folder: Path | str | None = None) -> Splits:
    """The examples ``config`` names, from ``folder`` or else from ``$DYNAMICS_DATA``.

    x as stored: uint8 [n H W] or [n H W C], for npz any [n ...]. y: int32 [n]. mean and std have
    the rank of one example: [1 1] for grey images, [1 1 C] for colour, [D] for the columns of a
    table [n D], one number for the rest. An npz file with ``group`` [n] beside x and y is split by
    whole groups. Warnings: test examples that are training examples, too, and classes without a
    training example.
    """
    source, seed = config.source, config.split_seed
    train, test, num_classes = _read(config, folder)
    rows = np.arange(len(train[1]))
    if test is None:
        test = train
        groups = _groups(config, folder)
        if groups is None:
            rows, test_rows = split(train[1], config.test_fraction, seed)
        else:
            rows, test_rows = split_groups(groups, config.test_fraction, seed)
    else:
        test_rows = np.arange(len(test[1]))
    rows = rows[_chosen("num_train", config.num_train, len(rows), seed)]
    test_rows = test_rows[_chosen("num_test", config.num_test, len(test_rows), seed)]
    mean, std = moments(_taken(train[0], rows))
    name = Path(config.file).stem if source == "npz" else source
    if train[0].ndim == 4 and recompressed(train[0]):
        name += " (JPEG)"
    splits = Splits(
        train=_dataset(train, rows, mean, std),
        test=_dataset(test, test_rows, mean, std),
        name=name,
        num_classes=num_classes,
    )
    _look_at(splits)
    return splits


def _look_at(splits: Splits) -> None:
    """Warn of what is wrong with the parts, whichever way they were made."""
    known, tested = (set(np.unique(y).tolist()) for y in (splits.train.y, splits.test.y))
    if unseen := sorted(tested - known - {IGNORED}):
        log.warning(
            "%s: classes %s are tested on and have no training example", splits.name, unseen
        )
    elif gaps := splits.num_classes - len(known - {IGNORED}):
        log.warning(
            "%s: %d of its %d classes have no example: number classes from 0 without gaps",
            splits.name,
            gaps,
            splits.num_classes,
        )
    if count := repeated(splits.train.x, splits.test.x):
        log.warning(
            "%s: %d of %d test examples are training examples, too: what is measured on them is "
            "no generalisation",
            splits.name,
            count,
            len(splits.test),
        )


def repeated(train: np.ndarray, test: np.ndarray) -> int:
    """How many examples of ``test`` [m, ...] are, to the bit, among those of ``train`` [n, ...]."""
    known = {hashlib.blake2b(x.tobytes(), digest_size=8).digest() for x in train}
    return sum(hashlib.blake2b(x.tobytes(), digest_size=8).digest() in known for x in test)


def of_arrays(x: Any, y: Any) -> Dataset:
    """Your own arrays [n, ...] as a dataset, used as they are: mean 0, standard deviation 1.

    Labels [n, ...] are integers, classes or ``IGNORED``; or floats: targets [n] or [n, outputs] for
    ``losses.squared_error``, probabilities [n, classes] for ``losses.soft_cross_entropy``. Integer
    inputs [n, T] are tokens. A warning: columns of a table whose spreads differ by 10,000 or more.
    ValueError: different lengths, inputs that are no finite numbers, labels that are none of these.
    """
    x, y = as_inputs(x), np.asarray(y)
    if not (x.ndim and y.ndim) or len(x) != len(y) or not len(x):
        raise ValueError(
            f"x and y must be [n, ...] of as many examples each, got {list(x.shape)} and "
            f"{list(y.shape)}"
        )
    as_labels(y)
    tokens = np.issubdtype(x.dtype, np.integer)
    if tokens and x.ndim != 2:
        raise ValueError(
            f"integers are tokens and must be [n, T], got {x.dtype}{list(x.shape)}: "
            "give images as floats, or through DataConfig"
        )
    empty = np.zeros(0, np.float32)
    one = np.ones((1,) * (x.ndim - 1), np.float32)
    mean, std = (empty, empty) if tokens else (0 * one, one)
    if x.ndim == 2 and not tokens:
        spread = moments(x)[1][(x != x[0]).any(axis=0)]  # of columns that are not constant
        if spread.size and spread.max() >= APART * spread.min():
            log.warning(
                "the columns of x have spreads from %.3g to %.3g and are used as they are: one of "
                "large numbers hides the others, standardise them first",
                spread.min(),
                spread.max(),
            )
    return Dataset(x=x, y=y, mean=mean, std=std)


def _dataset(pair: Pair, rows: Rows, mean: np.ndarray, std: np.ndarray) -> Dataset:
    x, y = (_taken(values, rows) for values in pair)
    return Dataset(x=x, y=y, mean=mean, std=std, file_row=rows.astype(np.int32))


def _taken(values: np.ndarray, rows: Rows) -> np.ndarray:
    return values if len(rows) == len(values) else values[rows]  # no copy of a whole file


def _chosen(field: str, count: int | None, available: int, seed: int) -> Rows:
    """``count`` of ``available`` places, ascending."""
    if count is None:
        return np.arange(available)
    if count > available:
        raise ValueError(f"DataConfig.{field} must be <= {available}, all there are, got {count}")
    return np.sort(_permutation(available, field, seed)[:count])


def _permutation(n: int, purpose: str, seed: int) -> Rows:
    words = np.random.PCG64([int.from_bytes(purpose.encode()), seed]).random_raw(n)
    return np.argsort(words, kind="stable")


def split(
    y: Integer[np.ndarray, "n"], test_fraction: float, seed: int
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "test"]]:
    """Rows to train on and rows to test on, ascending: of each class the same part.

    The test set has ceil(test_fraction n) rows (450 of the 1797 digits for a quarter). Each class
    gets its share rounded down; those with the largest remainders get one more, the lower class
    first.
    """
    if not 0 <= test_fraction <= 1:
        raise ValueError(f"test_fraction must be >= 0 and <= 1, got {test_fraction!r}")
    classes, place, counts = np.unique(y, return_inverse=True, return_counts=True)
    size = math.ceil(round(test_fraction * len(y), 6))
    share, remainder = np.divmod(size * counts, len(y))
    share[np.argsort(-remainder, kind="stable")[: size - share.sum()]] += 1
    empty = np.flatnonzero((share == 0) | (share == counts))
    if len(empty):
        c = empty[0]
        raise ValueError(
            "test_fraction must leave every class examples to train on and to test on, got "
            f"{test_fraction:g}: {share[c]} of the {counts[c]} examples of class {classes[c]} "
            "would be tested on"
        )
    permutation = _permutation(len(y), "split", seed)
    drawn = place[permutation]
    tested = np.zeros(len(y), bool)
    for c, k in enumerate(share):
        tested[permutation[drawn == c][:k]] = True
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def split_groups(
    groups: Shaped[np.ndarray, "n"], test_fraction: float, seed: int
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "test"]]:
    """Rows to train on and rows to test on, ascending: no group [n] has rows in both.

    Groups, in a random order, are tested on while their rows are at most ceil(test_fraction n).
    ValueError: no group can be left out, or none is left to train on.
    """
    names, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
    size = math.ceil(round(test_fraction * len(groups), 6))
    chosen, total = np.zeros(len(names), bool), 0
    for group in _permutation(len(names), "groups", seed):
        if total + counts[group] <= size:
            chosen[group], total = True, total + counts[group]
    if not chosen.any() or chosen.all():
        raise ValueError(
            f"test_fraction must leave whole groups to train on and to test on, got "
            f"{test_fraction:g} of {len(groups)} examples in groups of {counts.min()} to "
            f"{counts.max()}"
        )
    tested = chosen[place]
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def moments(
    x: Num[np.ndarray, "n ..."],
) -> tuple[Float32[np.ndarray, "..."], Float32[np.ndarray, "..."]]:
    """Mean and standard deviation with the rank of one example; a std of 0 becomes 1.

    Per channel for x [n H W C], per column of a table [n D], over everything otherwise; in float64,
    a block at a time.
    """
    last = x.ndim in (2, 4)
    axes = tuple(range(x.ndim - last))
    count = x.size // (x.shape[-1] if last else 1)
    blocks = [x[i : i + 1024] for i in range(0, len(x), 1024)]
    total = sum(b.sum(axes, dtype=np.float64, keepdims=True) for b in blocks)
    mean = np.asarray(total / count)
    squares = sum(np.square(b - mean).sum(axes, keepdims=True) for b in blocks)
    std = np.sqrt(squares / count)
    std = np.where(std > 1e-12 * np.abs(mean), std, 1.0)
    return mean[0].astype(np.float32), std[0].astype(np.float32)


def recompressed(x: Num[np.ndarray, "n h w c"]) -> bool:
    """Whether colour images show the 8 x 8 blocks of JPEG: another dataset than its original.

    Differences of neighbouring pixels across the edges of blocks exceed those beside the edges by
    more than 3 %, over the first 2,000 images (7 % at quality 75; without blocks they agree).
    """
    if x.shape[0] < 100 or min(x.shape[1:3]) < 24 or x.dtype != np.uint8:
        return False
    grey = x[:2000].astype(np.float32).mean(axis=3)
    rises = []
    for axis in (1, 2):
        step = np.abs(np.diff(grey, axis=axis)).mean(axis=(0, 3 - axis))
        edges = np.arange(7, len(step) - 1, 8)
        rises.append(
            step[edges].sum() / np.maximum((step[edges - 1] + step[edges + 1]).sum() / 2, 1e-9)
        )
    return bool(np.mean(rises) > 1.03)


def digest(dataset: Dataset) -> str:
    """128 bits in hexadecimal that name what x, y and file_row hold: a hash of the dataset."""
    out = hashlib.blake2b(digest_size=16)
    held = {"x": dataset.x, "y": dataset.y, "index": dataset.file_row}  # index: its name of old
    for name, given in held.items():
        values = np.ascontiguousarray(given)
        out.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        out.update(values.data)
    return out.hexdigest()


def locate(file: Path | str, folder: Path | str | None, example: str) -> Path:
    """``file`` if absolute, else its place in the data folder, which must hold ``example``."""
    if Path(file).is_absolute():
        return Path(file)
    chosen = folder or os.environ.get(ENVIRONMENT)
    remedy = f"set {ENVIRONMENT} or --data-folder to a folder that holds {example}"
    if not chosen:
        remedy += "; without one there is only source 'digits'"
        raise files.wrong("data folder", "one to read from", "none set", remedy)
    if not Path(chosen).is_dir():
        found = "a file" if Path(chosen).exists() else "nothing"
        raise files.wrong(chosen, "the data folder", found, remedy)
    return Path(chosen) / file


def _read(config: DataConfig, folder: Path | str | None) -> tuple[Pair, Pair | None, int]:
    """Training pair, test pair or None, number of classes."""
    source = config.source
    if source == "digits":
        return _digits(), None, 10
    if source == "npz":
        train, test = files.read_npz(locate(config.file, folder, config.file))
        num_classes = 1 + max(int(pair[1].max()) for pair in (train, test or train))
        return train, test, num_classes
    paths = _found(source, folder)
    if source in ("mnist", "fashion_mnist"):
        return _idx_pair(source, *paths[:2]), _idx_pair(source, *paths[2:]), 10
    train, test = (_cifar(source, part) for part in (paths[:-1], paths[-1:]))
    return train, test, 10 if source == "cifar10" else 100


def _groups(config: DataConfig, folder: Path | str | None) -> np.ndarray | None:
    """The groups of an npz file, None where there are none."""
    if config.source != "npz":
        return None
    return files.read_groups(locate(config.file, folder, config.file))


def _cifar(source: str, paths: list[Path]) -> Pair:
    ten = source == "cifar10"
    if paths[0].suffix == ".bin":
        return files.read_cifar_binary(paths, 1 if ten else 2)
    return files.read_cifar_pickle(paths, "labels" if ten else "fine_labels")


def _digits() -> Pair:
    """The 1797 digits of 8 x 8 pixels from 0 to 16 that come with scikit-learn."""
    from sklearn.datasets import load_digits  # slow to import

    x, y = load_digits(return_X_y=True)
    return np.asarray(x).reshape(-1, 8, 8).astype(np.uint8), np.asarray(y).astype(np.int32)


def _found(source: str, folder: Path | str | None) -> list[Path]:
    """The source's files, all from the first place that holds any of them."""
    names, endings, places, home = _LAYOUTS[source]
    zipped = f"{places[0]}/{names[0]}[.gz]"
    example = zipped if ".gz" in endings else f"{places[0]}/ or {places[1]}/"
    root = locate("", folder, f"{example} (from {home})")
    remedy = f"set {ENVIRONMENT} or --data-folder to a folder that holds {example} (from {home})"
    for place in places:
        # train-images.idx3-ubyte is how some mirrors spell train-images-idx3-ubyte
        spelled = [[n, n.replace("-idx", ".idx")] for n in names]
        options = [[root / place / (n + e) for n in pair for e in endings] for pair in spelled]
        present = [[path for path in paths if path.is_file()] for paths in options]
        if not any(present):
            continue
        for name, paths in zip(names, present, strict=True):
            if not paths:
                some = next(paths[0].name for paths in present if paths)
                either = " or ".join(name + e for e in endings)
                raise files.wrong(root / place, f"{either} beside {some}", "none", remedy)
        return [paths[0] for paths in present]
    expected = f"the files of {source} ({names[0]}, ...; {' or '.join(endings[1:])} too)"
    raise files.wrong(root, expected, f"none in {', '.join(places)}", remedy)


def _idx_pair(source: str, images: Path, labels: Path) -> Pair:
    x, y = files.read_idx(images, 3), files.read_idx(labels, 1)
    remedy = f"take both from one copy of {source}"
    if x.dtype != np.uint8 or y.dtype != np.uint8:
        found = f"{x.dtype} images and {y.dtype} labels"
        raise files.wrong(images, "uint8 images and uint8 labels", found, remedy)
    if len(x) != len(y):
        expected = f"{len(x)} labels, as many as images in {images.name}"
        raise files.wrong(labels, expected, f"{len(y)}", remedy)
    if y.max() > 9:
        raise files.wrong(labels, "labels from 0 to 9", f"{y.max()}", remedy)
    for other, first in _FIRST_LABELS.items():
        if other != source and y[:10].tolist() == first:
            expected = f"the labels of {source}"
            own = [_LAYOUTS[name].places[0] for name in (source, other)]
            remedy = f"put each in a folder of its own: {own[0]}/ and {own[1]}/"
            raise files.wrong(labels, expected, f"those of {other} ({first}, ...)", remedy)
    return x, y.astype(np.int32)

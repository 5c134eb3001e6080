"""From a config to datasets: which rows, which files, and what is said when they are not there."""

import gzip
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_files import idx_bytes, npz, pixels, write

from dynamics.config import fingerprint
from dynamics.data import DataConfig, DataError, load
from dynamics.data.sources import digest, moments, recompressed, split

FOLDER = os.environ.get("DYNAMICS_DATA")
IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv("DYNAMICS_DATA", raising=False)


@pytest.fixture(scope="module")
def digits():
    return load(DataConfig())


@pytest.fixture(scope="module")
def original():
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def mnist_like(folder, *, zipped=(), first=0):
    """Six images and three; ``first`` is the label the training set begins with."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 5), dtype=np.uint8)
    labels = ((np.arange(9) + first) % 10).astype(np.uint8)
    for name, values in zip(IDX, (images[:6], labels[:6], images[6:], labels[6:]), strict=True):
        content = idx_bytes(values)
        if name in zipped:
            write(folder / f"{name}.gz", gzip.compress(content))
        else:
            write(folder / name, content)
    return images, labels


# ---- digits -----------------------------------------------------------------------------------


def test_digits(digits, original):
    x, y = original
    assert digits.name == "digits" and digits.num_classes == 10
    assert len(digits.train) == 1347 and len(digits.test) == 450
    for part in (digits.train, digits.test):
        assert part.x.dtype == np.uint8 and part.x.shape[1:] == (8, 8)
        assert part.y.dtype == part.file_row.dtype == np.int32
        assert part.mean.shape == part.std.shape == (1, 1)
        assert part.mean.dtype == part.std.dtype == np.float32
        assert (np.diff(part.file_row) > 0).all()  # the order of the file
        np.testing.assert_array_equal(part.x.reshape(-1, 64), x[part.file_row])
        np.testing.assert_array_equal(part.y, y[part.file_row])
    both = np.concatenate([digits.train.file_row, digits.test.file_row])
    np.testing.assert_array_equal(np.sort(both), np.arange(1797))


def test_digits_are_split_in_proportion(digits, original):
    counts, tested = np.bincount(original[1]), np.bincount(digits.test.y)
    assert (np.abs(tested - counts * 450 / 1797) < 1).all()


def test_digits_are_normalised_with_what_is_trained_on(digits):
    for splits in (digits, load(DataConfig(num_train=100))):
        x = splits.train.x.astype(np.float64)
        np.testing.assert_allclose(splits.train.mean, [[x.mean()]], rtol=1e-6)
        np.testing.assert_allclose(splits.train.std, [[x.std()]], rtol=1e-6)
        assert splits.test.mean is splits.train.mean and splits.test.std is splits.train.std


def test_digits_are_these_on_every_machine(digits):
    """If this fails, the default data changed: every stored result on digits is of other data."""
    assert digest(digits.train) == "8cc2ad6112f7c49fa5bd012964ecb3fb"
    assert digest(digits.test) == "fb68d2b82c9406defca0cd2cada80792"


def test_a_digest_sees_values_order_shape_and_type(digits):
    data = digits.train
    changed = [
        data.replace(x=data.x.reshape(-1, 64)),
        data.replace(x=data.x.astype(np.int32)),
        data.replace(y=data.y[::-1]),
        data.replace(file_row=data.file_row + 1),
    ]
    assert len({digest(d) for d in (data, *changed)}) == 5
    assert digest(data.replace(x=np.asfortranarray(data.x))) == digest(data)


# ---- subsets and splits -------------------------------------------------------------------------


def test_subsets_keep_the_order_and_are_nested(digits):
    small, large = (load(DataConfig(num_train=n, num_test=n // 2)) for n in (100, 300))
    for part, size in (("train", 100), ("test", 50)):
        a, b, whole = (getattr(s, part).file_row for s in (small, large, digits))
        assert len(a) == size and (np.diff(a) > 0).all()
        assert set(a) < set(b) < set(whole)
    other = load(DataConfig(num_train=100, split_seed=1))
    assert set(other.train.file_row) != set(small.train.file_row)
    same = load(DataConfig(num_train=1347, num_test=450))
    assert digest(same.train) == digest(digits.train)
    assert digest(same.test) == digest(digits.test)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    counts=st.lists(st.integers(4, 40), min_size=1, max_size=8),
    fraction=st.floats(0.25, 0.75),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_split_is_stratified_and_a_partition(counts, fraction, seed):
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    train, test = split(y, fraction, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(len(y)))
    assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()
    assert -1e-6 < len(test) - fraction * len(y) < 1  # the ceiling
    share = np.bincount(y[test], minlength=len(counts))
    assert (np.abs(share - np.array(counts) * len(test) / len(y)) < 1).all()
    again = split(y, fraction, seed)
    np.testing.assert_array_equal(again[1], test)


def test_every_row_is_equally_likely_to_be_tested_on():
    y, trials = np.repeat([0, 1], [30, 10]), 1000
    counts = np.zeros(40)
    for seed in range(trials):
        counts[split(y, 0.3, seed)[1]] += 1
    assert (np.abs(counts / trials - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / trials)).all()


def test_a_fraction_that_is_a_whole_number_of_rows_is_exact():
    for fraction, size in ((0.07, 7), (0.1, 10), (0.29, 29), (0.57, 57)):  # 0.07 * 100 > 7
        assert len(split(np.arange(100) % 2, fraction, 0)[1]) == size


@pytest.mark.parametrize(
    "fraction, message",
    [
        (0.001, "got 0.001: 0 of the 178 examples of class 0 would be tested on"),
        (0.0, "got 0: 0 of the 178 examples of class 0"),
        (1.0, "got 1: 178 of the 178 examples of class 0"),
    ],
)
def test_a_split_leaves_no_class_empty(fraction, message):
    with pytest.raises(ValueError, match=message):
        load(DataConfig(test_fraction=fraction))


def test_split_checks_its_fraction():
    with pytest.raises(ValueError, match="test_fraction must be >= 0 and <= 1, got 1.5"):
        split(np.array([0, 1]), 1.5, 0)


@pytest.mark.parametrize("shape", [(3000, 2, 3), (3000, 2, 3, 3), (3000, 5), (2, 3)])
def test_moments(shape):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    axes = {4: (0, 1, 2), 2: (0,)}.get(len(shape))  # per channel, per column of a table
    mean, std = moments(x)
    assert mean.ndim == len(shape) - 1
    np.testing.assert_allclose(mean.ravel(), np.atleast_1d(x.mean(axes)), rtol=1e-6)
    np.testing.assert_allclose(std.ravel(), np.atleast_1d(x.std(axes)), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 7.0, -1e20])
def test_constant_data_have_std_1(value):
    x = np.full((3000, 3, 3, 2), value, np.float32)
    x[..., 1] = np.arange(3000)[:, None, None]
    mean, std = moments(x)
    assert std[0, 0, 0] == 1 and std[0, 0, 1] > 1
    np.testing.assert_allclose(mean[0, 0, 0], value, rtol=1e-6)


# ---- where files are found ----------------------------------------------------------------------


@pytest.mark.parametrize("place", ["mnist", "MNIST/raw", "."])
@pytest.mark.parametrize("zipped", [(), IDX, IDX[1:3]])
def test_mnist_is_found(tmp_path, monkeypatch, place, zipped):
    images, labels = mnist_like(tmp_path / place, zipped=zipped)
    monkeypatch.setenv("DYNAMICS_DATA", str(tmp_path))
    splits = load(DataConfig(source="mnist"))
    np.testing.assert_array_equal(splits.train.x, images[:6])
    np.testing.assert_array_equal(splits.test.x, images[6:])
    np.testing.assert_array_equal(splits.train.y, labels[:6])
    assert splits.test.file_row.tolist() == [0, 1, 2]
    assert splits.name == "mnist" and splits.num_classes == 10
    subset = load(DataConfig(source="mnist", num_train=3), tmp_path).train
    np.testing.assert_array_equal(subset.x, images[subset.file_row])


def test_other_spellings(tmp_path):
    images, _ = mnist_like(tmp_path / "FashionMNIST/raw")
    for path in (tmp_path / "FashionMNIST/raw").iterdir():
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    splits = load(DataConfig(source="fashion_mnist"), tmp_path)
    np.testing.assert_array_equal(splits.train.x, images[:6])


def cifar(folder, source, layout, n=2):
    """Files with n images each; returns the labels of training and test set."""
    ten = source == "cifar10"
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    folder.mkdir(parents=True)
    all_labels = []
    for i, name in enumerate(names):
        flat, labels = pixels(n, i), [(i * n + k) % (10 if ten else 100) for k in range(n)]
        if layout in ("py", "python"):
            key = b"labels" if ten else b"fine_labels"
            extra = {} if ten else {b"coarse_labels": [0] * n}
            write(folder / name, pickle.dumps({b"data": flat, key: labels} | extra, 2))
        else:
            columns = [np.zeros(n, np.uint8)] * (not ten) + [np.array(labels, np.uint8)]
            records = np.concatenate([np.stack(columns, 1), flat], 1)
            write(folder / f"{name}.bin", records.tobytes())
        all_labels.append(labels)
    return sum(all_labels[:-1], []), all_labels[-1]


@pytest.mark.parametrize("above", ["", "cifar10"])
@pytest.mark.parametrize("layout", ["py", "bin"])
def test_cifar10_is_found(tmp_path, above, layout):
    folder = tmp_path / above / f"cifar-10-batches-{layout}"
    train, test = cifar(folder, "cifar10", layout)
    for root in (tmp_path, folder):
        splits = load(DataConfig(source="cifar10"), root)
        assert splits.train.y.tolist() == train and splits.test.y.tolist() == test
        assert splits.train.x.shape == (10, 32, 32, 3) and splits.num_classes == 10
        assert splits.train.mean.shape == splits.train.std.shape == (1, 1, 3)
        assert splits.train.file_row.tolist() == list(range(10))
        np.testing.assert_array_equal(splits.train.x[2, 0, :, 1], pixels(2, 1)[0, 1024:1056])


@pytest.mark.parametrize("above", ["", "cifar100"])
@pytest.mark.parametrize("layout", ["python", "binary"])
def test_cifar100_is_found(tmp_path, above, layout):
    train, test = cifar(tmp_path / above / f"cifar-100-{layout}", "cifar100", layout, n=60)
    splits = load(DataConfig(source="cifar100", num_test=59), tmp_path)
    assert splits.train.y.tolist() == train and splits.num_classes == 100
    assert len(splits.test) == 59 and set(splits.test.y) < set(test)


def test_both_layouts_hold_the_same(tmp_path):
    for layout in ("py", "bin"):
        cifar(tmp_path / layout, "cifar10", layout)
    one, two = (load(DataConfig(source="cifar10"), tmp_path / layout) for layout in ("py", "bin"))
    assert digest(one.train) == digest(two.train) and digest(one.test) == digest(two.test)


def test_npz(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 4
    path = npz(tmp_path / "mine.npz", x=x, y=y)
    splits = load(DataConfig(source="npz", file=str(path)))  # absolute: no data folder needed
    assert splits.name == "mine" and splits.num_classes == 4
    assert len(splits.train) == 30 and len(splits.test) == 10
    np.testing.assert_array_equal(splits.test.x, x[splits.test.file_row].astype(np.float32))
    assert splits.train.mean.shape == (3,)  # one for each column
    npz(tmp_path / "sub.npz", x_train=x, y_train=y, x_test=x[:5], y_test=y[:5] + 2)
    splits = load(DataConfig(source="npz", file="sub.npz", test_fraction=0.0), tmp_path)
    assert len(splits.train) == 40 and len(splits.test) == 5 and splits.num_classes == 6


# ---- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["mnist", "fashion_mnist", "cifar10", "cifar100", "npz"])
def test_without_a_data_folder_only_digits_are_there(source):
    config = DataConfig(source=source, file="a.npz" if source == "npz" else "")
    message = "data folder: .* found none set; set DYNAMICS_DATA or --data-folder to a folder"
    with pytest.raises(DataError, match=message) as error:
        load(config)
    assert "only source 'digits'" in str(error.value)


def test_a_data_folder_that_is_none(tmp_path):
    with pytest.raises(DataError, match="nowhere: expected the data folder, found nothing; set"):
        load(DataConfig(source="mnist"), tmp_path / "nowhere")
    path = write(tmp_path / "file", b"")
    with pytest.raises(DataError, match="file: expected the data folder, found a file; set DYN"):
        load(DataConfig(source="mnist"), path)


@pytest.mark.parametrize(
    "source, message",
    [
        (
            "mnist",
            r"files of mnist \(train-images.* none in mnist, MNIST/raw, .; set .* holds mnist",
        ),
        ("cifar10", "files of cifar10 .* holds cifar-10-batches-py/ or cifar-10-batches-bin/"),
        ("cifar100", "files of cifar100 .* .from https://www.cs.toronto.edu/~kriz/cifar.html"),
    ],
)
def test_an_empty_data_folder(tmp_path, source, message):
    with pytest.raises(DataError, match=message):
        load(DataConfig(source=source), tmp_path)


def test_one_file_missing(tmp_path):
    mnist_like(tmp_path)
    (tmp_path / IDX[2]).unlink()
    message = f"expected {IDX[2]} or {IDX[2]}.gz beside {IDX[0]}, found none; set DYNAMICS_DATA"
    with pytest.raises(DataError, match=message):
        load(DataConfig(source="mnist"), tmp_path)
    cifar(tmp_path / "py", "cifar10", "py")
    (tmp_path / "py/data_batch_4").unlink()
    with pytest.raises(DataError, match="expected data_batch_4 or data_batch_4.bin beside data_b"):
        load(DataConfig(source="cifar10"), tmp_path / "py")


def test_images_and_labels_that_do_not_belong_together(tmp_path):
    mnist_like(tmp_path)
    write(tmp_path / IDX[1], idx_bytes(np.zeros(5, np.uint8)))
    with pytest.raises(DataError, match="expected 6 labels, as many as images in .*, found 5"):
        load(DataConfig(source="mnist"), tmp_path)
    write(tmp_path / IDX[1], idx_bytes(np.full(6, 26, np.uint8)))
    with pytest.raises(DataError, match="expected labels from 0 to 9, found 26"):
        load(DataConfig(source="mnist"), tmp_path)
    write(tmp_path / IDX[0], idx_bytes(np.zeros((6, 4, 5), ">f4"), 13))
    with pytest.raises(DataError, match="uint8 images and uint8 labels, found float32 images"):
        load(DataConfig(source="mnist"), tmp_path)


def test_one_dataset_is_not_taken_for_another(tmp_path):
    first = {
        "mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
        "fashion_mnist": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5],
    }
    for source, other in (("mnist", "fashion_mnist"), ("fashion_mnist", "mnist")):
        for i in (0, 2):
            write(tmp_path / IDX[i], idx_bytes(np.zeros((10, 2, 2), np.uint8)))
            write(tmp_path / IDX[i + 1], idx_bytes(np.array(first[other], np.uint8)))
        with pytest.raises(DataError, match=f"labels of {source}, found those of {other} .* own: "):
            load(DataConfig(source=source), tmp_path)
        load(DataConfig(source=other), tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(source="mnst"),
            r"DataConfig.source must be one of .* got 'mnst' \(perhaps 'mnist'\)",
        ),
        (dict(source="npz"), "DataConfig.file must name a file for source 'npz' .* got ''"),
        (dict(file="a.npz"), "be empty for the others, got 'a.npz' with source 'digits'"),
        (dict(num_train=0), "DataConfig.num_train must be >= 1, got 0"),
        (dict(test_fraction=1.5), "DataConfig.test_fraction must be >= 0 and <= 1, got 1.5"),
        (dict(split_seed=-1), "DataConfig.split_seed must be >= 0"),
        (dict(num_train=1348), "DataConfig.num_train must be <= 1347, all there are, got 1348"),
        (dict(num_test=451), "DataConfig.num_test must be <= 450, all there are, got 451"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        load(DataConfig(**fields))


def test_the_config_has_a_fingerprint():
    assert fingerprint(DataConfig()) != fingerprint(DataConfig(num_train=5))


# ---- the real thing -----------------------------------------------------------------------------


@pytest.mark.skipif(not FOLDER, reason="DYNAMICS_DATA is not set")
def test_mnist():
    splits = load(DataConfig(source="mnist"), FOLDER)
    assert splits.train.x.shape == (60_000, 28, 28) and splits.test.x.shape == (10_000, 28, 28)
    assert splits.train.y[:5].tolist() == [5, 0, 4, 1, 9]
    assert splits.test.y[:5].tolist() == [7, 2, 1, 0, 4]
    np.testing.assert_allclose(splits.train.mean / 255, [[0.1307]], atol=5e-5)
    np.testing.assert_allclose(splits.train.std / 255, [[0.3081]], atol=5e-5)
    packed = Path(str(FOLDER)) / "mnist" / f"{IDX[0]}.gz"
    if packed.exists():
        unpacked = gzip.decompress(packed.read_bytes())
        assert hashlib.md5(unpacked).hexdigest() == "6bbc9ace898e44ae57da46a324031adb"
        assert unpacked[16:] == splits.train.x.tobytes()


def test_images_that_went_through_jpeg_are_known_by_their_blocks() -> None:
    """Smooth noise as it is, and with a step at every edge of the 8 x 8 blocks."""
    generator = np.random.default_rng(0)
    smooth = generator.normal(0, 10, (300, 32, 32, 3)).cumsum(axis=1).cumsum(axis=2) / 4 + 128
    blocks = generator.normal(0, 20, (300, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    as_stored = lambda x: np.clip(x, 0, 255).astype(np.uint8)  # noqa: E731
    assert not recompressed(as_stored(smooth))
    assert recompressed(as_stored(smooth + blocks))
    assert not recompressed(as_stored(smooth + np.roll(blocks, 3, axis=(1, 2))))
    assert not recompressed(as_stored(smooth)[:10])  # too few to tell

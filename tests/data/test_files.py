"""Each format written by the test and read back; each way a file can be bad, and what is said."""

import gzip
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamics.data import DataError, files
from dynamics.data.files import read_cifar_binary, read_cifar_pickle, read_idx, read_npz

FEW = settings(derandomize=True, deadline=None, max_examples=200)


def idx_bytes(values, type_byte=8):
    header = bytes([0, 0, type_byte, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


def pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


def hwc(flat):
    """The slow way from CIFAR's planes to images."""
    images = np.zeros((len(flat), 32, 32, 3), np.uint8)
    for c in range(3):
        for row in range(32):
            start = 1024 * c + 32 * row
            images[:, row, :, c] = flat[:, start : start + 32]
    return images


def write(path, content):
    path.write_bytes(content)
    return path


def batch(n=4, **changes):
    """The dict of one of CIFAR-10's Python batches."""
    values = {b"batch_label": b"training batch 1 of 5", b"data": pixels(n)}
    values |= {b"labels": [i % 10 for i in range(n)], b"filenames": [b"a.png"] * n}
    return values | {key.encode(): value for key, value in changes.items()}


# ---- idx -----------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_round_trip(tmp_path, zipped):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4), dtype=np.uint8)
    content = idx_bytes(images)
    path = write(tmp_path / "a", gzip.compress(content) if zipped else content)
    np.testing.assert_array_equal(read_idx(path, 3), images)
    path = write(tmp_path / "a.gz", gzip.compress(content))
    np.testing.assert_array_equal(read_idx(path, 3), images)


@pytest.mark.parametrize(
    "type_byte, dtype", [(9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")]
)
def test_idx_of_other_types_comes_in_native_order(tmp_path, type_byte, dtype):
    values = np.array([-100, 0, 7, 101])
    read = read_idx(write(tmp_path / "a", idx_bytes(values.astype(dtype), type_byte)), 1)
    np.testing.assert_array_equal(read, values)
    assert read.dtype.isnative and read.dtype.itemsize == np.dtype(dtype).itemsize


IMAGES = idx_bytes(np.zeros((3, 2, 2), np.uint8))
LABELS = idx_bytes(np.zeros(3, np.uint8))
BAD_IDX = {
    "truncated": (IMAGES[:-1], "expected 28 bytes .a header of 16, 3 x 2 x 2 .*found 27 bytes"),
    "trailing": (IMAGES + b"ab", "expected 28 bytes .*found 30 bytes"),
    "header cut": (IMAGES[:9], "expected a header of 16 bytes, found 9 bytes"),
    "three bytes": (b"\0\0\x08", "expected an idx file .*found 3 bytes that begin 00 00 08"),
    "a web page": (b"<!DOCTYPE html>", "bytes 00 00 TYPE RANK.*begin 3c 21 44 4f .*DOCTYPE"),
    "unknown type": (b"\0\0\x0a\x03" + bytes(24), "expected an idx file .*begin 00 00 0a 03"),
    "labels": (LABELS, r"expected rank 3 \(images\), found rank 1 \(labels\)"),
    "no images": (idx_bytes(np.zeros((0, 2, 2), np.uint8)), "at least one value, found .* 0 x 2"),
    "little-endian": (
        b"\0\0\x08\x03" + struct.pack("<3I", 3, 2, 2) + bytes(12),
        "50331648 x 33554432 x 33554432 values of 1.*found 28 bytes",
    ),
    "empty": (b"", "found 0 bytes"),
    "cut gzip": (gzip.compress(IMAGES)[:-9], "expected an intact gzip file, found .* do not unzip"),
    "flipped gzip": (gzip.compress(IMAGES)[:-8] + bytes(8), "intact gzip file, found .*CRC"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx(tmp_path, case):
    content, message = BAD_IDX[case]
    path = write(tmp_path / "train-images", content)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path, 3)
    assert str(error.value).startswith(f"{path}: expected ")
    assert "fetch the dataset's four files again" in str(error.value)


def test_a_gz_that_is_none_and_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match="expected a gzip file .bytes 1f 8b., found 28 bytes"):
        read_idx(write(tmp_path / "a.gz", IMAGES), 3)
    with pytest.raises(DataError, match="nowhere: expected a file, found none"):
        read_idx(tmp_path / "nowhere", 3)
    with pytest.raises(DataError, match="expected a readable file, found 'Is a directory'"):
        read_idx(tmp_path, 3)


def test_images_given_for_labels(tmp_path):
    with pytest.raises(DataError, match=r"expected rank 1 \(labels\), found rank 3 \(images\)"):
        read_idx(write(tmp_path / "a", IMAGES), 1)


# ---- CIFAR, binary --------------------------------------------------------------------------


@pytest.mark.parametrize("label_bytes, top", [(1, 9), (2, 99)])
def test_binary_round_trip(tmp_path, label_bytes, top):
    paths, all_labels = [], []
    for i in range(2):
        labels = np.array([0, top, 3], np.uint8)
        coarse = [np.full((3, 1), 19, np.uint8)] * (label_bytes - 1)
        records = np.concatenate([*coarse, labels[:, None], pixels(3, i)], axis=1)
        paths.append(write(tmp_path / f"{i}.bin", records.tobytes()))
        all_labels += labels.tolist()
    x, y = read_cifar_binary(paths, label_bytes)
    np.testing.assert_array_equal(x, hwc(np.concatenate([pixels(3, 0), pixels(3, 1)])))
    assert y.tolist() == all_labels and y.dtype == np.int32 and x.flags.c_contiguous


def test_bad_binary(tmp_path):
    def read(*contents, label_bytes=1):
        paths = [write(tmp_path / f"{i}.bin", content) for i, content in enumerate(contents)]
        return read_cifar_binary(paths, label_bytes)

    with pytest.raises(DataError, match=r"records of 3073 bytes, found 3072 bytes \(0 records and"):
        read(bytes(3072))
    with pytest.raises(DataError, match=r"found 6147 bytes \(2 records and 1 bytes\)"):
        read(bytes(6147))
    with pytest.raises(DataError, match="records of 3074 bytes"):
        read(bytes(3073), label_bytes=2)
    with pytest.raises(DataError, match="labels from 0 to 9, found 10 in record 1"):
        read(bytes(3073) + b"\x0a" + bytes(3072))
    with pytest.raises(DataError, match="1.bin: expected 2 images, as many as in 0.bin, found 1"):
        read(bytes(6146), bytes(3073))
    with pytest.raises(DataError, match="found 0 bytes; unpack cifar-10-binary.tar.gz"):
        read(b"")


# ---- CIFAR, pickles -------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_pickle_round_trip(tmp_path, protocol):
    paths = [tmp_path / "1", tmp_path / "2"]
    for i, path in enumerate(paths):
        write(path, pickle.dumps(batch(4, data=pixels(4, i)), protocol))
    x, y = read_cifar_pickle(paths, "labels")
    np.testing.assert_array_equal(x, hwc(np.concatenate([pixels(4, 0), pixels(4, 1)])))
    assert y.tolist() == [0, 1, 2, 3] * 2 and y.dtype == np.int32 and x.flags.c_contiguous


def test_pickle_with_text_keys_array_labels_and_fortran_order(tmp_path):
    values = {"data": np.asfortranarray(pixels(3)), "fine_labels": np.array([99, 0, 5], ">i8")}
    path = write(tmp_path / "train", pickle.dumps(values | {"coarse_labels": [1, 2, 3]}, 4))
    x, y = read_cifar_pickle([path], "fine_labels")
    np.testing.assert_array_equal(x, hwc(pixels(3)))
    assert y.tolist() == [99, 0, 5]


def python_2_pickle(n):
    """The opcodes that Python 2's cPickle and a numpy of 2009 wrote, as in the official files."""

    def short(text):
        return b"U" + bytes([len(text)]) + text

    data = pixels(n).tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + short(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + short(b"u1") + b"K\0K\1tR"
    dtype += b"(K\3" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    array += b"(K\1(K" + bytes([n]) + b"M\0\x0ct" + dtype
    array += b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"
    labels = b"(" + b"".join(b"K" + bytes([i]) for i in range(n)) + b"l"
    return b"\x80\2(" + short(b"data") + array + short(b"labels") + labels + b"d."


def test_what_python_2_wrote_reads_without_a_warning(tmp_path):
    x, y = read_cifar_pickle([write(tmp_path / "a", python_2_pickle(3))], "labels")
    np.testing.assert_array_equal(x, hwc(pixels(3)))
    assert y.tolist() == [0, 1, 2]


class Shell:
    """Unpickled by an ordinary unpickler, this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, protocol):
    trace = tmp_path / "trace"
    content = pickle.dumps(batch(labels=Shell(trace)), protocol)
    message = r"found the global (posix|nt)\.system, which is refused and was not called"
    with pytest.raises(DataError, match=message):
        read_cifar_pickle([write(tmp_path / "a", content)], "labels")
    assert not trace.exists()
    pickle.loads(content)
    assert trace.exists()  # the attack is real


@pytest.mark.parametrize(
    "content, message",
    [
        (b"cbuiltins\neval\n(V1+1\ntR.", "builtins.eval"),
        (b"cbuiltins\ngetattr\n(cnumpy\nndarray\nVtofile\ntR.", "builtins.getattr"),
        (b"cnumpy\nload\n(Vfile\ntR.", "numpy.load"),
        (b"\x80\4\x8c\x05numpy\x8c\x0dndarray.dumps\x93.", "numpy.ndarray.dumps"),
        (b"cnumpy\nndarray\n(K\1tR.", "not callable"),
        (b"cnumpy\ndtype\n(VO8\ntR.", "expected arrays of numbers, found dtype 'O8'"),
        (b"cnumpy\ndtype\n(Vi4,O\ntR.", "expected arrays of numbers, found dtype 'i4,O'"),
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "bytes kept as latin1, found 'rot13'"),
    ],
)
def test_pickles_reach_no_other_name(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_cifar_pickle([write(tmp_path / "a", content)], "labels")


def test_pickles_change_nothing_that_stays(tmp_path):
    content = b"c_codecs\nencode\n}Vx\nVy\nsb."  # encode.__dict__.update(x="y")
    with pytest.raises(DataError, match="expected a pickled dict, found a function"):
        read_cifar_pickle([write(tmp_path / "a", content)], "labels")
    assert "x" not in vars(files._Unpickler._bytes)


OBJECTS = np.array([None, {}], object)
BAD_BATCH = {
    "object array": (batch(data=OBJECTS), "expected arrays of numbers, found dtype 'O8'"),
    "text array": (batch(data=np.array(["a"])), "expected arrays of numbers, found dtype 'U1'"),
    "floats": (batch(data=np.zeros((4, 3072))), "data to be an array of uint8, found float64"),
    "a list": (batch(data=[1, 2]), "data to be an array of uint8, found list"),
    "grey": (batch(data=pixels(4)[:, :1024]), r"shape \(n, 3072\), found \(4, 1024\)"),
    "images": (batch(data=hwc(pixels(4))), r"shape \(n, 3072\), found \(4, 32, 32, 3\)"),
    "no images": (batch(data=pixels(4)[:0]), r"shape \(n, 3072\), found \(0, 3072\)"),
    "counts": (batch(labels=[1, 2, 3]), "a list of 4 labels, found a list of 3"),
    "text": (batch(labels=b"1234"), "a list of 4 labels, found a bytes"),
    "float labels": (batch(labels=[0, 1, 2.5, 3]), "labels to be small integers, found 2.5"),
    "bool labels": (batch(labels=[0, 1, True, 3]), "labels to be small integers, found True"),
    "huge labels": (batch(labels=[0, 1, 2**70, 3]), "labels to be small integers, found 1180"),
    "out of range": (batch(labels=[0, 1, 2, 10]), "labels from 0 to 9, found 10 in record 3"),
    "negative": (batch(labels=[0, -1, 2, 3]), "labels from 0 to 9, found -1 in record 1"),
    "CIFAR-100": (
        {b"data": pixels(2), b"fine_labels": [1, 2]},
        r"keys 'data' and 'labels', found \['data', 'fine_labels'\]",
    ),
    "not a dict": ([1, 2], "expected a pickled dict, found a list"),
}


@pytest.mark.parametrize("case", BAD_BATCH)
def test_bad_batches(tmp_path, case):
    values, message = BAD_BATCH[case]
    path = write(tmp_path / "data_batch_1", pickle.dumps(values, 4))
    with pytest.raises(DataError, match=message) as error:
        read_cifar_pickle([path], "labels")
    assert str(error.value).startswith(f"{path}: expected ")
    assert "unpack cifar-10-python.tar.gz" in str(error.value)


def test_damaged_pickles(tmp_path):
    whole = pickle.dumps(batch(), 2)
    with pytest.raises(DataError, match="an intact pickle, found .* bytes that do not unpickle"):
        read_cifar_pickle([write(tmp_path / "a", whole[:-100])], "labels")
    with pytest.raises(DataError, match="nothing after the pickle, found 3 more bytes"):
        read_cifar_pickle([write(tmp_path / "a", whole + b"abc")], "labels")
    with pytest.raises(DataError, match="an intact pickle"):
        read_cifar_pickle([write(tmp_path / "a", b"<html>")], "labels")
    paths = [write(tmp_path / "a", whole), write(tmp_path / "b", pickle.dumps(batch(3), 2))]
    with pytest.raises(DataError, match="b: expected 4 images, as many as in a, found 3"):
        read_cifar_pickle(paths, "labels")


# ---- npz ------------------------------------------------------------------------------------


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


X = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
Y = np.array([0, 1, 2, 1])


def test_npz_round_trip(tmp_path):
    (x, y), test = read_npz(npz(tmp_path / "a.npz", x=X, y=Y, names=np.array(["a", "b"])))
    np.testing.assert_array_equal(x, X)
    assert y.tolist() == Y.tolist() and y.dtype == np.int32 and x.dtype == np.uint8 and test is None
    np.savez_compressed(tmp_path / "b.npz", x_train=X, y_train=Y, x_test=X[:1], y_test=Y[:1])
    (x, y), test = read_npz(tmp_path / "b.npz")
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(test[0], X[:1])
    assert test[1].tolist() == [0]
    assert read_npz(npz(tmp_path / "c.npz", x_train=X, y_train=Y))[1] is None


@pytest.mark.parametrize(
    "given_dtype, dtype",
    [("f8", "f4"), ("f2", "f4"), (">f4", "f4"), ("i8", "i4"), ("u2", "i4"), ("?", "u1")],
)
def test_npz_dtypes(tmp_path, given_dtype, dtype):
    (x, _), _ = read_npz(npz(tmp_path / "a.npz", x=X.astype(given_dtype), y=Y))
    assert x.dtype == np.dtype(dtype) and x.dtype.isnative
    np.testing.assert_array_equal(x, X.astype(given_dtype).astype(dtype))


BAD_NPZ = {
    "object": (dict(x=OBJECTS[:, None], y=Y[:2]), "npz file of arrays of numbers, .*Object arrays"),
    "object labels": (dict(x=X, y=Y.astype(object)), "Object arrays cannot be loaded"),
    "names": (dict(images=X, y=Y), r"arrays x, y or .*, found arrays \['images', 'y'\]"),
    "both": (dict(x=X, y=Y, x_train=X, y_train=Y), "arrays x, y or x_train"),
    "no y_test": (dict(x_train=X, y_train=Y, x_test=X), "found arrays .'x_test', 'x_train'"),
    "counts": (dict(x=X, y=Y[:3]), r"y to be integers of shape \(4,\) .*, found int64 \(3,\)"),
    "one-hot": (dict(x=X, y=np.eye(4, dtype=int)), r"shape \(4,\) .*, found int64 \(4, 4\)"),
    "float labels": (dict(x=X, y=Y + 0.5), r"integers .*, found float64 \(4,\)"),
    "negative": (dict(x=X, y=Y - 1), "labels y from 0, found -1..1"),
    "text": (dict(x=np.array([["a"]] * 4), y=Y), r"x to be numbers .*, found <U1 \(4, 1\)"),
    "vector": (dict(x=Y, y=Y), r"numbers of shape \(n, ...\), found int64 \(4,\)"),
    "none": (dict(x=X[:0], y=Y[:0]), r"found uint8 \(0, 3, 2\)"),
    "nan": (dict(x=np.full((4, 2), np.nan), y=Y), "x to fit float32, found nan"),
    "overflow": (dict(x=np.full((4, 2), 1e300), y=Y), r"x to fit float32, found 1e\+300"),
    "int64": (dict(x=np.full((4, 2), 2**40), y=Y), "x to fit int32, found 1099511627776"),
    "shapes": (
        dict(x_train=X, y_train=Y, x_test=X[:, :2], y_test=Y),
        r"x_test of uint8\[3, 2\] each, as x_train, found uint8\[2, 2\]",
    ),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz(tmp_path, case):
    arrays, message = BAD_NPZ[case]
    with pytest.raises(DataError, match=message) as error:
        read_npz(npz(tmp_path / "a.npz", **arrays))
    assert str(error.value).startswith(f"{tmp_path / 'a.npz'}: expected ")
    assert "write it with numpy.savez" in str(error.value)


def test_damaged_npz(tmp_path):
    whole = npz(tmp_path / "a.npz", x=X, y=Y).read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(X.tobytes())] ^= 1
    for content in (whole[:-30], bytes(flipped), b"PK\3\4"):
        with pytest.raises(DataError, match="expected an npz file of arrays of numbers, found Bad"):
            read_npz(write(tmp_path / "b.npz", content))
    np.save(tmp_path / "c.npy", X)
    with pytest.raises(DataError, match="npz file .bytes 50 4b., found 152 bytes .*93 4e 55 4d"):
        read_npz(tmp_path / "c.npy")
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", b"not an array")
    with pytest.raises(DataError, match="npz"):
        read_npz(tmp_path / "d.npz")


# ---- anything at all --------------------------------------------------------------------------


def whole_npz():
    out = io.BytesIO()
    np.savez(out, x=X, y=Y)
    return out.getvalue()


READERS = {
    "idx": (lambda path: read_idx(path, 3), IMAGES),
    "zipped idx": (lambda path: read_idx(path, 3), gzip.compress(IMAGES)),
    "binary": (lambda path: read_cifar_binary([path], 1), bytes(3073)),
    "pickle": (lambda path: read_cifar_pickle([path], "labels"), pickle.dumps(batch(1), 2)),
    "npz": (read_npz, whole_npz()),
}


@pytest.mark.parametrize("name", READERS)
@FEW
@given(data=st.data())
def test_damage_is_read_as_data_or_is_a_data_error(tmp_path_factory, name, data):
    read, whole = READERS[name]
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, 200)))
        content[place % len(content)] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([None, None, -1, -20]))]
    path = write(tmp_path_factory.getbasetemp() / "damaged", bytes(content))
    try:
        read(path)
    except DataError as error:
        assert str(error).startswith(f"{path}: expected ")

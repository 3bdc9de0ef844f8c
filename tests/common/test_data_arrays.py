"""IDX files, NumPy archives and the built-in digits."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data import has_split, open_source
from common.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 1, 0], dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(
    folder: Path, split: str, images: np.ndarray = IMAGES, labels: np.ndarray = LABELS
) -> Path:
    (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    file = folder / f"{split}-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(idx(images)))
    return file


def test_idx_folder_with_train_and_t10k(tmp_path: Path) -> None:
    write_idx(tmp_path, "train")
    write_idx(tmp_path, "t10k", IMAGES[:2], LABELS[:2])
    source = open_source(str(tmp_path))
    taken = source.take(np.array([3, 1]))
    assert np.array_equal(taken.images[..., 0], IMAGES[[3, 1]])
    assert (source.shape, source.classes) == ((1, 4, 3), ("0", "1", "2"))
    test = open_source(str(tmp_path), split="test")
    assert (len(test), test.classes) == (2, ("0", "1", "2"))


def test_idx_file_finds_its_labels_packed_or_not(tmp_path: Path) -> None:
    write_idx(tmp_path, "train")
    plain = tmp_path / "train-images-idx3-ubyte"
    plain.write_bytes(idx(IMAGES))
    source = open_source(str(plain))
    assert source.labels.tolist() == LABELS.tolist()
    assert not has_split(str(plain), "test")


def test_idx_images_are_made_colour_and_resized_when_asked(tmp_path: Path) -> None:
    source = open_source(str(write_idx(tmp_path, "train")), channels=3, size=8)
    taken = source.take(np.arange(5))
    assert taken.images.shape == (5, 8, 8, 3)
    assert np.array_equal(taken.images[..., 0], taken.images[..., 2])


def test_idx_without_labels(tmp_path: Path) -> None:
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(idx(IMAGES))
    with pytest.raises(DataError, match="no labels beside it; put train-labels-idx1-ubyte there"):
        open_source(str(file))
    assert open_source(str(file), labelled=False).labels.tolist() == [-1] * 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(IMAGES)[:10], "truncated, 10 bytes"),
        (idx(IMAGES)[:-1], "truncated (5 x 4 x 3 expected)"),
        (idx(IMAGES) + b"more", "longer than its header says"),
        (idx(LABELS) * 9, "wrong magic number 00000801, 00000803 is expected"),
        (struct.pack(">4B3i", 0, 0, 8, 3, 2**31 - 1, 2**31 - 1, 2**31 - 1), "truncated"),
        (struct.pack(">4B3i", 0, 0, 8, 3, -1, 4, 3), "truncated"),
        (idx(IMAGES[:0]), "no images"),
    ],
)
def test_idx_files_that_are_not_whole(tmp_path: Path, content: bytes, message: str) -> None:
    write_idx(tmp_path, "train")
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        open_source(str(file))
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_idx_torn_gzip(tmp_path: Path) -> None:
    file = write_idx(tmp_path, "train")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"ubyte\.gz: unreadable"):
        open_source(str(file))


def test_idx_counts_must_fit(tmp_path: Path) -> None:
    file = write_idx(tmp_path, "train", labels=LABELS[:4])
    with pytest.raises(DataError, match="5 images but 4 labels"):
        open_source(str(file))


@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y")], ids=str)
def test_npz_of_one_split(tmp_path: Path, names: tuple[str, str]) -> None:
    file = tmp_path / "a.npz"
    np.savez_compressed(file, **{names[0]: IMAGES, names[1]: LABELS[:, None]})
    source = open_source(str(file))
    assert np.array_equal(source.take(np.arange(5)).images[..., 0], IMAGES)
    assert source.labels.tolist() == LABELS.tolist()
    assert not has_split(str(file), "test")


@pytest.mark.parametrize("form", ["{0}_{1}", "{1}_{0}"], ids=["keras", "medmnist"])
def test_npz_of_two_splits(tmp_path: Path, form: str) -> None:
    x, y = ("x", "y") if form.startswith("{0}") else ("images", "labels")
    arrays = {
        form.format(x, "train"): IMAGES,
        form.format(y, "train"): LABELS,
        form.format(x, "test"): IMAGES[:2],
        form.format(y, "test"): LABELS[:2],
        form.format(x, "val"): IMAGES[:1],
        form.format(y, "val"): LABELS[:1],
    }
    np.savez(tmp_path / "a.npz", **arrays)
    assert len(open_source(str(tmp_path / "a.npz"))) == 5
    test = open_source(str(tmp_path / "a.npz"), split="test")
    assert (len(test), test.classes) == (2, ("0", "1", "2"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": IMAGES}, "no arrays images and labels, or x and y"),
        ({"images": IMAGES}, "no array labels; add it"),
        ({"images": IMAGES / 255, "labels": LABELS}, "images is float64 [5, 4, 3]; uint8"),
        ({"images": IMAGES[..., None].repeat(4, 3), "labels": LABELS}, "images is uint8 [5, 4, 3"),
        ({"images": IMAGES, "labels": LABELS / 2}, "labels is float64 [5]; integers [N]"),
        ({"images": IMAGES, "labels": -LABELS.astype(int)}, "row 1: label -1 is negative"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "no images"),
        ({"images": IMAGES, "labels": LABELS.astype(object)}, "Object arrays cannot be loaded"),
    ],
)
def test_npz_with_other_content(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, **arrays)
    with pytest.raises(DataError) as error:
        open_source(str(file))
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_npz_label_outside_the_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    with pytest.raises(DataError, match="row 2: label 2 is outside the 2 classes"):
        open_source(str(tmp_path / "a.npz"), classes=["a", "b"])


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x93NUMPY\x01\x00"])
def test_npz_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz: unreadable NumPy archive \([^\n]+\)"):
        open_source(str(tmp_path / "a.npz"))


def test_digits_are_split_once_and_for_all() -> None:
    train, test = open_source("digits"), open_source("digits", split="test")
    assert (len(train), len(test), train.shape) == (1438, 359, (1, 8, 8))
    shares = np.bincount(test.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    assert np.abs(shares - 0.2).max() < 0.005
    images = train.take(np.arange(len(train)))
    assert (images.images.min(), images.images.max()) == (0, 255)
    # Pinned: results name the digits alone, so their split must never move.
    assert images.digest.startswith("2fcec7000d769067")

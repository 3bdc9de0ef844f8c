"""Parquet in the Hugging Face layout."""

from __future__ import annotations

import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.data import has_split, open_source
from common.errors import DataError

CIFAR10 = Path(
    os.environ.get("FALLOW_DATA", Path(__file__).parents[3] / "shared" / "data" / "cifar10")
)


def png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count: int, seed: int = 0, shape: tuple[int, ...] = (6, 5, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write(
    path: Path,
    images: Any,
    labels: Any,
    *,
    image: str = "img",
    label: str = "label",
    names: list[str] | None = None,
    row_group_size: int = 3,
    **columns: Any,
) -> Path:
    """Write a file as the `datasets` library does: images are PNG bytes, or given as bytes."""
    encoded = [
        {"bytes": png(i) if isinstance(i, np.ndarray) else i, "path": f"{n}.png"}
        for n, i in enumerate(images)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(encoded, kind), label: pa.array(labels), **columns})
    if names:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def test_rows_come_in_the_order_asked_for_across_row_groups(tmp_path: Path) -> None:
    images = pictures(8)
    source = open_source(str(write(tmp_path / "a.parquet", images, range(8))))
    taken = source.take(np.array([7, 0, 4, 4]))
    assert np.array_equal(taken.images, images[[7, 0, 4, 4]])
    assert taken.labels.tolist() == [7, 0, 4, 4]
    assert (len(source), source.shape, source.labels.dtype) == (8, (3, 6, 5), np.int64)


def test_class_names_come_from_the_schema(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", pictures(3), [0, 2, 0], names=["cat", "dog", "eel"])
    assert open_source(str(file)).classes == ("cat", "dog", "eel")


def test_without_names_classes_are_numbered_over_both_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", pictures(3), [0, 4, 1])
    write(tmp_path / "test.parquet", pictures(2), [0, 1])
    expected = ("0", "1", "2", "3", "4")
    assert open_source(str(tmp_path)).classes == expected
    assert open_source(str(tmp_path), split="test").classes == expected


def test_a_test_split_without_labels_does_not_matter_where_classes_are_named(
    tmp_path: Path,
) -> None:
    names = ["cat", "dog"]
    write(tmp_path / "train.parquet", pictures(2), [0, 1], names=names)
    write(tmp_path / "test.parquet", pictures(2), [None, None], names=names)
    assert open_source(str(tmp_path)).classes == ("cat", "dog")


def test_labels_are_mapped_by_name_to_the_classes_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", pictures(3), [0, 1, 1], names=["cat", "dog"])
    source = open_source(str(file), classes=["dog", "eel", "cat"])
    assert source.labels.tolist() == [2, 0, 0]
    assert source.classes == ("dog", "eel", "cat")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["train.parquet"], ["test.parquet"]),
        (
            [f"train-0000{i}-of-00003.parquet" for i in range(3)],
            ["validation-00000-of-00001-1a2b.parquet"],
        ),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            ["data/test-00000-of-00001.parquet"],
        ),
        (["train/0000.parquet", "train/0001.parquet"], ["test/0000.parquet"]),
    ],
)
def test_the_layouts_of_the_hub(tmp_path: Path, train: list[str], test: list[str]) -> None:
    for number, name in enumerate(train):
        write(tmp_path / name, pictures(4, seed=number), [number] * 4)
    write(tmp_path / test[0], pictures(2, seed=9), [0, 0])
    source = open_source(str(tmp_path))
    assert source.labels.tolist() == [n for n in range(len(train)) for _ in range(4)]
    last = source.take(np.array([len(source) - 1])).images[0]
    assert np.array_equal(last, pictures(4, seed=len(train) - 1)[3])
    assert len(open_source(str(tmp_path), split="test")) == 2
    assert has_split(str(tmp_path), "test")


def test_a_single_file_is_a_train_split_only(tmp_path: Path) -> None:
    file = str(write(tmp_path / "test.parquet", pictures(2), [0, 1]))
    assert has_split(file, "train")
    assert not has_split(file, "test")
    with pytest.raises(DataError, match=r"test\.parquet: no test split, only train"):
        open_source(file, split="test")


def test_a_folder_with_only_a_test_split_is_not_trained_on_by_accident(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", pictures(2), [0, 1])
    with pytest.raises(DataError, match="no train split, only test"):
        open_source(str(tmp_path))


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", pictures(2), [0, 1])
    with pytest.raises(DataError, match="1 files of the train split, but their names tell of 2"):
        open_source(str(tmp_path))


def test_shards_must_have_the_same_columns(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", pictures(2), [0, 1])
    write(tmp_path / "train-00001-of-00002.parquet", pictures(2), [0, 1], vendor=["a", "b"])
    with pytest.raises(DataError, match=r"00001-of-00002\.parquet: its columns differ"):
        open_source(str(tmp_path))


def test_other_columns_are_read_as_text(tmp_path: Path) -> None:
    vendor = pa.array(["noto", "twemoji", "noto"]).dictionary_encode()
    file = write(tmp_path / "a.parquet", pictures(3), [0, 1, 0], vendor=vendor, writer=[7, 8, 7])
    source = open_source(str(file))
    assert source.columns == ("vendor", "writer")
    assert source.column("vendor").tolist() == ["noto", "twemoji", "noto"]
    assert source.column("writer").tolist() == ["7", "8", "7"]
    with pytest.raises(DataError, match="no column 'font'; there are: vendor, writer"):
        source.column("font")


def test_a_hole_in_a_column_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", pictures(3), [0, 1, 0], vendor=["a", None, "b"])
    with pytest.raises(DataError, match=r"a\.parquet: row 1: no value for vendor"):
        open_source(str(file)).column("vendor")


def test_label_and_image_columns_have_several_names(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", pictures(2), [1, 0], image="photo", label="fine_label")
    assert open_source(str(file)).labels.tolist() == [1, 0]


def test_unlabelled_images_need_no_label_column(tmp_path: Path) -> None:
    file = str(write(tmp_path / "a.parquet", pictures(2), ["x", "y"], label="caption"))
    source = open_source(file, labelled=False)
    assert source.take(np.array([1])).labels.tolist() == [-1]
    assert source.classes == ()
    with pytest.raises(DataError, match="no label column among img, caption; name it label or"):
        open_source(file)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, -1, 2, 0], {}, r"row 1: label -1 is negative"),
        ([0, 1, 2, 5], {"classes": "abc"}, r"row 3: label 5 is outside the 3 classes"),
        ([0, 1, None, 5], {}, r"row 2: no label; fill it in"),
        ([0, 10**9, 2, 5], {}, r"row 1: label 1000000000 is no class index"),
        (["a", "b", "c", "d"], {}, r"column label is string; integers are needed"),
    ],
)
def test_bad_labels_are_named_by_file_and_row(
    tmp_path: Path, labels: list[Any], options: dict[str, Any], message: str
) -> None:
    file = write(tmp_path / "a.parquet", pictures(4), labels)
    with pytest.raises(DataError, match=rf"a\.parquet: {message}"):
        open_source(str(file), **options)


def test_a_label_beyond_the_names_in_the_schema(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", pictures(2), [0, 2], names=["cat", "dog"])
    with pytest.raises(DataError, match="row 1: label 2 is outside the 2 classes"):
        open_source(str(file))


def test_a_class_that_the_model_does_not_have(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", pictures(2), [0, 1], names=["cat", "yak"])
    with pytest.raises(DataError, match="row 1: label 'yak' is outside the classes cat, dog"):
        open_source(str(file), classes=["cat", "dog"])


def test_rows_are_counted_inside_their_own_shard(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", pictures(4), [0] * 4)
    images = [*pictures(4), b"\x89PNG\r\n\x1a\nnonsense"]
    write(tmp_path / "train-00001-of-00002.parquet", images, [0] * 5)
    source = open_source(str(tmp_path))
    assert len(source.take(np.arange(8))) == 8
    with pytest.raises(DataError, match=r"00001-of-00002\.parquet: row 4: "):
        source.take(np.array([2, 8]))


def test_an_image_that_is_only_a_path(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [*pictures(1), None], [0, 1])
    with pytest.raises(DataError, match="row 1: no bytes in column img; embed the image"):
        open_source(str(file)).take(np.array([1]))


def test_no_image_column_or_two_of_them(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), file)
    with pytest.raises(DataError, match=r"0 image columns struct\{bytes, path\} among text, label"):
        open_source(str(file))
    other = pa.array([{"bytes": b"", "path": ""}])
    write(file, pictures(1), [0], image="left", right=other)
    with pytest.raises(DataError, match="2 image columns"):
        open_source(str(file))


def test_no_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [], pa.array([], pa.int64()))
    with pytest.raises(DataError, match=r"a\.parquet: no images"):
        open_source(str(file))


def test_not_parquet_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(DataError, match=r"a\.parquet: unreadable Parquet \([^\n]+\); replace it$"):
        open_source(str(file))


def test_a_file_damaged_in_the_middle_fails_when_it_is_taken(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", pictures(6), range(6), row_group_size=2)
    source = open_source(str(file))
    data = bytearray(file.read_bytes())
    data[4:24] = b"\xff" * 20
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: "):
        source.take(np.array([0]))


@pytest.mark.skipif(not (CIFAR10 / "train.parquet").exists(), reason=f"no CIFAR-10 at {CIFAR10}")
def test_cifar10_decodes_only_what_is_taken() -> None:
    source = open_source(str(CIFAR10))
    assert len(source) == 50_000
    assert len(open_source(str(CIFAR10), split="test")) == 10_000
    assert (source.shape, len(source.classes)) == ((3, 32, 32), 10)
    taken = source.take(np.arange(0, 50_000, 500))
    assert taken.images.shape == (100, 32, 32, 3)
    assert 100 < taken.images.mean() < 140

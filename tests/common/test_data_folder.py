"""Image folders, and what becomes of the single image file."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data import has_split, open_source, read_image
from common.errors import ConfigError, DataError


def save(path: Path, pixels: np.ndarray | None = None, size: tuple[int, int] = (6, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels is None:
        pixels = np.zeros((*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_classes_and_files_are_sorted_by_name(tmp_path: Path) -> None:
    for value, name in enumerate(["dog/b.png", "cat/z.png", "cat/sub/a.PNG"]):
        save(tmp_path / name, np.full((4, 4, 3), value, np.uint8))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    save(tmp_path / "cat" / ".hidden.png")
    source = open_source(str(tmp_path))
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 1]
    assert source.take(np.arange(3)).images[:, 0, 0, 0].tolist() == [2, 1, 0]


def test_the_train_folders_name_the_classes_of_both_splits(tmp_path: Path) -> None:
    for name in ["train/ant/1.png", "train/bee/1.png", "train/cow/1.png", "test/cow/1.png"]:
        save(tmp_path / name)
    test = open_source(str(tmp_path), split="test")
    assert (test.classes, test.labels.tolist()) == (("ant", "bee", "cow"), [2])
    assert has_split(str(tmp_path), "test")


def test_a_validation_folder_stands_in_for_a_missing_test_folder(tmp_path: Path) -> None:
    save(tmp_path / "train/a/1.png")
    save(tmp_path / "val/a/2.png")
    assert len(open_source(str(tmp_path), split="test")) == 1


def test_a_folder_without_splits_has_no_test(tmp_path: Path) -> None:
    save(tmp_path / "a/1.png")
    assert not has_split(str(tmp_path), "test")
    with pytest.raises(DataError, match="no test split, only train"):
        open_source(str(tmp_path), split="test")


def test_a_class_the_model_does_not_know_is_named_with_its_file(tmp_path: Path) -> None:
    save(tmp_path / "cat/1.png")
    save(tmp_path / "yak/1.png")
    with pytest.raises(DataError, match=r"1\.png: label 'yak' is outside the classes dog, cat"):
        open_source(str(tmp_path), classes=["dog", "cat"])
    assert open_source(str(tmp_path / "cat"), labelled=False).labels.tolist() == [-1]


def test_a_device_may_lack_classes_of_the_model(tmp_path: Path) -> None:
    save(tmp_path / "cat/1.png")
    assert open_source(str(tmp_path), classes=["ant", "bee", "cat"]).labels.tolist() == [2]


def test_a_broken_image_is_named_when_it_is_taken(tmp_path: Path) -> None:
    save(tmp_path / "a/1.png", size=(64, 64))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = save(tmp_path / "a/2.png", noise)
    whole.write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "a/3.png").write_text("no image at all")
    source = open_source(str(tmp_path))
    assert len(source.take(np.array([0]))) == 1
    with pytest.raises(DataError, match=r"2\.png: broken image \([^\n]+\); replace or remove it$"):
        source.take(np.array([0, 1]))
    with pytest.raises(DataError, match=r"3\.png: not an image; replace or remove it$"):
        source.take(np.array([2]))


def test_a_file_that_vanished(tmp_path: Path) -> None:
    file = save(tmp_path / "a/1.png")
    source = open_source(str(tmp_path))
    file.unlink()
    with pytest.raises(DataError, match=r"1\.png: unreadable"):
        source.take(np.array([0]))


def test_differing_sizes_need_a_size(tmp_path: Path) -> None:
    save(tmp_path / "a/1.png", size=(6, 6))
    save(tmp_path / "a/2.png", size=(12, 8))
    with pytest.raises(DataError, match=r"2\.png: 12x8 pixels, but the first image has 6x6; set"):
        open_source(str(tmp_path)).take(np.arange(2))
    source = open_source(str(tmp_path), size=4)
    assert source.shape == (3, 4, 4)
    assert source.take(np.arange(2)).images.shape == (2, 4, 4, 3)


def test_grey_becomes_colour_but_colour_becomes_grey_only_when_asked(tmp_path: Path) -> None:
    grey = np.full((4, 4), 9, np.uint8)
    save(tmp_path / "colour-first/a/1.png", size=(4, 4))
    save(tmp_path / "colour-first/a/2.png", grey)
    assert open_source(str(tmp_path / "colour-first")).take(np.array([1])).images.max() == 9
    save(tmp_path / "grey-first/a/1.png", grey)
    save(tmp_path / "grey-first/a/2.png", size=(4, 4))
    with pytest.raises(DataError, match=r"2\.png: a colour image, but the first one is grey"):
        open_source(str(tmp_path / "grey-first")).take(np.arange(2))
    for channels in (1, 3):
        source = open_source(str(tmp_path / "grey-first"), channels=channels)
        assert source.take(np.arange(2)).shape == (channels, 4, 4)


def test_an_image_outside_all_class_folders(tmp_path: Path) -> None:
    save(tmp_path / "a/1.png")
    save(tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png: lies in no class folder"):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path), labelled=False)) == 2


def test_an_empty_split(tmp_path: Path) -> None:
    save(tmp_path / "train/a/1.png")
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="test: no images"):
        open_source(str(tmp_path), split="test")


def test_a_folder_has_no_columns(tmp_path: Path) -> None:
    save(tmp_path / "a/1.png")
    with pytest.raises(DataError, match="no column 'vendor'; there are none"):
        open_source(str(tmp_path)).column("vendor")


@pytest.mark.parametrize(
    "option", [{"size": 0}, {"channels": 2}, {"classes": ["a", "b", "a"]}], ids=str
)
def test_options_that_cannot_be_used(option: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        open_source("digits", **option)  # type: ignore[arg-type]


def test_unknown_places_and_formats(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="unknown format; give Parquet, IDX or npz"):
        open_source(str(tmp_path))
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"table\.csv: unknown format"):
        has_split(str(tmp_path / "table.csv"), "train")


def test_resizing_keeps_the_centre_and_the_aspect() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200  # the centre square
    pixels = read_image(encoded(Image.fromarray(wide)), "wide.png", size=10)
    assert pixels.shape == (10, 10, 3)
    assert (pixels == 200).all()
    assert read_image(encoded(Image.fromarray(wide)), "wide.png", size=7).shape == (7, 7, 3)
    assert read_image(encoded(Image.fromarray(wide)), "wide.png", size=17).shape == (17, 17, 3)


def test_what_is_transparent_becomes_white() -> None:
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert (read_image(encoded(clear), "clear.png") == 255).all()
    palette = Image.new("P", (2, 2), 0)
    data = encoded(palette, transparency=bytes([0]))
    assert (read_image(data, "palette.png") == 255).all()


def test_the_orientation_of_cameras_is_applied() -> None:
    image = Image.fromarray(np.zeros((4, 8), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    data = encoded(image, "JPEG", exif=exif.tobytes())
    assert read_image(data, "phone.jpg").shape == (8, 4, 1)


def test_more_than_eight_bits_are_refused_not_clipped() -> None:
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(DataError, match=r"scan\.png: broken image \(mode I;16, more than 8 bits"):
        read_image(encoded(deep), "scan.png")


@pytest.mark.parametrize("side", [9_450, 14_000], ids=["below", "above"])
def test_a_decompression_bomb_is_refused(side: int) -> None:
    """Below the limit of Pillow's own error, and above."""
    bomb = Image.new("1", (side, side))
    with pytest.raises(DataError, match=r"bomb\.png: broken image \(.*pixels"):
        read_image(encoded(bomb), "bomb.png")

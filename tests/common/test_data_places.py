"""Places and worlds: one setting names several data sets, some of their rows, and their tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.config import Config
from common.data import ImageSet, Worlds
from common.data.places import Place, label_of, places_of
from common.errors import ConfigError, DataError
from common.scenario import Scenario

BLUE, RED, GREEN = (0, 0, 200), (200, 0, 0), (0, 200, 0)


def archive(
    path: Path, count: int, size: int, grey: int, *, classes: int = 3, test: int = 0
) -> str:
    """Images of one grey level, class by class in turn; as many test images as asked for."""
    labels = np.arange(count) % classes
    arrays = {"x_train": np.full((count, size, size), grey, np.uint8), "y_train": labels}
    if test:
        arrays["x_test"] = np.full((test, size, size), grey, np.uint8)
        arrays["y_test"] = np.arange(test) % classes
    np.savez(path, **arrays)
    return str(path)


def drawings(path: Path, colours: dict[str, tuple[int, int, int]]) -> str:
    """Parquet in which every vendor draws 15 images of 3 classes in a colour of its own."""
    rows, labels, vendors = [], [], []
    for number in range(15 * len(colours)):
        vendor = list(colours)[number % len(colours)]
        buffer = io.BytesIO()
        Image.new("RGB", (6, 6), colours[vendor]).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
        labels.append(number // len(colours) % 3)
        vendors.append(vendor)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, kind), "label": labels, "v": vendors}), path)
    return str(path)


def means(images: ImageSet) -> set[tuple[int, ...]]:
    return {tuple(int(v) for v in image.mean((0, 1))) for image in images.images}


# what the setting says


def test_a_path_that_exists_is_taken_as_it_is(tmp_path: Path) -> None:
    odd = tmp_path / "a,b+c@d=e|20%.npz"
    archive(odd, 12, 6, 9)
    assert places_of(str(odd)) == (Place((str(odd),)),)
    assert Scenario(Config(data=str(odd), steps=1)).images == 12


def test_worlds_locations_rows_and_tests_are_told_apart() -> None:
    places = places_of("x/a+y/b,x/c@v=p+q|x/d@v=r,digits|20%")
    assert [place.name for place in places] == ["a+b", "p+q", "digits"]
    assert places[1] == Place(("x/c",), "v", ("p", "q"), Place(("x/d",), "v", ("r",)))
    assert places[2].test == pytest.approx(0.2)
    assert label_of("x/a+y/b,x/c@v=p+q|x/d@v=r,digits|20%") == "a+b,c@v=p+q|d@v=r,digits|20%"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a,,b", "data has an empty place"),
        ("a@v", "data has 'a@v': write PATH@COLUMN=VALUE"),
        ("a|0%", "data sets '0%' aside for testing: give 1% to 99%"),
        ("a|x%", "data sets 'x%' aside for testing"),
    ],
)
def test_what_is_malformed_is_told(data: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        places_of(data)


# what is opened


def test_every_world_is_a_part_of_all_its_images(tmp_path: Path) -> None:
    big = archive(tmp_path / "big.npz", 30, 12, 100, test=6)
    small = archive(tmp_path / "small.npz", 24, 8, 200, test=3)
    scenario = Scenario(Config(data=f"{big},{small}", steps=1, devices=2))
    assert scenario.worlds == ("big.npz", "small.npz")
    assert (len(scenario.prior), len(scenario.part(1))) == (30, 24)
    assert scenario.shape == (1, 12, 12)  # the first world's: the second is resized
    assert (means(scenario.prior), means(scenario.part(1))) == ({(100,)}, {(200,)})
    tests = {name: len(images or ()) for name, images in scenario.tests().items()}
    assert tests == {"big.npz": 6, "small.npz": 3}
    assert len(scenario.test() or ()) == 9
    devices = [scenario.device(1, device) for device in range(2)]
    assert sum(len(device) for device in devices) == 24


def test_sizes_are_the_most_that_is_taken_of_a_world(tmp_path: Path) -> None:
    one, other = (archive(tmp_path / f"{n}.npz", n, 8, 50) for n in (30, 12))
    stream = Scenario(Config(data=f"{one},{other}", steps=1, prior_size=15, part_size=15)).stream
    assert (len(stream.prior), len(stream.parts[0])) == (15, 12)
    assert stream.prior.max() < 30 <= stream.parts[0].min()


def test_a_world_can_be_rows_of_a_file_or_several_files(tmp_path: Path) -> None:
    file = drawings(tmp_path / "all.parquet", {"b": BLUE, "r": RED, "g": GREEN})
    other = drawings(tmp_path / "more.parquet", {"b": BLUE, "x": (9, 9, 9)})
    scenario = Scenario(Config(data=f"{file}@v=g,{file}+{other}@v=b+r", steps=1, devices=2))
    assert scenario.worlds == ("g", "b+r")
    assert means(scenario.prior) == {GREEN}
    assert means(scenario.part(1)) == {BLUE, RED}
    assert len(scenario.part(1)) == 45
    by_vendor = Scenario(
        Config(
            data=f"{file}@v=g,{file}@v=b+r",
            steps=1,
            devices=2,
            partition="natural",
            column="v",
        )
    )
    assert [len(means(by_vendor.device(1, device))) for device in range(2)] == [1, 1]


def test_only_classes_that_all_worlds_have_are_taken(tmp_path: Path) -> None:
    for world, classes in (("photos", "cat dog fox"), ("sketches", "dog owl cat")):
        for split in ("train", "test"):
            for number, name in enumerate(classes.split()):
                folder = tmp_path / world / split / name
                folder.mkdir(parents=True)
                for i in range(4):
                    Image.new("L", (8, 8), 40 * number + i).save(folder / f"{i}.png")
    worlds = Worlds(f"{tmp_path}/photos,{tmp_path}/sketches")
    assert worlds.source.classes == ("cat", "dog")
    assert worlds.edges == (0, 8, 16)
    sketches = worlds.source.take(np.arange(8, 16))
    assert {image.mean() // 40: label for image, label in zip(*_pair(sketches), strict=True)} == {
        0: 1,  # dog is the first of the sketches and the second of ours
        2: 0,
    }
    test = worlds.test(1)
    assert test is not None
    assert np.bincount(test.labels).tolist() == [4, 4]


def _pair(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    return images.images, images.labels


def test_colour_wins_over_grey(tmp_path: Path) -> None:
    grey = archive(tmp_path / "grey.npz", 15, 6, 77)
    colour = drawings(tmp_path / "colour.parquet", {"r": RED})
    scenario = Scenario(Config(data=f"{grey},{colour}", steps=1, devices=2))
    assert (scenario.shape, means(scenario.prior)) == ((3, 6, 6), {(77, 77, 77)})
    assert Scenario(Config(data=f"{grey},{colour}", steps=1, channels=1)).shape == (1, 6, 6)


# what it is tested on


def test_a_share_is_set_aside_of_every_class_and_never_trained_on(tmp_path: Path) -> None:
    pixels = np.arange(60 * 16, dtype=np.uint32).reshape(60, 4, 4).view(np.uint8)[:, :, :4]
    np.savez(tmp_path / "plain.npz", images=pixels.copy(), labels=np.arange(60) % 3)
    config = Config(data=f"{tmp_path}/plain.npz|20%", steps=1, devices=2)
    runs = [Scenario(config.model_copy(update={"seed": seed})) for seed in (0, 1)]
    tests = [run.test() for run in runs]
    assert tests[0] is not None
    assert tests[1] is not None
    assert tests[0].digest == tests[1].digest  # whatever the seed of the run
    assert np.bincount(tests[0].labels).tolist() == [4, 4, 4]
    seen = {i.tobytes() for part in (runs[0].prior, runs[0].part(1)) for i in part.images}
    assert len(seen) == 48
    assert not seen & {image.tobytes() for image in tests[0].images}


def test_test_images_can_come_from_elsewhere(tmp_path: Path) -> None:
    data = archive(tmp_path / "data.npz", 30, 8, 10, test=3)
    other = archive(tmp_path / "other.npz", 9, 12, 90)
    test = Scenario(Config(data=f"{data}|{other}", steps=1)).test()
    assert test is not None
    assert (len(test), test.shape, means(test)) == (9, (1, 8, 8), {(90,)})
    split = archive(tmp_path / "split.npz", 9, 8, 90, test=6)
    assert len(Scenario(Config(data=f"{data}|{split}", steps=1)).test() or ()) == 6
    assert Scenario(Config(data=split, steps=1)).images == 9


def test_what_validates_is_cut_from_the_training_images_and_no_test_image_is_looked_at(
    tmp_path: Path,
) -> None:
    pixels = np.arange(60 * 16, dtype=np.uint32).reshape(60, 4, 4).view(np.uint8)[:, :, :4]
    np.savez(tmp_path / "plain.npz", images=pixels.copy(), labels=np.arange(60) % 3)
    place = f"{tmp_path}/plain.npz|20%"
    tested = Scenario(Config(data=place, steps=1, devices=2)).test()
    tuned = Scenario(Config(data=place, steps=1, devices=2, validate_share=0.25))
    validated = tuned.test()
    assert tested is not None
    assert validated is not None
    assert np.bincount(validated.labels).tolist() == [4, 4, 4]
    sets = [tested, validated, tuned.prior, tuned.part(1)]
    seen = [{image.tobytes() for image in some.images} for some in sets]
    assert [len(some) for some in seen] == [12, 12, 18, 18]
    assert len(set.union(*seen)) == 60

    split = archive(tmp_path / "split.npz", 30, 8, 90, test=6)
    validated = Scenario(Config(data=split, steps=1, validate_share=0.2)).test()
    assert len(validated or ()) == 6
    assert Scenario(Config(data=split, steps=1, validate_share=0.2)).images == 24


# what does not go together


def test_worlds_that_do_not_go_together_are_told(tmp_path: Path) -> None:
    data = archive(tmp_path / "data.npz", 30, 8, 10)
    zeros = archive(tmp_path / "zeros.npz", 30, 8, 10, classes=1)
    pictures = drawings(tmp_path / "drawings.parquet", {"r": RED})

    def build(text: str, **changes: str | int) -> Scenario:
        return Scenario(Config(**{"data": text, "steps": 1, **changes}))

    with pytest.raises(ConfigError, match="2 steps, but data names 2 worlds"):
        _ = build(f"{data},{data}", steps=2).stream
    with pytest.raises(
        ConfigError, match="data names 2 worlds, a part each, and stream is 'class'"
    ):
        build(f"{data},{data}", stream="class")
    with pytest.raises(ConfigError, match="and worlds is 'dark': use one of them"):
        build(f"{data},{data}", worlds="dark")
    with pytest.raises(DataError, match=r"have 1 class\(es\) in common"):
        build(f"{data},{zeros}")
    with pytest.raises(DataError, match="no row has v 'x'; there are: r"):
        build(f"{pictures}@v=r,{pictures}@v=x")
    with pytest.raises(DataError, match="no column 'w'; there are: v"):
        build(f"{pictures}@w=r")
    assert build(f"{data},{data}").worlds == ("data.npz", "data.npz (2)")
    assert build(f"{data},{data}").test() is None

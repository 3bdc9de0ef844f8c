"""A simulation's data: who has which images, from the settings alone."""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.config import Config
from common.data import ImageSet
from common.errors import ConfigError, DataError
from common.scenario import Scenario, scenario_of

DEVICES, STEPS = 4, 2


def scenario(**changes: Any) -> Scenario:
    return Scenario(Config(**{"devices": DEVICES, "steps": STEPS, **changes}))


def keys(images: ImageSet) -> set[bytes]:
    """The images themselves, as a set; every image of the test data is another."""
    return {image.tobytes() for image in images.images}


def unique_pixels(count: int, shape: tuple[int, ...] = (6, 6, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def archive(path: Path, *, classes: int = 6, count: int = 240, **others: np.ndarray) -> str:
    labels = np.arange(count) % classes
    np.savez(path, x_train=unique_pixels(count), y_train=labels, **others)
    return str(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return archive(tmp_path_factory.mktemp("data") / "plain.npz")


@pytest.fixture(scope="module")
def vendors(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Parquet with a column that says who drew an image; vendor i draws in its own greys."""
    path = tmp_path_factory.mktemp("data") / "drawings.parquet"
    encoded, labels, names = [], [], []
    for number in range(120):
        vendor = number % 5
        pixels = unique_pixels(1, (6, 6), seed=number)[0] // 8 + 40 * vendor
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
        labels.append(number // 5 % 3)
        names.append(f"vendor {vendor}")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(encoded, kind), "label": labels, "vendor": names})
    pq.write_table(table, path)
    return str(path)


# ---------------------------------------------------------------- who has what


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "classes"])
def test_prior_parts_and_devices_are_disjoint_and_complete(plain: str, partition: str) -> None:
    s = scenario(data=plain, partition=partition, classes_per_device=3)
    parts = [s.part(step) for step in range(1, STEPS + 1)]
    sets = [keys(s.prior), *(keys(part) for part in parts)]
    assert all(not one & other for one, other in itertools.combinations(sets, 2))
    assert [len(some) for some in sets] == [80, 80, 80]
    for step, part in enumerate(parts, start=1):
        devices = [s.device(step, device) for device in range(DEVICES)]
        assert all(len(device) >= 1 for device in devices)
        owned = [keys(device) for device in devices]
        assert all(not one & other for one, other in itertools.combinations(owned, 2))
        assert set.union(*owned) == keys(part)


def test_every_image_keeps_its_label(plain: str) -> None:
    s = scenario(data=plain)
    label_of = {image.tobytes(): number % 6 for number, image in enumerate(unique_pixels(240))}
    for images in (s.prior, s.part(2), s.device(1, 3)):
        found = [label_of[image.tobytes()] for image in images.images]
        assert found == images.labels.tolist()
        assert images.classes == s.classes


def test_two_processes_build_the_same_and_another_seed_another(plain: str) -> None:
    def digests(**changes: Any) -> list[str]:
        s = scenario(data=plain, **changes)
        devices = [s.device(t, d) for t in (2, 1) for d in reversed(range(DEVICES))]
        return [images.digest for images in (s.prior, s.part(1), s.part(2), *devices)]

    assert digests() == digests()
    assert set(digests()).isdisjoint(digests(seed=1))


def test_order_of_asking_does_not_matter(plain: str) -> None:
    forwards, backwards = scenario(data=plain), scenario(data=plain)
    asked = [(t, d) for t in (1, 2) for d in range(DEVICES)]
    one = {key: forwards.device(*key).digest for key in asked}
    other = {key: backwards.device(*key).digest for key in reversed(asked)}
    assert one == other


def test_before_the_first_step_a_device_sees_its_first_part(plain: str) -> None:
    s = scenario(data=plain)
    assert s.device(0, 2).digest == s.device(1, 2).digest
    assert s.device(1, 2).digest != s.device(2, 2).digest


def test_a_scenario_is_built_once_a_process(plain: str) -> None:
    config = Config(data=plain, devices=DEVICES)
    assert scenario_of(config) is scenario_of(Config(data=plain, devices=DEVICES))
    assert scenario_of(config) is not scenario_of(Config(data=plain, devices=3))


# ---------------------------------------------------------------- how much


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (80, 80, 80)),
        ({"steps": 3}, (60, 60, 60, 60)),
        ({"prior_size": 40}, (40, 100, 100)),
        ({"part_size": 30}, (30, 30, 30)),
        ({"prior_size": 100, "part_size": 50}, (100, 50, 50)),
        ({"prior_size": 41}, (41, 99, 99)),
    ],
)
def test_sizes_are_as_asked_for(
    plain: str, sizes: dict[str, int], expected: tuple[int, ...]
) -> None:
    stream = scenario(data=plain, **sizes).stream
    assert (len(stream.prior), *map(len, stream.parts)) == expected


def test_parts_by_share_have_the_balance_of_the_whole(plain: str) -> None:
    s = scenario(data=plain)
    for images in (s.prior, s.part(1), s.part(2)):
        counts = np.bincount(images.labels, minlength=6)
        assert counts.max() - counts.min() <= 2


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"prior_size": 240}, "prior-size 240 leaves nothing of 240 images for 2 steps"),
        ({"prior_size": 1000}, "prior-size 1000 leaves nothing of 240 images"),
        ({"part_size": 100}, "the data has 240"),
        ({"steps": 400}, "leaves nothing"),
    ],
)
def test_more_than_there_is_is_refused(plain: str, sizes: dict[str, int], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        _ = scenario(data=plain, **sizes).stream


def test_too_many_devices_are_refused(plain: str) -> None:
    with pytest.raises(ConfigError, match="devices: 41"):
        scenario(data=plain, devices=41).device(1, 0)


# ---------------------------------------------------------------- by class


def test_a_stream_by_class_has_disjoint_classes(plain: str) -> None:
    s = scenario(data=plain, stream="class", partition="iid")
    seen = [set(images.labels.tolist()) for images in (s.prior, s.part(1), s.part(2))]
    assert [len(classes) for classes in seen] == [2, 2, 2]
    assert set.union(*seen) == set(range(6))
    assert len(s.classes) == 6, "the head has room for all of them from the start"
    orders = {
        tuple(np.unique(scenario(data=plain, stream="class", seed=seed).prior.labels).tolist())
        for seed in range(5)
    }
    assert len(orders) > 1, "which classes come first is the seed's choice"


def test_classes_and_sizes_of_a_stream_by_class_are_as_asked_for(plain: str) -> None:
    s = scenario(data=plain, stream="class", prior_classes=3, prior_size=50, part_size=20)
    sets = (s.prior, s.part(1), s.part(2))
    assert [len(images) for images in sets] == [50, 20, 20]
    assert [len(np.unique(images.labels)) for images in sets] == [3, 2, 1]


def test_a_class_without_a_training_image_belongs_to_no_part(tmp_path: Path) -> None:
    count = 60
    labels = np.arange(count) % 4
    labels[labels == 2] = 3
    data = tmp_path / "gap.npz"
    np.savez(
        data,
        x_train=unique_pixels(count),
        y_train=labels,
        x_test=unique_pixels(4, seed=1),
        y_test=np.array([0, 1, 2, 4]),
    )
    s = scenario(data=str(data), stream="class", partition="iid")
    assert len(s.classes) == 5
    seen = [set(images.labels.tolist()) for images in (s.prior, s.part(1), s.part(2))]
    assert sorted(itertools.chain(*seen)) == [0, 1, 3]


def test_more_steps_than_classes_are_refused(plain: str) -> None:
    with pytest.raises(ConfigError, match="there are 6 classes"):
        _ = scenario(data=plain, stream="class", steps=6).stream


# ---------------------------------------------------------------- natural


def test_a_natural_partition_gives_every_device_its_own_vendors(vendors: str) -> None:
    s = scenario(data=vendors, partition="natural", column="vendor", devices=5, part_size=40)
    drawn = []
    for device in range(5):
        images = s.device(1, device)
        drawn.append(set((images.images.min((1, 2, 3)) // 40).tolist()))
    assert sorted(drawn, key=min) == [{0}, {1}, {2}, {3}, {4}]
    two = scenario(data=vendors, partition="natural", column="vendor", devices=2, part_size=40)
    assert len(two.device(1, 0)) + len(two.device(1, 1)) == 40
    assert not keys(two.device(1, 0)) & keys(two.device(1, 1))


def test_a_natural_partition_needs_a_column_that_is_there(vendors: str) -> None:
    with pytest.raises(ConfigError, match="column is empty"):
        Config.parse({"data": vendors, "partition": "natural"})
    with pytest.raises(DataError, match=r"no column 'seller'.*vendor"):
        scenario(data=vendors, partition="natural", column="seller").device(1, 0)
    with pytest.raises(ConfigError, match="only 5 values"):
        scenario(data=vendors, partition="natural", column="vendor", devices=6).device(1, 0)


# ---------------------------------------------------------------- what the images are


def test_digits_are_built_in() -> None:
    s = scenario()
    test = s.test()
    assert test is not None
    assert (s.shape, len(s.classes), s.images + len(test)) == ((1, 8, 8), 10, 1797)
    assert s.prior.shape == test.shape == s.device(2, 3).shape == (1, 8, 8)
    assert s.classes == test.classes
    trained_on = keys(s.prior) | keys(s.part(1)) | keys(s.part(2))
    assert len(keys(test) & trained_on) <= 1, "but for one pair of equal drawings"


def test_sizes_and_channels_can_be_asked_for_and_hold_for_the_test_split_too() -> None:
    s = scenario(image_size=16, channels=3)
    test = s.test()
    assert test is not None
    assert s.shape == s.device(1, 0).shape == test.shape == (3, 16, 16)


def test_without_a_test_split_there_is_no_test_data(plain: str) -> None:
    assert scenario(data=plain).test() is None


def test_test_images_are_brought_to_the_size_of_the_others(tmp_path: Path) -> None:
    test = {"x_test": unique_pixels(4, (9, 9, 3), seed=1), "y_test": np.arange(4)}
    found = scenario(data=archive(tmp_path / "a.npz", **test)).test()
    assert found is not None
    assert found.shape == (3, 6, 6)


def test_images_that_are_not_square_stay_so_in_the_test_split(tmp_path: Path) -> None:
    path = tmp_path / "wide.npz"
    pixels = unique_pixels(8, (6, 10, 3), seed=1)
    labels = np.arange(60) % 3
    np.savez(
        path,
        x_train=unique_pixels(60, (6, 10, 3)),
        y_train=labels,
        x_test=pixels,
        y_test=labels[:8],
    )
    s = scenario(data=str(path))
    test = s.test()
    assert test is not None
    assert s.shape == s.prior.shape == test.shape == (3, 6, 10)
    assert np.array_equal(test.images, pixels)


def test_data_that_is_not_there_is_told() -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        scenario(data="nowhere/at/all")

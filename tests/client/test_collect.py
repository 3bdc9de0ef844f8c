"""What a device keeps of what it sees, and what goes again."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.collect import Collector, NoConsentError
from client.index import Index
from client.settings import Collecting, DeviceSettings
from common.data.dataset import Pixels
from common.errors import ConfigError, DataError, StoreError

DAY = 86400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


class Sure:
    """A model that names every image alike."""

    digest = "model-1"

    def __init__(self, label: str = "newt", probability: float = 0.95) -> None:
        self.answer = (label, probability)

    def __call__(self, pixels: Pixels) -> tuple[str, float]:
        return self.answer


def picture(seed: int, side: int = 24) -> Image.Image:
    """A smooth image; different seeds look different."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(seed: int) -> bytes:
    return file_of(picture(seed))


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index.create(tmp_path / "store") as made:
        yield made


def collector(index: Index, labeller: Any = None, clock: Any = None, **rules: Any) -> Collector:
    settings = DeviceSettings(collect=Collecting(**rules), labels=rules.pop("labels", {}))
    made = Collector(index, settings, labeller, clock or Clock())
    made.consent("camera")
    return made


def files(index: Index) -> set[str]:
    return {path.name for path in (index.folder / "images").iterdir()}


# the store


def test_a_store_has_a_name_for_ever(tmp_path: Path) -> None:
    with Index.create(tmp_path / "a") as one, Index.create(tmp_path / "b") as other:
        assert one.name != other.name
        with Index.open(tmp_path / "a") as again, Index.create(tmp_path / "a") as third:
            assert again.name == third.name == one.name
            assert again.secret == one.secret != other.secret


def test_a_folder_without_a_store_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="collect init"):
        Index.open(tmp_path)
    (tmp_path / "index.sqlite3").write_bytes(b"no database, but longer than a header" * 9)
    with pytest.raises(StoreError, match="not a database"):
        Index.open(tmp_path)


def test_nobody_else_can_look_into_a_store(index: Index) -> None:
    assert index.folder.stat().st_mode & 0o077 == 0


def test_the_index_names_what_lies_on_the_disk(index: Index) -> None:
    taken = collector(index).add(png(1), "image", "camera", "cat")
    assert taken.outcome == "kept"
    assert index.content(taken.digest) == png(1)
    (image,) = index.images()
    assert (image.digest, image.label, image.origin) == (taken.digest, "cat", "given")
    assert index.check() == []
    index.path(taken.digest).write_bytes(b"altered")
    assert index.content(taken.digest) is None
    assert len(index.check()) == 1


# consent


def test_nothing_is_kept_without_consent(index: Index) -> None:
    one = collector(index)
    with pytest.raises(NoConsentError, match="source 'doorbell' has no consent"):
        one.add(png(1), "image", "doorbell", "cat")
    assert files(index) == set()
    one.consent("doorbell")
    one.consent("doorbell")
    assert one.add(png(1), "image", "doorbell", "cat").outcome == "kept"


def test_withdrawn_consent_removes_what_came_from_there(index: Index) -> None:
    one = collector(index)
    one.consent("doorbell")
    one.add(png(1), "image", "doorbell", "cat")
    kept = one.add(png(2), "image", "camera", "cat")
    assert one.withdraw("doorbell") == 1
    assert files(index) == {kept.digest}
    with pytest.raises(NoConsentError):
        one.add(png(1), "image", "doorbell", "cat")


# duplicates


def test_the_same_file_is_kept_once(index: Index) -> None:
    one = collector(index)
    first = one.add(png(1), "image", "camera", "cat")
    again = one.add(png(1), "image", "camera", "cat")
    assert (again.outcome, again.like) == ("duplicate", first.digest)
    assert len(index.images()) == 1


@pytest.mark.parametrize(
    "near",
    [
        file_of(picture(1), "JPEG", quality=80),
        file_of(picture(1, side=40)),
        file_of(picture(1), "WEBP", quality=80),
    ],
)
def test_the_same_scene_is_kept_once(index: Index, near: bytes) -> None:
    one = collector(index)
    first = one.add(png(1), "image", "camera", "cat")
    again = one.add(near, "image", "camera", "cat")
    assert (again.outcome, again.like) == ("near duplicate", first.digest)
    assert files(index) == {first.digest}


def test_other_scenes_and_other_colours_are_kept(index: Index) -> None:
    one = collector(index)
    for seed in range(30):
        assert one.add(png(seed), "image", "camera", "cat").outcome == "kept"
    blue = Image.fromarray(np.asarray(picture(1))[..., ::-1].copy())
    red = np.zeros((24, 24, 3), np.uint8)
    red[4:20, 4:20, 0] = 220
    lights = [file_of(Image.fromarray(np.roll(red, shift, axis=2))) for shift in (0, 1)]
    assert one.add(file_of(blue), "image", "camera").outcome == "kept"
    assert [one.add(light, "image", "camera").outcome for light in lights] == ["kept", "kept"]


def test_near_duplicates_are_kept_where_they_are_wanted(index: Index) -> None:
    one = collector(index, near=-1)
    one.add(png(1), "image", "camera", "cat")
    near = file_of(picture(1), "JPEG", quality=80)
    assert one.add(near, "image", "camera", "cat").outcome == "kept"


# labels


def test_a_label_that_was_missing_is_welcome_later(index: Index) -> None:
    one = collector(index)
    first = one.add(png(1), "image", "camera")
    assert index.images()[0].origin == "none"
    assert one.add(png(1), "image", "camera", "owl").outcome == "relabelled"
    assert one.add(png(1), "image", "camera", "pig").outcome == "duplicate"
    (image,) = index.images()
    assert (image.digest, image.label, image.origin) == (first.digest, "owl", "given")


def test_a_label_is_corrected_by_the_begin_of_the_id(index: Index) -> None:
    one = collector(index)
    taken = one.add(png(1), "image", "camera", "cat")
    one.add(png(2), "image", "camera", "cat")
    one.label(taken.digest[:10], "dog")
    found = index.image(taken.digest)
    assert found is not None
    assert (found.label, found.origin) == ("dog", "corrected")
    for start, said in (("zz", "in lower case"), ("", "give the digest"), ("0" * 20, "no image")):
        with pytest.raises(ConfigError, match=said):
            one.label(start, "dog")


def test_a_label_that_is_none_is_refused_by_name(index: Index) -> None:
    one = collector(index, classes=("cat", "dog"))
    with pytest.raises(ConfigError, match="label 'cta' is none of cat, dog"):
        one.add(png(1), "image", "camera", "cta")
    for label in ("", " cat"):
        with pytest.raises(ConfigError, match="label is"):
            collector(index).add(png(1), "image", "camera", label)
    assert files(index) == set()


def test_a_sure_model_labels_and_is_named_for_it(index: Index) -> None:
    one = collector(index, Sure())
    one.add(png(1), "image", "camera")
    (image,) = index.images()
    assert (image.label, image.origin, image.confidence, image.model) == (
        "newt",
        "model",
        0.95,
        "model-1",
    )
    unsure = collector(index, Sure(probability=0.89))
    assert unsure.add(png(2), "image", "camera").origin == "none"
    given = one.add(png(3), "image", "camera", "cat")
    assert given.origin == "given"


def test_a_newer_model_is_asked_again_but_people_are_not_overruled(index: Index) -> None:
    one = collector(index, Sure())
    guessed = one.add(png(1), "image", "camera").digest
    given = one.add(png(2), "image", "camera", "cat").digest
    bare = collector(index).add(png(3), "image", "camera").digest
    corrected = one.add(png(4), "image", "camera").digest
    one.label(corrected, "pig")
    assert one.label_rest(Sure("owl", 0.99)) == (2, 0)
    assert {i.digest: i.label for i in index.images()} == {
        guessed: "owl",
        bare: "owl",
        given: "cat",
        corrected: "pig",
    }
    assert one.label_rest(Sure("owl", 0.5)) == (0, 2)
    found = index.image(guessed)
    assert found is not None
    assert (found.label, found.origin, found.confidence, found.model) == (None, "none", None, None)


# what is no image


def test_what_is_no_image_or_too_large_is_refused(index: Index) -> None:
    one = collector(index, file_mib=0.01)
    for data, said in (
        (b"text", "shot.png: not an image"),
        (png(1)[:300], "shot.png: broken image"),
        (b"\x89PNG" + bytes(20_000), "shot.png: 0.0 MiB, file-mib allows 0.01"),
    ):
        with pytest.raises(DataError, match=said):
            one.add(data, "shot.png", "camera", "cat")
    assert files(index) == set()


# quotas


def test_a_full_label_keeps_a_fair_sample_of_all_that_came(index: Index) -> None:
    early = 0
    for turn in range(6):
        one = collector(index, class_quota=5, near=-1)
        source = f"camera-{turn}"
        one.consent(source)
        kept = Counter(
            one.add(png(1000 * turn + n), "image", source, "cat").outcome for n in range(20)
        )
        assert set(kept) <= {"kept", "full"}
        assert len(index.images()) == len(files(index)) == 5
        if turn == 0:
            assert 5 < kept["kept"] < 20
        early += sum(image.source == "camera-0" for image in index.images())
    assert one.add(png(77), "image", "camera", "dog").outcome == "kept"
    assert 0 < early < 30  # neither the first nor the last are all there is


def test_every_image_is_kept_with_the_same_probability(tmp_path: Path) -> None:
    kept: Counter[int] = Counter()
    from client.quota import make_room

    rules = Collecting(class_quota=4)
    for trial in range(60):
        with Index.create(tmp_path / str(trial)) as index:
            index.run("PRAGMA synchronous = OFF")
            index.run("INSERT INTO sources VALUES ('s', 0)")
            with index.writing():
                for n in range(16):
                    if make_room(index, "cat", 1, rules):
                        index.run(
                            "INSERT INTO images VALUES (?, 's', 'cat', 'given', NULL, NULL, 0, 1, "
                            "0, 0, 0)",
                            (f"{n:02d}",),
                        )
            kept.update(int(image.digest) // 4 for image in index.images())
    # each quarter of the stream has a quarter of the 240 places, within four deviations
    assert sum(kept.values()) == 240
    assert all(abs(kept[quarter] - 60) < 27 for quarter in range(4))


def test_rare_labels_stay_when_bytes_are_short(index: Index) -> None:
    size = len(png(1))
    one = collector(index, quota_mib=8.5 * size / 2**20, near=-1)
    one.add(png(1), "image", "camera", "rare")
    for n in range(2, 30):
        one.add(png(n), "image", "camera", "often")
        assert sum(image.bytes for image in index.images()) <= 8.5 * size
    labels = Counter(image.label for image in index.images())
    assert labels["rare"] == 1
    assert labels["often"] >= 6
    assert len(files(index)) == len(index.images())


def test_an_image_larger_than_the_quota_is_not_kept_and_moves_nothing(index: Index) -> None:
    one = collector(index, quota_mib=1.5 * len(png(1)) / 2**20)
    first = one.add(png(1), "image", "camera", "cat")
    large = file_of(picture(2, side=200))
    assert one.add(large, "image", "camera", "dog").outcome == "full"
    assert files(index) == {first.digest}


def test_what_the_model_labels_does_not_overfill_a_label(index: Index) -> None:
    one = collector(index)
    for n in range(6):
        one.add(png(n), "image", "camera")
    assert collector(index, class_quota=2).label_rest(Sure("newt")) == (6, 0)
    assert len(index.images()) == len(files(index)) == 2


def test_a_correction_does_not_overfill_a_label(index: Index) -> None:
    one = collector(index, class_quota=2)
    for n in (1, 2):
        one.add(png(n), "image", "camera", "cat")
    moved = one.add(png(3), "image", "camera", "dog")
    one.label(moved.digest, "cat")
    assert len(index.images()) == 2
    assert moved.digest in files(index)


# forgetting


def test_what_is_forgotten_leaves_no_row_and_no_byte(index: Index) -> None:
    one = collector(index, clock=(clock := Clock()))
    one.consent("doorbell")
    old = one.add(png(1), "image", "camera", "cat").digest
    clock.now += 10 * DAY
    dog = one.add(png(2), "image", "camera", "dog").digest
    bell = one.add(png(3), "image", "doorbell", "dog").digest
    bare = one.add(png(4), "image", "camera").digest
    cat = one.add(png(5), "image", "camera", "cat").digest
    assert one.forget(older_days=5) == 1
    assert files(index) == {dog, bell, bare, cat}
    assert one.forget(source="doorbell", label="cat") == 0
    assert one.forget(source="doorbell") == 1
    assert one.forget(label="") == 1
    assert one.forget(digest=cat[:12]) == 1
    assert files(index) == {dog}
    with pytest.raises(ConfigError, match="nothing to forget is named"):
        one.forget()
    assert one.forget(everything=True) == 1
    index.close()
    content = (index.folder / "index.sqlite3").read_bytes()
    for digest in (old, dog, bell, bare, cat):
        assert digest.encode() not in content


def test_what_is_too_old_goes_by_itself(index: Index) -> None:
    clock = Clock()
    one = collector(index, clock=clock, retention_days=3)
    one.add(png(1), "image", "camera", "cat")
    clock.now += 2 * DAY
    new = one.add(png(2), "image", "camera", "cat").digest
    assert one.expire() == 0
    clock.now += 1.5 * DAY
    assert one.expire() == 1
    assert files(index) == {new}
    assert collector(index, clock=clock).expire() == 0

"""A device that trains on what it collected: frozen batches, classes by name, what measures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_client_app import SETTINGS, SPEC, context, identity, judged, message, query, report_in
from test_collect import Sure, collector, png

from client.app import app
from client.index import Index
from client.limits import LimitError
from client.own import OwnDevice
from client.settings import Collecting, DeviceSettings, Limits, read_settings, template
from common.config import Config
from common.data.holdout import below
from common.errors import ConfigError, DataError
from common.order import Order

__all__ = ["identity", "judged"]

CLASSES = ("cat", "dog", "newt", "owl", "pig", "a", "b", "c", "d", "e")
CONFIG = Config.parse(SETTINGS)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index.create(tmp_path / "store") as made:
        yield made


@pytest.fixture
def order(judged: tuple[Order, np.ndarray]) -> Order:
    net = SPEC.model_copy(update={"class_names": CLASSES, "input_shape": (3, 8, 8)})
    return judged[0].model_copy(update={"net": net, "phase": "look"})


def at(order: Order, **changes: Any) -> Order:
    return order.model_copy(update=changes)


def device(index: Index, run: str = "1", **sections: Any) -> OwnDevice:
    return OwnDevice(index, CONFIG, run, DeviceSettings(**sections))


def fill(index: Index, many: int = 40, first: int = 0, label: str = "cat") -> None:
    one = collector(index, near=-1)
    for n in range(first, first + many):
        one.add(png(n), "image", "camera", label)


def bytes_of(pair: tuple[Any, Any]) -> str:
    return pair[0].digest + pair[1].digest


def test_all_rounds_of_a_step_see_the_same_images(index: Index, order: Order) -> None:
    fill(index)
    first = device(index).split(order)
    assert len(first[0]) + len(first[1]) == 40
    assert first[0].shape == (3, 8, 8)
    some = index.images()[0].digest
    fill(index, 10, 100, "dog")
    collector(index).label(some, "owl")
    full = collector(index, class_quota=1, near=-1)
    for n in range(200, 210):
        full.add(png(n), "image", "camera", "dog")
    later = at(order, phase="grow", round=1, class_counts=[1] * 10)
    assert bytes_of(device(index).split(later)) == bytes_of(first)
    index.drop_decoded()
    assert bytes_of(device(index).split(later)) == bytes_of(first)
    # the next step sees what is there now, and what was replaced goes with the step before
    after = device(index).split(at(order, step=2))
    assert {int(label) for part in after for label in part.labels} == {0, 1, 3}


def test_a_replaced_image_stays_while_its_step_lasts(index: Index, order: Order) -> None:
    fill(index, 8)
    before = bytes_of(device(index).split(order))
    one = collector(index, class_quota=4, near=-1)
    for n in range(50, 70):
        one.add(png(n), "image", "camera", "cat")
    assert len(index.images()) == 4
    index.drop_decoded()
    assert bytes_of(device(index).split(at(order, round=1))) == before
    for step in (2, 3):
        device(index).split(at(order, step=step))
    assert len(list((index.folder / "images").iterdir())) == len(index.images("TRUE")) == 4


def test_an_interrupted_run_goes_on_with_the_batch_that_its_rounds_have_seen(
    index: Index, order: Order
) -> None:
    fill(index)
    before = bytes_of(device(index, "1").split(order))
    fill(index, 5, 100)
    going_on = at(order, phase="consolidate", round=1, class_counts=[1] * 10)
    assert bytes_of(device(index, "2").split(going_on)) == before
    # a run that begins anew takes what is there
    assert bytes_of(device(index, "3").split(order)) != before
    fill(index, 5, 200)
    assert len(device(index, "4").split(order)[0]) > 30


def test_what_is_forgotten_leaves_the_frozen_batch_too(index: Index, order: Order) -> None:
    fill(index)
    fill(index, 10, 100, "dog")
    device(index).split(order)
    assert list((index.folder / "decoded").iterdir())
    collector(index).forget(label="dog")
    assert not list((index.folder / "decoded").iterdir())
    train, held = device(index).split(at(order, round=1))
    assert len(train) + len(held) == 40
    assert set(train.labels.tolist()) == {0}


def test_a_file_that_is_lost_is_left_out(index: Index, order: Order) -> None:
    fill(index)
    lost = index.images()[3].digest
    index.path(lost).unlink()
    for number in range(2):  # decoded, and from what was decoded
        train, held = device(index).split(at(order, round=number))
        assert len(train) + len(held) == 39


def test_what_measures_is_fixed_by_content_and_never_trained_on(index: Index, order: Order) -> None:
    fill(index, 60)
    train, held = device(index).split(at(order, heldout=0.3))
    wanted = {image.digest for image in index.images() if below(bytes.fromhex(image.digest), 0.3)}
    assert len(held) == len(wanted) > 5
    # a later run that asks for less does not train on them
    again = device(index, "2").split(at(order, heldout=0.1))
    assert again[1].digest == held.digest
    assert again[0].digest == train.digest


def test_a_models_labels_count_less_and_never_measure(index: Index, order: Order) -> None:
    fill(index, 40)
    guessing = collector(index, Sure("newt"), near=-1)
    for n in range(100, 200):
        guessing.add(png(n), "image", "camera")
    shares, seen = [], set()
    for number in range(12):
        train, held = device(index).split(at(order, phase="grow", round=number))
        assert 2 not in held.labels
        assert (train.labels == 0).sum() + len(held) == 40
        shares.append((train.labels == 2).sum())
        seen |= {image.tobytes() for image in train.images[train.labels == 2]}
    guessed = [i for i in index.images() if i.origin == "model"]
    trainable = sum(not below(bytes.fromhex(i.digest), 0.15) for i in guessed)
    assert abs(np.mean(shares) / trainable - 0.3) < 0.08
    assert len(set(shares)) > 1
    assert len(seen) > 0.9 * trainable  # in turn, all of them
    one = device(index).split(at(order, phase="grow", round=3))
    assert bytes_of(one) == bytes_of(device(index).split(at(order, phase="grow", round=3)))


def test_labels_are_the_models_classes_by_name(index: Index, order: Order) -> None:
    fill(index, 6, 0, "pig")
    fill(index, 6, 50, "kitty")
    fill(index, 6, 90, "blurred")
    with pytest.raises(DataError, match=r"label 'blurred' \(6 images\), 'kitty' .* none of the"):
        device(index).split(order)
    assert index.run("SELECT * FROM batches") == []  # it can be corrected before the step begins
    named = device(index, labels={"kitty": "cat", "blurred": ""})
    train, held = named.split(order)
    labels = [*train.labels.tolist(), *held.labels.tolist()]
    assert sorted(labels) == [0] * 6 + [4] * 6
    assert train.classes == CLASSES
    unnamed = at(order, net=order.net.model_copy(update={"class_names": ()}))
    with pytest.raises(DataError, match="does not name its model's classes"):
        named.split(unnamed)


def test_an_image_that_does_not_fit_is_named(index: Index, order: Order) -> None:
    fill(index, 3)
    oblong = order.net.model_copy(update={"input_shape": (3, 8, 12)})
    with pytest.raises(DataError, match="24x24 pixels, the model needs exactly 12x8"):
        device(index).split(at(order, net=oblong))


# the app


def test_a_node_with_a_store_tells_its_name_and_works(
    index: Index, judged: tuple[Order, np.ndarray], tmp_path: Path
) -> None:
    fill(index, 30)
    node = {"partition-id": None, "num-partitions": None, "store": str(index.folder)}
    report = report_in(app(query(), context(None, **node)))
    assert (report.device, report.declined) == (index.name, None)
    net = SPEC.model_copy(update={"class_names": CLASSES})
    asked = judged[0].model_copy(update={"net": net})
    report = report_in(app(message(asked, base=judged[1]), context(None, **node)))
    assert report.declined is None
    assert report.images + report.heldout == 30
    assert list((index.folder / "bases").glob("*.safetensors"))


def test_a_store_that_is_not_there_is_told_to_the_server(tmp_path: Path) -> None:
    node = {"partition-id": None, "store": str(tmp_path / "nothing")}
    report = report_in(app(query(), context(None, **node)))
    assert report.declined is not None
    assert "holds no store" in report.declined


def test_a_device_beyond_its_limits_declines_with_the_reason(
    index: Index, judged: tuple[Order, np.ndarray]
) -> None:
    fill(index, 30)
    (index.folder / "device.toml").write_text("[limits]\nmemory-mib = 100000000\n")
    node = {"partition-id": None, "store": str(index.folder)}
    threads = torch.get_num_threads()
    report = report_in(app(message(judged[0], base=judged[1]), context(None, **node)))
    assert torch.get_num_threads() == threads
    assert report.device == index.name
    assert report.declined is not None
    assert "this device trains from 100000000 MiB" in report.declined


def test_a_round_that_was_too_long_is_stopped_and_then_declined_at_once(
    index: Index, order: Order
) -> None:
    fill(index, 30)
    own = device(index, limits=Limits(seconds=10))
    own.split(order)
    own._guard._began -= 11
    with pytest.raises(LimitError, match="stopped after 11 s with 50% of the training done"):
        own._guard.check(0.5)
    again = device(index, limits=Limits(seconds=10))
    with pytest.raises(LimitError, match="would take about 22 s, this device gives 10 s"):
        again.split(order)
    # other work has a pace of its own, and a device that was slow once is asked again
    device(index, limits=Limits(seconds=10)).split(at(order, phase="grow"))
    for _ in range(10):
        try:
            device(index, limits=Limits(seconds=10)).split(order)
            break
        except LimitError:
            continue
    else:
        raise AssertionError("never asked again")


# settings


def test_the_template_says_all_and_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text(template())
    assert read_settings(tmp_path) == DeviceSettings() == read_settings(tmp_path / "none")
    for section in (Collecting, Limits):
        for name, field in section.model_fields.items():
            assert f"# {name.replace('_', '-')} = " in template()
            assert field.description
    lines = [line.removeprefix("# ") if " = " in line else line for line in template().splitlines()]
    (tmp_path / "device.toml").write_text("\n".join(lines))
    assert read_settings(tmp_path).collect == Collecting()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[collect]\nquota = 3", "unknown setting collect.quota"),
        ("[collect]\nnear = 40", "collect.near is 40"),
        ("[limits]\nthreads = 0", "limits.threads is 0"),
        ("[labels]\nkitty = 3", "labels.kitty is 3"),
        ("x", "is no TOML"),
    ],
)
def test_a_wrong_setting_is_told_by_name(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_settings(tmp_path)
    assert said in str(caught.value)
    assert "device.toml" in str(caught.value)
    assert "\n" not in str(caught.value)

"""Orders and reports: read as they were written, and refused by field if anything is wrong."""

import json
import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.distill import Distillation
from common.errors import UpdateError
from common.filters import FreeSet
from common.order import (
    NetSpec,
    Order,
    Phase,
    Report,
    as_channels,
    as_free_set,
    read_order,
    read_report,
)
from common.regrow import Diversity
from common.update import check_values

DIGEST = "0123456789abcdef" * 4
OTHER = "f" * 64
NET = {
    "name": "resnet8",
    "classes": 10,
    "input_shape": [3, 32, 32],
    "width": 16.0,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.2],
    "class_names": [str(number) for number in range(10)],
}
ORDER: dict[str, Any] = {
    "run": 7,
    "step": 1,
    "phase": "grow",
    "attempt": 0,
    "round": 3,
    "net": NET,
    "graph": DIGEST,
    "base": DIGEST,
    "regrown": {
        "source": OTHER,
        "free": {"conv1": [0, 3]},
        "seed": 11,
        "diversity": [0.4, 0.2, 0.2, 0.2],
    },
    "free": {"conv1": [0, 3], "layer1.0.conv1": [2]},
    "kept": {},
    "scope": "group",
    "layout": None,
    "keep": OTHER,
    "epochs": 2,
    "batch": 32,
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "prox": 0.0,
    "crop": 4,
    "flip": True,
    "class_counts": [5, 0, 3],
    "teaching": {
        "weight": 0.3,
        "temperature": 2.0,
        "floor": 0.25,
        "ntd_weight": 0.1,
        "calibration": 1.0,
        "teacher": "prior",
        "mask_absent": False,
    },
    "anneal": [0.0, 0.2, 0.6],
    "heldout": 0.15,
    "rotations": 0.5,
    "trunk": OTHER,
    "expert_share": 0.05,
    "stem": "AACAPw==",
    "by_class": True,
    "layers": "last",
    "codec_up": "int8",
    "codec_down": "int4",
    "moved": DIGEST,
    "since": None,
    "feedback": OTHER,
}
LATER: dict[str, Any] = {
    "anchor": DIGEST,
    "anchor_weight": 10.0,
    "importance": "mas",
    "replay": OTHER,
    "rival": DIGEST,
    "opinion": 0.5,
    "replay_weight": 0.5,
    "spare": {"conv1": [1]},
    "full_rate": "group",
    "kept_lr": 0.1,
    "peer_weight": 1.0,
}
"""Fields that need not be there."""
REPORT: dict[str, Any] = {
    "device": "17",
    "run": 7,
    "step": 1,
    "phase": "grow",
    "base": DIGEST,
    "layout": OTHER,
    "images": 120,
    "heldout": 20,
    "right": 15,
    "loss": 0.25,
    "seconds": 1.5,
}


def changed(path: str, value: Any, whole: dict[str, Any] = ORDER) -> str:
    """Return the JSON of `whole` with the field at a dotted path set."""
    copy = json.loads(json.dumps(whole))
    *parents, leaf = path.split(".")
    place = copy
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place[parent]
    place[int(leaf) if isinstance(place, list) else leaf] = value
    return json.dumps(copy)


# ---------------------------------------------------------------- reading what was written


def test_an_order_comes_back_as_it_was() -> None:
    order = read_order(json.dumps(ORDER))
    assert read_order(order.model_dump_json()) == order
    # what came later and has its default is not sent
    assert json.loads(order.model_dump_json(exclude_defaults=True)) == ORDER
    later = read_order(json.dumps({**ORDER, **LATER}))
    assert json.loads(later.model_dump_json(exclude_defaults=True)) == {**ORDER, **LATER}
    assert order.net == NetSpec.model_validate(NET)
    assert order.net.input_shape == (3, 32, 32)
    assert order.regrown is not None
    assert order.regrown.rules() == Diversity(0.4, 0.2, 0.2, 0.2)
    assert order.teaching.distillation() == Distillation(0.3, 2.0, 0.25, 0.1)
    assert order.free_set() == FreeSet({"conv1": (0, 3), "layer1.0.conv1": (2,)})


def test_a_net_names_all_of_its_classes_or_none() -> None:
    assert NetSpec.model_validate({**NET, "class_names": []}).class_names == ()
    wrong = {**ORDER, "net": {**NET, "class_names": ["cat"]}}
    with pytest.raises(UpdateError, match="1 class_names for 10 classes"):
        read_order(json.dumps(wrong))


def test_a_net_can_be_looked_up_by_its_description() -> None:
    one, other = (read_order(json.dumps(ORDER)).net for _ in range(2))
    assert hash(one) == hash(other)
    assert {one: "net"}[other] == "net"


def test_a_report_comes_back_as_it_was() -> None:
    report = read_report(json.dumps(REPORT))
    assert read_report(report.model_dump_json()) == report
    assert (report.device, report.images, report.right, report.loss) == ("17", 120, 15, 0.25)
    assert report.declined is None
    declined = Report(device="3", declined="needs base")
    assert read_report(declined.model_dump_json()) == declined


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text("abc.123", min_size=1), st.lists(st.integers(0, 99), unique=True), max_size=4
    )
)
def test_a_free_set_survives_the_wire(channels: dict[str, list[int]]) -> None:
    free = FreeSet({name: tuple(some) for name, some in channels.items()})
    order = read_order(changed("free", as_channels(free)))
    assert order.free_set().digest == free.digest
    assert as_free_set(as_channels(free)) == free


def test_an_order_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        read_order(json.dumps(ORDER)).lr = 1.0


# ---------------------------------------------------------------- what is wrong is named


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run", "seven"),
        ("step", -1),
        ("phase", "train"),
        ("attempt", None),
        ("round", 1.5),
        ("net.classes", 0),
        ("net.name", 3),
        ("net.input_shape.0", 0),
        ("net.width", -1),
        ("net.std.1", 0.0),
        ("graph", "abc"),
        ("base", DIGEST.upper()),
        ("base", None),
        ("layout", DIGEST + "0"),
        ("keep", "../../../etc/passwd"),
        ("regrown.source", DIGEST[:-1] + "/"),
        ("free.conv1.0", -1),
        ("free.conv1", "0"),
        ("kept", []),
        ("scope", "everything"),
        ("epochs", -1),
        ("batch", 1),
        ("lr", -0.1),
        ("lr", math.nan),
        ("lr", math.inf),
        ("momentum", 1.1),
        ("momentum", math.nan),
        ("weight_decay", -1),
        ("crop", -1),
        ("flip", "perhaps"),
        ("teaching.weight", -1),
        ("teaching.weight", math.inf),
        ("teaching.temperature", 0),
        ("teaching.floor", 2),
        ("teaching.ntd_weight", None),
        ("anneal.2", 0.0),
        ("rotations", -0.1),
        ("trunk", "abc"),
        ("expert_share", 1.5),
        ("codec_up", "int9"),
        ("moved", DIGEST + "0"),
        ("heldout", 0.9),
        ("heldout", math.nan),
    ],
)
def test_a_wrong_field_of_an_order_is_named_with_its_value(path: str, value: Any) -> None:
    with pytest.raises(UpdateError) as caught:
        read_order(changed(path, value))
    message = str(caught.value)
    assert message.startswith(f"order field '{path}' is ")
    assert "\n" not in message
    assert repr(value)[:40] in message


@pytest.mark.parametrize(
    ("path", "value"),
    [("images", -1), ("right", "many"), ("loss", math.nan), ("seconds", -1), ("device", None)],
)
def test_a_wrong_field_of_a_report_is_named(path: str, value: Any) -> None:
    with pytest.raises(UpdateError, match=rf"^report field '{path}' is {value!r}: "):
        read_report(changed(path, value, REPORT))


@pytest.mark.parametrize("field", sorted(ORDER))
def test_a_missing_field_of_an_order_is_named(field: str) -> None:
    partial = {name: value for name, value in ORDER.items() if name != field}
    with pytest.raises(UpdateError, match=rf"^order field '{field}': Field required$"):
        read_order(json.dumps(partial))


@pytest.mark.parametrize(
    ("path", "value", "missing"),
    [("net.input_shape", [3, 32], 2), ("regrown.diversity", [1.0], 1), ("anneal", [0.0, 1.0], 2)],
)
def test_a_list_that_is_too_short_is_named(path: str, value: Any, missing: int) -> None:
    with pytest.raises(UpdateError, match=rf"^order field '{path}\.{missing}': Field required$"):
        read_order(changed(path, value))


@pytest.mark.parametrize("path", ["evil", "net.evil", "teaching.evil", "regrown.evil"])
def test_extra_fields_are_refused(path: str) -> None:
    with pytest.raises(UpdateError, match=rf"^order field '{path}' is 1: Extra inputs"):
        read_order(changed(path, 1))
    with pytest.raises(UpdateError, match=r"^report field 'extra' is 'x': Extra"):
        read_report(changed("extra", "x", REPORT))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"order"',
        json.dumps(ORDER)[:-1],
        json.dumps(ORDER) + "}",
        "\x80\x04pickle",
        "\n\n{" + "x" * 5000,
        '{"run": ' + "9" * 5000 + "}",
    ],
)
def test_what_is_no_order_at_all_is_refused_in_one_short_line(text: str) -> None:
    for read in (read_order, read_report):
        with pytest.raises(UpdateError) as caught:
            read(text)
        message = str(caught.value)
        assert message.startswith(("order ", "report "))
        assert "\n" not in message
        assert len(message) < 300


def test_every_phase_and_scope_can_be_ordered() -> None:
    for phase in get_args(Phase):
        assert read_order(changed("phase", phase)).phase == phase
    for scope in ("rows", "group", "all", "expert"):
        assert read_order(changed("scope", scope)).scope == scope
    assert set(Order.model_fields) == set(ORDER) | set(LATER)


# ---------------------------------------------------------------- the values beside it


def test_good_values_pass_untouched() -> None:
    values = np.arange(5, dtype=np.float32)
    assert check_values(values, 5, "the model") is values
    assert check_values(np.zeros(0, np.float32), 0, "nothing").shape == (0,)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(5, np.float64),
        np.zeros(5, np.float16),
        np.zeros(5, np.int32),
        np.zeros(5, ">f4"),
        np.zeros(4, np.float32),
        np.zeros(6, np.float32),
        np.zeros((5, 1), np.float32),
        np.zeros((), np.float32),
    ],
)
def test_values_of_another_type_or_shape_are_refused(values: np.ndarray) -> None:
    with pytest.raises(UpdateError, match=r"^update of device 3 is .*expected float32\[5\]"):
        check_values(values, 5, "update of device 3")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_position(bad: float) -> None:
    values = np.zeros(5, np.float32)
    values[3] = bad
    with pytest.raises(UpdateError, match=rf"^update of device 3 is not finite: value 3 is {bad}"):
        check_values(values, 5, "update of device 3")

"""The device's Flower app: it parses, asks `client.local`, and never lets an error out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app, make_app
from client.local import net_and_graph
from client.simulated import SimulatedDevice
from common.config import Config
from common.filters import FreeSet
from common.layout import consolidation_layout, dense_layout
from common.order import NEEDS_BASE, NetSpec, Order, Report, Teaching, read_report
from common.scenario import Scenario
from common.state import read_state, state_digest

SETTINGS: dict[str, Any] = Config.parse(
    {"net": "resnet8", "width": 8, "devices": 4, "part-size": 200, "prior-size": 100}
).flat()
SPEC = NetSpec(name="resnet8", classes=10, input_shape=(1, 8, 8), width=8, mean=(0.3,), std=(0.4,))
TEACHING = Teaching(
    weight=0.3,
    temperature=2.0,
    floor=0.3,
    ntd_weight=0.0,
    calibration=1.0,
    teacher="prior",
    mask_absent=False,
)


@pytest.fixture(autouse=True)
def identity() -> None:
    """Without it Flower makes no message."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def context(cache: Path | None, run: dict[str, Any] | None = None, **node: Any) -> Context:
    config = {"partition-id": 2, "num-partitions": 4, "cache": cache and str(cache), **node}
    return Context(
        run_id=1,
        node_id=7,
        node_config={key: value for key, value in config.items() if value is not None},
        state=RecordDict(),
        run_config=SETTINGS if run is None else run,
    )


def query() -> Message:
    return Message(RecordDict(), dst_node_id=7, message_type="query")


def message(order: Order | str, **arrays: np.ndarray) -> Message:
    text = order if isinstance(order, str) else order.model_dump_json()
    content = RecordDict({"order": ConfigRecord({"json": text})})
    if arrays:
        content["arrays"] = ArrayRecord({name: Array(value) for name, value in arrays.items()})
    return Message(content, dst_node_id=7, message_type="train")


def report_in(reply: Message) -> Report:
    assert reply.has_content()
    return read_report(str(reply.content.config_records["report"]["json"]))


@pytest.fixture(scope="module")
def judged() -> tuple[Order, np.ndarray]:
    """An order to judge a fresh net, and its base."""
    net, graph = net_and_graph(SPEC)
    state = read_state(net)
    free = FreeSet({"conv1": (0,)})
    return (
        Order(
            run=0,
            step=1,
            phase="judge",
            attempt=0,
            round=0,
            net=SPEC,
            graph=graph.digest,
            base=state_digest(state),
            regrown=None,
            free={"conv1": [0]},
            kept={},
            scope="group",
            layout=consolidation_layout(graph, free, state).digest,
            keep=None,
            epochs=1,
            batch=32,
            lr=0.0,
            momentum=0.9,
            weight_decay=0.0,
            prox=0.0,
            crop=0,
            flip=False,
            teaching=TEACHING,
            class_counts=[],
            anneal=(0.0, 1.0, 0.6),
            heldout=0.15,
            rotations=0.0,
            trunk=None,
            expert_share=0.0,
            stem="",
            by_class=False,
            layers="all",
            codec_up="fp32",
            codec_down="fp32",
            moved=None,
            since=None,
            feedback=None,
        ),
        dense_layout(graph, state).pack(state),
    )


def test_a_device_tells_its_name_which_sorts_like_its_number(tmp_path: Path) -> None:
    report = report_in(app(query(), context(tmp_path)))
    assert report.device == "device-00002"
    assert report.declined is None
    names = [SimulatedDevice(Config(), i).device for i in (2, 10, 100)]
    assert names == sorted(names)


def test_a_simulated_device_has_its_share_of_a_part(tmp_path: Path) -> None:
    config = Config.parse(SETTINGS)
    batches = [SimulatedDevice(config, i).batch(1) for i in range(4)]
    assert sum(len(batch) for batch in batches) == 200
    assert SimulatedDevice(config, 2).batch(1).digest == batches[2].digest
    assert batches[2].digest == Scenario(config).device(1, 2).digest
    assert SimulatedDevice(config, 2).batch(2).digest != batches[2].digest
    # the first freeing of a brought model looks at the first new images
    assert SimulatedDevice(config, 2).batch(0).digest == batches[2].digest


def test_an_order_is_carried_out_and_answered(
    judged: tuple[Order, np.ndarray], tmp_path: Path
) -> None:
    order, base = judged
    reply = app(message(order, base=base), context(tmp_path))
    report = report_in(reply)
    assert report.declined is None
    assert report.device == "device-00002"
    assert report.images + report.heldout == len(
        SimulatedDevice(Config.parse(SETTINGS), 2).batch(1)
    )
    assert "arrays" not in reply.content.array_records
    assert reply.metadata.message_type == "train"


def test_weighing_sends_one_packed_array(judged: tuple[Order, np.ndarray], tmp_path: Path) -> None:
    order, base = judged
    graph = net_and_graph(SPEC)[1]
    weigh = order.model_copy(update={"phase": "weigh", "free": {}, "layout": None})
    reply = app(message(weigh, base=base), context(tmp_path))
    assert report_in(reply).declined is None
    record = reply.content.array_records["arrays"]
    assert list(record) == ["update"]
    assert record["update"].numpy().shape == (2 * graph.count,)


def test_a_device_keeps_its_bases_where_it_is_told(
    judged: tuple[Order, np.ndarray], tmp_path: Path
) -> None:
    order, base = judged
    app(message(order, base=base), context(tmp_path / "node"))
    assert report_in(app(message(order), context(tmp_path / "node"))).declined is None
    assert report_in(app(message(order), context(tmp_path / "other"))).declined == NEEDS_BASE
    by_engine = make_app(SETTINGS, str(tmp_path / "node"))
    assert report_in(by_engine(message(order), context(None, {}))).declined is None


def test_settings_stand_in_where_the_engine_passes_none(tmp_path: Path) -> None:
    reply = make_app(SETTINGS)(query(), context(tmp_path, {}))
    assert report_in(reply).device == "device-00002"


def test_the_servers_own_settings_are_no_concern_of_the_device(tmp_path: Path) -> None:
    run = {**SETTINGS, "out": "/nowhere", "resume": True}
    assert report_in(app(query(), context(tmp_path, run))).declined is None


def test_the_engine_decides_how_many_devices_there_are(
    judged: tuple[Order, np.ndarray], tmp_path: Path
) -> None:
    order, base = judged
    counts = []
    for devices in (4, 8):
        node = context(tmp_path, **{"num-partitions": devices})
        report = report_in(app(message(order, base=base), node))
        counts.append(report.images + report.heldout)
    config = Config.parse({**SETTINGS, "devices": 8})
    assert counts[1] == len(SimulatedDevice(config, 2).batch(1)) != counts[0]


# what a device refuses


def test_a_node_without_data_says_what_is_missing(tmp_path: Path) -> None:
    node = context(tmp_path, **{"partition-id": None})
    report = report_in(app(query(), node))
    assert report.declined is not None
    assert "node config has no 'store'" in report.declined


def test_settings_that_cannot_be_used_are_told_by_name(tmp_path: Path) -> None:
    for changes, said in (
        ({"colour": 1}, "unknown setting 'colour'"),
        ({"batch": 1}, "batch is 1"),
    ):
        report = report_in(app(query(), context(tmp_path, {**SETTINGS, **changes})))
        assert report.declined is not None
        assert said in report.declined


def test_data_that_is_not_there_is_told_to_the_server(
    judged: tuple[Order, np.ndarray], tmp_path: Path
) -> None:
    run = {**SETTINGS, "data": str(tmp_path / "nothing")}
    report = report_in(app(message(judged[0], base=judged[1]), context(tmp_path, run)))
    assert report.declined is not None
    assert str(tmp_path / "nothing") in report.declined


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"phase": "explode"}, "order field 'phase' is 'explode'"),
        ({"batch": 1}, "order field 'batch' is 1"),
        ({"graph": "short"}, "order field 'graph' is 'short'"),
        ({"pickle": "x"}, "order field 'pickle'"),
        ({"scope": None}, "order field 'scope' is None"),
    ],
)
def test_a_malformed_order_is_declined_by_field(
    change: dict[str, Any], said: str, judged: tuple[Order, np.ndarray], tmp_path: Path
) -> None:
    text = json.dumps({**judged[0].model_dump(mode="json"), **change})
    report = report_in(app(message(text), context(tmp_path)))
    assert report.declined is not None
    assert said in report.declined
    assert "\n" not in report.declined


def test_an_order_that_is_no_order_is_declined(tmp_path: Path) -> None:
    for text in ("", "hello", "[]"):
        assert report_in(app(message(text), context(tmp_path))).declined


def test_the_server_cannot_make_a_device_import_a_module(
    judged: tuple[Order, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('the module was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    order = judged[0].model_copy(update={"net": SPEC.model_copy(update={"name": "trap:net"})})
    report = report_in(app(message(order, base=judged[1]), context(tmp_path)))
    assert report.declined is not None
    assert "'trap:net', this device's settings name 'resnet8'" in report.declined


def test_a_net_that_the_devices_own_settings_name_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged: tuple[Order, np.ndarray]
) -> None:
    (tmp_path / "mine_for_test.py").write_text(
        "from common.nets import build\n"
        "def net(classes, in_channels):\n"
        "    return build('resnet8', classes, in_channels, 8)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "mine_for_test:net"
    order = judged[0].model_copy(update={"net": SPEC.model_copy(update={"name": name, "width": 0})})
    run = {**SETTINGS, "net": name, "width": 0}
    report = report_in(app(message(order, base=judged[1]), context(tmp_path, run)))
    assert report.declined is None

"""Rounds over a grid whose devices are functions: who is asked, who is used, who is not."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_grid import FakeGrid, arrays_in, freed_prior, make_plan, order_in, reply_to
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from common.errors import RoundError, UpdateError
from common.layout import consolidation_layout, dense_layout, scope_layout
from common.order import NEEDS_BASE, Order, Report
from common.state import State, read_state, state_digest
from server import rounds
from server.fleet import Fleet
from server.inline import _identify
from server.plan import Plan, RunState, layout_of, order_of, start
from server.report import _problem
from server.results import privacy_of
from server.rounds import play_rounds
from server.wire import order_message, read_reply

HELDOUT = 20


def honest(order: Order, device: str, **changes: Any) -> Report:
    """The report of a device that did as it was told."""
    asked = ("run", "step", "phase", "attempt", "round", "base", "free_digest", "layout")
    same = {name: getattr(order, name) for name in asked}
    counts = {"images": 50, "heldout": HELDOUT, "right": 15, "prior_right": 12, "both_right": 11}
    counts.update(changes)
    images, classes = int(counts["images"]), order.net.classes
    rest = images - images // classes * (classes - 1)
    by_class = [images // classes] * (classes - 1) + [rest]
    given = {"device": device, "loss": 1.5, "class_counts": by_class}
    return Report(**{**given, **same, **counts})


@dataclass
class Device:
    """A device that sends `value` for every entry; a test bends what it does.

    `bend` gets message, report and update and returns the reply, or None for no answer.
    """

    plan: Plan
    name: str
    value: float = 1.0
    bend: Callable[[Message, Report, np.ndarray | None], Message | None] = reply_to
    hello: Callable[[Message], Message] | None = None
    orders: list[Order] = field(default_factory=list)
    arrays: list[dict[str, np.ndarray]] = field(default_factory=list)

    def __call__(self, message: Message) -> Message | None:
        if message.metadata.message_type == "query":
            return (self.hello or (lambda m: reply_to(m, Report(device=self.name))))(message)
        order = order_in(message)
        self.orders.append(order)
        self.arrays.append(arrays_in(message))
        return self.bend(message, honest(order, self.name), self.update(order))

    def update(self, order: Order) -> np.ndarray | None:
        graph, state = self.plan.graph, read_state(self.plan.net)
        if order.phase == "judge":
            return None
        size = 2 * graph.count
        if order.phase == "grow":
            size = scope_layout(order.scope, graph, order.free_set(), state).size
        elif order.phase == "consolidate":
            size = consolidation_layout(graph, order.free_set(), state).size
        return np.full(size, self.value, np.float32)


@dataclass
class Watcher:
    texts: list[str] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)
    tries: list[str] = field(default_factory=list)
    done: list[tuple[int, int]] = field(default_factory=list)

    def device_done(self, done: int, asked: int) -> None:
        self.done.append((done, asked))

    def message(self, text: str) -> None:
        self.texts.append(text)

    def device(self, name: str, event: str, reason: str | None = None) -> None:
        self.events.append((name, event))

    def abandoned(self, reason: str) -> None:
        self.tries.append(reason)


class Enough(Exception):  # noqa: N818 - no error: it ends a test's run
    """Raised after the rounds that a test wants."""


@dataclass
class Played:
    states: list[RunState]
    records: list[dict[str, Any]]
    watcher: Watcher
    fleet: Fleet


def play(
    grid: FakeGrid,
    plan: Plan,
    state: RunState,
    count: int = 1,
    held: dict[str, list[str]] | None = None,
) -> Played:
    """Play `count` rounds from `state`."""
    played = Played([state], [], Watcher(), Fleet(grid, held))

    def after_round(before: RunState, after: RunState, record: dict[str, Any]) -> None:
        assert before is played.states[-1]
        played.states.append(after)
        played.records.append(record)
        if len(played.records) == count:
            raise Enough

    with pytest.raises(Enough):
        play_rounds(grid, plan, state, played.fleet, played.watcher, after_round)
    return played


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(
        devices=4,
        steps=1,
        rounds=2,
        consolidate_rounds=1,
        quorum=0.5,
        repeats=2,
        round_timeout=5.0,
        node_timeout=5.0,
        codec_up="fp32",
        codec_down="fp32",
    )


@pytest.fixture(scope="module")
def prior(plan: Plan) -> Any:
    return freed_prior(plan)


@pytest.fixture
def state(plan: Plan, prior: Any) -> RunState:
    return start(plan, *prior)


@pytest.fixture(autouse=True)
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    _identify()
    monkeypatch.setattr(rounds, "_PAUSE_SECONDS", 0.0)


def fleet_of(plan: Plan, count: int = 4) -> tuple[FakeGrid, list[Device]]:
    devices = [Device(plan, f"device-{i}", float(i + 1)) for i in range(count)]
    return FakeGrid({1000 + i: device for i, device in enumerate(devices)}), devices


def with_patience(plan: Plan, **settings: Any) -> Plan:
    return replace(plan, config=plan.config.model_copy(update=settings))


def weights_of(plan: Plan, state: RunState) -> np.ndarray:
    """Packed positions that are plainly averaged: all but BN variances."""
    layout = layout_of(plan, state)
    return np.setdiff1d(np.arange(layout.size), layout.statistics[1])


# a round that goes well


def test_a_round_is_the_mean_of_all_devices(plan: Plan, state: RunState) -> None:
    grid, _ = fleet_of(plan)
    played = play(grid, plan, state)
    values = played.states[1].values
    assert values is not None
    assert (values[weights_of(plan, state)] == np.float32(2.5)).all()
    assert (played.states[1].phase, played.states[1].round) == ("grow", 1)
    assert played.watcher.done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert played.watcher.texts == []


def test_devices_weigh_as_many_images_as_they_have(plan: Plan, state: RunState) -> None:
    grid, devices = fleet_of(plan)
    for device, images in zip(devices, (1, 1, 1, 7), strict=True):
        device.bend = lambda m, r, u, n=images: reply_to(  # type: ignore[misc]
            m, r.model_copy(update={"images": n, "class_counts": [n, *[0] * 9]}), u
        )
    values = play(grid, plan, state).states[1].values
    assert values is not None
    assert (values[weights_of(plan, state)] == np.float32((1 + 2 + 3 + 7 * 4) / 10)).all()


def test_devices_are_told_how_often_all_of_them_see_each_class(plan: Plan, state: RunState) -> None:
    grid, devices = fleet_of(plan)
    skewed = [20, 30, *[0] * 8]
    devices[0].bend = lambda m, r, u: reply_to(m, r.model_copy(update={"class_counts": skewed}), u)
    play(grid, plan, state, count=2)
    first, second = devices[1].orders
    assert first.class_counts == []
    assert second.class_counts == [20 + 3 * 5, 30 + 3 * 5, *[3 * 5] * 8]


@pytest.mark.parametrize("counts", [[], [50], [51, *[0] * 9], [25, 24, *[0] * 8]])
def test_class_counts_that_do_not_fit_the_images_are_declined(
    plan: Plan, state: RunState, counts: list[int]
) -> None:
    grid, devices = fleet_of(plan)
    devices[0].bend = lambda m, r, u: reply_to(m, r.model_copy(update={"class_counts": counts}), u)
    (record,) = play(grid, plan, state, count=1).records
    assert record["devices_used"] == 3
    ((reason, declined),) = record["declined"].items()
    assert declined == 1
    assert "are not 50 images of 10 classes" in reason


def test_a_record_tells_all_of_a_round_and_fits_the_schema(plan: Plan, state: RunState) -> None:
    grid, devices = fleet_of(plan)
    played = play(grid, plan, state, count=5)
    assert [r["phase"] for r in played.records] == ["grow", "grow", "weigh", "consolidate", "judge"]
    for record in played.records:
        assert _problem(json.loads(json.dumps(record)), "round") is None
    first, second, weigh, consolidate, judge = played.records
    assert first["devices_asked"] == first["devices_used"] == 4
    assert first["declined"] == {}
    assert first["heldout_accuracy"] == 15 / 20
    assert first["agreement"] == 11 / 12
    assert first["train_loss"] == 1.5
    assert first["lambda"] == plan.config.kd_weight
    assert [r["round"] for r in played.records] == [1, 2, 1, 1, 1]
    assert weigh["train_loss"] is judge["train_loss"] is None
    assert [r["scale"] for r in played.records] == [None, None, None, 1.0, None]
    update = 4 * layout_of(plan, state).size
    model = 4 * sum(t.numel() for t in state.base.values())
    assert 4 * update < first["bytes_up"] < 4 * update + 4 * 2000
    # the whole base once to each device, from then on only what changed
    assert 4 * model < first["bytes_down"] < 4 * model + 4 * 4000
    assert 4 * update < second["bytes_down"] < 4 * update + 4 * 4000
    assert consolidate["bytes_down"] < 4 * 4000
    assert judge["bytes_up"] < 4 * 2000
    assert [sorted(a) for a in devices[0].arrays] == [
        ["base"],
        ["values"],
        ["values"],
        [],
        ["values"],
    ]


def test_a_record_tells_the_largest_epsilon_of_the_devices_that_were_used(
    plan: Plan, state: RunState
) -> None:
    grid, devices = fleet_of(plan)
    for device, epsilon in zip(devices, (3.5, 0.25, None, 99.0), strict=True):
        changes = {"epsilon": epsilon, "declined": "not now" if epsilon == 99.0 else None}
        device.bend = lambda m, r, u, c=changes: reply_to(m, r.model_copy(update=c), u)  # type: ignore[misc]
    noised = play(grid, plan, state, count=1).records
    assert [r["epsilon"] for r in noised] == [3.5]
    assert _problem(json.loads(json.dumps(noised[0])), "round") is None
    plain = play(fleet_of(plan)[0], plan, state, count=1).records
    assert [r["epsilon"] for r in plain] == [None]
    assert privacy_of(plain) is None
    assert privacy_of([*noised, {"epsilon": 4.5}, *plain, {}]) == {"epsilon": 4.5, "delta": 1e-5}


def test_the_base_that_is_sent_is_the_whole_model(plan: Plan, state: RunState) -> None:
    grid, devices = fleet_of(plan)
    play(grid, plan, state)
    layout = dense_layout(plan.graph, state.base)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.base.items()}
    sent = layout.unpack(zeros, devices[0].arrays[0]["base"])
    assert state_digest(sent) == state.base_digest == devices[0].orders[0].base
    assert sorted(layout.offsets) == sorted(state.base)
    assert layout.size == sum(t.numel() for t in state.base.values())


def test_importances_are_summed_over_devices_by_layer(plan: Plan, state: RunState) -> None:
    grid, devices = fleet_of(plan)
    favourite = plan.graph.layers[-1]
    end = plan.graph.count

    def bend(message: Message, report: Report, update: np.ndarray | None) -> Message:
        if report.phase == "weigh":
            assert update is not None
            scores = np.tile(np.arange(end, dtype=np.float32), 2)
            scores[[end - favourite.width, 2 * end - favourite.width]] = 1e6
            update = scores
        return reply_to(message, report, update)

    for device in devices:
        device.bend = bend
    after = play(grid, plan, state, count=3).states[-1]
    assert after.scores is not None
    assert {n: s.shape for n, s in after.scores.items()} == {
        layer.name: (layer.width,) for layer in plan.graph.layers
    }
    assert after.scores[favourite.name][0] > after.scores[favourite.name][1]
    assert 0 not in after.next_free.channels[favourite.name]


# devices that hold a model already


def test_a_device_that_is_known_to_hold_the_base_is_not_sent_it(
    plan: Plan, state: RunState
) -> None:
    grid, devices = fleet_of(plan)
    held = {"device-1": [state.base_digest], "device-2": [str(state.source)]}
    play(grid, plan, state, held=held)
    assert [sorted(d.arrays[0]) for d in devices] == [["base"], [], [], ["base"]]


def test_a_device_that_lost_its_base_says_so_and_gets_it_in_the_same_round(
    plan: Plan, state: RunState
) -> None:
    grid, devices = fleet_of(plan)

    def forgetful(message: Message, report: Report, update: np.ndarray | None) -> Message:
        if "base" not in arrays_in(message):
            return reply_to(message, Report(device=report.device, declined=NEEDS_BASE))
        return reply_to(message, report, update)

    devices[2].bend = forgetful
    held = {d.name: [state.base_digest] for d in devices}
    played = play(grid, plan, state, held=held)
    assert played.records[0]["devices_used"] == 4
    assert played.records[0]["declined"] == {}
    assert played.watcher.done[-1] == (4, 4)
    assert [sorted(a) for a in devices[2].arrays] == [[], ["base"]]
    assert [len(d.orders) for d in devices] == [1, 1, 2, 1]
    assert played.fleet.holds("device-2", state.base_digest)


def test_a_device_that_never_has_enough_of_the_base_is_left_out(
    plan: Plan, state: RunState
) -> None:
    grid, devices = fleet_of(plan)
    devices[0].bend = lambda m, r, u: reply_to(m, Report(device=r.device, declined=NEEDS_BASE))
    played = play(grid, plan, state)
    assert played.records[0]["devices_used"] == 3
    assert played.records[0]["declined"] == {NEEDS_BASE: 1}
    assert len(devices[0].orders) <= 2


def test_what_a_device_keeps_is_remembered_as_its_next_base(plan: Plan, state: RunState) -> None:
    grid, _ = fleet_of(plan)
    played = play(grid, plan, state, count=3)
    grown = played.states[-1].base_digest
    assert all(played.fleet.holds(f"device-{i}", grown) for i in range(4))


def test_the_ledger_remembers_the_newest_models_only() -> None:
    fleet = Fleet(FakeGrid({}))
    for number in range(6):
        fleet.note("a", f"base-{number}", None)
    assert fleet.held == {"a": ["base-2", "base-3", "base-4", "base-5"]}
    fleet.note("a", "base-3")
    assert fleet.held["a"][-1] == "base-3"
    fleet.forget("a", "base-3")
    assert not fleet.holds("a", "base-3")
    assert not fleet.holds("b", "base-4")


# devices that are late, gone or wrong


def test_an_answer_after_the_time_limit_is_never_used(plan: Plan, state: RunState) -> None:
    plan = with_patience(plan, round_timeout=0.3)
    grid, devices = fleet_of(plan)
    devices[3].value = 1e6
    slow_once = iter([0.5])

    def late(message: Message, report: Report, update: np.ndarray | None) -> Message:
        grid.delay[1003] = next(slow_once, 0.0)
        if report.round:
            update = np.full_like(update, 4.0)  # type: ignore[arg-type]
        return reply_to(message, report, update)

    devices[3].bend = late
    played = play(grid, plan, state, count=2)
    first, second = played.records
    assert (first["devices_used"], first["declined"]) == (3, {"no answer in time": 1})
    assert second["devices_used"] == 4
    # the second round is the last of growing, which ends with the mean of both
    for after, mean in zip(played.states[1:], (2.0, (2.0 + 2.5) / 2), strict=True):
        assert after.values is not None
        assert (after.values[weights_of(plan, state)] == np.float32(mean)).all()


Bend = Callable[[Message, Report, "np.ndarray | None"], Message]


def changed(**changes: Any) -> Bend:
    return lambda message, report, update: reply_to(
        message, report.model_copy(update=changes), update
    )


def sends(make: Callable[[np.ndarray], Any]) -> Bend:
    def bend(message: Message, report: Report, update: np.ndarray | None) -> Message:
        assert update is not None
        return reply_to(message, report, make(update))

    return bend


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def make(update: np.ndarray) -> np.ndarray:
        update[len(update) // 2] = value
        return update

    return make


def dead(message: Message, report: Report, update: np.ndarray | None) -> Message:
    reply = Message(Error(1, "node is gone"), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = 1  # as Flower's SuperLink does
    return reply


def says(text: str) -> Bend:
    def bend(message: Message, report: Report, update: np.ndarray | None) -> Message:
        reply = reply_to(message, report, update)
        reply.content.config_records["report"]["json"] = text
        return reply

    return bend


def holding(data: bytes, kind: str = "numpy.ndarray") -> Bend:
    """The reply of a device whose array is made of `data`."""

    def bend(message: Message, report: Report, update: np.ndarray | None) -> Message:
        reply = reply_to(message, report, update)
        reply.content["arrays"] = ArrayRecord({"update": Array("float32", (3,), kind, data)})
        return reply

    return bend


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, update=np.zeros(3, np.float32))
    return file.getvalue()


def mute(message: Message, report: Report, update: np.ndarray | None) -> Message:
    return Message(RecordDict({"other": ConfigRecord({"json": "{}"})}), reply_to=message)


OTHER = "0" * 64
WRONG: dict[str, tuple[Bend, str]] = {
    "declines": (changed(declined="the battery is low"), "the battery is low"),
    "dead node": (dead, "node failed: node is gone"),
    "NaN": (sends(with_value(math.nan)), "not finite"),
    "negative variance": (sends(lambda u: -u), "BN variance of -1000000.0"),
    "infinite": (sends(with_value(-math.inf)), "not finite"),
    "too short": (sends(lambda u: u[:-1]), "expected float32"),
    "two-dimensional": (sends(lambda u: u[None]), "expected float32"),
    "float64": (sends(lambda u: u.astype(np.float64)), "expected float32"),
    "no update": (sends(lambda u: None), "no update in the reply"),
    "another round": (changed(round=7), "round is 7, asked was 0"),
    "another step": (changed(step=2), "step is 2, asked was 1"),
    "another phase": (changed(phase="judge"), "phase is judge"),
    "another try": (changed(attempt=1), "attempt is 1"),
    "another run": (changed(run=99), "run is 99"),
    "another base": (changed(base=OTHER), f"base is {OTHER}"),
    "another free set": (changed(free_digest=OTHER), f"free_digest is {OTHER}"),
    "another layout": (changed(layout=OTHER), f"layout is {OTHER}"),
    "another's name": (changed(device="device-2"), "'device-2' answered for 'device-0'"),
    "no images": (changed(images=0), "images 0"),
    "more images than can be counted": (changed(images=10**400), "images 1000"),
    "more right than there are": (changed(right=HELDOUT + 1), "right"),
    "more kept than right": (changed(both_right=13), "right"),
    "no report": (mute, "no report"),
    "report is no JSON": (says("hello"), "report"),
    "report has a wrong field": (says('{"device": "device-0", "images": -1}'), "images"),
    "report has an unknown field": (says('{"device": "device-0", "pickle": 1}'), "pickle"),
    "no NumPy array": (holding(b"no NumPy file"), "no NumPy array"),
    "no bytes at all": (holding(b""), "no NumPy array"),
    "an object array": (holding(saved(np.array([{}]))), "no NumPy array"),
    "an archive": (holding(archive()), "no NumPy array"),
    "a torn archive": (holding(archive()[:30]), "no NumPy array"),
    "a pickle": (holding(b"\x80\x04.", "torch.pickle"), "no NumPy array"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_declined_by_reason_and_never_averaged(
    name: str, plan: Plan, state: RunState
) -> None:
    bend, reason = WRONG[name]
    grid, devices = fleet_of(plan)
    devices[0].bend = bend
    devices[0].value = 1e6
    played = play(grid, plan, state)
    (record,) = played.records
    assert (record["devices_asked"], record["devices_used"]) == (4, 3)
    ((why, count),) = record["declined"].items()
    assert count == 1
    assert reason in why
    assert "\n" not in why
    after = played.states[1]
    assert after.values is not None
    assert (after.values[weights_of(plan, state)] == np.float32(3.0)).all()
    assert not played.fleet.held.get("device-0")
    assert played.watcher.done[-1] == (4, 4)


def test_a_loss_that_is_no_number_never_reaches_the_record(plan: Plan, state: RunState) -> None:
    for text in ("NaN", "Infinity"):
        grid, devices = fleet_of(plan)

        def bend(
            message: Message, report: Report, update: np.ndarray | None, loss: str = text
        ) -> Message:
            reply = reply_to(message, report, update)
            record = reply.content.config_records["report"]
            record["json"] = str(record["json"]).replace('"loss":1.5', f'"loss":{loss}')
            return reply

        devices[0].bend = bend
        (record,) = play(grid, plan, state).records
        assert record["devices_used"] == 3
        assert record["train_loss"] == 1.5


def test_a_round_without_its_quorum_is_repeated_loudly_with_the_same_devices(
    plan: Plan, state: RunState
) -> None:
    plan = with_patience(plan, quorum=0.75)
    grid, devices = fleet_of(plan)
    moods = {0: iter([True, False]), 1: iter([True, False])}

    def moody(number: int) -> Bend:
        def bend(message: Message, report: Report, update: np.ndarray | None) -> Message:
            ill = next(moods[number])
            return (changed(declined="not now") if ill else reply_to)(message, report, update)

        return bend

    devices[0].bend, devices[1].bend = moody(0), moody(1)
    played = play(grid, plan, state)
    assert played.records[0]["devices_used"] == 4
    (text,) = played.watcher.texts
    assert "round abandoned: 2 of 4 devices answered, 3 needed (2x not now); try 1 of 2" in text
    assert all(len(d.orders) == 2 and d.orders[0] == d.orders[1] for d in devices)
    assert played.states[1].values is not None
    assert played.states[1].values[weights_of(plan, state)][0] == 2.5
    whole = play(fleet_of(plan)[0], plan, state).records[0]
    # both tries count; only those that had declined are sent the base again
    assert whole["bytes_down"] < played.records[0]["bytes_down"] < 2 * whole["bytes_down"]
    assert played.records[0]["bytes_up"] > 1.5 * whole["bytes_up"]


def test_a_quorum_that_is_just_met_is_enough(plan: Plan, state: RunState) -> None:
    grid, devices = fleet_of(plan)
    for device in devices[:2]:
        device.bend = changed(declined="not now")
    (record,) = play(grid, plan, state).records
    assert record["devices_used"] == 2
    assert record["declined"] == {"not now": 2}


def test_a_round_that_never_reaches_its_quorum_ends_the_run_and_says_how_to_go_on(
    plan: Plan, state: RunState
) -> None:
    grid, devices = fleet_of(plan)
    for device in devices[:3]:
        device.bend = changed(declined="not now")
    watcher, fleet = Watcher(), Fleet(grid)
    with pytest.raises(RoundError) as caught:
        play_rounds(grid, plan, state, fleet, watcher, lambda *_: None)
    text = str(caught.value)
    assert "step 1 grow round 1" in text
    assert "fewer than 2 of 4 devices answered, 2 times (3x not now)" in text
    assert "--resume" in text
    assert caught.value.exit_code == 6
    assert len(watcher.texts) == 2
    assert all(len(d.orders) == 2 for d in devices)


def test_devices_that_hold_out_no_image_end_the_run_with_a_clear_error(
    plan: Plan, state: RunState
) -> None:
    grid, devices = fleet_of(plan)
    for device in devices:
        device.bend = changed(heldout=0, right=0, prior_right=0, both_right=0)
    with pytest.raises(RoundError, match=r"raise heldout \(now 0\.15\)"):
        play_rounds(grid, plan, state, Fleet(grid), Watcher(), lambda *_: None)


# who is asked


def sampled(plan: Plan, nodes: list[int], key: tuple[int | str, ...]) -> list[str]:
    order = np.random.default_rng(nodes).permutation(len(nodes))  # in which they turn up
    devices = [Device(plan, f"device-{i:02}") for i in order]
    grid = FakeGrid(dict(zip(nodes, devices, strict=True)))
    fleet = Fleet(grid)
    fleet.wait_for(len(nodes), 5.0)
    drawn = fleet.sample(0.5, *key)
    assert all(grid.nodes[node].name == name for name, node in drawn.items())  # type: ignore[attr-defined]
    return list(drawn)


def test_the_same_devices_are_asked_whatever_their_nodes_are_called(plan: Plan) -> None:
    rng = np.random.default_rng(0)
    draws = {
        tuple(sampled(plan, rng.choice(10**9, 12, replace=False).tolist(), (0, 1, "grow", 0, 0)))
        for _ in range(5)
    }
    assert len(draws) == 1
    assert len(draws.pop()) == 6


def test_another_seed_or_round_asks_other_devices(plan: Plan) -> None:
    keys = [
        (s, 1, phase, 0, r) for s in (0, 1) for phase in ("grow", "consolidate") for r in (0, 1)
    ]
    draws = {tuple(sampled(plan, list(range(1, 13)), key)) for key in keys}
    assert len(draws) == len(keys)


def test_only_the_sampled_are_asked_and_measuring_asks_all(plan: Plan, state: RunState) -> None:
    plan = with_patience(plan, sample=0.5)
    grid, devices = fleet_of(plan)
    records = play(grid, plan, state, count=5).records
    assert [r["devices_asked"] for r in records] == [2, 2, 4, 2, 4]
    per_round = [
        [d.name for d in devices if any((o.phase, o.round) == (p, r) for o in d.orders)]
        for p, r in (("grow", 0), ("grow", 1), ("weigh", 0), ("consolidate", 0), ("judge", 0))
    ]
    assert [len(names) for names in per_round] == [2, 2, 4, 2, 4]


def test_even_a_tiny_share_asks_one_device(plan: Plan) -> None:
    grid, _ = fleet_of(plan)
    fleet = Fleet(grid)
    fleet.wait_for(4, 1.0)
    assert len(fleet.sample(0.01, 0)) == 1
    assert len(fleet.sample(1.0, 0)) == 4


def test_a_device_that_left_is_not_asked(plan: Plan, state: RunState) -> None:
    plan = with_patience(plan, min_devices=3)
    grid, devices = fleet_of(plan)
    fleet = Fleet(grid)
    fleet.wait_for(4, 1.0)
    del grid.nodes[1001]
    assert list(fleet.present()) == ["device-0", "device-2", "device-3"]
    grid.nodes[5] = devices[1]  # back, under another node id
    fleet.wait_for(4, 1.0)
    assert fleet.present()["device-1"] == 5


def test_a_run_waits_for_its_devices_and_says_how_many_came(plan: Plan) -> None:
    grid, _ = fleet_of(plan, 3)
    with pytest.raises(RoundError, match=r"3 of 4 devices within 0 s: start more, or lower min-d"):
        Fleet(grid).wait_for(4, 0.05)


def test_a_device_that_fails_to_say_its_name_is_asked_again(plan: Plan) -> None:
    grid, devices = fleet_of(plan, 2)
    answers = iter([dead, dead, reply_to])
    report = Report(device="device-1")
    devices[1].hello = lambda message: next(answers)(message, report, None)  # type: ignore[operator]
    fleet = Fleet(grid)
    fleet.wait_for(2, 5.0)
    assert list(fleet.present()) == ["device-0", "device-1"]

    devices[1].hello = lambda message: dead(message, report, None)
    with pytest.raises(RoundError, match="one said: node failed: node is gone"):
        Fleet(grid).wait_for(2, 0.05)


# the wire


def test_an_order_arrives_as_it_was_sent_and_its_size_is_counted(
    plan: Plan, state: RunState
) -> None:
    order = order_of(plan, state)
    values = np.arange(5, dtype=np.float32)
    message, size = order_message(1000, order, {"values": values})
    assert order_in(message) == order
    assert arrays_in(message)["values"].tobytes() == values.tobytes()
    assert message.metadata.group_id == "1.grow.0.0"
    assert size == len(message.content.array_records["arrays"]["values"].data) + len(
        order.model_dump_json(exclude_defaults=True)
    )
    bare, _ = order_message(1000, order, {})
    assert not bare.content.array_records


def test_a_reply_is_read_with_its_size(plan: Plan, state: RunState) -> None:
    order = order_of(plan, state)
    message, _ = order_message(1000, order, {})
    report = honest(order, "device-0")
    reply = read_reply(reply_to(message, report, np.ones(3, np.float32)))
    assert reply.report == report
    assert reply.update is not None
    assert reply.update.tolist() == [1, 1, 1]
    assert 12 < reply.size < 12 + 2000
    assert read_reply(reply_to(message, report)).update is None
    with pytest.raises(UpdateError, match="node failed: node is gone"):
        read_reply(dead(message, report, None))


def test_states_are_not_shared_with_the_devices(plan: Plan, prior: tuple[State, Any]) -> None:
    state = start(plan, *prior)
    before = {name: tensor.clone() for name, tensor in state.base.items()}
    grid, devices = fleet_of(plan)
    play(grid, plan, state)
    assert all(state.base[name].equal(tensor) for name, tensor in before.items())
    assert devices[0].orders[0].base == state.base_digest

"""Which updates get in: compared with one another, with what came before, and kept if refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_grid import make_plan, reply_to
from flwr.app import Message
from test_rounds import (  # noqa: F401 - fixtures
    Device,
    Enough,
    Watcher,
    changed,
    fleet_of,
    holding,
    plan,
    play,
    prepared,
    prior,
    saved,
    sends,
    state,
    weights_of,
    with_patience,
)

from common.codec import encode
from common.errors import DiskError, UpdateError
from common.features import ClassSums
from common.gate import Moments
from common.order import Report
from common.update import as_array, rows_of
from server.fleet import Fleet
from server.plan import Plan, RunState, layout_of, start
from server.plausible import check_class_sums, check_moments
from server.quarantine import Quarantine
from server.rounds import Keep, play_rounds


def test_an_update_out_of_all_proportion_is_refused(plan: Plan, state: RunState) -> None:  # noqa: F811
    grid, devices = fleet_of(plan)
    devices[0].value = 1e6
    (record,) = play(grid, plan, state).records
    assert record["devices_used"] == 3
    (refused,) = record["refused"]
    assert refused["device"] == "device-0"
    assert "above 10 times the round's median" in refused["reason"]
    without = with_patience(plan, norm_limit=0.0)
    assert play(fleet_of(without)[0], without, state).records[0]["devices_used"] == 4


def test_with_two_answers_nobody_is_out_of_proportion(plan: Plan, state: RunState) -> None:  # noqa: F811
    grid, devices = fleet_of(plan)
    devices[0].value = 1e6
    for device in devices[2:]:
        device.bend = changed(declined="not now")
    assert play(grid, plan, state).records[0]["devices_used"] == 2


@pytest.mark.parametrize("count", ["images", "heldout"])
def test_a_count_out_of_all_proportion_is_refused(
    count: str,
    plan: Plan,  # noqa: F811
    state: RunState,  # noqa: F811
) -> None:
    grid, devices = fleet_of(plan)
    many = 10**6
    more = {"images": many, "class_counts": [many, *[0] * 9]} if count == "images" else {}
    devices[1].bend = changed(**(more or {"heldout": many}))
    (record,) = play(grid, plan, state).records
    assert record["devices_used"] == 3
    assert f"{count} is above 1000 times" in record["refused"][0]["reason"]


def test_a_count_that_jumps_within_a_step_is_refused(plan: Plan, state: RunState) -> None:  # noqa: F811
    grid, devices = fleet_of(plan)
    counts = {0: 50, 1: 400}
    devices[1].bend = lambda m, r, u: reply_to(
        m,
        r.model_copy(
            update={"images": counts[r.round], "class_counts": [counts[r.round], *[0] * 9]}
        ),
        u,
    )
    first, second = play(grid, plan, state, count=2).records
    assert first["devices_used"] == 4
    assert second["refused"] == [
        {
            "device": "device-1",
            "reason": "it counts 400 training images in a step in which it had 50",
        }
    ]


def coded_plan(plan: Plan) -> Plan:  # noqa: F811
    return with_patience(plan, codec_up="int8")


def coded(plan: Plan, state: RunState, device: Device, key: Any) -> Any:  # noqa: F811
    """A device that sends an encoded update, drawn by `key(report)`."""
    layout = layout_of(plan, state)

    def bend(message: Message, report: Report, update: np.ndarray | None) -> Message:
        rng = np.random.default_rng(key(report))
        values = rng.normal(0, 1e-2, layout.size).astype(np.float32)
        return reply_to(message, report, as_array(encode(values, rows_of(layout), "int8", rng)))

    device.bend = bend


def test_the_update_of_an_earlier_round_is_refused(plan: Plan, state: RunState) -> None:  # noqa: F811
    plan = coded_plan(plan)
    grid, devices = fleet_of(plan)
    for number, device in enumerate(devices):
        coded(plan, state, device, lambda r, n=number: 10 * n + (r.round if n else 0))
    first, second = play(grid, plan, state, count=2).records
    assert first["devices_used"] == 4
    (refused,) = second["refused"]
    assert refused == {
        "device": "device-0",
        "reason": "the update is that of round 1.grow.0.0 again, to the byte",
    }


def test_a_try_that_is_repeated_may_bring_the_same_update(plan: Plan, state: RunState) -> None:  # noqa: F811
    plan = with_patience(coded_plan(plan), quorum=1.0)
    grid, devices = fleet_of(plan)
    for number, device in enumerate(devices):
        coded(plan, state, device, lambda r, n=number: n)
    honest, ill = devices[3].bend, iter([True, False])
    devices[3].bend = lambda m, r, u: (
        changed(declined="not now")(m, r, u) if next(ill) else honest(m, r, u)
    )
    (record,) = play(grid, plan, state).records
    assert (record["devices_used"], record["tries"], record["refused"]) == (4, 2, [])


def test_a_reply_to_a_message_of_another_try_is_refused(plan: Plan, state: RunState) -> None:  # noqa: F811
    grid, devices = fleet_of(plan)

    def old(message: Message, report: Report, update: np.ndarray | None) -> Message:
        reply = reply_to(message, report, update)
        reply.metadata.__dict__["_group_id"] = "1.grow.0.0.again-1"
        return reply

    devices[0].bend = old
    (record,) = play(grid, plan, state).records
    assert "the reply is to message '1.grow.0.0.again-1'" in record["refused"][0]["reason"]


def test_an_oversized_reply_is_refused_unread(plan: Plan, state: RunState) -> None:  # noqa: F811
    grid, devices = fleet_of(plan)
    devices[0].bend = holding(saved(np.zeros(2**20, np.float32)))
    devices[1].bend = lambda m, r, u: reply_to(m, r.model_copy(update={"declined": "x" * 10**6}), u)
    (record,) = play(grid, plan, state).records
    reasons = [refused["reason"] for refused in record["refused"]]
    assert len(reasons) == 2
    assert all("bytes, at most" in reason for reason in reasons)


def test_a_long_reason_is_kept_short(plan: Plan, state: RunState) -> None:  # noqa: F811
    grid, devices = fleet_of(plan)
    devices[1].bend = changed(declined="so\nmuch " * 2000)
    (record,) = play(grid, plan, state).records
    ((reason, _),) = record["declined"].items()
    assert len(reason) <= 300
    assert "\n" not in reason


# statistics


def test_statistics_that_no_images_have_are_refused() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 6))
    report = Report(device="a", images=30, class_counts=[10, 20, 0])
    seen = Moments(30.0, features.sum(0), features.T @ features)
    check_moments(seen.pack(), 6, report)
    with pytest.raises(UpdateError, match="the statistics count 30 images, the report 29"):
        check_moments(seen.pack(), 6, report.model_copy(update={"images": 29}))
    with pytest.raises(UpdateError, match="negative variance"):
        check_moments(Moments(30.0, 100 * seen.total, seen.second).pack(), 6, report)
    with pytest.raises(UpdateError, match="not finite, or of no image"):
        check_moments(-seen.pack(), 6, report)
    labels = torch.tensor([0] * 10 + [1] * 20)
    sums = ClassSums.of(torch.from_numpy(features).float(), labels, 3)
    check_class_sums(sums.pack(), 3, 6, report)
    with pytest.raises(UpdateError, match="other images of a class"):
        check_class_sums(sums.pack(), 3, 6, report.model_copy(update={"class_counts": [9, 21, 0]}))
    bent = sums.pack()
    bent[3 + 2 * 6] = 5.0  # the third class has no image
    with pytest.raises(UpdateError, match="class without images"):
        check_class_sums(bent, 3, 6, report)
    with pytest.raises(UpdateError, match="negative variance"):
        check_class_sums(ClassSums(sums.counts, 50 * sums.sums, sums.second).pack(), 3, 6, report)


# closing a round


def test_over_selection_leaves_the_last_out_and_drops_its_reply(
    plan: Plan,  # noqa: F811
    state: RunState,  # noqa: F811
) -> None:
    plan = with_patience(plan, over_selection=2.0, round_timeout=30.0)
    grid, _ = fleet_of(plan)
    grid.delay = {1002: 0.3, 1003: 0.3}
    played = play(grid, plan, state, count=1)
    (record,) = played.records
    assert (record["devices_asked"], record["devices_wanted"], record["devices_used"]) == (4, 2, 2)
    assert record["declined"] == {"not waited for: enough had answered": 2}
    assert played.states[1].values is not None
    assert (played.states[1].values[weights_of(plan, state)] == np.float32(1.5)).all()
    time.sleep(0.35)
    assert sorted(played.fleet.sweep()) == [1002, 1003]
    assert not any(event == "silent" for _, event in played.watcher.events)


def test_answers_in_any_order_give_the_same_bytes(plan: Plan, state: RunState) -> None:  # noqa: F811
    results = set()
    for seed in range(3):
        grid, devices = fleet_of(plan)
        rng = np.random.default_rng(seed)
        grid.delay = {1000 + i: float(rng.uniform(0, 0.1)) for i in range(4)}
        for number, device in enumerate(devices):
            device.value = 1 / (number + 3)
        values = play(grid, plan, state).states[1].values
        assert values is not None
        results.add(values.tobytes())
    assert len(results) == 1


def test_a_device_that_never_answers_rests_and_the_rounds_get_faster(
    plan: Plan,  # noqa: F811
    prior: Any,  # noqa: F811
) -> None:
    plan = with_patience(plan, round_timeout=0.3, rest_after=1, rest_rounds=2)
    grid, devices = fleet_of(plan)
    devices[2].bend = lambda *_: None
    records = play(grid, plan, start(plan, *prior), count=4)
    asked = [(r["devices_asked"], r["resting"]) for r in records.records]
    assert asked == [(4, 0), (3, 1), (3, 1), (4, 0)]
    assert ("device-2", "rests") in records.watcher.events
    assert any("device-2 failed 1 times in a row" in text for text in records.watcher.texts)


def test_too_few_devices_abandon_a_try_and_not_the_run(plan: Plan, state: RunState) -> None:  # noqa: F811
    plan = with_patience(plan, node_timeout=0.1)
    grid, _ = fleet_of(plan, 3)
    watcher = Watcher()

    class Coming(Watcher):
        def abandoned(self, reason: str) -> None:
            watcher.tries.append(reason)
            grid.nodes[9] = Device(plan, "device-3", 4.0)

    def stop(*_: Any) -> None:
        raise Enough

    with pytest.raises(Enough):
        play_rounds(grid, plan, state, Fleet(grid), Coming(), stop)
    assert watcher.tries == [
        "3 of 4 devices within 0 s: start more, or lower min-devices",
    ]


# quarantine


def test_refused_updates_are_kept_with_their_reasons(
    plan: Plan,  # noqa: F811
    state: RunState,  # noqa: F811
    tmp_path: Path,
) -> None:
    grid, devices = fleet_of(plan)
    devices[0].bend = sends(lambda u: u[:-1])
    devices[1].value = 1e6
    devices[2].bend = changed(declined="not now")  # no fault of its own

    def stop(*_: Any) -> None:
        raise Enough

    keep = Keep(tmp_path, Quarantine(tmp_path / "q", 2**24))
    plan = with_patience(plan, quorum=0.25)
    grid.nodes[8], grid.nodes[9] = Device(plan, "device-8", 2.0), Device(plan, "device-9", 2.0)
    plan = with_patience(plan, min_devices=6)
    with pytest.raises(Enough):
        play_rounds(grid, plan, state, Fleet(grid), Watcher(), stop, keep=keep)
    kept = [json.loads(p.read_text()) for p in sorted((tmp_path / "q").glob("*.json"))]
    assert {k["device"] for k in kept} == {"device-0", "device-1"}
    assert all((k["step"], k["phase"], k["round"]) == (1, "grow", 0) for k in kept)
    assert any("expected float32" in k["reason"] for k in kept)
    for entry, path in zip(kept, sorted((tmp_path / "q").glob("*.bin")), strict=True):
        assert path.stat().st_size == entry["bytes"]


def test_a_quarantine_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quarantine = Quarantine(tmp_path, 10_000)
    for number in range(40):
        quarantine.put({}, f"device-{number}", "why", np.zeros(200, np.float32))
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 10_000
    newest = max(tmp_path.glob("*.json"))
    assert json.loads(newest.read_text())["device"] == "device-39"
    quarantine.put({}, "big", "why", np.zeros(10_000, np.float32))
    assert not json.loads(max(tmp_path.glob("*.json")).read_text())["kept"]
    Quarantine(tmp_path / "none", 0).put({}, "a", "why", None)
    assert not (tmp_path / "none").exists()

    def full(*_: Any) -> None:
        raise DiskError("no space left")

    monkeypatch.setattr("server.quarantine.write_bytes", full)
    quarantine.put({}, "a", "why", None)  # no reason to end a run


def test_settings_of_admission_are_checked() -> None:
    for name, value in (("faulty_share", 0.5), ("over_selection", 0.5), ("mean", "mode")):
        with pytest.raises(Exception, match=name.replace("_", "-")):
            make_plan(**{name: value})

"""Faults that a server survives: rubbish, kills, full disks, hostile devices.

At length: make chaos.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import time_machine
from fake_grid import DirectGrid, freed_prior, make_plan, reply_to
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from test_rounds import (  # noqa: F401 - fixtures
    fleet_of,
    honest,
    plan,
    play,
    prepared,
    prior,
    state,
    weights_of,
    with_patience,
)
from test_run import Cut, light, lines, models, no_export, quick  # noqa: F401 - fixtures

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import robust as bench
from hostile import ATTACKS

from common.codec import _HEADER, encode
from common.config import Config
from common.errors import DiskError, UpdateError
from common.order import Report
from common.update import as_array, encode_scores, rows_of
from server.admission import Admission
from server.plan import Plan, RunState, layout_of, order_of, start
from server.progress import NullProgress
from server.run import conduct
from server.wire import Reply, group_of, order_message, read_reply
from server.world import open_world

KILLS = int(os.environ.get("CHAOS_KILLS", "20"))

# ---------------------------------------------------------------- fuzzed updates


class Fuzz:
    """Replies to one order, bent in every way that bytes can be."""

    def __init__(self, phase: str, seed: int) -> None:
        self.plan = make_plan(codec_up="int8" if phase != "plain" else "fp32", shift="never")
        self.state = start(self.plan, *freed_prior(self.plan))
        if phase == "weigh":
            self.state = RunState(**{**vars(self.state), "phase": "weigh", "round": 0})
        self.order = order_of(self.plan, self.state)
        self.layout = layout_of(self.plan, self.state)
        self.admission = Admission(self.plan, self.state, self.order)
        self.rng = random.Random(seed)
        self.sent, _ = order_message(1, self.order, {})
        self.report = honest(self.order, "a").model_dump_json()
        self.array = self.sound(phase, seed)
        self.reasons: set[str] = set()

    def sound(self, phase: str, seed: int) -> Array:
        rng, size = np.random.default_rng(seed), self.layout.size
        if phase == "weigh":
            return Array(encode_scores(rng.random(2 * self.plan.graph.count).astype(np.float32)))
        drawn = rng.normal(0, 1e-2, size).astype(np.float32)
        if phase == "plain":
            drawn[self.layout.statistics[1]] = 1.0
            return Array(drawn)
        return Array(as_array(encode(drawn, rows_of(self.layout), "int8", rng)))

    def message(self, text: str, array: Array | None) -> Message:
        content = RecordDict({"report": ConfigRecord({"json": text})})
        if array is not None:
            content["arrays"] = ArrayRecord({"update": array})
        return Message(content, reply_to=self.sent)

    def bent(self) -> Message:
        """Return a reply of which something was changed."""
        text, array = self.report, self.array
        how = self.rng.randrange(6)
        if how in (0, 1, 5):
            text = self.bent_text(text)
        if how in (2, 3, 4, 5):
            array = self.bent_array(array)
        return self.message(text, array)

    def bent_text(self, text: str) -> str:
        rng, value = self.rng, json.loads(text)
        odd = [None, -1, 0, 1e308, 10**30, "", "x" * 999, [], {}, [1] * 50, True, 0.5, "1"]
        match rng.randrange(4):
            case 0:
                value[rng.choice(sorted(value))] = rng.choice(odd)
                return json.dumps(value)
            case 1:
                del value[rng.choice(sorted(value))]
                return json.dumps(value)
            case 2:
                at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
                return text[:at] + rng.choice(["", "NaN", "1e999", '"', "{" * 5000]) + text[end:]
            case _:
                return "".join(
                    chr(ord(c) ^ (1 << rng.randrange(7))) if rng.random() < 0.01 else c
                    for c in text
                )

    def bent_array(self, array: Array) -> Array | None:
        rng, data = self.rng, bytearray(array.data)
        match rng.randrange(7):
            case 0:
                return None
            case 1:
                del data[rng.randrange(len(data)) :]
            case 2:
                data += rng.randbytes(rng.choice([1, 100, 10**5]))
            case 3:
                for _ in range(rng.choice([1, 5, 200])):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 4:
                data[: rng.randrange(1, 129)] = rng.randbytes(rng.randrange(1, 129))
            case 5:
                at = 128 + rng.randrange(_HEADER.size)
                data[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31, 2**32 - 1]))
            case _:
                other = rng.choice([np.float64, np.int8, np.uint8, np.complex64])
                return Array(np.zeros(rng.choice([0, 1, self.layout.size]), other))
        return Array(array.dtype, tuple(array.shape), array.stype, bytes(data))

    def admits(self, message: Message) -> Reply | None:
        """Return the reply if it is admitted; any other error than a refusal is a crash."""
        group = group_of(self.order, 0)
        try:
            reply = read_reply(message, self.admission.most_bytes, group)
            if reply.report.declined is not None:
                return None
            self.admission.admit(reply, "a")
        except UpdateError as error:
            self.reasons.add(str(error))
            return None
        return reply

    def check(self, reply: Reply) -> None:
        """Look at an admitted reply with other eyes than admission's."""
        report, order = reply.report, self.order
        assert (report.run, report.step, report.phase) == (order.run, order.step, order.phase)
        assert (report.attempt, report.round) == (order.attempt, order.round)
        assert (report.base, report.layout) == (order.base, order.layout)
        assert report.free_digest == order.free_digest
        assert report.device == "a"
        assert len(report.class_counts) == order.net.classes
        assert sum(report.class_counts) == report.images > 0
        assert 0 <= report.both_right <= report.right <= report.heldout
        assert report.both_right <= report.prior_right <= report.heldout
        values = self.admission.decoded(reply.update, report)
        size = 2 * self.plan.graph.count if order.phase == "weigh" else self.layout.size
        assert values.dtype == np.float32
        assert values.shape == (size,)
        assert np.isfinite(values).all()
        if order.phase == "weigh":
            assert (values >= 0).all()
        else:
            assert (values[self.layout.statistics[1]] >= 0).all()


def fuzz(phase: str, count: int) -> dict[str, int]:
    fuzzed = Fuzz(phase, 7)
    sound = fuzzed.admits(fuzzed.message(fuzzed.report, fuzzed.array))
    assert sound is not None
    fuzzed.check(sound)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    admitted = 0
    for _ in range(count):
        reply = fuzzed.admits(fuzzed.bent())
        if reply is not None:
            fuzzed.check(reply)
            admitted += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024  # KiB
    assert admitted < count / 2
    assert len(fuzzed.reasons) > 20
    assert all(len(reason.splitlines()) == 1 for reason in fuzzed.reasons)
    return {"fuzzed": count, "admitted": admitted, "grown_kib": grown}


@pytest.mark.parametrize("phase", ["coded", "plain", "weigh"])
def test_fuzzed_updates_crash_nothing_and_none_that_is_malformed_gets_in(phase: str) -> None:
    fuzz(phase, 400)


@pytest.mark.chaos
@pytest.mark.parametrize("phase", ["coded", "plain", "weigh"])
def test_ten_thousand_fuzzed_updates(phase: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = fuzz(phase, 10_000)
    with capsys.disabled():
        print(phase, told)


def test_a_bomb_is_refused_before_it_goes_off() -> None:
    fuzzed = Fuzz("coded", 1)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(200 * 2**20)) + packer.flush()
    rows = rows_of(fuzzed.layout)
    head = _HEADER.pack(b"flw1", 8, 0, rows.size, len(rows.edges), len(bomb), 0, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = fuzzed.message(fuzzed.report, Array(as_array(head + bomb)))
    assert fuzzed.admits(message) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


# ---------------------------------------------------------------- clocks, disks


@pytest.mark.parametrize("off", [-86_400.0, 86_400.0])
def test_a_device_whose_clock_is_off_by_a_day_is_used_as_any_other(
    off: float,
    plan: Plan,  # noqa: F811
    state: RunState,  # noqa: F811
) -> None:
    def bend(message: Message, report: Report, update: np.ndarray | None) -> Message:
        reply = reply_to(message, report.model_copy(update={"seconds": max(off, 0.0)}), update)
        reply.metadata.__dict__["_created_at"] = time.time() + off
        return reply

    grid, devices = fleet_of(plan)
    devices[1].bend = bend
    mine, other = play(grid, plan, state, count=5), play(fleet_of(plan)[0], plan, state, count=5)
    assert [r["devices_used"] for r in mine.records] == [4] * 5
    for a, b in zip(mine.states, other.states, strict=True):
        assert a.base_digest == b.base_digest
        assert (a.values is None) == (b.values is None)
        assert a.values is None or a.values.tobytes() == b.values.tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize("days", [-1, 0, 1, 2])
def test_a_device_whose_clock_is_off_has_time_left_for_its_reply(
    plan: Plan,  # noqa: F811
    state: RunState,  # noqa: F811
    days: int,
) -> None:
    """Flower takes what has passed by the device's own clock from the order's time to live."""
    sent = datetime(2026, 3, 1, 12, tzinfo=UTC)
    with time_machine.travel(sent, tick=False):
        order, _ = order_message(1, order_of(plan, state), {})
    with time_machine.travel(sent + timedelta(days=days), tick=False):
        reply = Message(RecordDict(), reply_to=order)
    assert reply.metadata.ttl > 0
    # and it dies when the order does, or a SuperLink would refuse it
    ends = [m.metadata.created_at + m.metadata.ttl for m in (order, reply)]
    assert ends[1] == pytest.approx(ends[0])


def test_a_disk_that_is_full_in_the_middle_of_a_round_is_one_clear_error(
    plan: Plan,  # noqa: F811
    state: RunState,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def seek(self, _: int) -> None:
            pass

        def write(self, _: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr("server.spool.tempfile.TemporaryFile", Full)
    monkeypatch.setattr("server.spool._IN_MEMORY", 0)
    with pytest.raises(DiskError, match=r"no space left for .*--resume"):
        play(fleet_of(plan)[0], plan, state)


# ---------------------------------------------------------------- kills


class Clock:
    """Counts what the server does, and ends the session at one of the events.

    Devices, which work inside ``push_messages`` here, live on: theirs is another process.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 10**9
        self.seen = 0
        self.device_works = False
        for name in ("replace", "fsync"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *a, real=real: (self.tick(), real(*a))[1])
        push, pull = DirectGrid.push_messages, DirectGrid.pull_messages

        def pushed(grid: DirectGrid, messages: Any) -> Any:
            self.tick()
            self.device_works = True
            try:
                return push(grid, messages)
            finally:
                self.device_works = False

        def pulled(grid: DirectGrid, identifiers: Any) -> Any:
            self.tick()
            return pull(grid, identifiers)

        monkeypatch.setattr(DirectGrid, "push_messages", pushed)
        monkeypatch.setattr(DirectGrid, "pull_messages", pulled)

    def tick(self) -> None:
        if self.device_works:
            return
        self.seen += 1
        self.left -= 1
        if self.left == 0:
            raise Cut


def killed_run(kills: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Play a run undisturbed and again with so many kills, and compare the bytes."""
    config = quick()

    def session(out: Path, cache: Path) -> None:
        conduct(
            DirectGrid(config, cache),
            config,
            out,
            engine="inline",
            resume=True,
            progress=NullProgress(),
        )

    clock = Clock(monkeypatch)
    session(folder / "plain", folder / "plain-devices")
    events, rng = clock.seen, random.Random(kills)
    done, run = 0, 0
    while done < kills:
        run += 1
        out, cache = folder / f"run-{run}", folder / f"devices-{run}"
        for _ in itertools.count():
            # a few events at least, or a session that begins anew each time would never end
            clock.left = rng.randrange(3, events // 3) if done < kills else 10**9
            try:
                session(out, cache)
                break
            except Cut:
                done += 1
        assert models(out) == models(folder / "plain")
        mine, other = lines(out), lines(folder / "plain")
        assert [r["heldout_accuracy"] for r in mine] == [r["heldout_accuracy"] for r in other]


def test_a_run_killed_at_random_points_ends_in_the_same_bytes(
    tmp_path: Path,
    no_export: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed_run(4, tmp_path, monkeypatch)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_run_killed_at_twenty_random_points_ends_in_the_same_bytes(
    tmp_path: Path,
    no_export: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed_run(20, tmp_path, monkeypatch)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_a_server_process_killed_at_random_points_ends_in_the_same_bytes(tmp_path: Path) -> None:
    settings = {k: v for k, v in quick().flat().items() if v != Config().flat()[k]}
    command = [sys.executable, "-m", "server.cli", "simulate", "--resume", "--workers", "1"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def begin(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, "--out", str(tmp_path / name)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    began = time.monotonic()
    with begin("plain") as plain_run:
        _, error = plain_run.communicate()
    assert plain_run.returncode == 0, error.decode()
    whole = time.monotonic() - began
    rng, kills = random.Random(0), 0
    for run in itertools.count():
        while True:
            with begin(f"run-{run}") as process:
                try:
                    process.wait(rng.uniform(0.1, 0.9) * whole if kills < KILLS else None)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
                    continue
                assert process.stderr is not None
                assert process.returncode == 0, process.stderr.read().decode()
            break
        assert models(tmp_path / f"run-{run}") == models(tmp_path / "plain")
        if kills >= KILLS:
            break


# ---------------------------------------------------------------- hostile devices


def accuracies(kinds: list[str], **settings: Any) -> dict[str, dict[str, Any]]:
    values = {**bench.SETTINGS, **{k.replace("_", "-"): v for k, v in settings.items()}}
    world = open_world(Config.parse(values))
    prior = bench.first_model(world)  # noqa: F811
    return {kind: bench.run(world, prior, kind) for kind in kinds}


FEW: dict[str, Any] = {
    "width": 8,
    "rounds": 3,
    "prior_epochs": 15,
    "statistics_gap": 1.0,  # a prior so little trained falls behind its statistics
    "freeing": "prior",
    "freeing_epochs": 6,
    "max_drop": 1.0,
}


def test_with_a_robust_mean_hostile_devices_cost_little(prepared: None) -> None:  # noqa: F811
    got = accuracies(["none", "sign", "nan"], mean="trimmed", **FEW)
    assert got["none"]["updates_refused"] == got["sign"]["updates_refused"] == 0
    assert got["nan"]["updates_refused"] == 3 * 3
    for kind in ("sign", "nan"):
        assert abs(got[kind]["accuracy"] - got["none"]["accuracy"]) < 0.02


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mean", ["trimmed", "median", "krum"])
def test_with_every_robust_mean_no_attack_costs_more_than_a_point(mean: str) -> None:
    got = accuracies(["none", *ATTACKS], mean=mean)
    lost = {kind: got["none"]["accuracy"] - got[kind]["accuracy"] for kind in ATTACKS}
    assert max(lost.values()) <= 0.01, lost

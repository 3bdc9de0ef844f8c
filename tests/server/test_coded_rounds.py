"""Rounds over the coded wire with the real devices: fewer bytes, the same values at both ends."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_grid import DirectGrid, arrays_in, freed_prior, order_in
from flwr.app import Message

from client.app import _BASES
from common.config import Config
from common.order import Order
from common.update import as_array
from server import rounds
from server.checkpoint import Checkpoint, CheckpointFolder
from server.fleet import Fleet
from server.plan import Plan, RunState, layout_of, start
from server.progress import NullProgress
from server.rounds import play_rounds
from server.shared import share
from server.world import open_world

QUICK: dict[str, Any] = {
    "net": "resnet8",
    "width": 8,
    "devices": 3,
    "steps": 1,
    "prior_size": 120,
    "part_size": 150,
    "partition": "iid",
    "freeing": "prior",
    "rounds": 4,
    "epochs": 1,
    "average": 2,
    "scope": "rows",
    "accept_drop": 1.0,
    "max_drop": 1.0,
    "consolidate_rounds": 2,
    "consolidate_epochs": 1,
}


class Enough(Exception):  # noqa: N818 - no error: it ends a test's run
    """Raised after the rounds that a test wants."""


@dataclass
class Session:
    """A run in this process, with all that went over its wire."""

    plan: Plan
    state: RunState
    grid: Any
    fleet: Fleet
    records: list[dict[str, Any]] = field(default_factory=list)
    states: list[RunState] = field(default_factory=list)
    sent: list[Message] = field(default_factory=list)

    def play(self, count: int = 99, before_checkpoint: bool = False) -> Session:
        left = count

        def after_round(before: RunState, after: RunState, record: dict[str, Any]) -> None:
            nonlocal left
            left -= 1
            if left == 0 and before_checkpoint:
                raise Enough
            self.records.append(record)
            self.states.append(after)
            self.state = after
            if left == 0:
                raise Enough

        with contextlib.suppress(Enough):
            play_rounds(self.grid, self.plan, self.state, self.fleet, NullProgress(), after_round)
        return self

    def arrays(self, device: int | None = None) -> list[list[str]]:
        """Names of the arrays of each order, in the order in which they were sent."""
        orders = [m for m in self.sent if m.metadata.message_type == "train"]
        return [
            sorted(arrays_in(m))
            for m in orders
            if device is None or m.metadata.dst_node_id == device
        ]


Begin = Callable[..., Session]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begin:
    monkeypatch.setattr(rounds, "_PAUSE_SECONDS", 0.0)

    def make(disk: str = "disk", **settings: Any) -> Session:
        config = Config.parse({**QUICK, **settings})
        plan = open_world(config).plan
        grid: Any = DirectGrid(config, tmp_path / disk)
        session = Session(plan, start(plan, *freed_prior(plan)), grid, Fleet(grid))
        push = grid.push_messages

        def watched(messages: Any) -> Any:
            kept = list(messages)
            session.sent += kept
            return push(kept)

        monkeypatch.setattr(grid, "push_messages", watched)
        return session

    return make


# bytes


def test_each_codec_sends_less_than_the_one_before(begin: Begin) -> None:
    up, down = [], []
    for codec in ("fp32", "fp16", "int8", "int4"):
        session = begin(codec, codec_up=codec, codec_down=codec, scope="all", width=16).play()
        up.append(sum(r["bytes_up"] for r in session.records))
        down.append(sum(r["bytes_down"] for r in session.records[1:]))
        assert session.state.done
    for sizes in (up, down):
        assert sizes[1] < 0.55 * sizes[0]
        assert sizes[2] < 0.32 * sizes[0]
        assert sizes[3] < 0.20 * sizes[0]


def test_only_what_a_device_lacks_is_sent(begin: Begin) -> None:
    session = begin(freeing="always").play()
    assert [r["phase"] for r in session.records] == [*["grow"] * 4, "weigh", *["consolidate"] * 2,
                                                     "judge"]  # fmt: skip
    first, *rest = session.arrays(device=1)
    assert first == ["base"]
    assert rest == [["delta"]] * 4 + [[]] + [["delta"]] * 2
    assert all(r["declined"] == {} for r in session.records)


def test_bytes_are_those_of_the_messages_own_content(begin: Begin) -> None:
    session = begin().play(3)
    orders = [m for m in session.sent if m.metadata.message_type == "train"]
    size = sum(
        len(a.data) for m in orders for r in m.content.array_records.values() for a in r.values()
    )
    size += sum(len(str(m.content.config_records["order"]["json"])) for m in orders)
    assert sum(r["bytes_down"] for r in session.records) == size


# both ends hold the same


def test_the_server_goes_on_from_what_the_devices_decode(begin: Begin) -> None:
    session = begin(codec_down="int4").play(4)
    layouts = {layout_of(session.plan, s).digest for s in session.states}
    assert len(layouts) == 1
    layout = layout_of(session.plan, session.state)
    base = layout.pack(session.state.base)
    for state in session.states[:3]:
        assert state.shared is not None
        assert state.values is not None
        assert state.values.tobytes() == state.shared.moved.values(base, layout).tobytes()
    for m in session.sent:
        if m.metadata.message_type == "train" and order_in(m).round:
            moved = order_in(m).moved
            held = [s.shared.moved.digest for s in session.states if s.shared is not None]
            assert moved in held


def test_nothing_that_coding_took_is_lost_for_good(begin: Begin) -> None:
    session = begin()
    layout = layout_of(session.plan, session.state)
    base = layout.pack(session.state.base)
    rng = np.random.default_rng(0)
    target, last, residue = base.copy(), None, np.zeros(layout.size, np.float32)
    for number in range(1, 13):
        target = target + np.float32(0.01) * rng.normal(size=layout.size).astype(np.float32)
        target[layout.statistics[1]] = np.abs(target[layout.statistics[1]])
        values, last = share(target + residue, base, last, layout, "int3")
        residue = last.residue
        if number == 2:
            early = np.linalg.norm(values - target)
    assert np.linalg.norm(values - target) < 2 * early  # it does not add up over rounds
    np.testing.assert_allclose(values + residue, target, atol=0.02)


def test_the_wire_changes_accuracy_little(begin: Begin) -> None:
    models = {}
    for codec in ("fp32", "int8"):
        models[codec] = begin(codec, codec_up=codec, codec_down=codec).play().state
    moved = {
        codec: np.concatenate([
            (state.prior[name] - begin("x").state.base[name]).numpy().ravel()
            for name in sorted(state.prior)
        ])
        for codec, state in models.items()
    }  # fmt: skip
    error = np.linalg.norm(moved["int8"] - moved["fp32"]) / np.linalg.norm(moved["fp32"])
    assert 0 < error < 0.05


# devices that miss rounds, lose what they held, or come late


def test_devices_that_are_not_asked_in_every_round_are_sent_the_values_whole(begin: Begin) -> None:
    session = begin(devices=4, sample=0.5, rounds=6).play()
    kinds = {kind for names in session.arrays() for kind in names}
    assert kinds == {"base", "delta", "whole"}
    assert all(r["devices_used"] == 2 and r["declined"] == {} for r in session.records)


def test_a_device_that_lost_the_values_says_so_and_gets_them(begin: Begin, tmp_path: Path) -> None:
    session, other = begin("a"), begin("b")
    session.play(2)
    other.play(2)
    shutil.rmtree(tmp_path / "a" / "moved")
    _BASES.clear()
    session.play(1)
    other.play(1)
    # the devices share a disk here: what one of them has made, the others find
    assert session.arrays(device=1)[-2:] == [["delta"], ["whole"]]
    assert session.records[-1]["declined"] == {}
    assert session.records[-1]["bytes_up"] > other.records[-1]["bytes_up"]
    assert state_of(session) == state_of(other)


def test_a_device_that_lost_everything_gets_base_and_values(begin: Begin, tmp_path: Path) -> None:
    session = begin("a").play(2)
    for path in (tmp_path / "a").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _BASES.clear()
    session.play(1)
    assert session.arrays(device=1)[-2:] == [["delta"], ["base", "whole"]]
    assert session.records[-1]["devices_used"] == 3


def state_of(session: Session) -> tuple[str, bytes, bytes]:
    state = session.state
    assert state.values is not None
    assert state.shared is not None
    return state.base_digest, state.values.tobytes(), state.shared.residue.tobytes()


def test_the_ledger_holds_one_rounds_values_and_none_after_the_phase(begin: Begin) -> None:
    session = begin(freeing="always")
    for _ in range(4):
        session.play(1)
        asked_with_values = session.records[-1]["round"] > 1
        for held in session.fleet.held.values():
            assert sum(d.startswith("moved ") for d in held) == asked_with_values
    session.play(1)
    assert not any(d.startswith("moved ") for d in session.fleet.held["device-00000"])


# feedback


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_device_adds_what_it_still_owes(begin: Begin, tmp_path: Path, codec: str) -> None:
    kept, lost = begin("a", codec_up=codec), begin("b", codec_up=codec)
    kept.play(1)
    lost.play(1)
    assert state_of(kept) == state_of(lost)
    shutil.rmtree(tmp_path / "b" / "feedback")
    kept.play(1)
    lost.play(1)
    assert lost.records[-1]["declined"] == {}  # only accuracy
    assert state_of(kept) != state_of(lost)


def test_a_round_that_is_played_again_owes_what_it_owed_before(begin: Begin) -> None:
    straight, cut = begin("a", codec_up="int4").play(4), begin("b", codec_up="int4")
    for _ in range(3):
        cut.play(1)
        cut.play(1, before_checkpoint=True)  # the server dies before it has noted the round
        _BASES.clear()
    cut.play(1)
    for mine, other in zip(cut.states, straight.states, strict=True):
        assert mine.base_digest == other.base_digest
        assert (mine.values is None) == (other.values is None)
        if mine.values is not None and other.values is not None:
            assert mine.values.tobytes() == other.values.tobytes()


def test_what_an_other_phase_or_run_left_is_not_added(begin: Begin) -> None:
    first = begin("a", lr=0.03).play(2)
    second, clean = begin("a", lr=0.02).play(3), begin("b", lr=0.02).play(3)
    assert first.records[0]["train_loss"] != second.records[0]["train_loss"]
    assert state_of(second) == state_of(clean)


def test_a_disk_holds_a_file_a_device_and_few_models(begin: Begin, tmp_path: Path) -> None:
    begin("a", rounds=6).play()
    assert len(list((tmp_path / "a" / "feedback").iterdir())) == 3
    assert len(list((tmp_path / "a" / "moved").iterdir())) == 4


# checkpoints


def test_a_checkpoint_holds_what_coding_took(begin: Begin, tmp_path: Path) -> None:
    session = begin().play(2)
    folder = CheckpointFolder(tmp_path / "checkpoints", session.plan.config)
    folder.write(Checkpoint(session.state, session.fleet.held, {}, 2))
    read = folder.read().state
    mine, other = session.state.shared, read.shared
    assert mine is not None
    assert other is not None
    assert mine.moved.digest == other.moved.digest
    assert (mine.residue.tobytes(), mine.delta.tobytes()) == (
        other.residue.tobytes(),
        other.delta.tobytes(),
    )
    assert mine.since == other.since is not None
    folder.write(Checkpoint(read))
    assert len(list((tmp_path / "checkpoints" / "tensors").iterdir())) == 4


# what is refused


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda u, o: None, "no update in the reply"),
        (lambda u, o: u[:-1], "truncated"),
        (lambda u, o: np.zeros(4, np.float32), "the update is float32"),
        (lambda u, o: as_array(bytes(u)[:4] + b"\x04" + bytes(u)[5:]), "at 4 bits"),
        (lambda u, o: as_array(b"\0" * len(u)), "begins with"),
    ],
)
def test_a_damaged_update_is_declined_and_the_round_goes_on(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, make: Any, said: str
) -> None:
    session = begin()
    monkeypatch.setattr("client.simulated.carry_out", bent(make))
    session.play(1)
    (record,) = session.records
    assert (record["devices_asked"], record["devices_used"]) == (3, 2)
    ((why, count),) = record["declined"].items()
    assert count == 1
    assert said in why


def bent(make: Any) -> Any:
    from client.local import carry_out

    def call(order: Order, arrays: Any, data: Any, *others: Any, **named: Any) -> Any:
        report, update = carry_out(order, arrays, data, *others, **named)
        return report, make(update, order) if report.device == "device-00001" else update

    return call

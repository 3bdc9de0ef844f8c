"""Checkpoints: what is read is what was written, and what is torn or foreign is told apart."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_grid import freed_prior, make_plan

from common.config import Config
from common.errors import DiskError, StoreError
from common.filters import FreeSet
from common.sparsify import Attempt
from common.state import state_digest
from server.checkpoint import Checkpoint, CheckpointFolder
from server.plan import Plan, RunState, StepOutcome, layout_of, order_of, start


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan()


@pytest.fixture(scope="module")
def fresh(plan: Plan) -> RunState:
    return start(plan, *freed_prior(plan))


@pytest.fixture(scope="module")
def rich(plan: Plan, fresh: RunState) -> RunState:
    """A state in which every field has something to lose."""
    free = FreeSet({"conv1": (1, 3), "layer3.0.conv2": (0, 31)})
    step = StepOutcome(
        step=1,
        prior=0.1 + 0.2,
        grown=math.nan,
        consolidated=0.7,
        refusal="worse",
        free=free,
        requested_share=0.3,
        attempts=(Attempt(0.3, -0.0123, False), Attempt(0.21, 1 / 3, True)),
        lambdas=(0.3, 0.3 * 1.25),
    )
    rng = np.random.default_rng(0)
    return replace(
        fresh,
        step=2,
        phase="consolidate",
        next_free=free,
        values=rng.normal(size=1000).astype(np.float32),
        tail=rng.normal(size=1000).astype(np.float32),
        attempt=3,
        round=4,
        share=0.3 * 0.7**3,
        kd_weight=0.1 + 0.2,
        heldout_prior=2 / 3,
        attempts=step.attempts,
        lambdas=step.lambdas,
        scores={layer.name: rng.random(layer.width) for layer in plan.graph.layers},
        finished=(step, replace(step, step=2, refusal=None, free=FreeSet({}))),
    )


def plain(state: RunState) -> dict[str, str]:
    """All of a state as text that is equal only if every bit is."""
    out = {}
    for field in fields(state):
        value = getattr(state, field.name)
        if field.name in ("prior", "base"):
            value = state_digest(value)
        elif field.name == "retry" and value is not None:
            value = plain(value)
        elif field.name in ("values", "tail") and value is not None:
            value = (value.dtype, value.shape, value.tobytes())
        elif field.name == "scores" and value is not None:
            value = {name: (s.dtype, s.tobytes()) for name, s in value.items()}
        out[field.name] = repr(value)
    return out


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("state-*.json"))


def tensors(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "tensors").glob("*")}


def used_by(*some: RunState) -> set[str]:
    return {state_digest(model) for s in some for model in (s.prior, s.base)}


# round trips


def test_a_checkpoint_comes_back_to_the_bit(
    plan: Plan, fresh: RunState, rich: RunState, tmp_path: Path
) -> None:
    doubted = replace(fresh, retry=rich, allowed=0.1 + 0.2)
    for number, state in enumerate((fresh, rich, replace(rich, done=True), doubted)):
        checkpoints = CheckpointFolder(tmp_path / str(number), plan.config)
        assert not checkpoints.exists()
        written = Checkpoint(state, {"device-0": ["a", "b"]}, {"steps": {"1": {"x": None}}}, 17)
        checkpoints.write(written)
        assert checkpoints.exists()
        read = CheckpointFolder(tmp_path / str(number), plan.config).read()
        assert plain(read.state) == plain(state)
        assert (read.held, read.records, read.rounds) == (
            written.held,
            written.records,
            written.rounds,
        )


def test_what_is_read_goes_on_as_what_was_written(
    plan: Plan, fresh: RunState, tmp_path: Path
) -> None:
    checkpoints = CheckpointFolder(tmp_path, plan.config)
    state = replace(fresh, values=layout_of(plan, fresh).pack(fresh.base), round=1)
    checkpoints.write(Checkpoint(state))
    assert order_of(plan, checkpoints.read().state) == order_of(plan, state)


def test_the_newest_is_read_and_one_before_it_is_kept(
    plan: Plan, fresh: RunState, tmp_path: Path
) -> None:
    checkpoints = CheckpointFolder(tmp_path, plan.config)
    for number in range(5):
        checkpoints.write(Checkpoint(replace(fresh, round=number), rounds=number))
    assert states(tmp_path) == ["state-000003.json", "state-000004.json"]
    assert checkpoints.read().rounds == 4
    CheckpointFolder(tmp_path, plan.config).write(Checkpoint(fresh, rounds=99))
    assert states(tmp_path)[-1] == "state-000005.json"
    assert checkpoints.read().rounds == 99


def test_tensors_that_no_checkpoint_names_are_removed(
    plan: Plan, fresh: RunState, rich: RunState, tmp_path: Path
) -> None:
    checkpoints = CheckpointFolder(tmp_path, plan.config)
    checkpoints.write(Checkpoint(rich))
    stale = tensors(tmp_path) - used_by(rich)  # the packed values and their running mean
    assert len(stale) == 2
    checkpoints.write(Checkpoint(fresh))
    assert tensors(tmp_path) == used_by(fresh, rich) | stale
    checkpoints.write(Checkpoint(fresh))
    assert tensors(tmp_path) == used_by(fresh)
    assert plain(checkpoints.read().state) == plain(fresh)


def test_tensors_of_what_may_follow_are_kept(
    plan: Plan, fresh: RunState, rich: RunState, tmp_path: Path
) -> None:
    checkpoints = CheckpointFolder(tmp_path, plan.config)
    for _ in range(3):
        checkpoints.write(Checkpoint(replace(fresh, retry=rich)))
    assert plain(checkpoints.read().state) == plain(replace(fresh, retry=rich))


def test_a_model_that_does_not_change_is_written_once(
    plan: Plan, fresh: RunState, tmp_path: Path
) -> None:
    checkpoints = CheckpointFolder(tmp_path, plan.config)
    checkpoints.write(Checkpoint(fresh))
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "tensors").iterdir()}
    checkpoints.write(Checkpoint(replace(fresh, round=1)))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "tensors").iterdir()} == files


# torn and altered


def two(plan: Plan, fresh: RunState, folder: Path) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder, plan.config)
    checkpoints.write(Checkpoint(fresh, rounds=1))
    values = np.full(layout_of(plan, fresh).size, 2.0, np.float32)
    checkpoints.write(Checkpoint(replace(fresh, round=1, values=values), rounds=2))
    return checkpoints


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", [cut_short, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("what", ["state", "values"])
def test_a_newest_checkpoint_that_is_torn_costs_a_round_and_not_the_run(
    what: str, harm: Any, plan: Plan, fresh: RunState, tmp_path: Path
) -> None:
    checkpoints = two(plan, fresh, tmp_path)
    newest = tmp_path / states(tmp_path)[-1]
    if what == "values":
        digest = json.loads(newest.read_bytes())["state"]["values"]
        newest = tmp_path / "tensors" / f"{digest}.safetensors"
    harm(newest)
    read = checkpoints.read()
    assert read.rounds == 1
    assert plain(read.state) == plain(fresh)
    # and the run goes on from there: the same round is played again and written
    again = replace(fresh, round=1, values=np.full(layout_of(plan, fresh).size, 2.0, np.float32))
    checkpoints.write(Checkpoint(again, rounds=2))
    assert plain(checkpoints.read().state) == plain(again)


def test_without_a_whole_checkpoint_the_error_names_the_newest_fault(
    plan: Plan, fresh: RunState, tmp_path: Path
) -> None:
    checkpoints = two(plan, fresh, tmp_path)
    for name in states(tmp_path):
        cut_short(tmp_path / name)
    with pytest.raises(StoreError, match=r"no usable checkpoint in .*state-000001.json is torn"):
        checkpoints.read()
    with pytest.raises(StoreError, match="no usable checkpoint"):
        CheckpointFolder(tmp_path / "nothing", plan.config).read()


# another run's


def test_a_checkpoint_of_other_settings_is_refused_by_their_names(
    plan: Plan, fresh: RunState, tmp_path: Path
) -> None:
    two(plan, fresh, tmp_path)
    other = plan.config.model_copy(update={"seed": 7, "share": 0.25})
    with pytest.raises(StoreError) as caught:
        CheckpointFolder(tmp_path, other).read()
    text = str(caught.value)
    assert "seed 0 -> 7" in text
    assert "share 0.3 -> 0.25" in text
    assert "\n" not in text


def test_a_run_may_be_resumed_elsewhere_and_faster(
    plan: Plan, fresh: RunState, tmp_path: Path
) -> None:
    two(plan, fresh, tmp_path)
    elsewhere = plan.config.model_copy(
        update={"workers": 7, "round_timeout": 1.0, "node_timeout": 2.0, "repeats": 9}
    )
    assert CheckpointFolder(tmp_path, elsewhere).read().rounds == 2


def test_a_checkpoint_of_another_format_is_refused(
    plan: Plan, fresh: RunState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two(plan, fresh, tmp_path)
    monkeypatch.setattr("server.checkpoint._FORMAT", 5)
    with pytest.raises(StoreError, match="has format 4, this version reads 5"):
        CheckpointFolder(tmp_path, plan.config).read()


# a full disk


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_the_checkpoints_that_were_there(
    call: str, plan: Plan, fresh: RunState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = two(plan, fresh, tmp_path)
    before = plain(checkpoints.read().state)
    names = states(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    bigger = replace(fresh, values=np.zeros(5, np.float32))
    for allowed in range(2):  # fails at the tensors, then at the state that names them
        real, calls = getattr(os, call), iter(range(100))
        with monkeypatch.context() as patch:
            patch.setattr(
                os,
                call,
                lambda *a, n=allowed, f=real, c=calls: f(*a) if next(c) < n else full(),  # type: ignore[misc]
            )
            with pytest.raises(DiskError, match=r"no space left for .*--resume") as caught:
                checkpoints.write(Checkpoint(bigger))
        assert caught.value.exit_code == 7
        assert states(tmp_path) == names
        assert plain(checkpoints.read().state) == before
        assert not list(tmp_path.rglob(".*"))  # no half-written file stays
    checkpoints.write(Checkpoint(bigger))
    assert plain(checkpoints.read().state) == plain(bigger)


def test_a_checkpoint_holds_nothing_that_could_run_code(
    plan: Plan, rich: RunState, tmp_path: Path
) -> None:
    CheckpointFolder(tmp_path, plan.config).write(Checkpoint(rich))
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    value = json.loads((tmp_path / states(tmp_path)[0]).read_text(), parse_constant=pytest.fail)
    assert Config.parse(value["settings"]) == plan.config

"""Parts of the method that are off by default: what each changes in a run, with real devices."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_grid import freed_prior, order_in
from session import Session

from common.config import Config
from common.errors import ConfigError
from common.filters import FreeSet, freed_index, is_off
from common.layout import dense_layout, scope_layout
from common.memory import assembled
from common.peers import peer
from common.state import State, state_digest, write_state
from server import report
from server.charts import _segments
from server.checkpoint import Checkpoint, CheckpointFolder
from server.plan import layout_of

FREED: dict[str, Any] = {
    "freeing": "always",
    "scope": "group",
    "codec_up": "int8",
    "codec_down": "int8",
    "rounds": 4,
    "average": 2,
    "steps": 1,
    "accept_drop": 1.0,
    "max_drop": 1.0,
    "consolidate_rounds": 1,
    "consolidate_epochs": 1,
    "kd_teacher": "prior",
}


def session(folder: Path, freed: float = 0.3, **settings: Any) -> Session:
    made = Session(folder, **{**FREED, **settings})
    return Session(folder, freed_prior(made.world.plan, freed), **{**FREED, **settings})


def moved(one: State, other: State, names: dict[str, np.ndarray] | None = None) -> float:
    total = 0.0
    for name in one:
        if "running" in name or (names is not None and name not in names):
            continue
        rows = slice(None) if names is None else torch.from_numpy(names[name])
        total += float((one[name][rows] - other[name][rows]).square().sum())
    return total


# ---------------------------------------------------------------- schedules of scopes


def test_a_schedule_widens_what_travels_and_loses_nothing(tmp_path: Path) -> None:
    done = session(tmp_path, scope_schedule="rows:1,group:1,all:2").play()
    growing = [r for r in done.records if r["phase"] == "grow"]
    assert [r["scope"] for r in growing] == ["rows", "group", "all", "all"]
    up = [r["bytes_up"] for r in growing]
    assert up[0] < up[1] < up[2]
    plan, states = done.world.plan, [done.first(), *done.states]
    for before, after in itertools.pairwise(states):
        if before.phase != "grow" or after.phase != "grow":
            continue
        one, other = (
            layout_of(plan, s).unpack(s.base, s.values) if s.values is not None else s.base
            for s in (before, after)
        )
        rows = scope_layout("rows", plan.graph, before.free, before.base)
        assert not np.array_equal(rows.pack(one), rows.pack(other))
    last = next(s for s in states if s.phase == "weigh")
    assert last.values is not None
    assert len(last.values) == dense_layout(plan.graph, last.base).size


def test_a_schedule_of_one_scope_is_that_scope(tmp_path: Path) -> None:
    plain = session(tmp_path / "one", codec_up="fp32", codec_down="fp32").play()
    scheduled = session(
        tmp_path / "two", codec_up="fp32", codec_down="fp32", scope_schedule="group:1"
    ).play()
    assert state_digest(plain.state.prior) == state_digest(scheduled.state.prior)


# ---------------------------------------------------------------- kept weights that move a little


def test_kept_weights_move_a_little_and_travel_as_all(tmp_path: Path) -> None:
    runs = {
        rate: session(tmp_path / str(rate), rounds=1, average=1, kept_lr=rate).play()
        for rate in (0.0, 0.01, 0.1)
    }
    plan = runs[0.0].world.plan
    free = runs[0.0].first().free
    inner = scope_layout("group", plan.graph, free, runs[0.0].first().base)
    grown = {}
    for rate, run in runs.items():
        weigh = next(s for s in run.states if s.phase == "weigh")
        model, base = layout_of(run.world.plan, weigh).unpack(weigh.base, weigh.values), weigh.base
        distance = (
            dense_layout(plan.graph, base).pack(model) - dense_layout(plan.graph, base).pack(base)
        ) ** 2
        within = (inner.pack(model) - inner.pack(base)) ** 2
        grown[rate] = float(distance.sum() - within.sum())
    assert grown[0.0] == pytest.approx(0.0, abs=1e-6)
    assert grown[0.0] < grown[0.01] < grown[0.1]
    up = {rate: run.records[0]["bytes_up"] for rate, run in runs.items()}
    assert up[0.0] < up[0.1]
    order = order_in(runs[0.1].sent[0])
    assert (order.scope, order.full_rate, order.kept_lr) == ("all", "group", 0.1)


# ---------------------------------------------------------------- peers


def test_peers_grow_side_by_side_and_one_of_them_becomes_the_model(tmp_path: Path) -> None:
    done = session(tmp_path, peers=2).play()
    plan, first = done.world.plan, done.first()
    assert first.peers == 2
    one, other = peer(first.base, 0), peer(first.base, 1)
    assert moved(one, other, freed_index(plan.graph, first.free).own) > 0
    alone = session(tmp_path / "alone").play()
    assert state_digest(alone.first().base) == state_digest(one)
    growing = [r for r in done.records if r["phase"] == "grow"]
    single = [r for r in alone.records if r["phase"] == "grow"]
    ratio = growing[1]["bytes_up"] / single[1]["bytes_up"]
    assert 1.7 < ratio < 2.2
    weigh = next(s for s in done.states if s.phase == "weigh")
    assert weigh.peers == 1
    assert state_digest(weigh.base) == state_digest(peer(first.base, weigh.best))
    assert weigh.values is not None
    assert len(weigh.values) == layout_of(plan, weigh).size
    assert done.state.done
    assert done.state.finished[0].attempts


def test_the_best_peer_on_held_out_images_is_taken(tmp_path: Path) -> None:
    made = session(tmp_path, peers=2)
    seen: list[int] = []
    done = made.play()
    for message in done.sent:
        order = order_in(message)
        if order.phase == "grow":
            seen.append(order.peers)
        elif order.phase == "weigh":
            assert order.regrown is not None
            assert order.peers == 1
    assert seen == [2] * 8
    folder = CheckpointFolder(tmp_path / "checkpoints", done.world.config)
    folder.write(Checkpoint(done.states[1]))
    assert folder.read().state.peers == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"regrow": False}, "freeing 'always' with regrow"),
        ({"ewc_weight": 1.0}, "ewc-weight 0"),
        ({"replay": "synthetic"}, "replay 'none'"),
        ({"distill_source": "synthetic"}, "no distillation at the server"),
        ({"scope_schedule": "group:1,all:1"}, "no scope-schedule"),
    ],
)
def test_what_peers_do_not_go_with_is_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"peers is 2, which needs {told}"):
        Config.parse({"peers": 2, **settings})


# ---------------------------------------------------------------- images of the prior


def test_the_server_distils_on_images_that_it_makes(tmp_path: Path) -> None:
    plain = session(tmp_path / "plain", steps=1, rounds=2).play()
    done = session(tmp_path / "own", steps=1, rounds=2, distill_source="synthetic").play()
    assert done.first().prior.keys() == plain.first().prior.keys()
    assert state_digest(done.state.prior) != state_digest(plain.state.prior)
    assert done.records[0]["synthesis_seconds"] > 0
    assert done.arrays() == plain.arrays()  # no image leaves the server
    assert len({r["lambda"] for r in done.records if r["phase"] == "grow"}) == 1


def test_replay_goes_on_while_filters_are_freed(tmp_path: Path) -> None:
    done = session(tmp_path, rounds=2, replay="synthetic").play()
    names = {
        order.phase: order.replay for order in map(order_in, done.sent) if order.replay is not None
    }
    assert names.keys() == {"grow", "consolidate"}
    assert len(set(names.values())) == 1
    assert sum("replay" in sent for sent in done.arrays()) == 1


# ---------------------------------------------------------------- freeing again


def test_only_filters_of_the_last_step_are_freed_again(tmp_path: Path) -> None:
    done = session(tmp_path, rounds=1, average=1, free_from="last").play()
    first, last = done.first().free, done.state.free
    assert not last.empty
    for name, channels in last.channels.items():
        assert set(channels) <= set(first.channels[name])


def test_a_reserve_is_handed_out_step_by_step(tmp_path: Path) -> None:
    done = session(tmp_path, 0.5, steps=2, rounds=1, freeing="prior", reserve=True, share=0.5)
    first, plan = done.first(), done.world.plan
    done.play()
    every = done.prior[1]
    assert first.off == every
    later = done.states[0]
    assert (first.step, later.step) == (1, 2)
    assert first.free.count + later.free.count == every.count
    assert not set(first.free.channels.items()) & set(later.free.channels.items())
    assert later.off == later.free  # the first part belongs to the model now
    assert done.state.off == FreeSet({})
    for state, off in ((first, every), (later, later.free)):
        write_state(plan.net, state.prior)
        assert is_off(plan.net, plan.graph, off)
    write_state(plan.net, later.prior)
    assert not is_off(plan.net, plan.graph, first.free)
    assert [r["phase"] for r in done.records] == ["grow", "grow"]


def test_what_a_step_has_learnt_without_freeing_is_part_of_the_model(tmp_path: Path) -> None:
    done = session(tmp_path, rounds=1, freeing="prior").play()
    plan, state = done.world.plan, done.state
    assert state.off.empty
    assert not state.free.empty
    x = torch.randn(3, *plan.spec.input_shape)
    write_state(plan.net, state.prior)
    slim = assembled(plan.net, plan.graph, state.prior, state.off, state.memory)
    torch.testing.assert_close(slim(x), plan.net.eval()(x))


def test_a_reserve_needs_a_prior_that_frees() -> None:
    with pytest.raises(ConfigError, match="reserve is true but freeing is 'always'"):
        Config.parse({"reserve": True})
    with pytest.raises(ConfigError, match=r"kept-lr is 0\.1 but scope 'all' leaves nothing"):
        Config.parse({"kept-lr": 0.1, "scope": "all"})


# ---------------------------------------------------------------- in a report


@pytest.mark.parametrize("freeing", ["always", "never"])
def test_what_is_measured_after_a_step_is_drawn_with_its_last_phase(
    tmp_path: Path, freeing: str
) -> None:
    changes = {"steps": 2, "rounds": 1, "freeing": freeing, "ewc_weight": 1.0}
    done = session(tmp_path, 0.3 if freeing == "always" else 0.0, **changes).play()
    phases = [r["phase"] for r in done.records]
    assert phases.count("anchor") == 1
    assert [
        problem for record in done.records if (problem := report._problem(record, "round"))
    ] == []
    last = {"always": "consolidate", "never": "grow"}[freeing]
    drawn = {key: [r["phase"] for r in records] for key, _, records in _segments(done.records)}
    assert drawn[1, last, 0][-1] == "anchor"
    assert sum(map(len, drawn.values())) == len(phases)

"""What travels beside the model: importances of weights and synthetic images, each once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_grid import arrays_in
from session import QUICK, Session

from common.config import Config
from common.errors import ConfigError
from common.layout import dense_layout
from common.state import state_digest
from common.update import decode_scores
from server.checkpoint import Checkpoint, CheckpointFolder
from server.plan import rounds_left
from server.synthetic import ImageMaker
from server.world import open_world


def test_importances_go_down_once_a_step_and_come_up_after_it(tmp_path: Path) -> None:
    done = Session(tmp_path, ewc_weight=10.0).play()
    phases = [(r["step"], r["phase"]) for r in done.records]
    assert phases == [(1, "grow")] * 2 + [(1, "anchor")] + [(2, "grow")] * 2
    assert done.arrays() == [
        ["anchor", "base"],
        ["values"],
        ["base"],  # the grown model, of which the importances are
        ["anchor"],
        ["values"],
    ]
    size = 4 * dense_layout(done.world.plan.graph, done.state.prior).size
    assert done.records[2]["bytes_up"] == pytest.approx(2 * size, rel=0.05)
    assert done.records[3]["bytes_down"] == pytest.approx(2 * size, rel=0.1)
    first, last = done.first().carried.anchor, done.state.carried.anchor
    assert first is not None
    assert last is not None
    assert (last >= first).all()
    assert (last > first).mean() > 0.5
    expected = list(range(len(done.states), -1, -1))
    states = [done.first(), *done.states]
    assert [rounds_left(done.world.plan, state) for state in states] == expected


def test_a_strong_pull_leaves_what_matters_where_it_was(tmp_path: Path) -> None:
    runs = [Session(tmp_path / str(w), steps=1, ewc_weight=w).play() for w in (1e-9, 1e4)]
    importance = runs[0].first().carried.anchor
    assert importance is not None
    layout = dense_layout(runs[0].world.plan.graph, runs[0].state.prior)
    before = layout.pack(runs[0].first().prior)
    loose, held = (
        float((importance * (layout.pack(run.state.prior) - before) ** 2).sum()) for run in runs
    )
    assert held < 0.2 * loose


def test_what_is_coded_is_the_same_at_both_ends(tmp_path: Path) -> None:
    done = Session(tmp_path, ewc_weight=10.0, codec_up="int8", codec_down="int8").play()
    (sent,) = (m for m in done.sent[:1])
    anchor = done.first().carried.anchor
    assert anchor is not None
    arrays = arrays_in(sent)
    assert np.array_equal(decode_scores(arrays["anchor"], len(anchor)), anchor)
    assert arrays["anchor"].nbytes < 2.2 * len(anchor)


def test_synthetic_images_are_made_of_each_steps_prior_and_sent_once(tmp_path: Path) -> None:
    done = Session(tmp_path, replay="synthetic").play()
    assert done.arrays() == [["base", "replay"], ["values"], ["base", "replay"], ["values"]]
    made = [arrays_in(m)["replay"] for m in done.sent if "replay" in arrays_in(m)]
    assert made[0].shape == (12, 8, 8, 1)
    assert np.array_equal(made[0], made[1])  # both devices get the same
    assert not np.array_equal(made[0], made[2])
    seconds = [r.get("synthesis_seconds", 0.0) for r in done.records]
    assert [s > 0 for s in seconds] == [True, False, True, False]
    plain = Session(tmp_path / "plain").play()
    assert state_digest(plain.state.prior) != state_digest(done.state.prior)
    assert all("synthesis_seconds" not in r for r in plain.records)


def test_a_device_that_lost_its_cache_gets_all_of_it_again(tmp_path: Path) -> None:
    settings = {"replay": "synthetic", "ewc_weight": 10.0}
    kept = Session(tmp_path / "kept", **settings).play()
    lost = Session(tmp_path / "lost", **settings).play(forget_after=1)
    assert state_digest(lost.state.prior) == state_digest(kept.state.prior)
    again = Counter(map(str, lost.arrays())) - Counter(map(str, kept.arrays()))
    assert again == Counter({"['anchor', 'base', 'replay', 'values']": 1})


def test_a_checkpoint_holds_them(tmp_path: Path) -> None:
    done = Session(tmp_path, replay="synthetic", ewc_weight=10.0).play()
    state = done.states[0]
    folder = CheckpointFolder(tmp_path / "checkpoints", done.world.config)
    folder.write(Checkpoint(state))
    read = folder.read().state
    assert read.extras.keys() == {"anchor", "replay"}
    assert {n: d for n, (d, _) in read.extras.items()} == {
        n: d for n, (d, _) in state.extras.items()
    }
    assert read.carried.known == state.carried.known == tuple(range(10))


def test_images_that_were_kept_are_not_made_again(tmp_path: Path) -> None:
    done = Session(tmp_path, replay="synthetic")
    plan = done.world.plan
    maker = ImageMaker(folder=tmp_path / "images")
    one, seconds = maker(plan, done.state)
    path = next((tmp_path / "images").glob("synthetic-*"))
    stamp = path.stat().st_mtime_ns
    two, again = maker(plan, done.state)
    assert seconds == again > 0
    assert path.stat().st_mtime_ns == stamp
    assert one.extras["replay"][0] == two.extras["replay"][0]
    alone, _ = ImageMaker()(plan, done.state)
    assert alone.extras["replay"][0] == one.extras["replay"][0]
    other = replace(done.state, step=2)
    assert maker(plan, other)[0].extras["replay"][0] != one.extras["replay"][0]


def test_weights_of_a_prior_without_its_data_cannot_be_weighed(tmp_path: Path) -> None:
    config = Config.parse({**QUICK, "ewc_weight": 1.0, "prior": str(tmp_path / "mine")})
    with pytest.raises(ConfigError, match=r"ewc-weight is 1\.0 with a prior of your own"):
        open_world(config)

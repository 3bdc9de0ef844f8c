"""Methods: the same client, server and prior for all, and what each of them changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from common.config import Config
from common.data import split_holdout
from common.errors import ConfigError
from common.filters import FreeSet, freed_index, is_off
from common.layout import dense_layout
from common.seeds import torch_rng
from common.state import State, read_state, state_digest, write_state
from common.train import Labelled, Recipe, train
from server.bench.cell import Cell, Played, first_model, play
from server.bench.exam import exam_of
from server.bench.methods import METHODS, method_of, methods_of
from server.bench.plan import QUICK
from server.bench.priors import freed_prior, trained_prior
from server.plan import order_of, rounds_left, start
from server.prior import make_net
from server.world import open_world

TINY: dict[str, Any] = {
    **QUICK,
    "devices": 2,
    "rounds": 2,
    "epochs": 1,
    "prior_epochs": 3,
    "statistics_gap": 1.0,  # a prior so little trained falls behind its statistics
    "freeing_epochs": 2,
    "max_drop": 0.5,
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def cell(method: str, **settings: Any) -> Cell:
    return Cell("instance", 2, method, 0, {**TINY, **settings})


def played(which: Cell, out: Path) -> Played:
    torch.set_num_threads(1)
    world = open_world(which.config)
    return play(world, exam_of(which.base), *first_model(which, world, out))


def distance(one: State, other: State) -> float:
    return float(sum((one[k] - other[k]).square().sum() for k in one if "running" not in k))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_described_and_changes_settings_that_there_are(name: str) -> None:
    method = METHODS[name]
    assert len(method.about) > 10
    assert set(method.settings) <= set(Config.model_fields)
    equal_for_all = {"rounds", "epochs", "lr", "batch", "sample", "partition", "alpha", "crop"}
    equal_for_all |= {"flip", "prior_epochs", "prior_lr", "heldout", "weight_decay", "momentum"}
    assert not equal_for_all & set(method.settings)
    assert cell(name).config.model_dump().items() >= method.settings.items()


def test_all_is_every_method_and_a_variant_changes_one() -> None:
    assert methods_of("all") == tuple(METHODS)
    assert methods_of("fedavg,fallow,fedavg") == ("fedavg", "fallow")
    assert methods_of("fedavg,all") == ("fedavg", "all")  # the scope of that name
    variant = method_of("fedprox@prox=0.1+kd-weight=2")
    assert variant.settings["prox"] == "0.1"
    assert cell("fedprox@prox=0.1").config.prox == 0.1
    assert cell("fedprox").config.prox == 0.01


@pytest.mark.parametrize("name", ["fedmagic", "", "fedprox@prox", "fedavg,fedmagic"])
def test_an_unknown_method_is_told(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^methods "):
        methods_of(name)


# ---------------------------------------------------------------- the prior


def test_all_methods_begin_with_the_same_prior_bytes(out: Path) -> None:
    digests = {state_digest(trained_prior(open_world(cell(name).config), out)) for name in METHODS}
    assert len(digests) == 1
    assert len(list(out.glob("trained-*"))) == 1
    whole = first_model(cell("fedavg"), open_world(cell("fedavg").config), out)
    assert whole[1].empty
    assert state_digest(whole[0]) in digests


def test_ablations_begin_with_the_same_freed_filters_as_fallow(out: Path) -> None:
    digests = set()
    for name in ("fallow", "no-reinit", "no-distillation", "no-calibration", "rows", "all"):
        state, free = first_model(cell(name), open_world(cell(name).config), out)
        digests.add((state_digest(state), free.digest))
    assert len(digests) == 1


def test_a_random_mask_frees_other_filters_but_as_many_a_layer(out: Path) -> None:
    fallow, mask = cell("fallow"), cell("random-mask")
    _, mine = first_model(fallow, open_world(fallow.config), out)
    state, theirs = first_model(mask, open_world(mask.config), out)
    assert {n: len(c) for n, c in theirs.channels.items()} == {
        n: len(c) for n, c in mine.channels.items()
    }
    assert theirs != mine
    world = open_world(mask.config)
    write_state(world.plan.net, state)
    assert is_off(world.plan.net, world.plan.graph, theirs)


def test_a_random_mask_follows_a_share_that_fallow_had_to_lower(out: Path) -> None:
    mask = cell("random-mask", share=0.5)
    world = open_world(mask.config)
    lower = cell("fallow", share=0.3)  # as if freeing half had been refused
    _, like = first_model(lower, open_world(lower.config), out)
    _, theirs = freed_prior(world, lower.base, out)
    assert {n: len(c) for n, c in theirs.channels.items()} == {
        n: len(c) for n, c in like.channels.items()
    }


# ---------------------------------------------------------------- what a method changes


def test_fedavg_of_one_device_and_one_epoch_is_plain_training(out: Path) -> None:
    one = cell("fedavg", devices=1, rounds=1)
    config, world = one.config, open_world(one.config)
    prior, _ = first_model(one, world, out)
    net = make_net(config, world.plan.spec)
    write_state(net, prior)
    images, _ = split_holdout(world.scenario.device(1, 0), config.heldout)
    train(
        net,
        dense_layout(world.plan.graph, prior),
        Labelled.of(images, world.normalisation),
        lambda logits, _, y: F.cross_entropy(logits, y),
        Recipe(1, config.batch, config.lr, world.augment, config.momentum, config.weight_decay),
        torch_rng("train", 0, 1, "grow", 0, 0, "device-00000"),
    )
    model = played(one, out).model
    for name, tensor in read_state(net).items():
        torch.testing.assert_close(model[name], tensor, rtol=1e-6, atol=1e-6)
    assert distance(model, prior) > 0


def test_fedprox_without_its_term_is_fedavg_and_with_much_of_it_stays_near(out: Path) -> None:
    fedavg = played(cell("fedavg"), out)
    none = played(cell("fedprox@prox=0"), out)
    much = played(cell("fedprox@prox=5"), out)
    assert state_digest(none.model) == state_digest(fedavg.model)
    prior = trained_prior(open_world(cell("fedavg").config), out)
    assert distance(much.model, prior) < 0.5 * distance(fedavg.model, prior)


def test_no_reinit_leaves_the_freed_filters_their_weights(out: Path) -> None:
    plain, ablated = cell("fallow"), cell("no-reinit")
    world = open_world(plain.config)
    prior, free = first_model(plain, world, out)
    left = start(replace(world.plan, config=ablated.config), prior, free)
    drawn = start(world.plan, prior, free)
    assert state_digest(left.base) == state_digest(prior)
    assert order_of(replace(world.plan, config=ablated.config), left).regrown is None
    for name, rows in freed_index(world.plan.graph, free).own.items():
        if prior[name].dim() == 4:
            assert not torch.equal(drawn.base[name][rows], prior[name][rows])


def test_teachers_and_perturbation_change_what_is_learnt(out: Path) -> None:
    names = ("fedavg", "fedlwf", "fedntd", "shrink-perturb", "no-distillation", "fallow")
    models = {name: played(cell(name), out).model for name in names}
    assert len({state_digest(model) for model in models.values()}) == len(names)
    prior = trained_prior(open_world(cell("fedavg").config), out)
    assert distance(models["shrink-perturb"], prior) > distance(models["fedavg"], prior)


def test_fedlwf_listens_to_its_teacher_alike_on_every_image_and_in_every_round(out: Path) -> None:
    rounds = played(cell("fedlwf", rounds=3), out).rounds
    assert [r["lambda"] for r in rounds] == [1.0, 1.0, 1.0]
    world = open_world(cell("fedlwf").config)
    order = order_of(world.plan, start(world.plan, *first_model(cell("fedlwf"), world, out)))
    assert order.teaching.floor == 1.0


def test_fedewc_stays_where_the_prior_data_want_it(out: Path) -> None:
    prior = trained_prior(open_world(cell("fedavg").config), out)
    fedavg = played(cell("fedavg"), out)
    held = played(cell("fedewc@ewc-weight=100000"), out)
    assert distance(held.model, prior) < 0.8 * distance(fedavg.model, prior)
    assert [r["phase"] for r in held.rounds] == ["grow", "grow"]  # none after the last step
    importances = 4 * sum(t.numel() for t in held.model.values()) * 2  # to each device, once
    down = sum(r["bytes_down"] for r in held.rounds) - sum(r["bytes_down"] for r in fedavg.rounds)
    assert down == pytest.approx(importances, rel=0.05)


def test_generative_replay_costs_its_images_and_the_seconds_that_they_took(out: Path) -> None:
    small = cell("generative@synthetic-images=64+synthetic-steps=3")
    done = played(small, out)
    fedavg = played(cell("fedavg"), out)
    assert state_digest(done.model) != state_digest(fedavg.model)
    down = sum(r["bytes_down"] for r in done.rounds) - sum(r["bytes_down"] for r in fedavg.rounds)
    assert down == pytest.approx(2 * 64 * 8 * 8, rel=0.2)  # devices, images, pixels; and headers
    assert done.rounds[0]["synthesis_seconds"] > 0
    assert "synthesis_seconds" not in done.rounds[1]


def test_whole_net_methods_play_nothing_but_their_rounds(out: Path) -> None:
    done = played(cell("fedavg"), out)
    assert [r["phase"] for r in done.rounds] == ["grow", "grow"]
    assert done.free.empty
    assert len(done.rows) == 1
    plan = open_world(cell("fedavg").config).plan
    assert rounds_left(plan, start(plan, done.model, FreeSet({}))) == len(done.rounds)
    moved = 4 * sum(t.numel() for t in done.model.values()) * 2 * 2  # rounds, devices
    for way in ("up", "down"):
        assert sum(r[f"bytes_{way}"] for r in done.rounds) == pytest.approx(moved, rel=0.1)


def test_no_consolidation_keeps_what_its_filters_have_learnt(out: Path) -> None:
    two = Cell("instance", 3, "no-consolidation", 0, {**TINY, "rounds": 1})
    done = played(two, out)
    phases = [(step, phase) for step in (1, 2) for phase in ("look", "grow")]
    assert [(r["step"], r["phase"]) for r in done.rounds] == phases
    world = open_world(two.config)
    write_state(world.plan.net, done.model)
    _, freed = first_model(two, world, out)
    assert not freed.empty
    assert not is_off(world.plan.net, world.plan.graph, freed)
    assert done.free.empty  # they belong to the model that is measured: nothing is cut out


def test_fedavg_slim_frees_after_the_step_as_fallow_does(out: Path) -> None:
    done = played(cell("fedavg-slim"), out)
    phases = [r["phase"] for r in done.rounds]
    assert phases == ["grow"] * 2 + ["weigh"] + ["consolidate"] * 2 + ["judge"]
    assert done.outcomes[0].attempts

"""The first model: trained and freed at the server, or brought."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_grid import SPEC, make_plan
from safetensors.torch import save_file

from common.accelerator import CPU
from common.config import Config
from common.data import Augment, ImageSet, Normalisation, open_source, split_holdout
from common.errors import ConfigError, DataError, NetError, StoreError
from common.filters import cut, is_off
from common.state import read_state, state_digest, write_state
from common.store import write_state_file
from common.train import Labelled, accuracy_of
from server.plan import Plan
from server.prior import Prior, bring_prior, make_net, train_prior
from server.world import open_world

QUICK: dict[str, Any] = {"prior_epochs": 6, "freeing_epochs": 4, "max_drop": 0.05}


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return open_source("digits").take(np.arange(500))


def trained(images: ImageSet, told: list[Any] | None = None, **settings: Any) -> tuple[Plan, Prior]:
    plan = make_plan(**{**QUICK, **settings})
    prior = train_prior(
        plan.config,
        plan.spec,
        plan.graph,
        images,
        CPU,
        Augment(1, False),
        lambda *what: told.append(what) if told is not None else None,
    )
    return plan, prior


@pytest.fixture(scope="module")
def told() -> list[Any]:
    return []


@pytest.fixture(scope="module")
def made(images: ImageSet, told: list[Any]) -> tuple[Plan, Prior]:
    return trained(images, told)


def accuracy(plan: Plan, state: Any, images: ImageSet, free: Any = None) -> float:
    net = make_net(plan.config, plan.spec)
    write_state(net, state)
    net.eval()
    if free is not None:
        net = cut(net, plan.graph, free)
    return accuracy_of(net, Labelled.of(images, Normalisation(SPEC.mean, SPEC.std)))


def test_it_learns_and_what_is_freed_can_be_cut_out(
    made: tuple[Plan, Prior], images: ImageSet
) -> None:
    plan, prior = made
    assert prior.source == "trained"
    assert prior.freeing is not None
    _, held = split_holdout(images, plan.config.heldout)
    assert accuracy(plan, prior.trained, held) == prior.freeing.before > 0.5
    assert accuracy(plan, prior.state, held) == pytest.approx(prior.freeing.after)
    assert accuracy(plan, prior.state, held, prior.free) == prior.freeing.after_cut == prior.heldout
    assert prior.freeing.before - prior.heldout <= plan.config.max_drop
    assert prior.free.share(plan.graph) > 0.2
    net = make_net(plan.config, plan.spec)
    write_state(net, prior.state)
    assert is_off(net, plan.graph, prior.free)


def test_every_epoch_is_told(made: tuple[Plan, Prior], told: list[Any]) -> None:
    _, prior = made
    assert [t[:3] for t in told[:6]] == [("prior", n + 1, 6) for n in range(6)]
    assert [t[:3] for t in told[6:10]] == [("freeing (try 1)", n + 1, 4) for n in range(4)]
    assert all(math.isfinite(t[3]) for t in told)
    assert prior.freeing is not None
    assert len(told) == 6 + 4 * len(prior.freeing.attempts)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(images: ImageSet) -> None:
    short = {"prior_epochs": 1, "freeing_epochs": 1}
    digests = [
        state_digest(trained(images.select(np.arange(120)), **short, seed=seed)[1].state)
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_freeing_that_costs_too_much_is_given_up_and_the_model_stays(images: ImageSet) -> None:
    few = images.select(np.arange(200))
    _, prior = trained(few, freeing_lr=1e-9, freeing_epochs=1, max_drop=0.0, attempts=2)
    assert prior.freeing is not None
    assert [a.accepted for a in prior.freeing.attempts] == [False, False]
    shares = [a.share for a in prior.freeing.attempts]
    assert shares[1] < shares[0]
    assert prior.free.empty
    assert state_digest(prior.state) == state_digest(prior.trained)
    assert prior.heldout == prior.freeing.before


def test_too_few_images_are_refused_with_what_to_change(images: ImageSet) -> None:
    for few in (0, 1, 2):
        with pytest.raises(DataError, match=rf"{few} image\(s\) for the prior .* raise prior-size"):
            trained(images.select(np.arange(few)))


def test_a_new_net_hangs_on_the_seed_alone() -> None:
    config, other = (Config.parse({"net": "resnet8", "width": 8, "seed": s}) for s in (0, 1))
    before = torch.get_rng_state()
    torch.manual_seed(5)
    one = state_digest(read_state(make_net(config, SPEC)))
    torch.manual_seed(6)
    after_seeding = torch.get_rng_state()
    assert state_digest(read_state(make_net(config, SPEC))) == one
    assert torch.equal(torch.get_rng_state(), after_seeding)
    assert state_digest(read_state(make_net(other, SPEC))) != one
    torch.set_rng_state(before)


# a model that is brought


def bring(path: Path, images: ImageSet | None = None, **settings: Any) -> Prior:
    plan = make_plan(prior=str(path), **settings)
    return bring_prior(plan.config, plan.spec, images)


def test_a_model_is_brought_as_it_is(
    made: tuple[Plan, Prior], images: ImageSet, tmp_path: Path
) -> None:
    plan, prior = made
    write_state_file(tmp_path / "mine.safetensors", prior.trained)
    brought = bring(tmp_path / "mine.safetensors", images)
    assert state_digest(brought.state) == state_digest(prior.trained)
    assert brought.source == "brought"
    assert brought.free.empty
    assert brought.freeing is None
    assert brought.heldout == accuracy(plan, prior.trained, images)
    assert math.isnan(bring(tmp_path / "mine.safetensors").heldout)


def test_a_plain_state_dict_of_torch_is_brought_too(
    made: tuple[Plan, Prior], tmp_path: Path
) -> None:
    net = make_net(made[0].config, SPEC)  # with num_batches_tracked, which is no weight
    write_state(net, made[1].trained)
    save_file(net.state_dict(), tmp_path / "torch.safetensors")
    assert state_digest(bring(tmp_path / "torch.safetensors").state) == state_digest(
        made[1].trained
    )
    half = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    assert {t.dtype for t in bring(tmp_path / "half.safetensors").state.values()} == {torch.float32}


def test_a_model_that_does_not_fit_is_refused_by_file_and_tensor(
    made: tuple[Plan, Prior], tmp_path: Path
) -> None:
    state = made[1].trained
    path = tmp_path / "mine.safetensors"
    write_state_file(path, {k: v for k, v in state.items() if k != "fc.bias"})
    with pytest.raises(NetError, match=rf"{path}: the state lacks tensor 'fc.bias'"):
        bring(path)
    write_state_file(path, {**state, "fc2.bias": state["fc.bias"].clone()})
    with pytest.raises(NetError, match=r"unknown tensor 'fc2.bias'"):
        bring(path)
    write_state_file(path, {**state, "fc.bias": state["fc.bias"][:5].clone()})
    with pytest.raises(NetError, match=r"'fc.bias' has shape \(5,\), the net expects \(10,\)"):
        bring(path)


def test_a_model_file_that_is_absent_or_torn_is_refused(
    made: tuple[Plan, Prior], tmp_path: Path
) -> None:
    path = tmp_path / "mine.safetensors"
    with pytest.raises(StoreError, match="is not there"):
        bring(path)
    write_state_file(path, made[1].trained)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StoreError, match="no readable safetensors file"):
        bring(path)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(StoreError, match="no readable safetensors file"):
        bring(path)


def brought_world(path: Path, **settings: Any) -> Any:
    return open_world(
        Config.parse({"net": "resnet8", "width": 8, "prior": str(path), "devices": 2, **settings})
    ).plan.spec


def test_a_brought_model_must_say_how_its_images_were_normalised(
    made: tuple[Plan, Prior], tmp_path: Path
) -> None:
    path = tmp_path / "mine.safetensors"
    write_state_file(path, made[1].trained)
    with pytest.raises(ConfigError, match=r"give norm-mean and norm-std"):
        brought_world(path)
    told = brought_world(path, norm_mean="0.25", norm_std="0.5")
    assert (told.mean, told.std) == ((0.25,), (0.5,))
    write_state_file(path, made[1].trained, mean="[0.125]", std="[0.375]")
    own = brought_world(path)
    assert (own.mean, own.std) == ((0.125,), (0.375,))


@pytest.mark.parametrize(
    ("mean", "std", "wrong"),
    [
        ("0.1,0.2", "0.5", "norm-mean is '0.1,0.2': give 1 comma-separated"),
        ("0.1", "", "norm-std is ''"),
        ("0.1", "0", "norm-std is '0'"),
        ("red", "0.5", "norm-mean is 'red'"),
        ("nan", "0.5", "norm-mean is 'nan'"),
        ("0.1", "inf", "norm-std is 'inf'"),
    ],
)
def test_a_normalisation_that_cannot_be_used_is_refused(mean: str, std: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        open_world(
            Config.parse(
                {"net": "resnet8", "width": 8, "norm-mean": mean, "norm-std": std, "devices": 2}
            )
        )

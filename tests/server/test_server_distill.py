"""Distillation at the server: the mean learns from the prior and from the round's updates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_grid import make_plan
from torch import nn

from common.accelerator import CPU
from common.data import Augment, ImageSet, Normalisation, open_source
from common.distill import blend, kd
from common.filters import cut
from common.state import State, state_digest, write_state
from common.train import predict
from server.distill import ServerDistiller
from server.plan import Plan, RunState, layout_of, start
from server.prior import Prior, train_prior


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return open_source("digits").take(np.arange(256))


World = Callable[..., tuple[Plan, RunState]]


@pytest.fixture(scope="module")
def prior(images: ImageSet) -> Prior:
    plan = make_plan(prior_epochs=20, freeing_epochs=10, max_drop=1.0)
    plain = Augment(0, False)
    return train_prior(plan.config, plan.spec, plan.graph, images, CPU, plain, lambda *_: None)


@pytest.fixture
def world(prior: Prior) -> World:
    def build(**settings: Any) -> tuple[Plan, RunState]:
        plan = make_plan(**settings)
        return plan, start(plan, prior.state, prior.free)

    return build


def round_of(plan: Plan, state: RunState, devices: int = 3) -> tuple[np.ndarray, list[np.ndarray]]:
    """Updates of devices that drifted apart, and their mean."""
    layout = layout_of(plan, state)
    base = layout.pack(state.base)
    rng = np.random.default_rng(0)
    updates = [
        (base * np.exp(0.3 * rng.normal(size=layout.size))).astype(np.float32)
        for _ in range(devices)
    ]
    return np.mean(updates, axis=0).astype(np.float32), updates


def loaded(plan: Plan, model: State) -> nn.Module:
    net = copy.deepcopy(plan.net)
    write_state(net, model)
    return net.eval()


def logits(plan: Plan, state: RunState, values: np.ndarray, images: ImageSet) -> torch.Tensor:
    net = loaded(plan, layout_of(plan, state).unpack(state.base, values))
    x = Normalisation(plan.spec.mean, plan.spec.std).to_tensor(images.images)
    return predict(net, x)


def taught(
    plan: Plan, state: RunState, updates: list[np.ndarray], images: ImageSet
) -> torch.Tensor:
    """The teachers as the docstring states them: the prior, and the mean of the devices."""
    net = loaded(plan, state.prior)
    x = Normalisation(plan.spec.mean, plan.spec.std).to_tensor(images.images)
    prior = predict(cut(net, plan.graph, state.free), x)
    ensemble = torch.stack([logits(plan, state, u, images) for u in updates]).mean(0)
    return blend(prior, ensemble)


def test_the_mean_comes_closer_to_its_teachers(world: World, images: ImageSet) -> None:
    plan, state = world(distill_epochs=3, scope="group")
    mean, updates = round_of(plan, state)
    result = ServerDistiller(images, CPU)(plan, state, mean, updates)
    target = taught(plan, state, updates, images)
    before, after = (
        float(kd(logits(plan, state, v, images), target, 2.0).mean()) for v in (mean, result)
    )
    assert after < 0.5 * before


def test_where_the_devices_know_nothing_the_prior_is_heard(world: World, images: ImageSet) -> None:
    plan, state = world(distill_epochs=6, scope="all", distill_lr=0.02)
    layout = layout_of(plan, state)
    blank = {**state.base}
    for name in ("fc.weight", "fc.bias"):
        blank[name] = torch.zeros_like(blank[name])
    clueless = layout.pack(blank)
    result = ServerDistiller(images, CPU)(plan, state, clueless, [clueless] * 2)
    prior = logits(plan, state, layout.pack(state.base), images).argmax(1)
    agreement = (logits(plan, state, result, images).argmax(1) == prior).float().mean()
    assert agreement > 0.8


@pytest.mark.parametrize("scope", ["rows", "group", "all"])
def test_only_what_the_scope_names_is_touched(scope: str, world: World, images: ImageSet) -> None:
    plan, state = world(scope=scope)
    layout = layout_of(plan, state)
    mean, updates = round_of(plan, state)
    result = ServerDistiller(images, CPU)(plan, state, mean, updates)
    assert result.dtype == np.float32
    assert result.shape == mean.shape
    assert np.isfinite(result).all()
    assert (result != mean).any()
    if scope == "rows":  # the kept part is the prior, to the bit
        before, after = (
            cut(loaded(plan, model), plan.graph, state.free).state_dict()
            for model in (state.prior, layout.unpack(state.base, result))
        )
        assert all(before[name].equal(after[name]) for name in before)


def test_it_is_repeatable_and_another_round_draws_anew(world: World, images: ImageSet) -> None:
    plan, state = world()
    mean, updates = round_of(plan, state)
    distiller = ServerDistiller(images, CPU)
    first = distiller(plan, state, mean, updates)
    assert distiller(plan, state, mean, updates).tobytes() == first.tobytes()
    assert ServerDistiller(images, CPU)(plan, state, mean, updates).tobytes() == first.tobytes()
    assert distiller(plan, replace(state, round=1), mean, updates).tobytes() != first.tobytes()


def test_labels_are_not_looked_at(world: World, images: ImageSet) -> None:
    plan, state = world()
    mean, updates = round_of(plan, state)
    unlabelled = ImageSet(images.images, np.full(len(images), -1), images.classes)
    one, other = (ServerDistiller(i, CPU)(plan, state, mean, updates) for i in (images, unlabelled))
    assert one.tobytes() == other.tobytes()


def test_its_inputs_stay_as_they_were_and_its_time_is_counted(
    world: World, images: ImageSet
) -> None:
    plan, state = world()
    mean, updates = round_of(plan, state)
    before = (mean.tobytes(), [u.tobytes() for u in updates], state_digest(state.base))
    scratch = state_digest(dict(plan.net.state_dict()))
    distiller = ServerDistiller(images, CPU)
    assert distiller.seconds == 0.0
    distiller(plan, state, mean, updates)
    spent = distiller.seconds
    assert spent > 0
    distiller(plan, state, mean, updates)
    assert distiller.seconds > spent
    assert before == (mean.tobytes(), [u.tobytes() for u in updates], state_digest(state.base))
    assert state_digest(dict(plan.net.state_dict())) == scratch

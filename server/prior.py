"""The first model: trained and freed on the operator's own data, or brought by the user."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common.accelerator import Accelerator
from common.codec import coarse
from common.config import Config
from common.data import Augment, ImageSet, Normalisation, split_holdout
from common.distill import Distillation
from common.errors import DataError, NetError
from common.filters import FilterGraph, FreeSet
from common.importance import (
    bn_scale,
    choose,
    combine_ranks,
    random_scores,
    sensitivity,
    taylor,
)
from common.layout import dense_layout
from common.nets import build
from common.order import NetSpec
from common.rotation import Rotations
from common.seeds import numpy_rng, torch_rng
from common.sparsify import Freeing, free_filters
from common.state import State, read_state, write_state
from common.store import read_state_file
from common.train import Labelled, Recipe, accuracy_of, train

_SCORED_IMAGES = 1024


@dataclass(frozen=True, eq=False)
class Prior:
    """The first model and how it came about.

    Attributes
    ----------
    trained : State
        As trained or brought.
    state : State
        With the free filters off.
    free : FreeSet
        Empty if freeing is left to the devices.
    heldout : float
        Accuracy of `state` on held-out prior data, in [0, 1]; NaN if there is none.
    freeing : Freeing or None
        None if freeing is left to the devices.
    source : str
        ``trained`` or ``brought``.
    freeing_seconds : float
        Spent on freeing its filters at the server.
    """

    trained: State
    state: State
    free: FreeSet
    heldout: float
    freeing: Freeing | None
    source: str
    freeing_seconds: float = 0.0


Tell = Callable[[str, int, int, float], None]
"""(stage, epoch, epochs, loss), after each epoch."""


def make_net(config: Config, spec: NetSpec) -> nn.Module:
    """Build the net of a run, initialised by the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_rng("init", config.seed).initial_seed())
        return build(spec.name, spec.classes, spec.input_shape[0], spec.width or None)


def train_prior(
    config: Config,
    spec: NetSpec,
    graph: FilterGraph,
    images: ImageSet,
    accelerator: Accelerator,
    augment: Augment,
    tell: Tell,
) -> Prior:
    """Train the first model on the operator's data and, by `freeing`, free its filters there.

    Raises
    ------
    DataError
        If too few images are held out to decide on the freeing.
    """
    trained = fit_prior(config, spec, graph, images, accelerator, augment, tell)
    if config.freeing in ("always", "prior"):
        return free_prior(config, spec, graph, trained, images, accelerator, augment, tell)
    net = make_net(config, spec).to(accelerator.device)
    write_state(net, trained)
    heldout = _split(config, spec, images)[1]
    accuracy = accuracy_of(net, heldout, accelerator)
    return Prior(trained, trained, FreeSet({}), accuracy, None, "trained")


def _split(config: Config, spec: NetSpec, images: ImageSet) -> tuple[Labelled, Labelled]:
    normalisation = Normalisation(spec.mean, spec.std)
    kept, held = split_holdout(images, config.heldout)
    data, heldout = Labelled.of(kept, normalisation), Labelled.of(held, normalisation)
    if not len(heldout) or len(data) < 2:
        raise DataError(
            f"{len(images)} image(s) for the prior leave {len(data)} to train on and "
            f"{len(heldout)} to decide on: raise prior-size or heldout (now {config.heldout})"
        )
    return data, heldout


def fit_prior(
    config: Config,
    spec: NetSpec,
    graph: FilterGraph,
    images: ImageSet,
    accelerator: Accelerator,
    augment: Augment,
    tell: Tell,
) -> State:
    """Train the first model on the operator's data; raises as `train_prior` does."""
    data, _ = _split(config, spec, images)
    net = make_net(config, spec).to(accelerator.device)
    train(
        net,
        dense_layout(graph, read_state(net)),
        data,
        lambda logits, _, y: F.cross_entropy(logits, y),
        _recipe(config, config.prior_epochs, config.prior_lr, augment),
        torch_rng("prior", config.seed),
        accelerator=accelerator,
        after_epoch=lambda epoch, loss: tell("prior", epoch, config.prior_epochs, loss),
    )
    return read_state(net)


def free_prior(
    config: Config,
    spec: NetSpec,
    graph: FilterGraph,
    trained: State,
    images: ImageSet,
    accelerator: Accelerator,
    augment: Augment,
    tell: Tell,
) -> Prior:
    """Free filters of a trained first model on the data that it was trained on."""
    began = time.monotonic()
    data, heldout = _split(config, spec, images)
    net = make_net(config, spec).to(accelerator.device)
    write_state(net, trained)
    scored = Labelled(data.x[:_SCORED_IMAGES], data.y[:_SCORED_IMAGES])
    batches = list(zip(torch.split(scored.x, 128), torch.split(scored.y, 128), strict=True))
    scores = combine_ranks(
        [bn_scale(net, graph), sensitivity(net, graph, batches), taylor(net, graph, batches)]
    )
    if config.choice == "random":
        scores = random_scores(graph, numpy_rng("choice", config.seed, 0))
    teacher = copy.deepcopy(net).eval()

    def rotations(attempt: int) -> Rotations:
        head = net.get_submodule(graph.head)
        assert isinstance(head, nn.Linear)
        rng = torch_rng("rotations", config.seed, attempt)
        return Rotations(head, head.in_features, spec.classes, config.rotations, rng)

    freeing = free_filters(
        net,
        graph,
        lambda share: choose(graph, scores, share, cap=config.cap),
        data,
        heldout,
        [teacher],
        share=config.share,
        max_drop=config.max_drop,
        recipe=_recipe(config, config.freeing_epochs, config.freeing_lr, augment),
        distillation=Distillation(
            config.kd_weight, config.kd_temperature, config.kd_floor, config.ntd_weight
        ),
        until=config.anneal,
        rng=lambda attempt: torch_rng("free", config.seed, attempt),
        tries=config.attempts,
        shrink=config.shrink,
        rotations=rotations if config.rotations else None,
        accelerator=accelerator,
        on_epoch=lambda attempt, epoch, loss: tell(
            f"freeing (try {attempt + 1})", epoch, config.freeing_epochs, loss
        ),
    )
    return Prior(
        trained,
        read_state(net),
        freeing.free,
        freeing.after_cut,
        freeing,
        "trained",
        time.monotonic() - began,
    )


def shortened(prior: Prior) -> Prior:
    """Return the prior with weights of 8 significant bits.

    Every device gets it once, to the bit, and so for a third of the bytes. BN and biases, which
    are few, stay as they are.
    """
    state = {
        name: torch.from_numpy(coarse(tensor.numpy())) if tensor.dim() > 1 else tensor
        for name, tensor in prior.state.items()
    }
    return replace(prior, state=state)


def bring_prior(config: Config, spec: NetSpec, images: ImageSet | None) -> Prior:
    """Read the user's own model; its filters are freed later, on the devices.

    Raises
    ------
    StoreError, NetError
        If the file is unreadable or belongs to another net.
    """
    state = read_state_file(Path(config.prior))
    state = {k: v.float() for k, v in state.items() if v.is_floating_point()}
    net = make_net(config, spec)
    try:
        write_state(net, state)
    except NetError as error:
        raise NetError(f"{config.prior}: {error}") from None
    accuracy = math.nan
    if images is not None and len(images):
        accuracy = accuracy_of(net.eval(), Labelled.of(images, Normalisation(spec.mean, spec.std)))
    return Prior(state, state, FreeSet({}), accuracy, None, "brought")


def _recipe(config: Config, epochs: int, lr: float, augment: Augment) -> Recipe:
    return Recipe(
        epochs=epochs,
        batch=config.server_batch,
        lr=lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule="cosine",
        augment=augment,
    )

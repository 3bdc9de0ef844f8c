"""Prior models, made once for all methods and named by what they are made from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from common.config import Config
from common.filters import FreeSet
from common.importance import choose, random_scores
from common.seeds import numpy_rng
from common.state import State
from common.store import read_state_and_header, read_state_file, write_state_file
from server.prior import fit_prior, free_prior
from server.world import World

_TRAINING = {
    "seed",
    "heldout",
    "prior_epochs",
    "prior_lr",
    "server_batch",
    "momentum",
    "weight_decay",
}
_FREEING = {
    "freeing_epochs",
    "freeing_lr",
    "rotations",
    "share",
    "cap",
    "max_drop",
    "anneal",
    "attempts",
    "shrink",
    "choice",
    "kd_weight",
    "kd_temperature",
    "kd_floor",
    "ntd_weight",
}


def trained_prior(world: World, folder: Path) -> State:
    """Return the prior as trained, the same bytes for every method."""
    path = folder / f"trained-{_key(world, world.config, _TRAINING)}.safetensors"
    if not path.exists():
        config = world.config
        state = fit_prior(
            config,
            world.plan.spec,
            world.plan.graph,
            world.scenario.prior,
            world.accelerator,
            world.augment,
            _silent,
        )
        write_state_file(path, state)
    return read_state_file(path)


def freed_prior(world: World, base: Config, folder: Path) -> tuple[State, FreeSet]:
    """Return the prior with its free filters off, and which they are.

    Parameters
    ----------
    world : World
        Of the method.
    base : Config
        The settings of the default method: with choice ``random`` as many filters of each layer
        are freed as it frees.
    """
    config = world.config
    if config.choice == "random":
        _, like = freed_prior(_with(world, base), base, folder)
        if like.empty:
            return trained_prior(world, folder), like
        config = config.model_copy(update={"share": _share_of(world, like)})
    path = folder / f"freed-{_key(world, config, _TRAINING | _FREEING)}.safetensors"
    if not path.exists():
        prior = free_prior(
            config,
            world.plan.spec,
            world.plan.graph,
            trained_prior(world, folder),
            world.scenario.prior,
            world.accelerator,
            world.augment,
            _silent,
        )
        write_state_file(path, prior.state, free=prior.free.to_json())
    state, header = read_state_and_header(path)
    return state, FreeSet.from_json(header["free"])


def _with(world: World, config: Config) -> World:
    """Return `world` with other settings; only those of freeing may differ."""
    return World(
        config,
        world.scenario,
        world.plan,
        world.accelerator,
        world.test,
        world.proxy,
        world.calibration,
    )


def _share_of(world: World, like: FreeSet) -> float:
    """Return the share, among those that freeing tries, at which `like` was chosen."""
    config, graph = world.config, world.plan.graph
    scores = random_scores(graph, numpy_rng("choice", config.seed, 0))
    share = config.share
    while choose(graph, scores, share, cap=config.cap).count > like.count:
        share *= config.shrink
    return share


def _key(world: World, config: Config, settings: set[str]) -> str:
    made_from: dict[str, Any] = {
        "images": world.scenario.prior.digest,
        "net": world.plan.spec.model_dump(exclude={"class_names"}),
        "augment": [world.augment.crop_padding, world.augment.flip],
        "settings": config.model_dump(include=settings),
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def _silent(stage: str, epoch: int, epochs: int, loss: float) -> None:
    return None

"""What a run begins with: its first model, and what is recorded of the data while it is there."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np

from common.accelerator import CPU, Accelerator
from common.anchor import importances
from common.data import ImageSet, Normalisation, split_holdout
from common.filters import FreeSet
from common.seeds import torch_rng
from common.state import State, write_state
from common.train import Labelled
from server.plan import Carried, Plan, RunState, anchor_of, start
from server.remember import remember

_IMAGES = 1024


def first_state(
    plan: Plan,
    prior: State,
    free: FreeSet,
    images: ImageSet | None,
    accelerator: Accelerator = CPU,
) -> RunState:
    """Return the state of a new run.

    Parameters
    ----------
    prior, free
        The first model, its free filters off.
    images : ImageSet or None
        What it was trained on. Without them nothing is known of it but its weights.
    """
    memory = remember(plan, prior, free, images)
    known = range(plan.spec.classes) if images is None else np.unique(images.labels).tolist()
    carried = Carried(known=tuple(known))
    if plan.config.ewc_weight and images is not None:
        carried = replace(carried, anchor=_anchor(plan, prior, free, images, accelerator))
    return start(plan, prior, free, memory, carried)


def _anchor(
    plan: Plan, prior: State, free: FreeSet, images: ImageSet, accelerator: Accelerator
) -> np.ndarray:
    net = copy.deepcopy(plan.net)
    write_state(net, prior)
    net = net.to(accelerator.device)
    trained_on, _ = split_holdout(images, plan.config.heldout)
    data = Labelled.of(
        trained_on.select(np.arange(min(len(trained_on), _IMAGES))),
        Normalisation(plan.spec.mean, plan.spec.std),
    )
    rng = torch_rng("anchor", plan.config.seed, 0, "server")
    kind = plan.config.ewc_importance
    measured = importances(net, plan.graph, data, kind, rng, most=_IMAGES)
    return anchor_of(plan, prior, free, measured)

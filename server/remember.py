"""What is recorded of the prior's data while it is there, for the steps to come."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from common.data import ImageSet, Normalisation
from common.features import class_sums
from common.filters import FreeSet, parameter_count
from common.gate import Moments, stem_conv, stem_moments
from common.memory import Memory, trunk_of
from common.state import State
from common.train import Labelled
from server.plan import Plan, mirrors

_STAND_IN_IMAGES = 1000.0
_STATISTICS_SHARE = 1 / 6
"""Most parameters of a classifier of class statistics, as a share of the trunk's.

With many classes it would be larger than what slimming has saved, and hardly better: 36 classes are
told apart nearly as well by 735 features as by 1,280.
"""


def remember(plan: Plan, state: State, free: FreeSet, images: ImageSet | None) -> Memory | None:
    """Return the statistics that a run begins with; None if shifts are not looked for.

    Parameters
    ----------
    plan : Plan
        Of the run.
    state, free
        The prior, its free filters off.
    images : ImageSet or None
        What it was trained on. Without them world 0 is guessed from the first batch
        normalisation, all classes count as known, and there are no class statistics.
    """
    config = plan.config
    if config.shift == "never":
        return None
    trunk = trunk_of(plan.net, plan.graph, state, free)
    stem = stem_conv(trunk)
    weight = stem.weight.detach().clone().contiguous()
    classes = plan.spec.classes
    limit = _most_features(trunk, plan.graph.head, classes)
    if images is None or not len(images):
        guess = _guess(trunk)
        return Memory(weight, (guess,), known=tuple(range(classes)), stand_in=True, limit=limit)
    data = Labelled.of(images, Normalisation(plan.spec.mean, plan.spec.std))
    return Memory(
        weight,
        (stem_moments(stem, data.x),),
        known=tuple(torch.unique(data.y).tolist()),
        classes=class_sums(
            trunk,
            plan.graph.head,
            data.x,
            data.y,
            classes,
            layers=config.statistics_features,
            mirror=mirrors(config, plan.spec),
        ),
        head=config.statistics_head,
        layers=config.statistics_features,
        most=config.opinion_features,
        limit=limit,
        weight=config.opinion_weight,
    )


def _most_features(trunk: nn.Module, head: str, classes: int) -> int:
    """Return how many features a classifier has at most; as many as the net's own in any case."""
    own = trunk.get_submodule(head)
    assert isinstance(own, nn.Linear)
    return max(own.in_features, int(_STATISTICS_SHARE * parameter_count(trunk) / classes))


def _guess(trunk: nn.Module) -> Moments:
    """Return world 0 as its first batch normalisation saw it: the channels' means are right.

    Everything else is filled in when the first new images are seen (`common.gate.likened`).
    """
    bn = next(module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d))
    assert bn.running_mean is not None
    assert bn.running_var is not None
    deviation = bn.running_var.sqrt().double().numpy()
    mean = np.concatenate([bn.running_mean.double().numpy(), deviation])
    second = np.diag(np.tile(deviation**2, 2)) + np.outer(mean, mean)
    return Moments(_STAND_IN_IMAGES, _STAND_IN_IMAGES * mean, _STAND_IN_IMAGES * second)

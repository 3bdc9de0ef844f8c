"""Whether a model is worse than the one before it."""

from __future__ import annotations

import math

from common.sparsify import acceptable
from server.plan.state import Outcome


def is_worse(outcome: Outcome, allowed: float, errors: float = 1.0) -> bool:
    """Return whether the model is worse than the one before it, beyond what chance explains.

    Both are measured on the same images. A difference within one standard error is no evidence:
    refusing on it would throw a step's work away by the toss of a coin.
    """
    return outcome.prior_right - outcome.right > tolerated(outcome, allowed, errors)


def tolerated(outcome: Outcome, allowed: float, errors: float) -> float:
    """Return by how many images a model may be worse: what is allowed, and chance.

    Only images that one of both models gets right count; their difference has a standard error of
    the root of their number (McNemar, 1947).
    """
    lost = outcome.prior_right - outcome.both_right
    won = outcome.right - outcome.both_right
    return acceptable(allowed, outcome.heldout) + errors * math.sqrt(lost + won)

"""Where a run is: what stays the same, what a round comes to, what a step leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import nn

from common.config import Config
from common.filters import FilterGraph, FreeSet, union
from common.gate import Moments
from common.memory import Memory
from common.order import NetSpec, Phase
from common.regrow import Diversity
from common.sparsify import Attempt
from common.state import State, state_digest
from server.shared import Shared

Scores = dict[str, np.ndarray]


Way = Literal["whole", "expert", "classes"]


@dataclass(frozen=True, eq=False)
class Plan:
    """What stays the same for a whole run."""

    config: Config
    spec: NetSpec
    graph: FilterGraph
    net: nn.Module
    """Only its architecture is used; its weights are scratch space."""

    @property
    def diversity(self) -> Diversity:
        """Shares of the re-initialisation rules."""
        c = self.config
        return Diversity(c.regrow_orthogonal, c.regrow_kaiming, c.regrow_xavier, c.regrow_resample)


@dataclass(frozen=True)
class StepOutcome:
    """What a finished step came to; accuracies on the devices' held-out data, in [0, 1]."""

    step: int
    prior: float
    grown: float
    consolidated: float
    refusal: str | None
    free: FreeSet
    requested_share: float
    attempts: tuple[Attempt, ...]
    lambdas: tuple[float, ...]
    way: Way = "whole"


@dataclass(frozen=True, eq=False)
class Carried:
    """What a run takes from step to step beside the model, where a setting asks for it.

    Attributes
    ----------
    known : tuple of int
        Classes that the model has been trained on.
    anchor : float32 array or None
        What each weight matters to all data so far, in the dense layout (see `common.anchor`).
    spare : FreeSet
        A reserve: filters that were freed in the prior and are off until a later step's turn.
    learnt : bool
        Whether the free set is part of the prior model: nobody frees it again.
    """

    known: tuple[int, ...] = ()
    anchor: np.ndarray | None = None
    spare: FreeSet = field(default_factory=lambda: FreeSet({}))
    learnt: bool = False


@dataclass(frozen=True, eq=False)
class RunState:
    """Where a run is.

    Attributes
    ----------
    prior : State
        The model at the start of the step, its free filters off.
    base : State
        What `values` refer to: the regrown prior while growing, the grown model while
        consolidating.
    values : float32 array or None
        Packed entries of the phase's layout; None where they equal the base's.
    shared : Shared or None
        How `values` came to the devices; None where they travel as they are.
    tail : float32 array or None
        Mean of the last growing rounds' values so far; it is what a step's growing ends with.
    class_counts : tuple of int
        The devices' training images by class, as last reported in this step.
    free, next_free : FreeSet
        The freed filters that this step trains; those that its consolidation frees.
    source : str or None
        Digest of the model that `base` was regrown from.
    stopped : str or None
        Why the run is done before its last step.
    memory : Memory or None
        Statistics of all data so far; None if shifts are not looked for.
    way : {"whole", "expert", "classes"}
        How this step learns.
    world : int
        Whose expert this step trains; one more than there were, if it is a new one.
    seen : Moments or None
        Of this step's images, until they belong to `memory`.
    carried : Carried
        What earlier steps left.
    synthetic : uint8 array [N, H, W, C] or None
        Images that the server made of `prior`, until the step ends.
    peers : int
        Nets that `base` and `values` hold (see `common.peers`); one, but for growing.
    best : int
        Which of the step's peers became the model.
    pending : StepOutcome or None
        What the step came to, while a second opinion for its model is gathered and measured.
    retry : RunState or None
        What follows if even with its opinion the model has lost too much by the last freeing.
    allowed : float
        How much of the accuracy on held-out images it may have lost, in [0, 1].
    """

    step: int
    phase: Phase
    prior: State
    base: State
    free: FreeSet
    share: float
    kd_weight: float
    next_free: FreeSet = field(default_factory=lambda: FreeSet({}))
    values: np.ndarray | None = None
    shared: Shared | None = None
    tail: np.ndarray | None = None
    class_counts: tuple[int, ...] = ()
    source: str | None = None
    attempt: int = 0
    round: int = 0
    heldout_prior: float = math.nan
    heldout_grown: float = math.nan
    attempts: tuple[Attempt, ...] = ()
    lambdas: tuple[float, ...] = ()
    scores: Scores | None = None
    finished: tuple[StepOutcome, ...] = ()
    done: bool = False
    stopped: str | None = None
    memory: Memory | None = None
    way: Way = "whole"
    world: int = 0
    seen: Moments | None = None
    carried: Carried = field(default_factory=Carried)
    synthetic: np.ndarray | None = None
    peers: int = 1
    best: int = 0
    pending: StepOutcome | None = None
    retry: RunState | None = None
    allowed: float = 0.0

    @property
    def off(self) -> FreeSet:
        """Filters of `prior` that are off."""
        unused = [self.carried.spare] if self.carried.learnt else [self.free, self.carried.spare]
        return union(*unused)

    @cached_property
    def base_digest(self) -> str:
        """Digest of `base`."""
        return state_digest(self.base)

    @cached_property
    def extras(self) -> dict[str, tuple[str, np.ndarray]]:
        """What devices may need beside the base, by the field of the order that names it.

        Each with its digest; they hold it for as long as it stays the same.
        """
        rival, memory = None, self.memory
        comparing = self.phase in ("look", "tally", "advise")
        if comparing and memory is not None and memory.rival is not None:
            made = memory.advisor if self.phase == "advise" else memory.answer
            rival = made(memory.rival).pack(memory.rival.sums.shape[1])
        found = {"anchor": self.carried.anchor, "replay": self.synthetic, "rival": rival}
        return {
            name: (state_digest({name: torch.from_numpy(array)}), array)
            for name, array in found.items()
            if array is not None
        }


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a round's valid replies come to.

    Attributes
    ----------
    values : float32 array or None
        Aggregated packed values; None if nothing was trained.
    heldout, right, prior_right, both_right : int
        Sums of the devices' counts (see `common.order.Report`).
    scores : list of dict
        weigh: importances per layer, one dict a kind.
    class_counts : tuple of int
        Training images by class, over the devices.
    peer_right : tuple of int
        `right` of every peer.
    rival_right : int
        look, tally: held-out images that the rival classifier gets right.
    sums : float64 array or None
        look: sum of the devices' packed statistics. anchor: mean of their importances.
    """

    values: np.ndarray | None
    heldout: int
    right: int
    prior_right: int
    both_right: int
    scores: tuple[Scores, ...] = ()
    class_counts: tuple[int, ...] = ()
    sums: np.ndarray | None = None
    rival_right: int = 0
    peer_right: tuple[int, ...] = ()

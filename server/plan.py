"""Steps and phases as a pure state machine: (plan, state, outcome) -> state.

A step begins with ``look``: statistics of the new images tell how to learn from them. Other
classes are learnt by statistics alone. Images of another world are learnt by an expert: ``grow``,
then ``tally``, class statistics of what it sees, for a second opinion beside its own classifier;
unless a classifier made of class statistics alone is then measured to be better.
Where nothing has shifted, the step goes ``grow`` (AOD) -> ``weigh`` (is the grown model better,
which filters matter) -> ``consolidate`` (SST + MSL) -> ``judge`` (is what freeing cost accepted),
back to ``consolidate`` with a smaller share where it is not. Class statistics of the new model
then make a second opinion beside its classifier (``tally``), unless that is worse (``advise``).
Step 0 exists only for a prior whose filters nobody has freed yet; it has no ``grow``.

No function here does I/O or draws a random number, so a checkpoint is the state.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from common.anchor import without
from common.config import Config
from common.experts import changed_by, expert_layout
from common.features import ClassSums, Layers, feature_size
from common.features import packed_size as sums_size
from common.filters import FilterGraph, FreeSet, common_part, cut, parameter_count, portion, union
from common.gate import Moments, likened, separation, separation_by_channel
from common.gate import packed_size as moments_size
from common.importance import bn_scale, choose, combine_ranks, random_scores
from common.layout import (
    Layout,
    consolidation_layout,
    dense_layout,
    scope_layout,
    without_scales,
)
from common.memory import OPINION_LAYERS, Memory, trunk_of
from common.order import NetSpec, Order, Phase, Regrown, Teaching, as_channels
from common.peers import joined, joined_layout, peer
from common.regrow import Diversity, regrow
from common.schedule import Scope
from common.seeds import digest_of, numpy_rng, seed_of
from common.sparsify import Attempt, acceptable, off_state, scale_factor, smaller
from common.state import State, read_state, state_digest, write_state
from common.update import decode_scores, encode_scores
from server.prior import make_net
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
        if self.phase in ("tally", "advise") and memory is not None and memory.rival is not None:
            most = memory.most if self.phase == "advise" else 0
            size = memory.rival.sums.shape[1]
            rival = memory.rival.discriminant(memory.head, most).pack(size)
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
        tally: held-out images that the rival classifier gets right.
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


def start(
    plan: Plan,
    prior: State,
    free: FreeSet,
    memory: Memory | None = None,
    carried: Carried | None = None,
) -> RunState:
    """Return the state of a new run: at step 1, or at step 0 if the prior has yet to be freed."""
    config, carried = plan.config, carried or Carried()
    if free.empty and config.freeing in ("always", "prior"):
        return RunState(
            0,
            "weigh",
            prior,
            prior,
            free,
            config.share,
            config.kd_weight,
            memory=memory,
            carried=carried,
        )
    return _begin_step(plan, 1, prior, free, (), memory, carried)


def _begin_step(
    plan: Plan,
    step: int,
    prior: State,
    free: FreeSet,
    finished: tuple[StepOutcome, ...],
    memory: Memory | None,
    carried: Carried,
) -> RunState:
    config = plan.config
    if config.reserve:  # until the step is known to train filters, all that is left is off
        left = carried.spare if carried.learnt or free.empty else union(free, carried.spare)
        free, carried = FreeSet({}), replace(carried, spare=left, learnt=False)
    if memory is not None:
        return RunState(
            step,
            "look",
            prior,
            prior,
            free,
            config.share,
            config.kd_weight,
            finished=finished,
            memory=memory,
            carried=carried,
        )
    return _begin_growing(plan, step, prior, free, finished, carried)


def _begin_growing(
    plan: Plan,
    step: int,
    prior: State,
    free: FreeSet,
    finished: tuple[StepOutcome, ...],
    carried: Carried,
) -> RunState:
    config = plan.config
    if config.reserve:
        free, spare = portion(carried.spare, config.steps - step + 1)
        carried = replace(carried, spare=spare)
    base, source, peers = prior, None, 1
    if config.regrow and not carried.learnt:
        peers = 1 if free.empty else config.peers
        drawn = [
            regrow(prior, plan.graph, free, seed=seed, diversity=plan.diversity)
            for seed in _regrow_seeds(plan, step)[:peers]
        ]
        base = drawn[0] if peers == 1 else joined(drawn)
        source = state_digest(prior)
    if config.perturb_keep < 1 or config.perturb_noise > 0:
        base, source = _perturbed(plan, base, step), None
    return RunState(
        step,
        "grow",
        prior,
        base,
        free,
        config.share,
        config.kd_weight,
        source=source,
        finished=finished,
        carried=carried,
        peers=peers,
    )


def _regrow_seeds(plan: Plan, step: int) -> list[int]:
    """Return a seed for every peer; the first is that of a net without peers."""
    seed, peers = plan.config.seed, plan.config.peers
    return [seed_of("regrow", seed, step, *([k] if k else [])) for k in range(peers)]


def _perturbed(plan: Plan, state: State, step: int) -> State:
    """Return all weights shrunk and mixed with fresh ones (Ash & Adams, NeurIPS 2020)."""
    config = plan.config
    seed = seed_of("perturb", config.seed, step)
    fresh = read_state(make_net(config.model_copy(update={"seed": seed}), plan.spec))
    return {
        name: config.perturb_keep * tensor + config.perturb_noise * fresh[name]
        if tensor.dim() > 1
        else tensor
        for name, tensor in state.items()
    }


def layout_of(plan: Plan, state: RunState) -> Layout:
    """Return the layout of the packed values in the present phase."""
    if state.way == "expert" and state.phase in ("grow", "tally"):
        return _expert_layout(plan, state.off)
    if state.phase not in ("consolidate", "judge"):
        layout = scope_layout(_packed_scope(plan, state), plan.graph, _named(state), state.prior)
        if not state.carried.spare.empty:
            layout = without_scales(layout, plan.graph, state.carried.spare)
        return layout if state.peers == 1 else joined_layout(layout, state.peers)
    return consolidation_layout(plan.graph, state.next_free, state.base)


def _named(state: RunState) -> FreeSet:
    """Return the filters that an order names: those to be left out, or to be trained."""
    without = state.phase in ("look", "tally", "advise") or state.way == "expert"
    return state.off if without else state.free


def scope_of(plan: Plan, state: RunState) -> Scope:
    """Return what trains at full rate in this round of growing."""
    first, last = 0, plan.config.rounds
    number = {"grow": state.round, "look": first}.get(state.phase, last)
    return plan.config.scope_in(number)


def _packed_scope(plan: Plan, state: RunState) -> Scope:
    return "all" if plan.config.kept_lr else scope_of(plan, state)


def anneal_span(plan: Plan, state: RunState) -> tuple[float, float]:
    """Return the progress of the consolidation at the begin and the end of this round."""
    rounds = plan.config.consolidate_rounds
    return state.round / rounds, min(state.round + 1, rounds) / rounds


def current_model(plan: Plan, state: RunState) -> State:
    """Return the model that the next round begins with."""
    model = state.base
    if state.values is not None:
        model = layout_of(plan, state).unpack(state.base, state.values)
    if state.phase in ("consolidate", "judge"):
        progress = 1.0 if state.phase == "judge" else anneal_span(plan, state)[0]
        factor = scale_factor(progress, plan.config.anneal)
        model = off_state(model, plan.graph, state.next_free, factor)
    return model


def order_of(plan: Plan, state: RunState) -> Order:
    """Return what the devices are asked to do next."""
    config = plan.config
    growing = state.phase == "grow"
    expert = state.way == "expert" and state.phase in ("grow", "tally")
    rounds = config.rounds if growing else config.consolidate_rounds
    peak = config.lr if growing else config.consolidate_lr
    peak = config.expert_lr if expert else peak
    training = state.phase in ("grow", "consolidate")
    consolidating = state.phase in ("consolidate", "judge")
    looking = state.phase == "look" and state.memory is not None
    regrown = None
    if state.phase in ("grow", "weigh") and state.source is not None:
        seeds = _regrow_seeds(plan, state.step)
        regrown = Regrown(
            source=state.source,
            free=as_channels(state.free),
            seed=seeds[state.best],
            diversity=plan.diversity.shares(),
            others=seeds[1 : state.peers],
        )
    # Where nothing is freed after a step, what its filters have learnt belongs to the next prior.
    learnt = growing and state.carried.learnt
    free = state.next_free if consolidating else _named(state)
    begin, end = anneal_span(plan, state)
    keep = None if training else state_digest(current_model(plan, state))
    layout = layout_of(plan, state).digest
    codec_up, codec_down = config.codecs(state.phase)
    coded = training and codec_up != "fp32"
    phase = (config.digest, state.step, state.phase, state.attempt, state.base_digest, layout)
    return Order(
        run=config.seed,
        step=state.step,
        phase=state.phase,
        attempt=state.attempt,
        round=state.round,
        net=plan.spec,
        graph=plan.graph.digest,
        base=state.base_digest,
        regrown=regrown,
        free=as_channels(free),
        kept={} if learnt else as_channels(state.free),
        scope="expert" if expert else _packed_scope(plan, state),
        layout=layout,
        keep=keep,
        epochs=config.epochs if growing else config.consolidate_epochs,
        batch=config.batch,
        lr=peak * 0.5 * (1 + math.cos(math.pi * state.round / rounds)) if training else 0.0,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        prox=config.prox if growing else 0.0,
        crop=crop_of(config, plan.spec),
        flip=mirrors(config, plan.spec),
        teaching=Teaching(
            weight=state.kd_weight,
            temperature=config.kd_temperature,
            floor=config.kd_floor if config.adaptive else 1.0,
            ntd_weight=config.ntd_weight,
            calibration=config.label_calibration,
            # in another world the prior's opinion is worth nothing
            teacher="none" if expert else config.kd_teacher if growing else "prior",
            mask_absent=config.mask_absent,
        ),
        class_counts=list(state.class_counts),
        anneal=(begin, end, config.anneal),
        heldout=config.heldout,
        rotations=config.device_rotations if training else 0.0,
        trunk=state_digest(state.prior) if expert else None,
        expert_share=config.expert_share if expert else 0.0,
        stem=_stem_text(state.memory) if looking and state.memory is not None else "",
        by_class=looking and state.round > 0,
        layers=_layers(plan, state),
        codec_up=codec_up,
        codec_down=codec_down,
        moved=None if state.shared is None else state.shared.moved.digest,
        since=None if state.shared is None else state.shared.since,
        feedback=digest_of(*phase) if coded else None,
        importance=config.ewc_importance,
        spare=as_channels(state.carried.spare if not expert else FreeSet({})),
        full_rate=scope_of(plan, state) if growing and config.kept_lr and not expert else None,
        kept_lr=config.kept_lr if growing and not expert else 0.0,
        peer_weight=config.peer_weight if state.peers > 1 else 0.0,
        **_extras(config, state),
    )


def _extras(config: Config, state: RunState) -> dict[str, Any]:
    """Return what the order says of the arrays beside the base."""
    fields: dict[str, Any] = {}
    if "rival" in state.extras:
        fields |= {"rival": state.extras["rival"][0]}
    if state.phase == "advise" and state.memory is not None:
        fields |= {"opinion": state.memory.opinion_weight}
    if state.way != "whole":
        return fields
    if state.phase == "grow" and "anchor" in state.extras:
        fields |= {"anchor": state.extras["anchor"][0], "anchor_weight": config.ewc_weight}
    replays = config.replay == "synthetic" and state.phase in ("grow", "consolidate")
    if replays and "replay" in state.extras:
        fields |= {"replay": state.extras["replay"][0], "replay_weight": config.replay_weight}
    return fields


def wants_synthetic(config: Config, state: RunState) -> bool:
    """Return whether the server has to make images before the next round."""
    here = state.phase == "grow" and state.way == "whole"
    return config.synthesises and here and state.synthetic is None


def crop_of(config: Config, spec: NetSpec) -> int:
    """Return the padding of the random crop, in pixels."""
    return config.crop if config.crop >= 0 else spec.input_shape[1] // 8


def mirrors(config: Config, spec: NetSpec) -> bool:
    """Return whether a mirrored image is as good as the image: not where it may be grey text."""
    return config.flip and spec.input_shape[0] == 3


def advance(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """Return the state after a round."""
    steps = {
        "look": _after_look,
        "grow": _after_grow,
        "tally": _after_tally,
        "advise": _after_advise,
        "weigh": _after_weigh,
        "consolidate": _after_consolidate,
        "judge": _after_judge,
        "anchor": _after_anchor,
    }
    return steps[state.phase](plan, state, outcome)


def _after_grow(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    config, done = plan.config, state.round + 1
    assert outcome.values is not None
    averaged = min(config.average, config.rounds)
    tail = _running_mean(state.tail, outcome.values, done - (config.rounds - averaged))
    if done == config.rounds:
        outcome, tail = replace(outcome, values=tail), None
    if done == config.rounds and state.way == "expert":
        grown = replace(state, values=outcome.values, tail=None)
        if config.opinion_weight:
            return replace(grown, phase="tally", round=0)
        return _after_expert(plan, grown, outcome, None)
    if done == config.rounds and config.freeing in ("prior", "never"):
        return _after_last_grow(plan, state, outcome)
    more: Phase = "grow" if done < config.rounds else "weigh"
    following = replace(
        state,
        phase=more,
        round=done if more == "grow" else 0,
        values=outcome.values,
        tail=tail,
        class_counts=outcome.class_counts,
        kd_weight=_steer(config, state.kd_weight, outcome),
        lambdas=(*state.lambdas, state.kd_weight),
    )
    if more == "weigh" and state.peers > 1:
        return _best_peer(plan, following, outcome)
    if scope_of(plan, following) == scope_of(plan, state):
        return following
    return _repacked(plan, layout_of(plan, state), following)


def _best_peer(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """Go on with the peer that was best on held-out images when the last round began."""
    assert state.values is not None
    best = int(np.argmax(outcome.peer_right))
    one = replace(state, base=peer(state.base, best), peers=1, best=best)
    size = layout_of(plan, one).size
    return replace(one, values=state.values[best * size : (best + 1) * size])


def _repacked(plan: Plan, was: Layout, state: RunState) -> RunState:
    """Return `state` with values in its own layout, of which `was` is a part."""
    layout = layout_of(plan, state)

    def pack(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else layout.pack(was.unpack(state.base, values))

    return replace(state, values=pack(state.values), tail=pack(state.tail))


def _running_mean(tail: np.ndarray | None, values: np.ndarray, number: int) -> np.ndarray | None:
    """Return the mean of the last rounds' values, of which this is the `number`-th.

    Devices with skewed data pull each round's mean to and fro; the mean of the last few is
    better than the last (stochastic weight averaging, Izmailov et al., UAI 2018).
    """
    if number < 1:
        return None
    if tail is None:
        return values
    mean: np.ndarray = tail + (values - tail) / np.float32(number)
    return mean


def _after_last_grow(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """End a step without freeing: nothing is weighed, and the grown model is taken as it is.

    Its accuracy on held-out images is that of the model with which the last round began.
    """
    grown = replace(
        state,
        values=outcome.values,
        heldout_prior=outcome.prior_right / outcome.heldout,
        heldout_grown=outcome.right / outcome.heldout,
        lambdas=(*state.lambdas, state.kd_weight),
    )
    model = current_model(plan, grown)
    if plan.config.freeing == "prior":
        grown = replace(grown, carried=replace(grown.carried, learnt=True))
    return _end_step(plan, grown, model, state.free, grown.heldout_grown, None)


_STEER_UP, _STEER_DOWN, _STEER_RANGE = 1.25, 0.9, 4.0


def _steer(config: Config, weight: float, outcome: Outcome) -> float:
    """Return the next lambda: up while the devices lose what the prior knew, else down.

    Used where the server has no images of its own to distil on; it steers by the share of the
    held-out images that the prior gets right and the grown model still does.
    """
    if config.distils or not config.adaptive or not outcome.prior_right:
        return weight
    kept = outcome.both_right / outcome.prior_right
    weight *= _STEER_UP if kept < config.retention else _STEER_DOWN
    low, high = config.kd_weight / _STEER_RANGE, config.kd_weight * _STEER_RANGE
    return min(max(weight, low), high)


def _after_weigh(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    config = plan.config
    prior, grown = outcome.prior_right / outcome.heldout, outcome.right / outcome.heldout
    if state.step > 0 and _is_worse(outcome, config.accept_drop):
        return _end_step(
            plan,
            replace(state, heldout_prior=prior, heldout_grown=grown),
            model=state.prior,
            free=state.free,
            consolidated=prior,
            refusal=(
                f"grown model {grown:.4f} is worse than the prior {prior:.4f} on the devices' "
                "held-out images: the prior stands"
            ),
        )
    model = current_model(plan, state)
    write_state(plan.net, model)
    scores = combine_ranks([bn_scale(plan.net, plan.graph), *outcome.scores])
    if config.choice == "random":
        scores = random_scores(plan.graph, numpy_rng("choice", config.seed, state.step))
    weighed = replace(
        state,
        phase="consolidate",
        round=0,
        class_counts=outcome.class_counts,
        base=model,
        values=None,
        source=None,
        heldout_prior=prior,
        heldout_grown=grown,
        kd_weight=config.kd_weight,
        scores=scores,
    )
    return _choose(plan, weighed)


def _is_worse(outcome: Outcome, allowed: float, errors: float = 1.0) -> bool:
    """Return whether the model is worse than the one before it, beyond what chance explains.

    Both are measured on the same images, so only those that one of them gets right count: their
    difference has a standard error of the root of their sum (McNemar, 1947). A difference within
    one standard error is no evidence: refusing on it would throw a step's work away by the toss
    of a coin.
    """
    lost = outcome.prior_right - outcome.both_right
    won = outcome.right - outcome.both_right
    accepted = acceptable(allowed, outcome.heldout) + errors * math.sqrt(lost + won)
    return lost - won > accepted


def _choose(plan: Plan, state: RunState) -> RunState:
    """Pick the set to free: smaller than one that was refused; if none is left, end the step."""
    config, scores, among = plan.config, state.scores, None
    assert scores is not None
    if config.free_from == "last" and not state.free.empty:
        among = state.free
        scores = {
            name: score + 2.0 * ~np.isin(np.arange(len(score)), among.channels.get(name, ()))
            for name, score in scores.items()
        }  # ranks are at most 1: those of other filters come last

    def pick(share: float) -> FreeSet:
        chosen = choose(plan.graph, scores, share, cap=config.cap)
        return chosen if among is None else common_part(chosen, among)

    share, free = state.share, FreeSet({})
    if state.attempt == 0:
        free = pick(share)
    else:
        share, free = smaller(pick, share, config.shrink, state.next_free)
    state = replace(state, share=share)
    if free.empty or state.attempt >= plan.config.attempts:
        return _end_step(plan, state, state.base, FreeSet({}), state.heldout_grown, None)
    return replace(state, next_free=free)


def _after_consolidate(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    done = state.round + 1
    more: Phase = "consolidate" if done < plan.config.consolidate_rounds else "judge"
    return replace(
        state, phase=more, round=done if more == "consolidate" else 0, values=outcome.values
    )


def _after_judge(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    # Both accuracies come from the same devices and images, so that a change of devices
    # between rounds cannot pass for a loss.
    drop = (outcome.prior_right - outcome.right) / outcome.heldout
    accepted = not _is_worse(outcome, plan.config.max_drop, plan.config.drop_errors)
    tried = Attempt(state.next_free.share(plan.graph), drop, accepted)
    judged = replace(state, attempts=(*state.attempts, tried))
    if accepted:
        model = current_model(plan, state)
        return _end_step(
            plan, judged, model, state.next_free, outcome.right / outcome.heldout, None
        )
    again = replace(
        judged,
        phase="consolidate",
        attempt=state.attempt + 1,
        round=0,
        values=None,
    )
    return _choose(plan, again)


def _end_step(
    plan: Plan,
    state: RunState,
    model: State,
    free: FreeSet,
    consolidated: float,
    refusal: str | None,
) -> RunState:
    outcome = StepOutcome(
        step=state.step,
        prior=state.heldout_prior,
        grown=state.heldout_grown,
        consolidated=consolidated,
        refusal=refusal,
        free=free,
        requested_share=plan.config.share,
        attempts=state.attempts,
        lambdas=state.lambdas,
        way=state.way,
    )
    if state.way == "whole" and refusal is None and state.memory is not None:
        # it was of another model
        state = replace(state, memory=replace(state.memory, opinion=None))
    gathering = replace(
        state,
        phase="tally",
        attempt=0,
        round=0,
        prior=model,
        base=model,
        free=free,
        next_free=FreeSet({}),
        values=None,
        shared=None,
        tail=None,
        source=None,
        pending=outcome,
    )
    if _opinionated(plan, state) and statistics_size(plan, gathering) <= parameter_count(plan.net):
        return gathering
    return _close_step(plan, state, model, free, outcome)


def _opinionated(plan: Plan, state: RunState) -> bool:
    """Return whether a step that trains the whole net may end with a second opinion for it.

    Not where little is to travel: its statistics are several times a round of scope `rows`, and of
    a net with many channels they are more than the net itself.
    """
    wanted = plan.config.opinion_weight > 0 and "rows" not in plan.config.scopes
    return wanted and state.step > 0 and state.memory is not None and state.way == "whole"


def _close_step(
    plan: Plan, state: RunState, model: State, free: FreeSet, outcome: StepOutcome
) -> RunState:
    """Return the begin of the next step, or the end."""
    refusal, finished = outcome.refusal, (*state.finished, outcome)
    memory = _after_training(state, refused=refusal is not None)
    seen = {c for c, count in enumerate(state.class_counts) if count and refusal is None}
    carried = replace(state.carried, known=tuple(sorted({*state.carried.known, *seen})))
    last = state.step >= plan.config.steps
    nothing = free.empty and carried.spare.empty
    if last or (nothing and "rows" in plan.config.scopes):
        stopped = None if last else _nothing_to_grow(plan)
        return replace(
            state,
            prior=model,
            free=free,
            values=None,
            finished=finished,
            done=True,
            pending=None,
            stopped=stopped,
            memory=memory,
            carried=carried,
        )
    if carried.anchor is not None and state.way == "whole" and refusal is None:
        return RunState(
            state.step,
            "anchor",
            model,
            model,
            free,
            plan.config.share,
            plan.config.kd_weight,
            finished=finished,
            memory=memory,
            carried=carried,
        )
    return _begin_step(plan, state.step + 1, model, free, finished, memory, carried)


def _after_anchor(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """Add what the weights matter to this step's data, and begin the next step."""
    assert outcome.sums is not None
    assert state.carried.anchor is not None
    total = (state.carried.anchor + outcome.sums).astype(np.float32)
    carried = replace(state.carried, anchor=anchor_of(plan, state.prior, state.free, total))
    return _begin_step(
        plan,
        state.step + 1,
        state.prior,
        state.free,
        state.finished,
        state.memory,
        carried,
    )


def anchor_of(plan: Plan, state: State, free: FreeSet, packed: np.ndarray) -> np.ndarray:
    """Return importances as the devices will decode them, zero at free filters."""
    packed = without(packed, plan.graph, free, state)
    if plan.config.codec_down == "fp32":
        return packed
    return decode_scores(encode_scores(packed), len(packed))


def _nothing_to_grow(plan: Plan) -> str:
    return (
        f"no filter could be freed within max-drop {plan.config.max_drop}, and scope 'rows' "
        "trains nothing else: raise max-drop, lower share or use scope 'group'"
    )


def score_slices(graph: FilterGraph) -> Mapping[str, slice]:
    """Return where each layer's scores stand in one packed array of scores."""
    edges = np.cumsum([0, *(layer.width for layer in graph.layers)])
    return {
        layer.name: slice(int(a), int(b))
        for layer, a, b in zip(graph.layers, edges[:-1], edges[1:], strict=True)
    }


def _after_look(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """Decide by statistics how to learn from the step's images."""
    memory = state.memory
    assert memory is not None
    assert outcome.sums is not None
    present = [c for c, count in enumerate(outcome.class_counts) if count]
    if state.round > 0:
        new = ClassSums.unpack(outcome.sums, plan.spec.classes, _feature_size(plan, state))
        assert memory.classes is not None
        sums = memory.classes + new
        if state.way == "expert":
            return _begin_expert(plan, state, replace(memory, rival=sums), outcome)
        return _learn_classes(plan, state, memory, sums, outcome.class_counts, math.nan)
    seen = Moments.unpack(outcome.sums, len(memory.worlds[0].total))
    new_classes = set(present) - set(memory.known)
    alone = plan.config.shift == "statistics" or memory.by_statistics
    by_statistics = replace(state, round=1, seen=seen, way="classes", heldout_prior=_prior(outcome))
    if (alone or new_classes) and memory.classes is not None:
        return by_statistics
    if memory.stand_in and memory.plain:
        memory = replace(memory, worlds=(likened(memory.worlds[0], seen), *memory.worlds[1:]))
    nearest, gap = _nearest(plan, memory, seen, state.step)
    world = nearest if gap < plan.config.world_gap else len(memory.worlds)
    if world == 0 and memory.plain:
        growing = _begin_growing(
            plan, state.step, state.prior, state.free, state.finished, state.carried
        )
        return replace(growing, memory=memory, seen=seen)
    # A gate would too often ask the wrong expert. Beside experts, world 0 answers by class
    # statistics from then on, which takes the opinion's.
    told = memory.plain or (nearest == 0 and plan.config.opinion_weight > 0)
    if told and memory.classes is not None and gap < plan.config.expert_gap:
        return by_statistics
    another = replace(state, seen=seen, way="expert", memory=memory, world=world)
    if memory.plain and memory.classes is not None and plan.config.opinion_weight:
        return replace(another, round=1)  # what class statistics alone would be worth
    return _begin_expert(plan, another, memory, outcome)


def _begin_expert(plan: Plan, state: RunState, memory: Memory, outcome: Outcome) -> RunState:
    base = read_state(_trunk(plan, state))
    if 0 < state.world <= len(memory.experts):
        base |= memory.experts[state.world - 1]
    return replace(
        state,
        phase="grow",
        round=0,
        base=base,
        memory=memory,
        class_counts=outcome.class_counts,
    )


def _learn_classes(
    plan: Plan,
    state: RunState,
    memory: Memory,
    sums: ClassSums,
    class_counts: tuple[int, ...],
    accuracy: float,
) -> RunState:
    """End a step with a classifier made of class statistics."""
    present = {c for c, count in enumerate(class_counts) if count}
    known = tuple(sorted({*memory.known, *present}))
    assert state.seen is not None
    worlds = (memory.worlds[0] + state.seen, *memory.worlds[1:])
    memory = replace(memory, classes=sums, closed=True, known=known, rival=None, worlds=worlds)
    learnt = replace(state, memory=memory, way="classes", heldout_grown=accuracy)
    return _end_step(plan, learnt, state.prior, state.free, accuracy, None)


def _nearest(plan: Plan, memory: Memory, seen: Moments, step: int) -> tuple[int, float]:
    """Return the world that images are most like, and how often a gate between would be right."""
    rng = numpy_rng("separation", plan.config.seed, step)
    gaps = [separation(world, seen, rng) for world in memory.worlds]
    if memory.stand_in:
        gaps[0] = separation_by_channel(memory.worlds[0], seen)
    nearest = int(np.argmin(gaps))
    return nearest, gaps[nearest]


def _prior(outcome: Outcome) -> float:
    return outcome.prior_right / outcome.heldout


def _after_tally(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    assert outcome.sums is not None
    classes = plan.spec.classes
    sums = ClassSums.unpack(outcome.sums, classes, _feature_size(plan, state))
    if state.pending is not None:
        return _with_rival(state, sums)
    memory, rival = state.memory, None if state.memory is None else state.memory.rival
    if memory is not None and rival is not None:
        if outcome.rival_right > outcome.right:
            tried = replace(state, heldout_prior=_prior(outcome), world=0, values=None)
            accuracy = outcome.rival_right / outcome.heldout
            return _learn_classes(plan, tried, memory, rival, outcome.class_counts, accuracy)
        state = replace(state, memory=replace(memory, rival=None))
    return _after_expert(plan, state, outcome, sums)


def _with_rival(state: RunState, sums: ClassSums) -> RunState:
    """Have an opinion measured: of the step's images, and earlier ones if the model is theirs."""
    assert state.memory is not None
    before = state.memory.opinion
    rival = sums if before is None else before + sums
    return replace(state, phase="advise", memory=replace(state.memory, rival=rival))


def _after_advise(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """End a step; its model gets the opinion, unless that makes it worse (see `_is_worse`)."""
    assert state.memory is not None
    assert state.pending is not None
    worse = _is_worse(outcome, plan.config.accept_drop)
    opinion = state.memory.opinion if worse else state.memory.rival
    advised = replace(state, memory=replace(state.memory, rival=None, opinion=opinion))
    return _close_step(plan, advised, state.prior, state.free, state.pending)


def _after_expert(
    plan: Plan, state: RunState, outcome: Outcome, beside: ClassSums | None
) -> RunState:
    """End a step with an expert, if it is better than what there was in its world.

    Without a tally the accuracy on held-out images is that of the model with which the last round
    began.
    """
    memory, number = state.memory, state.world
    assert memory is not None
    assert state.seen is not None
    grown = replace(
        state,
        heldout_prior=_prior(outcome),
        heldout_grown=outcome.right / outcome.heldout,
    )
    if _is_worse(outcome, plan.config.accept_drop):
        refusal = "the expert is worse than the model before it on the devices' held-out images"
        return _end_step(plan, grown, state.prior, state.free, grown.heldout_prior, refusal)
    expert = changed_by(layout_of(plan, state), current_model(plan, grown))
    experts, worlds, opinions = list(memory.experts), list(memory.worlds), list(memory.beside)
    if 0 < number < len(worlds):
        experts[number - 1], opinions[number - 1] = expert, beside
        worlds[number] = worlds[number] + state.seen
    else:
        experts.append(expert)
        opinions.append(beside)
        worlds.append(state.seen)
    memory = replace(memory, experts=tuple(experts), worlds=tuple(worlds), beside=tuple(opinions))
    grown = replace(grown, memory=memory)
    return _end_step(plan, grown, state.prior, state.free, grown.heldout_grown, None)


def _after_training(state: RunState, *, refused: bool) -> Memory | None:
    """Return the memory at the end of a step; training the whole net outdates class statistics."""
    memory = state.memory
    if memory is None or state.way != "whole" or refused or state.seen is None:
        return memory
    first = memory.worlds[0] + state.seen
    known = {*memory.known, *(c for c, n in enumerate(state.class_counts) if n)}
    return replace(
        memory, worlds=(first, *memory.worlds[1:]), known=tuple(sorted(known)), classes=None
    )


def _trunk(plan: Plan, state: RunState) -> nn.Module:
    return trunk_of(plan.net, plan.graph, state.prior, state.off)


def _expert_layout(plan: Plan, free: FreeSet) -> Layout:
    trunk = cut(plan.net, plan.graph, free)
    return expert_layout(trunk, plan.graph.head, plan.config.expert_share)


def _stem_text(memory: Memory) -> str:
    return base64.b64encode(memory.stem.numpy().astype("<f4").tobytes()).decode()


def statistics_size(plan: Plan, state: RunState) -> int:
    """Return how many values a device's statistics have in this look, tally or anchor."""
    if state.phase == "anchor":
        return dense_layout(plan.graph, state.base).size
    assert state.memory is not None
    if state.phase == "look" and state.round == 0:
        return moments_size(len(state.memory.worlds[0].total))
    return sums_size(plan.spec.classes, _feature_size(plan, state))


def statistics_features(plan: Plan, state: RunState) -> int:
    """Return of how many features these are."""
    assert state.memory is not None
    if state.phase == "look" and state.round == 0:
        return len(state.memory.worlds[0].total)
    return _feature_size(plan, state)


def _feature_size(plan: Plan, state: RunState) -> int:
    trunk, shape = _trunk(plan, state), plan.spec.input_shape
    return feature_size(trunk, plan.graph.head, shape, _layers(plan, state))


def _layers(plan: Plan, state: RunState) -> Layers:
    return plan.config.statistics_features if state.pending is None else OPINION_LAYERS


def rounds_left(plan: Plan, state: RunState) -> int:
    """Return how many rounds are still to play if nothing is refused from here on.

    No more than a guess where shifts are looked for: a step that begins with a look is counted as
    one without a shift.
    """
    config = plan.config
    if state.done:
        return 0
    looks = 0 if state.memory is None else 1
    if state.way == "expert":
        growing = config.rounds - (state.round if state.phase == "grow" else 0)
        growing = 1 if state.phase == "tally" else growing + (config.opinion_weight > 0)
        growing += state.phase == "look"
        return growing + (config.steps - state.step) * (looks + config.rounds)
    of_step = {"look": looks, "grow": config.rounds}
    if config.freeing not in ("prior", "never") or state.step == 0:
        of_step |= {"weigh": 1, "consolidate": config.consolidate_rounds, "judge": 1}
    if _opinionated(plan, state):
        of_step |= {"tally": 1, "advise": 1}
    if config.ewc_weight:
        of_step["anchor"] = 1
    phases = list(of_step)
    here = phases.index(state.phase)
    rest = sum(of_step[phase] for phase in phases[here:]) - state.round
    without_last = 1 if "anchor" in of_step else 0
    return rest + (config.steps - state.step) * sum(of_step.values()) - without_last

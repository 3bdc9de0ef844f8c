"""Steps and phases as a pure state machine: (plan, state, outcome) -> state.

A step begins with ``look``: statistics of the new images tell how to learn from them. Other
classes are learnt by statistics alone. Images of another world are learnt by an expert: ``grow``,
then ``tally``, class statistics of what it sees, for a second opinion beside its own classifier.
Where nothing has shifted, the step goes ``grow`` (AOD) -> ``weigh`` (is the grown model better,
which filters matter) -> ``consolidate`` (SST + MSL) -> ``judge`` (is what freeing cost accepted),
back to ``consolidate`` with a smaller share where it is not, and on to the next step. Step 0
exists only for a prior whose filters nobody has freed yet; it has no ``grow``.

No function here does I/O or draws a random number, so a checkpoint is the state.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from torch import nn

from common.config import Config
from common.experts import changed_by, expert_layout
from common.features import ClassSums, Discriminant, feature_size
from common.features import packed_size as sums_size
from common.filters import FilterGraph, FreeSet, cut
from common.gate import Moments, likened, separation, separation_by_channel
from common.gate import packed_size as moments_size
from common.importance import bn_scale, choose, combine_ranks, random_scores
from common.layout import Layout, consolidation_layout, scope_layout
from common.memory import Memory, trunk_of
from common.order import NetSpec, Order, Phase, Regrown, Teaching, as_channels
from common.regrow import Diversity, regrow
from common.seeds import digest_of, numpy_rng, seed_of
from common.sparsify import Attempt, off_state, scale_factor, smaller
from common.state import State, read_state, state_digest, write_state
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

    @cached_property
    def base_digest(self) -> str:
        """Digest of `base`."""
        return state_digest(self.base)


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
    sums : float64 array or None
        look: sum of the devices' packed statistics.
    """

    values: np.ndarray | None
    heldout: int
    right: int
    prior_right: int
    both_right: int
    scores: tuple[Scores, ...] = ()
    class_counts: tuple[int, ...] = ()
    sums: np.ndarray | None = None


def start(plan: Plan, prior: State, free: FreeSet, memory: Memory | None = None) -> RunState:
    """Return the state of a new run: at step 1, or at step 0 if the prior has yet to be freed."""
    config = plan.config
    if free.empty and config.freeing in ("always", "prior"):
        return RunState(
            0, "weigh", prior, prior, free, config.share, config.kd_weight, memory=memory
        )
    return _begin_step(plan, 1, prior, free, (), memory)


def _begin_step(
    plan: Plan,
    step: int,
    prior: State,
    free: FreeSet,
    finished: tuple[StepOutcome, ...],
    memory: Memory | None,
) -> RunState:
    config = plan.config
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
        )
    return _begin_growing(plan, step, prior, free, finished)


def _begin_growing(
    plan: Plan, step: int, prior: State, free: FreeSet, finished: tuple[StepOutcome, ...]
) -> RunState:
    config = plan.config
    base, source = prior, None
    if config.regrow and (config.freeing != "prior" or step == 1):
        seed = _regrow_seed(plan, step)
        base = regrow(prior, plan.graph, free, seed=seed, diversity=plan.diversity)
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
    )


def _regrow_seed(plan: Plan, step: int) -> int:
    return seed_of("regrow", plan.config.seed, step)


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
        return _expert_layout(plan, state.free)
    if state.phase in ("look", "grow", "weigh"):
        return scope_layout(plan.config.scope, plan.graph, state.free, state.base)
    return consolidation_layout(plan.graph, state.next_free, state.base)


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
        regrown = Regrown(
            source=state.source,
            free=as_channels(state.free),
            seed=_regrow_seed(plan, state.step),
            diversity=plan.diversity.shares(),
        )
    # Where nothing is freed after a step, what its filters have learnt belongs to the next prior.
    learnt = growing and config.freeing == "prior" and state.step > 1
    begin, end = anneal_span(plan, state)
    keep = None if training else state_digest(current_model(plan, state))
    layout = layout_of(plan, state).digest
    coded = training and config.codec_up != "fp32"
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
        free=as_channels(state.next_free if consolidating else state.free),
        kept={} if learnt else as_channels(state.free),
        scope="expert" if expert else config.scope,
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
        layers=config.statistics_features,
        codec_up=config.codec_up,
        codec_down=config.codec_down,
        moved=None if state.shared is None else state.shared.moved.digest,
        since=None if state.shared is None else state.shared.since,
        feedback=digest_of(*phase) if coded else None,
    )


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
        "weigh": _after_weigh,
        "consolidate": _after_consolidate,
        "judge": _after_judge,
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
        if config.statistics_weight:
            return replace(grown, phase="tally", round=0)
        return _after_expert(plan, grown, outcome, None)
    if done == config.rounds and config.freeing in ("prior", "never"):
        return _after_last_grow(plan, state, outcome)
    more: Phase = "grow" if done < config.rounds else "weigh"
    return replace(
        state,
        phase=more,
        round=done if more == "grow" else 0,
        values=outcome.values,
        tail=tail,
        class_counts=outcome.class_counts,
        kd_weight=_steer(config, state.kd_weight, outcome),
        lambdas=(*state.lambdas, state.kd_weight),
    )


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
    return _end_step(plan, grown, model, state.free, grown.heldout_grown, None)


_STEER_UP, _STEER_DOWN, _STEER_RANGE = 1.25, 0.9, 4.0


def _steer(config: Config, weight: float, outcome: Outcome) -> float:
    """Return the next lambda: up while the devices lose what the prior knew, else down.

    Used where the server has no images of its own to distil on; it steers by the share of the
    held-out images that the prior gets right and the grown model still does.
    """
    if config.proxy or not config.adaptive or not outcome.prior_right:
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


def _is_worse(outcome: Outcome, allowed: float) -> bool:
    """Return whether the grown model is worse than the prior, beyond what chance explains.

    Both are measured on the same images, so only those that one of them gets right count: their
    difference has a standard error of the root of their sum (McNemar, 1947). A difference within
    one standard error is no evidence: refusing on it would throw a step's work away by the toss
    of a coin.
    """
    lost = outcome.prior_right - outcome.both_right
    won = outcome.right - outcome.both_right
    return lost - won > allowed * outcome.heldout + math.sqrt(lost + won)


def _choose(plan: Plan, state: RunState) -> RunState:
    """Pick the set to free: smaller than one that was refused; if none is left, end the step."""
    config, scores = plan.config, state.scores
    assert scores is not None

    def pick(share: float) -> FreeSet:
        return choose(plan.graph, scores, share, cap=config.cap)

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
    accepted = drop <= plan.config.max_drop
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
    finished = (*state.finished, outcome)
    memory = _after_training(state, refused=refusal is not None)
    last = state.step >= plan.config.steps
    if last or (free.empty and plan.config.scope == "rows"):
        stopped = None if last else _nothing_to_grow(plan)
        return replace(
            state,
            prior=model,
            free=free,
            values=None,
            finished=finished,
            done=True,
            stopped=stopped,
            memory=memory,
        )
    return _begin_step(plan, state.step + 1, model, free, finished, memory)


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
        memory = replace(
            memory,
            classes=memory.classes + new,
            closed=True,
            known=tuple(sorted({*memory.known, *present})),
        )
        learnt = replace(state, memory=memory, way="classes")
        return _end_step(plan, learnt, state.prior, state.free, math.nan, None)
    seen = Moments.unpack(outcome.sums, len(memory.worlds[0].total))
    new_classes = set(present) - set(memory.known)
    by_class = plan.config.shift == "statistics" or memory.closed or new_classes
    if by_class and memory.classes is not None:
        return replace(state, round=1, seen=seen, way="classes", heldout_prior=_prior(outcome))
    if memory.stand_in and memory.plain:
        memory = replace(memory, worlds=(likened(memory.worlds[0], seen), *memory.worlds[1:]))
    world = _world(plan, memory, seen, state.step)
    if world == 0 and memory.plain:
        growing = _begin_growing(plan, state.step, state.prior, state.free, state.finished)
        return replace(growing, memory=memory, seen=seen)
    base = read_state(_trunk(plan, state))
    if 0 < world <= len(memory.experts):
        base |= memory.experts[world - 1]
    return replace(
        state,
        phase="grow",
        round=0,
        base=base,
        way="expert",
        memory=memory,
        seen=seen,
        class_counts=outcome.class_counts,
        world=world,
    )


def _world(plan: Plan, memory: Memory, seen: Moments, step: int) -> int:
    """Return the world that images belong to; one more than there are if it is another one."""
    rng = numpy_rng("separation", plan.config.seed, step)
    gaps = [separation(world, seen, rng) for world in memory.worlds]
    if memory.stand_in:
        gaps[0] = separation_by_channel(memory.worlds[0], seen)
    nearest = int(np.argmin(gaps))
    return nearest if gaps[nearest] < plan.config.world_gap else len(memory.worlds)


def _prior(outcome: Outcome) -> float:
    return outcome.prior_right / outcome.heldout


def _after_tally(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    assert outcome.sums is not None
    classes = plan.spec.classes
    sums = ClassSums.unpack(outcome.sums, classes, _feature_size(plan, state))
    config = plan.config
    beside = sums.discriminant(config.statistics_head, config.statistics_most)
    return _after_expert(plan, state, outcome, beside)


def _after_expert(
    plan: Plan, state: RunState, outcome: Outcome, beside: Discriminant | None
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
    return trunk_of(plan.net, plan.graph, state.prior, state.free)


def _expert_layout(plan: Plan, free: FreeSet) -> Layout:
    trunk = cut(plan.net, plan.graph, free)
    return expert_layout(trunk, plan.graph.head, plan.config.expert_share)


def _stem_text(memory: Memory) -> str:
    return base64.b64encode(memory.stem.numpy().astype("<f4").tobytes()).decode()


def statistics_size(plan: Plan, state: RunState) -> int:
    """Return how many values a device's statistics have in this look."""
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
    return feature_size(trunk, plan.graph.head, shape, plan.config.statistics_features)


def rounds_left(plan: Plan, state: RunState) -> int:
    """Return how many rounds are still to play if nothing is refused from here on."""
    config = plan.config
    if state.done:
        return 0
    if state.way == "expert" or state.phase == "look":
        # no more than a guess: what the next steps need is known once they have looked
        growing = config.rounds - (state.round if state.phase == "grow" else 0)
        growing = 1 if state.phase == "tally" else growing
        return growing + (config.steps - state.step) * config.rounds
    of_step = {
        "grow": config.rounds,
        "weigh": 1,
        "consolidate": config.consolidate_rounds,
        "judge": 1,
    }
    if config.freeing in ("prior", "never") and state.step > 0:
        of_step = {"grow": config.rounds}
    phases = list(of_step)
    here = phases.index(state.phase)
    rest = sum(of_step[phase] for phase in phases[here:]) - state.round
    return rest + (config.steps - state.step) * sum(of_step.values())

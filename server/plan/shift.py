"""A step whose images have shifted: look, an expert or class statistics, a second opinion."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from common.experts import changed_by
from common.features import ClassSums
from common.gate import Moments, likened, separation, separation_by_channel
from common.memory import Memory
from common.seeds import numpy_rng
from common.sparsify import Attempt
from common.state import read_state
from server.plan.begin import begin_growing
from server.plan.end import close_step, end_step
from server.plan.layouts import class_features, current_model, layout_of, trunk_net
from server.plan.state import Outcome, Plan, RunState
from server.plan.verdict import is_worse


def after_look(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """Decide by statistics how to learn from the step's images."""
    memory = state.memory
    assert memory is not None
    assert outcome.sums is not None
    present = [c for c, count in enumerate(outcome.class_counts) if count]
    if state.round > 0:
        new = ClassSums.unpack(outcome.sums, plan.spec.classes, class_features(plan, state))
        assert memory.classes is not None
        sums = memory.classes + new
        if state.way == "expert":
            return _begin_expert(plan, state, replace(memory, rival=sums), outcome)
        return _learn_classes(plan, state, memory, sums, outcome.class_counts, math.nan)
    seen = Moments.unpack(outcome.sums, len(memory.worlds[0].total))
    weighed, memory = memory.rival is not None, replace(memory, rival=None)
    state = replace(state, memory=memory)
    new_classes = set(present) - set(memory.known)
    alone = plan.config.shift == "statistics" or memory.by_statistics
    by_statistics = replace(state, round=1, seen=seen, way="classes", heldout_prior=_prior(outcome))
    if memory.stand_in and memory.plain:
        memory = replace(memory, worlds=(likened(memory.worlds[0], seen), *memory.worlds[1:]))
    nearest, gap = _nearest(plan, memory, seen, state.step)
    world = nearest if gap < plan.config.world_gap else len(memory.worlds)
    if (alone or new_classes) and memory.classes is not None:
        heard = memory.heard and world == 0
        return replace(by_statistics, memory=replace(memory, heard=heard))
    if world == 0 and memory.plain:
        if weighed and _statistics_suffice(plan, outcome):
            # far ahead, the net's own classifier would only be in their way
            heard = not _ahead(outcome, outcome.prior_right, plan.config.statistics_gap)
            return replace(by_statistics, memory=replace(memory, heard=heard))
        growing = begin_growing(
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
    base = read_state(trunk_net(plan, state))
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
    memory = replace(
        memory,
        classes=sums,
        closed=True,
        heard=memory.heard and known == memory.known,
        known=known,
        rival=None,
        worlds=worlds,
    )
    learnt = replace(state, memory=memory, way="classes", heldout_grown=accuracy)
    return end_step(plan, learnt, state.prior, state.free, accuracy, None)


def _nearest(plan: Plan, memory: Memory, seen: Moments, step: int) -> tuple[int, float]:
    """Return the world that images are most like, and how often a gate between would be right."""
    rng = numpy_rng("separation", plan.config.seed, step)
    gaps = [separation(world, seen, rng) for world in memory.worlds]
    if memory.stand_in:
        gaps[0] = separation_by_channel(memory.worlds[0], seen)
    nearest = int(np.argmin(gaps))
    return nearest, gaps[nearest]


def _statistics_suffice(plan: Plan, outcome: Outcome) -> bool:
    """Return whether the prior's class statistics will learn more from a step than training.

    A classifier made of them has seen as little of the step's images as the prior. Where it is
    far ahead, data is simple, and the statistics of the kept filters say far more than a few
    rounds would teach. Where images are few it need only not be far behind: statistics of all
    images so far add up exactly, while training has the step's alone, and overfits them.
    """
    present = sum(count > 0 for count in outcome.class_counts)
    few = sum(outcome.class_counts) < plan.config.statistics_images * present
    gap = plan.config.statistics_gap
    return _ahead(outcome, outcome.prior_right, -gap if few else gap)


def _ahead(outcome: Outcome, right: int, share: float) -> bool:
    """Return whether the rival gets more than `share` of the images more right than `right`."""
    return outcome.rival_right - right > share * outcome.heldout


def _prior(outcome: Outcome) -> float:
    return outcome.prior_right / outcome.heldout


def after_tally(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """Compare a closed-form classifier with the expert, or have an opinion measured."""
    assert outcome.sums is not None
    classes = plan.spec.classes
    sums = ClassSums.unpack(outcome.sums, classes, class_features(plan, state))
    if state.pending is not None:
        return _with_rival(state, sums)
    memory, rival = state.memory, None if state.memory is None else state.memory.rival
    if memory is not None and rival is not None:
        # the expert will be advised by statistics, which was not measured
        if _ahead(outcome, outcome.right, plan.config.statistics_gap):
            tried = replace(state, heldout_prior=_prior(outcome), world=0, values=None)
            accuracy = outcome.rival_right / outcome.heldout
            return _learn_classes(plan, tried, memory, rival, outcome.class_counts, accuracy)
        state = replace(state, memory=replace(memory, rival=None))
    return after_expert(plan, state, outcome, sums)


def _with_rival(state: RunState, sums: ClassSums) -> RunState:
    """Have an opinion measured: of the step's images, and earlier ones if the model is theirs."""
    assert state.memory is not None
    before = state.memory.opinion
    rival = sums if before is None else before + sums
    return replace(state, phase="advise", memory=replace(state.memory, rival=rival))


def after_advise(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """End a step; its model gets the opinion, unless that makes it worse (see `is_worse`).

    A model that had lost too much by freeing is judged again with its opinion, as it would be
    published: if it still has, the step tries fewer filters.
    """
    assert state.memory is not None
    assert state.pending is not None
    pending = state.pending
    if state.retry is None:
        worse = is_worse(outcome, plan.config.accept_drop)
    else:
        *before, tried = pending.attempts
        drop = tried.drop - (outcome.right - outcome.prior_right) / outcome.heldout
        if drop > state.allowed:
            return state.retry
        attempts = (*before, Attempt(tried.share, drop, accepted=True))
        pending, worse = replace(pending, attempts=attempts), False
    opinion = state.memory.opinion if worse else state.memory.rival
    advised = replace(state, memory=replace(state.memory, rival=None, opinion=opinion))
    return close_step(plan, advised, state.prior, state.free, pending)


def after_expert(
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
    if is_worse(outcome, plan.config.accept_drop):
        refusal = "the expert is worse than the model before it on the devices' held-out images"
        return end_step(plan, grown, state.prior, state.free, grown.heldout_prior, refusal)
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
    return end_step(plan, grown, state.prior, state.free, grown.heldout_grown, None)

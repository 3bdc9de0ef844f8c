"""The begin of a run, of a step, and of growing."""

from __future__ import annotations

from dataclasses import replace

from common.filters import FreeSet, portion, union
from common.memory import Memory
from common.order import Phase
from common.peers import joined
from common.regrow import regrow
from common.seeds import seed_of
from common.state import State, read_state, state_digest
from server.plan.state import Carried, Plan, RunState, StepOutcome
from server.prior import make_net


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
        return measuring(plan, 0, "weigh", prior, free, (), memory, carried)
    return begin_step(plan, 1, prior, free, (), memory, carried)


def begin_step(
    plan: Plan,
    step: int,
    prior: State,
    free: FreeSet,
    finished: tuple[StepOutcome, ...],
    memory: Memory | None,
    carried: Carried,
) -> RunState:
    """Return the begin of a step: a look at its images where shifts are looked for."""
    config = plan.config
    if config.reserve:  # until the step is known to train filters, all that is left is off
        left = carried.spare if carried.learnt or free.empty else union(free, carried.spare)
        free, carried = FreeSet({}), replace(carried, spare=left, learnt=False)
    if memory is not None:
        if _weighs_statistics(plan, memory):
            memory = replace(memory, rival=memory.classes)
        return measuring(plan, step, "look", prior, free, finished, memory, carried)
    return begin_growing(plan, step, prior, free, finished, carried)


def _weighs_statistics(plan: Plan, memory: Memory) -> bool:
    """Return whether the look at a step's images compares the prior with its class statistics.

    Not where experts or statistics answer already, nor where little is to travel.
    """
    config = plan.config
    choice = config.shift == "auto" and config.statistics_gap < 1 and config.opinion_weight > 0
    return choice and memory.plain and "rows" not in config.scopes


def measuring(
    plan: Plan,
    step: int,
    phase: Phase,
    model: State,
    free: FreeSet,
    finished: tuple[StepOutcome, ...],
    memory: Memory | None,
    carried: Carried,
) -> RunState:
    """Return the begin of a phase that measures a model as it is."""
    return RunState(
        step,
        phase,
        model,
        model,
        free,
        plan.config.share,
        plan.config.kd_weight,
        finished=finished,
        memory=memory,
        carried=carried,
    )


def begin_growing(
    plan: Plan,
    step: int,
    prior: State,
    free: FreeSet,
    finished: tuple[StepOutcome, ...],
    carried: Carried,
) -> RunState:
    """Return the first round of growing the whole net."""
    config = plan.config
    if config.reserve:
        free, spare = portion(carried.spare, config.steps - step + 1)
        carried = replace(carried, spare=spare)
    base, source, peers = prior, None, 1
    if config.regrow and not carried.learnt:
        peers = 1 if free.empty else config.peers
        drawn = [
            regrow(prior, plan.graph, free, seed=seed, diversity=plan.diversity)
            for seed in regrow_seeds(plan, step)[:peers]
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


def regrow_seeds(plan: Plan, step: int) -> list[int]:
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

"""What the devices are asked to do."""

from __future__ import annotations

import base64
import math
from typing import Any

from common.config import Config
from common.filters import FreeSet
from common.memory import Memory
from common.order import NetSpec, Order, Regrown, Teaching, as_channels
from common.seeds import digest_of
from common.state import state_digest
from server.plan.begin import regrow_seeds
from server.plan.layouts import (
    anneal_span,
    current_model,
    layers_of,
    layout_of,
    named_filters,
    packed_scope,
    scope_of,
)
from server.plan.state import Plan, RunState


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
        seeds = regrow_seeds(plan, state.step)
        regrown = Regrown(
            source=state.source,
            free=as_channels(state.free),
            seed=seeds[state.best],
            diversity=plan.diversity.shares(),
            others=seeds[1 : state.peers],
        )
    # Where nothing is freed after a step, what its filters have learnt belongs to the next prior.
    learnt = growing and state.carried.learnt
    free = state.next_free if consolidating else named_filters(state)
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
        scope="expert" if expert else packed_scope(plan, state),
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
        layers=layers_of(plan, state),
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


def _stem_text(memory: Memory) -> str:
    return base64.b64encode(memory.stem.numpy().astype("<f4").tobytes()).decode()

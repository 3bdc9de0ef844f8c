"""What is packed in a phase, and the model that its values make."""

from __future__ import annotations

from torch import nn

from common.experts import expert_layout
from common.features import Layers, feature_size
from common.features import packed_size as sums_size
from common.filters import FreeSet, cut
from common.gate import packed_size as moments_size
from common.layout import (
    Layout,
    consolidation_layout,
    dense_layout,
    scope_layout,
    without_scales,
)
from common.memory import OPINION_LAYERS, trunk_of
from common.peers import joined_layout
from common.schedule import Scope
from common.sparsify import off_state, scale_factor
from common.state import State
from server.plan.state import Plan, RunState


def layout_of(plan: Plan, state: RunState) -> Layout:
    """Return the layout of the packed values in the present phase."""
    if state.way == "expert" and state.phase in ("grow", "tally"):
        return _expert_layout(plan, state.off)
    if state.phase not in ("consolidate", "judge"):
        layout = scope_layout(
            packed_scope(plan, state), plan.graph, named_filters(state), state.prior
        )
        if not state.carried.spare.empty:
            layout = without_scales(layout, plan.graph, state.carried.spare)
        return layout if state.peers == 1 else joined_layout(layout, state.peers)
    return consolidation_layout(plan.graph, state.next_free, state.base)


def named_filters(state: RunState) -> FreeSet:
    """Return the filters that an order names: those to be left out, or to be trained."""
    without = state.phase in ("look", "tally", "advise") or state.way == "expert"
    return state.off if without else state.free


def scope_of(plan: Plan, state: RunState) -> Scope:
    """Return what trains at full rate in this round of growing."""
    first, last = 0, plan.config.rounds
    number = {"grow": state.round, "look": first}.get(state.phase, last)
    return plan.config.scope_in(number)


def packed_scope(plan: Plan, state: RunState) -> Scope:
    """Return what is packed: everything where kept weights move a little."""
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


def trunk_net(plan: Plan, state: RunState) -> nn.Module:
    """Return the prior without the filters that are off."""
    return trunk_of(plan.net, plan.graph, state.prior, state.off)


def _expert_layout(plan: Plan, free: FreeSet) -> Layout:
    trunk = cut(plan.net, plan.graph, free)
    return expert_layout(trunk, plan.graph.head, plan.config.expert_share)


def statistics_size(plan: Plan, state: RunState) -> int:
    """Return how many values a device's statistics have in this look, tally or anchor."""
    if state.phase == "anchor":
        return dense_layout(plan.graph, state.base).size
    assert state.memory is not None
    if state.phase == "look" and state.round == 0:
        return moments_size(len(state.memory.worlds[0].total))
    return sums_size(plan.spec.classes, class_features(plan, state))


def statistics_features(plan: Plan, state: RunState) -> int:
    """Return of how many features these are."""
    assert state.memory is not None
    if state.phase == "look" and state.round == 0:
        return len(state.memory.worlds[0].total)
    return class_features(plan, state)


def class_features(plan: Plan, state: RunState) -> int:
    """Return of how many features class statistics are."""
    trunk, shape = trunk_net(plan, state), plan.spec.input_shape
    return feature_size(trunk, plan.graph.head, shape, layers_of(plan, state))


def layers_of(plan: Plan, state: RunState) -> Layers:
    """Return whose features statistics are of: an opinion has its own."""
    return plan.config.statistics_features if state.pending is None else OPINION_LAYERS

"""A device's part of a phase: check the order, train or measure, pack what changed."""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from client.bases import Bases
from client.extras import Extras, extras_of
from client.privacy import Privacy
from client.wire import Arrays, packed_update, received
from client.workshop import WORKSHOP
from common.accelerator import Accelerator
from common.anchor import anchored, importances
from common.data import Augment, ImageSet, Normalisation
from common.distill import class_log_shares
from common.errors import NetError, UpdateError
from common.experts import expert_layout
from common.features import ClosedFormNet, Discriminant, Scores, class_sums, feature_size
from common.filters import FilterGraph, FreeSet, cut
from common.gate import stem_conv, stem_moments
from common.importance import sensitivity, taylor
from common.layout import (
    Layout,
    consolidation_layout,
    dense_layout,
    rates_of,
    scope_layout,
    without_scales,
)
from common.memory import trunk_of
from common.nets import build
from common.order import NEEDS_BASE, NEEDS_VALUES, NetSpec, Order, Report, as_free_set
from common.peers import Once, Peers, joined, joined_layout, mutual, peer
from common.proximal import proximal
from common.regrow import regrow
from common.replay import replayed
from common.rotation import Rotations
from common.seeds import torch_rng
from common.sparsify import Anneal, multi_step_objective, off_state, scale_factor
from common.state import State, read_state, state_digest
from common.train import Labelled, Recipe, predict, train
from common.twin import Twin
from common.update import decode_base, encode_scores

_LOG = logging.getLogger(__name__)

_SCORED_IMAGES = 256
"""Importances are means over images and settle early; more would only cost the device."""


class DeviceData(Protocol):
    """Where a device's images come from."""

    @property
    def device(self) -> str:
        """Name of the device, stable over restarts."""

    def split(self, order: Order) -> tuple[ImageSet, ImageSet]:
        """Return the images that an order trains on, and those that it measures with.

        Which is which depends on the image alone; they are the same in every round of a step.
        """


def carry_out(
    order: Order,
    arrays: Arrays,
    data: DeviceData,
    bases: Bases,
    accelerator: Accelerator,
    *,
    privacy: Privacy | None = None,
    check: Callable[[float], None] | None = None,
) -> tuple[Report, np.ndarray | None]:
    """Do what an order asks.

    Parameters
    ----------
    order, arrays
        What the server sent.
    data : DeviceData
        The device's own images.
    bases : Bases
        Models that the device holds.
    accelerator : Accelerator
        Where to train.
    privacy : Privacy, optional
        Noises what training moved, before it is packed.
    check : callable, optional
        Called with the share of the training that is done, before each of its steps; may raise.

    Returns
    -------
    report : Report
        With `declined` set if the device lacks base or values or has too few images.
    update : array or None
        grow, consolidate: packed values after training, or what `client.wire` makes of them.
        anchor: importances of all weights.
        weigh: packed importances, first the sensitivities of all layers, then their Taylor scores.

    Raises
    ------
    UpdateError
        If the order and its arrays do not belong together.
    """
    began = time.monotonic()
    template, graph = net_and_graph(order.net)
    if graph.digest != order.graph:
        raise UpdateError(
            f"the net '{order.net.name}' has filter graph {graph.digest[:12]} here, the server "
            f"has {order.graph[:12]}: both sides need the same net"
        )
    trained_on, heldout = data.split(order)
    if len(trained_on) < 2:
        return Report(device=data.device, declined=f"{len(trained_on)} training image(s)"), None
    task = _Task.of(order, arrays, template, graph, bases)
    if isinstance(task, str):
        return Report(device=data.device, declined=task), None

    normalisation = Normalisation(order.net.mean, order.net.std)
    held = Labelled.of(heldout, normalisation)
    own = Labelled.of(trained_on, normalisation)
    # Before a step nobody has learnt from any of its images, and few say little.
    unseen = (held, own) if order.phase == "look" and order.rival is not None else (held,)
    current = task.current
    if order.phase in ("consolidate", "judge"):
        progress = 1.0 if order.phase == "judge" else order.anneal[0]
        current = off_state(current, graph, task.free, scale_factor(progress, order.anneal[2]))
    if order.keep is not None and bases.get(order.keep) is None:
        bases.put(current)

    student = WORKSHOP.net("student", task.template, current, accelerator)
    teacher = _first(WORKSHOP.net("teacher", task.template, task.base, accelerator, order.base))
    prior_right = _right(teacher, unseen, accelerator)
    if current is task.base and order.peers == 1:  # the very same net
        rights = [prior_right]
    else:
        rights = [_right(net, unseen, accelerator) for net in _nets(student)]
    right = rights[0]
    update: np.ndarray | None
    loss, rival_right = 0.0, 0
    if task.extras.rival is not None:
        rival = _rival(order, teacher, graph, task.extras.rival).to(accelerator.device)
        with_rival = _right(rival, unseen, accelerator)
        if order.phase == "advise":  # the model with its opinion, beside the model without
            right = with_rival
        else:
            rival_right = int(with_rival.sum())
    if order.phase in ("grow", "consolidate"):
        loss = _train(task, student, teacher, own, data.device, accelerator, check)
        trained = task.layout.pack(student.state_dict())
        update = packed_update(order, task.start, trained, task.layout, data.device, bases, privacy)
    else:
        update = _measured(task, student, own, data.device, accelerator)
    return (
        Report(
            device=data.device,
            run=order.run,
            step=order.step,
            phase=order.phase,
            attempt=order.attempt,
            round=order.round,
            base=order.base,
            free_digest=task.free.digest,
            layout=task.layout.digest,
            images=len(own),
            class_counts=torch.bincount(own.y, minlength=order.net.classes).tolist(),
            heldout=len(prior_right),
            right=int(right.sum()),
            rival_right=rival_right,
            peer_right=[int(each.sum()) for each in rights] if len(rights) > 1 else [],
            prior_right=int(prior_right.sum()),
            both_right=int((right & prior_right).sum()),
            loss=loss,
            seconds=time.monotonic() - began,
        ),
        update,
    )


@dataclass(frozen=True, eq=False)
class _Task:
    """An order with all that it refers to.

    Attributes
    ----------
    template : nn.Module
        The net that is trained, whatever its weights: whole, an expert's or peers.
    graph : FilterGraph
        Of the whole net.
    base, current : State
        The model that the order is relative to, and the one that the round begins with.
    layout : Layout
        What is trained; `start` holds its values in `current`.
    """

    order: Order
    template: nn.Module
    graph: FilterGraph
    free: FreeSet
    base: State
    extras: Extras
    layout: Layout
    start: np.ndarray
    current: State

    @classmethod
    def of(
        cls, order: Order, arrays: Arrays, template: nn.Module, graph: FilterGraph, bases: Bases
    ) -> _Task | str:
        """Return what an order refers to, or what this device lacks of it."""
        once, free, whole = WORKSHOP.once, order.free_set(), template
        if order.scope == "expert":
            template = once(("trunk", order.net, free.digest), lambda: cut(whole, graph, free))
        if order.peers > 1:
            one = template
            template = once(("peers", order.net, order.peers), lambda: Peers(one, order.peers))
        base = _resolve_base(order, arrays.base, template, graph, bases)
        if base is None:
            return NEEDS_BASE
        extras = extras_of(order, arrays, graph, base, bases)
        if extras is None:
            return NEEDS_BASE
        phase = (order.net, order.base, order.scope, order.phase, free.digest, order.expert_share)
        others = (order.peers, as_free_set(order.spare).digest)
        layout, packed_base = once(
            (*phase, *others), lambda: _layout_and_base(order, template, graph, base)
        )
        if order.layout is not None and layout.digest != order.layout:
            raise UpdateError(
                f"layout {layout.digest[:12]} here, {order.layout[:12]} at the server: scope or "
                "free set differ"
            )
        start = received(order, arrays, packed_base, layout, bases)
        if start is None:
            return NEEDS_VALUES
        current = base if start is packed_base else layout.unpack(base, start)
        return cls(order, template, graph, free, base, extras, layout, start, current)


@functools.lru_cache(maxsize=4)
def net_and_graph(spec: NetSpec) -> tuple[nn.Module, FilterGraph]:
    """Return the net of `spec` and its filter graph; the net's weights are scratch space."""
    with torch.random.fork_rng(devices=[]):
        net = build(spec.name, spec.classes, spec.input_shape[0], spec.width or None)
    return net, FilterGraph.build(net, spec.input_shape)


def _resolve_base(
    order: Order,
    packed: np.ndarray | None,
    template: nn.Module,
    graph: FilterGraph,
    bases: Bases,
) -> State | None:
    """Return the base model: held, made from one that is held, or sent; else None."""
    base = bases.get(order.base)
    if base is not None:
        return base
    if packed is not None:
        shapes = read_state(template)
        layout = dense_layout(graph, shapes)
        made = layout.unpack(shapes, decode_base(packed, layout.size, order.codec_down))
    elif order.trunk is not None:
        whole = bases.get(order.trunk)
        if whole is None:
            return None
        dense, _ = net_and_graph(order.net)
        made = read_state(trunk_of(dense, graph, whole, order.free_set()))
    elif order.regrown is not None:
        source = bases.get(order.regrown.source)
        if source is None:
            return None
        free = as_free_set(order.regrown.free)
        rules = order.regrown.rules()
        seeds = (order.regrown.seed, *order.regrown.others)
        drawn = [regrow(source, graph, free, seed=seed, diversity=rules) for seed in seeds]
        made = drawn[0] if len(drawn) == 1 else joined(drawn)
    else:
        return None
    if state_digest(made) != order.base:
        # Linear algebra may round differently on another CPU: a base made here is then
        # useless, one that was sent is damaged.
        if packed is None:
            return None
        raise UpdateError(f"the base model that was sent is not {order.base[:12]}")
    bases.put(made)
    return made


def _layout_and_base(
    order: Order, template: nn.Module, graph: FilterGraph, base: State
) -> tuple[Layout, np.ndarray]:
    """Return what the phase's values are, and those of the base."""
    if order.scope == "expert":
        layout = expert_layout(template, graph.head, order.expert_share)
    elif order.phase not in ("consolidate", "judge"):
        one = base if order.peers == 1 else peer(base, 0)
        layout = scope_layout(order.scope, graph, order.free_set(), one)
        if order.spare:
            layout = without_scales(layout, graph, as_free_set(order.spare))
        if order.peers > 1:
            layout = joined_layout(layout, order.peers)
    else:
        layout = consolidation_layout(graph, order.free_set(), base)
    return layout, layout.pack(base)


def _nets(net: nn.Module) -> list[nn.Module]:
    """Return the peers in `net`, or `net` alone."""
    return list(net.nets) if isinstance(net, Peers) else [net]


def _first(net: nn.Module) -> nn.Module:
    return _nets(net)[0]


def _right(net: nn.Module, parts: Iterable[Labelled], accelerator: Accelerator) -> torch.Tensor:
    """Return which images of all parts `net` gets right, bool [N]."""
    found = [torch.zeros(0, dtype=torch.bool)]
    for part in parts:
        if len(part):
            found.append(predict(net, part.x, accelerator=accelerator).argmax(1) == part.y)
    return torch.cat(found)


def _train(
    task: _Task,
    student: nn.Module,
    base_net: nn.Module,
    data: Labelled,
    device: str,
    accelerator: Accelerator,
    check: Callable[[float], None] | None,
) -> float:
    """Train `student` as the order says, in place; return the last epoch's mean loss."""
    order, graph, layout = task.order, task.graph, task.layout
    base, extras = task.base, task.extras
    recipe = Recipe(
        epochs=order.epochs,
        batch=order.batch,
        lr=order.lr,
        momentum=order.momentum,
        weight_decay=order.weight_decay,
        augment=Augment(order.crop, order.flip),
    )
    # Without the regrown filters, which nobody reads yet, the base is the prior model, in
    # less time; without this step's filters the grown model is its kept part.
    before_step = check
    teaching = order.teaching
    twin = _twin(order, student, graph, accelerator)
    if order.phase == "grow":
        if teaching.teacher == "none" or not (teaching.weight or teaching.ntd_weight):
            teachers = []
        elif teaching.teacher == "round":
            teachers = [copy.deepcopy(student)]
        elif twin is not None and order.kept == order.free:
            teachers = [twin.teacher]
        else:
            teachers = [_kept_part(order, base_net, graph)]
    else:
        teachers = [base_net]
        if order.kept:
            teachers.append(_kept_part(order, base_net, graph))
        begin, end, until = order.anneal
        anneal = Anneal(student, graph, order.free_set(), base)

        def before_step(done: float) -> None:
            if check is not None:
                check(done)
            anneal(scale_factor(begin + (end - begin) * done, until))

    classes = order.net.classes
    # Until the devices' counts are known, nobody can tell a skew from a shift.
    known = order.class_counts or torch.bincount(data.y, minlength=classes).tolist()
    skew = class_log_shares(
        data.y, known, teaching.calibration, mask_absent=teaching.mask_absent
    ).to(accelerator.device)
    if order.peers > 1:
        teachers = [Once(teacher) for teacher in teachers]
    objective = multi_step_objective(teachers, teaching.distillation(), skew)
    if order.peers > 1:
        objective = mutual(objective, order.peer_weight)
    trained_net, trained_layout = (student, layout) if twin is None else (twin, twin.layout)
    if order.prox:
        objective = proximal(objective, trained_net, trained_layout, order.prox)
    key = (order.run, order.step, order.phase, order.attempt, order.round, device)
    if extras.anchor is not None:
        importance = dense_layout(graph, base).unpack(base, extras.anchor)
        objective = anchored(
            objective, student, layout, importance, base, order.anchor_weight, order.lr
        )
    if extras.replay is not None:
        objective = replayed(
            objective,
            student,
            cut(base_net, graph, as_free_set(order.kept)) if order.phase == "grow" else base_net,
            Normalisation(order.net.mean, order.net.std).to_tensor(extras.replay),
            torch_rng("replay", *key),
            weight=order.replay_weight,
            temperature=teaching.temperature,
            batch=order.batch,
            accelerator=accelerator,
        )
    rates = None
    if order.full_rate is not None:
        inner = scope_layout(order.full_rate, graph, order.free_set(), base)
        if order.spare:
            inner = without_scales(inner, graph, as_free_set(order.spare))
        rates = rates_of(layout, inner, order.kept_lr)
    with contextlib.ExitStack() as stack:
        rotations = None
        if order.rotations:
            head = student.get_submodule(graph.head)
            assert isinstance(head, nn.Linear)
            rotations = stack.enter_context(
                Rotations(head, head.in_features, classes, order.rotations, torch_rng("turn", *key))
            )
        trained = train(
            trained_net,
            trained_layout,
            data,
            objective,
            recipe,
            torch_rng("train", *key),
            accelerator=accelerator,
            rotations=rotations,
            rates=rates,
            before_step=before_step,
        )
    if twin is not None:
        twin.merge(student)
    return trained.loss


def _kept_part(order: Order, base_net: nn.Module, graph: FilterGraph) -> nn.Module:
    kept = as_free_set(order.kept)
    device = str(next(base_net.parameters()).device)
    key = ("kept part", order.net, order.base, kept.digest, device)
    return WORKSHOP.once(key, lambda: cut(base_net, graph, kept))


def _twin(
    order: Order, student: nn.Module, graph: FilterGraph, accelerator: Accelerator
) -> Twin | None:
    """Return `student` as a twin, which learns the same in less time, or None: train by masks."""
    if order.phase != "grow" or order.scope != "rows":
        return None
    if order.peers > 1 or order.anchor_weight or order.replay_weight or order.full_rate is not None:
        _LOG.warning("peers, anchors, replay and kept weights that move are learnt by masks")
        return None
    if order.rotations:
        _LOG.warning("rotations are learnt by masks: a twin has no features of its own")
        return None
    cache = accelerator.cache_mib * 2**20
    if cache and order.crop:
        _LOG.warning("kept activations are not cached: crops (%d) do not come again", order.crop)
        cache = 0
    try:
        return Twin(student, graph, order.free_set(), lean=accelerator.lean, cache_bytes=cache)
    except NetError as reason:  # also: kept filters read freed ones that were not regrown
        _LOG.warning("trained by masks, which costs more: %s", reason)
        return None


def _measured(
    task: _Task, net: nn.Module, data: Labelled, device: str, accelerator: Accelerator
) -> np.ndarray | None:
    """Return what an order that does not train asks for, packed; None if counts are all."""
    order, graph = task.order, task.graph
    if order.phase == "look":
        return _seen(order, net, graph, data, accelerator)
    if order.phase == "tally":
        return _class_sums(order, _slim(order, net, graph), graph, data, accelerator)
    if order.phase == "weigh":
        values = _scores(net, graph, data, order.batch)
    elif order.phase == "anchor":
        rng = torch_rng("anchor", order.run, order.step, device)
        values = importances(net, graph, data, order.importance, rng)
    else:
        return None
    return values if order.codec_up == "fp32" else encode_scores(values)


def _seen(
    order: Order, net: nn.Module, graph: FilterGraph, data: Labelled, accelerator: Accelerator
) -> np.ndarray:
    """Return packed statistics of the device's images."""
    if order.by_class:
        return _class_sums(order, _slim(order, net, graph), graph, data, accelerator)
    stem = copy.deepcopy(stem_conv(net))  # the net is used again
    weight = np.frombuffer(base64.b64decode(order.stem), "<f4").copy()
    if not weight.size or weight.size % stem.weight[0].numel():
        raise UpdateError(f"the stem to look through has {weight.size} weights")
    stem.weight = nn.Parameter(torch.from_numpy(weight).view(-1, *stem.weight.shape[1:]))
    return stem_moments(stem, data.x, accelerator=accelerator).pack()


def _rival(order: Order, trunk: nn.Module, graph: FilterGraph, packed: np.ndarray) -> nn.Module:
    """Return a copy of the trunk with a classifier of its features, alone or beside its own."""
    copied = _slim(order, copy.deepcopy(trunk).cpu(), graph)
    size = feature_size(copied, graph.head, order.net.input_shape, order.layers)
    classifier = Discriminant.unpack(packed, order.net.classes, size)
    beside = order.opinion > 0
    scores = Scores(classifier.impartial(), order.opinion) if beside else Scores(classifier)
    return ClosedFormNet(copied, graph.head, scores, order.layers, beside=beside).eval()


def _slim(order: Order, net: nn.Module, graph: FilterGraph) -> nn.Module:
    """Return the part of `net` without its free filters; an expert's net has none."""
    return net if order.scope == "expert" else cut(net, graph, order.free_set())


def _class_sums(
    order: Order, net: nn.Module, graph: FilterGraph, data: Labelled, accelerator: Accelerator
) -> np.ndarray:
    classes, layers = order.net.classes, order.layers
    return class_sums(
        net,
        graph.head,
        data.x,
        data.y,
        classes,
        layers=layers,
        mirror=order.flip,
        accelerator=accelerator,
    ).pack()


def _scores(net: nn.Module, graph: FilterGraph, data: Labelled, batch: int) -> np.ndarray:
    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device = next(net.parameters()).device
        x, y = data.x[:_SCORED_IMAGES].to(device), data.y[:_SCORED_IMAGES].to(device)
        yield from zip(torch.split(x, batch), torch.split(y, batch), strict=True)

    kinds = [sensitivity(net, graph, batches()), taylor(net, graph, batches())]
    packed = [kind[layer.name] for kind in kinds for layer in graph.layers]
    return np.concatenate(packed).astype(np.float32)

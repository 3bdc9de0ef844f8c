"""A device's part of a phase: check the order, train or measure, pack what changed."""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import logging
import time
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import nn

from client.bases import Bases
from client.wire import Arrays, packed_update, received
from common.accelerator import Accelerator
from common.data import Augment, ImageSet, Normalisation, split_holdout
from common.distill import class_log_shares
from common.errors import NetError, UpdateError
from common.experts import expert_layout
from common.features import class_sums
from common.filters import FilterGraph, cut
from common.gate import stem_conv, stem_moments
from common.importance import sensitivity, taylor
from common.layout import Layout, consolidation_layout, dense_layout, scope_layout
from common.memory import trunk_of
from common.nets import build
from common.order import NEEDS_BASE, NEEDS_VALUES, NetSpec, Order, Report, as_free_set
from common.proximal import proximal
from common.regrow import regrow
from common.rotation import Rotations
from common.seeds import torch_rng
from common.sparsify import Anneal, multi_step_objective, off_state, scale_factor
from common.state import State, read_state, state_digest, write_state
from common.train import Labelled, Recipe, predict, train
from common.twin import Twin
from common.update import check_values, encode_scores

_LOG = logging.getLogger(__name__)

_SCORED_IMAGES = 256
"""Importances are means over images and settle early; more would only cost the device."""


class DeviceData(Protocol):
    """Where a device's images come from."""

    @property
    def device(self) -> str:
        """Name of the device, stable over restarts."""

    def batch(self, step: int) -> ImageSet:
        """Return the images of a step; the same in every round of the step."""


def carry_out(
    order: Order, arrays: Arrays, data: DeviceData, bases: Bases, accelerator: Accelerator
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

    Returns
    -------
    report : Report
        With `declined` set if the device lacks base or values or has too few images.
    update : array or None
        grow, consolidate: packed values after training, or what `client.wire` makes of them.
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
    images = data.batch(order.step)
    trained_on, heldout = split_holdout(images, order.heldout)
    if len(trained_on) < 2:
        return Report(device=data.device, declined=f"{len(trained_on)} training image(s)"), None
    if order.scope == "expert":
        template = cut(template, graph, order.free_set())
    base = _resolve_base(order, arrays.base, template, graph, bases)
    if base is None:
        return Report(device=data.device, declined=NEEDS_BASE), None
    layout = _layout(order, template, graph, base)
    packed_base = layout.pack(base)
    start = received(order, arrays, packed_base, layout, bases)
    if start is None:
        return Report(device=data.device, declined=NEEDS_VALUES), None
    current = base if start is packed_base else layout.unpack(base, start)

    normalisation = Normalisation(order.net.mean, order.net.std)
    held = Labelled.of(heldout, normalisation)
    own = Labelled.of(trained_on, normalisation)
    free = order.free_set()
    if order.phase in ("consolidate", "judge"):
        progress = 1.0 if order.phase == "judge" else order.anneal[0]
        current = off_state(current, graph, free, scale_factor(progress, order.anneal[2]))
    if order.keep is not None:
        bases.put(current)

    student = _net(template, current, accelerator)
    teacher = _net(template, base, accelerator)
    prior_right, right = _right(teacher, held, accelerator), _right(student, held, accelerator)
    update, loss = None, 0.0
    if order.phase == "look":
        update = _seen(order, student, graph, own, accelerator)
    elif order.phase == "tally":
        update = _class_sums(order, student, graph, own, accelerator)
    elif order.phase == "weigh":
        update = _scores(student, graph, own, order.batch)
        update = update if order.codec_up == "fp32" else encode_scores(update)
    elif order.phase != "judge":
        loss = _train(order, student, teacher, graph, layout, base, own, data.device, accelerator)
        trained = layout.pack(read_state(student))
        update = packed_update(order, start, trained, layout, data.device, bases)
    return (
        Report(
            device=data.device,
            run=order.run,
            step=order.step,
            phase=order.phase,
            attempt=order.attempt,
            round=order.round,
            base=order.base,
            free_digest=free.digest,
            layout=layout.digest,
            images=len(own),
            class_counts=torch.bincount(own.y, minlength=order.net.classes).tolist(),
            heldout=len(held),
            right=int(right.sum()),
            prior_right=int(prior_right.sum()),
            both_right=int((right & prior_right).sum()),
            loss=loss,
            seconds=time.monotonic() - began,
        ),
        update,
    )


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
        made = layout.unpack(shapes, check_values(packed, layout.size, "the base model"))
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
        made = regrow(source, graph, free, seed=order.regrown.seed, diversity=rules)
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


def _layout(order: Order, template: nn.Module, graph: FilterGraph, base: State) -> Layout:
    if order.scope == "expert":
        layout = expert_layout(template, graph.head, order.expert_share)
    elif order.phase in ("look", "grow", "weigh"):
        layout = scope_layout(order.scope, graph, order.free_set(), base)
    else:
        layout = consolidation_layout(graph, order.free_set(), base)
    if order.layout is not None and layout.digest != order.layout:
        raise UpdateError(
            f"layout {layout.digest[:12]} here, {order.layout[:12]} at the server: scope or "
            "free set differ"
        )
    return layout


def _net(template: nn.Module, state: State, accelerator: Accelerator) -> nn.Module:
    net = copy.deepcopy(template)
    write_state(net, state)
    return net.eval().to(accelerator.device)


def _right(net: nn.Module, data: Labelled, accelerator: Accelerator) -> torch.Tensor:
    if not len(data):
        return torch.zeros(0, dtype=torch.bool)
    return predict(net, data.x, accelerator=accelerator).argmax(1) == data.y


def _train(
    order: Order,
    student: nn.Module,
    base_net: nn.Module,
    graph: FilterGraph,
    layout: Layout,
    base: State,
    data: Labelled,
    device: str,
    accelerator: Accelerator,
) -> float:
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
    before_step = None
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
            teachers = [cut(base_net, graph, as_free_set(order.kept))]
    else:
        teachers = [base_net]
        if order.kept:
            teachers.append(cut(base_net, graph, as_free_set(order.kept)))
        begin, end, until = order.anneal
        anneal = Anneal(student, graph, order.free_set(), base)

        def before_step(done: float) -> None:
            anneal(scale_factor(begin + (end - begin) * done, until))

    classes = order.net.classes
    # Until the devices' counts are known, nobody can tell a skew from a shift.
    known = order.class_counts or torch.bincount(data.y, minlength=classes).tolist()
    skew = class_log_shares(
        data.y, known, teaching.calibration, mask_absent=teaching.mask_absent
    ).to(accelerator.device)
    objective = multi_step_objective(teachers, teaching.distillation(), skew)
    trained_net, trained_layout = (student, layout) if twin is None else (twin, twin.layout)
    if order.prox:
        objective = proximal(objective, trained_net, trained_layout, order.prox)
    key = (order.run, order.step, order.phase, order.attempt, order.round, device)
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
            before_step=before_step,
        )
    if twin is not None:
        twin.merge(student)
    return trained.loss


def _twin(
    order: Order, student: nn.Module, graph: FilterGraph, accelerator: Accelerator
) -> Twin | None:
    """Return `student` as a twin, which learns the same in less time, or None: train by masks."""
    if order.phase != "grow" or order.scope != "rows":
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


def _seen(
    order: Order, net: nn.Module, graph: FilterGraph, data: Labelled, accelerator: Accelerator
) -> np.ndarray:
    """Return packed statistics of the device's images."""
    if order.by_class:
        return _class_sums(order, cut(net, graph, order.free_set()), graph, data, accelerator)
    stem = stem_conv(net)
    weight = np.frombuffer(base64.b64decode(order.stem), "<f4").copy()
    if not weight.size or weight.size % stem.weight[0].numel():
        raise UpdateError(f"the stem to look through has {weight.size} weights")
    stem.weight = nn.Parameter(torch.from_numpy(weight).view(-1, *stem.weight.shape[1:]))
    return stem_moments(stem, data.x, accelerator=accelerator).pack()


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

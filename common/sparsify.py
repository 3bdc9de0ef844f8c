"""Selective sparsity training: drive a chosen set of filters to exact zero, keep the function.

Uniform sparsity over all scales followed by a cut destroys a net. Lee & Kim (IEEE Access
2023) select first: here the set is chosen (`common.filters.choose`), its BN scales and shifts
are annealed to exact zero on a schedule, and all other weights learn to do without it, from
labels and from the model as it was. With several teachers the same code is the multi-step
loss (SST + MSL).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from common.accelerator import CPU, Accelerator
from common.distill import Distillation, adaptive_loss
from common.errors import DataError
from common.filters import FilterGraph, FreeSet, cut, freed_index
from common.layout import consolidation_layout
from common.rotation import Rotations
from common.state import State, read_state, write_state
from common.train import Labelled, Objective, Recipe, accuracy_of, train

_ROUNDING = 1e-9  # 0.05 * 60 is 3.0000000000000004, and no more than three images


@dataclass(frozen=True)
class Attempt:
    """One try at freeing: share of all filters, what it cost (in accuracy, 0..1), the verdict."""

    share: float
    drop: float
    accepted: bool


@dataclass(frozen=True)
class Freeing:
    """The outcome of freeing: accuracies in [0, 1] on held-out data."""

    free: FreeSet
    before: float
    after: float
    after_cut: float
    attempts: tuple[Attempt, ...]


def scale_factor(progress: float, until: float) -> float:
    """Return what the free filters' scales are multiplied by: 1 at 0, exactly 0 from `until`."""
    return max(0.0, 1.0 - progress / until)


class Anneal:
    """Sets the scales and shifts of a free set to a share of what they were.

    Parameters
    ----------
    net : nn.Module
        Changed in place by every call.
    graph, free
        Filter groups, and those to drive to zero.
    base : State
        The model when the consolidation began.
    """

    def __init__(
        self, net: nn.Module, graph: FilterGraph, free: FreeSet, base: Mapping[str, torch.Tensor]
    ) -> None:
        self._tensors = dict(net.named_parameters())
        self._items = [
            (name, torch.from_numpy(rows), base[name][torch.from_numpy(rows)])
            for name, rows in freed_index(graph, free).own.items()
            if name in scale_and_shift(graph)
        ]

    @torch.no_grad()
    def __call__(self, factor: float) -> None:
        """Set every scale and shift of the free set to `factor` times its value in the base."""
        for name, rows, values in self._items:
            tensor = self._tensors[name]
            tensor[rows.to(tensor.device)] = (values * factor).to(tensor.device)


def scale_and_shift(graph: FilterGraph) -> frozenset[str]:
    """Return the names of all BN scales and shifts of the filter groups."""
    return frozenset(
        slot.tensor
        for layer in graph.layers
        for slot in layer.slots
        if slot.kind in ("scale", "shift")
    )


def multi_step_objective(
    teachers: Sequence[nn.Module],
    distillation: Distillation,
    class_log_share: torch.Tensor | None = None,
) -> Objective:
    """Return the loss that learns from labels and from earlier models (frozen, eval mode).

    `class_log_share` [C] is that of `common.distill.adaptive_loss`, on the net's device.
    """

    def objective(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            taught = [teacher(x).float() for teacher in teachers]
        return adaptive_loss(
            logits,
            taught,
            y,
            weight=distillation.weight,
            temperature=distillation.temperature,
            floor=distillation.floor,
            ntd_weight=distillation.ntd_weight,
            class_log_share=class_log_share,
        )

    return objective


def free_filters(
    net: nn.Module,
    graph: FilterGraph,
    choose: Callable[[float], FreeSet],
    data: Labelled,
    heldout: Labelled,
    teachers: Sequence[nn.Module],
    *,
    share: float,
    max_drop: float,
    recipe: Recipe,
    distillation: Distillation,
    until: float,
    rng: Callable[[int], torch.Generator],
    tries: int = 4,
    shrink: float = 0.7,
    rotations: Callable[[int], Rotations] | None = None,
    accelerator: Accelerator = CPU,
    on_epoch: Callable[[int, int, float], None] | None = None,
) -> Freeing:
    """Free a share of the filters of `net`, in place, within an accepted loss of accuracy.

    Parameters
    ----------
    net, graph
        The model and its filter groups.
    choose : callable
        From a share to a free set.
    data, heldout : Labelled
        Trained on; decided on.
    teachers : sequence of nn.Module
        The model as it was and, if any, earlier ones.
    share : float
        Of every layer's filters to free.
    max_drop : float
        Accepted loss of held-out accuracy (0.005 is half a point), see `acceptable`. If it is
        exceeded the share is multiplied by `shrink` until the set is smaller, and the training
        repeated from the start.
    recipe, distillation
        Of the training.
    until : float
        Share of the training after which the scales are exactly zero.
    rng : callable
        From the attempt's number to a generator.
    tries : int
        Attempts; after the last the net is left as it was and the free set is empty.
    rotations : callable, optional
        From the attempt's number to a second task of `net` (see `common.rotation`).
    on_epoch : callable, optional
        Called with attempt, epoch and loss.

    Returns
    -------
    Freeing

    Raises
    ------
    DataError
        If `heldout` is empty.
    """
    if not len(heldout):
        raise DataError("no held-out images to decide on the freeing: raise heldout")
    base = read_state(net)
    before = accuracy_of(net, heldout, accelerator)
    attempts: list[Attempt] = []
    free = choose(share)
    for attempt in range(tries):
        if attempt:
            share, free = smaller(choose, share, shrink, free)
        if free.empty:
            break
        write_state(net, base)
        anneal = Anneal(net, graph, free, base)
        with contextlib.ExitStack() as stack:
            train(
                net,
                consolidation_layout(graph, free, base),
                data,
                multi_step_objective(teachers, distillation),
                recipe,
                rng(attempt),
                accelerator=accelerator,
                rotations=None if rotations is None else stack.enter_context(rotations(attempt)),
                before_step=lambda done, anneal=anneal: anneal(scale_factor(done, until)),  # type: ignore[misc]
                after_epoch=None
                if on_epoch is None
                else lambda epoch, loss, n=attempt: on_epoch(n, epoch, loss),  # type: ignore[misc]
            )
        after = accuracy_of(net, heldout, accelerator)
        after_cut = accuracy_of(cut(net, graph, free), heldout, accelerator)
        lost = round((before - after_cut) * len(heldout))
        accepted = lost <= acceptable(max_drop, len(heldout))
        attempts.append(Attempt(free.share(graph), before - after_cut, accepted))
        if accepted:
            return Freeing(free, before, after, after_cut, tuple(attempts))
    write_state(net, base)
    return Freeing(FreeSet({}), before, before, before, tuple(attempts))


def acceptable(max_drop: float, heldout: int) -> int:
    """Return how many held-out images more may be wrong, if `max_drop` of them is accepted.

    Rounded up: with half a point and 796 images, whether three or four are lost is chance.
    """
    return math.ceil(max_drop * heldout - _ROUNDING)


def smaller(
    choose: Callable[[float], FreeSet], share: float, shrink: float, refused: FreeSet
) -> tuple[float, FreeSet]:
    """Return the next smaller share whose free set is smaller than `refused`, and the set.

    Kept widths are rounded, so a somewhat smaller share may name the same set again.
    """
    while share > _LEAST_SHARE:
        share *= shrink
        free = choose(share)
        if free.count < refused.count:
            return share, free
    return share, FreeSet({})


_LEAST_SHARE = 0.01


def off_state(
    state: Mapping[str, torch.Tensor], graph: FilterGraph, free: FreeSet, factor: float = 0.0
) -> State:
    """Return a copy of `state` with the scales and shifts of `free` multiplied by `factor`."""
    result = {name: tensor.clone() for name, tensor in state.items()}
    wanted = scale_and_shift(graph)
    for name, rows in freed_index(graph, free).own.items():
        if name in wanted:
            result[name][torch.from_numpy(rows)] *= factor
    return result

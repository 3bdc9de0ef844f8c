"""Which filter groups a net can do without: three scores, their ranks combined, and the choice.

Scores are per layer, one number a channel, larger = more important. They are comparable inside a
layer only, so `choose` frees the same share of every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import ConfigError, DataError
from common.filters import FilterGraph, FreeSet, Kind

Scores = dict[str, NDArray[np.float64]]
Batches = Iterable[tuple[Tensor, Tensor]]


def bn_scale(net: nn.Module, graph: FilterGraph) -> Scores:
    """Score by the size of the BatchNorm scales (Liu et al., "Network slimming", ICCV 2017).

    Returns
    -------
    dict of str to float64 array [width]
        ``|gamma|`` of every filter group; the mean where several BatchNorms scale it.
    """
    tensors = dict(net.named_parameters())
    scores: Scores = {}
    for layer in graph.layers:
        total, seen = np.zeros(layer.width), np.zeros(layer.width)
        for slot in layer.slots:
            if slot.kind == "scale":
                scale = tensors[slot.tensor].detach().cpu().double().abs().numpy()
                np.add.at(total, list(slot.channels), scale[list(slot.index)])
                np.add.at(seen, list(slot.channels), 1.0)
        scores[layer.name] = total / seen
    return scores


def sensitivity(net: nn.Module, graph: FilterGraph, batches: Batches) -> Scores:
    """Score by how much the logits' squared norm hangs on a group; needs no labels.

    First order, after MAS (Aljundi et al., ECCV 2018): ``|sum theta * d||f(x)||^2 / d theta|``
    over a group's BatchNorm scales and shifts, where ``||f||^2`` is the mean over a batch.

    Parameters
    ----------
    net : nn.Module
        Evaluated in eval mode; neither its weights, gradients nor modes change.
    batches : iterable of (float tensor [B, C, H, W], int64 tensor [B])
        On the net's device. The labels are not looked at.

    Returns
    -------
    dict of str to float64 array [width]
        Mean over the images.

    Raises
    ------
    DataError
        No images.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.square().sum(1).mean()

    return _gradient_scores(net, graph, batches, loss, ("scale", "shift"))


def taylor(net: nn.Module, graph: FilterGraph, batches: Batches) -> Scores:
    """Score by the first-order change of the loss (Molchanov et al., CVPR 2019).

    ``|sum gamma * d CE / d gamma|`` over a group's BatchNorm scales. Parameters, returned scores
    and errors as for `sensitivity`; the labels matter.
    """
    return _gradient_scores(net, graph, batches, F.cross_entropy, ("scale",))


def combine_ranks(scores: Sequence[Scores]) -> Scores:
    """Return the mean of the ranks inside each layer, 0 (least important) to 1.

    Equal scores rank by channel number.
    """
    if not scores:
        raise ConfigError("importance: no scores to combine; give at least one")
    return {name: np.mean([_ranks(each[name]) for each in scores], axis=0) for name in scores[0]}


def random_scores(graph: FilterGraph, rng: np.random.Generator) -> Scores:
    """Return scores that mean nothing: `choose` then frees as many filters a layer, but any."""
    return {layer.name: rng.random(layer.width) for layer in graph.layers}


def choose(
    graph: FilterGraph,
    scores: Mapping[str, NDArray[np.float64]],
    share: float,
    *,
    cap: float = 0.5,
    floor: int = 8,
    multiple: int = 8,
    exclude: Collection[str] = (),
) -> FreeSet:
    """Free the least important filter groups of every layer.

    Parameters
    ----------
    graph : FilterGraph
        All that could be freed.
    scores : mapping of str to float64 array [width]
        By layer name; the lowest go first, equal ones by channel number.
    share : float
        Part of each layer to free, 0 to `cap`. Where a layer is at least twice `multiple` wide,
        the kept width is rounded to the nearest multiple (up if two are equally near), so that a
        share may come out as 0 in one layer and larger in another; in narrower layers at least
        one of four or more filters is freed.
    cap : float
        Largest part of a layer that may be freed, below 1.
    floor : int
        Filters that a layer keeps at least, if it has them.
    multiple : int
        1: no rounding.
    exclude : collection of str
        Names of layers that are left whole.

    Raises
    ------
    ConfigError
        A setting out of its range, or scores that do not fit the graph.
    """
    if not 0 < cap < 1:
        raise ConfigError(f"cap {cap} must lie between 0 and 1")
    if not 0 <= share <= cap:
        raise ConfigError(f"share {share} must lie between 0 and cap, {cap}")
    if floor < 1 or multiple < 1:
        raise ConfigError(f"floor {floor} and multiple {multiple} must be at least 1")
    unknown = sorted(set(exclude) - {layer.name for layer in graph.layers})
    if unknown:
        known = ", ".join(layer.name for layer in graph.layers)
        raise ConfigError(f"exclude names {unknown[0]!r}, which is no layer; known: {known}")
    channels: dict[str, tuple[int, ...]] = {}
    for layer in graph.layers:
        score = np.asarray(scores.get(layer.name, ()), np.float64)
        if score.shape != (layer.width,) or not np.isfinite(score).all():
            raise ConfigError(
                f"importance of layer {layer.name!r} has shape {score.shape}: "
                f"it must be {layer.width} finite numbers"
            )
        if layer.name not in exclude:
            freed = layer.width - _kept(layer.width, share, cap, floor, multiple)
            channels[layer.name] = tuple(np.argsort(score, kind="stable")[:freed].tolist())
    return FreeSet(channels)


def _kept(width: int, share: float, cap: float, floor: int, multiple: int) -> int:
    if share == 0:
        return width
    most = math.floor(cap * width + 1e-9)  # 0.29 * 100 is 28.999999999999996
    least = max(min(floor, width), width - most)
    kept = width - math.floor(share * width + 0.5)
    if width < 2 * multiple:
        kept = max(kept, least)
        return width - 1 if kept == width and width >= 4 and most >= 1 else kept
    nearest = (kept + multiple // 2) // multiple * multiple
    aligned = max(nearest, -(-least // multiple) * multiple)
    return aligned if aligned <= width else max(kept, least)


def _ranks(score: NDArray[np.float64]) -> NDArray[np.float64]:
    ranks = np.empty(len(score))
    ranks[np.argsort(score, kind="stable")] = np.arange(len(score))
    return ranks / max(1, len(score) - 1)


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _gradient_scores(
    net: nn.Module,
    graph: FilterGraph,
    batches: Batches,
    loss: Callable[[Tensor, Tensor], Tensor],
    kinds: tuple[Kind, ...],
) -> Scores:
    slots = [(layer, slot) for layer in graph.layers for slot in layer.slots if slot.kind in kinds]
    tensors = dict(net.named_parameters())
    names = list(dict.fromkeys(slot.tensor for _, slot in slots))
    # Leaves of their own: the net's gradients stay untouched, and frozen parameters count too.
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in names}
    totals: Scores = {layer.name: np.zeros(layer.width) for layer in graph.layers}
    images = 0
    # The scores of a net that has diverged are not finite, which is told where they are read.
    with _evaluating(net), torch.enable_grad(), np.errstate(over="ignore", invalid="ignore"):
        for x, y in batches:
            logits: Tensor = torch.func.functional_call(net, leaves, (x,))
            gradients = torch.autograd.grad(loss(logits, y), list(leaves.values()))
            products = {
                name: (leaf.detach() * gradient).cpu().double().numpy()
                for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
            }
            batch: Scores = {name: np.zeros_like(total) for name, total in totals.items()}
            for layer, slot in slots:
                values = products[slot.tensor][list(slot.index)]
                np.add.at(batch[layer.name], list(slot.channels), values)
            for name, total in totals.items():
                total += np.abs(batch[name]) * len(x)
            images += len(x)
    if images == 0:
        raise DataError("importance: there are no images to measure it on; give at least one batch")
    return {name: total / images for name, total in totals.items()}

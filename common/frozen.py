"""Keep what a layout does not name from moving in a forward or backward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import nn

from common.layout import Entry, Layout
from common.sliced import Slices, sliced_forward, slices

_MOST = 0.6
"""Share of filters and channels together beyond which slices cost as much as the whole gradient."""
_LEAST = 128
"""Filters and channels below which they do, too."""


@contextlib.contextmanager
def training_only(net: nn.Module, layout: Layout) -> Iterator[None]:
    """Put `net` in training mode for the entries of `layout`, and in eval mode for the rest.

    A BN layer whose statistics are frozen runs on its running statistics; one of which only
    some channels train normalises just those by the batch. Parameters without a trainable
    entry get no gradient. All is put back at the end.
    """
    statistics = {e.tensor: e for e in layout.entries if e.kind == "mean"}
    named = {e.tensor for e in layout.entries}
    parameters = list(net.named_parameters())
    asked = [p.requires_grad for _, p in parameters]
    modes = [(module, module.training) for module in net.modules()]
    swapped: list[nn.Module] = []
    net.train()
    for name, parameter in parameters:
        parameter.requires_grad_(name in named)
    weights = {e.tensor: e for e in layout.entries if e.kind == "weight"}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and f"{name}.weight" in weights:
            trained = _slices(module, weights[f"{name}.weight"])
            if trained is not None:
                module.forward = functools.partial(sliced_forward, module, trained)  # type: ignore[method-assign]
                swapped.append(module)
        if getattr(module, "running_mean", None) is None:
            continue
        entry = statistics.get(f"{name}.running_mean")
        if entry is None:
            module.eval()
        elif entry.positions is not None:
            assert isinstance(module, nn.BatchNorm2d)
            channels = entry.positions.to(module.weight.device)
            module.forward = functools.partial(_partial_forward, module, channels)  # type: ignore[method-assign]
            swapped.append(module)
    try:
        yield
    finally:
        for module in swapped:
            del module.forward
        for (_, parameter), flag in zip(parameters, asked, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, training in modes:
            module.training = training


def _slices(conv: nn.Conv2d, entry: Entry) -> Slices | None:
    """Return what of a convolution is trained, if its gradient is cheaper than the whole one."""
    plain = conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    found = slices(entry) if plain else None
    if found is None or min(conv.weight.shape[:2]) < _LEAST:
        return None
    if sum(len(part) / side for part, side in zip(found, conv.weight.shape, strict=False)) > _MOST:
        return None
    return Slices(*(positions.to(conv.weight.device) for positions in found))


def _partial_forward(bn: nn.BatchNorm2d, channels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Batch-normalise `channels` by the batch and all others by their running statistics."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    own = x.index_select(1, channels).to(bn.weight.dtype)  # statistics in full precision
    var, mean = torch.var_mean(own, (0, 2, 3), correction=0)
    count = own.numel() // own.shape[1]
    full_mean = bn.running_mean.detach().clone().index_copy(0, channels, mean)
    full_var = bn.running_var.detach().clone().index_copy(0, channels, var)
    with torch.no_grad():
        rate = bn.momentum if bn.momentum is not None else 0.1
        unbiased = var * (count / max(count - 1, 1))
        for running, batch in ((bn.running_mean, mean), (bn.running_var, unbiased)):
            running[channels] = torch.lerp(running[channels], batch, rate)
    scale = bn.weight * torch.rsqrt(full_var + bn.eps)
    shift = bn.bias - full_mean * scale
    return (x * scale[None, :, None, None] + shift[None, :, None, None]).to(x.dtype)

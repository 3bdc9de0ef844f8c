"""The one sum of a twin that has gradients of its own: what freed filters read.

Autograd would follow kept activations too, and its kernels do badly with few filters.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS_LAST = torch.channels_last
NARROW = 8
"""Half a vector of floats: with fewer channels most of the kernels' work is wasted."""

VECTOR = 16
"""Filters that the widest vectors of today's CPUs hold."""

Conv = tuple[list[int], list[int], list[int], int]
"""Stride, padding, dilation, groups."""


class FreedSum(torch.autograd.Function):
    """What freed filters read from kept channels (given) plus what they read from freed ones."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        partial: Tensor,
        kept: Tensor,
        freed: Tensor | None,
        from_kept: Tensor,
        from_freed: Tensor | None,
        bias: Tensor | None,
        conv: Conv,
    ) -> Tensor:
        ctx.save_for_backward(kept, freed, from_kept, from_freed)
        ctx.conv, ctx.biased = conv, bias is not None
        if freed is None:
            return partial.clone(memory_format=CHANNELS_LAST)
        assert from_freed is not None
        return F.conv2d(freed, from_freed, None, *conv).add_(partial)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: D102
        gradient = gradients[0].contiguous(memory_format=CHANNELS_LAST)
        kept, freed, from_kept, from_freed = ctx.saved_tensors
        dfreed = dw_freed = None
        if freed is not None:
            dw_freed = weight_gradient(gradient, freed, from_freed, ctx.conv)
        if ctx.needs_input_grad[2]:
            dfreed = convolution_backward(gradient, freed, from_freed, ctx.conv, 0)
        dw_kept = weight_gradient(gradient, kept, from_kept, ctx.conv)
        dbias = gradient.sum((0, 2, 3)).to(from_kept.dtype) if ctx.biased else None
        return None, None, dfreed, dw_kept, dw_freed, dbias, None


def weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    """Return the gradient [F, C, h, w] of the filters `weight` on `x`, whose output had `gradient`.

    With filters that do not fill the last vector the two change places: correlating them gives
    the same sums, mirrored, and the kernels pay for full vectors of output channels alone.
    With several threads they do not: a crash was then seen, in which it is suspected.
    """
    stride, padding, dilation, _ = conv
    x = x.to(gradient.dtype)
    mirrored = [side - 1 - pad for side, pad in zip(weight.shape[2:], padding, strict=True)]
    as_it_is = not len(weight) % VECTOR or torch.get_num_threads() > 1
    if as_it_is or stride != [1, 1] or dilation != [1, 1] or min(mirrored) < 0:
        return convolution_backward(gradient, x, weight, conv, 1).to(weight.dtype)
    swapped = weight.new_empty(weight.shape[1], len(weight), *weight.shape[2:])
    found = convolution_backward(x, gradient, swapped, (stride, mirrored, dilation, 1), 1)
    return found.flip(2, 3).transpose(0, 1).to(weight.dtype)


def convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, conv: Conv, which: int
) -> Tensor:
    """Return a convolution's gradient with respect to its input (0) or its weight (1)."""
    stride, padding, dilation, groups = conv
    found = torch.ops.aten.convolution_backward(
        *(gradient, x, weight.to(gradient.dtype), None, stride, padding, dilation),
        *(False, [0, 0], groups, [which == 0, which == 1, False]),
    )
    return cast(Tensor, found[which])

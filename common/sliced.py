"""Convolutions of which some filters, and what all read of some channels, are trained.

Scope ``group`` needs gradients *through* every filter, but those *of* freed ones and of what
others read from them alone: no gradient of a whole weight is computed and then thrown away.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from common.layout import Entry
from common.twin_sum import CHANNELS_LAST, Conv, convolution_backward, weight_gradient


class Slices(NamedTuple):
    """Positions on axes 0 and 1 of a weight: the trained entries are all of either."""

    rows: Tensor
    columns: Tensor


def slices(entry: Entry) -> Slices | None:
    """Return the rows and columns that the entries of a weight make up, or None."""
    if entry.index is None or len(entry.shape) < 2:
        return None
    mask = torch.zeros(entry.shape, dtype=torch.bool)
    mask.view(-1)[cast(Tensor, entry.positions)] = True
    planes = mask.flatten(2) if mask.dim() > 2 else mask[:, :, None]
    rows, columns = planes.all(2).all(1), planes.all(2).all(0)
    if not torch.equal(planes, (rows[:, None] | columns)[:, :, None].expand_as(planes)):
        return None
    return Slices(rows.nonzero().flatten(), columns.nonzero().flatten())


class SlicedConv(torch.autograd.Function):
    """A convolution whose weight gets gradients at `Slices`, and zero elsewhere."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, trained: Slices, conv: Conv
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.trained, ctx.conv, ctx.biased = trained, conv, bias is not None
        return torch.conv2d(x, weight, bias, *conv)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: D102
        x, weight = ctx.saved_tensors
        rows, columns = ctx.trained
        gradient = gradients[0].contiguous(memory_format=CHANNELS_LAST)
        x = x.to(gradient.dtype).contiguous(memory_format=CHANNELS_LAST)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = convolution_backward(gradient, x, weight, ctx.conv, 0)
        dw = torch.zeros_like(weight)
        if len(columns):
            mine = weight.new_empty(len(weight), len(columns), *weight.shape[2:])
            read = _channels(x, columns)
            dw.index_copy_(1, columns, weight_gradient(gradient, read, mine, ctx.conv))
        if len(rows):
            mine = weight.new_empty(len(rows), *weight.shape[1:])
            written = _channels(gradient, rows)
            dw.index_copy_(0, rows, weight_gradient(written, x, mine, ctx.conv))
        db = gradient.sum((0, 2, 3)).to(weight.dtype) if ctx.biased else None
        return dx, dw, db, None, None


def sliced_forward(module: nn.Conv2d, trained: Slices, x: Tensor) -> Tensor:
    """Run a convolution of which only `trained` learns."""
    weight, bias = module.weight, module.bias
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    assert not isinstance(module.padding, str)
    conv = (list(module.stride), list(module.padding), list(module.dilation), 1)
    result: Tensor = SlicedConv.apply(x, weight, bias, trained, conv)  # type: ignore[no-untyped-call]
    return result


def _channels(x: Tensor, channels: Tensor) -> Tensor:
    """Return some channels of a channels-last tensor, whole pixels at a time."""
    count, width, height, breadth = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, width).index_select(1, channels)
    return pixels.view(count, height, breadth, len(channels)).permute(0, 3, 1, 2)

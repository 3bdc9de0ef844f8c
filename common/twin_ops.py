"""The layers of a twin: each computes its kept channels from kept ones, as the prior does, and
its freed channels from both, with gradients for freed filters alone.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.filters import Positions

Halves = tuple[Tensor, Tensor | None]
"""A value split along its channels: the kept ones, and the freed ones if there are any."""

_CHANNELS_LAST = torch.channels_last


class Part(nn.Module):
    """A layer with freed filters, which knows where its tensors belong in the dense net.

    Attributes
    ----------
    places : dict of str to (str, rows, columns or None)
        For each of the part's own trainable tensors: the dense tensor's name and the positions
        on its axes 0 and 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, tuple[str, Positions, Positions | None]] = {}

    def take(
        self,
        leaf: str,
        state: dict[str, Tensor],
        tensor: str,
        rows: Positions,
        columns: Positions | None = None,
    ) -> None:
        """Make a trainable tensor of the part from a slice of a dense one."""
        self.register_parameter(leaf, nn.Parameter(block(state[tensor], rows, columns)))
        self.places[leaf] = (tensor, rows, columns)


def block(tensor: Tensor, rows: Positions, columns: Positions | None = None) -> Tensor:
    """Return a contiguous copy of some rows, and columns, of `tensor`."""
    found = tensor.detach()[torch.from_numpy(rows).to(tensor.device)]
    if columns is not None:
        found = found[:, torch.from_numpy(columns).to(tensor.device)]
    return found.contiguous()


def fold(norm: nn.BatchNorm2d, kept: Positions) -> tuple[Tensor, Tensor]:
    """Return scale and shift (float64) of the kept channels of a BN in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias, mean, var = (
        block(t, kept).double()
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    scale = weight * torch.rsqrt(var + norm.eps)
    return scale, bias - mean * scale


class _FreedSum(torch.autograd.Function):
    """What freed filters read from kept channels (given) plus what they read from freed ones."""

    @staticmethod
    def forward(
        ctx: Any,
        partial: Tensor,
        kept: Tensor,
        freed: Tensor | None,
        from_kept: Tensor,
        from_freed: Tensor | None,
        bias: Tensor | None,
        conv: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(kept, freed, from_kept, from_freed)
        ctx.conv, ctx.biased = conv, bias is not None
        if freed is None:
            return partial.contiguous(memory_format=_CHANNELS_LAST)
        assert from_freed is not None
        return F.conv2d(freed, from_freed, None, *conv).add_(partial)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0].contiguous(memory_format=_CHANNELS_LAST)
        kept, freed, from_kept, from_freed = ctx.saved_tensors

        def back(x: Tensor, weight: Tensor, *, into: bool) -> Any:
            x, cast_weight = x.to(gradient.dtype), weight.to(gradient.dtype)
            dx, dw, _ = torch.ops.aten.convolution_backward(
                *(gradient, x, cast_weight, None, *ctx.conv[:3]),
                *(False, [0, 0], ctx.conv[3], [into, True, False]),
            )
            return dx, dw.to(weight.dtype)

        dfreed = dw_freed = None
        if freed is not None:
            dfreed, dw_freed = back(freed, from_freed, into=ctx.needs_input_grad[2])
        _, dw_kept = back(kept, from_kept, into=False)
        dbias = gradient.sum((0, 2, 3)).to(from_kept.dtype) if ctx.biased else None
        return None, None, dfreed, dw_kept, dw_freed, dbias, None


class TwinConv(Part):
    """A convolution; the BN behind it is folded into the kept filters.

    All filters read the kept channels in one convolution: filters of few channels cost as much
    as those of a full vector, so two convolutions would pay twice.
    """

    joint: Tensor
    joint_bias: Tensor

    def __init__(
        self,
        name: str,
        conv: nn.Conv2d,
        state: dict[str, Tensor],
        rows: np.ndarray,
        columns: np.ndarray,
        norm: nn.BatchNorm2d | None,
    ) -> None:
        super().__init__()
        self.conv = (list(conv.stride), _padding(conv), list(conv.dilation), 1)
        kept_rows, freed_rows = split(rows)
        kept_columns, freed_columns = split(columns)
        weight = f"{name}.weight"
        kept = block(conv.weight, kept_rows, kept_columns).double()
        shift = torch.zeros(len(kept), dtype=torch.float64, device=kept.device)
        if conv.bias is not None:
            shift = block(conv.bias, kept_rows).double()
        if norm is not None:
            scale, offset = fold(norm, kept_rows)
            kept, shift = kept * scale[:, None, None, None], shift * scale + offset
        self.kept = len(kept_rows)
        joint = torch.zeros(len(rows), *kept.shape[1:], dtype=conv.weight.dtype)
        joint = joint.to(conv.weight.device, memory_format=_CHANNELS_LAST)
        joint[: self.kept] = kept
        joint_bias = torch.zeros(len(rows)).to(joint)
        joint_bias[: self.kept] = shift
        self.register_buffer("joint", joint)
        self.register_buffer("joint_bias", joint_bias)
        self.from_kept: nn.Parameter | None = None
        self.from_freed: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if len(freed_rows):
            self.take("from_kept", state, weight, freed_rows, kept_columns)
            if len(freed_columns):
                self.take("from_freed", state, weight, freed_rows, freed_columns)
            if conv.bias is not None:
                self.take("bias", state, f"{name}.bias", freed_rows)

    def forward(self, kept: Tensor, freed: Tensor | None) -> Halves:
        if self.from_kept is None:
            return F.conv2d(kept, self.joint, self.joint_bias, *self.conv), None
        with torch.no_grad():
            self.joint[self.kept :] = self.from_kept
            if self.bias is not None:
                self.joint_bias[self.kept :] = self.bias
            both = F.conv2d(kept, self.joint, self.joint_bias, *self.conv)
        mine = _FreedSum.apply(
            both[:, self.kept :],
            *(kept, freed, self.from_kept, self.from_freed, self.bias, self.conv),
        )
        return both[:, : self.kept], cast(Tensor, mine)


class TwinDepthwise(Part):
    """A depthwise convolution: each channel reads itself alone."""

    kept_weight: Tensor
    kept_bias: Tensor

    def __init__(
        self,
        name: str,
        conv: nn.Conv2d,
        state: dict[str, Tensor],
        rows: np.ndarray,
        norm: nn.BatchNorm2d | None,
    ) -> None:
        super().__init__()
        self.conv = (list(conv.stride), _padding(conv), list(conv.dilation))
        kept_rows, freed_rows = split(rows)
        kept = block(conv.weight, kept_rows).double()
        shift = torch.zeros(len(kept), dtype=torch.float64, device=kept.device)
        if conv.bias is not None:
            shift = block(conv.bias, kept_rows).double()
        if norm is not None:
            scale, offset = fold(norm, kept_rows)
            kept, shift = kept * scale[:, None, None, None], shift * scale + offset
        self.register_buffer("kept_weight", kept.to(conv.weight.dtype))
        self.register_buffer("kept_bias", shift.to(conv.weight.dtype))
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if len(freed_rows):
            self.take("weight", state, f"{name}.weight", freed_rows)
            if conv.bias is not None:
                self.take("bias", state, f"{name}.bias", freed_rows)

    def forward(self, kept: Tensor, freed: Tensor | None) -> Halves:
        kept = F.conv2d(kept, self.kept_weight, self.kept_bias, *self.conv, kept.shape[1])
        if freed is None or self.weight is None:
            return kept, None
        return kept, F.conv2d(freed, self.weight, self.bias, *self.conv, freed.shape[1])


class TwinNorm(Part):
    """BatchNorm: running statistics for kept channels, the batch's for freed ones in training."""

    def __init__(
        self,
        name: str,
        norm: nn.BatchNorm2d,
        state: dict[str, Tensor],
        channels: np.ndarray,
        *,
        folded: bool,
    ) -> None:
        super().__init__()
        kept, freed = split(channels)
        self.affine: tuple[str, str] | None = None
        if not folded:
            scale, shift = fold(norm, kept)
            self.register_buffer("scale", scale.to(norm.weight.dtype)[:, None, None])
            self.register_buffer("shift", shift.to(norm.weight.dtype)[:, None, None])
            self.affine = ("scale", "shift")
        self.running_mean: Tensor | None = None
        self.running_var: Tensor | None = None
        self.eps = norm.eps
        self.momentum = 0.1 if norm.momentum is None else norm.momentum
        if len(freed):
            self.take("weight", state, f"{name}.weight", freed)
            self.take("bias", state, f"{name}.bias", freed)
            for leaf in ("running_mean", "running_var"):
                delattr(self, leaf)
                self.register_buffer(leaf, block(state[f"{name}.{leaf}"], freed))
                self.places[leaf] = (f"{name}.{leaf}", freed, None)

    def forward(self, kept: Tensor, freed: Tensor | None) -> Halves:
        if self.affine is not None:
            kept = torch.addcmul(self.shift, kept, self.scale)
        if freed is None:
            return kept, None
        freed = F.batch_norm(
            *(freed, self.running_mean, self.running_var, self.weight, self.bias),
            *(self.training, self.momentum, self.eps),
        )
        return kept, freed


class TwinHead(Part):
    """The classifier: the prior's logits, and the student's, which add what it reads of freed."""

    kept_weight: Tensor

    def __init__(
        self, name: str, linear: nn.Linear, state: dict[str, Tensor], columns: np.ndarray
    ) -> None:
        super().__init__()
        kept, freed = split(columns)
        rows = np.arange(linear.out_features)
        self.register_buffer("kept_weight", block(linear.weight, rows, kept))
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("kept_bias", bias)
        self.take("weight", state, f"{name}.weight", rows, freed)

    def forward(self, kept: Tensor, freed: Tensor | None) -> Halves:
        assert freed is not None
        taught = F.linear(kept, self.kept_weight, cast("Tensor | None", self.kept_bias))
        return taught, taught + F.linear(freed, cast(Tensor, self.weight))


def split(freed: np.ndarray) -> tuple[Positions, Positions]:
    """Return the positions at which a mask of freed channels is false, and true."""
    return np.flatnonzero(~freed), np.flatnonzero(freed)


def _padding(conv: nn.Conv2d) -> list[int]:
    assert not isinstance(conv.padding, str)
    return list(conv.padding)

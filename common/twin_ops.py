"""The layers of a twin, each in two halves.

Kept channels are computed from kept ones, as the prior does; freed channels from both, with
gradients for freed filters alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.filters import Positions
from common.twin_sum import CHANNELS_LAST, NARROW, FreedSum


class Halves(NamedTuple):
    """A value split along its channels: the kept ones, and the freed ones if there are any.

    The kept ones are None in a pass that has them from a cache.
    """

    kept: Tensor | None
    freed: Tensor | None


@dataclass
class Pass:
    """What all parts of a twin do in one pass.

    Attributes
    ----------
    half : {"both", "kept", "freed"}
        ``kept``: the prior alone, and what freed filters would read of it is noted; ``freed``:
        the freed part alone, on what was noted.
    noted : list of Tensor
        In the order in which the parts read them.
    again : bool
        The pass repeats another, for its backward pass: statistics have been counted.
    """

    half: Literal["both", "kept", "freed"] = "both"
    noted: list[Tensor] = field(default_factory=list)
    again: bool = False


class Part(nn.Module):
    """A layer with freed filters, which knows where its tensors belong in the dense net.

    Attributes
    ----------
    own : dict of str to Tensor
        Its trained tensors; the twin points them at its flat parameters.
    places : dict of str to (str, rows, columns or None)
        For each of them, and for its running statistics: the dense tensor's name and the
        positions on its axes 0 and 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pass_ = Pass()
        self.own: dict[str, Tensor] = {}
        self.places: dict[str, tuple[str, Positions, Positions | None]] = {}

    def take(
        self,
        leaf: str,
        tensor: str,
        source: Tensor,
        rows: Positions,
        columns: Positions | None = None,
    ) -> None:
        """Make a trained tensor of the part from a slice of a dense one."""
        self.own[leaf] = block(source, rows, columns)
        self.places[leaf] = (tensor, rows, columns)

    def read(self, kept: Tensor | None) -> Tensor:
        """Return the kept channels that freed filters read; they are noted, or were."""
        if self.pass_.half == "freed":
            return self.pass_.noted.pop(0)
        assert kept is not None
        if self.pass_.half == "kept":
            self.pass_.noted.append(kept)
        return kept


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
        joint = joint.to(conv.weight.device, memory_format=CHANNELS_LAST)
        joint[: self.kept] = kept
        joint_bias = torch.zeros(len(rows)).to(joint)
        joint_bias[: self.kept] = shift
        self.register_buffer("joint", joint)
        self.register_buffer("joint_bias", joint_bias)
        if len(freed_rows):
            self.take("from_kept", weight, conv.weight, freed_rows, kept_columns)
            if len(freed_columns):
                self.take("from_freed", weight, conv.weight, freed_rows, freed_columns)
            if conv.bias is not None:
                self.take("bias", f"{name}.bias", conv.bias, freed_rows)

    def forward(self, kept: Tensor | None, freed: Tensor | None) -> Halves:
        """Map both halves of the input to both of the output."""
        if kept is not None:  # once, and not for each convolution
            kept = kept.contiguous(memory_format=CHANNELS_LAST)
        if not self.own:
            return Halves(None if kept is None else self._convolve(kept), None)
        from_kept, bias = self.own["from_kept"], self.own.get("bias")
        kept = self.read(kept)
        if self.pass_.half == "kept":
            return Halves(self._convolve(kept, self.kept), None)
        with torch.no_grad():
            if self.pass_.half == "freed":
                prior, partial = None, F.conv2d(kept, from_kept, bias, *self.conv)
            else:
                self.joint[self.kept :] = from_kept
                if bias is not None:
                    self.joint_bias[self.kept :] = bias
                both = self._convolve(kept)
                prior, partial = both[:, : self.kept], both[:, self.kept :]
        mine = FreedSum.apply(  # type: ignore[no-untyped-call]
            *(partial, kept, freed, from_kept, self.own.get("from_freed"), bias, self.conv)
        )
        return Halves(prior, cast(Tensor, mine))

    def _convolve(self, kept: Tensor, filters: int | None = None) -> Tensor:
        return F.conv2d(kept, self.joint[:filters], self.joint_bias[:filters], *self.conv)


class TwinDepthwise(Part):
    """A depthwise convolution: each channel reads itself alone."""

    kept_weight: Tensor
    kept_bias: Tensor

    def __init__(
        self,
        name: str,
        conv: nn.Conv2d,
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
        if len(freed_rows):
            self.take("weight", f"{name}.weight", conv.weight, freed_rows)
            if conv.bias is not None:
                self.take("bias", f"{name}.bias", conv.bias, freed_rows)

    def forward(self, kept: Tensor | None, freed: Tensor | None) -> Halves:
        """Map both halves of the input to both of the output."""
        if kept is not None:
            kept = F.conv2d(kept, self.kept_weight, self.kept_bias, *self.conv, kept.shape[1])
        if freed is None:
            return Halves(kept, None)
        return Halves(
            kept,
            F.conv2d(freed, self.own["weight"], self.own.get("bias"), *self.conv, freed.shape[1]),
        )


class TwinNorm(Part):
    """BatchNorm: running statistics for kept channels, the batch's for freed ones in training."""

    affine: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(
        self,
        name: str,
        norm: nn.BatchNorm2d,
        channels: np.ndarray,
        *,
        folded: bool,
    ) -> None:
        super().__init__()
        kept, freed = split(channels)
        self.register_buffer("affine", None)
        if not folded:
            scale, shift = fold(norm, kept)
            both = torch.stack([scale, shift]).to(norm.weight.dtype)
            self.register_buffer("affine", both[:, :, None, None])
        self.register_buffer("running_mean", None)
        self.register_buffer("running_var", None)
        self.eps = norm.eps
        self.momentum = 0.1 if norm.momentum is None else norm.momentum
        if len(freed):
            self.take("weight", f"{name}.weight", norm.weight, freed)
            self.take("bias", f"{name}.bias", norm.bias, freed)
            for leaf in ("running_mean", "running_var"):
                self.register_buffer(leaf, block(getattr(norm, leaf), freed))
                self.places[leaf] = (f"{name}.{leaf}", freed, None)

    def forward(self, kept: Tensor | None, freed: Tensor | None) -> Halves:
        """Map both halves of the input to both of the output."""
        if self.affine is not None and kept is not None:
            kept = torch.addcmul(self.affine[1], kept, self.affine[0])
        if freed is None:
            return Halves(kept, None)
        if freed.shape[1] < NARROW:
            freed = freed.contiguous()
        mean, var = self.running_mean, self.running_var
        if self.pass_.again:  # they have counted this batch
            mean, var = (None if t is None else t.clone() for t in (mean, var))
        freed = F.batch_norm(
            *(freed, mean, var, self.own["weight"], self.own["bias"]),
            *(self.training, self.momentum, self.eps),
        ).contiguous(memory_format=CHANNELS_LAST)
        return Halves(kept, freed)


class TwinHead(Part):
    """The classifier: the prior's logits, and the student's, which add what it reads of freed."""

    kept_weight: Tensor

    def __init__(self, name: str, linear: nn.Linear, columns: np.ndarray) -> None:
        super().__init__()
        kept, freed = split(columns)
        rows = np.arange(linear.out_features)
        self.register_buffer("kept_weight", block(linear.weight, rows, kept))
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("kept_bias", bias)
        self.take("weight", f"{name}.weight", linear.weight, rows, freed)

    def forward(self, kept: Tensor | None, freed: Tensor | None) -> Halves:
        """Map both halves of the input to both of the output."""
        bias = cast("Tensor | None", self.kept_bias)
        taught = F.linear(self.read(kept), self.kept_weight, bias)
        if self.pass_.half == "kept":
            return Halves(taught, None)
        assert freed is not None
        return Halves(taught, taught + F.linear(freed, self.own["weight"]))


def split(freed: np.ndarray) -> tuple[Positions, Positions]:
    """Return the positions at which a mask of freed channels is false, and true."""
    return np.flatnonzero(~freed), np.flatnonzero(freed)


def _padding(conv: nn.Conv2d) -> list[int]:
    assert not isinstance(conv.padding, str)
    return list(conv.padding)

"""Follow a net's channels through its torch.fx graph and build its twin's operations.

Every value of the twin is a pair of tensors, kept and freed channels, each in the order in which
the net has them. Which channel of which value is freed follows from the filter graph's table at
the convolutions, and from the operation everywhere else.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from common.errors import NetError
from common.filters import FilterGraph, Freed, FreeSet, freed_index
from common.state import read_state
from common.twin_ops import Halves, TwinConv, TwinDepthwise, TwinHead, TwinNorm


class TwinUnsupported(NetError):  # noqa: N818  (says what it is; callers fall back on it)
    """The net does something that a twin cannot follow: train it with masks instead."""


@dataclass(frozen=True)
class Op:
    """One operation: computes value `number` by `run` from the values that `args` refer to.

    `run` gets what the net's own function would, with a pair for every tensor. `done` are the
    values that no later operation needs.
    """

    number: int
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    done: tuple[int, ...]


@dataclass(frozen=True)
class Ref:
    """A value, by its number, among an operation's arguments."""

    number: int


def resolve(argument: Any, values: dict[int, Any]) -> Any:
    """Return `argument` with every `Ref` in it replaced by its value."""
    if isinstance(argument, Ref):
        return values[argument.number]
    if isinstance(argument, tuple | list):
        return type(argument)(resolve(item, values) for item in argument)
    return argument


# Of each: what it does to one half it does to each channel for itself.
_CHANNELWISE_MODULES = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU),
    *(
        nn.Hardswish,
        nn.Mish,
        nn.Tanh,
        nn.Softsign,
        nn.MaxPool2d,
        nn.AvgPool2d,
        nn.AdaptiveAvgPool2d,
    ),
    *(nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.UpsamplingNearest2d),
)
_CHANNELWISE = {
    *(F.relu, torch.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish),
    *(F.mish, torch.tanh, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    *(F.adaptive_max_pool2d, "relu", "tanh", "contiguous"),
}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul"}
_FLATTEN = {torch.flatten, "flatten"}
_RESHAPE = {"view", "reshape", torch.reshape}
_SHAPES = {"size", getattr, operator.getitem}
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class Builder(fx.Interpreter):
    """Runs the traced net on an example, in pairs, and notes each operation.

    The example gives the shapes; `ops` are the operations, `parts` the twin's layers by name.
    """

    def __init__(self, net: nn.Module, graph: FilterGraph, free: FreeSet) -> None:
        super().__init__(trace(net), garbage_collect_values=False)
        self._net, self._head = net, graph.head
        self._modules_by_name = dict(net.named_modules())
        self._state = {k: v for k, v in net.state_dict().items() if v.is_floating_point()}
        self._freed = freed_index(graph, free)
        self._numbers = {node: i for i, node in enumerate(self.module.graph.nodes)}
        self._folded: set[fx.Node] = set()
        self._masks: dict[fx.Node, np.ndarray] = {}
        self.parts: dict[str, nn.Module] = {}
        self.ops: list[Op] = []


"""
"""

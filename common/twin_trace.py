"""Follow a net's channels through its torch.fx graph and build its twin's operations.

Every value of the twin is a pair of tensors, kept and freed channels, each in the order in which
the net has them. Which channels are freed follows from the filter graph's table where a
convolution writes, and from the operation everywhere else.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from common.errors import NetError
from common.filters import FilterGraph, FreeSet, freed_index
from common.twin_ops import Halves, Part, TwinConv, TwinDepthwise, TwinHead, TwinNorm
from common.twin_run import Op, Ref, cat, filled, on_halves


class TwinUnsupported(NetError):  # noqa: N818
    """The net does what a twin cannot follow: train it with masks instead."""


# What these do to a tensor they do to each channel for itself.
_CHANNELWISE = {
    *(nn.Identity, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish),
    *(nn.Tanh, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(F.hardtanh, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.mish, torch.tanh),
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, "tanh"),
    *(operator.mul, torch.mul, "mul"),
}
_SUMS = {operator.add, operator.iadd, torch.add, "add"}
_RECTIFIERS: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, "relu"), F.relu),
    **dict.fromkeys((nn.ReLU6, F.relu6), F.relu6),
}
_MEANS = {torch.mean, "mean"}
_FLATTEN = {nn.Flatten, torch.flatten, "flatten"}
_RESHAPE = {torch.reshape, "view", "reshape"}
_SHAPES = {getattr, "size"}
_DROPOUT = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, F.dropout, F.dropout2d}


class Builder:
    """Traces a net and runs it once on `example`, in pairs, noting each operation.

    Attributes
    ----------
    ops : list of Op
        In the order of the net; see `common.twin_run`.
    parts : dict of str to Part
        The twin's layers, by the names that they have in the net.
    logits : Halves
        The prior's and the student's on the example, in eval mode.
    """

    def __init__(self, net: nn.Module, graph: FilterGraph, free: FreeSet, example: Tensor) -> None:
        nodes = _trace(net)
        self.ops: list[Op] = []
        self.parts: dict[str, Part] = {}
        self._batch = len(example)
        self._head = graph.head
        self._modules = dict(net.named_modules())
        self._freed = freed_index(graph, free)
        self._folded: set[str] = set()
        self._fresh: set[fx.Node] = set()
        self._live = {0}
        self._sizes: list[tuple[int, bool]] = []
        self._masks = {nodes[0]: np.zeros(example.shape[1], bool)}
        numbers = {node: number for number, node in enumerate(nodes)}
        last = {source: node for node in nodes for source in node.all_input_nodes}
        values: dict[int, Any] = {0: Halves(example, None)}
        for node in nodes[1:]:
            run = self._run(node)
            args, kwargs = _with_refs((node.args, node.kwargs), numbers)
            done = tuple(numbers[s] for s in node.all_input_nodes if last[s] is node)
            self.ops.append(Op(numbers[node], run, tuple(args), dict(kwargs), done))
            try:
                value = run(*filled(tuple(args), values), **filled(dict(kwargs), values))
            except (RuntimeError, TypeError, ValueError) as error:
                line = " ".join(str(error).split())
                raise TwinUnsupported(f"{_called(node)} cannot be split: {line}") from error
            kept = value.kept if isinstance(value, Halves) else None
            if isinstance(value, Tensor) or not isinstance(kept, Tensor | None):
                raise TwinUnsupported(f"{_called(node)} does not give one tensor of channels")
            values[numbers[node]] = value
            self._note(node, value, done)
            if isinstance(value, Halves) and node.target != self._head:
                self._masks[node] = self._mask(node, value)
        self.logits: Halves = values[numbers[nodes[-1]]]

    def cuts(self, parts: int) -> list[int]:
        """Return after how many operations to cut, so that each part holds as much as any other.

        What they hold is what the backward pass needs. Only one value may be passed on at a cut:
        where there is no such place, there are fewer parts.
        """
        total = sum(size for size, _ in self._sizes)
        so_far, found = 0, list[int]()
        for count, (size, alone) in enumerate(self._sizes[:-1], 1):
            so_far += size
            if alone and so_far >= total * (len(found) + 1) / parts:
                found.append(count)
        return found[: parts - 1]

    def _note(self, node: fx.Node, value: Any, done: tuple[int, ...]) -> None:
        """Note what an operation adds to the memory, and whether others are needed after it."""
        number = self.ops[-1].number
        self._live = (self._live | {number}) - set(done)
        size = 0
        if isinstance(self.parts.get(str(node.target)), TwinConv | TwinDepthwise):
            size = sum(half.numel() for half in value if half is not None)
        overwritten = any(user in self._fresh for user in node.users) or any(
            _kind(user, self._modules) in _RECTIFIERS for user in node.users
        )
        whole = isinstance(value, Halves) and value.freed is not None
        self._sizes.append((size, whole and self._live == {number} and not overwritten))

    def _run(self, node: fx.Node) -> Callable[..., Any]:
        """Return what computes `node`."""
        if node.op not in ("call_module", "call_function", "call_method"):
            raise TwinUnsupported(f"the net's forward pass uses {node.op} {node.target!r}")
        module = self._modules[str(node.target)] if node.op == "call_module" else None
        kind = _kind(node, self._modules)
        sources = node.all_input_nodes
        if kind in _DROPOUT:
            if _dropped(node, module):
                raise TwinUnsupported(f"{_called(node)} drops kept channels, which a twin does not")
            return lambda x, *_, **__: x
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            part = self._part(node, module)
            if part is not None:
                self.parts[str(node.target)] = part.eval()
                self._fresh.add(node)
                return lambda x: part(*x)
        if kind in _RECTIFIERS:
            return self._rectify(node, _RECTIFIERS[kind])
        if kind in _SHAPES:
            function = _function(node, module)
            return lambda x, *args: function(_either(x), *args)
        if kind is torch.cat:
            if _argument(node, 1, "dim", 0) != 1:
                raise TwinUnsupported(f"{_called(node)} does not join channels")
            return cat
        if len({self._masks[s].tobytes() for s in sources if s in self._masks}) > 1:
            raise TwinUnsupported(f"{_called(node)} joins values whose freed channels differ")
        if kind in _SUMS:
            self._fresh.add(node)
            return on_halves(torch.add)
        known = kind in _CHANNELWISE | _FLATTEN | _RESHAPE or (
            kind in _MEANS and {d % 4 for d in _dims(node)} == {2, 3}
        )
        if not known and any(self._masks[s].any() for s in sources if s in self._masks):
            raise TwinUnsupported(f"{_called(node)} does to freed filters what is not known")
        return on_halves(_function(node, module))

    def _part(self, node: fx.Node, module: nn.Conv2d | nn.BatchNorm2d | nn.Linear) -> Part | None:
        name, read = str(node.target), self._masks[node.all_input_nodes[0]]
        own, out = self._freed.own.get(f"{name}.weight"), self._freed.out.get(f"{name}.weight")
        norm = None
        if isinstance(module, nn.Conv2d):
            norm = self._norm_behind(node)
        if isinstance(module, nn.BatchNorm2d) or (
            isinstance(module, nn.Conv2d) and module.groups > 1
        ):
            expected = _as_mask(own, len(module.weight))
        else:
            expected = _as_mask(out, module.weight.shape[1])
        if not np.array_equal(read, expected):
            raise TwinUnsupported(f"the freed channels that reach {name!r} are not the graph's")
        if isinstance(module, nn.BatchNorm2d):
            return TwinNorm(name, module, read, folded=name in self._folded)
        if isinstance(module, nn.Linear):
            return TwinHead(name, module, read) if name == self._head else None
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise TwinUnsupported(f"{_called(node)} has a padding that a twin does not know")
        if module.groups > 1:
            return TwinDepthwise(name, module, read, norm)
        return TwinConv(name, module, _as_mask(own, len(module.weight)), read, norm)

    def _norm_behind(self, node: fx.Node) -> nn.BatchNorm2d | None:
        """Return the BN that alone reads a convolution, which then takes it over."""
        user = next(iter(node.users))
        norm = self._modules[str(user.target)] if user.op == "call_module" else None
        if len(node.users) > 1 or not isinstance(norm, nn.BatchNorm2d):
            return None
        self._folded.add(str(user.target))
        return norm

    def _rectify(self, node: fx.Node, function: Callable[..., Tensor]) -> Callable[..., Any]:
        source = node.all_input_nodes[0]
        alone = source in self._fresh and len(source.users) == 1

        def run(x: Halves, *_: Any, **__: Any) -> Halves:
            kept = x.kept
            if kept is not None:
                # What is a slice of a convolution's output becomes one piece by the way.
                whole = alone and kept.is_contiguous(memory_format=torch.channels_last)
                kept = function(kept, inplace=whole)
            return Halves(kept, None if x.freed is None else function(x.freed, inplace=alone))

        return run

    def _mask(self, node: fx.Node, value: Halves) -> np.ndarray:
        """Return which channels of a value are freed."""
        assert value.kept is not None
        kept = value.kept.shape[1]
        freed = 0 if value.freed is None else value.freed.shape[1]
        own = self._freed.own.get(f"{node.target}.weight")
        masks = [self._masks[s] for s in node.all_input_nodes if s in self._masks]
        if node.target is torch.cat:
            mask = np.concatenate(masks)
        elif isinstance(self.parts.get(str(node.target)), TwinConv):
            mask = _as_mask(own, kept + freed)
        elif masks[0].any():
            mask = np.repeat(masks[0], (kept + freed) // len(masks[0]))
        else:
            mask = np.zeros(kept, bool)
        if len(value.kept) != self._batch or (len(mask) - mask.sum(), mask.sum()) != (kept, freed):
            raise TwinUnsupported(f"{_called(node)} mixes channels or images")
        return mask


def _trace(net: nn.Module) -> list[fx.Node]:
    """Return the net's nodes from its input to its classifier, as they are in training."""
    modes = [(module, module.training) for module in net.modules()]
    net.train()
    try:
        nodes = list(fx.Tracer().trace(net).nodes)
    except Exception as error:  # a user's net may do anything
        line = " ".join(str(error).split())
        raise TwinUnsupported(f"the net cannot be traced: {line}") from error
    finally:
        for module, training in modes:
            module.training = training
    output = nodes.pop()
    if [node.op for node in nodes].count("placeholder") != 1 or output.args[0] is not nodes[-1]:
        raise TwinUnsupported("the net does not map one input to the output of its classifier")
    return nodes


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    return type(modules[str(node.target)]) if node.op == "call_module" else node.target


def _either(x: Any) -> Any:
    if not isinstance(x, Halves):
        return x
    return x.freed if x.kept is None else x.kept


def _with_refs(argument: Any, numbers: dict[fx.Node, int]) -> Any:
    refer: Any = lambda node: Ref(numbers[node])  # noqa: E731  (fx's types know no other values)
    return fx.map_arg(argument, refer)


def _function(node: fx.Node, module: nn.Module | None) -> Callable[..., Any]:
    if module is not None:
        return copy.deepcopy(module).eval().requires_grad_(False)
    if isinstance(node.target, str):
        # The halves are channels-last, which view may refuse.
        name = "reshape" if node.target == "view" else node.target
        return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)
    return node.target


def _as_mask(positions: np.ndarray | None, size: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    if positions is not None:
        mask[positions] = True
    return mask


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _dims(node: fx.Node) -> tuple[int, ...]:
    dims = _argument(node, 1, "dim", ())
    return (dims,) if isinstance(dims, int) else tuple(dims)


def _dropped(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(module.p)
    return bool(_argument(node, 1, "p", 0.5)) and bool(_argument(node, 2, "training", True))


def _called(node: fx.Node) -> str:
    return f"{node.op.removeprefix('call_')} {getattr(node.target, '__name__', node.target)!r}"

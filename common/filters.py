"""The filter groups of a Conv+BN net as plain data, and what can be done to them.

A *layer* is a set of channels that can only be freed together, over all convolutions that write
to them: residual additions couple these, depthwise convolutions inherit their input's. Channel i
of a layer is the *filter group* (layer, i). Its *slots* say which positions of which tensors
belong to it: its ``own`` rows (convolution, bias, BatchNorm) and the ``out`` slices through which
other modules read it. Torch-Pruning's dependency graph (Fang et al., "DepGraph", CVPR 2023) finds
them once; from then on nothing but this table is used.

    graph = FilterGraph.build(net, (3, 32, 32))
    free = choose(graph, bn_scale(net, graph), share=0.3)        # common.importance
    switch_off(net, graph, free)                                 # scales and shifts to zero
    slim = cut(net, graph, free)                                 # computes the same, is smaller
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import NetError, StoreError

Role = Literal["own", "out"]
Kind = Literal["weight", "bias", "scale", "shift", "mean", "var"]
Positions = NDArray[np.int64]

BN_KINDS: dict[str, Kind] = {
    "weight": "scale",
    "bias": "shift",
    "running_mean": "mean",
    "running_var": "var",
}


@dataclass(frozen=True)
class Slot:
    """One axis of one tensor that belongs to a layer.

    Attributes
    ----------
    tensor : str
        Name in the net's state dict.
    axis : int
        0 with role ``own`` (the filters' convolution rows, biases, BatchNorm entries; a depthwise
        convolution's rows too), 1 with role ``out`` (slices through which others read them).
    kind : str
        What the tensor is: ``weight``, ``bias``, or BatchNorm's ``scale``, ``shift``, ``mean``,
        ``var``.
    channels, index : tuple of int
        Channel ``channels[k]`` of the layer owns position ``index[k]`` of the axis; ``index``
        ascends. They differ after a flatten or a concatenation.
    """

    tensor: str
    axis: int
    role: Role
    kind: Kind
    channels: tuple[int, ...]
    index: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A coupled set of `width` channels, named after its first convolution in module order."""

    name: str
    width: int
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class FilterGraph:
    """All layers of a net.

    Attributes
    ----------
    layers : tuple of Layer
        In module order. The image's channels and the logits belong to none.
    input_shape : (int, int, int)
        Channels, height, width of the images it was built for.
    head : str
        Name of the ``nn.Linear`` whose output is the logits.
    """

    layers: tuple[Layer, ...]
    input_shape: tuple[int, int, int]
    head: str

    @classmethod
    def build(cls, net: nn.Module, input_shape: tuple[int, int, int]) -> Self:
        """Find the filter groups of `net`, which is left as it is.

        At the end, a copy of the net with random weights is checked in float64: with random
        filters of all layers switched off, it computes what it does with them cut out.

        Parameters
        ----------
        net : nn.Module
            Convolutions and ``BatchNorm2d``, ending in an ``nn.Linear``.
        input_shape : (int, int, int)
            Channels, height, width of an image.

        Raises
        ------
        NetError
            The net's filters cannot be freed; names the module and the reason.
        """
        # Needed once a net, and slow to import: a graph read from JSON does without.
        from common.tracing import check_cut, find_layers

        layers, head = find_layers(net, input_shape)
        graph = cls(layers, input_shape, head)
        check_cut(net, graph)
        return graph

    def layer(self, name: str) -> Layer:
        """Return the layer called `name`."""
        try:
            return self._by_name[name]
        except KeyError:
            known = ", ".join(self._by_name)
            raise NetError(f"layer {name!r} is not in the filter graph; it has {known}") from None

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @property
    def count(self) -> int:
        """Number of filter groups."""
        return sum(layer.width for layer in self.layers)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the JSON form, in hex."""
        return _sha256(self.to_json())

    def to_json(self) -> str:
        """Return the canonical JSON form; ``range(n)`` is written as the number n."""
        layers = [
            {"name": layer.name, "width": layer.width, "slots": [_pack(s) for s in layer.slots]}
            for layer in self.layers
        ]
        return _canonical({"head": self.head, "input_shape": self.input_shape, "layers": layers})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; `StoreError` if it is malformed."""
        try:
            data = json.loads(text)
            layers = tuple(
                Layer(x["name"], int(x["width"]), tuple(_unpack(s) for s in x["slots"]))
                for x in data["layers"]
            )
            channels, height, width = data["input_shape"]
            graph = cls(layers, (channels, height, width), data["head"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"filter graph is malformed: {error!r}; write it again") from error
        if json.loads(graph.to_json()) != data:
            raise StoreError("filter graph is malformed: unknown or unsorted parts; write it again")
        return graph


@dataclass(frozen=True)
class FreeSet:
    """The filter groups freed in a step: the ascending channels of each layer, by layer name."""

    channels: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        plain = {
            name: tuple(sorted({int(channel) for channel in channels}))
            for name, channels in sorted(self.channels.items())
            if len(channels) > 0
        }
        object.__setattr__(self, "channels", plain)

    @property
    def count(self) -> int:
        """Number of freed filter groups."""
        return sum(len(channels) for channels in self.channels.values())

    @property
    def empty(self) -> bool:
        """Whether nothing is freed."""
        return not self.channels

    def share(self, graph: FilterGraph) -> float:
        """Return the freed part of all filter groups, 0 to 1."""
        return self.count / graph.count

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the JSON form, in hex."""
        return _sha256(self.to_json())

    def to_json(self) -> str:
        """Return the canonical JSON form."""
        return _canonical(self.channels)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; `StoreError` if it is malformed."""
        try:
            data = json.loads(text)
            free = cls(dict(data))
        except (ValueError, TypeError) as error:
            raise StoreError(f"free set is malformed: {error!r}; write it again") from error
        if json.loads(free.to_json()) != data:
            raise StoreError("free set is malformed: channels are not ascending; write it again")
        return free


def union(*sets: FreeSet) -> FreeSet:
    """Return the filter groups that any of the sets has."""
    channels: dict[str, tuple[int, ...]] = {}
    for free in sets:
        for name, some in free.channels.items():
            channels[name] = (*channels.get(name, ()), *some)
    return FreeSet(channels)


def common_part(one: FreeSet, other: FreeSet) -> FreeSet:
    """Return the filter groups that both sets have."""
    return FreeSet(
        {
            name: tuple(set(some) & set(other.channels.get(name, ())))
            for name, some in one.channels.items()
        }
    )


def portion(free: FreeSet, parts: int) -> tuple[FreeSet, FreeSet]:
    """Return one of so many equal parts of every layer's groups, and the rest.

    The part is every `parts`-th channel, so that it says nothing about where the channels stand.
    """
    part = {name: some[::parts] for name, some in free.channels.items()}
    rest = {
        name: tuple(channel for i, channel in enumerate(some) if i % parts)
        for name, some in free.channels.items()
    }
    return FreeSet(part), FreeSet(rest)


@dataclass(frozen=True)
class Freed:
    """Where a free set is in a net's tensors: ascending positions by tensor name.

    ``own[name]`` are positions on axis 0 (the freed filters themselves), ``out[name]`` on axis 1
    (the slices through which others read them). Depthwise weights are only in ``own``, the
    classifier's only in ``out``.
    """

    own: dict[str, Positions]
    out: dict[str, Positions]


def freed_index(graph: FilterGraph, free: FreeSet) -> Freed:
    """Return the positions of a free set in the net's tensors."""
    own: dict[str, list[Positions]] = {}
    out: dict[str, list[Positions]] = {}
    for slot, positions in _freed_slots(graph, free):
        (own if slot.role == "own" else out).setdefault(slot.tensor, []).append(positions)
    return Freed(
        {name: np.unique(np.concatenate(parts)) for name, parts in own.items()},
        {name: np.unique(np.concatenate(parts)) for name, parts in out.items()},
    )


def cut(net: nn.Module, graph: FilterGraph, free: FreeSet) -> nn.Module:
    """Return a deep copy of `net` without the freed filter groups.

    It computes what `net` does if the groups are switched off (see `switch_off`).

    Raises
    ------
    NetError
        The free set does not belong to the graph, or leaves a layer without filters.
    """
    for name, channels in free.channels.items():
        if len(channels) == graph.layer(name).width:
            raise NetError(f"layer {name!r} would be cut to zero filters: free fewer of them")
    freed = freed_index(graph, free)
    slim = copy.deepcopy(net)
    touched = set()
    for axis, places in enumerate((freed.own, freed.out)):
        for name, positions in places.items():
            owner, _, leaf = name.rpartition(".")
            module = slim.get_submodule(owner)
            _remove(module, leaf, axis, positions)
            touched.add(module)
    for module in touched:
        _resize(module)
    return slim


def switch_off(net: nn.Module, graph: FilterGraph, free: FreeSet) -> None:
    """Set the BatchNorm scales and shifts of the freed groups to zero, in place."""
    tensors = dict(net.named_parameters())
    with torch.no_grad():
        for slot, positions in _freed_slots(graph, free):
            if slot.kind in ("scale", "shift"):
                tensors[slot.tensor][torch.from_numpy(positions)] = 0.0


def is_off(net: nn.Module, graph: FilterGraph, free: FreeSet) -> bool:
    """Whether all BatchNorm scales and shifts of the freed groups are exactly zero."""
    tensors = dict(net.named_parameters())
    return all(
        not tensors[slot.tensor][torch.from_numpy(positions)].any()
        for slot, positions in _freed_slots(graph, free)
        if slot.kind in ("scale", "shift")
    )


def parameter_count(net: nn.Module) -> int:
    """Return the number of trainable and frozen parameters (no buffers)."""
    return sum(parameter.numel() for parameter in net.parameters())


def _freed_slots(graph: FilterGraph, free: FreeSet) -> Iterator[tuple[Slot, Positions]]:
    for name, channels in free.channels.items():
        layer = graph.layer(name)
        if channels[0] < 0 or channels[-1] >= layer.width:
            raise NetError(
                f"free set names channel {channels[-1] if channels[0] >= 0 else channels[0]} "
                f"of layer {name!r}, which has {layer.width}: it belongs to another net"
            )
        for slot in layer.slots:
            positions = np.asarray(slot.index, np.int64)[np.isin(slot.channels, channels)]
            if len(positions) > 0:
                yield slot, positions


def _remove(module: nn.Module, leaf: str, axis: int, positions: Positions) -> None:
    old: Tensor = getattr(module, leaf)
    keep = torch.ones(old.shape[axis], dtype=torch.bool)
    keep[torch.from_numpy(positions)] = False
    new = old.detach().index_select(axis, keep.nonzero().flatten().to(old.device))
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, leaf, new)


def _resize(module: nn.Module) -> None:
    """Make the module's attributes agree with its tensors, for exporters and for `repr`."""
    if isinstance(module, nn.Conv2d):
        module.out_channels = module.weight.shape[0]
        if module.groups > 1:
            module.groups = module.out_channels
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = module.weight.shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def _pack(slot: Slot) -> dict[str, Any]:
    packed = dict(vars(slot))
    for field in ("channels", "index"):
        values: tuple[int, ...] = packed[field]
        if values == tuple(range(len(values))):
            packed[field] = len(values)
    return packed


def _unpack(data: dict[str, Any]) -> Slot:
    both = {
        field: tuple(range(data[field])) if isinstance(data[field], int) else tuple(data[field])
        for field in ("channels", "index")
    }
    return Slot(**{**data, **both})


def _canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

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
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
import torch_pruning as tp
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import NetError, StoreError

Role = Literal["own", "out"]
Kind = Literal["weight", "bias", "scale", "shift", "mean", "var"]
Positions = NDArray[np.int64]

_BN_KINDS: dict[str, Kind] = {
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
        _check_modules(net)
        probe = copy.deepcopy(net).cpu().eval().requires_grad_()
        dtype = next(probe.parameters()).dtype
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Torch-Pruning's own; what matters is checked below
            example = torch.zeros(1, *input_shape, dtype=dtype)
            head = _trace(probe, example)
            dependencies = tp.DependencyGraph()
            dependencies.build_dependency(probe, (example,), verbose=False)
            layers = _find_layers(probe, dependencies)
        graph = cls(layers, input_shape, head)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            _check_cut(copy.deepcopy(net).cpu().eval().double(), graph)
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


def _check_modules(net: nn.Module) -> None:
    """Refuse what no graph is needed to see."""
    seen: dict[Tensor, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        if parameter in seen:
            raise NetError(
                f"{seen[parameter]!r} and {name!r} are one shared tensor: give each its own"
            )
        seen[parameter] = name
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not _depthwise(module):
            raise NetError(
                f"convolution {name!r} is grouped ({module.groups} groups over "
                f"{module.in_channels} -> {module.out_channels} channels): only depthwise ones "
                "(groups = in = out) can be followed"
            )
        if isinstance(module, nn.BatchNorm2d):
            if not module.affine:
                raise NetError(f"BatchNorm {name!r} has affine=False: it needs scale and shift")
            if not module.track_running_stats:
                raise NetError(
                    f"BatchNorm {name!r} has track_running_stats=False: it needs mean and variance"
                )


def _depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def _trace(net: nn.Module, example: Tensor) -> str:
    """Run the net once and return the name of the linear layer that makes the logits."""
    calls: dict[str, int] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, nn.Linear):
                outputs[name] = output

        return hook

    watched = [
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    ]
    handles = [module.register_forward_hook(record(name)) for name, module in watched]
    try:
        logits = net(example)
    except Exception as error:  # a user's net may raise anything
        line = " ".join(str(error).split())
        raise NetError(
            f"the net cannot compute an image of shape {tuple(example.shape[1:])}: {line}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for name, module in watched:
        times = calls.get(name, 0)
        if times != 1:
            raise NetError(
                f"{type(module).__name__} {name!r} is run {times} times in a forward pass: "
                "use it exactly once, or remove it"
            )
    for name, output in outputs.items():
        if output is logits and output.dim() == 2:
            return name
    raise NetError("the net's output is not that of an nn.Linear: end it in a linear classifier")


def _find_layers(net: nn.Module, dependencies: Any) -> tuple[Layer, ...]:
    convs = {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    claimed: dict[tuple[str, int], set[int]] = {}
    layers: list[Layer] = []
    for name, conv in convs.items():
        rows = claimed.get((f"{name}.weight", 0), set())
        if rows or _depthwise(conv):
            continue
        if conv not in dependencies.module2node:
            raise NetError(
                f"convolution {name!r} has no part in the logits (unused, detached or under "
                "no_grad): remove it, or keep it in the graph"
            )
        layer = _find_layer(net, dependencies, name, conv)
        for slot in layer.slots:
            taken = claimed.setdefault((slot.tensor, slot.axis), set())
            if taken.intersection(slot.index):
                raise NetError(
                    f"{slot.tensor!r} belongs to layer {name!r} and to another one as well: "
                    "the way its channels are joined cannot be followed"
                )
            taken.update(slot.index)
        layers.append(layer)
    if not layers:
        raise NetError("the net has no convolution whose filters could be freed")
    for name, conv in convs.items():
        if len(claimed.get((f"{name}.weight", 0), set())) != conv.out_channels:
            reason = "reads the image itself" if _depthwise(conv) else "is joined to others in part"
            raise NetError(f"convolution {name!r} {reason}: its filters cannot be freed")
    return tuple(layers)


def _find_layer(net: nn.Module, dependencies: Any, root: str, conv: nn.Conv2d) -> Layer:
    names = {module: name for name, module in net.named_modules()}
    tensors = net.state_dict()
    order = {name: number for number, name in enumerate(tensors)}
    owners: dict[tuple[str, int, Role, Kind], dict[int, int]] = {}
    channels = list(range(conv.out_channels))
    group = dependencies.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=channels)
    for item in group.items:
        module = item.dep.target.module
        rows = dependencies.is_out_channel_pruning_fn(item.dep.handler)
        for key in _slots(module, names.get(module, ""), root, rows=rows):
            if key[0] not in order:
                raise NetError(f"{key[0]!r} of layer {root!r} is computed, not a plain parameter")
            owner = owners.setdefault(key, {})
            size = tensors[key[0]].shape[key[1]]
            for position, channel in zip(item.idxs, item.root_idxs, strict=True):
                traced = channel is not None and 0 <= position < size
                if not traced or owner.setdefault(position, channel) != channel:
                    raise NetError(
                        f"position {position} of {key[0]!r} cannot be traced to one filter of "
                        f"convolution {root!r}"
                    )
    slots = tuple(
        Slot(*key, tuple(owner[i] for i in sorted(owner)), tuple(sorted(owner)))
        for key, owner in sorted(owners.items(), key=lambda x: (order[x[0][0]], x[0][1]))
    )
    scaled = {c for slot in slots if slot.kind == "scale" for c in slot.channels}
    if len(scaled) != conv.out_channels:
        raise NetError(
            f"convolution {root!r}: {conv.out_channels - len(scaled)} of its "
            f"{conv.out_channels} channels are scaled by no BatchNorm2d, so cannot be switched off"
        )
    return Layer(root, conv.out_channels, slots)


def _slots(module: Any, name: str, root: str, *, rows: bool) -> list[tuple[str, int, Role, Kind]]:
    """List the tensors of a module that a group touches, each with axis, role and kind."""
    if isinstance(module, nn.BatchNorm2d):
        return [(f"{name}.{leaf}", 0, "own", kind) for leaf, kind in _BN_KINDS.items()]
    if isinstance(module, nn.Conv2d | nn.Linear):
        if not (rows or _depthwise(module)):
            return [(f"{name}.weight", 1, "out", "weight")]
        biased: list[tuple[str, int, Role, Kind]] = [(f"{name}.bias", 0, "own", "bias")]
        return [
            (f"{name}.weight", 0, "own", "weight"),
            *(biased if module.bias is not None else []),
        ]
    if isinstance(module, Tensor):
        raise NetError(f"a bare parameter of shape {tuple(module.shape)} is joined to {root!r}")
    if any(parameter.numel() > 1 for parameter in module.parameters()):
        raise NetError(
            f"{type(module).__name__} {name!r} works on the channels of {root!r}: "
            "only Conv2d, BatchNorm2d and Linear can be cut"
        )
    return []


def _check_cut(probe: nn.Module, graph: FilterGraph) -> None:
    """Compare switching off with cutting out, on random weights; name the layer that differs."""
    generator = torch.Generator().manual_seed(0)
    _randomise(probe, generator)
    images = torch.randn(2, *graph.input_shape, generator=generator, dtype=torch.float64)
    for divisor in (3, 2):  # two draws, lest a split into equal halves pass by chance
        parts = {}
        for layer in graph.layers:
            drawn = torch.randperm(layer.width, generator=generator)
            parts[layer.name] = tuple(drawn[: -(-layer.width // divisor)].tolist())
        parts = {name: part for name, part in parts.items() if len(part) < graph.layer(name).width}
        if _cut_is_exact(probe, graph, FreeSet(parts), images):
            continue
        alone = (
            n for n in parts if not _cut_is_exact(probe, graph, FreeSet({n: parts[n]}), images)
        )
        raise NetError(
            f"layer {next(alone, 'unknown')!r}: its channels cannot be followed to all their "
            "readers (a reshape, shuffle, split or mean over channels between?), or still reach "
            "them when their scale and shift are zero (an activation with f(0) != 0, or a "
            "convolution without BatchNorm in the sum?)"
        )


def _randomise(net: nn.Module, generator: torch.Generator) -> None:
    """Fill all tensors, lest zeros or ones hide a wrong connection."""

    def normal(shape: torch.Size, std: float) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std

    for module in net.modules():
        for parameter in module.parameters(recurse=False):
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            parameter.copy_(normal(parameter.shape, (2 / fan_in) ** 0.5))
        if isinstance(module, nn.BatchNorm2d):
            shape = module.weight.shape
            module.weight.copy_(0.5 + torch.rand(shape, generator=generator, dtype=torch.float64))
            module.bias.copy_(normal(shape, 0.5))
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(normal(shape, 0.5))
            module.running_var.copy_(
                0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
            )


def _cut_is_exact(net: nn.Module, graph: FilterGraph, free: FreeSet, images: Tensor) -> bool:
    off = copy.deepcopy(net)
    switch_off(off, graph, free)
    expected: Tensor = off(images)
    try:
        found: Tensor = cut(net, graph, free)(images)
    except Exception:  # shapes that no longer fit, in whatever way the net notices
        return False
    scale = expected.abs().max()
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-8 * scale)

"""Find the filter groups of a net, and prove that they can be cut out.

Torch-Pruning's dependency graph (Fang et al., "DepGraph", CVPR 2023) says which tensors are
coupled. It follows much and says nothing of what it does not, so the result is held against the
net itself: with random filters switched off it must compute what it does with them cut out.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from common.errors import NetError
from common.filters import BN_KINDS, FilterGraph, FreeSet, Kind, Layer, Role, Slot, cut, switch_off


def find_layers(net: nn.Module, input_shape: tuple[int, int, int]) -> tuple[tuple[Layer, ...], str]:
    """Return the layers of `net` and the name of the linear layer that makes the logits.

    Parameters and errors as for `common.filters.FilterGraph.build`.
    """
    _check_modules(net)
    probe = copy.deepcopy(net).cpu().eval().requires_grad_()
    dtype = next(probe.parameters()).dtype
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Torch-Pruning's own; what matters is checked later
        example = torch.zeros(1, *input_shape, dtype=dtype)
        head = _trace(probe, example)
        dependencies = tp.DependencyGraph()
        dependencies.build_dependency(probe, (example,), verbose=False)
        return _find_layers(probe, dependencies), head


def check_cut(net: nn.Module, graph: FilterGraph) -> None:
    """Compare switching off with cutting out, on a copy with random weights in float64.

    Raises
    ------
    NetError
        Naming the layer for which they differ.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        _compare_cut(copy.deepcopy(net).cpu().eval().double(), graph)


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
        return [(f"{name}.{leaf}", 0, "own", kind) for leaf, kind in BN_KINDS.items()]
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


def _compare_cut(probe: nn.Module, graph: FilterGraph) -> None:
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

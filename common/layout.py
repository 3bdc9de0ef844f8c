"""Which entries of which tensors a device may train, and how they are packed.

A `Layout` names the trainable entries of every tensor in one fixed order. The optimiser,
the update that travels and the server's mean all use it, so what a scope does not name can
neither be trained nor sent nor averaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from common.errors import UpdateError
from common.filters import BN_KINDS, FilterGraph, FreeSet, freed_index
from common.schedule import Scope
from common.state import State


@dataclass(frozen=True, eq=False)
class Entry:
    """Trainable entries of one tensor.

    Attributes
    ----------
    tensor : str
        Name in the net's state.
    shape : tuple of int
        The tensor's shape.
    kind : str
        ``weight``, ``scale``, ``shift``, ``mean`` or ``var``; the last two are BN statistics.
    index : int64 array [n] or None
        Flat positions in C order, ascending; None for the whole tensor.
    """

    tensor: str
    shape: tuple[int, ...]
    kind: str
    index: np.ndarray | None

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(np.prod(self.shape)) if self.index is None else len(self.index)

    @cached_property
    def positions(self) -> torch.Tensor | None:
        """`index` as a tensor."""
        return None if self.index is None else torch.from_numpy(self.index)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the entries of `tensor` as one flat vector."""
        flat = tensor.reshape(-1)
        return flat if self.positions is None else flat[self.positions.to(flat.device)]

    def write(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Set the entries of a contiguous `tensor`, in place."""
        if self.positions is None:
            tensor.copy_(values.view_as(tensor))
        else:
            tensor.view(-1)[self.positions.to(tensor.device)] = values


@dataclass(frozen=True, eq=False)
class Layout:
    """All trainable entries of a net, in the order in which they are packed."""

    scope: str
    entries: tuple[Entry, ...]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        sha = hashlib.sha256(self.scope.encode())
        for entry in self.entries:
            sha.update(f"|{entry.tensor}|{entry.shape}|{entry.kind}|".encode())
            if entry.index is not None:
                sha.update(entry.index.astype("<i8").tobytes())
        object.__setattr__(self, "digest", sha.hexdigest())

    @cached_property
    def size(self) -> int:
        """Number of packed values."""
        return sum(entry.size for entry in self.entries)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each tensor's entries begin in the packed vector."""
        starts = np.cumsum([0, *(entry.size for entry in self.entries)])
        return {e.tensor: int(s) for e, s in zip(self.entries, starts, strict=False)}

    @cached_property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Packed positions of BN means and of the variances that go with them."""
        means: list[np.ndarray] = []
        variances: list[np.ndarray] = []
        for entry in self.entries:
            if entry.kind == "mean":
                partner = entry.tensor.removesuffix("running_mean") + "running_var"
                steps = np.arange(entry.size)
                means.append(self.offsets[entry.tensor] + steps)
                variances.append(self.offsets[partner] + steps)
        empty = [np.zeros(0, np.int64)]
        return np.concatenate(means or empty), np.concatenate(variances or empty)

    def without_statistics(self) -> Layout:
        """Return the same without BN means and variances: those stay as they are."""
        learnt = (entry for entry in self.entries if entry.kind not in ("mean", "var"))
        return Layout(self.scope, tuple(learnt))

    def pack(self, state: Mapping[str, torch.Tensor]) -> np.ndarray:
        """Return the trainable entries of `state` as float32 [size]."""
        if not self.entries:
            return np.zeros(0, np.float32)
        parts = [entry.read(state[entry.tensor]) for entry in self.entries]
        packed: np.ndarray = torch.cat(parts).cpu().numpy().astype(np.float32, copy=False)
        return packed

    def unpack(self, state: Mapping[str, torch.Tensor], values: np.ndarray) -> State:
        """Return a copy of `state` with its trainable entries set to `values`.

        Raises
        ------
        UpdateError
            If `values` is not float32 of shape [size].
        """
        if values.dtype != np.float32 or values.shape != (self.size,):
            raise UpdateError(
                f"packed values are {values.dtype}{list(values.shape)}, expected "
                f"float32[{self.size}] for scope '{self.scope}': free set or net differ"
            )
        result = {}
        entries = {entry.tensor: entry for entry in self.entries}
        for name, tensor in state.items():
            if name not in entries:
                result[name] = tensor.clone()
                continue
            entry, start = entries[name], self.offsets[name]
            mine = torch.from_numpy(values[start : start + entry.size].copy())
            if entry.index is None:
                result[name] = mine.view_as(tensor)
            else:
                result[name] = tensor.clone()
                entry.write(result[name], mine)
        return result


def dense_layout(graph: FilterGraph, state: Mapping[str, torch.Tensor]) -> Layout:
    """Return the layout of every entry of the net: a whole model in one array."""
    return scope_layout("all", graph, FreeSet({}), state)


def scope_layout(
    scope: Scope, graph: FilterGraph, free: FreeSet, state: Mapping[str, torch.Tensor]
) -> Layout:
    """Return what `scope` may train, given the free set.

    Parameters
    ----------
    scope : {"rows", "group", "all"}
        ``rows``: the freed filters' own weights and BN, and their columns of the classifier.
        ``group``: also the slices through which others read them, every BN and the whole
        classifier. ``all``: everything.
    graph, free
        The net's filter groups and those that are free.
    state : mapping of str to tensor
        Any state of the net; only names and shapes are read.
    """
    freed = freed_index(graph, free)
    kinds = _kinds(graph, state)
    head = (f"{graph.head}.weight", f"{graph.head}.bias")
    entries = []
    for name in sorted(state):
        shape = tuple(state[name].shape)
        kind = kinds.get(name, "weight")
        whole = scope == "all" or (scope == "group" and (kind in _BN or name in head))
        if whole:
            entries.append(Entry(name, shape, kind, None))
            continue
        mask = np.zeros(shape, bool)
        if name in freed.own:
            mask[freed.own[name]] = True
        if name in freed.out and (scope == "group" or name == head[0]):
            mask[:, freed.out[name]] = True
        if mask.any():
            entries.append(Entry(name, shape, kind, np.flatnonzero(mask)))
    return Layout(scope, tuple(entries))


def consolidation_layout(
    graph: FilterGraph, free: FreeSet, state: Mapping[str, torch.Tensor]
) -> Layout:
    """Return the layout of a consolidation: all but the scales and shifts of `free`.

    Those follow the schedule that drives them to zero, and nobody may train or send them.
    """
    dense = dense_layout(graph, state)
    return Layout("consolidate", without_scales(dense, graph, free).entries)


def without_scales(layout: Layout, graph: FilterGraph, free: FreeSet) -> Layout:
    """Return `layout` without the scales and shifts of `free`: what is off stays off."""
    own = freed_index(graph, free).own
    entries = []
    for entry in layout.entries:
        index = entry.index
        if entry.kind in ("scale", "shift") and entry.tensor in own:
            whole = np.arange(entry.size) if index is None else index
            index = np.setdiff1d(whole, own[entry.tensor])
        entries.append(Entry(entry.tensor, entry.shape, entry.kind, index))
    return Layout(layout.scope, tuple(entries))


def rates_of(layout: Layout, inner: Layout, factor: float) -> dict[str, torch.Tensor]:
    """Return a factor for each entry of `layout`, by tensor: 1 where `inner` has it too.

    `inner` names nothing that `layout` does not.
    """
    within = {entry.tensor: entry for entry in inner.entries}
    rates = {}
    for entry in layout.entries:
        whole = torch.full(entry.shape, factor)
        if entry.tensor in within:
            same = within[entry.tensor]
            same.write(whole, torch.ones(same.size))
        rates[entry.tensor] = entry.read(whole).clone()
    return rates


_BN = ("scale", "shift", "mean", "var")


def _kinds(graph: FilterGraph, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return what each tensor is that is a bias or belongs to a BN; all others are weights."""
    kinds: dict[str, str] = {
        slot.tensor: slot.kind
        for layer in graph.layers
        for slot in layer.slots
        if slot.role == "own"
    }
    # A BN on the image or behind a hidden linear layer belongs to no filter group.
    for name in state:
        owner, _, leaf = name.rpartition(".")
        if leaf == "running_mean":
            kinds |= {f"{owner}.{leaf}": kind for leaf, kind in BN_KINDS.items()}
    return kinds

"""What is kept of data that nobody has any more, and the net that it makes of a model.

No image: how each world looks to the first convolution as it was with the prior, what its expert
changed, and class statistics of the trunk's features.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import nn

from common.experts import ExpertNet
from common.features import (
    ClassSums,
    ClosedFormNet,
    Discriminant,
    Head,
    Layers,
    Scores,
    without_head,
)
from common.filters import FilterGraph, FreeSet, cut
from common.gate import Moments
from common.state import State, write_state

OPINION_LAYERS: Layers = "deviations"


@dataclass(frozen=True, eq=False)
class Memory:
    """Statistics of all data so far.

    Attributes
    ----------
    stem : tensor [C, c, h, w]
        Weights of the first convolution when the prior was recorded: all worlds are seen through
        it, whatever becomes of the net's own.
    worlds : tuple of Moments
        World 0 is the prior's.
    experts : tuple of State
        What worlds 1, 2, ... change in the trunk.
    known : tuple of int
        Classes that the model has seen.
    classes : ClassSums or None
        Of the trunk's features; None once the trunk was trained further, or if nobody had them.
    closed : bool
        Whether world 0's classifier is made of `classes`.
    heard : bool
        Whether the net's own classifier counts beside that one: it knows all classes so far, and
        all images were of its world.
    head : {"lda", "ridge", "ncm"}
        Which classifier they make.
    layers : {"all", "last"}
        Of which features.
    most : int
        Of how many of them at most, beside a net's own classifier; 0 is all.
    limit : int
        Of how many of them at most in any case; 0 is all.
    beside : tuple of ClassSums or None
        For every expert, class statistics of its own features; None where there are none.
    weight : float
        Of such statistics beside a net's own classifier.
    rival : ClassSums or None
        `classes` while a step's images are looked at: a classifier made of them is what the prior
        is held against. With those of the step's images, while the step grows an expert, which is
        held against it. Or what is to be the `opinion`, while the devices measure it.
    opinion : ClassSums or None
        Of the newest images, as the whole net sees them that was trained on them (deviations and
        the classifier's input): a second opinion beside its own classifier.
    stand_in : bool
        Whether world 0 is guessed from batch normalisations, for want of the prior's data.
    """

    stem: torch.Tensor
    worlds: tuple[Moments, ...]
    experts: tuple[State, ...] = ()
    known: tuple[int, ...] = ()
    classes: ClassSums | None = None
    closed: bool = False
    heard: bool = False
    stand_in: bool = False
    head: Head = "lda"
    layers: Layers = "all"
    most: int = 0
    limit: int = 0
    beside: tuple[ClassSums | None, ...] = ()
    weight: float = 0.0
    rival: ClassSums | None = None
    opinion: ClassSums | None = None

    @property
    def plain(self) -> bool:
        """Whether the model is one net that was trained to what it answers."""
        return not (self.closed or self.experts)

    @property
    def by_statistics(self) -> bool:
        """Whether class statistics answer for every world.

        They are shared with experts as their opinion; where none is wanted, there are no experts.
        """
        return self.closed and not (self.experts and self.weight)

    @property
    def opinion_weight(self) -> float:
        """Weight of `opinion`: it has seen the newest images alone, which were trained on, too."""
        return self.weight / 2

    def advisor(self, sums: ClassSums) -> Discriminant:
        """Return the classifier of `sums` that is heard beside a net's own."""
        return sums.discriminant(self.head, self.most, self.limit)

    def answer(self, sums: ClassSums) -> Discriminant:
        """Return the one that answers for a net."""
        return sums.discriminant(self.head, limit=self.limit)

    def as_state(self) -> State:
        """Return all of it as tensors (floats in float64)."""
        head, layers = get_args(Head).index(self.head), get_args(Layers).index(self.layers)
        counts = [len(self.worlds), len(self.experts)]
        limits = [self.most, self.limit]
        flags = [self.closed, self.heard, self.stand_in, *counts, head, layers, *limits]
        state = {
            "stem": self.stem,
            "known": torch.tensor(self.known, dtype=torch.int64),
            "flags": torch.tensor([int(flag) for flag in flags]),
            "weight": torch.tensor([self.weight], dtype=torch.float64),
        }
        for number, world in enumerate(self.worlds):
            parts = moments_as_state(world)
            state |= {f"world.{number}.{name}": tensor for name, tensor in parts.items()}
        for number, expert in enumerate(self.experts):
            state |= {f"expert.{number}.{name}": tensor for name, tensor in expert.items()}
        kinds = {"classes": self.classes, "rival": self.rival, "opinion": self.opinion}
        kinds |= {f"beside.{number}": sums for number, sums in enumerate(self.beside)}
        for kind, sums in kinds.items():
            if sums is not None:
                parts = {f"{kind}.{k}": torch.from_numpy(v) for k, v in vars(sums).items()}
                # the file's format refuses tensors that share memory
                again = kind == "rival" and sums is self.classes
                state |= {k: v.clone() for k, v in parts.items()} if again else parts
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Memory:
        """Read what `as_state` wrote."""
        flags = state["flags"].tolist()
        closed, heard, stand_in, worlds, experts, head, layers, most, limit = flags

        def under(prefix: str) -> State:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        def sums(kind: str) -> ClassSums | None:
            parts = {name: tensor.numpy() for name, tensor in under(f"{kind}.").items()}
            return ClassSums(**parts) if parts else None

        return cls(
            stem=state["stem"],
            worlds=tuple(moments_from_state(under(f"world.{number}.")) for number in range(worlds)),
            experts=tuple(under(f"expert.{number}.") for number in range(experts)),
            known=tuple(state["known"].tolist()),
            classes=sums("classes"),
            closed=bool(closed),
            heard=bool(heard),
            stand_in=bool(stand_in),
            head=get_args(Head)[head],
            layers=get_args(Layers)[layers],
            most=most,
            limit=limit,
            beside=tuple(sums(f"beside.{number}") for number in range(experts)),
            weight=float(state["weight"][0]),
            rival=sums("rival"),
            opinion=sums("opinion"),
        )


def moments_as_state(moments: Moments) -> State:
    """Return moments as tensors, every bit of them."""
    parts = {"count": np.array([moments.count]), "total": moments.total, "second": moments.second}
    return {name: torch.from_numpy(part) for name, part in parts.items()}


def moments_from_state(parts: Mapping[str, torch.Tensor]) -> Moments:
    """Read what `moments_as_state` wrote."""
    return Moments(float(parts["count"][0]), parts["total"].numpy(), parts["second"].numpy())


def trunk_of(
    net: nn.Module, graph: FilterGraph, state: Mapping[str, torch.Tensor], free: FreeSet
) -> nn.Module:
    """Return the net that `state` makes of `net` without its free filters, in eval mode."""
    dense = copy.deepcopy(net)
    write_state(dense, state)
    return cut(dense.eval(), graph, free)


def assembled(
    net: nn.Module,
    graph: FilterGraph,
    state: Mapping[str, torch.Tensor],
    free: FreeSet,
    memory: Memory | None,
) -> nn.Module:
    """Return the whole model for inference: trunk, and what memory adds to it."""
    trunk = trunk_of(net, graph, state, free)
    if memory is None:
        return trunk
    if memory.plain:
        return _advised(trunk, graph.head, memory)
    if memory.by_statistics:
        return _closed(trunk, graph.head, memory)
    sums = memory.classes
    by_world = (sums if memory.weight else None, *memory.beside)
    known = [one for one in by_world if one is not None]
    pooled = functools.reduce(ClassSums.__add__, known) if known else None
    mixed = ExpertNet(
        trunk,
        memory.experts,
        memory.worlds,
        memory.stem,
        graph.head,
        [one is not None for one in by_world],
        None if pooled is None else memory.advisor(pooled),
        memory.weight,
        closed=memory.closed,
    )
    if sums is None:
        mixed.nets[0] = _advised(mixed.nets[0], graph.head, memory)
    return mixed


def _closed(net: nn.Module, head: str, memory: Memory) -> nn.Module:
    """Return `net` with a classifier made of class statistics, beside its own if that is heard."""
    sums = memory.classes
    assert sums is not None
    if not memory.heard:
        scores = Scores(memory.answer(sums))
        return ClosedFormNet(without_head(net, head), head, scores, memory.layers)
    # A phone stores no more weights for it: as many features are left out as it has inputs.
    own = net.get_submodule(head)
    assert isinstance(own, nn.Linear)
    fewer = max(1, sums.sums.shape[1] - own.in_features)  # 0 would be no limit
    limit = min(memory.limit or fewer, fewer)
    scores = Scores(sums.discriminant(memory.head, limit=limit), memory.weight)
    return ClosedFormNet(net, head, scores, memory.layers, beside=True)


def _advised(net: nn.Module, head: str, memory: Memory) -> nn.Module:
    """Return `net` with the opinion beside its own classifier, if there is one."""
    if memory.opinion is None:
        return net
    scores = Scores(memory.advisor(memory.opinion).impartial(), memory.opinion_weight)
    return ClosedFormNet(net, head, scores, OPINION_LAYERS, beside=True)

"""One net for several worlds: a trunk that never changes again, and a small expert for each.

Where new data comes from another world than the prior's, one set of weights cannot serve both
(fine-tuning on the new forgets the old, and nobody has the old any more). The kept filters are
then frozen, and each new world gets an expert of its own: every batch normalisation, the
classifier, and the smallest convolutions, up to a share of the net's parameters. All else is
shared. Which expert an image is for is told by the gate (`common.gate`); the answer is
``p(y | x) = sum_k p(world k | x) p_k(y | x)`` (Jacobs et al., "Adaptive mixtures of local
experts", 1991).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from common.features import ClosedFormNet, Discriminant, ScaleShift, Scores, without_head
from common.filters import BN_KINDS
from common.gate import Gate, Moments, look, stem_conv
from common.layout import Entry, Layout
from common.state import State, read_state, write_state


def expert_layout(trunk: nn.Module, head: str, share: float) -> Layout:
    """Return what an expert of `trunk` may change.

    Parameters
    ----------
    trunk : nn.Module
        The net without its free filters.
    head : str
        Name of the classifier.
    share : float
        Most parameters of an expert, as a share of the trunk's. Every batch normalisation and
        the classifier count first and are always part of it; convolutions follow, the smallest
        first, as long as they fit. Those are the early ones, which see the world's light, noise
        and strokes.
    """
    state = read_state(trunk)
    kinds = _kinds(state)
    own = {name for name in state if kinds[name] != "weight"} | {f"{head}.weight", f"{head}.bias"}
    room = share * sum(p.numel() for p in trunk.parameters())
    room -= sum(state[name].numel() for name in own if kinds[name] not in ("mean", "var"))
    rest = sorted((state[name].numel(), name) for name in state if name not in own)
    for size, name in rest:
        if size > room:
            break
        room -= size
        own.add(name)
    entries = (Entry(name, tuple(state[name].shape), kinds[name], None) for name in sorted(own))
    return Layout("expert", tuple(entries))


def _kinds(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    kinds = dict.fromkeys(state, "weight")
    for name in state:
        owner, _, leaf = name.rpartition(".")
        if leaf == "running_mean":
            kinds |= {f"{owner}.{part}": kind for part, kind in BN_KINDS.items()}
    return {name: kinds[name] for name in state}


_AXES = 4
"""On which the gate looks at an image, for each world; with all there are it is no surer."""


class ExpertNet(nn.Module):
    """Trunk, experts and gate as one net, for inference: pixels in, log probabilities out.

    Tensors that an expert does not change are the trunk's own, not copies. Batch normalisations
    become scale and shift, which no exporter folds into the weights that the experts share.

    Parameters
    ----------
    trunk : nn.Module
        World 0's net.
    experts : sequence of State
        What each further world changes, by tensor name.
    worlds : sequence of Moments
        Of all worlds, the first one's first.
    stem : tensor
        Weights of the first convolution through which the gate looks.
    head : str
        Name of the classifier.
    told : sequence of bool
        For each world, whether `discriminant` is made of statistics of its net too.
    discriminant : Discriminant or None
        A classifier of any world's features, each as its own net sees it. One for all: the
        experts begin as the trunk, so that the features keep their meaning.
    weight : float
        Of its scores beside the net's own logits.
    closed : bool
        Whether world 0 answers by the discriminant alone: it has learnt more than its net.
    """

    absent: torch.Tensor | None

    def __init__(
        self,
        trunk: nn.Module,
        experts: Sequence[State],
        worlds: Sequence[Moments],
        stem: torch.Tensor,
        head: str,
        told: Sequence[bool],
        discriminant: Discriminant | None,
        weight: float,
        *,
        closed: bool = False,
    ) -> None:
        super().__init__()
        first = copy.deepcopy(trunk).eval()
        nets = [first, *(_expert(first, expert) for expert in experts)]
        self.stem = stem_conv(first, stem)
        scores = None if discriminant is None else Scores(discriminant.impartial(), weight)
        self.nets = nn.ModuleList()
        for number, (net, is_told) in enumerate(zip(nets, told, strict=True)):
            plain = _without_bn(net)
            if scores is None or not is_told:
                self.nets.append(plain)
            else:
                beside = number > 0 or not closed
                kept = plain if beside else without_head(plain, head)
                self.nets.append(ClosedFormNet(kept, head, scores, beside=beside))
        absent = discriminant.absent() if closed and discriminant is not None else None
        self.register_buffer("absent", absent)
        self.gate = Gate(worlds, _AXES * len(worlds))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``[B, C, H, W]`` to log probabilities ``[B, classes]``."""
        posterior = self.gate(look(self.stem(x)))
        heard = []
        for number, net in enumerate(self.nets):
            scores = net(x)
            if number == 0 and self.absent is not None:
                scores = scores + self.absent
            heard.append(F.log_softmax(scores, 1) + posterior[:, number : number + 1])
        return torch.logsumexp(torch.stack(heard), 0)


def _expert(trunk: nn.Module, changed: State) -> nn.Module:
    """Return a net with `changed` and otherwise the very tensors of `trunk`."""
    net = copy.deepcopy(trunk)
    write_state(net, {**read_state(trunk), **changed})
    shared = {name: p for name, p in trunk.named_parameters() if name not in changed}
    for name, parameter in shared.items():
        owner, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(owner), leaf, parameter)
    return net


def _without_bn(net: nn.Module) -> nn.Module:
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            owner, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(owner), leaf, ScaleShift(module))
    return net


def changed_by(layout: Layout, state: Mapping[str, torch.Tensor]) -> State:
    """Return the tensors of `state` that `layout` names: an expert."""
    return {entry.tensor: state[entry.tensor] for entry in layout.entries}

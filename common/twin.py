"""Kept and freed filters run as two nets: teacher and student in one forward pass.

After regrowing, with scope ``rows``, kept filters read no freed ones: the kept part of the net
*is* the prior model, and stays it. So it needs no gradients, no activations saved for itself, and
no BatchNorm of its own (folded into the convolutions); the freed part is a small net beside it,
which reads both. It learns what the whole net would with all else frozen
(`common.frozen.training_only`), in a fraction of the time and memory.

    twin = Twin(net, graph, free)
    objective = multi_step_objective([twin.teacher], distillation)       # common.sparsify
    train(twin, twin.layout, data, objective, recipe, rng)               # common.train
    twin.merge(net)
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import NetError
from common.filters import FilterGraph, FreeSet, freed_index
from common.layout import Entry, Layout
from common.twin_cache import KeptCache
from common.twin_ops import Halves, Part, Pass
from common.twin_run import Op, evaluate
from common.twin_trace import Builder, TwinUnsupported

__all__ = ["Twin", "TwinUnsupported"]

_LEAN_PARTS = 3
"""Of which a lean twin holds one: more would hold little less, for what passes between them."""
_TOLERANCE = 1e-3  # of the largest logit; a channel mistaken for another is far beyond it


class Twin(nn.Module):
    """A net split into its kept part, frozen, and its freed part, which trains.

    Its parameters and buffers are copies: `merge` writes the freed ones back.

    Parameters
    ----------
    net : nn.Module
        Any net that the filter graph was built for; left as it is.
    graph, free
        Its filter groups and those that are freed.
    lean : bool
        Compute two thirds of the activations anew in the backward pass instead of holding them.
    cache_bytes : int
        Most memory for the kept part's activations of images that come again; 0 caches none.
        Only images that are the same to the last bit do (see `common.twin_cache`).

    Raises
    ------
    NetError
        A kept filter reads a freed one, or a layer has no kept filter; names the tensor.
    TwinUnsupported
        A `NetError` too: the net has operations that cannot be followed, or its classifier reads
        no freed filter. Train it with masks instead.
    """

    def __init__(
        self,
        net: nn.Module,
        graph: FilterGraph,
        free: FreeSet,
        *,
        lean: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        super().__init__()
        _check_kept(net, graph, free)
        example = torch.randn(2, *graph.input_shape, generator=torch.Generator().manual_seed(0))
        example = example.to(next(net.parameters()))
        with torch.no_grad():
            builder = Builder(net, graph, free, example)
            _compare(net, example, builder.logits)
        self._ops = builder.ops
        cuts = [0, *(builder.cuts(_LEAN_PARTS) if lean else [])]
        self._repeated = [self._ops[a:b] for a, b in itertools.pairwise(cuts)]
        self._held = self._ops[cuts[-1] :]
        self.cache = KeptCache(cache_bytes) if cache_bytes else None
        self._pass = Pass()
        for part in builder.parts.values():
            part.pass_ = self._pass
        self.parts = nn.ModuleDict({_key(name): part for name, part in builder.parts.items()})
        # Two tensors in place of hundreds: the optimiser's time is that of its calls.
        self._decayed, self._undecayed = self._trained(), self._trained(matrices=False)
        self.weights = nn.Parameter(_joined(self._decayed)[None])
        self.scales = nn.Parameter(_joined(self._undecayed))
        self.layout = Layout("twin", tuple(self._entries()))
        self.teacher = Teacher()
        self.train()

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prior's logits [B, C], which have no gradient, and the student's."""
        self._point()
        x = x.contiguous(memory_format=torch.channels_last)
        learning = self.training and torch.is_grad_enabled()
        noted = self.cache.fetch(x, self._kept) if self.cache is not None and learning else None
        if noted is not None:
            with self._passing(half="freed", noted=noted):
                taught, logits = evaluate(self._ops, Halves(x, None))
        elif self._repeated and learning:
            kept, freed, number = x, None, 0
            for ops in self._repeated:
                run = functools.partial(self._run, ops, number)
                freed, kept = Again.apply(self.weights, self.scales, freed, kept, run)  # type: ignore[no-untyped-call]
                number = ops[-1].number
            self._point()  # what was pointed at inside has no gradient
            taught, logits = evaluate(self._held, Halves(kept, freed), number)
        else:
            taught, logits = evaluate(self._ops, Halves(x, None))
        assert taught is not None
        assert logits is not None
        return taught, logits

    def _run(
        self,
        ops: list[Op],
        number: int,
        weights: Tensor,
        scales: Tensor,
        value: Halves,
        *,
        again: bool,
    ) -> Halves:
        """Run some operations that a lean twin repeats, with these values of its parameters."""
        self._point(weights, scales)
        with self._passing(again=again):
            return evaluate(ops, value, number)

    @torch.no_grad()
    def _kept(self, x: Tensor) -> list[Tensor]:
        """Return all that freed filters read of the kept part on images `x`."""
        noted: list[Tensor] = []
        with self._passing(half="kept", noted=noted):
            evaluate(self._ops, Halves(x, None))
        return noted

    @contextlib.contextmanager
    def _passing(self, **changes: Any) -> Iterator[None]:
        before = vars(self._pass).copy()
        vars(self._pass).update(changes)
        try:
            yield
        finally:
            vars(self._pass).update(before)

    def forward(self, x: Tensor) -> Tensor:
        """Return the student's logits [B, C]; `teacher` then knows the prior's."""
        taught, logits = self.both(x)
        self.teacher.remember(x, taught)
        return logits

    @torch.no_grad()
    def merge(self, net: nn.Module) -> None:
        """Write the freed filters into `net`, in place; a twin of it has the same bytes."""
        self._point()
        tensors = net.state_dict()  # of the net's own storage
        for part in self._parts():
            for leaf, (name, rows, columns) in part.places.items():
                at = (rows,) if columns is None else np.ix_(rows, columns)
                tensor = tensors[name]
                index = tuple(torch.from_numpy(i).to(tensor.device) for i in at)
                values = part.own[leaf] if leaf in part.own else getattr(part, leaf)
                tensor[index] = values.to(tensor)

    def _point(self, weights: Tensor | None = None, scales: Tensor | None = None) -> None:
        """Let the parts' tensors be slices of the flat parameters, or of others like them."""
        weights = self.weights if weights is None else weights
        scales = self.scales if scales is None else scales
        for flat, trained in ((weights, self._decayed), (scales, self._undecayed)):
            pieces = torch.split(flat.view(-1), [shape.numel() for _, _, shape in trained])
            for piece, (part, leaf, shape) in zip(pieces, trained, strict=True):
                part.own[leaf] = piece.view(shape)

    def _parts(self) -> list[Part]:
        return [part for part in self.parts.values() if isinstance(part, Part)]

    def _trained(self, *, matrices: bool = True) -> list[tuple[Part, str, torch.Size]]:
        return [
            (part, leaf, tensor.shape)
            for part in self._parts()
            for leaf, tensor in part.own.items()
            if (tensor.dim() > 1) is matrices
        ]

    def _entries(self) -> Iterator[Entry]:
        yield Entry("weights", tuple(self.weights.shape), "weight", None)
        yield Entry("scales", tuple(self.scales.shape), "scale", None)
        for name, part in self.parts.items():
            for leaf, kind in (("running_mean", "mean"), ("running_var", "var")):
                if leaf in cast(Part, part).places:
                    tensor = cast(Tensor, getattr(part, leaf))
                    yield Entry(f"parts.{name}.{leaf}", tuple(tensor.shape), kind, None)


class Again(torch.autograd.Function):
    """Runs a part of a twin without holding anything, and again in the backward pass.

    What torch.utils.checkpoint does, without the 800 modules (80 MB) that it loads.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        scales: Tensor,
        freed: Tensor | None,
        kept: Tensor,
        run: Callable[..., Halves],
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(weights, scales, freed, kept)
        ctx.run, kind = run, kept.device.type
        ctx.mixed = torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )
        result = run(weights, scales, Halves(kept, freed), again=False)
        ctx.mark_non_differentiable(result.kept)
        return result.freed, result.kept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        *learnt, kept = ctx.saved_tensors
        with torch.enable_grad(), ctx.mixed:
            copies = [None if t is None else t.detach().requires_grad_() for t in learnt]
            weights, scales, freed = copies
            result = ctx.run(weights, scales, Halves(kept, freed), again=True).freed
        wanted = [t for t in copies if t is not None]
        found = iter(torch.autograd.grad(result, wanted, gradients[0], allow_unused=True))
        return *(None if t is None else next(found) for t in copies), None, None


class Teacher(nn.Module):
    """The prior model, which has already run: gives the logits of a twin's last forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: tuple[Tensor, Tensor] | None = None

    def remember(self, x: Tensor, logits: Tensor) -> None:
        """Keep the logits of images `x`."""
        self._seen = (x, logits)

    def forward(self, x: Tensor) -> Tensor:
        """Return the prior's logits [B, C] of the images that the twin has just seen."""
        if self._seen is None or self._seen[0] is not x:
            raise NetError("the twin's teacher was asked about images that the twin has not seen")
        return self._seen[1]


def _check_kept(net: nn.Module, graph: FilterGraph, free: FreeSet) -> None:
    for name, channels in free.channels.items():
        if len(channels) == graph.layer(name).width:
            raise NetError(f"layer {name!r} has no kept filter: free fewer of them")
    freed = freed_index(graph, free)
    if f"{graph.head}.weight" not in freed.out:
        raise TwinUnsupported(f"the classifier {graph.head!r} reads no freed filter")
    tensors = dict(net.named_parameters())
    for name, columns in freed.out.items():
        if name == f"{graph.head}.weight":
            continue
        tensor = tensors[name].detach().cpu()
        kept = np.setdiff1d(np.arange(len(tensor)), freed.own.get(name, []))
        if tensor[np.ix_(kept, columns)].any():
            raise NetError(
                f"kept filters read freed ones in {name!r}: a twin needs a regrown model trained "
                "with scope rows"
            )


def _compare(net: nn.Module, example: Tensor, logits: Halves) -> None:
    """Hold the student's logits against the net's own."""
    modes = [(module, module.training) for module in net.modules()]
    expected = net.eval()(example)
    for module, training in modes:
        module.training = training
    assert logits.freed is not None
    if (logits.freed - expected).abs().max() > _TOLERANCE * expected.abs().max():
        raise TwinUnsupported("the net does not compute what its split halves do")


def _joined(trained: list[tuple[Part, str, torch.Size]]) -> Tensor:
    return torch.cat([part.own[leaf].view(-1) for part, leaf, _ in trained])


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's name must not have dots

"""Diverse re-initialisation of a free set, from one seed that all share.

Lee & Kim (IEEE Access 2023) re-initialise the filters that sparsity training freed
"diversely". Here each freed filter of a layer is drawn by one of four rules, in proportions
that are settings, and scaled to the kept filters' norm:

- ``orthogonal``: in the null space of the kept filters (RePr, Prakash et al., CVPR 2019),
  as far as the fan-in leaves room;
- ``kaiming``, ``xavier``: the usual draws;
- ``resample``: a kept filter, jittered.

What others read from a freed filter starts at zero, so at round 0 the net computes exactly
the prior model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import ConfigError
from common.filters import FilterGraph, FreeSet, freed_index
from common.seeds import torch_rng
from common.state import State

_JITTER = 0.5


@dataclass(frozen=True)
class Diversity:
    """Shares of the freed filters of a layer that each rule draws; they are normalised."""

    orthogonal: float = 0.4
    kaiming: float = 0.2
    xavier: float = 0.2
    resample: float = 0.2

    def __post_init__(self) -> None:
        shares = self.shares()
        if not (min(shares) >= 0 and 0 < sum(shares) < math.inf):  # NaN fails too
            raise ConfigError(
                f"regrow shares are {shares}: give non-negative shares of which one is positive"
            )

    def shares(self) -> tuple[float, float, float, float]:
        """Return the four shares in the order of `RULES`."""
        return self.orthogonal, self.kaiming, self.xavier, self.resample


RULES = ("orthogonal", "kaiming", "xavier", "resample")


def regrow(
    state: Mapping[str, torch.Tensor],
    graph: FilterGraph,
    free: FreeSet,
    *,
    seed: int,
    diversity: Diversity | None = None,
) -> State:
    """Return a copy of `state` whose free filters are drawn anew.

    Parameters
    ----------
    state : mapping of str to tensor
        The prior model; its free filters are off (scale and shift zero).
    graph, free
        Filter groups and those to draw.
    seed : int
        Shared by the server and all devices of a step.
    diversity : Diversity, optional
        How many filters each rule draws.

    Returns
    -------
    State
        BN of free filters reset to scale 1, shift 0, mean 0, variance 1; what kept filters
        and the classifier read from free filters is zero.
    """
    diversity = diversity or Diversity()
    freed = freed_index(graph, free)
    result = {name: tensor.clone() for name, tensor in state.items()}
    kinds = {s.tensor: s.kind for layer in graph.layers for s in layer.slots if s.role == "own"}
    reset = {"scale": 1.0, "shift": 0.0, "mean": 0.0, "var": 1.0, "bias": 0.0}
    for name in sorted(freed.own):
        rows = torch.from_numpy(freed.own[name])
        if kinds[name] == "weight":
            rng = torch_rng("regrow", seed, name)
            result[name][rows] = _draw(result[name], freed.own[name], diversity, rng)
        else:
            result[name][rows] = reset[kinds[name]]
    for name, columns in freed.out.items():
        kept = np.setdiff1d(np.arange(len(result[name])), freed.own.get(name, []))
        result[name][np.ix_(kept, columns)] = 0.0
    return result


def _draw(
    weight: torch.Tensor, rows: np.ndarray, diversity: Diversity, rng: torch.Generator
) -> torch.Tensor:
    """Draw `rows` of a conv weight [out, in, kh, kw] anew; the others are the kept filters."""
    kept = weight[np.setdiff1d(np.arange(len(weight)), rows)].flatten(1).double()
    count, fan_in = len(rows), kept.shape[1]
    rules = _assign(count, diversity, rng)
    drawn = torch.randn(count, fan_in, generator=rng, dtype=torch.float64)
    uniform = torch.rand(count, fan_in, generator=rng, dtype=torch.float64) * 2 - 1
    source = torch.randint(max(len(kept), 1), (count,), generator=rng)

    room = fan_in - len(kept)
    orthogonal = [i for i, rule in enumerate(rules) if rule == "orthogonal"][: max(room, 0)]
    if orthogonal:
        # Gram-Schmidt by QR against the kept filters: what is left lies in their null space.
        basis = torch.linalg.qr(torch.cat([kept, drawn[orthogonal]]).T).Q
        drawn[orthogonal] = basis[:, len(kept) :].T
    for i, rule in enumerate(rules):
        if rule == "xavier":
            drawn[i] = uniform[i]
        elif rule == "resample" and len(kept):
            noise = drawn[i] * kept[source[i]].norm() / math.sqrt(fan_in)
            drawn[i] = kept[source[i]] + _JITTER * noise

    norm = kept.norm(dim=1).mean() if len(kept) else torch.tensor(math.sqrt(2.0))
    length = drawn.norm(dim=1, keepdim=True).clamp_min(1e-12)
    scaled: torch.Tensor = (drawn / length * norm).to(weight.dtype)
    return scaled.view(count, *weight.shape[1:])


def _assign(count: int, diversity: Diversity, rng: torch.Generator) -> list[str]:
    """Deal the rules out over `count` filters in their shares, in random order."""
    shares = np.array(diversity.shares()) / sum(diversity.shares())
    edges = np.floor(np.cumsum(shares) * count + 0.5).astype(int)
    counts = np.diff([0, *edges])
    dealt = [rule for rule, n in zip(RULES, counts, strict=True) for _ in range(n)]
    return [dealt[i] for i in torch.randperm(count, generator=rng).tolist()]

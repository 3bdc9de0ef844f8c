"""Self-supervised label augmentation: turned images are classes of their own.

A net that only tells the classes apart which it knows keeps too little to tell apart those that
are still to come. Asked to tell by how many quarters an image was turned as well, it keeps more:
each image is learnt once as it is and once turned, with the joint label (class, turn) (Lee et
al., "Self-supervised label augmentation via input transformations", ICML 2020; Zhu et al., "PASS",
CVPR 2021, for later classes).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common.seeds import torch_rng

_SCALE = 8.0
"""Of the cosine logits; that of the literature for nets of this size lies between 4 and 16."""


class Rotations:
    """The second task of a net in training: hands out turned images and returns their loss.

    The joint labels' classifier is fixed and drawn from a seed (orthonormal as far as the
    features have room): nothing of it has to be trained, kept or sent.

    Parameters
    ----------
    head : nn.Module
        The net's classifier; its input [B, F] are the features.
    features, classes : int
        Inputs and outputs of the classifier.
    weight : float
        Of the loss.
    rng : torch.Generator
        Of the turns.
    """

    def __init__(
        self, head: nn.Module, features: int, classes: int, weight: float, rng: torch.Generator
    ) -> None:
        self._rng, self._weight = rng, weight
        self._prototypes = _prototypes(features, 4 * classes)
        self._seen: torch.Tensor | None = None
        self._turns: torch.Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._remember)

    def __enter__(self) -> Rotations:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` [B, C, H, W], each image turned by a random number of quarters.

        An image that is not square is turned by halves alone.
        """
        square = x.shape[2] == x.shape[3]
        turns = torch.randint(0, 4, (len(x),), generator=self._rng)
        self._turns = turns if square else turns // 2 * 2
        result = torch.empty_like(x)
        for turn in range(4):
            chosen = (self._turns == turn).nonzero().flatten().to(x.device)
            if len(chosen):
                result[chosen] = torch.rot90(x[chosen], turn, (2, 3))
        return result

    def loss(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss on the turned images of the last pass, which came behind the others."""
        assert self._seen is not None
        assert self._turns is not None
        features = F.normalize(self._seen[-len(labels) :].float(), dim=1)
        logits = _SCALE * features @ self._prototypes.to(features.device).T
        joint = labels * 4 + self._turns.to(labels.device)
        loss: torch.Tensor = self._weight * F.cross_entropy(logits, joint)
        return loss

    def _remember(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._seen = inputs[0]


def _prototypes(features: int, count: int) -> torch.Tensor:
    """Return `count` unit vectors [count, features]; orthogonal in blocks of `features`."""
    rng = torch_rng("rotations", features, count)
    blocks = int(np.ceil(count / features))
    drawn = torch.randn(blocks, features, features, generator=rng, dtype=torch.float64)
    prototypes: torch.Tensor = torch.linalg.qr(drawn).Q.reshape(-1, features)[:count]
    return prototypes.float()

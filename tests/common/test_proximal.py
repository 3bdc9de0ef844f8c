"""The proximal term: what it adds to loss and gradient, and to nothing that may not move."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common.layout import Entry, Layout
from common.proximal import proximal


def test_the_loss_grows_with_the_distance_of_the_trainable_entries() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    rows = np.array([0, 1, 2])  # the first output's weights
    layout = Layout("rows", (Entry("weight", (2, 3), "weight", rows),))

    def plain(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, y)

    pulled = proximal(plain, net, layout, mu=0.5)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    assert pulled(net(x), x, y) == plain(net(x), x, y)
    with torch.no_grad():
        net.weight += 2.0
    free = torch.autograd.grad(plain(net(x), x, y), net.weight)[0]
    held = torch.autograd.grad(pulled(net(x), x, y), net.weight)[0]
    torch.testing.assert_close(pulled(net(x), x, y) - plain(net(x), x, y), torch.tensor(3.0))
    torch.testing.assert_close(held - free, torch.tensor([[1.0] * 3, [0.0] * 3]))

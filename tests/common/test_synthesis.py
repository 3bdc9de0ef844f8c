"""Images made of a net: near what it was trained on, in its eyes; and how they are replayed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.accelerator import CPU
from common.data import Normalisation
from common.distill import kd
from common.nets import build
from common.replay import replayed
from common.seeds import torch_rng
from common.state import read_state, state_digest
from common.synthesis import Inversion, _statistics, synthesise

NORM = Normalisation((0.4, 0.4, 0.4), (0.3, 0.2, 0.2))
SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A net that tells red, green and blue images, with the statistics of these."""
    torch.manual_seed(0)
    net = build("resnet8", 3, 3, 8)
    y = torch.arange(96) % 3
    x = 0.3 * torch.randn(96, *SHAPE) - 0.5
    x[torch.arange(96), y] += 2.0
    optimiser = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    optimiser.zero_grad()
    return net.eval()


def gap(net: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad(), _statistics(net) as gaps:
        net(x)
    return float(torch.stack(gaps).sum())


def make(net: nn.Module, count: int = 12, seed: int = 0, **how: int) -> np.ndarray:
    rng = torch_rng("synthesis", seed)
    return synthesise(net, (0, 2), count, SHAPE, NORM, rng, Inversion(steps=60, **how))


def test_images_are_of_the_wanted_classes_and_have_the_statistics_of_the_training(
    net: nn.Module,
) -> None:
    images = make(net)
    assert (images.shape, images.dtype) == ((12, 8, 8, 3), np.uint8)
    x = NORM.to_tensor(images)
    with torch.no_grad():
        assert net(x).argmax(1).tolist() == [0, 2] * 6
    noise = torch.randn(12, *SHAPE, generator=torch_rng("noise"))
    assert gap(net, x) < 0.3 * gap(net, noise)
    redder = images[::2].mean((0, 1, 2))
    assert redder[0] > redder[2]  # nobody told it what red is


def test_the_same_draw_gives_the_same_images_and_the_net_is_left_as_it_is(net: nn.Module) -> None:
    before = state_digest(read_state(net))
    net.train()
    one, again, other = make(net, 4), make(net, 4), make(net, 4, seed=1)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(m._forward_pre_hooks for m in net.modules())
    net.eval()
    assert state_digest(read_state(net)) == before


def test_there_are_as_many_as_asked_for_in_batches_of_any_size(net: nn.Module) -> None:
    assert len(make(net, 7, batch=3)) == 7


def test_replay_adds_what_the_net_forgets_of_the_teacher(net: nn.Module) -> None:
    images = NORM.to_tensor(make(net, 5))

    def plain(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, y)

    def with_replay(student: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = torch.zeros(2, *SHAPE), torch.tensor([0, 1])
        both = replayed(
            plain,
            student,
            net,
            images,
            torch_rng("replay"),
            weight=3.0,
            temperature=2.0,
            batch=4,
            accelerator=CPU,
        )
        logits = student(x)
        return both(logits, x, y), plain(logits, x, y)

    loss, alone = with_replay(net)
    torch.testing.assert_close(loss, alone)
    torch.manual_seed(1)
    other = build("resnet8", 3, 3, 8).eval()
    loss, alone = with_replay(other)
    drawn = torch.randint(5, (4,), generator=torch_rng("replay"))
    wanted = 3 * kd(other(images[drawn]), net(images[drawn]), 2.0).mean()
    torch.testing.assert_close(loss - alone, wanted, rtol=1e-4, atol=1e-5)
    gradient = torch.autograd.grad(loss, other.parameters(), allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in gradient)

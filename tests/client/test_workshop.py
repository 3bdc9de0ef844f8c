"""What a worker makes once: nets that carry nothing over from one device to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from client.workshop import Workshop
from common.accelerator import CPU
from common.state import read_state, state_digest


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=None), nn.Flatten(), nn.Linear(12, 2))
    return nn.Sequential(*layers)


def test_a_thing_is_made_once_and_the_least_used_is_dropped() -> None:
    made: list[str] = []

    def make(name: str) -> Any:
        return lambda: made.append(name) or name

    shop = Workshop(most=2)
    for name in ("a", "b", "a", "c", "a", "b"):
        assert shop.once(name, make(name)) == name
    assert made == ["a", "b", "c", "b"]


def test_a_net_is_used_again_and_nothing_of_the_last_device_is_left() -> None:
    shop, template = Workshop(), net(0)
    state = read_state(net(1))
    x = torch.randn(8, 1, 4, 4)
    fresh = net(1).train()
    fresh(x)
    for _ in range(2):
        student = shop.net("student", template, state, CPU)
        assert not student.training
        assert state_digest(read_state(student)) == state_digest(state)
        student.train()(x)  # momentum None: the running mean is weighed by the count of batches
        assert state_digest(read_state(student)) == state_digest(read_state(fresh))
    assert shop.net("student", template, state, CPU) is student
    assert shop.net("teacher", template, state, CPU, "1") is not student
    assert state_digest(read_state(template)) == state_digest(read_state(net(0)))


def test_a_net_that_never_changes_is_written_only_when_another_is_asked_for() -> None:
    shop, template = Workshop(), net(0)
    one, two = read_state(net(1)), read_state(net(2))
    teacher = shop.net("teacher", template, one, CPU, "one")
    assert state_digest(read_state(shop.net("teacher", template, two, CPU, "two"))) == (
        state_digest(two)
    )
    assert shop.net("teacher", template, two, CPU, "two") is teacher
    with torch.no_grad():
        next(teacher.parameters()).zero_()  # nobody does; but it shows that nothing is written
    shop.net("teacher", template, two, CPU, "two")
    assert not next(teacher.parameters()).any()
    shop.net("teacher", template, one, CPU, "one")
    assert state_digest(read_state(teacher)) == state_digest(one)

"""Grids without processes: one whose nodes are functions, one that calls the real client app."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from common.config import Config
from common.filters import FilterGraph, FreeSet
from common.importance import bn_scale, choose
from common.order import NetSpec, Order, Report, read_order
from common.sparsify import off_state
from common.state import State, read_state
from server.inline import InlineGrid, _identify
from server.plan import Plan
from server.prior import make_net

SPEC = NetSpec(name="resnet8", classes=10, input_shape=(1, 8, 8), width=8, mean=(0.3,), std=(0.4,))


def make_plan(**settings: Any) -> Plan:
    """A plan over a tiny net; `settings` in snake case."""
    config = Config.parse({"net": "resnet8", "width": 8, **settings})
    net = make_net(config, SPEC)
    return Plan(config, SPEC, FilterGraph.build(net, SPEC.input_shape), net)


def freed_prior(plan: Plan, share: float = 0.3) -> tuple[State, FreeSet]:
    """An untrained prior with a share of its filters off."""
    net = make_net(plan.config, plan.spec)  # the plan's own net is scratch space
    free = choose(plan.graph, bn_scale(net, plan.graph), share)
    return off_state(read_state(net), plan.graph, free), free


def reply_to(message: Message, report: Report, update: Any = None) -> Message:
    """Answer `message` as the client app does."""
    content = RecordDict({"report": ConfigRecord({"json": report.model_dump_json()})})
    if update is not None:
        content["arrays"] = ArrayRecord({"update": Array(update)})
    return Message(content, reply_to=message)


def order_in(message: Message) -> Order:
    """The order that a message carries."""
    return read_order(str(message.content.config_records["order"]["json"]))


def arrays_in(message: Message) -> dict[str, np.ndarray]:
    """The packed arrays that a message carries."""
    record = message.content.array_records.get("arrays", {})
    return {name: record[name].numpy() for name in record}


Answer = Callable[[Message], Message | None]


class FakeGrid(Grid):
    """Nodes are functions from a message to a reply, or to None if they never answer.

    `delay[node]` is how many seconds a node's replies take.
    """

    poll_seconds = 0.001

    def __init__(self, nodes: Mapping[int, Answer]) -> None:
        _identify()
        self.nodes = dict(nodes)
        self.delay: dict[int, float] = {}
        self.sent: list[Message] = []
        self._waiting: dict[str, tuple[float, Message]] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = []
        for message in messages:
            self.sent.append(message)
            identifier = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = identifier
            node = message.metadata.dst_node_id
            reply = self.nodes[node](message)
            if reply is not None:
                due = time.monotonic() + self.delay.get(node, 0.0)
                self._waiting[identifier] = (due, reply)
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        now = time.monotonic()
        ready = [i for i in message_ids if i in self._waiting and self._waiting[i][0] <= now]
        return [self._waiting.pop(i)[1] for i in ready]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError


class _AtOnce:
    """An executor that does the work when it is handed over."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


class DirectGrid(InlineGrid):
    """The inline engine without worker processes: the real devices, called at once."""

    def __init__(self, config: Config, cache: Path) -> None:
        super().__init__(config.flat(), config.devices, 1, str(cache))
        self._pool = _AtOnce()  # type: ignore[assignment]
        _identify()

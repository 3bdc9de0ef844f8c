"""Orders and reports as Flower messages, with their size in bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from common.errors import UpdateError
from common.order import Order, Report, read_report
from common.update import array_fields, read_array

K = TypeVar("K")
V = TypeVar("V")


class NodeError(UpdateError):
    """A node failed: there is no answer to look at."""


@dataclass(frozen=True, eq=False)
class Reply:
    """A device's answer: its report, its update if any as it came, and its size in bytes."""

    report: Report
    update: np.ndarray | None
    size: int


_TTL_SECONDS = 3 * 86400.0
"""Longer than any round. A device works out from its own clock how long its reply may live, and a
SuperLink refuses one that has no time left: with Flower's 12 hours, that of every device whose
clock is a day ahead."""


def hello_message(node: int) -> Message:
    """Return the message that asks a node for its name."""
    return Message(RecordDict(), node, "query", ttl=_TTL_SECONDS, group_id="hello")


def order_message(
    node: int, order: Order, arrays: dict[str, np.ndarray], attempt: int = 0
) -> tuple[Message, int]:
    """Return an order as a message, and its size in bytes; `attempt` counts tries at the round."""
    content = RecordDict({"order": ConfigRecord({"json": _json(order)})})
    if arrays:
        content["arrays"] = ArrayRecord({name: _array(a) for name, a in arrays.items()})
    group = group_of(order, attempt)
    message = Message(content, node, "train", ttl=_TTL_SECONDS, group_id=group)
    return message, _size(content)


_ORDERS: list[tuple[Order, str]] = []
_ARRAYS: list[tuple[np.ndarray, Array]] = []
_REPLIES: list[tuple[Message, Reply]] = []


def _json(order: Order) -> str:
    """Return an order as text; a round's devices all get the same one."""
    return _remembered(_ORDERS, order, lambda: order.model_dump_json(exclude_defaults=True))


def _array(values: np.ndarray) -> Array:
    """Return values for Flower; a round's devices share the bytes."""
    return _remembered(_ARRAYS, values, lambda: Array(*array_fields(values)))


def _remembered(known: list[tuple[K, V]], key: K, make: Callable[[], V], most: int = 3) -> V:
    """Return what was last made of this very object."""
    for object_, made in known:
        if object_ is key:
            return made
    known[:] = [(key, make()), *known[: most - 1]]
    return known[0][1]


def group_of(order: Order, attempt: int) -> str:
    """Return what an order's messages are marked with; Flower copies it into their replies."""
    again = f".again-{attempt}" if attempt else ""
    return f"{order.step}.{order.phase}.{order.attempt}.{order.round}{again}"


def read_reply(message: Message, most: int | None = None, group: str | None = None) -> Reply:
    """Read a device's answer; who asks again at once gets the same.

    Parameters
    ----------
    message : Message
        From anyone.
    most : int, optional
        Bytes that it may have; more is refused before anything is made of it.
    group : str, optional
        What the message that it answers was marked with.

    Raises
    ------
    NodeError
        If the node failed.
    UpdateError
        If its answer is malformed, oversized, or to another message.
    """
    if message.has_error():
        last = str(message.error.reason).strip().splitlines() or ["no reason given"]
        raise NodeError(f"node failed: {last[-1][:200]}")
    size = _size(message.content)
    if most is not None and size > most:
        raise UpdateError(f"the reply has {size} bytes, at most {most} can be right")
    if group is not None and message.metadata.group_id not in ("", group):
        raise UpdateError(
            f"the reply is to message {message.metadata.group_id!r:.80}, asked was {group}"
        )
    return _remembered(_REPLIES, message, lambda: _read_reply(message, size), most=1)


def _read_reply(message: Message, size: int) -> Reply:
    try:
        text = str(message.content.config_records["report"]["json"])
    except KeyError:
        raise UpdateError("reply has no report") from None
    record: Any = message.content.array_records.get("arrays", {})
    update = read_array(record["update"].data, "the update") if "update" in record else None
    return Reply(read_report(text), update, size)


def _size(content: RecordDict) -> int:
    arrays = sum(
        len(array.data) for record in content.array_records.values() for array in record.values()
    )
    texts = sum(
        len(str(value)) for record in content.config_records.values() for value in record.values()
    )
    return arrays + texts

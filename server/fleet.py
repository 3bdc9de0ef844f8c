"""The devices that are there: found, named, sampled, and what the server knows they hold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from common.errors import RoundError, UpdateError
from common.seeds import numpy_rng
from server.wire import hello_message, read_reply

EXTRA = "extra "
"""In the ledger, before the digest of what a device holds beside models."""


class Fleet:
    """The nodes of a Flower grid by the names that their devices give.

    Node ids change from run to run and engine to engine; sampling, seeds and the ledger go by
    the device's own name, so that a run is repeatable.

    Parameters
    ----------
    grid : Grid
        Where the nodes are.
    held : dict of str to list of str
        Digests of the models that each device is known to hold, newest last.
    """

    def __init__(self, grid: Grid, held: dict[str, list[str]] | None = None) -> None:
        self._grid = grid
        self._names: dict[int, str] = {}
        self.held: dict[str, list[str]] = held or {}

    def wait_for(self, wanted: int, timeout: float) -> None:
        """Wait until `wanted` devices have given their names.

        Raises
        ------
        RoundError
            If they have not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        trouble = ""
        while len(self.present()) < wanted:
            if time.monotonic() > deadline:
                raise RoundError(
                    f"{len(self.present())} of {wanted} devices within {timeout:.0f} s: start "
                    f"more, or lower min-devices{trouble}"
                )
            unknown = [n for n in self._grid.get_node_ids() if n not in self._names]
            hellos = [hello_message(node) for node in unknown]
            left = max(deadline - time.monotonic(), 1.0)
            for node, message in zip_replies(self._grid, hellos, left):
                try:
                    report = read_reply(message).report
                    if report.declined is not None:
                        raise UpdateError(report.declined)
                    self._names[node] = report.device
                except UpdateError as error:
                    trouble = f" (one said: {error})"
            if len(self.present()) < wanted:
                time.sleep(poll_seconds(self._grid))

    def present(self) -> dict[str, int]:
        """Return the nodes that are connected, by device name, in the order of the names."""
        nodes = set(self._grid.get_node_ids())
        return dict(sorted((name, n) for n, name in self._names.items() if n in nodes))

    def sample(self, share: float, *key: int | str) -> dict[str, int]:
        """Return a share of the devices, at least one, drawn by `key` alone."""
        present = self.present()
        names = list(present)
        count = max(1, math.ceil(share * len(names) - 1e-9))
        drawn = numpy_rng("sample", *key).choice(len(names), count, replace=False)
        return {names[i]: present[names[i]] for i in sorted(drawn.tolist())}

    def holds(self, device: str, digest: str) -> bool:
        """Return whether `device` is known to hold the model `digest`."""
        return digest in self.held.get(device, [])

    def note(self, device: str, *digests: str | None) -> None:
        """Remember that `device` holds these models; older ones are forgotten here."""
        known = [d for d in self.held.get(device, []) if d not in digests]
        known += [d for d in digests if d is not None]
        extras = [d for d in known if d.startswith(EXTRA)]
        self.held[device] = [*extras[-2:], *[d for d in known if d not in extras][-4:]]

    def forget(self, device: str, digest: str) -> None:
        """Note that `device` does not hold the model `digest` after all."""
        self.held[device] = [d for d in self.held.get(device, []) if d != digest]


def poll_seconds(grid: Grid) -> float:
    """Return the pause between two looks for replies: short where it costs no network."""
    return float(getattr(grid, "poll_seconds", 0.25))


def zip_replies(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    again: Callable[[int, Message], Message | None] | None = None,
) -> Iterator[tuple[int, Message]]:
    """Send messages and yield (node, reply) as they come, until all are in or time is up.

    Parameters
    ----------
    grid : Grid
        Flower's grid or ours.
    messages : iterable of Message
        One a node.
    timeout : float
        Seconds; a later reply is never used.
    again : callable, optional
        From a node and its reply to a message to send it in answer, whose reply replaces this.
    """
    sent = list(messages)
    # An error from a node that died names the SuperLink as its source: only the message that
    # it answers tells whose it is.
    nodes = {
        identifier: message.metadata.dst_node_id
        for identifier, message in zip(grid.push_messages(sent), sent, strict=True)
    }
    deadline = time.monotonic() + timeout
    while nodes and time.monotonic() < deadline:
        replies = list(grid.pull_messages(list(nodes)))
        for reply in replies:
            node = nodes.pop(reply.metadata.reply_to_message_id)
            following = again(node, reply) if again is not None else None
            if following is None:
                yield node, reply
            else:
                (identifier,) = grid.push_messages([following])
                nodes[identifier] = node
        if not replies:
            time.sleep(poll_seconds(grid))

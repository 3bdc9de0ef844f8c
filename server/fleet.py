"""The devices that are there: found, named, sampled, and what the server knows they hold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from common.errors import RoundError, UpdateError
from common.seeds import numpy_rng
from server.ledger import Ledger
from server.wire import hello_message, read_reply

EXTRA = "extra "
"""In the ledger, before the digest of what a device holds beside models."""
_AT_A_TIME = 32
"""Replies asked of the grid at once: it hands over all that are there, and each is a model."""
_LONGEST_NAME = 200


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
    ledger : Ledger, optional
        What else is known of the devices.

    Attributes
    ----------
    late : dict of str to int
        Messages whose replies nobody waits for any more, and their nodes.
    """

    def __init__(
        self, grid: Grid, held: dict[str, list[str]] | None = None, ledger: Ledger | None = None
    ) -> None:
        self._grid = grid
        self._names: dict[int, str] = {}
        self._doubles: dict[int, str] = {}
        self._hellos: dict[str, tuple[int, float]] = {}  # message: node, when it was sent
        self._said: dict[int, str] = {}
        self.held: dict[str, list[str]] = held or {}
        self.ledger = ledger or Ledger()
        self.late: dict[str, int] = {}

    def wait_for(
        self, wanted: int, timeout: float, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """Wait until `wanted` devices have given their names.

        The first time all nodes that are there are heard, so that who takes part does not depend
        on who answers first; later, newcomers are greeted and nobody waits for them.

        Parameters
        ----------
        wanted : int
            Number of devices.
        timeout : float
            Seconds.
        tell : callable
            Is told which node declined or has a name that another one has.

        Raises
        ------
        RoundError
            If there are too few within `timeout` seconds, or as soon as it is clear that they
            only seem to be because some have one name.
        """
        deadline = time.monotonic() + timeout
        first = not self._names
        while True:
            self._greet(timeout, tell)
            here = len(self.present())
            if here >= wanted and not (first and self._hellos):
                return
            nodes = list(self._grid.get_node_ids())
            heard = all(n in self._names or n in self._doubles for n in nodes)
            if self._doubles and heard and len(nodes) >= wanted:
                raise RoundError(f"{here} of {wanted} devices: {self._doubled()}")
            if time.monotonic() > deadline:
                if here >= wanted:
                    return
                raise RoundError(
                    f"{here} of {wanted} devices within {timeout:.0f} s: start "
                    f"more, or lower min-devices{self._trouble()}"
                )
            time.sleep(poll_seconds(self._grid))

    def _greet(self, patience: float, tell: Callable[[str], None]) -> None:
        """Ask nodes that have no name yet for it, and take the answers that are there."""
        nodes, now = set(self._grid.get_node_ids()), time.monotonic()
        self._forget_gone(nodes, now - patience)
        asked = {node for node, _ in self._hellos.values()}
        unknown = [n for n in sorted(nodes) if n not in self._names and n not in asked]
        unknown = [n for n in unknown if n not in self._doubles]
        self._push_hellos(unknown)
        for reply in self._grid.pull_messages(list(self._hellos)) if self._hellos else ():
            node, _ = self._hellos.pop(reply.metadata.reply_to_message_id, (None, 0.0))
            if node is None:
                continue
            try:
                report = read_reply(reply).report
                if report.declined is not None:
                    raise UpdateError(report.declined)
                self._name(node, _checked_name(report.device), tell)
            except UpdateError as error:
                text = f"node {node} gave no name: {error}"
                if self._said.get(node) != text:
                    tell(text)
                self._said[node] = text

    def _push_hellos(self, nodes: list[int]) -> None:
        now = time.monotonic()
        sent = self._grid.push_messages([hello_message(node) for node in nodes]) if nodes else ()
        self._hellos |= {i: (node, now) for i, node in zip(sent, nodes, strict=True)}

    def _forget_gone(self, nodes: set[int], before: float) -> None:
        """Forget who was replaced, and hellos that were never answered."""
        taken = {name for node, name in self._names.items() if node in nodes}
        # A node that lost its connection comes back as itself, unless its device has another now.
        self._names = {n: c for n, c in self._names.items() if n in nodes or c not in taken}
        self._said = {n: text for n, text in self._said.items() if n in nodes}
        self._doubles = {
            n: name for n, name in self._doubles.items() if n in nodes and name in taken
        }
        self._hellos = {
            i: (node, sent)
            for i, (node, sent) in self._hellos.items()
            if node in nodes and sent >= before
        }

    def _name(self, node: int, name: str, tell: Callable[[str], None]) -> None:
        """Take a node's name; of two nodes that answer with one name, the first keeps it."""
        here = set(self._grid.get_node_ids()) - {node}
        other = next((n for n, known in self._names.items() if known == name and n in here), None)
        self._names[node] = name
        self._said.pop(node, None)
        if other is None:
            return
        # A device that came back has a new node, and its old one takes minutes to be given up:
        # only one that still answers is another device.
        del self._names[other]
        (identifier,) = self._grid.push_messages([hello_message(other)])
        deadline = time.monotonic() + _STILL_THERE_SECONDS
        while time.monotonic() < deadline:
            for reply in self._grid.pull_messages([identifier]):
                if not reply.has_error():
                    del self._names[node]
                    self._names[other], self._doubles[node] = name, name
                    tell(f"{self._doubled()}; node {other} is used")
                return
            time.sleep(poll_seconds(self._grid))

    def _doubled(self) -> str:
        node, name = next(iter(self._doubles.items()))
        other = next(n for n, known in self._names.items() if known == name)
        return (
            f"nodes {other} and {node} both call themselves '{name}': give each device a name of "
            "its own (simulated ones: another partition-id)"
        )

    def _trouble(self) -> str:
        if self._doubles:
            return f" ({self._doubled()})"
        if self._said:
            return f" (one said: {list(self._said.values())[-1].partition(': ')[2]})"
        return ""

    def present(self) -> dict[str, int]:
        """Return the nodes that are connected, by device name, in the order of the names."""
        nodes = set(self._grid.get_node_ids())
        return dict(sorted((name, n) for n, name in self._names.items() if n in nodes))

    def awake(self, least: float = 0.5) -> dict[str, int]:
        """Return those who do not rest; all of them, if that would be less than `least` of all."""
        present = self.present()
        awake = {name: n for name, n in present.items() if not self.ledger.rests(name)}
        return awake if len(awake) >= max(1, math.ceil(least * len(present) - 1e-9)) else present

    def sample(
        self, share: float, *key: int | str, over: float = 1.0, least: float = 0.5
    ) -> dict[str, int]:
        """Return a share of the devices, at least one, drawn by `key` alone.

        Parameters
        ----------
        share : float
            Of those who do not rest.
        *key
            Of the draw.
        over : float
            How many are asked for each that is wanted.
        least : float
            Share of all without which no device may rest.
        """
        awake = self.awake(least)
        names = list(awake)
        count = max(1, math.ceil(share * len(names) - 1e-9))
        count = min(len(names), math.ceil(count * over - 1e-9))
        drawn = numpy_rng("sample", *key).choice(len(names), count, replace=False)
        return {names[i]: awake[names[i]] for i in sorted(drawn.tolist())}

    def sweep(self) -> list[int]:
        """Drop replies that came after their round was over; return their nodes."""
        nodes = []
        waiting = list(self.late)
        for start in range(0, len(waiting), _AT_A_TIME):
            for reply in self._grid.pull_messages(waiting[start : start + _AT_A_TIME]):
                node = self.late.pop(reply.metadata.reply_to_message_id, None)
                if node is not None and not reply.has_error():
                    nodes.append(node)
        for identifier in list(self.late)[:-_MOST_LATE]:
            del self.late[identifier]
        return nodes

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


_MOST_LATE = 1_000
"""Messages whose late replies are looked for: those of a device that is gone never come."""
_STILL_THERE_SECONDS = 30.0
"""A real node needs a process's start to answer."""


def _checked_name(name: str) -> str:
    if not (0 < len(name) <= _LONGEST_NAME and name.isprintable()):
        raise UpdateError(
            f"a device's name is {name[:40]!r} ({len(name)} characters): give it 1 to "
            f"{_LONGEST_NAME} printable ones"
        )
    return name


def poll_seconds(grid: Grid) -> float:
    """Return the pause between two looks for replies: short where it costs no network."""
    return float(getattr(grid, "poll_seconds", 0.25))


def zip_replies(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    again: Callable[[int, Message], Message | None] | None = None,
    late: dict[str, int] | None = None,
) -> Generator[tuple[int, Message]]:
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
    late : dict, optional
        Messages without a reply, and their nodes, are added to it when this ends.
    """
    sent = list(messages)
    # An error from a node that died names the SuperLink as its source: only the message that
    # it answers tells whose it is.
    nodes = {
        identifier: message.metadata.dst_node_id
        for identifier, message in zip(grid.push_messages(sent), sent, strict=True)
    }
    del sent
    deadline = time.monotonic() + timeout
    try:
        while nodes and time.monotonic() < deadline:
            found, waiting = False, list(nodes)
            for start in range(0, len(waiting), _AT_A_TIME):
                for reply in grid.pull_messages(waiting[start : start + _AT_A_TIME]):
                    found = True
                    node = nodes.pop(reply.metadata.reply_to_message_id, None)
                    if node is None:  # the same reply twice: one a message is used
                        continue
                    following = again(node, reply) if again is not None else None
                    if following is None:
                        yield node, reply
                    else:
                        (identifier,) = grid.push_messages([following])
                        nodes[identifier] = node
            if not found:
                time.sleep(poll_seconds(grid))
    finally:
        if late is not None:
            late |= nodes

"""A Flower grid in one process: the client app is called directly, on a few workers.

No Ray, no SuperLink, no process per message. Each worker handles one device at a time on one
thread, so what comes out does not depend on how many there are. An array that goes to many
devices is written to a file once and read once by each worker: their models are one copy in the
page cache, not a pickle each. A large array of a reply comes by file, too.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.process import settle
from server.workers import prepare

Settings = dict[str, Any]


class InlineGrid(Grid):
    """Nodes 1..n, each a simulated device.

    Parameters
    ----------
    settings : mapping
        Kebab-case settings of the run, for the devices.
    devices : int
        How many.
    workers : int
        Worker processes; 0 means one a core, at most one a device.
    cache : str
        Folder in which the devices keep their base models.

    Notes
    -----
    Used as a context manager; the workers end with it.
    """

    poll_seconds = 0.005

    def __init__(self, settings: Mapping[str, Any], devices: int, workers: int, cache: str) -> None:
        self._settings = dict(settings)
        self._devices = devices
        self._cache = cache
        self._count = min(workers or len(os.sched_getaffinity(0)), devices)
        self._pool: Executor | None = None
        self._numbers = itertools.count(1)
        self._pending: dict[str, Future[Message]] = {}
        self._done: set[str] = set()
        self._shelf: Shelf | None = None
        self._run = Run.create_empty(run_id=1)

    def __enter__(self) -> InlineGrid:
        _identify()
        self._pool = ProcessPoolExecutor(self._count, prepare(), _prepare)
        self._shelf = Shelf(Path(self._cache) / "sent")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message (see flwr.serverapp.Grid)."""
        return Message(
            content=content,
            message_type=message_type,
            dst_node_id=dst_node_id,
            group_id=group_id,
            ttl=ttl,
        )

    def get_node_ids(self) -> Iterable[int]:
        """Return 1..n."""
        return range(1, self._devices + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to the workers."""
        assert self._pool is not None
        identifiers = []
        for message in messages:
            identifier = f"inline-{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = identifier
            node = {
                "partition-id": message.metadata.dst_node_id - 1,
                "num-partitions": self._devices,
                "cache": self._cache,
            }
            if self._shelf is None:
                future = self._pool.submit(_answer, self._settings, node, message)
            else:
                handed = self._shelf.shortened(message)
                future = self._pool.submit(_answer_by_file, self._settings, node, handed)
                future.add_done_callback(self._shelf.done_with(handed))
            self._pending[identifier] = future
            future.add_done_callback(partial(self._note_done, identifier))
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there; an exception in a device is raised here."""
        ready = [identifier for identifier in message_ids if identifier in self._done]
        return [self._collected(identifier) for identifier in ready]

    def _collected(self, identifier: str) -> Message:
        self._done.remove(identifier)
        return picked_up(self._pending.pop(identifier).result())

    def _note_done(self, identifier: str, _: Future[Message]) -> None:
        self._done.add(identifier)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send and wait for all replies, or until `timeout` seconds have passed."""
        waiting = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            for reply in self.pull_messages(sorted(waiting)):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            time.sleep(self.poll_seconds)
        return replies


@dataclass(frozen=True)
class Elsewhere:
    """Stands for bytes that lie in a file."""

    path: str


class Shelf:
    """Files of what many messages carry, each there until the last of these was answered.

    Parameters
    ----------
    folder : Path
        Made when first written to.
    least : int
        Bytes from which it is worth a file.
    """

    def __init__(self, folder: Path, least: int = 1 << 15) -> None:
        self._folder, self._least = folder, least
        self._numbers = itertools.count()
        self._files: dict[int, tuple[bytes, str]] = {}  # the bytes keep their id theirs
        self._readers: Counter[str] = Counter()
        self._lock = threading.Lock()

    def shortened(self, message: Message) -> Message:
        """Return `message`, or a copy of it whose large arrays lie in files."""
        parts = message.content.array_records.values()
        if all(len(array.data) < self._least for part in parts for array in part.values()):
            return message
        records: dict[str, Any] = dict(message.content)
        for name, record in message.content.array_records.items():
            records[name] = ArrayRecord({key: copy.copy(array) for key, array in record.items()})
            for array in records[name].values():
                if len(array.data) >= self._least:
                    array.data = Elsewhere(self._file(array.data))
        short = copy.copy(message)
        short.__dict__["_content"] = RecordDict(records)
        return short

    def _file(self, data: bytes) -> str:
        with self._lock:
            if id(data) not in self._files:
                self._folder.mkdir(parents=True, exist_ok=True)
                path = self._folder / f"{os.getpid()}-{next(self._numbers)}"
                path.write_bytes(data)
                self._files[id(data)] = data, str(path)
            _, name = self._files[id(data)]
            self._readers[name] += 1
            return name

    def done_with(self, message: Message) -> Callable[[Future[Message]], None]:
        """Return what is to be called when `message` was answered."""
        names = [array.data.path for array in _elsewhere(message)]

        def done(_: Future[Message]) -> None:
            with self._lock:
                self._readers.subtract(names)
                # one that was read by all may still be sent to more: the newest stay
                free = [i for i, (_, name) in self._files.items() if not self._readers[name]]
                for number in free[:-2]:
                    name = self._files.pop(number)[1]
                    del self._readers[name]
                    Path(name).unlink(missing_ok=True)

        return done


def _arrays(message: Message) -> Iterator[Any]:
    if message.has_content():
        for record in message.content.array_records.values():
            yield from record.values()


def _elsewhere(message: Message) -> Iterator[Any]:
    return (array for array in _arrays(message) if isinstance(array.data, Elsewhere))


@lru_cache(maxsize=3)
def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _prepare() -> None:
    """Set a worker up: one thread, so that sums round alike wherever a device is trained."""
    settle()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server's process ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _identify()


def _end_with_parent() -> None:
    """End this worker when the server's process is gone, however it went.

    A worker that waits for work does not notice: its siblings hold the queue open.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _identify() -> None:
    """Give this process the identity without which Flower makes no message."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


@lru_cache(maxsize=1)
def _client_app() -> ClientApp:
    from client.app import app

    return app


_LEAST_FILED = 2**18
"""Bytes from which an array of a reply goes by file."""
_FILES = itertools.count()
_FULL, _FREE = ".reply", ".free"


def _answer_by_file(settings: Settings, node: Settings, message: Message) -> Message:
    """Answer, with the large arrays in files."""
    return put_down(_answer(settings, node, message), Path(node["cache"]) / "sent")


def put_down(reply: Message, folder: Path) -> Message:
    """Write a reply's large arrays into files, from which `picked_up` reads them.

    A file that was read is written again: its pages are there and in the processor's cache.
    """
    for array in _arrays(reply):
        if len(array.data) >= _LEAST_FILED:
            path = folder / f"{os.getpid()}-{next(_FILES)}{_FULL}"
            folder.mkdir(parents=True, exist_ok=True)
            with _free_file(path).open("r+b") as file:
                file.write(array.data)
                file.truncate()
            array.data = Elsewhere(str(path))
    return reply


def _free_file(path: Path) -> Path:
    """Return `path`, which is now a file that nobody needs, or a new one."""
    for free in path.parent.glob(f"*{_FREE}"):
        with contextlib.suppress(FileNotFoundError):  # another worker was faster
            return free.rename(path)
    path.touch()
    return path


def picked_up(reply: Message) -> Message:
    """Read the large arrays of a reply; their files are free for others."""
    for array in _elsewhere(reply):
        path = Path(array.data.path)
        array.data = path.read_bytes()
        path.rename(path.with_suffix(_FREE))
    return reply


def _answer(settings: Settings, node: Settings, message: Message) -> Message:
    """Let one device answer one message, in a worker."""
    for array in _elsewhere(message):
        array.data = _read(array.data.path)
    number = message.metadata.dst_node_id
    context = Context(
        run_id=1, node_id=number, node_config=node, state=RecordDict(), run_config=settings
    )
    return _client_app()(message, context)

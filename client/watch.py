"""Images from a folder that something else writes into.

``FOLDER/LABEL/file`` has the folder's name as its label, ``FOLDER/file`` has none. The folder is
polled, which works on every file system; a file is taken when it has not changed for a while, so
that none is read half written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from client.collect import Collector, Taken
from common.data.folder import is_image
from common.errors import ConfigError, DataError, FallowError

SETTLED_SECONDS = 1.0
"""A file that was changed more recently may still be written."""

_HOUR = 3600.0

Seen = tuple[str, int, int]


@dataclass
class Watch:
    """A folder that is looked at again and again.

    Attributes
    ----------
    collector : Collector
        Takes what is found.
    folder : Path
        Where images appear.
    source : str
        Under whose consent they are kept.
    remove : bool
        Remove a file once it was taken, or turned out to be known; what is refused stays.
    settled : float
        Seconds for which a file must not have changed.
    """

    collector: Collector
    folder: Path
    source: str
    remove: bool = False
    settled: float = SETTLED_SECONDS
    _seen: set[Seen] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder}: no such folder to watch")

    def poll(self) -> Iterator[tuple[Path, Taken | FallowError]]:
        """Take what is new; yields each file and what became of it.

        Raises
        ------
        FallowError
            What does not lie in one file: no consent, a full disk, a damaged store.
        """
        there: set[Seen] = set()
        for path in sorted(self.folder.rglob("*")):
            if not is_image(path, self.folder):
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            key = (str(path), stat.st_mtime_ns, stat.st_size)
            if key in self._seen:
                there.add(key)
                continue
            if 0 <= time.time() - stat.st_mtime < self.settled:
                continue
            there.add(key)
            result = self._take(path)
            if self.remove and isinstance(result, Taken):
                path.unlink(missing_ok=True)
            yield path, result
        self._seen = there

    def _take(self, path: Path) -> Taken | FallowError:
        parts = path.relative_to(self.folder).parts
        label = parts[0] if len(parts) > 1 else None
        try:
            self.collector.check_label(label)
        except ConfigError as error:
            return error
        try:
            data = path.read_bytes()
        except OSError as error:
            return DataError(f"{path}: cannot be read ({error.strerror}); make it readable")
        try:
            return self.collector.add(data, str(path), self.source, label)
        except DataError as error:
            return error


def watch(
    watched: Watch,
    tell: Callable[[Path, Taken | FallowError], None],
    interval: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Poll for ever; what is too old goes every hour."""
    expired = -_HOUR
    while True:
        if time.monotonic() - expired >= _HOUR:
            watched.collector.expire()
            expired = time.monotonic()
        for path, result in watched.poll():
            tell(path, result)
        sleep(interval)

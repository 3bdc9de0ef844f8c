"""Where checkpoints are: a folder, or whatever fsspec opens; and that one server alone works there.

A file is written whole or not at all in a folder. Object stores do the same by themselves; on other
file systems a torn file is found by its checksum and the one before it is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import fsspec

from common.errors import ConfigError, DiskError, StoreError
from common.store import disk_errors, write_bytes


class Files(Protocol):
    """Files by name; a name may have folders before it, with slashes."""

    @property
    def where(self) -> str:
        """For messages."""

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder, sorted; "" is the top."""

    def read(self, name: str) -> bytes:
        """Return a file's bytes; StoreError if it cannot be read."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file; DiskError if it cannot be written."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def owned(self) -> contextlib.AbstractContextManager[None]:
        """Keep other servers out; StoreError if one is there."""


def open_files(place: str | Path) -> Files:
    """Return the files at a path or fsspec URL.

    Raises
    ------
    ConfigError
        If fsspec does not know the URL's protocol, or lacks its package.
    """
    text = str(place)
    if isinstance(place, Path) or "://" not in text:
        return FolderFiles(Path(place))
    if text.startswith("file://"):
        return FolderFiles(Path(text.removeprefix("file://")))
    return UrlFiles(text)


class FolderFiles:
    """Files in a folder of this machine.

    Parameters
    ----------
    folder : Path
        Made when first written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def where(self) -> str:
        """The folder."""
        return str(self._folder)

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder, sorted."""
        found = (self._folder / folder).glob("[!.]*")
        return sorted(path.relative_to(self._folder).as_posix() for path in found if path.is_file())

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        path = self._folder / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise StoreError(f"{path} is not there") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror or error}") from None

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all, and see to it that it is on the disk."""
        write_bytes(self._folder / name, data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self._folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Lock the folder, and clear away what a killed writer left half-written."""
        with locked(self._folder):
            for pattern in (".state-*.json.*", "tensors/.*.safetensors.*"):
                for path in self._folder.glob(pattern):
                    path.unlink(missing_ok=True)
            yield


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of a folder; the lock ends with its owner, however it ends.

    Raises
    ------
    StoreError
        If another process has it.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(f"another run works in {folder}: choose another --out") from None
        yield
    finally:
        os.close(handle)


class UrlFiles:
    """Files behind an fsspec URL.

    Such stores have no locks. A lease in the file ``owner`` that is renewed as long as its server
    lives stands in: a second server refuses to start while it is fresh, and one whose lease was
    taken writes no more. Two that start within the same second may both believe in theirs, until
    their first renewal.

    Parameters
    ----------
    url : str
        For example ``s3://bucket/folder``.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"checkpoint-store is '{url}': {error}") from None
        self._owner: str | None = None
        self._taken_by: str | None = None

    @property
    def where(self) -> str:
        """The URL."""
        return self._url

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder, sorted."""
        self._files.invalidate_cache()
        path = self._path(folder).rstrip("/")
        try:
            found = self._files.ls(path, detail=True)
        except FileNotFoundError:
            return []
        except Exception as error:  # whatever the store's package raises
            raise StoreError(f"{self._url} cannot be read: {_first_line(error)}") from None
        prefix = f"{folder}/" if folder else ""
        files = [e["name"] for e in found if e["type"] == "file"]
        return sorted(prefix + name.rsplit("/", 1)[1] for name in files)

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        try:
            return bytes(self._files.cat_file(self._path(name)))
        except FileNotFoundError:
            raise StoreError(f"{self._url}/{name} is not there") from None
        except Exception as error:  # whatever the store's package raises
            raise StoreError(f"{self._url}/{name} cannot be read: {_first_line(error)}") from None

    def write(self, name: str, data: bytes) -> None:
        """Write a file, unless another server has taken the store over."""
        if self._taken_by is not None:
            raise StoreError(
                f"{self._url} was taken over by another server ({self._taken_by}): this one stops"
            )
        self._put(name, data)

    def _put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        try:
            self._files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self._files.pipe_file(path, data)
        except Exception as error:  # whatever the store's package raises
            raise DiskError(f"cannot write {self._url}/{name}: {_first_line(error)}") from None

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(Exception):  # one that stays costs space and nothing else
            self._files.rm_file(self._path(name))

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the lease while the context lasts."""
        lease = self._lease()
        if lease is not None and abs(time.time() - lease["beat"]) < _LEASE_SECONDS:
            raise StoreError(
                f"another server ({lease['owner']}) works in {self._url}: end it, or wait "
                f"{_LEASE_SECONDS} s if it is gone already"
            )
        self._owner = f"{socket.gethostname()}, process {os.getpid()}, {time.time_ns()}"
        self._renew()
        end = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(end,), daemon=True)
        keeper.start()
        try:
            yield
        finally:
            end.set()
            keeper.join()
            lease = self._lease()
            if lease is not None and lease["owner"] == self._owner:
                self.remove(_LEASE)

    def _lease(self) -> dict[str, Any] | None:
        self._files.invalidate_cache()
        try:
            lease = json.loads(self.read(_LEASE))
        except (StoreError, ValueError):
            return None
        sound = isinstance(lease, dict) and isinstance(lease.get("beat"), float)
        return lease if sound and "owner" in lease else None

    def _renew(self) -> None:
        lease = {"owner": self._owner, "beat": time.time()}
        self._put(_LEASE, json.dumps(lease).encode())

    def _keep(self, end: threading.Event) -> None:
        while not end.wait(_LEASE_SECONDS / 4):
            lease = self._lease()
            if lease is not None and lease["owner"] != self._owner:
                self._taken_by = str(lease["owner"])
                return
            with contextlib.suppress(DiskError):  # the next checkpoint tells of it
                self._renew()


_LEASE = "owner"
_LEASE_SECONDS = 120


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:200]}"

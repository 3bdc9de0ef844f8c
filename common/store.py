"""Bundles on disk: safetensors and JSON, written atomically, read with their checksum.

Whatever is written here is either whole or absent, also after a power cut: bytes go to a
temporary file, are synced, and are renamed. Nothing that is read can run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from common.disk import disk_errors as disk_errors
from common.disk import write_bytes as write_bytes
from common.errors import StoreError
from common.state import State, state_digest

_HEADER = "fallow"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON, atomically, with its own checksum in ``sha256``.

    Parameters
    ----------
    path : Path
        Where to.
    value : dict
        JSON data without a key ``sha256``.
    """
    write_bytes(path, json_bytes(value))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return what `write_json` writes."""
    return json.dumps(_seal(value), indent=1).encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises
    ------
    StoreError
        If it is absent, torn or altered.
    """
    return json_of(path, _read_bytes(path))


def json_of(source: Path | str, data: bytes) -> dict[str, Any]:
    """Return the value that `json_bytes` made `data` of.

    Raises
    ------
    StoreError
        If it is torn or altered; `source` is named in it.
    """
    return _unseal(source, data)


def write_state_file(
    path: Path, state: Mapping[str, torch.Tensor], durable: bool = True, /, **meta: str
) -> None:
    """Write a model state as safetensors, with `meta` and its digest in the header."""
    write_bytes(path, state_bytes(state, **meta), durable=durable)


def state_bytes(state: Mapping[str, torch.Tensor], **meta: str) -> bytes:
    """Return what `write_state_file` writes."""
    # One key, since safetensors writes several in random order: equal models, equal files.
    header = json.dumps(_seal({**meta, "digest": state_digest(state)}), sort_keys=True)
    return save(dict(state), metadata={_HEADER: header})


def read_state_file(path: Path) -> State:
    """Return the tensors of a safetensors file (see `read_state_and_header`)."""
    return read_state_and_header(path)[0]


def read_state_and_header(path: Path) -> tuple[State, dict[str, str]]:
    """Read a safetensors state and what `write_state_file` was told beside it.

    Both are checked against their digests; a file of someone else has neither, and its header
    comes back empty.

    Raises
    ------
    StoreError
        If it is absent, torn or altered.
    """
    return state_and_header_of(path, _read_bytes(path))


def state_and_header_of(source: Path | str, data: bytes) -> tuple[State, dict[str, str]]:
    """Read the bytes of such a file (see `read_state_and_header`)."""
    try:
        state = load(data)
    except SafetensorError as error:
        raise StoreError(f"{source} is no readable safetensors file: {error}") from None
    raw = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    sealed = raw.get("__metadata__", {}).get(_HEADER)
    header = {} if sealed is None else _unseal(source, sealed)
    if header and header["digest"] != state_digest(state):
        raise StoreError(f"{source} was altered: its digest does not match")
    return state, header


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise StoreError(f"{path} is not there") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from None


def _seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return `value` with the checksum of its canonical JSON."""
    body = json.dumps(value, sort_keys=True)
    return {**value, "sha256": hashlib.sha256(body.encode()).hexdigest()}


def _unseal(path: Path | str, text: str | bytes) -> dict[str, Any]:
    """Return what `_seal` was given, from the JSON of its result."""
    try:
        sealed = dict(json.loads(text))
        value = {name: part for name, part in sealed.items() if name != "sha256"}
    except (ValueError, TypeError):
        raise StoreError(f"{path} is torn or no file of fallow") from None
    if _seal(value) != sealed:
        raise StoreError(f"{path} was altered: its checksum does not match")
    return value


class BundleStore:
    """Model states in a folder, each named by its digest.

    Parameters
    ----------
    folder : Path
        Made when first written to.
    keep : int, optional
        If given, at most so many are kept, the least recently used go first. Processes on one
        machine may share the folder.
    durable : bool
        See `write_bytes`.
    """

    def __init__(self, folder: Path, keep: int | None = None, *, durable: bool = True) -> None:
        self.folder = folder
        self._keep = keep
        self._durable = durable

    def path(self, digest: str) -> Path:
        """Return where the state called `digest` is or would be."""
        return self.folder / f"{digest}.safetensors"

    def has(self, digest: str) -> bool:
        """Return whether the state called `digest` is here."""
        return self.path(digest).exists()

    def put(self, state: Mapping[str, torch.Tensor]) -> str:
        """Keep `state` and return its digest."""
        digest = state_digest(state)
        if self.has(digest):
            self._touch(digest)
        else:
            write_state_file(self.path(digest), state, self._durable)
            self._forget_oldest(digest)
        return digest

    def get(self, digest: str) -> State:
        """Return the state called `digest`.

        Raises
        ------
        StoreError
            If it is absent or damaged.
        """
        path = self.path(digest)
        state, header = read_state_and_header(path)
        if header.get("digest") != digest:
            raise StoreError(f"{path} was altered: it is not the state of that digest")
        self._touch(digest)
        return state

    def discard(self, digest: str) -> None:
        """Remove the state called `digest`, if it is here."""
        self.path(digest).unlink(missing_ok=True)

    def _touch(self, digest: str) -> None:
        if self._keep is not None:
            with contextlib.suppress(OSError):
                os.utime(self.path(digest))

    def _forget_oldest(self, newest: str) -> None:
        if self._keep is None:
            return
        # `newest` stays by name: clocks are coarse, and are set back.
        paths = [path for path in self.folder.glob("*.safetensors") if path.stem != newest]
        for path in sorted(paths, key=_age, reverse=True)[self._keep - 1 :]:
            path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0

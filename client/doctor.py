"""What is wrong with a device, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from client.index import Index
from client.limits import Guard
from client.node import Connection
from client.settings import DeviceSettings, read_settings
from common.errors import FallowError

Level = Literal["good", "note", "bad"]

_NEEDED = ("flwr", "torch", "numpy", "pillow", "onnxruntime", "safetensors", "grpcio", "imagehash")
_LEAST_FREE_MIB = 500
_REACH_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    what : str
        What was looked at.
    level : str
        ``good``, ``note`` (it works, but not as it may be meant) or ``bad``.
    text : str
        What was found, and what to do.
    """

    what: str
    level: Level
    text: str

    def __str__(self) -> str:
        mark = {"good": "ok  ", "note": "note", "bad": "BAD "}[self.level]
        return f"{mark}  {self.what}: {self.text}"

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return asdict(self)


def examine(store: Path, connection: Connection | None, repair: bool = False) -> list[Finding]:
    """Look at everything that a device needs.

    Parameters
    ----------
    store : Path
        The device's.
    connection : Connection, optional
        How it is to reach its fleet; without, keys and server are left out.
    repair : bool
        Remove images whose file is gone or altered, and files that no row names.
    """
    findings = [_environment()]
    settings = DeviceSettings()
    try:
        settings = read_settings(store)
        findings.append(Finding("settings", "good", "device.toml can be used"))
    except FallowError as error:
        findings.append(Finding("settings", "bad", str(error)))
    findings += _guarded("store", lambda: _store(store, settings, repair))
    findings += _guarded("disk", lambda: _disk(store, settings))
    if connection is not None:
        findings += _guarded("keys", lambda: _keys(connection))
        findings += _guarded("server", lambda: _server(connection))
    return findings


def _guarded(what: str, look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(look())
    except FallowError as error:
        found.append(Finding(what, "bad", str(error)))
    return found


def _environment() -> Finding:
    missing = []
    for name in _NEEDED:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("environment", "bad", f"{', '.join(missing)} missing: install fallow again")
    python = ".".join(str(part) for part in sys.version_info[:3])
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("flwr", "torch"))
    return Finding("environment", "good", f"Python {python}, {versions}")


def _store(store: Path, settings: DeviceSettings, repair: bool) -> Iterator[Finding]:
    with Index.open(store) as index:
        wrong = index.check()
        if wrong and repair:
            gone = [i.digest for i in index.images("TRUE") if index.content(i.digest) is None]
            for digest in gone:
                index.remove("digest = ?", (digest,))
            wrong = index.check()
            yield Finding("store", "note", f"{len(gone)} damaged images were removed")
        if repair:
            yield Finding("store", "note", f"{index.sweep()} files without a row were removed")
        for text in wrong[:10]:
            advice = "" if repair else "; --repair removes it"
            yield Finding("store", "bad", text + advice)
        if not wrong:
            count = index.one("SELECT COUNT(*) FROM images WHERE evicted = 0")
            yield Finding("store", "good", f"{index.name}, {count} images, all whole")
        if not index.one("SELECT COUNT(*) FROM sources"):
            yield Finding(
                "consent", "note", "no source has any: `fallow-device collect consent SOURCE`"
            )
        labelled = index.one("SELECT COUNT(*) FROM images WHERE evicted = 0 AND label IS NOT NULL")
        if labelled < 2:
            yield Finding(
                "labels", "note", f"{labelled} labelled images: a round needs at least two"
            )
        newest = index.one("SELECT MAX(added) FROM images")
        if newest is not None and newest > time.time() + 60:
            yield Finding(
                "clock", "bad", "images are dated in the future: set the clock, or use NTP"
            )
        try:
            Guard(index, settings.limits).admit()
            yield Finding("limits", "good", "a round would be taken now")
        except FallowError as error:
            yield Finding("limits", "note", f"a round would be declined now: {error}")


def _disk(store: Path, settings: DeviceSettings) -> Iterator[Finding]:
    mib = 2**20
    place = next(path for path in (store.absolute(), *store.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free // mib
    if free < _LEAST_FREE_MIB:
        yield Finding(
            "disk", "bad", f"{free} MiB free, models and rounds need {_LEAST_FREE_MIB}: free some"
        )
    elif free < settings.collect.quota_mib:
        yield Finding(
            "disk",
            "note",
            f"{free} MiB free, less than collect.quota-mib ({settings.collect.quota_mib:g}): "
            "lower it",
        )
    else:
        yield Finding("disk", "good", f"{free} MiB free")


def _keys(connection: Connection) -> Iterator[Finding]:
    connection.check()
    if connection.insecure:
        yield Finding("keys", "note", "--insecure: no TLS and no key, on loopback")
        return
    assert connection.key is not None
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        key = load_ssh_private_key(connection.key.read_bytes(), None)
    except (ValueError, TypeError, OSError) as error:
        yield Finding("keys", "bad", f"{connection.key}: no OpenSSH private key ({error})")
        return
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        yield Finding(
            "keys",
            "bad",
            f"{connection.key}: Flower needs an elliptic-curve key: make it with "
            "ssh-keygen -t ecdsa -b 384",
        )
        return
    yield Finding("keys", "good", f"{connection.key} ({key.curve.name})")


def _server(connection: Connection) -> Iterator[Finding]:
    host, port = connection.address()
    try:
        with socket.create_connection((host, port), _REACH_SECONDS) as plain:
            if connection.insecure:
                yield Finding("server", "good", f"{host}:{port} answers")
                return
            authority = connection.root_certificates
            context = ssl.create_default_context(cafile=authority and str(authority))
            with context.wrap_socket(plain, server_hostname=host) as secured:
                certificate = secured.getpeercert() or {}
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", "") or error.reason or str(error)
        yield Finding(
            "server",
            "bad",
            f"{host}:{port}: TLS fails ({reason}): check --root-certificates and "
            "the name in the server's certificate",
        )
        return
    except OSError as error:
        yield Finding(
            "server",
            "bad",
            f"{host}:{port} does not answer ({error}): check address, network "
            "and that the server runs",
        )
        return
    until = str(certificate.get("notAfter", "?"))
    yield Finding("server", "good", f"{host}:{port} answers; its certificate holds until {until}")

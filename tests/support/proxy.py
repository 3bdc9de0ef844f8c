"""The nginx of deploy/nginx on free ports, and requests to it."""

from __future__ import annotations

import http.client
import os
import shutil
import ssl
from pathlib import Path

import pytest
from processes import ROOT

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")


def tool(name: str, found: str | None) -> str:
    """Return a system tool; skip where it is absent, fail where CI should have installed it."""
    if found is None:
        reason = f"{name} is not installed: deploy/install-test-packages.sh brings it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def nginx_command(folder: Path, name: str, certs: Path, changes: dict[str, str]) -> list[str]:
    """Lay out a folder for nginx as the guide says; returns the command that serves it.

    `changes` are what an operator would edit: ports and names.
    """
    (folder / "tmp").mkdir(parents=True)
    (folder / "certs").symlink_to(certs.resolve())
    text = (ROOT / "deploy" / "nginx" / name).read_text()
    for old, new in changes.items():
        assert old in text, f"{name} does not say {old!r}"
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    # -c goes by its own folder for what the file names: certs lies beside it.
    command = [tool("nginx", NGINX), "-p", f"{folder}/", "-c", str(folder / "nginx.conf")]
    return [*command, "-g", "daemon off;"]


def ask(
    port: int,
    path: str,
    ca: Path,
    client: tuple[Path, Path] | None = None,
    size: int = 0,
    method: str = "POST",
) -> int:
    """Ask over TLS, with a body of `size` bytes; returns the HTTP status."""
    context = ssl.create_default_context(cafile=str(ca))
    if client is not None:
        context.load_cert_chain(*client)
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=30)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        connection.putheader("Content-Type", "application/protobuf")
        connection.putheader("Content-Length", str(size))
        connection.endheaders()
        if size and size < 1_000_000:
            connection.send(bytes(size))
        return connection.getresponse().status
    finally:
        connection.close()

"""A run on a SuperLink and its SuperNodes, and what Flower counted of its traffic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import ROOT, device_command, free_port, process, run, status, wait_for


@dataclass(frozen=True)
class Done:
    """A run: its folder, and the bytes that Flower counted from and to the devices."""

    out: Path
    up: int
    down: int

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl."""
        return [json.loads(line) for line in (self.out / "rounds.jsonl").read_text().splitlines()]

    def counted(self, way: str) -> int:
        """Return the bytes that we counted, ``up`` or ``down``."""
        return sum(record[f"bytes_{way}"] for record in self.rounds)


def superlink_run(settings: Mapping[str, Any], folder: Path) -> Done:
    """Run on a SuperLink and as many SuperNodes as `settings` has devices, in `folder`."""
    port, out, home = free_port(), folder / "out", folder / "operator"
    home.mkdir(parents=True)
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "local"\n\n'
        f'[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    given = {"data": "digits", **settings, "out": str(out)}
    overrides = " ".join(f"{key}={toml(value)}" for key, value in given.items())
    command = ["flwr", "run", str(ROOT), "local", "--stream", "--run-config", overrides]
    with ExitStack() as stack:
        link = ["flower-superlink", "--insecure", "--port", str(port)]
        stack.enter_context(process("superlink", folder, link))
        wait_for(port)
        count, address = int(settings["devices"]), f"127.0.0.1:{port}"
        for number in range(count):
            made = device_command(number, address, folder, ["--insecure"], count)
            stack.enter_context(process(f"device-{number}", folder, made))
        run(command, FLWR_HOME=str(home))
        listed = run(["flwr", "list", "local", "--format", "json"], FLWR_HOME=str(home))
    (told,) = json.loads(listed[listed.index("{") :])["runs"]
    log = (folder / "superlink.log").read_text()[-3000:]
    assert status(out) == "complete", log
    moved = told["network-traffic"]
    return Done(out, moved["inbound-bytes"], moved["outbound-bytes"])


def toml(value: Any) -> str:
    """Return a value as Flower's overrides want it."""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    plain = text in ("true", "false") or text.replace(".", "", 1).replace("e-", "", 1).isdigit()
    return text if plain else f"'{text}'"

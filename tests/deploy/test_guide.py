"""The guide, word for word: its commands are run in the order in which a reader meets them."""

import json
import os
import re
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest
from processes import ROOT, Process
from proxy import NGINX, tool

PORTS = (8000, 8443, *range(9101, 9106))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_guide_leads_from_zero_to_five_devices(tmp_path: Path) -> None:
    tool("nginx", NGINX)
    taken = [port for port in PORTS if not free(port)]
    assert not taken, f"the guide's ports {taken} are in use on this machine"
    script = "\n".join(["set -euo pipefail", f"cd '{ROOT}'", *commands()])
    fleet = tmp_path / "fleet"
    (tmp_path / "guide.sh").write_text(script)
    places = {"FLEET": str(fleet), "HOME": str(tmp_path)}
    # In a process group of its own: whatever stops the reader, all that it started ends with it.
    command = ["setsid", "bash", str(tmp_path / "guide.sh")]
    reader = Process("reader", tmp_path, command, **places)
    try:
        code = reader.wait(1700)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(reader.pid, number)
                time.sleep(5)
        reader.end()
    logs = "\n".join(f"== {p.name}\n{p.read_text()[-1000:]}" for p in fleet.glob("*.log"))
    assert code == 0, reader.said()[-3000:] + logs
    summary = json.loads((fleet / "runs" / "first" / "summary.json").read_text())
    assert summary["status"] == "complete"
    rounds = [json.loads(x) for x in (fleet / "runs/first/rounds.jsonl").read_text().splitlines()]
    assert {r["devices_used"] for r in rounds} == {5}
    assert "device-5  revoked" in reader.said()
    assert len(re.findall(r"device-\d  node \d+", reader.said())) == 4
    assert [port for port in PORTS if not free(port)] == []


def commands() -> list[str]:
    """Return the shell blocks of the section that starts from zero."""
    text = (ROOT / "deploy" / "README.md").read_text()
    section = text.split("## From zero to five devices")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 7
    return blocks


def free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0

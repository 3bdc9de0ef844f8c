"""Devices that collect and train, as real processes, with every byte on the wire recorded."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from leaks import Secret, find_images
from processes import BIN, ROOT, free_port, process, run, wait_for
from recorded import recorded
from test_traffic import png

from common.data import open_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

TINY = {
    "net": "'resnet8'",
    "width": "8",
    "devices": "2",
    "steps": "1",
    "rounds": "1",
    "prior-size": "150",
    "prior-epochs": "3",
    "statistics-gap": "1",  # a prior so little trained falls behind its statistics
    "freeing-epochs": "2",
    "consolidate-rounds": "1",
    "max-drop": "1.0",
    "accept-drop": "1.0",
    "data": "'digits'",
}


def test_devices_train_on_what_they_collected_and_send_no_image(tmp_path: Path) -> None:
    images = open_source("digits").take(np.arange(200))
    secrets = [Secret(png(pixels), pixels) for pixels in images.images]
    program = str(BIN / "fallow-device")
    stores = [tmp_path / f"store-{number}" for number in range(2)]
    for number, store in enumerate(stores):
        inbox = tmp_path / f"inbox-{number}"
        for i in range(number * 100, number * 100 + 100):
            path = inbox / images.classes[images.labels[i]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(secrets[i].file)
        for command in (["init"], ["consent", "folder"], ["watch", str(inbox), "--once"]):
            run([program, "collect", *command], FALLOW_STORE=str(store))
    port, home, out = free_port(), tmp_path / "operator", tmp_path / "out"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "local"\n\n'
        f'[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    settings = " ".join(f"{key}={value}" for key, value in TINY.items()) + f" out='{out}'"
    with ExitStack() as stack:
        superlink = ["flower-superlink", "--insecure", "--port", str(port)]
        stack.enter_context(process("superlink", tmp_path, superlink))
        wait_for(port)
        passed, streams = stack.enter_context(recorded(port))
        for number, store in enumerate(stores):
            train = [program, "train", "--superlink", f"127.0.0.1:{passed}", "--insecure"]
            name = f"device-{number}"
            stack.enter_context(process(name, tmp_path, train, FALLOW_STORE=str(store)))
        command = ["flwr", "run", str(ROOT), "local", "--stream", "--run-config", settings]
        told = run(command, FLWR_HOME=str(home))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "complete", told[-2000:]
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert all(line["devices_used"] == 2 for line in rounds), rounds
    for store in stores:
        state = json.loads(run([program, "status", "--json"], FALLOW_STORE=str(store)))
        assert state["batches"][0]["images"] == state["images"] > 80
        model = str(out / "models" / "step-1" / "model.onnx")
        measured = run([program, "evaluate", model, "--json"], FALLOW_STORE=str(store))
        assert json.loads(measured)["images"] == state["heldout"]["images"]
    traffic = b"".join(bytes(stream) for stream in streams)
    # what the server counted, and Flower's own messages around it
    assert len(traffic) > sum(line["bytes_up"] + line["bytes_down"] for line in rounds)
    assert find_images(traffic, secrets[::8]) == []

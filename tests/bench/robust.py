"""Accuracy with 30 % faulty devices, by mean: fallow's whole cycle on few images.

    python tests/bench/robust.py [--data PATH] [--seeds 0,1] [--cells trimmed/sign,...]

Every cell is the same run from the same prior; three of ten devices send what
`tests/bench/hostile.py` names, in every training round. Prints the accuracy on all test images
and the difference to the run with the same mean in which all devices are sound. A finished cell
is not run again. Writes results/robust.json (or --out).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile import ATTACKS, attack

from common.config import Config
from common.seeds import numpy_rng
from common.state import write_state
from common.store import write_bytes
from common.train import Labelled, accuracy_of
from server.bench.here import HereGrid
from server.fleet import Fleet
from server.plan import start
from server.prior import train_prior
from server.progress import NullProgress
from server.rounds import play_rounds
from server.world import World, open_world

HERE = Path(__file__).parent
SETTINGS: dict[str, Any] = {
    "net": "resnet8",
    "width": 16,
    "devices": 10,
    "steps": 1,
    "prior-size": 300,
    "alpha": 1.0,
    "prior-epochs": 10,
    "statistics-gap": 1,
    "freeing-epochs": 4,
    "rounds": 5,
    "epochs": 1,
    "consolidate-rounds": 3,
    "consolidate-epochs": 1,
    "shift": "never",
    "accept-drop": 0.02,
    "max-drop": 0.03,
}
FAULTY = 0.3
CELLS = [
    "weighted/none",
    *(f"trimmed/{kind}" for kind in ("none", *ATTACKS)),
    *(f"{mean}/{kind}" for mean in ("weighted", "krum", "median") for kind in ATTACKS),
    *("krum/none", "median/none"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits", help="'digits' or a folder")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, any setting")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "robust.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    more = dict(text.split("=", 1) for text in options.set)
    settings = {**SETTINGS, "data": options.data, **more}
    told = {**settings, "data": Path(options.data).name}
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    if result.get("settings") != told:
        result = {"settings": told, "faulty": FAULTY, "cells": {}}
    for seed in map(int, options.seeds.split(",")):
        prior = None
        for cell in options.cells.split(","):
            key = f"{cell}/{seed}"
            if key in result["cells"]:
                continue
            mean, kind = cell.split("/")
            world = open_world(Config.parse({**settings, "seed": seed, "mean": mean}))
            if prior is None:
                prior = first_model(world)
            result["cells"][key] = run(world, prior, kind)
            print(key, result["cells"][key], flush=True)
            write_bytes(options.out, (json.dumps(result, indent=1) + "\n").encode())
    print(table(result))


def first_model(world: World) -> Any:
    config, plan = world.config, world.plan
    return train_prior(
        config,
        plan.spec,
        plan.graph,
        world.scenario.prior,
        world.accelerator,
        world.augment,
        lambda *_: None,
    )


def run(world: World, prior: Any, kind: str) -> dict[str, Any]:
    """Play one cell."""
    config, plan = world.config, world.plan
    names = [f"device-{i:05d}" for i in range(config.devices)]
    count = int(FAULTY * config.devices)
    drawn = numpy_rng("faulty", config.seed).choice(len(names), count, replace=False)
    faulty = {names[i] for i in drawn} if kind != "none" else set()
    refused = used = 0

    def after_round(before: Any, after: Any, record: dict[str, Any]) -> None:
        nonlocal refused, used
        refused += len(record["refused"])
        used += record["devices_used"]

    began = time.process_time()
    with (
        tempfile.TemporaryDirectory(prefix="fallow-") as cache,
        HereGrid(config.flat(), config.devices, cache) as grid,
        attack(kind, faulty),
    ):
        state = start(plan, prior.state, prior.free)
        done = play_rounds(grid, plan, state, Fleet(grid), NullProgress(), after_round)
    net = plan.net
    write_state(net, done.prior)
    assert world.test is not None
    test = Labelled.of(world.test, world.normalisation)
    outcome = done.finished[-1]
    return {
        "accuracy": float(np.round(accuracy_of(net.eval(), test, world.accelerator), 6)),
        "test_images": len(test),
        "accepted": outcome.refusal is None,
        "updates_refused": refused,
        "updates_used": used,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def table(result: dict[str, Any]) -> str:
    """Return the cells as Markdown: accuracy, and points against the sound run of that mean."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for key, cell in result["cells"].items():
        cells.setdefault(key.rpartition("/")[0], []).append(cell)
    mean = {key: 100 * float(np.mean([c["accuracy"] for c in v])) for key, v in cells.items()}
    lines = ["| mean | 30 % send | accuracy | against sound | refused |", "|---|---|---|---|---|"]
    for key, accuracy in mean.items():
        name, kind = key.split("/")
        sound = mean.get(f"{name}/none")
        change = "" if sound is None else f"{accuracy - sound:+.1f}"
        refused = sum(c["updates_refused"] for c in cells[key])
        lines.append(f"| {name} | {kind} | {accuracy:.1f} | {change} | {refused} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

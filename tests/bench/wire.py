"""What a step moves over the real wire, against dense float32 FedAvg; and which coder is worth it.

    python tests/bench/wire.py --case traffic [--rounds 8 --consolidate-rounds 5]
    python tests/bench/wire.py --case accuracy --data FOLDER
    python tests/bench/wire.py --case coders

traffic: one step (look, grow, weigh, consolidate, judge) of scope rows with a quarter of the
filters free, on a SuperLink with a SuperNode on loopback, once as it is by default and once as
dense FedAvg in float32 over as many rounds of training. The bytes are those that Flower counted
(`flwr list`), by which ours are held too. Dense rounds are all alike, so only --dense-rounds of
them are played and scaled up; what a run without a round costs is in both.

accuracy: the same scope on small CIFAR-10 (ResNet-8 of width 8, 2,000 images for the prior and
2,000 new ones on four devices, 10,000 to test), three seeds, as it is by default and with float32
on the wire in every phase: by `fallow bench`, which is resumed if it was interrupted.

coders: an update of a device and values of the server are trained, quantised and packed with
deflate (ours), zstd, bz2 and lzma, and compared with the symbols' entropy, which rANS comes
within 0.1 % of.

Writes results/wire.json beside this script. Half an hour on two cores.
"""

from __future__ import annotations

import argparse
import bz2
import json
import lzma
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "wire.json"
sys.path.insert(0, str(HERE.parent / "support"))

from superlink import superlink_run

STEP = {
    "net": "resnet8",
    "width": 32,
    "devices": 1,
    "steps": 1,
    "prior-size": 400,
    "prior-epochs": 4,
    "freeing-epochs": 3,
    "epochs": 1,
    "consolidate-epochs": 1,
    "max-drop": 1.0,
    "accept-drop": 1.0,
}
ROWS = {"scope": "rows", "share": 0.25}
DENSE = {
    "scope": "all",
    "freeing": "never",
    "shift": "never",
    "regrow": False,
    "codec-up": "fp32",
    "codec-down": "fp32",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = ("traffic", "accuracy", "coders")
    parser.add_argument("--case", choices=cases, action="append")
    parser.add_argument("--data", help="folder with CIFAR-10 as Parquet, for accuracy")
    parser.add_argument("--out", default="runs/bench/wire-accuracy")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--consolidate-rounds", type=int, default=5)
    parser.add_argument("--dense-rounds", type=int, default=2)
    options = parser.parse_args()
    for case in options.case or ("coders", "traffic"):
        made = {"traffic": traffic, "accuracy": accuracy, "coders": coders}[case](options)
        result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        result[case] = made
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({case: made}, indent=1))


def traffic(options: argparse.Namespace) -> dict[str, Any]:
    """Play a step and some dense rounds, and compare what Flower counted."""
    rounds = {"rounds": options.rounds, "consolidate-rounds": options.consolidate_rounds}
    with tempfile.TemporaryDirectory() as folder:
        ours = superlink_run({**STEP, **ROWS, **rounds}, Path(folder) / "ours")
        print(f"up {ours.up}, down {ours.down} as Flower counted", flush=True)
        dense = superlink_run(
            {**STEP, **DENSE, "rounds": options.dense_rounds}, Path(folder) / "dense"
        )
        trained = options.rounds + options.consolidate_rounds
        scale = trained / options.dense_rounds
        by_phase: dict[str, dict[str, int]] = {}
        for record in ours.rounds:
            phase = by_phase.setdefault(record["phase"], {"up": 0, "down": 0})
            phase["up"] += record["bytes_up"]
            phase["down"] += record["bytes_down"]
        return {
            "settings": {**STEP, **ROWS, **rounds},
            "training_rounds": trained,
            "flower_counted": {"up": ours.up, "down": ours.down},
            "we_counted": {"up": ours.counted("up"), "down": ours.counted("down")},
            "by_phase_as_we_counted": by_phase,
            "dense_flower_counted": {
                "rounds": options.dense_rounds,
                "up": dense.up,
                "down": dense.down,
            },
            "up_by_dense": ours.up / (dense.up * scale),
            "down_by_dense": ours.down / (dense.down * scale),
            "goals": {"up": 0.07, "down": 0.10},
        }


SMALL = [
    *("--protocol", "instance", "--parts", "2", "--seeds", "0,1,2", "--net", "resnet8"),
    *("--width", "8", "--prior-size", "2000", "--part-size", "2000", "--devices", "4"),
    *("--rounds", "8", "--epochs", "2", "--set", "share=0.25"),
    *("--set", "prior-epochs=10", "--set", "freeing-epochs=8"),
]
WIRES = {
    "coded": "rows@codec-consolidate=int3",
    "float32": "rows@codec-up=fp32+codec-down=fp32",
}


def accuracy(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the coded wire's test accuracy with float32's, seed by seed."""
    if not options.data:
        raise SystemExit("accuracy is on CIFAR-10: give its folder with --data")
    command = [sys.executable, "-m", "server.cli", "bench", "--data", options.data, *SMALL]
    command += ["--methods", ",".join(WIRES.values()), "--out", options.out]
    subprocess.run(command, check=True)
    made: dict[str, Any] = {}
    for name, method in WIRES.items():
        cells = Path(options.out, "cells").glob(f"instance-2_{method}_seed_*.json")
        records = sorted((json.loads(cell.read_text()) for cell in cells), key=lambda r: r["seed"])
        made[name] = {
            "test_accuracy": [record["acc"] for record in records],
            "prior_accuracy": [record["prior_acc"] for record in records],
            "bytes_up": [record["bytes_up"] for record in records],
            "bytes_down": [record["bytes_down"] for record in records],
        }
    pairs = zip(made["coded"]["test_accuracy"], made["float32"]["test_accuracy"], strict=True)
    points = [100 * (coded - plain) for coded, plain in pairs]
    made["coded_minus_float32_points"] = points
    made["mean_points"] = sum(points) / len(points)
    return {**made, "goal_points": 0.3, "settings": " ".join(SMALL)}


def coders(_: argparse.Namespace) -> dict[str, Any]:
    """Pack what a round moves with several coders."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    from common.codec import _bits, _quantise
    from common.config import Config
    from common.filters import FreeSet
    from common.seeds import numpy_rng
    from common.update import rows_of
    from server.plan import layout_of, start
    from server.prior import fit_prior
    from server.world import open_world

    config = Config.parse({"net": "resnet8", "width": 32, "steps": 1, "scope": "all"})
    config = config.model_copy(update={"freeing": "never", "shift": "never", "prior_epochs": 3})
    world = open_world(config)
    plan = world.plan
    parts = (world.scenario.prior, world.accelerator, world.augment)
    first = fit_prior(config, plan.spec, plan.graph, *parts, lambda *_: None)
    state = start(plan, first, FreeSet({}))
    layout = layout_of(plan, state)
    later = config.model_copy(update={"prior_epochs": 4, "prior_lr": 0.05})
    trained = fit_prior(later, plan.spec, plan.graph, *parts, lambda *_: None)
    rows = rows_of(layout)
    difference = (layout.pack(trained) - layout.pack(first))[rows.inside]
    packers = {
        "deflate, runs only (ours)": _ours,
        "deflate, level 9": lambda data: zlib.compress(data, 9),
        "bz2": bz2.compress,
        "lzma": lzma.compress,
        **_zstd(),
    }
    table: dict[str, Any] = {}
    for codec in ("int8", "int4", "int3"):
        symbols, _ = _quantise(difference, rows.lengths, _bits(codec), numpy_rng("bench", codec))
        counts = np.bincount(symbols.view(np.uint8), minlength=256)
        share = counts[counts > 0] / counts.sum()
        entropy = float(-(share * np.log2(share)).sum())
        row: dict[str, Any] = {"values": len(symbols), "entropy_bits": entropy}
        for name, pack in packers.items():
            began = time.process_time()
            size = len(pack(symbols.tobytes()))
            seconds = time.process_time() - began
            row[name] = {
                "bits": 8 * size / len(symbols),
                "by_entropy": 8 * size / len(symbols) / entropy,
                "ms": 1e3 * seconds,
            }
        table[codec] = row
    return table


def _ours(data: bytes) -> bytes:
    from common.codec import _deflate

    return _deflate(data)


def _zstd() -> dict[str, Any]:
    """Return zstd at two levels where `zstandard` is installed (it is no dependency)."""
    try:
        import zstandard
    except ImportError:
        return {}
    levels = (3, 19)
    return {f"zstd, level {n}": zstandard.ZstdCompressor(level=n).compress for n in levels}


if __name__ == "__main__":
    main()

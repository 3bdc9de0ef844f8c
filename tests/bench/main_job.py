"""Reproduce the README's tables of the main job: `fallow simulate` on CIFAR-10.

    python tests/bench/main_job.py --data FOLDER [--case two-steps|four-steps] [--seed 0]

Writes results/CASE-seed-N.json beside this script and prints the table in Markdown. The runs
themselves are kept in runs/bench and resumed if they were interrupted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
CASES = {
    "two-steps": ["--steps", "2"],
    "four-steps": ["--steps", "4", "--rounds", "6"],
}
COMMON = [
    *("--net", "resnet8", "--width", "32", "--devices", "8", "--alpha", "0.5"),
    *("--prior-size", "5000", "--part-size", "5000"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with CIFAR-10 as Parquet")
    parser.add_argument("--case", choices=sorted(CASES), default="two-steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    out = Path("runs/bench") / f"{options.case}-seed-{options.seed}"
    command = [sys.executable, "-m", "server.cli", "simulate", "--data", options.data]
    command += [*COMMON, *CASES[options.case], "--seed", str(options.seed)]
    command += ["--calibration", options.data, "--resume", "--out", str(out)]
    began = time.monotonic()
    subprocess.run(command, check=True)
    wall = time.monotonic() - began
    summary = json.loads((out / "summary.json").read_text())
    kept = ("prior", "steps", "accuracy_matrix", "acc", "bwt", "forgetting", "versions", "seed")
    result = {key: summary[key] for key in kept}
    result["wall_seconds_of_this_call"] = wall
    result["seconds"] = summary["seconds"]
    result["settings"] = {**summary["settings"], "data": "CIFAR-10", "calibration": "CIFAR-10"}
    target = HERE / "results" / f"{options.case}-seed-{options.seed}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(table(summary))
    print(f"\n{target}")


def table(summary: dict) -> str:
    """Return the run as a Markdown table."""
    prior = summary["prior"]
    rows = [
        "| | prior | grown | slim | freed | parameters | up MB | down MB | int8 kB | parity |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| prior | {_p(prior['accuracy_test'])} | | {_p(summary['steps'][0]['prior_accuracy'])} "
        f"| {_p(prior['freed_share'])} | {_share(prior)} | | | | |",
    ]
    for step in summary["steps"]:
        int8 = step["onnx"]["int8"]
        rows.append(
            f"| step {step['step']} | {_p(step['prior_accuracy'])} | {_p(step['grown_accuracy'])} "
            f"| {_p(step['slim_accuracy'])} | {_p(step['freed_share'])} | {_share(step)} "
            f"| {step['bytes_up'] / 1e6:.1f} | {step['bytes_down'] / 1e6:.1f} "
            f"| {int8['bytes'] / 1e3:.0f} | {step['onnx']['fp32']['max_abs_diff']:.1e} |"
        )
    return "\n".join(rows)


def _p(share: float) -> str:
    return f"{share * 100:.1f} %"


def _share(row: dict) -> str:
    return f"{row['params_slim'] / row['params_full'] * 100:.0f} %"


if __name__ == "__main__":
    main()

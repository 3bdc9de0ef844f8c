"""Reproduce the README's tables of the main job.

    python tests/bench/main_job.py --data FOLDER [--seed 0]      two steps on CIFAR-10
    python tests/bench/main_job.py --case four-steps [--seed 0]  four steps on digits

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
    "two-steps": [
        *("--net", "resnet8", "--width", "32", "--steps", "2", "--devices", "8"),
        *("--alpha", "0.5", "--prior-size", "5000", "--part-size", "5000"),
    ],
    # One of the devices' held-out images is almost a point on digits: see `make demo`.
    "four-steps": [
        *("--net", "resnet8", "--width", "32", "--steps", "4", "--devices", "4", "--rounds", "5"),
        *("--prior-size", "300", "--set", "max-drop=0.025", "--set", "accept-drop=0.02"),
        *("--set", "statistics-images=0"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits", help="folder with CIFAR-10 as Parquet")
    parser.add_argument("--case", choices=sorted(CASES), default="two-steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.case == "two-steps" and options.data == "digits":
        parser.error("two-steps is on CIFAR-10: give its folder with --data")

    out = Path("runs/bench") / f"{options.case}-seed-{options.seed}"
    command = [sys.executable, "-m", "server.cli", "simulate", "--data", options.data]
    command += [*CASES[options.case], "--seed", str(options.seed)]
    command += ["--calibration", options.data, "--resume", "--out", str(out)]
    began = time.monotonic()
    subprocess.run(command, check=True)
    wall = time.monotonic() - began
    summary = json.loads((out / "summary.json").read_text())
    kept = ("prior", "steps", "accuracy_matrix", "acc", "bwt", "forgetting", "versions", "seed")
    result = {key: summary[key] for key in kept}
    result["wall_seconds_of_this_call"] = wall
    result["seconds"] = summary["seconds"]
    # The folder's name tells which data; where it lay concerns nobody.
    name = summary["data"]["name"]
    result["settings"] = {**summary["settings"], "data": name, "calibration": name}
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

"""The one small search that tunes every method's own settings, on validation images.

    python tests/bench/search.py --data FOLDER --protocol instance --parts 2 [--methods a,b]

For each method every candidate below is run with the same seeds, on a stream cut from the training
images alone: 20 % of every world's take the place of its test images (`fallow bench --validate`).
The candidate with the highest mean accuracy over the seeds is the method's best; what is equal for
all methods (learning rate, rounds, epochs, batch) is not searched. No method has more than five.

Writes results/search-PROTOCOL-PARTS.json beside this script, all candidates in it, and prints the
``--methods`` with which `fallow bench` runs the best of each. Finished cells are kept in --out and
not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GRIDS: dict[str, tuple[str, ...]] = {
    "fedprox": ("prox=0.001", "prox=0.01", "prox=0.1", "prox=1"),
    "fedlwf": ("kd-weight=0.3", "kd-weight=1", "kd-weight=3", "kd-weight=10"),
    "fedewc": ("ewc-weight=1", "ewc-weight=10", "ewc-weight=100", "ewc-weight=1000"),
    "fedntd": ("ntd-weight=0.1", "ntd-weight=0.3", "ntd-weight=1", "ntd-weight=3"),
    "generative": ("replay-weight=0.3", "replay-weight=1", "replay-weight=3", "replay-weight=10"),
    "shrink-perturb": (
        "perturb-keep=0.4+perturb-noise=0.1",
        "perturb-keep=0.6+perturb-noise=0.1",
        "perturb-keep=0.8+perturb-noise=0.1",
        "perturb-keep=0.8+perturb-noise=0.01",
    ),
    "fedavg-slim": ("max-drop=0.005", "max-drop=0.02"),
    "two-models": ("expert-lr=0.01", "expert-lr=0.03", "expert-lr=0.1"),
    "fallow": ("kd-weight=0.1", "kd-weight=0.3", "kd-weight=1", "kd-weight=3"),
}
"""Candidates by method; those without settings of their own have nothing to be tuned."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", action="append", help="as of fallow bench; default: digits")
    parser.add_argument("--protocol", default="instance")
    parser.add_argument("--parts", type=int)
    parser.add_argument("--methods", default=",".join(GRIDS), help="some of the methods above")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget", default="rounds")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    unknown = sorted(set(options.methods.split(",")) - set(GRIDS))
    if unknown:
        parser.error(f"methods names '{unknown[0]}': use some of {', '.join(GRIDS)}")
    found = search(options)
    name = f"search-{options.protocol}-{found['parts']}{'-quick' if options.quick else ''}.json"
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / name).write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    print("\n--methods " + ",".join(method["best"] for method in found["methods"]))
    print(options.results / name)


def search(options: argparse.Namespace) -> dict[str, Any]:
    """Run all candidates and return them, with the best of each method."""
    from server.bench.plan import VALIDATE_SHARE, cells_of, data_of
    from server.bench.runner import run_bench
    from server.bench.table import Stat

    wanted = {method: GRIDS[method] for method in options.methods.split(",")}
    names = {m: tuple(f"{m}@{change}" for change in grid) for m, grid in wanted.items()}
    settings: dict[str, Any] = dict(text.split("=", 1) for text in options.set)
    settings["validate_share"] = VALIDATE_SHARE
    if options.data:
        settings["data"] = data_of(options.data, [])
    cells = cells_of(
        options.protocol,
        options.parts,
        ",".join(name for variants in names.values() for name in variants),
        options.seeds,
        settings,
        quick=options.quick,
        budget=options.budget,
    )
    run_bench(cells, options.out, options.workers, lambda text: print(text, flush=True))
    records = {cell.name: json.loads(cell.path(options.out).read_text()) for cell in cells}
    methods = []
    for method, variants in names.items():
        tried = []
        for variant in variants:
            mine = [records[cell.name] for cell in cells if cell.method == variant]
            stat = Stat.of([record["acc"] for record in mine])
            row = {"variant": variant, "acc": stat.mean, "std": stat.std, "seeds": stat.count}
            row["std"] = None if stat.count < 2 else stat.std
            row["accs"] = [record["acc"] for record in mine]
            tried.append(row)
        best = max(tried, key=lambda row: row["acc"])  # of equal ones the first
        methods.append({"method": method, "best": best["variant"], "tried": tried})
    first = records[cells[0].name]
    own = {change.split("=")[0] for grid in GRIDS.values() for c in grid for change in c.split("+")}
    return {
        "command": f"python tests/bench/search.py {' '.join(without_places(sys.argv[1:]))}",
        "protocol": options.protocol,
        "parts": first["parts"],
        "budget": options.budget,
        "seeds": sorted({cell.seed for cell in cells}),
        "tested_on": f"{VALIDATE_SHARE:.0%} of every world's training images",
        "methods": methods,
        "settings": {k: v for k, v in first["settings"].items() if k not in own},
        "versions": first["versions"],
    }


def without_places(arguments: list[str]) -> list[str]:
    """Return a command's arguments without the folders of the machine it ran on."""
    kept = []
    given = iter(arguments)
    for argument in given:
        flag, equals, _ = argument.partition("=")
        if flag not in ("--data", "--out", "--results"):
            kept.append(argument)
            continue
        if not equals:
            next(given, None)
        if flag == "--data":
            kept += [flag, "FOLDER"]
    return kept


def table(found: dict[str, Any]) -> str:
    """Return all candidates as a Markdown table."""
    lines = ["| candidate | validation accuracy | |", "|---|---|---|"]
    for method in found["methods"]:
        for row in method["tried"]:
            spread = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
            best = "best" if row["variant"] == method["best"] else ""
            lines.append(f"| {row['variant']} | {100 * row['acc']:.1f}{spread} | {best} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Reproduce the README's tables of methods: baselines, ablations and upper bounds on every stream.

    python tests/bench/tables.py --cifar FOLDER                       the CIFAR-10 streams
    python tests/bench/tables.py --cifar FOLDER --only domain-2       one of them
    python tests/bench/tables.py --emoji FOLDER --fashion FOLDER      other data, nothing retuned

A finished cell is kept in runs/tables and not run again, so that a long table can be made in
pieces. Writes results/table-STREAM.json beside this script (the table, and of every cell what it
was made of, without the lines of its rounds) and prints it in Markdown. --print alone prints those
that are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BASELINES = "prior,fedavg,fedlwf,fedprox,fedntd,shrink-perturb,fedavg-slim,lda,ridge,ncm,lda-deep"


@dataclass(frozen=True)
class Table:
    """A stream, and which methods its table has.

    Attributes
    ----------
    data : str
        Which folder it needs: cifar, emoji or fashion.
    arguments : tuple of str
        Of ``fallow bench``, beside data and methods.
    worlds : tuple of str
        Vendors of each world; none is all there is as one world.
    """

    data: str
    arguments: tuple[str, ...]
    methods: str
    worlds: tuple[str, ...] = ()


STREAMS = {
    "instance-2": Table(
        "cifar", ("--protocol=instance", "--parts=2"), f"{BASELINES},fallow,joint,central"
    ),
    "instance-5": Table(
        "cifar",
        ("--protocol=instance", "--parts=5", "--part-size=2500"),
        f"{BASELINES},fallow,joint",
    ),
    "domain-2": Table(
        "cifar", ("--protocol=domain", "--parts=2"), f"{BASELINES},two-models,fallow,joint"
    ),
    "class-2": Table("cifar", ("--protocol=class", "--parts=2"), f"{BASELINES},fallow,joint"),
    "emoji": Table(
        "emoji",
        ("--protocol=domain", "--prior-size=0", "--part-size=0"),
        f"{BASELINES},two-models,fallow,joint",
        ("openmoji", "twemoji+emojione", "noto", "fluent-emoji"),
    ),
    "fashion-instance-2": Table(
        "fashion", ("--protocol=instance", "--parts=2"), f"{BASELINES},fallow,joint"
    ),
    "fashion-class-2": Table(
        "fashion", ("--protocol=class", "--parts=2"), f"{BASELINES},fallow,joint"
    ),
}


def main() -> None:
    """Run the tables whose data was named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar", help="folder with CIFAR-10 as Parquet")
    parser.add_argument("--emoji", help="folder with the emoji of nine vendors as Parquet")
    parser.add_argument("--fashion", help="folder with Fashion-MNIST as IDX files")
    parser.add_argument("--only", help="names of streams, with commas")
    parser.add_argument("--methods", help="instead of the table's own, with commas")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workers", default="0")
    parser.add_argument("--out", type=Path, default=Path("runs/tables"))
    parser.add_argument("--print", action="store_true", dest="printed")
    options = parser.parse_args()
    if options.printed:
        for name in STREAMS:
            if _target(name).exists():
                print(markdown(json.loads(_target(name).read_text())))
        return
    given = vars(options)
    wanted = options.only.split(",") if options.only else list(STREAMS)
    unknown = [name for name in wanted if name not in STREAMS]
    if unknown:
        parser.error(f"--only names {unknown[0]}: use {', '.join(STREAMS)}")
    names = [name for name in wanted if given[STREAMS[name].data]]
    if not names:
        parser.error("name the data with --cifar, --emoji or --fashion")
    for name in names:
        table = STREAMS[name]
        folder = options.out / table.data
        command = [sys.executable, "-m", "server.cli", "bench", *table.arguments]
        where = given[table.data]
        for place in [f"{where}@vendor={world}" for world in table.worlds] or [where]:
            command += ["--data", place]
        command += ["--methods", options.methods or table.methods, "--seeds", options.seeds]
        command += ["--workers", options.workers, "--out", str(folder)]
        subprocess.run(command, check=True)
        write(name, folder)


def write(name: str, folder: Path) -> None:
    """Keep what a stream's results say, without the lines of its rounds."""
    protocol, _, parts = name.removeprefix("fashion-").partition("-")
    stream = ("domain", 4) if name == "emoji" else (protocol, int(parts))
    results = json.loads((folder / "results.json").read_text())

    def mine(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows if (row["protocol"], row["parts"]) == stream]

    cells = [{k: v for k, v in cell.items() if k != "rounds"} for cell in mine(results["cells"])]
    kept = {"stream": name, "table": mine(results["table"]), "cells": cells}
    _target(name).write_text(json.dumps(kept, indent=1) + "\n")
    print(markdown(kept))


def markdown(kept: dict[str, Any]) -> str:
    """Return what the README shows of a stream: accuracies of the last model, in %, and costs."""
    rows = kept["table"]
    parts = list(rows[0]["final"]) if len(rows[0]["final"]) > 1 else []
    head = ["method", "seeds", *parts, "mean", "bytes", "device time", "parameters"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        accuracies = [_percent(row["final"][part]) for part in parts]
        costs = [_ratio(row[column]) for column in ("bytes x", "time x")]
        seeds = ", ".join(map(str, row["seeds"]))
        size = f"{row['slim %']['mean'] * 100:.0f} %"
        lines.append([row["method"], seeds, *accuracies, _percent(row["ACC"]), *costs, size])
    return "\n".join(["", kept["stream"], "", *(f"| {' | '.join(line)} |" for line in lines)])


def _percent(stat: dict[str, Any]) -> str:
    text = f"{stat['mean'] * 100:.1f}"
    return text if stat["std"] is None else f"{text} ± {stat['std'] * 100:.1f}"


def _ratio(stat: dict[str, Any]) -> str:
    return "" if stat["mean"] is None else f"{stat['mean']:.2f}x"


def _target(name: str) -> Path:
    return HERE / "results" / f"table-{name}.json"


if __name__ == "__main__":
    main()

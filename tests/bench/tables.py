"""Reproduce the README's tables of methods: baselines, ablations and upper bounds on every stream.

    python tests/bench/tables.py --cifar FOLDER                       the CIFAR-10 streams
    python tests/bench/tables.py --cifar FOLDER --only domain-2       one of them
    python tests/bench/tables.py --emoji FOLDER --fashion FOLDER      other data, nothing retuned

A finished cell is kept in runs/tables and not run again, so that a long table can be made in
pieces. Writes results/table-STREAM.json beside this script (the table, and of every cell what it
was made of, without the lines of its rounds) and prints it in Markdown. --print alone prints those
that are there; --readme also puts them where the README has them.
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
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
BASELINES = (
    "prior,fedavg,fedprox,fedlwf,fedewc,fedntd,generative,shrink-perturb,fedavg-slim,"
    "fedavg-freed,ncm,ridge,lda,lda-deep"
)
ABLATIONS = "random-mask,no-rotations,no-reinit,no-distillation,no-consolidation,rows,group,all"
PARTS = "no-gate,no-calibration,no-statistics"
OFF_BY_DEFAULT = (
    "kept-moves,kept-moves-free,widening,peers,synthetic-distillation,synthetic-replay,free-last,"
    "reserve"
)


@dataclass(frozen=True)
class Table:
    """A stream, and which methods its table has.

    Attributes
    ----------
    title : str
        In the README, in Markdown.
    data : str
        Which folder it needs: cifar, emoji or fashion.
    protocol, parts
        Of ``fallow bench``.
    arguments : tuple of str
        Of ``fallow bench``, beside data, protocol, parts and methods.
    worlds : tuple of str
        Vendors of each world; none is all there is as one world.
    """

    title: str
    data: str
    protocol: str
    parts: int
    methods: str
    arguments: tuple[str, ...] = ()
    worlds: tuple[str, ...] = ()


def found(search: str) -> str:
    """Return the methods with the settings that `search.py` found for them, with commas."""
    methods = json.loads((HERE / "results" / f"search-{search}.json").read_text())["methods"]
    return ",".join(method["best"] for method in methods)


STREAMS = {
    "instance-2": Table(
        "**Same classes, same world** (CIFAR-10, a prior of 5,000 images and 5,000 new ones)",
        *("cifar", "instance", 2),
        f"{BASELINES},{ABLATIONS},trained,statistics,fallow,joint,central",
    ),
    "instance-2-off": Table(
        "**The same without some parts, and with what is off by default** (an earlier version: its "
        "first freeing took 20 epochs, and fallow, which trained there, had 72.0 with this seed)",
        *("cifar", "instance", 2),
        f"{PARTS},{OFF_BY_DEFAULT}",
    ),
    "instance-2-longer": Table(
        "**The same from a prior that was trained for 70 epochs** instead of 20, as long as "
        "fallow's with its first freeing",
        *("cifar", "instance", 2),
        ",".join(f"{name}@prior-epochs=70" for name in ("prior", "fedavg", "lda-deep", "fallow")),
    ),
    "instance-2-tuned": Table(
        "**The same with the baselines' own settings as the search found them**",
        *("cifar", "instance", 2),
        found("instance-2"),
    ),
    "class-2-longer": Table(
        "**New classes from a prior that was trained for 70 epochs**",
        *("cifar", "class", 2),
        ",".join(f"{name}@prior-epochs=70" for name in ("prior", "lda", "lda-deep")),
    ),
    "instance-2-bytes": Table(
        "**The same at equal bytes**: as many rounds as what fallow sends allows, one of "
        "FedAvg's and six in int8",
        *("cifar", "instance", 2),
        "fedavg,fedavg-int8,fedavg-freed@codec-up=int8+codec-down=int8,fallow",
        ("--budget=bytes",),
    ),
    "instance-2-compute": Table(
        "**The same at equal device time**: as many rounds as the time of fallow's devices allows, "
        "one of FedAvg's",
        *("cifar", "instance", 2),
        "fedavg,fallow",
        ("--budget=compute",),
    ),
    "instance-5": Table(
        "**Four steps in a row** (CIFAR-10, 2,500 new images each)",
        *("cifar", "instance", 5),
        f"{BASELINES},trained,statistics,fallow,joint",
        ("--part-size=2500",),
    ),
    "domain-2": Table(
        "**Another world** (CIFAR-10, the new images dark, blurred and noisy)",
        *("cifar", "domain", 2),
        f"{BASELINES},{ABLATIONS},{PARTS},two-models,statistics,fallow,joint",
    ),
    "domain-2-tuned": Table(
        "**The same with the baselines' own settings as the search found them**",
        *("cifar", "domain", 2),
        found("domain-2"),
    ),
    "domain-5": Table(
        "**Four other worlds, one after the other** (CIFAR-10, 5,000 images each: dark, inverted, "
        "turned, turned and inverted)",
        *("cifar", "domain", 5),
        f"{BASELINES},no-gate,statistics,fallow,joint",
    ),
    "class-2": Table(
        "**New classes** (CIFAR-10, five classes and then five others, told apart among all ten)",
        *("cifar", "class", 2),
        f"{BASELINES},fallow,joint",
    ),
    "emoji": Table(
        "**A natural stream of worlds** (emoji in ten classes by vendor: openmoji, then "
        "twemoji + emojione, noto, fluent-emoji; nothing retuned)",
        *("emoji", "domain", 4),
        f"{BASELINES},two-models,fallow,joint",
        ("--prior-size=0", "--part-size=0"),
        ("openmoji", "twemoji+emojione", "noto", "fluent-emoji"),
    ),
    "fashion-instance-2": Table(
        "**Fashion-MNIST, same classes** (5,000 and 5,000 images; nothing retuned)",
        *("fashion", "instance", 2),
        f"{BASELINES},fallow,joint",
    ),
    "fashion-class-2": Table(
        "**Fashion-MNIST, new classes** (nothing retuned)",
        *("fashion", "class", 2),
        f"{BASELINES},fallow,joint",
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
    parser.add_argument("--readme", action="store_true", help="write them into the README, too")
    options = parser.parse_args()
    if options.printed or options.readme:
        text = "\n\n".join(markdown(name) for name in STREAMS if _target(name).exists())
        print(text)
        if options.readme:
            before, _, rest = README.read_text().partition(BEGIN)
            after = rest.partition(END)[2]
            README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
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
        command += ["--protocol", table.protocol, "--parts", str(table.parts)]
        where = given[table.data]
        for place in [f"{where}@vendor={world}" for world in table.worlds] or [where]:
            command += ["--data", place]
        command += ["--methods", options.methods or table.methods, "--seeds", options.seeds]
        command += ["--workers", options.workers, "--out", str(folder)]
        subprocess.run(command, check=True)
        write(name, folder)


def write(name: str, folder: Path) -> None:
    """Keep what a stream's results say, without the lines of its rounds.

    Rows of methods that an earlier version ran, and this one has not, stay as they are. Methods
    that only another table of the same stream has are kept there.
    """
    table = STREAMS[name]
    stream = (table.protocol, table.parts)
    others = {
        method
        for other in STREAMS.values()
        if (other.data, other.protocol, other.parts) == (table.data, *stream)
        for method in other.methods.split(",")
    }.difference(table.methods.split(","))
    results = json.loads((folder / "results.json").read_text())
    before = json.loads(_target(name).read_text()) if _target(name).exists() else {}

    def mine(row: dict[str, Any]) -> bool:
        return (row["protocol"], row["parts"]) == stream and row["method"] not in others

    kept: dict[str, Any] = {"stream": name}
    for part in ("table", "cells"):
        new = [
            {k: v for k, v in row.items() if part == "table" or k != "rounds"}
            for row in filter(mine, results[part])
        ]
        again = {row["method"] for row in new}
        old = filter(mine, before.get(part, []))
        kept[part] = new + [row for row in old if row["method"] not in again]
    _target(name).write_text(json.dumps(kept, indent=1) + "\n")
    print(markdown(name))


def markdown(name: str) -> str:
    """Return what the README shows of a stream: accuracies of the last model, in %, and costs."""
    table, kept = STREAMS[name], json.loads(_target(name).read_text())
    order = table.methods.split(",")
    rows = [row for row in kept["table"] if row["method"] in order]
    rows.sort(key=lambda row: order.index(row["method"]))
    parts = list(rows[0]["final"]) if len(rows[0]["final"]) > 1 else []
    head = ["method", "seeds", *parts, "mean", "bytes", "device time", "parameters"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        accuracies = [_percent(row["final"][part]) for part in parts]
        costs = [_ratio(row[column]) for column in ("bytes x", "time x")]
        seeds = ", ".join(map(str, row["seeds"]))
        size = f"{row['slim %']['mean'] * 100:.0f} %"
        lines.append([row["method"], seeds, *accuracies, _percent(row["ACC"]), *costs, size])
    return "\n".join([f"{table.title}:", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _percent(stat: dict[str, Any]) -> str:
    text = f"{stat['mean'] * 100:.1f}"
    return text if stat["std"] is None else f"{text} ± {stat['std'] * 100:.1f}"


def _ratio(stat: dict[str, Any]) -> str:
    return "" if stat["mean"] is None else f"{stat['mean']:.2f}x"


def _target(name: str) -> Path:
    return HERE / "results" / f"table-{name}.json"


if __name__ == "__main__":
    main()

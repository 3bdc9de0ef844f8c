"""What happened in a run, for people: ``report.html``, and a table for the terminal.

Everything is made from the two files that a run leaves, ``summary.json`` (its schema is
``summary.schema.json``) and ``rounds.jsonl``. The page is one file without scripts that asks
the network for nothing. Numbers in it are rounded, never recomputed.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from common.errors import StoreError
from common.store import write_bytes
from server.page import TEMPLATE

Record = dict[str, Any]
UNKNOWN, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
_HERE = Path(__file__).parent
_SCOPES = {
    "rows": "the freed filters' own weights and BN, and the head",
    "group": "the freed filters, what reads from them, all BN, and the head",
    "all": "every weight",
}


def write_summary(summary: Record, path: Path) -> None:
    """Check `summary` against the schema and write it to `path`, whole or not at all.

    Raises
    ------
    ValueError
        If it does not fit the schema, or holds NaN: a bug, not the user's fault.
    DiskError
        If it cannot be written.
    """
    problem = _problem(summary, "summary")
    if problem:
        raise ValueError(f"summary does not fit summary.schema.json: {problem}")
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def write_report(out_dir: Path) -> Path:
    """Write ``report.html`` beside the ``summary.json`` and ``rounds.jsonl`` of a run.

    Returns
    -------
    Path
        The report's.

    Raises
    ------
    StoreError
        If one of the two is absent, torn, or not what a run leaves.
    DiskError
        If the report cannot be written.
    """
    summary = _parsed(out_dir / "summary.json", _text(out_dir / "summary.json"), "summary")
    rounds_path = out_dir / "rounds.jsonl"
    # Text after the last line end is a record that a crash cut off: its round is run again.
    lines = _text(rounds_path).split("\n")[:-1] if rounds_path.exists() else []
    rounds = [
        _parsed(f"{rounds_path}, line {number}", line, "round")
        for number, line in enumerate(lines, start=1)
    ]
    path = out_dir / "report.html"
    write_bytes(path, render_report(summary, rounds).encode())
    return path


def render_report(summary: Record, rounds: list[Record]) -> str:
    """Render the report as one HTML page.

    Parameters
    ----------
    summary
        As `write_summary` takes it.
    rounds
        The records of ``rounds.jsonl``, in the order in which they were run.

    Returns
    -------
    str
        The page. The same arguments give the same page.
    """
    from server import charts  # here, because matplotlib takes a second to load

    steps = summary["steps"]
    drawn = {
        "accuracy": charts.accuracy_by_round(summary, rounds) if rounds else "",
        "freeing": charts.freeing(_freeings(summary)) if summary["prior"] else "",
        "traffic": charts.traffic(summary) if steps else "",
        "sizes": charts.sizes(summary) if summary["prior"] else "",
    }
    environment = Environment(
        loader=DictLoader({"report": TEMPLATE}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "pct": percent,
        "points": points,
        "size": size,
        "duration": duration,
        "number": lambda value, spec: UNKNOWN if value is None else format(value, spec),
    }
    return environment.get_template("report").render(
        run=summary,
        rounds=rounds,
        headline=headline(summary),
        notices=notices(summary),
        scope_meaning=_SCOPES.get(summary["scope"], ""),
        participation=_participation(rounds),
        freeings=_freeings(summary),
        times=_times(summary, rounds),
        heat=_heat(summary["accuracy_matrix"]["values"]),
        charts={name: Markup(svg) for name, svg in drawn.items()},
    )


def headline(summary: Record) -> str:
    """Say in one sentence what the run did to accuracy, size and traffic."""
    prior, steps = summary["prior"], summary["steps"]
    if prior is None:
        return "The run ended before there was a prior model."
    if not steps:
        return (
            f"No step was completed: the prior model stands at {percent(prior['accuracy_test'])} "
            f"on test data, {percent(prior['accuracy_heldout'])} on held-out data."
        )
    last = steps[-1]
    where, before, after = "test", prior["accuracy_test"], last["slim_accuracy"]
    if before is None or after is None:
        where, before = "held-out", steps[0]["heldout"]["prior"]
        after = last["heldout"]["consolidated" if last["accepted"] else "prior"]
    change = f" ({points(after - before)})" if None not in (before, after) else ""
    kept = percent(last["params_slim"] / last["params_full"], 0)
    count = "one step" if len(steps) == 1 else f"{len(steps)} steps"
    text = (
        f"In {count} the model went from {percent(before)} to {percent(after)} {where} "
        f"accuracy{change}; slimmed, it keeps {kept} of its parameters"
    )
    if last["onnx"]:
        text += f" and is an ONNX file of {size(last['onnx']['fp32']['bytes'])}"
        if last["onnx"]["int8"]:
            text += f" ({size(last['onnx']['int8']['bytes'])} in int8)"
    moved = sum(step["bytes_up"] + step["bytes_down"] for step in steps)
    dense = sum(step["bytes_dense_fedavg"] for step in steps)
    text += f"; devices and server exchanged {size(moved)}"
    return text + (f", {percent(moved / dense, 0)} of dense FedAvg's." if dense else ".")


def notices(summary: Record) -> list[tuple[str, str]]:
    """List what a reader must not miss, as (``bad`` or ``note``, text)."""
    found = []
    done = f"steps completed: {len(summary['steps'])}"
    if summary["status"] == "interrupted":
        found.append(("bad", f"The run was interrupted, {done}. To go on, add --resume."))
    if summary["status"] == "failed":
        reason = summary.get("error") or "the log says why"
        found.append(("bad", f"The run failed, {done}. {reason}"))
    for step in summary["steps"]:
        name = f"Step {step['step']}"
        before, after = step["prior_accuracy"], step["slim_accuracy"]
        if not step["accepted"]:
            found.append(("bad", f"{name} was refused: {step['refusal']}."))
        elif None not in (before, after) and after < before:
            found.append(
                (
                    "note",
                    f"{name} was accepted on held-out data, but on test data its slim model is "
                    f"{points(after - before)} against the model before it.",
                )
            )
    for row in _freeings(summary):
        if row["rejected"]:
            found.append(
                (
                    "note",
                    f"{row['name']}: freeing shrank from {percent(row['asked'], 0)} of the filters "
                    f"to {percent(row['freed'], 0)}, because more would have cost more accuracy "
                    "than allowed.",
                )
            )
    return found


def summary_table(summary: Record) -> Table:
    """Return the run as a table for the terminal: a row for the prior model, one for each step."""
    title = f"{summary['data']['name']}, {summary['net']['name']}, seed {summary['seed']}"
    if summary["status"] != "complete":
        title += f": {summary['status']}"
    table = Table(
        title=Text(title),
        caption="accuracies on test data, in %; 1 MB = 1,000,000 bytes",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("step")
    heads = "prior|grown|slim|filters\nfreed|params\nkept|MB\nup|MB\ndown|ONNX\nkB|parity|time\ns"
    for head in heads.split("|"):
        table.add_column(head, justify="right", no_wrap=True)
    prior = summary["prior"]
    if prior:
        table.add_row(
            "prior",
            _cell(prior["accuracy_test"]),
            *("", ""),
            *_slimness(prior),
            *("", "", "", ""),
            f"{prior['seconds']:.0f}",
        )
    for step in summary["steps"]:
        onnx = step["onnx"] and step["onnx"]["fp32"]
        table.add_row(
            f"{step['step']}" if step["accepted"] else f"{step['step']} refused",
            *(_cell(step[f"{name}_accuracy"]) for name in ("prior", "grown", "slim")),
            *_slimness(step),
            *(_megabytes(step[f"bytes_{way}"]) for way in ("up", "down")),
            f"{onnx['bytes'] / 1e3:.0f}" if onnx else UNKNOWN,
            f"{onnx['max_abs_diff']:.0e}" if onnx else UNKNOWN,
            f"{step['seconds']:.0f}",
        )
    return table


def percent(value: float | None, digits: int = 1) -> str:
    """Format a share as a percentage; unknown is a dash."""
    return UNKNOWN if value is None else f"{100 * value:.{digits}f} %"


def points(value: float | None) -> str:
    """Format a difference of shares in signed percentage points."""
    if value is None:
        return UNKNOWN
    text = f"{100 * value:+.1f}"
    return f"{'0.0' if float(text) == 0 else text.replace('-', MINUS)} points"


def size(count: float) -> str:
    """Format bytes with three digits in kB, MB or GB (powers of 1,000)."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.{max(0, 3 - len(str(int(count / unit))))}f} {name}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Format seconds for people."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _cell(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.1f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.{2 if count < 1e7 else 1}f}"


def _slimness(row: Record) -> tuple[str, str]:
    left = row["params_slim"] / row["params_full"]
    return f"{100 * row['freed_share']:.0f} %", f"{100 * left:.0f} %"


def _freeings(summary: Record) -> list[Record]:
    """List every freeing, the prior's first, in one shape."""
    rows = []
    if summary["prior"]:
        prior = summary["prior"]
        rows.append(
            {
                "name": "Prior",
                "asked": prior["requested_share"],
                "freed": prior["freed_share"],
                "before": prior["before_freeing"],
                "after": prior["after_freeing"],
                "after_cut": prior["after_cut"],
                "attempts": prior["attempts"],
            }
        )
    for step in summary["steps"]:
        unknown: Record = {"before": None, "after": None, "after_cut": None, "attempts": []}
        rows.append(
            {
                "name": f"Step {step['step']}",
                "asked": step["requested_share"],
                "freed": step["freed_share"],
                **(step["freeing"] or unknown),
            }
        )
    for row in rows:
        known = None not in (row["before"], row["after_cut"])
        row["cost"] = row["before"] - row["after_cut"] if known else None
        row["rejected"] = [a for a in row["attempts"] if not a["accepted"]]
    return rows


def _times(summary: Record, rounds: list[Record]) -> list[Record]:
    """List where the time of the prior and of every step went, in seconds."""
    prior, rows = summary["prior"], []
    if prior:
        at_server = prior["seconds_by_phase"]
        first = [record for record in rounds if record["step"] == 0]
        sst = sum(r["seconds"] for r in first if r["phase"] == "consolidate")
        measuring = sum(r["seconds"] for r in first) - sst
        row = {"name": "Prior", "distillation": 0.0, "measuring": measuring, **at_server}
        rows.append({**row, "sst": at_server["sst"] + sst})
    for step in summary["steps"]:
        phases = dict(step["seconds_by_phase"])
        distillation = step["distillation"]["seconds"]
        rows.append(
            {
                "name": f"Step {step['step']}",
                "train": max(phases.pop("grow", 0.0) - distillation, 0.0),
                "sst": phases.pop("consolidate", 0.0),
                "distillation": distillation,
                "export": phases.pop("export"),
                "measuring": sum(phases.values()),
            }
        )
    for row in rows:
        row["total"] = sum(value for key, value in row.items() if key != "name")
    return rows


def _participation(rounds: list[Record]) -> list[Record]:
    """Sum up for every phase which devices were asked, used and declined, and why."""
    phases: dict[tuple[int, str], list[Record]] = {}
    for record in rounds:
        phases.setdefault((record["step"], record["phase"]), []).append(record)
    rows = []
    for (step, phase), records in phases.items():
        reasons: Counter[str] = Counter()
        for record in records:
            reasons.update(record["declined"])
        summed = ("devices_asked", "devices_used", "bytes_up", "bytes_down", "seconds")
        rows.append(
            {
                "step": step,
                "phase": phase,
                "rounds": len(records),
                "declined": reasons.most_common(),
                **{name: sum(record[name] for record in records) for name in summed},
            }
        )
    return rows


def _heat(values: list[list[float | None]]) -> list[list[float]]:
    """Return how strongly to shade each cell, 0 for the lowest accuracy, 1 for the highest."""
    known = [value for row in values for value in row if value is not None]
    low, span = (min(known), max(known) - min(known)) if known else (0.0, 0.0)
    return [
        [0.0 if value is None or not span else (value - low) / span for value in row]
        for row in values
    ]


@cache
def _validator(kind: str) -> Draft202012Validator:
    schema = json.loads((_HERE / "summary.schema.json").read_text("utf-8"))
    if kind == "round":
        schema = {"$ref": "#/$defs/round", "$defs": schema["$defs"]}
    return Draft202012Validator(schema)


def _problem(value: Any, kind: str) -> str | None:
    """Return what is wrong with a summary or a round, in one line; None if nothing is."""
    error = best_match(_validator(kind).iter_errors(value))
    if error is not None:
        return " ".join(f"{error.json_path}: {error.message}".split())[:400]
    if kind == "summary":
        matrix = value["accuracy_matrix"]
        widths = [len(row) for row in matrix["values"]]
        if widths != [len(matrix["parts"])] * len(matrix["rows"]):
            return (
                f"$.accuracy_matrix: {len(matrix['rows'])} rows and {len(matrix['parts'])} parts "
                f"are named, but values has rows of {widths}"
            )
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"cannot read {path}: {error}; give the folder of a run") from None


def _parsed(source: Path | str, text: str, kind: str) -> Record:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise StoreError(f"{source} is torn or no JSON: {error}") from None
    problem = _problem(value, kind)
    if problem:
        raise StoreError(f"{source} was not written by this version of fallow: {problem}")
    return dict(value)

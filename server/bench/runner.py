"""All cells of a table: priors first, then the cells, as many at a time as there are workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from common.command import INTERRUPTED
from common.errors import ConfigError, FallowError
from common.store import read_json, write_bytes, write_json
from server.bench.budget import Budget, reference_of, run_within
from server.bench.cell import Cell, finished, make_priors, run_cell
from server.bench.methods import METHODS
from server.bench.show import markdown
from server.bench.table import Row, as_json, by_stream, rows_of
from server.inline import _prepare

Record = dict[str, Any]
Tell = Callable[[str], None]

_PATIENCE = 5.0
"""Seconds that an interrupted worker has to close what it has open."""


class BenchInterruptedError(FallowError):
    """Somebody stopped the benchmark."""

    exit_code = INTERRUPTED

    def __init__(self, out: Path, command: str) -> None:
        super().__init__(
            f"interrupted: the finished cells are kept in {BenchFolder(out).folder}; "
            f"the same command goes on with the others: {command}"
        )


@dataclass(frozen=True)
class BenchFolder:
    """Where a benchmark's files are: all in one folder, or the results in a file beside it.

    Attributes
    ----------
    out : Path
        A folder; or a ``.json`` file, whose name without the suffix is then the folder.
    """

    out: Path

    @property
    def folder(self) -> Path:
        """Of ``cells/*.json``, ``priors/``, ``table.md`` and the charts."""
        return self.out.with_suffix("") if self.out.suffix == ".json" else self.out

    @property
    def results(self) -> Path:
        """The table and all its cells as JSON."""
        return self.out if self.out.suffix == ".json" else self.out / "results.json"

    @property
    def table(self) -> Path:
        """The table as Markdown."""
        return self.folder / "table.md"


def run_bench(cells: Sequence[Cell], out: Path, workers: int, tell: Tell) -> list[Row]:
    """Run the cells that are not finished yet and write the tables of all that `out` holds.

    Parameters
    ----------
    cells : sequence of Cell
        Those of one protocol, seed by seed, are best side by side.
    out : Path
        Where to write; see `BenchFolder`.
    workers : int
        Processes, a cell each; 0 is one a core.
    tell : callable
        Is given a line for every cell.

    Returns
    -------
    list of Row
        The cells asked for first, then what earlier calls left there of the same streams with
        the same settings.

    Raises
    ------
    ConfigError
        Before anything is run, if a setting is wrong.
    FallowError
        The first of a cell, after all others were run.
    """
    place = BenchFolder(out)
    folder = place.folder
    measured = [reference_of(cell) for cell in cells if cell.budget != "rounds"]
    references = {cell.name for cell in measured}
    needed = list({cell.name: cell for cell in [*cells, *measured]}.values())
    open_cells = [cell for cell in needed if finished(cell, folder) is None]
    tell(f"{len(needed)} cells, {len(needed) - len(open_cells)} of them finished before")
    groups: dict[tuple[str, int, int], list[Cell]] = {}
    for cell in open_cells:
        groups.setdefault((cell.protocol, cell.parts, cell.seed), []).append(cell)
    # What an equal budget is measured by comes before what it is given to.
    waves = [
        [cell for cell in open_cells if cell.name in references],
        [cell for cell in open_cells if cell.name not in references],
    ]
    problems: list[FallowError] = []
    done = 0
    with _Workers(workers or len(os.sched_getaffinity(0)), len(open_cells)) as pool:
        for group, _ in pool.each(make_priors, list(groups.values()), folder, problems):
            tell(f"prior of {group[0].protocol}-{group[0].parts} seed {group[0].seed} is there")
        for wave in waves:
            if problems:
                raise problems[0]
            for cell, record in pool.each(_run, wave, folder, problems):
                done += 1
                tell(
                    f"{cell.name}: ACC {record['acc']:.1%}, {record['seconds']:.0f} s"
                    f"{_spent(record)} ({done} of {len(open_cells)})"
                )
    rows = write_tables(_records(cells, folder), place)
    if problems:
        raise problems[0]
    return rows


def _run(cell: Cell, folder: Path) -> Record:
    return run_cell(cell, folder) if cell.budget == "rounds" else run_within(cell, folder)


def _spent(record: Record) -> str:
    budget = record.get("budget")
    if budget is None:
        return ""
    over = ", over its budget" if budget["spent"] > budget["limit"] else ""
    return f", {budget['rounds']} rounds a step{over}"


def _records(cells: Sequence[Cell], folder: Path) -> list[Record]:
    """Return the records of the cells, then of what else the folder holds that fits them."""
    found = {cell.path(folder): record for cell in cells if (record := finished(cell, folder))}
    # One budget a table: with half of its bytes, the default method with all of them is no row.
    budget = Budget.parse(max((cell.budget for cell in cells), key=lambda text: text != "rounds"))
    others = [(path, read_json(path)) for path in (folder / "cells").glob("*.json")]
    for path, record in sorted(others, key=lambda other: _place_of(other[1])):
        names = {key: record[key] for key in ("protocol", "parts", "method", "seed")}
        try:
            other = replace(cells[0], **names, budget=budget.of(record["method"]))
            if path not in found and other.path(folder) == path and finished(other, folder):
                found[path] = record
        except ConfigError:
            continue  # of other settings, or of a method that is no more: not to be compared
    return list(found.values())


def _place_of(record: Record) -> tuple[str, int, int, str, int]:
    """Return what orders a record among others: as the methods are listed."""
    name = record["method"].partition("@")[0]
    number = list(METHODS).index(name) if name in METHODS else len(METHODS)
    return record["protocol"], record["parts"], number, record["method"], record["seed"]


def write_tables(records: Sequence[Record], place: BenchFolder) -> list[Row]:
    """Write results, table and charts of the records and return the rows."""
    from server.bench.chart import frontier, steps  # a worker needs no matplotlib

    rows = rows_of(records)
    write_json(place.results, {"table": as_json(rows), "cells": list(records)})
    write_bytes(place.table, markdown(rows).encode())
    for (protocol, parts), mine in by_stream(rows).items():
        for name, draw in (("bytes", frontier), ("steps", steps)):
            path = place.folder / f"{protocol}-{parts}-{name}.svg"
            write_bytes(path, draw(mine).encode())
    return rows


class _Workers:
    """Calls a function for every item, in this process or in several."""

    def __init__(self, workers: int, items: int) -> None:
        self._pool = None
        if min(workers, items) > 1:
            context = multiprocessing.get_context("spawn")  # torch's threads survive no fork
            self._pool = ProcessPoolExecutor(min(workers, items), context, _begin_worker)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is None:
            return
        if kind is KeyboardInterrupt:  # a cell takes minutes: nobody waits for its end
            workers = multiprocessing.active_children()
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.join(_PATIENCE)
                worker.kill()  # one that was told where no exception gets through goes on
        self._pool.shutdown(wait=True, cancel_futures=True)

    def each(
        self,
        call: Callable[[Any, Path], Any],
        items: Sequence[Any],
        out: Path,
        problems: list[FallowError],
    ) -> Iterator[tuple[Any, Any]]:
        """Yield (item, result) as they come; an error is kept, and the others go on."""
        if self._pool is None:
            answers: Iterator[tuple[Any, Callable[[], Any]]] = (
                (item, lambda item=item: call(item, out))  # type: ignore[misc]
                for item in items
            )
        else:
            futures = {self._pool.submit(_in_worker, call, item, out): item for item in items}
            answers = ((futures[future], future.result) for future in as_completed(futures))
        for item, answer in answers:
            try:
                result = answer()
            except FallowError as problem:
                problems.append(problem)
                continue
            except BrokenProcessPool:
                raise FallowError(
                    "a worker process died, perhaps for want of memory: run the same command "
                    "again with --workers 1"
                ) from None
            yield item, result


def _begin_worker() -> None:
    _prepare()
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _in_worker(call: Callable[[Any, Path], Any], item: Any, out: Path) -> Any:
    try:
        return call(item, out)
    except SystemExit:
        # What the cell had open is closed now. The pool would go on with its next item.
        os._exit(128 + signal.SIGTERM)

"""All cells of a table: priors first, then the cells, as many at a time as there are workers."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from common.errors import FallowError
from common.store import write_bytes, write_json
from server.bench.cell import Cell, finished, make_priors, run_cell
from server.bench.table import Row, as_json, markdown, rows_of
from server.inline import _prepare

Record = dict[str, Any]
Tell = Callable[[str], None]


def run_bench(cells: Sequence[Cell], out: Path, workers: int, tell: Tell) -> list[Row]:
    """Run the cells that are not finished yet and write the tables of all that `out` holds.

    Parameters
    ----------
    cells : sequence of Cell
        Those of one protocol, seed by seed, are best side by side.
    out : Path
        Written to: ``cells/*.json``, ``priors/``, ``results.json``, ``table.md``.
    workers : int
        Processes, a cell each; 0 is one a core.
    tell : callable
        Is given a line for every cell.

    Raises
    ------
    ConfigError
        Before anything is run, if a setting is wrong.
    FallowError
        The first of a cell, after all others were run.
    """
    open_cells = [cell for cell in cells if finished(cell, out) is None]
    tell(f"{len(cells)} cells, {len(cells) - len(open_cells)} of them finished before")
    groups: dict[tuple[str, int, int], list[Cell]] = {}
    for cell in open_cells:
        groups.setdefault((cell.protocol, cell.parts, cell.seed), []).append(cell)
    problems: list[FallowError] = []
    with _Workers(workers or len(os.sched_getaffinity(0)), len(open_cells)) as pool:
        for group, _ in pool.each(make_priors, list(groups.values()), out, problems):
            tell(f"prior of {group[0].protocol}-{group[0].parts} seed {group[0].seed} is there")
        if problems:
            raise problems[0]
        for number, (cell, record) in enumerate(pool.each(run_cell, open_cells, out, problems), 1):
            tell(
                f"{cell.name}: ACC {record['acc']:.1%}, {record['seconds']:.0f} s "
                f"({number} of {len(open_cells)})"
            )
    rows = write_tables([record for cell in cells if (record := finished(cell, out))], out)
    if problems:
        raise problems[0]
    return rows


def write_tables(records: Sequence[Record], out: Path) -> list[Row]:
    """Write ``results.json`` and ``table.md`` and return the rows."""
    rows = rows_of(records)
    write_json(out / "results.json", {"table": as_json(rows), "cells": list(records)})
    write_bytes(out / "table.md", markdown(rows).encode())
    return rows


class _Workers:
    """Calls a function for every item, in this process or in several."""

    def __init__(self, workers: int, items: int) -> None:
        self._pool = None
        if min(workers, items) > 1:
            context = multiprocessing.get_context("spawn")  # torch's threads survive no fork
            self._pool = ProcessPoolExecutor(min(workers, items), context, _prepare)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
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
            futures = {self._pool.submit(call, item, out): item for item in items}
            answers = ((futures[future], future.result) for future in as_completed(futures))
        for item, answer in answers:
            try:
                result = answer()
            except FallowError as problem:
                problems.append(problem)
                continue
            yield item, result

"""Equal budgets: every method plays as many rounds as what the default method spends allows.

``rounds``: all play as many rounds. ``bytes``: the others send, up and down and over all steps,
at most the bytes that the default method sends with the rounds asked for. ``compute``: their
devices take at most the CPU time that its devices take. ``bytes:0.5`` allows half of that.

What a round costs is measured in two rounds that are then thrown away. What all rounds came to
is measured again afterwards, and too much of it is played again with fewer rounds.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from common.errors import ConfigError
from common.store import read_json, write_json
from server.begin import first_state
from server.bench.cell import Cell, finished, first_model, run_afresh
from server.bench.here import HereGrid
from server.bench.methods import method_of
from server.fleet import Fleet
from server.plan import RunState
from server.progress import NullProgress
from server.rounds import play_rounds
from server.synthetic import ImageMaker
from server.world import open_world

Kind = Literal["rounds", "bytes", "compute"]
Record = dict[str, Any]

REFERENCE = "fallow"
_UPPER_BOUND = "joint"
_TRIES = 3
_MOST = 5.0
"""Times the rounds asked for: a method that costs next to nothing needs no thousand rounds."""
_TOLERANCE = {"bytes": 1.0, "compute": 1.03}
"""CPU times of equal work differ by some per cent; a repetition would not make them agree."""


@dataclass(frozen=True)
class Budget:
    """What is equal for all methods.

    Attributes
    ----------
    factor : float
        Of what the default method spends.
    """

    kind: Kind
    factor: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Return the budget that a text like ``bytes`` or ``bytes:0.5`` names.

        Raises
        ------
        ConfigError
            If there is none.
        """
        name, colon, number = text.partition(":")
        try:
            factor = float(number) if colon else 1.0
        except ValueError:
            factor = 0.0
        kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
        if name not in kinds or not 0 < factor < math.inf or (colon and name == "rounds"):
            raise ConfigError(
                f"budget is '{text}': use {', '.join(kinds)}, or one of the last two "
                "with a factor, as bytes:0.5"
            )
        return cls(kinds[name], factor)

    def of(self, method: str) -> str:
        """Return the budget of a method, as a cell has it.

        The default method is what the others are measured by, an upper bound is no rival, and
        what plays no rounds has none to choose.
        """
        free = self.kind == "rounds" or method_of(method).kind != "rounds"
        if free or method == _UPPER_BOUND or (method == REFERENCE and self.factor == 1):
            return "rounds"
        return self.kind if self.factor == 1 else f"{self.kind}:{self.factor:g}"

    def spent(self, record: Record) -> float:
        """Return what a cell, or a round of one, spent: bytes, or seconds."""
        if self.kind == "bytes":
            return float(record["bytes_up"] + record["bytes_down"])
        return float(record["device_cpu_seconds"])


def reference_of(cell: Cell) -> Cell:
    """Return the cell whose spending is the budget of `cell`."""
    return replace(cell, method=REFERENCE, budget="rounds")


def run_within(cell: Cell, out: Path) -> Record:
    """Run a cell within its budget, unless it was run before, and return its record.

    The record's ``budget`` says what was allowed, what was spent and in how many rounds a step.

    Raises
    ------
    FallowError
        See `common.errors`; nothing is then kept of the cell.
    """
    record = finished(cell, out)
    if record is not None:
        return record
    reference = finished(reference_of(cell), out)
    assert reference is not None  # the runner runs it first
    budget = Budget.parse(cell.budget)
    limit = budget.factor * budget.spent(reference)
    rounds = _first_guess(cell, out, budget, limit, reference)
    for _ in range(_TRIES):
        record = run_afresh(replace(cell, rounds=rounds), out)
        spent = budget.spent(record)
        if spent <= limit * _TOLERANCE[budget.kind] or rounds == 1:
            break
        rounds = max(1, min(rounds - 1, math.floor(rounds * limit / spent)))
    assert record is not None
    played = record["settings"]["rounds"]
    record["budget"] = {"kind": cell.budget, "limit": limit, "spent": spent, "rounds": played}
    write_json(cell.path(out), record)
    return read_json(cell.path(out))


def rounds_within(
    limit: float, overhead: float, first: float, later: float, steps: int, most: int
) -> int:
    """Return how many rounds a step cost at most `limit` in all, 1 to `most`.

    Parameters
    ----------
    overhead : float
        What is spent beside the rounds of growing.
    first, later : float
        The first round of the run, in which the model is sent, and every other.
    """
    rounds = ((limit - overhead - first) / later + 1) / steps if later else most
    return max(1, min(math.floor(rounds), most))


def _first_guess(cell: Cell, out: Path, budget: Budget, limit: float, reference: Record) -> int:
    costs = [budget.spent(cost) for cost in _two_rounds(cell, out)]
    if not costs:  # learns by statistics alone
        return cell.config.rounds
    # What freeing costs is known of the default method alone; for others it is about the same.
    overhead = sum(budget.spent(r) for r in reference["rounds"] if r["phase"] != "grow")
    if cell.config.freeing not in ("always", "steps"):
        overhead = 0.0
    most = math.ceil(_MOST * cell.config.rounds)
    return rounds_within(limit, overhead, costs[0], costs[-1], cell.config.steps, most)


class _EnoughError(Exception):
    """Two rounds were played."""


def _two_rounds(cell: Cell, out: Path) -> list[Record]:
    """Return what the first two rounds of growing spend."""
    world = open_world(cell.config)
    prior, free = first_model(cell, world, out)
    costs: list[Record] = []
    before_round = 0.0
    with (
        tempfile.TemporaryDirectory(prefix="fallow-") as cache,
        HereGrid(world.config.flat(), world.config.devices, cache) as grid,
    ):

        def after_round(before: RunState, after: RunState, record: Record) -> None:
            nonlocal before_round
            if before.phase == "grow":
                costs.append({**record, "device_cpu_seconds": grid.cpu_seconds - before_round})
            before_round = grid.cpu_seconds
            if len(costs) == 2:
                raise _EnoughError

        state = first_state(world.plan, prior, free, world.scenario.prior, world.accelerator)
        with contextlib.suppress(_EnoughError):
            play_rounds(
                grid,
                world.plan,
                state,
                Fleet(grid),
                NullProgress(),
                after_round,
                maker=ImageMaker(world.accelerator, out / "priors"),
            )
    return costs

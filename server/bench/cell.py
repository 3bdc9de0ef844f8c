"""One cell of the table: a method on a stream with a seed, run once and kept as JSON."""

from __future__ import annotations

import math
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import metrics
from common.config import NOT_THE_RESULT, Config
from common.data import ImageSet
from common.errors import ConfigError
from common.filters import FreeSet, cut, parameter_count
from common.state import State, state_digest, write_state
from common.store import read_json, write_json
from server.bench.exam import Exam, exam_of
from server.bench.here import HereGrid
from server.bench.methods import method_of
from server.bench.priors import freed_prior, trained_prior
from server.bench.protocols import settings_of
from server.fleet import Fleet
from server.plan import Plan, RunState, StepOutcome, start
from server.prior import fit_prior
from server.progress import NullProgress
from server.rounds import play_rounds
from server.world import World, open_world

Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is run.

    Attributes
    ----------
    parts : int
        Of the stream, the prior's among them.
    method : str
        See `server.bench.methods.method_of`.
    settings : mapping
        Common to all methods, in snake case.
    """

    protocol: str
    parts: int
    method: str
    seed: int
    settings: Mapping[str, Any]

    @cached_property
    def base(self) -> Config:
        """Settings of the default method."""
        stream = settings_of(self.protocol, self.parts)
        return Config.parse({**stream, **self.settings, "seed": self.seed})

    @cached_property
    def config(self) -> Config:
        """Settings of the method."""
        return Config.parse({**self.base.model_dump(), **method_of(self.method).settings})

    @property
    def name(self) -> str:
        """For people and for the cell's file."""
        return f"{self.protocol}-{self.parts} {self.method} seed {self.seed}"

    def path(self, out: Path) -> Path:
        """Return the file that a finished cell is kept in."""
        return out / "cells" / f"{self.name.replace(' ', '_')}.json"


def finished(cell: Cell, out: Path) -> Record | None:
    """Return the record of a cell that was run before, or None.

    Raises
    ------
    ConfigError
        If it was run with other settings.
    """
    path = cell.path(out)
    if not path.exists():
        return None
    record = read_json(path)
    # A setting that is newer than the record had its default then.
    was = {**Config().flat(), **record["settings"]}
    now = _settings(cell.config)
    other = [
        f"{key} {was[key]!r} -> {value!r}"
        for key, value in now.items()
        if was[key] != value and key.replace("-", "_") not in NOT_THE_RESULT
    ]
    if other:
        raise ConfigError(
            f"{path} was run with other settings ({', '.join(other[:4])}): choose another --out"
        )
    return record


def make_priors(cells: list[Cell], out: Path) -> None:
    """Make the prior models of cells that differ in the method alone, each once."""
    torch.set_num_threads(1)
    for cell in cells:
        first_model(cell, open_world(cell.config), out)


def run_cell(cell: Cell, out: Path) -> Record:
    """Run a cell, unless it was run before, and return its record.

    Raises
    ------
    FallowError
        See `common.errors`; nothing is then kept of the cell.
    """
    record = finished(cell, out)
    if record is None:
        torch.set_num_threads(1)
        record = _run(cell, out)
        write_json(cell.path(out), record)
        record = read_json(cell.path(out))
    return record


@dataclass
class Played:
    """What is gathered while a method plays: its last model, lines of rounds, a row a step."""

    model: State
    free: FreeSet
    rows: list[list[float]] = field(default_factory=list)
    rounds: list[Record] = field(default_factory=list)
    outcomes: list[StepOutcome] = field(default_factory=list)
    cpu_seconds: float = 0.0


def _run(cell: Cell, out: Path) -> Record:
    began = time.monotonic()
    exam = exam_of(cell.base)
    world = open_world(cell.config)
    prior = trained_prior(world, out / "priors")
    first = exam.mark(world.plan, prior)
    played = Played(prior, FreeSet({}))
    kind = method_of(cell.method).kind
    if kind == "frozen":
        played.rows = [first.parts] * cell.config.steps
    elif kind == "central":
        played.model = _train_centrally(world)
        blank = [[math.nan] * len(first.parts)] * (cell.config.steps - 1)
        played.rows = [*blank, exam.mark(world.plan, played.model).parts]
    else:
        played = play(world, exam, *first_model(cell, world, out))
    last = exam.mark(world.plan, played.model)
    rows = [first.parts, *played.rows]
    matrix = np.array(rows)
    return {
        "protocol": cell.protocol,
        "parts": cell.parts,
        "method": cell.method,
        "seed": cell.seed,
        "columns": list(exam.tests),
        "matrix": [[_defined(value) for value in row] for row in rows],
        "acc": metrics.acc(matrix),
        "prior_acc": float(np.mean(first.parts)),
        "forgetting": _defined(metrics.forgetting(matrix)),
        "bwt": _defined(metrics.bwt(matrix)),
        "worst_device": last.worst_device,
        "bytes_up": sum(r["bytes_up"] for r in played.rounds),
        "bytes_down": sum(r["bytes_down"] for r in played.rounds),
        "device_cpu_seconds": played.cpu_seconds,
        **_size(world.plan, played.model, played.free),
        "steps": [_step(outcome, world.plan) for outcome in played.outcomes],
        "rounds": [{k: r[k] for k in _OF_A_ROUND} for r in played.rounds],
        "prior_digest": state_digest(prior),
        "model_digest": state_digest(played.model),
        "seconds": time.monotonic() - began,
        "settings": _settings(cell.config),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("fallow", "torch", "flwr", "numpy")},
        },
    }


_OF_A_ROUND = (
    "step",
    "phase",
    "attempt",
    "round",
    "heldout_accuracy",
    "agreement",
    "train_loss",
    "lambda",
    "bytes_up",
    "bytes_down",
)


def first_model(cell: Cell, world: World, out: Path) -> tuple[State, FreeSet]:
    """Return what the method begins with: the prior, as trained or with freed filters."""
    frees = method_of(cell.method).kind == "rounds" and cell.config.freeing in ("always", "prior")
    if not frees:
        return trained_prior(world, out / "priors"), FreeSet({})
    return freed_prior(world, cell.base, out / "priors")


def play(world: World, exam: Exam, prior: State, free: FreeSet) -> Played:
    """Play all rounds of `world`'s settings, from a prior and its free filters."""
    config, plan = world.config, world.plan
    played = Played(prior, free)

    def after_round(before: RunState, after: RunState, record: Record) -> None:
        played.rounds.append(record)
        if len(after.finished) > len(before.finished):
            outcome = after.finished[-1]
            played.outcomes.append(outcome)
            if outcome.step > 0:
                played.rows.append(exam.mark(plan, after.prior).parts)

    with (
        tempfile.TemporaryDirectory(prefix="fallow-") as cache,
        HereGrid(config.flat(), config.devices, cache) as grid,
    ):
        watcher = NullProgress()
        done = play_rounds(grid, plan, start(plan, prior, free), Fleet(grid), watcher, after_round)
        played.cpu_seconds = grid.cpu_seconds
    played.model, played.free = done.prior, done.free
    # A run that stops early leaves its last model to the steps that it did not play.
    missing = config.steps - len(played.rows)
    played.rows += [exam.mark(plan, done.prior).parts for _ in range(missing)]
    return played


def _train_centrally(world: World) -> State:
    """Train a new net on the images of the prior and of all parts, as the prior was trained."""
    scenario, plan = world.scenario, world.plan
    parts = [scenario.part(step + 1) for step in range(world.config.steps)]
    return fit_prior(
        world.config,
        plan.spec,
        plan.graph,
        ImageSet.concat([scenario.prior, *parts]),
        world.accelerator,
        world.augment,
        lambda stage, epoch, epochs, loss: None,
    )


def _size(plan: Plan, model: State, free: FreeSet) -> Record:
    write_state(plan.net, model)
    return {
        "params_full": parameter_count(plan.net),
        "params_slim": parameter_count(cut(plan.net, plan.graph, free)),
        "freed_share": free.share(plan.graph),
    }


def _step(outcome: StepOutcome, plan: Plan) -> Record:
    return {
        "step": outcome.step,
        "heldout_prior": outcome.prior,
        "heldout_grown": outcome.grown,
        "heldout_consolidated": outcome.consolidated,
        "refusal": outcome.refusal,
        "freed_share": outcome.free.share(plan.graph),
        "attempts": [vars(attempt) for attempt in outcome.attempts],
    }


def _settings(config: Config) -> Record:
    """Return all settings; of the data only its name, not where it lies on this machine."""
    return {**config.flat(), "data": Path(config.data).name}


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)

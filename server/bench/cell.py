"""One cell of the table: a method on a stream with a seed, run once and kept as JSON."""

from __future__ import annotations

import math
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from common import metrics
from common.config import NOT_THE_RESULT, Config
from common.data import ImageSet, digits
from common.data.places import label_of, places_of
from common.errors import ConfigError
from common.filters import FreeSet, parameter_count
from common.memory import Memory, assembled
from common.process import settle
from common.state import State, state_digest
from common.store import read_json, write_json
from server.begin import first_state
from server.bench.exam import Exam, Marks, exam_of
from server.bench.here import HereGrid
from server.bench.methods import method_of
from server.bench.priors import freed_prior, trained_prior
from server.bench.protocols import settings_of
from server.distill import distiller_of
from server.fleet import Fleet
from server.plan import Plan, RunState, StepOutcome, current_model
from server.prior import fit_prior
from server.progress import NullProgress
from server.rounds import play_rounds
from server.synthetic import ImageMaker
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
    budget : str
        ``rounds``, or what decides on their number (see `server.bench.budget`).
    rounds : int or None
        The number that was decided on.
    """

    protocol: str
    parts: int
    method: str
    seed: int
    settings: Mapping[str, Any]
    budget: str = "rounds"
    rounds: int | None = None

    @cached_property
    def base(self) -> Config:
        """Settings of the default method."""
        worlds = len(places_of(str(self.settings.get("data", digits.NAME))))
        stream = settings_of(self.protocol, self.parts, worlds)
        return Config.parse({**stream, **self.settings, "seed": self.seed})

    @cached_property
    def config(self) -> Config:
        """Settings of the method."""
        own = method_of(self.method).settings
        rounds = {} if self.rounds is None else {"rounds": self.rounds}
        return Config.parse({**self.base.model_dump(), **own, **rounds})

    @property
    def name(self) -> str:
        """For people and for the cell's file."""
        budget = "" if self.budget == "rounds" else f" {self.budget}"
        return f"{self.protocol}-{self.parts} {self.method} seed {self.seed}{budget}"

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
    if cell.budget != "rounds":
        cell = replace(cell, rounds=record["budget"]["rounds"])
    # A setting that is newer than the record had its default then.
    was = {**Config().flat(), **record["settings"]}
    now = _settings(cell.config)
    idle = _idle(cell)
    other = [
        f"{key} {was[key]!r} -> {value!r}"
        for key, value in now.items()
        if was[key] != value and key not in idle and key.replace("-", "_") not in NOT_THE_RESULT
    ]
    if other:
        raise ConfigError(
            f"{path} was run with other settings ({', '.join(other[:4])}): choose another --out"
        )
    return record


def _idle(cell: Cell) -> set[str]:
    """Return settings that decide nothing in a cell: of freeing where nothing is, and the like."""
    config, learns = cell.config, method_of(cell.method).kind == "rounds"
    idle: set[str] = set()
    if not learns or config.freeing in ("steps", "never"):
        idle |= {"freeing-epochs", "freeing-lr"}
    if not learns or config.freeing == "never":
        idle |= {"rotations", "max-drop", "drop-errors", "attempts"}
    if not learns or config.shift != "auto":
        idle |= {"opinion-features", "statistics-gap", "statistics-images"}
    return idle


def make_priors(cells: list[Cell], out: Path) -> None:
    """Make the prior models of cells that differ in the method alone, each once."""
    settle()
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
        settle()
        record = run_afresh(cell, out)
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
    memory: int = 0
    distill_seconds: float = 0.0
    added: Memory | None = None
    unslimmed: Marks | None = None
    """Marks of the last step's grown model, before its filters were freed."""


def run_afresh(cell: Cell, out: Path) -> Record:
    """Run a cell and return its record, which is not written anywhere."""
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
        played = play(world, exam, *first_model(cell, world, out), out / "priors")
    last = exam.mark(world.plan, played.model, played.free, played.added)
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
        "synthesis_seconds": sum(r.get("synthesis_seconds", 0.0) for r in played.rounds),
        "distill_seconds": played.distill_seconds,
        "memory": played.memory,
        "unslimmed": None if played.unslimmed is None else played.unslimmed.parts,
        **_size(world.plan, played),
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
    "device_cpu_seconds",
)


def first_model(cell: Cell, world: World, out: Path) -> tuple[State, FreeSet]:
    """Return what the method begins with: the prior, as trained or with freed filters."""
    frees = method_of(cell.method).kind == "rounds" and cell.config.freeing in ("always", "prior")
    if not frees:
        return trained_prior(world, out / "priors"), FreeSet({})
    return freed_prior(world, cell.base, out / "priors")


def play(
    world: World, exam: Exam, prior: State, free: FreeSet, images: Path | None = None
) -> Played:
    """Play all rounds of `world`'s settings, from a prior and its free filters.

    Images that the server makes of a model are kept in the folder `images`.
    """
    config, plan = world.config, world.plan
    played = Played(prior, free)

    def after_round(before: RunState, after: RunState, record: Record) -> None:
        spent = grid.cpu_seconds - sum(r["device_cpu_seconds"] for r in played.rounds)
        played.rounds.append({**record, "device_cpu_seconds": spent})
        if before.phase == "weigh" and before.step == config.steps:
            played.unslimmed = exam.mark(plan, current_model(plan, before))
        if len(after.finished) > len(before.finished):
            outcome = after.finished[-1]
            played.outcomes.append(outcome)
            if outcome.refusal is not None:
                played.unslimmed = None
            if outcome.step > 0:
                played.rows.append(_marks(exam, plan, after).parts)

    with (
        tempfile.TemporaryDirectory(prefix="fallow-") as cache,
        HereGrid(config.flat(), config.devices, cache) as grid,
    ):
        watcher, distiller = NullProgress(), distiller_of(world)
        first = first_state(plan, prior, free, world.scenario.prior, world.accelerator)
        done = play_rounds(
            grid,
            plan,
            first,
            Fleet(grid),
            watcher,
            after_round,
            distiller,
            maker=ImageMaker(world.accelerator, images),
        )
        played.cpu_seconds = grid.cpu_seconds
        played.memory = grid.memory.peak
        played.distill_seconds = 0.0 if distiller is None else distiller.seconds
    played.model, played.free, played.added = done.prior, done.off, done.memory
    # A run that stops early leaves its last model to the steps that it did not play.
    missing = config.steps - len(played.rows)
    played.rows += [_marks(exam, plan, done).parts for _ in range(missing)]
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


def _marks(exam: Exam, plan: Plan, state: RunState) -> Marks:
    return exam.mark(plan, state.prior, state.off, state.memory)


def _size(plan: Plan, played: Played) -> Record:
    slim = assembled(plan.net, plan.graph, played.model, played.free, played.added)
    return {
        "params_full": parameter_count(plan.net),
        "params_slim": parameter_count(slim),
        "freed_share": played.free.share(plan.graph),
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
    """Return all settings; of the data only the names, not where it lies on this machine."""
    return {**config.flat(), "data": label_of(config.data)}


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)

"""A whole run: prior, rounds, models after each step, summary and report.

Everything of a run is in one folder::

    OUT/rounds.jsonl                 a line a round
    OUT/checkpoints/                 what --resume goes on from (or checkpoint-store)
    OUT/quarantine/                  refused updates with their reasons, the latest
    OUT/models/step-N/               model.safetensors, free.json, model.onnx, model.int8.onnx
    OUT/summary.json, report.html    what came out
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from common.config import Config
from common.errors import ConfigError, FallowError, NetError
from common.store import disk_errors, write_bytes
from server.begin import first_state
from server.checkpoint import Checkpoint, CheckpointFolder
from server.distill import distiller_of
from server.files import locked
from server.fleet import Fleet
from server.ledger import Ledger
from server.listeners import listening
from server.plan import RunState, current_model, rounds_left
from server.prior import Prior, bring_prior, shortened, train_prior
from server.progress import Progress
from server.publish import publish
from server.quarantine import Quarantine
from server.report import write_report, write_summary
from server.results import Results
from server.rounds import Keep, play_rounds
from server.synthetic import ImageMaker
from server.world import open_world


@dataclass(frozen=True)
class RunFolder:
    """Where a run's files are."""

    out: Path

    @property
    def rounds(self) -> Path:
        """One JSON line a round."""
        return self.out / "rounds.jsonl"

    def model(self, step: int) -> Path:
        """Return where a step publishes its model; step 0 is the prior."""
        return self.out / "models" / f"step-{step}"

    @property
    def quarantine(self) -> Path:
        """Refused updates."""
        return self.out / "quarantine"


def conduct(
    grid: Grid,
    config: Config,
    out: Path,
    *,
    engine: str,
    resume: bool,
    progress: Progress,
    command: str | None = None,
) -> dict[str, Any]:
    """Run all steps, or go on with them, and write what came out.

    Parameters
    ----------
    grid : Grid
        Flower's or ours.
    config : Config
        All settings.
    out : Path
        The run's folder.
    engine : str
        For the report: ``inline`` or ``flower``.
    resume : bool
        Go on from the last checkpoint in `out`, if there is one.
    progress : Progress
        Is told what happens.
    command : str, optional
        For the report: how to do it again.

    Returns
    -------
    dict
        What summary.json holds.

    Raises
    ------
    FallowError
        See `common.errors`; whatever was done before is kept and can be resumed.
    """
    folder = RunFolder(out)
    checkpoints = CheckpointFolder(config.checkpoint_store or out / "checkpoints", config)
    with locked(out), checkpoints.owned(), listening(config, progress) as told:
        return _Conductor(grid, config, folder, checkpoints, engine, told, command).run(resume)


class _Conductor:
    """The parts of a run and the order in which they are called."""

    def __init__(
        self,
        grid: Grid,
        config: Config,
        folder: RunFolder,
        checkpoints: CheckpointFolder,
        engine: str,
        progress: Progress,
        command: str | None,
    ) -> None:
        self._grid, self._config, self._folder = grid, config, folder
        self._engine, self._progress, self._command = engine, progress, command
        self._checkpoints = checkpoints
        self._lines = 0

    def run(self, resume: bool) -> dict[str, Any]:
        checkpoint = self._last_checkpoint(resume)
        self._world = open_world(self._config)
        records = {} if checkpoint is None else checkpoint.records
        self._results = Results(self._world, self._engine, self._command, records)
        status, error = "failed", None
        try:
            if checkpoint is None:
                checkpoint = Checkpoint(self._first_state(), {}, self._results.records, 0)
                self._checkpoints.write(checkpoint)
            self._play(checkpoint)
            status = "complete"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except FallowError as problem:
            error = str(problem)
            raise
        finally:
            if self._results.begun:
                summary = self._results.summary(status, error, self._read_rounds())
                write_summary(summary, self._folder.out / "summary.json")
                write_report(self._folder.out)
        return summary

    def _last_checkpoint(self, resume: bool) -> Checkpoint | None:
        if not self._checkpoints.exists():
            return None
        if not resume:
            raise ConfigError(
                f"out is {self._folder.out}, which holds a run already: add --resume to go on "
                "with it, or choose another --out"
            )
        return self._checkpoints.read()

    def _first_state(self) -> RunState:
        began = time.monotonic()
        prior = self._make_prior()
        images = None if prior.source == "brought" else self._world.scenario.prior
        world = self._world
        state = first_state(world.plan, prior.state, prior.free, images, world.accelerator)
        self._results.prior_made(prior, time.monotonic() - began)
        if state.step > 0:
            self._publish(0, state)
        return state

    def _make_prior(self) -> Prior:
        world, config = self._world, self._config
        if config.prior:
            return bring_prior(config, world.plan.spec, world.test)

        def tell(stage: str, epoch: int, epochs: int, loss: float) -> None:
            if epoch == 1:
                self._progress.stage(f"{stage} at the server", epochs)
            self._progress.advance(1)

        prior = train_prior(
            config,
            world.plan.spec,
            world.plan.graph,
            world.scenario.prior,
            world.accelerator,
            world.augment,
            tell,
        )
        return prior if config.codec_down == "fp32" else shortened(prior)

    def _play(self, checkpoint: Checkpoint) -> None:
        plan = self._world.plan
        state = checkpoint.state
        self._match_rounds(checkpoint)
        self._progress.plan(checkpoint.rounds + rounds_left(plan, state), done=checkpoint.rounds)
        fleet = Fleet(self._grid, checkpoint.held, Ledger(checkpoint.ledger))
        quarantine = Quarantine(self._folder.quarantine, self._config.quarantine * 2**20)
        keep = Keep(self._folder.out, quarantine)
        distiller = distiller_of(self._world)

        def after_round(before: RunState, after: RunState, record: dict[str, Any]) -> None:
            if distiller is not None:
                self._results.distilled(before.step, distiller.seconds)
                distiller.seconds = 0.0
            self._progress.round_done(record)
            self._note_changes(before, after)
            line = json.dumps(record)
            self._checkpoints.write(
                Checkpoint(
                    after,
                    fleet.held,
                    self._results.records,
                    self._lines + 1,
                    fleet.ledger.as_json(),
                    line,
                )
            )
            self._append(line)
            if (after.step, after.phase, after.attempt) != (
                before.step,
                before.phase,
                before.attempt,
            ):
                expected = self._lines + rounds_left(plan, after)
                self._progress.plan(expected, done=checkpoint.rounds)
                self._announce(after)

        self._announce(state)
        state = play_rounds(
            self._grid,
            plan,
            state,
            fleet,
            self._progress,
            after_round,
            distiller,
            ImageMaker(self._world.accelerator),
            keep,
        )
        if state.stopped is not None:
            raise NetError(state.stopped)

    def _announce(self, state: RunState) -> None:
        if state.done:
            return
        rounds = {"grow": self._config.rounds, "consolidate": self._config.consolidate_rounds}
        self._progress.phase(
            state.step,
            self._config.steps,
            state.phase,
            rounds.get(state.phase, 1),
            done=state.round,
        )

    def _note_changes(self, before: RunState, after: RunState) -> None:
        """Measure and publish what a round has brought to its end."""
        if before.phase == "weigh":
            # base is the grown model now, unless it was refused or nothing can be freed
            grown = current_model(self._world.plan, before)
            self._results.grown(before.step, grown)
        if len(after.finished) > len(before.finished):
            freed = before.way == "whole" and self._config.freeing in ("always", "steps")
            if before.phase in ("grow", "look", "tally", "advise") and not freed:
                self._results.grown(before.step, after.prior, after.off, after.memory)
            outcome = after.finished[-1]
            for text in self._results.verdicts(outcome):
                self._progress.message(text)
            self._publish(outcome.step, after)

    def _publish(self, step: int, state: RunState) -> None:
        self._progress.stage(f"step {step}: export", None)
        published = publish(
            self._world,
            state.prior,
            state.off,
            state.memory,
            step,
            self._folder.model(step),
            parent=self._results.parent(step),
        )
        self._results.published(step, state, published)

    def _append(self, line: str) -> None:
        with disk_errors(self._folder.rounds), self._folder.rounds.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._lines += 1

    def _match_rounds(self, checkpoint: Checkpoint) -> None:
        """Have the lines of the rounds that the checkpoint knows: others are played again."""
        lines = self._read_lines()[: checkpoint.rounds]
        if checkpoint.last:  # in the file it may be torn, or not yet there
            lines[checkpoint.rounds - 1 :] = [checkpoint.last]
        write_bytes(self._folder.rounds, "".join(line + "\n" for line in lines).encode())
        self._lines = len(lines)

    def _read_lines(self) -> list[str]:
        path = self._folder.rounds
        return path.read_text().splitlines() if path.exists() else []

    def _read_rounds(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._read_lines()[: self._lines]]

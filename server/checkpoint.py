"""The state of a run on disk: written after every round, read by --resume.

``checkpoints/state-NNNNNN.json`` refers to tensors by digest in ``checkpoints/tensors``. Two
states are kept, so that a newest one that is torn costs a round and not the run. Where they are is
`server.files`' business.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import NOT_THE_RESULT, Config
from common.errors import StoreError
from common.filters import FreeSet
from common.gate import Moments
from common.memory import Memory, moments_as_state, moments_from_state
from common.order import as_channels, as_free_set
from common.sparsify import Attempt
from common.state import State, state_digest
from common.store import json_bytes, json_of, state_and_header_of, state_bytes
from common.update import Moved
from server.files import Files, open_files
from server.plan import Carried, RunState, StepOutcome
from server.shared import Shared

_FORMAT = 4
_KEEP = 2


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything that a run goes on from.

    Attributes
    ----------
    state : RunState
        Of the plan.
    held : dict
        Models that each device is known to hold.
    records : dict
        What the summary will say of the prior and of finished steps.
    rounds : int
        Lines of rounds.jsonl that belong to it.
    ledger : dict
        What else is remembered of the devices (see `server.ledger`).
    last : str
        The newest of those lines: it is put into the file after the checkpoint, so that no line
        that is there is ever played again.
    """

    state: RunState
    held: dict[str, list[str]] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)
    rounds: int = 0
    ledger: dict[str, Any] = field(default_factory=dict)
    last: str = ""


class CheckpointFolder:
    """Checkpoints of one run.

    Parameters
    ----------
    place : Path or str
        Folder or fsspec URL of the checkpoints.
    config : Config
        Settings of the run; a checkpoint of others is refused.
    """

    def __init__(self, place: Path | str, config: Config) -> None:
        self._files: Files = open_files(place)
        self._config = config

    def owned(self) -> AbstractContextManager[None]:
        """Keep other servers out while the context lasts.

        Raises
        ------
        StoreError
            If one is there.
        """
        return self._files.owned()

    def exists(self) -> bool:
        """Return whether there is any checkpoint."""
        return bool(self._states())

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; those before the last are removed.

        Raises
        ------
        DiskError
            If the disk is full; the checkpoints that were there still are.
        """
        known = self._states()
        number = int(known[-1].split("-")[1].split(".")[0]) + 1 if known else 0
        name = f"state-{number:06d}.json"
        value = {
            "format": _FORMAT,
            "config": self._config.digest,
            "settings": self._config.flat(),
            "state": self._encode(checkpoint.state),
            "held": checkpoint.held,
            "records": checkpoint.records,
            "rounds": checkpoint.rounds,
            "ledger": checkpoint.ledger,
            "last": checkpoint.last,
        }
        self._files.write(name, json_bytes(value))
        kept = [*known, name][-_KEEP:]
        for old in known:
            if old not in kept:
                self._files.remove(old)
        used = {self._tensor_name(d) for k in kept for d in self._digests(k)}
        for tensor in self._files.names("tensors"):
            if tensor not in used:
                self._files.remove(tensor)

    def read(self) -> Checkpoint:
        """Return the newest checkpoint that is whole.

        Raises
        ------
        StoreError
            If there is none, or it is of a run with other settings.
        """
        problems = []
        for name in reversed(self._states()):
            path = f"{self._files.where}/{name}"
            try:
                value = json_of(path, self._files.read(name))
                self._check(path, value)
                return Checkpoint(
                    self._decode(value["state"]),
                    value["held"],
                    value["records"],
                    value["rounds"],
                    value.get("ledger", {}),  # absent in a run that an earlier version began
                    value.get("last", ""),
                )
            except _ForeignError:
                raise
            except StoreError as error:
                problems.append(str(error))
        detail = f": {problems[0]}" if problems else ""
        raise StoreError(f"no usable checkpoint in {self._files.where}{detail}")

    def _states(self) -> list[str]:
        return [n for n in self._files.names("") if n.startswith("state-") and n.endswith(".json")]

    def _check(self, path: str, value: dict[str, Any]) -> None:
        if value.get("format") != _FORMAT:
            raise _ForeignError(
                f"{path} has format {value.get('format')}, this version reads {_FORMAT}: finish "
                "the run with the version that began it"
            )
        if value["config"] != self._config.digest:
            mine = self._config.flat()
            other = [
                f"{key} {was!r} -> {mine.get(key)!r}"
                for key, was in value["settings"].items()
                if mine.get(key) != was and key.replace("-", "_") not in NOT_THE_RESULT
            ] or ["settings that another version of fallow knows"]
            raise _ForeignError(
                f"{path} is of another run ({', '.join(other[:4])}): resume with the same "
                "settings or choose another --out"
            )

    def _encode(self, state: RunState) -> dict[str, Any]:
        packed = {
            name: self._put_array(array, name)
            for name, array in (("values", state.values), ("tail", state.tail))
        }
        scores = state.scores
        return {
            "step": state.step,
            "phase": state.phase,
            "attempt": state.attempt,
            "round": state.round,
            "share": state.share,
            "kd_weight": state.kd_weight,
            "prior": self._put(state.prior),
            "base": self._put(state.base),
            **packed,
            "shared": None if state.shared is None else self._put(_bundle(state.shared)),
            "since": None if state.shared is None else state.shared.since,
            "memory": None if state.memory is None else self._put(state.memory.as_state()),
            "way": state.way,
            "world": state.world,
            "seen": None if state.seen is None else self._put(moments_as_state(state.seen)),
            "known": list(state.carried.known),
            "spare": as_channels(state.carried.spare),
            "learnt": state.carried.learnt,
            "peers": state.peers,
            "best": state.best,
            "anchor": self._put_array(state.carried.anchor, "anchor"),
            "synthetic": self._put_array(state.synthetic, "synthetic"),
            "source": state.source,
            "free": as_channels(state.free),
            "next_free": as_channels(state.next_free),
            "heldout_prior": _number(state.heldout_prior),
            "heldout_grown": _number(state.heldout_grown),
            "attempts": [asdict(a) for a in state.attempts],
            "lambdas": list(state.lambdas),
            "scores": None if scores is None else {k: v.tolist() for k, v in scores.items()},
            "finished": [_encode_step(outcome) for outcome in state.finished],
            "pending": None if state.pending is None else _encode_step(state.pending),
            "retry": None if state.retry is None else self._encode(state.retry),
            "allowed": state.allowed,
            "class_counts": list(state.class_counts),
            "done": state.done,
            "stopped": state.stopped,
        }

    def _decode(self, value: dict[str, Any]) -> RunState:
        scores = value["scores"]
        return RunState(
            step=value["step"],
            phase=value["phase"],
            attempt=value["attempt"],
            round=value["round"],
            share=value["share"],
            kd_weight=value["kd_weight"],
            prior=self._tensor(value["prior"]),
            base=self._tensor(value["base"]),
            values=self._array(value, "values"),
            shared=self._shared(value),
            tail=self._array(value, "tail"),
            memory=self._memory(value["memory"]),
            way=value["way"],
            world=value["world"],
            seen=self._seen(value["seen"]),
            carried=Carried(
                tuple(value.get("known", ())),
                self._array(value, "anchor"),
                as_free_set(value.get("spare", {})),
                value.get("learnt", False),
            ),
            peers=value.get("peers", 1),
            best=value.get("best", 0),
            synthetic=self._array(value, "synthetic"),
            source=value["source"],
            free=as_free_set(value["free"]),
            next_free=as_free_set(value["next_free"]),
            heldout_prior=_float(value["heldout_prior"]),
            heldout_grown=_float(value["heldout_grown"]),
            attempts=tuple(Attempt(**a) for a in value["attempts"]),
            lambdas=tuple(value["lambdas"]),
            scores=None if scores is None else {k: np.array(v) for k, v in scores.items()},
            finished=tuple(_decode_step(step) for step in value["finished"]),
            pending=_decode_step(value["pending"]) if value.get("pending") else None,
            retry=self._decode(value["retry"]) if value.get("retry") else None,
            allowed=value.get("allowed", 0.0),
            class_counts=tuple(value["class_counts"]),
            done=value["done"],
            stopped=value["stopped"],
        )

    def _put_array(self, array: np.ndarray | None, name: str) -> str | None:
        return None if array is None else self._put({name: torch.from_numpy(array)})

    def _array(self, state: dict[str, Any], name: str) -> np.ndarray | None:
        digest = state.get(name)
        return None if digest is None else self._tensor(digest)[name].numpy()

    def _shared(self, state: dict[str, Any]) -> Shared | None:
        if state["shared"] is None:
            return None
        parts = {name: part.numpy() for name, part in self._tensor(state["shared"]).items()}
        moved = Moved(parts["distance"])
        return Shared(moved, parts["residue"], parts["delta"], state["since"])

    def _memory(self, digest: str | None) -> Memory | None:
        return None if digest is None else Memory.from_state(self._tensor(digest))

    def _seen(self, digest: str | None) -> Moments | None:
        return None if digest is None else moments_from_state(self._tensor(digest))

    def _put(self, state: State) -> str:
        """Keep tensors that are not here yet; return their digest."""
        digest = state_digest(state)
        name = self._tensor_name(digest)
        if name not in self._files.names("tensors"):
            self._files.write(name, state_bytes(state))
        return digest

    def _tensor(self, digest: str) -> State:
        name = self._tensor_name(digest)
        path = f"{self._files.where}/{name}"
        try:
            state, header = state_and_header_of(path, self._files.read(name))
            if header.get("digest") != digest:
                raise StoreError(f"{path} was altered: it is not the state of that digest")
        except StoreError:
            # The round that is played again makes the same tensors, which are written only
            # if no file has their name.
            self._files.remove(name)
            raise
        return state

    @staticmethod
    def _tensor_name(digest: str) -> str:
        return f"tensors/{digest}.safetensors"

    def _digests(self, name: str) -> set[str]:
        """Return the tensors that a state refers to; of one that is torn, none."""
        try:
            state = json_of(name, self._files.read(name))["state"]
        except StoreError:
            return set()
        names = ("prior", "base", "values", "shared", "tail", "memory", "seen")
        states = [state, state["retry"]] if state.get("retry") else [state]
        named = {one.get(name) for one in states for name in (*names, "anchor", "synthetic")}
        return {digest for digest in named if digest}


class _ForeignError(StoreError):
    """A whole checkpoint of another run or version: an older one would be no better."""


def _bundle(shared: Shared) -> State:
    arrays = {"residue": shared.residue, "delta": shared.delta}
    return {**shared.moved.as_state(), **{n: torch.from_numpy(a) for n, a in arrays.items()}}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _encode_step(outcome: StepOutcome) -> dict[str, Any]:
    value = {**vars(outcome), "free": as_channels(outcome.free)}
    value["attempts"] = [asdict(a) for a in outcome.attempts]
    value.update({k: _number(value[k]) for k in ("prior", "grown", "consolidated")})
    return value


def _decode_step(value: dict[str, Any]) -> StepOutcome:
    return StepOutcome(
        **{
            **value,
            **{k: _float(value[k]) for k in ("prior", "grown", "consolidated")},
            "free": FreeSet({k: tuple(v) for k, v in value["free"].items()}),
            "attempts": tuple(Attempt(**a) for a in value["attempts"]),
            "lambdas": tuple(value["lambdas"]),
        }
    )

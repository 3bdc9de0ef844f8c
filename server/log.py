"""A run as a log: one line an event on standard error, as text or JSON.

Every line has run, step, phase and round, and those of a device its name::

    {"time": "2026-11-26T18:00:00.123+00:00", "level": "warning", "event": "device", "run":
     "5f0c...", "step": 1, "phase": "grow", "round": 3, "device": "device-4", "outcome": "refused",
     "reason": "the update is not finite: value 7 is nan"}
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from common.config import Config
from server.progress import Progress

_LOUD = ("refused", "failed", "silent", "rests")


class Log(Progress):
    """Writes what it is told.

    Parameters
    ----------
    config : Config
        Of the run; its digest names the run in every line.
    """

    def __init__(self, config: Config) -> None:
        self._logger = logging.getLogger("fallow.run")
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        self._handler = logging.StreamHandler(sys.stderr)
        self._handler.setFormatter(_Json() if config.log == "json" else _Text())
        self._where: dict[str, Any] = {"run": config.digest[:12]}

    def __enter__(self) -> Self:
        self._logger.addHandler(self._handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._say(logging.ERROR, "end", error=str(error) or type(error).__name__)
        else:
            self._say(logging.INFO, "end")
        self._logger.removeHandler(self._handler)

    def phase(self, step: int, steps: int, phase: str, rounds: int, done: int = 0) -> None:  # noqa: D102
        self._where |= {"step": step, "phase": phase, "round": done + 1}
        self._say(logging.INFO, "phase", rounds=rounds)

    def device(self, name: str, event: str, reason: str | None = None) -> None:  # noqa: D102
        level = logging.WARNING if event in _LOUD else logging.INFO
        more = {} if reason is None else {"reason": reason}
        self._say(level, "device", device=name, outcome=event, **more)

    def abandoned(self, reason: str) -> None:  # noqa: D102
        self._say(logging.WARNING, "abandoned", reason=reason)

    def round_done(self, record: dict[str, Any]) -> None:  # noqa: D102
        names = ("devices_used", "devices_asked", "heldout_accuracy", "train_loss", "seconds")
        told = {name: record[name] for name in names}
        here = {"step": record["step"], "phase": record["phase"], "round": record["round"]}
        self._where |= here
        self._say(logging.INFO, "round", **told)
        self._where["round"] += 1

    def stage(self, name: str, total: int | None = None) -> None:  # noqa: D102
        self._say(logging.INFO, "stage", stage=name)

    def message(self, text: str) -> None:  # noqa: D102
        self._say(logging.INFO, "message", text=text)

    def _say(self, level: int, event: str, **fields: Any) -> None:
        self._logger.log(level, event, extra={"fields": {**self._where, **fields}})


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({**_head(record), **record.fields}, ensure_ascii=False)  # type: ignore[attr-defined]


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = record.fields  # type: ignore[attr-defined]
        said = " ".join(f"{key}={json.dumps(value)}" for key, value in fields.items())
        return "{time} {level} {event} ".format(**_head(record)) + said


def _head(record: logging.LogRecord) -> dict[str, str]:
    when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    return {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}

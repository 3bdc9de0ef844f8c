"""Hundreds of devices behind the real rounds loop, for minutes: times of a round, memory.

    python tests/bench/fleet_load.py --minutes 30 [--devices 200]

The devices are functions in this process: they answer late, decline, fail and send rubbish now and
then, as a fleet does; what they send are encoded updates of the net's real size. Everything else
(selection, admission, aggregation, checkpoints) is the server's own code. Memory is that of the
whole process, the devices' part included. Prints p50 and p95 of a round and how memory went, and
writes results/fleet-load.json (or --out).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Error, Message

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "server"))
from fake_grid import FakeGrid, freed_prior, make_plan, order_in, reply_to

from common.codec import encode
from common.layout import scope_layout
from common.order import Order, Report
from common.seeds import numpy_rng
from common.state import read_state
from common.update import as_array, rows_of
from server.checkpoint import Checkpoint, CheckpointFolder
from server.fleet import Fleet
from server.plan import Plan, RunState, start
from server.progress import NullProgress
from server.quarantine import Quarantine
from server.rounds import Keep, play_rounds

POOL = 16
"""Different updates; encoding one for every device and round would measure the devices."""


class TimeIsUp(Exception):  # noqa: N818 - no error
    """Ends the bench."""


class Devices(FakeGrid):
    """Nodes 1..n, with delays, declines, failures and rubbish, drawn by message."""

    def __init__(self, plan: Plan, count: int) -> None:
        super().__init__(dict.fromkeys(range(1, count + 1), self.answer))
        self.sent = _Count()  # type: ignore[assignment]
        self._rng = numpy_rng("load", 0)
        self._plan = plan
        self._pool: list[np.ndarray] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.delay = {m.metadata.dst_node_id: float(self._rng.uniform(0, 0.3)) for m in messages}
        return super().push_messages(messages)

    def answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        name = f"device-{node:05d}"
        if message.metadata.message_type == "query":
            return reply_to(message, Report(device=name))
        order, luck = order_in(message), self._rng.random()
        if luck < 0.01:
            return None
        if luck < 0.02:
            return Message(Error(1, "node is gone"), reply_to=message)
        if luck < 0.05:
            return reply_to(message, Report(device=name, declined="the battery is low"))
        update = self.updates(order)[(node + order.round) % POOL]
        if luck < 0.06:
            update = update[: len(update) // 2]
        return reply_to(message, self.report(order, name), update)

    def updates(self, order: Order) -> list[np.ndarray]:
        if not self._pool:
            layout = scope_layout(
                order.scope, self._plan.graph, order.free_set(), read_state(self._plan.net)
            )
            self._pool = [
                as_array(
                    encode(
                        self._rng.normal(0, 1e-3, layout.size).astype(np.float32),
                        rows_of(layout),
                        order.codec_up,
                        self._rng,
                    )
                )
                for _ in range(POOL)
            ]
        return self._pool

    def report(self, order: Order, name: str) -> Report:
        asked = ("run", "step", "phase", "attempt", "round", "base", "free_digest", "layout")
        return Report(
            device=name,
            images=50,
            class_counts=[5] * 10,
            heldout=10,
            right=6,
            prior_right=5,
            both_right=5,
            loss=1.0,
            **{field: getattr(order, field) for field in asked},
        )


class _Count(list[Message]):
    """Counts what is appended and keeps nothing: memory is what is measured."""

    def __init__(self) -> None:
        super().__init__()
        self._length = 0

    def append(self, message: Message) -> None:
        self._length += 1

    def __len__(self) -> int:
        return self._length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--over-selection", type=float, default=1.0)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fleet-load.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = make_plan(
        width=options.width,
        devices=options.devices,
        min_devices=options.devices // 2,
        rounds=10**6,
        round_timeout=2.0,
        over_selection=options.over_selection,
    )
    result = load(plan, options.devices, 60 * options.minutes)
    result |= {"minutes_asked": options.minutes, "over_selection": options.over_selection}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "rss_mb_by_round"}, indent=1))


def load(plan: Plan, devices: int, seconds: float) -> dict[str, Any]:
    """Play rounds for so long and return what was measured."""
    grid = Devices(plan, devices)
    times: list[float] = []
    rss: list[float] = []
    events: dict[str, int] = {"declined": 0, "refused": 0, "late": 0, "abandoned": 0, "used": 0}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fallow-") as folder:
        place = Path(folder)
        checkpoints = CheckpointFolder(place / "checkpoints", plan.config)
        fleet = Fleet(grid)

        def after_round(before: RunState, after: RunState, record: dict[str, Any]) -> None:
            checkpoints.write(Checkpoint(after, fleet.held, {}, len(times), fleet.ledger.as_json()))
            times.append(record["seconds"])
            rss.append(_rss_mb())
            events["used"] += record["devices_used"]
            events["declined"] += sum(record["declined"].values())
            events["refused"] += len(record["refused"])
            events["late"] += record["late"]
            events["abandoned"] += record["tries"] - 1
            if time.monotonic() - began > seconds:
                raise TimeIsUp

        keep = Keep(place, Quarantine(place / "quarantine", 2**20))
        try:
            state = start(plan, *freed_prior(plan))
            play_rounds(grid, plan, state, fleet, NullProgress(), after_round, keep=keep)
        except TimeIsUp:
            pass
        quarantined = sum(p.stat().st_size for p in (place / "quarantine").glob("*"))
    half = len(rss) // 2
    slope = float(np.polyfit(range(len(rss) - half), rss[half:], 1)[0]) if len(rss) > 4 else 0.0
    return {
        "devices": devices,
        "rounds": len(times),
        "minutes": round((time.monotonic() - began) / 60, 2),
        "round_seconds_p50": round(float(np.percentile(times, 50)), 3),
        "round_seconds_p95": round(float(np.percentile(times, 95)), 3),
        "rss_mb_after_10_percent": round(rss[len(rss) // 10], 1),
        "rss_mb_at_half": round(rss[half], 1),
        "rss_mb_at_end": round(rss[-1], 1),
        "rss_mb_most": round(max(rss), 1),
        "rss_growth_mb_per_100_rounds_second_half": round(100 * slope, 3),
        "quarantine_mb": round(quarantined / 1e6, 3),
        "devices_by_outcome": events,
        "rss_mb_by_round": [round(v, 1) for v in rss[:: max(1, len(rss) // 100)]],
        "load_average_at_end": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("flwr", "numpy", "torch")},
        },
    }


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()

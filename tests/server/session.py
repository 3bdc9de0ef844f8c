"""A whole run in this process with the real devices, and all that went over its wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fake_grid import DirectGrid, arrays_in
from flwr.app import Message

from client.app import _BASES
from common.config import Config
from common.filters import FreeSet
from common.state import State, read_state
from server.begin import first_state
from server.distill import distiller_of
from server.fleet import Fleet
from server.plan import RunState
from server.prior import make_net
from server.progress import NullProgress
from server.rounds import play_rounds
from server.world import World, open_world

QUICK: dict[str, Any] = {
    "net": "resnet8",
    "width": 8,
    "devices": 2,
    "steps": 2,
    "prior_size": 120,
    "part_size": 100,
    "partition": "iid",
    "freeing": "never",
    "shift": "never",
    "scope": "all",
    "kd_teacher": "none",
    "rounds": 2,
    "epochs": 1,
    "codec_up": "fp32",
    "codec_down": "fp32",
    "synthetic_images": 12,
    "synthetic_steps": 4,
}


class Session:
    """A run in this process, with all that went over its wire."""

    def __init__(
        self, folder: Path, prior: tuple[State, FreeSet] | None = None, **settings: Any
    ) -> None:
        torch.set_num_threads(1)
        self.world: World = open_world(Config.parse({**QUICK, **settings}))
        self.cache = folder / "cache"
        self.sent: list[Message] = []
        self.states: list[RunState] = []
        self.records: list[dict[str, Any]] = []
        plan = self.world.plan
        self.prior = prior or (read_state(make_net(plan.config, plan.spec)), FreeSet({}))
        self.state = self.first()

    def first(self) -> RunState:
        return first_state(self.world.plan, *self.prior, self.world.scenario.prior)

    def play(self, forget_after: int = 0) -> Session:
        grid = DirectGrid(self.world.config, self.cache)
        push = grid.push_messages

        def watched(messages: Any) -> Any:
            messages = list(messages)
            self.sent += [m for m in messages if m.metadata.message_type == "train"]
            return push(messages)

        grid.push_messages = watched  # type: ignore[method-assign]

        def after_round(before: RunState, after: RunState, record: dict[str, Any]) -> None:
            self.states.append(after)
            self.records.append(record)
            if len(self.states) == forget_after:
                for path in self.cache.glob("**/*.safetensors"):
                    path.unlink()
                _BASES.pop(self.cache, None)

        fleet = Fleet(grid)
        plan = self.world.plan
        self.state = play_rounds(
            grid,
            plan,
            self.state,
            fleet,
            NullProgress(),
            after_round,
            distiller_of(self.world),
        )
        return self

    def arrays(self, node: int = 1) -> list[list[str]]:
        return [sorted(arrays_in(m)) for m in self.sent if m.metadata.dst_node_id == node]

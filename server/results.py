"""What summary.json says, gathered while a run goes on and kept in its checkpoints."""

from __future__ import annotations

import copy
import math
import platform
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from common import metrics
from common.data import ImageSet, split_holdout
from common.delta import DELTA
from common.filters import FreeSet, parameter_count
from common.memory import Memory, assembled
from common.sparsify import Attempt
from common.state import State, write_state
from common.train import Labelled, accuracy_of
from server.plan import RunState, StepOutcome
from server.prior import Prior
from server.publish import Published
from server.world import World

Record = dict[str, Any]

_CONSOLIDATION = ("weigh", "consolidate", "judge")


class Results:
    """Records of the prior and of each finished step.

    Parameters
    ----------
    world : World
        Of the run.
    engine, command
        For the summary.
    records : dict
        Of a resumed run, else empty. It is JSON data and is changed in place.
    """

    def __init__(self, world: World, engine: str, command: str | None, records: Record) -> None:
        self._world, self._engine, self._command = world, engine, command
        self.records = records
        records.setdefault("steps", {})
        records.setdefault("matrix", [])

    @property
    def begun(self) -> bool:
        """Whether there is a prior to tell of."""
        return "prior" in self.records

    def prior_made(self, prior: Prior, seconds: float) -> None:
        """Note the first model."""
        net = self._net(prior.trained)
        freeing = prior.freeing
        self.records["prior"] = {
            "accuracy_test": self._test_accuracy(net),
            "accuracy_heldout": freeing.before if freeing else None,
            "before_freeing": freeing.before if freeing else None,
            "after_freeing": freeing.after if freeing else None,
            "after_cut": freeing.after_cut if freeing else None,
            "freed_share": prior.free.share(self._world.plan.graph),
            "requested_share": self._world.config.share,
            "attempts": _attempts(freeing.attempts if freeing else ()),
            "params_full": parameter_count(net),
            "params_slim": parameter_count(net),
            "seconds": seconds,
            "seconds_by_phase": {
                "train": seconds - prior.freeing_seconds,
                "sst": prior.freeing_seconds,
                "export": 0.0,
            },
            "source": prior.source,
        }
        self.records["test_accuracy"] = self._test_accuracy(self._net(prior.state))
        self.records["matrix"] = [self._row(self._net(prior.state))]

    def grown(
        self, step: int, model: State, free: FreeSet | None = None, memory: Memory | None = None
    ) -> None:
        """Note the model at the end of a step's growing, with what `memory` adds to it."""
        plan = self._world.plan
        net = assembled(plan.net, plan.graph, model, free or FreeSet({}), memory)
        self._step(step)["grown_accuracy"] = self._test_accuracy(net)

    def distilled(self, step: int, seconds: float) -> None:
        """Add what the server's distillation of a round took."""
        record = self._step(step)
        record["distill_seconds"] = record.get("distill_seconds", 0.0) + seconds

    def parent(self, step: int) -> str | None:
        """Return the digest of the model that was published before `step`."""
        earlier = [int(s) for s, r in self.records["steps"].items() if "model_digest" in r]
        before = [s for s in earlier if s < step]
        if not before:
            return self.records.get("digest")
        digest: str = self.records["steps"][str(max(before))]["model_digest"]
        return digest

    def published(self, step: int, state: RunState, published: Published) -> None:
        """Note the model that a step ended with; step 0 is the prior."""
        free = state.off
        share = free.share(self._world.plan.graph)
        if step == 0:
            self.records["digest"] = published.digest
            self.records["prior"]["seconds_by_phase"]["export"] = published.seconds
            self.records["prior"].update(params_slim=published.params_slim, freed_share=share)
            outcome = state.finished[-1] if state.finished else None
            if outcome is not None:
                self._freed_by_devices(outcome, published)
            return
        outcome = state.finished[-1]
        accuracy = self._test_accuracy(published.slim)
        record = self._step(step)
        record.update(
            prior_accuracy=self.records["test_accuracy"],
            slim_accuracy=accuracy,
            heldout={
                "prior": _defined(outcome.prior),
                "grown": _defined(outcome.grown),
                "consolidated": None if outcome.refusal else _defined(outcome.consolidated),
            },
            accepted=outcome.refusal is None,
            refusal=outcome.refusal,
            freed_share=share,
            requested_share=outcome.requested_share,
            way=outcome.way,
            freeing=None if outcome.refusal or not outcome.attempts else _freeing(outcome),
            params_full=published.params_full,
            params_slim=published.params_slim,
            onnx=published.onnx,
            model_digest=published.digest,
            **{"lambda": list(outcome.lambdas), "export_seconds": published.seconds},
        )
        self.records["test_accuracy"] = accuracy
        self.records["matrix"].append(self._row(published.slim))

    def _freed_by_devices(self, outcome: StepOutcome, published: Published) -> None:
        """Note the first freeing of a model that was brought."""
        self.records["prior"].update(
            accuracy_heldout=outcome.grown,
            before_freeing=outcome.grown,
            after_freeing=outcome.consolidated,
            after_cut=outcome.consolidated,
            attempts=_attempts(outcome.attempts),
        )
        self.records["test_accuracy"] = self._test_accuracy(published.slim)
        self.records["matrix"] = [self._row(published.slim)]

    def verdicts(self, outcome: StepOutcome) -> Iterator[str]:
        """Yield what people should be told of a finished step, in lines."""
        name = f"step {outcome.step}" if outcome.step else "first freeing"
        if outcome.refusal:
            yield f"{name} refused: {outcome.refusal}"
            return
        if outcome.way != "whole":
            yield f"{name}: {_WAYS[outcome.way]}"
            return
        for attempt in outcome.attempts:
            verdict = "accepted" if attempt.accepted else "refused, the set shrinks"
            yield (
                f"{name}: freeing {attempt.share:.1%} of the filters cost "
                f"{attempt.drop * 100:+.2f} points of held-out accuracy: {verdict}"
            )
        if outcome.free.empty and self._world.config.freeing in ("always", "steps"):
            yield (
                f"{name}: nothing could be freed within max-drop "
                f"{self._world.config.max_drop}; the model stays whole"
            )

    def summary(self, status: str, error: str | None, rounds: list[Record]) -> Record:
        """Return what summary.json holds.

        Parameters
        ----------
        status : str
            ``complete``, ``interrupted`` or ``failed``.
        error : str or None
            Why it failed.
        rounds : list of dict
            The lines of rounds.jsonl.
        """
        world, config = self._world, self._world.config
        steps = [
            self._step_summary(int(number), record, rounds)
            for number, record in self.records["steps"].items()
            if "model_digest" in record
        ]
        matrix = np.array(
            [[math.nan if v is None else v for v in row] for row in self.records["matrix"]]
        )
        whole = len(matrix) == config.steps + 1
        seconds = (
            sum(self.records["prior"]["seconds_by_phase"].values())
            + sum(r["seconds"] for r in rounds)
            + sum(r.get("export_seconds", 0.0) for r in self.records["steps"].values())
        )
        return {
            "schema_version": 1,
            "status": status,
            "error": error,
            "data": self._data(),
            "net": {
                "name": config.net,
                "width": config.width or None,
                "classes": world.plan.spec.classes,
            },
            "seed": config.seed,
            "scope": config.scope_schedule or config.scope,
            "engine": self._engine,
            **_server_data(world),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in _VERSIONS},
            },
            "command": self._command,
            "settings": config.flat(),
            "prior": self.records["prior"],
            "steps": steps,
            "accuracy_matrix": {
                "parts": ["prior", *(f"part {i + 1}" for i in range(config.steps))],
                "rows": ["prior", *(f"step {i + 1}" for i in range(len(matrix) - 1))],
                "values": self.records["matrix"],
                "on": "held-out images of each part",
            },
            "acc": _defined(metrics.acc(matrix)) if whole else None,
            "bwt": _defined(metrics.bwt(matrix)) if whole else None,
            "forgetting": _defined(metrics.forgetting(matrix)) if whole else None,
            "seconds": seconds,
            "admission": {
                "mean": config.mean,
                "used": sum(r["devices_used"] for r in rounds),
                "late": sum(r.get("late", 0) for r in rounds),
                "abandoned": sum(r.get("tries", 1) - 1 for r in rounds),
                "refused": _refused(rounds),
            },
            "privacy": privacy_of(rounds),
        }

    def _step_summary(self, number: int, record: Record, rounds: list[Record]) -> Record:
        mine = [r for r in rounds if r["step"] == number]
        traffic = {
            name: {
                way: sum(r[f"bytes_{way}"] for r in mine if (r["phase"] == "grow") == growing)
                for way in ("up", "down")
            }
            for name, growing in (("grow", True), ("consolidate", False))
        }
        seconds: dict[str, float] = defaultdict(float)
        for r in mine:
            seconds[r["phase"]] += r["seconds"]
        seconds["export"] = record["export_seconds"]
        # Dense FedAvg moves the whole net both ways for every update that was used in training.
        moved = sum(r["devices_used"] for r in mine if r["phase"] in ("grow", "consolidate"))
        dense = 4 * sum(t.numel() for t in self._world.plan.net.state_dict().values())
        own = ("lambda", "export_seconds", "distill_seconds")
        return {
            "step": number,
            **{key: value for key, value in record.items() if key not in own},
            "bytes_up": traffic["grow"]["up"] + traffic["consolidate"]["up"],
            "bytes_down": traffic["grow"]["down"] + traffic["consolidate"]["down"],
            "bytes": traffic,
            "bytes_dense_fedavg": 2 * moved * dense,
            "seconds": sum(seconds.values()),
            "seconds_by_phase": dict(seconds),
            "rounds": len(mine),
            "distillation": {
                "kind": self._world.config.distill_source if self._world.config.distils else "none",
                "seconds": record.get("distill_seconds", 0.0),
                "lambda": record["lambda"],
            },
        }

    def _data(self) -> Record:
        scenario, config = self._world.scenario, self._world.config
        path = Path(config.data)
        stream = scenario.stream
        built_in = not path.exists()
        return {
            "name": config.data if built_in else path.resolve().name,
            "path": None if built_in else config.data,
            "classes": list(scenario.classes),
            "image_shape": list(scenario.shape),
            "train_images": scenario.images,
            "test_images": 0 if self._world.test is None else len(self._world.test),
            "prior_images": len(stream.prior),
            "part_images": [len(part) for part in stream.parts],
            "partition": config.partition,
            "alpha": config.alpha if config.partition == "dirichlet" else None,
            "devices": config.devices,
        }

    def _step(self, step: int) -> Record:
        record: Record = self.records["steps"].setdefault(str(step), {})
        return record

    def _net(self, model: State) -> nn.Module:
        net = copy.deepcopy(self._world.plan.net)
        write_state(net, model)
        return net.eval()

    def _test_accuracy(self, net: nn.Module) -> float | None:
        test = self._world.test
        return None if test is None else self._accuracy(net, test)

    def _row(self, net: nn.Module) -> list[float | None]:
        """Return the accuracy on the held-out images of the prior and of every part."""
        scenario, config = self._world.scenario, self._world.config
        parts = [scenario.prior, *(scenario.part(i + 1) for i in range(config.steps))]
        return [self._accuracy(net, split_holdout(p, config.heldout)[1]) for p in parts]

    def _accuracy(self, net: nn.Module, images: ImageSet) -> float | None:
        data = Labelled.of(images, self._world.normalisation)
        moved = net.to(self._world.accelerator.device)
        return _defined(accuracy_of(moved, data, self._world.accelerator))


_WAYS = {
    "expert": "images of another world: learnt by an expert of their own behind the gate",
    "classes": "learnt by class statistics of the kept filters' features",
}
_VERSIONS = ("fallow", "torch", "flwr", "onnx", "onnxruntime", "numpy")


def privacy_of(rounds: list[Record]) -> Record | None:
    """Return what the device that disclosed the most has disclosed; None without noise."""
    spent = [r["epsilon"] for r in rounds if r.get("epsilon") is not None]
    return {"epsilon": max(spent), "delta": DELTA} if spent else None


def _refused(rounds: list[Record]) -> list[Record]:
    counts = Counter((u["device"], u["reason"]) for r in rounds for u in r.get("refused", ()))
    return [
        {"device": device, "reason": reason, "count": count}
        for (device, reason), count in counts.most_common(100)
    ]


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _attempts(attempts: tuple[Attempt, ...]) -> list[Record]:
    return [vars(attempt).copy() for attempt in attempts]


def _freeing(outcome: StepOutcome) -> Record:
    return {
        "before": outcome.grown,
        "after": outcome.consolidated,
        "after_cut": outcome.consolidated,
        "attempts": _attempts(outcome.attempts),
    }


def _server_data(world: World) -> Record:
    """Return which images the server uses, and how many."""
    proxy = world.proxy if world.config.distill_source == "proxy" else None
    uses = {"proxy": 0 if proxy is None else len(proxy)}
    uses["synthetic"] = world.config.synthetic_images if world.config.synthesises else 0
    kinds = [kind for kind, count in uses.items() if count]
    return {"server_data": "+".join(kinds) or "none", "server_data_images": sum(uses.values())}

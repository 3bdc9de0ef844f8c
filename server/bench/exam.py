"""What models of one protocol and seed are measured on: test images and the devices' classes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from common.config import Config
from common.data import ImageSet, Normalisation
from common.filters import FreeSet
from common.memory import Memory, assembled
from common.scenario import Scenario
from common.state import State, state_digest
from common.train import Labelled, predict
from server.bench.protocols import test_sets
from server.plan import Plan


@dataclass(frozen=True, eq=False)
class Marks:
    """A model's accuracies, in [0, 1].

    Attributes
    ----------
    parts : list of float
        On the test images of each world or part.
    worst_device : float
        See `Exam`.
    """

    parts: list[float]
    worst_device: float


_NOTHING = FreeSet({})


@dataclass(frozen=True, eq=False)
class Exam:
    """Test images by part, and each device's share of every class in the last step.

    A device has too few images to be tested on its own. Its accuracy is that of every class on
    the last part's test images, weighted by the device's own classes: under label skew the
    images of a class are alike on all devices.
    """

    tests: dict[str, ImageSet]
    shares: np.ndarray  # [devices, classes]
    _known: dict[str, Marks] = field(default_factory=dict)

    def mark(
        self, plan: Plan, model: State, free: FreeSet = _NOTHING, memory: Memory | None = None
    ) -> Marks:
        """Return what `model` achieves; a model that was seen before costs nothing.

        Parameters
        ----------
        plan, model
            Of the method.
        free : FreeSet
            Filters of the model that are off: cut out, they cost no time.
        memory : Memory, optional
            What is added to the model.
        """
        digest = state_digest(model)
        if memory is not None and not (memory.plain and memory.opinion is None):
            digest += state_digest(memory.as_state())
        if digest not in self._known:
            self._known[digest] = self._mark(
                plan, assembled(plan.net, plan.graph, model, free, memory)
            )
        return self._known[digest]

    def _mark(self, plan: Plan, net: nn.Module) -> Marks:
        normalisation = Normalisation(plan.spec.mean, plan.spec.std)
        parts = []
        for images in self.tests.values():
            data = Labelled.of(images, normalisation)
            right = (predict(net.eval(), data.x).argmax(1) == data.y).numpy()
            parts.append(float(right.mean()) if len(right) else math.nan)
        return Marks(parts, self._worst(images.labels, right))

    def _worst(self, labels: np.ndarray, right: np.ndarray) -> float:
        classes = self.shares.shape[1]
        count = np.bincount(labels, minlength=classes)
        hits = np.bincount(labels, weights=right, minlength=classes)
        shares = np.where(count > 0, self.shares, 0.0)
        shares = shares[shares.sum(1) > 0]  # a device may have untested classes alone
        devices = shares @ (hits / np.maximum(count, 1)) / shares.sum(1)
        return float(devices.min())


def exam_of(base: Config) -> Exam:
    """Return the exam of a protocol and seed; the last one is kept for the process."""
    return _exam(base.model_dump_json())


@functools.lru_cache(maxsize=1)
def _exam(text: str) -> Exam:
    config = Config.model_validate_json(text)
    scenario = Scenario(config)
    classes = len(scenario.classes)
    devices = [scenario.device(config.steps, d).labels for d in range(config.devices)]
    counts = np.array([np.bincount(labels, minlength=classes) for labels in devices])
    return Exam(test_sets(config, scenario), counts / counts.sum(1, keepdims=True))

"""What a run stands on, checked before any work: data, net, normalisation, server images."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.accelerator import Accelerator
from common.config import Config
from common.data import Augment, ImageSet, Normalisation, open_source
from common.errors import ConfigError, DataError, NetError
from common.filters import FilterGraph
from common.order import NetSpec
from common.scenario import Scenario, scenario_of
from common.seeds import numpy_rng
from common.store import read_state_and_header
from server.plan import Plan, crop_of, mirrors
from server.prior import make_net


@dataclass(frozen=True, eq=False)
class World:
    """All that the settings name, opened and checked.

    Attributes
    ----------
    test : ImageSet or None
        Only ever reported, never decided on.
    proxy, calibration : ImageSet or None
        The operator's unlabelled images, for distillation and for int8.
    """

    config: Config
    scenario: Scenario
    plan: Plan
    accelerator: Accelerator
    test: ImageSet | None
    proxy: ImageSet | None
    calibration: ImageSet | None

    @property
    def normalisation(self) -> Normalisation:
        """Of the images, before the net."""
        return Normalisation(self.plan.spec.mean, self.plan.spec.std)

    @property
    def augment(self) -> Augment:
        """Of training images."""
        spec = self.plan.spec
        return Augment(crop_of(self.config, spec), mirrors(self.config, spec))


def open_world(config: Config) -> World:
    """Open and check everything that `config` names.

    Raises
    ------
    ConfigError, DataError, NetError, StoreError
        Before any work is done, naming what is wrong.
    """
    accelerator = Accelerator.pick(config.accelerator, config.amp)
    scenario = scenario_of(config)
    if config.ewc_weight and config.prior:
        raise ConfigError(
            f"ewc-weight is {config.ewc_weight} with a prior of your own: what its weights matter "
            "is measured on the data that it was trained on; set ewc-weight to 0"
        )
    if len(scenario.classes) < 2:
        raise DataError(f"{config.data} has only class {scenario.classes[0]!r}: give at least two")
    _check_sizes(config, scenario)
    proxy = _images(config, config.proxy, "proxy", scenario)
    calibration = _images(config, config.calibration, "calibration", scenario) or proxy
    mean, std = _normalisation(config, scenario)
    spec = NetSpec(
        name=config.net,
        classes=len(scenario.classes),
        input_shape=scenario.shape,
        width=config.width,
        mean=mean,
        std=std,
        class_names=scenario.classes,
    )
    net = make_net(config, spec)
    graph = FilterGraph.build(net, spec.input_shape)
    _check_scope(config, graph)
    plan = Plan(config, spec, graph, net)
    for step in range(1, config.steps + 1):
        # A broken image, or a part that cannot be dealt out, would cost the prior's training.
        scenario.device(step, 0)
    return World(config, scenario, plan, accelerator, scenario.test(), proxy, calibration)


def _check_scope(config: Config, graph: FilterGraph) -> None:
    """With scope rows, freed filters reach the logits through the classifier alone."""
    read = {slot.tensor for layer in graph.layers for slot in layer.slots}
    if "rows" in config.scopes and f"{graph.head}.weight" not in read:
        raise NetError(
            f"scope 'rows' trains the freed filters' columns of the classifier '{graph.head}', "
            "but it reads no filter directly: use scope 'group' or 'all'"
        )


def _check_sizes(config: Config, scenario: Scenario) -> None:
    """Every device needs two images a part; finding out in the last step would be late."""
    for number, part in enumerate(scenario.stream.parts, 1):
        if len(part) < 2 * config.devices:
            raise ConfigError(
                f"part {number} has {len(part)} images for {config.devices} devices: lower "
                "devices or steps, or raise part-size"
            )


def _images(config: Config, path: str, name: str, scenario: Scenario) -> ImageSet | None:
    """Return up to proxy-size images of `path`, drawn by the run's seed; None without a path."""
    if not path:
        return None
    channels, height, width = scenario.shape
    side = height if height == width else None  # a size makes them square
    source = open_source(path, size=side, channels=channels, labelled=False)
    if source.shape != scenario.shape:
        raise DataError(
            f"{path} has images of {list(source.shape)}, the data has {list(scenario.shape)} "
            f"[channels, height, width]: resize those of {name}"
        )
    count = min(config.proxy_size, len(source))
    index = np.sort(numpy_rng(name, config.seed).choice(len(source), count, replace=False))
    return source.take(index)


def _normalisation(
    config: Config, scenario: Scenario
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation: as told, as the brought model says, or of the prior's data."""
    if config.norm_mean or config.norm_std:
        channels = scenario.shape[0]
        return (
            _numbers("norm-mean", config.norm_mean, channels),
            _numbers("norm-std", config.norm_std, channels),
        )
    if config.prior:
        _, header = read_state_and_header(Path(config.prior))
        if "mean" in header and "std" in header:
            return tuple(json.loads(header["mean"])), tuple(json.loads(header["std"]))
        raise ConfigError(
            f"{config.prior} does not say how its images were normalised: give norm-mean and "
            "norm-std, for example --set norm-mean=0.49,0.48,0.45"
        )
    measured = Normalisation.from_images(scenario.prior)
    return measured.mean, measured.std


def _numbers(name: str, text: str, channels: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    low = 0 if name == "norm-std" else -math.inf
    if len(numbers) != channels or not all(low < number < math.inf for number in numbers):
        raise ConfigError(f"{name} is '{text}': give {channels} comma-separated number(s)")
    return numbers

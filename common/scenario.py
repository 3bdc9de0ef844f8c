"""A simulation's data: who has which images, from the settings alone.

Server and simulated devices build the same scenario from the same settings, each in its own
process; only what is asked for is decoded.
"""

from __future__ import annotations

import functools
from functools import cached_property

import numpy as np

from common.config import Config
from common.data import ImageSet, Stream, Worlds, by_class, by_share, by_world, partition
from common.data.worlds import transform, worlds_of
from common.errors import ConfigError
from common.seeds import numpy_rng


class Scenario:
    """Prior data, one part of new data a step, each dealt out over the devices, and test data.

    Parameters
    ----------
    config : Config
        The settings of the run; those under "data" count.

    Raises
    ------
    DataError
        If the data cannot be read.
    ConfigError
        If the settings ask for more images or classes than there are.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        size, channels = config.image_size or None, config.channels or None
        self._data = Worlds(
            config.data, size=size, channels=channels, validate=config.validate_share
        )
        self._source = self._data.source
        self.classes: tuple[str, ...] = self._source.classes
        self.shape: tuple[int, int, int] = self._source.shape
        self.images = len(self._source)
        self._worlds = worlds_of(config.worlds, config.steps)
        if len(self.worlds) > 1 and (config.stream == "class" or config.worlds):
            other = f"worlds is '{config.worlds}'" if config.worlds else "stream is 'class'"
            raise ConfigError(
                f"data names {len(self.worlds)} worlds, a part each, and {other}: use one of them"
            )
        self._decoded: dict[int, ImageSet] = {}

    @property
    def worlds(self) -> tuple[str, ...]:
        """Names of the worlds that the setting `data` names, the prior's first."""
        return self._data.names

    @cached_property
    def stream(self) -> Stream:
        """Which training images belong to the prior and to each part."""
        c = self._config
        labels = self._source.labels
        rng = numpy_rng("stream", c.seed)
        if len(self.worlds) > 1:
            edges, sizes = self._data.edges, (c.prior_size or None, c.part_size or None)
            return by_world(labels, edges, c.steps, rng, *sizes)
        if c.stream == "class":
            first = c.prior_classes or max(1, len(np.unique(labels)) // (c.steps + 1))
            return by_class(
                labels, None, first, c.steps, rng, c.prior_size or None, c.part_size or None
            )
        images = len(labels)
        part = c.part_size
        if not part:
            rest = images - c.prior_size
            part = rest // (c.steps if c.prior_size else c.steps + 1)
        if part < 1:
            raise ConfigError(
                f"prior-size {c.prior_size} leaves nothing of {images} images for {c.steps} "
                "steps: lower it"
            )
        return by_share(labels, c.prior_size or part, [part] * c.steps, rng)

    @cached_property
    def prior(self) -> ImageSet:
        """The operator's own data, for the prior."""
        return self._source.take(self.stream.prior)

    def part(self, step: int) -> ImageSet:
        """Return all new images of a step (from 1), over all devices."""
        if step not in self._decoded:
            if not self._config.joint:
                self._decoded.clear()
            images = self._source.take(self.stream.parts[step - 1])
            self._decoded[step] = transform(images, self._worlds[step - 1])
        return self._decoded[step]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one scenario lives as long as its process
    def _dealt(self, step: int) -> list[np.ndarray]:
        c = self._config
        index = self.stream.parts[step - 1] if step else self.stream.prior
        column = self._source.column(c.column)[index] if c.partition == "natural" else None
        return partition(
            c.partition,
            self._source.labels[index],
            c.devices,
            numpy_rng("partition", c.seed, step),
            alpha=c.alpha,
            k=c.classes_per_device,
            column=column,
        )

    def device(self, step: int, device: int) -> ImageSet:
        """Return the new images of one device in a step; step 0 sees the first part."""
        step = max(step, 1)
        own = self.part(step).select(self._dealt(step)[device])
        if not self._config.joint:
            return own
        earlier = [self.prior, *(self.part(s) for s in range(1, step))]
        shares = [part.select(self._dealt(s)[device]) for s, part in enumerate(earlier)]
        return ImageSet.concat([*shares, own])

    def test(self) -> ImageSet | None:
        """Return the test images of all worlds, or None if a world has none."""
        tests = list(self.tests().values())
        known = [images for images in tests if images is not None]
        return ImageSet.concat(known) if len(known) == len(tests) else None

    def tests(self) -> dict[str, ImageSet | None]:
        """Return each world's test images, None where it has none, in the order of the stream."""
        worlds = self.worlds[: self._config.steps + 1]
        sources = {name: self._data.test(number) for number, name in enumerate(worlds)}
        return {
            name: None if source is None else source.take(np.arange(len(source)))
            for name, source in sources.items()
        }


@functools.lru_cache(maxsize=1)
def _scenario(text: str) -> Scenario:
    return Scenario(Config.model_validate_json(text))


def scenario_of(config: Config) -> Scenario:
    """Return the scenario of `config`; the last one is kept for the process."""
    return _scenario(config.model_dump_json())

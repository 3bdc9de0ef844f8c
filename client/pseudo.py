"""Labels by the current model, for images that nobody labelled.

The pseudo-labels of Lee (ICML workshop 2013): only those are believed that the model is sure of.
They are marked as the model's, count less in training and never measure anything.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from client.infer import Classifier
from client.settings import DeviceSettings
from common.data.dataset import Pixels
from common.errors import ConfigError, DataError


class OnnxLabeller:
    """An exported model as a labeller (see `client.collect.Labeller`)."""

    def __init__(self, path: Path, settings: DeviceSettings) -> None:
        self._classifier = Classifier.load(path)
        self.digest = self._classifier.metadata.get("digest") or _digest(path)
        # Labels in the store are the device's own, where it has names for the model's classes.
        self._own = {model: own for own, model in settings.labels.items() if model}

    def __call__(self, pixels: Pixels) -> tuple[str, float]:
        """Return the most probable class, by the device's name for it, and its probability."""
        prediction = self._classifier.classify(pixels)
        return self._own.get(prediction.name, prediction.name), prediction.probability


def labeller_of(settings: DeviceSettings, model: Path | None = None) -> OnnxLabeller | None:
    """Return the labeller for `model`, or for the one that the settings name; None without.

    Raises
    ------
    ConfigError
        If the settings' model cannot be used.
    """
    if model is not None:
        return OnnxLabeller(model, settings)
    if not settings.collect.model:
        return None
    try:
        return OnnxLabeller(Path(settings.collect.model), settings)
    except DataError as error:
        raise ConfigError(f"collect.model in device.toml: {error}") from None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

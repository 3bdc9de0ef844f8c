"""How good a published model is on the images that a device holds out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from client.heldout import heldout_share, measures
from client.index import Index
from client.infer import Classifier
from client.settings import read_settings
from common.data.decode import read_image
from common.errors import DataError


def evaluate(index: Index, model: Path) -> dict[str, Any]:
    """Return the accuracy of `model` on the held-out images whose label a person gave.

    Returns
    -------
    dict
        ``model``, ``images``, ``right``, ``accuracy`` in [0, 1] (None without images), its
        standard error ``error``, and ``classes``: the same counts by label.

    Raises
    ------
    DataError
        If the model cannot be read, or knows no such class.
    """
    settings = read_settings(index.folder)
    classifier = Classifier.load(model)
    share = heldout_share(index, settings.collect.heldout)
    classes: dict[str, dict[str, int]] = {}
    for image in index.images():
        if not measures(image, share):
            continue
        label = str(image.label)
        name = settings.labels.get(label, label)
        if not name:  # left out by the settings
            continue
        if name not in classifier.classes:
            raise DataError(
                f"label '{label}' is no class of {model}: correct it with `fallow-device collect "
                "label`, or name its class in [labels] of device.toml"
            )
        data = index.content(image.digest)
        if data is None:
            continue
        found = classifier.classify(read_image(data, image.digest[:12]))
        counts = classes.setdefault(label, {"images": 0, "right": 0})
        counts["images"] += 1
        counts["right"] += found.name == name
    images = sum(counts["images"] for counts in classes.values())
    right = sum(counts["right"] for counts in classes.values())
    accuracy = right / images if images else None
    error = None if accuracy is None else math.sqrt(accuracy * (1 - accuracy) / images)
    return {
        "model": str(model),
        "digest": classifier.metadata.get("digest", ""),
        "images": images,
        "right": right,
        "accuracy": accuracy,
        "error": error,
        "classes": dict(sorted(classes.items())),
    }

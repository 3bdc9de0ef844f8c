"""Image files to classes with ONNX Runtime: all that a phone-like device needs.

Nothing here imports torch; numpy, Pillow and onnxruntime are enough.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from common.data.decode import fit_image, read_image
from common.errors import DataError

FORMAT = "1"

# Trailing axis of an array: none or one (grey), RGB, RGBA.
_CHANNELS = ((), (1,), (3,), (4,))


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image.

    Parameters
    ----------
    label : int
        Index of the most probable class.
    name : str
        Its name.
    probability : float
    probabilities : tuple of float
        Of all classes, in their order; they sum to 1 (softmax of the logits).
    """

    label: int
    name: str
    probability: float
    probabilities: tuple[float, ...]


class Classifier:
    """An exported model, ready to classify; made by :meth:`load`.

    Parameters
    ----------
    session : onnxruntime.InferenceSession
    classes : tuple of str
        Names in the order of the logits.
    metadata : dict of str to str
        All that was written into the file: run, step, normalisation, ...
    """

    def __init__(self, session: Any, classes: tuple[str, ...], metadata: dict[str, str]) -> None:
        self._session = session
        self.classes = classes
        self.metadata = metadata
        self.channels, self.height, self.width = session.get_inputs()[0].shape[1:]

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """Open a model that fallow exported, fp32 or int8.

        Raises
        ------
        DataError
            If the file is missing, no ONNX model, or not one of fallow's.
        """
        if not path.is_file():
            raise DataError(f"{path}: no such model file; give the path of a .onnx file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is raised; the log would repeat it
        try:
            session = onnxruntime.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors have no base class of their own
            raise DataError(f"{path}: not an ONNX model; export or download it again") from error
        metadata = dict(session.get_modelmeta().custom_metadata_map)
        version = metadata.get("fallow_format")
        if version is None:
            raise DataError(f"{path}: an ONNX model, but not exported by fallow; give one that is")
        if version != FORMAT:
            raise DataError(
                f"{path}: format {version} of fallow, this program reads {FORMAT}; update it"
            )
        return cls(session, tuple(json.loads(metadata["classes"])), metadata)

    def classify(self, image: Path | NDArray[np.uint8]) -> Prediction:
        """Classify one image.

        Parameters
        ----------
        image : Path or uint8 array [H, W] or [H, W, C]
            A file in any format that Pillow reads, or pixels (grey, RGB or RGBA). Other sizes
            than the model's are brought to it as in training: shorter side resized, centre cut.

        Raises
        ------
        DataError
            If the image is missing or broken.
        """
        return self.classify_many([image])[0]

    def classify_many(
        self, images: Sequence[Path | NDArray[np.uint8]], batch: int = 32
    ) -> list[Prediction]:
        """Classify images, ``batch`` at a time; see :meth:`classify`."""
        found: list[Prediction] = []
        for start in range(0, len(images), batch):
            pixels = np.stack([self._pixels(image) for image in images[start : start + batch]])
            inputs = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
            logits = self._session.run(["logits"], {"input": inputs / np.float32(255)})[0]
            found += [self._prediction(row) for row in logits]
        return found

    def _pixels(self, image: Path | NDArray[np.uint8]) -> NDArray[np.uint8]:
        square = self.height if self.height == self.width else None
        if isinstance(image, np.ndarray):
            name, pixels = "array", _fit_array(image, square, self.channels)
        else:
            name, pixels = str(image), _fit_file(image, square, self.channels)
        if pixels.shape[:2] != (self.height, self.width):
            raise DataError(
                f"{name}: {pixels.shape[1]}x{pixels.shape[0]} pixels, the model needs exactly "
                f"{self.width}x{self.height}; resize it"
            )
        return pixels

    def _prediction(self, logits: NDArray[np.float32]) -> Prediction:
        shifted = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = tuple((shifted / shifted.sum()).tolist())
        label = int(logits.argmax())
        return Prediction(label, self.classes[label], probabilities[label], probabilities)


def _fit_file(path: Path, size: int | None, channels: int) -> NDArray[np.uint8]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return read_image(content, str(path), size=size, channels=channels)


def _fit_array(array: NDArray[np.uint8], size: int | None, channels: int) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in _CHANNELS:
        raise DataError(
            f"array: {array.dtype} {list(array.shape)} is no image; "
            "give uint8 [H, W], [H, W, 3] or [H, W, 4]"
        )
    picture = Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array)
    return fit_image(picture, size=size, channels=channels)


def infer_lines(
    model: Path, images: Sequence[Path], *, top: int = 1, as_json: bool = False
) -> list[str]:
    """Return what ``fallow-device infer`` prints: a line for each image.

    Parameters
    ----------
    model : Path
    images : sequence of Path
    top : int
        How many classes to name, the most probable first.
    as_json : bool
        One JSON object a line, with keys ``image``, ``label``, ``name``, ``probability`` and
        ``top``, instead of text.
    """
    classifier = Classifier.load(model)
    lines = []
    for path, prediction in zip(images, classifier.classify_many(images), strict=True):
        p = prediction.probabilities
        ranked = sorted(range(len(p)), key=lambda i: -p[i])[:top]
        if as_json:
            line = {
                "image": str(path),
                "label": prediction.label,
                "name": prediction.name,
                "probability": prediction.probability,
                "top": [
                    {"label": i, "name": classifier.classes[i], "probability": p[i]} for i in ranked
                ],
            }
            lines.append(json.dumps(line))
        else:
            named = ", ".join(f"{classifier.classes[i]} {100 * p[i]:.1f} %" for i in ranked)
            lines.append(f"{path}: {named}")
    return lines

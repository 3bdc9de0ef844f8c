"""A trained net as one ONNX file: the same bytes for the same weights, checked against torch.

Normalisation is part of the graph, so that whoever runs the file needs to know nothing but
"pixels / 255". The exporter folds batch normalisation into the convolutions before it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from common.data.normalise import Normalisation
from common.errors import ExportError
from common.store import write_bytes

FORMAT = "1"
OPSET = 18
# The oldest runtimes in use on phones read no newer intermediate representation.
MAX_IR = 10

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class OnnxReport:
    """What was written.

    Parameters
    ----------
    path : str
    bytes : int
        Size of the file.
    sha256 : str
        Of the whole file, hexadecimal.
    """

    path: str
    bytes: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


class _Normalised(nn.Module):
    """The net behind (x - mean) / std."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, net: nn.Module, normalisation: Normalisation) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(normalisation.mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(normalisation.std).reshape(1, -1, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net((pixels - self.mean) / self.std)
        return logits


def export_onnx(
    net: nn.Module,
    path: Path,
    *,
    input_shape: tuple[int, int, int],
    normalisation: Normalisation,
    classes: Sequence[str],
    metadata: Mapping[str, str],
) -> OnnxReport:
    """Write ``net`` as ONNX, for inference.

    The graph maps "input", float32 [batch, C, H, W] of pixel values / 255, to "logits",
    float32 [batch, classes]; the size of the batch is free. The same weights give the same
    bytes from any directory and process; no path, trace or time is in them.

    Parameters
    ----------
    net : nn.Module
        Any net; it is copied and stays as it is.
    path : Path
        Written whole or not at all.
    input_shape : (C, H, W)
    normalisation : Normalisation
        That of the training, with values in pixels / 255.
    classes : sequence of str
        Names in the order of the logits.
    metadata : mapping of str to str
        What else to write into the file's ``metadata_props``: run, step, parent digest. The
        keys ``fallow_format``, ``classes``, ``input``, ``mean`` and ``std`` are fallow's own.

    Raises
    ------
    ExportError
        If the exporter cannot follow the net, or the classes do not fit the logits.
    DiskError
        If the file cannot be written.
    """
    wrapped = _Normalised(evaluation_copy(net), normalisation)
    example = torch.zeros(2, *input_shape)  # two images: the exporter would fix a batch of one
    try:
        with quiet():
            program = torch.onnx.export(
                wrapped.eval(),
                (example,),
                input_names=["input"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"the net cannot be exported to ONNX: {_cause(error)}") from error
    assert program is not None
    model = program.model_proto
    outputs = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    if outputs != len(classes):
        raise ExportError(f"classes: {len(classes)} names, but the net has {outputs} logits")
    own = {
        "fallow_format": FORMAT,
        "classes": json.dumps(list(classes)),
        "input": "float32 [batch, channels, height, width], pixel values / 255 (0..1)",
        "mean": json.dumps(list(normalisation.mean)),
        "std": json.dumps(list(normalisation.std)),
    }
    return write_model(model, path, {**metadata, **own})


def parity(
    net: nn.Module, path: Path, images: Pixels | None, normalisation: Normalisation, seed: int
) -> float:
    """Return the largest absolute difference between torch's logits and ONNX Runtime's.

    Compared on 64 images of random pixels, one of them in a batch of its own, and on
    ``images``.

    Parameters
    ----------
    net : nn.Module
    path : Path
        What :func:`export_onnx` made of it.
    images : uint8 array [N, H, W, C], optional
    normalisation : Normalisation
        That of the training.
    seed : int
        Of the random pixels.

    Returns
    -------
    float
        In units of logits, or of an image's largest logit where that is above 1; not a number if
        either side is.
    """
    reference, session = evaluation_copy(net), open_session(path)
    channels, height, width = session.get_inputs()[0].shape[1:]
    noise = np.random.default_rng(seed).integers(
        0, 256, (64, height, width, channels), dtype=np.uint8
    )
    batches = [noise[:1], noise[1:8], noise[8:]]
    if images is not None:
        batches += [images[i : i + 64] for i in range(0, len(images), 64)]
    worst = [0.0]
    for batch in batches:
        with torch.no_grad():
            expected = reference(normalisation.to_tensor(batch)).numpy()
        # Rounding grows with the logits, and noise drives those of a discriminant far out.
        size = np.maximum(1.0, np.abs(expected).max(1, keepdims=True))
        worst.append(float((np.abs(expected - run_logits(session, batch)) / size).max()))
    return float(np.max(worst))


def check_parity(
    net: nn.Module,
    path: Path,
    images: Pixels | None,
    normalisation: Normalisation,
    seed: int,
    limit: float = 1e-4,
) -> float:
    """Return :func:`parity`, or raise ExportError if it is over ``limit`` or not a number."""
    difference = parity(net, path, images, normalisation, seed)
    if not difference <= limit:
        raise ExportError(
            f"{path}: its logits differ from the trained net's by {difference:.3g}, "
            f"the limit is {limit:.3g}; do not publish it"
        )
    return difference


def evaluation_copy(net: nn.Module) -> nn.Module:
    """Copy a net to the CPU, in evaluation mode and the default memory format."""
    twin = copy.deepcopy(net).cpu().eval()
    for tensor in (*twin.parameters(), *twin.buffers()):
        # channels_last weights would come out as a graph of strided gathers.
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return twin


def open_session(path: Path) -> Any:
    """Open an ONNX file in ONNX Runtime: CPU, one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )


def model_input(images: Pixels) -> Floats:
    """Return uint8 [N, H, W, C] as the graph's input, float32 [N, C, H, W] in 0..1."""
    scaled = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(scaled)


def run_logits(session: Any, images: Pixels) -> Floats:
    """Return the logits [N, K] of uint8 images [N, H, W, C], in one batch."""
    logits: Floats = session.run(["logits"], {"input": model_input(images)})[0]
    return logits


def write_model(model: Any, path: Path, metadata: Mapping[str, str]) -> OnnxReport:
    """Write an ONNX model reproducibly: nothing but the graph, its weights and ``metadata``."""
    _strip(model)
    model.producer_name, model.producer_version = "fallow", ""
    model.ir_version = min(model.ir_version, MAX_IR)
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString(deterministic=True)
    write_bytes(path, data)
    return OnnxReport(os.fspath(path), len(data), hashlib.sha256(data).hexdigest())


def _strip(message: Any) -> None:
    # The exporter writes the source path and stack trace of every operation beside it.
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in value if isinstance(value, Sequence) else [value]:
                _strip(part)


def _cause(error: BaseException) -> str:
    """Return the innermost reason, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's and the quantiser's chatter out of the terminal."""
    logger, root, sink = logging.getLogger("torch"), logging.getLogger(), logging.NullHandler()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    root.addHandler(sink)  # the quantiser logs to the root, which else installs a handler
    # A net that torch cannot follow is printed in full; the error names the cause.
    printed = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(sink)
        logger.setLevel(level)

"""An exported model in 8-bit integers: smaller, and compared with the original.

Static quantisation (QDQ): uint8 activations, int8 weights with a scale per output channel.
Ranges are plain minima and maxima: on CIFAR-10 and digits, percentile and entropy calibration
agreed with fp32 no better and took two to four times as long.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from common.errors import DataError
from common.store import disk_errors
from server.export import (
    Floats,
    OnnxReport,
    Pixels,
    model_input,
    open_session,
    quiet,
    run_logits,
    write_model,
)

BATCH = 64


@dataclass(frozen=True)
class QuantReport:
    """An int8 model beside its fp32 original.

    Parameters
    ----------
    images : int
        How many the accuracies were measured on.
    fp32_accuracy, int8_accuracy : float
        Top-1, 0..1.
    agreement : float
        Share of the images that both models give the same class.
    fp32_bytes, int8_bytes : int
        Sizes of the files.
    fp32_latency_ms, int8_latency_ms : float
        Median time of one image on one thread of this machine, in milliseconds.
    """

    images: int
    fp32_accuracy: float
    int8_accuracy: float
    agreement: float
    fp32_bytes: int
    int8_bytes: int
    fp32_latency_ms: float
    int8_latency_ms: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


class _Calibration:
    """The interface that onnxruntime asks its calibration images through."""

    def __init__(self, images: Pixels) -> None:
        self._batches = (images[i : i + BATCH] for i in range(0, len(images), BATCH))

    def get_next(self) -> dict[str, Floats] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"input": model_input(batch)}


def quantise(fp32_path: Path, out_path: Path, calibration: Pixels) -> OnnxReport:
    """Write an int8 version of an exported model; its metadata is kept.

    x86 CPUs without VNNI add pairs of 8-bit products with saturation, which can cost accuracy
    there; phones' CPUs do not.

    Parameters
    ----------
    fp32_path : Path
        What :func:`server.export.export_onnx` wrote.
    out_path : Path
        Written whole or not at all.
    calibration : uint8 array [N, H, W, C]
        Images like those the model will see; 64 to 512 are enough.

    Raises
    ------
    DataError
        If there is no calibration image.
    DiskError
        If the disk is full or refuses.
    """
    if len(calibration) == 0:
        raise DataError("calibration: no images; give some like those the model will see")
    model = onnx.load(fp32_path)
    metadata = {p.key: p.value for p in model.metadata_props}
    with (
        disk_errors(out_path),
        tempfile.TemporaryDirectory(prefix="fallow-int8-") as folder,
        quiet(),
    ):
        prepared, quantised = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
        # The exporter has optimised the graph already; what is missing is inferred shapes.
        quant_pre_process(model, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantised,
            _Calibration(calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=float_nodes(model),
            # 256 levels for the logits would make ties: half of all disagreements with fp32.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )
        model = onnx.load(quantised)
    metadata["quantisation"] = "static QDQ: uint8 activations, int8 weights per output channel"
    return write_model(model, out_path, metadata)


def float_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that stay in float: few operations behind the convolutions.

    Those that no convolution and no classifier of a net's own needs, the gate's and the mixing of
    what experts say: log probabilities of hundreds and of tenths share one scale of 256 levels.
    And those that make scores of class statistics out of feature maps: so do features of all
    layers, and the classifier weighs differences between them that are smaller than that.
    """
    maker = {name: node for node in model.graph.node for name in node.output}

    def with_sources(waiting: list[onnx.NodeProto]) -> set[str]:
        seen = set[str]()
        while waiting:
            node = waiting.pop()
            if node.name not in seen:
                seen.add(node.name)
                waiting += [maker[name] for name in node.input if name in maker]
        return seen

    nodes = list(model.graph.node)
    convs = [node for node in nodes if node.op_type == "Conv"]
    # scores are of features that were chosen
    gathers = [node for node in nodes if node.op_type == "Gather" and node.input[0] in maker]
    chosen = {name for node in gathers for name in node.output}
    classifiers = [node for node in nodes if node.op_type == "Gemm"]
    scores = [node for node in classifiers if node.input[0] in chosen]
    own = [node for node in classifiers if node.input[0] not in chosen]
    needed = with_sources(convs) | (with_sources(own) - with_sources(scores))
    return sorted({node.name for node in nodes} - needed)


def compare(
    fp32_path: Path, int8_path: Path, images: Pixels, labels: NDArray[np.int64], repeats: int = 50
) -> QuantReport:
    """Measure an int8 model beside its fp32 original.

    Parameters
    ----------
    fp32_path, int8_path : Path
    images : uint8 array [N, H, W, C]
    labels : int64 array [N]
    repeats : int
        Timed runs of each model; the two alternate, so that their ratio holds on a busy machine.
    """
    sessions = [open_session(fp32_path), open_session(int8_path)]
    fp32, int8 = (_predictions(session, images) for session in sessions)
    rounds = [[_milliseconds(s, images[:1]) for s in sessions] for _ in range(repeats)]
    fp32_latency, int8_latency = np.median(rounds, axis=0)
    return QuantReport(
        images=len(images),
        fp32_accuracy=float(np.mean(fp32 == labels)),
        int8_accuracy=float(np.mean(int8 == labels)),
        agreement=float(np.mean(fp32 == int8)),
        fp32_bytes=fp32_path.stat().st_size,
        int8_bytes=int8_path.stat().st_size,
        fp32_latency_ms=float(fp32_latency),
        int8_latency_ms=float(int8_latency),
    )


def _predictions(session: Any, images: Pixels) -> NDArray[np.int64]:
    batches = (images[i : i + BATCH] for i in range(0, len(images), BATCH))
    return np.concatenate([run_logits(session, batch).argmax(axis=1) for batch in batches])


def _milliseconds(session: Any, image: Pixels) -> float:
    start = time.perf_counter_ns()
    run_logits(session, image)
    return (time.perf_counter_ns() - start) / 1e6

"""What a step gives to phones: the slimmed copy as ONNX, checked, and as int8 where possible."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from common.data import ImageSet, split_holdout
from common.filters import FreeSet, parameter_count
from common.memory import Memory, assembled
from common.state import State, state_digest
from common.store import write_bytes, write_state_file
from server.export import check_parity, export_onnx
from server.quantise import compare, quantise
from server.world import World

_PARITY_IMAGES = 64
_COMPARED_IMAGES = 1000


@dataclass(frozen=True, eq=False)
class Published:
    """The files of a step and what was measured of them."""

    slim: nn.Module
    digest: str
    params_full: int
    params_slim: int
    onnx: dict[str, Any]
    seconds: float


def publish(
    world: World,
    state: State,
    free: FreeSet,
    memory: Memory | None,
    step: int,
    folder: Path,
    parent: str | None,
) -> Published:
    """Cut the free filters out of a copy, export it and check it.

    Parameters
    ----------
    world : World
        Of the run.
    state, free
        The model after the step, its free filters off.
    memory : Memory or None
        What is added to the model: experts, or a classifier made of statistics.
    step : int
        0 is the prior.
    folder : Path
        Written to: ``model.safetensors`` (all filters), ``free.json``, ``memory.safetensors``
        (statistics and experts, where there are any), ``model.onnx`` (slim),
        and ``model.int8.onnx`` if there are images to calibrate with.
    parent : str or None
        Digest of the model of the step before.

    Raises
    ------
    ExportError
        If the exported model computes something else.
    """
    began = time.monotonic()
    plan, config = world.plan, world.config
    slim = assembled(plan.net, plan.graph, state, free, memory).eval()
    digest = state_digest(state)
    share = free.share(plan.graph)
    described = {
        "net": config.net,
        "step": str(step),
        "mean": str(list(plan.spec.mean)),
        "std": str(list(plan.spec.std)),
    }
    write_state_file(folder / "model.safetensors", state, **described)
    write_bytes(folder / "free.json", (free.to_json() + "\n").encode())
    if memory is not None:
        write_state_file(folder / "memory.safetensors", memory.as_state())
    path = folder / "model.onnx"
    written = export_onnx(
        slim,
        path,
        input_shape=plan.spec.input_shape,
        normalisation=world.normalisation,
        classes=world.scenario.classes,
        metadata={
            "run": config.digest,
            "step": str(step),
            "free_share": f"{share:.6f}",
            "digest": digest,
            "parent": parent or "",
            "net": config.net,
        },
    )
    images = _real_images(world)
    difference = check_parity(
        slim, path, images.images[:_PARITY_IMAGES], world.normalisation, config.seed
    )
    onnx: dict[str, Any] = {
        "fp32": {"path": _name(path, folder), "bytes": written.bytes, "max_abs_diff": difference},
        "int8": _int8(world, path, folder, images),
    }
    return Published(
        slim=slim,
        digest=digest,
        params_full=parameter_count(plan.net),
        params_slim=parameter_count(slim),
        onnx=onnx,
        seconds=time.monotonic() - began,
    )


def _real_images(world: World) -> ImageSet:
    """Return images for checks: test images where there are some, else held-out ones."""
    if world.test is not None:
        return world.test.select(np.arange(min(len(world.test), _COMPARED_IMAGES)))
    return split_holdout(world.scenario.prior, world.config.heldout)[1]


def _int8(world: World, path: Path, folder: Path, images: ImageSet) -> dict[str, Any] | None:
    if world.calibration is None:
        return None
    target = folder / "model.int8.onnx"
    written = quantise(path, target, world.calibration.images[:256])
    report = compare(path, target, images.images, images.labels)
    return {
        "path": _name(target, folder),
        "bytes": written.bytes,
        "accuracy_fp32": report.fp32_accuracy,
        "accuracy_int8": report.int8_accuracy,
        "agreement": report.agreement,
        "latency_ms_fp32": report.fp32_latency_ms,
        "latency_ms_int8": report.int8_latency_ms,
    }


def _name(path: Path, folder: Path) -> str:
    """Return `path` as the summary names it: relative to the run's folder."""
    return str(path.relative_to(folder.parent.parent))

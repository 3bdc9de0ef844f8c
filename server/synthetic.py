"""The server's own images, made of the model with which a step begins (`common.synthesis`)."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from common.accelerator import CPU, Accelerator
from common.data import Normalisation
from common.memory import trunk_of
from common.seeds import digest_of, torch_rng
from common.state import state_digest
from common.store import read_state_and_header, write_state_file
from common.synthesis import Inversion, synthesise
from server.plan import Plan, RunState, mirrors, wants_synthetic


class ImageMaker:
    """Makes a state's images before the first round that needs them.

    They are drawn by run and step alone: a run that is resumed makes the same again.

    Parameters
    ----------
    accelerator : Accelerator
        Where they are made.
    folder : Path, optional
        Keeps them: what begins with the same model need not make them again.
    """

    def __init__(self, accelerator: Accelerator = CPU, folder: Path | None = None) -> None:
        self._accelerator = accelerator
        self._folder = folder

    def __call__(self, plan: Plan, state: RunState) -> tuple[RunState, float]:
        """Return `state` with the images that its next round needs, and the seconds they took.

        Images that were kept took what they took when they were made.
        """
        if not wants_synthetic(plan.config, state):
            return state, 0.0
        if self._folder is None:
            images, seconds = self._make(plan, state)
        else:
            path = self._folder / f"synthetic-{_key(plan, state)[:16]}.safetensors"
            if not path.exists():
                images, seconds = self._make(plan, state)
                write_state_file(path, {"images": images}, seconds=repr(seconds))
            kept, header = read_state_and_header(path)
            images, seconds = kept["images"], float(header["seconds"])
        return replace(state, synthetic=images.numpy()), seconds

    def _make(self, plan: Plan, state: RunState) -> tuple[torch.Tensor, float]:
        began = time.monotonic()
        config, spec = plan.config, plan.spec
        images = synthesise(
            trunk_of(plan.net, plan.graph, state.prior, state.off).to(self._accelerator.device),
            state.carried.known or tuple(range(spec.classes)),
            config.synthetic_images,
            spec.input_shape,
            Normalisation(spec.mean, spec.std),
            torch_rng("synthesis", config.seed, state.step),
            Inversion(steps=config.synthetic_steps),
            mirror=mirrors(config, spec),
            accelerator=self._accelerator,
        )
        return torch.from_numpy(images), time.monotonic() - began


def _key(plan: Plan, state: RunState) -> str:
    config = plan.config
    return digest_of(
        state_digest(state.prior),
        state.off.digest,
        plan.spec.model_dump_json(),
        *state.carried.known,
        config.synthetic_images,
        config.synthetic_steps,
        config.seed,
        state.step,
        mirrors(config, plan.spec),
    )

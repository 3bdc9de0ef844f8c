"""The server's own images, made of the model with which a step begins (`common.synthesis`)."""

from __future__ import annotations

import time
from dataclasses import replace

from common.accelerator import Accelerator
from common.data import Normalisation
from common.memory import trunk_of
from common.seeds import torch_rng
from common.synthesis import Inversion, synthesise
from server.plan import Plan, RunState, mirrors, wants_synthetic


def with_synthetic(plan: Plan, state: RunState, accelerator: Accelerator) -> tuple[RunState, float]:
    """Return `state` with the images that its next round needs, and the seconds they took.

    They are drawn by run and step alone: a run that is resumed makes the same again.
    """
    if not wants_synthetic(plan.config, state):
        return state, 0.0
    began = time.monotonic()
    config, spec = plan.config, plan.spec
    images = synthesise(
        trunk_of(plan.net, plan.graph, state.prior, state.free).to(accelerator.device),
        state.carried.known or tuple(range(spec.classes)),
        config.synthetic_images,
        spec.input_shape,
        Normalisation(spec.mean, spec.std),
        torch_rng("synthesis", config.seed, state.step),
        Inversion(steps=config.synthetic_steps),
        mirror=mirrors(config, spec),
        accelerator=accelerator,
    )
    return replace(state, synthetic=images), time.monotonic() - began

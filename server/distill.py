"""Adaptive online distillation at the server, on the operator's unlabelled images or its own.

The round's mean is the student. Its teachers are the prior global model and the ensemble of
this round's updates (FedDF, Lin et al., NeurIPS 2020; with the previous model among the
teachers: CFeD, Ma et al., IJCAI 2022), mixed per image by how sure each is, so that images far
from the domain do little harm.
"""

from __future__ import annotations

import copy
import time

import numpy as np
import torch

from common.accelerator import Accelerator
from common.data import Augment, ImageSet, Normalisation
from common.distill import blend, kd
from common.filters import cut
from common.seeds import torch_rng
from common.state import State, read_state, write_state
from common.train import Labelled, Recipe, predict, train
from server.plan import Plan, RunState, layout_of
from server.taken import Updates
from server.world import World


def distiller_of(world: World) -> ServerDistiller | None:
    """Return the distiller that the settings ask for, or None."""
    if not world.config.distils:
        return None
    proxy = world.proxy if world.config.distill_source == "proxy" else None
    return ServerDistiller(proxy, world.accelerator)


class ServerDistiller:
    """Distils a round's mean.

    Parameters
    ----------
    images : ImageSet or None
        Proxy images, whose labels are not used; without them it is done on those that the server
        made of the prior (`server.synthetic`).
    accelerator : Accelerator
        Where to train.

    Attributes
    ----------
    seconds : float
        Spent so far.
    """

    def __init__(self, images: ImageSet | None, accelerator: Accelerator) -> None:
        self._images = images
        self._accelerator = accelerator
        self.seconds = 0.0

    def __call__(
        self, plan: Plan, state: RunState, mean: np.ndarray, updates: Updates
    ) -> np.ndarray:
        """Return the packed values of the distilled mean.

        Parameters
        ----------
        plan, state
            The phase that the round belongs to.
        mean : float32 array
            Aggregated packed values.
        updates : iterable of float32 arrays
            The devices' own.
        """
        began = time.monotonic()
        config, layout = plan.config, layout_of(plan, state)
        spec = plan.spec
        pixels = state.synthetic if self._images is None else self._images.images
        assert pixels is not None  # made before the first round of growing
        x = Normalisation(spec.mean, spec.std).to_tensor(pixels)
        prior = cut(self._net(plan, state.base), plan.graph, state.free)
        prior_logits = predict(prior, x, accelerator=self._accelerator)
        ensemble = torch.zeros_like(prior_logits)
        for update in updates:
            net = self._net(plan, layout.unpack(state.base, update))
            ensemble += predict(net, x, accelerator=self._accelerator) / len(updates)
        taught = blend(prior_logits, ensemble)

        student = self._net(plan, layout.unpack(state.base, mean))
        recipe = Recipe(
            epochs=config.distill_epochs,
            batch=config.server_batch,
            lr=config.distill_lr,
            momentum=config.momentum,
            weight_decay=0.0,
            augment=Augment(0, False),
        )
        # The index of an image stands where its label would: the teachers' logits were
        # computed once, for the images as they are.
        numbered = Labelled(x, torch.arange(len(x)))

        def objective(logits: torch.Tensor, _: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            target = taught.to(logits.device)[index]
            return kd(logits, target, config.kd_temperature).mean()

        key = (config.seed, state.step, state.attempt, state.round)
        rng = torch_rng("distill", *key)
        # What a batch normalisation sees of the prior's images says nothing of the devices'.
        trained = layout if self._images is not None else layout.without_statistics()
        train(student, trained, numbered, objective, recipe, rng, accelerator=self._accelerator)
        self.seconds += time.monotonic() - began
        return layout.pack(read_state(student))

    def _net(self, plan: Plan, model: State) -> torch.nn.Module:
        net = copy.deepcopy(plan.net)
        write_state(net, model)
        return net.eval().to(self._accelerator.device)

"""pfl's side of the simulation benchmark; run by `simulation.py` in an environment of its own.

    python pfl_side.py IMAGES.npz ROUNDS THREADS NORM

Prints as JSON the seconds that each central iteration took, by the clock and of this process's
CPU.
"""

from __future__ import annotations

import json
import sys
import time
import types

import nets
import numpy as np
import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

COHORT, BATCH = 50, 10


class Clock(TrainingProcessCallback):
    """Notes when each central iteration ends."""

    def __init__(self) -> None:
        self.times, self.cpu = [time.monotonic()], [time.process_time()]

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.times.append(time.monotonic())
        self.cpu.append(time.process_time())
        return False, Metrics()


def loss(self, x, y, eval=False):  # noqa: A002 - the name is pfl's
    self.train(not eval)
    return F.cross_entropy(self(x), y)


@torch.no_grad()
def metrics(self, x, y, eval=True):  # noqa: A002
    self.train(not eval)
    return {"loss": Weighted(float(F.cross_entropy(self(x), y, reduction="sum")), len(x))}


def main() -> None:
    path, rounds, threads, norm = sys.argv[1], *map(int, sys.argv[2:5])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with np.load(path) as data:
        images, labels, users = data["x"], data["y"], data["users"]
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).contiguous()
    y = torch.from_numpy(labels)
    net = nets.cnn2(10, 3, norm=bool(norm))
    net.loss, net.metrics = types.MethodType(loss, net), types.MethodType(metrics, net)
    model = PyTorchModel(
        net,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(net.parameters(), 1.0),
    )

    def dataset(user: int) -> Dataset:
        where = torch.from_numpy(users[user])
        return Dataset(raw_data=[x[where], y[where]], user_id=str(user))

    people = FederatedDataset(dataset, get_user_sampler("random", range(len(users))))
    clock = Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**6,
            train_cohort_size=COHORT,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=people, val_data=people),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=0.1, local_batch_size=BATCH),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[clock],
    )
    if pytorch_ops.distributed.global_rank == 0:
        taken = {"rounds": clock.times, "cpu_rounds": clock.cpu}
        print(json.dumps({name: np.diff(times).tolist() for name, times in taken.items()}))


if __name__ == "__main__":
    main()

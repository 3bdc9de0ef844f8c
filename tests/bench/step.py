"""What a device's training step costs: time and memory against plain full fine-tuning.

    python tests/bench/step.py [--seconds 18]

Batch after batch, every variant trains one step in turn, on one thread and in float32, so that
other load falls on all alike; a ratio is the median of the turns' ratios. Plain fine-tuning is
the usual loop: all weights, torch's SGD, cross entropy, channels-last tensors, no teacher. All
others learn from the prior model too. Writes results/step.json beside this script and prints a
table in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.distill import Distillation
from common.filters import FilterGraph, FreeSet, cut, switch_off
from common.frozen import training_only
from common.layout import scope_layout
from common.nets import build
from common.optim import PackedSGD
from common.regrow import regrow
from common.sparsify import multi_step_objective
from common.state import read_state, write_state
from common.train import Objective
from common.twin import Twin

RESULTS = Path(__file__).parent / "results" / "step.json"
NETS = ("resnet18", "resnet20", "resnet56", "mobilenetv2")
BATCHES = (32, 8)
SHARES = (0.1, 0.25, 0.5)
GOALS = {"resnet18": 0.35, "resnet20": 0.6, "mobilenetv2": 0.6}
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
Step = tuple[Callable[[], None], Callable[[], Tensor], nn.Module]
"""One training step, its forward pass with the loss, and the net."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=18.0, help="for each net and batch size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name in NETS:
        grown = {share: regrown(name, share) for share in SHARES}
        for batch in BATCHES:
            rows += measure(name, batch, grown, options.seconds)
    result = {
        "rows": rows,
        "goals_time_ratio_at_25_percent": GOALS,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds_per_case": options.seconds,
        "seed": 0,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


def regrown(name: str, share: float) -> tuple[nn.Module, FilterGraph, FreeSet]:
    """Return a net at the start of a step with `share` of each layer freed."""
    net = build(name, 10)
    graph = FilterGraph.build(net, (3, 32, 32))
    rng = np.random.default_rng(0)
    drawn = {x.name: rng.permutation(x.width)[: round(share * x.width)] for x in graph.layers}
    free = FreeSet(drawn)
    switch_off(net, graph, free)
    write_state(net, regrow(read_state(net), graph, free, seed=0))
    return net, graph, free


def measure(
    name: str,
    batch: int,
    grown: dict[float, tuple[nn.Module, FilterGraph, FreeSet]],
    seconds: float,
) -> list[dict]:
    """Return a row for every variant of a net and batch size."""
    x = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,))
    with contextlib.ExitStack() as stack:
        net, graph, free = grown[0.25]
        steps = {"plain": plain(net, x, y)}
        for share, (base, _, freed) in grown.items():
            steps[f"rows {share:.0%}"] = rows(Twin(base, graph, freed), x, y, stack)
        steps["group 25%"] = group(net, graph, free, x, y, stack)
        saved = {variant: saved_bytes(run, net) for variant, (_, run, net) in steps.items()}
        for step, _, _ in steps.values():
            step()
        times: dict[str, list[float]] = {variant: [] for variant in steps}
        began = time.perf_counter()
        while time.perf_counter() - began < seconds or len(times["plain"]) < 3:
            for variant, (step, _, _) in steps.items():
                start = time.perf_counter()
                step()
                times[variant].append(time.perf_counter() - start)
    return [
        {
            "net": name,
            "batch": batch,
            "variant": variant,
            "time_ratio": statistics.median(
                mine / plain for mine, plain in zip(taken, times["plain"], strict=True)
            ),
            "saved_ratio": saved[variant] / saved["plain"],
            "milliseconds": statistics.median(taken) * 1e3,
            "saved_bytes": saved[variant],
            "turns": len(taken),
        }
        for variant, taken in times.items()
    ]


def plain(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Full fine-tuning as anyone would write it."""
    net = copy.deepcopy(net).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.SGD(net.parameters(), **SGD)

    def forward() -> Tensor:
        return F.cross_entropy(net(x), y)

    def step() -> None:
        optimiser.zero_grad()
        forward().backward()
        optimiser.step()

    return step, forward, net


def rows(twin: Twin, x: Tensor, y: Tensor, stack: contextlib.ExitStack) -> Step:
    """Scope rows as a twin, which brings its teacher."""
    stack.enter_context(training_only(twin, twin.layout))
    optimiser = PackedSGD(twin, twin.layout, **SGD)
    objective = multi_step_objective([twin.teacher], Distillation())
    return _taught(twin, optimiser, objective, x, y)


def group(
    net: nn.Module,
    graph: FilterGraph,
    free: FreeSet,
    x: Tensor,
    y: Tensor,
    stack: contextlib.ExitStack,
) -> Step:
    """Scope group by masks, with the prior cut out as the teacher."""
    net, prior = copy.deepcopy(net), cut(net, graph, free).eval()
    layout = scope_layout("group", graph, free, read_state(net))
    stack.enter_context(training_only(net, layout))
    optimiser = PackedSGD(net, layout, **SGD)
    return _taught(net, optimiser, multi_step_objective([prior], Distillation()), x, y)


def _taught(
    net: nn.Module, optimiser: PackedSGD, objective: Objective, x: Tensor, y: Tensor
) -> Step:
    def forward() -> Tensor:
        return objective(net(x), x, y)

    def step() -> None:
        forward().backward()
        optimiser.step()

    return step, forward, net


def saved_bytes(forward: Callable[[], Tensor], net: nn.Module) -> int:
    """Return the bytes that a forward pass keeps for the backward one, each storage once.

    Parameters are there anyway and do not count.
    """
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    sizes: dict[int, int] = {}
    kept = []  # lest an address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


def table(rows: list[dict]) -> str:
    """Return the ratios as a Markdown table."""
    variants = [row["variant"] for row in rows[: len(SHARES) + 2]][1:]
    lines = [
        "| net | batch | plain | " + " | ".join(f"{v}: time, saved" for v in variants) + " |",
        "|---" * (len(variants) + 3) + "|",
    ]
    for name in NETS:
        for batch in BATCHES:
            case = {r["variant"]: r for r in rows if (r["net"], r["batch"]) == (name, batch)}
            cells = [f"{case[v]['time_ratio']:.2f}, {case[v]['saved_ratio']:.2f}" for v in variants]
            plain_ms = f"{case['plain']['milliseconds']:.0f} ms"
            lines.append(f"| {name} | {batch} | {plain_ms} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

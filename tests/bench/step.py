"""What a device's training step costs: time and memory against plain full fine-tuning.

    python tests/bench/step.py [--seconds 18] [--accelerator cuda] [--amp]

Batch after batch, every variant trains one step in turn, on one thread and in float32, so that
other load falls on all alike; a ratio is the median of the turns' ratios. The ratios of the
thread's CPU time stand beside those of wall time: other processes disturb them less. Plain
fine-tuning is the usual loop: all weights, torch's SGD, cross entropy, channels-last tensors, no
teacher. All others learn from the prior model too:

- rows: a twin; lean: one that computes two thirds of its activations anew; cached: one that has the
  kept part's activations of these images from the epoch before (no crops).
- group: whole gradients of all weights, of which all but a slice is dropped, and slices (what the
  devices do): wide convolutions have gradients for the trained slices alone.

Peak memory is that of a process of its own for each variant, less what it held before the first
step. Writes results/step.json beside this script and prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common.frozen as frozen
from common.accelerator import Accelerator
from common.distill import Distillation
from common.filters import FilterGraph, FreeSet, cut, switch_off
from common.frozen import training_only
from common.layout import scope_layout
from common.nets import build
from common.optim import PackedSGD
from common.process import settle
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
VARIANTS = ("plain", *(f"rows {s:.0%}" for s in SHARES), "lean 25%", "cached 25%")
VARIANTS += ("group 25%", "slices 25%")
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
Step = tuple[Callable[[], None], Callable[[], Tensor], nn.Module]
"""One training step, its forward pass with the loss, and the net."""
Regrown = tuple[nn.Module, FilterGraph, FreeSet]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=18.0, help="for each net and batch size")
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--amp", action="store_true", help="forward passes in bfloat16")
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--peaks", nargs="*", default=["resnet18"], help="nets, at batch 32")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", nargs=3, metavar=("NET", "BATCH", "VARIANT"), help="internal")
    options = parser.parse_args()
    accelerator = Accelerator.pick(options.accelerator, options.amp)
    settle()
    torch.manual_seed(0)
    if options.peak:
        name, batch, variant = options.peak
        print(peak_here(name, int(batch), variant, accelerator))
        return
    rows = []
    for name in options.nets:
        grown = {share: regrown(name, share) for share in SHARES}
        for batch in options.batches:
            peaks = name in options.peaks and batch == BATCHES[0]
            rows += measure(name, batch, grown, options.seconds, accelerator, peaks=peaks)
            print(f"{name}, batch {batch}: done", file=sys.stderr, flush=True)
    result = {
        "rows": rows,
        "goals_time_ratio_at_25_percent": GOALS,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "accelerator": str(accelerator.device),
        "amp": accelerator.amp,
        "load_average": os.getloadavg(),
        "threads": torch.get_num_threads(),
        "seconds_per_case": options.seconds,
        "seed": 0,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


def regrown(name: str, share: float) -> Regrown:
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
    grown: dict[float, Regrown],
    seconds: float,
    accelerator: Accelerator,
    *,
    peaks: bool,
) -> list[dict]:
    """Return a row for every variant of a net and batch size."""
    with contextlib.ExitStack() as stack:
        steps = {v: made(v, batch, grown, accelerator, stack) for v in VARIANTS}
        for step, _, _ in steps.values():
            step()
        saved = {variant: saved_bytes(run, net) for variant, (_, run, net) in steps.items()}
        wall: dict[str, list[float]] = {variant: [] for variant in steps}
        cpu: dict[str, list[float]] = {variant: [] for variant in steps}
        began = time.perf_counter()
        while time.perf_counter() - began < seconds or len(wall["plain"]) < 3:
            for variant, (step, _, _) in steps.items():
                start = time.perf_counter(), time.thread_time()
                step()
                if accelerator.device.type == "cuda":
                    torch.cuda.synchronize()
                wall[variant].append(time.perf_counter() - start[0])
                cpu[variant].append(time.thread_time() - start[1])
    held = {v: peak(name, batch, v, accelerator) if peaks else None for v in VARIANTS}
    return [
        {
            "net": name,
            "batch": batch,
            "variant": variant,
            "time_ratio": _ratio(wall, variant),
            "cpu_time_ratio": _ratio(cpu, variant),
            "saved_ratio": saved[variant] / saved["plain"],
            "peak_ratio": held[variant] / held["plain"] if peaks else None,
            "milliseconds": statistics.median(wall[variant]) * 1e3,
            "cpu_milliseconds": statistics.median(cpu[variant]) * 1e3,
            "saved_bytes": saved[variant],
            "peak_bytes": held[variant],
            "turns": len(wall[variant]),
        }
        for variant in VARIANTS
    ]


def _ratio(times: dict[str, list[float]], variant: str) -> float:
    turns = zip(times[variant], times["plain"], strict=True)
    return statistics.median(mine / plain for mine, plain in turns)


def made(
    variant: str,
    batch: int,
    grown: dict[float, Regrown],
    accelerator: Accelerator,
    stack: contextlib.ExitStack,
) -> Step:
    """Return the step of a variant."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 32, 32, generator=rng).to(memory_format=torch.channels_last)
    x, y = x.to(accelerator.device), torch.arange(batch).to(accelerator.device) % 10
    kind, _, percent = variant.partition(" ")
    net, graph, free = grown[int(percent.rstrip("%")) / 100 if percent else 0.25]
    net = copy.deepcopy(net).to(accelerator.device)
    if kind == "plain":
        return plain(net, x, y, accelerator)
    if kind in ("group", "slices"):
        return group(net, graph, free, x, y, stack, accelerator, sliced=kind == "slices")
    cache = 2**32 if kind == "cached" else 0
    twin = Twin(net, graph, free, lean=kind == "lean", cache_bytes=cache)
    return rows(twin, x, y, stack, accelerator)


def peak(name: str, batch: int, variant: str, accelerator: Accelerator) -> int:
    """Return the peak memory in bytes of a variant in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, str(batch), variant]
    command += ["--accelerator", str(accelerator.device), *["--amp"] * accelerator.amp]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_here(name: str, batch: int, variant: str, accelerator: Accelerator) -> int:
    """Return what three steps add to the memory that this process had."""
    share = int(variant.partition(" ")[2].rstrip("%") or 25) / 100
    with contextlib.ExitStack() as stack:
        step, _, _ = made(variant, batch, {share: regrown(name, share)}, accelerator, stack)
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        status = Path("/proc/self/statm").read_text().split()
        before = int(status[1]) * resource.getpagesize()
        for _ in range(3):
            step()
        if accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, 1)


def plain(net: nn.Module, x: Tensor, y: Tensor, accelerator: Accelerator) -> Step:
    """Full fine-tuning as anyone would write it."""
    net = net.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.SGD(net.parameters(), **SGD)

    def forward() -> Tensor:
        with accelerator.autocast():
            logits = net(x)
        return F.cross_entropy(logits.float(), y)

    def step() -> None:
        optimiser.zero_grad()
        forward().backward()
        optimiser.step()

    return step, forward, net


def rows(
    twin: Twin, x: Tensor, y: Tensor, stack: contextlib.ExitStack, accelerator: Accelerator
) -> Step:
    """Scope rows as a twin, which brings its teacher."""
    stack.enter_context(training_only(twin, twin.layout))
    optimiser = PackedSGD(twin, twin.layout, **SGD)
    objective = multi_step_objective([twin.teacher], Distillation())
    return _taught(twin, optimiser, objective, x, y, accelerator)


def group(
    net: nn.Module,
    graph: FilterGraph,
    free: FreeSet,
    x: Tensor,
    y: Tensor,
    stack: contextlib.ExitStack,
    accelerator: Accelerator,
    *,
    sliced: bool,
) -> Step:
    """Scope group, with the prior cut out as the teacher."""
    prior = cut(net, graph, free).eval()
    layout = scope_layout("group", graph, free, read_state(net))
    with mock.patch.object(frozen, "_LEAST", frozen._LEAST if sliced else 10**9):
        stack.enter_context(training_only(net, layout))
    optimiser = PackedSGD(net, layout, **SGD)
    objective = multi_step_objective([prior], Distillation())
    return _taught(net, optimiser, objective, x, y, accelerator)


def _taught(
    net: nn.Module,
    optimiser: PackedSGD,
    objective: Objective,
    x: Tensor,
    y: Tensor,
    accelerator: Accelerator,
) -> Step:
    def forward() -> Tensor:
        with accelerator.autocast():
            return objective(net(x).float(), x, y)

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
    variants = VARIANTS[1:]
    lines = [
        "time, CPU time, saved for backward and peak memory, of plain fine-tuning's",
        "",
        "| net | batch | plain | " + " | ".join(variants) + " |",
        "|---" * (len(variants) + 3) + "|",
    ]
    for name, batch in dict.fromkeys((r["net"], r["batch"]) for r in rows):
        case = {r["variant"]: r for r in rows if (r["net"], r["batch"]) == (name, batch)}
        keys = ("time_ratio", "cpu_time_ratio", "saved_ratio", "peak_ratio")
        cells = [
            " ".join("-" if case[v][key] is None else f"{case[v][key]:.2f}" for key in keys)
            for v in variants
        ]
        plain_ms = f"{case['plain']['milliseconds']:.0f} ms"
        lines.append(f"| {name} | {batch} | {plain_ms} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""A thousand updates of a ResNet-18 through admission and the mean: memory, time per update.

    python tests/bench/stream.py [--updates 1000] [--mean weighted]

ResNet-18 (64-512, 32x32), 25 % freed, scope rows, int8 updates. Updates are made one at a time
while the round runs, as they come off the wire; the server's own code takes, spools, compares and
averages them. Memory is the most that the process held, beyond what it held before the round and in
all. Run with several --updates it shows that memory does not grow with them. Writes
results/stream.json (or --out).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent

from common.codec import encode
from common.config import Config
from common.filters import FilterGraph
from common.importance import bn_scale, choose
from common.order import NetSpec, Report
from common.seeds import numpy_rng
from common.sparsify import off_state
from common.state import read_state
from common.update import as_array, rows_of
from server.admission import Admission
from server.aggregate import MaskedMean
from server.plan import Plan, layout_of, order_of, start
from server.prior import make_net
from server.robust import robust_mean
from server.taken import Taken
from server.wire import Reply

SPEC = NetSpec(
    name="resnet18",
    classes=10,
    input_shape=(3, 32, 32),
    width=64,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", default="100,1000", help="numbers with commas, ascending")
    parser.add_argument("--mean", default="weighted")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "stream.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = Config(
        net="resnet18", width=64, scope="rows", share=0.25, shift="never", mean=options.mean
    )
    net = make_net(config, SPEC)
    plan = Plan(config, SPEC, FilterGraph.build(net, SPEC.input_shape), net)
    free = choose(plan.graph, bn_scale(net, plan.graph), 0.25)
    prior = off_state(read_state(net), plan.graph, free)
    rows = [measure(plan, prior, free, int(n)) for n in options.updates.split(",")]
    result = {
        "net": "resnet18",
        "freed": 0.25,
        "scope": "rows",
        "codec": config.codec_up,
        "mean": options.mean,
        "rounds": rows,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("flwr", "numpy", "torch")},
        },
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(plan: Plan, prior: Any, free: Any, count: int) -> dict[str, Any]:
    """Take and average `count` updates."""
    state = start(plan, prior, free)
    order, layout = order_of(plan, state), layout_of(plan, state)
    admission, rng = Admission(plan, state, order), numpy_rng("stream", 0)
    pool = [
        as_array(
            encode(
                rng.normal(0, 1e-3, layout.size).astype(np.float32), rows_of(layout), "int8", rng
            )
        )
        for _ in range(4)
    ]
    asked = ("run", "step", "phase", "attempt", "round", "base", "free_digest", "layout")
    same = {name: getattr(order, name) for name in asked}
    before, cpu = rss_mb(), time.process_time()
    with tempfile.TemporaryDirectory() as folder, Taken(admission, Path(folder)) as taken:
        for number in range(count):
            name = f"device-{(number * 7919) % count:05d}"  # in no order
            report = Report(
                device=name, images=50, class_counts=[5] * 10, heldout=10, loss=1.0, **same
            )
            taken.add(name, Reply(report, pool[number % 4].copy(), len(pool[0])))
        admitted = time.process_time() - cpu
        assert not taken.refuse_outliers()
        images = [report.images for report in taken.reports.values()]
        if plan.config.mean == "weighted":
            mean = MaskedMean(layout)
            for update, weight in zip(taken, images, strict=True):
                mean.add(update, weight)
            values = mean.result()
        else:
            share = plan.config.faulty_share
            values = robust_mean(plan.config.mean, taken, images, layout, share, Path(folder))
        took = time.process_time() - cpu
    assert np.isfinite(values).all()
    return {
        "updates": len(images),
        "values_an_update": layout.size,
        "bytes_an_update": len(pool[0]),
        "update_bytes_in_all_mb": round(count * len(pool[0]) / 1e6, 1),
        "cpu_ms_an_update": round(1000 * took / count, 2),
        "cpu_ms_an_update_to_admit": round(1000 * admitted / count, 2),
        "rss_mb_before": round(before, 1),
        "rss_mb_most": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
    }


def rss_mb() -> float:
    """Return the memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


if __name__ == "__main__":
    main()

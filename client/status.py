"""What a device holds and has given, in numbers."""

from __future__ import annotations

from typing import Any

from client.heldout import heldout_share, measures
from client.index import Index
from client.privacy import epsilon_of, released
from client.settings import read_settings
from common.delta import DELTA


def status(index: Index) -> dict[str, Any]:
    """Return what ``fallow-device status`` tells, as JSON data.

    Returns
    -------
    dict
        ``device``, ``images`` (by origin of the label), ``labels``, ``sources``, ``bytes`` and
        ``quota_bytes``, ``heldout`` (share and images), ``batches`` (frozen ones, newest first)
        and ``privacy`` (None if nothing was sent under noise).
    """
    settings = read_settings(index.folder)
    images = index.images()
    share = heldout_share(index, settings.collect.heldout)
    sources: dict[str, int] = {
        str(name): 0 for (name,) in index.run("SELECT name FROM sources ORDER BY name")
    }
    labels: dict[str, int] = {}
    origins = {"given": 0, "corrected": 0, "model": 0, "none": 0}
    for image in images:
        sources[image.source] += 1
        origins[image.origin] += 1
        if image.label is not None:
            labels[image.label] = labels.get(image.label, 0) + 1
    batches = index.run(
        "SELECT step, frozen, (SELECT COUNT(*) FROM members WHERE batch = id) FROM batches "
        "ORDER BY id DESC"
    )
    noises = released(index)
    return {
        "device": index.name,
        "store": str(index.folder),
        "images": len(images),
        "origins": origins,
        "labels": dict(sorted(labels.items())),
        "sources": sources,
        "bytes": sum(image.bytes for image in images),
        "quota_bytes": int(settings.collect.quota_mib * 2**20),
        "heldout": {"share": share, "images": sum(measures(image, share) for image in images)},
        "batches": [{"step": s, "frozen": f, "images": n} for s, f, n in batches],
        "privacy": {"updates": len(noises), "epsilon": epsilon_of(noises), "delta": DELTA}
        if noises
        else None,
    }


def status_lines(told: dict[str, Any]) -> list[str]:
    """Return the same for people."""
    mib = 2**20
    origins = ", ".join(f"{n} {name}" for name, n in told["origins"].items() if n)
    lines = [
        f"device    {told['device']} in {told['store']}",
        f"images    {told['images']} ({origins or 'none yet'})",
        f"space     {told['bytes'] / mib:.1f} of {told['quota_bytes'] / mib:g} MiB",
        f"held out  {told['heldout']['images']} images that only measure "
        f"({told['heldout']['share']:.0%} of all, by their content)",
        "sources   " + (_counts(told["sources"]) or "none has consent: nothing is collected"),
        "labels    " + (_counts(told["labels"]) or "none"),
    ]
    lines += [f"batch     step {b['step']}: {b['images']} images" for b in told["batches"]]
    privacy = told["privacy"]
    if privacy is not None:
        lines.append(
            f"privacy   epsilon {privacy['epsilon']:.3g} at delta {privacy['delta']:g} over "
            f"{privacy['updates']} noised updates"
        )
    return lines


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())

"""Which images stay when there is no room for all: a reservoir for each label.

Of n images offered with a label, each is kept with the same probability, whatever n is
(Vitter's algorithm R, ACM TOMS 1985). Where bytes are short, the label that takes most of them
gives way first, so that rare labels stay (class-balancing reservoir sampling, Chrysakis & Moens,
ICML 2020).
"""

from __future__ import annotations

import numpy as np

from client.index import Index
from client.settings import Collecting
from common.seeds import numpy_rng

_MIB = 2**20


def make_room(index: Index, label: str | None, size: int, rules: Collecting) -> bool:
    """Take images out until one of `size` bytes fits; return False if it is not to be kept.

    Counts the image as offered. Call it inside the index's write lock, once for each image.
    """
    key = label or ""
    index.run(
        "INSERT INTO offered VALUES (?, 1) ON CONFLICT (label) DO UPDATE SET count = count + 1",
        (key,),
    )
    offered = int(index.one("SELECT count FROM offered WHERE label = ?", (key,)))
    rng = numpy_rng("reservoir", index.secret, key, offered)
    if size > rules.quota_mib * _MIB:
        return False
    count = _count(index, key)
    if rules.class_quota and count >= rules.class_quota:
        if rng.random() * offered >= rules.class_quota:
            return False
        _evict(index, key, count - rules.class_quota + 1, rng)
    limit = rules.quota_mib * _MIB - size
    own_turn = _bytes(index) > limit and _largest(index) == key
    if own_turn and rng.random() * offered >= _count(index, key):
        return False
    while _bytes(index) > limit:
        _evict(index, _largest(index), 1, rng)
    return True


def trim(index: Index, label: str, rules: Collecting, keep: str) -> None:
    """Take out what a label has too much after images got it, but not the image `keep`."""
    count = _count(index, label)
    if rules.class_quota and count > rules.class_quota:
        rng = numpy_rng("trim", index.secret, label, count, keep)
        _evict(index, label, count - rules.class_quota, rng, keep)


def _count(index: Index, key: str) -> int:
    return int(
        index.one(
            "SELECT COUNT(*) FROM images WHERE COALESCE(label, '') = ? AND evicted = 0", (key,)
        )
    )


def _bytes(index: Index) -> int:
    return int(index.one("SELECT COALESCE(SUM(bytes), 0) FROM images WHERE evicted = 0"))


def _largest(index: Index) -> str:
    """Return the label that takes most bytes."""
    return str(
        index.one(
            "SELECT COALESCE(label, '') FROM images WHERE evicted = 0 "
            "GROUP BY 1 ORDER BY SUM(bytes) DESC, 1"
        )
    )


def _evict(index: Index, key: str, many: int, rng: np.random.Generator, keep: str = "") -> None:
    members = index.run(
        "SELECT digest FROM images WHERE COALESCE(label, '') = ? AND evicted = 0 AND digest != ? "
        "ORDER BY digest",
        (key, keep),
    )
    for i in rng.choice(len(members), min(many, len(members)), replace=False):
        index.evict(str(members[i][0]))

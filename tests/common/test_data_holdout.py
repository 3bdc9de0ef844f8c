"""The held-out part, fixed by content."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from common.data import ImageSet, holdout_mask, split_holdout
from common.errors import ConfigError

PIXELS = np.random.default_rng(0).integers(0, 256, (2000, 4, 4, 3), dtype=np.uint8)
IMAGES = ImageSet(PIXELS, np.arange(2000), tuple(map(str, range(2000))))


def test_about_the_share_is_held_out() -> None:
    assert abs(holdout_mask(IMAGES, 0.15).mean() - 0.15) < 0.03
    assert not holdout_mask(IMAGES, 0.0).any()


def test_the_choice_is_the_documented_hash() -> None:
    expected = [
        int.from_bytes(hashlib.sha256(b"salt" + image.tobytes()).digest()[:8], "big") / 2**64 < 0.3
        for image in PIXELS[:200]
    ]
    assert holdout_mask(IMAGES.select(np.arange(200)), 0.3, "salt").tolist() == expected


def test_order_company_labels_and_memory_layout_do_not_matter() -> None:
    mask = holdout_mask(IMAGES, 0.2)
    order = np.random.default_rng(1).permutation(2000)[:300]
    assert np.array_equal(holdout_mask(IMAGES.select(order), 0.2), mask[order])
    other = ImageSet(np.asfortranarray(PIXELS), IMAGES.labels[::-1], IMAGES.classes)
    assert np.array_equal(holdout_mask(other, 0.2), mask)


def test_duplicates_lie_on_one_side() -> None:
    train, held = split_holdout(ImageSet.concat([IMAGES, IMAGES]), 0.5)
    assert len(train) + len(held) == 4000
    sides = [{image.tobytes() for image in side.images} for side in (train, held)]
    assert not sides[0] & sides[1]


def test_a_larger_share_only_adds_and_another_salt_chooses_anew() -> None:
    small, large = holdout_mask(IMAGES, 0.1), holdout_mask(IMAGES, 0.3)
    assert (large >= small).all()
    assert large.sum() > small.sum()
    assert not np.array_equal(holdout_mask(IMAGES, 0.3, "other"), large)


def test_few_images_may_leave_a_side_empty() -> None:
    one = IMAGES.select(np.array([0]))
    assert sorted(map(len, split_holdout(one, 0.5))) == [0, 1]
    nothing = IMAGES.select(np.array([], dtype=np.int64))
    assert list(map(len, split_holdout(nothing, 0.5))) == [0, 0]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_leaves_nothing_to_train_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=f"holdout share: {share}"):
        holdout_mask(IMAGES, share)

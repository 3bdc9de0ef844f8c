"""The metrics, against numbers worked out by hand and against what must always hold."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import common.metrics
from common.errors import DataError
from common.metrics import acc, accuracy, bwt, forgetting, gap_closed

NAN = float("nan")
# Three models (prior, after step 1, after step 2) on three parts.
RUN = np.array([[0.80, 0.40, 0.30], [0.75, 0.70, 0.50], [0.70, 0.60, 0.90]])


def test_accuracy_is_the_share_of_rows_with_the_largest_logit_at_the_label() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 2.0]], dtype=np.float32)
    assert accuracy(logits, np.array([0, 1, 1, 1])) == 0.75


def test_accuracy_of_no_images_is_undefined() -> None:
    assert math.isnan(accuracy(np.zeros((0, 10), np.float32), np.zeros(0, np.int64)))


@pytest.mark.parametrize("labels", [np.zeros(3, np.int64), np.zeros((2, 1), np.int64)])
def test_accuracy_refuses_labels_of_another_shape(labels: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"\(2, 10\)"):
        accuracy(np.zeros((2, 10)), labels)


def test_accuracy_refuses_a_model_that_has_diverged() -> None:
    # argmax takes NaN for the largest: without the check a dead model could score 10 %.
    with pytest.raises(DataError, match="diverged"):
        accuracy(np.array([[NAN, 1.0]]), np.array([0]))


def test_the_three_figures_of_a_run_worked_out_by_hand() -> None:
    assert acc(RUN) == pytest.approx((0.70 + 0.60 + 0.90) / 3)
    assert bwt(RUN) == pytest.approx(((0.70 - 0.80) + (0.60 - 0.70)) / 2)
    assert forgetting(RUN) == pytest.approx(((0.80 - 0.70) + (0.70 - 0.60)) / 2)


def test_forgetting_looks_at_all_earlier_models_and_may_be_negative() -> None:
    # Part 1 was known best before it was learnt: its own step made it worse.
    spoiled = np.array([[0.8, 0.9, 0.0], [0.8, 0.7, 0.0], [0.8, 0.7, 0.9]])
    assert forgetting(spoiled) == pytest.approx((0.0 + 0.2) / 2)
    assert bwt(spoiled) == pytest.approx(0.0)
    improved = np.array([[0.5, 0.1], [0.6, 0.2]])
    assert forgetting(improved) == pytest.approx(-0.1)


def test_what_was_not_measured_is_left_out() -> None:
    brought = RUN.copy()
    brought[:, 0] = NAN  # a prior model that came without its data
    assert acc(brought) == pytest.approx((0.60 + 0.90) / 2)
    assert bwt(brought) == pytest.approx(-0.10)
    assert forgetting(brought) == pytest.approx(0.10)


def test_before_the_first_step_nothing_can_be_forgotten() -> None:
    prior_only = np.array([[0.8, 0.4, 0.3]])
    assert acc(prior_only) == pytest.approx(0.5)
    assert math.isnan(bwt(prior_only))
    assert math.isnan(forgetting(prior_only))


@pytest.mark.parametrize("matrix", [np.zeros(3), np.zeros((0, 2)), np.zeros((2, 0))])
def test_a_matrix_without_models_or_parts_is_refused(matrix: np.ndarray) -> None:
    for figure in (acc, bwt, forgetting):
        with pytest.raises(DataError, match="accuracy matrix"):
            figure(matrix)


@given(
    st.integers(1, 5).flatmap(
        lambda steps: arrays.arrays(
            np.float64, (steps + 1, steps + 1), elements=st.floats(0, 1) | st.just(NAN)
        )
    )
)
def test_losing_nothing_ever_means_no_forgetting(matrix: np.ndarray) -> None:
    # If the last model is at least as good as each earlier one wherever both were measured,
    # forgetting is never positive and backward transfer never negative.
    matrix[-1] = np.fmax.reduce(matrix, axis=0)
    assert not forgetting(matrix) > 0
    assert not bwt(matrix) < 0
    assert math.isnan(acc(matrix)) or 0 <= acc(matrix) <= 1


def test_gap_closed_is_measured_from_the_prior_to_joint_training() -> None:
    assert gap_closed(0.70, prior=0.66, joint=0.74) == pytest.approx(0.5)
    assert gap_closed(0.65, prior=0.66, joint=0.74) < 0
    assert math.isnan(gap_closed(0.70, prior=0.74, joint=0.74))
    assert math.isnan(gap_closed(0.70, prior=0.75, joint=0.74))


def test_the_example_in_the_docstring_holds() -> None:
    assert doctest.testmod(common.metrics).failed == 0

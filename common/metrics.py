"""What a run is judged by: accuracy, the accuracy matrix and what follows from it.

The accuracy matrix has a row for every model and a column for every part of the data:
``matrix[i][j]`` is the accuracy of the model after step ``i`` on part ``j``. Row 0 is the
prior model, column 0 the data that it was trained on; part ``j`` arrives with step ``j``.
NaN marks what was not or could not be measured; it is left out of every mean, and a mean
over nothing is NaN. All accuracies are shares in 0..1.

>>> matrix = np.array([[0.70, 0.50], [0.66, 0.80]])
>>> round(acc(matrix), 3), round(bwt(matrix), 3), round(forgetting(matrix), 3)
(0.73, -0.04, 0.04)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

Floats = NDArray[np.floating[Any]]


def accuracy(logits: Floats, labels: NDArray[np.integer[Any]]) -> float:
    """Share of rows whose largest logit is at the label (top-1); a tie goes to the lower class.

    Parameters
    ----------
    logits
        Scores, [N, classes].
    labels
        Class indices, [N].

    Returns
    -------
    float
        Share in 0..1; NaN if there are no rows.

    Raises
    ------
    DataError
        If the shapes do not fit, or a logit is NaN: ``argmax`` would take it for the largest.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise DataError(
            f"logits of shape {logits.shape} do not fit labels of shape {labels.shape}: "
            "give [N, classes] and [N]"
        )
    if np.isnan(logits).any():
        raise DataError("logits hold NaN: the model has diverged; lower its learning rate")
    return _mean(logits.argmax(axis=1) == labels)


def acc(matrix: Floats) -> float:
    """Average accuracy of the last model over all parts: ``mean_j R[T][j]``.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017, equation 2.
    """
    return _mean(_checked(matrix)[-1])


def bwt(matrix: Floats) -> float:
    """Backward transfer: ``mean_{j<T} (R[T][j] - R[j][j])``.

    How a part's accuracy changed from when it was learnt to the end of the run; negative means
    that something was lost. NaN before the first step. Lopez-Paz and Ranzato, "Gradient
    Episodic Memory", NeurIPS 2017, equation 3.
    """
    matrix = _checked(matrix)
    earlier = min(matrix.shape[0] - 1, matrix.shape[1])
    return _mean(matrix[-1, :earlier] - np.diagonal(matrix)[:earlier])


def forgetting(matrix: Floats) -> float:
    """Forgetting against the best earlier model: ``mean_{j<T} (max_{i<T} R[i][j] - R[T][j])``.

    The maximum runs over *all* earlier models, also those that had not seen part ``j`` yet, and
    the difference is not cut at zero: a negative value means that the last model is the best of
    all on average. NaN before the first step. Chaudhry et al., "Riemannian Walk for
    Incremental Learning", ECCV 2018, equation 3, with k = T. Other code bases take the maximum
    only from step ``j`` on, include the last model in it, or cut at zero: their numbers differ.
    """
    matrix = _checked(matrix)
    earlier = min(matrix.shape[0] - 1, matrix.shape[1])
    # fmax passes over NaN and gives NaN only where every earlier model is unmeasured.
    best = np.fmax.reduce(matrix[:-1, :earlier], axis=0, initial=np.nan)
    return _mean(best - matrix[-1, :earlier])


def gap_closed(acc: float, prior: float, joint: float) -> float:
    """Share of the way from the prior model to joint training: ``(acc - prior) / (joint - prior)``.

    ``joint`` is the accuracy of the same net trained on all data at once, the upper bound
    (notes/method.md). Above 1 beats it, below 0 is worse than the prior; NaN where joint
    training is no better than the prior, so that there is no gap.
    """
    return (acc - prior) / (joint - prior) if joint > prior else float("nan")


def _checked(matrix: Floats) -> Floats:
    if matrix.ndim != 2 or matrix.size == 0:
        raise DataError(
            f"accuracy matrix has shape {matrix.shape}: give [steps + 1, parts], neither of them 0"
        )
    return matrix


def _mean(values: NDArray[Any]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if known.size else float("nan")

"""Arrays as Flower's messages carry them."""

from __future__ import annotations

import numpy as np
from flwr.app import Array

from common.update import write_array


def flower_array(values: np.ndarray) -> Array:
    """Return `values` for a message; what `Array(values)` would be, without its many copies."""
    return Array(str(values.dtype), values.shape, "numpy.ndarray", write_array(values))

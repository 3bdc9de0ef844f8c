"""What travels: packed values, and the checks that they pass before anything is done with them."""

from __future__ import annotations

import numpy as np

from common.errors import UpdateError


def check_values(values: np.ndarray, size: int, what: str) -> np.ndarray:
    """Return `values` if they are finite float32 [size].

    Parameters
    ----------
    values : array
        As it came off the wire.
    size : int
        Number of values that the layout names.
    what : str
        For the message, for example ``"update of device 3"``.

    Raises
    ------
    UpdateError
        If dtype or length differ or a value is not finite.
    """
    if values.dtype != np.float32 or values.shape != (size,):
        raise UpdateError(
            f"{what} is {values.dtype}{list(values.shape)}, expected float32[{size}]: "
            "it belongs to another net, scope or free set"
        )
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UpdateError(f"{what} is not finite: value {bad} is {values[bad]}")
    return values

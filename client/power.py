"""Whether the device is on mains power, and on a network that costs nothing by the byte."""

from __future__ import annotations

import subprocess
from pathlib import Path

_SUPPLIES = Path("/sys/class/power_supply")
_NETWORK_MANAGER = (
    "busctl",
    "get-property",
    "org.freedesktop.NetworkManager",
    "/org/freedesktop/NetworkManager",
    "org.freedesktop.NetworkManager",
    "Metered",
)
_UNMETERED = ("2", "4")
"""NetworkManager's NM_METERED_NO and NM_METERED_GUESS_NO; 1 and 3 are metered, 0 is unknown."""


def why_not_charging(folder: Path = _SUPPLIES) -> str | None:
    """Return why training would drain a battery; None on mains power or without a battery."""
    batteries = []
    for supply in sorted(folder.glob("*")):
        kind = _read(supply / "type")
        if kind in ("Mains", "USB", "USB_C", "Wireless") and _read(supply / "online") == "1":
            return None
        # a mouse has a battery too, which is not this device's
        if kind == "Battery" and _read(supply / "scope") != "Device":
            batteries.append(_read(supply / "status"))
    if not batteries or any(status in ("Charging", "Full") for status in batteries):
        return None
    return "on battery: this device trains only while it charges"


def why_metered(command: tuple[str, ...] = _NETWORK_MANAGER) -> str | None:
    """Return why the network may cost money; None if NetworkManager says that it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        answer = done.stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        answer = []
    if len(answer) != 2 or answer[1] == "0":
        return (
            "nothing here says whether the network is metered: set limits.unmetered to false, or "
            "limits.check to a check of your own"
        )
    if answer[1] not in _UNMETERED:
        return "on a metered network: this device trains only on one that is not"
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

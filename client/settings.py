"""A device's own settings: ``device.toml`` in its store.

They belong to whoever owns the device: no order and no run config changes them.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import ConfigError

FILE = "device.toml"

Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Whole = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )


class Collecting(_Section):
    """What is taken and how long it stays."""

    quota_mib: Positive = Field(1024.0, description="most that the image files take, in MiB")
    class_quota: Whole = Field(0, description="most images of a label; 0 = no limit")
    retention_days: NotNegative = Field(
        0.0, description="days after which an image is removed; 0 = never"
    )
    file_mib: Positive = Field(32.0, description="largest file that is taken, in MiB")
    near: Annotated[int, Field(ge=-1, le=32)] = Field(
        4, description="bits of 64 in which near duplicates differ at most; -1 = not looked for"
    )
    heldout: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.15, description="least share of the images that only measures, fixed by content"
    )
    classes: tuple[str, ...] = Field(
        (), description="labels that may be given; empty = any, or those of the model"
    )
    model: str = Field("", description="path of the current model.onnx, which labels what has none")
    confidence: Share = Field(0.9, description="probability from which its label is believed")
    model_weight: Share = Field(
        0.3, description="weight of images that it labelled, against 1 of the others"
    )


class Limits(_Section):
    """What the device gives to training; beyond it declines a round."""

    threads: Count = Field(1, description="threads of training")
    keep_warm: bool = Field(
        True,
        description="hold a process with torch loaded (280 MB), so that messages need not load it",
    )
    memory_mib: Whole = Field(0, description="memory that must be free, in MiB; 0 = not asked")
    process_mib: Whole = Field(0, description="memory that training may take, in MiB; 0 = no limit")
    seconds: NotNegative = Field(0.0, description="longest round, in seconds; 0 = no limit")
    charging: bool = Field(False, description="train only on mains power")
    unmetered: bool = Field(False, description="train only on an unmetered network")
    check: str = Field(
        "",
        description="own check: module:function that returns why not, or a command that fails",
    )


class Privacy(_Section):
    """Noise that the device adds of its own accord, whatever the run asks for."""

    clip: NotNegative = Field(0.0, description="largest L2 norm of an update; 0 = the run's")
    noise: NotNegative = Field(0.0, description="least noise, in multiples of the clip")


class DeviceSettings(_Section):
    """All of ``device.toml``."""

    collect: Collecting = Collecting()
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="this device's own labels, and the model's class of each; '' leaves them out",
    )
    limits: Limits = Limits()
    privacy: Privacy = Privacy()


def read_settings(store: Path) -> DeviceSettings:
    """Return the settings of the device whose store is `store`; without a file, the defaults.

    Raises
    ------
    ConfigError
        Naming the file, each wrong setting, its value and what is allowed.
    """
    path = store / FILE
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return DeviceSettings()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); make it readable") from None
    except ValueError as error:  # bad TOML, bad UTF-8
        raise ConfigError(f"{path} is no TOML: {error}; correct it") from None
    try:
        return DeviceSettings.model_validate(values)
    except ValidationError as error:
        told = "; ".join(_explain(problem) for problem in error.errors())
        raise ConfigError(f"{path}: {told}") from None


def _explain(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {name}: remove it"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{name} is {problem['input']!r}: {message[0].lower()}{message[1:]}"


def template() -> str:
    """Return a ``device.toml`` that says what can be set and sets nothing."""
    default = DeviceSettings()
    lines = ["# Settings of this device. A line without its '#' overrides what it shows.", ""]
    for name in ("collect", "limits", "privacy"):
        section = getattr(default, name)
        lines.append(f"[{name}]")
        for field, info in type(section).model_fields.items():
            key = field.replace("_", "-")
            lines.append(f"# {key} = {_toml(getattr(section, field))}  # {info.description}")
        lines.append("")
    about = DeviceSettings.model_fields["labels"].description
    lines += ["[labels]", f"# {about}", '# kitty = "cat"', '# blurred = ""', ""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[]"
    return f'"{value}"' if isinstance(value, str) else str(value)

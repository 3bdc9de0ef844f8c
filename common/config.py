"""Every setting of a run: typed, checked, with its unit.

Keys are kebab-case on the command line, in ``[tool.flwr.app.config]`` and in ``--set``;
``config.share`` in Python. A value that cannot be used is refused with its name, the value
and what is allowed, before any work starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from common.codec import Codec
from common.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]


def _number(value: object) -> object:
    """Return the number in a text: a `Literal` converts nothing by itself."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Config(BaseModel):
    """Settings of a run. Shares and accuracies are in [0, 1], times in seconds."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=_kebab,
        populate_by_name=True,
    )

    # the run
    seed: Whole = Field(0, description="seed of the run; the same seed gives the same bytes")
    steps: Count = Field(2, description="steps, each on one part of the new data")
    devices: Count = Field(8, description="simulated devices")
    workers: Whole = Field(0, description="worker processes of the inline engine; 0 = one a core")
    accelerator: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    amp: bool = Field(False, description="train in bfloat16 mixed precision")
    lean: bool = Field(
        False, description="scope rows: half the memory of a training step, for more time"
    )
    cache_mib: Whole = Field(
        0,
        description="scope rows, crop 0: most MiB of kept activations held from epoch to epoch",
    )

    # data
    data: str = Field("digits", description="'digits', a folder or a file (see README, Data)")
    image_size: Whole = Field(0, description="pixels a side to resize to; 0 = as they are")
    channels: Annotated[Literal[0, 1, 3], BeforeValidator(_number)] = Field(
        0, description="1 grey, 3 colour; 0 = as they are"
    )
    stream: Literal["share", "class"] = Field(
        "share", description="parts have all classes, or classes of their own"
    )
    prior_size: Whole = Field(0, description="images for the prior; 0 = as many as a part")
    part_size: Whole = Field(0, description="new images a step; 0 = all, split evenly")
    prior_classes: Whole = Field(
        0, description="stream 'class': classes of the prior; 0 = as many as a part"
    )
    worlds: str = Field(
        "", description="how each part's images are transformed, comma-separated; empty = not"
    )
    joint: bool = Field(
        False, description="devices also hold their share of all earlier images: an upper bound"
    )
    partition: Literal["iid", "dirichlet", "classes", "natural"] = Field(
        "dirichlet", description="how a part is dealt out over the devices"
    )
    alpha: Positive = Field(0.5, description="Dirichlet concentration; small = skewed")
    classes_per_device: Count = Field(2, description="partition 'classes': classes a device")
    column: str = Field("", description="partition 'natural': the column that names the device")
    heldout: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.15, description="share of the training images that only decides, fixed by content"
    )
    crop: int = Field(-1, ge=-1, description="random-crop padding in pixels; -1 = an eighth")
    flip: bool = Field(True, description="random horizontal flip; never for digits")

    # the net and the prior
    net: str = Field("resnet8", description="a name that `fallow nets` lists, or module:function")
    width: NotNegative = Field(0.0, description="width of the net; 0 = its default")
    prior: str = Field("", description="safetensors state of your own model; empty = train one")
    norm_mean: str = Field(
        "", description="of your own model, comma-separated, pixels in 0..1; empty = of its data"
    )
    norm_std: str = Field("", description="likewise")
    prior_epochs: Count = Field(20, description="epochs of the prior")
    prior_lr: Positive = Field(0.1, description="learning rate of the prior (cosine)")

    # freeing (SST, SST+MSL)
    freeing: Literal["always", "prior", "steps", "never"] = Field(
        "always", description="where filters are freed: in the prior, after each step, or neither"
    )
    choice: Literal["importance", "random"] = Field(
        "importance", description="which filters are freed: the least important, or any"
    )
    share: Annotated[float, Field(gt=0, le=0.9)] = Field(
        0.3, description="share of every layer's filters to free"
    )
    cap: Annotated[float, Field(gt=0, le=0.9)] = Field(
        0.5, description="most that a layer may lose"
    )
    max_drop: Share = Field(0.005, description="accepted loss of held-out accuracy by freeing")
    freeing_epochs: Count = Field(20, description="epochs of the first freeing, at the server")
    freeing_lr: Positive = Field(0.05, description="learning rate of the first freeing (cosine)")
    rotations: NotNegative = Field(
        1.0,
        description="weight, in the first freeing, of telling how images are turned; 0 = not asked",
    )
    anneal: Annotated[float, Field(gt=0, le=1)] = Field(
        0.6, description="share of a freeing after which the scales are exactly zero"
    )
    attempts: Count = Field(4, description="tries at freeing, each with a smaller share")
    shrink: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.7, description="what the share is multiplied by after a refused try"
    )
    server_batch: Annotated[int, Field(ge=2)] = Field(
        32, description="images a training step of prior, first freeing and distillation"
    )
    consolidate_lr: Positive = Field(
        0.015, description="learning rate of a consolidation (cosine over the rounds)"
    )
    consolidate_rounds: Count = Field(5, description="rounds of a consolidation")
    consolidate_epochs: Count = Field(2, description="local epochs of such a round")

    # growing (AOD)
    rounds: Count = Field(8, description="rounds of growing in a step")
    epochs: Count = Field(3, description="local epochs of such a round")
    average: Count = Field(
        3, description="last rounds of growing whose mean is the grown model; 1 = the last alone"
    )
    scope: Literal["rows", "group", "all"] = Field(
        "group", description="what a device may train while growing"
    )
    batch: Annotated[int, Field(ge=2)] = Field(16, description="images a device's training step")
    lr: Positive = Field(0.03, description="learning rate of growing (cosine over the rounds)")
    momentum: Share = Field(0.9, description="of SGD")
    weight_decay: NotNegative = Field(5e-4, description="of conv and linear weights")
    kd_weight: NotNegative = Field(0.3, description="lambda, weight of the distillation")
    kd_temperature: Positive = Field(2.0, description="T, softens both sides")
    kd_floor: Share = Field(0.3, description="least weight of an image in the distillation")
    kd_teacher: Literal["prior", "round", "none"] = Field(
        "prior", description="who teaches while growing: the prior, the round's first model, nobody"
    )
    adaptive: bool = Field(
        True, description="the distillation's weight follows image and round; else it is fixed"
    )
    device_rotations: NotNegative = Field(
        0.0, description="weight, on the devices, of telling how images are turned; twice the work"
    )
    ntd_weight: NotNegative = Field(0.0, description="weight of FedNTD's term")
    label_calibration: NotNegative = Field(
        1.0, description="how far a device's own label skew is taken out of its loss; 0 = not"
    )
    mask_absent: bool = Field(
        False, description="leave classes that a device lacks out of its cross-entropy"
    )
    prox: NotNegative = Field(0.0, description="mu of FedProx: pull to the round's first model")
    perturb_keep: Share = Field(
        1.0, description="what all weights are multiplied by at the begin of a step"
    )
    perturb_noise: NotNegative = Field(
        0.0, description="share of a fresh initialisation added to them there"
    )
    retention: Share = Field(
        0.9, description="agreement with the prior below which lambda is raised (no proxy)"
    )
    regrow: bool = Field(True, description="re-initialise the freed filters before growing")
    regrow_orthogonal: NotNegative = Field(0.4, description="share of the freed filters drawn so")
    regrow_kaiming: NotNegative = Field(0.2, description="share of the freed filters drawn so")
    regrow_xavier: NotNegative = Field(0.2, description="share of the freed filters drawn so")
    regrow_resample: NotNegative = Field(0.2, description="share of the freed filters drawn so")
    accept_drop: Share = Field(
        0.0,
        description="accepted loss of held-out accuracy by growing, beyond one standard error",
    )

    # shifts
    shift: Literal["auto", "statistics", "never"] = Field(
        "auto",
        description="whether other worlds and new classes are looked for and learnt apart; or all "
        "is learnt by class statistics",
    )
    statistics_head: Literal["lda", "ridge", "ncm"] = Field(
        "lda", description="the classifier that class statistics make"
    )
    statistics_features: Literal["all", "last"] = Field(
        "all", description="they are taken of every layer's channels, or of the classifier's input"
    )
    statistics_most: int = Field(
        150,
        ge=0,
        description="most features in what they say beside an expert's classifier; 0: all",
    )
    statistics_weight: NotNegative = Field(
        0.25,
        description="weight of class statistics beside an expert's own classifier; 0: not gathered",
    )
    world_gap: Annotated[float, Field(ge=0.5, le=1)] = Field(
        0.8, description="how often a gate must be right for images to be of another world"
    )
    expert_share: Share = Field(
        0.05, description="most that a world's expert may change, of the kept parameters"
    )
    expert_lr: Positive = Field(
        0.05, description="learning rate of an expert (cosine over the rounds)"
    )

    # rounds
    sample: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of the devices asked a round"
    )
    quorum: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="share of the asked that must answer"
    )
    min_devices: Whole = Field(
        0, description="devices without which no round begins; 0 = all of `devices`"
    )
    node_timeout: Positive = Field(120.0, description="seconds to wait for min-devices")
    round_timeout: Positive = Field(1800.0, description="seconds a round may take")
    repeats: Count = Field(3, description="tries at a round before the run is given up")

    # the wire
    codec_up: Codec = Field(
        "int8", description="how updates travel: fp32, fp16, or int8 to int2 with error feedback"
    )
    codec_down: Codec = Field("int8", description="how values travel to the devices: likewise")

    # the server's own data
    proxy: str = Field("", description="unlabelled images at the server; empty = none")
    proxy_size: Count = Field(1000, description="most images used of the proxy")
    distill_epochs: Count = Field(1, description="epochs of the server's distillation a round")
    distill_lr: Positive = Field(0.005, description="its learning rate")
    calibration: str = Field("", description="images that calibrate int8; empty = the proxy's")

    @model_validator(mode="after")
    def _together(self) -> Config:
        if self.share > self.cap:
            raise ValueError(f"share {self.share} is above cap {self.cap}: raise cap")
        if self.partition == "natural" and not self.column:
            raise ValueError("partition is 'natural' but column is empty: name the column")
        if self.freeing in ("steps", "never") and self.scope == "rows":
            raise ValueError(
                f"freeing is '{self.freeing}' but scope is 'rows', which trains freed filters: "
                "use scope 'group' or 'all'"
            )
        if self.min_devices > self.devices:
            raise ValueError(
                f"min-devices {self.min_devices} is above devices {self.devices}: lower it"
            )
        if self.regrow_orthogonal + self.regrow_kaiming + self.regrow_xavier <= 0 and (
            self.regrow_resample <= 0
        ):
            raise ValueError("all regrow shares are zero: make one positive")
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Config:
        """Check `values` (kebab-case or snake_case keys; strings are converted).

        Raises
        ------
        ConfigError
            Naming each wrong setting, its value and what is allowed, in one line.
        """
        known = set(cls.model_fields)
        unknown = sorted(k for k in values if k.replace("-", "_") not in known)
        if unknown:
            raise ConfigError(
                f"unknown setting '{unknown[0]}': `fallow settings` lists all of them"
            )
        try:
            return cls.model_validate({k.replace("-", "_"): v for k, v in values.items()})
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from None

    def flat(self) -> dict[str, Any]:
        """Return the settings with kebab-case keys, as Flower's run config wants them."""
        return self.model_dump(by_alias=True)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the settings that decide what comes out.

        Where and how fast it is computed does not count: a run may be resumed with other
        workers, time limits or tries.
        """
        dumped = self.model_dump(exclude=NOT_THE_RESULT)
        return hashlib.sha256(json.dumps(dumped, sort_keys=True).encode()).hexdigest()


NOT_THE_RESULT = {"workers", "node_timeout", "round_timeout", "repeats", "accelerator", "lean"}


def _explain(problem: Any) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0]).replace("_", "-")
    return f"{name} is {problem['input']!r}: {message[0].lower()}{message[1:]}"

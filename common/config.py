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
from common.schedule import Scope, schedule_of, scope_at

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
        False, description="scope rows: less than half the memory of a training step, for more time"
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
    validate_share: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.0,
        description="share of every world's training images that is tested on instead of its test "
        "images, which are then not looked at: for tuning",
    )
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
    free_from: Literal["all", "last"] = Field(
        "all",
        description="after a step: any filters, or some of those that the step has trained",
    )
    reserve: bool = Field(
        False,
        description="what was freed in the prior is handed out over the steps, a part each "
        "(freeing 'prior')",
    )
    cap: Annotated[float, Field(gt=0, le=0.9)] = Field(
        0.5, description="most that a layer may lose"
    )
    max_drop: Share = Field(
        0.005,
        description="accepted loss of held-out accuracy by freeing, up to a whole image",
    )
    drop_errors: NotNegative = Field(
        2.0,
        description="standard errors of its measurement on the devices that it may be above that",
    )
    freeing_epochs: Count = Field(50, description="epochs of the first freeing, at the server")
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
    scope: Scope = Field("group", description="what a device may train while growing")
    scope_schedule: str = Field(
        "", description="scopes in turn within a step, as group:6,all:6; empty = scope throughout"
    )
    kept_lr: Share = Field(
        0.0,
        description="factor on the learning rate of what the scope leaves alone; 0 = it stays",
    )
    peers: Annotated[int, Field(ge=1, le=4)] = Field(
        1,
        description="nets a device trains that teach one another, each with its own freed filters",
    )
    peer_weight: NotNegative = Field(1.0, description="of what peers learn from one another")
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
    ewc_weight: NotNegative = Field(
        0.0, description="pull of each weight to the prior, by what it matters to earlier data"
    )
    ewc_importance: Literal["fisher", "mas"] = Field(
        "fisher", description="how that is measured: Fisher information, or sensitivity (MAS)"
    )
    replay: Literal["none", "synthetic"] = Field(
        "none", description="images beside a device's own: none, or made of the prior by the server"
    )
    replay_weight: NotNegative = Field(
        1.0, description="weight, on these, of the distillation from the earlier model"
    )
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
    opinion_features: int = Field(
        775,
        ge=0,
        description="most features in what they say beside experts or a net that the devices "
        "trained; 0: all",
    )
    opinion_weight: NotNegative = Field(
        1.0,
        description="weight of class statistics beside the classifier of an expert or of the "
        "prior, half of it beside that of a net which the devices trained; 0: not gathered",
    )
    statistics_gap: Share = Field(
        0.05,
        description="how much more of the new images class statistics must get right than the "
        "prior, or than an expert, for a step to be learnt by them alone; 1: never",
    )
    statistics_images: int = Field(
        1000,
        ge=0,
        description="training images a class, over all devices, below which a step is learnt by "
        "them alone unless they are behind the prior by as much",
    )
    world_gap: Annotated[float, Field(ge=0.5, le=1)] = Field(
        0.8, description="how often a gate must be right for images to be of another world"
    )
    expert_gap: Annotated[float, Field(ge=0.5, le=1)] = Field(
        0.95,
        description="how often it must be right for such images to get an expert; else they are "
        "learnt by class statistics, if there are any of the prior",
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
    over_selection: Annotated[float, Field(ge=1, le=10)] = Field(
        1.0,
        description="devices asked for each answer that is wanted; with that many answers a round "
        "closes (above 1, who is used hangs on who is first)",
    )
    rest_after: Whole = Field(
        3, description="failures in a row after which a device rests; 0 = it never does"
    )
    rest_rounds: Count = Field(3, description="rounds that it rests")

    # which updates are used
    mean: Literal["weighted", "trimmed", "median", "krum"] = Field(
        "weighted",
        description="of the updates: by images, or one that some faulty ones cannot move",
    )
    faulty_share: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.3, description="share of the updates that 'trimmed' and 'krum' expect to be faulty"
    )
    norm_limit: NotNegative = Field(
        10.0, description="medians of a round that an update may be long; 0 = no limit"
    )
    count_limit: NotNegative = Field(
        1000.0, description="medians of a round that a device's images may be; 0 = no limit"
    )
    quarantine: Whole = Field(64, description="MiB of refused updates that are kept; 0 = none")

    # the wire
    codec_up: Codec = Field(
        "int8", description="how updates travel: fp32, fp16, or int8 to int2 with error feedback"
    )
    codec_down: Codec = Field("int8", description="how values travel to the devices: likewise")
    codec_consolidate: Codec = Field(
        "int3",
        description="the same of a consolidation, which moves the whole net; "
        "a direction that is fp32 stays so",
    )

    # privacy
    dp_clip: NotNegative = Field(
        0.0, description="largest L2 norm of a device's update, which is scaled to it; 0 = any"
    )
    dp_noise: NotNegative = Field(
        0.0, description="deviation of the noise on a device's update, in multiples of dp-clip"
    )

    # the server's own data
    proxy: str = Field("", description="unlabelled images at the server; empty = none")
    proxy_size: Count = Field(1000, description="most images used of the proxy")
    distill_source: Literal["none", "proxy", "synthetic"] = Field(
        "proxy",
        description="what the server distils each round's mean on: nothing, the proxy's images if "
        "there are any, or images that it makes of the prior",
    )
    synthetic_images: Annotated[int, Field(ge=2)] = Field(
        500, description="images that the server makes of the prior, where they are used"
    )
    synthetic_steps: Count = Field(100, description="steps of the optimisation that makes them")
    distill_epochs: Count = Field(1, description="epochs of the server's distillation a round")
    distill_lr: Positive = Field(0.005, description="its learning rate")
    calibration: str = Field("", description="images that calibrate int8; empty = the proxy's")

    # the operator's view
    checkpoint_store: str = Field(
        "", description="folder or fsspec URL of the checkpoints; empty = in the run's folder"
    )
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="port of the Prometheus metrics; 0 = none"
    )
    metrics_host: str = Field("127.0.0.1", description="address that they are served on")
    log: Literal["off", "text", "json"] = Field(
        "off", description="log on standard error, a line an event"
    )

    @model_validator(mode="after")
    def _together(self) -> Config:
        if self.share > self.cap:
            raise ValueError(f"share {self.share} is above cap {self.cap}: raise cap")
        if self.partition == "natural" and not self.column:
            raise ValueError("partition is 'natural' but column is empty: name the column")
        if self.scope_schedule:
            try:
                schedule_of(self.scope_schedule)
            except ValueError as error:
                raise ValueError(f"scope-schedule: {error}") from None
        if self.freeing in ("steps", "never") and "rows" in self.scopes:
            raise ValueError(
                f"freeing is '{self.freeing}' but scope is 'rows', which trains freed filters: "
                "use scope 'group' or 'all'"
            )
        if self.reserve and self.freeing != "prior":
            raise ValueError(
                f"reserve is true but freeing is '{self.freeing}': set freeing to 'prior', where "
                "the reserve comes from"
            )
        if self.kept_lr and "all" in self.scopes:
            raise ValueError(
                f"kept-lr is {self.kept_lr} but scope 'all' leaves nothing alone: use scope "
                "'group' or 'rows'"
            )
        if self.peers > 1:
            self._check_peers()
        if self.dp_noise and not self.dp_clip:
            raise ValueError(
                f"dp-noise is {self.dp_noise:g} but dp-clip is 0: noise is a multiple of it"
            )
        if self.dp_noise and self.shift != "never":
            raise ValueError(
                f"dp-noise is {self.dp_noise:g} but shift is '{self.shift}', which sends "
                "statistics of images without noise: use shift 'never'"
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

    def _check_peers(self) -> None:
        """Peers are single nets for everything but growing."""
        apart = {
            "freeing 'always' with regrow": self.freeing == "always" and self.regrow,
            "device-rotations 0": not self.device_rotations,
            "ewc-weight 0": not self.ewc_weight,
            "kept-lr 0": not self.kept_lr,
            "perturb-keep 1": self.perturb_keep == 1 and not self.perturb_noise,
            "replay 'none'": self.replay == "none",
            "no scope-schedule": not self.scope_schedule,
            "no distillation at the server": not self.distils,
            "kd-teacher 'prior' or 'none'": self.kd_teacher != "round",
        }
        for needed, there in apart.items():
            if not there:
                raise ValueError(f"peers is {self.peers}, which needs {needed}: set one of the two")

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """Scopes of a step's growing, in turn."""
        if not self.scope_schedule:
            return (self.scope,)
        return tuple(scope for scope, _ in schedule_of(self.scope_schedule))

    def scope_in(self, number: int) -> Scope:
        """Return the scope of round `number` (from 0) of growing; past the end, the last one."""
        if not self.scope_schedule:
            return self.scope
        return scope_at(schedule_of(self.scope_schedule), number, self.rounds)

    @property
    def distils(self) -> bool:
        """Whether the server distils each round's mean."""
        has_images = {"none": False, "proxy": bool(self.proxy), "synthetic": True}
        return has_images[self.distill_source]

    @property
    def synthesises(self) -> bool:
        """Whether the server makes images of the prior."""
        return "synthetic" in (self.replay, self.distill_source)

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

    def codecs(self, phase: str) -> tuple[Codec, Codec]:
        """Return how updates and values travel in a phase."""
        codecs = self.codec_up, self.codec_down
        if phase not in ("consolidate", "judge"):
            return codecs
        up, down = (c if c == "fp32" else self.codec_consolidate for c in codecs)
        return up, down

    def flat(self) -> dict[str, Any]:
        """Return the settings with kebab-case keys, as Flower's run config wants them."""
        return self.model_dump(by_alias=True)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the settings that decide what comes out.

        Where and how fast it is computed does not count: a run may be resumed with other
        workers, time limits or tries. Nor does a setting that came later and has its default:
        what was run before it was there stays the same run.
        """
        dumped = self.model_dump(exclude=NOT_THE_RESULT)
        for name in LATER:
            if dumped[name] == type(self).model_fields[name].default:
                del dumped[name]
        return hashlib.sha256(json.dumps(dumped, sort_keys=True).encode()).hexdigest()


NOT_THE_RESULT = {
    "workers",
    "node_timeout",
    "round_timeout",
    "repeats",
    "accelerator",
    "lean",
    "quarantine",
    "checkpoint_store",
    "metrics_port",
    "metrics_host",
    "log",
}

LATER = (
    "statistics_gap",
    "statistics_images",
    "expert_gap",
    "drop_errors",
    "validate_share",
    "free_from",
    "reserve",
    "scope_schedule",
    "kept_lr",
    "peers",
    "peer_weight",
    "distill_source",
    "ewc_weight",
    "ewc_importance",
    "replay",
    "replay_weight",
    "synthetic_images",
    "synthetic_steps",
    "over_selection",
    "rest_after",
    "rest_rounds",
    "mean",
    "faulty_share",
    "norm_limit",
    "count_limit",
    "dp_clip",
    "dp_noise",
    "cache_mib",
)
"""Settings that came later: at their default they do not change the digest, which draws depend on,
so that a run ends in the bytes that it always ended in."""


def _explain(problem: Any) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0]).replace("_", "-")
    return f"{name} is {problem['input']!r}: {message[0].lower()}{message[1:]}"

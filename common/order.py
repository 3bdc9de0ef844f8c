"""What the server asks of a device, and what the device answers.

Both travel as one JSON text beside at most two packed arrays: the base model (only to a device
that lacks it) and what changed since (see `common.update`). Everything is checked when it is read.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.codec import Codec
from common.distill import Distillation
from common.errors import UpdateError
from common.features import Layers
from common.filters import FreeSet
from common.regrow import Diversity

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Channels = dict[str, list[Annotated[int, Field(ge=0)]]]
Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Phase = Literal["look", "weigh", "grow", "tally", "advise", "consolidate", "judge", "anchor"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NetSpec(_Frozen):
    """What it takes to build the net and to feed it.

    `class_names` are in the order of the logits; a device that has labels of its own needs them.
    """

    name: str
    classes: int = Field(ge=1)
    input_shape: tuple[Size, Size, Size]
    width: float = Field(ge=0)
    mean: tuple[float, ...]
    std: tuple[Positive, ...]
    class_names: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _together(self) -> NetSpec:
        if len(self.class_names) not in (0, self.classes):
            raise ValueError(f"{len(self.class_names)} class_names for {self.classes} classes")
        return self


class Regrown(_Frozen):
    """How a device makes the base itself from a model it may hold."""

    source: Digest
    free: Channels
    seed: int
    diversity: tuple[float, float, float, float]
    others: list[int] = Field(default_factory=list)
    """Seeds of further peers: the base is then all of them (see `common.peers`)."""

    def rules(self) -> Diversity:
        """Return the shares of the re-initialisation rules."""
        return Diversity(*self.diversity)


class Teaching(_Frozen):
    """How labels and earlier models are learnt from (see `common.distill`).

    `teacher` is that of growing; a consolidation has teachers of its own.
    """

    weight: float = Field(ge=0)
    temperature: float = Field(gt=0)
    floor: float = Field(ge=0, le=1)
    ntd_weight: float = Field(ge=0)
    calibration: float = Field(ge=0)
    teacher: Literal["prior", "round", "none"]
    mask_absent: bool

    def distillation(self) -> Distillation:
        """Return the same for the losses."""
        return Distillation(self.weight, self.temperature, self.floor, self.ntd_weight)


class Order(_Frozen):
    """One round's work for one device.

    Attributes
    ----------
    phase : str
        ``look`` answers with statistics of the images (`common.gate`, `common.features`);
        ``grow`` and ``consolidate`` train; ``weigh`` measures the model and every filter's
        importance; ``tally`` answers with class statistics of the grown expert's features;
        ``judge`` measures the model; ``anchor`` answers with what each weight of the model matters
        to the images (`common.anchor`).
    base : str
        Digest of the model that the packed values refer to.
    regrown : Regrown or None
        How to make the base from another model.
    free : dict
        grow: the freed filters that are trained. consolidate, judge: those driven to zero.
    kept : dict
        consolidate: the filters whose removal leaves the kept part, the second teacher.
    layout : str or None
        Digest of the layout of the packed values.
    class_counts : list of int
        Training images of each class over all devices, as last reported; empty if unknown.
    keep : str or None
        Digest of the model that base and values make; the device keeps it as a later base.
    anneal : tuple of float
        consolidate: progress at the begin and at the end of this round, and where the scales
        reach zero.
    rotations : float
        Weight of telling how images are turned (see `common.rotation`).
    trunk : str or None
        Scope expert: digest of the model whose part without its free filters is the base.
    expert_share : float
        Scope expert: see `common.experts.expert_layout`.
    stem : str
        look: weights of the convolution to look through, float32 in base64.
    by_class : bool
        look: answer with statistics of the net's features by class, not with those of the stem.
    layers : str
        Which features these are (see `common.features.FeatureNet`).
    codec_up, codec_down : str
        How the update and the values travel; importances go in fp16 unless the update is ``fp32``.
    moved : str or None
        Digest of how far the values that the round begins with are from the base (see
        `common.update.Moved`); None where they equal the base's or come as they are.
    since : str or None
        Digest of the same of the round before, to which an array ``delta`` is the difference;
        None where that was the base.
    feedback : str or None
        Names the phase to whose updates the device adds what coding took from those before.
    anchor, replay : str or None
        Digests of the importances by which weights are pulled to the base (`common.anchor`), and
        of synthetic images to learn from beside the device's own (`common.replay`).
    rival : str or None
        tally: digest of a classifier of the trunk's features, to be measured beside the expert.
        advise: the same of the model's, with which the model is measured beside itself.
    opinion : float
        advise: weight of its scores beside the model's own logits.
    anchor_weight, replay_weight : float
        Of the two.
    spare : dict
        Filters that are off and stay so.
    full_rate, kept_lr : str or None, float
        The scope that trains at the full learning rate, and the factor on that of all else; None
        where all that is trained does.
    peer_weight : float
        Of what peers learn from one another.
    importance : str
        anchor: which importances (see `common.anchor.importances`).

    Fields that have a default are left out of the text that travels while they have it.
    """

    run: int
    step: int = Field(ge=0)
    phase: Phase
    attempt: int = Field(ge=0)
    round: int = Field(ge=0)
    net: NetSpec
    graph: Digest
    base: Digest
    regrown: Regrown | None
    free: Channels
    kept: Channels
    scope: Literal["rows", "group", "all", "expert"]
    layout: Digest | None
    keep: Digest | None
    epochs: int = Field(ge=0)
    batch: int = Field(ge=2)
    lr: float = Field(ge=0)
    momentum: float = Field(ge=0, le=1)
    weight_decay: float = Field(ge=0)
    prox: float = Field(ge=0)
    crop: int = Field(ge=0)
    flip: bool
    teaching: Teaching
    class_counts: list[Annotated[int, Field(ge=0)]]
    anneal: tuple[float, float, Positive]
    heldout: float = Field(gt=0, le=0.5)
    rotations: float = Field(ge=0)
    trunk: Digest | None
    expert_share: float = Field(ge=0, le=1)
    stem: str
    by_class: bool
    layers: Layers
    codec_up: Codec
    codec_down: Codec
    moved: Digest | None
    since: Digest | None
    feedback: Digest | None
    anchor: Digest | None = None
    rival: str | None = None
    opinion: float = Field(0.0, ge=0)
    anchor_weight: float = Field(0.0, ge=0)
    importance: Literal["fisher", "mas"] = "fisher"
    replay: Digest | None = None
    replay_weight: float = Field(0.0, ge=0)
    spare: Channels = Field(default_factory=dict)
    full_rate: Literal["rows", "group"] | None = None
    kept_lr: float = Field(0.0, ge=0, le=1)
    peer_weight: float = Field(0.0, ge=0)

    @property
    def peers(self) -> int:
        """How many nets the base is."""
        return 1 + (0 if self.regrown is None else len(self.regrown.others))

    def free_set(self) -> FreeSet:
        """Return `free` as a free set."""
        return as_free_set(self.free)

    @property
    def free_digest(self) -> str:
        """Digest of the free set, which an update has to name."""
        return self.free_set().digest


class Report(_Frozen):
    """A device's answer.

    Attributes
    ----------
    declined : str or None
        Why the device did not do what was asked; everything else is then zero.
    class_counts : list of int
        The training images by class; they sum to `images`.
    right, prior_right, both_right : int
        Held-out images that the received model, the base, and both of them get right.
    rival_right : int
        Held-out images that the order's rival classifier gets right.
    peer_right : list of int
        `right` of every peer, of which the first is the received model; empty without peers.
    epsilon : float or None
        What all noised updates of the device disclose of its images, at most (see README).
    """

    device: str
    declined: str | None = None
    run: int = 0
    step: int = 0
    phase: str = ""
    attempt: int = 0
    round: int = 0
    base: str = ""
    free_digest: str = ""
    layout: str | None = None
    images: int = Field(0, ge=0)
    class_counts: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    heldout: int = Field(0, ge=0)
    right: int = Field(0, ge=0)
    prior_right: int = Field(0, ge=0)
    both_right: int = Field(0, ge=0)
    rival_right: int = Field(0, ge=0)
    peer_right: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    loss: float = 0.0
    seconds: float = Field(0.0, ge=0)
    epsilon: float | None = Field(None, ge=0)


M = TypeVar("M", bound=BaseModel)

NEEDS_BASE = "needs base"
"""`Report.declined` of a device that lacks the base: the server sends it and asks again."""

NEEDS_VALUES = "needs values"
"""`Report.declined` of a device that lacks the values of the round before: likewise."""


def read_order(text: str) -> Order:
    """Read an order.

    Raises
    ------
    UpdateError
        Naming the first field that is wrong.
    """
    return _read(Order, text)


def read_report(text: str) -> Report:
    """Read a report.

    Raises
    ------
    UpdateError
        Naming the first field that is wrong.
    """
    return _read(Report, text)


def _read(kind: type[M], text: str) -> M:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        name = kind.__name__.lower() + (f" field '{where}'" if where else "")
        value = "" if first["type"] == "missing" else f" is {first['input']!r:.80}"
        raise UpdateError(f"{name}{value}: {first['msg']}") from None


def as_free_set(channels: Channels) -> FreeSet:
    """Return plain lists as a free set."""
    return FreeSet({name: tuple(indices) for name, indices in channels.items()})


def as_channels(free: FreeSet) -> Channels:
    """Return a free set as plain lists."""
    return {name: list(indices) for name, indices in free.channels.items()}

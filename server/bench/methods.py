"""What is compared: every method is a set of settings over one and the same client and server.

A method changes what the devices train and learn from, nothing else: prior model, partition,
sampling, rounds, local epochs, learning rate and augmentation are those of all.
``name@key=value+key=value`` is a variant of a method, for a search of its own settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import ConfigError

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A method by name.

    Attributes
    ----------
    settings : mapping
        What it changes in `common.config.Config`, in snake case.
    kind : {"rounds", "frozen", "central"}
        Rounds over the devices; the prior as it is; training on all data at one place.
    """

    name: str
    about: str
    settings: Settings
    kind: Literal["rounds", "frozen", "central"] = "rounds"


WHOLE: Settings = {
    "scope": "all",
    "freeing": "never",
    "shift": "never",
    "codec_up": "fp32",
    "codec_down": "fp32",
    "kd_teacher": "none",
    "label_calibration": 0.0,
}
"""Plain federated learning of the whole net: cross-entropy, nothing freed."""
INT8: Settings = {"codec_up": "int8", "codec_down": "int8"}

LAST: Settings = {"shift": "statistics", "statistics_features": "last"}

TRAINS: Settings = {"statistics_gap": 1.0}
"""No step of the old world is learnt by class statistics, which would hide what training does."""

_ALL = (
    Method("prior", "the prior model, never changed", {}, "frozen"),
    Method("fedavg", "FedAvg fine-tuning (McMahan et al., AISTATS 2017)", WHOLE),
    Method("fedprox", "FedAvg + proximal term (Li et al., MLSys 2020)", {**WHOLE, "prox": 0.01}),
    Method(
        "fedlwf",
        "FedAvg + KD from the prior on all images, T 2, weight 1 (Li & Hoiem, ECCV 2016)",
        {
            **WHOLE,
            "kd_teacher": "prior",
            "kd_weight": 1.0,
            "kd_temperature": 2.0,
            "adaptive": False,
        },
    ),
    Method(
        "fedewc",
        "FedAvg + elastic weight consolidation, Fisher of the prior's data at the server, of later "
        "data on the devices (Kirkpatrick et al., PNAS 2017)",
        {**WHOLE, "ewc_weight": 100.0},
    ),
    Method(
        "fedntd",
        "FedAvg + not-true KD from the round's model, T 1, weight 1 (Lee et al., NeurIPS 2022)",
        {
            **WHOLE,
            "kd_teacher": "round",
            "kd_weight": 0.0,
            "kd_temperature": 1.0,
            "ntd_weight": 1.0,
            "adaptive": False,
        },
    ),
    Method(
        "generative",
        "FedAvg + KD from the prior on images that the server makes of it without data (TARGET, "
        "Zhang et al., ICCV 2023; images as in DeepInversion, Yin et al., CVPR 2020)",
        {**WHOLE, "replay": "synthetic", "replay_weight": 1.0},
    ),
    Method(
        "shrink-perturb",
        "FedAvg from shrunk and perturbed weights (Ash & Adams, NeurIPS 2020)",
        {**WHOLE, "perturb_keep": 0.6, "perturb_noise": 0.1},
    ),
    Method(
        "fedavg-slim",
        "FedAvg with label calibration, then the same slimming as fallow's",
        {**WHOLE, "freeing": "steps", "regrow": False, "label_calibration": 1.0},
    ),
    Method("fedavg-int8", "FedAvg with int8 updates and values", {**WHOLE, **INT8}),
    Method(
        "fedavg-freed",
        "FedAvg from fallow's freed prior, which was trained for longer than the prior itself",
        {**WHOLE, "freeing": "prior", "regrow": False},
    ),
    Method(
        "lda",
        "LDA on the frozen prior's features, from class statistics (FeCAM, NeurIPS 2023)",
        {**WHOLE, **LAST},
    ),
    Method(
        "ridge",
        "ridge regression on them (Fed3R, Fani et al., ICML 2024)",
        {**WHOLE, **LAST, "statistics_head": "ridge"},
    ),
    Method(
        "ncm",
        "nearest class mean on them",
        {**WHOLE, **LAST, "statistics_head": "ncm"},
    ),
    Method(
        "lda-deep",
        "LDA as fallow has it, on every layer of the prior, which nobody has freed",
        {**WHOLE, "shift": "statistics"},
    ),
    Method(
        "statistics",
        "fallow that learns by class statistics alone, whatever shifts",
        {"shift": "statistics"},
    ),
    Method(
        "two-models",
        "a whole model for every world behind the same gate: an upper bound, twice the size",
        {
            **WHOLE,
            "shift": "auto",
            "expert_share": 1.0,
            "expert_gap": 0.5,
            "expert_lr": 0.03,
            "opinion_weight": 0.0,
        },
    ),
    Method(
        "trained",
        "fallow that trains on the devices also where it would learn by class statistics; so do "
        "the ablations below",
        TRAINS,
    ),
    Method(
        "random-mask",
        "fallow with any filters freed instead of the least important, as many a layer",
        {**TRAINS, "choice": "random", "max_drop": 1.0},
    ),
    Method("no-gate", "fallow that looks for no shift: one net for all", {"shift": "never"}),
    Method(
        "no-rotations",
        "fallow whose first freeing does not ask how images are turned",
        {**TRAINS, "rotations": 0.0},
    ),
    Method(
        "no-statistics",
        "fallow whose experts answer by their own classifiers alone",
        {"opinion_weight": 0.0},
    ),
    Method(
        "no-reinit",
        "fallow without re-initialisation of what is freed",
        {**TRAINS, "regrow": False},
    ),
    Method(
        "no-distillation",
        "fallow without a teacher while growing",
        {**TRAINS, "kd_teacher": "none"},
    ),
    Method(
        "no-calibration", "fallow without label calibration", {**TRAINS, "label_calibration": 0.0}
    ),
    Method(
        "no-consolidation", "fallow that frees in the prior alone", {**TRAINS, "freeing": "prior"}
    ),
    Method("rows", "fallow, scope rows", {**TRAINS, "scope": "rows"}),
    Method("group", "fallow, scope group", {**TRAINS, "scope": "group"}),
    Method("all", "fallow, scope all", {**TRAINS, "scope": "all"}),
    Method(
        "kept-moves",
        "fallow whose kept weights move a tenth as fast as the others, held by what they matter to "
        "earlier data (MAS, Aljundi et al., ECCV 2018); travels as scope all",
        {**TRAINS, "kept_lr": 0.1, "ewc_weight": 1.0, "ewc_importance": "mas"},
    ),
    Method("kept-moves-free", "the same, held by nothing", {**TRAINS, "kept_lr": 0.1}),
    Method(
        "widening",
        "fallow that trains scope group for half of a step's rounds, then all",
        {**TRAINS, "scope_schedule": "group:1,all:1"},
    ),
    Method(
        "peers",
        "fallow with two nets a device that teach one another (Zhang et al., CVPR 2018); twice "
        "the work and the bytes of growing",
        {**TRAINS, "peers": 2},
    ),
    Method(
        "synthetic-distillation",
        "fallow that distils each round's mean at the server, on images that it makes of the prior",
        {**TRAINS, "distill_source": "synthetic"},
    ),
    Method(
        "synthetic-replay",
        "fallow whose devices distil on such images, in growing and in consolidation",
        {**TRAINS, "replay": "synthetic"},
    ),
    Method(
        "free-last",
        "fallow that frees again only filters that the step has trained",
        {**TRAINS, "free_from": "last"},
    ),
    Method(
        "reserve",
        "fallow that frees half of the filters in the prior, hands them out step by step and frees "
        "nothing more",
        {**TRAINS, "freeing": "prior", "reserve": True, "share": 0.5},
    ),
    Method("fallow", "the defaults", {}),
    Method(
        "joint",
        "FedAvg on old and new data, both on the devices: an upper bound",
        {**WHOLE, "joint": True},
    ),
    Method("central", "old and new data trained from scratch at one place", {}, "central"),
)
METHODS = {method.name: method for method in _ALL}


def method_of(text: str) -> Method:
    """Return a method by its name, or a variant of it (``fedprox@prox=0.1``).

    Raises
    ------
    ConfigError
        If there is no such method, or the variant is malformed.
    """
    name, at, changes = text.partition("@")
    if name not in METHODS:
        raise ConfigError(f"methods names '{name}': use all, or some of {', '.join(METHODS)}")
    method = METHODS[name]
    if not at:
        return method
    pairs = [change.partition("=") for change in changes.split("+")]
    if not all(equals for _, equals, _ in pairs):
        raise ConfigError(f"methods has '{text}': write {name}@KEY=VALUE+KEY=VALUE")
    changed = {key.replace("-", "_"): value for key, _, value in pairs}
    return Method(text, f"{method.about}; {changes}", {**method.settings, **changed}, method.kind)


def methods_of(text: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list, checked; ``all`` (alone) is every method."""
    if text == "all":
        return tuple(METHODS)
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        method_of(name)
    return names

"""Settings: each is checked, converted, described, and told by name if it is wrong."""

import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.config import Config
from common.errors import ConfigError

NOT_THE_RESULT = {
    *("workers", "node_timeout", "round_timeout", "repeats", "accelerator", "lean"),
    *("quarantine", "checkpoint_store", "metrics_port", "metrics_host", "log"),
}

# Another good value for every setting whose type alone does not give one.
OTHERS: dict[str, Any] = {
    "channels": 3,
    "heldout": 0.2,
    "validate_share": 0.2,
    "share": 0.25,
    "cap": 0.6,
    "anneal": 0.5,
    "shrink": 0.5,
    "sample": 0.5,
    "quorum": 0.75,
    "faulty_share": 0.2,
    "max_drop": 0.01,
    "momentum": 0.8,
    "kd_floor": 0.1,
    "retention": 0.8,
    "accept_drop": 0.01,
    "perturb_keep": 0.5,
    "world_gap": 0.9,
    "statistics_gap": 0.1,
    "statistics_images": 100,
    "expert_gap": 0.99,
    "expert_share": 0.1,
    "kept_lr": 0.1,
    "scope_schedule": "group:1,all:1",
}


NEEDS: dict[str, dict[str, Any]] = {
    "reserve": {"freeing": "prior"},
    "dp_noise": {"dp_clip": 1.0, "shift": "never"},
}
"""Settings without which another has no meaning."""


def another(name: str) -> Any:
    """Return a good value for a setting that is not its default."""
    field = Config.model_fields[name]
    if name in OTHERS:
        return OTHERS[name]
    if choices := get_args(field.annotation):
        # "natural" needs a column, which is another setting.
        return next(c for c in choices if c not in (field.default, "natural"))
    default = field.default
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int | float) else default + "x"


"""Settings that another one does not go without."""


# ---------------------------------------------------------------- good values


def test_no_setting_is_needed() -> None:
    config = Config.parse({})
    assert config == Config()
    assert (config.net, config.data, config.scope, config.seed) == ("resnet8", "digits", "group", 0)


def test_every_setting_is_described_and_has_a_default_of_a_plain_type() -> None:
    for name, field in Config.model_fields.items():
        assert field.description, name
        assert len(field.description) > 3
        assert isinstance(field.default, bool | int | float | str), name
        assert field.alias == name.replace("_", "-")


@pytest.mark.parametrize("name", Config.model_fields)
def test_kebab_and_snake_case_and_text_mean_the_same(name: str) -> None:
    value, needed = another(name), NEEDS.get(name, {})
    expected = Config(**{name: value}, **needed)
    assert getattr(expected, name) == value != Config.model_fields[name].default
    assert Config.parse({name: value, **needed}) == expected
    assert Config.parse({name.replace("_", "-"): value, **needed}) == expected
    assert Config.parse({name.replace("_", "-"): str(value), **needed}) == expected


def test_flat_settings_are_kebab_case_and_give_the_same_again() -> None:
    config = Config.parse({"max-drop": 0.01, "part_size": 40, "flip": "false"})
    flat = config.flat()
    assert set(flat) == {name.replace("_", "-") for name in Config.model_fields}
    assert not [name for name in flat if "_" in name]
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
    assert Config.parse(flat) == config
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert (config.max_drop, config.part_size, config.flip) == (0.01, 40, False)


def test_flowers_run_config_has_every_setting_with_its_default() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    listed = project["tool"]["flwr"]["app"]["config"]
    assert {k: v for k, v in listed.items() if k not in ("out", "resume")} == Config().flat()


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        Config().share = 0.5


# ---------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("seed", -1, "greater than or equal to 0"),
        ("seed", "x", "valid integer"),
        ("seed", "1.5", "valid integer"),
        ("steps", 0, "greater than or equal to 1"),
        ("devices", 2.5, "valid integer"),
        ("amp", "perhaps", "valid boolean"),
        ("image-size", -8, "greater than or equal to 0"),
        ("channels", 2, "0, 1 or 3"),
        ("channels", "grey", "0, 1 or 3"),
        ("stream", "task", "'share' or 'class'"),
        ("partition", "random", "'iid', 'dirichlet', 'classes' or 'natural'"),
        ("alpha", 0, "greater than 0"),
        ("alpha", float("nan"), "finite"),
        ("alpha", "inf", "finite"),
        ("classes-per-device", 0, "greater than or equal to 1"),
        ("heldout", 0.6, "less than or equal to 0.5"),
        ("heldout", 0, "greater than 0"),
        ("crop", -2, "greater than or equal to -1"),
        ("width", -1, "greater than or equal to 0"),
        ("prior-lr", "fast", "valid number"),
        ("share", 0.95, "less than or equal to 0.9"),
        ("share", 0, "greater than 0"),
        ("max-drop", 1.5, "less than or equal to 1"),
        ("anneal", 0, "greater than 0"),
        ("shrink", 1, "less than 1"),
        ("scope", "everything", "'rows', 'group' or 'all'"),
        ("batch", 1, "greater than or equal to 2"),
        ("lr", float("inf"), "finite"),
        ("lr", -0.1, "greater than 0"),
        ("momentum", "nan", "finite"),
        ("weight-decay", -1, "greater than or equal to 0"),
        ("kd-temperature", 0, "greater than 0"),
        ("kd-floor", 2, "less than or equal to 1"),
        ("regrow-kaiming", -0.2, "greater than or equal to 0"),
        ("sample", 0, "greater than 0"),
        ("quorum", 1.01, "less than or equal to 1"),
        ("round-timeout", 0, "greater than 0"),
        ("proxy-size", 0, "greater than or equal to 1"),
        ("net", None, "valid string"),
    ],
)
def test_a_bad_value_is_told_with_name_value_and_what_is_allowed(
    name: str, value: Any, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.parse({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is {value!r}: ")
    assert allowed in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"share": 0.6}, "share 0.6 is above cap 0.5: raise cap"),
        ({"share": 0.4, "cap": 0.3}, "share 0.4 is above cap 0.3: raise cap"),
        ({"partition": "natural"}, "partition is 'natural' but column is empty: name the column"),
        ({"devices": 3, "min-devices": 4}, "min-devices 4 is above devices 3: lower it"),
        (
            {"freeing": "never", "scope": "rows"},
            "freeing is 'never' but scope is 'rows', which trains freed filters: use scope "
            "'group' or 'all'",
        ),
        (
            dict.fromkeys(
                (f"regrow-{r}" for r in ("orthogonal", "kaiming", "xavier", "resample")), 0
            ),
            "all regrow shares are zero: make one positive",
        ),
    ],
)
def test_settings_that_contradict_one_another_are_told(
    values: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.parse(values)
    assert str(caught.value) == expected


def test_settings_that_only_just_agree_are_taken() -> None:
    assert Config.parse({"share": 0.5, "cap": 0.5}).share == 0.5
    assert Config.parse({"partition": "natural", "column": "vendor"}).column == "vendor"
    assert Config.parse({"devices": 3, "min-devices": 3}).min_devices == 3
    alone = {f"regrow-{r}": 0 for r in ("orthogonal", "kaiming", "xavier")}
    assert Config.parse(alone).regrow_resample == 0.2


def test_all_bad_values_are_told_at_once_in_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.parse({"lr": 0, "scope": "x", "batch": 1})
    message = str(caught.value)
    assert all(f"{name} is " in message for name in ("lr", "scope", "batch"))
    assert message.count("; ") == 2
    assert "\n" not in message


@pytest.mark.parametrize("name", ["epoch", "Share", "kd--weight", "", "model-config", "digest"])
def test_an_unknown_setting_is_told_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^unknown setting '{name}': `fallow settings` lists"):
        Config.parse({"share": 0.3, name: 1})


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(sorted(Config.model_fields)),
    st.one_of(st.text(max_size=5), st.floats(), st.integers(), st.none(), st.booleans()),
)
def test_any_value_is_taken_or_refused_in_one_line(name: str, value: Any) -> None:
    try:
        config = Config.parse({name: value})
    except ConfigError as error:
        message = str(error)
    else:
        message = name.replace("_", "-")
        assert Config.parse(config.flat()) == config
    assert name.replace("_", "-") in message
    assert len(message.splitlines()) == 1


# ---------------------------------------------------------------- the digest


@pytest.mark.parametrize("name", Config.model_fields)
def test_the_digest_counts_what_decides_the_result_and_nothing_else(name: str) -> None:
    needed = NEEDS.get(name, {})
    changed, plain = Config(**{name: another(name)}, **needed), Config(**needed)
    assert changed != plain
    assert (changed.digest == plain.digest) == (name in NOT_THE_RESULT)


def test_settings_that_came_later_leave_the_digest_of_older_runs_alone() -> None:
    # of the settings before there were any of `_LATER`: what began then is the same run still
    assert Config().digest == "64c19a806187e91a400511d9a9cdb62d5aa8aae14f249efa15626cc4aa8f0121"


def test_the_digest_is_the_same_however_the_settings_were_given() -> None:
    one = Config.parse({"max-drop": "0.01", "seed": "3"})
    other = Config(seed=3, max_drop=0.01)
    assert one.digest == other.digest
    assert len(one.digest) == 64


def test_a_consolidation_has_a_codec_of_its_own_but_fp32_stays_fp32() -> None:
    config = Config(codec_up="int8", codec_down="fp16", codec_consolidate="int4")
    for phase in ("look", "grow", "weigh", "tally"):
        assert config.codecs(phase) == ("int8", "fp16")
    for phase in ("consolidate", "judge"):
        assert config.codecs(phase) == ("int4", "int4")
    plain = Config(codec_up="fp32", codec_down="int8", codec_consolidate="int4")
    assert plain.codecs("consolidate") == ("fp32", "int4")

"""``fallow``: each mistake ends in one clear line and its documented exit code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from fake_grid import DirectGrid
from PIL import Image

import server.run
from common import errors
from common.config import Config
from common.nets import WIDTHS
from server import simulate as engines
from server.cli import main
from server.files import locked
from server.run import conduct

TINY = [
    *("--net=resnet8", "--width=8", "--devices=2", "--steps=1", "--rounds=1"),
    *("--prior-size=120", "--part-size=80", "--set=prior-epochs=1", "--set=freeing-epochs=1"),
    "--set=statistics-gap=1",  # a prior so little trained falls behind its statistics
    *("--set=consolidate-rounds=1", "--set=epochs=1", "--set=consolidate-epochs=1"),
    *("--set=max-drop=1", "--set=accept-drop=1"),
]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Fallow = Callable[..., Ended]


@pytest.fixture
def fallow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Fallow:
    """The command line in this process, on devices in this process."""

    def direct(config: Config, out: Path, *, resume: bool, progress: Any, command: Any) -> Any:
        grid = DirectGrid(config, tmp_path / "cache")
        options = {"resume": resume, "progress": progress, "command": command}
        return conduct(grid, config, out, engine="inline", **options)

    monkeypatch.setattr(engines, "simulate_inline", direct)

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["fallow", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        told = capsys.readouterr()
        return Ended(int(end.value.code or 0), told.out, told.err)

    return call


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the input is found before any work is done."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the prior was trained before the input was checked")

    monkeypatch.setattr(server.run, "train_prior", refuse)


def told_in_one_line(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code, ended
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert ended.err.endswith("\n")
    for word in words:
        assert word in ended.err


# what it tells of itself


def test_help_names_every_command_and_option(fallow: Fallow) -> None:
    ended = fallow("--help")
    assert ended.code == 0
    for command in ("simulate", "settings", "nets"):
        assert command in ended.out
    ended = fallow("simulate", "--help")
    assert ended.code == 0
    for option in ("--data", "--net", "--steps", "--devices", "--alpha", "--rounds", "--scope"):
        assert option in ended.out
    for option in ("--out", "--seed", "--engine", "--proxy", "--resume", "--set"):
        assert option in ended.out


def test_every_setting_is_listed_with_its_default(fallow: Fallow, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ended = fallow("settings")
    assert ended.code == 0
    for name, field in Config.model_fields.items():
        assert name.replace("_", "-") in ended.out
        assert str(field.description)[:20] in ended.out


def test_every_net_is_listed(fallow: Fallow) -> None:
    ended = fallow("nets")
    assert ended.code == 0
    assert ended.out.split("\n")[: len(WIDTHS)] == list(WIDTHS)
    assert "module:function" in ended.out


def test_the_installed_command_works() -> None:
    command = [sys.executable, "-m", "server.cli", "nets"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resnet8" in done.stdout
    assert "torch" not in done.stderr


def test_every_error_has_an_exit_code_of_its_own() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.FallowError)
    ]
    codes = {kind.exit_code for kind in kinds}
    assert len(codes) == len(kinds)
    assert 0 not in codes
    assert codes.isdisjoint({130, 137, 143})


# a run


def test_a_run_ends_with_a_table_and_the_reports_path_and_is_resumed(
    fallow: Fallow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    ended = fallow("simulate", *TINY, "--out", out)
    assert ended.code == 0, ended
    assert "step 1" in ended.out.lower()
    assert str(out / "report.html") in ended.out.replace("\n", "")
    assert (out / "models" / "step-1" / "model.onnx").exists()
    assert f"fallow simulate {' '.join(TINY)}" in (out / "report.html").read_text()

    told_in_one_line(fallow("simulate", *TINY, "--out", out), 2, str(out), "--resume")
    assert fallow("simulate", *TINY, "--out", out, "--resume", "--workers=2").code == 0
    other = fallow("simulate", *TINY, "--out", out, "--resume", "--seed=9")
    told_in_one_line(other, 5, "another run", "seed 0 -> 9")


def test_ctrl_c_says_how_to_go_on(
    fallow: Fallow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engines, "simulate_inline", interrupted)
    ended = fallow("simulate", "--out", tmp_path / "out")
    assert ended.code == 130
    assert ended.err.strip() == "interrupted: go on with --resume"


# bad input


def test_an_unknown_option_or_a_missing_out_is_a_usage_error(fallow: Fallow) -> None:
    assert fallow("simulate", "--colour=red").code == 2
    ended = fallow("simulate", *TINY)
    assert ended.code == 2
    assert "--out" in ended.err
    assert fallow("frobnicate").code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--data=no/such/folder"], 3, ["no/such/folder"]),
        (["--net=resnet9"], 4, ["'resnet9'", "resnet8", "module:function"]),
        (["--net=no_such_module:net"], 4, ["no_such_module", "PYTHONPATH"]),
        (["--net=math:nothing"], 4, ["'nothing'"]),
        (["--width=8.5"], 4, ["width 8.5"]),
        (["--set", "colour=red"], 2, ["unknown setting 'colour'", "fallow settings"]),
        (["--set", "colour"], 2, ["--set is 'colour'", "KEY=VALUE"]),
        (["--set", "batch=1"], 2, ["batch is '1'", "greater than or equal to 2"]),
        (["--set", "batch=many"], 2, ["batch is 'many'"]),
        (["--share=0.6"], 2, ["share 0.6 is above cap 0.5"]),
        (["--share=nan"], 2, ["share"]),
        (["--alpha=0"], 2, ["alpha is 0"]),
        (["--steps=0"], 2, ["steps is 0"]),
        (["--scope=everything"], 2, ["scope is 'everything'", "rows"]),
        (["--engine=inlin"], 2, ["engine is 'inlin'", "inline or flower"]),
        (["--seed=-1"], 2, ["seed is -1"]),
        (["--devices=2000"], 2, ["lower devices"]),
        (["--prior-size=99999"], 2, ["prior"]),
        (["--part-size=99999"], 2, ["part"]),
        (["--prior=no/model.safetensors"], 5, ["no/model.safetensors", "is not there"]),
        (["--proxy=no/images"], 3, ["no/images"]),
        (["--calibration=no/images"], 3, ["no/images"]),
        (["--set", "accelerator=tpu"], 2, ["accelerator is 'tpu'"]),
        (["--set", "partition=natural"], 2, ["column is empty"]),
        (["--set", "partition=natural", "--set", "column=writer"], 3, ["writer"]),
        (["--set", "partition=classes", "--set", "classes-per-device=1"], 2, ["raise one"]),
    ],
)
def test_a_mistake_is_told_in_one_line_before_any_work(
    arguments: list[str],
    code: int,
    words: list[str],
    fallow: Fallow,
    tmp_path: Path,
    no_training: None,
) -> None:
    told_in_one_line(fallow("simulate", *TINY, *arguments, "--out", tmp_path / "out"), code, *words)


def test_a_cuda_device_that_is_not_there_is_told(fallow: Fallow, tmp_path: Path) -> None:
    ended = fallow("simulate", *TINY, "--set", "accelerator=cuda:7", "--out", tmp_path / "out")
    told_in_one_line(ended, 2, "cuda:7", "use cpu")


def folder_of_images(root: Path, count: int = 40) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


SMALL = ["--prior-size=30", "--part-size=40"]


def test_a_broken_image_is_named_before_any_work(
    fallow: Fallow, tmp_path: Path, no_training: None
) -> None:
    root = folder_of_images(tmp_path / "data")
    broken = sorted(root.glob("*/*.png"))
    for path in (broken[7], broken[-3]):
        whole = path.read_bytes()
        path.write_bytes(whole[:40])
        # all images are in use, so it lies in the prior's or in a part
        ended = fallow(
            "simulate", *TINY, "--data", root, "--prior-size=40", "--part-size=40",
            "--out", tmp_path / "out",
        )  # fmt: skip
        told_in_one_line(ended, 3, str(path))
        path.write_bytes(whole)


def test_a_folder_with_one_class_or_none_is_refused(
    fallow: Fallow, tmp_path: Path, no_training: None
) -> None:
    root = folder_of_images(tmp_path / "data")
    for path in (root / "dog").iterdir():
        path.unlink()
    ended = fallow("simulate", *TINY, *SMALL, "--data", root, "--out", tmp_path / "out")
    told_in_one_line(ended, 3, "cat")
    (tmp_path / "empty").mkdir()
    ended = fallow("simulate", *TINY, "--data", tmp_path / "empty", "--out", tmp_path / "out")
    told_in_one_line(ended, 3, str(tmp_path / "empty"))


def test_too_little_data_for_a_prior_is_refused(fallow: Fallow, tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "data")
    ended = fallow(
        "simulate", *TINY, "--prior-size=2", "--part-size=40", "--data", root, "--out",
        tmp_path / "out",
    )  # fmt: skip
    told_in_one_line(ended, 3, "prior-size")


NETS = {
    "without_bn": ("nn.Conv2d(c, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)", ["BatchNorm"]),
    "in_groups": (
        "nn.Conv2d(c, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), "
        "nn.BatchNorm2d(8)",
        ["group"],
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_a_net_that_cannot_be_freed_is_refused_by_name_and_reason(
    name: str,
    fallow: Fallow,
    tmp_path: Path,
    no_training: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body, words = NETS[name]
    (tmp_path / "nets_for_cli.py").write_text(
        "from torch import nn\n"
        f"def {name}(classes, in_channels):\n"
        "    c = in_channels\n"
        f"    return nn.Sequential({body}, nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(8, classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nets_for_cli", raising=False)
    arguments = [a for a in TINY if "width" not in a]
    ended = fallow("simulate", *arguments, f"--net=nets_for_cli:{name}", "--out", tmp_path / "out")
    told_in_one_line(ended, 4, *words)


# where it writes


def test_a_folder_that_cannot_be_written_is_told(
    fallow: Fallow, tmp_path: Path, no_training: None
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        told_in_one_line(fallow("simulate", *TINY, "--out", out), 7, str(out), "cannot write")


def test_a_full_disk_is_told_and_what_was_there_stays(
    fallow: Fallow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        ended = fallow("simulate", *TINY, "--out", out)
    told_in_one_line(ended, 7, "no space left for", "--resume")


def test_a_folder_that_another_run_uses_is_told(
    fallow: Fallow, tmp_path: Path, no_training: None
) -> None:
    out = tmp_path / "out"
    with locked(out):
        told_in_one_line(fallow("simulate", *TINY, "--out", out), 5, "another run works in")


def test_devices_that_cannot_answer_end_the_run_with_their_reason(
    fallow: Fallow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.rounds._PAUSE_SECONDS", 0.0)
    ended = fallow("simulate", *TINY, "--set", "lr=1e9", "--scope=all", "--out", tmp_path / "out")
    told_in_one_line(ended, 6, "fewer than 1 of 2 devices answered", "is nan", "--resume")

"""Whole runs on digits: what comes out, and that nothing is lost whatever happens in between."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fake_grid import DirectGrid
from locks import locked_elsewhere

import server.run
from common.config import Config
from common.data import split_holdout
from common.errors import ConfigError, DataError, DiskError, RoundError, StoreError
from common.filters import FreeSet, cut, is_off, parameter_count
from common.memory import Memory, assembled
from common.nets import build
from common.scenario import Scenario
from common.state import State, state_digest, write_state
from common.store import read_state_file, write_state_file
from server.plan import Plan
from server.progress import NullProgress, Progress
from server.publish import Published
from server.report import _problem
from server.run import conduct
from server.world import World

QUICK: dict[str, Any] = {
    "data": "digits",
    "net": "resnet8",
    "width": 8,
    "devices": 3,
    "steps": 1,
    "prior-size": 200,
    "part-size": 150,
    "partition": "iid",
    "prior-epochs": 4,
    "statistics-gap": 1,  # a prior so little trained falls behind its statistics
    "freeing-epochs": 2,
    "rounds": 2,
    "epochs": 1,
    "consolidate-rounds": 2,
    "consolidate-epochs": 1,
    "max-drop": 1.0,
    "accept-drop": 1.0,
}
FREEING = ["weigh", "consolidate", "consolidate", "judge"]
STEP = ["look", "grow", "grow", *FREEING, "tally", "advise"]


def quick(**settings: Any) -> Config:
    return Config.parse({**QUICK, **{k.replace("_", "-"): v for k, v in settings.items()}})


def play(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """One session on devices in this process; their cache is new unless it is given."""
    grid = DirectGrid(config, cache or out.parent / f"cache-{next(_numbers)}")
    return conduct(
        grid,
        config,
        out,
        engine="inline",
        resume=resume,
        progress=progress or NullProgress(),
        command="fallow simulate",
    )


_numbers = itertools.count()


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def models(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("models/*/*"))}


def summary_of(out: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return value


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step, never interrupted, really exported."""
    out = tmp_path_factory.mktemp("run") / "out"
    play(quick(), out)
    return out


def test_a_prior_far_behind_its_statistics_learns_by_them_alone(tmp_path: Path) -> None:
    play(quick(statistics_gap=0.05), tmp_path / "out")
    assert [line["phase"] for line in lines(tmp_path / "out")] == ["look", "look"]
    (step,) = summary_of(tmp_path / "out")["steps"]
    assert (step["way"], step["accepted"]) == ("classes", True)
    assert step["slim_accuracy"] > step["prior_accuracy"] + 0.05


def light(
    world: World,
    state: State,
    free: FreeSet,
    memory: Memory | None,
    step: int,
    folder: Path,
    parent: str | None,
) -> Published:
    """Publish without the seconds that an ONNX export takes."""
    net = build("resnet8", 10, 1, 8)
    write_state(net, state)
    slim = cut(net.eval(), world.plan.graph, free)
    write_state_file(folder / "model.safetensors", state)
    fp32 = {"path": "models/none.onnx", "bytes": 1, "max_abs_diff": 0.0}
    counts = parameter_count(net), parameter_count(slim)
    return Published(slim, state_digest(state), *counts, {"fp32": fp32, "int8": None}, 0.0)


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.run, "publish", light)


# what comes out


def test_a_run_leaves_all_its_files_and_no_others(plain: Path) -> None:
    files = {str(p.relative_to(plain)) for p in plain.rglob("*") if p.is_file()}
    kept = {name for name in files if not name.startswith("checkpoints/")}
    assert kept == {
        ".lock",
        "rounds.jsonl",
        "summary.json",
        "report.html",
        *(
            f"models/step-{step}/{name}"
            for step in (0, 1)
            for name in ("model.safetensors", "free.json", "memory.safetensors", "model.onnx")
        ),
    }
    assert len(list((plain / "checkpoints").glob("state-*.json"))) == 2


def test_every_round_is_a_line(plain: Path) -> None:
    rounds = lines(plain)
    assert [r["phase"] for r in rounds] == STEP
    assert all(_problem(r, "round") is None for r in rounds)
    assert all(r["devices_used"] == r["devices_asked"] == 3 for r in rounds)
    assert [r["scale"] for r in rounds if r["phase"] == "consolidate"] == [
        1.0,
        pytest.approx(1 / 6),
    ]


def test_the_summary_fits_its_schema_and_the_files_beside_it(plain: Path) -> None:
    summary = summary_of(plain)
    assert _problem(summary, "summary") is None
    assert (summary["status"], summary["error"]) == ("complete", None)
    (step,) = summary["steps"]
    rounds = lines(plain)
    training = [r for r in rounds if r["phase"] in ("grow", "consolidate")]
    for way in ("up", "down"):
        assert step[f"bytes_{way}"] == sum(r[f"bytes_{way}"] for r in rounds)
    whole = 4 * sum(t.numel() for t in build("resnet8", 10, 1, 8).state_dict().values())
    assert step["bytes_dense_fedavg"] == 2 * whole * sum(r["devices_used"] for r in training)
    assert step["heldout"]["grown"] == rounds[3]["heldout_accuracy"]
    assert step["heldout"]["consolidated"] == rounds[6]["heldout_accuracy"]
    assert set(step["seconds_by_phase"]) == {*STEP, "export"}
    assert summary["data"]["part_images"] == [150]
    assert summary["data"]["prior_images"] == 200
    assert summary["server_data"] == "none"
    assert np.array(summary["accuracy_matrix"]["values"]).shape == (2, 2)
    for name in ("acc", "bwt", "forgetting"):
        assert math.isfinite(summary[name])
    assert summary["settings"] == quick().flat()
    onnx_file = plain / step["onnx"]["fp32"]["path"]
    assert onnx_file.stat().st_size == step["onnx"]["fp32"]["bytes"]
    assert step["onnx"]["fp32"]["max_abs_diff"] <= 1e-4


def test_the_models_are_what_the_summary_says(plain: Path) -> None:
    summary = summary_of(plain)
    (step,) = summary["steps"]
    digests = []
    for number in (0, 1):
        folder = plain / "models" / f"step-{number}"
        state = read_state_file(folder / "model.safetensors")
        free = FreeSet.from_json((folder / "free.json").read_text())
        net = build("resnet8", 10, 1, 8)
        write_state(net, state)
        graph = plan_of(quick()).graph
        assert is_off(net, graph, free)
        assert not free.empty
        digests.append(state_digest(state))
    assert step["model_digest"] == digests[1]
    assert step["freed_share"] == free.share(graph)
    assert step["params_full"] == parameter_count(net)
    memory = Memory.from_state(read_state_file(folder / "memory.safetensors"))
    slim = assembled(net, graph, state, free, memory)
    assert step["params_slim"] == parameter_count(slim)
    assert parameter_count(cut(net, graph, free)) < step["params_full"]
    metadata = onnx.load(plain / "models" / "step-1" / "model.onnx").metadata_props
    told = {entry.key: entry.value for entry in metadata}
    assert (told["step"], told["digest"], told["parent"]) == ("1", digests[1], digests[0])


def plan_of(config: Config) -> Plan:
    return server.run.open_world(config).plan


def test_the_test_split_is_only_reported(plain: Path, tmp_path: Path, no_export: None) -> None:
    real = server.run.open_world
    changed = []

    def other_test(config: Config) -> World:
        world = real(config)
        assert world.test is not None
        shuffled = world.test.labels[::-1].copy()
        object.__setattr__(world.test, "labels", shuffled)
        changed.append(world)
        return world

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.run, "open_world", other_test)
        summary = play(quick(), tmp_path / "out")
    assert changed
    before = summary_of(plain)["steps"][0]
    assert summary["steps"][0]["model_digest"] == before["model_digest"]
    assert summary["steps"][0]["slim_accuracy"] != before["slim_accuracy"]


# sessions that end early


class Cut(Exception):  # noqa: N818 - stands for a power cut
    """The process ends here."""


class Killer(NullProgress):
    """Ends a session in its `after`-th finished round, before that round's checkpoint."""

    def __init__(self, after: int, how: type[BaseException]) -> None:
        self.left, self.how = after, how

    def round_done(self, record: dict[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.how


def test_a_run_that_is_killed_in_every_round_gives_the_same_bytes(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sessions = tmp_path / "out", 0
    real, published = server.run.publish, []

    def cut_after_export(*arguments: Any, **options: Any) -> Published:
        result = real(*arguments, **options)
        if arguments[4] == 1 and not published:
            published.append(result)
            raise Cut
        return result

    monkeypatch.setattr(server.run, "publish", cut_after_export)
    statuses = []
    while True:
        # each session plays the lost round again and is cut in the next one
        how = KeyboardInterrupt if sessions % 2 else Cut
        killer = Killer(1 if sessions == 0 else 2, how)
        try:
            summary = play(
                quick(), out, resume=sessions > 0, progress=killer, cache=tmp_path / "devices"
            )
        except (Cut, KeyboardInterrupt):
            sessions += 1
            interrupted = summary_of(out)
            statuses.append(interrupted["status"])
            assert interrupted["steps"] == []
            assert _problem(interrupted, "summary") is None
            assert (out / "report.html").exists()
            continue
        break
    assert sessions == len(STEP) + 1
    assert set(statuses) == {"failed", "interrupted"}
    assert models(out) == models(plain)
    assert [r["phase"] for r in lines(out)] == STEP
    assert unmeasured(summary) == unmeasured(summary_of(plain))
    for mine, other in zip(lines(out), lines(plain), strict=True):
        assert mine["heldout_accuracy"] == other["heldout_accuracy"]
        assert mine["train_loss"] == other["train_loss"]


def unmeasured(value: Any) -> Any:
    """A summary without what hangs on the clock, and without traffic: restarted devices may
    have lost their models."""
    if isinstance(value, dict):
        return {
            key: unmeasured(item)
            for key, item in value.items()
            if not any(word in key for word in ("seconds", "bytes"))
        }
    return [unmeasured(item) for item in value] if isinstance(value, list) else value


def test_devices_that_keep_their_models_are_sent_no_more_after_a_resume(
    plain: Path, tmp_path: Path, no_export: None
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    with pytest.raises(Cut):
        play(quick(), out, progress=Killer(3, Cut), cache=cache)
    with (out / "rounds.jsonl").open("a") as file:
        file.write('{"step": 1, "pha')  # a line that a power cut tore
    play(quick(), out, resume=True, cache=cache)
    for mine, other in zip(lines(out), lines(plain), strict=True):
        assert mine["bytes_up"] == pytest.approx(other["bytes_up"], abs=100)
        assert mine["bytes_down"] == other["bytes_down"]


def test_a_line_of_a_round_is_never_played_again(
    tmp_path: Path, no_export: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a checkpoint and its line, or in the middle of the line."""
    out, cache, real = tmp_path / "out", tmp_path / "cache", server.run._Conductor._append
    for half in (False, True):

        def cut(conductor: Any, line: str, half: bool = half) -> None:
            if half:
                with (out / "rounds.jsonl").open("a") as file:
                    file.write(line[:20])
            raise Cut

        monkeypatch.setattr(server.run._Conductor, "_append", cut)
        with pytest.raises(Cut):
            play(quick(), out, resume=half, cache=cache)
    monkeypatch.setattr(server.run._Conductor, "_append", real)
    summary = play(quick(), out, resume=True, cache=cache)
    assert summary["status"] == "complete"
    assert [r["phase"] for r in lines(out)] == STEP


def test_a_disk_that_fills_up_anywhere_loses_nothing(
    plain: Path, tmp_path: Path, no_export: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", os.replace
    failures: list[str] = []
    for allowed in itertools.count(3, 6):
        writes = itertools.count()

        def full(*arguments: Any, allowed: int = allowed, writes: Iterator[int] = writes) -> None:
            if next(writes) >= allowed:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(*arguments)

        monkeypatch.setattr(os, "replace", full)
        try:
            devices = tmp_path / "devices"  # what coding took from an update is kept there
            summary = play(quick(), out, resume=bool(failures), cache=devices)
        except DiskError as error:
            failures.append(str(error))
            continue
        break
    assert len(failures) >= 2
    assert all("no space left" in text and "--resume" in text for text in failures)
    assert summary["status"] == "complete"
    assert (
        unmeasured(summary)["steps"][0]["model_digest"]
        == (summary_of(plain)["steps"][0]["model_digest"])
    )
    assert len(lines(out)) == len(STEP)


def test_a_session_that_failed_says_why_in_its_summary(
    tmp_path: Path, no_export: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.rounds._PAUSE_SECONDS", 0.0)
    config = quick(lr=1e6, epochs=3, scope="all", repeats=1)
    with pytest.raises(RoundError, match="training loss is"):
        play(config, tmp_path / "out")
    summary = summary_of(tmp_path / "out")
    assert summary["status"] == "failed"
    assert "--resume" in summary["error"]
    assert "lower the learning rate" in summary["error"]
    assert (tmp_path / "out" / "models" / "step-0" / "model.safetensors").exists()


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(plain: Path) -> None:
    before, rounds = models(plain), lines(plain)
    modified = {p: p.stat().st_mtime_ns for p in plain.glob("models/*/*")}
    summary = play(quick(), plain, resume=True)
    assert summary["status"] == "complete"
    assert models(plain) == before
    assert {p: p.stat().st_mtime_ns for p in plain.glob("models/*/*")} == modified
    assert lines(plain) == rounds


def test_resume_in_an_empty_folder_begins_a_run(tmp_path: Path, no_export: None) -> None:
    assert play(quick(rounds=1), tmp_path / "out", resume=True)["status"] == "complete"


# folders that are taken


def test_a_second_run_into_the_same_folder_is_refused(plain: Path) -> None:
    before = summary_of(plain)
    with pytest.raises(ConfigError, match=rf"out is {plain}, which holds a run .* --resume"):
        play(quick(), plain)
    assert summary_of(plain) == before


def test_a_run_with_other_settings_is_not_resumed(plain: Path) -> None:
    before = summary_of(plain)
    with pytest.raises(StoreError, match=r"another run .*seed 0 -> 4"):
        play(quick(seed=4), plain, resume=True)
    assert summary_of(plain) == before


def test_a_folder_in_which_another_process_works_is_refused(plain: Path) -> None:
    with (
        locked_elsewhere(plain / ".lock"),
        pytest.raises(StoreError, match=f"another run works in {plain}"),
    ):
        play(quick(), plain, resume=True)
    assert play(quick(), plain, resume=True)["status"] == "complete"  # the lock ends with its owner


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot write"):
        play(quick(), tmp_path / "file" / "out")


# devices and settings of other kinds


def test_devices_that_have_one_class_each_work(tmp_path: Path, no_export: None) -> None:
    config = quick(
        devices=10, partition="classes", classes_per_device=1, part_size=300, consolidate_rounds=1
    )
    scenario = Scenario(config)
    assert {len(set(scenario.device(1, i).labels.tolist())) for i in range(10)} == {1}
    summary = play(config, tmp_path / "out")
    assert summary["status"] == "complete"
    assert all(r["devices_used"] == 10 for r in lines(tmp_path / "out"))


def test_a_device_with_too_few_images_is_left_out_and_the_run_goes_on(
    tmp_path: Path, no_export: None
) -> None:
    config = quick(
        devices=8, partition="dirichlet", alpha=0.05, part_size=60, heldout=0.4, seed=3, quorum=0.3
    )
    scenario = Scenario(config)
    training = [len(split_holdout(scenario.device(1, i), 0.4)[0]) for i in range(8)]
    poor = [n for n in training if n < 2]
    assert 0 < len(poor) < 4
    summary = play(config, tmp_path / "out")
    assert summary["status"] == "complete"
    for record in lines(tmp_path / "out"):
        assert record["devices_used"] == 8 - len(poor)
        assert record["declined"] == {
            f"{n} training image(s)": poor.count(n) for n in sorted(set(poor))
        }


def test_four_steps_in_a_row_free_the_same_share_each(
    tmp_path: Path, no_export: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = quick(steps=4, rounds=1, consolidate_rounds=1, prior_epochs=2, freeing_epochs=1)
    summary = play(config, tmp_path / "out")
    shares = [step["freed_share"] for step in summary["steps"]]
    costs = [step["freeing"]["attempts"][0]["drop"] for step in summary["steps"]]
    print(f"r_t {[round(s, 3) for s in shares]}, cost {[round(c, 3) for c in costs]}")
    assert len(shares) == 4
    assert set(shares) == {summary["prior"]["freed_share"]}
    assert shares[0] == pytest.approx(config.share, abs=0.1)
    # and it is a new share of the whole net every time, not the same filters
    free = [
        FreeSet.from_json(json.dumps(value["free"]))
        for value in json.loads(newest_state(tmp_path / "out"))["state"]["finished"]
    ]
    assert len({f.digest for f in free}) > 1
    assert len(summary["accuracy_matrix"]["values"]) == 5


def newest_state(out: Path) -> str:
    return max((out / "checkpoints").glob("state-*.json")).read_text()


def test_a_grown_model_that_is_worse_is_refused_and_the_prior_published_again(
    tmp_path: Path, no_export: None
) -> None:
    told: list[str] = []

    class Listening(NullProgress):
        def message(self, text: str) -> None:
            told.append(text)

    config = quick(
        prior_epochs=12,
        max_drop=1.0,
        accept_drop=0.0,
        lr=3.0,
        scope="all",
        kd_weight=0,
        rounds=1,
        opinion_weight=0.0,
    )
    summary = play(config, tmp_path / "out", progress=Listening())
    (step,) = summary["steps"]
    assert not step["accepted"]
    assert "the prior stands" in step["refusal"]
    assert any("step 1 refused" in text for text in told)
    assert step["freeing"] is None
    assert step["grown_accuracy"] < step["prior_accuracy"] == step["slim_accuracy"]
    out = tmp_path / "out" / "models"
    before, after = (read_state_file(out / f"step-{n}" / "model.safetensors") for n in (0, 1))
    assert state_digest(before) == state_digest(after) == step["model_digest"]
    assert [r["phase"] for r in lines(tmp_path / "out")] == ["look", "grow", "weigh"]


def test_a_brought_model_is_freed_on_the_devices_first(
    plain: Path, tmp_path: Path, no_export: None
) -> None:
    mine = tmp_path / "mine.safetensors"
    state = read_state_file(plain / "models" / "step-1" / "model.safetensors")
    write_state_file(mine, state)
    config = quick(prior=str(mine), norm_mean="0.3", norm_std="0.37")
    summary = play(config, tmp_path / "out")
    assert summary["prior"]["source"] == "brought"
    assert summary["prior"]["freed_share"] > 0.2
    assert [r["phase"] for r in lines(tmp_path / "out")] == [*FREEING, *STEP]
    assert {r["step"] for r in lines(tmp_path / "out")[:4]} == {0}
    assert summary["prior"]["attempts"][0]["accepted"]
    assert (tmp_path / "out" / "models" / "step-0" / "model.safetensors").exists()


def test_a_proxy_is_used_and_said(
    plain: Path, tmp_path: Path, no_export: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = play(quick(proxy="digits", proxy_size=64), tmp_path / "out")
    (step,) = summary["steps"]
    assert (summary["server_data"], summary["server_data_images"]) == ("proxy", 64)
    assert step["distillation"]["kind"] == "proxy"
    assert step["distillation"]["seconds"] > 0
    assert step["model_digest"] != summary_of(plain)["steps"][0]["model_digest"]
    assert set(step["distillation"]["lambda"]) == {0.3}


def test_the_servers_own_images_must_be_like_the_datas(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def saved(name: str, *shape: int) -> str:
        images = rng.integers(0, 255, shape, np.uint8)
        np.savez(tmp_path / name, images=images, labels=np.arange(len(images)) % 2)
        return str(tmp_path / name)

    wide = quick(data=saved("wide.npz", 400, 8, 12), prior_size=100, part_size=100)
    like, other = saved("like.npz", 30, 8, 12), saved("other.npz", 30, 8, 8)
    world = server.run.open_world(wide.model_copy(update={"proxy": like, "proxy_size": 20}))
    assert world.proxy is not None
    assert (len(world.proxy), world.proxy.shape) == (20, world.scenario.shape)
    assert world.calibration is world.proxy
    with pytest.raises(DataError, match=r"\[1, 8, 8\], the data has \[1, 8, 12\] .* proxy"):
        server.run.open_world(wide.model_copy(update={"proxy": other}))


@pytest.mark.parametrize("scope", ["rows", "all"])
def test_the_other_scopes_run_too_and_send_what_they_name(
    scope: str, plain: Path, tmp_path: Path, no_export: None
) -> None:
    play(quick(scope=scope), tmp_path / "out")
    mine, group = (lines(out)[1]["bytes_up"] for out in (tmp_path / "out", plain))
    assert mine < group if scope == "rows" else mine > group


def test_progress_is_told_everything_in_order(tmp_path: Path, no_export: None) -> None:
    told: list[tuple[Any, ...]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *arguments, **options: told.append((name, *arguments, *options.items()))

    progress = NullProgress()
    for name in ("plan", "phase", "round_done", "stage", "device_done"):
        setattr(progress, name, note(name))
    play(quick(), tmp_path / "out", progress=progress)
    phases = [t[1:5] for t in told if t[0] == "phase"]
    assert phases == [
        (1, 1, "look", 1),
        (1, 1, "grow", 2),
        (1, 1, "weigh", 1),
        (1, 1, "consolidate", 2),
        (1, 1, "judge", 1),
        (1, 1, "tally", 1),
        (1, 1, "advise", 1),
    ]
    assert next(t for t in told if t[0] == "plan")[1] == len(STEP)
    assert sum(t[0] == "round_done" for t in told) == len(STEP)
    assert sum(t[0] == "device_done" for t in told) == 3 * len(STEP)
    stages = [t[1] for t in told if t[0] == "stage"]
    assert stages[0] == "prior at the server"
    assert stages[-1] == "step 1: export"


def test_a_run_leaves_torchs_generator_alone(plain: Path, tmp_path: Path, no_export: None) -> None:
    torch.manual_seed(123)
    np.random.seed(5)
    summary = play(quick(), tmp_path / "out")
    assert summary["steps"][0]["model_digest"] == summary_of(plain)["steps"][0]["model_digest"]


@pytest.mark.parametrize("freeing", ["never", "prior", "steps"])
def test_a_run_that_frees_less_is_told_in_full(
    tmp_path: Path, no_export: None, freeing: str
) -> None:
    config = quick(freeing=freeing, scope="all", steps=2, max_drop=0.9)
    summary = play(config, tmp_path / "out")
    phases = [line["phase"] for line in lines(tmp_path / "out")]
    assert phases == (STEP if freeing == "steps" else ["look", "grow", "grow"]) * 2
    assert summary["status"] == "complete"
    assert _problem(summary, "summary") is None
    assert (summary["prior"]["freed_share"] > 0) == (freeing == "prior")
    for step in summary["steps"]:
        assert step["grown_accuracy"] is not None
        assert step["heldout"]["grown"] >= 0
        assert (step["freed_share"] > 0) == (
            freeing == "steps"
        )  # learnt, not free, after freeing in the prior


# shifts


@pytest.mark.parametrize(
    ("settings", "way", "phases"),
    [
        (
            {"worlds": "invert", "statistics_gap": 0.05},
            "classes",
            ["look", "look", "grow", "grow", "tally"],
        ),
        ({"worlds": "invert"}, "expert", ["look", "look", "grow", "grow", "tally"]),
        ({"stream": "class"}, "classes", ["look", "look"]),
    ],
)
def test_a_shift_is_found_learnt_and_exported_and_a_killed_run_ends_in_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    way: str,
    phases: list[str],
) -> None:
    if way == "expert":  # on digits class statistics are always better
        monkeypatch.setattr("client.local._rival", lambda order, trunk, graph, packed: trunk)
    config = quick(**settings)
    summary = play(config, tmp_path / "out")
    (step,) = summary["steps"]
    assert step["way"] == way
    assert [r["phase"] for r in lines(tmp_path / "out")] == phases
    assert step["accepted"]
    assert step["freeing"] is None
    assert step["slim_accuracy"] > step["prior_accuracy"] + 0.1
    assert step["onnx"]["fp32"]["max_abs_diff"] <= 1e-4
    again, cut_after = tmp_path / "again", itertools.chain([1], itertools.repeat(2))
    for session in range(len(phases)):
        killer = Killer(next(cut_after), Cut)
        with pytest.raises(Cut):
            play(config, again, resume=session > 0, progress=killer, cache=tmp_path / "devices")
    play(config, again, resume=True, cache=tmp_path / "devices")
    assert models(again) == models(tmp_path / "out")

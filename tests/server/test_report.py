"""The report of a run: what it says, that it says it honestly, and that it opens anywhere."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.errors import StoreError
from server.report import (
    MINUS,
    UNKNOWN,
    _times,
    duration,
    headline,
    notices,
    points,
    render_report,
    size,
    summary_table,
    write_report,
    write_summary,
)

FULL, SLIM = 308_490, 150_634


def sample_step(number: int, prior: float) -> dict[str, Any]:
    """One step of a run like the one that issue 2 asks for: better, and slim again."""
    grown = prior + 0.022
    return {
        "step": number,
        "prior_accuracy": prior,
        "grown_accuracy": grown,
        "slim_accuracy": grown - 0.004,
        "heldout": {"prior": prior - 0.01, "grown": grown - 0.008, "consolidated": grown - 0.013},
        "accepted": True,
        "refusal": None,
        "freed_share": 0.3,
        "requested_share": 0.3,
        "freeing": {
            "before": grown - 0.008,
            "after": grown - 0.012,
            "after_cut": grown - 0.012,
            "attempts": [{"share": 0.3, "drop": 0.004, "accepted": True}],
        },
        "params_full": FULL,
        "params_slim": SLIM,
        "bytes_up": 71_400_000,
        "bytes_down": 88_200_000,
        "bytes": {
            "grow": {"up": 51_200_000, "down": 66_100_000},
            "consolidate": {"up": 20_200_000, "down": 22_100_000},
        },
        "bytes_dense_fedavg": 316_000_000,
        "seconds": 312.4,
        "seconds_by_phase": {"grow": 190.2, "consolidate": 108.0, "export": 14.2},
        "rounds": 16,
        "distillation": {"kind": "none", "seconds": 0.0, "lambda": [0.5] * 10},
        "onnx": {
            "fp32": {
                "path": f"models/step-{number}/model.onnx",
                "bytes": 611_204,
                "max_abs_diff": 2.1e-6,
            },
            "int8": {
                "path": f"models/step-{number}/model.int8.onnx",
                "bytes": 178_411,
                "accuracy_fp32": grown - 0.004,
                "accuracy_int8": grown - 0.005,
                "agreement": 0.991,
                "latency_ms_fp32": 1.42,
                "latency_ms_int8": 0.86,
            },
        },
        "model_digest": f"sha256:{number:064x}",
    }


def sample_summary(steps: int = 2) -> dict[str, Any]:
    """A whole summary; each step starts where the one before it ended."""
    done: list[dict[str, Any]] = []
    for number in range(1, steps + 1):
        done.append(sample_step(number, done[-1]["slim_accuracy"] if done else 0.654))
    parts = ["prior", *(f"part {number}" for number in range(1, steps + 1))]
    return {
        "schema_version": 1,
        "status": "complete",
        "data": {
            "name": "cifar10",
            "path": "data/cifar10",
            "classes": [f"class {number}" for number in range(10)],
            "image_shape": [3, 32, 32],
            "train_images": 15_000,
            "test_images": 10_000,
            "prior_images": 5_000,
            "part_images": [5_000] * steps,
            "partition": "dirichlet",
            "alpha": 0.5,
            "devices": 8,
        },
        "net": {"name": "resnet8", "width": 32, "classes": 10},
        "seed": 0,
        "scope": "group",
        "engine": "inline",
        "server_data": "none",
        "server_data_images": 0,
        "versions": {
            "fallow": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "flwr": "1.41.0",
            "onnx": "1.23.2",
            "onnxruntime": "1.32.0",
            "numpy": "2.4.6",
        },
        "command": "fallow simulate --data data/cifar10 --net resnet8 --steps 2 --out run",
        "settings": {"rounds": 10, "max_drop": 0.005, "note": "<b>bold</b>", "steps": [1, 2]},
        "prior": {
            "accuracy_test": 0.66,
            "accuracy_heldout": 0.652,
            "before_freeing": 0.652,
            "after_freeing": 0.648,
            "after_cut": 0.648,
            "freed_share": 0.3,
            "requested_share": 0.3,
            "attempts": [{"share": 0.3, "drop": 0.004, "accepted": True}],
            "params_full": FULL,
            "params_slim": SLIM,
            "seconds": 118.0,
            "seconds_by_phase": {"train": 71.0, "sst": 47.0, "export": 3.5},
            "source": "trained",
        },
        "steps": done,
        "accuracy_matrix": {
            "parts": parts,
            "rows": ["prior", *(f"step {number}" for number in range(1, steps + 1))],
            "values": [
                [0.655 + 0.011 * row - 0.004 * column for column in range(steps + 1)]
                for row in range(steps + 1)
            ],
            "on": "held-out images of each part",
        },
        "acc": 0.673,
        "bwt": 0.008,
        "forgetting": -0.006,
        "seconds": 802.0,
    }


def sample_round(step: int, phase: str, number: int, accuracy: float) -> dict[str, Any]:
    late = number == 3
    trains = phase in ("grow", "consolidate")
    return {
        "step": step,
        "phase": phase,
        "attempt": 0,
        "round": number + 1,
        "devices_asked": 8,
        "devices_used": 7 if late else 8,
        "declined": {"no answer in time": 1} if late else {},
        "heldout_accuracy": accuracy,
        "train_loss": 0.9 / (number + 1) if trains else None,
        "agreement": 0.93,
        "lambda": 0.5,
        "bytes_up": 5_120_000,
        "bytes_down": 6_610_000,
        "seconds": 19.02,
        "scope": "group",
        "scale": 0.5 if phase == "consolidate" else None,
    }


def sample_rounds(steps: int = 2, grow: int = 10, consolidate: int = 6) -> list[dict[str, Any]]:
    rounds = []
    for step in range(1, steps + 1):
        base = 0.644 + 0.018 * (step - 1)
        for number in range(grow):
            rounds.append(sample_round(step, "grow", number, base + 0.022 * (1 - 0.6**number)))
        rounds.append(sample_round(step, "weigh", 0, base + 0.022))
        for number in range(consolidate):
            dip = 0.02 * number * (1.3 * consolidate - number) / consolidate**2
            rounds.append(sample_round(step, "consolidate", number, base + 0.022 - dip))
        rounds.append(sample_round(step, "judge", 0, base + 0.019))
    return rounds


def refuse(summary: dict[str, Any], number: int, reason: str) -> None:
    step = summary["steps"][number - 1]
    step |= {"accepted": False, "refusal": reason, "freeing": None, "onnx": None}
    step["heldout"] |= {"grown": step["heldout"]["prior"] - 0.02, "consolidated": None}
    step["slim_accuracy"] = step["prior_accuracy"]


def save(folder: Path, summary: dict[str, Any], rounds: list[dict[str, Any]]) -> None:
    write_summary(summary, folder / "summary.json")
    lines = [json.dumps(record) + "\n" for record in rounds]
    (folder / "rounds.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(sample_summary(), sample_rounds())


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that elements are closed in order."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def svgs(html: str) -> list[str]:
    return [f"<svg{part.split('</svg>')[0]}</svg>" for part in html.split("<svg")[1:]]


def text_of(table: Any, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


# The page


def test_the_headline_says_accuracy_size_and_traffic_in_one_sentence() -> None:
    assert headline(sample_summary()) == (
        "In 2 steps the model went from 66.0 % to 69.0 % test accuracy (+3.0 points); slimmed, it "
        "keeps 49 % of its parameters and is an ONNX file of 611 kB (178 kB in int8); devices and "
        "server exchanged 319 MB, 51 % of dense FedAvg's."
    )


def test_a_loss_is_called_a_loss() -> None:
    summary = sample_summary(1)
    summary["steps"][0]["slim_accuracy"] = 0.651
    assert f"from 66.0 % to 65.1 % test accuracy ({MINUS}0.9 points)" in headline(summary)
    assert any(
        f"{MINUS}0.3 points against the model before it" in text for _, text in notices(summary)
    )


def test_without_test_data_the_headline_speaks_of_held_out_data() -> None:
    summary = sample_summary(1)
    summary["prior"]["accuracy_test"] = None
    for name in ("prior_accuracy", "grown_accuracy", "slim_accuracy"):
        summary["steps"][0][name] = None
    assert "from 64.4 % to 66.3 % held-out accuracy (+1.9 points)" in headline(summary)
    assert "held-out" in render_report(summary, sample_rounds(1))


def test_the_page_is_well_formed_and_asks_the_network_for_nothing(page: str) -> None:
    tags = Tags(page)
    assert tags.open == []
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags.seen}
    for _, attributes in tags.seen:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in page
    assert "url(" not in page.replace("url(#", "")


def test_every_chart_is_there_once_and_takes_its_colours_from_the_page(page: str) -> None:
    charts = svgs(page)
    assert len(charts) == 4
    for chart in charts:
        ET.fromstring(chart)
        assert "var(--ink)" in chart
        assert "#a100" not in chart, "a stand-in colour was left"
    ids = [attributes["id"] for _, attributes in Tags(page).seen if "id" in attributes]
    assert len(ids) == len(set(ids)), "two charts share an id"


def test_the_same_run_gives_the_same_page(page: str) -> None:
    assert render_report(sample_summary(), sample_rounds()) == page
    assert "<metadata" not in page


def test_what_the_server_could_use_stands_before_the_first_table(page: str) -> None:
    top = page[: page.index("<table")]
    assert "Images the server could use" in top
    assert "none; before the run, 5,000 labelled ones" in " ".join(top.split())
    proxy = sample_summary() | {"server_data": "proxy", "server_data_images": 1000}
    assert "1,000 unlabelled (proxy)" in render_report(proxy, [])


def test_strings_of_a_run_are_shown_and_never_become_markup() -> None:
    evil = "<script>alert(1)</script>"
    summary = sample_summary()
    summary["data"] |= {"name": evil, "path": evil}
    summary["command"] = evil
    summary["settings"] = {evil: evil, "list": [evil]}
    refuse(summary, 2, evil)
    rounds = sample_rounds()
    rounds[0]["declined"] = {evil: 1}
    html = render_report(summary, rounds)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_matplotlib_is_loaded_only_to_draw() -> None:
    check = "import sys, server.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_drawing_leaves_matplotlibs_settings_alone(page: str) -> None:
    import matplotlib

    before = matplotlib.rcParams.copy()
    render_report(sample_summary(1), sample_rounds(1))
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules


# What must not be missed


def test_a_refused_step_says_why_and_the_prior_stands() -> None:
    summary = sample_summary()
    refuse(summary, 2, "held-out accuracy fell from 66.2 % to 64.2 %")
    (notice,) = notices(summary)
    assert notice == (
        "bad",
        "Step 2 was refused: held-out accuracy fell from 66.2 % to 64.2 %.",
    )
    assert "to 67.2 % test accuracy" in headline(summary)
    assert "refused" in text_of(summary_table(summary))
    assert notice[1] in render_report(summary, sample_rounds())


def test_a_freeing_that_shrank_is_told_and_its_attempts_are_listed() -> None:
    summary = sample_summary()
    summary["steps"][1]["freed_share"] = 0.2
    summary["steps"][1]["freeing"]["attempts"] = [
        {"share": 0.3, "drop": 0.021, "accepted": False},
        {"share": 0.2, "drop": 0.004, "accepted": True},
    ]
    rounds = sample_rounds()
    again = [r | {"attempt": 1} for r in rounds[-7:]]
    html = render_report(summary, rounds + again)
    assert [kind for kind, _ in notices(summary)] == ["note"]
    assert "Step 2: freeing shrank from 30 % of the filters to 20 %" in html
    assert "30.0 % (cost +2.1 points)" in html


def test_rounding_to_multiples_of_eight_is_no_shrinking() -> None:
    summary = sample_summary()
    summary["prior"]["freed_share"] = 0.281
    assert notices(summary) == []


def test_an_interrupted_run_has_a_report_of_what_was_finished() -> None:
    summary = sample_summary(1) | {"status": "interrupted"}
    html = render_report(summary, sample_rounds(2)[:25])
    assert "The run was interrupted, steps completed: 1." in html
    assert "--resume" in html
    assert "interrupted" in text_of(summary_table(summary))


def test_a_run_that_failed_before_its_prior_model_still_has_a_page() -> None:
    summary = sample_summary(0) | {"status": "failed", "error": "disk full", "prior": None}
    summary |= {"acc": None, "bwt": None, "forgetting": None}
    summary["accuracy_matrix"] |= {"parts": [], "rows": [], "values": []}
    html = render_report(summary, [])
    assert Tags(html).open == []
    assert "The run failed, steps completed: 0. disk full" in html
    assert "The run ended before there was a prior model." in html
    assert "cifar10" in text_of(summary_table(summary))


def test_a_run_without_steps_shows_its_prior_model() -> None:
    summary = sample_summary(0) | {"status": "interrupted", "bwt": None, "forgetting": None}
    html = render_report(summary, [])
    assert "the prior model stands at 66.0 % on test data" in html
    assert "What freeing filters cost" in html


def test_the_first_freeing_on_devices_is_shown_as_such() -> None:
    summary = sample_summary(1)
    summary["prior"] |= {"source": "brought", "accuracy_test": None}
    first = [r | {"step": 0} for r in sample_rounds(1)[10:]]
    html = render_report(summary, first + sample_rounds(1))
    assert "first freeing, weigh" in html
    assert "first freeing</text>" in html
    assert "moved 93.8 MB more, which is in none of these totals" in html
    assert "labelled ones to train the prior model" not in html


# The table in the terminal


def test_the_table_has_a_row_for_the_prior_model_and_one_for_each_step() -> None:
    lines = text_of(summary_table(sample_summary())).splitlines()
    assert [" ".join(line.split()) for line in lines[4:7]] == [
        "prior 66.0 30 % 49 % 118",
        "1 65.4 67.6 67.2 30 % 49 % 71.4 88.2 611 2e-06 312",
        "2 67.2 69.4 69.0 30 % 49 % 71.4 88.2 611 2e-06 312",
    ]


def test_the_table_fits_a_terminal_of_eighty_columns() -> None:
    text = text_of(summary_table(sample_summary()), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "2e-06" in text
    assert "…" not in text


def test_names_with_brackets_are_no_markup_in_the_terminal() -> None:
    summary = sample_summary()
    summary["data"]["name"] = "[red]set[/red]"
    assert "[red]set[/red]" in text_of(summary_table(summary))


# The files


def test_a_summary_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_summary(sample_summary(), tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == sample_summary()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.update(schema_version=2), "schema_version"),
        (lambda s: s.update(surprise=1), "surprise"),
        (lambda s: s.update(prior=None), "prior"),
        (lambda s: s["steps"][1].pop("bytes_up"), r"steps\[1\].*bytes_up"),
        (lambda s: s["steps"][0].update(grown_accuracy=67.6), r"steps\[0\].grown_accuracy"),
        (lambda s: s["steps"][0].update(accepted=False), r"steps\[0\].refusal"),
        (lambda s: s["steps"][0].update(freeing={}), r"steps\[0\].freeing"),
        (lambda s: s["steps"][0]["bytes"]["grow"].update(up=1.5), "bytes.grow.up"),
        (lambda s: s["accuracy_matrix"]["rows"].append("step 3"), "accuracy_matrix"),
        (lambda s: s.update(acc=float("nan")), "nan"),
    ],
)
def test_a_summary_that_does_not_fit_the_schema_is_never_written(
    tmp_path: Path, change: Any, named: str
) -> None:
    summary = sample_summary()
    change(summary)
    with pytest.raises(ValueError, match=named):
        write_summary(summary, tmp_path / "summary.json")
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_written_beside_the_files_of_the_run(tmp_path: Path, page: str) -> None:
    save(tmp_path, sample_summary(), sample_rounds())
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text("utf-8") == page


def test_a_record_that_a_crash_cut_off_is_passed_over(tmp_path: Path, page: str) -> None:
    save(tmp_path, sample_summary(), sample_rounds())
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"step": 2, "pha')
    write_report(tmp_path)
    assert (tmp_path / "report.html").read_text("utf-8") == page


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"summary\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize("line", ["{torn", '{"step": 1}'])
def test_a_bad_line_of_the_rounds_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    save(tmp_path, sample_summary(), sample_rounds()[:2])
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StoreError, match=r"rounds\.jsonl, line 3"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_summary_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(sample_summary() | {"schema_version": 9}))
    with pytest.raises(StoreError, match="not written by this version"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12 bytes"), (1_234, "1.23 kB"), (61_120, "61.1 kB"), (2e8, "200 MB"), (3e9, "3.00 GB")],
)
def test_sizes_have_three_digits(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.018, "+1.8 points"),
        (-0.018, f"{MINUS}1.8 points"),
        (-0.0004, "0.0 points"),
        (None, UNKNOWN),
    ],
)
def test_differences_are_signed_points(share: float | None, text: str) -> None:
    assert points(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.23, "1.2 s"), (42.0, "42 s"), (125, "2 min 5 s"), (9000, "2 h 30 min")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_page_tells_where_the_time_of_the_prior_and_of_every_step_went() -> None:
    summary = sample_summary(1)
    step = summary["steps"][0]
    step["seconds_by_phase"] = {"grow": 190.0, "weigh": 3.0, "consolidate": 108.0, "export": 14.0}
    step["distillation"] = {"kind": "proxy", "seconds": 40.0, "lambda": []}
    brought = {**sample_round(0, "consolidate", 0, 0.6), "seconds": 20.0}
    weighed = {**sample_round(0, "weigh", 0, 0.6), "seconds": 2.0}
    prior, first = _times(summary, [brought, weighed, *sample_rounds(1)])
    expected = {"train": 71.0, "sst": 67.0, "distillation": 0.0, "measuring": 2.0, "export": 3.5}
    assert prior == {"name": "Prior", **expected, "total": sum(expected.values())}
    expected = {"train": 150.0, "sst": 108.0, "distillation": 40.0, "measuring": 3.0}
    expected["export"] = 14.0
    assert first == {"name": "Step 1", **expected, "total": sum(expected.values())}
    html = render_report(summary, sample_rounds(1))
    assert "Where the time went" in html
    assert "<td>1 min 48 s</td><td>40 s</td><td>3.0 s</td><td>14 s</td>" in html


def test_refused_updates_abandoned_rounds_and_late_answers_are_in_the_report() -> None:
    admission = {
        "mean": "trimmed",
        "used": 70,
        "late": 5,
        "abandoned": 2,
        "refused": [{"device": "device-<7>", "reason": "it is not finite", "count": 3}],
    }
    text = render_report({**sample_summary(), "admission": admission}, sample_rounds())
    assert "averaged by the trimmed mean" in text
    assert "abandoned: 2" in text
    assert "round was over: 5" in text
    assert "device-&lt;7&gt;" in text
    assert "it is not finite" in text
    assert "Refused updates" not in render_report(sample_summary(), sample_rounds())


def test_what_noised_updates_disclose_is_in_the_report() -> None:
    privacy = {"epsilon": 3.25, "delta": 1e-5}
    text = render_report({**sample_summary(), "privacy": privacy}, sample_rounds())
    assert "epsilon 3.25 (delta 1e-05)" in text
    for plain in ({}, {"privacy": None}):
        text = render_report({**sample_summary(), **plain}, sample_rounds())
        assert "epsilon" not in text

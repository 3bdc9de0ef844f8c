"""A device's part of a phase: nothing frozen moves, the same order gives the same bytes."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import client.local as local
from client.bases import Bases
from client.local import Arrays, carry_out, net_and_graph
from common.accelerator import CPU
from common.data import ImageSet, Normalisation, open_source, split_holdout
from common.errors import UpdateError
from common.features import ClosedFormNet, Scores, class_sums
from common.filters import FilterGraph, FreeSet, cut, freed_index
from common.gate import stem_conv
from common.importance import bn_scale, choose, sensitivity, taylor
from common.layout import Layout, consolidation_layout, dense_layout, scope_layout
from common.order import NEEDS_BASE, NetSpec, Order, Regrown, Report, Teaching, as_channels
from common.regrow import Diversity, regrow
from common.sparsify import off_state, scale_and_shift
from common.state import State, read_state, state_digest, write_state
from common.train import Labelled, predict
from common.twin import Twin

SPEC = NetSpec(name="resnet8", classes=10, input_shape=(1, 8, 8), width=8, mean=(0.3,), std=(0.4,))
DIVERSITY = Diversity()
TEACHING = Teaching(
    weight=0.3,
    temperature=2.0,
    floor=0.3,
    ntd_weight=0.1,
    calibration=1.0,
    teacher="prior",
    mask_absent=False,
)
SEED = 11


@dataclass
class Own:
    """Images of a device that remembers which step it was asked for."""

    images: ImageSet
    name: str = "camera-1"
    asked: int | None = None

    @property
    def device(self) -> str:
        return self.name

    def split(self, order: Order) -> tuple[ImageSet, ImageSet]:
        self.asked = order.step
        return split_holdout(self.images, order.heldout)


@dataclass(frozen=True)
class World:
    graph: FilterGraph
    prior: State
    free: FreeSet
    base: State
    next_free: FreeSet

    def layout(self, order: Order) -> Layout:
        if order.phase in ("grow", "weigh"):
            return scope_layout(order.scope, self.graph, order.free_set(), self.base)
        return consolidation_layout(self.graph, order.free_set(), self.base)

    def order(self, phase: str = "grow", **changes: Any) -> Order:
        growing = phase in ("grow", "weigh")
        regrown = Regrown(
            source=state_digest(self.prior),
            free=as_channels(self.free),
            seed=SEED,
            diversity=DIVERSITY.shares(),
        )
        order = Order(
            run=0,
            step=3,
            phase=phase,
            attempt=1,
            round=2,
            net=SPEC,
            graph=self.graph.digest,
            base=state_digest(self.base),
            regrown=regrown if growing else None,
            free=as_channels(self.free if growing else self.next_free),
            kept=as_channels(self.free),
            scope="group",
            layout=None,
            keep=None,
            epochs=2,
            batch=16,
            lr=0.05,
            momentum=0.9,
            weight_decay=5e-4,
            prox=0.0,
            crop=1,
            flip=False,
            teaching=TEACHING,
            class_counts=[],
            anneal=(0.2, 0.4, 0.6),
            heldout=0.2,
            rotations=0.0,
            trunk=None,
            expert_share=0.0,
            stem="",
            by_class=False,
            layers="all",
            codec_up="fp32",
            codec_down="fp32",
            moved=None,
            since=None,
            feedback=None,
        ).model_copy(update=changes)
        return order.model_copy(update={"layout": self.layout(order).digest})


@pytest.fixture(scope="module")
def world() -> World:
    torch.manual_seed(0)
    net, graph = net_and_graph(SPEC)
    free = choose(graph, bn_scale(net, graph), 0.3)
    state = {k: v + 0.01 * torch.rand_like(v) for k, v in read_state(net).items()}
    prior = off_state(state, graph, free)
    base = regrow(prior, graph, free, seed=SEED, diversity=DIVERSITY)
    rng = np.random.default_rng(0)
    scores = {layer.name: rng.random(layer.width) for layer in graph.layers}
    return World(graph, prior, free, base, choose(graph, scores, 0.3))


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return open_source("digits").take(np.arange(80))


@pytest.fixture
def bases(world: World, tmp_path: Path) -> Bases:
    held = Bases(tmp_path)
    held.put(world.prior)
    return held


@pytest.fixture
def do(images: ImageSet, bases: Bases) -> Callable[..., tuple[Report, np.ndarray | None]]:
    def call(order: Order, arrays: Arrays | None = None, **changes: Any) -> Any:
        data = changes.get("data") or Own(images)
        return carry_out(order, arrays or Arrays(), data, changes.get("bases", bases), CPU)

    return call


Do = Callable[..., tuple[Report, np.ndarray]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """The net's whole state after every training on the device."""
    seen: list[State] = []
    real = local._train

    def watching(order: Order, net: nn.Module, *arguments: Any) -> Any:
        result = real(order, net, *arguments)
        seen.append(read_state(net))
        return result

    monkeypatch.setattr(local, "_train", watching)
    return seen


def same(report: Report) -> dict[str, Any]:
    """What of a report must be repeatable."""
    return report.model_dump(exclude={"seconds"})


def packed(world: World, order: Order, seed: int = 0) -> np.ndarray:
    """Values that an earlier round might have come to."""
    layout = world.layout(order)
    rng = np.random.default_rng(seed)
    factor = 1 + 0.05 * rng.random(layout.size)
    return (layout.pack(world.base) * factor).astype(np.float32)


# growing


@pytest.mark.parametrize("scope", ["rows", "group", "all"])
def test_only_what_the_scope_names_moves_on_the_device(
    scope: str, world: World, do: Do, trained: list[State]
) -> None:
    order = world.order(scope=scope)
    report, update = do(order)
    layout = world.layout(order)
    (after,) = trained
    assert state_digest(after) == state_digest(layout.unpack(world.base, update))
    for entry in layout.entries:  # and all that may move does: weights, scales, statistics
        moved = entry.read(after[entry.tensor]) != entry.read(world.base[entry.tensor])
        assert moved.any(), entry.tensor
    assert report.images == 80 - report.heldout
    assert np.isfinite(report.loss)


def test_with_rows_the_prior_is_the_kept_part_of_the_grown_model(world: World, do: Do) -> None:
    order = world.order(scope="rows")
    values = packed(world, order)
    _, update = do(order, Arrays(values=values))
    layout = world.layout(order)
    grown = layout.unpack(world.base, update)
    parts = []
    for model in (world.prior, grown):
        net = net_and_graph(SPEC)[0]
        write_state(net, model)
        parts.append(read_state(cut(net, world.graph, world.free)))
    assert state_digest(parts[0]) == state_digest(parts[1])
    assert state_digest(grown) != state_digest(world.base)
    # and what the server unpacks is bit-identical wherever the free set is not
    freed = freed_index(world.graph, world.free)
    for name, tensor in grown.items():
        mask = np.ones(tensor.shape, bool)
        mask[freed.own.get(name, [])] = False
        if name == f"{world.graph.head}.weight":
            mask[:, freed.out[name]] = False
        assert tensor.numpy()[mask].tobytes() == world.base[name].numpy()[mask].tobytes()


@pytest.mark.parametrize(
    "change", [{}, {"prox": 0.1}, {"kept": {}}, {"teaching": {"teacher": "round"}}], ids=str
)
def test_a_twin_learns_what_the_masked_net_does(
    change: dict[str, Any], world: World, do: Do, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "teaching" in change:
        change = {"teaching": TEACHING.model_copy(update=change["teaching"])}
    order = world.order(scope="rows", epochs=1, lr=0.01, **change)
    split: list[Any] = []
    real = local._twin
    monkeypatch.setattr(local, "_twin", lambda *args: split.append(real(*args)) or split[-1])
    report, update = do(order)
    _, again = do(order)
    assert again.tobytes() == update.tobytes()
    assert all(isinstance(twin, Twin) for twin in split)
    monkeypatch.setattr(local, "_twin", lambda *_: None)
    expected, masked = do(order)
    np.testing.assert_allclose(update, masked, rtol=1e-5, atol=1e-5)
    assert report.loss == pytest.approx(expected.loss, rel=1e-5)


def test_a_device_short_of_memory_or_with_much_of_it_learns_the_same(
    world: World, images: ImageSet, bases: Bases, caplog: pytest.LogCaptureFixture
) -> None:
    def update(crop: int, **thrift: Any) -> np.ndarray:
        order = world.order(scope="rows", lr=0.01, crop=crop)
        accelerator = replace(CPU, **thrift)
        found = carry_out(order, Arrays(), Own(images), bases, accelerator)[1]
        assert found is not None
        return found

    expected = update(0)
    assert update(0, lean=True).tobytes() == expected.tobytes()
    np.testing.assert_allclose(update(0, cache_mib=64), expected, rtol=1e-5, atol=1e-5)
    assert "not cached" not in caplog.text
    assert update(1, cache_mib=64).tobytes() == update(1).tobytes()
    assert "kept activations are not cached: crops (1) do not come again" in caplog.text


@pytest.mark.parametrize(
    ("change", "regrown", "message"),
    [
        ({"rotations": 1.0}, True, "a twin has no features"),
        ({"regrown": None}, False, "kept filters read freed ones in 'layer1.0.conv1.weight'"),
    ],
)
def test_what_a_twin_cannot_do_is_done_by_masks_and_said(
    change: dict[str, Any],
    regrown: bool,
    message: str,
    world: World,
    do: Do,
    bases: Bases,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not regrown:
        world = replace(world, base={k: v + 0.01 for k, v in world.base.items()})
        bases.put(world.base)
    _, update = do(world.order(scope="rows", **change))
    assert message in caplog.text
    assert np.isfinite(update).all()


def test_layers_without_a_freed_filter_stay_as_they_are_to_the_bit(
    world: World, do: Do, trained: list[State]
) -> None:
    free = FreeSet({"layer2.0.conv2": world.free.channels["layer2.0.conv2"]})
    base = regrow(world.prior, world.graph, free, seed=SEED, diversity=DIVERSITY)
    few = replace(world, free=free, base=base)
    do(few.order(scope="rows"))
    touched = freed_index(world.graph, free)
    names = {*touched.own, "fc.weight"} & base.keys()
    changed = {name for name in base if not trained[0][name].equal(base[name])}
    assert changed <= names
    assert "layer2.0.bn2.running_mean" in changed
    assert "bn1.running_mean" not in changed


def test_training_lowers_the_loss(world: World, do: Do) -> None:
    losses = [do(world.order(scope="all", epochs=epochs))[0].loss for epochs in (1, 12)]
    assert losses[1] < 0.7 * losses[0]


def test_the_same_order_gives_the_same_bytes_whatever_was_drawn_before(
    world: World, do: Do
) -> None:
    order = world.order()
    first, update = do(order)
    torch.manual_seed(99)
    np.random.seed(99)
    state = torch.get_rng_state()
    again, other = do(order)
    assert torch.equal(torch.get_rng_state(), state)
    assert other.tobytes() == update.tobytes()
    assert same(first) == same(again)


@pytest.mark.parametrize("change", [{"round": 3}, {"attempt": 2}, {"run": 1}, {"step": 4}])
def test_another_round_attempt_run_or_step_draws_anew(
    change: dict[str, int], world: World, do: Do
) -> None:
    _, update = do(world.order())
    _, other = do(world.order(**change))
    assert other.tobytes() != update.tobytes()


def test_devices_of_other_names_draw_other_batches(world: World, do: Do, images: ImageSet) -> None:
    order = world.order()
    one, two = (do(order, data=Own(images, name))[1] for name in ("camera-1", "camera-2"))
    assert one.tobytes() != two.tobytes()


def test_the_report_answers_the_order_and_counts_what_the_net_gets_right(
    world: World, do: Do, images: ImageSet
) -> None:
    order = world.order()
    values = packed(world, order)
    data = Own(images)
    report, update = do(order, Arrays(values=values), data=data)
    assert data.asked == order.step
    asked = ("run", "step", "phase", "attempt", "round", "base", "free_digest", "layout")
    assert {name: getattr(report, name) for name in asked} == {
        name: getattr(order, name) for name in asked
    }
    assert report.device == "camera-1"
    assert report.declined is None
    assert update.dtype == np.float32
    kept, held = split_holdout(images, order.heldout)
    assert (report.images, report.heldout) == (len(kept), len(held))
    assert report.heldout > 5
    labelled = Labelled.of(held, Normalisation(SPEC.mean, SPEC.std))
    right = []
    for model in (world.layout(order).unpack(world.base, values), world.base):
        net = net_and_graph(SPEC)[0]
        write_state(net, model)
        right.append(predict(net.eval(), labelled.x).argmax(1) == labelled.y)
    assert report.right == int(right[0].sum())
    assert report.prior_right == int(right[1].sum())
    assert report.both_right == int((right[0] & right[1]).sum())


# consolidating


def test_a_consolidation_drives_the_scales_on_and_sends_all_the_rest(
    world: World, do: Do, trained: list[State], bases: Bases
) -> None:
    bases.put(world.base)
    order = world.order("consolidate")
    _, update = do(order)
    (after,) = trained
    layout = world.layout(order)
    freed = freed_index(world.graph, world.next_free).own
    scales = scale_and_shift(world.graph) & freed.keys()
    for name in scales:
        expected = world.base[name][freed[name]] * (1 - 0.4 / 0.6)
        assert after[name][freed[name]].equal(expected)
    sent = layout.unpack(world.base, update)
    for name, tensor in after.items():
        mask = np.ones(tensor.shape, bool)
        if name in scales:
            mask[freed[name]] = False
        assert tensor.numpy()[mask].tobytes() == sent[name].numpy()[mask].tobytes()
    assert layout.size == dense_layout(world.graph, world.base).size - sum(
        len(freed[name]) for name in scales
    )


@pytest.mark.parametrize(
    ("anneal", "zero"),
    [((0.5, 0.7, 0.6), True), ((0.8, 1.0, 1.0), True), ((0.6, 0.8, 1.0), False)],
)
def test_at_the_end_of_the_anneal_the_scales_are_exactly_zero(
    anneal: tuple[float, float, float],
    zero: bool,
    world: World,
    do: Do,
    trained: list[State],
    bases: Bases,
) -> None:
    bases.put(world.base)
    do(world.order("consolidate", anneal=anneal))
    freed = freed_index(world.graph, world.next_free).own
    for name in scale_and_shift(world.graph) & freed.keys():
        scales = trained[0][name][freed[name]]
        assert scales.equal(torch.zeros_like(scales)) is zero


def test_the_first_freeing_of_a_brought_model_has_one_teacher(
    world: World, do: Do, bases: Bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases.put(world.base)
    teachers: list[int] = []
    real = local.multi_step_objective

    def counting(nets: list[nn.Module], *others: Any) -> Any:
        teachers.append(len(nets))
        return real(nets, *others)

    monkeypatch.setattr(local, "multi_step_objective", counting)
    do(world.order("consolidate"))
    do(world.order("consolidate", kept={}))
    do(world.order("grow"))
    assert teachers == [2, 1, 1]


# measuring


def test_weighing_scores_every_filter_by_both_measures(
    world: World, do: Do, images: ImageSet, trained: list[State]
) -> None:
    order = world.order("weigh")
    values = packed(world, order)
    report, scores = do(order, Arrays(values=values))
    assert trained == []
    assert report.loss == 0.0
    net = net_and_graph(SPEC)[0]
    write_state(net, world.layout(order).unpack(world.base, values))
    kept, _ = split_holdout(images, order.heldout)
    data = Labelled.of(kept, Normalisation(SPEC.mean, SPEC.std))
    batches = [(data.x, data.y)]
    parts = [kind(net, world.graph, batches) for kind in (sensitivity, taylor)]
    expected = np.concatenate([part[la.name] for part in parts for la in world.graph.layers])
    assert scores.dtype == np.float32
    assert scores.shape == (2 * world.graph.count,)
    # the same measure, but the absolute value is taken batch by batch
    assert np.corrcoef(scores, expected)[0, 1] > 0.9


def test_judging_measures_the_model_with_its_filters_off(
    world: World, do: Do, trained: list[State], bases: Bases
) -> None:
    order = world.order("judge")
    values = packed(world, order)
    layout = world.layout(order)
    model = off_state(layout.unpack(world.base, values), world.graph, world.next_free)
    order = order.model_copy(update={"keep": state_digest(model)})
    bases.put(world.base)
    report, update = do(order, Arrays(values=values))
    assert update is None
    assert trained == []
    assert report.heldout > 0
    kept = bases.get(state_digest(model))
    assert kept is not None
    assert state_digest(kept) == state_digest(model)


def test_an_opinion_is_gathered_of_the_slim_model_and_measured_beside_it(
    world: World, do: Do, images: ImageSet
) -> None:
    model = state_digest(world.prior)
    of_model = {"base": model, "regrown": None, "free": as_channels(world.free)}
    gather = {**of_model, "layers": "deviations", "layout": None}
    asked = world.order("tally").model_copy(update=gather)
    report, sums = do(asked)
    net, graph = net_and_graph(SPEC)
    write_state(net, world.prior)
    slim = cut(net.eval(), graph, world.free)
    own, held = split_holdout(images, asked.heldout)
    data = Labelled.of(own, Normalisation(SPEC.mean, SPEC.std))
    expected = class_sums(slim, graph.head, data.x, data.y, 10, layers="deviations")
    np.testing.assert_allclose(sums, expected.pack(), rtol=1e-4, atol=1e-4)

    classifier = expected.discriminant("lda", 20)
    size = expected.sums.shape[1]
    packed_classifier = classifier.pack(size)
    digest = state_digest({"rival": torch.from_numpy(packed_classifier)})
    measured = world.order("advise").model_copy(update={**gather, "rival": digest, "opinion": 0.5})
    report, update = do(measured, Arrays(rival=packed_classifier))
    assert update is None
    x = Labelled.of(held, Normalisation(SPEC.mean, SPEC.std))
    scores = Scores(classifier.impartial(), 0.5)
    both = ClosedFormNet(slim, graph.head, scores, "deviations", beside=True).eval()
    assert report.prior_right == int((predict(slim, x.x).argmax(1) == x.y).sum())
    assert report.right == int((predict(both, x.x).argmax(1) == x.y).sum()) > report.prior_right
    assert report.rival_right == 0


def test_a_look_holds_the_prior_against_statistics_on_all_images(
    world: World, do: Do, images: ImageSet
) -> None:
    net, graph = net_and_graph(SPEC)
    write_state(net, world.prior)
    slim = cut(net.eval(), graph, world.free)
    data = Labelled.of(images, Normalisation(SPEC.mean, SPEC.std))
    classifier = class_sums(slim, graph.head, data.x, data.y, 10).discriminant()
    sent = classifier.pack(len(classifier.chosen))
    stem = stem_conv(slim).weight.detach().numpy().astype("<f4").tobytes()
    asked = world.order("look").model_copy(
        update={
            "base": state_digest(world.prior),
            "regrown": None,
            "free": as_channels(world.free),
            "layout": None,
            "stem": base64.b64encode(stem).decode(),
            "rival": state_digest({"rival": torch.from_numpy(sent)}),
        }
    )
    report, _ = do(asked, Arrays(rival=sent))
    closed = ClosedFormNet(slim, graph.head, Scores(classifier)).eval()
    assert report.heldout == len(images)
    assert report.prior_right == int((predict(slim, data.x).argmax(1) == data.y).sum())
    assert report.rival_right == int((predict(closed, data.x).argmax(1) == data.y).sum())
    assert report.rival_right > report.prior_right
    alone, _ = do(asked.model_copy(update={"rival": None}))
    assert (alone.heldout, alone.rival_right) == (len(split_holdout(images, asked.heldout)[1]), 0)


def test_only_what_is_to_be_kept_is_kept(world: World, do: Do, bases: Bases) -> None:
    do(world.order("weigh", keep=None))
    files = {path.stem for path in bases._disk.folder.glob("*.safetensors")}
    assert files == {state_digest(world.prior), state_digest(world.base)}


# the base model


def test_a_device_makes_the_base_from_the_prior_that_it_holds(
    world: World, do: Do, bases: Bases
) -> None:
    assert bases.get(state_digest(world.base)) is None
    report, _ = do(world.order())
    assert report.declined is None
    assert bases.get(state_digest(world.base)) is not None


def test_a_device_without_base_and_source_says_so(world: World, do: Do, tmp_path: Path) -> None:
    empty = Bases(tmp_path / "empty")
    for phase in ("grow", "consolidate"):
        report, update = do(world.order(phase), bases=empty)
        assert report == Report(device="camera-1", declined=NEEDS_BASE)
        assert update is None


def test_a_base_that_is_sent_is_used_and_held_from_then_on(
    world: World, do: Do, tmp_path: Path
) -> None:
    layout = dense_layout(world.graph, world.base)
    sent = Arrays(base=layout.pack(world.base))
    new = Bases(tmp_path / "new")
    order = world.order("consolidate", regrown=None)
    _, update = do(order, sent, bases=new)
    _, again = do(order, bases=new)
    assert again.tobytes() == update.tobytes()


def test_a_base_made_here_that_is_not_the_servers_is_sent_for(world: World, do: Do) -> None:
    order = world.order()
    assert order.regrown is not None
    other = order.model_copy(
        update={"regrown": order.regrown.model_copy(update={"seed": SEED + 1})}
    )
    report, _ = do(other)
    assert report.declined == NEEDS_BASE
    layout = dense_layout(world.graph, world.base)
    report, _ = do(other, Arrays(base=layout.pack(world.base)))
    assert report.declined is None


# orders that do not belong here


def test_an_order_for_another_net_is_refused(world: World, do: Do) -> None:
    with pytest.raises(
        UpdateError, match=r"'resnet8' has filter graph .* both sides need the same"
    ):
        do(world.order().model_copy(update={"graph": "0" * 64}))


def test_an_order_for_another_layout_is_refused(world: World, do: Do) -> None:
    order = world.order(scope="group")
    for change in ({"scope": "all"}, {"layout": "0" * 64}, {"free": {"conv1": [0]}}):
        with pytest.raises(UpdateError, match=r"layout \w+ here, \w+ at the server"):
            do(order.model_copy(update=change))


def test_a_damaged_base_is_refused(world: World, do: Do, tmp_path: Path) -> None:
    base = dense_layout(world.graph, world.base).pack(world.base)
    base[5] += 1
    order = world.order()
    with pytest.raises(UpdateError, match="the base model that was sent is not"):
        do(order, Arrays(base=base), bases=Bases(tmp_path / "new"))
    with pytest.raises(UpdateError, match="the base model is float32"):
        do(order, Arrays(base=base[:-1]), bases=Bases(tmp_path / "new"))


def test_values_of_another_length_or_not_finite_are_refused(world: World, do: Do) -> None:
    order = world.order()
    values = packed(world, order)
    with pytest.raises(UpdateError, match=r"the model is float32\[\d+\], expected"):
        do(order, Arrays(values=values[:-1]))
    values[7] = np.nan
    with pytest.raises(UpdateError, match="the model is not finite: value 7 is nan"):
        do(order, Arrays(values=values))


# devices with little


@pytest.mark.parametrize("count", [0, 1])
def test_a_device_with_too_few_images_declines(
    count: int, world: World, do: Do, images: ImageSet
) -> None:
    kept, held = split_holdout(images, 0.2)
    few = ImageSet.concat([kept.select(np.arange(count)), held.select(np.arange(3))])
    for phase in ("grow", "weigh", "consolidate", "judge"):
        report, update = do(world.order(phase), data=Own(few))
        assert report == Report(device="camera-1", declined=f"{count} training image(s)")
        assert update is None


def test_two_images_of_one_class_and_none_held_out_are_enough(
    world: World, do: Do, images: ImageSet, bases: Bases
) -> None:
    kept, _ = split_holdout(images, 0.2)
    of_one_class = kept.select(np.flatnonzero(kept.labels == kept.labels[0])[:2])
    assert len(of_one_class) == 2
    bases.put(world.base)
    for phase in ("grow", "weigh", "consolidate", "judge"):
        report, update = do(world.order(phase), data=Own(of_one_class))
        assert report.declined is None
        assert (report.images, report.heldout, report.right) == (2, 0, 0)
        assert update is None or np.isfinite(update).all()


def test_the_device_changes_neither_its_images_nor_what_it_holds(
    world: World, do: Do, images: ImageSet, bases: Bases
) -> None:
    digest = images.digest
    held = bases.get(state_digest(world.prior))
    assert held is not None
    for phase in ("grow", "weigh", "consolidate", "judge"):
        bases.put(world.base)
        do(world.order(phase))
    assert images.digest == digest
    assert state_digest(held) == state_digest(world.prior)
    again = bases.get(state_digest(world.base))
    assert again is not None
    assert state_digest(again) == state_digest(world.base)
    assert replace(world) == world

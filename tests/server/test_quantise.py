"""The int8 version: nearly as good, smaller, reproducible, clean."""

import copy
import itertools
import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from common.data.normalise import Normalisation
from common.errors import DataError
from common.experts import ExpertNet, changed_by, expert_layout
from common.features import ClosedFormNet, Scores, class_sums
from common.gate import stem_conv, stem_moments
from common.state import read_state
from server.export import export_onnx, open_session, run_logits
from server.quantise import compare, float_nodes, quantise

ROOT = Path(__file__).resolve().parents[2]
NORMALISATION = Normalisation(mean=(0.3,), std=(0.38,))
TRAIN = 1300


def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return np.rint(data.images * 255 / 16).astype(np.uint8)[..., None], data.target.astype(np.int64)


def trained_net() -> nn.Module:
    torch.manual_seed(0)
    widths = (1, 16, 32, 32)
    blocks = [
        nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        for i, o in itertools.pairwise(widths)
    ]
    net = nn.Sequential(
        *blocks[:2],
        nn.MaxPool2d(2),
        blocks[2],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    images, labels = digits()
    x, y = NORMALISATION.to_tensor(images[:TRAIN]), torch.from_numpy(labels[:TRAIN])
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(6):
        for rows in torch.randperm(TRAIN).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
    return net


def export(net: nn.Module, path: Path) -> Path:
    export_onnx(
        net,
        path,
        input_shape=(1, 8, 8),
        normalisation=NORMALISATION,
        classes=[str(i) for i in range(10)],
        metadata={"run": "r1", "step": "3"},
    )
    return path


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return trained_net()


@pytest.fixture(scope="module")
def fp32(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(net, tmp_path_factory.mktemp("fp32") / "model.onnx")


@pytest.fixture(scope="module")
def int8(fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "model-int8.onnx"
    quantise(fp32, path, digits()[0][:256])
    return path


def test_it_classifies_as_well_and_is_smaller(fp32: Path, int8: Path) -> None:
    images, labels = digits()
    report = compare(fp32, int8, images[TRAIN:], labels[TRAIN:])
    assert report.images == len(images) - TRAIN
    assert report.fp32_accuracy > 0.9
    assert report.int8_accuracy >= report.fp32_accuracy - 0.02
    assert report.agreement > 0.95
    assert report.int8_bytes < 0.6 * report.fp32_bytes
    assert 0 < report.fp32_latency_ms < 50
    assert 0 < report.int8_latency_ms < 50
    assert report.as_dict()["int8_bytes"] == int8.stat().st_size


def test_convolutions_have_int8_weights_with_a_scale_per_channel(int8: Path) -> None:
    graph = onnx.load(int8).graph
    tensors = {t.name: t for t in graph.initializer}
    quantised = [t for name, t in tensors.items() if name.endswith("weight_quantized")]
    assert len(quantised) == 4  # three convolutions and the head
    for weight in quantised:
        assert weight.data_type == onnx.TensorProto.INT8
        scale = tensors[weight.name.replace("_quantized", "_scale")]
        if len(weight.dims) == 4:
            assert list(scale.dims) == [weight.dims[0]]
    activations = {n.input[2] for n in graph.node if n.op_type == "QuantizeLinear"}
    assert {tensors[name].data_type for name in activations} == {onnx.TensorProto.UINT8}


def test_scores_of_class_statistics_stay_in_float(
    net: nn.Module, fp32: Path, tmp_path: Path
) -> None:
    images, labels = digits()
    x, y = NORMALISATION.to_tensor(images[:TRAIN]), torch.from_numpy(labels[:TRAIN])
    sums = class_sums(net, "6", x, y, 10)
    closed = ClosedFormNet(copy.deepcopy(net).eval(), "6", Scores(sums.discriminant()), beside=True)
    path = export(closed, tmp_path / "model.onnx")
    quantise(path, tmp_path / "int8.onnx", images[:256])
    tensors = {t.name: t for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert sum(name.endswith("weight_quantized") for name in tensors) == 4
    (scores,) = (t for name, t in tensors.items() if name.endswith("scores.classifier.weight"))
    assert scores.data_type == onnx.TensorProto.FLOAT
    kinds = {node.name: node.op_type for node in onnx.load(path).graph.node}
    left = [kinds[name] for name in float_nodes(onnx.load(path))]
    assert left.count("Gemm") == 1
    assert "Conv" not in left
    assert float_nodes(onnx.load(fp32)) == []
    report = compare(path, tmp_path / "int8.onnx", images[TRAIN:], labels[TRAIN:], repeats=1)
    assert report.agreement > 0.98


def test_gate_and_mixing_of_experts_stay_in_float(net: nn.Module, tmp_path: Path) -> None:
    images, labels = digits()
    both = np.concatenate([images, 255 - images])
    worlds = [NORMALISATION.to_tensor(half[:TRAIN]) for half in (images, 255 - images)]
    there = copy.deepcopy(net).train()
    with torch.no_grad():
        for rows in worlds[1].split(100):
            there(rows)  # its batch normalisations learn the other world
    expert = changed_by(expert_layout(net, "6", 0.05), read_state(there))
    stem = stem_conv(net)
    looks = [stem_moments(stem, world) for world in worlds]
    told = [False, False]
    mixed = ExpertNet(net, [expert], looks, stem.weight.detach(), "6", told, None, 0.0)
    path = export(mixed, tmp_path / "model.onnx")
    quantise(path, tmp_path / "int8.onnx", both[::10])
    kinds = {node.name: node.op_type for node in onnx.load(path).graph.node}
    left = [kinds[name] for name in float_nodes(onnx.load(path))]
    assert left.count("LogSoftmax") == 3
    assert "ReduceLogSumExp" in left
    assert "MatMul" in left
    assert not {"Conv", "Gemm"} & set(left)
    report = compare(path, tmp_path / "int8.onnx", both, np.tile(labels, 2), repeats=1)
    assert report.agreement > 0.95


def test_metadata_are_kept_and_name_the_quantisation(fp32: Path, int8: Path) -> None:
    before, after = (
        {p.key: p.value for p in onnx.load(path).metadata_props} for path in (fp32, int8)
    )
    assert "int8" in after.pop("quantisation")
    assert after == before


def test_same_images_same_bytes_and_no_path_inside(fp32: Path, int8: Path, tmp_path: Path) -> None:
    other = tmp_path / "some" / "where.onnx"
    report = quantise(fp32, other, digits()[0][:256])
    assert other.read_bytes() == int8.read_bytes()
    assert report.bytes == other.stat().st_size
    for path in (
        ROOT,
        Path.home(),
        Path(torch.__file__).parent,
        int8.parent,
        tempfile.gettempdir(),
    ):
        assert str(path).encode() not in int8.read_bytes()


def test_nothing_else_is_left_behind_and_nothing_is_printed(
    fp32: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    handlers = list(logging.getLogger().handlers)
    quantise(fp32, tmp_path / "int8.onnx", digits()[0][:64])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int8.onnx", "scratch"]
    assert not list(scratch.iterdir())
    assert logging.getLogger().handlers == handlers
    assert capfd.readouterr() == ("", "")


def test_filters_that_are_exactly_zero_do_no_harm(net: nn.Module, tmp_path: Path) -> None:
    net = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net[1][1].parameters():  # a freed half, not yet cut out
            parameter[:16] = 0
    images = digits()[0]
    plain = export(net, tmp_path / "model.onnx")
    quantise(plain, tmp_path / "int8.onnx", images[:128])
    report = compare(plain, tmp_path / "int8.onnx", images[:300], digits()[1][:300], repeats=1)
    assert np.isfinite(run_logits(open_session(tmp_path / "int8.onnx"), images[:32])).all()
    assert report.agreement > 0.95


def test_no_calibration_images_is_an_error(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="calibration: no images"):
        quantise(fp32, tmp_path / "int8.onnx", np.zeros((0, 8, 8, 1), np.uint8))

"""The exported file: what is in it, what is not, and that it computes what the net does."""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from common.data.normalise import Normalisation
from common.errors import DiskError, ExportError
from common.nets import build
from server.export import (
    check_parity,
    export_onnx,
    model_input,
    open_session,
    parity,
    run_logits,
)

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (3, 12, 12)
CLASSES = ("cat", "dog", "newt", "owl")
NORMALISATION = Normalisation(mean=(0.5, 0.45, 0.4), std=(0.2, 0.25, 0.3))


class SmallNet(nn.Module):
    """Every pattern that our nets use: strides, a residual add, depthwise, ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 16, 1, stride=2, bias=False)
        self.bn3 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = nn.functional.relu6(x + self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


class Undecided(SmallNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(-x if x.sum() > 0 else x)


def randomised(net: nn.Module) -> nn.Module:
    """Weights and running statistics such that folding them wrongly would show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(-1, 1, generator=generator)
                module.bias.normal_(0, 0.5, generator=generator)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.normal_(0, 0.3, generator=generator)
    return net.eval()


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return randomised(SmallNet())


def export(net: nn.Module, path: Path) -> bytes:
    export_onnx(
        net,
        path,
        input_shape=SHAPE,
        normalisation=NORMALISATION,
        classes=CLASSES,
        metadata={"run": "r1", "step": "2", "free_share": "0.3", "parent": "c0ffee"},
    )
    return path.read_bytes()


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.onnx"
    export(small_net(), path)
    return path


def test_the_graph_has_a_free_batch_and_no_batch_norm(exported: Path) -> None:
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    ((name, shape),) = [(i.name, i.type.tensor_type.shape.dim) for i in model.graph.input]
    assert name == "input"
    assert shape[0].dim_param == "batch"
    assert tuple(d.dim_value for d in shape[1:]) == SHAPE
    assert [o.name for o in model.graph.output] == ["logits"]
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert model.ir_version <= 10
    assert list(exported.parent.iterdir()) == [exported]


def test_the_metadata_say_what_the_model_is(exported: Path) -> None:
    properties = [(p.key, p.value) for p in onnx.load(exported).metadata_props]
    assert properties == sorted(properties)
    metadata = dict(properties)
    assert metadata.pop("input").startswith("float32 [batch, channels, height, width], pixel")
    assert json.loads(metadata.pop("classes")) == list(CLASSES)
    assert json.loads(metadata.pop("mean")) == [0.5, 0.45, 0.4]
    assert json.loads(metadata.pop("std")) == [0.2, 0.25, 0.3]
    assert metadata == {
        "fallow_format": "1",
        "free_share": "0.3",
        "parent": "c0ffee",
        "run": "r1",
        "step": "2",
    }


def test_the_report_names_the_file_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = export_onnx(
        small_net(),
        path,
        input_shape=SHAPE,
        normalisation=NORMALISATION,
        classes=CLASSES,
        metadata={},
    )
    content = path.read_bytes()
    assert report.as_dict() == {
        "path": str(path),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_same_weights_same_bytes_from_any_folder_process_and_source_file(
    exported: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "else" / "where"
    elsewhere.mkdir(parents=True)
    shutil.copy(__file__, elsewhere / "copy_of_this_file.py")
    script = (
        "from pathlib import Path\n"
        "import copy_of_this_file as here\n"
        "here.export(here.small_net(), Path('model.onnx'))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": f"{elsewhere}{os.pathsep}{ROOT}", "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")  # nor does it chatter
    assert (elsewhere / "model.onnx").read_bytes() == exported.read_bytes()


def test_the_memory_format_and_the_mode_of_the_net_do_not_show(
    exported: Path, tmp_path: Path
) -> None:
    net = small_net().to(memory_format=torch.channels_last).train()
    assert export(net, tmp_path / "model.onnx") == exported.read_bytes()


def test_other_weights_other_bytes(exported: Path, tmp_path: Path) -> None:
    net = small_net()
    with torch.no_grad():
        net.get_parameter("bn1.weight")[0] += 1e-3
    assert export(net, tmp_path / "model.onnx") != exported.read_bytes()


def test_no_path_of_this_machine_is_inside(exported: Path) -> None:
    content = exported.read_bytes()
    for path in (ROOT, Path.home(), Path(torch.__file__).parent, exported.parent):
        assert str(path).encode() not in content
    for trace in (b".py", b"stack_trace", b"SmallNet", b"forward"):
        assert trace not in content


def test_the_net_stays_as_it_was(tmp_path: Path) -> None:
    net = small_net().to(memory_format=torch.channels_last).train()
    net.get_submodule("bn2").eval()
    net(torch.rand(4, *SHAPE)).sum().backward()
    net.get_parameter("conv3.weight").requires_grad_(False)

    def condition() -> dict[str, tuple[object, ...]]:
        tensors = {
            name: (t.detach().numpy().tobytes(), t.stride(), t.requires_grad)
            for name, t in net.state_dict(keep_vars=True).items()
        }
        gradients = {
            name + ".grad": (None if p.grad is None else p.grad.numpy().tobytes(),)
            for name, p in net.named_parameters()
        }
        modes = {name + ".training": (m.training,) for name, m in net.named_modules()}
        return {**tensors, **gradients, **modes}

    before, draws = condition(), torch.get_rng_state()
    path = tmp_path / "model.onnx"
    export(net, path)
    parity(net, path, None, NORMALISATION, seed=0)
    assert condition() == before
    assert torch.equal(torch.get_rng_state(), draws)


def test_logging_and_warning_settings_stay_as_they_were(tmp_path: Path) -> None:
    filters = list(warnings.filters)
    handlers = list(logging.getLogger().handlers)
    level = logging.getLogger("torch").level
    export(small_net(), tmp_path / "model.onnx")
    assert warnings.filters == filters
    assert logging.getLogger().handlers == handlers
    assert logging.getLogger("torch").level == level


def test_normalisation_is_part_of_the_graph(exported: Path) -> None:
    images = random_images(5)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ((0.5, 0.45, 0.4), (0.2, 0.25, 0.3)))
    with torch.no_grad():
        expected = small_net()((x - mean) / std).numpy()
    np.testing.assert_allclose(run_logits(open_session(exported), images), expected, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3, 64, 65])
def test_an_image_gets_the_same_logits_in_a_batch_of_any_size(exported: Path, batch: int) -> None:
    session, images = open_session(exported), random_images(65)
    alone = np.concatenate([run_logits(session, images[i : i + 1]) for i in range(batch)])
    np.testing.assert_allclose(run_logits(session, images[:batch]), alone, atol=1e-5)


def test_the_input_is_pixels_over_255() -> None:
    images = random_images(2)
    x = model_input(images)
    assert (x.dtype, x.shape, x.flags.c_contiguous) == (np.float32, (2, 3, 12, 12), True)
    assert x[1, 2, 4, 7] == np.float32(images[1, 4, 7, 2]) / np.float32(255)


def test_parity_holds_on_random_and_on_real_images(exported: Path) -> None:
    assert 0 < parity(small_net(), exported, None, NORMALISATION, seed=0) < 1e-5
    assert 0 < check_parity(small_net(), exported, random_images(70), NORMALISATION, seed=0) < 1e-5


def test_parity_sees_an_image_that_only_the_given_images_have(exported: Path) -> None:
    class Flawed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            black = (x < 0).all(dim=(1, 2, 3))
            return self.net(x) + black[:, None]

    images = random_images(70)
    images[69] = 0
    assert parity(Flawed(), exported, images[:69], NORMALISATION, seed=0) < 1e-5
    assert parity(Flawed(), exported, images, NORMALISATION, seed=0) > 0.1


@pytest.mark.parametrize("value", [10.0, float("nan")])
def test_a_model_that_computes_something_else_is_refused(exported: Path, value: float) -> None:
    net = small_net()
    with torch.no_grad():
        net.get_parameter("head.bias")[0] = value
    with pytest.raises(
        ExportError, match=r"model\.onnx.* by (\d+\.?\d*|nan), the limit is 0\.0001"
    ):
        check_parity(net, exported, None, NORMALISATION, seed=0)


def test_a_full_disk_leaves_the_older_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"older")

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"no space left for .*model\.onnx"):
        export(small_net(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"older"


def test_a_net_that_the_exporter_cannot_follow_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=r"cannot be exported to ONNX: .+") as caught:
        export(randomised(Undecided()), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_class_names_must_fit_the_logits(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="3 names, but the net has 4 logits"):
        export_onnx(
            small_net(),
            tmp_path / "model.onnx",
            input_shape=SHAPE,
            normalisation=NORMALISATION,
            classes=CLASSES[:3],
            metadata={},
        )


@pytest.mark.parametrize(
    ("name", "width", "shape"),
    [("resnet8", 8, (1, 8, 8)), ("vgg11", 8, (3, 32, 32)), ("mobilenetv2", 0.25, (3, 32, 32))],
)
def test_our_nets_export_exactly(
    tmp_path: Path, name: str, width: float, shape: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    net = build(name, 4, shape[0], width)
    net(torch.randn(16, *shape))  # running statistics that are not the initial ones
    path = tmp_path / "model.onnx"
    normalisation = Normalisation(mean=(0.5,) * shape[0], std=(0.25,) * shape[0])
    export_onnx(
        net,
        path,
        input_shape=shape,
        normalisation=normalisation,
        classes=CLASSES,
        metadata={},
    )
    assert "BatchNormalization" not in {n.op_type for n in onnx.load(path).graph.node}
    assert check_parity(net, path, None, normalisation, seed=0) < 2e-5

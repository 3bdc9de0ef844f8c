"""A plain image file gets the class that the trained net gives it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from client.infer import Classifier, infer_lines
from common.data.normalise import Normalisation
from common.errors import DataError
from server.export import export_onnx

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("cat", "dog", "newt", "owl", "pig")


def make_net(channels: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(len(CLASSES)),
    ).eval()


def normalisation(channels: int) -> Normalisation:
    return Normalisation(mean=(0.5, 0.4, 0.6)[:channels], std=(0.2, 0.3, 0.1)[:channels])


def make_model(path: Path, shape: tuple[int, int, int]) -> nn.Module:
    net = make_net(shape[0])
    net(torch.zeros(1, *shape))
    export_onnx(
        net,
        path,
        input_shape=shape,
        normalisation=normalisation(shape[0]),
        classes=CLASSES,
        metadata={"run": "r1"},
    )
    return net


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def expected(net: nn.Module, image: np.ndarray) -> np.ndarray:
    """Torch's probabilities for uint8 [H, W, C]."""
    with torch.no_grad():
        logits = net(normalisation(image.shape[2]).to_tensor(image[None]))
    return logits.softmax(1)[0].numpy()


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    path = tmp_path_factory.mktemp("colour") / "model.onnx"
    return path, make_model(path, (3, 16, 16))


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    path = tmp_path_factory.mktemp("grey") / "model.onnx"
    return path, make_model(path, (1, 12, 20))


def test_png_files_get_the_classes_that_torch_gives_them(
    colour: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    model, net = colour
    images = [pixels(16, 16, 3, seed=i) for i in range(20)]
    files = [tmp_path / f"{i}.png" for i in range(20)]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(image).save(file)
    predictions = Classifier.load(model).classify_many(files)
    assert len({p.label for p in predictions}) > 1
    for image, prediction in zip(images, predictions, strict=True):
        probabilities = expected(net, image)
        assert prediction.label == probabilities.argmax()
        assert prediction.name == CLASSES[prediction.label]
        assert prediction.probability == prediction.probabilities[prediction.label]
        np.testing.assert_allclose(prediction.probabilities, probabilities, atol=1e-5)
        assert sum(prediction.probabilities) == pytest.approx(1)


def test_batches_change_nothing(colour: tuple[Path, nn.Module]) -> None:
    classifier = Classifier.load(colour[0])
    images = [pixels(16, 16, 3, seed=i) for i in range(7)]
    together = classifier.classify_many(images, batch=3)
    for image, prediction in zip(images, together, strict=True):
        alone = classifier.classify(image)
        assert prediction.label == alone.label
        np.testing.assert_allclose(prediction.probabilities, alone.probabilities, atol=1e-6)
    assert classifier.classify_many([]) == []


def test_a_loaded_model_knows_its_form_and_metadata(grey: tuple[Path, nn.Module]) -> None:
    classifier = Classifier.load(grey[0])
    assert (classifier.channels, classifier.height, classifier.width) == (1, 12, 20)
    assert classifier.classes == CLASSES
    assert classifier.metadata["run"] == "r1"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_any_mode_of_image_is_brought_to_colour(
    colour: tuple[Path, nn.Module], tmp_path: Path, mode: str
) -> None:
    model, net = colour
    file = tmp_path / "image.tif"
    Image.fromarray(pixels(16, 16, 3)).convert(mode).save(file)
    with Image.open(file) as image:
        seen = np.asarray(image.convert("RGB"))  # no pixel is transparent
    (prediction,) = Classifier.load(model).classify_many([file])
    np.testing.assert_allclose(prediction.probabilities, expected(net, seen), atol=1e-5)


def test_a_colour_image_is_brought_to_grey(grey: tuple[Path, nn.Module]) -> None:
    model, net = grey
    image = pixels(12, 20, 3)
    seen = np.asarray(Image.fromarray(image).convert("L"))
    prediction = Classifier.load(model).classify(image)
    np.testing.assert_allclose(prediction.probabilities, expected(net, seen[..., None]), atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 20), (12, 20, 1)])
def test_grey_arrays_may_have_a_channel_axis_or_not(
    grey: tuple[Path, nn.Module], shape: tuple[int, ...]
) -> None:
    model, net = grey
    image = pixels(*shape)
    prediction = Classifier.load(model).classify(image)
    seen = image.reshape(12, 20, 1)
    np.testing.assert_allclose(prediction.probabilities, expected(net, seen), atol=1e-5)


def test_another_size_is_resized_and_its_centre_cut(colour: tuple[Path, nn.Module]) -> None:
    model, net = colour
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = np.kron(pixels(16, 16, 3), np.ones((2, 2, 1), np.uint8))
    seen = np.asarray(Image.fromarray(wide).resize((48, 16), Image.Resampling.BILINEAR))[:, 16:32]
    prediction = Classifier.load(model).classify(wide)
    np.testing.assert_allclose(prediction.probabilities, expected(net, seen), atol=1e-5)


def test_a_photo_that_the_camera_marked_as_turned_is_turned_back(
    colour: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    model, net = colour
    upright = pixels(16, 16, 3)
    turned = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to view"
    turned.save(tmp_path / "photo.png", exif=exif)
    (prediction,) = Classifier.load(model).classify_many([tmp_path / "photo.png"])
    np.testing.assert_allclose(prediction.probabilities, expected(net, upright), atol=1e-5)


def test_lines_of_text_name_the_most_probable_classes(
    colour: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    model, net = colour
    image = pixels(16, 16, 3)
    Image.fromarray(image).save(tmp_path / "a.png")
    probabilities = expected(net, image)
    first, second = np.argsort(-probabilities)[:2]
    (line,) = infer_lines(model, [tmp_path / "a.png"], top=2)
    assert line == (
        f"{tmp_path / 'a.png'}: {CLASSES[first]} {100 * probabilities[first]:.1f} %, "
        f"{CLASSES[second]} {100 * probabilities[second]:.1f} %"
    )


def test_lines_of_json_can_be_parsed_one_by_one(
    colour: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for i, file in enumerate(files):
        Image.fromarray(pixels(16, 16, 3, seed=i)).save(file)
    lines = [json.loads(line) for line in infer_lines(colour[0], files, top=3, as_json=True)]
    classified = Classifier.load(colour[0]).classify_many(files)
    assert [line["image"] for line in lines] == [str(f) for f in files]
    for line, prediction in zip(lines, classified, strict=True):
        assert line["label"] == prediction.label
        assert line["top"][0] == {
            "label": prediction.label,
            "name": prediction.name,
            "probability": prediction.probability,
        }
        assert len(line["top"]) == 3


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.onnx: no such model file"):
        Classifier.load(tmp_path / "none.onnx")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" * 40, b"garbage" * 99])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.onnx: not an ONNX model") as caught:
        Classifier.load(path)
    assert "\n" not in str(caught.value)


def test_a_model_cut_short_is_named(colour: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(colour[0].read_bytes()[:-200])
    with pytest.raises(DataError, match=r"model\.onnx: "):
        Classifier.load(path)


def test_a_foreign_or_newer_model_is_refused(
    colour: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    model = onnx.load(colour[0])
    onnx.helper.set_model_props(model, {})
    onnx.save(model, path)
    with pytest.raises(DataError, match="not exported by fallow"):
        Classifier.load(path)
    onnx.helper.set_model_props(model, {"fallow_format": "99"})
    onnx.save(model, path)
    with pytest.raises(DataError, match="format 99 of fallow, this program reads 1"):
        Classifier.load(path)


def test_missing_and_broken_images_are_named(
    colour: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    classifier = Classifier.load(colour[0])
    Image.fromarray(pixels(64, 64, 3)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("not an image")
    for name in ("cut.jpg", "text.png", "absent.png"):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            classifier.classify_many([tmp_path / "whole.jpg", tmp_path / name])


@pytest.mark.parametrize(
    "image",
    [np.zeros((16, 16, 3), np.float64), np.zeros((16, 16, 2, 2), np.uint8), np.zeros(9, np.uint8)],
)
def test_arrays_that_are_no_images_are_refused(
    colour: tuple[Path, nn.Module], image: np.ndarray
) -> None:
    with pytest.raises(DataError, match="is no image; give uint8"):
        Classifier.load(colour[0]).classify(image)


def test_a_model_that_is_not_square_wants_the_exact_size(grey: tuple[Path, nn.Module]) -> None:
    with pytest.raises(DataError, match="30x30 pixels, the model needs exactly 20x12"):
        Classifier.load(grey[0]).classify(pixels(30, 30))


def test_a_device_needs_no_torch(colour: tuple[Path, nn.Module], tmp_path: Path) -> None:
    Image.fromarray(pixels(16, 16, 3)).save(tmp_path / "a.png")
    script = (
        "import sys; from pathlib import Path; from client.infer import infer_lines\n"
        "print(*infer_lines(Path(sys.argv[1]), [Path(sys.argv[2])]))\n"
        "heavy = {'torch', 'onnx', 'onnxscript', 'sklearn', 'pyarrow', 'flwr', 'pandas'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(colour[0]), str(tmp_path / "a.png")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert ran.stdout.startswith(str(tmp_path / "a.png"))

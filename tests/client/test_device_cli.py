"""``fallow-device``: what it prints, how it ends, and what it starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from test_collect import png
from test_infer import CLASSES, make_model
from typer.testing import CliRunner

from client.cli import app
from client.heldout import measures
from client.index import Index
from client.infer import Classifier
from client.node import Connection, is_loopback, supernode_command
from client.watch import Watch
from common.command import run_command
from common.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "store"
    monkeypatch.setenv("FALLOW_STORE", str(folder))
    Index.create(folder).close()
    return folder


def device(*arguments: object, code: int = 0) -> Any:
    """Run a command; returns what it printed."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        ended = run_command(lambda: (_ for _ in ()).throw(done.exception))  # type: ignore[arg-type]
    else:
        ended = done.exit_code
    assert ended == code, (done.output, done.exception)
    return done.exception if code and done.exception else done.stdout


def told(*arguments: object, code: int = 0) -> Any:
    return json.loads(device(*arguments, "--json", code=code))


def write(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed))
    return path


def test_images_come_in_are_listed_corrected_and_forgotten(store: Path, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.png", n) for n in range(3)]
    device("collect", "consent", "hand")
    lines = device("collect", "add", *files, "--label", "cat", "--json").splitlines()
    assert [json.loads(line)["outcome"] for line in lines] == ["kept"] * 3
    assert "duplicate as cat" in device("collect", "add", files[0])
    one = json.loads(device("collect", "list", "--json").splitlines()[0])["id"]
    device("collect", "label", one[:12], "dog")
    assert f"{one[:12]}" in device("collect", "list", "--label", "dog")
    assert told("status")["labels"] == {"cat": 2, "dog": 1}
    assert "2 given, 1 corrected" in device("status")
    assert told("forget", "--id", one) == {"removed": 1}
    assert "2 images removed" in device("collect", "consent", "hand", "--withdraw")
    assert told("status")["sources"] == {}


def test_errors_have_codes_and_one_line(store: Path, tmp_path: Path) -> None:
    image = write(tmp_path / "a.png", 1)
    assert "has no consent" in str(device("collect", "add", image, code=2))
    device("collect", "consent", "hand")
    bad = tmp_path / "text.png"
    bad.write_text("text")
    assert "not an image" in str(device("collect", "add", bad, image, code=3))
    assert told("status")["images"] == 1  # the other one is kept
    assert "no such file" in str(device("collect", "add", tmp_path / "none.png", code=3)).lower()
    assert "nothing to forget" in str(device("forget", code=2))
    assert "no model" in str(device("collect", "guess", code=2))
    assert "holds no store" in str(device("status", "--store", tmp_path / "x", code=5))
    (store / "device.toml").write_text("[collect]\nnear = 99")
    assert "collect.near is 99" in str(device("collect", "add", image, code=2))


def test_init_shows_all_settings_and_keeps_what_is_there(tmp_path: Path) -> None:
    store = tmp_path / "new"
    name = device("collect", "init", "--store", store).split()[-1]
    assert "# quota-mib = 1024.0" in (store / "device.toml").read_text()
    (store / "device.toml").write_text("[limits]\nthreads = 2\n")
    assert device("collect", "init", "--store", store).split()[-1] == name
    assert (store / "device.toml").read_text() == "[limits]\nthreads = 2\n"


def test_a_watched_folder_is_emptied_of_what_was_taken(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "cat" / "1.png", 1)
    write(folder / "2.png", 2)
    write(folder / "2-again.png", 2)
    write(folder / ".hidden" / "3.png", 3)
    (folder / "cat" / "broken.png").write_bytes(png(4)[:200])
    (folder / "notes.txt").write_text("no image")
    device("collect", "consent", "folder")
    lines = device("collect", "watch", folder, "--once", "--remove", "--json").splitlines()
    results = {Path(r["file"]).name: r for r in map(json.loads, lines)}
    assert results["1.png"]["label"] == "cat"
    assert sorted(r.get("outcome", "refused") for r in results.values()) == [
        "duplicate",
        "kept",
        "kept",
        "refused",
    ]
    left = sorted(path.name for path in folder.rglob("*") if path.is_file())
    assert left == ["3.png", "broken.png", "notes.txt"]


def test_a_file_is_read_once_and_not_while_it_is_written(store: Path, tmp_path: Path) -> None:
    from client.collect import Collector

    path = write(tmp_path / "in" / "1.png", 1)
    with Index.open(store) as index:
        collector = Collector(index)
        collector.consent("folder")
        watch = Watch(collector, tmp_path / "in", "folder", settled=30)
        assert list(watch.poll()) == []
        os.utime(path, (0, 0))
        assert [result.outcome for _, result in watch.poll()] == ["kept"]
        assert list(watch.poll()) == []
        os.utime(write(path, 2), (9, 9))
        assert [result.outcome for _, result in watch.poll()] == ["kept"]
        with pytest.raises(ConfigError, match="no such folder"):
            Watch(collector, tmp_path / "none", "folder")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    make_model(path, (3, 24, 24))
    return path


def test_the_model_labels_and_is_measured_by_people_alone(
    store: Path, tmp_path: Path, model: Path
) -> None:
    classifier = Classifier.load(model)
    device("collect", "consent", "hand")
    files = [write(tmp_path / f"{n}.png", n) for n in range(40)]
    first, *_ = classifier.classify_many(files[30:])
    (store / "device.toml").write_text(
        "[collect]\nnear = -1\nconfidence = 0.0\n"
        f"model = '{model}'\n[labels]\nkitty = '{first.name}'\n"
    )
    device("collect", "add", *files[:15], "--label", CLASSES[0])
    device("collect", "add", *files[15:30], "--label", "kitty")
    device("collect", "add", *files[30:])
    told_of = told("status")
    assert told_of["origins"] == {"given": 30, "corrected": 0, "model": 10, "none": 0}
    assert told("collect", "guess") == {"labelled": 10, "unsure": 0}
    assert told_of["labels"]["kitty"] > 15  # the device's own name for the model's class
    measured = told("evaluate")
    names = {CLASSES[0]: CLASSES[0], "kitty": first.name}
    with Index.open(store) as index:
        held = [image for image in index.images("origin = 'given'") if measures(image, 0.15)]
        paths = [index.path(image.digest) for image in held]
        right = [
            found.name == names[str(image.label)]
            for image, found in zip(held, classifier.classify_many(paths), strict=True)
        ]
    assert measured["right"] == sum(right)
    assert measured["images"] == told_of["heldout"]["images"] > 0
    assert sum(c["images"] for c in measured["classes"].values()) == measured["images"]
    assert measured["accuracy"] == pytest.approx(measured["right"] / measured["images"])
    assert f"of {measured['images']} held-out" in device("evaluate", model)


# train


def connection(**changes: Any) -> Connection:
    return Connection(**{"superlink": "127.0.0.1:9092", "insecure": True, **changes})


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "device-key"
    made = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    return path


def test_train_starts_flowers_supernode_with_the_store(store: Path, key: Path) -> None:
    command, environment = supernode_command(store, connection())
    assert Path(command[0]).name == "flower-supernode"
    assert "--insecure" in command
    assert command[command.index("--node-config") + 1] == f"store='{store}'"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert Path(environment["FLWR_HOME"]).is_relative_to(store)
    assert command[command.index("--isolation") + 1] == "process"
    (store / "device.toml").write_text("[limits]\nthreads = 3\nkeep-warm = false\n")
    secure = connection(insecure=False, key=key, root_certificates=key, superlink="fleet.org:443")
    command, environment = supernode_command(store, secure)
    assert "--insecure" not in command
    assert command[command.index("--auth-supernode-private-key") + 1] == str(key)
    assert command[command.index("--root-certificates") + 1] == str(key)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert not {"--isolation", "--superexec-auth-secret-file"} & set(command)
    shown = device("train", "--superlink", "127.0.0.1:9092", "--insecure", "--dry-run")
    assert "flower-supernode --superlink 127.0.0.1:9092 --insecure --host 127.0.0.1" in shown


def test_train_refuses_what_is_not_safe(store: Path, key: Path) -> None:
    for changes, said in (
        ({"superlink": "fleet.org:9092"}, "without TLS only loopback is allowed"),
        ({"superlink": "192.168.1.5:9092"}, "without TLS only loopback is allowed"),
        ({"superlink": "127.0.0.1"}, "give HOST:PORT"),
        ({"superlink": "https://x:y"}, "give HOST:PORT"),
        ({"insecure": False}, "no --key"),
        ({"insecure": False, "key": Path("none")}, "no such file"),
        ({"key": key}, "goes with neither"),
    ):
        with pytest.raises(ConfigError, match=said):
            supernode_command(store, connection(**changes))
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="others can read it"):
        supernode_command(store, connection(insecure=False, key=key))
    hosts = ("::1", "localhost", "127.3.2.1", "localhost.example.org", "10.0.0.1")
    assert [is_loopback(host) for host in hosts] == [True, True, True, False, False]


# doctor


def findings(*arguments: object, code: int = 0) -> dict[str, list[tuple[str, str]]]:
    done = CliRunner().invoke(app, ["doctor", "--json", *map(str, arguments)])
    assert done.exit_code == code, done.output
    found: dict[str, list[tuple[str, str]]] = {}
    for row in json.loads(done.stdout):
        found.setdefault(row["what"], []).append((row["level"], row["text"]))
    return found


def test_the_doctor_says_what_to_do(store: Path, tmp_path: Path) -> None:
    fresh = findings()
    assert fresh["environment"][0][0] == fresh["settings"][0][0] == fresh["store"][0][0] == "good"
    assert "collect consent SOURCE" in fresh["consent"][0][1]
    device("collect", "consent", "hand")
    device("collect", "add", write(tmp_path / "a.png", 1), "--label", "cat")
    device("collect", "add", write(tmp_path / "b.png", 2), "--label", "cat")
    assert "consent" not in findings()
    lost = next((store / "images").iterdir())
    lost.unlink()
    (store / "images" / "left-over").write_bytes(b"x")
    broken = findings(code=1)
    assert broken["store"][0][0] == "bad"
    assert "--repair" in broken["store"][0][1]
    mended = findings("--repair")
    assert "1 damaged images were removed" in mended["store"][0][1]
    assert len(list((store / "images").iterdir())) == 1
    (store / "device.toml").write_text("[limits]\ncheck = 'false'\n")
    assert "would be declined now" in findings()["limits"][0][1]
    (store / "device.toml").write_text("[limits]\nthreads = 0\n")
    assert "limits.threads is 0" in findings(code=1)["settings"][0][1]
    assert "holds no store" in findings("--store", tmp_path / "none", code=1)["store"][0][1]


def test_the_doctor_looks_at_server_and_key(store: Path, key: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        found = findings("--superlink", address, "--insecure")
        assert found["server"] == [("good", f"{address} answers")]
    found = findings("--superlink", address, "--insecure", code=1)
    assert "does not answer" in found["server"][0][1]
    found = findings("--superlink", address, "--key", key, code=1)
    assert found["keys"][0] == ("good", f"{key} (secp384r1)")
    other = ed25519.Ed25519PrivateKey.generate()
    key.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    assert "elliptic-curve" in findings("--superlink", address, "--key", key, code=1)["keys"][0][1]
    key.write_text("no key")
    assert (
        "no OpenSSH private key"
        in (findings("--superlink", address, "--key", key, code=1)["keys"][0][1])
    )


# what is imported


def modules_after(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


HEAVY = {
    "imagehash",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "opacus",
    "pandas",
    "pyarrow",
    "ray",
    "scipy",
    "sklearn",
    "sympy",
    "torch_pruning",
}


def test_a_training_process_imports_nothing_heavy_but_torch() -> None:
    modules = modules_after("import client.app, client.own")
    assert "torch" in modules
    # sympy comes with torch where a version of it needs it
    alone = modules_after("import torch, numpy")
    assert (HEAVY - alone) & modules == set()


def test_collecting_needs_no_torch() -> None:
    statement = "import client.cli, client.collect, client.service, client.status, client.doctor"
    modules = modules_after(statement)
    assert modules & (HEAVY | {"torch", "flwr"}) == set()

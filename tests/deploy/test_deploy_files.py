"""What deploy/ holds, held against the tools that will read it."""

import re
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from processes import BIN, ROOT, attempt, run
from proxy import NGINX, nginx_command, tool

DEPLOY = ROOT / "deploy"
COMPOSE = ("compose.yml", "with-tls.yml", "with-state.yml", "with-cuda.yml")


def test_shell_scripts_pass_shellcheck() -> None:
    scripts = [DEPLOY / "certs", *sorted(DEPLOY.glob("*.sh"))]
    run([tool("shellcheck", shutil.which("shellcheck")), *map(str, scripts)])


def test_the_dockerfile_passes_hadolint() -> None:
    run(
        [
            tool("hadolint", shutil.which("hadolint", path=str(BIN))),
            *map(str, (DEPLOY / "docker").glob("Dockerfile")),
        ]
    )


def test_images_hold_all_that_the_package_and_the_app_need() -> None:
    """The Docker build cannot be run here: what it copies is compared with what is installed."""
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    copied = set(" ".join(re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE)).split())
    passed = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} <= set(passed)
    assert {"pyproject.toml", "README.md", "LICENSE", "common", "client", "server"} <= copied


@pytest.mark.parametrize("files", [COMPOSE[:1], COMPOSE[:3], COMPOSE])
def test_compose_reads_its_files(files: tuple[str, ...]) -> None:
    config = compose_config(files)
    services = config["services"]
    secure = len(files) > 1
    assert set(services) == {"superlink", "run", "device-0", "device-1"} | (
        {"nginx"} if secure else set()
    )
    for name, service in services.items():
        # One network namespace: the SuperLink's port is on a loopback that nobody else has.
        assert name == "superlink" or service["network_mode"] == "service:superlink"
        said = " ".join(service["command"])
        assert ("--insecure" in said) <= (not secure), f"{name}: {said}"
    published = services["superlink"].get("ports", [])
    assert [port["target"] for port in published] == ([8443] if secure else [])
    kept = {mount for service in services.values() for mount in mounts(service)}
    assert ("/srv/data/state" in kept) == secure


def test_compose_has_a_device_with_images_of_its_own() -> None:
    (service,) = compose_config(("device.yml",))["services"].values()
    assert service["entrypoint"] == ["fallow-device"]
    assert "--insecure" not in service["command"]
    asked = [str(BIN / "fallow-device"), *service["command"]]
    assert "--superlink=fleet.example.org:8443" in asked
    help_text = attempt([*asked[:2], "--help"], COLUMNS="200", NO_COLOR="1").stdout
    named = [word.split("=")[0] for word in asked if word.startswith("--")]
    assert [flag for flag in named if flag not in help_text] == []
    assert {"/srv/keys", "/srv/photos"} <= set(mounts(service))


def test_compose_commands_are_those_that_the_programs_know() -> None:
    flags: dict[tuple[str, ...], set[str]] = {}
    for files in (COMPOSE[:1], COMPOSE[:3]):
        for name, service in compose_config(files)["services"].items():
            words = service["command"]
            ours = ("fallow", words[0]) if name in ("superlink", "run") else ("flower-supernode",)
            if name != "nginx":
                named = {word.split("=")[0] for word in words if word.startswith("--")}
                flags.setdefault(ours, set()).update(named)
    assert set(flags) == {("fallow", "serve"), ("fallow", "run"), ("flower-supernode",)}
    for (program, *command), named in flags.items():
        asked = [str(BIN / program), *command, "--help"]
        said = attempt(asked, COLUMNS="200", NO_COLOR="1").stdout
        assert [flag for flag in sorted(named) if flag not in said] == [], asked


def test_kubernetes_manifests_are_valid() -> None:
    kinds = []
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            kubernetes_validate.validate(document, "1.34", strict=True)
            kinds.append(document["kind"])
    assert sorted(kinds) == ["Namespace", "NetworkPolicy", "Secret", "Service", "StatefulSet"]


def test_a_manifest_with_a_wrong_field_is_not() -> None:
    """The validator is worth something."""
    (document, *_) = yaml.safe_load_all((DEPLOY / "kubernetes" / "secret.yaml").read_text())
    document["stringdata"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, "1.34", strict=True)


def test_the_pod_leaves_only_the_proxy_open() -> None:
    documents = {
        d["kind"]: d
        for d in yaml.safe_load_all((DEPLOY / "kubernetes" / "server.yaml").read_text())
    }
    pod = documents["StatefulSet"]["spec"]["template"]["spec"]
    ports = [p["containerPort"] for c in pod["containers"] for p in c.get("ports", [])]
    assert documents["StatefulSet"]["spec"]["replicas"] == 1
    assert ports == [8443]
    assert documents["Service"]["spec"]["ports"] == [
        {"name": "fleet", "port": 8443, "targetPort": "fleet"}
    ]
    assert documents["NetworkPolicy"]["spec"]["ingress"] == [
        {"ports": [{"port": 8443, "protocol": "TCP"}]}
    ]
    assert not any("--insecure" in str(c) for c in pod["containers"])
    volumes = {v["name"] for v in pod["volumes"]} | {
        c["metadata"]["name"] for c in documents["StatefulSet"]["spec"]["volumeClaimTemplates"]
    }
    everything = [*pod["containers"], *pod["initContainers"]]
    assert {m["name"] for c in everything for m in c["volumeMounts"]} == volumes


@pytest.mark.parametrize("unit", sorted((DEPLOY / "systemd").iterdir()), ids=lambda p: p.name)
def test_systemd_units_verify(unit: Path, tmp_path: Path) -> None:
    analyze = tool("systemd-analyze", shutil.which("systemd-analyze"))
    # systemd looks whether the programs are there: here they are in this environment.
    for source in (DEPLOY / "systemd").iterdir():
        text = source.read_text().replace("/opt/fallow/.venv/bin", str(BIN))
        (tmp_path / source.name).write_text(text.replace("/opt/fallow", str(ROOT)))
    tool("nginx", NGINX)
    done = attempt([analyze, "verify", "--man=no", str(tmp_path / unit.name)])
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in done.stderr, done.stderr


def test_a_device_that_died_is_restarted_after_its_key_is_free_again() -> None:
    """For 2 x 30 s the SuperLink holds it for alive and refuses the key (exit 305)."""
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE

    text = (DEPLOY / "systemd" / "fallow-device.service").read_text()
    (seconds,) = re.findall(r"^RestartSec=(\d+)$", text, re.MULTILINE)
    assert int(seconds) > HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL


@pytest.mark.parametrize("name", ["server.conf", "device.conf"])
def test_nginx_reads_its_configuration(name: str, tmp_path: Path) -> None:
    certs = str(DEPLOY / "certs")
    run([certs, "init", str(tmp_path / "ca"), "localhost"])
    run([certs, "device", str(tmp_path / "ca"), "north"])
    folder = tmp_path / "ca" / ("server" if name == "server.conf" else "devices/north")
    changes = {} if name == "server.conf" else {"server fleet.example.org": "server localhost"}
    run([*nginx_command(tmp_path / "nginx", name, folder, changes)[:-2], "-t"])


def compose_config(files: tuple[str, ...]) -> dict[str, Any]:
    plugin = attempt(["docker", "compose", "version"]) if shutil.which("docker") else None
    command = ["docker", "compose"]
    if plugin is None or plugin.returncode:
        command = [tool("docker-compose", shutil.which("docker-compose"))]
    named = [f"--file={DEPLOY / 'compose' / name}" for name in files]
    given = {
        "CERTS": "/srv/certs",
        "DATA": "/srv/data",
        "KEYS": "/srv/keys",
        "PHOTOS": "/srv/photos",
    }
    given["SERVER"] = "fleet.example.org:8443"
    environment = {f"FALLOW_{name}": value for name, value in given.items()}
    text = run([*command, *named, "config"], **environment)
    config: dict[str, Any] = yaml.safe_load(text)
    return config


def mounts(service: dict[str, Any]) -> list[str]:
    """Return where a service's volumes come from, in either of the forms that config prints."""
    return [
        v["source"] if isinstance(v, dict) else v.split(":")[0] for v in service.get("volumes", [])
    ]

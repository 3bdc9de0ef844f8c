"""A fleet as it is deployed: TLS, device keys and a real nginx in front of the SuperLink."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet import FAST, Fleet, fleet
from processes import ROOT, Process, attempt, digests, free_port, run, simulate, until, wait_for
from proxy import ask, nginx_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CERTS = str(ROOT / "deploy" / "certs")
DEVICES = ("north", "south")


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ca") / "certs"
    run([CERTS, "init", str(folder), "localhost"])
    for name in (*DEVICES, "stranger"):
        run([CERTS, "device", str(folder), name])
    return folder


@pytest.fixture(scope="module")
def secure(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(tmp_path_factory.mktemp("secure"), certs) as made:
        made.serve()
        for name in DEVICES:
            run([CERTS, "register", str(certs), name, str(made.state)])
        yield made


@pytest.fixture(scope="module")
def proxy(secure: Fleet, certs: Path) -> int:
    port = free_port()
    changes = {
        "listen 8443": f"listen 127.0.0.1:{port}",
        "127.0.0.1:8000": f"127.0.0.1:{secure.port}",
    }
    command = nginx_command(secure.folder / "proxy", "server.conf", certs / "server", changes)
    secure.start("nginx", command)
    wait_for(port)
    return port


@pytest.fixture(scope="module")
def forwarder(secure: Fleet, certs: Path, proxy: int) -> int:
    """Return the port of the proxy on a device whose server demands client certificates."""
    strict, port = free_port(), free_port()
    changes = {
        "listen 8443": f"listen 127.0.0.1:{strict}",
        "127.0.0.1:8000": f"127.0.0.1:{secure.port}",
        "ssl_verify_client optional": "ssl_verify_client on",
    }
    secure.start(
        "nginx-strict",
        nginx_command(secure.folder / "strict", "server.conf", certs / "server", changes),
    )
    changes = {
        "127.0.0.1:9443": f"127.0.0.1:{port}",
        "server fleet.example.org:8443": f"server 127.0.0.1:{strict}",
        "proxy_ssl_name fleet.example.org": "proxy_ssl_name localhost",
    }
    device = certs / "devices" / DEVICES[1]
    secure.start(
        "nginx-device", nginx_command(secure.folder / "near", "device.conf", device, changes)
    )
    wait_for(strict)
    wait_for(port)
    assert ask(strict, "/v1/fleet/pull-messages", certs / "server" / "ca.crt") == 400
    return port


@pytest.fixture(scope="module")
def devices(secure: Fleet, proxy: int, forwarder: int) -> tuple[Process, Process]:
    """Return two devices that are connected, the second by a proxy of its own."""
    north = secure.secure_device(0, DEVICES[0], proxy)
    south = secure.secure_device(1, DEVICES[1], forwarder)
    log = secure.folder / "superlink.log"
    connected = "no two devices connect"
    until(lambda: log.read_text().count("Activated node") >= 2, 600, connected)
    return north, south


def test_a_whole_run_passes_through_the_proxies(
    secure: Fleet, devices: tuple[Process, Process], tmp_path: Path
) -> None:
    going = secure.run(FAST)
    assert going.wait(1500) == 0, secure.told()
    assert digests(secure.out) == digests(simulate("inline", tmp_path / "inline", FAST))
    assert [device.code() for device in devices] == [None, None]


def test_the_proxy_passes_nothing_but_the_fleet_and_health(proxy: int, certs: Path) -> None:
    ca = certs / "server" / "ca.crt"
    refused = [
        "/",
        "/v1/control/list-runs",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/pull-app-inputs",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "//v1/control/start-run",
        "/docs",
        "/openapi.json",
    ]
    assert {path: ask(proxy, path, ca) for path in refused} == dict.fromkeys(refused, 403)
    assert ask(proxy, "/health", ca, method="GET") == 200
    assert ask(proxy, "/v1/fleet/pull-messages", ca) == 401  # it got there: no key was shown
    assert ask(proxy, "/v1/fleet/pull-messages", ca, size=17 * 2**20) == 413


def test_the_control_api_itself_answers_on_loopback(secure: Fleet, certs: Path) -> None:
    """What the proxy refuses exists: its refusals above mean something."""
    assert ask(secure.port, "/v1/control/list-runs", certs / "server" / "ca.crt") == 200


def test_a_client_certificate_has_to_be_of_our_ca_and_not_revoked(
    proxy: int, certs: Path, tmp_path: Path
) -> None:
    ca, path = certs / "server" / "ca.crt", "/v1/fleet/pull-messages"
    run([CERTS, "init", str(tmp_path / "other"), "localhost"])
    run([CERTS, "device", str(tmp_path / "other"), "north"])

    def client(folder: Path) -> tuple[Path, Path]:
        return folder / "client.crt", folder / "client.key"

    assert ask(proxy, path, ca, client(certs / "devices" / "north")) == 401
    assert ask(proxy, path, ca, client(tmp_path / "other" / "devices" / "north")) == 400


@pytest.mark.usefixtures("devices")
def test_unknown_and_duplicate_keys_are_refused(secure: Fleet, proxy: int, certs: Path) -> None:
    for name in ("stranger", "north"):
        flags = secure.device_flags(name)
        refused = secure.start(f"again-{name}", _supernode(proxy, flags))
        assert refused.wait(300) != 0, refused.said()
        assert "Failed to initialize the connection" in refused.said()
    twice = attempt([CERTS, "register", str(certs), "north", str(secure.state)])
    assert twice.returncode == 2
    assert "registered already" in twice.stderr
    (certs / "devices" / "copy").mkdir()
    shutil.copy(certs / "devices" / "north" / "device.pub", certs / "devices" / "copy")
    copied = attempt([CERTS, "register", str(certs), "copy", str(secure.state)])
    assert copied.returncode == 1
    assert "did not register 'copy'" in copied.stderr


def test_a_revoked_device_is_out_at_once_and_stays_out(
    secure: Fleet, proxy: int, certs: Path, devices: tuple[Process, Process]
) -> None:
    _, south = devices
    run([CERTS, "revoke", str(certs), "south", str(secure.state)])
    assert "south  revoked" in run([CERTS, "list", str(certs)])
    until(lambda: south.code() is not None, 300, f"south goes on: {south.said()[-2000:]}")
    again = secure.start("again-south", _supernode(proxy, secure.device_flags("south")))
    assert again.wait(300) != 0
    assert "Failed to initialize the connection" in again.said()
    (nginx,) = [p for p in secure.running() if p.name == "nginx"]
    nginx.signal(signal.SIGHUP)
    ca, mine = certs / "server" / "ca.crt", certs / "devices" / "south"
    client = (mine / "client.crt", mine / "client.key")

    def refused() -> bool:
        return ask(proxy, "/v1/fleet/pull-messages", ca, client) == 400

    until(refused, 20, "nginx lets a revoked certificate in")


def test_a_second_server_on_one_state_folder_is_refused(secure: Fleet) -> None:
    command = [*secure.serve_command()]
    command[command.index("--port") + 1] = str(free_port())
    second = attempt(command)
    assert second.returncode == 5
    assert "another SuperLink works in" in second.stderr
    port = attempt(
        [*secure.serve_command()[:2], str(secure.folder / "other"), *secure.serve_command()[3:]]
    )
    assert port.returncode == 2
    assert f"port is {secure.port}" in port.stderr


def _supernode(port: int, flags: list[str]) -> list[str]:
    command = ["flower-supernode", *flags, "--superlink", f"localhost:{port}"]
    return [*command, "--port", str(free_port()), "--max-retries", "2"]

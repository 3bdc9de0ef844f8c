"""deploy/certs: what it makes and what it refuses."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from processes import ROOT, attempt, run

CERTS = str(ROOT / "deploy" / "certs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("certs") / "fleet"
    run([CERTS, "init", str(made), "fleet.example.org", "192.0.2.7"])
    run([CERTS, "device", str(made), "north"])
    return made


def test_certificates_verify_strictly_and_only_against_their_own_ca(
    folder: Path, tmp_path: Path
) -> None:
    run([CERTS, "init", str(tmp_path / "other"), "localhost"])
    for leaf in ("server/server.crt", "devices/north/client.crt"):
        ours = ["openssl", "verify", "-x509_strict", "-CAfile", str(folder / "ca" / "ca.crt")]
        other = ["openssl", "verify", "-CAfile", str(tmp_path / "other" / "ca" / "ca.crt")]
        assert attempt([*ours, str(folder / leaf)]).returncode == 0
        assert attempt([*other, str(folder / leaf)]).returncode != 0


def test_the_server_certificate_names_the_hosts_and_the_loopback(folder: Path) -> None:
    found = load(folder / "server" / "server.crt")
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"fleet.example.org", "localhost"}
    assert set(names.get_values_for_type(x509.IPAddress)) == {
        ip_address("192.0.2.7"),
        ip_address("127.0.0.1"),
    }
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert found.not_valid_after_utc < datetime.now(UTC) + timedelta(days=826)


def test_private_keys_are_for_their_owner_alone(folder: Path) -> None:
    keys = sorted(folder.rglob("*.key"))
    assert [k.name for k in keys] == ["ca.key", "client.key", "device.key", "server.key"]
    assert {k.stat().st_mode & 0o777 for k in keys} == {0o600}


def test_the_ca_key_is_in_neither_the_servers_nor_a_devices_folder(folder: Path) -> None:
    assert {p.name for p in (folder / "server").iterdir()} == {
        "ca.crt",
        "server.crt",
        "server.key",
        "crl.pem",
    }
    assert {p.name for p in (folder / "devices" / "north").iterdir()} == {
        "ca.crt",
        "client.crt",
        "client.key",
        "device.key",
        "device.pub",
    }


def test_a_new_server_certificate_leaves_devices_alone(folder: Path) -> None:
    before = load(folder / "server" / "server.crt").serial_number
    run([CERTS, "server", str(folder), "new.example.org"])
    found = load(folder / "server" / "server.crt")
    assert found.serial_number != before
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "new.example.org" in names.get_values_for_type(x509.DNSName)
    run([CERTS, "server", str(folder), "fleet.example.org", "192.0.2.7"])


def test_a_device_may_make_its_own_key(folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "device.key"
    run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key)])
    mine = folder / "devices" / "own-key"
    mine.mkdir()
    (mine / "device.pub").write_bytes(key.with_suffix(".key.pub").read_bytes())
    run([CERTS, "device", str(folder), "own-key"])
    assert not (mine / "device.key").exists()
    assert (mine / "device.pub").read_bytes() == key.with_suffix(".key.pub").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["init", "{folder}", "localhost"], "there is a CA already"),
        (["init", "{new}", "localhost:8443"], "give it without a port"),
        (["init", "{new}", "two words"], "HOST is 'two words'"),
        (["device", "{folder}", "../ca"], "NAME is '../ca'"),
        (["device", "{folder}", "Big"], "NAME is 'Big'"),
        (["device", "{folder}", "north"], "that device has keys already"),
        (["device", "{new}", "north"], "no CA there"),
        (["register", "{folder}", "south", "{new}"], "no {folder}/devices/south/device.pub"),
        (["register", "{folder}", "north", "{new}"], "start 'fallow serve {new}' first"),
        (["serve", "{folder}"], "usage"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], said: str, folder: Path, tmp_path: Path
) -> None:
    places = {"folder": str(folder), "new": str(tmp_path / "new")}
    done = attempt([CERTS, *(a.format(**places) for a in arguments)])
    assert done.returncode == 2
    assert said.format(**places) in done.stderr
    assert not (tmp_path / "new" / "server" / "server.crt").exists()


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())

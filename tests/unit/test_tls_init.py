"""``migrate-lab tls-init``: what it makes is good for both commands, and for nobody else."""

import datetime
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from migrate.cli.lab import main
from migrate.errors import TlsError
from migrate.lab.certificates import read_pair
from migrate.lab.host_certificates import CA_DAYS
from migrate.lab.host_certificates import initialise as initialise_for
from migrate.lab.tls_init import DEFAULT_DAYS, this_host
from migrate.transport.tls_credentials import load_credentials
from proto.link.state import Role

FILES = {
    "ca-cert.pem",
    "client-cert.pem",
    "client-key.pem",
    "server-cert.pem",
    "server-key.pem",
}


def tls_init(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["tls-init", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def initialise(
    directory: Path, hosts: Sequence[Sequence[str]], days: int = DEFAULT_DAYS
) -> list[Path]:
    return initialise_for(directory, hosts, days=days)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_each_host_gets_a_directory_for_both_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pki = tmp_path / "pki"
    hosts = ["--host", "alpha,alpha.example.org,10.0.0.1", "--host", "beta,2001:db8::2"]
    assert tls_init(str(pki), *hosts) == 0
    said = capsys.readouterr().out
    for name in ("alpha", "beta"):
        folder = pki / name
        assert {path.name for path in folder.iterdir()} == FILES
        assert mode(folder) == 0o700
        assert {mode(path) for path in folder.glob("*-key.pem")} == {0o600}
        for role in Role:
            load_credentials(folder, role)
        assert f"{folder}: copy it to {name}" in said
    assert mode(pki / "ca-key.pem") == 0o600
    assert "ca-key.pem signs certificates: keep it here" in said
    assert "PRIVATE KEY" not in said


def test_lifetimes_and_names(tmp_path: Path) -> None:
    (folder,) = initialise(tmp_path, [["alpha", "10.0.0.1"]])
    now = datetime.datetime.now(datetime.UTC)
    for directory, name, days, subject in (
        (tmp_path, "ca", CA_DAYS, "precopy CA of "),
        (folder, "server", DEFAULT_DAYS, "alpha"),
        (folder, "client", DEFAULT_DAYS, "alpha"),
    ):
        pair = read_pair(directory / f"{name}-cert.pem", directory / f"{name}-key.pem")
        left = pair.certificate.not_valid_after_utc - now
        assert days - 1 <= left / datetime.timedelta(days=1) <= days
        assert pair.certificate.not_valid_before_utc < now
        assert pair.certificate.subject.rfc4514_string().startswith(f"CN={subject}")


def test_a_later_call_adds_hosts_to_the_same_ca(tmp_path: Path) -> None:
    (alpha,) = initialise(tmp_path, [["alpha"]])
    (beta,) = initialise(tmp_path, [["beta"]], days=1)
    authority = (tmp_path / "ca-cert.pem").read_bytes()
    assert (alpha / "ca-cert.pem").read_bytes() == authority
    assert (beta / "ca-cert.pem").read_bytes() == authority


def test_without_a_host_it_is_for_this_one(tmp_path: Path) -> None:
    assert tls_init(str(tmp_path)) == 0
    assert (tmp_path / this_host()[0]).is_dir()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--host", "a b"], "expected a host name or an address, got 'a b'"),
        (["--host", "alpha,"], "expected a host name or an address, got ''"),
        (["--host", "../x"], "expected a host name or an address, got '../x'"),
        (["--host", "fe80::1%eth0"], "expected a host name or an address, got 'fe80::1%eth0'"),
        (["--host", "x" * 63 + ".y" * 2], "expected a first name of at most 64 characters"),
        (["--host", "alpha", "--host", "alpha"], "alpha exists already: remove it"),
        (["--days", "0"], "expected --days from 1 to 3650, got 0"),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert tls_init(str(tmp_path / "pki"), *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("migrate-lab tls-init: ")
    assert text in line
    assert not (tmp_path / "pki").exists()


def test_a_host_is_not_overwritten(tmp_path: Path) -> None:
    (folder,) = initialise(tmp_path, [["alpha"]])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert tls_init(str(tmp_path), "--host", "alpha") == 2
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_ca_that_others_can_use_is_not_used(tmp_path: Path) -> None:
    initialise(tmp_path, [["alpha"]])
    (tmp_path / "ca-key.pem").chmod(0o644)
    with pytest.raises(TlsError, match=r"ca-key\.pem can be read by others"):
        initialise(tmp_path, [["beta"]])
    (tmp_path / "ca-key.pem").unlink()
    with pytest.raises(TlsError, match=r"cannot read .*ca-key\.pem: No such file"):
        initialise(tmp_path, [["beta"]])


def test_without_the_library_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for name in ("certificates", "host_certificates"):
        monkeypatch.delitem(sys.modules, f"migrate.lab.{name}")
    assert tls_init(str(tmp_path), "--host", "alpha") == TlsError.exit_code
    assert "needs the library cryptography: pip install 'precopy[tls-init]'" in (
        capsys.readouterr().err
    )

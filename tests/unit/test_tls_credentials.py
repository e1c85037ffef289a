"""What can be wrong with a directory of certificates is said before anybody connects."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from migrate.errors import TlsError, TokenError
from migrate.lab.certificates import Validity
from migrate.transport.guard import MAX_TOKEN_FILE_BYTES, read_token
from migrate.transport.tls_credentials import load_credentials
from proto.link.state import Role
from tests.pki import EXPIRED, NOT_YET, Pki, write_secret

COMMANDS = {Role.SOURCE: "client", Role.DESTINATION: "server"}


@pytest.mark.parametrize("role", Role)
def test_a_good_directory_is_taken(pki: Pki, tmp_path: Path, role: Role) -> None:
    context = load_credentials(pki.directory(tmp_path / "tls"), role)
    assert context.minimum_version.name == "TLSv1_3"


@pytest.mark.parametrize("role", Role)
def test_each_end_needs_its_own_files_only(pki: Pki, tmp_path: Path, role: Role) -> None:
    directory = pki.directory(tmp_path / "tls")
    other = COMMANDS[Role.SOURCE if role is Role.DESTINATION else Role.DESTINATION]
    for path in directory.glob(f"{other}-*"):
        path.unlink()
    load_credentials(directory, role)


@pytest.mark.parametrize("role", Role)
def test_libvirts_own_layout_is_taken(pki: Pki, tmp_path: Path, role: Role) -> None:
    flat = pki.directory(tmp_path / "flat")
    layout = {
        "ca-cert.pem": "CA/cacert.pem",
        "server-cert.pem": "libvirt/servercert.pem",
        "server-key.pem": "libvirt/private/serverkey.pem",
        "client-cert.pem": "libvirt/clientcert.pem",
        "client-key.pem": "libvirt/private/clientkey.pem",
    }
    for here, there in layout.items():
        target = tmp_path / "pki" / there
        target.parent.mkdir(parents=True, exist_ok=True)
        (flat / here).rename(target)
    load_credentials(tmp_path / "pki", role)


Spoil = Callable[[Path, Pki], object]

SPOILT: dict[str, tuple[Spoil, str]] = {
    "no CA": (
        lambda d, _: (d / "ca-cert.pem").unlink(),
        r"ca-cert\.pem is missing: migrate-dst needs ca-cert\.pem, server-cert\.pem and "
        r"server-key\.pem in its --tls-dir",
    ),
    "no certificate": (
        lambda d, _: (d / "server-cert.pem").unlink(),
        r"server-cert\.pem is missing: migrate-dst needs",
    ),
    "no key": (
        lambda d, _: (d / "server-key.pem").unlink(),
        r"server-key\.pem is missing: migrate-dst needs",
    ),
    "key of others": (
        lambda d, _: (d / "server-key.pem").chmod(0o604),
        r"server-key\.pem can be read by others \(mode 0604\): chmod 600 .*server-key\.pem$",
    ),
    "key of another certificate": (
        lambda d, p: (d / "server-key.pem").write_bytes(p.pairs[Role.SOURCE].key_pem),
        r"server-key\.pem is not the key of .*server-cert\.pem$",
    ),
    "certificate of another key": (
        lambda d, p: (d / "server-cert.pem").write_bytes(p.pairs[Role.SOURCE].certificate_pem),
        r"server-key\.pem is not the key of .*server-cert\.pem$",
    ),
    "no PEM": (
        lambda d, _: (d / "server-cert.pem").write_text("certificate"),
        r"server-cert\.pem holds nothing that is PEM and can be used",
    ),
    "a key that is none": (
        lambda d, _: (d / "server-key.pem").write_text("key"),
        r"cannot use .*server-cert\.pem with .*server-key\.pem",
    ),
    "a CA that is none": (
        lambda d, p: (d / "ca-cert.pem").write_bytes(p.pairs[Role.SOURCE].certificate_pem),
        r"ca-cert\.pem holds no certificate of a CA",
    ),
    "another CA": (
        lambda d, _: (d / "ca-cert.pem").write_bytes(Pki().authority.certificate_pem),
        r"server-cert\.pem was not issued by a CA in our ca-cert\.pem$",
    ),
    "no revocation list": (
        lambda d, p: (d / "ca-crl.pem").write_bytes(p.authority.certificate_pem),
        r"ca-crl\.pem holds no revocation list in PEM form",
    ),
    "list of another CA": (
        lambda d, _: (d / "ca-crl.pem").write_bytes(Pki().revoked()),
        r"server-cert\.pem cannot be checked: ca-crl\.pem was not made by its CA",
    ),
    "old list": (
        lambda d, p: (d / "ca-crl.pem").write_bytes(p.revoked(validity=EXPIRED)),
        r"server-cert\.pem cannot be checked: ca-crl\.pem has expired$",
    ),
    "revoked": (
        lambda d, p: (d / "ca-crl.pem").write_bytes(p.revoked(p.pairs[Role.DESTINATION])),
        r"server-cert\.pem was revoked$",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_bad_directory_is_refused_in_one_line(pki: Pki, tmp_path: Path, what: str) -> None:
    spoil, text = SPOILT[what]
    directory = pki.directory(tmp_path / "tls")
    spoil(directory, pki)
    with pytest.raises(TlsError, match=text) as raised:
        load_credentials(directory, Role.DESTINATION)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(
    ("validity", "text"), [(EXPIRED, "has expired$"), (NOT_YET, r"is not valid yet \(are the")]
)
def test_a_certificate_out_of_its_time_is_refused_by_its_owner(
    pki: Pki, tmp_path: Path, role: Role, validity: Validity, text: str
) -> None:
    pair = pki.issue(role, validity=validity)
    # the other role's certificate, which is wrong for it, is not looked at
    directory = pki.directory(tmp_path / "tls", source=pair, destination=pair)
    with pytest.raises(TlsError, match=rf"{COMMANDS[role]}-cert\.pem {text}"):
        load_credentials(directory, role)


@pytest.mark.parametrize("role", Role)
def test_a_certificate_for_another_purpose_is_refused(
    pki: Pki, tmp_path: Path, role: Role
) -> None:
    directory = pki.directory(
        tmp_path / "tls", source=pki.issue(None), destination=pki.issue(None)
    )
    with pytest.raises(TlsError, match=rf"{COMMANDS[role]}-cert\.pem is not for this purpose"):
        load_credentials(directory, role)


def test_no_password_is_asked_for(pki: Pki, tmp_path: Path) -> None:
    directory = pki.directory(tmp_path / "tls")
    key = directory / "server-key.pem"
    encrypt = ["openssl", "pkey", "-aes256", "-passout", "pass:secret", "-in", str(key)]
    encrypted = subprocess.run(encrypt, capture_output=True, check=True).stdout
    key.write_bytes(encrypted)
    with pytest.raises(TlsError, match=r"server-key\.pem is encrypted; expected a key without"):
        load_credentials(directory, Role.DESTINATION)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(TlsError, match=r"--tls-dir .*/nowhere is not a directory$"):
        load_credentials(tmp_path / "nowhere", Role.SOURCE)


# --- the token ------------------------------------------------------------------------------------


def test_white_space_around_a_token_does_not_count(tmp_path: Path) -> None:
    path = write_secret(tmp_path / "token", b" " + b"0123456789abcdef" * 2 + b"\n")
    assert read_token(path) == b"0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("content", "mode", "text"),
    [
        (
            b"x" * 31 + b"\n",
            0o600,
            "has 31 bytes, expected 32 or more: openssl rand -hex 32 > ",
        ),
        (b"", 0o600, "has 0 bytes"),
        (b"x" * 64, 0o644, r"can be read by others \(mode 0644\): chmod 600 "),
        (b"x" * (MAX_TOKEN_FILE_BYTES + 1), 0o600, "is longer than 4096 bytes"),
    ],
)
def test_a_bad_token_is_refused(tmp_path: Path, content: bytes, mode: int, text: str) -> None:
    path = write_secret(tmp_path / "token", content, mode)
    with pytest.raises(TokenError, match=text) as raised:
        read_token(path)
    assert "xxxx" not in str(raised.value)


def test_a_missing_token_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match=r"cannot read .*/token: No such file or directory"):
        read_token(tmp_path / "token")
    with pytest.raises(TokenError, match="is no regular file"):
        read_token(tmp_path)


def test_the_group_may_read_a_secret_of_root_only(tmp_path: Path) -> None:
    path = write_secret(tmp_path / "token", b"x" * 32, 0o640)
    if path.stat().st_uid == 0:
        assert read_token(path) == b"x" * 32
    else:
        with pytest.raises(TokenError, match="can be read by others"):
            read_token(path)

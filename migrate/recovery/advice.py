"""What a person types after a crash: the exact command, for the end of an error message."""

import shlex

from migrate.errors import GuestOn, MigrationError
from migrate.link_security import LinkSecurity
from migrate.params import LinkAddress
from migrate.state_file import COMMIT_SENT, COMMITTED, Record, StateFile

NEEDS_HELP = (GuestOn.NEITHER, GuestOn.UNKNOWN)
"""Where somebody must do something."""

SOCKET = "SOCKET"
"""Stands for what only a person knows: the monitor of a QEMU that we had none of."""


def advise(error: MigrationError, advice: str | None) -> str | None:
    """Complete an error's text by what to do about it, if it leaves the guest nowhere.

    Returns:
        The advice, if it is one.
    """
    if advice is None or error.guest_on not in NEEDS_HELP:
        return None
    error.args = (f"{error}. To recover: {advice}",)
    return advice


def source_advice(state_file: StateFile | None, security: LinkSecurity) -> str | None:
    """The command that recovers a migration from its source; ``None`` where none can.

    Args:
        state_file: Its record, if one was begun.
        security: How the link was protected.
    """
    record = _recoverable(state_file)
    if state_file is None or record is None:
        return None
    here = _command("migrate-src", str(state_file.path), record)
    if record.state != COMMIT_SENT:
        return here
    link = record.facts.link
    there = f"migrate-dst --recover {record.facts.migration_id.hex()} --listen {link}"
    there += _as_there(security)
    here += f" --to {link}{_as_here(security)}"
    return f"'{there}' on the destination host, then '{here}' here"


def destination_advice(
    state_file: StateFile | None, migration_id: bytes | None, security: LinkSecurity
) -> str | None:
    """The same from the destination.

    Args:
        state_file: Its record, if one was begun.
        migration_id: Of the migration, if it came to one.
        security: How the link was protected.
    """
    if migration_id is None:
        return None
    there = f"migrate-src --recover {migration_id.hex()}{_as_there(security)}"
    record = _recoverable(state_file)
    if state_file is None or record is None:
        return f"'{there}' on the source host"
    here = _command("migrate-dst", str(state_file.path), record)
    if record.state == COMMITTED:
        return here
    here += f" --listen {record.facts.link}{_as_here(security)}"
    return f"'{here}' here and '{there}' on the source host"


def asking_advice(record: Record, address: LinkAddress, security: LinkSecurity) -> str:
    """How the destination can be made to answer, or a person can answer for it."""
    number = record.facts.migration_id.hex()
    there = f"migrate-dst --recover {number} --listen {address}{_as_there(security)}"
    return (
        f"start '{there}' on the destination host and try again; or, if its QEMU is dead for "
        "certain and stays so, add --destination-is-fenced"
    )


def _as_here(security: LinkSecurity) -> str:
    """The link's protection as options, as this side was given them."""
    words: list[str] = []
    if security.tls_dir is not None:
        words += ["--tls-dir", str(security.tls_dir)]
    if security.tls_hostname is not None:
        words += ["--tls-hostname", security.tls_hostname]
    for name in security.tls_authz:
        words += ["--tls-authz", name]
    if security.token_file is not None:
        words += ["--token-file", str(security.token_file)]
    return "".join(f" {shlex.quote(word)}" for word in words)


def _as_there(security: LinkSecurity) -> str:
    """The same for the other host, whose files we do not know."""
    tls = " --tls-dir DIR" * (security.tls_dir is not None)
    return tls + " --token-file FILE" * (security.token_file is not None)


def _recoverable(state_file: StateFile | None) -> Record | None:
    record = state_file.record if state_file is not None else None
    return None if record is None or record.facts.form == "simulate" else record


def _command(program: str, path: str, record: Record) -> str:
    command = f"{program} --recover {shlex.quote(path)}"
    if record.facts.form == "incoming":
        return command
    qmp = record.facts.qmp
    return f"{command} --qmp {SOCKET if qmp is None else shlex.quote(str(qmp))}"

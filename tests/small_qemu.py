"""Small QEMUs for tests: they start in well under a second and need no kernel."""

import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import pytest
import trio

from migrate.qemu import queries
from migrate.qemu.qmp_client import QmpClient, open_qmp

CACHE: Final = Path(os.environ.get("PRECOPY_CACHE", Path.home() / ".cache" / "precopy"))
QEMU_7: Final = "qemu-system-x86_64"
QEMUS: Final = {"7.2": QEMU_7, "10.0": str(CACHE / "qemu-10.0" / "qemu-system-x86_64")}
both_versions = pytest.mark.parametrize("version", list(QEMUS))

MACHINE: Final = ["-nodefaults", "-display", "none", "-machine", "q35", "-m", "32M", "-S"]


@asynccontextmanager
async def running_qemu(
    tmp_path: Path, *arguments: str, qemu: str = QEMU_7
) -> AsyncIterator[tuple[Path, trio.Process]]:
    """A small QEMU with a QMP socket; surely dead afterwards."""
    path = tmp_path / "qmp.sock"
    command = [qemu, *MACHINE, "-qmp", f"unix:{path},server=on,wait=off", *arguments]
    with trio.fail_after(60):
        process = await trio.lowlevel.open_process(command)
        try:
            await until(lambda: is_listening(path))
            yield path, process
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


@asynccontextmanager
async def qemu_client(tmp_path: Path, version: str = "7.2") -> AsyncIterator[QmpClient]:
    async with (
        running_qemu(tmp_path, qemu=QEMUS[version]) as (path, _),
        open_qmp(path) as client,
    ):
        yield client


def is_listening(path: Path) -> bool:
    """Ask the kernel; a connection would take the monitor from its first client."""
    rows = (row.split() for row in Path("/proc/net/unix").read_text().splitlines())
    # Column 3 holds the flags; 0x10000 is __SO_ACCEPTCON.
    return any(row[-1] == str(path) and row[3] == "00010000" for row in rows)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  what another process does has no event
        await trio.sleep(0.02)


@contextmanager
def unread_socket(tmp_path: Path) -> Iterator[str]:
    """Listen without ever reading; returns the URI for a migration that cannot end."""
    path = tmp_path / "unread.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield f"unix:{path}"


async def wait_status(client: QmpClient, *statuses: str) -> queries.MigrationStatus:
    """Poll: without the capability ``events`` QEMU tells nobody of its migration status."""
    while (status := await queries.query_migrate(client)).status not in statuses:  # noqa: ASYNC110
        await trio.sleep(0.02)
    return status

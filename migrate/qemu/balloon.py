"""The virtio balloon of a running QEMU: what its guest keeps, and asking it to keep less.

QEMU counts what is left to the guest: ``balloon 512`` in its monitor asks the guest's driver to
give back all but 512 MiB. What the driver gives reads as zero from then on (unless the host may not
discard guest memory). The device holds what was asked for, and that travels with a migration.

Free-page hinting belongs to the same device: during a migration the guest tells which pages it does
not use, and QEMU leaves them out. It is set when QEMU starts (``free-page-hint=on,iothread=…``) and
can't be switched later.

Source: QEMU, hw/virtio/virtio-balloon.c (7.2 and 10.0); tests/qemu/test_balloon.py.
"""

import math
from dataclasses import dataclass
from typing import Final

import trio

from migrate.errors import QmpCommandError
from migrate.qemu.answers import Fields, execute_list
from migrate.qemu.qmp_client import QmpClient
from migrate.qemu.queries import qom_get
from proto.qemu.qmp import JsonValue

STALLED_S: Final = 5.0
"""A driver that finds no free memory tries again five times a second."""

LONGEST_S: Final = 300.0
"""Drivers give more than 1 GB/s."""

_LOOK_S: Final = 0.05
_DEVICE: Final = "virtio-balloon"
_DRIVER_OK: Final = "VIRTIO_CONFIG_S_DRIVER_OK"
_HINTING: Final = "VIRTIO_BALLOON_F_FREE_PAGE_HINT"


@dataclass(frozen=True, slots=True)
class BalloonDevice:
    """A machine's balloon; there is one at most.

    Attributes:
        driver: The guest has a driver for it that is ready.
        hint_offered: QEMU was started with ``free-page-hint=on``.
        hinting: The guest's driver took that up: free pages will be left out.
    """

    driver: bool
    hint_offered: bool
    hinting: bool


async def find_balloon(client: QmpClient) -> BalloonDevice | None:
    """Look for the balloon.

    Returns:
        ``None`` if there is none, or this QEMU cannot be asked (before 7.2).
    """
    try:
        listed = await execute_list(client, "x-query-virtio")
    except QmpCommandError:
        return None
    for item in listed:
        fields = Fields("x-query-virtio", item)
        if fields.text("name") == _DEVICE:
            return await _look_at(client, fields.text("path"))
    return None


async def _look_at(client: QmpClient, path: str) -> BalloonDevice:
    command = "x-query-virtio-status"
    answer = await client.execute(command, path=path)
    Fields(command, answer)
    return BalloonDevice(
        driver=_names(answer.get("status"), "statuses", _DRIVER_OK),
        hint_offered=bool(await qom_get(client, path, "free-page-hint")),
        hinting=_names(answer.get("guest-features"), "dev-features", _HINTING),
    )


def _names(value: JsonValue, key: str, name: str) -> bool:
    """Whether a list of ``NAME: explanation`` holds a name."""
    listed = value.get(key) if isinstance(value, dict) else None
    return isinstance(listed, list) and any(str(item).startswith(name) for item in listed)


async def query_kept_bytes(client: QmpClient) -> int:
    """Ask how much memory the guest has.

    Raises:
        QmpCommandError: There is no balloon.
    """
    command = "query-balloon"
    return Fields(command, await client.execute(command)).integer("actual")


async def ask_to_keep(client: QmpClient, n_bytes: int) -> None:
    """Ask the guest to have ``n_bytes`` of memory from now on; its driver may take its time.

    Raises:
        QmpCommandError: There is no balloon.
    """
    await client.execute("balloon", value=n_bytes)


async def shrink_to(client: QmpClient, n_bytes: int) -> int:
    """Ask the guest to keep ``n_bytes`` only, and wait as long as it gives something.

    What it has not given by then it is not asked for any more.

    Returns:
        What it kept, at most what it had before.
    """
    await ask_to_keep(client, n_bytes)
    kept_bytes = await _wait_given(client, n_bytes)
    if kept_bytes > n_bytes:
        await ask_to_keep(client, kept_bytes)
    return kept_bytes


async def _wait_given(client: QmpClient, n_bytes: int) -> int:
    kept_bytes, since_s = await query_kept_bytes(client), trio.current_time()
    end_s = since_s + LONGEST_S
    with client.listen("BALLOON_CHANGE") as events:
        while kept_bytes > n_bytes and trio.current_time() < min(since_s + STALLED_S, end_s):
            # QEMU tells once a second at most: look in between.
            with trio.move_on_after(_LOOK_S):
                await events.next()
            now_bytes = await query_kept_bytes(client)
            if now_bytes < kept_bytes:
                since_s = trio.current_time()
            kept_bytes = now_bytes
    return kept_bytes


def monitor_words(n_bytes: int) -> str:
    """What to type into a QEMU's human monitor for at least so much."""
    return f"balloon {math.ceil(n_bytes / 2**20)}"

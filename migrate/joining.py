"""Further connections of a link: the source opens them, the destination waits for them a while."""

from collections.abc import Awaitable, Callable

import trio

from migrate.errors import MigrationError
from migrate.transport.channels import SPARED_DESCRIPTORS, has_descriptors
from migrate.transport.link import Link
from migrate.transport.stream import LinkStream

JOIN_S = 5.0
"""From opening a connection to the answer; both are round trips."""

JOINING_S = 10.0
"""How long the destination takes further connections after WELCOME."""


async def open_streams(link: Link, connect: Callable[[], Awaitable[LinkStream]]) -> list[str]:
    """Source: open the connections that were agreed upon beside the first, all at once.

    Those of this epoch that are there, or that somebody else has just asked for, are left alone.

    Args:
        link: Greeted.
        connect: Opens one.

    Returns:
        Why some could not be had, in words; the migration goes on without them.
    """
    assert link.session.welcome is not None, "there is an agreement"
    missing: list[str] = []
    async with trio.open_nursery() as nursery:
        for number in range(1, link.session.welcome.streams):
            if link.session.is_joining(number):
                continue
            if has_descriptors(SPARED_DESCRIPTORS + number):
                nursery.start_soon(_open_one, link, number, connect, missing)
            else:
                missing.append(_not_opened(number, "this host has too few file descriptors"))
    return sorted(missing)


async def _open_one(
    link: Link,
    number: int,
    connect: Callable[[], Awaitable[LinkStream]],
    missing: list[str],
) -> None:
    stream: LinkStream | None = None
    why = f"no answer within {JOIN_S:.0f} s"
    joined = False
    try:
        with trio.move_on_after(JOIN_S):
            stream = await connect()
            if link.session.is_joining(number):  # somebody else was faster
                return
            refused = await link.join(stream, number)
            joined = refused is None
            why = "" if refused is None else refused.message
    except MigrationError as error:
        why = str(error)
    finally:
        if stream is not None and not joined:
            stream.close()
    if not joined:
        missing.append(_not_opened(number, why))


def _not_opened(number: int, why: str) -> str:
    return f"connection {number} of --streams could not be opened: {why}"


async def end_joining(link: Link) -> None:
    """Destination: run as a task after WELCOME; takes further connections for a while after it.

    And for the same time after each cut.
    """
    session = link.session
    while True:
        epoch = session.epoch
        await trio.sleep(JOINING_S)
        if session.epoch == epoch:
            session.end_joining()
            await link.wait_epoch_after(epoch)

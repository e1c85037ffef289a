"""What goes into a destination QEMU."""

from typing import cast

import trio

from migrate.guests.base import DestinationGuest
from migrate.inbound import Inbound
from migrate.qemu.loader import QemuLoader
from migrate.qemu.local_hop import OutgoingHop
from migrate.report.ledger import Ledger
from migrate.runtime import Runtime
from migrate.transport.link import Link
from proto.guest_events import Opaque, OpaqueKind
from proto.link.messages import PrecopyAgain, Switchover
from tests.proto.test_qemu_tail import TAILS

PRELUDE = b"what precedes the end of RAM"


async def test_nothing_of_a_stop_that_was_revoked_goes_into_the_destination() -> None:
    inbound = Inbound(
        cast(DestinationGuest, None),  # decodes what concerns no guest
        cast(Link, None),
        seed=1,
        slot_count=0,
        ledger=Ledger(),
        runtime=cast(Runtime, None),
    )
    ours, qemus = trio.socket.socketpair()
    loader = QemuLoader(OutgoingHop(ours))
    await loader.load([Opaque(OpaqueKind.OPEN_RETURN_PATH, b"")])
    digest = inbound.opaque_digest
    stop, again = Switchover(PRELUDE), PrecopyAgain(1)
    for messages, kept in (((stop,), True), ((again,), False), ((stop, again), False)):
        for message in messages:
            await loader.load(inbound._decode(message))
        with trio.move_on_after(0.2):  # nobody answers
            await loader.load_devices(TAILS["10.0-plain"], 1)
        sent = await qemus.recv(1 << 20)
        assert (PRELUDE in sent) is kept
        assert (inbound.opaque_digest == digest) is not kept
    ours.close()
    qemus.close()

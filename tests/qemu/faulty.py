"""Runs one of the two commands with a fault: ``faulty.py FAULT[=WHAT] COMMAND ARGUMENT …``."""

import os
import signal
import sys
from collections.abc import Callable

import numpy as np
import trio
from numpy.typing import NDArray

import migrate.pages.apply
from migrate.cli import dst, src
from migrate.errors import LandingError
from migrate.guests.qemu_source import QemuSource
from migrate.handover import DestinationHandover
from migrate.inbound import Inbound
from migrate.outbound import Outbound, Read
from migrate.pages.page_cache import SlotStore
from migrate.qemu import virtio_queries
from migrate.qemu.landing import QemuRam
from migrate.qemu.qmp_client import QmpClient
from migrate.state_file import StateFile
from migrate.transport.link import Link
from proto.guest_events import PAGE_SIZE, GuestEvent, PageRun
from proto.link.messages import DeviceStateData, EndOfState, Message
from proto.link.pages import PageBatch


def flip_after_decoding() -> None:
    """One bit of one page changes between decoding and the destination guest."""
    decode = migrate.pages.apply.decode_into_rows
    done = False

    def flipped(batch: PageBatch, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        nonlocal done
        decode(batch, rows)
        if not done:
            rows[len(rows) // 2, 1234] ^= 0x10
            done = True
        return rows

    migrate.pages.apply.decode_into_rows = flipped


def flip_while_landing() -> None:
    """One bit of one page changes on its way into the guest's RAM."""
    write = QemuRam.write
    batches = 0

    def flipped(self: QemuRam, pages: NDArray[np.uint32], data: NDArray[np.uint8]) -> None:
        nonlocal batches
        batches += 1
        data = data.copy()
        if batches == 4:  # behind those that prove where the RAM is
            data[len(data) // 2, 1234] ^= 0x10
        write(self, pages, data)

    QemuRam.write = flipped  # type: ignore[method-assign]


def hide_memory() -> None:
    """The destination QEMU's monitor shows other memory than the one that was written to."""

    async def other(client: QmpClient, address: int, length: int) -> bytes | None:
        await trio.lowlevel.checkpoint()
        return bytes(length)

    virtio_queries.read_physical = other


def lose_memory() -> None:
    """The kernel stops letting the destination command at its QEMU's memory."""
    write = QemuRam.write
    batches = 0

    def refused(self: QemuRam, pages: NDArray[np.uint32], data: NDArray[np.uint8]) -> None:
        nonlocal batches
        batches += 1
        if batches == 4:
            raise LandingError("cannot reach the memory of process 0: not any more")
        write(self, pages, data)

    QemuRam.write = refused  # type: ignore[method-assign]


def read_wrong_slot() -> None:
    """References read the page cache one slot too far."""
    store = SlotStore
    read_into = store.read_into

    def wrong(self: SlotStore, slots: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
        read_into(self, (slots + 1) % self.slot_count, out)

    store.read_into = wrong  # type: ignore[method-assign]


def lose_delta() -> None:
    """One page of each batch that has differences stays as it was."""
    apply_differences = migrate.pages.apply.apply_differences

    def losing(batch: PageBatch, rows: NDArray[np.uint8]) -> None:
        before = rows[-1].copy()
        apply_differences(batch, rows)
        rows[-1] = before

    migrate.pages.apply.apply_differences = losing


def use_wrong_base() -> None:
    """One difference of each batch is applied to a base that was never written."""
    apply_differences = migrate.pages.apply.apply_differences

    def wrong(batch: PageBatch, rows: NDArray[np.uint8]) -> None:
        rows[-1] = 0
        apply_differences(batch, rows)

    migrate.pages.apply.apply_differences = wrong


def lose_frame() -> None:
    """A small batch of pages never reaches the wire, though it got its number."""
    send = Link.send
    lost = False

    async def losing(
        self: Link, message: Message, framed: Callable[[int], None] | None = None
    ) -> int:
        nonlocal lost
        if isinstance(message, PageBatch) and not lost and len(message.literal_pages) < 8:
            lost = True
            buffers = self.session.send(message)
            if framed is not None:
                framed(sum(map(len, buffers)))
            return 0
        return await send(self, message, framed)

    Link.send = losing  # type: ignore[method-assign, assignment]


def drop_batch() -> None:
    """The destination forgets a batch that arrived in order."""
    decode = Inbound._decode_pages
    batches = 0

    def forgetful(self: Inbound, batch: PageBatch) -> list[GuestEvent]:
        nonlocal batches
        batches += 1
        return [] if batches == 2 else decode(self, batch)

    Inbound._decode_pages = forgetful  # type: ignore[method-assign]


def flip_device_state() -> None:
    """One bit of the device state changes on its way."""
    decode = Inbound._decode

    def flipped(self: Inbound, message: Message) -> list[GuestEvent]:
        if isinstance(message, DeviceStateData) and message.codec_id == 1:
            damaged = bytearray(message.encoded)
            damaged[len(damaged) // 2] ^= 1
            message = DeviceStateData(bytes(damaged), message.raw_len, message.codec_id)
        return decode(self, message)

    Inbound._decode = flipped  # type: ignore[method-assign]


def corrupt_avail_ring() -> None:
    """The page of a ring arrives from the source QEMU with another avail index.

    Before anything of ours saw it: digests agree, and only the device's own state contradicts it.
    """
    classify = Outbound._classify

    def corrupted(self: Outbound, events: list[Read]) -> object:
        layout, pinned = self.rings._layout, self.rings._pinned
        if layout is not None and pinned is not None:
            avail, _ = layout.extents[1]
            pieces = layout.physical.locate(avail + 2, 2)
            assert isinstance(pieces, tuple)
            page, at = divmod(pieces[0].offset, PAGE_SIZE)
            block = pinned._names[pieces[0].block]
            for event in events:
                if isinstance(event, PageRun) and event.block == block:
                    event.data[event.pages == page, at : at + 2] = 0x77
        return classify(self, events)

    Outbound._classify = corrupted  # type: ignore[assignment, method-assign]


def slow_verify() -> None:
    """The destination takes a second to compare its digests."""
    verify = DestinationHandover._verify

    async def slowly(self: DestinationHandover, end: EndOfState) -> bytes:
        print("verifying slowly", file=sys.stderr, flush=True)
        await trio.sleep(1)
        return await verify(self, end)

    DestinationHandover._verify = slowly  # type: ignore[method-assign]


def die_when_recorded(wanted: str) -> None:
    """The command is killed right after it recorded this of the handover."""
    write = StateFile.write

    def deadly(
        self: StateFile, state: str, *, run_state: str | None = None, reason: str | None = None
    ) -> None:
        write(self, state, run_state=run_state, reason=reason)
        if state == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    StateFile.write = deadly  # type: ignore[method-assign]


def die_before(step: str) -> None:
    """The command is killed when it is about to tell the source QEMU this."""

    async def deadly(self: QemuSource) -> None:
        await trio.lowlevel.checkpoint()
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(QemuSource, step, deadly)


FAULTS: dict[str, Callable[..., None]] = {
    fault.__name__: fault
    for fault in (
        flip_after_decoding,
        flip_while_landing,
        hide_memory,
        lose_memory,
        read_wrong_slot,
        lose_delta,
        use_wrong_base,
        lose_frame,
        drop_batch,
        flip_device_state,
        corrupt_avail_ring,
        slow_verify,
        die_when_recorded,
        die_before,
    )
}


if __name__ == "__main__":
    fault, _, argument = sys.argv[1].partition("=")
    FAULTS[fault](*[argument] if argument else [])
    command = sys.argv[2]
    del sys.argv[1:3]
    (src if command == "migrate-src" else dst).main()

"""Feeds a destination QEMU: guest events -> stream, PINGs -> what it has loaded so far.

The one place that knows when bytes may go to a QEMU that loads. The tail of the stream is never
given away by accident: device state goes out in ``load_devices``, the end mark in ``load_end``, and
of a stream that is not understood the last byte is always kept back.
"""

from collections.abc import Iterable

import trio

from migrate.errors import GuestOn, QemuStreamBrokenError
from migrate.qemu.local_hop import OutgoingHop
from proto.errors import QemuStreamError
from proto.guest_events import (
    GuestEvent,
    Opaque,
    OpaqueKind,
    PageRun,
    RamBlocks,
    Switchover,
    SwitchoverRevoked,
    ZeroRun,
)
from proto.qemu.format import RP_PONG, RP_SHUT
from proto.qemu.multifd_writer import MultifdWriter
from proto.qemu.return_path import ReturnPathMessage
from proto.qemu.stream_writer import PING_MASK, is_our_ping
from proto.qemu.tail import end_mark_offset

RELAY_MESSAGES = 1024
"""Return path messages kept for the source; only postcopy page requests come in numbers."""


class QemuLoader:
    """One stream into one destination QEMU.

    Attributes:
        consumed: Highest mark that the QEMU has loaded everything before of.
        shut_value: What the QEMU said with SHUT; None until then.
    """

    def __init__(self, hop: OutgoingHop, writer: MultifdWriter | None = None) -> None:
        """Load over one connection, or over those that both ``hop`` and ``writer`` are made for."""
        self._hop = hop
        self._writer = writer or MultifdWriter()
        self._rest = False
        self._held_byte = b""
        self._prelude = b""
        self._end = b""
        self._changed = trio.Event()
        self._closed = False
        self._failure: QemuStreamBrokenError | None = None
        self._last_ping = self._riding = 0
        self._unanswered = True
        self.consumed = 0
        self.shut_value: int | None = None
        self._relay_in, self._relay_out = trio.open_memory_channel[bytes](RELAY_MESSAGES)

    async def read_return_path(self) -> None:
        """Read what the QEMU says until it closes the stream; run this as a task."""
        try:
            while messages := await self._hop.next_messages():
                for message in messages:
                    await self._take(message)
                self._notify()
        except QemuStreamBrokenError as error:
            self._failure = error  # whoever waits for the QEMU hears of it
        finally:
            self._closed = True
            self._notify()
            self._relay_in.close()

    async def _take(self, message: ReturnPathMessage) -> None:
        ours = message.type == RP_PONG and message.value is not None
        if ours and message.value is not None and is_our_ping(message.value):
            # The wire carries 28 bits of the mark; marks in flight are far fewer.
            step = (message.value - self.consumed) & PING_MASK
            if self.consumed + step <= self._last_ping:
                self.consumed += step
                self._settle_riding()
            return
        if message.type == RP_SHUT:
            self.shut_value = message.value
        await self._relay_in.send(message.raw)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def relayed(self) -> bytes:
        """Next return path message that is meant for the source.

        Raises:
            trio.EndOfChannel: The QEMU closed its return path.
        """
        return await self._relay_out.receive()

    async def load(self, events: Iterable[GuestEvent]) -> None:
        """Write events; returns when the socket has taken them.

        Raises:
            QemuStreamBrokenError: The QEMU stopped loading.
        """
        for event in events:
            self._write(event)
        await self._flush()

    async def _flush(self) -> None:
        if intervals := self._writer.take():
            self._unanswered = True
            await self._hop.send_intervals(intervals)

    def _write(self, event: GuestEvent) -> None:
        writer = self._writer
        match event:
            case PageRun(block, pages, data):
                writer.pages(block, pages, data)
            case ZeroRun(block, pages):
                writer.zero_pages(block, pages)
            case RamBlocks(blocks, start):
                writer.open_return_path()
                writer.ram_start(blocks, start)
            case Opaque(kind, data, reason):
                self._write_opaque(kind, data, reason)
            case Switchover(prelude):
                self._prelude = prelude
            case SwitchoverRevoked():
                self._prelude = b""

    def _write_opaque(self, kind: OpaqueKind, data: bytes, reason: str) -> None:
        writer = self._writer
        if kind is OpaqueKind.OPEN_RETURN_PATH:
            writer.open_return_path()
        elif kind not in (OpaqueKind.REST, OpaqueKind.REST_IN_RAM):
            writer.verbatim(data)
        else:
            if not self._rest:
                self._begin_rest(reason, in_ram=kind is OpaqueKind.REST_IN_RAM)
            if data:
                writer.raw(self._held_byte, memoryview(data)[:-1])
                self._held_byte = data[-1:]

    def _begin_rest(self, reason: str, *, in_ram: bool) -> None:
        if self._writer.sync_per_section:
            raise QemuStreamBrokenError(
                f"the source's stream: {reason}. That cannot be passed on over several connections "
                "to a machine of this type: start migrate-dst with --local-channels 0"
            )
        self._writer.open_return_path()
        self._writer.rest(in_ram=in_ram)
        self._rest = True

    async def mark(self, number: int) -> None:
        """Ask to be told when all before was loaded: ``consumed`` then reaches ``number``.

        Where nothing was written since the mark before (the pages land elsewhere), what that one
        was told is true of this one, too, and no message is needed.
        """
        if self._rest:  # no section boundary is known: what the socket took must do
            self.consumed = number
            self._notify()
        elif self._unanswered:
            self._last_ping = number
            self._writer.ping(number)
            await self._flush()
            self._unanswered = False
        else:
            self._riding = number
            self._settle_riding()
            self._notify()

    def _settle_riding(self) -> None:
        """Marks that wrote nothing are consumed as soon as the last PING is answered."""
        if self.consumed >= self._last_ping:
            self.consumed = max(self.consumed, self._riding)

    async def wait_consumed(self, number: int) -> int:
        """Wait until ``consumed`` > ``number``; returns it.

        Raises:
            QemuStreamBrokenError: The QEMU closed the stream before.
        """
        while self.consumed <= number:
            if self._closed:
                raise self._failure or QemuStreamBrokenError(
                    "the destination QEMU stopped loading"
                )
            await self._changed.wait()
        return self.consumed

    async def load_devices(self, state: bytes, mark: int) -> None:
        """Write the end of RAM and the device sections; return when QEMU has loaded them.

        Args:
            state: The whole tail of the stream; its end mark and description are kept back.
            mark: A number above all marks before.
        """
        if self._rest:
            return
        try:
            cut = end_mark_offset(state)
        except QemuStreamError as error:
            raise QemuStreamBrokenError(f"the source's device state: {error}") from error
        self._end = state[cut:]
        self._writer.verbatim(self._prelude)
        self._writer.ram_end()
        self._writer.raw(state[:cut])
        await self._flush()
        await self.mark(mark)
        await self.wait_consumed(mark - 1)

    async def load_end(self) -> None:
        """Deliver the end and wait for the QEMU's verdict.

        Raises:
            QemuStreamBrokenError: It did not load. A destination that starts by itself may have
                run before it failed to say so, so ``guest_on`` is ``unknown``.
        """
        self._hop.expect_end()
        await self._hop.send([self._held_byte, self._end])
        while self.shut_value is None and not self._closed:
            await self._changed.wait()
        if self.shut_value != 0:
            said = "closed the stream" if self.shut_value is None else "reported a failure"
            raise QemuStreamBrokenError(
                f"the destination QEMU {said} at the end of the load", guest_on=GuestOn.UNKNOWN
            )

    async def wait_closed(self) -> None:
        """Wait until the QEMU closed the stream, or we did."""
        while not self._closed:
            await self._changed.wait()

    def close(self) -> None:
        """Close the stream: before the end was delivered, the QEMU can never run the guest."""
        self._hop.close()

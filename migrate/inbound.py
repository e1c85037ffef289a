"""Destination: the way of a page from the link to the guest.

    receive -> decode and digest (one thread, in sequence) -> load -> acknowledge what is consumed

The link is always read, so that keep-alives never wait behind a busy QEMU; the source's window
bounds what piles up here, and a source that ignores it is cut off.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import trio
import xxhash

from migrate.backlog import Backlog
from migrate.errors import HostExhaustedError, LandingError, PeerProtocolError
from migrate.guests.base import EXIT_GRACE_S, DestinationGuest
from migrate.pages.apply import PageApplier
from migrate.pages.old_copy import Slots
from migrate.report.ledger import Ledger
from migrate.runtime import Costs, Runtime, Step
from migrate.transport.link import Link
from proto.codecs import CodecId, decode
from proto.errors import CodecError
from proto.guest_events import (
    GuestEvent,
    Opaque,
    OpaqueKind,
    RamBlocks,
    Switchover,
    SwitchoverRevoked,
)
from proto.link import messages
from proto.link.account import raw_bytes
from proto.link.messages import Message
from proto.link.pages import PageBatch, bytes_by_class
from proto.qemu.format import MAX_DEVICE_STATE_BYTES, MAX_RAM_BYTES

MAX_QUEUED_BYTES = 192 * 2**20
"""The source's window never lets more than 64 MiB be under way; three times that is no accident."""

MIN_START_BYTES = 5
"""A RAM section's start has at least its type and its id."""

MAX_BURST_BYTES = 8 << 20
"""What is decoded in one thread hop, if so much has queued up."""

ACK_PAUSE_S = 0.005
"""Acknowledgements are at least this far apart: little beside a window of 40 ms, and a fast link
would otherwise carry one for every batch in each of its two meanings."""

CODEC_NAMES: Mapping[int, str] = {
    CodecId.RAW: "none",
    CodecId.LZ4: "lz4",
    CodecId.ZSTD: "zstd",
    CodecId.WORDS: "words",
}

MARK_BYTES = 1 << 20
"""The guest is asked what it has loaded about once per batch of this size."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """One numbered message, ready for the guest.

    Attributes:
        seq: Its number.
        events: What the guest must be given; may be nothing.
        encoded_bytes: Its page content on the wire.
    """

    seq: int
    events: list[GuestEvent]
    encoded_bytes: int


@dataclass(slots=True)
class InboundState:
    """What the handover and the progress display look at.

    Attributes:
        blocks: The guest's RAM blocks, None before they are announced.
        applier: Decoder and digests; None before the RAM blocks.
        return_path: The source's guest has a return path.
        run_state: The guest's run state at its stop.
        end: The source's END_OF_STATE.
        device_state: The tail of the stream, complete once ``end`` is set.
        opaque_rest: Why the rest of the stream is not understood, empty if it is.
        loaded_seq: Highest frame written to the guest.
        round_no: The round that arrives.
    """

    blocks: RamBlocks | None = None
    applier: PageApplier | None = None
    end: messages.EndOfState | None = None
    device_state: bytes = b""
    opaque_rest: str = ""
    loaded_seq: int = 0
    round_no: int = 0
    stopped: bool = False


class Inbound:
    """Runs the destination's pipeline until END_OF_STATE was loaded up to."""

    def __init__(
        self,
        guest: DestinationGuest,
        link: Link,
        *,
        seed: int,
        slot_count: int,
        ledger: Ledger,
        runtime: Runtime,
        old_pages: Slots | None = None,
    ) -> None:
        self._old_pages = old_pages
        self._guest = guest
        self._runtime = runtime
        self._link = link
        self._seed = seed
        self._slot_count = slot_count
        self._ledger = ledger
        self._queue: Backlog[tuple[int, Message]] = Backlog(MAX_QUEUED_BYTES)
        self._device_state: list[bytes] = []
        self._opaque_hash = xxhash.xxh3_128(seed=seed)
        self._before_stop: xxhash.xxh3_128 | None = None
        self._unmarked_bytes = self._device_state_bytes = 0
        self._answers = trio.Event()
        self._flowing = trio.Event()
        self._news = trio.Event()
        self._consumption = trio.Event()
        self._watching = trio.CancelScope()
        self._consumed_seq = 0
        self._last_seq: int | None = None
        self.state = InboundState()

    @property
    def opaque_digest(self) -> bytes:
        """Digest over everything that is not pages, as it arrived."""
        return self._opaque_hash.digest()

    def take(self, message: Message) -> None:
        """Queue a numbered message that the link has just received.

        Raises:
            PeerProtocolError: The source sends far beyond its window.
        """
        self._flowing.set()
        self._news.set()
        size = _held_bytes(message)
        if self._queue.bytes_waiting + size > MAX_QUEUED_BYTES:
            raise PeerProtocolError(f"{self._link.peer} ignores the window it was given")
        if isinstance(message, messages.OpaqueData):
            self._ledger.add_bytes("opaque", len(message.encoded))
        elif isinstance(message, messages.DeviceStateData):
            self._ledger.add_bytes("device_state", len(message.encoded))
        self._queue.put_nowait((self._link.session.sequence.received_seq, message), size)

    async def wait_flowing(self) -> None:
        """Wait until the source's guest begins to flow."""
        await self._flowing.wait()

    async def run(self) -> None:
        """Load everything up to END_OF_STATE; returns when the guest has taken all RAM.

        Raises:
            GuestError: The guest stopped loading.
            PeerProtocolError: A batch does not decode.
        """
        self._ledger.start_round(0, 0)
        to_load, decoded = trio.open_memory_channel[list[Decoded]](1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_consumed)
            nursery.start_soon(self._acknowledge)
            nursery.start_soon(self._decode_all, to_load)
            await self._load_all(decoded)

    async def _decode_all(self, out: trio.MemorySendChannel[list[Decoded]]) -> None:
        async with out:
            while self.state.end is None:
                burst = await self._queue.get_burst(MAX_BURST_BYTES)
                decoded = await self._decode_beside(burst)
                await out.send(decoded)

    async def _decode_beside(self, burst: list[tuple[int, Message]]) -> list[Decoded]:
        unreachable: LandingError | None = None
        decoded: list[Decoded] = []
        try:
            decoded = await self._runtime.work(
                Step.DECODE, _decode_costs(burst), self._decode_burst, burst
            )
        except LandingError as error:
            unreachable = error
        if unreachable is not None:
            # Memory is seen to be gone before the process that it belonged to is.
            with trio.move_on_after(EXIT_GRACE_S):
                await self._guest.watch()
            raise unreachable
        return decoded

    def _decode_burst(self, burst: list[tuple[int, Message]]) -> list[Decoded]:
        """Decode what has queued up, in order; runs in a thread, one burst at a time."""
        decoded = []
        for seq, message in burst:
            try:
                events = self._decode(message)
            except CodecError as error:
                raise PeerProtocolError(f"frame {seq} does not decode: {error}") from error
            encoded_bytes = message.payload_len if isinstance(message, PageBatch) else 0
            decoded.append(Decoded(seq, events, encoded_bytes))
        return decoded

    def _decode(self, message: Message) -> list[GuestEvent]:
        match message:
            case PageBatch():
                return self._decode_pages(message)
            case messages.RamBlockTable(blocks, start):
                self._opaque_hash.update(start)
                return [self._take_blocks(RamBlocks(blocks, bytes(start)))]
            case messages.OpaqueData(kind, encoded, raw_len, codec_id, reason):
                data = bytes(decode(codec_id, encoded, raw_len))
                self._opaque_hash.update(data)
                if kind in (OpaqueKind.REST, OpaqueKind.REST_IN_RAM):
                    self.state.opaque_rest = self.state.opaque_rest or reason
                return [Opaque(kind, data, reason)]
            case messages.Switchover(prelude):
                self._before_stop = self._opaque_hash.copy()
                self._opaque_hash.update(prelude)
                self.state.stopped = True
                return [Switchover(bytes(prelude))]
            case messages.DeviceStateData(encoded, raw_len, codec_id):
                data = bytes(decode(codec_id, encoded, raw_len))
                self._opaque_hash.update(data)
                self._device_state.append(data)
                self._device_state_bytes += raw_len
                if self._device_state_bytes > MAX_DEVICE_STATE_BYTES:
                    raise PeerProtocolError(f"{self._link.peer} sends endless device state")
            case messages.RoundEnd():
                self._begin_round()
            case messages.PrecopyAgain():
                self._begin_again()
                return [SwitchoverRevoked()]
            case messages.EndOfState():
                if self.state.applier is None and not self.state.opaque_rest:
                    raise PeerProtocolError(f"{self._link.peer} ended a guest without RAM")
                self.state.device_state = b"".join(self._device_state)
                self.state.end = message
        return []

    def _begin_round(self) -> None:
        self.state.round_no += 1
        self._ledger.start_round(len(self._ledger.rounds), 0)

    def _begin_again(self) -> None:
        """Forget the end of a stream that was broken off; the guest has got nothing of it.

        Its pages stay: they are what the source's tables say of us.
        """
        if self.state.opaque_rest:
            raise PeerProtocolError(
                f"{self._link.peer} goes back to pre-copy, and the guest has got what follows"
            )
        self._device_state.clear()
        self._device_state_bytes = 0
        if self._before_stop is not None:
            self._opaque_hash, self._before_stop = self._before_stop, None
        self.state.stopped = False
        self._begin_round()

    def _decode_pages(self, batch: PageBatch) -> list[GuestEvent]:
        applier = self.state.applier
        assert applier is not None, "the link protocol allows no page before the block list"
        applied = applier.apply(batch)
        round_no = len(self._ledger.rounds) - 1
        self._ledger.add_pages(round_no, batch.pages_by_class, bytes_by_class(batch))
        return [event for event in (applied.zeros, applied.pages) if event is not None]

    def _take_blocks(self, blocks: RamBlocks) -> RamBlocks:
        ram_bytes = sum(block.used_length for block in blocks.blocks)
        if len(blocks.start) < MIN_START_BYTES or ram_bytes > MAX_RAM_BYTES:
            raise PeerProtocolError(
                f"{self._link.peer} announces no guest RAM that can be: {ram_bytes} bytes, "
                f"a start of {len(blocks.start)}"
            )
        self.state.blocks = blocks
        context = self._link.session.context
        try:
            self.state.applier = PageApplier(
                blocks.blocks,
                seed=self._seed,
                slot_count=self._slot_count,
                allocate=self._guest.allocate,
                fresh_blocks=self._guest.fresh_blocks(blocks),
                landed=self._guest.landed_blocks(blocks),
                old_pages=self._old_pages,
                first_old=context.slots.first_old(context.shape),
            )
        except MemoryError as error:
            raise HostExhaustedError(
                f"no memory for the tables of {ram_bytes} bytes of guest RAM"
            ) from error
        return blocks

    async def _load_all(self, bursts: trio.MemoryReceiveChannel[list[Decoded]]) -> None:
        async with bursts:
            async for burst in bursts:
                events = [event for item in burst for event in item.events]
                await self._guest.load(events)
                self.state.loaded_seq = burst[-1].seq
                if any(_opens_return_path(event) for event in events):
                    self._answers.set()
                await self._mark(burst[-1].seq, sum(item.encoded_bytes for item in burst))
        self._last_seq = self.state.loaded_seq
        await self._guest.mark(self._last_seq)
        while not self._all_consumed:
            await self._consumption.wait()
        self._watching.cancel()
        self._news.set()

    async def _mark(self, seq: int, size: int) -> None:
        """Ask for a confirmation where a megabyte went out, or the source may be waiting for it.

        No mark can be set before the return path is open.
        """
        self._unmarked_bytes += size
        if not self._answers.is_set():
            return
        if self._unmarked_bytes >= MARK_BYTES // 4 or self._queue.is_empty:
            self._unmarked_bytes = 0
            await self._guest.mark(seq)

    @property
    def _all_consumed(self) -> bool:
        return self._last_seq is not None and self._consumed_seq >= self._last_seq

    async def _watch_consumed(self) -> None:
        """Follow what the guest has consumed until ``_load_all`` has seen enough."""
        with self._watching:
            await self._answers.wait()
            while True:
                self._consumed_seq = await self._guest.wait_consumed(self._consumed_seq)
                self._news.set()
                self._consumption.set()
                self._consumption = trio.Event()

    async def _acknowledge(self) -> None:
        """Tell the source what arrived and what was consumed; one task, so never backwards."""
        while not self._all_consumed:
            await self._news.wait()
            self._news = trio.Event()
            await self._link.acknowledge(self._consumed_seq)
            if not self._all_consumed:
                await trio.sleep(ACK_PAUSE_S)


def _decode_costs(burst: list[tuple[int, Message]]) -> Costs:
    """What decoding a burst is made of."""
    return [
        (CODEC_NAMES.get(message.codec_id, ""), raw_bytes(message))
        for _, message in burst
        if isinstance(message, PageBatch | messages.OpaqueData | messages.DeviceStateData)
    ]


def _held_bytes(message: Message) -> int:
    """What a queued message keeps in memory, or will, decoded."""
    match message:
        case PageBatch():
            numbers = len(message.zero_pages) + message.content_count
            return message.payload_len + 8 * numbers + 256
        case messages.OpaqueData() | messages.DeviceStateData():
            return message.raw_len + 256
    return 256


def _opens_return_path(event: GuestEvent) -> bool:
    """Whether the guest can be asked what it has loaded, from this event on."""
    rest = (OpaqueKind.REST, OpaqueKind.REST_IN_RAM)
    return isinstance(event, RamBlocks) or (isinstance(event, Opaque) and event.kind in rest)

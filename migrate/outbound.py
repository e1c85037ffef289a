"""Source: the way of a page from the guest to the link.

    guest events -> classify (one thread at a time, in order) -> encode (threads) -> send (credit)

The unit is a batch of up to 256 pages. Order is kept: batches are numbered by their place in the
backlog, and only encoding runs out of order. What waits between the guest and the link is bounded:
tightly while the guest runs, by ``STOPPED_BACKLOG_BYTES`` once it is stopped.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import trio
import xxhash

from migrate.backlog import Backlog
from migrate.control.codec_choice import CodecChoice, CodecSetting
from migrate.control.goodput import Goodput
from migrate.control.token_bucket import TokenBucket
from migrate.control.window import CreditPolicy
from migrate.guests.base import SourceGuest
from migrate.pages.classify import ClassifiedPages, Classifier
from migrate.params import Compress
from migrate.report.ledger import Ledger
from migrate.transport.link import Link
from proto.codecs import CodecId, make_codec
from proto.guest_events import (
    PAGE_SIZE,
    DeviceState,
    End,
    GuestEvent,
    Opaque,
    OpaqueKind,
    PageRun,
    RamBlock,
    RamBlocks,
    RoundEnd,
    Switchover,
    ZeroRun,
)
from proto.link import messages
from proto.link.messages import Message
from proto.link.pages import PageBatch, bytes_by_class, split_zero_pages

ENCODE_THREADS = 2
"""Encoders at work at a time; the machines this is measured on have two cores."""

READ_AHEAD_EVENTS = 2
"""Page runs between reading and classifying: one is worked on, one waits."""

RUNNING_BACKLOG_BYTES = 3 * 2**20
"""Raw bytes that may wait for the link while the guest runs: what the encoders hold."""

STOPPED_BACKLOG_BYTES = 64 * 2**20
"""The same once the guest is stopped; the link drains it, the source QEMU never waits for us."""

OPAQUE_PIECE_BYTES = 1 << 20
"""Device state and opaque bytes travel in pieces of this size."""

HANDOVER_RESERVE_MS = 110
"""Taken off the downtime limit before QEMU hears it: what verify, load and commit need here."""

NOTE_NS = 20_000_000
"""How often the round's goodput is noted and the kernel's send queue fitted to the link."""

CODEC_IDS = {"none": CodecId.RAW, "lz4": CodecId.LZ4, "zstd": CodecId.ZSTD}


@dataclass(slots=True)
class Outgoing:
    """One numbered message on its way to the link, in its place in the order.

    Attributes:
        round_no: Round its pages belong to.
        message: What to send; None until it is encoded.
        ready: Set when ``message`` is.
        pages: Pages by class, for the ledger.
        raw_bytes: What it stands for in the destination guest.
        codec: How its pages were encoded.
    """

    round_no: int
    message: Message | None = None
    ready: trio.Event = field(default_factory=trio.Event)
    pages: dict[str, int] = field(default_factory=dict)
    raw_bytes: int = 0
    codec: CodecSetting | None = None


@dataclass(slots=True)
class RoundNotes:
    """What a round's report says besides its counts.

    Attributes:
        goodput_bps: What the link carried near its end.
        codec_batches: Batches by codec.
    """

    goodput_bps: float | None = None
    codec_batches: dict[str, int] = field(default_factory=dict)

    @property
    def codec(self) -> str | None:
        """The codec most batches had."""
        counts = self.codec_batches
        return max(counts, key=lambda name: counts[name]) if counts else None


@dataclass(slots=True)
class OutboundState:
    """What other tasks may look at while pages flow.

    Attributes:
        blocks: The guest's RAM blocks, empty before they are known.
        ram_bytes: Size of the guest's RAM, 0 before it is known.
        round_no: The round being sent.
        opaque_rest: Why the rest of the stream is not understood, empty if it is.
        run_state: The guest's run state at the stop, from its device state.
        device_state_at_ns: When the last page was read and device state began.
        end_at_ns: When the end of the state was sent.
        classifier: The source's picture of the destination; None before the RAM blocks.
        switchover_at_ns: When the guest was seen to be stopped.
    """

    blocks: tuple[RamBlock, ...] = ()
    ram_bytes: int = 0
    round_no: int = 0
    opaque_rest: str = ""
    run_state: str | None = None
    device_state_at_ns: int | None = None
    end_at_ns: int | None = None
    classifier: Classifier | None = None
    switchover_at_ns: int | None = None


class Outbound:
    """Runs the source's pipeline from the first event to END_OF_STATE."""

    def __init__(
        self,
        guest: SourceGuest,
        link: Link,
        *,
        seed: int,
        slot_count: int,
        compress: Compress,
        max_bandwidth_bps: int | None,
        ledger: Ledger,
    ) -> None:
        self._guest = guest
        self._link = link
        self._seed = seed
        self._slot_count = slot_count
        self._compress = compress
        self._ledger = ledger
        self._backlog: Backlog[Outgoing] = Backlog(RUNNING_BACKLOG_BYTES)
        self._encoders = trio.CapacityLimiter(ENCODE_THREADS)
        self._classifying = trio.CapacityLimiter(1)
        self._opaque_hash = xxhash.xxh3_128(seed=seed)
        self._choice = CodecChoice(ENCODE_THREADS)
        self.goodput = Goodput()
        self._carried = Goodput()
        self.credit = CreditPolicy(self.goodput)
        self._acked = trio.Event()
        self._sent_ns: dict[int, int] = {}
        self._framed_wire_bytes = self._framed_raw_bytes = 0
        self._consumed_wire_bytes = self._consumed_raw_bytes = 0
        self._starved = True
        self._received_wire_bytes = 0
        self._link_idle = True
        self._noted_ns = self._fitted_ns = 0
        self._bucket = (
            TokenBucket(max_bandwidth_bps, max(64 * 1024, max_bandwidth_bps // 50))
            if max_bandwidth_bps
            else None
        )
        self.round_notes: dict[int, RoundNotes] = {}
        self.state = OutboundState()

    async def run(self, pending: list[GuestEvent]) -> None:
        """Carry everything over; returns when END_OF_STATE is sent.

        Args:
            pending: Events that were already taken from the guest.

        Raises:
            GuestError: The guest's stream broke.
            PeerLostError: The link broke.
        """
        self._ledger.start_round(0, time.monotonic_ns())
        to_classify, read = trio.open_memory_channel[GuestEvent](READ_AHEAD_EVENTS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, to_classify, pending)
            nursery.start_soon(self._classify, read, nursery)
            await self._send_all()

    # --- read ---------------------------------------------------------------------------------

    async def _read(
        self, out: trio.MemorySendChannel[GuestEvent], pending: list[GuestEvent]
    ) -> None:
        events = pending
        async with out:
            while True:
                for event in events:
                    if isinstance(event, Switchover):
                        self._stopped()
                    await out.send(event)
                    if isinstance(event, End):
                        return
                events = await self._guest.next_events()

    def _stopped(self) -> None:
        self.state.switchover_at_ns = time.monotonic_ns()
        self._backlog.raise_limit(STOPPED_BACKLOG_BYTES)

    # --- classify -----------------------------------------------------------------------------

    async def _classify(
        self, read: trio.MemoryReceiveChannel[GuestEvent], nursery: trio.Nursery
    ) -> None:
        async with read:
            async for event in read:
                match event:
                    case PageRun():
                        await self._classify_run(event, nursery)
                    case ZeroRun():
                        await self._classify_zeros(event)
                    case RamBlocks(blocks, start):
                        self.state.classifier = Classifier(
                            blocks, seed=self._seed, slot_count=self._slot_count
                        )
                        self.state.blocks = blocks
                        self.state.ram_bytes = sum(block.used_length for block in blocks)
                        self._opaque_hash.update(start)
                        await self._put(messages.RamBlockTable(blocks, start))
                    case RoundEnd(round_no):
                        self.state.round_no = round_no + 1
                        await self._put(messages.RoundEnd(round_no))
                    case Switchover(prelude):
                        self._opaque_hash.update(prelude)
                        await self._put(messages.Switchover(prelude))
                    case Opaque():
                        await self._put_opaque(event)
                    case DeviceState(data):
                        if self.state.device_state_at_ns is None:
                            self.state.device_state_at_ns = time.monotonic_ns()
                        await self._put_device_state(data)
                    case End(run_state):
                        self.state.run_state = run_state
                        await self._put(self._end_of_state(run_state))

    async def _classify_run(self, run: PageRun, nursery: trio.Nursery) -> None:
        assert self.state.classifier is not None
        pages = await trio.to_thread.run_sync(
            self.state.classifier.classify, run, limiter=self._classifying
        )
        item = self._outgoing(pages)
        if len(pages.literal_pages) == 0:
            self._make_ready(item, pages, CodecSetting("none"), None)
        else:
            codec = self._pick_codec()
            if codec.codec == "none":
                self._make_ready(item, pages, codec, None)
            else:
                nursery.start_soon(self._encode, item, pages, codec)
        await self._backlog.put(item, pages.literals.nbytes)

    async def _classify_zeros(self, run: ZeroRun) -> None:
        assert self.state.classifier is not None
        pages = self.state.classifier.classify_zeros(run)
        same = pages.same_count
        for zeros in split_zero_pages(pages.zero_pages) or [pages.zero_pages]:
            part = ClassifiedPages(
                run.block,
                zeros,
                same,
                pages.ref_pages,
                pages.ref_slots,
                pages.literal_pages,
                pages.literal_slots,
                pages.literals,
            )
            same = 0
            if part.page_count == 0:
                continue
            item = self._outgoing(part)
            self._make_ready(item, part, CodecSetting("none"), None)
            await self._backlog.put(item, 0)

    def _outgoing(self, pages: ClassifiedPages) -> Outgoing:
        item = Outgoing(self.state.round_no)
        item.pages = {
            "zero": len(pages.zero_pages),
            "same": pages.same_count,
            "ref": len(pages.ref_pages),
            "literal": len(pages.literal_pages),
        }
        return item

    def _pick_codec(self) -> CodecSetting:
        wish = self._compress
        if wish.mode != "auto":
            return CodecSetting(wish.mode, (wish.level or 1) if wish.mode == "zstd" else 0)
        return self._choice.choose(self._carried.estimate(time.monotonic_ns()))

    # --- encode -------------------------------------------------------------------------------

    async def _encode(
        self, item: Outgoing, pages: ClassifiedPages, codec: CodecSetting
    ) -> None:
        encoded, encode_ns = await trio.to_thread.run_sync(
            _encode_literals, pages, codec, limiter=self._encoders
        )
        if self._compress.mode == "auto":
            length = pages.literals.nbytes if encoded is None else len(encoded)
            self._choice.observe(codec, pages.literals.nbytes, length, encode_ns)
        self._make_ready(item, pages, codec, encoded)

    def _make_ready(
        self, item: Outgoing, pages: ClassifiedPages, codec: CodecSetting, encoded: bytes | None
    ) -> None:
        raw = np.ascontiguousarray(pages.literals).reshape(-1).data
        item.message = PageBatch(
            block=pages.block,
            zero_pages=pages.zero_pages,
            same_count=pages.same_count,
            ref_pages=pages.ref_pages,
            ref_slots=pages.ref_slots,
            literal_pages=pages.literal_pages,
            literal_slots=pages.literal_slots,
            codec_id=CodecId.RAW if encoded is None else CODEC_IDS[codec.codec],
            encoded=raw if encoded is None else encoded,
        )
        item.raw_bytes = (len(pages.ref_pages) + len(pages.literal_pages)) * PAGE_SIZE
        item.codec = codec if len(pages.literal_pages) else None
        item.ready.set()

    # --- everything that is not a page ----------------------------------------------------------

    async def _put(self, message: Message, raw_bytes: int = 0) -> None:
        item = Outgoing(self.state.round_no, message, raw_bytes=raw_bytes)
        item.ready.set()
        await self._backlog.put(item, raw_bytes)

    async def _put_opaque(self, event: Opaque) -> None:
        if event.kind in (OpaqueKind.REST, OpaqueKind.REST_IN_RAM) and event.reason:
            self.state.opaque_rest = event.reason
            # no switchover can be seen in what is not understood: never stop reading for long
            self._backlog.raise_limit(STOPPED_BACKLOG_BYTES // 4)
        self._opaque_hash.update(event.data)
        reason = event.reason
        for start in range(0, max(1, len(event.data)), OPAQUE_PIECE_BYTES):
            piece = event.data[start : start + OPAQUE_PIECE_BYTES]
            encoded, codec_id = await self._encode_bytes(piece)
            message = messages.OpaqueData(event.kind, encoded, len(piece), codec_id, reason)
            reason = ""
            await self._put(message, len(piece))

    async def _put_device_state(self, data: bytes) -> None:
        self._opaque_hash.update(data)
        for start in range(0, len(data), OPAQUE_PIECE_BYTES):
            piece = data[start : start + OPAQUE_PIECE_BYTES]
            encoded, codec_id = await self._encode_bytes(piece)
            await self._put(messages.DeviceStateData(encoded, len(piece), codec_id), len(piece))

    async def _encode_bytes(self, data: bytes) -> tuple[bytes, int]:
        """Device state is mostly zero bytes: always compress, unless the user said none."""
        if self._compress.mode == "none" or len(data) < 256:
            return data, CodecId.RAW
        codec = make_codec(CodecId.ZSTD, 1)
        encoded = await trio.to_thread.run_sync(codec.encode, data, limiter=self._encoders)
        return (data, CodecId.RAW) if encoded is None else (encoded, CodecId.ZSTD)

    def _end_of_state(self, run_state: str | None) -> messages.EndOfState:
        classifier = self.state.classifier
        return messages.EndOfState(
            run_state=run_state,
            ram_digest=classifier.table.digest() if classifier else bytes(16),
            opaque_digest=self._opaque_hash.digest(),
            page_count=classifier.table.page_count if classifier else 0,
        )

    # --- send ---------------------------------------------------------------------------------

    async def _send_all(self) -> None:
        rounds = 1
        while True:
            if self._backlog.is_empty:
                self._starved = True
            item = await self._backlog.get()
            if not item.ready.is_set():
                self._starved = True
            await item.ready.wait()
            assert item.message is not None
            if isinstance(item.message, messages.RoundEnd):
                self._ledger.start_round(rounds, time.monotonic_ns())
                rounds += 1
            await self._wait_credit()
            await self._send_one(item)
            if isinstance(item.message, messages.EndOfState):
                self.state.end_at_ns = time.monotonic_ns()
                return

    async def _wait_credit(self) -> None:
        window = self._link.connection.window
        credit = self.credit
        while (
            window.outstanding_wire_bytes >= credit.window_wire_bytes
            or window.outstanding_raw_bytes >= credit.window_raw_bytes
        ):
            await self._acked.wait()

    async def _send_one(self, item: Outgoing) -> None:
        message = item.message
        assert message is not None
        if self._bucket is not None and isinstance(message, PageBatch):
            delay_ns = self._bucket.delay_ns(len(message.encoded) + 100, time.monotonic_ns())
            if delay_ns > 0:
                await trio.sleep(delay_ns / 1e9)
        await self._link.send(message, lambda wire_bytes: self._framed(item, wire_bytes))

    def _framed(self, item: Outgoing, wire_bytes: int) -> None:
        """Account for a numbered frame at the moment it begins to be written."""
        now_ns = time.monotonic_ns()
        window = self._link.connection.window
        self._sent_ns[window.sent_seq] = now_ns
        self._framed_wire_bytes += wire_bytes
        self._framed_raw_bytes = self._consumed_raw_bytes + window.outstanding_raw_bytes
        self.goodput.sent(wire_bytes, now_ns)
        self._carried.sent(wire_bytes, now_ns)
        if isinstance(item.message, PageBatch):
            round_no = min(item.round_no, len(self._ledger.rounds) - 1)
            self._ledger.add_pages(round_no, item.pages, bytes_by_class(item.message))
            self._note_round(round_no, item)
        self.settle_ledger()

    def settle_ledger(self) -> None:
        """Bring everything that is not pages into the ledger; afterwards it closes to the byte."""
        sent = self._link.connection.sent_bytes
        for kind in ("opaque", "device_state", "control"):
            self._ledger.add_bytes(kind, sent[kind] - getattr(self._ledger.bytes, kind))

    def _note_round(self, round_no: int, item: Outgoing) -> None:
        notes = self.round_notes.setdefault(round_no, RoundNotes())
        if item.codec is not None:
            name = str(item.codec)
            notes.codec_batches[name] = notes.codec_batches.get(name, 0) + 1
        now_ns = time.monotonic_ns()
        if now_ns - self._noted_ns > NOTE_NS:
            self._noted_ns = now_ns
            if estimate := self.goodput.estimate(now_ns):
                notes.goodput_bps = estimate.wire_bps

    @property
    def codec_text(self) -> str | None:
        """The codec most batches of this round had."""
        notes = self.round_notes.get(len(self._ledger.rounds) - 1)
        return notes.codec if notes else None

    def expected_downtime_ms(self, remaining_bytes: int | None) -> float | None:
        """What the downtime would be if the guest were stopped now; None while unknown."""
        estimate = self.goodput.estimate(time.monotonic_ns())
        if remaining_bytes is None or estimate is None or estimate.raw_bps <= 0:
            return None
        waiting = (
            self._backlog.bytes_waiting + self._link.connection.window.outstanding_raw_bytes
        )
        return (remaining_bytes + waiting) / estimate.raw_bps * 1000 + HANDOVER_RESERVE_MS

    def take_ack(self) -> None:
        """Use an acknowledgement that the connection has just applied to its window."""
        now_ns = time.monotonic_ns()
        window = self._link.connection.window
        newest = 0
        while self._sent_ns and next(iter(self._sent_ns)) <= window.consumed_seq:
            newest = self._sent_ns.pop(next(iter(self._sent_ns)))
        if newest:
            self.credit.rtt_sample(now_ns - newest, now_ns)
        consumed_wire = self._framed_wire_bytes - window.outstanding_wire_bytes
        consumed_raw = self._framed_raw_bytes - window.outstanding_raw_bytes
        wire_bytes = consumed_wire - self._consumed_wire_bytes
        raw_bytes = consumed_raw - self._consumed_raw_bytes
        self._consumed_wire_bytes, self._consumed_raw_bytes = consumed_wire, consumed_raw
        self._take_received(window.retained_bytes, raw_bytes, now_ns)
        if not wire_bytes:
            return
        starved, self._starved = self._starved, False
        self.goodput.acked(wire_bytes, raw_bytes, now_ns, source_limited=starved)
        self.credit.acked(wire_bytes, raw_bytes, now_ns, source_limited=starved)
        self._acked.set()
        self._acked = trio.Event()

    def _take_received(self, retained_bytes: int, raw_bytes: int, now_ns: int) -> None:
        """Learn the link's own rate from what arrived, whether or not the guest took it in.

        What the destination QEMU cannot swallow is no reason for a stronger codec.
        """
        received = self._framed_wire_bytes - retained_bytes
        wire_bytes, self._received_wire_bytes = received - self._received_wire_bytes, received
        if wire_bytes:
            idle, self._link_idle = self._link_idle, retained_bytes == 0
            self._carried.acked(wire_bytes, raw_bytes, now_ns, source_limited=idle)
            if now_ns - self._fitted_ns > NOTE_NS:
                self._fitted_ns = now_ns
                if estimate := self._carried.estimate(now_ns):
                    self._link.allow_unsent(estimate.wire_bps)


def _encode_literals(pages: ClassifiedPages, codec: CodecSetting) -> tuple[bytes | None, int]:
    """Compress a batch's literals together; None if they do not shrink. Runs in a thread."""
    started_ns = time.perf_counter_ns()
    raw = np.ascontiguousarray(pages.literals).reshape(-1)
    encoded = make_codec(CODEC_IDS[codec.codec], codec.level or 1).encode(raw.data)
    return encoded, time.perf_counter_ns() - started_ns

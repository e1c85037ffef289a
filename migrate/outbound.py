"""Source: the way of a page from the guest to the backlog of the link.

    guest events -> classify (in order, in one thread) -> encode (in threads) -> backlog

The unit is a batch of 256 to 1024 pages. Order is kept: a message takes its place in the backlog
before it is encoded, and only encoding runs out of order. What waits between the guest and the
link is bounded: tightly while the guest runs, by ``STOPPED_BACKLOG_BYTES`` once it is stopped.

Where the migration goes back to pre-copy (``migrate.way_back``), the stages stay as they are and
another stream of the guest's enters the first one. What was classified by then is sent all the
same: the tables of both ends count with it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import trio
import xxhash

from migrate.checkpoint.source_side import SourceCopies
from migrate.control.codec_choice import CodecSetting
from migrate.control.first_walk import FirstWalk
from migrate.encoding import PageEncoder, Plan
from migrate.errors import GuestError
from migrate.guests.base import SourceGuest
from migrate.pages.classify import ClassifiedPages, Classifier
from migrate.pages.page_cache import affordable_slots, less_cache
from migrate.ring_guard import SourceRingGuard
from migrate.runtime import Costs, Runtime, Step
from migrate.sending import (
    STOPPED_BACKLOG_BYTES,
    Outgoing,
    Sender,
)
from migrate.splicing import Splice
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
from proto.link.page_lists import split_zero_pages
from proto.link.pages import PageBatch
from proto.qemu.stream_reader import POSTCOPY_REASON

OPAQUE_PIECE_BYTES = 1 << 20
"""Device state and opaque bytes travel in pieces of this size."""

BURST_NS = 10_000_000
MIN_BURST_BYTES = 1 << 20
MAX_BURST_BYTES = 8 << 20
"""How much is read from the guest at a time: 10 ms of the present rate, within these bounds. A
large burst is few large batches, which saves thread hops on a fast link, and on a slow one it would
be downtime."""

LINK_LOOK_S = 0.02
"""How often a lost link is looked for."""

STATE_CODEC = CodecSetting("zstd", 1)
"""Codec of device state and opaque bytes."""

POSTCOPY_ADVISE = bytes.fromhex("08 0003 0010")
"""How QEMU announces at the start of a stream that it may switch to postcopy."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Stands between two streams of the guest's; ``count`` as in PRECOPY_AGAIN."""

    count: int


Read = GuestEvent | Turn
Classified = ClassifiedPages | GuestEvent | Turn
"""Page events are replaced by their classes, all others pass."""


@dataclass(slots=True)
class OutboundState:
    """What other tasks may look at while pages flow.

    Attributes:
        blocks: The guest's RAM blocks, empty before they are known.
        round_no: The round being classified.
        opaque_rest: Why the rest of the stream is not understood, empty if it is.
        run_state: The guest's run state at the stop, from its device state.
        switchover_at_ns: When the guest was seen to be stopped.
        classifier: The source's picture of the destination; None before the RAM blocks.
    """

    blocks: tuple[RamBlock, ...] = ()
    round_no: int = 0
    opaque_rest: str = ""
    run_state: str | None = None
    switchover_at_ns: int | None = None
    classifier: Classifier | None = None

    @property
    def ram_bytes(self) -> int:
        """Size of the guest's RAM, 0 before it is known."""
        return sum(block.used_length for block in self.blocks)


class Outbound:
    """Runs the source's pipeline from the first event to END_OF_STATE, and again where need be."""

    def __init__(
        self,
        guest: SourceGuest,
        sender: Sender,
        *,
        seed: int,
        slot_count: int,
        landed: frozenset[str],
        encoder: PageEncoder,
        runtime: Runtime,
        rings: SourceRingGuard,
        copies: SourceCopies,
        warn: Callable[[str], None],
    ) -> None:
        self._guest = guest
        self._runtime = runtime
        self._seed = seed
        self._slot_count = slot_count
        self._landed = landed
        self._opaque_hash = xxhash.xxh3_128(seed=seed)
        self._before_stop: xxhash.xxh3_128 | None = None
        self._splice = Splice()
        self._walk = FirstWalk()
        self._to_classify, self._read_out = trio.open_memory_channel[list[Read]](0)
        self._nursery: trio.Nursery | None = None
        self._reading = trio.CancelScope()
        self._left = trio.Event()
        self._judging = trio.CancelScope()
        self._judged = trio.Event()
        self._judged.set()
        self._turned_back = False
        self._encoder = encoder
        self.sender = sender
        self.rings = rings
        self._copies = copies
        self._warn = warn
        self._warnings: list[str] = []
        self.state = OutboundState()

    async def run(self, pending: list[GuestEvent]) -> None:
        """Carry everything over; run this as a task as long as the migration lasts.

        Args:
            pending: Events that were already taken from the guest.

        Raises:
            GuestError: The guest's stream broke.
            PeerLostError: The link broke.
        """
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._classify_all, self._nursery)
            self._nursery.start_soon(self._read_stream, pending)
            await self.sender.run()

    # --- back to pre-copy ---------------------------------------------------------------------

    def turn_back(self) -> None:
        """Read no more of this stream, and send no end of it; call while there is no link."""
        self._turned_back = True
        self.sender.turn_back()
        self._reading.cancel()
        self._judging.cancel()

    async def wait_left(self) -> None:
        """Wait until nothing is read from the guest any more; it is not asked for rings either."""
        await self._left.wait()
        await self._judged.wait()

    def guest_runs(self) -> None:
        """Say that the guest goes on at the source."""
        self.state.switchover_at_ns = None
        self.sender.let_little_wait()

    async def say_again(self, count: int) -> None:
        """Say PRECOPY_AGAIN behind what is left of this stream; returns when it was heard."""
        await self._to_classify.send([Turn(count)])
        await self.sender.wait_turned()

    def read_another(self) -> None:
        """Go on with another stream of the guest's, which has begun."""
        assert self._nursery is not None, "run() comes first"
        self._reading, self._left = trio.CancelScope(), trio.Event()
        self._splice.begin_another()
        self._walk = FirstWalk()
        self._nursery.start_soon(self._read_stream, [])

    # --- read ---------------------------------------------------------------------------------

    async def _read_stream(self, pending: list[GuestEvent]) -> None:
        """Read one stream up to its end, or until the migration turns back."""
        try:
            with self._reading:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._follow_switchover)
                    await self._read(pending)
                    nursery.cancel_scope.cancel()
        finally:
            self._left.set()

    async def _read(self, pending: list[GuestEvent]) -> None:
        events = pending
        while True:
            if any(isinstance(event, Switchover) for event in events):
                self._guest_stopped()
            self._walk.see(events)
            self.sender.to_come_bytes = self._walk.to_come_bytes
            last = events[-1] if events else None
            if events := self._splice.take(events):
                self._copies.keep(events)
                await self._to_classify.send(list(events))
            if isinstance(last, End):
                return
            await self._wait_link()
            events = await self._guest.next_events(self._burst_bytes())

    async def _wait_link(self) -> None:
        """Read nothing from a guest that runs while there is no link.

        Its last pages could find room here, and then it would be stopped, and stand still.
        """
        # Two things of others' to wait for, which have no event in common.
        while self.sender.is_cut_off and not self._is_stopped:  # noqa: ASYNC110
            await trio.sleep(LINK_LOOK_S)

    @property
    def _is_stopped(self) -> bool:
        return self.state.switchover_at_ns is not None

    async def _follow_switchover(self) -> None:
        await self._guest.wait_switchover()
        self._guest_stopped()

    def _guest_stopped(self) -> None:
        """From here on the guest waits, and so the source QEMU must not."""
        if self.state.switchover_at_ns is None:
            self.state.switchover_at_ns = self._runtime.now_ns()
            self.sender.let_wait(STOPPED_BACKLOG_BYTES)

    def _burst_bytes(self) -> int:
        estimate = self.sender.consumed_estimate()
        wanted = int(estimate.raw_bps * BURST_NS / 1e9) if estimate else 0
        return min(max(wanted, MIN_BURST_BYTES), MAX_BURST_BYTES)

    def note_remaining(self, remaining_bytes: int) -> None:
        """Note what the guest says that it has yet to send of this round."""
        self._walk.see_remaining(remaining_bytes)

    # --- classify -----------------------------------------------------------------------------

    async def _classify_all(self, nursery: trio.Nursery) -> None:
        async for events in self._read_out:
            classified = await self._runtime.work(
                Step.CLASSIFY, _classify_costs(events), self._classify, events
            )
            while self._warnings:
                self._warn(self._warnings.pop())
            for item in classified:
                if isinstance(item, ClassifiedPages):
                    await self._put_pages(item, nursery)
                elif isinstance(item, Turn):
                    await self._put_turn(item)
                elif not self._turned_back:
                    await self._put_event(item)

    def _classify(self, events: list[Read]) -> list[Classified]:
        """Classify the pages of a burst, in order; runs in a thread, one burst at a time."""
        classified: list[Classified] = []
        rule = self._encoder.keep_rule()
        for event in events:
            if isinstance(event, RamBlocks):
                self.state.classifier = self._new_classifier(event.blocks)
                self.rings.blocks(event.blocks)
            classifier = self.state.classifier
            if isinstance(event, PageRun | ZeroRun):
                assert classifier is not None, "a guest announces its blocks before its pages"
                self.rings.see(event)
                classified.append(
                    classifier.classify_zeros(event)
                    if isinstance(event, ZeroRun)
                    else classifier.classify(event, rule)
                )
            else:
                classified.append(event)
        return classified

    def _new_classifier(self, blocks: tuple[RamBlock, ...]) -> Classifier:
        landed = frozenset(i for i, block in enumerate(blocks) if block.idstr in self._landed)
        # Landing was agreed on, but for blocks that this guest has not: no slots, no base.
        wished = self._slot_count if landed or not self._landed else 0
        wished = min(wished, sum(block.page_count for block in blocks))
        slot_count = affordable_slots(wished)
        if slot_count < wished:
            self._warnings.append(less_cache(wished, slot_count))
        return Classifier(
            blocks,
            seed=self._seed,
            slot_count=slot_count,
            landed=landed,
            old_slots=self._copies.old_slots(blocks),
        )

    async def _put_pages(self, pages: ClassifiedPages, nursery: trio.Nursery) -> None:
        if not pages.content_bytes:
            for part in _split(pages):
                item = self._outgoing(part)
                self._make_ready(item, self._encoder.pass_on(part))
                await self.sender.backlog.put(item, item.raw_bytes + part.zero_pages.nbytes)
            return
        item = self._outgoing(pages)
        link, hungry = self.sender.look_at_link()
        plan = self._encoder.plan(pages, link, hungry=hungry)
        item.codec = plan.literals
        if plan.is_instant:
            self._make_ready(item, self._encoder.pass_on(pages))
        else:
            nursery.start_soon(self._encode, item, pages, plan)
        await self.sender.backlog.put(item, pages.content_bytes)

    def _outgoing(self, pages: ClassifiedPages) -> Outgoing:
        item = Outgoing(self.state.round_no)
        item.raw_bytes = pages.content_count * PAGE_SIZE
        self._copies.count_references(pages.ref_slots)
        return item

    async def _encode(self, item: Outgoing, pages: ClassifiedPages, plan: Plan) -> None:
        await self._encoder.encode(pages, plan, partial(self._make_ready, item))

    def _make_ready(self, item: Outgoing, batch: PageBatch) -> None:
        item.message = batch
        item.ready.set()

    # --- everything that is not a page ----------------------------------------------------------

    async def _put_event(self, event: GuestEvent) -> None:
        match event:
            case RamBlocks(blocks, start):
                self.state.blocks = blocks
                self._opaque_hash.update(start)
                await self._put(messages.RamBlockTable(blocks, start))
            case RoundEnd():  # its own number counts in one stream only
                self.state.round_no += 1
                await self._put(messages.RoundEnd(self.state.round_no - 1))
            case Switchover(prelude):
                self._before_stop = self._opaque_hash.copy()
                self._opaque_hash.update(prelude)
                await self._put(messages.Switchover(prelude))
            case Opaque():
                await self._put_opaque(event)
            case DeviceState(data):
                await self._put_device_state(data)
            case End(run_state):
                self.state.run_state = run_state
                await self._judge_rings()
                if not self._turned_back:
                    await self._put(self._end_of_state(run_state))

    async def _judge_rings(self) -> None:
        self._judged = trio.Event()
        try:
            with self._judging:
                await self.rings.settle()
        finally:
            self._judged.set()

    async def _put_turn(self, turn: Turn) -> None:
        """What was put of this stream's end counts no more."""
        self._turned_back = False
        self._judging = trio.CancelScope()
        if self._before_stop is not None:
            self._opaque_hash, self._before_stop = self._before_stop, None
        self.rings.forget_state()
        self.state.run_state = None
        self.state.round_no += 1
        await self._put(messages.PrecopyAgain(turn.count))

    async def _put(self, message: Message, raw_bytes: int = 0) -> None:
        item = Outgoing(self.state.round_no, message, raw_bytes=raw_bytes)
        item.ready.set()
        await self.sender.backlog.put(item, raw_bytes)

    async def _put_opaque(self, event: Opaque) -> None:
        advised = event.kind is OpaqueKind.COMMAND and event.data.startswith(POSTCOPY_ADVISE)
        if advised or event.reason == POSTCOPY_REASON:
            raise GuestError(
                "the source QEMU is set up for postcopy, which cannot be verified before the "
                "guest runs: switch its capability postcopy-ram off"
            )
        if event.kind in (OpaqueKind.REST, OpaqueKind.REST_IN_RAM) and event.reason:
            self.state.opaque_rest = event.reason
            # no switchover can be seen in what is not understood: never stop reading for long
            self.sender.let_wait(STOPPED_BACKLOG_BYTES // 4)
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
        self.rings.take_device_state(data)
        for start in range(0, len(data), OPAQUE_PIECE_BYTES):
            piece = data[start : start + OPAQUE_PIECE_BYTES]
            encoded, codec_id = await self._encode_bytes(piece)
            await self._put(messages.DeviceStateData(encoded, len(piece), codec_id), len(piece))

    async def _encode_bytes(self, data: bytes) -> tuple[bytes, int]:
        """Device state is mostly zero bytes: always compress, unless the user said none."""
        if not self._encoder.may_compress or len(data) < 256:
            return data, CodecId.RAW
        codec = make_codec(CodecId.ZSTD, STATE_CODEC.level)
        costs = ((str(STATE_CODEC), len(data)),)
        encoded = await self._runtime.work(Step.ENCODE, costs, codec.encode, data)
        return (data, CodecId.RAW) if encoded is None else (encoded, CodecId.ZSTD)

    def _end_of_state(self, run_state: str | None) -> messages.EndOfState:
        classifier = self.state.classifier
        return messages.EndOfState(
            run_state=run_state,
            ram_digest=classifier.table.digest() if classifier else bytes(16),
            opaque_digest=self._opaque_hash.digest(),
            page_count=classifier.table.page_count if classifier else 0,
            rings_checked=self.rings.all_checked,
        )


def _split(pages: ClassifiedPages) -> list[ClassifiedPages]:
    """Cut a batch without literals so that each part's zero runs fit one message."""
    zeros = split_zero_pages(pages.zero_pages)
    first = replace(pages, zero_pages=zeros[0]) if zeros else pages
    nothing = replace(
        pages,
        same_count=0,
        ref_pages=pages.ref_pages[:0],
        ref_slots=pages.ref_slots[:0],
    )
    parts = [first, *(replace(nothing, zero_pages=part) for part in zeros[1:])]
    return [part for part in parts if part.page_count]


def _classify_costs(events: list[Read]) -> Costs:
    """What classifying a burst is made of."""
    return [("", event.data.nbytes) for event in events if isinstance(event, PageRun)]

"""Source: the last stage, from the backlog to the link.

Sends messages in order, as far as the credit goes: what the destination guest has not consumed is
bandwidth that does not exist. Also keeps the account of every byte and measures the link.
"""

from dataclasses import dataclass, field, replace

import trio

from migrate.backlog import Backlog
from migrate.control.codec_choice import CodecSetting
from migrate.control.goodput import Goodput, GoodputEstimate
from migrate.control.link_meter import LinkEstimate, LinkMeter
from migrate.control.token_bucket import TokenBucket
from migrate.control.window import CreditPolicy
from migrate.report.ledger import Ledger
from migrate.runtime import Runtime
from migrate.transport.link import Link
from proto.link import messages
from proto.link.messages import Message
from proto.link.pages import PageBatch, bytes_by_class

RUNNING_BACKLOG_BYTES = 3 * 2**20
"""Raw bytes that may wait for the link while the guest runs: what the encoders hold."""

MAX_RUNNING_BACKLOG_BYTES = 8 * 2**20
RUNNING_BACKLOG_S = 0.04
"""On a fast link what waits may be as much as passes in this time: less runs empty when a busy
host gives one of our threads its processor late."""

MIN_RUNNING_BACKLOG_BYTES = 2**20
MOST_RUNNING_BACKLOG_S = 0.05
"""On a slow link no more than passes in this time: QEMU does not know of it, so it is downtime."""

ZERO_SCAN_BPS = 8e9
"""How fast a QEMU passes memory that is all zero. It sends next to nothing meanwhile."""

MOST_AHEAD_S = 0.12
MOST_AHEAD_BYTES = 32 * 2**20
"""As long as so much memory is still to come that the guest cannot be stopped soon, more may wait:
no more than is gone by the time that the QEMU has passed all of it, were it zero."""

STOPPED_BACKLOG_BYTES = 64 * 2**20
"""The same once the guest is stopped; the link drains it, the source QEMU never waits for us."""

HANDOVER_MS = 110
"""What verify, load and commit need here, at most."""

HANDOVER_RESERVE_MS = 150
"""Taken off the downtime limit before QEMU hears it: the same, and what waits for the link, of
which QEMU knows nothing."""

NOTE_NS = 20_000_000
"""How often the round's goodput is noted and the kernel's send queue fitted to the link."""


@dataclass(slots=True)
class Outgoing:
    """One numbered message on its way to the link, in its place in the order.

    Attributes:
        round_no: Round its pages belong to.
        message: What to send; None until it is encoded.
        ready: Set when ``message`` is.
        raw_bytes: What it stands for in the destination guest.
        codec: How its pages were encoded.
    """

    round_no: int
    message: Message | None = None
    ready: trio.Event = field(default_factory=trio.Event)
    raw_bytes: int = 0
    codec: CodecSetting | None = None


@dataclass(slots=True)
class RoundNotes:
    """What a round's report says besides its counts.

    Attributes:
        goodput_bps: What the link carried near its end.
        codec_batches: Batches by codec.
        dirty_pages_per_s: Rate at which the guest wrote to clean pages, as it says itself.
        throttle_percent: How much its vCPUs were throttled.
    """

    goodput_bps: float | None = None
    dirty_pages_per_s: float | None = None
    throttle_percent: int = 0
    codec_batches: dict[str, int] = field(default_factory=dict)

    @property
    def codec(self) -> str | None:
        """The codec most batches had."""
        counts = self.codec_batches
        return max(counts, key=lambda name: counts[name]) if counts else None


class Sender:
    """Sends what is put into ``backlog`` and follows the acknowledgements.

    Attributes:
        backlog: Messages in the order in which they leave.
        to_come_bytes: Guest memory that the source has yet to look at before it can stop the guest.
        goodput: What the destination guest consumes.
        carried: What the link carries, whether or not the guest takes it in.
        meter: The same as the kernel sees it, where one does.
        credit: How much may be under way.
        round_notes: By round number.
        device_state_ns: When the last page was sent and device state began, None before.
        ended_ns: When END_OF_STATE was sent, None before, and again once it is taken back.
    """

    def __init__(
        self, link: Link, ledger: Ledger, runtime: Runtime, max_bandwidth_bps: int | None
    ) -> None:
        self._link = link
        self._now_ns = runtime.now_ns
        self._ledger = ledger
        self.backlog: Backlog[Outgoing] = Backlog(RUNNING_BACKLOG_BYTES)
        self.to_come_bytes = 0
        self._fits_backlog = True
        self.goodput = Goodput()
        self.carried = Goodput()
        self.meter = LinkMeter()
        self._waits_for_encoder = False
        self.credit = CreditPolicy(self.goodput)
        self.round_notes: dict[int, RoundNotes] = {}
        self.device_state_ns: int | None = None
        self.ended_ns: int | None = None
        self._acked = trio.Event()
        self._ended = trio.Event()
        self._ending = trio.CancelScope()
        self._turned_back = False
        self._turn_seq: int | None = None
        self._rounds = 0
        self._sent_ns: dict[int, int] = {}
        self._framed_wire_bytes = self._framed_raw_bytes = 0
        self._consumed_wire_bytes = self._consumed_raw_bytes = 0
        self._received_wire_bytes = 0
        self._epoch = 0
        self._starved = True
        self._link_idle = True
        self._noted_ns = self._fitted_ns = self._consumed_ns = 0
        self._consumed: GoodputEstimate | None = None
        self._max_bandwidth_bps = max_bandwidth_bps
        self._bucket = (
            TokenBucket(max_bandwidth_bps, max(64 * 1024, max_bandwidth_bps // 50))
            if max_bandwidth_bps
            else None
        )

    async def run(self) -> None:
        """Send what comes; run this as a task as long as the migration lasts."""
        self._start_round()
        while True:
            if self.backlog.is_empty:
                self._starved = True
            item = await self.backlog.get()
            if not item.ready.is_set():
                self._starved = True
                self._waits_for_encoder = True
                await item.ready.wait()
                self._waits_for_encoder = False
            assert item.message is not None
            if isinstance(item.message, messages.EndOfState):
                await self._send_end(item)
                continue
            if isinstance(item.message, messages.RoundEnd | messages.PrecopyAgain):
                self._start_round()
            if isinstance(item.message, messages.DeviceStateData) and not self.device_state_ns:
                self.device_state_ns = self._now_ns()
            await self._wait_credit()
            await self._send_one(item)
            if isinstance(item.message, messages.PrecopyAgain):
                self._turn()

    def _start_round(self) -> None:
        self._ledger.start_round(self._rounds, self._now_ns())
        self._rounds += 1

    async def _send_end(self, item: Outgoing) -> None:
        """Send END_OF_STATE, unless it is taken back meanwhile.

        Where it has its number by then, the session takes it back with the next epoch.
        """
        if self._turned_back:
            return
        with self._ending:
            await self._wait_credit()
            await self._send_one(item)
            await self._link.flush()
        if not self._turned_back:
            self.ended_ns = self._now_ns()
            self._ended.set()

    async def wait_ended(self) -> None:
        """Wait until END_OF_STATE is out."""
        await self._ended.wait()

    # --- back to pre-copy -----------------------------------------------------------------------

    def turn_back(self) -> None:
        """Say no END_OF_STATE before PRECOPY_AGAIN; call while there is no link."""
        self._turned_back = True
        self._turn_seq = None
        self._ending.cancel()
        self.ended_ns = None
        self._ended = trio.Event()

    def _turn(self) -> None:
        self._turned_back = False
        self._ending = trio.CancelScope()
        self.device_state_ns = None  # that was another stop's
        self._turn_seq = self._link.session.window.sent_seq
        self._ring()

    async def wait_turned(self) -> None:
        """Wait until the destination has heard PRECOPY_AGAIN, and so all before it."""
        window = self._link.session.window
        while self._turn_seq is None or window.received_seq < self._turn_seq:
            await self._acked.wait()

    def _ring(self) -> None:
        self._acked.set()
        self._acked = trio.Event()

    @property
    def is_cut_off(self) -> bool:
        """There is no link at the moment."""
        return self._link.is_down

    async def _wait_credit(self) -> None:
        window = self._link.session.window
        credit = self.credit
        while (
            window.outstanding_wire_bytes >= credit.window_wire_bytes
            or window.outstanding_raw_bytes >= credit.window_raw_bytes
            or window.is_full
        ):
            await self._acked.wait()

    async def _send_one(self, item: Outgoing) -> None:
        message = item.message
        assert message is not None
        if self._bucket is not None and isinstance(message, PageBatch):
            delay_ns = self._bucket.delay_ns(message.payload_len + 100, self._now_ns())
            if delay_ns > 0:
                await trio.sleep(delay_ns / 1e9)
        await self._link.send(message, lambda wire_bytes: self._framed(item, wire_bytes))

    def _framed(self, item: Outgoing, wire_bytes: int) -> None:
        """Account for a numbered frame at the moment it begins to be written."""
        now_ns = self._now_ns()
        window = self._link.session.window
        self._sent_ns[window.sent_seq] = now_ns
        self._framed_wire_bytes += wire_bytes
        self._framed_raw_bytes = self._consumed_raw_bytes + window.outstanding_raw_bytes
        self.goodput.sent(wire_bytes, now_ns)
        self.carried.sent(wire_bytes, now_ns)
        if isinstance(item.message, PageBatch):
            round_no = min(item.round_no, len(self._ledger.rounds) - 1)
            pages = item.message.pages_by_class
            self._ledger.add_pages(round_no, pages, bytes_by_class(item.message))
            self._note_round(round_no, item)
        self.settle_ledger()

    def settle_ledger(self) -> None:
        """Bring everything that is not pages into the ledger; afterwards it closes to the byte."""
        sent = self._link.session.sent_bytes
        for kind in ("opaque", "device_state", "control", "resent"):
            self._ledger.add_bytes(kind, sent[kind] - getattr(self._ledger.bytes, kind))

    def _note_round(self, round_no: int, item: Outgoing) -> None:
        notes = self.round_notes.setdefault(round_no, RoundNotes())
        if item.codec is not None:
            name = str(item.codec)
            notes.codec_batches[name] = notes.codec_batches.get(name, 0) + 1
        now_ns = self._now_ns()
        if now_ns - self._noted_ns > NOTE_NS:
            self._noted_ns = now_ns
            if estimate := self.consumed_estimate():
                notes.goodput_bps = estimate.wire_bps

    def note_guest(self, dirty_pages_per_s: float | None, throttle_percent: int | None) -> None:
        """Note what the guest says of itself under the round that is being sent."""
        notes = self.round_notes.setdefault(len(self._ledger.rounds) - 1, RoundNotes())
        # QEMU says 0 until it has looked for a second.
        notes.dirty_pages_per_s = dirty_pages_per_s or notes.dirty_pages_per_s
        notes.throttle_percent = max(throttle_percent or 0, notes.throttle_percent)

    @property
    def codec_text(self) -> str | None:
        """The codec most batches of this round had."""
        notes = self.round_notes.get(len(self._ledger.rounds) - 1)
        return notes.codec if notes else None

    def look_at_link(self) -> tuple[LinkEstimate | None, bool]:
        """What the choice of a codec asks.

        Returns:
            The link's own rate, as the kernel sees it where one does (``--max-bandwidth`` is a
            link, too); and whether it has nothing to send because an encoder is not ready.
        """
        now_ns = self._now_ns()
        hungry = self._waits_for_encoder
        if (state := self._link.tcp_state) is not None:
            hungry = hungry and not state.unsent_bytes
            if self.meter.wants_sample(now_ns):
                busy_ns = state.busy_us * 1000
                self.meter.sample(
                    now_ns,
                    state.acked_bytes,
                    busy_ns,
                    raw_bytes=self._framed_raw_bytes,
                    waiting=state.waiting,
                )
        seen = self.meter.estimate()
        if seen is None and (carried := self.carried.estimate(now_ns)) is not None:
            seen = LinkEstimate(carried.wire_bps, carried.saturated)
        limit = self._max_bandwidth_bps
        if seen is None or limit is None or seen.wire_bps < 0.8 * limit:
            return seen, hungry
        return replace(seen, wire_bps=min(seen.wire_bps, limit), saturated=True), False

    def consumed_estimate(self) -> GoodputEstimate | None:
        """What the destination guest takes in; looked up at most every ``NOTE_NS``."""
        now_ns = self._now_ns()
        if now_ns - self._consumed_ns > NOTE_NS:
            self._consumed_ns = now_ns
            self._consumed = self._capped(self.goodput.estimate(now_ns))
        return self._consumed

    def _capped(self, estimate: GoodputEstimate | None) -> GoodputEstimate | None:
        """Time in which the token bucket held us back is not busy time, so cap the rates by it."""
        limit = self._max_bandwidth_bps
        if estimate is None or limit is None or estimate.wire_bps < 0.8 * limit:
            return estimate
        raw_bps = estimate.raw_bps * min(1.0, limit / estimate.wire_bps)
        return GoodputEstimate(min(estimate.wire_bps, limit), raw_bps, saturated=True)

    def expected_downtime_ms(self, remaining_bytes: int | None) -> float | None:
        """What the downtime would be if the guest were stopped now; None while unknown."""
        estimate = self.consumed_estimate()
        if remaining_bytes is None or estimate is None or estimate.raw_bps <= 0:
            return None
        waiting = self.backlog.bytes_waiting + self._link.session.window.outstanding_raw_bytes
        return (remaining_bytes + waiting) / estimate.raw_bps * 1000 + HANDOVER_MS

    def take_ack(self) -> None:
        """Use an acknowledgement that the connection has just applied to its window."""
        now_ns = self._now_ns()
        window = self._link.session.window
        newest = 0
        if self._epoch != self._link.session.epoch:
            # What lies between says nothing of the link.
            self._epoch = self._link.session.epoch
            self._sent_ns.clear()
            self._starved = self._link_idle = True
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
        if wire_bytes:
            starved, self._starved = self._starved, False
            self.goodput.acked(wire_bytes, raw_bytes, now_ns, source_limited=starved)
            self.credit.acked(wire_bytes, raw_bytes, now_ns, source_limited=starved)
        self._ring()

    def _take_received(self, retained_bytes: int, raw_bytes: int, now_ns: int) -> None:
        """Learn the link's own rate from what arrived, whether or not the guest took it in.

        What the destination QEMU cannot swallow is no reason for a stronger codec.
        """
        received = self._framed_wire_bytes - retained_bytes
        wire_bytes, self._received_wire_bytes = received - self._received_wire_bytes, received
        if wire_bytes:
            idle, self._link_idle = self._link_idle, retained_bytes == 0
            self.carried.acked(wire_bytes, raw_bytes, now_ns, source_limited=idle)
            if now_ns - self._fitted_ns > NOTE_NS:
                self._fitted_ns = now_ns
                if estimate := self.carried.estimate(now_ns):
                    self._link.allow_unsent(estimate.wire_bps)
                    self._fit_backlog(estimate.raw_bps)

    def let_wait(self, limit_bytes: int) -> None:
        """Let so much wait for the link from now on, however fast that is."""
        self._fits_backlog = False
        self.backlog.set_limit(limit_bytes)

    def let_little_wait(self) -> None:
        """Let only what fits the link wait: the guest runs."""
        self._fits_backlog = True
        self.backlog.set_limit(RUNNING_BACKLOG_BYTES)

    def _fit_backlog(self, raw_bps: float) -> None:
        if self._fits_backlog:
            self.backlog.set_limit(running_backlog_bytes(raw_bps, self.to_come_bytes))


def running_backlog_bytes(raw_bps: float, to_come_bytes: int = 0) -> int:
    """What may wait for a link that carries so many bytes of pages a second.

    Args:
        raw_bps: Page bytes a second.
        to_come_bytes: As the attribute of ``Sender``.
    """
    wanted = max(raw_bps * RUNNING_BACKLOG_S, RUNNING_BACKLOG_BYTES)
    most = max(raw_bps * MOST_RUNNING_BACKLOG_S, MIN_RUNNING_BACKLOG_BYTES)
    ahead = raw_bps * min(to_come_bytes / ZERO_SCAN_BPS, MOST_AHEAD_S)
    fitting = min(wanted, most, MAX_RUNNING_BACKLOG_BYTES)
    return int(fitting + min(ahead, MOST_AHEAD_BYTES))

"""One migration by hand: the engine's parts from the dirty bitmap to the guest that is built.

Link protocol, page classes, codecs, page cache, digests and account are the engine's own. What
only a task could do, asking for pages and waiting, is left to whoever calls.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from migrate.checkpoint.file import CheckpointReader
from migrate.guests.simulated_source import BLOCK_NAME, RAM_START, DirtyWalk
from migrate.pages.apply import PageApplier
from migrate.pages.classify import KEEP, ClassifiedPages, Classifier
from migrate.pages.digest_index import DigestIndex
from migrate.pages.encode import encode_rows, make_batch
from migrate.pages.old_copy import OldSlots
from migrate.pages.page_cache import KeepRule
from migrate.report.ledger import PAGE_CLASSES, Ledger
from migrate.simulation.guest import SimulatedGuest, load_guest
from migrate.simulation.ram import Pages, SimulatedRam
from proto.codecs import CodecId, decode, make_codec
from proto.guest_events import MAX_RUN_PAGES, PageRun, RamBlock, ZeroRun
from proto.link import messages as m
from proto.link.dispatch import FRAMES
from proto.link.exchange import LinkClosed
from proto.link.messages import Message
from proto.link.page_lists import split_zero_pages
from proto.link.pages import PageBatch, bytes_by_class
from proto.link.state import LinkState, Role
from tests.link_pair import End, feed, join
from tests.model.kept_ram import VM, KeptRam
from tests.simulated import FakeTime


class OldPages:
    """What the destination reads of an old copy; here nothing happens to it meanwhile."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def read_into(self, slots: Pages, out: NDArray[np.uint8]) -> None:
        assert self._reader.read_into(slots, out)


@dataclass(frozen=True, slots=True)
class MoveParams:
    """How a migration is done.

    Attributes:
        digest_seed: Of its page digests.
        cache_slots: Size of the page cache in pages.
        codec_id: Of page content, a ``CodecId``.
        rule: What is kept, and what travels as a difference.
        old_copy: Whether the destination uses what it kept of the guest when it was there last.
        lands: Pages are written to memory as they are decoded, and read from there as slots.
        streams: Connections, which overtake each other by chance.
    """

    digest_seed: int
    cache_slots: int
    codec_id: int
    rule: KeepRule = KEEP
    old_copy: bool = False
    lands: bool = False
    streams: int = 1


class LandedSimulatedRam:
    """A simulated guest's memory to write to and read from; see ``LandedBlock``."""

    fresh = True

    def __init__(self, ram: SimulatedRam) -> None:
        self._ram = ram

    def write(self, pages: Pages, data: NDArray[np.uint8]) -> None:
        """Write whole pages."""
        self._ram.load_rows(pages, data)

    def zero(self, pages: Pages) -> None:
        """Zero whole pages."""
        self._ram.zero(pages)

    def read_into(self, pages: Pages, out: NDArray[np.uint8]) -> None:
        """Read whole pages."""
        out[:] = self._ram.rows(pages)


class Move:
    """One migration of a guest, from its first page on.

    Attributes:
        source: The guest that leaves.
        params: How it is done.
        ram: Its memory at the destination, as far as it has arrived.
        applier: The destination's decoder and digests.
        state: The device state that arrived.
        end: The source's last word, None before it arrived.
        sent_pages: Pages that were announced, with repeats.
        kept: What the source keeps of its memory.
    """

    def __init__(
        self,
        source: SimulatedGuest,
        params: MoveParams,
        *,
        track_dma: bool,
        old_copy: KeptRam | None = None,
    ) -> None:
        self.source = source
        self.params = params
        blocks = (RamBlock(BLOCK_NAME, source.ram.length_bytes),)
        seed, slots = params.digest_seed, params.cache_slots
        self.ram = SimulatedRam(source.ram.length_bytes, track_dma=track_dma)
        self.kept = KeptRam(blocks)
        self._old_copy = old_copy.reader(seed) if old_copy is not None else None
        self._announced = DigestIndex()
        landed = {0: LandedSimulatedRam(self.ram)} if params.lands else {}
        first_old = self.ram.page_count if landed else slots
        self._classifier = Classifier(
            blocks,
            seed=seed,
            slot_count=slots,
            landed=frozenset(landed),
            old_slots=OldSlots(self._announced, first_old),
        )
        self.applier = PageApplier(
            blocks,
            seed=seed,
            slot_count=0 if landed else slots,
            allocate=self.ram.lend_rows,
            fresh_blocks=frozenset({0}),
            landed=landed,
            old_pages=OldPages(self._old_copy) if self._old_copy is not None else None,
            first_old=first_old,
        )
        self._near, self._far = End(Role.SOURCE), End(Role.DESTINATION)
        self._under_way: list[deque[bytes]] = [deque() for _ in range(params.streams)]
        self._chance = random.Random(seed)
        self._hashes = [xxhash.xxh3_128(seed=seed) for _ in range(2)]
        self._ledger = Ledger()
        self._wire_bytes = self._round_no = self.sent_pages = 0
        self._classes = [dict.fromkeys(PAGE_CLASSES, 0) for _ in range(2)]
        self.state = b""
        self.end: m.EndOfState | None = None
        self._greet(blocks)
        source.harvest()
        self._walk = DirtyWalk()
        self._walk.add(source.ram.present_pages())

    def _greet(self, blocks: tuple[RamBlock, ...]) -> None:
        seed, slots = self.params.digest_seed, self.params.cache_slots
        streams = self.params.streams
        facts = {"kind": "simulated"}
        self._say(m.Hello(bytes(16), seed, slots, facts, vm_id=VM, streams=streams))
        self.deliver()
        old_pages = self._old_copy.page_limit if self._old_copy is not None else 0
        lands = self.params.lands
        self._answer(
            m.Welcome(
                m.CommitKind.HELD.value,
                0 if lands else slots,
                facts,
                landed=(BLOCK_NAME,) if lands else (),
                old_pages=old_pages,
                streams=streams,
                join_token=bytes(16) if streams > 1 else b"",
            )
        )
        for number in range(1, streams):
            join(self._near, self._far, number)
        self._wire_bytes = sum(self._near.sent_bytes.values())
        self._announce(old_pages // 2)
        self._ledger.start_round(0, 0)
        self._hashes[0].update(RAM_START)
        self._say(m.RamBlockTable(blocks, RAM_START))

    def _announce(self, page_count: int) -> None:
        """Announce some more pages of the old copy."""
        reader = self._old_copy
        if reader is None or reader.exhausted:
            return
        first, digests = reader.index.count, reader.read_digests(page_count)
        if len(digests) or reader.exhausted:
            self._answer(m.OldCopy(first, digests.tobytes(), reader.exhausted))
            self._announced.append(digests)

    # --- the source's end --------------------------------------------------------------------

    @property
    def classes(self) -> dict[str, int]:
        """Pages by class, as they arrived."""
        return self._classes[1]

    @property
    def pages_left(self) -> int:
        """Pages of the round that were not announced yet."""
        return len(self._walk)

    def harvest(self) -> None:
        """End the round: what was dirtied meanwhile is the next one, with what is left."""
        self._walk.add(self.source.harvest())
        self._say(m.RoundEnd(self._round_no))
        self._announce(1 << 20)
        self._round_no += 1
        self._ledger.start_round(self._round_no, 0)

    def send(self, limit: int) -> None:
        """Put the next ``limit`` pages of the round on the link, as they are now."""
        ram = self.source.ram
        window = self._walk.ahead[:limit]
        self._walk.go(len(window))
        window = window[ram.travels(window)]
        zero = ram.zero_known(window)
        full = window[~zero]
        for at in range(0, len(full), MAX_RUN_PAGES):
            pages = full[at : at + MAX_RUN_PAGES]
            run = PageRun(0, pages, ram.rows(pages))
            self.kept.take(run)
            self._send_classified(self._classifier.classify(run, self.params.rule))
        if zero.any():
            self.kept.take(ZeroRun(0, window[zero]))
            self._send_classified(self._classifier.classify_zeros(ZeroRun(0, window[zero])))
        self.sent_pages += len(window)

    def _send_classified(self, found: ClassifiedPages) -> None:
        codec = make_codec(self.params.codec_id)
        zeros = split_zero_pages(found.zero_pages)
        first = replace(found, zero_pages=zeros[0]) if zeros else found
        literals, differences = (
            encode_rows(x, codec) for x in (found.literals, found.differences)
        )
        self._say(make_batch(first, literals, differences))
        for pages in zeros[1:]:
            self._say(PageBatch(0, pages))

    def stop(self) -> None:
        """Stop the guest; what its devices wrote while they came to rest is dirty, too."""
        self.harvest()
        self.source.stop()
        self._walk.add(self.source.harvest())
        self._say(m.Switchover(b""))

    def send_rest(self) -> bytes:
        """Put everything that is left of the stopped guest on the link; returns its state."""
        while self.pages_left:
            self.send(MAX_RUN_PAGES)
        state = self.source.save()
        self._hashes[0].update(state)
        encoded = make_codec(CodecId.ZSTD).encode(state)
        codec_id = CodecId.RAW if encoded is None else CodecId.ZSTD
        self._say(m.DeviceStateData(encoded or state, len(state), codec_id))
        table = self._classifier.table
        self._say(
            m.EndOfState(
                "running", table.digest(), self._hashes[0].digest(), table.page_count, True
            )
        )
        return state

    def _say(self, message: Message) -> None:
        numbered = FRAMES[message.frame_type].numbered
        number = self._chance.randrange(self.params.streams) if numbered else 0
        data = b"".join(self._near.send(message, number))
        self._under_way[number].append(data)
        self._wire_bytes += len(data)
        if isinstance(message, PageBatch):
            counts = message.pages_by_class
            self._ledger.add_pages(self._round_no, counts, bytes_by_class(message))
            _count(self._classes[0], counts)

    # --- the destination's end -----------------------------------------------------------------

    def deliver(self, frames: int = 1 << 30) -> None:
        """Have so many frames arrive, of each connection in order."""
        for _ in range(min(frames, sum(map(len, self._under_way)))):
            number = self._next_to_arrive()
            for event in feed(self._far, self._under_way[number].popleft(), number):
                assert not isinstance(event, LinkClosed), event
                self._take(event)
        if self._far.state in (LinkState.PRECOPY, LinkState.STOP_AND_COPY):
            received = self._far.sequence.received_seq
            self._answer(m.Ack(received, received))

    def _next_to_arrive(self) -> int:
        filled = [number for number, queue in enumerate(self._under_way) if queue]
        return self._chance.choice(filled)

    def _take(self, message: Message) -> None:
        match message:
            case PageBatch():
                _count(self._classes[1], message.pages_by_class)
                applied = self.applier.apply(message)
                if applied.zeros is not None:
                    self.ram.zero(applied.zeros.pages)
                if applied.pages is not None:
                    self.ram.load_rows(applied.pages.pages, applied.pages.data)
            case m.RamBlockTable(_, start):
                self._hashes[1].update(start)
            case m.DeviceStateData(encoded, raw_len, codec_id):
                self.state += bytes(decode(codec_id, encoded, raw_len))
                self._hashes[1].update(self.state)
            case m.EndOfState():
                self.end = message

    def _answer(self, message: Message) -> None:
        heard = feed(self._near, b"".join(self._far.send(message)))
        assert [type(event) for event in heard] == [type(message)]

    def break_link(self, cut_at: float) -> None:
        """Lose what is under way, the first frame of it in the middle: no message comes of it."""
        before = self._far.received_bytes
        if any(self._under_way):
            number = self._next_to_arrive()
            data = self._under_way[number].popleft()
            part = data[: int(cut_at * (len(data) - 1))]
            assert feed(self._far, part, number) == []
            before += len(part)
        assert self._far.received_bytes == before
        self._far.eof()
        assert isinstance(feed(self._far, b"")[0], LinkClosed)

    # --- the handover --------------------------------------------------------------------------

    def verify(self) -> None:
        """Compare what left and what arrived as the two commands do, and the account."""
        assert self.end is not None
        table = self.applier.table
        assert self.end.ram_digest == table.digest()
        assert self.end.page_count == table.page_count == self.source.ram.page_count
        assert self.end.opaque_digest == self._hashes[1].digest()
        assert self._classes[0] == self._classes[1]
        assert sum(self._classes[0].values()) == self.sent_pages
        for kind in ("opaque", "device_state", "control"):
            missing = self._near.sent_bytes[kind] - getattr(self._ledger.bytes, kind)
            self._ledger.add_bytes(kind, missing)
        self._ledger.close(self._wire_bytes, 0)
        assert self._far.received_bytes == self._wire_bytes
        self._answer(m.Verified(table.digest(), table.page_count))

    def load(self, time: FakeTime, completed: Callable[[int, int], None]) -> SimulatedGuest:
        """Build the guest from what arrived."""
        arrived = load_guest(
            self.state, self.ram, now_ns=time.now_ns, wall_ns=time.wall_ns, completed=completed
        )
        self._answer(m.Ready())
        return arrived

    def commit(self) -> None:
        """Say who runs from now on."""
        self._say(m.Commit())
        self.deliver()
        self._answer(m.Running("running"))
        assert self._near.state is self._far.state is LinkState.RUNNING


def _count(sums: dict[str, int], counts: dict[str, int]) -> None:
    for key, count in counts.items():
        sums[key] += count

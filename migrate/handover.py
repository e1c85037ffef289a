"""The handover: at most one side runs the guest, at every instant.

Theory of operation. The guest is stopped at the source and everything but the end of its stream
is at the destination. What follows is the same for every guest; three kinds differ in who commits:

``held``      both sides are ours. The destination loads completely and stays paused (READY); then
              the source lets go; then COMMIT; then the destination says ``cont``.
``withheld``  the destination starts by itself when its stream is complete, so its last bytes are
              withheld: the source lets go first, COMMIT next, the last bytes after that. A source
              without return path has let go when its stream was read; then a destination that
              starts when we say so is loaded before COMMIT, as in ``held``.
``relayed``   somebody else owns both monitors and commits: the end of the stream and the
              destination's SHUT are passed on as they come, once the RAM is verified.

Who runs the guest if everything dies here:

====================================  =============  =================================
after                                 guest          who may run it
====================================  =============  =================================
END_OF_STATE sent, mark recorded      paused, src    source (it resumes by itself)
VERIFIED                              paused, src    source (it resumes by itself)
READY (held)                          paused, src    source (it resumes by itself)
``let_go``                            paused, src    source, by ``cont``
COMMIT_SENT recorded                  paused         nobody knows before RUNNING is seen
COMMITTED recorded (destination)      destination    destination, by ``cont``
RUNNING                               destination    destination
====================================  =============  =================================

Up to VERIFIED a guest that has waited for the link for too long goes on, and the migration from
pre-copy: ``migrate.way_back``.

COMMIT_SENT is the point of no return: before it every failure leaves the guest to the source, after
it the source never resumes unless the destination says that its copy is dead.

``tests/model/handover_tables.py`` holds the same as tables, and ``--recover`` with it; a test goes
through all that can happen. Change both.
"""

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from migrate.errors import (
    DeadlineExceededError,
    GuestError,
    GuestOn,
    IntegrityError,
    MigrationError,
    PeerLostError,
    PeerProtocolError,
    PeerRefusedError,
    SwitchoverUnknownError,
)
from migrate.guests.base import DestinationGuest, SourceGuest
from migrate.inbound import Inbound
from migrate.outbound import Outbound
from migrate.ring_guard import check_loaded
from migrate.rings import RingVerdict
from migrate.runtime import Runtime
from migrate.state_file import (
    COMMIT_SENT,
    COMMITTED,
    GIVEN_BACK,
    RETURNED,
    RUNNING,
    StateFile,
)
from migrate.timeouts import DEFAULTS, Timeouts
from migrate.transport.link import Link
from proto.limits import MAX_DIGEST_RANGES
from proto.link import messages
from proto.link.messages import CommitKind, Message
from proto.packing import clip_text

BISECT_RANGES = 16
"""Into how many ranges a differing range is cut per question."""

M = TypeVar("M")


@dataclass(slots=True)
class Timeline:
    """Monotonic times of the handover, None for what did not happen."""

    verified_ns: int | None = None
    ready_ns: int | None = None
    let_go_ns: int | None = None
    running_ns: int | None = None


@dataclass(slots=True)
class SourceHandover:
    """What the source's side of one handover needs, and what it has reached.

    Attributes:
        commit_sent: The point of no return was passed.
        running: The destination said that the guest goes on there.
        destination_digest: What the destination said of its RAM.
        equal: Whether RAM and device state arrived as they left; None before the comparison.
        shut_relayed: The owner of both monitors has been told to commit (``relayed``).
        holding: A person wants the guest to stand still.
    """

    guest: SourceGuest
    link: Link
    control: trio.MemoryReceiveChannel[Message]
    outbound: Outbound
    kind: CommitKind
    state_file: StateFile
    runtime: Runtime
    timeouts: Timeouts = DEFAULTS
    hold: Callable[[], Awaitable[None]] | None = None
    times: Timeline = field(default_factory=Timeline)
    commit_sent: bool = False
    running: messages.Running | None = None
    destination_digest: bytes | None = None
    shut_relayed: bool = False
    holding: bool = False
    equal: bool | None = None
    _shut: trio.Event = field(default_factory=trio.Event)

    async def hand_over(self) -> None:
        """Make the destination the guest's place; returns when it is (``relayed``: handed over).

        Raises:
            IntegrityError: The digests differ; the guest is the source's.
            SwitchoverUnknownError: COMMIT was sent and no RUNNING came.
            MigrationError: Anything else, before the point of no return.
        """
        await self._record_mark()  # paused at the source; dies: the source resumes
        with trio.move_on_after(self.timeouts.verify_s) as waiting:
            await self._verified()  # paused at the source; dies: the source resumes
            if self.kind is CommitKind.HELD:
                # loaded and paused there; dies: the source resumes
                await self._expect(messages.Ready)
                self.times.ready_ns = self.runtime.now_ns()
        if waiting.cancelled_caught:
            raise DeadlineExceededError(
                f"{self.link.peer} did not verify and load the guest within "
                f"{self.timeouts.verify_s:.0f} s"
            )
        if self.kind is CommitKind.RELAYED:
            await self._relayed()
            return
        await self.guest.let_go()  # nobody runs; dies: ``cont`` at the source
        self.times.let_go_ns = self.runtime.now_ns()
        # nobody runs, and nobody waits long for a lost link; dies: ``cont`` at the source
        await self.link.send(messages.SourceDone())
        if self.hold is not None:
            self.holding = True
            try:
                await self._record_mark()  # nobody runs; dies: ``cont`` at the source
                await self.hold()  # nobody runs; dies: ``cont`` at the source
            finally:
                self.holding = False
        await self._commit()

    async def _record_mark(self) -> None:
        """Record which migration of the source QEMU is ours: ``cont`` is for that one only.

        Before ``let_go`` at the latest; done while the destination compares it costs no downtime.
        """
        if self.state_file.record is None or self.guest.form == "simulate":
            return  # nothing that could be recovered here
        mark = await self.guest.take_mark()
        self.state_file.complete(mark=mark, run_state=self.outbound.state.run_state)

    async def _verified(self) -> None:
        answer: messages.Verified | messages.Mismatch
        answer = await self._expect(messages.Verified, messages.Mismatch)
        self.times.verified_ns = self.runtime.now_ns()
        self.destination_digest = answer.ram_digest
        self.equal = isinstance(answer, messages.Verified)
        if isinstance(answer, messages.Mismatch):
            where = await self._bisect(answer)
            raise IntegrityError(
                f"the RAM that arrived is not the RAM that left: {where}; nothing was handed over"
            )
        classifier = self.outbound.state.classifier
        if classifier is not None and answer.ram_digest != classifier.table.digest():
            raise IntegrityError("the destination verified another RAM than the source sent")

    async def _bisect(self, mismatch: messages.Mismatch) -> str:
        """Name the first page that differs."""
        classifier = self.outbound.state.classifier
        if classifier is None or mismatch.ram_digest == classifier.table.digest():
            return "the device state differs"
        ranges = [
            (block, 0, info.page_count)
            for block, info in enumerate(self.outbound.state.blocks)
            if info.page_count
        ]
        while True:
            asked, ranges = ranges[:MAX_DIGEST_RANGES], ranges[MAX_DIGEST_RANGES:]
            query = tuple(
                messages.DigestRange(b, p, n, classifier.table.range_digest(b, p, n))
                for b, p, n in asked
            )
            await self.link.send(messages.DigestQuery(query))
            reply = await self._expect(messages.DigestReply)
            if not reply.differing and not ranges:
                return "the page tables differ in a place that cannot be found"
            if not reply.differing:
                continue
            block, first, count = asked[reply.differing[0]]
            if count == 1:
                name = self.outbound.state.blocks[block].idstr
                more = len(reply.differing) - 1
                return f"page {first} of block {name}" + (
                    f" and {more} near it" if more else ""
                )
            step = max(1, -(-count // BISECT_RANGES))
            ranges = [
                (block, at, min(step, first + count - at))
                for at in range(first, first + count, step)
            ]

    async def _commit(self) -> None:
        """The point of no return. Nobody runs before and after the record is written."""
        # What cannot carry SOURCE_DONE would not carry COMMIT. Dies: ``cont`` at the source.
        await self.link.flush()
        await trio.lowlevel.checkpoint()  # called off by now? then not a step further
        with trio.CancelScope(shield=True), trio.move_on_after(self.timeouts.running_s):
            # dies before the rename: the source may ``cont``; after it: unknown
            self.state_file.write(COMMIT_SENT, run_state=self.outbound.state.run_state)
            self.commit_sent = True
            try:
                # A link that is broken may hold the destination's ABORT: what counts is what was
                # received, so a failed send is no answer yet.
                with contextlib.suppress(PeerLostError):
                    await self.link.send(messages.Commit())  # dies: unknown
                self.running = await self._expect_running()  # dies: unknown
            except PeerRefusedError as error:
                if error.guest_on not in (GuestOn.SOURCE, GuestOn.NEITHER):
                    raise SwitchoverUnknownError(self._unknown(str(error))) from error
                # The destination's copy is dead, as it says itself: the guest is ours again.
                with contextlib.suppress(MigrationError):  # recorded or not
                    self.state_file.write(RETURNED, reason=error.code)
                self.commit_sent = False
                raise
            except PeerLostError as error:
                raise SwitchoverUnknownError(self._unknown(str(error))) from error
            self.times.running_ns = self.runtime.now_ns()
            self.state_file.write(RUNNING, run_state=self.running.run_state)
            return
        raise SwitchoverUnknownError(
            self._unknown(f"no answer within {self.timeouts.running_s:.0f} s")
        )

    async def _expect_running(self) -> messages.Running:
        answer: messages.Running | messages.Abort
        answer = await self._expect(messages.Running, messages.Abort)
        if isinstance(answer, messages.Abort):
            raise PeerRefusedError(
                f"the destination gave up: {answer.message}", guest_on=GuestOn(answer.guest_on)
            )
        return answer

    def _unknown(self, cause: str) -> str:
        if self.guest.form == "simulate":
            return (
                f"COMMIT was sent and no RUNNING came back ({cause}). The copy here ends with "
                "this command; whether the guest ran there, migrate-dst's last line or its state "
                f"file says. Recorded in {self.state_file.path}"
            )
        return (
            f"COMMIT was sent and no RUNNING came back ({cause}). The guest is paused at the "
            "source and may run at the destination: ask the destination QEMU ('info status') "
            "before anything is started; never 'cont' the source while that is unknown. "
            f"Recorded in {self.state_file.path}"
        )

    def take_relayed_shut(self) -> None:
        """Note that the destination's SHUT went to the source."""
        self.shut_relayed = True
        self._shut.set()

    async def _relayed(self) -> None:
        """Wait until SHUT went to the source: from then on it is in its owner's hands."""
        await self._shut.wait()

    async def _expect(self, *types: type[M]) -> M:
        while True:
            try:
                message = await self.control.receive()
            except trio.EndOfChannel:
                raise PeerLostError(f"lost the connection to {self.link.peer}") from None
            if isinstance(message, types):
                return message


@dataclass(slots=True)
class DestinationHandover:
    """What the destination's side of one handover needs, and what it has reached.

    Attributes:
        verified: The source may know that what arrived is what left.
        committed: The guest is ours, recorded.
        given_back: It was, and could not run here: this copy is dead.
        run_state: The guest's run state once it is complete here.
        arrived: The guest is complete here, and nothing that follows can change that.
        load_ns: Time to load device state and end.
        settle_rings: Raises or warns for a verdict on the loaded guest's rings.
        rings: That verdict, None if the source made the check.
    """

    guest: DestinationGuest
    link: Link
    control: trio.MemoryReceiveChannel[Message]
    inbound: Inbound
    kind: CommitKind
    state_file: StateFile
    runtime: Runtime
    settle_rings: Callable[[RingVerdict], None]
    timeouts: Timeouts = DEFAULTS
    times: Timeline = field(default_factory=Timeline)
    verified: bool = False
    committed: bool = False
    given_back: bool = False
    run_state: str | None = None
    arrived: bool = False
    load_ns: int = 0
    rings: RingVerdict | None = None

    async def hand_over(self) -> None:
        """Take the guest over; returns when it is here as it was at the source.

        Raises:
            IntegrityError: The digests differ.
            MigrationError: Anything else; ``committed`` says whose the guest is.
        """
        state = self.inbound.state
        assert state.end is not None
        digest = await self._verify(state.end)
        started_ns = self.runtime.now_ns()
        if self.kind is not CommitKind.HELD:
            await self.guest.load_devices(state.device_state)
        self.verified = True  # also if the message is cut off: the source may hear it
        await self.link.send(messages.Verified(digest, state.end.page_count))
        self.times.verified_ns = self.runtime.now_ns()
        if self.kind is CommitKind.RELAYED:
            await self.guest.load_end()
            self.run_state = state.end.run_state
            self.arrived = True
            return
        if self.kind is CommitKind.HELD:
            await self.guest.load_devices(state.device_state)
        if self.guest.commanded:
            await self.guest.load_end()  # loaded and paused; the source may still resume
            await self._check_rings(state.end)
            self.load_ns = self.runtime.now_ns() - started_ns
        if self.kind is CommitKind.HELD:
            await self.link.send(messages.Ready())
            self.times.ready_ns = self.runtime.now_ns()
        await self._expect_commit()
        await self._take_over(state.end.run_state or "running")

    async def _check_rings(self, end: messages.EndOfState) -> None:
        """Check the rings of the loaded guest, if the source could not."""
        if end.rings_checked:
            return
        state = self.inbound.state
        self.rings = await check_loaded(self.guest, state.blocks, state.device_state)
        if self.rings is not None:
            self.settle_rings(self.rings)

    async def _verify(self, end: messages.EndOfState) -> bytes:
        """Compare digests and return RAM's; on a mismatch help to find the page, then refuse."""
        applier = self.inbound.state.applier
        ram_digest = applier.table.digest() if applier else bytes(16)
        page_count = applier.table.page_count if applier else 0
        opaque_digest = self.inbound.opaque_digest
        mine = (ram_digest, opaque_digest, page_count)
        if mine == (end.ram_digest, end.opaque_digest, end.page_count):
            return ram_digest
        await self.link.send(messages.Mismatch(*mine))
        with trio.move_on_after(self.timeouts.verify_s):
            while applier is not None:
                query = await self._expect(messages.DigestQuery)
                self._check_ranges(query)
                differing = tuple(
                    i
                    for i, r in enumerate(query.ranges)
                    if applier.table.range_digest(r.block, r.first_page, r.page_count)
                    != r.digest
                )
                await self.link.send(messages.DigestReply(differing))
        raise IntegrityError("the RAM that arrived is not the RAM that left")

    def _check_ranges(self, query: messages.DigestQuery) -> None:
        blocks = self.inbound.state.blocks
        assert blocks is not None
        counts = [block.page_count for block in blocks.blocks]
        for item in query.ranges:
            inside = item.block < len(counts)
            if not inside or item.first_page + item.page_count > counts[item.block]:
                raise PeerProtocolError(f"{self.link.peer} asks for pages that do not exist")

    async def _expect_commit(self) -> None:
        while True:
            message = await self._expect(messages.Commit, messages.SourceDone)
            if isinstance(message, messages.Commit):
                return

    async def _take_over(self, run_state: str) -> None:
        """COMMITTED, then run. From the record on the guest is ours, whatever the link does."""
        with trio.CancelScope(shield=True):
            started_ns = self.runtime.now_ns()
            self.state_file.write(COMMITTED, run_state=run_state)
            self.committed = True
            failure: MigrationError | None = None
            try:
                if not self.guest.commanded:
                    await self.guest.load_end()
                self.run_state = run_state = await self.guest.run(run_state)
                self.arrived = True
            except MigrationError as error:
                failure = error
            if failure is not None:
                await self._give_back(failure)
                raise failure
            self.times.running_ns = self.runtime.now_ns()
            resume_ns = self.times.running_ns - started_ns
            await self.link.try_send(messages.Running(run_state, self.load_ns, resume_ns))

    async def _give_back(self, error: MigrationError) -> None:
        """The guest cannot run here: make sure it never will, then say so."""
        if not self.guest.may_have_run:
            with contextlib.suppress(MigrationError):  # it dies, recorded or not
                self.state_file.write(GIVEN_BACK, reason=error.code)
        try:
            done = await self.guest.discard()  # dies: recovery makes sure of it, then says so
        except GuestError as undead:
            message = clip_text(f"{error}; {undead}")
            await self.link.try_send(messages.Abort("run-failed", message, "unknown"))
            return
        self.committed = False
        self.given_back = True
        message = clip_text(f"the guest could not run at the destination: {error}; {done}")
        await self.link.try_send(messages.Abort("run-failed", message, "neither"))

    async def _expect(self, *types: type[M]) -> M:
        while True:
            try:
                message = await self.control.receive()
            except trio.EndOfChannel:
                raise PeerLostError(f"lost the connection to {self.link.peer}") from None
            if isinstance(message, types):
                return message

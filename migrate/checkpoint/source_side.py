"""Source: what it keeps of the guest that leaves, and what it knows of the destination's old copy.

Two directions that share the VM's identity: the checkpoint that this host writes (``--checkpoint``)
and the pages that the other host announces from an earlier visit of the guest.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import trio
from numpy.typing import NDArray

from migrate.checkpoint.keeper import CheckpointKeeper
from migrate.checkpoint.params import CheckpointParams, needs_vm_id
from migrate.checkpoint.store import CheckpointStore
from migrate.guests.base import Facts
from migrate.hello import Agreement
from migrate.pages.digest_index import DigestIndex
from migrate.pages.old_copy import OldSlots
from migrate.report.old_copy import OldCopyReport
from migrate.report.report import Report
from migrate.runtime import Step
from migrate.session import Session
from proto.guest_events import PAGE_SIZE, GuestEvent, RamBlock
from proto.limits import NOT_CACHED
from proto.link.messages import OldCopy

WAIT_S: Final = 5.0
"""How long the migration waits for the announcement. A host that has its file in memory announces
1 GiB in 0.2 s; a disk that is slower than this link is not worth waiting for, and what it finds
later is used from then on."""


class SourceCopies:
    """Checkpoint and old copy of one run of migrate-src.

    Attributes:
        old_pages: Digests that the destination announced, by the slot behind all others; ``None`` =
            it has no old copy.
        publishing_ns: Time that the checkpoint took when the guest was away already.
    """

    def __init__(
        self, params: CheckpointParams | None, vm_id: str | None, session: Session
    ) -> None:
        self._params = params
        self._vm_id = vm_id
        self._session = session
        self._keeper: CheckpointKeeper | None = None
        self._announced = trio.Event()
        self._agreement: Agreement | None = None
        self._first_slot: int | None = None
        self._referenced_pages = 0
        self.old_pages: DigestIndex | None = None
        self.publishing_ns = 0

    async def identify(self, facts: Facts) -> str | None:
        """Find out whose RAM it is, and see that it can be kept if it is to be.

        Returns:
            The VM's identity, for HELLO; ``None`` if it has none.

        Raises:
            ParamsError: It is to be kept, and has no identity or no place.
        """
        vm_id = self._vm_id or facts.vm_id
        if self._params is None:
            return vm_id
        if vm_id is None:
            raise needs_vm_id(facts.missing or "the VM has no UUID")
        store = CheckpointStore(self._params.directory, self._params.max_bytes)
        runtime = self._session.runtime
        await runtime.work(Step.CHECKPOINT, (), store.prepare)
        self._keeper = CheckpointKeeper(store, vm_id, runtime, self._session.warn)
        return vm_id

    # --- the checkpoint -------------------------------------------------------------------------

    def keep(self, events: Sequence[GuestEvent]) -> None:
        """Take what the guest sends, in order; never waits."""
        if self._keeper is not None:
            self._keeper.take(events)

    async def run(self) -> None:
        """Write beside the migration; run this as a task."""
        if self._keeper is not None:
            await self._keeper.run()

    async def publish(self) -> None:
        """Complete the checkpoint: the guest is away. ``run`` still runs; raises nothing."""
        if self._keeper is not None:
            self._session.enter("keeping a checkpoint")
            started_ns = self._session.runtime.now_ns()
            await self._keeper.publish()
            self.publishing_ns = self._session.runtime.now_ns() - started_ns

    def discard(self) -> None:
        """Leave nothing of a checkpoint that was not published."""
        if self._keeper is not None:
            self._keeper.discard()

    # --- the old copy ---------------------------------------------------------------------------

    def expect(self, agreement: Agreement) -> None:
        """Note what WELCOME said."""
        self._agreement = agreement
        if agreement.old_pages:
            self.old_pages = DigestIndex()

    async def take(self, message: OldCopy) -> None:
        """Take a piece of the announcement."""
        if self.old_pages is not None and len(message.digests):
            digests = np.frombuffer(message.digests, np.uint64).reshape(-1, 2)
            # Classifying looks digests up, so it must not happen at the same time.
            costs = [("", digests.nbytes)]
            await self._session.runtime.work(
                Step.CLASSIFY, costs, self.old_pages.append, digests
            )
        if message.is_last:
            self._announced.set()

    async def wait_announced(self) -> None:
        """Wait for the rest of the announcement, as long as that is worth it."""
        if self.old_pages is None:
            return
        self._session.enter("hearing of an old copy")
        with trio.move_on_after(WAIT_S):
            await self._announced.wait()

    def old_slots(self, blocks: Sequence[RamBlock]) -> OldSlots | None:
        """What the classifier may refer to, given the guest's RAM blocks; ``None`` = nothing."""
        agreement = self._agreement
        if self.old_pages is None or agreement is None:
            return None
        landed = any(block.idstr in agreement.landed for block in blocks)
        ram_pages = sum(block.page_count for block in blocks)
        first_slot = ram_pages if landed else agreement.slot_count
        if first_slot + agreement.old_pages > NOT_CACHED:
            return None  # more RAM than there are slot numbers
        self._first_slot = first_slot
        return OldSlots(self.old_pages, first_slot)

    def count_references(self, slots: NDArray[np.uint32]) -> None:
        """Count those of a batch's references that go to the old copy."""
        if self._first_slot is not None:
            self._referenced_pages += int(np.count_nonzero(slots >= self._first_slot))

    def tell(self, report: Report) -> None:
        """Put it into the report."""
        if self._keeper is not None:
            report.checkpoint = self._keeper.report
        if self.old_pages is not None:
            report.old_copy = OldCopyReport(
                announced_pages=self.old_pages.count,
                referenced_pages=self._referenced_pages,
                saved_bytes=self._referenced_pages * PAGE_SIZE,
            )

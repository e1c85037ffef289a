"""Source: keeps the RAM of a guest that leaves, as it was at the handover.

    events of the guest -> bounded queue -> writer thread -> file, published after the handover

The migration never waits for it. A page for which there is no room in the queue is missing in the
file; whatever else goes wrong is a warning, and the checkpoint is given up.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import trio
from numpy.typing import NDArray

from migrate.checkpoint.file import CheckpointWriter
from migrate.checkpoint.store import CheckpointStore, Unfinished
from migrate.pages.checkpoint import CheckpointHeader
from migrate.report.old_copy import CheckpointReport
from migrate.runtime import Runtime, Step
from proto.errors import MessageError
from proto.guest_events import GuestEvent, PageRun, RamBlock, RamBlocks, ZeroRun

QUEUE_BYTES: Final = 32 << 20
"""Pages that may wait for the writer: what a disk that keeps up on average needs, and no more
memory than that."""

BURST_BYTES: Final = 4 << 20
"""What is written in one thread hop, if so much has queued up."""

DRAIN_S: Final = 30.0
"""Longest time that the command stays for its checkpoint once the guest is away."""


class CheckpointKeeper:
    """Writes one checkpoint beside a migration."""

    def __init__(
        self,
        store: CheckpointStore,
        vm_id: str,
        runtime: Runtime,
        warn: Callable[[str], None],
    ) -> None:
        """Set it up; nothing is written before the guest's RAM blocks are known.

        Args:
            store: Where checkpoints are.
            vm_id: Whose it is.
            runtime: Threads and time.
            warn: Told why there will be no checkpoint, or none that is complete.
        """
        self._store = store
        self._vm_id = vm_id
        self._runtime = runtime
        self._warn = warn
        self._queue: deque[PageRun | ZeroRun] = deque()
        self._queued_bytes = 0
        self._news = trio.Event()
        self._idle = trio.Event()
        self._header: CheckpointHeader | None = None
        self._first: list[int] = []
        self._missing: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._file: Unfinished | None = None
        self._writer: CheckpointWriter | None = None
        self._dropped = False
        self.report = CheckpointReport(path=str(store.path(vm_id)))

    def take(self, events: Sequence[GuestEvent]) -> None:
        """Take what the guest sends, in order; never waits."""
        if self.report.given_up is not None:
            return
        for event in events:
            if isinstance(event, RamBlocks):
                self._begin(event.blocks)
            elif isinstance(event, PageRun):
                self._put(event, event.data.nbytes)
            elif isinstance(event, ZeroRun):
                self._put(event, event.pages.nbytes)

    def _begin(self, blocks: Sequence[RamBlock]) -> None:
        try:
            self._header = CheckpointHeader.of(self._vm_id, blocks)
        except MessageError as error:
            self._give_up(str(error))
            return
        counts = [block.page_count for block in blocks]
        self._first = [sum(counts[:i]) for i in range(len(counts))]
        self._missing = np.zeros(sum(counts), np.bool_)

    def _put(self, run: PageRun | ZeroRun, n_bytes: int) -> None:
        if self._header is None:
            return
        full = self._queued_bytes + n_bytes > QUEUE_BYTES
        # The newest version decides: an older one that still waits may be written all the same.
        self._missing[run.pages.astype(np.int64) + self._first[run.block]] = full
        if not full:
            self._queue.append(run)
            self._queued_bytes += n_bytes
            self._news.set()

    async def run(self) -> None:
        """Write what comes; run this as a task beside the migration."""
        while self.report.given_up is None:
            if not self._queue:
                self._idle.set()
                await self._news.wait()
                self._idle = trio.Event()
            burst = self._take_burst()
            costs = [("", run.data.nbytes) for run in burst if isinstance(run, PageRun)]
            try:
                await self._runtime.work(Step.CHECKPOINT, costs, self._write, burst)
            except (OSError, MemoryError) as error:
                self._give_up(_reason(error))

    def _take_burst(self) -> list[PageRun | ZeroRun]:
        burst: list[PageRun | ZeroRun] = []
        n_bytes = 0
        while self._queue and n_bytes < BURST_BYTES:
            run = self._queue.popleft()
            burst.append(run)
            n_bytes += run.data.nbytes if isinstance(run, PageRun) else run.pages.nbytes
        self._queued_bytes -= n_bytes
        if not self._queue:
            self._news = trio.Event()
        return burst

    def _write(self, burst: list[PageRun | ZeroRun]) -> None:
        """Write a burst; runs in a thread, one at a time."""
        if self._writer is None:
            assert self._header is not None
            file = self._file = self._store.create(self._vm_id)
            if self._dropped:  # meanwhile, by a migration that does not wait for slow disks
                self._store.discard(file)

            def make_room(least_bytes: int, wanted_bytes: int) -> int:
                return self._store.make_room(file, least_bytes, wanted_bytes)

            self._writer = CheckpointWriter(file.file, self._header, make_room)
        for run in burst:
            if isinstance(run, PageRun):
                self._writer.write(run.block, run.pages, run.data)
            else:
                self._writer.zero(run.block, run.pages)

    async def publish(self) -> None:
        """Make the checkpoint the VM's, now that its guest is away; ``run`` still runs.

        Neither raises nor waits long: what does not work is a warning.
        """
        with trio.move_on_after(DRAIN_S) as draining:
            while self._queue or not self._idle.is_set():
                if self.report.given_up is not None:
                    return
                await self._idle.wait()
            try:
                await self._runtime.work(Step.CHECKPOINT, (), self._finish)
            except OSError as error:
                self._give_up(_reason(error))
        if draining.cancelled_caught:
            self._give_up(f"the disk did not take it within {DRAIN_S:.0f} s")
        if self.report.missing_pages:
            lacking = f"the checkpoint of {self._vm_id} lacks {self.report.missing_pages} pages"
            self._warn(f"{lacking}: its disk was too slow")

    def _finish(self) -> None:
        """Complete and rename the file; runs in a thread."""
        writer, file = self._writer, self._file
        if writer is None or file is None or self._dropped:
            return
        missing = int(np.count_nonzero(self._missing))
        header = writer.finish(int(self._runtime.utc().timestamp()), missing)
        self._store.publish(file)
        self._file = None
        self.report.kept = True
        self.report.pages = header.present_pages
        self.report.missing_pages = missing
        self.report.file_bytes = writer.file_bytes

    def _give_up(self, why: str) -> None:
        self.report.given_up = why
        self._queue.clear()
        self._idle.set()
        self._warn(f"no checkpoint of {self._vm_id} is kept: {why}")
        self.discard()

    def discard(self) -> None:
        """Leave nothing of a checkpoint that was not published."""
        self._dropped = True
        if self._file is not None:
            self._store.discard(self._file)


def _reason(error: OSError | MemoryError) -> str:
    return getattr(error, "strerror", None) or str(error) or "out of memory"

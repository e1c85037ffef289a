"""Destination: finds what this host has of the guest that comes, and announces it.

HELLO -> open the file -> read and digest (a thread) -> announce -> read again when referred to
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import trio
from numpy.typing import NDArray

from migrate.checkpoint.file import CheckpointReader
from migrate.checkpoint.params import CheckpointParams, needs_vm_id
from migrate.checkpoint.store import CheckpointStore
from migrate.errors import OldCopyError, PeerProtocolError
from migrate.guests.base import DestinationGuest
from migrate.pages.digests import Digests
from migrate.report.old_copy import OldCopyReport
from migrate.report.report import Report
from migrate.runtime import Step
from migrate.session import Session
from migrate.transport.link import Link
from proto.errors import MessageError
from proto.guest_events import PAGE_SIZE
from proto.link.messages import Hello, OldCopy

PIECE_PAGES: Final = 16384
"""How much is read and announced at a time: 64 MiB of guest memory, 256 KiB on the link, 10 ms of
a link of 200 Mbit/s on which acknowledgements must come through meanwhile."""

OPEN_S: Final = 5.0
"""A disk that does not even show a header by then is not worth waiting for."""


class OldPages:
    """What ``apply`` needs of an old copy: its pages, by their slots from 0.

    Attributes:
        referenced_pages: Pages that were read for the guest.
    """

    def __init__(
        self, reader: CheckpointReader, path: Path, spoiled: Callable[[], None]
    ) -> None:
        self._reader = reader
        self._path = path
        self._spoiled = spoiled
        self.announced_pages = self.referenced_pages = 0

    def read_into(self, slots: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
        """Read pages and compare them with what was announced.

        Args:
            slots: Shape (n,).
            out: Where to, shape (n, 4096); rows may be apart.

        Raises:
            PeerProtocolError: A page that was never announced.
            OldCopyError: A page is not what it was.
        """
        if int(slots.max()) >= self.announced_pages:
            raise PeerProtocolError(
                f"the source refers to old page {int(slots.max())}, "
                f"and {self.announced_pages} were announced"
            )
        try:
            good, why = self._reader.read_into(slots, out), "changed"
        except OSError as error:
            good, why = False, f"cannot be read ({error.strerror})"
        if not good:
            self._spoiled()
            raise OldCopyError(
                f"the old copy {self._path} {why} while it was in use; it was removed, and the "
                "next migration goes without it"
            )
        self.referenced_pages += len(slots)


class DestinationCopies:
    """The old copy of one run of migrate-dst.

    Attributes:
        pages: The old copy, ``None`` if there is none.
    """

    def __init__(
        self, params: CheckpointParams | None, vm_id: str | None, session: Session
    ) -> None:
        self._params = params
        self._vm_id = vm_id
        self._session = session
        self._store: CheckpointStore | None = None
        self._reader: CheckpointReader | None = None
        self._announcing = trio.CancelScope()
        self.pages: OldPages | None = None

    async def prepare(self, guest: DestinationGuest) -> None:
        """Find out whose RAM may be used, before any source is listened to.

        Raises:
            ParamsError: The guest has no identity, or the directory cannot be used.
        """
        if self._params is None:
            return
        if self._vm_id is None and guest.form != "simulate":
            facts = await guest.facts()
            self._vm_id = facts.vm_id
            if self._vm_id is None:
                raise needs_vm_id(facts.missing or "the VM has no UUID")
        store = self._store = CheckpointStore(self._params.directory, self._params.max_bytes)
        await self._session.runtime.work(Step.CHECKPOINT, (), store.prepare)

    async def find(self, hello: Hello) -> int:
        """Look for an old copy of the guest that comes.

        Returns:
            How many pages it may have; 0 = there is none that can be used.
        """
        if self._store is None:
            return 0
        # A simulated guest is made by the source: there is nobody here who knew it before.
        vm_id = self._vm_id or hello.vm_id
        if vm_id is None or hello.vm_id != vm_id:
            self._session.warn(
                f"no old copy is used: expected VM {vm_id or 'with a --vm-id'}, and the source "
                f"says {hello.vm_id or 'nothing of the kind (--vm-id, or a UUID)'}"
            )
            return 0
        self._vm_id = vm_id
        runtime = self._session.runtime
        with trio.move_on_after(OPEN_S) as opening:
            try:
                self._reader = await runtime.work(
                    Step.CHECKPOINT, (), _open, self._store, vm_id, hello.digest_seed
                )
            except (OSError, MessageError) as error:
                self._useless(getattr(error, "strerror", None) or str(error))
        if opening.cancelled_caught:
            self._useless(f"its disk did not answer within {OPEN_S:.0f} s")
        reader, store = self._reader, self._store
        if reader is None or not reader.page_limit:
            if reader is not None:
                self._useless("no page is left of it" if reader.truncated else "it is empty")
            return 0
        self.pages = OldPages(reader, store.path(vm_id), lambda: store.remove(vm_id))
        return reader.page_limit

    def _useless(self, why: str) -> None:
        self._session.warn(f"the old copy {self._path} is not used: {why}")

    def _lacking(self, why: str) -> None:
        self._session.warn(f"the old copy {self._path} is not complete: {why}")

    @property
    def _path(self) -> Path:
        assert self._store is not None
        assert self._vm_id is not None
        return self._store.path(self._vm_id)

    async def announce(self, link: Link, welcomed: trio.Event) -> None:
        """Read and digest what there is, and announce it; run this as a task from HELLO on.

        Args:
            link: To the source.
            welcomed: Set once WELCOME has been said.
        """
        if self._reader is None or self.pages is None:
            return
        most = self._reader.page_limit // PIECE_PAGES + 1
        to_send, pieces = trio.open_memory_channel[tuple[Digests, bool]](most)
        with self._announcing:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, self._reader, to_send)
                await welcomed.wait()
                async for digests, is_last in pieces:
                    await self._announce(link, digests, is_last)

    async def _read(
        self, reader: CheckpointReader, out: trio.MemorySendChannel[tuple[Digests, bool]]
    ) -> None:
        runtime = self._session.runtime
        costs = [("", PIECE_PAGES * PAGE_SIZE)]
        async with out:
            try:
                while not reader.exhausted:
                    digests = await runtime.work(
                        Step.CHECKPOINT, costs, reader.read_digests, PIECE_PAGES
                    )
                    await out.send((digests, reader.exhausted))
                if reader.truncated:
                    self._lacking("it ends early")
            except OSError as error:
                self._lacking(error.strerror or str(error))
                await out.send((np.empty((0, 2), np.uint64), True))

    async def _announce(self, link: Link, digests: Digests, is_last: bool) -> None:
        assert self.pages is not None
        if not (len(digests) or is_last):
            return  # all of them were known
        first = self.pages.announced_pages
        # Before it is sent: the source may refer to it at once.
        self.pages.announced_pages += len(digests)
        payload = np.ascontiguousarray(digests).reshape(-1).data.cast("B")
        await link.send(OldCopy(first, payload, is_last))

    def stop_announcing(self) -> None:
        """The source has sent all pages; whatever is announced from now on comes too late."""
        self._announcing.cancel()

    def tell(self, report: Report) -> None:
        """Put it into the report."""
        if self.pages is None or self._reader is None:
            return
        now_s = self._session.runtime.utc().timestamp()
        report.old_copy = OldCopyReport(
            announced_pages=self.pages.announced_pages,
            referenced_pages=self.pages.referenced_pages,
            saved_bytes=self.pages.referenced_pages * PAGE_SIZE,
            age_s=max(0.0, now_s - self._reader.header.created_s),
        )


def _open(store: CheckpointStore, vm_id: str, seed: int) -> CheckpointReader | None:
    """Open the checkpoint of a VM, keep the directory within its bound; runs in a thread."""
    file = store.open(vm_id)
    store.trim()  # what is open stays readable
    if file is None:
        return None
    reader = CheckpointReader(file, seed)
    if reader.header.vm_id != vm_id:
        raise MessageError("checkpoint", f"one of VM {vm_id}", f"one of {reader.header.vm_id}")
    return reader

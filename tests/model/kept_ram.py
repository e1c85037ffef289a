"""A guest's RAM as a host kept it, in memory instead of on a disk, and what can happen to it."""

import os
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from migrate.checkpoint.file import CheckpointReader, CheckpointWriter, OpenFile
from migrate.pages.checkpoint import CheckpointHeader
from migrate.simulation.ram import Pages
from proto.errors import MessageError
from proto.guest_events import PAGE_SIZE, PageRun, RamBlock, ZeroRun

Fate = Literal["whole", "cut", "flipped", "swapped", "no header"]
FATES: Final[tuple[Fate, ...]] = ("whole", "cut", "flipped", "swapped", "no header")

VM: Final = "vm-1"


class KeptRam:
    """A checkpoint that is written beside a migration."""

    def __init__(self, blocks: tuple[RamBlock, ...]) -> None:
        self.file = OpenFile(os.memfd_create("kept"))
        self.header = CheckpointHeader.of(VM, blocks)
        self._writer = CheckpointWriter(
            self.file, self.header, lambda least_bytes, wanted_bytes: wanted_bytes
        )

    @classmethod
    def read(cls, path: Path) -> "KeptRam":
        """What a command kept."""
        kept = cls.__new__(cls)
        kept.file = OpenFile(os.open(path, os.O_RDONLY))
        kept.header = CheckpointReader(kept.file, 0).header
        return kept

    def take(self, run: PageRun | ZeroRun) -> None:
        """Take what the source sends."""
        if isinstance(run, PageRun):
            self._writer.write(run.block, run.pages, run.data)
        else:
            self._writer.zero(run.block, run.pages)

    def finish(self) -> "KeptRam":
        """The guest is away."""
        self.header = self._writer.finish(0, 0)
        return self

    def rows(self, pages: Pages) -> NDArray[np.uint8]:
        """Pages as they are in the file."""
        everything = np.zeros((self.header.page_count, PAGE_SIZE), np.uint8)
        os.preadv(self.file.number, [everything.data], self.header.pages_at)
        return everything[pages]

    def suffer(self, fate: Fate, at: float) -> None:
        """Let something happen to it, ``at`` a place from 0 to 1."""
        fd, size = self.file.number, os.fstat(self.file.number).st_size
        where = int(at * (size - 1))
        page_at = self.header.pages_at + where % self.header.page_count * PAGE_SIZE
        match fate:
            case "cut":
                os.ftruncate(fd, where)
            case "flipped":
                bits = bytes(bit ^ 0x10 for bit in os.pread(fd, 1, page_at + where % PAGE_SIZE))
                os.pwrite(fd, bits, page_at + where % PAGE_SIZE)
            case "swapped":  # the same pages elsewhere: nothing is lost
                first, other = (
                    os.pread(fd, PAGE_SIZE, offset)
                    for offset in (self.header.pages_at, page_at)
                )
                os.pwrite(fd, other, self.header.pages_at)
                os.pwrite(fd, first, page_at)
            case "no header":
                os.pwrite(fd, bytes(8), 0)

    def reader(self, seed: int) -> CheckpointReader | None:
        """Read it; ``None`` if it is no checkpoint any more."""
        try:
            reader = CheckpointReader(self.file, seed)
        except MessageError:
            return None
        return reader if reader.page_limit else None

"""Whole pages of this machine's own files, packed into an image that a lab guest reads as a disk.

Memory of real guests is mostly page cache and programs: what it compresses to, and how much of it
occurs twice, no generator gets right. The same machine always gives the same image: files are
drawn by the hash of their path, a third of the image each from programs and libraries, from text,
and from the rest (packed, tables, byte code). No file comes twice, and none gives more than
``FILE_PAGES_MAX`` pages.
"""

import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import numpy as np
import xxhash

from migrate.errors import GuestError, GuestOn
from migrate.lab.qemu_binaries import cache_dir
from migrate.units import MIB
from proto.guest_events import PAGE_SIZE

FOLDERS: Final = ("/usr/bin", "/usr/sbin", "/usr/lib", "/usr/libexec", "/usr/share")
FILE_PAGES_MAX: Final = 1024
PROBE_BYTES: Final = 4096
DIGEST_BYTES: Final = 16 * MIB
ELF_MAGIC: Final = b"\x7fELF"
KINDS: Final = ("program", "text", "other")


@dataclass(frozen=True, slots=True)
class FileContent:
    """An image of whole pages of files.

    Attributes:
        path: The image; its size is a multiple of the page size.
        xxh3: Digest of its start, so that tables of two machines can be told apart; a smaller
            image is the start of a larger one.
    """

    path: Path
    xxh3: str


def build(mib: int, folders: tuple[str, ...] = FOLDERS) -> FileContent:
    """Return the image of ``mib`` MiB in the cache, made now if it is missing; blocks for seconds.

    Raises:
        GuestError: The machine has too few files.
    """
    target = cache_dir() / "content" / f"files-{mib}.img"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Two makers at once make the same, and each puts its own in place whole.
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as image:
            new = Path(image.name)
            try:
                pack(image, mib * MIB // PAGE_SIZE, folders)
                new.replace(target)
            except BaseException:
                new.unlink(missing_ok=True)
                raise
    return FileContent(target, _digest(target))


def pack(image: IO[bytes], n_pages: int, folders: tuple[str, ...]) -> None:
    """Write ``n_pages`` pages; where one kind of file runs out, the next fills its share.

    Raises:
        GuestError: There are too few files.
    """
    queues = _files_by_kind(folders)
    seen: set[bytes] = set()
    written = dict.fromkeys(KINDS, 0)
    while (missing := n_pages - sum(written.values())) > 0:
        # The kind that is furthest behind among those that still have files.
        kind = min(
            (kind for kind in KINDS if queues[kind]), key=written.__getitem__, default=None
        )
        if kind is None:
            raise GuestError(
                f"{', '.join(folders)} have {missing} of {n_pages} pages of files too few",
                guest_on=GuestOn.NEITHER,
            )
        pages = _whole_pages(queues[kind].pop())
        digest = xxhash.xxh3_128_digest(pages)
        if pages and digest not in seen:
            seen.add(digest)
            pages = pages[: missing * PAGE_SIZE]
            image.write(pages)
            written[kind] += len(pages) // PAGE_SIZE


def _files_by_kind(folders: tuple[str, ...]) -> dict[str, list[Path]]:
    """All files of a page or more, by kind, in an order that only their paths decide."""
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for path in sorted(_files(folders), key=lambda path: xxhash.xxh3_128_digest(bytes(path))):
        try:
            with path.open("rb") as file:
                start = file.read(PROBE_BYTES)
        except OSError:
            continue
        if len(start) == PROBE_BYTES:
            is_program = start.startswith(ELF_MAGIC)
            kind = "program" if is_program else "other" if b"\0" in start else "text"
            found[kind].append(path)
    return found


def _files(folders: tuple[str, ...]) -> Iterator[Path]:
    """Regular files that everybody may read; no links, which would name a file twice."""
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                try:
                    status = path.lstat()
                except OSError:
                    continue
                is_regular = stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IROTH
                if is_regular and status.st_size >= PAGE_SIZE:
                    yield path


def _whole_pages(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_PAGES_MAX * PAGE_SIZE)
    except OSError:
        return b""
    return content[: len(content) // PAGE_SIZE * PAGE_SIZE]


def _digest(path: Path) -> str:
    return xxhash.xxh3_64_hexdigest(np.memmap(path, np.uint8, "r")[:DIGEST_BYTES].data)

"""Memory of another process on this host, read and written in place.

``process_vm_readv`` and ``process_vm_writev``: one copy by the kernel, no mapping on our side, and
whatever kind of memory the process has (anonymous, huge pages, files) stays what it is. The kernel
allows it where it would allow to trace the process: root's, and one's own descendants, mostly.

Source: process_vm_readv(2), ptrace(2) "Ptrace access mode checking".
"""

import ctypes
import errno
import os
import select
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migrate.errors import LandingError
from proto.guest_events import PAGE_SIZE

MAX_VECTORS: Final = 1024
"""The kernel's UIO_MAXIOV."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class ProcessMemory:
    """Pages in the address space of one process.

    The kernel takes the process by its number; a descriptor of it is looked at before each call, so
    that another process which got the same number later is never touched.

    Attributes:
        pid: The process.
    """

    def __init__(self, pid: int) -> None:
        """Open it.

        Raises:
            LandingError: There is no such process.
        """
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise LandingError(f"cannot reach process {pid}: {error.strerror}") from error
        self._exited = select.poll()
        self._exited.register(self._pidfd, select.POLLIN)

    def close(self) -> None:
        """Forget the process; nothing can be transferred afterwards."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def read_pages(self, base: int, pages: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
        """Copy pages of the area that begins at ``base`` into ``out``, shape (n, 4096).

        Args:
            base: Address in the process.
            pages: Page numbers in the area, strictly increasing, shape (n,).
            out: Contiguous.

        Raises:
            LandingError: The kernel refused, or a page is not there.
        """
        self._transfer("process_vm_readv", base, pages, out)

    def write_pages(
        self, base: int, pages: NDArray[np.uint32], data: NDArray[np.uint8]
    ) -> None:
        """Copy ``data``, shape (n, 4096), into pages of the area; arguments as ``read_pages``.

        Raises:
            LandingError: As ``read_pages``; any part may have been written.
        """
        self._transfer("process_vm_writev", base, pages, np.ascontiguousarray(data))

    def _transfer(
        self, call: str, base: int, pages: NDArray[np.uint32], data: NDArray[np.uint8]
    ) -> None:
        if self._pidfd < 0 or self._exited.poll(0):
            raise LandingError(f"process {self.pid} has ended")
        there = _vectors(base, pages)
        start = data.ctypes.data
        for first in range(0, len(there), MAX_VECTORS):
            part = there[first : first + MAX_VECTORS]
            length = int(part[:, 1].sum())
            here = np.array([[start, length]], np.uint64)
            done = getattr(_LIBC, call)(
                ctypes.c_int(self.pid),
                here.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_ulong(1),
                part.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_ulong(len(part)),
                ctypes.c_ulong(0),
            )
            if done != length:
                raise LandingError(self._why(call, done, length))
            start += length

    def _why(self, call: str, done: int, length: int) -> str:
        code = ctypes.get_errno() if done < 0 else errno.EFAULT
        return (
            f"cannot reach the memory of process {self.pid}: {call} of {length} bytes: "
            f"{os.strerror(code)}"
        )


def _vectors(base: int, pages: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Address and length of each run of consecutive pages, shape (runs, 2)."""
    count = len(pages)
    if int(pages[-1]) - int(pages[0]) == count - 1:  # nearly always
        return np.array([[base + int(pages[0]) * PAGE_SIZE, count * PAGE_SIZE]], np.uint64)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(pages) != 1) + 1))
    vectors = np.empty((len(starts), 2), np.uint64)
    vectors[:, 0] = pages[starts].astype(np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(base)
    vectors[:, 1] = np.diff(starts, append=count) * PAGE_SIZE
    return vectors

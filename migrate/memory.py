"""How this process keeps memory: batches are allocated and freed a thousand times a second.

glibc gives freed megabytes back to the kernel at once, and fetches them again, page fault by page
fault, for the next batch. Kept in the process they cost nothing.
"""

import ctypes
import gc

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

KEPT_BYTES = 96 * 2**20
"""Freed memory at the end of the heap that is kept: what the window and the backlog may need."""

LARGEST_HEAP_BLOCK_BYTES = 32 * 2**20
"""glibc's own maximum: larger blocks (page caches) stay mappings of their own."""


def keep_freed_memory() -> None:
    """Tell malloc to reuse; the C library part only where it has ``mallopt``."""
    gc.freeze()  # what the start-up made stays; collections need not walk it again and again
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK_BYTES)
    mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(_M_ARENA_MAX, 1)

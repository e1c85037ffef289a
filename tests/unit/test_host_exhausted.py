"""What the host runs out of is told as such; what is a mistake of ours stays one."""

import errno
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from migrate.errors import HostExhaustedError, PeerLostError, exhausted
from migrate.pages.page_cache import SPARED_BYTES, affordable_slots, less_cache
from migrate.session import most_telling
from migrate.transport.channels import has_descriptors
from proto.guest_events import PAGE_SIZE

MIB = 1 << 20


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "no memory left"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "no memory left"),
        (OSError(errno.EMFILE, "Too many open files"), "no file descriptors left"),
        (OSError(errno.ENOSPC, "No space left on device"), "no room on a disk left"),
        (RuntimeError("can't start new thread"), "no threads left"),
    ],
)
def test_the_host_is_named(error: Exception, words: str) -> None:
    told = most_telling(ExceptionGroup("", [PeerLostError("lost"), error]))
    assert isinstance(told, HostExhaustedError)
    assert words in str(told)
    assert not str(told).endswith(":")


def test_an_array_too_large_is_no_mistake_of_ours() -> None:
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 60, np.uint8)
    assert isinstance(exhausted(caught.value), HostExhaustedError)


@pytest.mark.parametrize(
    "error", [OSError(errno.EBADF, "Bad file descriptor"), RuntimeError("else"), KeyError("x")]
)
def test_mistakes_are_raised_as_they_are(error: Exception) -> None:
    assert exhausted(error) is None
    with pytest.raises(type(error)):
        most_telling(ExceptionGroup("", [PeerLostError("lost"), error]))


LIMITED = f"""
import resource
from migrate.pages.page_cache import SPARED_BYTES, affordable_slots
with open("/proc/self/status") as file:
    held = int(dict(line.split(":", 1) for line in file)["VmSize"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (held + SPARED_BYTES + {40 * MIB},) * 2)
print(affordable_slots({256 * MIB // PAGE_SIZE}), affordable_slots(1 << 60))
"""


def test_a_cache_is_halved_until_there_is_memory_for_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True
    )
    slots, of_far_too_many = map(int, done.stdout.split())
    assert slots == 32 * MIB // PAGE_SIZE
    assert 0 < of_far_too_many * PAGE_SIZE <= 40 * MIB
    assert affordable_slots(0) == 0
    assert affordable_slots(1000) == 1000
    assert SPARED_BYTES > 2 * 64 * MIB
    assert less_cache(65536, 0) == "no memory for a page cache of 256 MiB: none is used"
    assert less_cache(65536, 8192).endswith(": only 32.0 MiB is used")


def test_descriptors_are_counted_from_the_lowest_that_is_free() -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/", os.O_PATH)
    os.close(lowest)
    assert has_descriptors(limit - lowest)
    assert not has_descriptors(limit - lowest + 1)

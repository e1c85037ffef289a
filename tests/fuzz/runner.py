"""Runs one fuzzing target in this process and measures what it took.

An input is told by the target, a seed and its number, and can be run alone. What must not happen:
another exception than the target expects, a broken promise (``assert``), more than ``LIMIT_S`` of
processor time for one input, more memory than ``MAX_GROWTH_BYTES`` beyond what the process had
before the first input: resident, where it is measured at the end, and reserved, where the kernel
refuses it at once (``RLIMIT_AS``), so that the input is known by its number.
"""

import gc
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

from tests.fuzz import frames, qemu_stream, values, virtio

Case = Callable[[random.Random], str]

TARGETS: Final[dict[str, Callable[[], Case]]] = {
    "frames": frames.frames,
    "messages": frames.messages,
    "session": frames.session,
    "codecs": values.codecs,
    "stream": qemu_stream.stream,
    "multifd": qemu_stream.multifd,
    "return-path": qemu_stream.return_path,
    "virtio": virtio.virtio,
    "qmp": values.qmp,
    "facts": values.facts,
}
"""What is fuzzed, by name; each makes its corpus and returns what runs one input."""

MIB: Final = 1 << 20
MAX_GROWTH_BYTES: Final = 64 * MIB
"""What a hostile message may reserve (32 MiB: ``MAX_CONTAINER_ITEMS``), beside some buffers."""

LIMIT_S: Final = 2.0
KEPT_FAILURES: Final = 20

COLLECT_EVERY: Final = 8
"""Readers with a generator hold themselves, megabytes each, until cycles are looked for."""


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        target: Name of what was fuzzed.
        seed: Of all inputs.
        inputs: How many were run.
        counts: How they ended.
        n_failures: Inputs that ended otherwise.
        failures: Number and traceback of the first ``KEPT_FAILURES``.
        seconds: Wall-clock time of the inputs.
        cpu_seconds: Processor time of the same.
        start_bytes: Resident memory before the first input.
        peak_bytes: The most that was resident afterwards.
    """

    target: str
    seed: int
    inputs: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    n_failures: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    start_bytes: int = 0
    peak_bytes: int = 0

    @property
    def growth_bytes(self) -> int:
        """Memory that inputs took, at most."""
        return self.peak_bytes - self.start_bytes

    @property
    def good(self) -> bool:
        """Nothing happened that must not."""
        return not self.n_failures and self.growth_bytes <= MAX_GROWTH_BYTES


class TooSlowError(Exception):
    """An input takes more processor time than any may."""


def run(target: str, inputs: int, seed: int, only: int | None = None) -> Outcome:
    """Run inputs 0 to ``inputs - 1`` of a target, or only one of them."""
    case = TARGETS[target]()
    outcome = Outcome(target, seed)
    gc.collect()
    gc.freeze()
    restore = _limit_memory()
    watch = _Watch()
    started, cpu = time.perf_counter(), time.process_time()
    outcome.start_bytes = _reset_peak()
    try:
        for number in range(inputs) if only is None else [only]:
            watch.number = number
            try:
                what = case(random.Random(f"{seed} {number}"))
                outcome.counts[what] = outcome.counts.get(what, 0) + 1
            except Exception:  # what must not happen is what is looked for
                outcome.n_failures += 1
                if len(outcome.failures) < KEPT_FAILURES:
                    outcome.failures.append((number, traceback.format_exc()))
            outcome.inputs += 1
            if not number % COLLECT_EVERY:
                gc.collect()
    finally:
        watch.stop()
        restore()
    outcome.peak_bytes = _resident("VmHWM")
    outcome.seconds = time.perf_counter() - started
    outcome.cpu_seconds = time.process_time() - cpu
    return outcome


class _Watch:
    """Interrupts an input that takes too long; looks only now and then.

    Attributes:
        number: Of the input under way.
    """

    def __init__(self) -> None:
        self.number = -1
        self._seen = -1
        self._old = signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S, LIMIT_S)

    def _look(self, _: int, __: FrameType | None) -> None:
        seen, self._seen = self._seen, self.number
        if seen == self.number:
            raise TooSlowError(f"more than {LIMIT_S:g} s of processor time")

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self._old)


def _limit_memory() -> Callable[[], None]:
    """Have the kernel refuse what goes too far; returns what lifts that."""
    old, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_resident("VmSize") + MAX_GROWTH_BYTES, most))
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (old, most))


def _reset_peak() -> int:
    """Have the kernel forget the peak so far; resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"the kernel tells no {what}")

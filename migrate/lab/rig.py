"""A link between two hosts on one machine, with lab guests at both ends and ways to migrate.

A source guest serves many migrations: each leaves it stopped, and once the destination is surely
dead it may ``cont``.
"""

import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from migrate.errors import DeadlineExceededError, GuestError, GuestOn
from migrate.lab import guest_image
from migrate.lab.console import ConsoleLog, follow_console
from migrate.lab.engine import EngineMode, EngineWay, Receiver, receiving
from migrate.lab.guest_vm import Guest, GuestConfig, GuestPaths, qemu_args, running_guest
from migrate.lab.measured import Endpoint, Measurement, Stopwatch, stopwatch
from migrate.lab.native import NativeMode, NativeWay
from migrate.lab.netns import Namespace, NetnsPair
from migrate.lab.processes import killed_at_the_end, listener_pid
from migrate.lab.qemu_binaries import QemuBinary
from migrate.qemu import queries
from migrate.qemu.qmp_client import open_qmp
from migrate.units import KIB, MIB

BOOT_S: Final = 180.0
AFTERWARDS_S: Final = 30.0
"""For the guest to show itself at the destination, and later at the source again."""

SETTLE_S: Final = 1.0
"""Both ends are up and the guest runs this long before each migration: even heartbeats."""

GREETING_S: Final = 60.0
"""A QEMU that allocates its guest's memory does not answer meanwhile."""

SPARE_BYTES: Final = 512 * MIB
TOUCHED_MAX_BYTES: Final = 2048 * MIB
"""More is not written during a migration: a larger guest's other memory is zero."""

COMPACT: Final = Path("/proc/sys/vm/compact_memory")
TOUCH: Final = """
import mmap, pathlib, sys
pathlib.Path("/proc/self/oom_score_adj").write_text("1000")
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(14)  # MADV_HUGEPAGE
memory.madvise(23)  # MADV_POPULATE_WRITE
"""


class Way(Protocol):
    """A destination that waits, and how to get there."""

    @property
    def endpoint(self) -> Endpoint:
        """The destination."""
        ...

    async def migrate(self, source: Endpoint, watch: Stopwatch) -> dict[str, Any] | None:
        """Migrate and return the engine's report, natively ``None``."""
        ...

    async def cancel(self, source: Endpoint) -> None:
        """Call off what ``migrate`` was cancelled in, and wait until it is."""
        ...


@dataclass(frozen=True, slots=True)
class Rig:
    """The link and the folder that all runs share.

    Attributes:
        link: Its source end is where guests leave.
        folder: For sockets and logs; a short path.
    """

    link: NetnsPair
    folder: Path

    @property
    def turned(self) -> "Rig":
        """The same with source and destination exchanged."""
        return Rig(NetnsPair(self.link.destination, self.link.source), self.folder)

    @contextlib.contextmanager
    def _workdir(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(
            dir=self.folder, prefix="", ignore_cleanup_errors=True
        ) as name:
            yield Path(name)

    @asynccontextmanager
    async def qemu(
        self, config: GuestConfig, binary: QemuBinary, namespace: Namespace, *, incoming: bool
    ) -> AsyncIterator[Endpoint]:
        """Run a QEMU; unless ``incoming``, its guest has filled its memory on entry.

        Raises:
            GuestError: The machine has not the memory for it, or the guest does not boot.
        """
        _require_memory(config)
        with self._workdir() as workdir:
            launcher = namespace.write_launcher(workdir / "qemu", binary.path)
            local = QemuBinary(launcher, binary.version)
            how = "defer" if incoming else None
            async with (
                running_guest(config, local, workdir, incoming=how) as guest,
                open_qmp(guest.paths.qmp[0], greeting_timeout_s=GREETING_S) as monitor,
            ):
                if not incoming:
                    with trio.fail_after(BOOT_S):
                        await guest.console.wait_ready()
                    _check_content(guest)
                yield Endpoint(
                    guest.process.pid, guest.console, monitor, guest.paths.qmp[1], workdir
                )

    @asynccontextmanager
    async def native(
        self,
        mode: NativeMode,
        config: GuestConfig,
        binary: QemuBinary,
        *,
        downtime_limit_ms: int,
    ) -> AsyncIterator[Way]:
        """Start a destination for QEMU's own migration."""
        end = self.link.destination
        async with self.qemu(config, binary, end, incoming=True) as endpoint:
            yield NativeWay(mode, endpoint, end.address, downtime_limit_ms)

    @asynccontextmanager
    async def engine(
        self,
        mode: EngineMode,
        config: GuestConfig,
        binary: QemuBinary,
        *,
        downtime_limit_ms: int,
    ) -> AsyncIterator[Way]:
        """Start a destination for the engine."""
        destination = self._attached if mode.attach else self._owned
        async with destination(mode, config, binary) as (endpoint, receiver):
            yield EngineWay(mode, endpoint, receiver, self.link, downtime_limit_ms)

    @asynccontextmanager
    async def _attached(
        self, mode: EngineMode, config: GuestConfig, binary: QemuBinary
    ) -> AsyncIterator[tuple[Endpoint, Receiver]]:
        end = self.link.destination
        async with self.qemu(config, binary, end, incoming=True) as endpoint:
            way = ["--qmp", str(endpoint.engine_qmp)]
            async with receiving(mode, self.link, endpoint.workdir, way) as receiver:
                yield endpoint, receiver

    @asynccontextmanager
    async def _owned(
        self, mode: EngineMode, config: GuestConfig, binary: QemuBinary
    ) -> AsyncIterator[tuple[Endpoint, Receiver]]:
        """A QEMU that migrate-dst starts; it outlives the command, so it is killed at the end."""
        _require_memory(config)
        with self._workdir() as workdir:
            paths = GuestPaths.under(workdir)
            argv = qemu_args(
                config,
                image=guest_image.locate(),
                qmp_paths=paths.qmp,
                console_path=paths.console,
                serial_path=paths.serial,
            )
            way = ["--", str(binary.path), *argv]
            async with contextlib.AsyncExitStack() as stack:
                receiver = await stack.enter_async_context(
                    receiving(mode, self.link, workdir, way)
                )
                pid = listener_pid(paths.qmp[0])
                await stack.enter_async_context(killed_at_the_end(pid))
                console = ConsoleLog()
                nursery = await stack.enter_async_context(_cancelled_nursery())
                await nursery.start(follow_console, paths.console, console)
                monitor = await stack.enter_async_context(open_qmp(paths.qmp[0]))
                yield Endpoint(pid, console, monitor, paths.qmp[1], workdir), receiver

    async def timed(self, source: Endpoint, way: Way, timeout_s: float) -> Measurement:
        """Migrate, measure, and leave the source as it is.

        Raises:
            DeadlineExceededError: Not finished in time, and called off: the guest is at the
                source; or the engine gave up as it would not converge.
            MigrationError: It failed.
        """
        await trio.sleep(SETTLE_S)
        async with stopwatch(source, way.endpoint, self.link) as watch:
            report = None
            with trio.move_on_after(timeout_s) as deadline:
                report = await way.migrate(source, watch)
            if deadline.cancelled_caught:
                with trio.fail_after(AFTERWARDS_S):
                    await way.cancel(source)
                raise DeadlineExceededError(f"not finished within {timeout_s:g} s")
            with trio.fail_after(AFTERWARDS_S):
                return await watch.finish(report)

    async def revive(self, source: Endpoint) -> None:
        """Let the source guest go on; its only other copy must be dead."""
        with trio.fail_after(AFTERWARDS_S):
            if not (await queries.query_run_state(source.monitor)).running:
                await queries.cont(source.monitor)
            await source.console.wait_heartbeats(1)


def _require_memory(config: GuestConfig) -> None:
    """Refuse what the kernel would end by killing some process of this machine."""
    wanted = config.ram_kib * KIB + SPARE_BYTES if config.prealloc else SPARE_BYTES
    available = _available_bytes()
    if available < wanted:
        raise GuestError(
            f"a guest of {config.ram_kib // 1024} MiB needs {wanted // MIB} MiB of free memory, "
            f"this machine has {available // MIB} MiB",
            guest_on=GuestOn.NEITHER,
        )


def _check_content(guest: Guest) -> None:
    """An image built by an older checkout, which shares the cache, would just lack its content."""
    wanted = f"device_mib={guest.config.workload.device_mib}"
    if wanted not in guest.console.ready_words:
        raise GuestError(
            f"expected a guest with {wanted}, got {' '.join(guest.console.ready_words)}: another "
            "checkout built the lab guest (run tools/build-guest)",
            guest_on=GuestOn.NEITHER,
        )


@asynccontextmanager
async def _cancelled_nursery() -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


async def level_memory(ram_bytes: int, most_bytes: int = TOUCHED_MAX_BYTES) -> None:
    """Bring the machine's free memory into the same state before each run, as far as we can.

    A virtual machine's host takes a fault for each page that nobody used for long, and huge
    pages are to be had or not. So as much as a destination needs is touched and given back, and
    the kernel asked to put free memory together. The page cache is left alone: programs and the
    guests' content stay in it from the first run on.
    """
    with contextlib.suppress(OSError):
        await trio.to_thread.run_sync(COMPACT.write_text, "1")
    available = _available_bytes()
    wanted = min(ram_bytes + SPARE_BYTES, most_bytes, available // 2)
    await trio.run_process([sys.executable, "-c", TOUCH, str(wanted)], check=False)


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * KIB

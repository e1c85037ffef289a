"""What the engine takes from its surroundings: time, threads, chance, disk and connections.

Everything in ``migrate`` that a migration passes through asks here and never the operating system,
so the same engine runs in the commands (``RealRuntime``) and on a virtual clock
(``migrate.lab.virtual``). Waiting is not here: ``trio.sleep`` and deadlines follow the clock that
trio was started with.
"""

import datetime
import enum
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar, TypeVarTuple

import trio

from migrate.errors import MigrationError
from migrate.params import LinkAddress
from migrate.state_file import Side, StateFile, check_state_dir
from migrate.transport.channels import LinkListener, LinkSocket, connect_tcp, listen

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

ENCODE_THREADS = 2
"""Encoders at work at a time."""


SWITCH_INTERVAL_S = 0.0005
"""How long a thread keeps the interpreter from the others: a tenth of Python's own. A thread that
comes back from the kernel or a codec with a batch waits for it up to so long."""


class Step(enum.Enum):
    """Work on whole batches that is too long for the trio thread; each has threads of its own."""

    CLASSIFY = "classify"
    ENCODE = "encode"
    DECODE = "decode"
    CHECKPOINT = "checkpoint"
    """Reading and writing files that a migration does not depend on."""


THREADS = {Step.CLASSIFY: 1, Step.ENCODE: ENCODE_THREADS, Step.DECODE: 1, Step.CHECKPOINT: 1}
"""One thread where order matters."""

Costs = Sequence[tuple[str, int]]
"""What a piece of work is made of: the codec as in ``CodecSetting`` (empty: none has a part in it)
and raw bytes. A real processor takes what it takes; a modelled one is charged by this."""


class Runtime(Protocol):
    """The surroundings of one command.

    Attributes:
        real_time: Time passes while this process computes; on a virtual clock it does not.
    """

    real_time: bool

    def now_ns(self) -> int:
        """Monotonic time in nanoseconds, never 0."""
        ...

    def utc(self) -> datetime.datetime:
        """The same moment for people."""
        ...

    def random_bytes(self, count: int) -> bytes:
        """Bytes that a peer or a guest cannot guess."""
        ...

    async def work(
        self, step: Step, costs: Costs, function: Callable[[*Ts], T], *args: *Ts
    ) -> T:
        """Call ``function(*args)`` beside the trio thread, not more at a time than ``THREADS``.

        Args:
            step: Whose threads do it.
            costs: What it is made of.
            function: Knows no trio.
            args: Its arguments.

        Returns:
            Its result.
        """
        ...

    def private_dir(self, parent: Path) -> AbstractContextManager[Path]:
        """A fresh directory for this run's sockets, removed at the end if it is empty.

        Raises:
            MigrationError: It cannot be made.
        """
        ...

    def check_state_dir(self, directory: Path) -> None:
        """See before a migration that a handover can be recorded there.

        Raises:
            MigrationError: It cannot.
        """
        ...

    def state_file(self, directory: Path, side: Side, file_id: bytes) -> StateFile:
        """One side's record of one migration."""
        ...

    async def connect(self, address: LinkAddress, what: str) -> LinkSocket:
        """Connect to the other command; ``what`` names it.

        Raises:
            ConnectError: Nothing answers there.
        """
        ...

    async def listen(self, address: LinkAddress, what: str) -> LinkListener:
        """Wait for the other command; raises as ``connect``."""
        ...


def share_interpreter() -> None:
    """Have threads that carry pages wait less for each other; for the whole process.

    Half random guest over an unshaped link, 5 interleaved runs on busy processors: 1.18 s (0.89 to
    1.53) before, 0.99 s (0.79 to 1.29) after.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)


class RealRuntime:
    """The host's clock, threads, random numbers, disk and TCP. See ``Runtime``."""

    def __init__(self) -> None:
        self.real_time = True
        self._limiters = {step: trio.CapacityLimiter(count) for step, count in THREADS.items()}

    def now_ns(self) -> int:
        """``CLOCK_MONOTONIC``."""
        return time.monotonic_ns()

    def utc(self) -> datetime.datetime:
        """The host's date."""
        return datetime.datetime.now(datetime.UTC)

    def random_bytes(self, count: int) -> bytes:
        """From the kernel."""
        return secrets.token_bytes(count)

    async def work(
        self, step: Step, costs: Costs, function: Callable[[*Ts], T], *args: *Ts
    ) -> T:
        """In a thread; see ``Runtime.work``. One that hangs on a dead disk is left behind."""
        return await trio.to_thread.run_sync(
            partial(function, *args),
            abandon_on_cancel=step is Step.CHECKPOINT,
            limiter=self._limiters[step],
        )

    @contextmanager
    def private_dir(self, parent: Path) -> Iterator[Path]:
        """Mode 0700. Its name begins with our process id: what a killed run left can be told."""
        path = parent / f"{os.getpid()}-{secrets.token_hex(2)}"
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
        except OSError as error:
            raise MigrationError(
                f"cannot make a directory for sockets in {parent}: {error.strerror}"
            ) from error
        try:
            yield path
        finally:
            with suppress(OSError):  # somebody's socket is still in it
                path.rmdir()

    def check_state_dir(self, directory: Path) -> None:
        """Write a file there and remove it."""
        check_state_dir(directory)

    def state_file(self, directory: Path, side: Side, file_id: bytes) -> StateFile:
        """A file that survives power loss."""
        return StateFile(directory, side, file_id)

    async def connect(self, address: LinkAddress, what: str) -> LinkSocket:
        """Over TCP."""
        return await connect_tcp(address, what)

    async def listen(self, address: LinkAddress, what: str) -> LinkListener:
        """On TCP."""
        return await listen(address, what)

"""Migrations on a virtual clock: the engine as it is, in one process, faster than they would take.

Time stands still while anything computes and jumps to the next deadline when everything waits
(trio's mock clock). What would have taken time is charged by model: processor work by
``CostModel``, the link by ``migrate.transport.memory_link``. Nothing depends on the host, the disk
or the date, so equal seeds give equal reports, in any process and in any order.
"""

import datetime
import gc
import math
import os
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar, TypeVarTuple

import trio
from trio._core import _run as scheduler
from trio._core._mock_clock import MockClock  # trio.testing would import pytest, for 0.1 s

from migrate.destination import DestinationRun
from migrate.errors import ConnectError
from migrate.params import (
    DEFAULT_CACHE_BYTES,
    Compress,
    DestinationParams,
    LinkAddress,
    OutputParams,
    SourceParams,
)
from migrate.report.report import Report, Role
from migrate.runtime import ENCODE_THREADS, THREADS, Costs, Step
from migrate.session import Session
from migrate.simulation.profile import Profile
from migrate.source import SourceRun
from migrate.state_file import Record, Side, StateFile
from migrate.timeouts import DEFAULTS, Timeouts
from migrate.transport.memory_link import Line, MemoryLinkParams, MemorySocket, memory_link
from migrate.units import NS_PER_S

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

START_NS: Final = 1000 * NS_PER_S
"""What the monotonic clock shows when a run begins: no clock of a host shows 0 either."""

ROLES: Final[tuple[Role, Role]] = ("source", "destination")

ADDRESS: Final = LinkAddress("127.0.0.1", 7001)
"""Where the virtual migrate-dst listens: like loopback, no stranger can reach it."""

PATIENCE_S: Final = 30.0
"""How long a virtual migrate-dst waits for HELLO when the only source there is has ended; thrice
what it gives a connection to introduce itself."""

NOWHERE: Final = Path("/nonexistent")
"""Directories that a virtual run names and never touches."""

START_UTC: Final = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)

ZSTD_LEVEL_FACTOR: Final = 1.35
"""Each level of zstd takes a third more time than the one before, from 1 to 19."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Processor time in nanoseconds per raw byte; one core of some 2.x GHz (design, section 9).

    Attributes:
        classify: Digest, lookups and comparisons of a page with content.
        encode: By codec; zstd's levels above 1 follow from ``zstd``. ``delta``: differences.
        decode: By codec; digest and copies are in it.
    """

    classify: float = 0.15
    encode: Mapping[str, float] = field(
        default_factory=lambda: {
            "none": 0.0,
            "lz4": 0.85,
            "words": 1.9,
            "zstd": 1.83,
            "delta": 0.2,
        }
    )
    decode: Mapping[str, float] = field(
        default_factory=lambda: {"none": 0.2, "lz4": 0.6, "words": 1.0, "zstd": 1.2}
    )

    def cost_ns(self, step: Step, costs: Costs) -> int:
        """Charge a piece of work."""
        return math.ceil(sum(self._per_byte(step, name) * n_bytes for name, n_bytes in costs))

    def _per_byte(self, step: Step, codec: str) -> float:
        name, _, level = codec.partition(":")
        if step is Step.CLASSIFY or not name:
            return self.classify
        if step is Step.DECODE:
            return self.decode[name]
        return self.encode[name] * ZSTD_LEVEL_FACTOR ** (int(level or 1) - 1)


class VirtualStateFile(StateFile):
    """A record in memory.

    Attributes:
        states: What was written, in order.
    """

    def __init__(self, directory: Path, side: Side, file_id: bytes) -> None:
        super().__init__(directory, side, file_id)
        self.states: list[str] = []

    def _store(self, record: Record) -> None:
        self.states.append(record.state)

    def remove(self) -> None:
        """Nothing to remove."""
        self.record = None


class VirtualNetwork:
    """Where virtual commands meet: one link, which all connections share.

    Attributes:
        link: Its rate and delay.
        sockets: One end of every connection, for experiments that break it.
        connected: Set once there is one.
        is_down: Nobody reaches anybody any more.
    """

    def __init__(self, link: MemoryLinkParams) -> None:
        self.link = link
        self._lines = (Line(), Line())
        self.sockets: list[MemorySocket] = []
        self.connected = trio.Event()
        self.is_down = False
        self._listeners: dict[LinkAddress, VirtualListener] = {}
        self._news = trio.Event()

    async def connect(self, address: LinkAddress) -> MemorySocket:
        """Connect; waits for somebody to listen, as long as the caller likes.

        Raises:
            ConnectError: Nobody listens any more, or there is no way.
        """
        while (listener := self._listeners.get(address)) is None:
            await self._news.wait()
        if self.is_down:
            raise ConnectError(f"no way to {address}")
        await trio.sleep(2 * self.link.delay_ms / 1000)
        near, far = memory_link(self.link, self._lines)
        self.sockets.append(near)
        self.connected.set()
        try:
            await listener.offer(far)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectError(f"nobody listens at {address} any more") from error
        return near

    def cut(self) -> None:
        """Have nobody reach anybody any more, and nobody told."""
        self.is_down = True
        for sock in self.sockets:
            sock.cut()

    def listen(self, address: LinkAddress) -> "VirtualListener":
        """Listen."""
        listener = self._listeners[address] = VirtualListener(address)
        self._news.set()
        self._news = trio.Event()
        return listener


class VirtualListener:
    """A listening socket; see ``LinkListener``."""

    def __init__(self, address: LinkAddress) -> None:
        self._address = address
        self._to_us, self._arrived = trio.open_memory_channel[MemorySocket](16)

    async def offer(self, sock: MemorySocket) -> None:
        """Have a connection accepted."""
        await self._to_us.send(sock)

    async def accept(self) -> tuple[MemorySocket, Any]:
        """Wait for a connection."""
        return await self._arrived.receive(), ("source", 0)

    def getsockname(self) -> Any:  # noqa: ANN401 - as trio's
        """Our address."""
        return (self._address.host, self._address.port)

    def close(self) -> None:
        """Listen no longer."""
        self._to_us.close()
        self._arrived.close()


class VirtualRuntime:
    """A modelled host for one command. See ``migrate.runtime.Runtime``.

    Attributes:
        state_files: The handover's records that were opened.
    """

    def __init__(
        self,
        role: str,
        network: VirtualNetwork,
        seed: int,
        *,
        model: CostModel | None = None,
    ) -> None:
        """Set the host up.

        Args:
            role: Tells the hosts of one migration apart.
            network: How it is connected.
            seed: Of its random numbers.
            model: What work costs.
        """
        self.real_time = False
        self.state_files: list[VirtualStateFile] = []
        self._network = network
        self._model = model or CostModel()
        self._random = random.Random(f"{role} {seed}")
        self._limiters = {step: trio.CapacityLimiter(count) for step, count in THREADS.items()}

    def now_ns(self) -> int:
        """Trio's clock."""
        return START_NS + round(trio.current_time() * NS_PER_S)

    def utc(self) -> datetime.datetime:
        """A date that is always the same at the start."""
        return START_UTC + datetime.timedelta(seconds=trio.current_time())

    def random_bytes(self, count: int) -> bytes:
        """From the seed."""
        return self._random.randbytes(count)

    async def work(
        self, step: Step, costs: Costs, function: Callable[[*Ts], T], *args: *Ts
    ) -> T:
        """Done by the time that the model says.

        Encoders change nothing but what they return, so a processor that is free may do their work
        while the other tasks go on. All else is done at once: other tasks could see it half done.
        """
        async with self._limiters[step]:
            cost_ns = self._model.cost_ns(step, costs)
            if step is Step.ENCODE:
                work = _encoders().submit(function, *args)
                await trio.sleep(cost_ns / NS_PER_S)
                return work.result()
            result = function(*args)
            await trio.sleep(cost_ns / NS_PER_S)
        return result

    def private_dir(self, parent: Path) -> AbstractContextManager[Path]:
        """A path and nothing there."""
        return nullcontext(parent)

    def check_state_dir(self, directory: Path) -> None:
        """Memory can always be written to."""

    def state_file(self, directory: Path, side: Side, file_id: bytes) -> VirtualStateFile:
        """A record in memory."""
        record = VirtualStateFile(directory, side, file_id)
        self.state_files.append(record)
        return record

    async def connect(self, address: LinkAddress, what: str) -> MemorySocket:
        """Over the virtual network."""
        return await self._network.connect(address)

    async def listen(self, address: LinkAddress, what: str) -> VirtualListener:
        """On the virtual network."""
        await trio.lowlevel.checkpoint()
        return self._network.listen(address)


@cache
def _encoders() -> ThreadPoolExecutor:
    """Threads of this process; codecs let go of the interpreter."""
    free = (os.cpu_count() or 2) - 1
    return ThreadPoolExecutor(max(1, min(free, ENCODE_THREADS)), "virtual-encoder")


os.register_at_fork(after_in_child=_encoders.cache_clear)


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualParams:
    """How a virtual migration is done; as the options of the commands.

    Attributes:
        downtime_limit_ms: How long the guest may stand still.
        max_bandwidth_bps: Bytes per second on the link; None = as much as it takes.
        compress: Codec of page content.
        cache_bytes: RAM for the page cache, on each side.
        run_for_s: Seconds that the guest is watched at the destination.
        model: What processor work costs.
        streams: Connections of the link.
        timeouts: How long is too long.
    """

    downtime_limit_ms: int = 300
    max_bandwidth_bps: int | None = None
    compress: Compress = field(default_factory=Compress)
    cache_bytes: int = DEFAULT_CACHE_BYTES
    run_for_s: float = 1.0
    model: CostModel = field(default_factory=CostModel)
    streams: int = 1
    timeouts: Timeouts = DEFAULTS


def run_virtual(
    profile: Profile,
    link: MemoryLinkParams,
    params: VirtualParams,
    seed: int,
) -> tuple[Report, Report]:
    """Migrate a simulated guest on a virtual clock, from power-on to the end of both commands.

    Not inside of a trio run. Equal arguments give equal reports.

    Args:
        profile: The guest; its own seed counts as well.
        link: Between the hosts.
        params: How it is done.
        seed: Of the guest, of the commands' random numbers, and of the order of their tasks.

    Returns:
        The source's and the destination's report; they say what went wrong.
    """
    guest_seed = random.Random(f"guest {profile.seed} {seed}").getrandbits(32)
    guest = replace(profile, seed=guest_seed)

    def make_runs(source: Session, destination: Session) -> Runs:
        return (
            SourceRun(source_params(params, simulate=guest), source),
            DestinationRun(destination_params(params), destination),
        )

    async def migrate() -> tuple[Report, Report]:
        return await migrate_virtually(
            make_runs,
            VirtualNetwork(link),
            seed,
            model=params.model,
        )

    with _collected():
        return run_on_virtual_clock(migrate, seed)


def source_params(params: VirtualParams, **guest: Any) -> SourceParams:  # noqa: ANN401
    """As migrate-src takes them; ``guest`` says which of its ways to a guest."""
    return SourceParams(
        to=ADDRESS,
        downtime_limit_ms=params.downtime_limit_ms,
        max_bandwidth_bps=params.max_bandwidth_bps,
        compress=params.compress,
        cache_bytes=params.cache_bytes,
        streams=params.streams,
        timeouts=params.timeouts,
        state_dir=NOWHERE,
        **guest,
    )


def destination_params(params: VirtualParams) -> DestinationParams:
    """As migrate-dst takes them."""
    return DestinationParams(
        listen=ADDRESS,
        simulate=True,
        run_for_s=params.run_for_s,
        timeouts=params.timeouts,
        state_dir=NOWHERE,
        run_dir=NOWHERE,
    )


Runs = tuple[SourceRun, DestinationRun]
MakeRuns = Callable[[Session, Session], Runs]
"""Makes migrate-src and migrate-dst, given the session of each; their address is ``ADDRESS``."""


async def migrate_virtually(
    make_runs: MakeRuns,
    network: VirtualNetwork,
    seed: int,
    *,
    model: CostModel | None = None,
) -> tuple[Report, Report]:
    """Run both commands against each other, in a trio run that somebody else started.

    Reports are only repeatable under ``run_on_virtual_clock``. A migrate-dst that has heard of no
    source would wait for the next one; here there is none, so it is called off.

    Returns:
        The source's and the destination's report; they say what went wrong.
    """
    runtimes = [VirtualRuntime(role, network, seed, model=model) for role in ROLES]
    sessions = [
        Session(role, OutputParams(quiet=True), runtime, watched=False)
        for role, runtime in zip(ROLES, runtimes, strict=True)
    ]
    source, destination = make_runs(*sessions)
    reports: dict[Role, Report] = {}
    source_ended = trio.Event()

    async def run_source() -> None:
        reports["source"], _ = await source.run()
        source_ended.set()

    async def run_destination() -> None:
        reports["destination"], _ = await destination.run()

    async with trio.open_nursery() as watching:
        watching.start_soon(_call_off_if_alone, source_ended, destination)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_source)
            nursery.start_soon(run_destination)
        watching.cancel_scope.cancel()
    return reports["source"], reports["destination"]


async def _call_off_if_alone(source_ended: trio.Event, destination: DestinationRun) -> None:
    await source_ended.wait()
    await trio.sleep(PATIENCE_S)
    if destination.waits_for_source:
        destination.cancel("the end of the only source")


def run_on_virtual_clock(function: Callable[[], Awaitable[T]], seed: int) -> T:
    """Run an async function from start to end on a virtual clock, tasks in an order by the seed.

    Args:
        function: Must neither use threads nor wait for anything outside of the process.
        seed: Another one is another order of tasks that can run at the same time.
    """
    with _ordered_tasks(seed):
        return trio.run(function, clock=MockClock(autojump_threshold=0))


@contextmanager
def _collected() -> Iterator[None]:
    """Have the garbage collector look at nothing but what is made here, and at that in the end.

    Tasks and guests are one knot: gigabytes would wait for the collector's turn. And a walk over
    all that a process has imported takes it 20 ms.
    """
    freeze = gc.get_freeze_count() == 0  # somebody else's must stay frozen
    if freeze:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if freeze:
            gc.unfreeze()


@contextmanager
def _ordered_tasks(seed: int) -> Iterator[None]:
    """Have trio order its tasks by age and the seed, not by memory addresses and chance.

    There is no public way; hypothesis' plugin for trio does the same.
    """
    chance = scheduler._r
    before, state = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, chance.getstate()
    chance.seed(seed)
    _sort_tasks(sort=True)
    try:
        yield
    finally:
        _sort_tasks(sort=before)
        chance.setstate(state)


def _sort_tasks(*, sort: bool) -> None:
    # Final for whoever reads trio, not for whoever plugs in.
    setattr(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", sort)  # noqa: B010

"""A running QEMU that we drive over QMP: the guest that leaves.

QEMU is told to migrate to a unix socket of ours, with the return path on: it then keeps the guest
paused at the end until we answer SHUT, and resumes it by itself when we close the stream instead.
"""

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from migrate.errors import (
    GuestError,
    GuestOn,
    GuestStoppedError,
    MigrationError,
    QemuExitedError,
    QemuStreamBrokenError,
    QmpCommandError,
    QmpInterruptedError,
    problems_text,
)
from migrate.guests.base import Facts, GuestProgress, QemuPlace, Whereabouts
from migrate.guests.source_state import answered, bring_back, check_can_migrate, where_now
from migrate.params import UnixAddress
from migrate.qemu import preflight, queries, virtio_queries
from migrate.qemu.local_channels import LocalChannels, choose_channels, switch_on
from migrate.qemu.local_hop import IncomingHop
from migrate.qemu.machine_facts import MachineFacts
from migrate.qemu.migration_mark import MigrationMark
from migrate.qemu.multifd_hop import MultifdHop, accept_multifd
from migrate.qemu.process_mark import ProcessMark
from migrate.qemu.qmp_client import EventListener, QmpClient, open_qmp
from migrate.qemu.queries import Parameter
from migrate.qemu.return_path_thread import ReturnPathThread
from migrate.qemu.settings import ChangedSettings, changed_settings
from migrate.rings import RingLayout
from migrate.timeouts import DEFAULTS
from migrate.transport.channels import listen
from proto.guest_events import GuestEvent
from proto.qemu.return_path import shut
from proto.qemu.virtio import virtio_devices

logger = logging.getLogger(__name__)

UNLIMITED_BYTES_PER_S = 2**63 - 1 - 2**20
"""QEMU's own rate limit is lifted: the link, through our window, is the only brake."""

CONNECT_S = 10.0
"""QEMU connects to our socket within milliseconds, or not at all."""

CANCEL_S = 5.0
"""A QEMU whose stream is read is cancelled within moments; then its connections are cut."""

END_S = DEFAULTS.qemu_s
"""QEMU needs moments from SHUT to ``completed``, and from a closed stream to a running guest."""

STOP_ANSWER_S = 1.0
"""QEMU answers at once after a user's stop, and late or never during its own."""

SHUTDOWN_GRACE_S = 1.0
"""A guest that powers off breaks the stream and sends SHUTDOWN at the same time."""

CAPABILITIES_ON = ("return-path", "events")
CAPABILITIES_OFF = (
    "xbzrle",
    "compress",
    "multifd",
    "postcopy-ram",
    "x-colo",
    "background-snapshot",
    "release-ram",
    "zero-copy-send",
    "pause-before-switchover",
    "switchover-ack",
    "mapped-ram",
    "rdma-pin-all",
    "block",
)
"""Off for our migration, the user's choice comes back after it: the engine does their work, or they
change who decides about the switchover."""

CHANGED = frozenset(
    (
        *(*CAPABILITIES_ON, *CAPABILITIES_OFF),
        *(Parameter.MAX_BANDWIDTH_BYTES_PER_S, Parameter.DOWNTIME_LIMIT_MS),
        *(Parameter.MULTIFD_CHANNELS, Parameter.MULTIFD_COMPRESSION),
        Parameter.ZERO_PAGE_DETECTION,
    )
)
"""All that we may change, for the record: recovery gives it back."""


class QemuSource:
    """See ``migrate.guests.base.SourceGuest``.

    Attributes:
        settings: Ours, until the user's come back.
        is_ours: The migration that QEMU is in, or was in last, is ours: then it is for us to cancel
            it and to resume the guest. Not before our ``migrate``, and not between two of them.
    """

    form = "qmp"
    can_start_again = True
    return_path = True
    virtio_devices = staticmethod(virtio_devices)

    def __init__(
        self,
        client: QmpClient,
        run_dir: Path,
        name: str,
        *,
        channels_wish: int | None = None,
        max_bandwidth_bps: int | None = None,
        warn: Callable[[str], None] = logger.warning,
        step_s: float = END_S,
    ) -> None:
        self._client = client
        self._step_s = step_s
        self._socket_path = run_dir / "from-qemu.sock"
        self._hop: IncomingHop | None = None
        self.settings: ChangedSettings | None = None
        self._facts: MachineFacts | None = None
        self._channels_wish = channels_wish
        self._max_bandwidth_bps = max_bandwidth_bps
        self._switchover_seen = trio.Event()
        self._powered_off = False
        self.paused_by_user = False
        self._let_go = self._has_started = False
        self._mark: MigrationMark | None = None
        self._return_path_thread: ReturnPathThread | None = None
        self.is_ours = True
        self._warn = warn
        self._channels = LocalChannels(0)
        self.name = name
        self.place = QemuPlace(client.path.absolute(), ProcessMark.of(client.peer_pid))
        self.was_running: bool | None = None
        self.stopped_at_ns: int | None = None

    async def facts(self) -> Facts:
        """Ask the monitor; see ``migrate.qemu.preflight``."""
        self._facts = facts = await preflight.collect_facts(self._client)
        version = str(queries.version_of(self._client))
        return Facts(facts.to_dict(), qemu_version=version, vm_id=facts.uuid)

    async def ring_layout(self) -> RingLayout | None:
        """Ask the monitor; ``None`` for a QEMU that cannot say."""
        devices = await virtio_queries.query_virtio(self._client)
        if devices is None:
            return None
        blocks = tuple(b.idstr for b in await queries.query_ram_blocks(self._client))
        physical = await virtio_queries.query_physical_map(self._client, blocks)
        return RingLayout.of(physical, (q for device in devices for q in device.virtqueues))

    async def read_physical(self, address: int, length: int) -> bytes | None:
        """Ask the monitor."""
        return await virtio_queries.read_physical(self._client, address, length)

    async def start(self) -> None:
        """Listen, tell QEMU to migrate to us, and take its connection.

        Raises:
            GuestStoppedError: The guest has powered off.
            GuestError: QEMU refused, did not connect, or is not in a state to migrate.
        """
        await self._check_ready()
        if self.settings is not None:
            await self.settings.apply()
        if not self._has_started:
            await self._choose_channels()
        self._has_started = True
        listener = await listen(UnixAddress(self._socket_path), "the source QEMU")
        # The guest may have been stopped before, and not by our migration.
        self._switchover_seen, self.stopped_at_ns = trio.Event(), None
        version = queries.version_of(self._client).number
        self._return_path_thread = ReturnPathThread(self._client.peer_pid, version)
        try:
            # Not to be cancelled in between: 7.2 hangs if it finds nobody for one of its channels.
            with trio.move_on_after(CONNECT_S, shield=True):
                await self._begin_migration()
                if self._channels.count:
                    self._hop = await accept_multifd(listener, self._channels.count)
                else:
                    sock, _ = await listener.accept()
                    self._hop = IncomingHop(sock)
                    await trio.lowlevel.wait_readable(sock)
                self._return_path_thread.has_begun()
                return
            status = await queries.query_migrate(self._client)
            why = status.error_desc or status.status
            raise GuestError(f"{self.name} did not start its migration: {why}")
        finally:
            listener.close()
            self._socket_path.unlink(missing_ok=True)

    async def _check_ready(self) -> None:
        """Raise unless QEMU can be told to migrate what the destination was compared with."""
        if self._powered_off:
            raise GuestStoppedError("the guest powered off at the source: nothing to migrate")
        await check_can_migrate(self._client, self.name)
        if not self._has_started or self._facts is None:
            return
        now = await preflight.collect_facts(self._client)
        if changes := preflight.compare_with_before(self._facts, now):
            raise GuestError(
                f"the machine changed while the guest ran on: {problems_text(changes)}"
            )

    async def _begin_migration(self) -> None:
        self.is_ours = True
        try:
            await queries.migrate(self._client, f"unix:{self._socket_path}")
        except QmpCommandError:
            self.is_ours = False  # what is under way, if anything, is another's
            raise

    @property
    def local_channels(self) -> int:
        """As the base says."""
        return self._channels.count

    async def _choose_channels(self) -> None:
        """Switch multifd on if it is to be used; it cannot be changed later."""
        settings, facts, wish = self.settings, self._facts, self._channels_wish
        if settings is None or facts is None:
            return
        known = await queries.query_capabilities(self._client)
        types = [device.qom_type for device in facts.devices]
        version = queries.version_of(self._client).number
        channels = choose_channels(wish, self._max_bandwidth_bps, version, known, types)
        channels = await switch_on(self._client, settings, channels)
        self._channels = channels
        if channels.refusal and wish is not None:
            self._warn(f"--local-channels {wish}: the main connection only, {channels.refusal}")

    async def next_events(self, burst_bytes: int) -> list[GuestEvent]:
        """As the base says; a guest that powers off is told apart from a broken stream."""
        assert self._hop is not None
        try:
            return await self._hop.next_events(burst_bytes)
        except QemuStreamBrokenError as error:
            raise await self._why_broken(error) from error

    async def _why_broken(self, error: QemuStreamBrokenError) -> MigrationError:
        with trio.move_on_after(SHUTDOWN_GRACE_S):
            # Whichever of the two comes first; the monitor closes without an event.
            while not self._powered_off and not self._client.is_closed:  # noqa: ASYNC110
                await trio.sleep(0.02)
        if self._powered_off:
            return GuestStoppedError("the guest powered off in the middle of the migration")
        if self._client.is_closed:
            return QemuExitedError(
                f"{self.name} exited in the middle of the migration",
                guest_on=GuestOn.NEITHER,
            )
        with contextlib.suppress(MigrationError):
            status = await queries.query_migrate(self._client)
            if status.error_desc:
                return QemuStreamBrokenError(f"{error} (QEMU says: {status.error_desc})")
        return error

    async def answer(self, message: bytes) -> None:
        """Send a return path message to QEMU."""
        assert self._hop is not None
        await self._hop.answer(message)

    async def progress(self) -> GuestProgress:
        """Ask ``query-migrate``; empty once the guest is stopped."""
        if self.stopped_at_ns is not None or self._client.is_closed:
            return GuestProgress()
        status = await queries.query_migrate(self._client)
        ram = status.ram
        return GuestProgress(
            remaining_bytes=ram.remaining_bytes if ram else None,
            dirty_pages_per_s=ram.dirty_pages_rate if ram else None,
            dirty_sync_count=ram.dirty_sync_count if ram else None,
            throttle_percent=status.throttle_percent,
        )

    async def take_mark(self) -> MigrationMark | None:
        """As the base says.

        Raises:
            GuestError: QEMU does not answer.
        """
        with trio.move_on_after(self._step_s):
            with contextlib.suppress(QmpInterruptedError):  # one that is dead never goes on
                status = await queries.query_migrate_settled(self._client)
                self._mark = MigrationMark.of(status)
            return self._mark
        raise GuestError(f"{self.name} does not answer", guest_on=GuestOn.SOURCE)

    async def let_go(self) -> None:
        """Answer SHUT 0 and see that QEMU completed: it cannot resume on its own any more.

        A QEMU whose process ended after SHUT has let go as well.

        Raises:
            GuestError: It did not complete; the guest is paused at the source.
        """
        assert self._hop is not None
        with self._client.listen("MIGRATION") as events:
            self._let_go = True
            try:
                await self._hop.answer(shut(0))
                with trio.move_on_after(self._step_s):
                    await self._wait_status(events, {"completed"})
                    return
            except (QmpInterruptedError, QemuStreamBrokenError):
                await trio.lowlevel.checkpoint()
                if await self._process_gone():
                    return
        raise GuestError(f"{self.name} did not complete the migration", guest_on=GuestOn.SOURCE)

    async def _process_gone(self) -> bool:
        """Whether the process ends; its monitor alone proves nothing."""
        with trio.move_on_after(self._step_s):
            await self._client.wait_peer_dead()
            return True
        return False

    async def _wait_status(self, events: EventListener, wanted: set[str]) -> str:
        while True:
            status = (await queries.query_migrate(self._client)).status
            if status in wanted:
                return status
            with trio.move_on_after(0.5):
                await events.next()

    async def go_on(self) -> Whereabouts:
        """Close the stream, cancel, and see that the guest is as it was before.

        A migration that is not ours is left alone, and so is its guest.
        """
        if isinstance(self._hop, MultifdHop):
            with trio.move_on_after(CANCEL_S):
                await self._cancel_reading(self._hop)
        hop, self._hop = self._hop, None  # cancelled below, this may be called again
        if hop is not None:
            hop.close()
        if self._powered_off:
            text = "the guest powered off at the source"
            return Whereabouts(GuestOn.SOURCE, text, "shutdown")
        if self._client.is_closed:
            return Whereabouts(GuestOn.NEITHER, f"{self.name} is gone")
        where = await answered(self._client, self.name, self._step_s, self._call_off)
        if self._return_path_thread is not None:
            await self._return_path_thread.wait_gone()
        return where

    async def _call_off(self, events: EventListener) -> Whereabouts:
        if not self.is_ours:
            return await where_now(self._client, self.name)
        await self._cancel(events)
        was_running = bool(self.was_running) and not self.paused_by_user
        mark = self._mark

        def is_ours(status: queries.MigrationStatus) -> bool:
            return self._let_go and (mark is None or mark.fits(status))

        return await bring_back(
            self._client, self.name, events, was_running=was_running, is_ours=is_ours
        )

    async def turn_back(self) -> Whereabouts:
        """As ``go_on``: what QEMU was told for its migration stays as it is for the next."""
        where = await self.go_on()
        if where.run_state == "running":
            self.stopped_at_ns = None
            self.is_ours = False
        return where

    async def _cancel_reading(self, hop: MultifdHop) -> None:
        """Cancel while QEMU can still write on all channels: see ``MultifdHop.discard``."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hop.discard)
            with (
                contextlib.suppress(MigrationError),
                self._client.listen("MIGRATION") as events,
            ):
                await self._cancel(events)
            nursery.cancel_scope.cancel()

    async def _cancel(self, events: EventListener) -> None:
        status = await queries.query_migrate(self._client)
        if not status.has_ended:
            with contextlib.suppress(QmpCommandError):
                await queries.migrate_cancel(self._client)
            await self._wait_status(events, set(queries.ENDED_STATUSES))

    async def finish(self, *, quit_guest: bool) -> None:
        """Quit the source QEMU if asked to."""
        if quit_guest and not self._client.is_closed:
            await queries.quit_qemu(self._client)

    async def wait_switchover(self) -> None:
        """As the base says: QEMU's STOP event comes before the stream shows anything."""
        await self._switchover_seen.wait()

    async def watch(self, events: EventListener) -> None:
        """Follow the guest's stops and its end; runs as a task as long as the monitor is open."""
        with contextlib.suppress(QmpInterruptedError):
            while True:
                event = await events.next()
                if event.name == "SHUTDOWN":
                    self._powered_off = True
                    if self._hop is not None and not self._let_go:
                        self._hop.abort()
                elif event.name == "RESUME":
                    self.stopped_at_ns = None
                    self.paused_by_user = False
                elif event.name == "STOP":
                    if self.is_ours:
                        self.stopped_at_ns = _monotonic_ns(event.timestamp_us)
                    await self._who_stopped()
                    if self.stopped_at_ns is not None:
                        self._switchover_seen.set()

    async def _who_stopped(self) -> None:
        """Tell a user's stop from QEMU's own, which may hold QEMU's main lock for a while."""
        with trio.move_on_after(STOP_ANSWER_S), contextlib.suppress(QmpInterruptedError):
            state = await queries.query_run_state(self._client)
            if state.status == "paused":
                self.paused_by_user = True
            if state.running or self.paused_by_user:
                self.stopped_at_ns = None


def _monotonic_ns(timestamp_us: int | None) -> int:
    """Translate QEMU's wall-clock stamp of an event to our monotonic clock (same host)."""
    if timestamp_us is None:
        return time.monotonic_ns()
    return time.monotonic_ns() - max(0, time.time_ns() - timestamp_us * 1000)


@asynccontextmanager
async def open_qemu_source(
    qmp: Path,
    run_dir: Path,
    *,
    downtime_limit_ms: int,
    channels_wish: int | None = None,
    max_bandwidth_bps: int | None = None,
    warn: Callable[[str], None] = logger.warning,
    step_s: float = END_S,
) -> AsyncIterator[QemuSource]:
    """Attach to a running QEMU; its own settings are restored on every way out.

    They are not changed before ``start``: by then the record can say what they were.

    Args:
        qmp: Its QMP socket.
        run_dir: Private directory for the stream's socket.
        downtime_limit_ms: What QEMU is told; at least 1 (0 makes 7.2 switch without a last sync).
        channels_wish: Multifd channels that its pages shall come over, None = as it is best.
        max_bandwidth_bps: What the user allows the link, None = as much as it takes.
        warn: Told why that wish cannot be granted.
        step_s: How long it may take to end its migration, or to let the guest go on.

    Raises:
        QmpConnectError: The monitor cannot be used.
        GuestError: The QEMU is not in a state to migrate.
    """
    async with open_qmp(qmp) as client:
        name = f"the source QEMU ({qmp})"
        source = QemuSource(
            client,
            run_dir,
            name,
            channels_wish=channels_wish,
            max_bandwidth_bps=max_bandwidth_bps,
            warn=warn,
            step_s=step_s,
        )
        source.was_running = (await check_can_migrate(client, name)).running
        source.is_ours = False
        known = await queries.query_capabilities(client)
        wanted = dict.fromkeys(CAPABILITIES_ON, True)
        wanted |= {name: False for name in CAPABILITIES_OFF if known.get(name)}
        parameters = {
            Parameter.MAX_BANDWIDTH_BYTES_PER_S: UNLIMITED_BYTES_PER_S,
            Parameter.DOWNTIME_LIMIT_MS: max(1, downtime_limit_ms),
        }
        async with changed_settings(
            client, wanted, parameters, at_once=False
        ) as source.settings:
            users = source.settings.user_settings(CHANGED)
            source.place = replace(source.place, settings=users)
            with client.listen("STOP", "RESUME", "SHUTDOWN") as events:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(source.watch, events)
                    yield source
                    nursery.cancel_scope.cancel()

"""A destination QEMU whose monitor is ours: started by us, or attached over QMP.

It is loaded without running (``-S``, or ``stop`` while it waits), so it runs when we say ``cont``
and not before.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import trio
from numpy.typing import NDArray

from migrate.errors import (
    GuestError,
    GuestOn,
    MigrationError,
    QemuExitedError,
    QemuStreamBrokenError,
    QmpCommandError,
    QmpInterruptedError,
)
from migrate.guests.base import EXIT_GRACE_S, Facts, QemuPlace
from migrate.pages.landed import LandedBlock
from migrate.params import UnixAddress
from migrate.qemu import preflight, queries, virtio_queries
from migrate.qemu.incoming_channels import choose_incoming, writer_for
from migrate.qemu.landing import Landing, find_landing
from migrate.qemu.loader import QemuLoader
from migrate.qemu.local_channels import LocalChannels, switch_on
from migrate.qemu.machine_facts import MachineFacts
from migrate.qemu.multifd_out import connect_multifd
from migrate.qemu.process import OwnedQemu
from migrate.qemu.process_mark import ProcessMark
from migrate.qemu.qmp_client import EventListener, QmpClient, open_qmp
from migrate.qemu.queries import Parameter
from migrate.qemu.settings import ChangedSettings, changed_settings
from migrate.timeouts import DEFAULTS
from proto.guest_events import PAGE_SIZE, GuestEvent, RamBlocks
from proto.qemu.physical import PhysicalMap
from proto.qemu.ram import page_buffer
from proto.qemu.virtio import virtio_devices

logger = logging.getLogger(__name__)

START_S = 30.0
"""A QEMU that we start opens its monitor within a second; with preallocated RAM it takes longer."""

STEP_S = DEFAULTS.qemu_s
"""From the end mark to ``completed`` (devices are loaded by then, disks may have to be opened), and
from ``cont`` to the RESUME event (activating disks is the slow part)."""

DISCARD_S = 10.0

CAPABILITIES_ON = ("late-block-activate", "events")
CAPABILITIES_OFF = ("multifd", "postcopy-ram", "x-colo", "mapped-ram", "switchover-ack")
PARAMETERS = (Parameter.MULTIFD_CHANNELS, Parameter.MULTIFD_COMPRESSION)
"""What may change; recovery gives it back, too."""

NOT_ANONYMOUS = (
    "readconfig",
    "mem-path",
    "memory-backend-file",
    "memory-backend-memfd",
    "memory-backend-epc",
)
"""With any of these on QEMU's command line its RAM may not be fresh zero memory."""


class QemuDestination:
    """See ``migrate.guests.base.DestinationGuest``."""

    commanded = True
    virtio_devices = staticmethod(virtio_devices)

    def __init__(
        self,
        client: QmpClient,
        run_dir: Path,
        owned: OwnedQemu | None,
        *,
        step_s: float = STEP_S,
    ) -> None:
        self._client = client
        self._step_s = step_s
        self._owned = owned
        self.settings: ChangedSettings | None = None
        self._socket_path = run_dir / "to-qemu.sock"
        self._loader: QemuLoader | None = None
        self._nursery: trio.Nursery | None = None
        self._marks = 0
        self._end_delivered = False
        self.may_have_run = False
        self._ended_by_us = False
        self._argv: Sequence[str] = ()
        self._may_land = False
        self._landing = Landing({}, "--landing never")
        self._machine: MachineFacts | None = None
        self._channels_wish: int | None = 0
        self._channels = LocalChannels(0)
        self._warn: Callable[[str], None] = logger.warning
        self.form = "owned" if owned else "qmp"
        self.name = f"the destination QEMU ({client.path})"
        self.place = QemuPlace(client.path.absolute(), ProcessMark.of(client.peer_pid))

    async def facts(self) -> Facts:
        """Ask the monitor; see ``migrate.qemu.preflight``."""
        facts = await preflight.collect_facts(self._client)
        self._machine = facts
        version = str(queries.version_of(self._client))
        return Facts(facts.to_dict(), qemu_version=version, vm_id=facts.uuid)

    async def physical_map(self, blocks: RamBlocks) -> PhysicalMap | None:
        """Ask the monitor."""
        names = tuple(block.idstr for block in blocks.blocks)
        return await virtio_queries.query_physical_map(self._client, names)

    async def read_physical(self, address: int, length: int) -> bytes | None:
        """Ask the monitor."""
        return await virtio_queries.read_physical(self._client, address, length)

    def take_argv(self, argv: Sequence[str]) -> None:
        """Remember the command line we started it with."""
        self._argv = argv

    def allow_landing(self) -> None:
        """Write pages straight into the QEMU's RAM where that is possible."""
        self._may_land = True

    def wish_channels(self, wish: int | None, warn: Callable[[str], None]) -> None:
        """Say over how many channels pages that do not land shall go, None = as it is best."""
        self._channels_wish, self._warn = wish, warn

    @property
    def local_channels(self) -> int | None:
        """As the base says."""
        return self._channels.count

    def run_in(self, nursery: trio.Nursery) -> None:
        """Give it a place for its background tasks."""
        self._nursery = nursery

    async def watch(self) -> None:
        """Wait until the QEMU ends.

        Raises:
            QemuExitedError: It did, and not by ``discard``.
        """
        if self._owned is not None:
            await self._owned.wait_exited()
        else:
            await self._client.wait_closed()
        if not self._ended_by_us:
            raise self._exited()

    async def receive(self) -> None:
        """Make sure it will not start by itself, let it listen, and connect.

        Raises:
            GuestError: It is not waiting for a migration.
        """
        state = await queries.query_run_state(self._client)
        if state.status != queries.RUN_STATE_INCOMING:
            raise GuestError(
                f"{self.name} does not wait for a migration: its run state is "
                f"'{state.status}'; start it with -incoming defer"
            )
        if self.settings is not None:
            await self.settings.apply()  # by now the record says what the user's were
        await queries.stop(self._client)  # clears autostart: it stays paused after the load
        await self._choose_channels()
        try:
            await queries.migrate_incoming(self._client, f"unix:{self._socket_path}")
        except QmpCommandError as error:
            raise GuestError(
                f"{self.name} cannot receive: {error.desc}; start it with -incoming defer"
            ) from error
        try:
            address = UnixAddress(self._socket_path)
            hop = await connect_multifd(address, self.name, self._channels.count)
        finally:
            self._socket_path.unlink(missing_ok=True)
        assert self._machine is not None, "facts() comes first"
        self._loader = QemuLoader(hop, writer_for(self._machine, self._channels))
        assert self._nursery is not None
        self._nursery.start_soon(self._loader.read_return_path)
        self._nursery.start_soon(hop.watch_channels)
        await self.load([])  # what tells the connections apart

    async def _choose_channels(self) -> None:
        """Switch multifd on if it is to be used; it cannot be changed later."""
        settings, machine, wish = self.settings, self._machine, self._channels_wish
        if settings is None or machine is None:
            return
        known = await queries.query_capabilities(self._client)
        channels = choose_incoming(wish, machine, known, lands=bool(self._landing.blocks))
        self._channels = channels = await switch_on(self._client, settings, channels)
        if channels.refusal and wish is not None:
            self._warn(f"--local-channels {wish}: the main connection only, {channels.refusal}")

    async def prepare_landing(self) -> tuple[str, ...]:
        """Find the QEMU's main memory in its process."""
        if self._may_land:
            fresh = self._has_fresh_memory()
            self._landing = await find_landing(self._client, self._client.peer_pid, fresh=fresh)
        if self._landing.missing:
            logger.info("pages go through QEMU's stream: %s", self._landing.missing)
        return tuple(self._landing.blocks)

    def landed_blocks(self, blocks: RamBlocks) -> Mapping[int, LandedBlock]:
        """See the base."""
        ours = self._landing.blocks
        landed: dict[int, LandedBlock] = {}
        for i, block in enumerate(blocks.blocks):
            ram = ours.get(block.idstr)
            if ram is not None and ram.page_count != block.page_count:
                raise GuestError(
                    f"RAM block {block.idstr} has {ram.page_count} pages at the destination, "
                    f"{block.page_count} at the source"
                )
            if ram is not None:
                landed[i] = ram
        return landed

    def allocate(self, count: int) -> NDArray[np.uint8]:
        """Memory with room for the stream's record headers, which packets do not need."""
        if self._channels.count:
            return np.empty((count, PAGE_SIZE), np.uint8)
        return page_buffer(count)

    def fresh_blocks(self, blocks: RamBlocks) -> frozenset[int]:
        """``pc.ram`` of a QEMU that we started with anonymous memory."""
        if not self._has_fresh_memory():
            return frozenset()
        return frozenset(i for i, b in enumerate(blocks.blocks) if b.idstr == "pc.ram")

    def _has_fresh_memory(self) -> bool:
        return self._owned is not None and not any(
            word in argument for argument in self._argv for word in NOT_ANONYMOUS
        )

    @property
    def _open_loader(self) -> QemuLoader:
        assert self._loader is not None, "receive() comes first"
        return self._loader

    async def load(self, events: Iterable[GuestEvent]) -> None:
        """Write events to the QEMU; a failure is explained with what QEMU says."""
        async with self._explained():
            await self._open_loader.load(events)

    async def mark(self, number: int) -> None:
        """See the base."""
        self._marks = number
        await self._open_loader.mark(number)

    async def wait_consumed(self, number: int) -> int:
        """See the base."""
        async with self._explained():
            return await self._open_loader.wait_consumed(number)

    async def relayed(self) -> bytes:
        """See the base."""
        return await self._open_loader.relayed()

    async def load_devices(self, state: bytes) -> None:
        """See the base."""
        async with self._explained():
            await self._open_loader.load_devices(state, self._marks + 1)

    async def load_end(self) -> None:
        """Deliver the end; returns when QEMU completed the load and is paused.

        Raises:
            QemuStreamBrokenError: The load failed.
        """
        self._end_delivered = True
        async with self._explained():
            with self._client.listen("MIGRATION") as events:
                with trio.move_on_after(self._step_s):
                    await self._open_loader.load_end()
                    await self._wait_loaded(events)
                    return
        raise GuestError(f"{self.name} did not complete the load within {self._step_s:.0f} s")

    async def _wait_loaded(self, events: EventListener) -> None:
        while True:
            status = await queries.query_migrate(self._client)
            state = await queries.query_run_state(self._client)
            if status.status == "completed" and state.status != queries.RUN_STATE_INCOMING:
                if state.running:
                    self.may_have_run = True
                    raise GuestError(f"{self.name} runs already", guest_on=GuestOn.UNKNOWN)
                return
            if status.status == "failed":
                raise QemuStreamBrokenError(f"{self.name}: {status.error_desc}")
            with trio.move_on_after(0.02):
                await events.next()

    async def run(self, run_state: str) -> str:
        """``cont`` where the guest ran at the source; otherwise leave it paused.

        Once it ran, this is its place whatever happens to it next: its state is told, not judged.

        Raises:
            QmpCommandError: ``cont`` was refused (its disks, most likely): it never ran.
            GuestError: No answer: it may run or not (``guest_on`` is ``unknown``).
        """
        with trio.move_on_after(self._step_s):
            if run_state == "running":
                await self._cont()
            return (await queries.query_run_state(self._client)).status
        raise GuestError(
            f"{self.name} did not say within {self._step_s:.0f} s that the guest runs",
            guest_on=GuestOn.UNKNOWN,
        )

    async def _cont(self) -> None:
        with self._client.listen("RESUME") as events:
            self.may_have_run = True
            try:
                await queries.cont(self._client)
            except QmpCommandError:
                self.may_have_run = False
                raise
            await events.next()

    async def discard(self) -> str:
        """Kill the QEMU we started; make an attached one unable to run this guest.

        Raises:
            GuestError: The guest may have run here already, or this copy's QEMU may still live:
                nobody may resume another copy.
        """
        if self.may_have_run:
            raise GuestError(
                f"{self.name} may have run the guest: ask 'info status' there",
                guest_on=GuestOn.UNKNOWN,
            )
        self._ended_by_us = True
        if self._loader is not None:
            self._loader.close()
        if self._owned is not None:
            await self._owned.kill()
            return "the destination QEMU that was started is ended"
        if not self._end_delivered:
            return f"{self.name} got no complete guest; start it anew for another try"
        with trio.move_on_after(min(DISCARD_S, self._step_s)):
            with contextlib.suppress(MigrationError):
                await queries.quit_qemu(self._client)
            await self._client.wait_peer_dead()
            return f"{self.name} held a complete copy and was made to quit"
        raise GuestError(
            f"{self.name} holds a complete, paused copy: end it, never 'cont' it",
            guest_on=GuestOn.UNKNOWN,
        )

    async def keep(self) -> None:
        """Leave the QEMU to itself; its monitor stays where it is."""
        if self._loader is not None:
            self._loader.close()
        if self._owned is not None:
            with contextlib.suppress(QemuExitedError):  # it ran, and has ended since
                await self._owned.release()

    @asynccontextmanager
    async def _explained(self) -> AsyncIterator[None]:
        """Say of a broken stream that the QEMU ended, if it did: with why, as far as it said."""
        broken: GuestError | None = None
        try:
            yield
        except (QmpInterruptedError, QemuStreamBrokenError) as error:
            broken = error
        if broken is not None:
            with trio.move_on_after(EXIT_GRACE_S):
                await self.watch()
            raise broken

    def _exited(self) -> QemuExitedError:
        if self._owned is None:
            return QemuExitedError(f"{self.name} ended; its own log may say why")
        # QEMU says why in its last lines, and an error is one line.
        return QemuExitedError(
            f"the destination {self._owned.exited_error()}".replace("\n", " / ")
        )


@asynccontextmanager
async def open_qemu_destination(
    qmp: Path,
    run_dir: Path,
    *,
    owned: OwnedQemu | None = None,
    argv: Sequence[str] = (),
    landing: bool = True,
    channels_wish: int | None = 0,
    warn: Callable[[str], None] = logger.warning,
    step_s: float = STEP_S,
) -> AsyncIterator[QemuDestination]:
    """Attach to a QEMU that waits with ``-incoming defer``; its settings are restored at exit.

    Args:
        qmp: Its QMP socket.
        run_dir: Private directory for the stream's socket.
        owned: The process, if we started it.
        argv: Its command line then.
        landing: Write pages straight into its RAM where that is possible.
        channels_wish: Multifd channels that pages which do not land shall go over, None = as it is
            best.
        warn: Told why a wish is not granted.
        step_s: How long it may take to complete the load, and to let the guest run.

    Raises:
        QmpConnectError: The monitor cannot be used.
    """
    async with open_qmp(qmp) as client:
        known = await queries.query_capabilities(client)
        wanted = {name: True for name in CAPABILITIES_ON if name in known}
        wanted |= {name: False for name in CAPABILITIES_OFF if known.get(name)}
        async with (
            changed_settings(client, wanted, {}, at_once=False) as settings,
            trio.open_nursery() as nursery,
        ):
            guest = QemuDestination(client, run_dir, owned, step_s=step_s)
            users = settings.user_settings((*CAPABILITIES_ON, *CAPABILITIES_OFF, *PARAMETERS))
            guest.place = replace(guest.place, settings=users)
            guest.settings = settings
            guest.take_argv(argv)
            if landing:
                guest.allow_landing()
            guest.wish_channels(channels_wish, warn)
            guest.run_in(nursery)
            yield guest
            nursery.cancel_scope.cancel()

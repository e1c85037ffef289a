"""The destination's guest, in whichever way it is reached, opened for one run of migrate-dst."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from migrate.errors import GuestError
from migrate.guests.base import DestinationGuest
from migrate.guests.incoming_destination import open_incoming_destination
from migrate.guests.qemu_destination import START_S, open_qemu_destination
from migrate.guests.simulated_destination import (
    SimulatedDestination,
    open_simulated_destination,
)
from migrate.guests.simulated_facts import COUNTS_EVENT, settled_counts
from migrate.params import DestinationParams
from migrate.qemu.process import OwnedQemu
from migrate.session import Session
from migrate.simulation.guest import SimulatedGuest
from migrate.state_file import StateFile

DISCARD_S = 30.0


class GuestOpener:
    """Opens the guest that migrate-dst was told of.

    Attributes:
        qemu: The QEMU that was started, if one was.
        simulated: The guest, if it is a simulated one.
        state_file: Where the handover will be recorded, if that had to be settled already.
    """

    def __init__(
        self, params: DestinationParams, session: Session, committed: Callable[[], bool]
    ) -> None:
        """Open nothing yet.

        Args:
            params: Which guest.
            session: Of the run.
            committed: Whether the guest is ours by now: then its QEMU outlives us.
        """
        self._params = params
        self._session = session
        self._committed = committed
        self.qemu: OwnedQemu | None = None
        self.simulated: SimulatedDestination | None = None
        self.state_file: StateFile | None = None

    @asynccontextmanager
    async def open(self, run_dir: Path) -> AsyncIterator[DestinationGuest]:
        """Open it for the duration of the block.

        Args:
            run_dir: Private directory for its sockets.

        Raises:
            GuestError: It cannot be reached, or does not start.
        """
        params = self._params
        if params.incoming is not None:
            async with open_incoming_destination(
                params.incoming, end_s=2 * params.timeouts.qemu_s
            ) as waiting:
                yield waiting
        elif params.simulate:
            async with open_simulated_destination(
                self._session.runtime, run_for_s=params.run_for_s
            ) as simulated:
                self.simulated = simulated
                try:
                    yield simulated
                finally:
                    simulated.tell(self._session.builder.report)
                self._trace_counts(simulated.guest)
        elif params.qmp is not None:
            async with open_qemu_destination(
                params.qmp,
                run_dir,
                landing=params.landing == "auto",
                channels_wish=params.local_channels,
                warn=self._session.warn,
                step_s=params.timeouts.qemu_s,
            ) as attached:
                yield attached
        else:
            async with self._open_owned(run_dir) as owned:
                yield owned

    def _trace_counts(self, guest: SimulatedGuest | None) -> None:
        """Write down what a simulated guest that lived here counted; its life is over."""
        if guest is not None and self._session.traced:
            for values in settled_counts(guest):
                self._session.trace(COUNTS_EVENT, **values)

    @asynccontextmanager
    async def _open_owned(self, run_dir: Path) -> AsyncIterator[DestinationGuest]:
        """Start QEMU; unless the guest becomes ours it is dead when this ends."""
        argv = self._params.qemu_argv
        assert argv is not None
        runtime = self._session.runtime
        # Its supervisor must know the state file before the source names the migration.
        self.state_file = runtime.state_file(
            self._params.state_dir, "destination", runtime.random_bytes(16)
        )
        self._session.enter("starting QEMU")
        qemu_dir = run_dir / "qemu"
        try:
            qemu = self.qemu = await OwnedQemu.start(argv, qemu_dir, self.state_file.path)
        except BaseException:
            _remove_run_files(qemu_dir)
            raise
        try:
            with trio.move_on_after(START_S) as starting:
                await qemu.wait_qmp_ready()
            if starting.cancelled_caught:
                raise GuestError(f"QEMU opened no monitor within {START_S:.0f} s")
            async with open_qemu_destination(
                qemu.qmp_path,
                run_dir,
                owned=qemu,
                argv=argv,
                landing=self._params.landing == "auto",
                channels_wish=self._params.local_channels,
                warn=self._session.warn,
                step_s=self._params.timeouts.qemu_s,
            ) as guest:
                yield guest
        finally:
            if not self._committed():
                with trio.CancelScope(shield=True), trio.move_on_after(DISCARD_S):
                    await qemu.kill()
                _remove_run_files(qemu_dir)


def _remove_run_files(directory: Path) -> None:
    """Remove what a QEMU of ours that is dead left; its log was quoted where it mattered."""
    for name in ("qmp.sock", "qemu.log"):
        (directory / name).unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()

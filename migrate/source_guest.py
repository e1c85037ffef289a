"""migrate-src: the guest that leaves, by the way in that was asked for."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from migrate.ballooning import Ballooning, ballooned
from migrate.guests.base import SourceGuest
from migrate.guests.gateway_source import open_gateway
from migrate.guests.qemu_source import open_qemu_source
from migrate.guests.simulated_source import SIMULATED_RESERVE_MS, open_simulated_source
from migrate.params import SourceParams
from migrate.sending import HANDOVER_RESERVE_MS
from migrate.session import Session


class SourceOpener:
    """Opens the guest of one run.

    Attributes:
        ballooning: What the guest gives back for its migration; None if nobody asks.
    """

    def __init__(
        self, params: SourceParams, session: Session, may_run_there: Callable[[], bool]
    ) -> None:
        """Open nothing yet.

        Args:
            params: Of the run.
            session: Of the run.
            may_run_there: Whether the guest may be the destination's by now.
        """
        self.ballooning: Ballooning | None = None
        self._params = params
        self._session = session
        self._may_run_there = may_run_there

    @asynccontextmanager
    async def open(self, run_dir: Path) -> AsyncIterator[SourceGuest]:
        """Open it; ``run_dir`` is for sockets."""
        params = self._params
        if params.qmp is not None:
            async with self._qemu(params.qmp, run_dir) as source:
                yield source
        elif params.simulate is not None:
            told_ms = params.downtime_limit_ms - SIMULATED_RESERVE_MS
            async with open_simulated_source(
                params.simulate, self._session.runtime, downtime_limit_ms=told_ms
            ) as simulated:
                try:
                    yield simulated
                finally:
                    simulated.tell(self._session.builder.report)
        else:
            assert params.gateway is not None
            async with open_gateway(
                params.gateway,
                mode=params.gateway_mode,
                owner=params.gateway_owner,
                warn=self._session.warn,
                step_s=params.timeouts.qemu_s,
            ) as gateway:
                yield gateway

    @asynccontextmanager
    async def _qemu(self, qmp: Path, run_dir: Path) -> AsyncIterator[SourceGuest]:
        params, session = self._params, self._session
        told_ms = params.downtime_limit_ms - HANDOVER_RESERVE_MS
        async with (
            ballooned(qmp, params.balloon_bytes, session, self._may_run_there) as ballooning,
            open_qemu_source(
                qmp,
                run_dir,
                downtime_limit_ms=told_ms,
                step_s=params.timeouts.qemu_s,
                channels_wish=params.local_channels,
                max_bandwidth_bps=params.max_bandwidth_bps,
                warn=session.warn,
            ) as source,
        ):
            self.ballooning = ballooning
            yield source

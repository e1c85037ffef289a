"""migrate-src: notice a destination that is there and takes nothing in."""

import math
from collections.abc import Callable, Hashable

from migrate.errors import DeadlineExceededError
from migrate.sending import Sender
from migrate.session import wait_stalled
from migrate.timeouts import Timeouts
from migrate.transport.link import Link
from proto.limits import MAX_DATA_BYTES


class StallWatch:
    """Two watches over one migration, each a task that raises when its time is up.

    While the guest runs nobody suffers, and a destination QEMU may be busy for a while. Once it is
    stopped every second counts. The handover, which begins when everything is sent, has deadlines
    of its own.
    """

    def __init__(
        self,
        link: Link,
        sender: Sender,
        stopped: Callable[[], bool],
        timeouts: Timeouts,
        max_bandwidth_bps: int | None,
    ) -> None:
        """Watch nothing yet.

        Args:
            link: To the destination.
            sender: What is sent over it.
            stopped: Whether the guest is stopped for the switchover.
            timeouts: How long is too long.
            max_bandwidth_bps: Limit of the link; a frame is paid for before it is sent: at the
                lowest rates that alone takes a minute.
        """
        self._link = link
        self._sender = sender
        self._stopped = stopped
        self._timeouts = timeouts
        self._paying_s = 2 * MAX_DATA_BYTES / (max_bandwidth_bps or math.inf)

    async def watch_precopy(self) -> None:
        """While the guest runs.

        Raises:
            DeadlineExceededError: What was sent is not taken in.
        """
        await self._watch(self._precopy_state, self._timeouts.take_in_s, "")

    async def watch_stop(self) -> None:
        """While it is stopped.

        Raises:
            DeadlineExceededError: Nothing is sent any more, or taken in.
        """
        await self._watch(
            self._stop_state, self._timeouts.stall_s, " while the guest stood still"
        )

    async def _watch(self, state: Callable[[], Hashable], limit_s: float, when: str) -> None:
        limit_s += self._paying_s
        await wait_stalled(state, limit_s)
        while self._sender.ended_ns is not None:  # perhaps only until it is taken back
            await wait_stalled(state, limit_s)
        raise DeadlineExceededError(
            f"{self._link.peer} has taken nothing in for {limit_s:.0f} s{when}"
        )

    def _precopy_state(self) -> Hashable:
        window = self._link.session.window
        waits_for_us = window.consumed_seq == window.next_seq - 1
        if self._stopped() or waits_for_us or self._link.is_down:
            return object()  # unlike any other
        return window.consumed_seq

    def _stop_state(self) -> Hashable:
        if not self._stopped() or self._link.is_down:
            return object()
        session = self._link.session
        written = self._link.written_bytes - session.sent_bytes["control"]
        return written, session.window.consumed_seq

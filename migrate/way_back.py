"""migrate-src: back to pre-copy where the link is lost for too long while the guest stands still.

Theory of operation. The destination guest gets the end of its stream only once everything was
received and compared. Up to then a stop-and-copy that is broken off costs it nothing: the source
lets its guest go on, waits for the link as in pre-copy, and says PRECOPY_AGAIN; then its guest is
told to migrate anew, and what comes is spliced into the stream that the destination has open
(``migrate.splicing``). Tables, page cache and digests of both ends go on: all that was classified
is sent before PRECOPY_AGAIN, so they say what the destination has.

Who runs the guest, and if everything dies there:

=============================  ===========  ====================================================
await                          guest        if it dies there
=============================  ===========  ====================================================
its stop-and-copy              paused, src  the source resumes it: END_OF_STATE was not answered
``wait_left``                  paused, src  the same; nothing more is read from it
``turn_back`` of the guest     source's     a QEMU whose stream is closed resumes it by itself
``wait_up``                    source       it runs on; so it does where the link stays away
``say_again``                  source       it runs on
``start``, its next pre-copy   source       it runs on, as in any pre-copy
=============================  ===========  ====================================================

While the guest runs on, no migration of ours is under way in its QEMU, and its owner may begin one.
So in that time nothing is cancelled there and no guest resumed: it is only asked where it is.

Nothing here gives the guest away. The destination cannot run it either: that takes COMMIT,
which ``handover`` sends only after a VERIFIED for this END_OF_STATE. One that answers an earlier
END_OF_STATE is impossible: where the destination took that one in, there is no way back
(``LinkSession.turn_back``), and where it did not, it is never said again.

Both records say PREPARED throughout: recovery lets the guest go on at the source.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from migrate.errors import DeadlineExceededError, GuestError, GuestOn
from migrate.guests.base import SourceGuest, Whereabouts
from migrate.handover import SourceHandover
from migrate.session import Session
from migrate.transport.link import Link
from migrate.units import NS_PER_MS
from proto.link.state import TURNABLE

MOST_TIMES: Final = 3
"""A link that is away at each stop will be at the next: then the guest has stood still enough."""


class WayBack:
    """Takes one handover to its end, through as many stop-and-copies as that needs.

    Attributes:
        count: How often it went back to pre-copy.
    """

    def __init__(
        self,
        handover: SourceHandover,
        session: Session,
        open_more: Callable[[], Awaitable[list[str]]],
        *,
        agreed: bool,
    ) -> None:
        """Begin with the first pre-copy.

        Args:
            handover: Of the migration.
            session: Of the run.
            open_more: Opens further connections of a link that has one, and says which it could
                not.
            agreed: The destination can go back, too.
        """
        self._handover = handover
        self._guest: SourceGuest = handover.guest
        self._link: Link = handover.link
        self._outbound = handover.outbound
        self._session = session
        self._open_more = open_more
        self._agreed = agreed and handover.guest.can_start_again
        self._turning = False
        self._stopped_ns = 0
        self._handing_over = trio.CancelScope()
        self.count = 0

    def turns_back(self) -> bool:
        """Whether a guest that has stood still for too long goes on; then this begins at once.

        Call while there is no link.
        """
        if not self._turning and self._is_possible:
            self._turning = True
            self.count += 1
            stopped_ns = self._guest.stopped_at_ns or self._outbound.state.switchover_at_ns
            self._stopped_ns = stopped_ns or self._session.runtime.now_ns()
            # All at once, so that nothing is said or heard in between.
            self._link.session.turn_back()
            self._outbound.turn_back()
            self._handing_over.cancel()
        return self._turning

    @property
    def _is_possible(self) -> bool:
        """The destination may lack the end of the stream, as far as is known here."""
        session, outbound = self._link.session, self._outbound.state
        return (
            self._agreed
            and self.count < MOST_TIMES
            and (session.state in TURNABLE or session.end_may_be_lost)
            and bool(outbound.blocks)
            and not outbound.opaque_rest
        )

    async def hand_over(self) -> None:
        """Wait for the end of pre-copy and hand the guest over; raises as ``SourceHandover``.

        Raises:
            DeadlineExceededError: The destination guest has got the end of its stream.
            GuestError: The guest does not go on, or cannot be migrated again.
        """
        while True:
            with trio.CancelScope() as self._handing_over:
                await self._outbound.sender.wait_ended()  # runs, then paused at the source
                self._session.enter("handover")
                await self._handover.hand_over()  # cancelled only before VERIFIED
                return
            await self._turn_back()
            self._turning = False

    async def _turn_back(self) -> None:
        """Have the guest run at the source, and migrate it anew; see above who runs it where."""
        session, outbound = self._session, self._outbound
        session.enter("back to pre-copy")
        await outbound.wait_left()
        where = await self._guest.turn_back()
        _check_runs(where)
        outbound.guest_runs()
        session.enter("precopy")
        stood_ms = (session.runtime.now_ns() - self._stopped_ns) / NS_PER_MS
        report = session.builder.report
        report.back_to_precopy_stopped_ms += stood_ms
        unless = (
            ""
            if self._link.session.state in TURNABLE
            else ", unless the destination has it all"
        )
        session.say(
            f"{where.text}, after it had stood still for {stood_ms:.0f} ms; "
            f"once the link is back the migration goes on from pre-copy{unless}"
        )
        await self._link.wait_up()
        if self._link.session.state not in TURNABLE:
            raise DeadlineExceededError(
                "the link was away for longer than a stopped guest waits, and the destination "
                "has got the end of its stream: it cannot go on with another one"
            )
        await outbound.say_again(self.count)
        report.back_to_precopy = self.count
        for missing in await self._open_more():
            session.warn(missing)
        await self._guest.start()
        outbound.read_another()


def _check_runs(where: Whereabouts) -> None:
    """Raise unless the guest was seen to run."""
    if where.guest_on is not GuestOn.SOURCE or where.run_state != "running":
        raise GuestError(f"no way back to pre-copy: {where.text}", guest_on=where.guest_on)

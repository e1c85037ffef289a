"""The source's streams, one each time that its guest is migrated anew, as one.

A migration that goes back to pre-copy goes on into the stream that the destination guest has open.
Of each further stream the beginning is left out: header, commands and the start of RAM, which the
destination has. Pages follow, whatever their order, and in the end device state.

Pure: events in, events out.
"""

from collections.abc import Sequence

from migrate.errors import GuestError
from proto.guest_events import (
    GuestEvent,
    Opaque,
    OpaqueKind,
    RamBlock,
    RamBlocks,
)

LEFT_OUT = (OpaqueKind.OPEN_RETURN_PATH, OpaqueKind.COMMAND)
"""What lies between the header and RAM, in every stream of one source."""


class Splice:
    """Joins streams; the first passes whole."""

    def __init__(self) -> None:
        self._header: bytes | None = None
        self._blocks: tuple[RamBlock, ...] | None = None
        self._is_first = True
        self._is_open = False

    def begin_another(self) -> None:
        """Say that the events that follow are of another stream."""
        self._is_first = self._is_open = False

    def take(self, events: Sequence[GuestEvent]) -> list[GuestEvent]:
        """What of these events goes on.

        Raises:
            GuestError: The stream does not go on where the first one was broken off: it is of
                another machine, or of other RAM.
        """
        return [kept for event in events if (kept := self._one(event)) is not None]

    def _one(self, event: GuestEvent) -> GuestEvent | None:
        if self._is_open:
            return event
        if isinstance(event, RamBlocks):
            self._is_open = True
            return self._same("RAM blocks", "_blocks", event.blocks, event)
        if isinstance(event, Opaque) and event.kind is OpaqueKind.HEADER:
            return self._same("machine", "_header", event.data, event)
        if self._is_first:
            return event
        if isinstance(event, Opaque) and event.kind in LEFT_OUT:
            return None
        raise GuestError(
            "the guest's second stream has what the first had not, before its RAM: the "
            "destination cannot go on with it"
        )

    def _same(
        self, what: str, name: str, value: object, event: GuestEvent
    ) -> GuestEvent | None:
        """Remember it of the first stream and pass it on; leave it out of others."""
        if self._is_first:
            setattr(self, name, value)
            return event
        if getattr(self, name) != value:
            raise GuestError(
                f"the {what} changed while the guest ran on: the destination cannot go on with it"
            )
        return None

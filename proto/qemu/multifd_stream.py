"""Joins the main connection of a multifd migration and its channels to one order of events.

Syncs part the migration into intervals. Within one, no page is sent twice, so pages may come out in
any order; an interval is complete when every connection stands at its sync, and only then the next
one begins. Who does the input and output may read all connections at the same time, each in a
thread of its own, and calls ``take`` when none of them is being read.
"""

from collections.abc import Sequence

from proto.errors import QemuStreamError
from proto.guest_events import (
    GuestEvent,
    Opaque,
    PageRun,
    RamBlock,
    RamBlocks,
    RoundEnd,
    ZeroRun,
)
from proto.qemu.multifd import ChannelReader
from proto.qemu.multifd_format import MAX_CHANNELS
from proto.qemu.rounds import RoundFinder
from proto.qemu.stream_reader import StreamReader


class MultifdStream:
    """One migration over several connections.

    Attributes:
        main: Reads the main connection.
        channels: Read the others.
        settled: All channels are known; until then not even the first sync is passed.
    """

    def __init__(self, main: StreamReader) -> None:
        self.main = main
        self.channels: list[ChannelReader] = []
        self.settled = False
        self._blocks: Sequence[RamBlock] = ()
        self._rounds = RoundFinder()
        self._round_no = 0
        self._wrapped = False

    def add_channel(self) -> ChannelReader:
        """Make the reader of one more data connection.

        Raises:
            QemuStreamError: There are too many.
        """
        if len(self.channels) >= MAX_CHANNELS:
            raise QemuStreamError("multifd", f"at most {MAX_CHANNELS} channels", "another one")
        channel = ChannelReader()
        channel.set_blocks(self._blocks)
        self.channels.append(channel)
        return channel

    def settle(self) -> None:
        """Say that no more channels come; without any, the main connection is all there is.

        A source has made all its connections before it ends the block list.
        """
        self.settled = True
        self.main.multifd = bool(self.channels)
        self._pass_sync()

    def take(self, from_main: Sequence[GuestEvent]) -> list[GuestEvent]:
        """Put in order what was received since the last call, and pass a sync that all reached.

        Args:
            from_main: What the main connection brought.

        Raises:
            QemuStreamError: Something beside RAM is sent that cannot be carried together with it,
                or the channels are not what they should be.
        """
        events: list[GuestEvent] = []
        for channel in self.channels:
            pages = channel.take_events()
            if pages and self.main.ram_ended:
                raise QemuStreamError(
                    "a multifd channel", "no page behind the end of RAM", "some"
                )
            events += pages
        for event in from_main:
            if isinstance(event, RamBlocks):
                self._blocks = event.blocks
                for channel in self.channels:
                    channel.set_blocks(event.blocks)
            elif isinstance(event, Opaque) and event.reason and self.channels:
                raise QemuStreamError(
                    "the main connection",
                    "nothing but RAM before its end, as there is multifd",
                    f"{event.reason}: switch the capability multifd off",
                )
        events += from_main
        events = self._in_rounds(events)
        self._pass_sync()
        return events

    def _in_rounds(self, events: list[GuestEvent]) -> list[GuestEvent]:
        """Announce a round's end before the first page behind it."""
        if self._wrapped:
            for i, event in enumerate(events):
                if isinstance(event, PageRun | ZeroRun):
                    events.insert(i, RoundEnd(self._round_no))
                    self._wrapped = False
                    self._round_no += 1
                    break
        return events

    def _pass_sync(self) -> None:
        main, channels = self.main, self.channels
        reached = main.at_sync and all(channel.at_sync for channel in channels)
        if not reached or not self.settled:
            return
        if sorted(channel.channel_id for channel in channels) != list(range(len(channels))):
            found = sorted(channel.channel_id for channel in channels)
            raise QemuStreamError("multifd", f"channels 0 to {len(channels) - 1}", f"{found}")
        tracks = [main.track, *(channel.track for channel in channels)]
        if main.sync_per_section:
            self._wrapped |= self._rounds.wrapped(tracks)
        else:  # every sync is the end of a walk over RAM; of one that found nothing, no matter
            self._wrapped |= any(track.last is not None for track in tracks)
        main.pass_sync()
        for channel in channels:
            channel.pass_sync()

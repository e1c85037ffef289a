"""How long one waits for another process that does not answer.

Two figures, from which all deadlines of the handover follow: a QEMU with slow disks needs more of
one, a link with long gaps more of the other. Both commands should be given the same.
"""

from dataclasses import dataclass
from typing import Final

from migrate.errors import ParamsError

MIN_PEER_S: Final = 3.0
"""An end that has nothing to say says so every second; two of these may be late."""

MIN_QEMU_S: Final = 1.0
MAX_S: Final = 3600.0
MAX_RECONNECT_S: Final = 7 * 86400.0
STOPPED_S: Final = 3.0
"""A link that is back sooner costs a stopped guest less than another pre-copy would."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Deadlines, in seconds.

    Attributes:
        peer_s: The other command is lost after so long a silence.
        qemu_s: What a QEMU may need for one step: to complete its migration, to load the devices
            and open disks, to let the guest run.
        reconnect_s: How long a link that is lost is waited for.
        stopped_s: The same while the guest stands still, for the source; None = ``STOPPED_S``
            beyond the downtime that was asked for.
    """

    peer_s: float = 15.0
    qemu_s: float = 30.0
    reconnect_s: float = 300.0
    stopped_s: float | None = None

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--peer-timeout", self.peer_s, MIN_PEER_S),
            ("--qemu-timeout", self.qemu_s, MIN_QEMU_S),
        ):
            if not least <= value <= MAX_S:
                raise ParamsError(
                    f"expected {option} from {least:g}s to {MAX_S:g}s, got {value:g}s"
                )
        for option, wait_s in (
            ("--reconnect-timeout", self.reconnect_s),
            ("--stopped-timeout", self.stopped_s or 0.0),
        ):
            if not 0 <= wait_s <= MAX_RECONNECT_S:
                raise ParamsError(
                    f"expected {option} from 0s to {MAX_RECONNECT_S:g}s, got {wait_s:g}s"
                )

    def stopped_wait_s(self, downtime_limit_ms: int) -> float:
        """How long the source waits for a lost link while its guest stands still."""
        if self.stopped_s is not None:
            return self.stopped_s
        return downtime_limit_ms / 1000 + STOPPED_S

    @property
    def verify_s(self) -> float:
        """From END_OF_STATE to VERIFIED and READY: last pages, then the load."""
        return 2 * self.qemu_s

    @property
    def running_s(self) -> float:
        """From COMMIT to RUNNING: the load where it comes last, ``cont``, and the way back."""
        return 3 * self.qemu_s

    @property
    def call_off_s(self) -> float:
        """To bring the guest back after a failure: a cancel, then ``cont``."""
        return 1.5 * self.qemu_s

    @property
    def take_in_s(self) -> float:
        """How long a destination may take nothing in while the guest runs."""
        return 4 * self.qemu_s

    @property
    def stall_s(self) -> float:
        """How long the stopped guest waits for a destination that takes nothing in."""
        return 2 * self.peer_s


DEFAULTS: Final = Timeouts()

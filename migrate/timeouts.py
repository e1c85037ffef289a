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


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Deadlines, in seconds.

    Attributes:
        peer_s: The other command is lost after so long a silence.
        qemu_s: What a QEMU may need for one step: to complete its migration, to load the devices
            and open disks, to let the guest run.
    """

    peer_s: float = 15.0
    qemu_s: float = 30.0

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--peer-timeout", self.peer_s, MIN_PEER_S),
            ("--qemu-timeout", self.qemu_s, MIN_QEMU_S),
        ):
            if not least <= value <= MAX_S:
                raise ParamsError(
                    f"expected {option} from {least:g}s to {MAX_S:g}s, got {value:g}s"
                )

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

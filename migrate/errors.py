"""Errors of the engine: one class per reaction, with exit code and what it knows of the guest."""

import enum
import errno
from collections.abc import Sequence
from typing import Final

MOST_PROBLEMS = 4
"""Problems of one kind that a message names; a reader needs one, the report has all."""


def problems_text(problems: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(problems) - MOST_PROBLEMS
    return "; ".join(problems[:MOST_PROBLEMS]) + (f"; and {more} more" * (more > 0))


class GuestOn(enum.Enum):
    """Where the guest is, never more than is known."""

    SOURCE = "source"
    DESTINATION = "destination"
    NEITHER = "neither"
    UNKNOWN = "unknown"
    HANDED_OVER = "handed-over"


class MigrationError(Exception):
    """A migration did not happen, or its end is not what was asked for.

    Attributes:
        exit_code: Exit status of the command; unique per class (``tests/style`` checks it).
        code: Short machine-readable name, stands in the report.
        guest_on: Where the guest is now, as far as it is known.
    """

    exit_code = 1
    code = "failed"

    def __init__(self, message: str, *, guest_on: GuestOn = GuestOn.SOURCE) -> None:
        super().__init__(message)
        self.guest_on = guest_on


class ParamsError(MigrationError):
    """An option has a value that cannot work."""

    exit_code = 2
    code = "bad-option"


class ConnectError(MigrationError):
    """The other command, or a QEMU socket, could not be reached."""

    exit_code = 10
    code = "cannot-connect"


class PeerLostError(MigrationError):
    """The link to the other command broke."""

    exit_code = 11
    code = "peer-lost"


class PeerRefusedError(MigrationError):
    """The other command refused or aborted, and said why."""

    exit_code = 12
    code = "peer-refused"


class PeerProtocolError(MigrationError):
    """The other command sent something the link protocol does not allow."""

    exit_code = 13
    code = "peer-protocol"


class MachineMismatchError(MigrationError):
    """Source and destination machines differ in a way that would damage the guest."""

    exit_code = 14
    code = "machine-mismatch"


class TlsError(MigrationError):
    """The link is not as safe as asked for: a certificate, a key, or a side without TLS."""

    exit_code = 15
    code = "tls"


class TokenError(MigrationError):
    """The shared token that admits a source is missing, unsafe, or not the other side's."""

    exit_code = 16
    code = "token"


class GuestError(MigrationError):
    """A QEMU on this host did not do what was asked of it."""

    exit_code = 20
    code = "guest"


class QmpConnectError(GuestError):
    """A QMP socket is missing, in use, or not QMP."""

    exit_code = 21
    code = "qmp-connect"


class QmpCommandError(GuestError):
    """QEMU answered a QMP command with an error.

    Attributes:
        command: Name of the command.
        error_class: QMP's error class, e.g. ``GenericError``.
        desc: QEMU's own text.
    """

    exit_code = 22
    code = "qmp-command"

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"QEMU refused '{command}': {desc}")
        self.command = command
        self.error_class = error_class
        self.desc = desc


class QmpInterruptedError(GuestError):
    """The monitor closed while a command was under way; whether it took effect is unknown."""

    exit_code = 23
    code = "qmp-interrupted"


class QemuExitedError(GuestError):
    """A QEMU process ended while it was needed."""

    exit_code = 24
    code = "qemu-exited"


class QemuStreamBrokenError(GuestError):
    """The source QEMU's migration stream ended early or is not a migration stream."""

    exit_code = 25
    code = "qemu-stream"


class GuestStoppedError(GuestError):
    """The guest powered off or crashed on its own while it was migrating."""

    exit_code = 26
    code = "guest-stopped"


class RingsInconsistentError(GuestError):
    """A virtio ring in guest memory contradicts its device's state; nothing was handed over.

    Attributes:
        problems: A line per queue: device, queue, values, page.
    """

    exit_code = 27
    code = "rings-inconsistent"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(
            "virtio rings contradict their devices, which would lose requests or kill the device: "
            + problems_text(problems)
            + " (--allow-inconsistent-rings hands over all the same)"
        )
        self.problems = tuple(problems)

    @classmethod
    def told(cls, message: str, *, guest_on: GuestOn) -> "RingsInconsistentError":
        """What the other side found."""
        error = cls(())
        error.args = (message,)
        error.guest_on = guest_on
        return error


class LandingError(GuestError):
    """The destination QEMU's memory, which pages are written into directly, cannot be reached."""

    exit_code = 28
    code = "landing"


class MigrationCancelledError(MigrationError):
    """The user, or a signal, cancelled the migration."""

    exit_code = 30
    code = "cancelled"


class DeadlineExceededError(MigrationError):
    """A phase did not end within its time-out."""

    exit_code = 31
    code = "deadline"


class NotConvergedError(MigrationError):
    """Pre-copy gets nowhere: the guest dirties memory faster than the link carries it.

    Attributes:
        rounds: Rounds that were tried.
        dirty_bps: Bytes of memory per second that the guest dirtied lately.
        bandwidth_bps: Bytes of memory per second that the link carried.
        enough_limit_ms: A downtime limit that would have been enough.
    """

    exit_code = 32
    code = "not-converged"

    def __init__(
        self, rounds: int, dirty_bps: float, bandwidth_bps: float, *, enough_limit_ms: int
    ) -> None:
        super().__init__(
            f"the migration does not converge: after {rounds} rounds what remains does not "
            f"become less; the guest dirties at least {dirty_bps / 1e6:.0f} MB/s of memory, the "
            f"link takes {bandwidth_bps / 1e6:.0f} MB/s; --downtime-limit {enough_limit_ms}ms "
            "would do, or a faster link, or a guest that writes less"
        )
        self.rounds = rounds
        self.dirty_bps = dirty_bps
        self.bandwidth_bps = bandwidth_bps
        self.enough_limit_ms = enough_limit_ms


class IntegrityError(MigrationError):
    """The RAM that arrived is not the RAM that left; refused before the handover."""

    exit_code = 40
    code = "integrity"


class OldCopyError(MigrationError):
    """What this host had kept of the guest's RAM changed on the disk while it was in use."""

    exit_code = 41
    code = "old-copy"


class HostExhaustedError(MigrationError):
    """This host has no memory, threads, file descriptors or room on a disk left."""

    exit_code = 60
    code = "host-exhausted"


EXHAUSTION: Final = {
    errno.ENOMEM: "memory",
    errno.EMFILE: "file descriptors",
    errno.ENFILE: "file descriptors",
    errno.ENOSPC: "room on a disk",
    errno.EDQUOT: "room on a disk",
    errno.EFBIG: "room for a file of that size",
}
"""What ran out, by what the kernel says."""

NO_THREAD: Final = "can't start new thread"
"""All that Python says when the kernel gives it none."""


def exhausted(error: BaseException) -> HostExhaustedError | None:
    """What to tell of an error that is no mistake of ours, but this host's; ``None`` of others."""
    if isinstance(error, MemoryError):
        return HostExhaustedError(f"this host has no memory left: {error}".rstrip(": "))
    if isinstance(error, OSError) and (what := EXHAUSTION.get(error.errno or 0)):
        return HostExhaustedError(f"this host has no {what} left: {error.strerror}")
    if isinstance(error, RuntimeError) and str(error) == NO_THREAD:
        return HostExhaustedError("this host has no threads left, or no memory for another one")
    return None


class SwitchoverUnknownError(MigrationError):
    """The link died between COMMIT and RUNNING: the guest may run on the destination."""

    exit_code = 50
    code = "switchover-unknown"

    def __init__(self, message: str) -> None:
        super().__init__(message, guest_on=GuestOn.UNKNOWN)


class RecoveryRefusedError(MigrationError):
    """A recovery needs something that is not known or not there; the text says what."""

    exit_code = 51
    code = "recovery-refused"

    def __init__(self, message: str, *, guest_on: GuestOn = GuestOn.UNKNOWN) -> None:
        super().__init__(message, guest_on=guest_on)


class RecordBusyError(RecoveryRefusedError):
    """Another command still works on the migration that is to be recovered."""

    exit_code = 52
    code = "record-busy"

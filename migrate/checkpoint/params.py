"""Where a host keeps the RAM of guests that left, and whose it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from migrate.errors import ParamsError
from migrate.units import GIB, MIB, size_text
from proto.errors import MessageError
from proto.link.fields import VM_ID

DEFAULT_MAX_BYTES: Final = 16 * GIB
"""Some guests of the size that this engine is tested with; a host that has many says more."""

MIN_MAX_BYTES: Final = 1 * MIB


@dataclass(frozen=True, slots=True)
class CheckpointParams:
    """A directory of checkpoints.

    Attributes:
        directory: Where they are.
        max_bytes: What all of them may take up on the disk.
    """

    directory: Path
    max_bytes: int = DEFAULT_MAX_BYTES

    def __post_init__(self) -> None:
        if self.max_bytes < MIN_MAX_BYTES:
            raise ParamsError(
                f"expected --checkpoint-max of at least {size_text(MIN_MAX_BYTES)}, "
                f"got {size_text(self.max_bytes)}"
            )


def parse_vm_id(text: str) -> str:
    """Read a VM's identity.

    Raises:
        ParamsError: Other characters than letters, digits and ``._-``, or too many.
    """
    try:
        VM_ID("--vm-id", text)
    except MessageError as error:
        raise ParamsError(str(error)) from error
    return text


def needs_vm_id(why: str) -> ParamsError:
    """The error for a checkpoint of a VM that has no name."""
    return ParamsError(
        f"--checkpoint needs --vm-id: {why}, so nothing says whose memory it is; any name will do, "
        "the same whenever this VM migrates"
    )

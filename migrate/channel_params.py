"""What ``--local-channels`` may be."""

from typing import Final

from migrate.errors import ParamsError

MAX_LOCAL_CHANNELS: Final = 64
"""QEMU takes up to 255; each costs it and us a thread and memory for a packet or two."""


def check_channels(count: int | None, needs: str) -> None:
    """Check a wish for channels; None is none.

    Args:
        count: Channels wished for.
        needs: What is missing for any wish, in words; empty if nothing is.

    Raises:
        ParamsError: It cannot be had.
    """
    if count is None:
        return
    if not 0 <= count <= MAX_LOCAL_CHANNELS:
        raise ParamsError(
            f"expected --local-channels auto or 0 to {MAX_LOCAL_CHANNELS}, got {count}"
        )
    if needs:
        raise ParamsError(f"--local-channels needs {needs}")

"""Over how many connections a destination QEMU gets the pages that do not land.

It must know before it listens. What parts the pages then, its machine type decides: see
``proto.qemu.multifd_writer``.
"""

import re
import uuid
from collections.abc import Mapping
from typing import Final

from migrate.qemu.local_channels import LocalChannels, refusal_of
from migrate.qemu.machine_facts import MachineFacts
from proto.qemu.multifd_writer import MultifdWriter

AUTO_CHANNELS: Final = 0
"""Measured with 7.2 and 10.0, 1 and 2 channels are not faster than none on a machine with two
processors (``docs/performance.md``): one connection carries 5 to 7 GB/s. ``tools/bench-load``."""

FIRST_FLUSHING: Final = (8, 1)
"""QEMU and machine type from which a record is the sync, and no longer the end of a section."""

_UPSTREAM: Final = re.compile(r"pc-(?:q35|i440fx)-(\d+)\.(\d+)")


def choose_incoming(
    wish: int | None, machine: MachineFacts, capabilities: Mapping[str, bool], *, lands: bool
) -> LocalChannels:
    """Decide before the QEMU listens.

    Args:
        wish: What the user asked for: 0 for none, None = as it is best.
        machine: The destination's.
        capabilities: The migration capabilities it knows, and whether they are on.
        lands: Pages are written into its RAM; what is left is little.
    """
    wanted = AUTO_CHANNELS if wish is None else wish
    if not wanted:
        return LocalChannels(0)
    if lands:
        return LocalChannels(0, "pages are written straight into the QEMU's RAM")
    if refusal := refusal_of(capabilities, (device.qom_type for device in machine.devices)):
        return LocalChannels(0, refusal)
    if sync_per_section(machine) is None:
        return LocalChannels(0, f"machine type {machine.machine_type} is not one of QEMU's own")
    return LocalChannels(wanted, incoming=True)


def sync_per_section(machine: MachineFacts) -> bool | None:
    """Whether this machine waits for its channels at each end of a RAM section; None: unknown.

    A distribution's own machine types do not say which of QEMU's they follow.
    """
    if machine.qemu_version[:2] < FIRST_FLUSHING:
        return True
    match = _UPSTREAM.fullmatch(machine.machine_type)
    if match is None:
        return None
    return (int(match[1]), int(match[2])) < FIRST_FLUSHING


def writer_for(machine: MachineFacts, channels: LocalChannels) -> MultifdWriter:
    """Make the writer for a machine that listens for these channels."""
    number = uuid.UUID(machine.uuid).bytes if machine.uuid else bytes(16)
    per_section = sync_per_section(machine)
    return MultifdWriter(channels.count, sync_per_section=bool(per_section), uuid=number)

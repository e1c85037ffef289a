"""The byte account of a link: every byte that is sent stands under exactly one class."""

from typing import Final

from proto.guest_events import PAGE_SIZE
from proto.link.frames import Buffer
from proto.link.messages import (
    DeviceStateData,
    Message,
    OpaqueData,
    RamBlockTable,
    Switchover,
)
from proto.link.pages import PageBatch, bytes_by_class

BYTE_CLASSES: Final = (
    "zero",
    "same",
    "ref",
    "delta",
    "literal",
    "opaque",
    "device_state",
    "control",
    "resent",
)
"""Keys of a byte account; a frame's bytes are each counted under exactly one."""


def raw_bytes(message: Message) -> int:
    """Bytes the destination guest takes in because of a message: its share of the window."""
    if isinstance(message, PageBatch):
        return message.content_count * PAGE_SIZE
    if isinstance(message, (OpaqueData, DeviceStateData)):
        return message.raw_len
    return 0


def account(message: Message, buffers: list[Buffer]) -> dict[str, int]:
    """Account for every byte of a message's frame.

    Args:
        message: The message.
        buffers: Its frame, the first buffer being the head.

    Returns:
        Bytes under some of ``BYTE_CLASSES``; they sum to the frame's length.
    """
    if isinstance(message, PageBatch):
        return bytes_by_class(message)
    payload_class = "control"
    if isinstance(message, (OpaqueData, RamBlockTable, Switchover)):
        payload_class = "opaque"
    elif isinstance(message, DeviceStateData):
        payload_class = "device_state"
    head = len(buffers[0])
    found = {"control": head}
    found[payload_class] = found.get(payload_class, 0) + sum(map(len, buffers[1:]))
    return found

"""What the engine asks of a QEMU about its virtio devices and about guest memory.

As ``migrate.qemu.queries``, of which it is a part: QMP's names and shapes end here. The commands
``x-query-virtio*`` exist in QEMU 7.2 and 10.0; a QEMU built without them is no error.
"""

import re
from dataclasses import dataclass
from typing import Final

from migrate.errors import GuestError, QmpCommandError
from migrate.qemu.answers import Fields, execute_list
from migrate.qemu.qmp_client import QmpClient
from proto.errors import QmpProtocolError
from proto.qemu.hmp import (
    host_address_line,
    memory_line,
    parse_host_address,
    parse_memory,
)
from proto.qemu.physical import PhysicalMap, parse_mtree
from proto.virtqueue import MAX_QUEUES, VirtqueueState

MAX_READ_PHYSICAL_BYTES: Final = 65536
"""Most guest memory in one question: 8192 lines of the monitor's text."""

_NO_DEVICES: Final = re.compile(r"(?i)no virtio devices")
_NO_SUCH_QUEUE: Final = re.compile(r"(?i)invalid|number")


@dataclass(frozen=True, slots=True)
class VirtioDevice:
    """A virtio device as QEMU's monitor shows it.

    Attributes:
        path: QOM path of its back-end.
        name: ``virtio-net``, …
        broken: Whether the device has given up on its driver.
        virtqueues: Queues that the driver has set up.
    """

    path: str
    name: str
    broken: bool
    virtqueues: tuple[VirtqueueState, ...]


async def query_virtio(client: QmpClient) -> tuple[VirtioDevice, ...] | None:
    """Ask for all virtio devices and their queues.

    Returns:
        ``None`` where this QEMU cannot be asked.
    """
    try:
        listed = await execute_list(client, "x-query-virtio")
    except QmpCommandError as error:
        if error.error_class == "CommandNotFound":
            return None
        if _NO_DEVICES.search(error.desc):
            return ()  # QEMU 10.0 calls that an error
        raise
    devices = []
    for item in listed:
        path = Fields("x-query-virtio", item).text("path")
        devices.append(await _device(client, path))
    return tuple(devices)


async def _device(client: QmpClient, path: str) -> VirtioDevice:
    command = "x-query-virtio-status"
    status = Fields(command, await client.execute(command, path=path))
    ask = _vhost_queue if status.boolean("vhost-started") else _queue
    queues = []
    for index in range(min(status.integer("num-vqs"), MAX_QUEUES)):
        queue = await ask(client, path, index)
        if queue is None:
            break
        if queue.desc:
            queues.append(queue)
    broken = status.boolean("broken")
    return VirtioDevice(path, status.text("name"), broken, tuple(queues))


async def _queue(client: QmpClient, path: str, index: int) -> VirtqueueState | None:
    command = "x-query-virtio-queue-status"
    try:
        answer = await client.execute(command, path=path, queue=index)
    except QmpCommandError as error:
        if _NO_SUCH_QUEUE.search(error.desc):
            return None
        raise
    fields = Fields(command, answer)
    return VirtqueueState(
        index=index,
        num=fields.integer("vring-num"),
        desc=fields.integer("vring-desc"),
        avail=fields.integer("vring-avail"),
        used=fields.integer("vring-used"),
        last_avail_idx=fields.integer_or_none("last-avail-idx") or 0,
        used_idx=fields.integer("used-idx"),
        in_flight=fields.integer("inuse"),
    )


async def _vhost_queue(client: QmpClient, path: str, index: int) -> VirtqueueState | None:
    """Ask for a queue whose data path is outside of QEMU: only its place.

    Never with the other command, which asks a vhost-user back-end for its indices, and that stops
    the ring of the running guest for good.
    """
    command = "x-query-virtio-vhost-queue-status"
    try:
        answer = await client.execute(command, path=path, queue=index)
    except QmpCommandError as error:
        if _NO_SUCH_QUEUE.search(error.desc):
            return None
        raise
    fields = Fields(command, answer)
    return VirtqueueState(
        index=index,
        num=fields.integer("num"),
        desc=fields.integer("desc-phys"),
        avail=fields.integer("avail-phys"),
        used=fields.integer("used-phys"),
        last_avail_idx=0,
    )


async def query_physical_map(client: QmpClient, blocks: tuple[str, ...]) -> PhysicalMap:
    """Ask where guest-physical memory lies in the RAM blocks.

    Raises:
        GuestError: The monitor's text is not understood.
    """
    text = await _monitor(client, "info mtree -f")
    try:
        return parse_mtree(text, blocks)
    except QmpProtocolError as error:
        raise GuestError(f"the memory map is not understood: {error}") from error


async def read_physical(client: QmpClient, address: int, length: int) -> bytes | None:
    """Read guest memory at a guest-physical address; ``None`` where there is none.

    Args:
        client: Monitor of a QEMU whose guest does not run, or the bytes are torn.
        address: Where.
        length: How much, at most ``MAX_READ_PHYSICAL_BYTES``.

    Raises:
        ValueError: Too much at a time.
    """
    if not 0 < length <= MAX_READ_PHYSICAL_BYTES:
        raise ValueError(f"expected 1 to {MAX_READ_PHYSICAL_BYTES} bytes, got {length}")
    text = await _monitor(client, memory_line(address, length))
    try:
        return parse_memory(text, address, length)
    except QmpProtocolError:
        return None


async def query_host_address(client: QmpClient, address: int) -> tuple[str, int]:
    """Ask where guest-physical memory is in the QEMU's process.

    Returns:
        The memory region's name, and the address there.

    Raises:
        GuestError: There is no memory, or the monitor's text is not understood.
    """
    text = await _monitor(client, host_address_line(address))
    try:
        return parse_host_address(text, address)
    except QmpProtocolError as error:
        raise GuestError(f"the monitor's answer is not understood: {error}") from error


async def _monitor(client: QmpClient, line: str) -> str:
    answer = await client.execute("human-monitor-command", **{"command-line": line})
    if not isinstance(answer, str):
        raise GuestError(f"unexpected answer to '{line}': {answer!r:.80}")
    return answer

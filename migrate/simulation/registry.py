"""Which module makes which kind of device; they are imported when a profile asks for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from migrate.errors import ParamsError
from migrate.simulation.base import GuestRam, Scheduler, SimulatedDevice

_VIRTIO: Final = "migrate.simulation.virtio.factory"
_EMULATED: Final = "migrate.simulation.emulated"

MODULES: Final[dict[str, str]] = {
    "virtio-net": _VIRTIO,
    "virtio-blk": _VIRTIO,
    "virtio-balloon": _VIRTIO,
    "virtio-console": _VIRTIO,
    "nic": _EMULATED,
    "disk": _EMULATED,
}
"""Each has a function ``make_device``."""

Completed = Callable[[int, int], None]
"""Told of each request that is done: when it was sent and done, on the clock outside, in ns."""

PagesTaken = Callable[[NDArray[np.uint32]], None]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a device of a guest is connected to.

    Attributes:
        ram_cpu: Memory as its driver sees it.
        ram_dma: Memory as the device sees it.
        ram_vhost: Memory for a data path outside of the device process, None without one.
        scheduler: The guest's event queue.
        seed: Of its share of chance.
        area: Address and length of the guest RAM that is its own, zero at power-on.
        completed: See ``Completed``.
        discard: Told of pages that a balloon has taken.
        reclaim: Told of pages that it has given back.
    """

    ram_cpu: GuestRam
    ram_dma: GuestRam
    ram_vhost: GuestRam | None
    scheduler: Scheduler
    seed: int
    area: tuple[int, int]
    completed: Completed
    discard: PagesTaken
    reclaim: PagesTaken


def preload() -> None:
    """Import what makes devices now: on a destination that would be part of the downtime."""
    for module in sorted(set(MODULES.values())):
        import_module(module)


def make_device(
    kind: str, name: str, options: Mapping[str, Any], around: Surroundings
) -> SimulatedDevice:
    """Make a device together with its driver and its load; nothing is written or scheduled yet.

    Raises:
        ParamsError: There is no such kind, or an option is not one of its own or out of range.
    """
    module = MODULES.get(kind)
    if module is None:
        known = ", ".join(sorted(MODULES))
        raise ParamsError(f"{name}: no device of kind '{kind}': expected one of {known}")
    more: dict[str, object] = {}
    if module == _VIRTIO:
        more = {
            "discard": around.discard,
            "reclaim": around.reclaim,
            "ram_vhost": around.ram_vhost,
        }
    device = import_module(module).make_device(
        kind,
        name,
        options,
        ram_cpu=around.ram_cpu,
        ram_dma=around.ram_dma,
        scheduler=around.scheduler,
        seed=around.seed,
        area=around.area,
        completed=around.completed,
        **more,
    )
    return cast("SimulatedDevice", device)

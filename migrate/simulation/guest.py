"""A simulated guest: memory, vCPUs, devices and a clock, driven from outside.

Whoever owns it says up to which instant of guest time it lives (``run_until``), and gets the same
guest however finely that is cut. It knows nothing of migrations but what a hypervisor offers:
stop, save, load, resume, and the dirty bitmap.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from migrate.errors import ParamsError
from migrate.simulation.base import SimulatedDevice
from migrate.simulation.clock import GuestClock, Now
from migrate.simulation.content import PageContent
from migrate.simulation.dirty_bitmap import DirtyBitmap
from migrate.simulation.events import EventQueue
from migrate.simulation.profile import MAX_DEVICES, MAX_NAME_CHARS, Profile, read_profile
from migrate.simulation.ram import Pages, RamView, SimulatedRam
from migrate.simulation.registry import Completed, Surroundings, make_device
from migrate.simulation.vcpu import QUANTUM_NS, Vcpus
from proto.errors import MessageError
from proto.guest_events import PAGE_SIZE
from proto.packing import (
    binary,
    integer,
    optional,
    pack_fields,
    plain_map,
    record,
    sequence,
    text,
    unpack_fields,
)
from proto.qemu.format import MAX_DEVICE_STATE_BYTES

STATE_VERSION: Final = 1
_WHERE: Final = "simulated guest"
_MAX_TIME_NS: Final = 2**63 - 1

_FIELDS: Final = {
    "version": integer(STATE_VERSION, STATE_VERSION),
    "profile": plain_map,
    "guest_ns": integer(0, _MAX_TIME_NS),
    "stopped_wall_ns": integer(0, _MAX_TIME_NS),
    "behind_ns": integer(0, _MAX_TIME_NS),
    "balloon": binary(MAX_DEVICE_STATE_BYTES),
    "service": optional(plain_map),
    "devices": sequence(
        record(text(4 * MAX_NAME_CHARS), text(4 * MAX_NAME_CHARS), plain_map), MAX_DEVICES
    ),
}


def not_counted(sent_ns: int, done_ns: int) -> None:
    """Where nobody measures the service."""


class SimulatedGuest:
    """A guest that is stopped until ``power_on`` or ``resume``.

    Attributes:
        profile: What it is.
        ram: Its memory.
        clock: Its clock.
        queue: Its events; ``queue.now_ns`` is the guest time that it has lived through.
        devices: Its devices, in the profile's order.
        service_state: What ``load_guest`` found of ``save``'s ``service``, not checked yet.
    """

    def __init__(
        self,
        profile: Profile,
        ram: SimulatedRam | None = None,
        *,
        now_ns: Now = time.monotonic_ns,
        wall_ns: Now = time.time_ns,
        completed: Completed = not_counted,
        track_dma: bool = True,
    ) -> None:
        """Build it.

        Args:
            profile: What it is.
            ram: Memory that a migration has filled; None for that of a new guest.
            now_ns: Monotonic time of the host.
            wall_ns: The world's time.
            completed: Told of each request that a client of the guest sees answered.
            track_dma: See ``SimulatedRam``.

        Raises:
            ParamsError: The profile names a device that there is not.
            MemoryError: The host cannot give so much address space.
        """
        self.profile = profile
        self.ram = ram or SimulatedRam(
            profile.ram_bytes, PageContent(profile.seed, profile.content), track_dma=track_dma
        )
        self.queue = EventQueue()
        self.clock = GuestClock(now_ns, wall_ns)
        self._completed = completed
        self._vhost_logs: list[DirtyBitmap] = []
        self._vcpus = Vcpus(profile, self.ram) if profile.vcpus else None
        self.devices: Sequence[SimulatedDevice] = [
            self._make_device(number) for number in range(len(profile.devices))
        ]
        self.service_state: Mapping[str, Any] | None = None
        self._written_until_ns = 0

    def _make_device(self, number: int) -> SimulatedDevice:
        spec = self.profile.devices[number]
        around = Surroundings(
            ram_cpu=self.ram.view_cpu,
            ram_dma=self.ram.view_dma,
            ram_vhost=self._vhost_view(spec.options),
            scheduler=self.queue,
            seed=self.profile.seed * MAX_DEVICES + number,
            area=self.profile.areas()[number],
            completed=self._completed,
            discard=self.ram.discard,
            reclaim=self.ram.restore,
        )
        return make_device(spec.kind, spec.name, spec.options, around)

    def _vhost_view(self, options: Mapping[str, Any]) -> RamView | None:
        """Where the data path is outside of the device process, its writes have their own log."""
        if not options.get("vhost"):
            return None
        log = DirtyBitmap(self.ram.page_count)
        self._vhost_logs.append(log)
        return self.ram.view_logged(log)

    # --- life ------------------------------------------------------------------------------------

    def power_on(self) -> None:
        """Begin to live at guest time 0, through the profile's warm-up at once."""
        for address, length in self.profile.areas():
            self.ram.zero_area(address // PAGE_SIZE, length // PAGE_SIZE)
        for device in self.devices:
            device.start()
        self.run_until(self.profile.warm_up_ns)
        self.clock.stop_at(self.profile.warm_up_ns)
        self.clock.stopped_wall_ns = None  # nobody ever stopped it
        self.clock.start()

    def run_until(self, guest_ns: int) -> None:
        """Live through everything up to and including ``guest_ns``; a time gone by is nothing."""
        while self._vcpus is not None and self._written_until_ns + QUANTUM_NS <= guest_ns:
            start_ns = self._written_until_ns
            end_ns = start_ns + QUANTUM_NS
            next_ns = self.queue.next_ns
            if next_ns is None or next_ns > end_ns:
                # Nothing can see memory before then: the writes of many quanta are made at once.
                quiet_ns = guest_ns if next_ns is None else min(guest_ns, next_ns - 1)
                end_ns = max(end_ns, quiet_ns // QUANTUM_NS * QUANTUM_NS)
            self.queue.run_until(end_ns)
            self._vcpus.run_quanta(start_ns, end_ns)
            self._written_until_ns = end_ns
        self.queue.run_until(guest_ns)

    def stop(self) -> None:
        """Stop the vCPUs and quiesce the devices: from here on nothing changes."""
        for device in self.devices:
            device.quiesce()
        self.queue.stop()
        self.clock.stop_at(self.queue.now_ns)

    def resume(self) -> None:
        """Go on where it stopped, or where ``load_guest`` says that it stopped elsewhere."""
        self.clock.start()
        self.queue.resume(self.queue.now_ns)
        for device in self.devices:
            device.world_went_on(self.clock.gap_ns)
            device.start()

    def outside_ns(self) -> int:
        """The clock outside: since power-on, stops included."""
        return self.queue.now_ns + self.clock.behind_ns

    def take_time(self, guest_ns: int, stopped_wall_ns: int, behind_ns: int) -> None:
        """Stand where another guest stopped; see ``GuestClock.load``."""
        self.clock.load(guest_ns, stopped_wall_ns, behind_ns)
        self._written_until_ns = guest_ns // QUANTUM_NS * QUANTUM_NS
        self.queue.now_ns = guest_ns

    def harvest(self) -> Pages:
        """Pages written since the last harvest, by whomever; they are clean from now on."""
        for log in self._vhost_logs:
            self.ram.dirty.merge(log)
        pages = self.ram.dirty.harvest_and_clear()
        return pages[self.ram.travels(pages)]

    # --- state -----------------------------------------------------------------------------------

    def save(self, service: Mapping[str, Any] | None = None) -> bytes:
        """Everything but memory, of the stopped guest.

        Args:
            service: Plain data of whoever measures its service, to go along.
        """
        assert not self.clock.runs, "stop() comes first"
        return pack_fields(
            _WHERE,
            _FIELDS,
            {
                "version": STATE_VERSION,
                "profile": self.profile.to_map(),
                "guest_ns": self.clock.read_ns(),
                "stopped_wall_ns": self.clock.stopped_wall_ns or 0,
                "behind_ns": self.clock.behind_ns,
                "balloon": _runs(self.ram.ballooned_pages()).tobytes(),
                "service": service,
                "devices": [(d.name, d.kind, d.save()) for d in self.devices],
            },
        )


def load_guest(
    state: bytes,
    ram: SimulatedRam,
    *,
    now_ns: Now = time.monotonic_ns,
    wall_ns: Now = time.time_ns,
    completed: Completed = not_counted,
) -> SimulatedGuest:
    """Build the guest that ``save`` described around memory that has arrived; it is stopped.

    Raises:
        RemoteProtocolError: ``state`` is not what ``save`` gives for a guest with this memory.
    """
    values = unpack_fields(_WHERE, _FIELDS, state)
    try:
        profile = read_profile(values["profile"])
        if profile.ram_bytes != ram.length_bytes:
            raise ParamsError(f"profile: its RAM has {profile.ram_bytes} bytes")
        guest = SimulatedGuest(
            profile, ram, now_ns=now_ns, wall_ns=wall_ns, completed=completed
        )
    except ParamsError as error:
        raise MessageError(
            _WHERE, f"a guest of {ram.length_bytes} bytes", str(error)
        ) from error
    ram.discard(_pages_of_runs(values["balloon"], ram.page_count))
    guest_ns: int = values["guest_ns"]
    guest.take_time(guest_ns, values["stopped_wall_ns"], values["behind_ns"])
    arrived = [(name, kind) for name, kind, _ in values["devices"]]
    expected = [(device.name, device.kind) for device in guest.devices]
    if arrived != expected:
        raise MessageError(_WHERE, f"devices {expected}", repr(arrived)[:200])
    for device, (_, _, device_state) in zip(guest.devices, values["devices"], strict=True):
        device.load(device_state)
    guest.service_state = values["service"]
    return guest


def _runs(pages: Pages) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Ascending pages as runs: first page and count, little-endian u32, shape (n, 2)."""
    starts = np.flatnonzero(np.diff(pages.astype(np.int64), prepend=-2) != 1)
    counts = np.diff(np.append(starts, len(pages)))
    return np.stack([pages[starts].astype("<u4"), counts.astype("<u4")], axis=1)


def _pages_of_runs(data: bytes, page_count: int) -> Pages:
    """Read ``_runs``.

    Raises:
        RemoteProtocolError: The runs overlap, are out of order, or leave memory.
    """
    if len(data) % 8:
        raise MessageError(f"{_WHERE}.balloon", "runs of 8 bytes", f"{len(data)} bytes")
    runs = np.frombuffer(data, "<u4").reshape(-1, 2).astype(np.int64)
    ends = runs.sum(axis=1)
    apart = bool((runs[1:, 0] > ends[:-1]).all()) and bool((runs[:, 1] > 0).all())
    if len(runs) and not (apart and ends[-1] <= page_count):
        raise MessageError(f"{_WHERE}.balloon", f"runs below page {page_count}", "others")
    lengths = runs[:, 1]
    # Within each run count up from its first page.
    before = np.cumsum(lengths) - lengths
    steps = np.arange(lengths.sum()) - np.repeat(before, lengths)
    pages: Pages = (np.repeat(runs[:, 0], lengths) + steps).astype(np.uint32)
    return pages

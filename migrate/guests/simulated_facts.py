"""What a simulated side says of its machine, and whom it can talk to: another simulated side."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from migrate.qemu.preflight import Difference, Severity
from migrate.simulation.guest import SimulatedGuest
from migrate.simulation.profile import Profile
from migrate.simulation.virtio.device import VirtioDevice
from migrate.units import NS_PER_S
from proto.errors import MessageError
from proto.link.fields import VM_ID
from proto.virtqueue import VirtioDeviceState

COUNTS_EVENT: Final = "simulated device"
"""Trace event with everything that one device counted."""

SETTLE_NS: Final = NS_PER_S
"""Guest time in which what was asked for is answered; a lost packet is sent again after 200 ms."""

FACTS_VERSION: Final = 1
"""Of everything that two simulated sides must agree on besides the link protocol."""


def simulated_facts(**more: object) -> dict[str, Any]:
    """Facts of a simulated machine; ``more`` is for people."""
    return {"kind": "simulated", "version": FACTS_VERSION, **more}


def simulated_vm_id(profile: Profile) -> str | None:
    """Identity of a simulated guest; ``None`` if its profile's name is none for that."""
    vm_id = f"{profile.name}-{profile.seed}"
    try:
        VM_ID("profile", vm_id)
    except MessageError:
        return None
    return vm_id


def is_simulated(facts: Mapping[str, Any] | None) -> bool:
    """Whether facts are those of a simulated machine; those of a QEMU name no kind."""
    return facts is not None and facts.get("kind") == "simulated"


def compare_simulated(
    source: Mapping[str, Any] | None, destination: Mapping[str, Any] | None
) -> Iterator[Difference]:
    """Compare two machines of which at least one is simulated; None = a QEMU nobody can ask."""
    if not is_simulated(destination):
        text = (
            "the source is a simulated guest, which no QEMU can load: start migrate-dst with "
            "--simulate"
        )
        yield Difference(Severity.ERROR, text)
    elif not is_simulated(source):
        text = (
            "the destination takes a simulated guest, and the source is a QEMU: start "
            "migrate-dst with a QEMU"
        )
        yield Difference(Severity.ERROR, text)
    elif source is not None and source.get("version") != FACTS_VERSION:
        text = f"simulated guests of version {FACTS_VERSION}: the source has another version"
        yield Difference(Severity.ERROR, text)


def simulated_virtio(guest: SimulatedGuest) -> tuple[VirtioDeviceState, ...]:
    """Describe a guest's virtio devices like those of a QEMU."""
    return tuple(d.device_state() for d in guest.devices if isinstance(d, VirtioDevice))


def settled_counts(guest: SimulatedGuest) -> Iterator[dict[str, Any]]:
    """Let a guest at its end answer what it was asked, and tell what each device counted.

    Guest time passes at once. What is outstanding afterwards is lost.
    """
    for device in guest.devices:
        device.drain()
    guest.resume()
    guest.run_until(guest.queue.now_ns + SETTLE_NS)
    guest.stop()
    for device in guest.devices:
        yield {"device": device.name, "kind": device.kind, "counts": device.statistics()}

"""The guests of comparisons, by name, and the options that change their sizes."""

import argparse
from dataclasses import dataclass, replace
from typing import Final

from migrate.lab.guest_vm import Workload
from migrate.units import GIB, KIB, MIB, parse_size

ODD_KIB: Final = 8
"""On top of whole MiB: QEMU 7.2 under TCG loses dirty pages of RAM in whole 256 KiB."""

CHECK_PAGES_PER_S: Final = 2000


@dataclass(frozen=True, slots=True)
class GuestKind:
    """A guest to be migrated.

    Attributes:
        summary: What it is, for people.
        workload: What it does. Its ``device_mib`` are pages of this machine's files.
        ram_kib: Guest RAM.
        prealloc: Whether the source's RAM is all there from the start, like that of a guest that
            has run for long.
    """

    summary: str
    workload: Workload
    ram_kib: int = GIB // KIB + ODD_KIB
    prealloc: bool = True


def _workload(
    *,
    files_mib: int = 0,
    wws_mib: int = 0,
    writes: int = 0,
    touch: int = 64,
    rewrite: str = "random",
) -> Workload:
    return Workload(
        static_mib=0,
        device_mib=files_mib,
        wws_mib=wws_mib,
        rate_pages_per_s=writes,
        touch_bytes=touch,
        rewrite=rewrite,
        check_pages_per_s=CHECK_PAGES_PER_S,
    )


def _generated(static_mib: int, *, random: int = 0, half: int = 0, writes: int = 0) -> Workload:
    return Workload(
        static_mib=static_mib,
        random=random,
        text=0,
        zero=0,
        file=0,
        half=half,
        wws_mib=64 if writes else 16,
        rate_pages_per_s=writes,
        touch_bytes=4096,
        check_pages_per_s=CHECK_PAGES_PER_S,
    )


def _growing(gib: int) -> GuestKind:
    return GuestKind(
        f"{gib} GiB of RAM, {64 * gib} MiB of it pages of files, the rest zero",
        _workload(files_mib=64 * gib),
        gib * GIB // KIB + ODD_KIB,
        prealloc=False,  # two guests of 8 GiB would not fit on small machines
    )


GUESTS: Final = {
    "idle": GuestKind("512 MiB of pages of files, no writes", _workload(files_mib=512)),
    "hot": GuestKind(
        "128 MiB of pages of files, 20,000 page writes/s of 64 random bytes in 64 MiB",
        _workload(files_mib=128, wws_mib=64, writes=20_000),
    ),
    "rewrite": GuestKind(
        "128 MiB of pages of files, 4,000 whole pages/s of half-random content in 64 MiB",
        _workload(files_mib=128, wws_mib=64, writes=4_000, touch=4096, rewrite="half"),
    ),
    "random": GuestKind(
        "512 MiB incompressible, 2,000 whole incompressible pages/s in 64 MiB of it",
        _generated(448, random=100, writes=2_000),
    ),
    "half": GuestKind(
        "512 MiB of pages that are half random, half text, 16 MiB random, no writes",
        _generated(512, half=100),
    ),
    **{f"grow-{gib}": _growing(gib) for gib in (1, 2, 4, 8)},
}


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``resized`` takes."""
    add = parser.add_argument
    add("--ram", metavar="SIZE", help="guest RAM instead of what the guest has")
    add("--content", metavar="SIZE", help="likewise its memory that does not change")
    add("--working-set", metavar="SIZE", help="likewise the memory that it writes")


def resized(kind: GuestKind, options: argparse.Namespace) -> GuestKind:
    """Return the guest with the sizes that were asked for.

    Raises:
        ValueError: Something that is no size.
    """
    workload = kind.workload
    if options.content is not None:
        mib = parse_size(options.content) // MIB
        workload = (
            replace(workload, device_mib=mib)
            if workload.device_mib
            else replace(workload, static_mib=mib)
        )
    if options.working_set is not None and workload.wws_mib:
        workload = replace(workload, wws_mib=parse_size(options.working_set) // MIB)
    ram_kib = kind.ram_kib
    if options.ram is not None:
        ram_kib = parse_size(options.ram) // KIB
        if ram_kib % 256 == 0:
            ram_kib += ODD_KIB
    return replace(kind, workload=workload, ram_kib=ram_kib)

"""Small guests of chance: 4 to 16 MiB, with devices of one family or of all kinds."""

from collections.abc import Mapping
from typing import Any, Final

from hypothesis import strategies as st

from migrate.simulation.profile import FIRST_AREA, Profile, read_profile
from migrate.units import MIB
from proto.guest_events import PAGE_SIZE
from tests.model.migration_model import BALLOON_PAGES, SCRATCH_PAGES

AREA_BYTES: Final = 256 << 10

Options = Mapping[str, st.SearchStrategy[Any]]

_VIRTIO: Final[Options] = {
    "event_idx": st.booleans(),
    "indirect": st.booleans(),
    "kick_us": st.sampled_from([0, 1, 40]),
    "interrupt_us": st.sampled_from([0, 2, 60]),
}
_CLIENT: Final[Options] = {
    "mode": st.sampled_from(["open", "closed"]),
    "arrivals": st.sampled_from(["poisson", "fixed"]),
    "rate_per_s": st.sampled_from([300.0, 3000.0]),
    "users": st.integers(1, 6),
    "think_us": st.sampled_from([400, 2000]),
    "wire_us": st.sampled_from([0, 30, 300]),
    "workers": st.integers(1, 3),
    "service_us": st.sampled_from([0, 50, 800]),
    "accept_queue": st.sampled_from([1, 3, 64]),
    "backlog_packets": st.sampled_from([1, 6, 64]),
    "transmit_us": st.sampled_from([0, 20]),
    "resend_ms": st.just(3),
    "max_outstanding": st.just(32),
    "request_bytes": st.sampled_from([16, 300]),
    "response_bytes": st.sampled_from([16, 900]),
}
_NET: Final[Options] = {
    **_VIRTIO,
    **_CLIENT,
    "queue_size": st.sampled_from([4, 8, 32]),
    "batch": st.integers(1, 3),
    "control_ms": st.sampled_from([0, 0.7]),
}
_DISK: Final[Options] = {
    "blocks": st.sampled_from([1, 5, 60]),
    "depth": st.integers(1, 6),
    "think_us": st.sampled_from([300, 900]),
    "latency_us": st.sampled_from([20, 500]),
    "read_share": st.sampled_from([0.0, 0.5, 1.0]),
    "flush_every": st.sampled_from([0, 3, 7]),
    "flush_us": st.sampled_from([20, 900]),
    "jitter": st.sampled_from([0, 1]),
}
_BLK: Final[Options] = {
    **_VIRTIO,
    **_DISK,
    "queue_size": st.sampled_from([8, 32]),
    "block_bytes": st.sampled_from([512, 4096, 8192]),
}
_BALLOON: Final[Options] = {
    **_VIRTIO,
    "queue_size": st.sampled_from([2, 8]),
    "page_count": st.just(BALLOON_PAGES),
    "targets": st.lists(st.integers(0, BALLOON_PAGES + 20), min_size=1, max_size=6).map(
        lambda pages: [[1 + i * 1.3, count] for i, count in enumerate(pages)]
    ),
    "chunk_pages": st.sampled_from([1, 9, 256]),
    "chunk_us": st.sampled_from([20, 150]),
    "stats_ms": st.sampled_from([0, 0.6]),
}
_CONSOLE: Final[Options] = {
    **_VIRTIO,
    "queue_size": st.sampled_from([2, 8]),
    "line_ms": st.sampled_from([0.2, 1.5]),
    "lines_at_once": st.integers(1, 4),
    "input_ms": st.sampled_from([0, 0.6]),
}
_NIC: Final[Options] = {
    **_CLIENT,
    "exit_us": st.sampled_from([1, 5]),
    "rx_fifo": st.sampled_from([1, 4, 16]),
    "tx_slots": st.sampled_from([1, 8]),
}
_EMULATED_DISK: Final[Options] = {
    **_DISK,
    "exit_us": st.sampled_from([1, 5]),
    "block_bytes": st.sampled_from([512, 2048]),
}

DEVICES: Final[Mapping[str, tuple[str, Options]]] = {
    "net": ("virtio-net", {**_NET, "packed": st.just(False)}),
    "packed net": ("virtio-net", {**_NET, "packed": st.just(True)}),
    "vhost net": ("virtio-net", {**_NET, "packed": st.booleans(), "vhost": st.just(True)}),
    "blk": ("virtio-blk", {**_BLK, "vhost": st.booleans()}),
    "balloon": ("virtio-balloon", _BALLOON),
    "console": ("virtio-console", _CONSOLE),
    "nic": ("nic", _NIC),
    "disk": ("disk", _EMULATED_DISK),
}

FAMILIES: Final[Mapping[str, tuple[str, ...]]] = {
    "vcpus": (),
    "net": ("net",),
    "packed net": ("packed net",),
    "vhost": ("vhost net",),
    "blk": ("blk",),
    "balloon": ("balloon", "console"),
    "emulated": ("nic", "disk"),
    "all": ("vhost net", "blk", "balloon", "console", "nic"),
}
"""Which devices the guests of a family have."""

contents = st.sampled_from(
    [
        {"random": 0.1, "text": 0.2, "repeated": 0.2, "half": 0.1},
        {"random": 0.9},
        {"text": 0.6, "repeated": 0.4},
        {"repeated": 0.1},
        {},
    ]
)
phases = st.fixed_dictionaries(
    {
        "duration": st.sampled_from(["1ms", "6ms", "40ms"]),
        "rate": st.sampled_from([0, 500, 20_000]),
        "locality": st.sampled_from(["uniform", "zipf", "sequential"]),
        "bytes_per_write": st.sampled_from([1, 64, 200, 4096]),
        "content": st.sampled_from(["random", "text", "zero"]),
        "working_set": st.sampled_from(["4KiB", "64KiB", "256KiB"]),
    }
)
vcpus = st.lists(
    st.builds(lambda of: {"phases": of}, st.lists(phases, min_size=1, max_size=3)), max_size=2
)


@st.composite
def profiles(draw: st.DrawFn, family: str, *, ram_mib: int | None = None) -> Profile:
    """Draw a guest of one of ``FAMILIES``."""
    kinds = FAMILIES[family]
    ram_bytes = (ram_mib or draw(st.sampled_from([4, 4, 4, 4, 4, 4, 6, 16]))) * MIB
    spare_page = ram_bytes // PAGE_SIZE - SCRATCH_PAGES - BALLOON_PAGES
    devices = []
    for at, name in enumerate(kinds):
        kind, options = DEVICES[name]
        device = {**draw(st.fixed_dictionaries(dict(options))), "kind": kind}
        if kind == "virtio-balloon":
            device["first_page"] = spare_page
        devices.append({**device, "name": f"{name}.{at}", "area": f"{AREA_BYTES >> 10}KiB"})
    assert FIRST_AREA + len(kinds) * AREA_BYTES + MIB <= ram_bytes
    return read_profile(
        {
            "name": family,
            "ram": f"{ram_bytes // MIB}MiB",
            "seed": draw(st.integers(0, 2**32 - 1)),
            "warm_up": draw(st.sampled_from(["0ms", "3ms"])),
            "content": draw(contents),
            "vcpus": draw(vcpus),
            "devices": devices,
        }
    )

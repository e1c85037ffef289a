"""Two network namespaces joined by a veth pair: a link of known rate on one machine.

Owns the namespaces, the shaping (token bucket filter at both ends) and the byte counters. What
runs in the namespaces is somebody else's; it must have ended before the pair is removed.
"""

import contextlib
import ctypes
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from migrate.errors import GuestError, GuestOn, ParamsError

CLONE_NEWNET: Final = 0x40000000
NAMESPACE_FILES: Final = Path("/run/netns")
NAME: Final = re.compile(r"migrate-lab-(\d+)-(?:src|dst)")
NETWORK: Final = "10.77.1.0"
PREFIX_LENGTH: Final = 24

SMALLEST_BURST_BYTES: Final = 256 << 10
"""Four of TCP's largest segments (64 KiB): a smaller bucket makes tbf cut every one of them up."""

BURST_S: Final = 0.002
"""A bucket of 2 ms at full rate, so that a late timer does not cost throughput at 10 Gbit/s."""

QUEUE_S: Final = 0.02
"""Time the queue before the bucket may hold back a packet: a switch with little buffer."""

BLAST_CHUNK_BYTES: Final = 1 << 20
BLAST_PORT: Final = 7002


@dataclass(frozen=True, slots=True)
class Namespace:
    """One end of the link.

    Attributes:
        name: As ``ip netns`` knows it.
        interface: Its end of the veth pair.
        address: IPv4 address of that end.
    """

    name: str
    interface: str
    address: str

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs ``argv`` in the namespace; it keeps its process id."""
        return ["ip", "netns", "exec", self.name, *argv]

    def write_launcher(self, path: Path, program: Path) -> Path:
        """Write a script that becomes ``program`` in the namespace, for who takes only a path."""
        path.write_text(f'#!/bin/sh\nexec ip netns exec {self.name} "{program}" "$@"\n')
        path.chmod(0o700)
        return path

    async def sent_bytes(self) -> int:
        """Return what left on the link so far: TCP/IP headers included, retransmissions too.

        The kernel counts a large segment before it is cut into packets, so the headers of the
        packets it becomes are not in it (about 4 % at 1500 bytes).
        """
        links: list[dict[str, Any]] = json.loads(
            await _run("ip", "-n", self.name, "-s", "-j", "link", "show", "dev", self.interface)
        )
        return int(links[0]["stats64"]["tx"]["bytes"])

    async def shape(self, rate_bytes_per_s: int | None) -> None:
        """Limit what leaves here; ``None`` lifts the limit."""
        if rate_bytes_per_s is None:
            # Fails where there is no limit, which is what is wanted.
            with contextlib.suppress(GuestError):
                await _run("tc", "-n", self.name, "qdisc", "del", "dev", self.interface, "root")
            return
        burst_bytes = max(SMALLEST_BURST_BYTES, int(rate_bytes_per_s * BURST_S))
        limit_bytes = burst_bytes + int(rate_bytes_per_s * QUEUE_S)
        await _run(
            *("tc", "-n", self.name, "qdisc", "replace", "dev", self.interface, "root", "tbf"),
            *("rate", f"{rate_bytes_per_s * 8}bit"),
            *("burst", str(burst_bytes), "limit", str(limit_bytes)),
        )  # fmt: skip

    def open_socket(self) -> socket.socket:
        """Return a TCP socket that lives in the namespace, whatever thread uses it."""
        made: list[socket.socket | OSError] = []
        # A thread of its own, which ends: a thread cannot be trusted to come back.
        thread = threading.Thread(target=self._open_socket_there, args=(made,))
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise GuestError(
                f"cannot enter {self.name}: {made[0]}", guest_on=GuestOn.NEITHER
            ) from made[0]
        return made[0]

    def _open_socket_there(self, made: list[socket.socket | OSError]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            with (NAMESPACE_FILES / self.name).open("rb") as namespace:
                if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            made.append(socket.socket())
        except OSError as error:
            made.append(error)


@dataclass(frozen=True, slots=True)
class NetnsPair:
    """A link from ``source`` to ``destination``; from ``netns_pair``."""

    source: Namespace
    destination: Namespace

    async def shape(self, rate_bytes_per_s: int | None) -> None:
        """Give the link a rate in each direction; ``None``: as fast as the machine."""
        for end in (self.source, self.destination):
            await end.shape(rate_bytes_per_s)

    async def measure_bytes_per_s(self, seconds: float) -> float:
        """Return what one TCP connection gets through the link, measured over ``seconds``."""
        received = [0]
        listener = trio.socket.from_stdlib_socket(self.destination.open_socket())
        sender = trio.socket.from_stdlib_socket(self.source.open_socket())
        with listener, sender:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await listener.bind((self.destination.address, BLAST_PORT))
            listener.listen(1)
            await sender.connect((self.destination.address, BLAST_PORT))
            receiver, _ = await listener.accept()
            with receiver:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_send_forever, sender)
                    nursery.start_soon(_count, receiver, received)
                    await trio.sleep(seconds / 4)  # past the bucket and the slow start
                    before, started_s = received[0], trio.current_time()
                    await trio.sleep(seconds)
                    rate = (received[0] - before) / (trio.current_time() - started_s)
                    nursery.cancel_scope.cancel()
        return rate


async def _send_forever(sock: trio.socket.SocketType) -> None:
    data = bytes(BLAST_CHUNK_BYTES)
    while True:
        await sock.send(data)


async def _count(sock: trio.socket.SocketType, received: list[int]) -> None:
    buffer = bytearray(BLAST_CHUNK_BYTES)
    while n_bytes := await sock.recv_into(buffer):
        received[0] += n_bytes


@asynccontextmanager
async def netns_pair(*, congestion_control: str | None = None) -> AsyncIterator[NetnsPair]:
    """Make the two namespaces and the link; remove them on every way out.

    What a killed run left behind is removed first.

    Args:
        congestion_control: TCP's on this link, whatever the machine's default is. It matters:
            ``bbr`` paces, and gets a third of what ``cubic`` does through an unlimited link.

    Raises:
        ParamsError: Not root, or a tool is missing.
        GuestError: The kernel refused.
    """
    if os.geteuid() != 0:
        raise ParamsError("network namespaces need root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise ParamsError(f"no '{tool}' on this machine (apt-get install iproute2)")
    await _remove_abandoned()
    stem = f"migrate-lab-{os.getpid()}"
    pair = NetnsPair(
        Namespace(f"{stem}-src", "link-src", "10.77.1.1"),
        Namespace(f"{stem}-dst", "link-dst", "10.77.1.2"),
    )
    try:
        await _create(pair, congestion_control)
        yield pair
    finally:
        with trio.CancelScope(shield=True):
            for end in (pair.source, pair.destination):
                await _delete(end.name)


async def _create(pair: NetnsPair, congestion_control: str | None) -> None:
    source, destination = pair.source, pair.destination
    for end in (source, destination):
        await _run("ip", "netns", "add", end.name)
    await _run(
        *("ip", "-n", source.name, "link", "add", source.interface, "type", "veth"),
        *("peer", "name", destination.interface, "netns", destination.name),
    )  # fmt: skip
    for end in (source, destination):
        address = f"{end.address}/{PREFIX_LENGTH}"
        await _run("ip", "-n", end.name, "addr", "add", address, "dev", end.interface)
        await _run("ip", "-n", end.name, "link", "set", "lo", "up")
        await _run("ip", "-n", end.name, "link", "set", end.interface, "up")
        if congestion_control is not None:
            # By route: a namespace may only choose its default among what the machine allows to
            # unprivileged processes.
            await _run(
                *("ip", "-n", end.name, "route", "replace", f"{NETWORK}/{PREFIX_LENGTH}"),
                *("dev", end.interface, "src", end.address, "congctl", congestion_control),
            )  # fmt: skip


async def _delete(name: str) -> None:
    # The veth pair goes with its namespaces. One that was never made cannot be deleted.
    with contextlib.suppress(GuestError):
        await _run("ip", "netns", "del", name)


async def _remove_abandoned() -> None:
    """Delete the namespaces of runs whose process is gone."""
    if not NAMESPACE_FILES.is_dir():
        return
    for path in NAMESPACE_FILES.iterdir():
        match = NAME.fullmatch(path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            await _delete(path.name)


async def _run(*command: str) -> str:
    done = await trio.run_process(
        command, capture_stdout=True, capture_stderr=True, check=False
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise GuestError(f"'{' '.join(command)}' failed: {said}", guest_on=GuestOn.NEITHER)
    return done.stdout.decode()

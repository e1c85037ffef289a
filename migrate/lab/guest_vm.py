"""Runs the lab guest in a QEMU of its own: argument list, console, and a sure end.

Source and destination of a migration must be the same machine, so both get their arguments from
``qemu_args``. It knows nothing of the engine: tests and experiments bring QMP and migration.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import STDOUT
from typing import Final

import trio

from migrate.errors import GuestError, GuestOn, ParamsError, QemuExitedError
from migrate.lab import guest_image
from migrate.lab.console import ConsoleLog, follow_console
from migrate.lab.guest_image import GuestImage
from migrate.lab.qemu_binaries import QemuBinary

CONNECT_RETRY_S: Final = 0.02
LONGEST_SOCKET_PATH_BYTES: Final = 107
KERNEL_ARGS: Final = (
    "console=ttyS0 quiet panic=-1 nokaslr mitigations=off no_timer_check tsc=reliable "
    "clocksource=tsc audit=0 apparmor=0 cryptomgr.notests random.trust_cpu=on "
    "transparent_hugepage=never"
)
"""Words that shorten the boot or make it steady under TCG; without huge pages, so that the
kernel writes no pages of its own accord to collapse them."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What the guest does, as ``tools/guest/workload.c`` takes it from the kernel command line.

    The shares are in percent of the static pages; what they leave below 100 is zero pages.

    Attributes:
        static_mib: Memory that is filled once and only checked afterwards.
        random: Share of pages that do not compress.
        text: Share of word-like pages.
        zero: Share of zero pages.
        file: Share of pages with bytes of real files.
        half: Share of pages that are half random, half text.
        duplicate: Share of pages that each equal many others.
        device_mib: More memory, filled once with the content of ``GuestConfig.content``.
        wws_mib: Writable working set.
        rate_pages_per_s: Page writes per second in it.
        touch_bytes: Bytes per page write; a multiple of 8 that divides 4096.
        rewrite: What is written: ``random``, ``counter``, ``half`` or ``text``.
        sequential: Write the pages in order instead of drawing them at random.
        heartbeat_hz: Heartbeat lines per second.
        check_pages_per_s: Speed of the self-check, 0 turns it off.
        disk_hz: Block writes (and as many reads) per second if the guest has a disk.
        address: IPv4 address with prefix length of the guest's network card.
        udp_port: Port of the UDP echo.
        seed: Of all content.
    """

    static_mib: int = 32
    random: int = 50
    text: int = 20
    zero: int = 10
    file: int = 20
    half: int = 0
    duplicate: int = 0
    device_mib: int = 0
    wws_mib: int = 8
    rate_pages_per_s: int = 500
    touch_bytes: int = 64
    rewrite: str = "random"
    sequential: bool = False
    heartbeat_hz: int = 200
    check_pages_per_s: int = 2000
    disk_hz: int = 20
    address: str = "10.77.0.2/24"
    udp_port: int = 7777
    seed: int = 1

    def kernel_args(self, *, disk: bool) -> str:
        """Return the words of the kernel command line that say all this."""
        values: dict[str, int | str] = {
            "static_mib": self.static_mib,
            "random": self.random,
            "text": self.text,
            "zero": self.zero,
            "file": self.file,
            "half": self.half,
            "duplicate": self.duplicate,
            "device_mib": self.device_mib,
            # By their addresses the writable disk comes first.
            "device": "/dev/vdb" if disk else "/dev/vda",
            "wws_mib": self.wws_mib,
            "rate": self.rate_pages_per_s,
            "touch": self.touch_bytes,
            "rewrite": self.rewrite,
            "sequential": int(self.sequential),
            "hb_hz": self.heartbeat_hz,
            "selfcheck": int(self.check_pages_per_s > 0),
            "check_rate": self.check_pages_per_s,
            "disk": int(disk),
            "disk_hz": self.disk_hz,
            "ip": self.address,
            "udp": 1,
            "udp_port": self.udp_port,
            "seed": self.seed,
        }
        return " ".join(f"wl.{name}={value}" for name, value in values.items())


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """One lab machine; the same for both ends of its migration.

    Attributes:
        ram_kib: Guest RAM, at least 96 MiB, and 72 MiB more than the workload owns. Keep it off
            multiples of 256 KiB with QEMU 7.2 under TCG, which loses dirty pages of such blocks.
        machine: QEMU machine type; one that both ends know.
        workload: What runs in the guest.
        disk: Raw image for ``/dev/vda``, shared by both ends; ``None``: no disk.
        content: Image that the guest reads ``Workload.device_mib`` from, shared by both ends.
        netdev: QEMU network backend without its id, e.g.
            ``tap,ifname=tap0,script=no,downscript=no``; ``None``: connected to nothing.
        prealloc: Take RAM from a backend that is allocated at start.
        smp: Virtual CPUs.
        cpu: QEMU CPU model; ``None``: QEMU's default.
        uuid: Machine UUID.
        mac: Address of the network card.
        kernel_args: More words for the guest's kernel command line.
        extra: More QEMU arguments.
    """

    ram_kib: int = 131080
    machine: str = "pc-q35-7.2"
    workload: Workload = field(default_factory=Workload)
    disk: Path | None = None
    content: Path | None = None
    netdev: str | None = None
    prealloc: bool = False
    smp: int = 1
    cpu: str | None = None
    uuid: str | None = None
    mac: str = "52:54:00:77:00:02"
    kernel_args: str = ""
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GuestPaths:
    """The files of one QEMU: sockets it listens on and logs it writes.

    Attributes:
        qmp: QMP sockets; each serves one client at a time.
        console: Socket of the guest's console (hvc0).
        serial: File with the kernel's messages.
        output: File with QEMU's own standard output and error.
    """

    qmp: tuple[Path, ...]
    console: Path
    serial: Path
    output: Path

    @classmethod
    def under(cls, folder: Path) -> "GuestPaths":
        """Return the usual names in ``folder``, with two QMP sockets."""
        return cls(
            qmp=(folder / "qmp0", folder / "qmp1"),
            console=folder / "console",
            serial=folder / "serial.log",
            output=folder / "qemu.log",
        )


@dataclass(frozen=True, slots=True)
class Guest:
    """A running QEMU with the lab guest in it.

    Attributes:
        config: What it was started with.
        binary: Which QEMU it is.
        process: The QEMU process; killed when ``running_guest`` ends.
        paths: Its sockets and logs.
        console: Its console, read all the time by a task.
    """

    config: GuestConfig
    binary: QemuBinary
    process: trio.Process
    paths: GuestPaths
    console: ConsoleLog

    def cpu_seconds(self) -> float:
        """Return the CPU time that QEMU used so far (user and system, all threads)."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8")
        user_ticks, system_ticks = stat.rpartition(")")[2].split()[11:13]
        return (int(user_ticks) + int(system_ticks)) / os.sysconf("SC_CLK_TCK")

    def output(self) -> str:
        """Return what QEMU printed so far."""
        return self.paths.output.read_text(encoding="utf-8", errors="replace")


def qemu_args(
    config: GuestConfig,
    *,
    image: GuestImage,
    qmp_paths: Sequence[Path],
    console_path: Path,
    serial_path: Path,
    accel: str = "tcg",
) -> list[str]:
    """Return QEMU's arguments, without the program and without ``-incoming``.

    Every device has an explicit address, so that both ends get the same machine whatever
    version of QEMU puts it together.
    """
    workload = config.workload.kernel_args(disk=config.disk is not None)
    append = f"{KERNEL_ARGS} {config.kernel_args} {workload}"
    args = ["-accel", accel, "-machine", _machine(config), "-smp", str(config.smp)]
    args += ["-m", f"{config.ram_kib}K", "-nodefaults", "-display", "none", "-no-reboot"]
    if config.prealloc:
        args += ["-object", f"memory-backend-ram,id=pc.ram,size={config.ram_kib}K,prealloc=on"]
    if config.cpu is not None:
        args += ["-cpu", config.cpu]
    if config.uuid is not None:
        args += ["-uuid", config.uuid]
    args += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", append]
    args += ["-serial", f"file:{serial_path}"]
    for path in qmp_paths:
        args += ["-qmp", f"unix:{path},server=on,wait=off"]
    args += _devices(config, console_path)
    return [*args, *config.extra]


def _machine(config: GuestConfig) -> str:
    return f"{config.machine},memory-backend=pc.ram" if config.prealloc else config.machine


def _devices(config: GuestConfig, console_path: Path) -> list[str]:
    backend = config.netdev or "hubport,hubid=0"
    args = ["-netdev", f"{backend},id=net0"]
    args += ["-device", f"virtio-net-pci,netdev=net0,mac={config.mac},addr=0x2,romfile="]
    args += ["-device", "virtio-balloon-pci,addr=0x4"]
    # Without an event notifier the vCPU thread itself writes out each line. With one, the
    # guest's driver spins until QEMU's main loop did it: 37 % of a core for 200 lines a second
    # (TCG, 2-core machine), against 10 %.
    args += ["-device", "virtio-serial-pci,id=serial0,addr=0x5,ioeventfd=off"]
    args += ["-chardev", f"socket,id=console,path={console_path},server=on,wait=off"]
    args += ["-device", "virtconsole,bus=serial0.0,chardev=console"]
    args += ["-object", "rng-random,id=rng0,filename=/dev/urandom"]
    args += ["-device", "virtio-rng-pci,rng=rng0,addr=0x6"]
    if config.disk is not None:
        args += _disk("disk0", config.disk, "addr=0x3", "")
    if config.content is not None:
        args += _disk("content", config.content, "addr=0x7", ",read-only=on")
    return args


def _disk(name: str, path: Path, address: str, mode: str) -> list[str]:
    args = ["-blockdev", f"driver=file,node-name={name}-file,filename={path}{mode}"]
    args += ["-blockdev", f"driver=raw,node-name={name},file={name}-file{mode}"]
    return [*args, "-device", f"virtio-blk-pci,drive={name},{address}"]


@contextlib.asynccontextmanager
async def running_guest(
    config: GuestConfig,
    binary: QemuBinary,
    workdir: Path,
    *,
    image: GuestImage | None = None,
    incoming: str | None = None,
    accel: str = "tcg",
) -> AsyncIterator[Guest]:
    """Start QEMU, follow its console, and kill it at the end whatever happens.

    On entry QEMU listens on all its sockets; the guest boots (``console.wait_ready``).

    Args:
        config: The machine.
        binary: The QEMU to run.
        workdir: Existing folder for sockets and logs of this one QEMU; a short path.
        image: Kernel and initramfs; by default those in the cache.
        incoming: Value of ``-incoming`` (``defer``, ``unix:…``) for a destination.
        accel: QEMU accelerator.

    Raises:
        ParamsError: ``workdir`` is too long for a socket path.
        QemuExitedError: QEMU ended during its start.
    """
    paths = GuestPaths.under(workdir)
    if len(os.fsencode(paths.console)) > LONGEST_SOCKET_PATH_BYTES:
        raise ParamsError(f"path too long for a unix socket: {paths.console}")
    args = qemu_args(
        config,
        image=guest_image.locate() if image is None else image,
        qmp_paths=paths.qmp,
        console_path=paths.console,
        serial_path=paths.serial,
        accel=accel,
    )
    if incoming is not None:
        args += ["-incoming", incoming]
    with paths.output.open("wb") as output:
        process = await trio.lowlevel.open_process(
            [str(binary.path), *args], stdin=None, stdout=output, stderr=STDOUT
        )
    try:
        async with trio.open_nursery() as nursery:
            guest = Guest(config, binary, process, paths, ConsoleLog())
            await _follow_when_listening(nursery, guest)
            yield guest
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def _follow_when_listening(nursery: trio.Nursery, guest: Guest) -> None:
    """Start the console reader; nothing tells when QEMU listens, so try until it does."""
    while True:
        try:
            await nursery.start(follow_console, guest.paths.console, guest.console)
        except OSError:
            if (status := guest.process.poll()) is not None:
                said = guest.output().strip()[-400:]
                raise QemuExitedError(
                    f"QEMU ended with status {status} at its start: {said}",
                    guest_on=GuestOn.NEITHER,
                ) from None
            await trio.sleep(CONNECT_RETRY_S)
        else:
            return


def make_disk(path: Path, size_mib: int) -> Path:
    """Create a sparse raw image for ``GuestConfig.disk`` and return its path.

    Raises:
        GuestError: It cannot be created.
    """
    try:
        with path.open("wb") as image:
            image.truncate(size_mib << 20)
    except OSError as error:
        raise GuestError(f"cannot create {path}: {error}", guest_on=GuestOn.NEITHER) from error
    return path

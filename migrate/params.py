"""What one run of ``migrate-src`` or ``migrate-dst`` was asked to do: frozen and checked.

Owns the meaning and the limits of every option; knows nothing of argparse, which is one way to
build these (``migrate.cli.options``). Tests and experiments build them directly.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from migrate.channel_params import check_channels
from migrate.checkpoint.params import CheckpointParams, needs_vm_id
from migrate.errors import ParamsError
from migrate.link_security import UNPROTECTED, LinkSecurity
from migrate.simulation.profile import Profile
from migrate.timeouts import DEFAULTS, Timeouts
from migrate.units import GIB, KIB, MIB, size_text
from proto.guest_events import PAGE_SIZE
from proto.limits import MAX_STREAMS

MAX_CACHE_BYTES: Final = 64 * GIB
"""Slot numbers are 32-bit; and a cache larger than this is a typing mistake."""

DEFAULT_CACHE_BYTES: Final = 256 * MIB
"""Nobody knows before where in a guest the pages are that it writes again and again: what is kept
of the bulk round decides whether they travel whole a second time (``docs/performance.md``, Deltas).
Only what is kept is allocated."""

MIN_BANDWIDTH_BPS: Final = 12_500
"""100 kbit/s: below it not even the guest's idle dirtying can be sent."""

MAX_DOWNTIME_LIMIT_MS: Final = 2_000_000
"""QEMU refuses a ``downtime-limit`` above 2000 seconds."""

DEFAULT_RUN_FOR_S: Final = 1.0
MAX_RUN_FOR_S: Final = 3600
"""A simulated guest ends with its command; an hour is longer than any experiment."""

MIN_BALLOON_BYTES: Final = 16 * MIB
"""No kernel lives in less."""

MAX_UNIX_PATH_BYTES: Final = 107
"""``sun_path`` holds 108 bytes with the closing zero on Linux."""

MAX_PROBE_RATE_PER_S: Final = 2000
"""A probe is there to watch a service, not to load it, nor the engine beside it."""

MAX_PROBE_BEFORE_S: Final = 60.0
"""The other side waits for the migration meanwhile."""

MAX_ZSTD_LEVEL: Final = 19
"""Levels 20-22 want hundreds of MiB per encoder and are never faster than the link."""

CompressMode = Literal["auto", "none", "lz4", "zstd", "words"]
CommitMode = Literal["auto", "relay"]
LandingMode = Literal["auto", "never"]
AfterMode = Literal["keep", "quit"]

_REFUSED_QEMU_OPTIONS: Final = {
    "daemonize": "migrate-dst must stay the parent of the QEMU it starts",
    "incoming": "migrate-dst adds '-incoming defer' itself",
}


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """A TCP endpoint.

    Attributes:
        host: Name or address, IPv6 without brackets; never empty.
        port: 0 to 65535; 0 means "any free port" and only makes sense for listening.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        if not self.host:
            raise ParamsError(f"expected HOST:PORT, got no host before port {self.port}")
        if not 0 <= self.port <= 65535:
            raise ParamsError(f"expected a port from 0 to 65535, got {self.port}")

    @classmethod
    def parse(cls, text: str) -> "LinkAddress":
        """Read ``HOST:PORT`` or ``[IPV6]:PORT``.

        Raises:
            ParamsError: Anything else.
        """
        host, colon, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ParamsError(f"expected [ADDRESS]:PORT for an IPv6 address, got '{text}'")
        if not colon or not port.isascii() or not port.isdecimal() or len(port) > 5:
            raise ParamsError(f"expected HOST:PORT, got '{text}'")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket on this host; the path fits what the kernel allows."""

    path: Path

    def __post_init__(self) -> None:
        _check_socket_path(self.path, "socket")

    def __str__(self) -> str:
        return f"unix:{self.path}"


SocketAddress = LinkAddress | UnixAddress
"""Where a QEMU speaks its migration stream: ``tcp:HOST:PORT`` or ``unix:PATH``."""


def parse_socket_address(text: str) -> SocketAddress:
    """Read ``tcp:HOST:PORT`` or ``unix:PATH``, the forms QEMU's own ``migrate`` takes.

    Raises:
        ParamsError: Anything else.
    """
    scheme, _, rest = text.partition(":")
    if scheme == "tcp":
        return LinkAddress.parse(rest)
    if scheme == "unix" and rest:
        return UnixAddress(Path(rest))
    raise ParamsError(f"expected tcp:HOST:PORT or unix:PATH, got '{text}'")


@dataclass(frozen=True, slots=True)
class ProbeTarget:
    """A UDP echo service of the guest, and how often to ask it.

    Attributes:
        address: Where clients reach it, before the migration and after it.
        rate_per_s: Requests per second, 1 to ``MAX_PROBE_RATE_PER_S``.
    """

    address: LinkAddress
    rate_per_s: int = 200

    def __post_init__(self) -> None:
        if self.address.port == 0:
            raise ParamsError(f"--probe needs the port of the service, got {self.address}")
        if not 1 <= self.rate_per_s <= MAX_PROBE_RATE_PER_S:
            raise ParamsError(
                f"expected a probe rate from 1 to {MAX_PROBE_RATE_PER_S} a second, "
                f"got {self.rate_per_s}"
            )

    @classmethod
    def parse(cls, text: str) -> "ProbeTarget":
        """Read ``udp:HOST:PORT`` or ``udp:HOST:PORT,rate=N``.

        Raises:
            ParamsError: Anything else.
        """
        where, comma, option = text.partition(",")
        scheme, _, address = where.partition(":")
        name, _, value = option.partition("=")
        good_rate = value.isascii() and value.isdecimal() and len(value) <= 9
        if scheme != "udp" or (comma and not (name == "rate" and good_rate)):
            raise ParamsError(f"expected udp:HOST:PORT[,rate=N], got '{text}'")
        rate = {"rate_per_s": int(value)} if comma else {}
        return cls(LinkAddress.parse(address), **rate)

    def __str__(self) -> str:
        return f"udp:{self.address}"


@dataclass(frozen=True, slots=True)
class Compress:
    """How page content is compressed.

    Attributes:
        mode: ``auto`` measures link and encoders and moves between the others.
        level: zstd's level, 1 to ``MAX_ZSTD_LEVEL``; ``None`` for every other mode.
    """

    mode: CompressMode = "auto"
    level: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(CompressMode):
            raise ParamsError(
                f"expected auto, none, lz4, zstd[:LEVEL] or words, got '{self.mode}'"
            )
        if self.level is not None and self.mode != "zstd":
            raise ParamsError(f"only zstd takes a level, got '{self.mode}:{self.level}'")
        if self.mode == "zstd" and not 1 <= (self.level or 0) <= MAX_ZSTD_LEVEL:
            raise ParamsError(
                f"expected a zstd level from 1 to {MAX_ZSTD_LEVEL}, got {self.level}"
            )

    @classmethod
    def parse(cls, text: str) -> "Compress":
        """Read ``auto``, ``none``, ``lz4``, ``words``, ``zstd`` (level 1) or ``zstd:LEVEL``.

        Raises:
            ParamsError: Anything else.
        """
        mode, colon, level = text.partition(":")
        if colon and not (level.isascii() and level.isdecimal() and len(level) <= 2):
            raise ParamsError(f"expected a number after 'zstd:', got '{text}'")
        # The dataclass refuses what is not one of the modes.
        number = int(level) if colon else (1 if mode == "zstd" else None)
        return cls(mode, number)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.mode if self.level is None else f"{self.mode}:{self.level}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputParams:
    """What a command tells the user, and where.

    Attributes:
        report_path: JSON report is written here at the end; also on failure.
        html_path: The same as a self-contained page.
        trace_path: One JSON object a line while it runs.
        json: Print the JSON report on stdout instead of the summary.
        quiet: No progress on stderr; warnings, errors and the last line stay.
    """

    report_path: Path | None = None
    html_path: Path | None = None
    trace_path: Path | None = None
    json: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        paths = [p for p in (self.report_path, self.html_path, self.trace_path) if p]
        if len({os.path.abspath(p) for p in paths}) != len(paths):  # noqa: PTH100 - no disk access
            raise ParamsError("--report, --html and --trace must name different files")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceParams:
    """One run of ``migrate-src``.

    Attributes:
        to: Where ``migrate-dst`` listens.
        qmp: QMP socket of the source QEMU; exclusive with ``gateway``.
        gateway: Where we listen for a QEMU that its owner tells to migrate.
        simulate: Profile of a guest to simulate; exclusive with ``qmp`` and ``gateway``.
        gateway_owner: uid and gid of the unix gateway socket; ``None`` leaves them ours.
        gateway_mode: Permission bits of the unix gateway socket.
        downtime_limit_ms: How long the guest may stand still.
        max_bandwidth_bps: Bytes per second on the link; ``None`` = as much as it takes.
        local_channels: Connections beside the main one over which a QEMU driven by QMP gives its
            pages; 0 = none, None = as it is best.
        streams: Connections of the link, 1 to ``MAX_STREAMS``.
        compress: Codec of page content.
        cache_bytes: RAM for the page cache, on each side, or at the source alone where pages land;
            0 = none.
        balloon_bytes: What the guest is asked to keep of its memory during the migration; ``None``:
            nobody asks.
        commit: ``relay`` leaves the handover to whoever owns both monitors.
        hold_before_commit: Wait, both sides paused, for a key or SIGUSR1 before the commit.
        allow_inconsistent_rings: Hand over virtio rings that contradict their devices, with a
            warning.
        after: What becomes of the source QEMU after a success.
        state_dir: Where the handover is recorded; survives a crash of the host.
        connect_timeout_s: Seconds until giving up on reaching ``to``.
        probe: Service of the guest whose answers are watched; ``None`` = none.
        probe_before_s: Seconds to watch it before its migration.
        security: How the link is protected.
        timeouts: How long other processes are waited for.
        checkpoint: Where the guest's RAM is kept when it leaves; ``None`` = nowhere.
        vm_id: Identity of the VM; ``None`` = its UUID.
        output: Reports and progress.
    """

    to: LinkAddress
    qmp: Path | None = None
    gateway: SocketAddress | None = None
    simulate: Profile | None = None
    gateway_owner: tuple[int, int] | None = None
    gateway_mode: int = 0o600
    downtime_limit_ms: int = 300
    max_bandwidth_bps: int | None = None
    streams: int = 1
    local_channels: int | None = None
    compress: Compress = Compress()
    cache_bytes: int = DEFAULT_CACHE_BYTES
    balloon_bytes: int | None = None
    commit: CommitMode = "auto"
    hold_before_commit: bool = False
    allow_inconsistent_rings: bool = False
    after: AfterMode = "keep"
    state_dir: Path
    connect_timeout_s: float = 30.0
    probe: ProbeTarget | None = None
    probe_before_s: float = 1.0
    security: LinkSecurity = UNPROTECTED
    timeouts: Timeouts = DEFAULTS
    checkpoint: CheckpointParams | None = None
    vm_id: str | None = None
    output: OutputParams = OutputParams()

    def __post_init__(self) -> None:
        ways = (self.qmp, self.gateway, self.simulate)
        if sum(way is not None for way in ways) != 1:
            raise ParamsError("expected exactly one of --qmp, --gateway and --simulate")
        if self.qmp is not None:
            _check_socket_path(self.qmp, "--qmp")
        if self.to.port == 0:
            raise ParamsError(f"--to needs the port migrate-dst listens on, got {self.to}")
        self._check_gateway()
        self._check_limits()
        _check_positive(self.connect_timeout_s, "--connect-timeout")
        if self.probe is not None and self.simulate is not None:
            raise ParamsError(
                "--probe needs a real guest: simulated ones have their own clients"
            )
        if not 0 <= self.probe_before_s <= MAX_PROBE_BEFORE_S:
            raise ParamsError(
                f"expected --probe-before from 0s to {MAX_PROBE_BEFORE_S:.0f}s, "
                f"got {self.probe_before_s}s"
            )

    def _check_gateway(self) -> None:
        if self.checkpoint is not None and self.gateway is not None and self.vm_id is None:
            raise needs_vm_id("--gateway cannot ask the QEMU for a UUID")
        unix_gateway = isinstance(self.gateway, UnixAddress)
        if self.gateway_owner is not None and not unix_gateway:
            raise ParamsError("--gateway-owner only works with --gateway unix:PATH")
        if self.gateway_owner is not None and min(self.gateway_owner) < 0:
            raise ParamsError(f"expected a uid and a gid, got {self.gateway_owner}")
        if self.gateway_mode != 0o600 and not unix_gateway:
            raise ParamsError("--gateway-mode only works with --gateway unix:PATH")
        if not 0 <= self.gateway_mode <= 0o777:
            raise ParamsError(f"expected a mode from 000 to 777, got {self.gateway_mode:o}")
        if self.commit not in get_args(CommitMode):
            raise ParamsError(f"expected --commit auto or relay, got '{self.commit}'")
        if self.commit == "relay" and self.gateway is None:
            raise ParamsError("--commit relay needs --gateway: otherwise the engine commits")
        if self.commit == "relay" and self.hold_before_commit:
            raise ParamsError("--hold-before-commit does not work with --commit relay")
        if self.after not in get_args(AfterMode):
            raise ParamsError(f"expected --after keep or quit, got '{self.after}'")
        if self.after == "quit" and self.qmp is None:
            raise ParamsError("--after quit needs --qmp: no other way ends the source QEMU")

    def _check_limits(self) -> None:
        if not 1 <= self.downtime_limit_ms <= MAX_DOWNTIME_LIMIT_MS:
            raise ParamsError(
                f"expected --downtime-limit from 1ms to {MAX_DOWNTIME_LIMIT_MS // 1000}s, "
                f"got {self.downtime_limit_ms}ms"
            )
        bandwidth = self.max_bandwidth_bps
        if bandwidth is not None and bandwidth < MIN_BANDWIDTH_BPS:
            raise ParamsError(
                f"expected --max-bandwidth of at least 100kbit, got {bandwidth} B/s"
            )
        no_wish = "--qmp: a gateway takes what comes" if self.qmp is None else ""
        check_channels(self.local_channels, no_wish)
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ParamsError(f"expected --streams from 1 to {MAX_STREAMS}, got {self.streams}")
        _check_cache(self.cache_bytes, "--cache")
        if self.balloon_bytes is not None and self.qmp is None:
            raise ParamsError("--balloon needs --qmp: no other way asks a guest for memory")
        if self.balloon_bytes is not None and self.balloon_bytes < MIN_BALLOON_BYTES:
            raise ParamsError(
                f"--balloon is what the guest keeps, expected at least "
                f"{size_text(MIN_BALLOON_BYTES)}, got {size_text(self.balloon_bytes)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationParams:
    """One run of ``migrate-dst``.

    Attributes:
        listen: Where to wait for ``migrate-src``; port 0 takes any free one.
        qemu_argv: Command of the QEMU to start; exclusive with ``qmp`` and ``incoming``.
        qmp: QMP socket of a QEMU started with ``-incoming defer``.
        incoming: Where a QEMU already waits with ``-incoming``.
        simulate: Take in a simulated guest; exclusive with the three ways above.
        run_for_s: Seconds that a simulated guest lives here after the handover.
        cache_max_bytes: Largest page cache a source may ask for.
        landing: ``auto`` writes pages straight into the QEMU's RAM where that is possible.
        local_channels: Connections beside the main one over which a QEMU driven by QMP gets pages
            that do not land; 0 = none, None = as it is best.
        allow_inconsistent_rings: As for the source, for a guest whose source cannot check.
        state_dir: Where the handover is recorded; survives a crash of the host.
        run_dir: Where the sockets and logs of a QEMU that we start live; made with mode 0700.
        hello_timeout_s: Seconds a connection may take to introduce itself.
        security: How the link is protected.
        timeouts: How long other processes are waited for.
        checkpoint: Where the RAM of guests that left is kept; ``None`` = nothing is.
        vm_id: Identity of the VM that may come; ``None`` = its QEMU's UUID.
        output: Reports and progress.
    """

    listen: LinkAddress
    qemu_argv: tuple[str, ...] | None = None
    qmp: Path | None = None
    incoming: SocketAddress | None = None
    simulate: bool = False
    run_for_s: float = DEFAULT_RUN_FOR_S
    cache_max_bytes: int = 1 * GIB
    landing: LandingMode = "auto"
    local_channels: int | None = None
    allow_inconsistent_rings: bool = False
    state_dir: Path
    run_dir: Path
    hello_timeout_s: float = 10.0
    security: LinkSecurity = UNPROTECTED
    timeouts: Timeouts = DEFAULTS
    checkpoint: CheckpointParams | None = None
    vm_id: str | None = None
    output: OutputParams = OutputParams()

    def __post_init__(self) -> None:
        ways = (self.qemu_argv, self.qmp, self.incoming, self.simulate or None)
        if sum(way is not None for way in ways) != 1:
            raise ParamsError(
                "expected exactly one of '-- QEMU COMMAND', --qmp, --incoming and --simulate"
            )
        if not 0 <= self.run_for_s <= MAX_RUN_FOR_S:
            raise ParamsError(
                f"expected --run-for up to {MAX_RUN_FOR_S}s, got {self.run_for_s:g}s"
            )
        if self.run_for_s != DEFAULT_RUN_FOR_S and not self.simulate:
            raise ParamsError("--run-for only works with --simulate")
        if self.qemu_argv is not None:
            _check_qemu_argv(self.qemu_argv)
        if self.qmp is not None:
            _check_socket_path(self.qmp, "--qmp")
        if isinstance(self.incoming, LinkAddress) and self.incoming.port == 0:
            raise ParamsError(f"--incoming needs QEMU's port, got {self.incoming}")
        told = self.qemu_argv is not None or self.qmp is not None
        no_wish = "" if told else "'-- QEMU COMMAND' or --qmp: nobody else can be told"
        check_channels(self.local_channels, no_wish)
        if self.checkpoint is not None and self.incoming is not None and self.vm_id is None:
            raise needs_vm_id("--incoming cannot ask the QEMU for a UUID")
        _check_cache(self.cache_max_bytes, "--cache-max")
        _check_positive(self.hello_timeout_s, "--hello-timeout")


def default_state_dir(environ: Mapping[str, str], uid: int) -> Path:
    """Where handovers are recorded: a directory that a reboot does not empty."""
    if uid == 0:
        return Path("/var/lib/precopy")
    if environ.get("XDG_STATE_HOME"):
        return Path(environ["XDG_STATE_HOME"]) / "precopy"
    return Path(environ.get("HOME") or f"/tmp/precopy-{uid}") / ".local/state/precopy"


def default_run_dir(environ: Mapping[str, str], uid: int) -> Path:
    """Where sockets live: short enough for a unix socket path, private to the user."""
    if uid == 0:
        return Path("/run/precopy")
    if environ.get("XDG_RUNTIME_DIR"):
        return Path(environ["XDG_RUNTIME_DIR"]) / "precopy"
    return Path(f"/tmp/precopy-{uid}")


def _check_socket_path(path: Path, option: str) -> None:
    length = len(os.fsencode(path))
    if length > MAX_UNIX_PATH_BYTES:
        raise ParamsError(
            f"{option} path has {length} bytes, expected at most {MAX_UNIX_PATH_BYTES}: {path}"
        )
    if "\0" in str(path):
        raise ParamsError(f"{option} path holds a zero byte")


def _check_cache(n_bytes: int, option: str) -> None:
    if n_bytes != 0 and not 16 * PAGE_SIZE <= n_bytes <= MAX_CACHE_BYTES:
        raise ParamsError(
            f"expected {option} 0 or from {16 * PAGE_SIZE // KIB}KiB to "
            f"{size_text(MAX_CACHE_BYTES)}, got {size_text(n_bytes)}"
        )


def _check_positive(seconds: float, option: str) -> None:
    if not seconds > 0:
        raise ParamsError(f"expected {option} above zero, got {seconds:g}s")


def _check_qemu_argv(argv: tuple[str, ...]) -> None:
    if not argv or not argv[0]:
        raise ParamsError("expected a QEMU command behind '--', got nothing")
    for argument in argv[1:]:
        # QEMU takes its options with one dash or two.
        name = argument.removeprefix("-").removeprefix("-") if argument[:1] == "-" else ""
        if name in _REFUSED_QEMU_OPTIONS:
            reason = _REFUSED_QEMU_OPTIONS[name]
            raise ParamsError(f"leave out '{argument}' from the QEMU command: {reason}")

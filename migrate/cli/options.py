"""The command lines of ``migrate-src`` and ``migrate-dst``.

Turns arguments into ``migrate.params``; owns option names, help texts and how a mistake is
reported (one line on stderr, exit status 2). What a value may be is decided in ``params``.
"""

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from migrate.checkpoint.params import DEFAULT_MAX_BYTES, CheckpointParams, parse_vm_id
from migrate.cli.parsing import (
    add_output,
    add_reconnect,
    add_security,
    add_state_dir,
    add_timeouts,
    checked,
    link_security,
    make_parser,
    output_params,
    parse_ms,
    parse_seconds,
    timeouts_of,
)
from migrate.errors import ParamsError
from migrate.params import (
    Compress,
    DestinationParams,
    LinkAddress,
    ProbeTarget,
    SourceParams,
    default_run_dir,
    parse_socket_address,
)
from migrate.simulation.guest import SimulatedGuest
from migrate.simulation.profile import Profile, load_profile, shipped_names
from migrate.units import (
    parse_rate,
    parse_size,
    size_text,
)
from proto.limits import MAX_STREAMS

T = TypeVar("T")


def source_parser() -> argparse.ArgumentParser:
    """Build the parser of ``migrate-src``; ``parse_source`` is what commands use."""
    parser = make_parser(
        "migrate-src",
        "Migrate a running QEMU guest, or a simulated one, to where migrate-dst waits.",
        "Sizes are written 512MiB, rates 200Mbit, times 300ms or 5s. The exit status is 0 only "
        "when the guest is on the destination in the state it had.",
    )
    parser.add_argument(
        "--to", required=True, metavar="HOST:PORT", type=checked(LinkAddress.parse),
        help="where migrate-dst listens",
    )  # fmt: skip
    _add_source_ways(parser)
    _add_source_limits(parser)
    add_security(parser).add_argument(
        "--tls-hostname", metavar="NAME",
        help="the destination's name in its certificate, if not the one in --to",
    )  # fmt: skip
    _add_handover(parser)
    _add_probe(parser)
    _add_checkpoint(parser, "keep the guest's memory in DIR when it leaves")
    add_timeouts(parser)
    add_reconnect(parser, stopped=True)
    add_output(parser)
    return parser


def _add_source_ways(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "the guest (exactly one of --qmp, --gateway and --simulate)"
    )
    group.add_argument(
        "--qmp", metavar="SOCKET", type=Path,
        help="QMP socket of the running QEMU, which migrate-src then drives",
    )  # fmt: skip
    group.add_argument(
        "--gateway", metavar="ADDRESS", type=checked(parse_socket_address),
        help="listen on tcp:HOST:PORT or unix:PATH; whoever owns QEMU says 'migrate' to it",
    )  # fmt: skip
    group.add_argument(
        "--simulate", metavar="PROFILE", type=checked(_parse_profile),
        help="simulate a guest instead: a TOML file, or one of " + ", ".join(shipped_names()),
    )  # fmt: skip
    group.add_argument(
        "--gateway-owner", metavar="UID:GID", type=checked(_parse_owner),
        help="owner of the unix gateway socket, as numbers",
    )  # fmt: skip
    group.add_argument(
        "--gateway-mode", metavar="MODE", type=checked(_parse_mode), default="600",
        help="permission bits of the unix gateway socket, octal",
    )  # fmt: skip


def _add_source_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--downtime-limit", metavar="TIME", type=checked(parse_ms), default="300ms",
        help="how long the guest may stand still",
    )  # fmt: skip
    group.add_argument(
        "--max-bandwidth", metavar="RATE", type=checked(parse_rate),
        help="most the link may carry, e.g. 200Mbit or 25MB per second (default: no limit)",
    )  # fmt: skip
    group.add_argument(
        "--streams", metavar="N", type=int, default=1,
        help=f"connections to the destination, 1 to {MAX_STREAMS}; pages are striped over them",
    )  # fmt: skip
    group.add_argument(
        "--local-channels", metavar="N", type=checked(_parse_channels), default="auto",
        help="connections beside the main one that the source QEMU gives its pages over "
        "(multifd), 0 for none; auto decides by its version",
    )  # fmt: skip
    group.add_argument(
        "--compress", metavar="CODEC", type=checked(Compress.parse), default="auto",
        help="auto, none, lz4, zstd[:LEVEL] or words (for memory full of pointers); auto follows "
        "link, processor and content",
    )  # fmt: skip
    group.add_argument(
        "--cache", metavar="SIZE", type=checked(parse_size), default="256MiB",
        help="RAM for the page cache, also at the destination unless pages land; 0 for none",
    )  # fmt: skip
    group.add_argument(
        "--balloon", metavar="SIZE", type=checked(parse_size),
        help="have the guest's balloon driver give all memory back but SIZE for the migration "
        "(--qmp only)",
    )  # fmt: skip
    group.add_argument(
        "--connect-timeout", metavar="TIME", type=checked(parse_seconds), default="30s",
        help="how long to try to reach migrate-dst",
    )  # fmt: skip


def _add_handover(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the handover")
    group.add_argument(
        "--commit", choices=("auto", "relay"), default="auto",
        help="relay leaves the commit to whoever owns both monitors (gateway only)",
    )  # fmt: skip
    group.add_argument(
        "--hold-before-commit", action="store_true",
        help="wait, both sides paused, for a key or a signal before the commit",
    )  # fmt: skip
    group.add_argument(
        "--after", choices=("keep", "quit"), default="keep",
        help="what becomes of the source QEMU after a success",
    )  # fmt: skip
    _add_rings(group)
    add_state_dir(group)


def _add_probe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what a client of the guest notices")
    group.add_argument(
        "--probe", metavar="ADDRESS", type=checked(ProbeTarget.parse),
        help="udp:HOST:PORT[,rate=N] of an echo service in the guest: ask it N times a second "
        "(200), report answers, latencies and the gap",
    )  # fmt: skip
    group.add_argument(
        "--probe-before", metavar="TIME", type=checked(parse_seconds), default="1s",
        help="how long to ask it before the migration begins",
    )  # fmt: skip


def _add_destination_guest(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the destination's guest (exactly one way)")
    group.add_argument(
        "--qmp", metavar="SOCKET", type=Path,
        help="QMP socket of a QEMU that was started with -incoming defer",
    )  # fmt: skip
    group.add_argument(
        "--incoming", metavar="ADDRESS", type=checked(parse_socket_address),
        help="tcp:HOST:PORT or unix:PATH where a QEMU already waits with -incoming",
    )  # fmt: skip
    group.add_argument(
        "--simulate", action="store_true", help="take in a simulated guest, without a QEMU"
    )
    group.add_argument(
        "--run-for", metavar="TIME", type=checked(parse_seconds), default="1s",
        help="how long a simulated guest lives here after the handover",
    )  # fmt: skip
    group.add_argument(
        "--landing", choices=("auto", "never"), default="auto",
        help="auto: write pages straight into the QEMU's RAM where that is possible",
    )  # fmt: skip
    group.add_argument(
        "--local-channels", metavar="N", type=checked(_parse_channels), default="auto",
        help="connections beside the main one that the QEMU gets pages over which do not land "
        "(multifd), 0 for none, as auto chooses",
    )  # fmt: skip


def destination_parser() -> argparse.ArgumentParser:
    """Build the parser of ``migrate-dst``; ``parse_destination`` is what commands use."""
    parser = make_parser(
        "migrate-dst",
        "Wait for migrate-src and load the guest it sends into a QEMU on this host, or "
        "simulate it here.",
        "Everything behind '--' is the command of a QEMU to start, written as on the source; "
        "migrate-dst adds -S, -incoming defer and a QMP socket.",
        usage="migrate-dst --listen HOST:PORT [option ...]\n                   "
        "(-- QEMU COMMAND | --qmp SOCKET | --incoming ADDRESS | --simulate)",
    )
    parser.add_argument(
        "--listen", required=True, metavar="HOST:PORT", type=checked(LinkAddress.parse),
        help="where to wait for migrate-src; port 0 takes a free one and prints it",
    )  # fmt: skip
    _add_destination_guest(parser)
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--cache-max", metavar="SIZE", type=checked(parse_size), default="1GiB",
        help="largest page cache that a source may ask for",
    )  # fmt: skip
    group.add_argument(
        "--hello-timeout", metavar="TIME", type=checked(parse_seconds), default="10s",
        help="how long a new connection may take to introduce itself",
    )  # fmt: skip
    add_security(parser).add_argument(
        "--tls-authz", metavar="NAME", action="append",
        help="take only sources whose certificate has this name; may be repeated (default: all "
        "that the CA issued)",
    )  # fmt: skip
    group = parser.add_argument_group("the handover")
    _add_rings(group)
    add_state_dir(group)
    group.add_argument(
        "--run-dir", metavar="DIR", type=Path, default=default_run_dir(os.environ, os.getuid()),
        help="sockets and logs of a QEMU that migrate-dst starts",
    )  # fmt: skip
    _add_checkpoint(parser, "use what DIR has of the guest's memory from when it left")
    add_timeouts(parser)
    add_reconnect(parser, stopped=False)
    add_output(parser)
    return parser


def parse_source(argv: Sequence[str]) -> SourceParams:
    """Read the arguments of ``migrate-src`` (without the program's name).

    Raises:
        SystemExit: 2 with one line on stderr for a mistake; 0 after ``--help``, ``--version``.
    """
    parser = source_parser()
    options = parser.parse_args(argv)
    try:
        return SourceParams(
            to=options.to,
            qmp=options.qmp,
            gateway=options.gateway,
            simulate=options.simulate,
            gateway_owner=options.gateway_owner,
            gateway_mode=options.gateway_mode,
            downtime_limit_ms=options.downtime_limit,
            max_bandwidth_bps=options.max_bandwidth,
            streams=options.streams,
            local_channels=options.local_channels,
            compress=options.compress,
            cache_bytes=options.cache,
            balloon_bytes=options.balloon,
            commit=options.commit,
            hold_before_commit=options.hold_before_commit,
            allow_inconsistent_rings=options.allow_inconsistent_rings,
            after=options.after,
            state_dir=options.state_dir,
            connect_timeout_s=options.connect_timeout,
            probe=options.probe,
            probe_before_s=options.probe_before,
            security=link_security(options),
            timeouts=timeouts_of(options),
            checkpoint=_checkpoint(options),
            vm_id=options.vm_id,
            output=output_params(options),
        )
    except ParamsError as error:
        parser.error(str(error))


def parse_destination(argv: Sequence[str]) -> DestinationParams:
    """Read the arguments of ``migrate-dst``; what stands behind ``--`` is the QEMU command.

    Raises:
        SystemExit: As ``parse_source``.
    """
    ours, qemu_argv = list(argv), None
    if "--" in ours:
        cut = ours.index("--")
        ours, qemu_argv = ours[:cut], tuple(ours[cut + 1 :])
    parser = destination_parser()
    options = parser.parse_args(ours)
    try:
        return DestinationParams(
            listen=options.listen,
            qemu_argv=qemu_argv,
            qmp=options.qmp,
            incoming=options.incoming,
            simulate=options.simulate,
            run_for_s=options.run_for,
            cache_max_bytes=options.cache_max,
            landing=options.landing,
            local_channels=options.local_channels,
            allow_inconsistent_rings=options.allow_inconsistent_rings,
            state_dir=options.state_dir,
            run_dir=options.run_dir,
            hello_timeout_s=options.hello_timeout,
            security=link_security(options),
            timeouts=timeouts_of(options),
            checkpoint=_checkpoint(options),
            vm_id=options.vm_id,
            output=output_params(options),
        )
    except ParamsError as error:
        parser.error(str(error))


def _add_rings(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--allow-inconsistent-rings", action="store_true",
        help="hand over virtio rings that contradict their devices, with a warning",
    )  # fmt: skip


def _add_checkpoint(parser: argparse.ArgumentParser, what: str) -> None:
    group = parser.add_argument_group("old copies of the guest's memory")
    group.add_argument(
        "--checkpoint", metavar="DIR", type=Path,
        help=f"{what}; a directory of mode 700, the same for leaving and coming back",
    )  # fmt: skip
    group.add_argument(
        "--checkpoint-max", metavar="SIZE", type=checked(parse_size),
        default=size_text(DEFAULT_MAX_BYTES),
        help="most that DIR may take up on the disk; the oldest are removed",
    )  # fmt: skip
    group.add_argument(
        "--vm-id", metavar="ID", type=checked(parse_vm_id),
        help="whose memory it is (default: the VM's UUID)",
    )  # fmt: skip


def _checkpoint(options: argparse.Namespace) -> CheckpointParams | None:
    if options.checkpoint is None:
        return None
    return CheckpointParams(options.checkpoint, options.checkpoint_max)


def _parse_profile(text: str) -> Profile:
    """Read a profile and build its devices once: what they refuse is a wrong option."""
    profile = load_profile(text)
    try:
        with contextlib.suppress(MemoryError):  # told with what it was needed for
            SimulatedGuest(profile)
    except ParamsError as error:
        raise ParamsError(f"profile {text}: {error}") from error
    return profile


def _parse_channels(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"expected a number or auto, got '{text}'")
    return int(text)


def _parse_owner(text: str) -> tuple[int, int]:
    uid, colon, gid = text.partition(":")
    if not (colon and uid.isascii() and uid.isdecimal() and gid.isascii() and gid.isdecimal()):
        raise ValueError(f"expected UID:GID as numbers, got '{text}'")
    return int(uid), int(gid)


def _parse_mode(text: str) -> int:
    try:
        return int(text, 8)
    except ValueError as error:
        raise ValueError(f"expected an octal mode such as 660, got '{text}'") from error

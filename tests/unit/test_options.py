"""The two command lines: what they mean, and how a mistake is told."""

from collections.abc import Callable
from pathlib import Path

import pytest

from migrate.checkpoint.params import CheckpointParams
from migrate.cli.lab import main as run_lab
from migrate.cli.options import parse_destination, parse_source
from migrate.params import (
    DEFAULT_CACHE_BYTES,
    Compress,
    DestinationParams,
    LinkAddress,
    SourceParams,
    UnixAddress,
)
from migrate.simulation.profile import load_profile

SOURCE = ["--to", "host-b:4444", "--qmp", "/run/vm/qmp"]
DESTINATION = ["--listen", "0.0.0.0:4444"]


def test_a_short_source_command_gets_the_documented_defaults() -> None:
    params = parse_source(SOURCE)
    assert params.to == LinkAddress("host-b", 4444)
    assert params.qmp == Path("/run/vm/qmp")
    assert params.downtime_limit_ms == 300
    assert params.max_bandwidth_bps is None
    assert params.streams == 1
    assert params.local_channels is None
    assert params.compress == Compress("auto")
    assert params.cache_bytes == DEFAULT_CACHE_BYTES == 256 << 20
    assert (params.commit, params.after, params.hold_before_commit) == ("auto", "keep", False)
    assert params.gateway_mode == 0o600
    assert params.connect_timeout_s == 30.0
    assert params.output.report_path is None
    assert not params.output.json


def test_every_source_option_arrives() -> None:
    params = parse_source(
        [
            *("--to", "[::1]:1"),
            *("--gateway", "unix:/run/gw"),
            *("--gateway-owner", "64055:107"),
            *("--gateway-mode", "660"),
            *("--downtime-limit", "1.5s"),
            *("--max-bandwidth", "200Mbit"),
            *("--streams", "16"),
            *("--compress", "zstd:3"),
            *("--cache", "1GiB"),
            *("--commit", "relay"),
            *("--state-dir", "/s"),
            *("--connect-timeout", "2min"),
            *("--report", "r.json"),
            *("--html", "r.html"),
            *("--trace", "t.jsonl"),
            "--json",
            "--quiet",
        ]
    )
    assert params.gateway == UnixAddress(Path("/run/gw"))
    assert params.gateway_owner == (64055, 107)
    assert params.gateway_mode == 0o660
    assert params.downtime_limit_ms == 1500
    assert params.max_bandwidth_bps == 25_000_000
    assert params.compress == Compress("zstd", 3)
    assert params.cache_bytes == 1 << 30
    assert params.commit == "relay"
    assert params.state_dir == Path("/s")
    assert params.connect_timeout_s == 120.0
    assert params.output.report_path == Path("r.json")
    assert params.output.html_path == Path("r.html")
    assert params.output.trace_path == Path("t.jsonl")
    assert params.output.json
    assert params.output.quiet
    driven = parse_source(
        [*SOURCE, "--hold-before-commit", "--after", "quit", "--balloon", "1GiB"]
    )
    assert driven.balloon_bytes == 1 << 30
    assert params.balloon_bytes is None
    assert driven.hold_before_commit
    assert driven.after == "quit"


def test_a_simulated_guest_is_named_by_its_profile() -> None:
    params = parse_source(["--to", "host-b:4444", "--simulate", "thrash"])
    assert params.simulate == load_profile("thrash")
    assert (params.qmp, params.gateway) == (None, None)
    waiting = parse_destination([*DESTINATION, "--simulate", "--run-for", "250ms"])
    assert (waiting.simulate, waiting.run_for_s) == (True, 0.25)


def test_what_a_device_refuses_in_a_profile_is_a_wrong_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "wrong.toml"
    profile.write_text('ram = "16MiB"\n[[devices]]\nkind = "virtio-gpu"\n', encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        parse_source(["--to", "host-b:4444", "--simulate", str(profile)])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert f"profile {profile}: virtio-gpu.0: no device of kind" in err
    assert err.count("\n") == 1


def test_everything_behind_the_dashes_is_the_qemu_command() -> None:
    params = parse_destination(
        [*DESTINATION, "--", "qemu-system-x86_64", "--version", "--", "-m", "512"]
    )
    assert params.qemu_argv == ("qemu-system-x86_64", "--version", "--", "-m", "512")
    assert params.qmp is None


def test_every_destination_option_arrives() -> None:
    params = parse_destination(
        [
            *DESTINATION,
            *[
                "--incoming",
                "tcp:127.0.0.1:7777",
                "--cache-max",
                "128MiB",
                "--hello-timeout",
                "500ms",
            ],
            *["--state-dir", "/s", "--run-dir", "/r", "--report", "d.json", "--quiet"],
        ]
    )
    assert params.incoming == LinkAddress("127.0.0.1", 7777)
    assert params.qemu_argv is None
    assert params.cache_max_bytes == 128 << 20
    assert params.hello_timeout_s == 0.5
    assert (params.state_dir, params.run_dir) == (Path("/s"), Path("/r"))
    assert params.output.report_path == Path("d.json")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "required: --to"),
        (["--to", "host-b:4444"], "exactly one of --qmp, --gateway and --simulate"),
        (
            [*SOURCE, "--gateway", "unix:/run/gw"],
            "exactly one of --qmp, --gateway and --simulate",
        ),
        ([*SOURCE, "--downtime-limit", "300"], "argument --downtime-limit: '300' has no unit"),
        ([*SOURCE, "--max-bandwidth", "1Mbps"], "argument --max-bandwidth: '1Mbps' is ambig"),
        ([*SOURCE, "--streams", "17"], "--streams from 1 to 16, got 17"),
        ([*SOURCE, "--local-channels", "two"], "expected a number or auto, got 'two'"),
        ([*SOURCE, "--local-channels", "65"], "auto or 0 to 64, got 65"),
        ([*SOURCE, "--compress", "gzip"], "expected auto, none, lz4, zstd[:LEVEL] or words"),
        ([*SOURCE, "--down", "300ms"], "unrecognized arguments: --down"),
        ([*SOURCE, "--gateway-mode", "9"], "octal mode"),
        ([*SOURCE, "--gateway-owner", "root:kvm"], "UID:GID as numbers"),
        ([*SOURCE, "--simulate", "idle"], "exactly one of --qmp, --gateway and --simulate"),
        (["--to", "host-b:4444", "--simulate", "nothing"], "no profile 'nothing'"),
    ],
)
def test_a_source_mistake_ends_with_one_line_and_status_2(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_source(argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("migrate-src: ")
    assert text in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "required: --listen"),
        (DESTINATION, "exactly one of '-- QEMU COMMAND', --qmp,"),
        ([*DESTINATION, "--"], "expected a QEMU command behind '--'"),
        ([*DESTINATION, "--qmp", "/q", "--", "qemu"], "exactly one of"),
        ([*DESTINATION, "--simulate", "--", "qemu"], "exactly one of"),
        ([*DESTINATION, "--simulate", "--run-for", "2h"], "expected --run-for up to 3600s"),
        ([*DESTINATION, "--qmp", "/q", "--run-for", "5s"], "--run-for only works with --simul"),
        ([*DESTINATION, "--", "qemu", "-daemonize"], "leave out '-daemonize'"),
        ([*DESTINATION, "qemu"], "unrecognized arguments: qemu"),
    ],
)
def test_a_destination_mistake_ends_with_one_line_and_status_2(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_destination(argv)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("migrate-dst: ")
    assert text in err
    assert err.count("\n") == 1


def test_help_prints_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_source(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for default in ("300ms", "256MiB", "auto", "30s", "keep", "no limit"):
        assert f"(default: {default})" in text
    with pytest.raises(SystemExit):
        parse_destination(["--help"])
    assert "(default: 1GiB)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("parse", [parse_source, parse_destination, run_lab])
def test_version_needs_no_other_option(
    parse: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(parse)
    with pytest.raises(SystemExit) as caught:
        parse(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("migrate-")


@pytest.mark.parametrize(
    ("parse", "options"), [(parse_source, SOURCE), (parse_destination, DESTINATION)]
)
def test_old_copies_have_the_same_options_on_both_sides(
    parse: Callable[[list[str]], SourceParams | DestinationParams], options: list[str]
) -> None:
    if parse is parse_destination:
        options = [*options, "--simulate"]
    plain = parse(options)
    assert (plain.checkpoint, plain.vm_id) == (None, None)
    kept = parse([*options, "--checkpoint", "/old"])
    assert kept.checkpoint == CheckpointParams(Path("/old"), 16 << 30)
    more = ["--checkpoint", "/old", "--checkpoint-max", "2GiB", "--vm-id", "vm-1"]
    named = parse([*options, *more])
    assert named.checkpoint == CheckpointParams(Path("/old"), 2 << 30)
    assert named.vm_id == "vm-1"

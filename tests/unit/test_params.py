"""What a run may be asked to do, and what is refused."""

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from migrate.checkpoint.params import CheckpointParams, parse_vm_id
from migrate.errors import ParamsError
from migrate.params import (
    Compress,
    DestinationParams,
    LinkAddress,
    OutputParams,
    SourceParams,
    UnixAddress,
    default_run_dir,
    default_state_dir,
    parse_socket_address,
)

STATE = Path("/var/lib/precopy")


def source(**changes: Any) -> SourceParams:  # noqa: ANN401 - a type per field
    values: dict[str, Any] = {
        "to": LinkAddress("host-b", 4444),
        "qmp": Path("/run/vm/qmp"),
        "state_dir": STATE,
    }
    return SourceParams(**{**values, **changes})


def gateway_source(**changes: Any) -> SourceParams:  # noqa: ANN401 - a type per field
    return source(**{"qmp": None, "gateway": UnixAddress(Path("/run/gw")), **changes})


def destination(**changes: Any) -> DestinationParams:  # noqa: ANN401 - a type per field
    values: dict[str, Any] = {
        "listen": LinkAddress("0.0.0.0", 4444),
        "qemu_argv": ("qemu-system-x86_64", "-m", "512"),
        "state_dir": STATE,
        "run_dir": Path("/run/precopy"),
    }
    return DestinationParams(**{**values, **changes})


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("host-b:4444", "host-b", 4444),
        ("10.0.0.2:1", "10.0.0.2", 1),
        ("[::1]:65535", "::1", 65535),
    ],
)
def test_link_addresses_read_and_print_the_same(text: str, host: str, port: int) -> None:
    address = LinkAddress.parse(text)
    assert (address.host, address.port) == (host, port)
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    ["host", "host:", ":4444", "host:65536", "host:-1", "::1:4444", "host:٤", "h:000001"],
)
def test_what_is_no_link_address_is_refused(text: str) -> None:
    with pytest.raises(ParamsError, match="expected"):
        LinkAddress.parse(text)


def test_socket_addresses_take_the_forms_of_qemu() -> None:
    assert parse_socket_address("tcp:0:7777") == LinkAddress("0", 7777)
    assert parse_socket_address("unix:/run/a:b") == UnixAddress(Path("/run/a:b"))
    assert str(parse_socket_address("unix:/run/gw")) == "unix:/run/gw"


@pytest.mark.parametrize("text", ["exec:cat", "host:4444", "unix:", "tcp:7777", "fd:3"])
def test_other_transports_of_qemu_are_refused(text: str) -> None:
    with pytest.raises(ParamsError):
        parse_socket_address(text)


def test_a_unix_path_that_the_kernel_cannot_bind_is_refused() -> None:
    assert len(str(UnixAddress(Path("/" + "x" * 106)).path)) == 107
    with pytest.raises(ParamsError, match="108 bytes, expected at most 107"):
        UnixAddress(Path("/" + "x" * 107))
    with pytest.raises(ParamsError, match="--qmp path has 120 bytes"):
        source(qmp=Path("/" + "q" * 119))
    with pytest.raises(ParamsError, match="zero byte"):
        UnixAddress(Path("/run/\0gw"))


@pytest.mark.parametrize(
    ("text", "compress"),
    [
        ("auto", Compress("auto")),
        ("none", Compress("none")),
        ("lz4", Compress("lz4")),
        ("zstd", Compress("zstd", 1)),
        ("zstd:19", Compress("zstd", 19)),
    ],
)
def test_codecs_are_read(text: str, compress: Compress) -> None:
    assert Compress.parse(text) == compress
    assert Compress.parse(str(compress)) == compress


@pytest.mark.parametrize("text", ["", "gzip", "lz4:3", "zstd:", "zstd:0", "zstd:20", "zstd:x"])
def test_unknown_codecs_and_levels_are_refused(text: str) -> None:
    with pytest.raises(ParamsError):
        Compress.parse(text)


def test_params_cannot_be_changed_later() -> None:
    params = source()
    with pytest.raises(FrozenInstanceError):
        params.streams = 2  # type: ignore[misc]


@pytest.mark.parametrize("changes", [{"qmp": None}, {"gateway": UnixAddress(Path("/run/gw"))}])
def test_a_source_has_exactly_one_way_to_its_qemu(changes: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match="exactly one of --qmp, --gateway and --simulate"):
        source(**changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"to": LinkAddress("host-b", 0)}, "--to needs the port"),
        ({"streams": 0}, "--streams from 1 to 16, got 0"),
        ({"streams": 17}, "--streams from 1 to 16, got 17"),
        (
            {"qmp": None, "gateway": UnixAddress(Path("/g")), "local_channels": 2},
            "--local-channels needs --qmp",
        ),
        ({"downtime_limit_ms": 0}, "--downtime-limit from 1ms to 2000s, got 0ms"),
        ({"downtime_limit_ms": 2_000_001}, "--downtime-limit"),
        ({"max_bandwidth_bps": 12_499}, "at least 100kbit"),
        ({"cache_bytes": 4096}, "--cache 0 or from 64KiB to 64GiB, got 4KiB"),
        ({"cache_bytes": 65 << 30}, "got 65GiB"),
        ({"balloon_bytes": 4 << 20}, "what the guest keeps, expected at least 16MiB, got 4MiB"),
        ({"connect_timeout_s": 0.0}, "--connect-timeout above zero"),
        ({"connect_timeout_s": float("nan")}, "--connect-timeout above zero"),
        ({"commit": "relay"}, "--commit relay needs --gateway"),
        ({"commit": "later"}, "auto or relay"),
        ({"after": "explode"}, "keep or quit"),
        ({"gateway_owner": (0, 0)}, "--gateway-owner only works"),
        ({"gateway_mode": 0o660}, "--gateway-mode only works"),
    ],
)
def test_source_values_that_cannot_work_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ParamsError, match=text):
        source(**changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"commit": "relay", "hold_before_commit": True}, "--hold-before-commit"),
        ({"after": "quit"}, "--after quit needs --qmp"),
        ({"balloon_bytes": 1 << 30}, "--balloon needs --qmp"),
        ({"gateway_mode": 0o1777}, "mode from 000 to 777, got 1777"),
        ({"gateway_owner": (-1, 0)}, "a uid and a gid"),
    ],
)
def test_gateway_values_that_cannot_work_are_refused(
    changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ParamsError, match=text):
        gateway_source(**changes)


def test_the_smallest_and_largest_values_are_taken() -> None:
    assert source(downtime_limit_ms=1, max_bandwidth_bps=12_500, cache_bytes=0).cache_bytes == 0
    assert source(downtime_limit_ms=2_000_000).downtime_limit_ms == 2_000_000
    assert source(cache_bytes=64 << 30).cache_bytes == 64 << 30
    relayed = gateway_source(commit="relay", gateway_owner=(0, 107), gateway_mode=0o660)
    assert (relayed.commit, relayed.gateway_owner) == ("relay", (0, 107))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"local_channels": 65}, "--local-channels auto or 0 to 64, got 65"),
        ({"qemu_argv": None, "simulate": True, "local_channels": 2}, "nobody else can be told"),
        (
            {"qemu_argv": None, "incoming": UnixAddress(Path("/q")), "local_channels": 0},
            "--local-channels needs '-- QEMU COMMAND' or --qmp",
        ),
    ],
)
def test_channels_that_no_qemu_can_be_told_of_are_refused(
    changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ParamsError, match=text):
        destination(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"qemu_argv": None},
        {"qmp": Path("/run/qmp")},
        {"incoming": LinkAddress("127.0.0.1", 7777)},
    ],
)
def test_a_destination_has_exactly_one_way_to_its_qemu(changes: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match="exactly one of"):
        destination(**changes)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ((), "expected a QEMU command"),
        (("",), "expected a QEMU command"),
        (("qemu", "-daemonize"), "leave out '-daemonize'"),
        (("qemu", "--daemonize"), "leave out '--daemonize'"),
        (("qemu", "-incoming", "defer"), "leave out '-incoming'"),
    ],
)
def test_qemu_options_that_we_add_are_refused(argv: tuple[str, ...], text: str) -> None:
    with pytest.raises(ParamsError, match=text):
        destination(qemu_argv=argv)


def test_a_value_that_only_looks_like_a_refused_option_is_taken() -> None:
    argv = ("qemu", "-name", "incoming", "-append", "daemonize")
    assert destination(qemu_argv=argv).qemu_argv == argv


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cache_max_bytes": 1}, "--cache-max"),
        ({"hello_timeout_s": -1.0}, "--hello-timeout"),
        ({"qemu_argv": None, "incoming": LinkAddress("127.0.0.1", 0)}, "QEMU's port"),
    ],
)
def test_destination_values_that_cannot_work_are_refused(
    changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ParamsError, match=text):
        destination(**changes)


def test_two_outputs_never_share_a_file() -> None:
    both = OutputParams(report_path=Path("a.json"), html_path=Path("a.html"))
    assert both.html_path == Path("a.html")
    with pytest.raises(ParamsError, match="different files"):
        OutputParams(report_path=Path("a"), trace_path=Path("./a"))


def test_state_outlives_a_reboot_and_sockets_need_not() -> None:
    assert default_state_dir({}, 0) == Path("/var/lib/precopy")
    assert default_state_dir({"XDG_STATE_HOME": "/s"}, 7) == Path("/s/precopy")
    assert default_state_dir({"HOME": "/home/u"}, 7) == Path("/home/u/.local/state/precopy")
    assert default_run_dir({}, 0) == Path("/run/precopy")
    assert default_run_dir({"XDG_RUNTIME_DIR": "/run/user/7"}, 7) == Path("/run/user/7/precopy")
    assert default_run_dir({}, 7) == Path("/tmp/precopy-7")


# --- old copies ----------------------------------------------------------------------------------


def test_a_checkpoint_needs_an_identity_where_nobody_can_be_asked() -> None:
    kept = CheckpointParams(Path("/kept"))
    with pytest.raises(ParamsError, match="--checkpoint needs --vm-id: --gateway"):
        gateway_source(checkpoint=kept)
    with pytest.raises(ParamsError, match="--checkpoint needs --vm-id: --incoming"):
        destination(
            qemu_argv=None, incoming=parse_socket_address("unix:/run/in"), checkpoint=kept
        )
    assert gateway_source(checkpoint=kept, vm_id="vm").vm_id == "vm"
    assert source(checkpoint=kept).vm_id is None


@pytest.mark.parametrize("text", ["", ".x", "a/b", "a b", "x" * 65, "é"])
def test_an_identity_can_be_a_file_name(text: str) -> None:
    with pytest.raises(ParamsError, match="letters, digits"):
        parse_vm_id(text)
    assert parse_vm_id("6f1d-a.b_C") == "6f1d-a.b_C"


def test_a_directory_of_checkpoints_holds_at_least_a_small_guest() -> None:
    with pytest.raises(ParamsError, match="--checkpoint-max of at least 1MiB"):
        CheckpointParams(Path("/kept"), 4096)

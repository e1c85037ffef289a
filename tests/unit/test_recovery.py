"""Recovery without a QEMU: what is refused, what is advised, and who is answered."""

from pathlib import Path

import pytest
import trio

from migrate.cli.recover import (
    asks_for_recovery,
    parse_destination_recovery,
    parse_source_recovery,
)
from migrate.errors import GuestOn, MigrationError, PeerLostError, PeerRefusedError
from migrate.link_security import UNPROTECTED, LinkSecurity
from migrate.params import LinkAddress, OutputParams
from migrate.recovery.advice import advise, destination_advice, source_advice
from migrate.recovery.destination import DestinationRecovery
from migrate.recovery.params import DestinationRecoveryParams, SourceRecoveryParams
from migrate.recovery.source import SourceRecovery
from migrate.report.report import Report
from migrate.report.summary import summary_lines
from migrate.runtime import RealRuntime
from migrate.session import Session
from migrate.state_file import (
    ABORTED,
    COMMIT_SENT,
    COMMITTED,
    RETURNED,
    RUNNING,
    RecordFacts,
    Side,
    StateFile,
    read_record,
)
from migrate.transport.channels import connect_tcp
from migrate.transport.link import Link
from migrate.transport.socket_stream import start_stream
from proto.link import messages
from proto.link.session import LinkSession
from proto.link.state import Role
from tests.link_pair import HELLO
from tests.pki import write_secret

ID = bytes(range(16))
ANYWHERE = LinkAddress("127.0.0.1", 0)
QUIET = OutputParams(quiet=True)


def begun(folder: Path, side: Side, *states: str, form: str = "incoming") -> StateFile:
    record = StateFile(folder, side, ID)
    qmp = None if form == "incoming" else Path("/run/a vm.qmp")
    record.begin(RecordFacts(ID, "withheld", form, "the QEMU", "the peer", "host-b:7001", qmp))
    for state in states:
        record.write(state)
    return record


async def recover(
    side: Side, folder: Path, **more: object
) -> tuple[Report, MigrationError | None]:
    session = Session(side, QUIET, RealRuntime(), watched=False)
    if side == "source":
        params = SourceRecoveryParams(record=ID.hex(), state_dir=folder, **more)  # type: ignore[arg-type]
        return await SourceRecovery(params, session).run()
    asked = DestinationRecoveryParams(record=ID.hex(), state_dir=folder, **more)  # type: ignore[arg-type]
    return await DestinationRecovery(asked, session).run()


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_simulated_guest_cannot_be_recovered(tmp_path: Path, side: Side) -> None:
    begun(tmp_path, side, form="simulate").close()
    report, error = await recover(side, tmp_path)
    assert error is not None
    assert "ends with its command" in str(error)
    assert (report.status, report.command, report.guest_on) == (
        "failed",
        "recover",
        GuestOn.UNKNOWN,
    )


async def test_the_other_sides_record_is_refused(tmp_path: Path) -> None:
    record = begun(tmp_path, "destination")
    record.close()
    session = Session("source", QUIET, RealRuntime(), watched=False)
    params = SourceRecoveryParams(record=str(record.path), state_dir=tmp_path)
    _, error = await SourceRecovery(params, session).run()
    assert "use migrate-dst --recover" in str(error)


async def test_source_that_heard_running_needs_nobody(tmp_path: Path) -> None:
    record = begun(tmp_path, "source", COMMIT_SENT)
    record.write(RUNNING, run_state="paused")
    record.close()
    report, error = await recover("source", tmp_path)
    assert error is None
    assert (report.guest_on, report.guest_state) == (GuestOn.DESTINATION, "paused")
    assert summary_lines(report)[-1].endswith("not running: QEMU says 'paused'")


async def test_committed_copy_that_starts_by_itself_cannot_be_judged(tmp_path: Path) -> None:
    record = begun(tmp_path, "destination", COMMITTED)
    record.close()
    report, error = await recover("destination", tmp_path)
    assert "--qmp SOCKET" in str(error)
    assert report.guest_on is GuestOn.UNKNOWN
    assert StateFile.open(record.path).state == COMMITTED


async def test_what_was_not_committed_is_given_up_for_good(tmp_path: Path) -> None:
    record = begun(tmp_path, "destination")
    record.close()
    for _ in range(2):
        report, error = await recover("destination", tmp_path)
        assert error is None
        assert report.guest_on is GuestOn.SOURCE
    assert StateFile.open(record.path).state == ABORTED


# --- the question and its answer ----------------------------------------------------------------


class Listening:
    """A ``migrate-dst --recover --listen`` that has given its copy up."""

    def __init__(self, folder: Path, security: LinkSecurity = UNPROTECTED) -> None:
        self.record = begun(folder, "destination", ABORTED)
        self.record.close()
        self._session = Session("destination", OutputParams(), RealRuntime(), watched=False)
        self._told = trio.Event()
        self.address = ANYWHERE
        params = DestinationRecoveryParams(
            record=ID.hex(),
            state_dir=folder,
            listen=ANYWHERE,
            hello_timeout_s=0.2,
            security=security,
        )
        self.run = DestinationRecovery(params, self._session)
        self._session.say = self._hear  # type: ignore[method-assign]

    def _hear(self, line: str) -> None:
        if line.startswith("listening on "):
            self.address = LinkAddress.parse(line.split()[2])
            self._told.set()

    async def listens(self) -> LinkAddress:
        await self._told.wait()
        return self.address

    async def link(self) -> Link:
        sock = await connect_tcp(await self.listens(), "it")
        return Link(start_stream(sock, Role.SOURCE), LinkSession(Role.SOURCE), "it")

    async def ask(self, number: bytes = ID) -> tuple[Link, messages.Message | None]:
        link = await self.link()
        await link.send(messages.Recover(number, b"", COMMIT_SENT))
        return link, await link.receive()


async def test_the_source_is_told_until_it_says_bye(tmp_path: Path) -> None:
    listening = Listening(tmp_path)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listening.run.run)
            for _ in range(2):  # one that dies before it has acted, and another try
                link, answer = await listening.ask()
                assert isinstance(answer, messages.Recovered)
                assert (answer.state, answer.guest_on, answer.run_state) == (
                    ABORTED,
                    "source",
                    None,
                )
                assert listening.record.path.exists()
                link.close()
            link, _ = await listening.ask()
            await link.send(messages.Bye())
            assert await link.receive() == messages.Bye()
            link.close()
    assert not listening.record.path.exists()


async def test_strangers_learn_nothing_and_hold_nobody_up(tmp_path: Path) -> None:
    listening = Listening(tmp_path)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listening.run.run)
            silent = await listening.link()
            link, answer = await listening.ask(bytes(16))
            assert answer == messages.Refused(
                "unknown-migration", "no record of that migration here"
            )
            link.close()
            link = await listening.link()
            await link.send(HELLO)
            answer = await link.receive()
            assert isinstance(answer, messages.Refused)
            assert answer.code == "recovering"
            link.close()
            link = await listening.link()
            link.stream.write([b"GET / HTTP/1.0\r\n\r\n"])
            await link.stream.flush()
            link.close()
            with pytest.raises(PeerLostError):
                await silent.receive()
            link, answer = await listening.ask()
            assert isinstance(answer, messages.Recovered)
            await link.send(messages.Bye())
            await link.receive()
            link.close()
            silent.close()


async def test_silence_and_refusals_let_nobody_go_on(tmp_path: Path) -> None:
    begun(tmp_path, "source", COMMIT_SENT).close()
    report, error = await recover(
        "source", tmp_path, to=LinkAddress("127.0.0.1", 1), connect_timeout_s=0.05
    )
    assert report.guest_on is GuestOn.UNKNOWN
    assert f"migrate-dst --recover {ID.hex()} --listen 127.0.0.1:1" in str(error)
    assert "--destination-is-fenced" in str(error)
    assert StateFile.open(tmp_path / f"{ID.hex()}.source.json").state == COMMIT_SENT


async def test_only_whom_the_token_admits_is_told(tmp_path: Path) -> None:
    token = LinkSecurity(token_file=write_secret(tmp_path / "token", b"x" * 40))
    record = begun(tmp_path, "source", COMMIT_SENT, form="gateway")
    record.close()
    listening = Listening(tmp_path, token)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listening.run.run)
            to = await listening.listens()
            _, error = await recover("source", tmp_path, to=to)
            assert "--token-file" in str(error)
            assert read_record(record.path).state == COMMIT_SENT
            # The guest is given back; to go on it would need its QEMU.
            report, error = await recover("source", tmp_path, to=to, security=token)
            assert "/run/a vm.qmp" in str(error)
            assert report.guest_on is GuestOn.UNKNOWN
            assert read_record(record.path).state == RETURNED
            assert listening.record.path.exists()
            nursery.cancel_scope.cancel()


# --- what is advised ------------------------------------------------------------------------------


def test_the_advice_fits_what_is_known(tmp_path: Path) -> None:
    before = begun(tmp_path / "1", "source", form="qmp")
    here = f"migrate-src --recover {before.path} --qmp '/run/a vm.qmp'"
    assert source_advice(before, UNPROTECTED) == here
    after = begun(tmp_path / "2", "source", COMMIT_SENT, form="gateway")
    advice = source_advice(after, UNPROTECTED)
    assert advice is not None
    assert f"'migrate-dst --recover {ID.hex()} --listen host-b:7001'" in advice
    assert f"--recover {after.path} --qmp '/run/a vm.qmp' --to host-b:7001' here" in advice
    there = begun(tmp_path / "3", "destination", COMMITTED)
    assert destination_advice(there, ID, UNPROTECTED) == f"migrate-dst --recover {there.path}"
    given_up = begun(tmp_path / "4", "destination", ABORTED)
    assert destination_advice(given_up, ID, UNPROTECTED) == (
        f"'migrate-dst --recover {given_up.path} --listen host-b:7001' here and "
        f"'migrate-src --recover {ID.hex()}' on the source host"
    )
    assert (
        destination_advice(None, ID, UNPROTECTED)
        == f"'migrate-src --recover {ID.hex()}' on the source host"
    )
    assert destination_advice(None, None, UNPROTECTED) is None
    simulated = begun(tmp_path / "5", "source", form="simulate")
    assert source_advice(None, UNPROTECTED) is source_advice(simulated, UNPROTECTED) is None
    secure = LinkSecurity(tls_dir=Path("/my pki"), tls_hostname="b", token_file=Path("/t"))
    advice = source_advice(after, secure)
    assert advice is not None
    assert "--listen host-b:7001 --tls-dir DIR --token-file FILE'" in advice
    assert "--tls-dir '/my pki' --tls-hostname b --token-file /t' here" in advice


@pytest.mark.parametrize("guest_on", GuestOn)
def test_advice_is_given_where_somebody_must_do_something(guest_on: GuestOn) -> None:
    error = PeerRefusedError("no", guest_on=guest_on)
    advice = advise(error, "type this")
    needed = guest_on in (GuestOn.NEITHER, GuestOn.UNKNOWN)
    assert (advice is not None) == ("type this" in str(error)) == needed


# --- the command line -----------------------------------------------------------------------------


def test_options_of_recovery() -> None:
    argv = ["--recover", "x", "--qmp", "/q", "--to", "h:1", "--destination-is-fenced"]
    source = parse_source_recovery([*argv, "--connect-timeout", "2s"])
    assert (source.record, source.qmp, source.to) == ("x", Path("/q"), LinkAddress("h", 1))
    assert source.fenced
    assert source.connect_timeout_s == 2
    destination = parse_destination_recovery(["--recover=x", "--listen", "h:0"])
    assert destination.listen == LinkAddress("h", 0)
    assert asks_for_recovery(argv)
    assert asks_for_recovery(["--recover=x"])
    assert not asks_for_recovery(["--listen", "h:0", "--", "qemu", "--recover"])


@pytest.mark.parametrize("argv", [["--recover"], ["--recover", "x", "--to", "h:0"]])
def test_mistakes_are_told_in_one_line(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_source_recovery(argv)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_of_recovery(capsys: pytest.CaptureFixture[str]) -> None:
    for parse in (parse_source_recovery, parse_destination_recovery):
        with pytest.raises(SystemExit) as exit_info:
            parse(["--recover", "--help"])
        assert exit_info.value.code == 0
        assert "STATE_FILE_OR_MIGRATION_ID" in capsys.readouterr().out

"""The record of a handover: only ways that are allowed, one writer, nothing half written."""

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from migrate.errors import MigrationError, RecordBusyError, RecoveryRefusedError
from migrate.qemu.migration_mark import MigrationMark
from migrate.qemu.process_mark import ProcessMark, is_stopped
from migrate.qemu.settings import UserSettings
from migrate.state_file import (
    ABORTED,
    COMMIT_SENT,
    COMMITTED,
    GIVEN_BACK,
    KEPT,
    MOVES,
    PREPARED,
    RETURNED,
    RUNNING,
    RecordFacts,
    Side,
    StateFile,
    find_record,
    read_record,
)

ID = bytes(range(16))
FACTS = RecordFacts(ID, "held", "qmp", "a QEMU", "migrate-dst at there:1", "there:1")
STATES = (PREPARED, COMMIT_SENT, RUNNING, KEPT, RETURNED, COMMITTED, ABORTED, GIVEN_BACK)
SIDES: tuple[Side, ...] = ("source", "destination")

HOLDER = """
import sys
from pathlib import Path
from migrate.state_file import StateFile
record = StateFile.open(Path(sys.argv[1]))
print(record.state, flush=True)
sys.stdin.read()
"""


def begun(folder: Path, side: Side, *states: str) -> StateFile:
    record = StateFile(folder, side, ID)
    record.begin(FACTS)
    for state in states:
        record.write(state)
    return record


def way_to(side: Side, state: str) -> tuple[str, ...]:
    """States to write, behind PREPARED."""
    before = [s for s, after in MOVES[side].items() if state in after and s]
    return () if not before else (*way_to(side, before[0]), state)


@pytest.mark.parametrize("side", SIDES)
def test_only_what_may_follow_can_be_recorded(tmp_path: Path, side: Side) -> None:
    reachable = {PREPARED, *itertools.chain(*MOVES[side].values())}
    for number, (state, after) in enumerate(itertools.product(reachable, STATES)):
        record = begun(tmp_path / str(number), side, *way_to(side, state))
        if after in MOVES[side].get(state, ()):
            record.write(after)
        else:
            with pytest.raises(MigrationError, match=f"says {state}: it cannot become {after}"):
                record.write(after)
        expected = after if after in MOVES[side].get(state, ()) else state
        assert record.state == read_record(record.path).state == expected


def test_committed_and_aborted_exclude_each_other() -> None:
    moves = MOVES["destination"]
    assert ABORTED not in moves[COMMITTED]
    assert ABORTED not in moves  # final
    assert MOVES["source"][COMMIT_SENT] == {RUNNING, RETURNED}
    assert KEPT not in MOVES["source"]


def test_nothing_can_be_recorded_before_the_start_or_twice(tmp_path: Path) -> None:
    record = StateFile(tmp_path, "source", ID)
    with pytest.raises(MigrationError, match="nothing was recorded"):
        record.write(COMMIT_SENT)
    record.begin(FACTS)
    with pytest.raises(MigrationError, match="cannot become PREPARED"):
        record.begin(FACTS)
    again = StateFile(tmp_path, "source", ID)
    with pytest.raises(MigrationError, match="File exists"):
        again.begin(FACTS)
    assert [path.name for path in tmp_path.iterdir()] == [record.path.name]


def test_facts_come_back_as_they_were(tmp_path: Path) -> None:
    mark = ProcessMark.of(os.getpid())
    facts = RecordFacts(
        *(ID, "withheld", "incoming", "q", "p", "h:1", Path("/q.sock"), mark),
        run_state="paused",
        settings=UserSettings({"events": False}, {"downtime-limit": 300, "tls-creds": ""}),
        mark=MigrationMark(7, 11, total_time_ms=5),
    )
    record = StateFile(tmp_path, "destination", b"another name")
    record.begin(facts)
    record.write(COMMITTED, run_state="running", reason="because")
    found = read_record(record.path)
    assert found == record.record
    assert found.facts.run_state == "running"
    assert found.command_pid == os.getpid()
    assert json.loads(record.path.read_text())["state"] == COMMITTED
    assert record.path.stat().st_mode & 0o777 == 0o600


def test_a_record_can_be_completed_and_its_state_stays(tmp_path: Path) -> None:
    record = StateFile(tmp_path, "source", ID)
    mark = MigrationMark(1, 2, 3, 4, 5, 6, 7)
    with pytest.raises(MigrationError, match="could be completed"):
        record.complete(mark=mark, run_state=None)
    record.begin(FACTS)
    record.complete(mark=None, run_state="paused")
    record.complete(mark=mark, run_state=None)
    record.complete(mark=None, run_state=None)
    expected = replace(FACTS, mark=mark, run_state="paused")
    assert read_record(record.path).facts == expected
    assert read_record(record.path).state == PREPARED
    record.write(COMMIT_SENT)
    assert read_record(record.path).facts == expected
    with pytest.raises(RecordBusyError):
        StateFile.open(record.path)


def test_a_record_of_an_older_version_lacks_what_was_not_recorded_then(
    tmp_path: Path,
) -> None:
    record = begun(tmp_path, "source")
    content = json.loads(record.path.read_text())
    del content["settings"], content["mark"]
    record.path.write_text(json.dumps(content))
    assert read_record(record.path).facts == FACTS


def test_a_record_is_found_by_its_path_or_by_the_number_of_its_migration(
    tmp_path: Path,
) -> None:
    record = StateFile(tmp_path, "destination", b"x")
    record.begin(FACTS)
    (tmp_path / "00.destination.json").write_text("{}")  # of somebody else
    for name in (str(record.path), ID.hex(), ID.hex().upper()):
        assert find_record(name, tmp_path, "destination") == record.path
    for side, number in (("source", ID), ("destination", bytes(16))):
        with pytest.raises(RecoveryRefusedError, match="another --state-dir"):
            find_record(number.hex(), tmp_path, side)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"state": "COMMITTED"}', '{"side": "moon"}'])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.source.json"
    path.write_text(text)
    with pytest.raises(RecoveryRefusedError, match="no record of a migration"):
        StateFile.open(path)
    with pytest.raises(RecoveryRefusedError, match="No such file"):
        StateFile.open(tmp_path / "y.source.json")


def test_a_record_has_one_owner(tmp_path: Path) -> None:
    record = begun(tmp_path, "source")
    with pytest.raises(RecordBusyError, match=f"process {os.getpid()} is at work"):
        StateFile.open(record.path)
    record.write(COMMIT_SENT)  # another file takes the name
    with pytest.raises(RecordBusyError):
        StateFile.open(record.path)
    record.close()
    taken = StateFile.open(record.path)
    assert taken.state == COMMIT_SENT
    with pytest.raises(RecordBusyError):
        StateFile.open(record.path)
    taken.write(RETURNED)
    taken.remove()
    with pytest.raises(RecoveryRefusedError, match="No such file"):
        StateFile.open(record.path)


def test_an_owner_that_dies_lets_go_and_one_that_is_frozen_does_not(tmp_path: Path) -> None:
    record = begun(tmp_path, "source")
    record.close()
    command = [sys.executable, "-c", HOLDER, str(record.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"PREPARED\n"
        with pytest.raises(RecordBusyError):
            StateFile.open(record.path)
        holder.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
        assert is_stopped(holder.pid)
        with pytest.raises(RecordBusyError):
            StateFile.open(record.path)
        holder.kill()
        holder.wait()
    StateFile.open(record.path).close()


def test_a_record_that_somebody_replaced_is_not_written_over(tmp_path: Path) -> None:
    record = begun(tmp_path, "destination")
    record.path.unlink()
    record.path.write_text("{}")
    with pytest.raises(MigrationError, match="somebody else has changed it"):
        record.write(COMMITTED)
    assert record.path.read_text() == "{}"


def test_a_record_that_cannot_be_written_stays_what_it_was(tmp_path: Path) -> None:
    record = begun(tmp_path, "destination")
    (tmp_path / f"{ID.hex()}.destination.{os.getpid()}.tmp").mkdir()
    with pytest.raises(MigrationError, match="cannot record the handover"):
        record.write(COMMITTED)
    assert record.state == read_record(record.path).state == PREPARED


async def test_a_process_is_told_from_a_later_one_of_the_same_number() -> None:
    mark = ProcessMark.of(os.getpid())
    assert mark is not None
    assert mark.lives
    assert not ProcessMark(mark.pid, mark.start_ticks + 1, mark.boot_id).lives
    assert not ProcessMark(mark.pid, mark.start_ticks, "another boot").lives
    await ProcessMark(mark.pid, mark.start_ticks + 1, mark.boot_id).kill()  # not us
    child = await trio.lowlevel.open_process(["sleep", "60"])
    other = ProcessMark.of(child.pid)
    assert other is not None
    await other.kill()
    assert not other.lives  # a zombie, until it is waited for
    await child.wait()
    assert ProcessMark.of(child.pid) is None
    await other.wait_dead()

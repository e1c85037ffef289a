"""A directory of checkpoints: private, bounded, safe for several commands, nothing left behind."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from migrate.checkpoint import store as store_module
from migrate.checkpoint.store import CheckpointStore, Unfinished
from migrate.errors import ParamsError

KIB = 1024


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    found = CheckpointStore(tmp_path / "kept", 1000 * KIB)
    found.prepare()
    return found


def fill(own: Unfinished, kib: int) -> None:
    os.pwrite(own.file.number, b"x" * kib * KIB, 0)
    os.fsync(own.file.number)  # a file system may tell what a file takes up only then


def keep(store: CheckpointStore, vm_id: str, kib: int, mtime: int) -> Path:
    own = store.create(vm_id)
    fill(own, kib)
    path = store.publish(own)
    os.utime(path, (mtime, mtime))
    return path


def names(store: CheckpointStore) -> set[str]:
    return {path.name for path in store.directory.iterdir()} - {"lock"}


def test_files_and_directory_are_private(store: CheckpointStore) -> None:
    own = store.create("vm")
    assert own.path.stat().st_mode & 0o777 == 0o600
    path = store.publish(own)
    assert path == store.path("vm")
    assert names(store) == {"vm.ram"}
    assert path.stat().st_mode & 0o777 == 0o600
    assert store.directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_directory_into_which_others_look_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(ParamsError, match=f"mode {mode:o}"):
        CheckpointStore(directory, KIB).prepare()


def test_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ParamsError, match="cannot use --checkpoint"):
        CheckpointStore(tmp_path / "file" / "x", KIB).prepare()


def test_unfinished_one_is_seen_by_nobody_and_leaves_nothing(store: CheckpointStore) -> None:
    own = store.create("vm")
    fill(own, 8)
    assert store.open("vm") is None
    store.discard(own)
    store.discard(own)
    assert names(store) == set()


def test_what_a_killed_command_left_is_swept_and_what_is_written_stays(
    store: CheckpointStore,
) -> None:
    script = (
        "import os, sys, signal\n"
        "from pathlib import Path\n"
        "from migrate.checkpoint.store import CheckpointStore\n"
        "own = CheckpointStore(Path(sys.argv[1]), 1).create('dead')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, store.directory], check=False)
    alive = store.create("alive")
    assert len(names(store)) == 2
    store.prepare()
    assert names(store) == {alive.path.name}


def test_oldest_goes_first_but_before_it_the_vms_own(store: CheckpointStore) -> None:
    for vm_id, mtime in (("a", 10), ("b", 20), ("c", 30)):
        keep(store, vm_id, 300, mtime)
    own = store.create("c")
    assert store.make_room(own, 200 * KIB, 340 * KIB) == 340 * KIB
    assert names(store) == {"a.ram", "b.ram", own.path.name}
    fill(own, 340)
    assert store.make_room(own, 200 * KIB, 340 * KIB) == 340 * KIB
    assert names(store) == {"b.ram", own.path.name}
    assert store.make_room(own, 100 * KIB, 1000 * KIB) == 100 * KIB
    assert names(store) == {"b.ram", own.path.name}
    with pytest.raises(OSError, match="checkpoint-max"):
        store.make_room(own, 700 * KIB, 1000 * KIB)
    assert names(store) == {"b.ram", own.path.name}


def test_directory_that_is_too_full_is_trimmed_and_a_reader_reads_on(
    store: CheckpointStore,
) -> None:
    for vm_id, mtime in (("a", 10), ("b", 20), ("c", 30)):
        keep(store, vm_id, 300, mtime)
    oldest = store.open("a")
    assert oldest is not None
    store.max_bytes = 500 * KIB
    store.trim()
    assert names(store) == {"c.ram"}
    assert os.pread(oldest.number, 4, 0) == b"xxxx"


def test_what_is_no_plain_file_of_ours_is_not_opened(
    store: CheckpointStore, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("x")
    store.path("link").symlink_to(tmp_path / "secret")
    os.mkfifo(store.path("fifo"))
    store.path("folder").mkdir()
    for vm_id in ("link", "fifo", "folder"):
        with pytest.raises(OSError, match=r"symbolic links|no plain file"):
            store.open(vm_id)
    if os.geteuid() == 0:
        path = keep(store, "foreign", 1, 1)
        os.chown(path, 12345, 12345)
        with pytest.raises(OSError, match="no plain file of ours"):
            store.open("foreign")


def test_commands_at_the_same_time_stay_within_the_bound(store: CheckpointStore) -> None:
    """Each thread has file descriptions of its own, as commands have."""
    failures = []

    def leave(vm_id: str) -> None:
        mine = CheckpointStore(store.directory, store.max_bytes)
        try:
            for _ in range(5):
                own = mine.create(vm_id)
                mine.make_room(own, 200 * KIB, 200 * KIB)
                fill(own, 200)
                mine.publish(own)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=leave, args=(f"vm{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert names(store) <= {"vm0.ram", "vm1.ram", "vm2.ram"}
    assert sum(store.path(f"vm{i}").exists() for i in range(3)) >= 1


def test_lock_that_a_stopped_command_holds_is_not_waited_for_long(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "LOCK_S", 0.05)
    with (
        store._locked(),
        pytest.raises(OSError, match="lock"),
    ):
        CheckpointStore(store.directory, KIB).create("vm")
    store.create("vm")

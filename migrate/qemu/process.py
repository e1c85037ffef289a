"""The destination QEMU that migrate-dst starts itself.

QEMU runs in a session of its own below a supervisor process (``supervisor.py``): a Ctrl-C, a
hang-up or our death never reach it. The supervisor kills it if we die, unless the engine's
state file says COMMITTED; then it runs on, and its QMP socket stays where it was.

This module refuses to know what is migrated: it starts, watches and ends a process.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final, Self

import trio

from migrate.errors import ParamsError, QemuExitedError, QmpConnectError
from migrate.qemu import supervisor
from migrate.qemu.qmp_client import open_qmp

REFUSED_ARGUMENTS: Final = {
    "daemonize": "QEMU must stay our child's child",
    "incoming": "it is added by us",
}
"""QEMU options that the user may not give, with one dash or two, and why."""

LOG_TAIL_BYTES: Final = 2048
"""How much of QEMU's output stands in an error message."""

MAX_SOCKET_PATH_BYTES: Final = 107
"""Longest path of a unix socket on Linux (``sun_path`` less its NUL)."""

_POLL_S: Final = 0.02
_RECEIVE_BYTES: Final = 4096


class OwnedQemu:
    """A QEMU waiting for a migration (``-S -incoming defer``) that belongs to us.

    It ends in one of three ways: ``kill``; ``release``; or we are gone without either, and the
    state file decides. Dropping the object without either counts as being gone.

    Attributes:
        pid: QEMU's process id.
        qmp_path: Its QMP socket.
        log_path: Its stdout and stderr.
    """

    def __init__(self, run_dir: Path, control: trio.SocketStream) -> None:
        self.run_dir = run_dir
        self.qmp_path = run_dir / "qmp.sock"
        self.log_path = run_dir / "qemu.log"
        self.pid = 0
        self._pidfd: int | None = None
        self._control = control
        self._reading = trio.Lock()
        self._buffer = b""
        self._messages_taken = 0
        self._supervisor_gone = False
        self._released = False
        self._exited = False
        self._status: int | None = None

    @classmethod
    async def start(
        cls,
        argv: Sequence[str],
        run_dir: Path,
        state_file: Path,
        *,
        sockets: Sequence[Path] = (),
    ) -> Self:
        """Start QEMU; it may still refuse its arguments, see ``wait_qmp_ready``.

        If this is cancelled, QEMU is killed.

        Args:
            argv: The user's command line, program first. ``-S``, ``-incoming defer`` and a QMP
                socket are added to it.
            run_dir: Where ``qmp.sock`` and ``qemu.log`` go; made with mode 0700 if missing.
            state_file: What the supervisor reads when we are gone: one JSON object with
                ``state``. The engine writes it, atomically.
            sockets: Further unix sockets that the supervisor removes once QEMU ended.

        Raises:
            ParamsError: An argument, the run directory or the program cannot be used.
        """
        check_arguments(argv)
        _prepare(run_dir, state_file)
        ours, theirs = socket.socketpair()
        try:
            ours.setblocking(False)
            qemu = cls(run_dir, trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
            try:
                await _start_supervisor(theirs, qemu.log_path)
                await qemu._begin(argv, state_file, sockets)
            except BaseException:
                qemu._close()
                raise
        finally:
            theirs.close()
        return qemu

    async def _begin(
        self, argv: Sequence[str], state_file: Path, sockets: Sequence[Path]
    ) -> None:
        await self._control.send_all(self._start_message(argv, state_file, sockets))
        message = await self._receive()
        if message is None:
            raise QemuExitedError(f"QEMU's supervisor did not start: {self.log_tail()}")
        if message["event"] == "error":
            raise ParamsError(f"cannot start '{argv[0]}': {message['message']}")
        self.pid = int(message["pid"])
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self._pidfd = None  # it ended already; the supervisor says how

    def _start_message(
        self, argv: Sequence[str], state_file: Path, sockets: Sequence[Path]
    ) -> bytes:
        qmp_option = f"unix:{str(self.qmp_path).replace(',', ',,')},server=on,wait=off"
        config = {
            "argv": [*argv, "-S", "-incoming", "defer", "-qmp", qmp_option],
            "log": str(self.log_path),
            "state_file": str(state_file.absolute()),
            "sockets": [str(path.absolute()) for path in (self.qmp_path, *sockets)],
        }
        return json.dumps(config).encode("ascii") + b"\n"

    async def wait_qmp_ready(self) -> None:
        """Wait until QEMU's monitor greets, and so until its machine is built.

        The monitor is free for ``open_qmp`` afterwards. The deadline is the caller's.

        Raises:
            QemuExitedError: QEMU ended instead; names its status and last output.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_greeting, nursery.cancel_scope)
            await self.wait_exited()
            # Only an exit comes here: the greeting cancels.
            nursery.cancel_scope.cancel()
        if self._exited:
            raise self.exited_error()

    async def _wait_greeting(self, done: trio.CancelScope) -> None:
        while True:
            try:
                async with open_qmp(self.qmp_path, greeting_timeout_s=float("inf")):
                    break
            except QmpConnectError:
                await trio.sleep(_POLL_S)  # not listening yet
        done.cancel()

    async def wait_exited(self) -> int | None:
        """Wait until QEMU is dead.

        Returns:
            Its exit status, negative for a signal; ``None`` where only the supervisor was told
            and we no longer speak to it (it was killed, or QEMU was released).
        """
        while not self._exited:
            await self._take_one_message()
            if self._supervisor_gone and not self._exited:
                await self._wait_dead_without_supervisor()
        return self._status

    async def kill(self) -> None:
        """Kill QEMU and wait until it is dead; idempotent, also works after ``release``.

        Its sockets are removed too, unless the supervisor is gone. If this is cancelled, QEMU
        is killed but perhaps not waited for.
        """
        if self._exited:
            return
        try:
            await self._control.send_all(b'{"do": "kill"}\n')
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._supervisor_gone = True
        while not self._heard_the_last():
            await self._take_one_message()
        if self._pidfd is not None and not _is_dead(self._pidfd):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        await self.wait_exited()

    async def release(self) -> None:
        """Leave QEMU running for good: our end no longer concerns it; idempotent.

        Raises:
            QemuExitedError: It ended before.
        """
        if not self._released and not self._exited:
            try:
                await self._control.send_all(b'{"do": "release"}\n')
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._supervisor_gone = True  # then nobody is left who would kill it
        while not (self._released or self._heard_the_last()):
            await self._take_one_message()
        if self._exited:
            raise self.exited_error()
        self._released = True
        self._control.socket.close()

    def exited_error(self) -> QemuExitedError:
        """Build the error for a QEMU that ended, with its status and last output."""
        status = "with unknown status" if self._status is None else _describe(self._status)
        return QemuExitedError(f"QEMU ended {status}; its output: {self.log_tail()}")

    def log_tail(self) -> str:
        """Return the end of QEMU's output, up to ``LOG_TAIL_BYTES``, for error messages."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
                text = log.read().decode("utf-8", "replace").strip()
        except OSError as error:
            return f"({self.log_path}: {error.strerror})"
        return text or "(nothing)"

    def _heard_the_last(self) -> bool:
        return self._exited or self._supervisor_gone

    async def _take_one_message(self) -> None:
        """Take what the supervisor says next; of several callers one reads, all see it."""
        seen = self._messages_taken
        async with self._reading:
            if self._messages_taken != seen:
                return  # another task took one meanwhile: the caller looks again
            message = None if self._supervisor_gone else await self._receive()
            self._messages_taken += 1
            if message is None:
                self._supervisor_gone = True
            elif message["event"] == "released":
                self._released = True
            elif message["event"] == "exited":
                self._status = int(message["status"])
                self._exited = True
                self._close()

    async def _wait_dead_without_supervisor(self) -> None:
        """Only a process descriptor tells of the end of a process that is not our child."""
        if self._pidfd is not None and not _is_dead(self._pidfd):
            await trio.lowlevel.wait_readable(self._pidfd)
        self._exited = True
        self._close()

    async def _receive(self) -> dict[str, Any] | None:
        while b"\n" not in self._buffer:
            try:
                data = await self._control.receive_some(_RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return None
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _close(self) -> None:
        self._control.socket.close()
        if self._pidfd is not None:
            trio.lowlevel.notify_closing(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None


def check_arguments(argv: Sequence[str]) -> None:
    """Refuse a command line that we could not supervise.

    Raises:
        ParamsError: It is empty, or has one of ``REFUSED_ARGUMENTS``.
    """
    if not argv:
        raise ParamsError("no QEMU command line given")
    for argument in argv[1:]:
        for name, reason in REFUSED_ARGUMENTS.items():
            if argument in {f"-{name}", f"--{name}"}:
                raise ParamsError(f"'{argument}' cannot be used here: {reason}")


def _prepare(run_dir: Path, state_file: Path) -> None:
    """Make the run directory, and refuse what an earlier QEMU still needs there."""
    qmp_path = run_dir / "qmp.sock"
    if len(os.fsencode(qmp_path)) > MAX_SOCKET_PATH_BYTES:
        raise ParamsError(
            f"'{qmp_path}' is too long for a socket, at most {MAX_SOCKET_PATH_BYTES} bytes"
        )
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = supervisor.read_state(str(state_file))
    except (OSError, ValueError) as error:
        raise ParamsError(f"cannot use '{run_dir}' with '{state_file}': {error}") from error
    if state == "COMMITTED":
        # Left in place it would make the supervisor spare a QEMU that has no guest yet.
        raise ParamsError(f"'{state_file}' is of a migration that was committed before")
    if _is_listening(qmp_path):
        raise ParamsError(f"another QEMU uses '{qmp_path}'")
    qmp_path.unlink(missing_ok=True)


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True  # its queue is full, or it is not ours to touch
    return True


async def _start_supervisor(control: socket.socket, log_path: Path) -> None:
    with _open_log(log_path) as log:
        await trio.run_process(
            # Isolated and without site: neither the environment nor a package can break it.
            [sys.executable, "-I", "-S", supervisor.__file__, str(control.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=False,
            pass_fds=(control.fileno(),),
            start_new_session=True,
        )


def _open_log(path: Path) -> IO[bytes]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        return os.fdopen(os.open(path, flags, 0o600), "ab")
    except OSError as error:
        raise ParamsError(f"cannot write '{path}': {error.strerror}") from error


def _is_dead(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _describe(status: int) -> str:
    return f"by signal {-status}" if status < 0 else f"with status {status}"

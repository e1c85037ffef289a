"""The parent process of a destination QEMU that we started: it outlives us.

A QEMU that waits for a migration must die with migrate-dst, even if that is killed with
SIGKILL. One that runs the guest must survive migrate-dst. So this small process is QEMU's
parent and holds one end of a socket pair whose other end only migrate-dst has. When that end
closes, the state file that migrate-dst keeps decides.

It is run as a plain file with only the standard library (``python -I -S``), to start fast and
to depend on nothing that may change below it while the guest runs.

Messages are JSON objects, one a line:

    to the supervisor   {"argv", "log", "state_file", "sockets"} once,
                        then {"do": "kill" | "release"}
    from the supervisor {"event": "started", "pid"} or {"event": "error", "message"};
                        {"event": "released"}; {"event": "exited", "status"} as the last one
"""

import contextlib
import json
import os
import select
import signal
import socket
import stat
import sys
from typing import Any

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
"""Not for us: a Ctrl-C, a closed terminal or a service manager that stops migrate-dst must not
leave QEMU without the one who decides about it. We end when QEMU does."""

_RECEIVE_BYTES = 65536


def read_state(path: str) -> str | None:
    """Read the ``state`` in a state file; ``None`` if there is no file.

    Raises:
        OSError: The file exists but cannot be read.
        ValueError: It does not hold a JSON object with a ``state``.
    """
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123  pathlib costs 10 ms of start-up
            content = json.loads(file.read())
    except FileNotFoundError:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("state"), str):
        raise ValueError("no object with a state")
    return str(content["state"])


class Supervisor:
    """Starts one QEMU, obeys migrate-dst while it is there, and decides when it is not."""

    def __init__(self, control: socket.socket) -> None:
        self._control: socket.socket | None = control
        self._buffer = b""
        self._config: dict[str, Any] = {}
        self._pid = 0
        self._pidfd = -1

    def run(self) -> None:
        """Serve until QEMU is gone, or migrate-dst went before QEMU was started."""
        message = self._next_message()
        if message is None or "argv" not in message:
            return
        self._config = message
        try:
            self._start()
        except (OSError, ValueError) as error:
            self._report({"event": "error", "message": getattr(error, "strerror", str(error))})
            return
        self._report({"event": "started", "pid": self._pid})
        status = self._supervise()
        self._remove_sockets()
        self._report({"event": "exited", "status": status})

    def _start(self) -> None:
        argv = self._config["argv"]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        log = os.open(self._config["log"], flags, 0o600)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        # Our own complaints go the same way as QEMU's.
        os.dup2(log, 1)
        os.dup2(log, 2)
        self._pid = os.posix_spawnp(
            argv[0],
            argv,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
            setsigmask=[],
            setsigdef=[*IGNORED_SIGNALS, signal.SIGPIPE, signal.SIGXFSZ],
        )
        self._pidfd = os.pidfd_open(self._pid)
        os.close(log)
        os.close(null)

    def _supervise(self) -> int:
        while True:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if self._control is not None:
                poll.register(self._control, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            if self._pidfd in ready:
                return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            self._obey(self._next_message())

    def _obey(self, message: dict[str, Any] | None) -> None:
        if message is None:
            self._part_from_owner()
            if not self._may_live():
                self._kill()
        elif message.get("do") == "kill":
            self._kill()
        elif message.get("do") == "release":
            self._report({"event": "released"})
            self._part_from_owner()

    def _part_from_owner(self) -> None:
        if self._control is not None:
            self._control.close()
        self._control = None

    def _may_live(self) -> bool:
        """Whether QEMU goes on without migrate-dst.

        A file that is there but cannot be read may say COMMITTED, and then QEMU may run the
        only copy of the guest. Without COMMITTED it is paused and harms nobody. So it lives.
        """
        try:
            return read_state(self._config["state_file"]) == "COMMITTED"
        except (OSError, ValueError) as error:
            path = self._config["state_file"]
            print(f"supervisor: state file {path}: {error}; QEMU is left alone", flush=True)
            return True

    def _kill(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _remove_sockets(self) -> None:
        for path in self._config["sockets"]:
            # QEMU removes them itself when it ends in order.
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    os.unlink(path)  # noqa: PTH108  as above

    def _next_message(self) -> dict[str, Any] | None:
        """Wait for a line from migrate-dst; ``None`` when it is gone."""
        while b"\n" not in self._buffer:
            try:
                data = b"" if self._control is None else self._control.recv(_RECEIVE_BYTES)
            except OSError:
                data = b""
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _report(self, message: dict[str, Any]) -> None:
        if self._control is None:
            return
        with contextlib.suppress(OSError):  # migrate-dst is gone: the next read says so
            self._control.sendall(json.dumps(message).encode("ascii") + b"\n")


def main() -> None:
    """Detach from whoever started us and serve; the argument is the socket's number."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # The starter waits for this process; the one that stays is nobody's child to reap.
    if os.fork():
        os._exit(0)
    Supervisor(control).run()


if __name__ == "__main__":
    main()

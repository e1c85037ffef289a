"""Where ``inspect`` reads from: a file, packed or not, standard input, or a socket."""

import fcntl
import os
import selectors
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final, Literal, Protocol

from migrate.errors import ParamsError
from proto.codecs.zstd_codec import FILE_MAGIC, ZstdReader
from proto.qemu.format import MULTIFD_MAGIC

Kind = Literal["file", "pipe", "socket"]
DRAIN_BYTES: Final = 2**20
PIPE_BYTES: Final = 2**20
"""What a pipe shall hold: in the usual 64 KiB runs of pages are too short for array work."""

MAX_CONNECTIONS: Final = 256
"""A main channel and the most multifd channels; QEMU 10 connects them all before it says a word."""


class Input(Protocol):
    """Bytes of a stream.

    Attributes:
        kind: ``file`` can be read again from its start, the others are live.
        is_packed: Whether it is unpacked on the way (zstd).
    """

    kind: Kind
    is_packed: bool

    def readinto(self, out: memoryview) -> int:
        """Fill some of ``out``; 0 at the end.

        Raises:
            OSError: It cannot be read.
            CodecError: The packed file is damaged.
        """
        ...

    def notes(self) -> list[str]:
        """Say what came beside the stream."""
        ...


class FileInput:
    """A file, or whatever has a name and is no socket."""

    def __init__(self, file: BinaryIO) -> None:
        """Look at the first bytes.

        Args:
            file: Unbuffered; stays the caller's.
        """
        mode = os.fstat(file.fileno()).st_mode
        is_file = stat.S_ISREG(mode)
        if stat.S_ISFIFO(mode):
            with suppress(OSError):
                fcntl.fcntl(file, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.kind: Kind = "file" if is_file else "pipe"
        self.is_packed = is_file and file.read(len(FILE_MAGIC)) == FILE_MAGIC
        if is_file:
            file.seek(0)
        self._fd = file.fileno()
        self._packed = ZstdReader(file) if self.is_packed else None

    def readinto(self, out: memoryview) -> int:
        """Fill some of ``out``; 0 at the end."""
        if self._packed is not None:
            return self._packed.readinto(out)
        return os.readv(self._fd, [out])

    def notes(self) -> list[str]:
        """Say what came beside the stream: nothing."""
        return []


class SocketInput:
    """A unix socket that a QEMU connects to; the stream is its main channel.

    A source with multifd makes more connections and waits for all of them to be read: their
    bytes are counted and dropped.
    """

    def __init__(self, listener: socket.socket) -> None:
        self.kind: Kind = "socket"
        self.is_packed = False
        self._main: socket.socket | None = None
        self._others: dict[socket.socket, int] = {}
        self._dropped_bytes = 0
        self._channels = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._listener = listener

    def readinto(self, out: memoryview) -> int:
        """Wait for bytes of the main channel; 0 when the source closed it."""
        while True:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._listener:
                    self._accept()
                elif sock is self._main:
                    return sock.recv_into(out)
                else:
                    self._drain(sock)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        # Whoever connects says something at once; a multifd channel says what it is.
        first = sock.recv(len(MULTIFD_MAGIC), socket.MSG_PEEK)
        if first == MULTIFD_MAGIC or self._main is not None:
            self._channels += 1
        else:
            self._main = sock
        self._selector.register(sock, selectors.EVENT_READ)

    def _drain(self, sock: socket.socket) -> None:
        dropped = len(sock.recv(DRAIN_BYTES))
        self._dropped_bytes += dropped
        if not dropped:
            self._selector.unregister(sock)
            sock.close()

    def notes(self) -> list[str]:
        """Say what came on other connections."""
        if not self._channels:
            return []
        return [f"{self._dropped_bytes} bytes on {self._channels} more connections (multifd)"]

    def close(self) -> None:
        """Close all connections: a source that waits for an answer goes on with its guest."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()


@contextmanager
def open_input(name: str) -> Iterator[Input]:
    """Open ``FILE``, ``-`` or ``unix:PATH``; the socket's file is removed at the end.

    Raises:
        ParamsError: It is not there or not ours to read, or the address is taken.
    """
    if name == "-":
        with ExitStack() as stack:
            try:
                file = stack.enter_context(open(0, "rb", buffering=0, closefd=False))
            except OSError as error:
                raise ParamsError(f"cannot read standard input: {error.strerror}") from error
            yield FileInput(file)
    elif name.startswith("unix:"):
        with _listening(Path(name.removeprefix("unix:"))) as listener:
            live = SocketInput(listener)
            try:
                yield live
            finally:
                live.close()
    else:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(Path(name).open("rb", buffering=0))
                source = FileInput(file)
            except OSError as error:
                raise ParamsError(f"cannot read {name}: {error.strerror}") from error
            yield source


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            _remove_dead_socket(path)
            listener.bind(str(path))
        except OSError as error:
            raise ParamsError(
                f"cannot listen at unix:{path}: {error.strerror or error}"
            ) from error
        try:
            listener.listen(MAX_CONNECTIONS)
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _remove_dead_socket(path: Path) -> None:
    """Remove a socket that nobody listens at any more; everything else stays."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()

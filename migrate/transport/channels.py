"""Sockets: open, accept, receive into our own memory, send gather lists.

trio's streams hand out copies of 64-100 KiB; at a gigabyte a second that is a copy too many, so the
engine works on trio sockets directly.
"""

import errno
import os
import resource
import socket
import stat
from collections.abc import Awaitable, Iterable
from pathlib import Path
from typing import Any, Protocol

import trio

from migrate.errors import ConnectError
from migrate.params import LinkAddress, SocketAddress, UnixAddress

IOV_MAX = 1024
"""Most buffers the kernel takes in one sendmsg."""

LOCAL_SEND_BUFFER_BYTES = 1 << 20
"""Asked for on the hop to the destination QEMU; the kernel may grant less."""

LINK_NOTSENT_BYTES = 128 * 1024
"""Unsent bytes the kernel may hold for the link: what lies there is delay, not bandwidth."""

SO_SNDBUFFORCE = 32
TCP_NOTSENT_LOWAT = 25
"""Linux's numbers; the socket module does not name them in every Python."""

SPARED_DESCRIPTORS = 12
"""Not for strangers and further connections: a migration opens records, sockets, modules."""

Buffer = bytes | bytearray | memoryview


class Tunable(Protocol):
    """A connection's options."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Tune the connection; what is not known is ignored or an ``OSError``."""
        ...


class LinkSocket(Protocol):
    """What the link needs of a connection: of trio's sockets, which do it, or of others."""

    async def sendmsg(
        self,
        buffers: Iterable[memoryview],
        ancdata: Iterable[tuple[int, int, Buffer]],
        flags: int,
        /,
    ) -> int:
        """Send some of the buffers in order; returns how many bytes."""
        ...

    def recv_into(self, buffer: bytearray | memoryview, /) -> Awaitable[int]:
        """Receive at least one byte; returns how many, 0 at the end of the stream."""
        ...

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Tune the connection; what is not known is ignored or an ``OSError``."""
        ...

    def shutdown(self, flag: int, /) -> None:
        """End our direction (``SHUT_WR``)."""
        ...

    def close(self) -> None:
        """Close both directions."""
        ...


class LinkListener(Protocol):
    """What migrate-dst needs of a listening socket."""

    def accept(self) -> Awaitable[tuple[LinkSocket, Any]]:
        """Wait for a connection; returns it and the peer's address, the host first."""
        ...

    def getsockname(self) -> Any:  # noqa: ANN401 - as trio's
        """Our address: host and port first."""
        ...

    def close(self) -> None:
        """Listen no longer."""
        ...


def has_descriptors(count: int) -> bool:
    """Whether about so many files more may be opened, as the lowest free number says."""
    try:
        lowest = os.open("/", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    os.close(lowest)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit == resource.RLIM_INFINITY or lowest + count <= limit


async def send_all(sock: trio.socket.SocketType, buffers: Iterable[Buffer]) -> int:
    """Send buffers in order without joining them; returns the bytes sent.

    A cancelled call may have sent any part: the stream is then unusable.
    """
    views = [memoryview(buffer) for buffer in buffers if len(buffer)]
    total = sum(view.nbytes for view in views)
    await send_views(sock, views)
    return total


async def send_views(sock: LinkSocket, views: list[memoryview]) -> None:
    """Send buffers, none empty, and take them off the list; a cancelled call leaves the rest."""
    while views:
        # A socket shared with a thread may be a blocking one; here nothing ever blocks.
        take_off(views, await sock.sendmsg(views[:IOV_MAX], [], socket.MSG_DONTWAIT))


def take_off(views: list[memoryview], n_bytes: int) -> None:
    """Take what was sent off a list of buffers, none empty."""
    done = 0
    while done < len(views) and n_bytes >= views[done].nbytes:
        n_bytes -= views[done].nbytes
        done += 1
    del views[:done]
    if n_bytes:
        views[0] = views[0][n_bytes:]


def tune_link(sock: "Tunable") -> None:
    """Set a link connection up for small latency: no delays, no deep kernel queue."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, LINK_NOTSENT_BYTES)


def widen_send_buffer(sock: trio.socket.SocketType) -> None:
    """Let a local socket hold a whole batch, so that writing one takes one wake-up.

    Beyond the kernel's usual limit only root may go; others get what the limit allows.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, LOCAL_SEND_BUFFER_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_SEND_BUFFER_BYTES)


async def connect_tcp(address: LinkAddress, what: str) -> trio.socket.SocketType:
    """Connect to ``address``.

    Raises:
        ConnectError: Nothing answers there; the text names ``what`` and the address.
    """
    try:
        stream = await trio.open_tcp_stream(address.host, address.port)
    except OSError as error:
        raise ConnectError(f"cannot reach {what} at {address}: {reason(error)}") from error
    return stream.socket


async def connect(address: SocketAddress, what: str) -> trio.socket.SocketType:
    """Connect to a TCP or unix address; raises ConnectError as ``connect_tcp`` does."""
    if isinstance(address, LinkAddress):
        return await connect_tcp(address, what)
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await sock.connect(str(address.path))
    except OSError as error:
        sock.close()
        raise ConnectError(f"cannot reach {what} at {address}: {reason(error)}") from error
    except BaseException:
        sock.close()
        raise
    return sock


async def listen(
    address: SocketAddress,
    what: str,
    *,
    mode: int = 0o600,
    owner: tuple[int, int] | None = None,
) -> trio.socket.SocketType:
    """Listen on ``address``; a stale unix socket file is replaced, any other file is not.

    Args:
        address: Where.
        what: Name for error messages.
        mode: Permissions of a unix socket.
        owner: uid and gid of a unix socket, None = ours.

    Raises:
        ConnectError: The address cannot be listened on.
    """
    try:
        if isinstance(address, UnixAddress):
            return await _listen_unix(address.path, mode, owner)
        listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=16)
    except OSError as error:
        raise ConnectError(f"cannot listen on {address} for {what}: {reason(error)}") from error
    for extra in listeners[1:]:
        await extra.aclose()
    return listeners[0].socket


async def _listen_unix(
    path: Path, mode: int, owner: tuple[int, int] | None
) -> trio.socket.SocketType:
    if path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise OSError(errno.EEXIST, "a file that is no socket is in the way")
        path.unlink()
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await sock.bind(str(path))
        path.chmod(mode)
        if owner is not None:
            os.chown(path, *owner)
        sock.listen(16)
    except BaseException:
        sock.close()
        raise
    return sock


def reason(error: OSError) -> str:
    """The cause in words, without Python's and trio's decoration."""
    if error.strerror:
        # trio says the address again: "Error connecting to ('::1', 7001, 0, 0): Connection refused"
        decorated = error.strerror.startswith("Error connecting to ")
        return os.strerror(error.errno or 0) if decorated else error.strerror
    cause = error.__cause__
    if isinstance(cause, ExceptionGroup) and isinstance(cause.exceptions[0], OSError):
        return reason(cause.exceptions[0])
    return str(error)

"""What Linux knows of a TCP connection: ``TCP_INFO`` of tcp(7), laid out as in linux/tcp.h."""

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

_APP_LIMITED_AT: Final = 7
_FIELDS: Final = struct.Struct("=8x 24I QQ QQ II 4I QQ")
"""Up to ``tcpi_busy_time``; Linux 4.10 and newer have it all."""

_BYTES_ACKED, _NOTSENT, _BUSY_US = 26, 30, 35
"""Places of ``bytes_acked``, ``notsent_bytes`` and ``busy_time`` among the fields."""


@dataclass(frozen=True, slots=True)
class TcpState:
    """How a connection's sending half is doing.

    Attributes:
        acked_bytes: What the peer's kernel has acknowledged since the connection began.
        busy_us: Microseconds in which something was under way or waited to be sent.
        unsent_bytes: What waits in this host's kernel.
        app_limited: There was less to send than the network would have taken, as the kernel found
            when something was last sent.
    """

    acked_bytes: int
    busy_us: int
    unsent_bytes: int
    app_limited: bool

    @property
    def waiting(self) -> bool:
        """More waits than the network takes: the sender is not what limits the rate."""
        return self.unsent_bytes > 0 or not self.app_limited


class Asked(Protocol):
    """A socket, or what stands on one."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """See ``socket.getsockopt``."""
        ...


def tcp_state(sock: Asked) -> TcpState | None:
    """Ask the kernel; ``None`` if this socket or this kernel cannot say."""
    try:
        raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _FIELDS.size)
    except OSError:
        return None
    if len(raw) < _FIELDS.size:
        return None
    fields = _FIELDS.unpack(raw)
    limited = bool(raw[_APP_LIMITED_AT] & 1)
    return TcpState(fields[_BYTES_ACKED], fields[_BUSY_US], fields[_NOTSENT], limited)


def joint_state(states: Sequence[TcpState | None]) -> TcpState | None:
    """One state for several connections of one link: bytes in all, the mean of busy time."""
    known = [state for state in states if state is not None]
    if not known or len(known) < len(states):
        return None
    return TcpState(
        acked_bytes=sum(state.acked_bytes for state in known),
        busy_us=sum(state.busy_us for state in known) // len(known),
        unsent_bytes=sum(state.unsent_bytes for state in known),
        app_limited=all(state.app_limited for state in known),
    )

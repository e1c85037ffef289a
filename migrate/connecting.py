"""migrate-src's way to migrate-dst: a connection, past the guard, as a link."""

from typing import Final

import trio

from migrate.errors import ConnectError, PeerLostError
from migrate.params import SourceParams
from migrate.runtime import Runtime
from migrate.transport.guard import Guard
from migrate.transport.link import Link
from migrate.transport.socket_stream import start_stream
from migrate.transport.stream import LinkStream
from proto.link.session import LinkSession
from proto.link.state import Role

AGAIN_S: Final = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Before each further attempt to be admitted; somebody else who listens there ends all of them."""


async def open_link(params: SourceParams, runtime: Runtime, guard: Guard) -> Link:
    """Connect to migrate-dst, with everything that the guard asks.

    Raises:
        ConnectError: Nothing answers there, or not in time.
        TlsError: One end does not take the other's certificate, or speaks no TLS.
        TokenError: The two ends have different tokens, or one has none.
        PeerLostError: The connection broke.
        PeerProtocolError: Something else listens there.
    """
    peer = peer_name(params)
    with trio.move_on_after(params.connect_timeout_s):
        stream = await _open_first(params, runtime, guard)
        silence_s = params.timeouts.peer_s
        return Link(stream, LinkSession(Role.SOURCE), peer, silence_s=silence_s)
    raise ConnectError(f"{peer} did not answer within {params.connect_timeout_s:.0f} s")


async def _open_first(params: SourceParams, runtime: Runtime, guard: Guard) -> LinkStream:
    """Open a connection; one that was cut before anything was said may have been cut by chance."""
    for pause_s in AGAIN_S:
        try:
            return await open_stream(params, runtime, guard)
        except PeerLostError:
            await trio.sleep(pause_s)
    return await open_stream(params, runtime, guard)


async def open_stream(params: SourceParams, runtime: Runtime, guard: Guard) -> LinkStream:
    """Open one connection to migrate-dst; raises as ``open_link`` does, and sets no deadline."""
    sock = await runtime.connect(params.to, "migrate-dst")
    sock = await guard.enter(sock, params.to, peer_name(params))
    return start_stream(sock, Role.SOURCE)


def peer_name(params: SourceParams) -> str:
    """The destination, for error texts."""
    return f"migrate-dst at {params.to}"

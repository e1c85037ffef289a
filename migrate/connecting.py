"""migrate-src's way to migrate-dst: a connection, past the guard, as a link."""

import trio

from migrate.errors import ConnectError
from migrate.params import SourceParams
from migrate.runtime import Runtime
from migrate.transport.guard import Guard
from migrate.transport.link import Link
from proto.link.session import LinkSession
from proto.link.state import Role


async def open_link(params: SourceParams, runtime: Runtime, guard: Guard) -> Link:
    """Connect to migrate-dst, with everything that the guard asks.

    Raises:
        ConnectError: Nothing answers there, or not in time.
        TlsError: One end does not take the other's certificate, or speaks no TLS.
        TokenError: The two ends have different tokens, or one has none.
        PeerLostError: The connection broke.
        PeerProtocolError: Something else listens there.
    """
    peer = f"migrate-dst at {params.to}"
    with trio.move_on_after(params.connect_timeout_s):
        sock = await runtime.connect(params.to, "migrate-dst")
        sock = await guard.enter(sock, params.to, peer)
        silence_s = params.timeouts.peer_s
        return Link(sock, LinkSession(Role.SOURCE), peer, silence_s=silence_s)
    raise ConnectError(f"{peer} did not answer within {params.connect_timeout_s:.0f} s")

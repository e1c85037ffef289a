"""What the kernel says of a real connection."""

import contextlib
import socket

from migrate.transport.tcp_info import TcpState, joint_state, tcp_state


def test_the_kernel_counts_what_the_peer_has_acknowledged() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sock,
        server.accept()[0] as peer,
    ):
        before = tcp_state(sock)
        sock.sendall(bytes(100_000))
        received = 0
        while received < 100_000:
            received += len(peer.recv(65536))
        peer.sendall(b"x")
        assert sock.recv(1) == b"x"  # carries the acknowledgement
        after = tcp_state(sock)
    assert before is not None
    assert after is not None
    assert after.acked_bytes - before.acked_bytes == 100_000
    assert after.busy_us >= before.busy_us


def test_what_waits_for_a_peer_that_does_not_read_is_seen() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sock,
    ):
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(bytes(1 << 20))
        state = tcp_state(sock)
    assert state is not None
    assert state.waiting


def test_other_sockets_say_nothing() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert tcp_state(left) is None


def test_connections_of_one_link_are_seen_as_one() -> None:
    one, other = TcpState(100, 50, 0, True), TcpState(300, 150, 7, False)
    assert joint_state([one, other]) == TcpState(400, 100, 7, False)
    assert (one.waiting, other.waiting) == (False, True)
    assert joint_state([one, None]) is None
    assert joint_state([]) is None

"""What every decoder of a peer's bytes promises, beside the errors that it may raise."""

from collections.abc import Callable

from proto.errors import RemoteProtocolError


def says_again(call: Callable[[], object], error: RemoteProtocolError) -> bool:
    """Whether a decoder that has failed raises the same error at the next call."""
    try:
        call()
    except RemoteProtocolError as again:
        return again is error
    return False

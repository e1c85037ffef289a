"""What a message must be in the light of an earlier one: answers that fit their question."""

from dataclasses import dataclass

from proto.errors import MessageError, VersionMismatchError
from proto.limits import DIGEST_BYTES, MIN_JOIN_TOKEN_BYTES
from proto.link.messages import (
    CommitKind,
    DigestQuery,
    DigestReply,
    Hello,
    OldCopy,
    PrecopyAgain,
    Welcome,
)
from proto.link.vocabulary import OLDEST_VERSION, PRECOPY_AGAIN, PROTOCOL_VERSION


def check_welcome(where: str, hello: Hello, welcome: Welcome) -> None:
    """Check an answer against what was offered.

    Raises:
        VersionMismatchError: A version neither side offered, or we do not speak.
        MessageError: More slots or streams, other capabilities or another commit than offered.
    """
    low, high = max(hello.oldest, OLDEST_VERSION), min(hello.version, PROTOCOL_VERSION)
    if not low <= welcome.version <= high:
        raise VersionMismatchError(where, f"version {low} to {high}", str(welcome.version))
    if welcome.cache_slots > hello.cache_slots:
        offered = f"at most {hello.cache_slots} cache slots"
        raise MessageError(where, offered, str(welcome.cache_slots))
    if welcome.landed and welcome.cache_slots:
        raise MessageError(where, "no cache slots beside landed RAM", str(welcome.cache_slots))
    if len(set(welcome.landed)) != len(welcome.landed):
        raise MessageError(where, "each landed block once", repr(welcome.landed)[:80])
    if welcome.streams > hello.streams:
        raise MessageError(where, f"at most {hello.streams} streams", str(welcome.streams))
    _check_join_token(where, welcome)
    if welcome.old_pages and hello.vm_id is None:
        raise MessageError(where, "no old copy of a VM without identity", "one")
    if (hello.commit == "relay") != (welcome.commit == CommitKind.RELAYED.value):
        raise MessageError(where, f"a commit that fits {hello.commit!r}", welcome.commit)
    agreed = set(welcome.capabilities)
    if not set(hello.required) <= agreed <= {*hello.required, *hello.optional}:
        raise MessageError(where, "all required and only offered capabilities", str(agreed))


def _check_join_token(where: str, welcome: Welcome) -> None:
    length = len(welcome.join_token)
    if welcome.streams == 1 and length:
        raise MessageError(where, "no join token for one connection", f"{length} bytes")
    if welcome.streams > 1 and length < MIN_JOIN_TOKEN_BYTES:
        expected = f"a join token of {MIN_JOIN_TOKEN_BYTES} bytes or more"
        raise MessageError(where, expected, f"{length} bytes")


def check_turn(where: str, welcome: Welcome | None, turns: int, again: PrecopyAgain) -> None:
    """Check that going back to pre-copy was agreed upon, and is counted.

    Raises:
        MessageError: It was not, or is not.
    """
    if welcome is None or PRECOPY_AGAIN not in welcome.capabilities:
        raise MessageError(where, f"the capability {PRECOPY_AGAIN!r}", "it was not agreed upon")
    if again.count != turns + 1:
        raise MessageError(where, f"count {turns + 1}", str(again.count))


@dataclass(slots=True)
class Announced:
    """How much of the old copy was announced: in order, once, no more than WELCOME said."""

    pages: int = 0
    complete: bool = False

    def take(self, where: str, welcome: Welcome | None, message: OldCopy) -> None:
        """Account for a message.

        Raises:
            MessageError: Too many pages, others than the next, or any behind the last.
        """
        limit = 0 if welcome is None else welcome.old_pages
        count = len(message.digests) // DIGEST_BYTES
        if self.complete:
            raise MessageError(where, "nothing behind the last of the old copy", "more")
        if message.first_page != self.pages:
            raise MessageError(where, f"old pages from {self.pages}", str(message.first_page))
        if self.pages + count > limit:
            raise MessageError(where, f"{limit} old pages", str(self.pages + count))
        self.pages += count
        self.complete = message.is_last


def choose_capabilities(hello: Hello, known: frozenset[str]) -> tuple[str, ...]:
    """Return what a WELCOME may name: the offered capabilities that ``known`` contains."""
    return tuple(sorted({*hello.required, *hello.optional} & known))


def check_reply(where: str, query: DigestQuery | None, reply: DigestReply) -> None:
    """Check that a digest reply speaks of ranges that were asked for.

    Raises:
        MessageError: An index beyond the query's ranges.
    """
    asked = 0 if query is None else len(query.ranges)
    if reply.differing and reply.differing[-1] >= asked:
        raise MessageError(where, f"an index below {asked}", str(reply.differing[-1]))

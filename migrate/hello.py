"""The introduction: HELLO, comparison of both machines, WELCOME or REFUSED."""

from collections.abc import Iterator
from dataclasses import dataclass

import trio

from migrate.errors import (
    MachineMismatchError,
    MigrationError,
    ParamsError,
    PeerLostError,
    PeerProtocolError,
    PeerRefusedError,
    TlsError,
    TokenError,
)
from migrate.guests.base import DestinationGuest, Facts, SourceGuest
from migrate.guests.simulated_destination import SimulatedDestination
from migrate.guests.simulated_facts import compare_simulated, is_simulated
from migrate.pages.page_cache import affordable_slots, less_cache
from migrate.qemu.machine_facts import MachineFacts
from migrate.qemu.preflight import Difference, Severity, compare
from migrate.report.report import Commit
from migrate.runtime import Runtime
from migrate.transport.link import Link
from proto.errors import MessageError
from proto.guest_events import PAGE_SIZE
from proto.limits import MAX_WARNINGS
from proto.link import messages
from proto.link.checks import choose_capabilities
from proto.link.messages import CommitKind, Hello, Welcome
from proto.link.vocabulary import PRECOPY_AGAIN, WORDS
from proto.packing import clip_text

ANSWER_S = 60.0
"""From HELLO to WELCOME: the destination asks its QEMU about the machine."""

FAREWELL_S = 3.0

TOKEN_BYTES = 32
"""Nobody guesses 256 bits."""

REFUSALS = {error.code: error for error in (MachineMismatchError, TlsError, TokenError)}


@dataclass(frozen=True, slots=True)
class Agreement:
    """What both sides go on with.

    Attributes:
        migration_id: 16 bytes that name the migration.
        kind: Who commits.
        seed: Digest seed.
        slot_count: Page cache slots. With landed RAM the destination has none, and those of the
            source are its own affair.
        landed: RAM blocks whose pages are written into the destination guest's RAM in place.
        old_pages: Slots of the destination's old copy.
        warnings: What a person should know.
        not_checked: What the comparison could not look at.
        restore_balloon_bytes: Memory that the guest is to have again where it arrives; ``None``: it
            gave nothing back for its migration.
        may_turn_back: The source may go back to pre-copy; at the destination the session knows.
        may_use_words: The destination knows the codec ``words``; at the source only.
    """

    migration_id: bytes
    kind: CommitKind
    seed: int
    slot_count: int
    landed: frozenset[str]
    old_pages: int
    warnings: tuple[str, ...]
    not_checked: tuple[str, ...]
    restore_balloon_bytes: int | None = None
    may_turn_back: bool = False
    may_use_words: bool = False


async def introduce(
    link: Link,
    guest: SourceGuest,
    facts: Facts,
    runtime: Runtime,
    *,
    cache_bytes: int,
    relay: bool,
    vm_id: str | None,
    streams: int,
    needs_words: bool = False,
) -> Agreement:
    """Source: say what we are and want, hear what the destination makes of it.

    Raises:
        PeerRefusedError: The destination does not take the migration.
        MachineMismatchError: The machines differ.
        PeerLostError: The link broke, or no answer came.
    """
    hello = Hello(
        migration_id=runtime.random_bytes(16),
        digest_seed=int.from_bytes(runtime.random_bytes(8), "little"),
        cache_slots=cache_bytes // PAGE_SIZE,
        facts=facts.machine,
        facts_missing=facts.missing,
        commit="relay" if relay else "auto",
        return_path=guest.return_path,
        paused_at_start=guest.was_running is False,
        vm_id=vm_id,
        streams=streams,
        resume_token=runtime.random_bytes(TOKEN_BYTES),
        required=(WORDS,) if needs_words else (),
        optional=tuple(_optional(guest, needs_words=needs_words)),
    )
    await link.send(hello)
    welcome: Welcome | None = None
    with trio.move_on_after(ANSWER_S):
        welcome = await _answer(link)
    if welcome is None:
        raise PeerLostError(f"{link.peer} did not answer HELLO within {ANSWER_S:.0f} s")
    return Agreement(
        migration_id=hello.migration_id,
        kind=CommitKind(welcome.commit),
        seed=hello.digest_seed,
        slot_count=hello.cache_slots if welcome.landed else welcome.cache_slots,
        landed=frozenset(welcome.landed),
        old_pages=welcome.old_pages,
        may_turn_back=PRECOPY_AGAIN in welcome.capabilities,
        may_use_words=WORDS in welcome.capabilities,
        warnings=tuple(welcome.warnings),
        not_checked=_not_checked(facts.missing, welcome.facts_missing),
    )


def _optional(guest: SourceGuest, *, needs_words: bool) -> Iterator[str]:
    if guest.can_start_again:
        yield PRECOPY_AGAIN
    if not needs_words:
        yield WORDS


async def _answer(link: Link) -> Welcome:
    while True:
        message = await link.receive()
        match message:
            case Welcome():
                return message
            case messages.Refused(code, text):
                raise REFUSALS.get(code, PeerRefusedError)(text)
            case messages.Abort(_, text, _):
                raise PeerRefusedError(text)
            case None:
                raise PeerLostError(f"{link.peer} closed the connection")
            case _:
                continue


async def answer_hello(
    link: Link,
    hello: Hello,
    guest: DestinationGuest,
    runtime: Runtime,
    *,
    cache_max_bytes: int,
    old_pages: int,
) -> Agreement:
    """Destination: compare the machines and say WELCOME.

    Raises:
        MachineMismatchError: They differ in a way that damages the guest; REFUSED was sent.
        MigrationError: The guest's facts cannot be had; REFUSED was sent.
    """
    try:
        facts, warnings, landed = await _prepare(hello, guest)
    except MigrationError as error:
        with trio.move_on_after(FAREWELL_S, shield=True):
            await link.try_send(messages.Refused(error.code, clip_text(str(error))))
        raise
    kind = commit_kind(
        relay=hello.commit == "relay",
        commanded=guest.commanded,
        return_path=hello.return_path,
    )
    # A guest's RAM holds more pages than any cache of them.
    wished = 0 if landed else min(hello.cache_slots, cache_max_bytes // PAGE_SIZE)
    slot_count = affordable_slots(wished)
    if slot_count < wished:
        warnings += (f"at the destination: {less_cache(wished, slot_count)}",)
    await link.send(
        Welcome(
            commit=kind.value,
            cache_slots=slot_count,
            facts=facts.machine,
            facts_missing=facts.missing,
            landed=landed,
            old_pages=old_pages,
            capabilities=_capabilities(hello, kind),
            warnings=warnings[:MAX_WARNINGS],
            streams=hello.streams,
            join_token=runtime.random_bytes(TOKEN_BYTES) if hello.streams > 1 else b"",
        )
    )
    return Agreement(
        migration_id=hello.migration_id,
        kind=kind,
        seed=hello.digest_seed,
        slot_count=slot_count,
        landed=frozenset(landed),
        old_pages=old_pages,
        warnings=warnings,
        not_checked=_not_checked(hello.facts_missing, facts.missing),
        restore_balloon_bytes=_restore_balloon(hello, facts),
    )


def _capabilities(hello: Hello, kind: CommitKind) -> tuple[str, ...]:
    """Those that are offered and can be used; a relayed handover is not ours to begin again."""
    known = {WORDS} if kind is CommitKind.RELAYED else {WORDS, PRECOPY_AGAIN}
    return choose_capabilities(hello, frozenset(known))


async def _prepare(
    hello: Hello, guest: DestinationGuest
) -> tuple[Facts, tuple[str, ...], tuple[str, ...]]:
    """Facts of the destination, what a person should know of them, and blocks that land."""
    if hello.commit == "relay" and guest.commanded:
        raise ParamsError(
            "--commit relay is for a destination QEMU that somebody else starts the guest of "
            "(migrate-dst --incoming); this migrate-dst commands its QEMU itself"
        )
    facts = await guest.facts()
    warnings = _machine_warnings(hello, facts)
    landed = await guest.prepare_landing()
    if isinstance(guest, SimulatedDestination) and hello.facts is not None:
        await guest.prepare(hello.facts)
    return facts, warnings, landed


def _restore_balloon(hello: Hello, destination: Facts) -> int | None:
    """What the guest is to have again here; the source's facts were checked by the comparison."""
    if hello.facts is None or destination.machine is None or is_simulated(hello.facts):
        return None
    return MachineFacts.from_dict(hello.facts).restore_balloon_bytes


def commit_kind(*, relay: bool, commanded: bool, return_path: bool) -> CommitKind:
    """Who commits (design, section 5).

    Args:
        relay: The user said that the owner of both monitors commits.
        commanded: The destination guest runs when we say so.
        return_path: The source guest stays held until we let it go.
    """
    if relay:
        return CommitKind.RELAYED
    return CommitKind.HELD if commanded and return_path else CommitKind.WITHHELD


def reported_commit(kind: CommitKind, form: str) -> Commit:
    """What the report calls the handover: no QEMU takes part in that of a simulated guest."""
    return "simulated" if form == "simulate" else kind.value


def _machine_warnings(hello: Hello, destination: Facts) -> tuple[str, ...]:
    """Compare both machines; what a person should know of the differences.

    Raises:
        MachineMismatchError: They differ in a way that damages the guest.
        PeerProtocolError: The peer's facts are none.
    """
    differences = compare_machines(hello, destination)
    errors = [d.text for d in differences if d.severity is Severity.ERROR]
    if errors:
        raise MachineMismatchError(
            f"the two machines differ: {'; '.join(errors)}. The guest stays where it is"
        )
    return tuple(clip_text(d.text) for d in differences)


def compare_machines(hello: Hello, destination: Facts) -> list[Difference]:
    """Compare both machines; nothing where one side cannot be asked.

    Raises:
        PeerProtocolError: The peer's facts are none.
    """
    if is_simulated(hello.facts) or is_simulated(destination.machine):
        return list(compare_simulated(hello.facts, destination.machine))
    if hello.facts is None or destination.machine is None:
        return []
    try:
        source = MachineFacts.from_dict(hello.facts)
    except MessageError as error:
        raise PeerProtocolError(f"the source's machine facts: {error}") from error
    return compare(source, MachineFacts.from_dict(destination.machine))


def _not_checked(source_missing: str, destination_missing: str) -> tuple[str, ...]:
    missing = [text for text in (source_missing, destination_missing) if text]
    if not missing:
        return ()
    return (f"the machines were not compared: {'; '.join(missing)}",)

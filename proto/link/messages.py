"""The messages of the link protocol, as values.

Numbered messages carry the guest's state from the source to the destination; control messages
say what happens to it. Adding a message is one dataclass here, its keys in
``proto.link.fields``, one row in ``proto.link.dispatch``, its rows in ``proto.link.state``, and
its section in ``docs/link-protocol.md``.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from proto.codecs import CodecId
from proto.guest_events import OpaqueKind, RamBlock
from proto.link.frames import Buffer, FrameType
from proto.link.pages import PageBatch
from proto.link.vocabulary import OLDEST_VERSION, PROTOCOL_VERSION


class CommitKind(enum.Enum):
    """Who commits, and with what (``docs/link-protocol.md``, section Handover)."""

    HELD = "held"
    WITHHELD = "withheld"
    RELAYED = "relayed"


@dataclass(frozen=True, slots=True)
class RamBlockTable:
    """RAM_BLOCKS: names and lengths of the guest's RAM, before any page.

    Attributes:
        blocks: In stream order; pages name a block by its index.
        start: The stream's bytes that announced them, verbatim.
    """

    frame_type: ClassVar[FrameType] = FrameType.RAM_BLOCKS

    blocks: tuple[RamBlock, ...]
    start: Buffer = b""


@dataclass(frozen=True, slots=True)
class OpaqueData:
    """OPAQUE: bytes of the stream that are not pages, in place; encoded like pages.

    Attributes:
        kind: Which part of the stream they are.
        encoded: The bytes as encoded with ``codec_id``.
        raw_len: Their number after decoding.
        codec_id: A ``CodecId``; RAW unless that makes them shorter.
        reason: Why the stream is not understood, in the first message where it is not.
    """

    frame_type: ClassVar[FrameType] = FrameType.OPAQUE

    kind: OpaqueKind
    encoded: Buffer
    raw_len: int
    codec_id: int = CodecId.RAW
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RoundEnd:
    """ROUND_END: a walk over the dirty bitmap ended; ``round_no`` 0 is the bulk round."""

    frame_type: ClassVar[FrameType] = FrameType.ROUND_END

    round_no: int


@dataclass(frozen=True, slots=True)
class Switchover:
    """SWITCHOVER: the guest is stopped; ``prelude`` must precede the end of RAM, verbatim."""

    frame_type: ClassVar[FrameType] = FrameType.SWITCHOVER

    prelude: Buffer = b""


@dataclass(frozen=True, slots=True)
class DeviceStateData:
    """DEVICE_STATE: a piece of the tail behind the last RAM section, as in ``OpaqueData``."""

    frame_type: ClassVar[FrameType] = FrameType.DEVICE_STATE

    encoded: Buffer
    raw_len: int
    codec_id: int = CodecId.RAW


@dataclass(frozen=True, slots=True)
class EndOfState:
    """END_OF_STATE: nothing of the guest follows.

    Attributes:
        run_state: The guest's run state in QEMU's words, ``None`` if it could not be read.
        ram_digest: Digest over the table of page digests, 16 bytes.
        opaque_digest: Digest over everything that is not pages, 16 bytes.
        page_count: Pages in the table.
        rings_checked: Every virtio ring in use was compared with the memory that was sent.
    """

    frame_type: ClassVar[FrameType] = FrameType.END_OF_STATE

    run_state: str | None
    ram_digest: bytes
    opaque_digest: bytes
    page_count: int
    rings_checked: bool


@dataclass(frozen=True, slots=True)
class PrecopyAgain:
    """PRECOPY_AGAIN: the guest runs at the source again, which sends all of its pages anew.

    Attributes:
        count: How often that has happened, this time included.
    """

    frame_type: ClassVar[FrameType] = FrameType.PRECOPY_AGAIN

    count: int


@dataclass(frozen=True, slots=True)
class Hello:
    """HELLO: what the source is and wants; first message of all.

    Attributes:
        migration_id: 16 random bytes that name the migration.
        digest_seed: Seed of the page digests of this migration.
        cache_slots: Page cache slots the source would like; 0 = no cache.
        facts: The source machine, for the comparison before the migration; ``None`` if unknown.
        facts_missing: Why ``facts`` is ``None``, else empty.
        commit: ``"auto"``, or ``"relay"`` to let whoever owns both monitors commit.
        return_path: The source guest stays held until it is let go; ``False`` for a QEMU that
            completes as soon as its stream was read.
        paused_at_start: The guest was paused before the migration.
        required: Capabilities without which the source does not go on.
        optional: Capabilities it would use.
        vm_id: Identity of the VM that comes; ``None``: nothing kept of it may be used.
        streams: Connections the source would open in all.
        resume_token: The secret with which it comes back after a cut; empty: it never will.
        version: Protocol version of the source.
        oldest: Oldest version it speaks.
    """

    frame_type: ClassVar[FrameType] = FrameType.HELLO

    migration_id: bytes
    digest_seed: int
    cache_slots: int
    facts: Mapping[str, object] | None
    facts_missing: str = ""
    commit: str = "auto"
    return_path: bool = True
    paused_at_start: bool = False
    vm_id: str | None = None
    streams: int = 1
    resume_token: bytes = b""
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    version: int = PROTOCOL_VERSION
    oldest: int = OLDEST_VERSION


@dataclass(frozen=True, slots=True)
class Welcome:
    """WELCOME: the destination takes the migration.

    Attributes:
        commit: The ``CommitKind``'s value that will be used.
        cache_slots: Page cache slots, at most those offered; 0 if any block lands.
        landed: Names of the RAM blocks whose pages are written into the guest's RAM in place.
        facts: The destination machine, ``None`` if unknown.
        facts_missing: Why ``facts`` is ``None``, else empty.
        capabilities: The offered capabilities that will be used; all required ones are.
        warnings: What a person should know, one sentence each.
        old_pages: Slots of the old copy: as many pages may be announced, and no more; 0 = there
            is none.
        streams: Connections that will be taken in all, this one among them; at most those wished.
        join_token: The secret that admits the further ones; empty if there are none.
        version: Protocol version that will be used.
    """

    frame_type: ClassVar[FrameType] = FrameType.WELCOME

    commit: str
    cache_slots: int
    facts: Mapping[str, object] | None
    facts_missing: str = ""
    capabilities: tuple[str, ...] = ()
    landed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    old_pages: int = 0
    streams: int = 1
    join_token: bytes = b""
    version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Refused:
    """REFUSED: the destination does not take the migration, or the connection, and why."""

    frame_type: ClassVar[FrameType] = FrameType.REFUSED

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Join:
    """JOIN: a further connection of a migration; first message there.

    Attributes:
        migration_id: As HELLO named it.
        join_token: As WELCOME gave it.
        connection: Its number, from 1.
        epoch: The link's epoch, 0 before the first cut.
    """

    frame_type: ClassVar[FrameType] = FrameType.JOIN

    migration_id: bytes
    join_token: bytes
    connection: int
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Joined:
    """JOINED: numbered frames may come on this connection."""

    frame_type: ClassVar[FrameType] = FrameType.JOINED


@dataclass(frozen=True, slots=True)
class Resume:
    """RESUME: goes on with a migration whose connections were lost; first message there.

    Attributes:
        migration_id: As HELLO named it.
        resume_token: As HELLO gave it.
        epoch: Number of the link's new epoch, above all that were said before.
        heard: Counted control messages of the destination's that the source has heard.
    """

    frame_type: ClassVar[FrameType] = FrameType.RESUME

    migration_id: bytes
    resume_token: bytes
    epoch: int
    heard: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """RESUMED: the connection is the first one of the new epoch, and the old one is over.

    Attributes:
        received_seq: As in ACK; the source goes on behind it.
        consumed_seq: As in ACK.
        heard: Counted control messages of the source's that the destination has heard.
    """

    frame_type: ClassVar[FrameType] = FrameType.RESUMED

    received_seq: int
    consumed_seq: int
    heard: int


@dataclass(frozen=True, slots=True)
class Ack:
    """ACK: how far the numbered frames got (``proto.link.sequence``)."""

    frame_type: ClassVar[FrameType] = FrameType.ACK

    received_seq: int
    consumed_seq: int


@dataclass(frozen=True, slots=True)
class ReturnPath:
    """RETURN_PATH: bytes of the destination QEMU's return path, verbatim (kind relayed)."""

    frame_type: ClassVar[FrameType] = FrameType.RETURN_PATH

    data: Buffer


@dataclass(frozen=True, slots=True)
class Verified:
    """VERIFIED: everything but the end is applied, and all digests are equal.

    Attributes:
        ram_digest: The destination's digest over what it wrote.
        page_count: Pages in its table.
    """

    frame_type: ClassVar[FrameType] = FrameType.VERIFIED

    ram_digest: bytes
    page_count: int


@dataclass(frozen=True, slots=True)
class Mismatch:
    """MISMATCH: a digest or the page count differs; here are the destination's."""

    frame_type: ClassVar[FrameType] = FrameType.MISMATCH

    ram_digest: bytes
    opaque_digest: bytes
    page_count: int


@dataclass(frozen=True, slots=True)
class DigestRange:
    """The source's digest over the page digests of consecutive pages of one block."""

    block: int
    first_page: int
    page_count: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class DigestQuery:
    """DIGEST_QUERY: which of these ranges differ at the destination?"""

    frame_type: ClassVar[FrameType] = FrameType.DIGEST_QUERY

    ranges: tuple[DigestRange, ...]


@dataclass(frozen=True, slots=True)
class DigestReply:
    """DIGEST_REPLY: indices into the query's ranges that differ, strictly increasing."""

    frame_type: ClassVar[FrameType] = FrameType.DIGEST_REPLY

    differing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """READY: the destination guest is loaded and paused (kind held)."""

    frame_type: ClassVar[FrameType] = FrameType.READY


@dataclass(frozen=True, slots=True)
class SourceDone:
    """SOURCE_DONE: the source QEMU has completed and cannot resume on its own any more."""

    frame_type: ClassVar[FrameType] = FrameType.SOURCE_DONE


@dataclass(frozen=True, slots=True)
class Commit:
    """COMMIT: the guest is the destination's from here on; may be repeated, means the same."""

    frame_type: ClassVar[FrameType] = FrameType.COMMIT


@dataclass(frozen=True, slots=True)
class Running:
    """RUNNING: the guest goes on at the destination.

    Attributes:
        run_state: Its run state in QEMU's words, as asked after the resume.
        load_ns: Time the destination took to load the device state, 0 if not measured.
        resume_ns: Time from COMMIT's arrival to the guest's resume, 0 if not measured.
    """

    frame_type: ClassVar[FrameType] = FrameType.RUNNING

    run_state: str
    load_ns: int = 0
    resume_ns: int = 0


@dataclass(frozen=True, slots=True)
class OldCopy:
    """OLD_COPY: digests of pages that the destination has of this VM from before.

    Attributes:
        first_page: How many were announced before; the slots go on from there.
        digests: 16 bytes a page.
        is_last: No further ones come.
    """

    frame_type: ClassVar[FrameType] = FrameType.OLD_COPY

    first_page: int
    digests: Buffer
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Recover:
    """RECOVER: what became of this migration's guest? First message of all, instead of HELLO.

    Attributes:
        migration_id: As in its HELLO.
        token: As in HELLO.
        state: What the source's record says, one of ``SOURCE_STATES``.
        version: Protocol version of the source.
        oldest: Oldest version it speaks.
    """

    frame_type: ClassVar[FrameType] = FrameType.RECOVER

    migration_id: bytes
    token: bytes
    state: str
    version: int = PROTOCOL_VERSION
    oldest: int = OLDEST_VERSION


@dataclass(frozen=True, slots=True)
class Recovered:
    """RECOVERED: what the destination recorded, and what it made sure of.

    Attributes:
        state: What its record says, one of ``DESTINATION_STATES``.
        guest_on: ``source`` only if its copy is dead and never ran; ``destination`` if the guest
            is there; ``unknown`` otherwise.
        run_state: The guest's run state there in QEMU's words, ``None`` if it is not there.
        message: For a person.
    """

    frame_type: ClassVar[FrameType] = FrameType.RECOVERED

    state: str
    guest_on: str
    run_state: str | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """KEEPALIVE: the sender is there.

    Attributes:
        heard: Counted control messages that it has heard; the other end need not keep them.
    """

    frame_type: ClassVar[FrameType] = FrameType.KEEPALIVE

    heard: int = 0


@dataclass(frozen=True, slots=True)
class Abort:
    """ABORT: the sender gives the migration up.

    Attributes:
        code: Short machine-readable name.
        message: For a person; ``packing.clip_text`` makes any text fit.
        guest_on: One of ``GUEST_ON``: where the guest is as far as the sender knows.
    """

    frame_type: ClassVar[FrameType] = FrameType.ABORT

    code: str
    message: str
    guest_on: str


@dataclass(frozen=True, slots=True)
class Bye:
    """BYE: the sender's last message."""

    frame_type: ClassVar[FrameType] = FrameType.BYE


Message = (
    RamBlockTable | PageBatch | OpaqueData | RoundEnd | Switchover | DeviceStateData
    | EndOfState | PrecopyAgain | Hello | Commit | SourceDone | DigestQuery | Welcome | Refused
    | Ack | ReturnPath | Verified | Mismatch | DigestReply | Ready | Running | Recover
    | Recovered | OldCopy | Join | Joined | Resume | Resumed | KeepAlive | Abort | Bye
)  # fmt: skip

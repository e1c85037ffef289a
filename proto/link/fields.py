"""Keys of the messages whose header is a msgpack map, with the check of each value.

Keys are the attribute names of the message's dataclass. A message with no keys has no header.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from proto.guest_events import PAGE_SIZE
from proto.limits import (
    DIGEST_BYTES,
    MAX_BLOCK_PAGES,
    MAX_CACHE_SLOTS,
    MAX_CAPABILITIES,
    MAX_DIGEST_RANGES,
    MAX_EPOCHS,
    MAX_IDSTR_BYTES,
    MAX_NAME_BYTES,
    MAX_OLD_PAGES,
    MAX_RAM_BLOCKS,
    MAX_STREAMS,
    MAX_TEXT_BYTES,
    MAX_TOKEN_BYTES,
    MAX_TURNS,
    MAX_VM_ID_BYTES,
    MAX_WARNINGS,
    MIGRATION_ID_BYTES,
    MIN_JOIN_TOKEN_BYTES,
)
from proto.link.frames import FrameType
from proto.link.messages import CommitKind
from proto.link.vocabulary import DESTINATION_STATES, GUEST_ON, SOURCE_STATES
from proto.packing import (
    Check,
    binary,
    boolean,
    integer,
    matching,
    one_of,
    optional,
    plain_map,
    record,
    sequence,
    text,
)

U16: Final = integer(0, (1 << 16) - 1)
U64: Final = integer(0, (1 << 64) - 1)
SLOTS: Final = integer(0, MAX_CACHE_SLOTS)
DIGEST: Final = binary(DIGEST_BYTES, DIGEST_BYTES)
MIGRATION_ID: Final = binary(MIGRATION_ID_BYTES, MIGRATION_ID_BYTES)
STREAMS: Final = integer(1, MAX_STREAMS)
EPOCH: Final = integer(0, MAX_EPOCHS)
NAME: Final = text(MAX_NAME_BYTES, 1)
TEXT: Final = text(MAX_TEXT_BYTES)
NAMES: Final = sequence(NAME, MAX_CAPABILITIES)
VM_ID: Final = matching(
    f"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_VM_ID_BYTES - 1}}}",
    f"1 to {MAX_VM_ID_BYTES} letters, digits, '.', '_' or '-', the first a letter or digit",
)
"""Identity of a VM; it can be the name of a file."""

BLOCK: Final = record(text(MAX_IDSTR_BYTES, 1), integer(0, MAX_BLOCK_PAGES * PAGE_SIZE))
RANGE: Final = record(U16, integer(0, MAX_BLOCK_PAGES - 1), integer(1, MAX_BLOCK_PAGES), DIGEST)

FIELDS: Final[Mapping[FrameType, Mapping[str, Check]]] = MappingProxyType(
    {
        FrameType.RAM_BLOCKS: {"blocks": sequence(BLOCK, MAX_RAM_BLOCKS, 1)},
        FrameType.END_OF_STATE: {
            "run_state": optional(NAME),
            "ram_digest": DIGEST,
            "opaque_digest": DIGEST,
            "page_count": U64,
            "rings_checked": boolean,
        },
        FrameType.PRECOPY_AGAIN: {"count": integer(1, MAX_TURNS)},
        FrameType.HELLO: {
            "version": U16,
            "oldest": U16,
            "migration_id": MIGRATION_ID,
            "required": NAMES,
            "optional": NAMES,
            "digest_seed": U64,
            "cache_slots": SLOTS,
            "facts": optional(plain_map),
            "facts_missing": TEXT,
            "commit": one_of("auto", "relay"),
            "return_path": boolean,
            "paused_at_start": boolean,
            "vm_id": optional(VM_ID),
            "streams": STREAMS,
            "resume_token": binary(MAX_TOKEN_BYTES),
        },
        FrameType.COMMIT: {},
        FrameType.SOURCE_DONE: {},
        FrameType.DIGEST_QUERY: {"ranges": sequence(RANGE, MAX_DIGEST_RANGES, 1)},
        FrameType.JOIN: {
            "migration_id": MIGRATION_ID,
            "join_token": binary(MAX_TOKEN_BYTES, MIN_JOIN_TOKEN_BYTES),
            "connection": integer(1, MAX_STREAMS - 1),
            "epoch": EPOCH,
        },
        FrameType.RESUME: {
            "migration_id": MIGRATION_ID,
            "resume_token": binary(MAX_TOKEN_BYTES, MIN_JOIN_TOKEN_BYTES),
            "epoch": integer(1, MAX_EPOCHS),
            "heard": U64,
        },
        FrameType.WELCOME: {
            "version": U16,
            "capabilities": NAMES,
            "cache_slots": SLOTS,
            "landed": sequence(text(MAX_IDSTR_BYTES, 1), MAX_RAM_BLOCKS),
            "commit": one_of(*[kind.value for kind in CommitKind]),
            "facts": optional(plain_map),
            "facts_missing": TEXT,
            "warnings": sequence(TEXT, MAX_WARNINGS),
            "old_pages": integer(0, MAX_OLD_PAGES),
            "streams": STREAMS,
            "join_token": binary(MAX_TOKEN_BYTES),
        },
        FrameType.REFUSED: {"code": NAME, "message": TEXT},
        FrameType.VERIFIED: {"ram_digest": DIGEST, "page_count": U64},
        FrameType.MISMATCH: {
            "ram_digest": DIGEST,
            "opaque_digest": DIGEST,
            "page_count": U64,
        },
        FrameType.DIGEST_REPLY: {
            "differing": sequence(integer(0, MAX_DIGEST_RANGES - 1), MAX_DIGEST_RANGES)
        },
        FrameType.READY: {},
        FrameType.RUNNING: {"run_state": NAME, "load_ns": U64, "resume_ns": U64},
        FrameType.JOINED: {},
        FrameType.RESUMED: {"received_seq": U64, "consumed_seq": U64, "heard": U64},
        FrameType.RECOVER: {
            "version": U16,
            "oldest": U16,
            "migration_id": binary(MIGRATION_ID_BYTES, MIGRATION_ID_BYTES),
            "token": binary(MAX_TOKEN_BYTES),
            "state": one_of(*SOURCE_STATES),
        },
        FrameType.RECOVERED: {
            "state": one_of(*DESTINATION_STATES),
            "guest_on": one_of("source", "destination", "unknown"),
            "run_state": optional(NAME),
            "message": TEXT,
        },
        FrameType.ABORT: {"code": NAME, "message": TEXT, "guest_on": one_of(*GUEST_ON)},
        FrameType.BYE: {},
    }
)
"""Frame type -> key -> check, in wire order."""

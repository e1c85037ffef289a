"""Every limit of the link protocol's wire format, each with its reason.

A limit is checked on both ends: the sender's mistake is a ``LocalProtocolError``, a peer's is a
``RemoteProtocolError`` raised before memory of the announced size is allocated. Changing a
limit changes the wire format (``docs/link-protocol.md``, section Limits).
"""

from typing import Final

from proto.guest_events import MAX_RUN_PAGES, MAX_ZERO_RUN_PAGES, PAGE_SIZE

FRAME_HEADER_BYTES: Final = 24
"""Fixed part in front of every frame; a multiple of 8, so that what follows is aligned."""

MAX_MESSAGE_HEADER_BYTES: Final = 0xFFFF
"""What the u16 length field can say; the largest message header any type may have."""

SCRATCH_BYTES: Final = 128 * 1024
"""Receive buffer for heads: holds the largest frame head (64 KiB) and some small frames behind
it, and is small enough that the page bytes that land in it and are copied out again (at most
one eighth of the smallest full frame) do not show."""

MAX_BATCH_PAGES: Final = MAX_RUN_PAGES
"""Literal and referenced pages in one PAGES frame: 4 MiB of guest memory, the unit of work on a
fast link; a slow one gets less at a time."""

MAX_DATA_BYTES: Final = MAX_BATCH_PAGES * PAGE_SIZE
"""Raw and encoded bytes in one PAGES, OPAQUE or DEVICE_STATE frame: 4 MiB, so what a peer makes us
hold per connection is little, and no frame delays another for long."""

MAX_ZERO_RUNS: Final = 4096
"""Zero runs in one PAGES frame: 32 KiB of message header, which leaves room for the rest."""

MAX_ZERO_PAGES: Final = MAX_ZERO_RUN_PAGES
"""Zero pages in one PAGES frame: bounds the array that a few bytes expand to (256 KiB)."""

MAX_SAME_PAGES: Final = MAX_ZERO_RUN_PAGES
"""Pages counted as 'same' in one PAGES frame: only an account, bounded to keep sums sane."""

MAX_CACHE_SLOTS: Final = 1 << 24
"""Page cache slots: 64 GiB of pages, far beyond use; keeps 0xFFFFFFFF free for 'not cached'."""

NOT_CACHED: Final = 0xFFFF_FFFF
"""Slot number of a literal page that goes into no cache slot."""

MAX_RAM_BLOCKS: Final = 1024
"""RAM blocks of a guest: QEMU guests have some tens (RAM, VGA, one or two ROMs per device)."""

MAX_IDSTR_BYTES: Final = 255
"""Name of a RAM block: QEMU writes it behind a one-byte length."""

MAX_BLOCK_PAGES: Final = 1 << 32
"""Pages of a RAM block: 16 TiB, what a u32 page number can address."""

MAX_STREAMS: Final = 16
"""Connections of one link: more share no bottleneck better, and each may keep a frame."""

MIN_JOIN_TOKEN_BYTES: Final = 16
"""What admits a further connection: nobody guesses 128 random bits."""

MAX_EPOCHS: Final = (1 << 32) - 1
"""Epochs of a link: one attempt to resume a second goes on for 136 years."""

MAX_TURNS: Final = 16
"""How often a migration may go back to pre-copy; each time the guest stood still for nothing."""

MAX_CONTROL_BYTES: Final = 16 << 20
"""Control messages that are kept until the other end has confirmed them: digests of an old copy go
out by the megabyte; all others are small and few."""

CONFIRM_CONTROL_BYTES: Final = 1 << 20
"""So many bytes of control messages are confirmed at once, not with the next keep-alive."""

MAX_AHEAD_FRAMES: Final = 16384
"""Numbered frames that may arrive before one that is missing: bounds what is kept of tiny ones;
full ones of so many are 16 GiB, beyond every other limit."""

MAX_AHEAD_BYTES: Final = 80 << 20
"""Bytes of the same: the source's window, 64 MiB at most, and frames that were begun within it."""

MAX_START_BYTES: Final = 512 * 1024
"""QEMU's START section of RAM, verbatim: 1024 blocks with the longest names take 300 KiB."""

MAX_PRELUDE_BYTES: Final = 64 * 1024
"""Bytes between the last page and the end of RAM; QEMU 10 sends 5, some sections' ends more."""

MAX_RETURN_PATH_BYTES: Final = 64 * 1024
"""Return path bytes in one frame; QEMU's own messages there are at most 512 bytes long."""

MAX_TOKEN_BYTES: Final = 64
"""What admits a further connection: 32 random bytes do, 64 leave room for a keyed hash."""

NONCE_BYTES: Final = 32
"""A nonce of the admission: random, so that no proof is ever asked for twice."""

PROOF_BYTES: Final = 32
"""A proof of the admission: an HMAC-SHA256."""

MAX_CAPABILITIES: Final = 64
"""Entries of a capability list; version 1 defines none."""

MAX_NAME_BYTES: Final = 64
"""Capability names, error codes, run states: identifiers, not prose."""

MAX_TEXT_BYTES: Final = 1024
"""Prose for a person (error messages, reasons), UTF-8; ``clip_text`` cuts longer ones."""

MAX_WARNINGS: Final = 32
"""Warnings in a WELCOME: 32 of the longest fill half of the largest message header."""

MAX_GREETING_BYTES: Final = 0xFFFF
"""HELLO and WELCOME: machine facts (a device list, PCI paths) take some KiB."""

MAX_SMALL_HEADER_BYTES: Final = 4096
"""Message headers with a few numbers, digests and one text."""

MAX_DIGEST_RANGES: Final = 256
"""Ranges in one DIGEST_QUERY: three queries tell one page among 16 million."""

DIGEST_BYTES: Final = 16
"""A 128-bit xxh3 digest."""

MIGRATION_ID_BYTES: Final = 16
"""A random UUID."""

MAX_VM_ID_BYTES: Final = 64
"""Identity of a VM: a UUID has 36 characters, a name of the user's is no longer."""

MAX_OLD_PAGES: Final = 1 << 24
"""Pages of an old copy that can be announced: 64 GiB, as many as there may be cache slots."""

MAX_OLD_COPY_BYTES: Final = 1 << 20
"""Digests in one OLD_COPY: 65536 pages, 256 MiB of guest memory."""

MAX_CONTAINER_ITEMS: Final = 4096
"""Items of a msgpack list or map: RAM blocks, devices. Room for the items is reserved when a header
announces them, 8 bytes each, before any of them is there; containers nested 1024 deep, where
msgpack ends, so reserve 32 MiB. Without a limit of ours it would be 512 MiB."""

MAX_NESTING: Final = 8
"""Depth of msgpack containers in machine facts."""

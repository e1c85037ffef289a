"""Values that messages of the link carry: versions, where a guest is, what was recorded of it."""

PROTOCOL_VERSION = 1
"""The version this code speaks."""

OLDEST_VERSION = 1
"""The oldest version this code still speaks."""

PRECOPY_AGAIN = "precopy-again"
"""Capability: the source may go back to pre-copy with PRECOPY_AGAIN."""

WORDS = "words"
"""Capability: pages may be encoded with the codec of that name."""

REQUIRABLE = frozenset({WORDS})
"""Capabilities that this code always has, so that a HELLO may require them."""

GUEST_ON = ("source", "destination", "neither", "unknown", "handed-over")
"""Where a guest can be said to be; never more than is known."""

SOURCE_STATES = ("PREPARED", "COMMIT_SENT", "RUNNING", "KEPT", "RETURNED")
"""What a source can have recorded of a handover."""

DESTINATION_STATES = ("COMMITTED", "ABORTED", "GIVEN_BACK")
"""What a destination has recorded when it answers."""

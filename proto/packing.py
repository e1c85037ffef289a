"""The only importer of msgpack: strict maps with exactly the documented keys.

A message header is one msgpack map with text keys. ``unpack_fields`` accepts precisely the keys
it is told, each checked by a ``Check``; duplicate keys, extension types, trailing bytes, deep
nesting and non-finite floats are refused. ``pack_fields`` runs the same checks on our own
values, so that what we send can be read.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgpack  # noqa: TID251 - the one place that may

from proto.errors import MessageError
from proto.limits import MAX_CONTAINER_ITEMS, MAX_NESTING, MAX_TEXT_BYTES

Check = Callable[[str, object], object]
"""``check(where, value)`` returns the value as the message holds it, or raises
``MessageError``."""


def pack_fields(where: str, fields: Mapping[str, Check], values: Mapping[str, object]) -> bytes:
    """Pack a map after checking every value.

    Args:
        where: Names the message in errors.
        fields: The map's keys and their checks, in wire order.
        values: One value per key.

    Raises:
        MessageError: A value does not pass its check.
    """
    checked = {key: check(f"{where}.{key}", values[key]) for key, check in fields.items()}
    return cast("bytes", msgpack.packb(checked, use_bin_type=True))


def unpack_fields(
    where: str, fields: Mapping[str, Check], data: bytes, *, allow_unknown: bool = False
) -> dict[str, Any]:
    """Unpack a map that has exactly the given keys and check every value.

    Args:
        where: Names the frame in errors.
        fields: The keys and their checks.
        data: The whole message header.
        allow_unknown: Ignore further keys (a HELLO of a newer version).

    Raises:
        MessageError: Not a map, keys missing, unknown or repeated, or a value is out of range.
    """
    found = unpack_map(where, data)
    missing = fields.keys() - found.keys()
    if missing:
        raise MessageError(where, f"key {min(missing)!r}", "no such key")
    unknown = found.keys() - fields.keys()
    if unknown and not allow_unknown:
        raise MessageError(where, "documented keys only", f"key {min(unknown)[:40]!r}")
    return {key: check(f"{where}.{key}", found[key]) for key, check in fields.items()}


def unpack_map(where: str, data: bytes) -> dict[str, object]:
    """Unpack one msgpack map with text keys, without judging keys or values.

    Raises:
        MessageError: ``data`` is not exactly one such map.
    """
    try:
        found = msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            strict_map_key=True,
            object_pairs_hook=_unique_pairs,
            max_ext_len=0,
            max_array_len=MAX_CONTAINER_ITEMS,
            max_map_len=MAX_CONTAINER_ITEMS,
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as exc:
        raise MessageError(
            where, "a msgpack map", f"{type(exc).__name__}: {exc}"[:120]
        ) from exc
    if not isinstance(found, dict):
        raise MessageError(where, "a msgpack map", type(found).__name__)
    if not all(isinstance(key, str) for key in found):
        raise MessageError(where, "text keys", "another one")
    return cast("dict[str, object]", found)


def clip_text(text: str, limit_bytes: int = MAX_TEXT_BYTES) -> str:
    """Cut a text so that its UTF-8 form fits a wire field; the unencodable becomes ``?``."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit_bytes:
        return data.decode("utf-8")
    return data[: limit_bytes - 3].decode("utf-8", "ignore") + "..."


def _unique_pairs(pairs: Sequence[tuple[object, object]]) -> dict[object, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key stands twice in a map")
    return unique


def plain(where: str, value: object, depth: int = 0) -> object:
    """Check that a value consists of what JSON knows, and bytes; returns it unchanged."""
    if depth > MAX_NESTING:
        raise MessageError(where, f"at most {MAX_NESTING} nested containers", "more")
    if isinstance(value, (list, tuple)):
        for item in value:
            plain(where, item, depth + 1)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise MessageError(where, "text keys", type(key).__name__)
            _utf8(where, key)
            plain(where, item, depth + 1)
    else:
        _scalar(where, value)
    return value


def _scalar(where: str, value: object) -> None:
    if value is None or isinstance(value, (bool, bytes)):
        return
    if isinstance(value, str):
        _utf8(where, value)
    elif isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 64:
            raise MessageError(where, "a 64-bit integer", "a larger one")
    elif not isinstance(value, float):
        raise MessageError(where, "a plain value", type(value).__name__)
    elif not math.isfinite(value):
        raise MessageError(where, "a finite number", str(value))


def integer(low: int, high: int) -> Check:
    """Check for an integer with low <= value <= high; a bool is none."""

    def check(where: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise MessageError(where, "an integer", type(value).__name__)
        if not low <= value <= high:
            raise MessageError(where, f"{low} to {high}", str(value))
        return value

    return check


def text(max_bytes: int, min_bytes: int = 0) -> Check:
    """Check for text whose UTF-8 form has ``min_bytes`` to ``max_bytes`` bytes."""

    def check(where: str, value: object) -> str:
        if not isinstance(value, str):
            raise MessageError(where, "text", type(value).__name__)
        length = len(_utf8(where, value))
        if not min_bytes <= length <= max_bytes:
            raise MessageError(where, f"{min_bytes} to {max_bytes} bytes of text", str(length))
        return value

    return check


def matching(pattern: str, what: str) -> Check:
    """Check for text that matches ``pattern`` as a whole; ``what`` describes it in errors."""
    compiled = re.compile(pattern)

    def check(where: str, value: object) -> str:
        if not isinstance(value, str) or compiled.fullmatch(value) is None:
            raise MessageError(where, what, repr(value)[:80])
        return value

    return check


def binary(max_bytes: int, min_bytes: int = 0) -> Check:
    """Check for a byte string of ``min_bytes`` to ``max_bytes`` bytes."""

    def check(where: str, value: object) -> bytes:
        if not isinstance(value, bytes):
            raise MessageError(where, "bytes", type(value).__name__)
        if not min_bytes <= len(value) <= max_bytes:
            raise MessageError(where, f"{min_bytes} to {max_bytes} bytes", str(len(value)))
        return value

    return check


def one_of(*allowed: str) -> Check:
    """Check for one of the given words."""

    def check(where: str, value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise MessageError(where, " or ".join(allowed), repr(value)[:40])
        return value

    return check


def boolean(where: str, value: object) -> bool:
    """Check for true or false."""
    if not isinstance(value, bool):
        raise MessageError(where, "true or false", type(value).__name__)
    return value


def optional(check: Check) -> Check:
    """Check for nil, or a value that passes ``check``."""
    return lambda where, value: None if value is None else check(where, value)


def sequence(item: Check, max_items: int, min_items: int = 0) -> Check:
    """Check for an array whose items pass ``item``; yields a tuple."""

    def check(where: str, value: object) -> tuple[object, ...]:
        if not isinstance(value, (list, tuple)):
            raise MessageError(where, "an array", type(value).__name__)
        if not min_items <= len(value) <= max_items:
            raise MessageError(where, f"{min_items} to {max_items} items", str(len(value)))
        return tuple(item(f"{where}[{i}]", entry) for i, entry in enumerate(value))

    return check


def record(*checks: Check) -> Check:
    """Check for an array with one item per check, in order; yields a tuple."""

    def check(where: str, value: object) -> tuple[object, ...]:
        if not isinstance(value, (list, tuple)) or len(value) != len(checks):
            raise MessageError(where, f"an array of {len(checks)}", repr(value)[:40])
        return tuple(one(where, entry) for one, entry in zip(checks, value, strict=True))

    return check


def plain_map(where: str, value: object) -> dict[str, object]:
    """Check for a map with text keys and plain values of any depth up to ``MAX_NESTING``."""
    if not isinstance(value, Mapping):
        raise MessageError(where, "a map", type(value).__name__)
    plain(where, value)
    return dict(value)


def _utf8(where: str, value: str) -> bytes:
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise MessageError(where, "text that UTF-8 can express", "a lone surrogate") from exc

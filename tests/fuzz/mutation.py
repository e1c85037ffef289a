"""Damage to bytes and to values, as a fault or an attacker would do it; all by a seed."""

import random
from collections.abc import Callable, Iterator
from typing import Any, Final

NUMBERS: Final = (
    *(0, 1, 2, 7, 8, 127, 128, 255, 256, 1023, 1024, 4095, 4096, 0x7FFF, 0x8000, 0xFFFF),
    *(0x7FFFFFFF, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1),
)
"""What lengths, counts and indices go wrong at."""

HEAD_BYTES: Final = 2048
"""Most damage goes where most is said: the first and the last bytes."""


def damage(
    rng: random.Random, data: bytes, other: bytes = b"", head: int = HEAD_BYTES
) -> bytes:
    """Change, cut, repeat or splice some bytes; ``other`` is what is spliced in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = _place(rng, len(out), head)
        kind = rng.randrange(8)
        if kind <= 1 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind <= 3:
            number = number_bytes(rng)
            out[at : at + len(number)] = number
        elif kind == 4:
            del out[at : at + rng.choice((1, 2, 4, 16, 5000))]
        elif kind == 5:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 4, 16, 300)))
        elif kind == 6:
            start = rng.randrange(len(other) + 1)
            size = rng.choice((4, 64, 3000))
            out[at : at + size] = other[start : start + size]
        elif rng.random() < 0.5:
            del out[at:]
        else:
            out[at:at] = out[at : at + rng.choice((5, 40, 2000))]
    return bytes(out)


def _place(rng: random.Random, length: int, head: int) -> int:
    near = rng.randrange(head)
    place = rng.choice((near, length - 1 - near, rng.randrange(length + 1)))
    return max(0, min(place, length - 1))


def number(rng: random.Random) -> int:
    """A number that something goes wrong at, or any other."""
    known = rng.choice(NUMBERS)
    return rng.choice((known, known + rng.randint(-2, 2), rng.getrandbits(rng.choice((8, 32)))))


def number_bytes(rng: random.Random) -> bytes:
    """A number in one of the sizes and orders of the formats."""
    size = rng.choice((1, 2, 4, 8))
    raw = number(rng).to_bytes(9, signed=True)[-size:]
    return raw if rng.random() < 0.5 else raw[::-1]


def pieces(rng: random.Random, data: bytes, most: int = 6) -> Iterator[memoryview]:
    """Cut bytes as a connection may bring them; rarely one by one."""
    view = memoryview(data)
    if rng.random() < 0.02:
        yield from (view[i : i + 1] for i in range(min(len(data), 400)))
        yield view[400:]
        return
    at = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(most)))
    for start, end in zip([0, *at], [*at, len(data)], strict=True):
        yield view[start:end]


def odd_value(rng: random.Random) -> Any:  # noqa: ANN401 - any value that msgpack or JSON knows
    """A value that a field hardly means."""
    choices: tuple[Callable[[], Any], ...] = (
        lambda: number(rng),
        lambda: -number(rng) // 2,
        lambda: rng.choice((None, True, False)),
        lambda: rng.choice((0.5, float("inf"), float("-inf"), float("nan"), -0.0, 1e308)),
        lambda: "é" * rng.choice((0, 1, 17, 255, 256, 1025)),
        lambda: "\ud800",
        list,
        lambda: [number(rng)] * rng.choice((1, 2, 65, 300)),
        lambda: nested(rng.choice((1, 7, 8, 9, 30, 200)), as_map=rng.random() < 0.5),
        lambda: {"a": number(rng), "": None},
    )
    return rng.choice(choices)()


def nested(depth: int, *, as_map: bool) -> Any:  # noqa: ANN401 - containers of containers
    """Containers in each other."""
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if as_map else [value]
    return value


def changed(rng: random.Random, value: Any) -> Any:  # noqa: ANN401 - as odd_value
    """The value with one part, however deep, replaced, left out or doubled; the old one stays."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        out = dict(value)
        key = rng.choice(list(out))
        kind = rng.random()
        if kind < 0.1:
            del out[key]
        elif kind < 0.2:
            out[rng.choice(("x", "", "é", key[:1] if isinstance(key, str) else "k"))] = (
                odd_value(rng)
            )
        else:
            out[key] = changed(rng, out[key])
        return out
    if isinstance(value, list) and value and rng.random() < 0.9:
        out_list = list(value)
        at = rng.randrange(len(out_list))
        kind = rng.random()
        if kind < 0.1:
            del out_list[at]
        elif kind < 0.3:
            out_list[at:at] = [out_list[at]] * rng.choice((1, 2, 70, 300))
        else:
            out_list[at] = changed(rng, out_list[at])
        return out_list
    return odd_value(rng)

"""Chance with a state of eight bytes: it travels with its device, unlike a Mersenne twister."""

import math
from typing import Final

_MASK: Final = (1 << 64) - 1
_STEP: Final = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio, odd: the state visits every value once."""

MAX_STATE: Final = _MASK


class Chance:
    """A splitmix64 generator.

    Attributes:
        state: Everything there is to it, 0 to ``MAX_STATE``; set it to go on from there.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """

    __slots__ = ("state",)

    def __init__(self, seed: int) -> None:
        self.state = seed & _MASK

    def bits(self) -> int:
        """Draw 64 bits."""
        self.state = (self.state + _STEP) & _MASK
        mixed = self.state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return mixed ^ (mixed >> 31)

    def fraction(self) -> float:
        """Draw from [0, 1)."""
        return (self.bits() >> 11) * 2.0**-53

    def below(self, limit: int) -> int:
        """Draw from 0 to ``limit`` - 1; the bias of 2**-64 x limit is nothing here."""
        return self.bits() * limit >> 64

    def exponential(self, mean: float) -> float:
        """Draw a waiting time with this mean."""
        return -math.log(1.0 - self.fraction()) * mean

    def octets(self, length: int) -> bytes:
        """Draw bytes, e.g. for packets that do not compress."""
        words = (length + 7) // 8
        return b"".join(self.bits().to_bytes(8, "little") for _ in range(words))[:length]

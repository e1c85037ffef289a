"""RAM of the destination guest that pages are written into in place, instead of into a stream.

What stands here is what ``apply`` needs of it; where the RAM is and how it is reached (another
process, a mapped file) is the destination guest's.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class LandedBlock(Protocol):
    """One RAM block of the destination guest, while nothing runs in it.

    Page numbers are within the block, u32, strictly increasing, shape (n,), and checked by the
    link protocol. Calls are synchronous and come one at a time, from one thread.

    Attributes:
        fresh: All of it is zero until we write to it.
    """

    fresh: bool

    def write(self, pages: NDArray[np.uint32], data: NDArray[np.uint8]) -> None:
        """Write ``data``, shape (n, 4096), to ``pages``.

        Raises:
            LandingError: The memory cannot be reached.
        """
        ...

    def zero(self, pages: NDArray[np.uint32]) -> None:
        """Make ``pages`` zero; memory that is zero already is not touched, nor allocated.

        Raises:
            LandingError: The memory cannot be reached.
        """
        ...

    def read_into(self, pages: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
        """Read ``pages`` into ``out``, shape (n, 4096), contiguous.

        Raises:
            LandingError: The memory cannot be reached.
        """
        ...

"""``--trace FILE.jsonl``: one JSON object a line, what happened when.

A trace is for whoever looks at it later, so it must cost the migration nothing: lines are
buffered, and a full disk ends the trace and not the migration.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from migrate.report.report import to_json_value
from migrate.units import NS_PER_MS

BUFFER_BYTES: Final = 64 * 1024


class TraceWriter:
    """Write events to a file.

    After the first error everything here does nothing: ``warn`` was called once with the
    reason.
    """

    def __init__(self, path: Path | None, started_ns: int, warn: Callable[[str], None]) -> None:
        """Create or empty the file.

        Args:
            path: Where to; ``None`` makes a writer that does nothing.
            started_ns: The moment that is ``t_ms`` 0, on the clock of every ``now_ns``.
            warn: Called at most once, when the file cannot be opened or written.
        """
        self._path = path
        self._started_ns = started_ns
        self._warn = warn
        self._file: IO[bytes] | None = None
        if path is not None:
            try:
                self._file = path.open("wb", buffering=BUFFER_BYTES)
            except OSError as error:
                self._give_up(error)

    @property
    def enabled(self) -> bool:
        """Whether events still go anywhere; worth asking before collecting costly fields."""
        return self._file is not None

    def event(self, name: str, now_ns: int, **values: object) -> None:
        """Write ``{"t_ms": …, "event": name, …}``.

        Args:
            name: What happened.
            now_ns: When.
            values: What ``to_json_value`` takes; names carry their units. ``t_ms`` and
                ``event`` are taken.

        Raises:
            TypeError: A value that JSON cannot hold. Nothing is written.
        """
        if self._file is None:
            return
        record = {
            "t_ms": (now_ns - self._started_ns) / NS_PER_MS,
            "event": name,
            **values,
        }
        line = json.dumps(to_json_value(record), separators=(",", ":"), ensure_ascii=False)
        self._try(lambda file: file.write(line.encode("utf-8", "replace") + b"\n"))

    def flush(self) -> None:
        """Hand everything to the kernel, e.g. before a step that may be the last."""
        self._try(lambda file: file.flush())

    def close(self) -> None:
        """Write what is buffered and close; may be called again."""
        self.flush()
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _try(self, write: Callable[[IO[bytes]], object]) -> None:
        if self._file is None:
            return
        try:
            write(self._file)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        file, self._file = self._file, None
        if file is not None:
            # Closing flushes, which fails again for the same reason.
            with contextlib.suppress(OSError):
                file.close()
        self._warn(f"no more trace in {self._path}: {error.strerror or error}")

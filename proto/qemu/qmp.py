"""QMP, QEMU's JSON monitor protocol: lines from QEMU to typed messages, commands to lines.

QEMU sends one JSON object per line: first a greeting, then replies, error replies and events.
This module knows that framing and those four shapes; what a command means is known elsewhere.
QEMU's bytes are checked like any peer's: whatever arrives, only ``QmpProtocolError`` is raised.

Source: docs/interop/qmp-spec of QEMU 7.2 and 10.0; greeting and out-of-band tried on both.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

from proto.errors import LocalProtocolError, QmpProtocolError
from proto.guest_events import NEED_DATA, NeedData

MAX_LINE_BYTES: Final = 4 * 1024 * 1024
"""Longest line accepted. The longest answer known is query-qmp-schema (about 250 kB on 10.0);
query-pci stays below 700 bytes per device, a machine full of devices needs a tenth of this."""

MAX_NAME_CHARS: Final = 256
"""Longest event name, error class or capability name; QAPI's longest names have about 40."""


JsonValue: TypeAlias = Any
"""A parsed JSON value; its shape is checked where its meaning is known."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """QEMU's first line.

    Attributes:
        version: (major, minor, micro).
        package: Distribution's package version; may be empty.
        capabilities: What the monitor can negotiate, e.g. ``oob``.
    """

    version: tuple[int, int, int]
    package: str
    capabilities: frozenset[str]


@dataclass(frozen=True, slots=True)
class Reply:
    """A command succeeded; ``value`` is its parsed JSON result."""

    id: int | None
    value: JsonValue


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """A command failed; ``id`` is ``None`` where QEMU could not read the command at all."""

    id: int | None
    error_class: str
    desc: str


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened in QEMU.

    Attributes:
        name: E.g. ``STOP``.
        data: The event's own fields; empty if it has none.
        timestamp_us: Microseconds since the epoch on QEMU's host, ``None`` if it has no clock.
    """

    name: str
    data: Mapping[str, JsonValue]
    timestamp_us: int | None


QmpMessage = Greeting | Reply | ErrorReply | Event


def encode_command(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    command_id: int,
    out_of_band: bool = False,
) -> bytes:
    """Encode one command as a line.

    Args:
        name: QMP command name.
        arguments: JSON values by argument name.
        command_id: Comes back in the reply.
        out_of_band: Run beside the main lock; only legal once ``oob`` was negotiated.

    Raises:
        LocalProtocolError: The arguments are not JSON.
    """
    message: dict[str, Any] = {"exec-oob" if out_of_band else "execute": name}
    if arguments:
        message["arguments"] = dict(arguments)
    message["id"] = command_id
    try:
        text = json.dumps(message, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise LocalProtocolError(f"arguments of '{name}' are not JSON: {error}") from error
    return text.encode("ascii") + b"\n"


class QmpReader:
    """Turn bytes from a monitor, cut anywhere, into messages.

    The greeting must come first and only once. After an error every call raises that error
    again. Memory is bounded by ``max_line_bytes`` plus the largest piece fed, as long as the
    messages are taken out after each feed.
    """

    def __init__(self, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_line_bytes = max_line_bytes
        self._buffer = bytearray()
        self._scanned = 0
        self._line_no = 1
        self._greeted = False
        self._error: QmpProtocolError | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes; nothing is parsed yet."""
        self._buffer += data

    def feed_eof(self) -> None:
        """State that nothing follows.

        Raises:
            QmpProtocolError: A line was cut short.
        """
        if self._error is not None:
            raise self._error
        if self._buffer.strip():
            self._fail("the end of the line", f"end of file after {len(self._buffer)} bytes")

    def next_message(self) -> QmpMessage | NeedData:
        """Take the next complete message, or ``NEED_DATA``.

        Raises:
            QmpProtocolError: The bytes are not QMP.
        """
        if self._error is not None:
            raise self._error
        while (line := self._take_line()) is not None:
            text = line.strip()
            if text:
                message = self._parse(text)
                self._line_no += 1
                return message
            self._line_no += 1
        return NEED_DATA

    def _take_line(self) -> bytes | None:
        end = self._buffer.find(b"\n", self._scanned)
        length = len(self._buffer) if end < 0 else end
        if length > self._max_line_bytes:
            self._fail(f"a line of at most {self._max_line_bytes} bytes", f"{length} bytes")
        if end < 0:
            self._scanned = length
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._scanned = 0
        return line

    def _parse(self, text: bytes) -> QmpMessage:
        try:
            message = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            self._fail("a JSON object", _excerpt(text))
        if not isinstance(message, dict):
            self._fail("a JSON object", _excerpt(text))
        if not self._greeted:
            if "QMP" not in message:
                self._fail("the QMP greeting", _excerpt(text))
            greeting = self._greeting(message["QMP"])
            self._greeted = True
            return greeting
        if "event" in message:
            return self._event(message)
        if "return" in message:
            return Reply(self._id(message), message["return"])
        if "error" not in message:
            self._fail("a reply, an error or an event", _excerpt(text))
        return self._error_reply(message)

    def _greeting(self, body: object) -> Greeting:
        fields = self._object(body, "the greeting")
        version = self._object(fields.get("version"), "the greeting's version")
        numbers = self._object(version.get("qemu"), "the greeting's version.qemu")
        offered = fields.get("capabilities", [])
        if not isinstance(offered, list):
            self._fail("a list of capabilities", type(offered).__name__)
        package = version.get("package", "")
        if not isinstance(package, str):
            self._fail("a package version as text", type(package).__name__)
        return Greeting(
            version=(
                self._integer(numbers.get("major"), "version.qemu.major"),
                self._integer(numbers.get("minor"), "version.qemu.minor"),
                self._integer(numbers.get("micro"), "version.qemu.micro"),
            ),
            package=package[:MAX_NAME_CHARS],
            capabilities=frozenset(self._name(item, "a capability") for item in offered),
        )

    def _event(self, message: dict[str, Any]) -> Event:
        name = self._name(message["event"], "an event name")
        data = self._object(message.get("data", {}), "the event's data")
        timestamp = self._object(message.get("timestamp"), "the event's timestamp")
        seconds = self._integer(timestamp.get("seconds"), "timestamp.seconds")
        microseconds = self._integer(timestamp.get("microseconds"), "timestamp.microseconds")
        # QEMU sends -1 for both when the host's clock cannot be read.
        known = seconds >= 0 and microseconds >= 0
        return Event(name, data, seconds * 1_000_000 + microseconds if known else None)

    def _error_reply(self, message: dict[str, Any]) -> ErrorReply:
        error = self._object(message["error"], "the error")
        desc = error.get("desc")
        if not isinstance(desc, str):
            self._fail("error.desc as text", type(desc).__name__)
        return ErrorReply(
            self._id(message), self._name(error.get("class"), "error.class"), desc
        )

    def _id(self, message: dict[str, Any]) -> int | None:
        return self._integer(message["id"], "an id") if "id" in message else None

    def _object(self, value: object, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._fail(f"{what} as an object", type(value).__name__)
        return value

    def _integer(self, value: object, what: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            self._fail(f"{what} as an integer", type(value).__name__)
        return value

    def _name(self, value: object, what: str) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARS:
            self._fail(f"{what} of 1 to {MAX_NAME_CHARS} characters", type(value).__name__)
        return value

    def _fail(self, expected: str, got: str) -> NoReturn:
        self._error = QmpProtocolError(f"QMP line {self._line_no}", expected, got)
        self._buffer.clear()
        raise self._error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _excerpt(text: bytes) -> str:
    return repr(text[:60])[1:]

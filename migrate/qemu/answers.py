"""Typed access to what QMP commands answer."""

from migrate.errors import GuestError
from migrate.qemu.qmp_client import QmpClient
from proto.qemu.qmp import JsonValue


class Fields:
    """Typed access to a QMP object; a missing or mistyped field names the command."""

    def __init__(self, command: str, value: JsonValue) -> None:
        if not isinstance(value, dict):
            raise GuestError(f"unexpected answer to '{command}': {value!r:.80}")
        self._command = command
        self._values = value

    def integer(self, name: str) -> int:
        """An integer that must be there."""
        value = self.integer_or_none(name)
        if value is None:
            raise GuestError(f"answer to '{self._command}' has no '{name}'")
        return value

    def integer_or_none(self, name: str) -> int | None:
        """An integer, or nothing."""
        value = self._values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self._mistyped(name, value)
        return value

    def number(self, name: str) -> float:
        """An integer or a float."""
        value = self._values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._mistyped(name, value)
        return float(value)

    def boolean(self, name: str) -> bool:
        """A truth value."""
        value = self._values.get(name)
        if not isinstance(value, bool):
            raise self._mistyped(name, value)
        return value

    def text(self, name: str) -> str:
        """A text that must be there."""
        value = self.text_or_none(name)
        if value is None:
            raise GuestError(f"answer to '{self._command}' has no '{name}'")
        return value

    def text_or_none(self, name: str) -> str | None:
        """A text, or nothing."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            raise self._mistyped(name, value)
        return value

    def _mistyped(self, name: str, value: object) -> GuestError:
        return GuestError(f"'{name}' in the answer to '{self._command}' is {value!r:.80}")


async def execute_list(client: QmpClient, command: str) -> list[JsonValue]:
    """Execute a command without arguments that answers with a list."""
    answer = await client.execute(command)
    if not isinstance(answer, list):
        raise GuestError(f"unexpected answer to '{command}': {answer!r:.80}")
    return answer

"""Of commands that hang or fail the lab tells what they did last."""

import re
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from migrate.lab.commands import (
    MigrationFailedError,
    both_end,
    failures,
    listening_port,
    running_command,
)


async def test_a_command_that_does_not_end_says_where_it_is(tmp_path: Path) -> None:
    """A destination that nobody comes to, and a source that ended at once."""
    with pytest.RaisesGroup(MigrationFailedError, flatten_subgroups=True) as caught:
        async with AsyncExitStack() as stack:
            listen = ("--listen", "127.0.0.1:0", "--simulate", "--state-dir", str(tmp_path))
            dst = await stack.enter_async_context(running_command("migrate-dst", *listen))
            with trio.fail_after(60):
                await listening_port(dst)
            src = await stack.enter_async_context(running_command("migrate-src", "--version"))
            await both_end(src, dst, 3)
    text = failures(caught.value)
    assert "no end after 3 s: [0, None]" in text
    assert re.search(r"migrate-dst:\n(.*\n)*.*listening on 127.0.0.1", text)
    assert "most recent call first" in text


async def test_a_command_that_ends_early_is_told_of_with_what_it_said() -> None:
    with pytest.RaisesGroup(MigrationFailedError) as caught:
        async with running_command("migrate-dst", "--listen", "nowhere") as dst:
            await listening_port(dst)
    assert "the command ended" in failures(caught.value)
    assert "nowhere" in failures(caught.value)

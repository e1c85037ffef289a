"""Whatever is killed, frozen or cut at any step: a guest in QEMU runs on one side at most."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.matrix import Cell
from tests.crash.real_scene import run_real
from tests.crash.scene import Outcome

pytestmark = pytest.mark.qemu


@pytest.mark.timeout(400)
async def test_cell(real_cell: Cell, short_tmp: Path, keep: Callable[[Outcome], None]) -> None:
    outcome = await run_real(real_cell, short_tmp)
    keep(outcome)
    assert outcome.wrongs == [], outcome


@pytest.mark.timeout(400)
async def test_cell_of_a_waiting_qemu(
    waiting_cell: Cell, short_tmp: Path, keep: Callable[[Outcome], None]
) -> None:
    outcome = await run_real(waiting_cell, short_tmp)
    keep(outcome)
    assert outcome.wrongs == [], outcome

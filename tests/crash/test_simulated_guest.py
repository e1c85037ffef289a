"""Whatever is killed, frozen or cut at any step: a simulated guest runs on one side at most."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.matrix import Cell
from tests.crash.scene import Outcome
from tests.crash.simulated_scene import run_simulated


@pytest.mark.timeout(240)
async def test_cell(
    simulated_cell: Cell, marked: Path, keep: Callable[[Outcome], None]
) -> None:
    outcome = await run_simulated(simulated_cell, marked)
    keep(outcome)
    assert outcome.wrongs == [], outcome

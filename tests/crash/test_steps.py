"""The matrix knows every step: an undisturbed migration makes these and no others."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.crash.matrix import DESTINATION, LINK, SOURCE, STEPS, Cell
from tests.crash.real_scene import real_scene
from tests.crash.scene import Scene
from tests.crash.simulated_scene import simulated_scene

NOT_HELD = Cell("real", SOURCE, "nowhere", "cut", LINK)
EITHER_FIRST = "BYE received"
"""Both sides say it at once."""


async def check_steps(scene: Scene) -> None:
    for command in scene.commands.values():
        assert await command.wait() == 0, command.text
    for name in (SOURCE, DESTINATION):
        conductor = scene.conductors[name]
        await conductor.wait_ended()
        # A batch of pages may wait for room, so there is no step behind sending it.
        made = [p for p in conductor.points if not p.startswith("sending ")]
        made = [point for point in made if point != "pages sent"]
        known = [step for actor, step in STEPS[scene.cell.kind] if actor == name]
        assert sorted(made) == sorted(known)
        for steps in (made, known):
            steps.remove(EITHER_FIRST)
        assert made == known


async def test_steps_of_a_simulated_guest(marked: Path) -> None:
    async with simulated_scene(NOT_HELD, marked) as scene:
        await check_steps(scene)


@pytest.mark.qemu
@pytest.mark.parametrize("kind", ["real", "waiting"])
async def test_steps_of_a_guest_in_qemu(short_tmp: Path, kind: str) -> None:
    async with real_scene(replace(NOT_HELD, kind=kind), short_tmp) as scene:
        await check_steps(scene)

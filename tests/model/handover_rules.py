"""What must be true of every handover, wherever one gets to."""

from collections import deque
from typing import Final

from tests.model.handover_world import Explored, Rule, Setup, World, told

DIED_WITH_ITS_QEMU: Final = "the QEMU that had the guest was killed"
NEEDS_A_PERSON: Final = "a person has to say that the destination is fenced"


def one_runner(world: World, setup: Setup) -> str | None:
    """At most one side runs the guest, or a third place does."""
    here, there = world.src_qemu == "runs", world.dst_qemu == "runs"
    if world.elsewhere and (here or there):
        return "the guest runs elsewhere and on one of the sides"
    return "both sides run the guest" if here and there else None


def no_way_back(world: World, setup: Setup) -> str | None:
    """A guest that ran at the destination never goes on from what it was at the source."""
    back = world.ran and world.src_qemu == "runs" and not world.fenced
    return "the guest ran at the destination and goes on at the source" if back else None


def nothing_is_undone(world: World, setup: Setup) -> str | None:
    """What starts at the destination is the guest as it was when it last stopped."""
    stale = world.dst_qemu == "runs" and world.newer and not world.fenced
    return (
        "the destination runs the guest from before it went on at the source" if stale else None
    )


def said_no_more_than_known(world: World, setup: Setup) -> str | None:
    """Where somebody said that the guest is, there it stays."""
    if "source" in world.said and world.ran and not world.fenced:
        return "it was said that the guest is on the source, and it ran at the destination"
    if "destination" in world.said and not world.ran:
        return "it was said that the guest is on the destination, and it never ran there"
    ran = "neither" in world.said and world.ran and not world.fenced
    if ran or "neither, wrongly" in world.said:
        return "it was said that the guest runs nowhere, and it runs"
    return None


def let_go_late(world: World, setup: Setup) -> str | None:
    """Until the destination has proven that it can run it, the guest comes back by itself."""
    let_go = world.shut or world.src_qemu == "completed"
    if let_go and not world.proven and "return path" in setup.traits:
        return "the source QEMU was let go before the destination was ready"
    return None


def only_one_copy_lives(world: World, setup: Setup) -> str | None:
    """After COMMIT_SENT the source goes on only when the other copy is dead."""
    alive = world.dst_qemu != "dead" and world.src_qemu == "runs"
    if alive and world.src_file == "RETURNED":
        return "the source goes on while the destination's copy could be started"
    return None


RULES: Final[tuple[Rule, ...]] = (
    one_runner,
    no_way_back,
    nothing_is_undone,
    said_no_more_than_known,
    let_go_late,
    only_one_copy_lives,
)


def runs_once(world: World) -> bool:
    """Exactly one side runs the guest, or a third place does."""
    return [world.src_qemu == "runs", world.dst_qemu == "runs", world.elsewhere].count(
        True
    ) == 1


def excuse(world: World, setup: Setup) -> str | None:
    """Why a guest need not come back without a person's help, if it need not."""
    committed = world.dst_file == "COMMITTED" or world.ran
    if world.src_qemu == "dead":
        given_back = world.cont == "refused" or not committed
        return DIED_WITH_ITS_QEMU if given_back or world.dst_qemu in ("dead", "waits") else None
    if world.dst_qemu == "dead" and world.dst_crash and committed:
        return DIED_WITH_ITS_QEMU if world.ran else NEEDS_A_PERSON
    # Its last bytes died with migrate-dst, or did not: that cannot be seen from outside.
    incomplete = world.dst_qemu in ("waits", "dead") and not world.ran
    if incomplete and world.dst_file == "COMMITTED" and "incoming" in setup.traits:
        return NEEDS_A_PERSON
    return None


def check_nothing_is_lost(explored: Explored, setup: Setup) -> None:
    """From everywhere the guest can be made to run on one side again, without another fault.

    Raises:
        BrokenRuleError: Not so; or a person's word, where one is needed, does not help.
    """
    alone = _can_reach(explored, fencing=False)
    fenced = _can_reach(explored, fencing=True)
    for world in explored.came_from:
        if world in alone:
            continue
        why = excuse(world, setup)
        if why is None:
            raise told(explored, world, "the guest is lost")
        if why is NEEDS_A_PERSON and world not in fenced:
            raise told(explored, world, "the guest is lost even to a person")


def _can_reach(explored: Explored, *, fencing: bool) -> set[World]:
    found = {world for world in explored.came_from if runs_once(world)}
    todo = deque(found)
    while todo:
        after = todo.popleft()
        for before in explored.allowed.get(after, ()):
            if before not in found and (fencing or before.fenced == after.fenced):
                found.add(before)
                todo.append(before)
    return found

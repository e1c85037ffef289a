"""Everything that can happen to a handover: the tables, the link, crashes; breadth first.

The world is a tuple of a few words. A message can be lost only with all that follow it in its
direction, and only once the link is cut. Any process may die at any time, a host may lose its
power, and either side's ``--recover`` may be started, once nobody else works on its record, as
often as one likes.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from tests.model.handover_tables import PROCESSES, Row, Value


class World(NamedTuple):
    """One state of everything.

    Attributes:
        src_qemu: ``runs``, ``held`` (stopped; goes on when its stream closes), ``completed``
            (stopped; needs ``cont``), ``left`` (as that, by its owner's migration) or ``dead``.
        shut: SHUT 0 lies in its socket.
        stream: migrate-src has its stream open.
        migrate_src: A place in its table.
        src_file: What the source's record says.
        src_disk: What it says after a loss of power.
        recover_src: A place in the table of ``migrate-src --recover``; empty = never started.
        dst_qemu: ``waits`` (lacks its end), ``loaded``, ``complete`` (about to start by itself),
            ``runs`` or ``dead``.
        cont: ``asked`` or ``refused``, if ``cont`` was said to it.
        migrate_dst, dst_file, dst_disk, recover_dst: As for the source.
        supervisor: Of a destination QEMU that migrate-dst started.
        supervised: That was not told to leave it.
        owner: Of both monitors, if there is one.
        up: The link is not cut.
        there: What is under way to the destination.
        back: What is under way to the source.
        proven: The destination said that it can run the guest.
        ran: It ran there.
        fenced: A person said that it never will again.
        said: Sides on which somebody said that the guest is.
        dst_crash: The destination QEMU was killed from outside, or its host lost power.
        newer: The guest ran at the source since the stop whose end the destination has.
        elsewhere: Its owner migrated it to a third place, where it runs.
    """

    src_qemu: str = "runs"
    shut: bool = False
    stream: bool = True
    migrate_src: str = "pre-copy"
    src_file: str = "PREPARED"
    src_disk: str = "PREPARED"
    recover_src: str = ""
    dst_qemu: str = "waits"
    cont: str = ""
    migrate_dst: str = "pre-copy"
    dst_file: str = "PREPARED"
    dst_disk: str = "PREPARED"
    recover_dst: str = ""
    supervisor: str = "watches"
    supervised: bool = True
    owner: str = ""
    up: bool = True
    there: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    proven: bool = False
    ran: bool = False
    fenced: bool = False
    said: frozenset[str] = frozenset()
    dst_crash: bool = False
    newer: bool = False
    elsewhere: bool = False


AT: Final = {name: index for index, name in enumerate(World._fields)}
COMMANDS: Final = ("migrate_src", "recover_src", "migrate_dst", "recover_dst")
RECOVERS: Final = {"recover_src": "migrate_src", "recover_dst": "migrate_dst"}
OF_SOURCE: Final = frozenset({"migrate_src", "recover_src"})
LISTENS: Final = frozenset({"is dead", "is there"})

Step = Callable[[tuple[Any, ...]], World | None]
Move = tuple[str, World]


@dataclass(frozen=True, slots=True)
class Setup:
    """A kind of handover and of its guests.

    Attributes:
        name: For people.
        traits: What rows may ask for.
        synced: Records are on disk before the next step (not so only to show that it matters).
        locks: Recoveries that keep off a record on which another command is at work: both.
        reconnects: The link comes back after a cut, and what was said last is said again.
        only_faults: Faults that happen, if not all of them do.
        tables: What the processes do.
    """

    name: str
    traits: frozenset[str]
    synced: bool = True
    locks: tuple[str, ...] = ("recover_src", "recover_dst")
    reconnects: bool = False
    only_faults: tuple[str, ...] | None = None
    tables: Mapping[str, tuple[Row, ...]] = field(default_factory=lambda: PROCESSES)

    @property
    def start(self) -> World:
        """How a migration begins."""
        relayed = "relayed" in self.traits
        return World(
            supervisor="watches" if "owned" in self.traits else "",
            owner="watches" if relayed else "",
            src_file="" if relayed else "PREPARED",
            src_disk="" if relayed else "PREPARED",
            dst_file="" if relayed else "PREPARED",
            dst_disk="" if relayed else "PREPARED",
        )


def is_over(place: str) -> bool:
    """Whether a process does not live."""
    return place in ("", "over")


def _holds(value: object, wanted: tuple[Value, ...]) -> bool:
    if value in wanted:
        return True
    if "ended" in wanted and isinstance(value, str):
        return is_over(value)
    return "listens" in wanted and value in LISTENS


def compile_row(process: str, row: Row, setup: Setup) -> Step:
    """Turn a row into a function: the world after it, ``None`` where it cannot happen."""
    at, up = AT[process], AT["up"]
    ours = process in OF_SOURCE
    inbox, outbox = (AT["back"], AT["there"]) if ours else (AT["there"], AT["back"])
    record, disk = (
        (AT["src_file"], AT["src_disk"]) if ours else (AT["dst_file"], AT["dst_disk"])
    )
    conditions = [(AT[name], values) for name, values in row.when.items()]
    changes = [(AT[name], value) for name, value in row.sets.items()]
    written = "" if row.forgets else row.records

    def step(world: tuple[Any, ...]) -> World | None:
        if row.hears and world[inbox][:1] != (row.hears,):
            return None
        if row.lost and (world[up] or world[inbox]):
            return None
        for index, wanted in conditions:
            if not _holds(world[index], wanted):
                return None
        after: list[Any] = list(world)
        for index, value in changes:
            after[index] = value
        if row.hears:
            after[inbox] = world[inbox][1:]
        if row.says == "RECOVER":  # another connection
            after[inbox], after[outbox] = (), ("RECOVER",)
        elif row.says and after[up]:
            after[outbox] = (*world[outbox], row.says)
        if row.records or row.forgets:
            after[record] = written
            if setup.synced:
                after[disk] = written
        after[at] = row.to
        _compare(after, world[AT["src_qemu"]], row.hears)
        if row.to.startswith("end "):
            after[at] = "over"
            _end(after, process, row.to.removeprefix("end "))
        return settled(World._make(after))

    return step


def _compare(after: list[Any], before: str, hears: str) -> None:
    """Note whether the guest at the source is newer than what the destination has of it."""
    now, newer = after[AT["src_qemu"]], AT["newer"]
    if hears == "END_OF_STATE" or (now == "runs" and before != "runs"):
        after[newer] = now == "runs"


def _end(after: list[Any], process: str, where: str) -> None:
    """A command is over: its connections close, and what it said stays said."""
    after[AT["up"]] = False
    if process == "migrate_src":
        after[AT["stream"]] = False
    # What the source does once it was told is not for migrate-dst to know.
    if where == "neither" and process in OF_SOURCE and after[AT["src_qemu"]] == "runs":
        where = "neither, wrongly"
    if where in ("source", "destination", "neither", "neither, wrongly"):
        after[AT["said"]] = after[AT["said"]] | {where}


def settled(world: World) -> World:
    """Leave out differences that make no difference any more."""
    changes: dict[str, Any] = {}
    if world.dst_qemu in ("runs", "dead"):
        if world.cont:
            changes["cont"] = ""
        if world.dst_qemu == "runs":
            changes["ran"] = True
        elif world.supervisor:
            changes["supervisor"] = ""
    if world.newer and (world.dst_qemu == "dead" or world.ran):  # nobody asks any more
        changes["newer"] = world.dst_qemu == "runs"
    if world.src_qemu not in ("held", "runs") and (world.shut or world.stream):
        changes["shut"] = changes["stream"] = False
    # what nobody will read
    if world.back and world.migrate_src == "over" and is_over(world.recover_src):
        changes["back"] = ()
    if world.there and world.migrate_dst == "over" and is_over(world.recover_dst):
        changes["there"] = ()
    return world._replace(**changes) if changes else world


def _with(world: World, name: str, value: Any) -> World:  # noqa: ANN401
    changes: dict[str, Any] = {name: value}
    return world._replace(**changes)


class Handover:
    """All that can happen under one setup."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._steps: dict[str, dict[str, list[tuple[str, Step]]]] = {}
        self._heard: dict[tuple[str, str], set[str]] = {}
        for process, rows in setup.tables.items():
            places = self._steps[process] = {}
            for row in rows:
                if not set(row.only) <= {*setup.traits, "recorded"}:
                    continue
                step = compile_row(process, row, setup)
                for place in row.at.split("|"):
                    what = f"{process}: {place} -> {row.to}" + (
                        f" [{row.says or row.records}]" if row.says or row.records else ""
                    )
                    places.setdefault(place, []).append((what, step))
                    if row.hears:
                        self._heard.setdefault((process, place), set()).add(row.hears)

    def allowed(self, world: World) -> Iterator[Move]:
        """What the processes do, and a person who starts ``--recover``."""
        for process, places in self._steps.items():
            place = getattr(world, process)
            for what, step in places.get(place, ()):
                after = step(world)
                if after is not None and after != world:
                    yield what, after
            if heard := self._heard.get((process, place)):
                inbox = "back" if process in OF_SOURCE else "there"
                queue = getattr(world, inbox)
                if queue and queue[0] not in heard:  # as ``_expect``: nothing to us
                    yield f"{process}: ignores {queue[0]}", _with(world, inbox, queue[1:])
        if "relayed" not in self.setup.traits:
            for process, other in RECOVERS.items():
                free = is_over(getattr(world, other)) or process not in self.setup.locks
                if free and is_over(getattr(world, process)):
                    yield f"a person: {process}", _with(world, process, "read")
        if self.setup.reconnects and not world.up:
            yield from self._reconnected(world)

    def _reconnected(self, world: World) -> Iterator[Move]:
        """The link is taken up again: what an end waits to be answered for, it says again."""
        if is_over(world.migrate_src) or is_over(world.migrate_dst):
            return
        again = {
            "wait verified": ("END_OF_STATE",),
            "wait heard": ("PRECOPY_AGAIN",),
            "wait running": ("COMMIT",),
        }.get(world.migrate_src, ())
        answer = {
            "wait commit": ("VERIFIED", "READY")
            if "held" in self.setup.traits
            else ("VERIFIED",),
            "wait bye": ("RUNNING", "BYE"),
        }.get(world.migrate_dst, ())
        yield "the link comes back", world._replace(up=True, there=again, back=answer)

    def faults(self, world: World) -> Iterator[Move]:
        """What the world does to it: cuts, crashes, losses of power."""
        if world.up:
            yield "cut", world._replace(up=False)
        else:
            if world.there:
                yield "lost on the way there", world._replace(there=())
            if world.back:
                yield "lost on the way back", world._replace(back=())
        for process in COMMANDS:
            if not is_over(getattr(world, process)):
                yield f"kill {process}", settled(_killed(world, process))
        if world.src_qemu != "dead":
            yield "kill the source QEMU", settled(world._replace(src_qemu="dead"))
            dead = _killed(world, "migrate_src", "recover_src")
            after = dead._replace(src_qemu="dead", src_file=world.src_disk)
            yield "the source host loses power", settled(after)
        if world.dst_qemu != "dead":
            after = world._replace(dst_qemu="dead", dst_crash=True)
            yield "kill the destination QEMU", settled(after)
            dead = _killed(world, "migrate_dst", "recover_dst")
            after = dead._replace(dst_qemu="dead", dst_crash=True, dst_file=world.dst_disk)
            yield "the destination host loses power", settled(after)


def _killed(world: World, *processes: str) -> World:
    for process in processes:
        if not is_over(getattr(world, process)):
            world = _with(world, process, "over")._replace(up=False)
            if process == "migrate_src":
                world = world._replace(stream=False)
    return world


@dataclass
class Explored:
    """What can be reached.

    Attributes:
        came_from: Every world, and the step and the world it was first reached by.
        allowed: Edges that need no fault, backwards.
    """

    came_from: dict[World, tuple[str, World] | None]
    allowed: dict[World, list[World]]

    def way_to(self, world: World) -> list[str]:
        """The shortest story that leads to a world."""
        story: list[str] = []
        step = self.came_from[world]
        while step is not None:
            story.append(step[0])
            step = self.came_from[step[1]]
        return story[::-1]


class BrokenRuleError(Exception):
    """A rule does not hold somewhere; the message tells how one gets there."""


Rule = Callable[[World, Setup], str | None]


def explore(setup: Setup, rules: tuple[Rule, ...]) -> Explored:
    """Go everywhere, checking rules.

    Raises:
        BrokenRuleError: One does not hold.
    """
    handover = Handover(setup)
    start = setup.start
    explored = Explored({start: None}, {})
    todo = deque([start])
    wanted = setup.only_faults
    came_from, back = explored.came_from, explored.allowed
    while todo:
        world = todo.popleft()
        for rule in rules:
            if broken := rule(world, setup):
                raise told(explored, world, broken)
        for what, after in handover.allowed(world):
            back.setdefault(after, []).append(world)
            if after not in came_from:
                came_from[after] = (what, world)
                todo.append(after)
        for what, after in handover.faults(world):
            if after not in came_from and (wanted is None or what in wanted):
                came_from[after] = (what, world)
                todo.append(after)
    return explored


def told(explored: Explored, world: World, broken: str) -> BrokenRuleError:
    """Make the error: what is broken, and how it comes about."""
    story = "\n  ".join(explored.way_to(world))
    return BrokenRuleError(f"{broken}\n  {story}\n{world}")


def changed(setup: Setup, process: str, change: Callable[[Row], Row | None]) -> Setup:
    """The same with other rows in one table; ``None`` takes a row out."""
    rows = tuple(new for row in setup.tables[process] if (new := change(row)) is not None)
    return replace(setup, tables={**setup.tables, process: rows})

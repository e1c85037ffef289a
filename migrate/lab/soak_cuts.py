"""Migrate a guest many times over a link that is cut at random bytes, and judge each time.

Real TCP on loopback, the two commands as processes, and a proxy between them that cuts: in
pre-copy, in the handover, all connections or one of several. A migration is good if the guest is
in one place, both commands say so, and either it arrived as it was or what is known was said; if
every cut was shorter than the time-outs it must have arrived.
"""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import trio

from migrate.lab.commands import (
    MigrationFailedError,
    both_end,
    failures,
    listening_port,
    running_command,
    said,
)
from migrate.lab.cutting_proxy import CutPlan, How, cutting
from proto.limits import MAX_AHEAD_BYTES, MAX_CONTROL_BYTES
from proto.link.frames import FrameType

PROFILE: Final = """
description = "Busy, and full of what does not compress"
ram = "24MiB"
[content]
random = 0.9
[[vcpus]]
rate = 300
working_set = "1MiB"
"""

HANDOVER: Final = (
    FrameType.SWITCHOVER,
    FrameType.DEVICE_STATE,
    FrameType.END_OF_STATE,
    FrameType.VERIFIED,
    FrameType.READY,
    FrameType.SOURCE_DONE,
    FrameType.COMMIT,
    FrameType.RUNNING,
    FrameType.BYE,
)
"""Where the handover can be cut, in the order in which it goes."""

PRECOPY_PART: Final = 0.9
"""Cuts by position fall into this part of the bytes, those by frame behind it."""

SHORT_S: Final = (0.0, 0.0, 0.05, 0.3, 0.8)
"""Outages that no time-out minds."""

LONG_S: Final = 8.0
"""One that a stopped guest does not wait for."""

LONGEST_S: Final = 180.0
LEAST_BYTES: Final = 1000


@dataclass(frozen=True, slots=True)
class Outcome:
    """One migration and what became of it.

    Attributes:
        plan: The cuts that were wanted.
        made: Those that were made; the migration may have been over before the others.
        codes: How the commands ended.
        source: migrate-src's report.
        destination: migrate-dst's.
        wire_bytes: What passed the proxy.
        took_s: All of it.
        said: What both commands said last.
    """

    plan: Sequence[CutPlan]
    made: Sequence[CutPlan]
    codes: tuple[int, int]
    source: dict[str, Any]
    destination: dict[str, Any]
    wire_bytes: int
    took_s: float
    said: str

    @property
    def arrived(self) -> bool:
        """The guest is at the destination, as it was, and both know it."""
        reports = (self.source, self.destination)
        return self.codes == (0, 0) and all(
            r["status"] == "completed"
            and r["guest_on"] == "destination"
            and r["integrity"]["equal"] is True
            for r in reports
        )

    @property
    def most_resent(self) -> int:
        """Bytes that were sent again for one cut, at most."""
        return max((cut["resent_bytes"] for cut in self.source["cuts"]), default=0)

    def faults(self) -> list[str]:
        """What is wrong with it; empty if it is good."""
        found = []
        places = (self.source["guest_on"], self.destination["guest_on"])
        short = all(cut.outage_s <= max(SHORT_S) and cut.how != "silence" for cut in self.made)
        if short and not self.arrived:
            found.append("did not arrive although every cut was short")
        if places == ("source", "destination"):
            found.append("is said to be in two places")
        if not self.arrived and self.codes[0] == 0:
            found.append("migrate-src says that it arrived")
        if not self.arrived and self.source["error"] is None:
            found.append("failed without a reason")
        if self.most_resent > MAX_AHEAD_BYTES + MAX_CONTROL_BYTES:
            found.append("more was sent again than the window holds")
        if self.source["wire_bytes"] != sum(self.source["bytes"].values()):
            found.append("the account does not close")
        return found

    def __str__(self) -> str:
        source = self.source
        error = "" if source["error"] is None else f" ({source['error']['code']})"
        downtime = source["downtime_ms"]
        shown = "-" if downtime is None else f"{downtime:.0f} ms"
        return (
            f"{source['status']}{error}, guest on {source['guest_on']}, "
            f"equal={source['integrity']['equal']}, streams={source['streams']}, "
            f"cuts={len(self.made)}, reconnects={source['reconnects']}, "
            f"outage={source['outage_ms']:.0f} ms, resent={source['bytes']['resent']} "
            f"(most {self.most_resent}), downtime={shown}, total={source['total_ms']:.0f} ms"
        )


def random_plan(
    chance: random.Random, wire_bytes: int, streams: int, *, long: bool
) -> list[CutPlan]:
    """Draw 1 to 10 cuts.

    Args:
        chance: Where from.
        wire_bytes: What a migration without cuts takes.
        streams: Its connections.
        long: Let one of them last longer than a stopped guest waits.
    """
    count = chance.randint(1, 10)
    in_handover = sum(chance.random() < 0.4 for _ in range(count))
    spread = int(wire_bytes * PRECOPY_PART)
    places = sorted(chance.randint(1, spread) for _ in range(count - in_handover))
    plan = [CutPlan(at_bytes=at) for at in places]
    frames = sorted(chance.choices(HANDOVER, k=in_handover), key=HANDOVER.index)
    plan += [CutPlan(frame=frame, plus_bytes=chance.randint(0, 60)) for frame in frames]
    hows: tuple[How, ...] = ("reset", "reset", "reset", "end")
    plan = [
        replace(
            cut,
            one=streams > 1 and chance.random() < 0.5,
            how=chance.choice(hows),
            outage_s=chance.choice(SHORT_S),
        )
        for cut in plan
    ]
    if long:
        at = chance.randrange(len(plan))
        plan[at] = replace(plan[at], outage_s=LONG_S)
    return plan


async def migrate_simulated(
    folder: Path,
    plan: Sequence[CutPlan],
    *,
    streams: int = 1,
    options: Sequence[str] = (),
    destination_options: Sequence[str] = (),
    profile: str = PROFILE,
) -> Outcome:
    """Migrate a simulated guest with both commands, cut by plan, however it ends.

    Raises:
        ExceptionGroup: Of ``MigrationFailedError``: a command did not end.
        MigrationFailedError: One left no report.
    """
    path = folder / "profile.toml"
    path.write_text(profile)
    listen = ("--listen", "127.0.0.1:0", "--simulate", "--run-for", "0ms")
    told = ("--run-dir", str(folder), *_files(folder, "dst"), *destination_options)
    began = trio.current_time()
    async with running_command("migrate-dst", *listen, *told) as dst:
        with trio.fail_after(LONGEST_S):
            port = await listening_port(dst)
        async with cutting(port, plan) as proxy:
            way = ("--to", f"127.0.0.1:{proxy.port}", "--simulate", str(path))
            more = ("--streams", str(streams), *_files(folder, "src"), *options)
            async with running_command("migrate-src", *way, *more) as src:
                codes = await both_end(src, dst, LONGEST_S)
    try:
        source, destination = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("src", "dst")
        )
    except FileNotFoundError as error:
        raise MigrationFailedError(f"{error}, exit codes {codes}\n{said(src, dst)}") from error
    took_s = trio.current_time() - began
    return Outcome(
        plan,
        proxy.done,
        codes,
        source,
        destination,
        proxy.forwarded_bytes,
        took_s,
        said(src, dst),
    )


def _files(folder: Path, name: str) -> tuple[str, ...]:
    told = ("--report", str(folder / f"{name}.json"), "--trace", str(folder / f"{name}.jsonl"))
    return ("--state-dir", str(folder), *told)


SLOW_OPTIONS: Final = ("--max-bandwidth", "80Mbit", "--compress", "none")
"""Most of a guest is still to come when some megabytes have passed: it is not stopped for long."""

SIMULATED_OPTIONS: Final = ("--max-bandwidth", "400Mbit", "--compress", "none")


WAITS: Final = ("--reconnect-timeout", "15s")
"""Longer than any outage; a destination whose last message was cut waits as long at its end."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A migration of which a command hung, or died without a word; takes ``Outcome``'s place.

    Attributes:
        plan: The cuts that were wanted.
        said: Why, and what both commands said last.
    """

    plan: Sequence[CutPlan]
    said: str

    def faults(self) -> list[str]:
        """What is wrong with it."""
        return ["is nobody knows where: a command hung or left no report"]

    def __str__(self) -> str:
        return "failed"


async def soak_cuts(
    folder: Path,
    *,
    numbers: Sequence[int],
    seed: int,
    on_end: Callable[[int, Outcome | Failure, Path], None],
) -> None:
    """Migrate a simulated guest again and again, each time with a plan of its own.

    Args:
        folder: For profiles, records, reports and traces.
        numbers: Of the migrations; with the seed they say the plan.
        seed: Of all plans.
        on_end: Told of each: number, what became of it, and its folder, which goes then.

    Raises:
        RuntimeError: Not even one without cuts works.
    """
    whole = await _migrate(folder / "0", [], 1)
    if isinstance(whole, Failure) or not whole.arrived or whole.wire_bytes < LEAST_BYTES:
        raise RuntimeError(f"a migration without cuts fails: {whole}\n{whole.said}")
    for number in numbers:
        chance = random.Random(f"cuts {seed} {number}")
        streams = chance.choice((1, 3))
        long = number % 10 == 0
        plan = random_plan(chance, whole.wire_bytes, streams, long=long)
        own = folder / str(number)
        on_end(number, await _migrate(own, plan, streams), own)
        shutil.rmtree(own)


async def _migrate(folder: Path, plan: Sequence[CutPlan], streams: int) -> Outcome | Failure:
    folder.mkdir(mode=0o700)
    why = ""
    try:
        return await migrate_simulated(
            folder,
            plan,
            streams=streams,
            options=(*SIMULATED_OPTIONS, *WAITS),
            destination_options=WAITS,
        )
    except* MigrationFailedError as group:
        why = failures(group)
    return Failure(plan, why)

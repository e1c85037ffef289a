"""The matrix: every step of a handover, every process, every fault; and which of it CI runs."""

import re
from dataclasses import dataclass
from typing import Final

KINDS: Final = ("simulated", "real", "waiting")

SOURCE: Final = "migrate-src"
DESTINATION: Final = "migrate-dst"
SOURCE_QEMU: Final = "source QEMU"
DESTINATION_QEMU: Final = "destination QEMU"
LINK: Final = "link"
BOTH_COMMANDS: Final = "both commands"

PROCESSES: Final[dict[str, tuple[str, ...]]] = {
    "simulated": (SOURCE, DESTINATION),
    "real": (SOURCE, DESTINATION, SOURCE_QEMU, DESTINATION_QEMU),
    "waiting": (SOURCE, DESTINATION, SOURCE_QEMU, DESTINATION_QEMU),
}
"""A simulated guest lives in the commands. A real one arrives in a QEMU that migrate-dst starts, or
that somebody started and that waits with ``-incoming``: then it starts by itself."""

HELD: Final[tuple[tuple[str, str], ...]] = (
    (SOURCE, "PREPARED recorded"),
    (DESTINATION, "PREPARED recorded"),
    (SOURCE, "guest's stream began"),
    (DESTINATION, "guest waits"),
    (DESTINATION, "pages received"),
    (SOURCE, "guest stopped"),
    (SOURCE, "END_OF_STATE sent"),
    (DESTINATION, "END_OF_STATE received"),
    (DESTINATION, "compared"),
    (DESTINATION, "VERIFIED sent"),
    (SOURCE, "VERIFIED received"),
    (DESTINATION, "devices loaded"),
    (DESTINATION, "end loaded"),
    (DESTINATION, "READY sent"),
    (SOURCE, "READY received"),
    (SOURCE, "guest let go"),
    (SOURCE, "SOURCE_DONE sent"),
    (DESTINATION, "SOURCE_DONE received"),
    (SOURCE, "COMMIT_SENT recorded"),
    (SOURCE, "COMMIT sent"),
    (DESTINATION, "COMMIT received"),
    (DESTINATION, "COMMITTED recorded"),
    (DESTINATION, "guest runs"),
    (DESTINATION, "RUNNING sent"),
    (SOURCE, "RUNNING received"),
    (SOURCE, "RUNNING recorded"),
    (DESTINATION, "BYE sent"),
    (SOURCE, "BYE sent"),
    (SOURCE, "BYE received"),
    (DESTINATION, "BYE received"),
    (SOURCE, "guest finished"),
    (SOURCE, "record removed"),
    (DESTINATION, "guest kept"),
    (DESTINATION, "record removed"),
)
"""Who has just done what, in an order that may be; what was sent is still under way."""


def _withheld() -> tuple[tuple[str, str], ...]:
    """The end of the stream waits for the commit; all else is loaded before VERIFIED."""
    end, devices = (DESTINATION, "end loaded"), (DESTINATION, "devices loaded")
    steps = [step for step in HELD if step not in {end, devices} and "READY" not in step[1]]
    steps.insert(steps.index((DESTINATION, "compared")) + 1, devices)
    steps.insert(steps.index((DESTINATION, "COMMITTED recorded")) + 1, end)
    return tuple(steps)


STEPS: Final = {"simulated": HELD, "real": HELD, "waiting": _withheld()}
"""By kind of guest."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault at one step.

    Attributes:
        kind: Of guest.
        actor: The command that has just made the step.
        step: Which.
        fault: ``kill``, ``freeze`` or ``cut``.
        victim: What it hits.
    """

    kind: str
    actor: str
    step: str
    fault: str
    victim: str

    @property
    def index(self) -> int:
        """Of the step."""
        return STEPS[self.kind].index((self.actor, self.step))

    def is_before(self, actor: str, step: str) -> bool:
        """Whether another step comes later."""
        return self.index < STEPS[self.kind].index((actor, step))

    def __str__(self) -> str:
        """As it is named in tests: ``kill migrate-src when migrate-dst: compared``."""
        return f"{self.fault} {self.victim} when {self.actor}: {self.step}"


def cells(kind: str) -> list[Cell]:
    """The whole matrix of one kind of guest."""
    hits = [(fault, victim) for victim in PROCESSES[kind] for fault in ("kill", "freeze")]
    hits.append(("cut", LINK))
    return [
        Cell(kind, actor, step, fault, victim)
        for actor, step in STEPS[kind]
        for fault, victim in hits
    ]


REPRESENTATIVE: Final[dict[str, tuple[str, ...]]] = {
    "simulated": (
        r"kill .*: (pages received|compared|READY received|COMMIT sent|guest runs)",
        r"cut .*: (guest stopped|VERIFIED sent|guest let go|COMMIT received|RUNNING recorded)",
        r"freeze migrate-dst when migrate-src: (READY received|COMMIT_SENT recorded)",
    ),
    "real": (
        r"kill migrate-src when migrate-src: COMMIT_SENT recorded",
        r"kill migrate-dst when migrate-dst: COMMITTED recorded",
        r"kill source QEMU when migrate-src: guest stopped",
        r"kill destination QEMU when migrate-dst: COMMITTED recorded",
        r"cut .*: COMMIT sent",
    ),
    "waiting": (r"kill migrate-dst .*: COMMITTED recorded",),
}
"""What CI runs."""


def chosen(kind: str, pattern: str | None) -> list[Cell]:
    """Those whose name has the pattern in it; without one a representative few."""
    if pattern is not None:
        return [cell for cell in cells(kind) if re.search(pattern, str(cell))]
    few = [re.compile(wanted) for wanted in REPRESENTATIVE[kind]]
    return [cell for cell in cells(kind) if any(p.fullmatch(str(cell)) for p in few)]

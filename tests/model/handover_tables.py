"""The handover as literal tables: what each process does next, and which code does it.

A row reads: ``process`` at ``at``, if it ``hears`` this message (or has ``lost`` the link) and
everything in ``when`` holds, ``records``, ``sets`` and ``says`` this and is at ``to``. A row
without a condition may happen at any time: a time-out, a signal or a failure. That is also how a
process that is frozen looks to the others, so a freeze needs no rows of its own.

Whatever one row does happens at once; between two rows anything may happen, and every process may
die. ``code`` names what does it; ``tests/model/test_handover.py`` checks that it exists.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

Value = str | bool


@dataclass(frozen=True, slots=True)
class Row:
    """One step of a process.

    Attributes:
        at: Where the process is; alternatives are joined by ``|``.
        code: What does this step, ``module:qualified.name`` below ``migrate``; or what a QEMU does.
        to: Where it is then. ``end WHERE``: it ended and said that the guest is there.
        hears: Message that it takes.
        lost: The link is cut, and what had arrived is read.
        says: Message that it sends; into a link that is cut it is lost.
        records: State that is on disk, synced, before the next row.
        forgets: The record is removed.
        when: Fields of the world and the values with which this can happen; ``ended`` is a process
            that does not live, ``listens`` a migrate-dst --recover that can be asked.
        sets: Fields of the world and their new values.
        only: Traits that the setup must have.
    """

    at: str
    code: str
    to: str
    hears: str = ""
    lost: bool = False
    says: str = ""
    records: str = ""
    forgets: bool = False
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    sets: Mapping[str, Value] = field(default_factory=dict)
    only: tuple[str, ...] = ()


RUN = "handover:SourceHandover.hand_over"
COMMIT = "handover:SourceHandover._commit"
CALL_OFF = "source:SourceRun._call_off"
GO_ON = "guests.qemu_source:QemuSource.go_on"
AS_BEFORE = "guests.source_state:bring_back"
BYE_SRC = "source:SourceRun._farewell"
TURN = "way_back:WayBack._turn_back"

MIGRATE_SRC: Final = (
    Row("pre-copy", "outbound:Outbound.run", "wait verified", says="END_OF_STATE",
        when={"src_qemu": ("runs",)}, sets={"src_qemu": "held"}, only=("return path",)),
    Row("pre-copy", "outbound:Outbound.run", "wait verified", says="END_OF_STATE",
        when={"src_qemu": ("runs",)}, sets={"src_qemu": "completed"}, only=("no return path",)),
    Row("wait verified", RUN, "wait ready", hears="VERIFIED", only=("held",)),
    Row("wait verified", RUN, "let go", hears="VERIFIED", only=("withheld",)),
    Row("wait verified", RUN, "wait shut", hears="VERIFIED", only=("relayed",)),
    # the link is away for too long while the guest is stopped: back to pre-copy
    Row("wait verified", "way_back:WayBack.turns_back", "turn back", lost=True, only=("qmp",)),
    Row("turn back", "guests.qemu_source:QemuSource.turn_back", "wait goes on",
        sets={"stream": False}),
    Row("wait goes on", TURN, "wait link", when={"src_qemu": ("runs",)}),
    # RESUMED says that END_OF_STATE was not received, and it is taken back
    Row("wait link", TURN, "say again", when={"up": (True,), "migrate_dst": ("pre-copy",)}),
    Row("say again", "outbound:Outbound.say_again", "wait heard", says="PRECOPY_AGAIN"),
    Row("wait heard", "outbound:Outbound.say_again", "start again", hears="ACK"),
    Row("start again", "guests.qemu_source:QemuSource.start", "pre-copy",
        when={"src_qemu": ("runs",)}, sets={"stream": True}),
    Row("wait ready", RUN, "let go", hears="READY"),
    Row("let go", "guests.qemu_source:QemuSource.let_go", "wait completed",
        sets={"shut": True}, only=("return path",)),
    Row("let go", "guests.gateway_source:GatewaySource.let_go", "wait completed",
        only=("no return path",)),
    Row("wait completed", "guests.qemu_source:QemuSource.let_go", "hold",
        when={"src_qemu": ("completed", "dead")}),
    Row("hold", RUN, "commit"),
    # the point of no return
    Row("commit", COMMIT, "send commit", records="COMMIT_SENT"),
    Row("send commit", COMMIT, "wait running", says="COMMIT"),
    Row("wait running", COMMIT, "record running", hears="RUNNING"),
    Row("wait running", COMMIT, "returned", hears="ABORT dead"),
    Row("wait running", COMMIT, "end unknown", hears="ABORT unknown"),
    Row("wait running", COMMIT, "end unknown", lost=True),
    Row("wait running", COMMIT, "end unknown"),
    Row("record running", COMMIT, "farewell", records="RUNNING"),
    Row("farewell", BYE_SRC, "wait bye", says="BYE"),
    Row("wait bye", BYE_SRC, "end destination", hears="BYE", forgets=True),
    Row("wait bye", BYE_SRC, "end destination", lost=True),
    Row("wait bye", BYE_SRC, "end destination"),
    Row("returned", COMMIT, "go on", records="RETURNED"),
    # the ways back, before the commit
    *(
        Row("pre-copy|wait verified|turn back|wait goes on|wait link|say again|wait heard|"
            "start again|wait ready|wait shut|wait completed|hold|commit",
            CALL_OFF, to, hears=hears, lost=lost)
        for to in ("say abort", "go on")
        for hears, lost in (("ABORT dead", False), ("ABORT unknown", False), ("", True),
                            ("", False))
    ),
    Row("say abort", "source:SourceRun._say_abort", "go on", says="ABORT"),
    Row("go on", GO_ON, "as before", sets={"stream": False}),
    Row("as before", AS_BEFORE, "forget", when={"src_qemu": ("runs",)}),
    Row("as before", AS_BEFORE, "forget", when={"src_qemu": ("completed",)},
        sets={"src_qemu": "runs"}, only=("qmp",)),
    Row("as before", AS_BEFORE, "end neither", when={"src_qemu": ("completed",)}),
    Row("as before", GO_ON, "end neither", when={"src_qemu": ("dead",)}),
    Row("as before", GO_ON, "end unknown"),
    Row("forget", CALL_OFF, "end source", forgets=True),
    # the owner of both monitors commits
    Row("wait shut", "source:SourceRun._relay", "end handed-over", hears="SHUT",
        sets={"shut": True}),
)  # fmt: skip

LOAD = "handover:DestinationHandover.hand_over"
TAKE = "handover:DestinationHandover._take_over"
BACK = "handover:DestinationHandover._give_back"
DISCARD = "destination:DestinationRun._discard"
BYE_DST = "destination:DestinationRun._farewell"
RUN_DST = "guests.qemu_destination:QemuDestination.run"
KILL = "guests.qemu_destination:QemuDestination.discard"

MIGRATE_DST: Final = (
    Row("pre-copy", "handover:DestinationHandover._verify", "verified", hears="END_OF_STATE"),
    Row("pre-copy", "inbound:Inbound._begin_again", "pre-copy", hears="PRECOPY_AGAIN",
        says="ACK"),
    Row("verified", LOAD, "load", says="VERIFIED", only=("held",)),
    Row("verified", LOAD, "wait commit", says="VERIFIED", sets={"proven": True},
        only=("incoming", "withheld")),
    Row("verified", LOAD, "load paused", says="VERIFIED", only=("commanded",)),
    Row("load paused", LOAD, "wait commit", when={"dst_qemu": ("waits",)},
        sets={"dst_qemu": "loaded"}),
    Row("verified", LOAD, "load end", says="VERIFIED", sets={"proven": True},
        only=("relayed",)),
    Row("load", LOAD, "ready", when={"dst_qemu": ("waits",)}, sets={"dst_qemu": "loaded"}),
    Row("ready", LOAD, "wait commit", says="READY", sets={"proven": True}),
    Row("wait commit", LOAD, "take over", hears="COMMIT"),
    # from here on the guest is the destination's
    Row("take over", TAKE, "deliver", records="COMMITTED", only=("incoming",)),
    Row("take over", TAKE, "cont", records="COMMITTED", only=("held",)),
    Row("take over", TAKE, "cont", records="COMMITTED", only=("commanded",)),
    Row("deliver", TAKE, "wait runs", when={"dst_qemu": ("waits",)},
        sets={"dst_qemu": "complete"}),
    Row("deliver", TAKE, "say unknown"),
    Row("cont", RUN_DST, "wait runs", sets={"cont": "asked"}),
    Row("wait runs", RUN_DST, "say running", when={"dst_qemu": ("runs",)}),
    Row("wait runs", TAKE, "give back", when={"cont": ("refused",)}),
    Row("wait runs", TAKE, "say unknown"),
    Row("say running", TAKE, "farewell", says="RUNNING"),
    Row("farewell", BYE_DST, "wait bye", says="BYE"),
    Row("wait bye", BYE_DST, "forget", hears="BYE", sets={"supervised": False}),
    Row("wait bye", BYE_DST, "end destination", lost=True),
    Row("wait bye", BYE_DST, "end destination"),
    Row("forget", BYE_DST, "end destination", forgets=True),
    Row("say unknown", BACK, "end unknown", says="ABORT unknown"),
    Row("give back", BACK, "kill returned", records="GIVEN_BACK"),
    Row("kill returned", KILL, "say returned", sets={"dst_qemu": "dead"}),
    Row("kill returned", KILL, "say unknown", only=("attached",)),
    Row("say returned", BACK, "end neither", says="ABORT dead"),
    # the ways back, before COMMITTED
    *(
        Row("load|load paused|ready|wait commit|take over", DISCARD, "discard", lost=lost)
        for lost in (True, False)
    ),
    # the source cannot have committed, or never will
    Row("pre-copy|verified", DISCARD, "kill, forget"),
    Row("pre-copy|verified|load|load paused|ready|wait commit|take over", DISCARD,
        "kill, forget", hears="ABORT"),
    Row("kill, forget", KILL, "forget unused", sets={"dst_qemu": "dead"}),
    Row("kill, forget", KILL, "end unknown", only=("attached",)),
    Row("forget unused", DISCARD, "end source", forgets=True),
    Row("discard", DISCARD, "kill", records="ABORTED", only=("recorded",)),
    Row("discard", DISCARD, "kill"),  # it cannot be recorded
    Row("kill", KILL, "say dead", sets={"dst_qemu": "dead"}),
    Row("kill", KILL, "say unknown", only=("attached",)),
    Row("say dead", DISCARD, "end source", says="ABORT dead"),
    # the owner of both monitors commits
    Row("load end", LOAD, "relay", when={"dst_qemu": ("waits",)}, sets={"dst_qemu": "loaded"}),
    Row("load end", DISCARD, "end handed-over"),
    Row("relay", "destination:DestinationRun._relay", "end handed-over", says="SHUT"),
    Row("relay", "destination:DestinationRun._relay", "end handed-over"),
)  # fmt: skip

LOOK = "recovery.source:SourceRecovery._run"
KEEP = "recovery.source:SourceRecovery._keep"
ASK = "recovery.source:SourceRecovery._ask"
QUESTION = "recovery.source:SourceRecovery._question"
ACT = "recovery.source:SourceRecovery._act"
BYE_ASKED = "recovery.source:SourceRecovery._farewell"

RECOVER_SRC: Final = (
    Row("read", "state_file:StateFile.open", "end unknown", when={"src_file": ("",)}),
    Row("read", KEEP, "end neither",
        when={"src_file": ("PREPARED", "KEPT", "RETURNED"), "src_qemu": ("dead",)}),
    Row("read", KEEP, "go on", records="KEPT", when={"src_file": ("PREPARED",)}),
    Row("read", KEEP, "go on", when={"src_file": ("KEPT", "RETURNED")}),
    Row("read", LOOK, "end destination", when={"src_file": ("RUNNING",)}),
    Row("read", ASK, "connect", when={"src_file": ("COMMIT_SENT",)}),
    # --destination-is-fenced: a person has made sure of it
    Row("read", ASK, "go on", records="RETURNED", sets={"fenced": True},
        when={"src_file": ("COMMIT_SENT",), "dst_qemu": ("dead",)}),
    Row("connect", QUESTION, "asked", says="RECOVER", when={"recover_dst": ("listens",)},
        sets={"up": True}),
    Row("connect", ASK, "end unknown"),
    Row("asked", ACT, "returned", hears="DEAD"),
    Row("asked", ACT, "runs there", hears="RUNS"),
    Row("asked", ASK, "end unknown", lost=True),
    Row("asked", ASK, "end unknown"),
    Row("returned", ACT, "go on", records="RETURNED"),
    Row("runs there", ACT, "forget there", records="RUNNING"),
    Row("forget there", ACT, "bye there", forgets=True),
    Row("bye there", BYE_ASKED, "end destination", says="BYE"),
    Row("go on", GO_ON, "as before", sets={"stream": False}),
    Row("as before", AS_BEFORE, "forget", when={"src_qemu": ("runs",)}),
    Row("as before", AS_BEFORE, "forget", when={"src_qemu": ("completed",)},
        sets={"src_qemu": "runs"}),
    Row("as before", AS_BEFORE, "end neither", when={"src_qemu": ("completed",)}),
    Row("as before", GO_ON, "end neither", when={"src_qemu": ("dead",)}),
    Row("as before", GO_ON, "end unknown"),
    Row("forget", KEEP, "bye", forgets=True),
    Row("bye", BYE_ASKED, "end source", says="BYE"),
)  # fmt: skip

FORGO = "recovery.destination:DestinationRecovery._forgo"
MAKE_DEAD = "recovery.destination:DestinationRecovery._make_dead"
RESUME = "recovery.destination:DestinationRecovery._resume"
AS_BEFORE_DST = "recovery.destination:DestinationRecovery._run_as_before"
ANSWER = "recovery.destination:DestinationRecovery._answer"
TELL = "recovery.destination:DestinationRecovery._tell"

RECOVER_DST: Final = (
    Row("read", "state_file:StateFile.open", "end unknown", when={"dst_file": ("",)}),
    Row("read", FORGO, "kill", records="ABORTED", when={"dst_file": ("PREPARED",)}),
    Row("read", FORGO, "kill", when={"dst_file": ("ABORTED", "GIVEN_BACK")}),
    Row("kill", MAKE_DEAD, "is dead", sets={"dst_qemu": "dead"}),
    Row("kill", MAKE_DEAD, "end unknown", only=("attached",)),
    Row("read", RESUME, "resume", when={"dst_file": ("COMMITTED",)}),
    Row("resume", AS_BEFORE_DST, "is there", when={"dst_qemu": ("runs",)}),
    Row("resume", AS_BEFORE_DST, "wait runs", when={"dst_qemu": ("loaded",)},
        sets={"cont": "asked"}),
    Row("resume", RESUME, "end unknown"),
    Row("wait runs", AS_BEFORE_DST, "is there", when={"dst_qemu": ("runs",)}),
    Row("wait runs", AS_BEFORE_DST, "end unknown"),
    # --listen: until migrate-src --recover has asked and acted, or a person ends it
    Row("is dead", ANSWER, "end source"),
    Row("is there", ANSWER, "end destination"),
    Row("is dead", TELL, "tell dead", hears="RECOVER"),
    Row("is there", TELL, "tell runs", hears="RECOVER"),
    Row("tell dead", TELL, "told dead", says="DEAD"),
    Row("tell runs", TELL, "told runs", says="RUNS"),
    Row("told dead", TELL, "end source", hears="BYE", forgets=True),
    Row("told dead", TELL, "is dead", lost=True),
    Row("told dead", ANSWER, "end source"),
    # this record stays: a supervisor that is slow to see migrate-dst gone must still find it
    Row("told runs", TELL, "end destination", hears="BYE"),
    Row("told runs", TELL, "is there", lost=True),
    Row("told runs", ANSWER, "end destination"),
)  # fmt: skip

SOURCE_QEMU: Final = (
    Row("held", "reads SHUT 0", "completed", when={"shut": (True,)}),
    Row("held", "sees its stream closed", "runs", when={"stream": (False,)}),
    # while no migration of ours is under way there; it looks as completed as one of ours
    Row("runs", "is told by its owner to migrate elsewhere", "left", when={"stream": (False,)},
        sets={"elsewhere": True}, only=("elsewhere",)),
)  # fmt: skip

DESTINATION_QEMU: Final = (
    Row("loaded", "cont", "runs", when={"cont": ("asked",)}, sets={"cont": ""}),
    Row("loaded", "refuses cont: its disks are taken", "loaded", when={"cont": ("asked",)},
        sets={"cont": "refused"}),
    Row("loaded", "sees its monitor closed before it reads cont", "loaded",
        when={"cont": ("asked",), "migrate_dst": ("ended",), "recover_dst": ("ended",)},
        sets={"cont": ""}),
    Row("complete", "starts by itself", "runs"),
    Row("waits", "sees its stream end early", "dead", when={"migrate_dst": ("ended",)}),
)  # fmt: skip

SUPERVISOR: Final = (
    Row("watches", "qemu.supervisor:Supervisor._may_live", "done",
        when={"migrate_dst": ("ended",), "supervised": (True,),
              "dst_file": ("", "PREPARED", "ABORTED", "GIVEN_BACK")},
        sets={"dst_qemu": "dead"}, only=("owned",)),
)  # fmt: skip

OWNER: Final = (
    Row("watches", "cont on the destination", "done",
        when={"src_qemu": ("completed",), "dst_qemu": ("loaded",)}, sets={"dst_qemu": "runs"}),
    Row("watches", "ends the destination", "done",
        when={"src_qemu": ("runs",)}, sets={"dst_qemu": "dead"}),
    Row("watches", "cont on the source", "done",
        when={"src_qemu": ("completed",), "dst_qemu": ("dead",)}, sets={"src_qemu": "runs"}),
)  # fmt: skip

PROCESSES: Final[Mapping[str, tuple[Row, ...]]] = {
    "src_qemu": SOURCE_QEMU,
    "migrate_src": MIGRATE_SRC,
    "recover_src": RECOVER_SRC,
    "dst_qemu": DESTINATION_QEMU,
    "migrate_dst": MIGRATE_DST,
    "recover_dst": RECOVER_DST,
    "supervisor": SUPERVISOR,
    "owner": OWNER,
}
"""The field of the world that says where a process is, and its table."""

"""What one run of ``migrate-src --recover`` or ``migrate-dst --recover`` was asked to do."""

from dataclasses import dataclass, field
from pathlib import Path

from migrate.errors import ParamsError
from migrate.link_security import UNPROTECTED, LinkSecurity
from migrate.params import LinkAddress, OutputParams
from migrate.timeouts import DEFAULTS, Timeouts


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecoveryParams:
    """``migrate-src --recover``.

    Attributes:
        record: A state file, or the number of a migration.
        qmp: The source QEMU's QMP socket; ``None`` = as recorded.
        to: Where ``migrate-dst --recover`` listens; ``None`` = where migrate-dst did.
        fenced: A person says that the destination's copy does not run and never will.
        state_dir: Where records are.
        connect_timeout_s: Seconds until giving up on reaching ``to``.
        security: How the link is protected.
        timeouts: How long other processes are waited for.
        output: Reports and progress.
    """

    record: str
    qmp: Path | None = None
    to: LinkAddress | None = None
    fenced: bool = False
    state_dir: Path
    connect_timeout_s: float = 10.0
    security: LinkSecurity = UNPROTECTED
    timeouts: Timeouts = DEFAULTS
    output: OutputParams = field(default_factory=OutputParams)

    def __post_init__(self) -> None:
        if not self.record:
            raise ParamsError("--recover needs a state file or the number of a migration")
        if self.to is not None and self.to.port == 0:
            raise ParamsError(f"--to needs the port migrate-dst listens on, got {self.to}")
        if not self.connect_timeout_s > 0:
            raise ParamsError("expected --connect-timeout above zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationRecoveryParams:
    """``migrate-dst --recover``.

    Attributes:
        record: A state file, or the number of a migration.
        qmp: The destination QEMU's QMP socket; ``None`` = as recorded.
        listen: Where to wait for ``migrate-src --recover``; ``None`` = not at all.
        state_dir: Where records are.
        hello_timeout_s: Seconds a connection may take to say what it wants.
        security: How the link is protected.
        timeouts: How long other processes are waited for.
        output: Reports and progress.
    """

    record: str
    qmp: Path | None = None
    listen: LinkAddress | None = None
    state_dir: Path
    hello_timeout_s: float = 10.0
    security: LinkSecurity = UNPROTECTED
    timeouts: Timeouts = DEFAULTS
    output: OutputParams = field(default_factory=OutputParams)

    def __post_init__(self) -> None:
        if not self.record:
            raise ParamsError("--recover needs a state file or the number of a migration")
        if not self.hello_timeout_s > 0:
            raise ParamsError("expected --hello-timeout above zero")

"""One end of a link: an exchange, and who may take part in it with which connection. No I/O.

Theory of operation. Messages are ``proto.link.exchange``'s. A link begins with one connection, on
which HELLO is said. Further ones begin with JOIN (``join``, ``take_answer``; the destination:
``admit``). When a connection is lost before its time, all are: the epoch of the link is over. The
source opens another with RESUME (``resume``, ``take_resumed``; the destination: ``admit_resume``),
and ``repeat`` says what must be written again. To the messages that pass it is as if nothing had
happened.
"""

import hmac

from proto.errors import (
    LocalProtocolError,
    MessageError,
    UnexpectedMessageError,
)
from proto.link.dispatch import decode_message, encode_message
from proto.link.exchange import Exchange
from proto.link.frames import Buffer, Frame, encode_frame
from proto.link.messages import Ack, Join, Joined, Refused, Resume, Resumed
from proto.link.state import JOINABLE, RESUMABLE, Direction, JoinState, LinkState, Role
from proto.link.strangers import UNKNOWN


class LinkSession(Exchange):
    """One end of the link protocol, over all connections of one migration. See ``Exchange``."""

    # --- further connections ------------------------------------------------------------------

    def join(self, connection: int) -> Join:
        """Source: what to send first on a further connection.

        Raises:
            LocalProtocolError: There was no WELCOME, or it does not take so many.
        """
        if self.hello is None or self.welcome is None or connection >= self.welcome.streams:
            raise LocalProtocolError(f"connection {connection} was not agreed upon")
        return Join(self.hello.migration_id, self.welcome.join_token, connection, self.epoch)

    def is_joining(self, connection: int) -> bool:
        """Source: JOIN was said on this connection in this epoch, and not refused."""
        state = self._further.get(connection, JoinState.UNJOINED)
        return state in (JoinState.JOINING, JoinState.JOINED)

    def take_answer(self, frame: Frame) -> Joined | Refused:
        """Source: take the first message of a further connection, the answer to JOIN.

        Raises:
            RemoteProtocolError: It is none. The migration is not concerned.
        """
        joined = self._join_move(frame.connection, frame.frame_type, Direction.RECEIVED)
        message = None if joined is None else decode_message(frame, self.context)
        if joined is None or not isinstance(message, Joined | Refused):
            expected = "JOINED or REFUSED"
            raise UnexpectedMessageError(frame.where, expected, frame.frame_type.name)
        self._further[frame.connection] = joined
        return message

    def admit(self, join: Join) -> Joined | Refused:
        """Destination: judge a connection that wants to join, whoever opened it.

        Returns:
            JOINED, which must be sent on it next, or a REFUSED that concerns nothing else.
        """
        hello, welcome = self.hello, self.welcome
        if (
            hello is None
            or welcome is None
            or not hmac.compare_digest(hello.migration_id, join.migration_id)
            or not hmac.compare_digest(welcome.join_token, join.join_token)
        ):
            return UNKNOWN
        if not self._joining or self.state not in JOINABLE or join.epoch != self.epoch:
            return Refused("late", "connections are no longer taken")
        if join.connection >= welcome.streams:
            return Refused("extra", f"{welcome.streams} connections were agreed upon")
        if join.connection in self._further:
            return Refused("taken", f"connection {join.connection} was opened before")
        self._further[join.connection] = JoinState.JOINING
        self.sequence.open(join.connection)
        return Joined()

    def end_joining(self) -> None:
        """Destination: take no further connections from now on, in this epoch."""
        self._joining = False

    # --- epochs -------------------------------------------------------------------------------

    @property
    def resumable(self) -> bool:
        """The loss of a connection does not end the migration."""
        token = b"" if self.hello is None else self.hello.resume_token
        return bool(token) and self.state in RESUMABLE

    def resume(self) -> Resume:
        """Source: what to send first on a connection that is to go on with the migration.

        Each call offers another epoch: the destination may have begun one that we never heard of.

        Raises:
            LocalProtocolError: There is nothing to go on with.
        """
        if self.role is not Role.SOURCE or self.hello is None or not self.resumable:
            raise LocalProtocolError(f"nothing can be resumed in state {self.state.value}")
        self._offered_epoch = max(self._offered_epoch, self.epoch) + 1
        hello = self.hello
        return Resume(
            hello.migration_id, hello.resume_token, self._offered_epoch, self.control.heard
        )

    def turn_back(self) -> None:
        """Source: want END_OF_STATE back, if the next epoch shows that it was not received.

        Call while there is no link. ``take_resumed`` does it: the state is then what it was before
        END_OF_STATE. It stays what it is where the destination has it: then its guest may have its
        end by now, and only an ABORT is left to say.
        """
        self._wants_end_back = True

    @property
    def end_may_be_lost(self) -> bool:
        """Source: END_OF_STATE was said, and nothing heard yet that shows that it was received."""
        ended = self.state is LinkState.STATE_COMPLETE
        return ended and self.window.received_seq < self.window.sent_seq

    def _take_end_back(self) -> None:
        self._wants_end_back = False
        if self.end_may_be_lost:
            self.window.take_back()
            self.state = self._before_end

    def open_with(self, message: Resume | Resumed) -> list[Buffer]:
        """The frame that opens an epoch's first connection, and its account."""
        buffers = encode_frame(message.frame_type, 0, *encode_message(message))
        self.sent_bytes["control"] += sum(map(len, buffers))
        return buffers

    def take_resumed(self, frame: Frame) -> Resumed | Refused:
        """Source: take the answer to RESUME; RESUMED begins the new epoch.

        Raises:
            RemoteProtocolError: It is none, or says what cannot be. Nothing has changed.
        """
        message = decode_message(frame, self.context)
        if isinstance(message, Refused):
            return message
        if not isinstance(message, Resumed):
            expected = "RESUMED or REFUSED"
            raise UnexpectedMessageError(frame.where, expected, frame.frame_type.name)
        ack = Ack(message.received_seq, message.consumed_seq)
        self.control.confirm(frame.where, message.heard)
        self.window.on_ack(ack.received_seq, ack.consumed_seq, frame.where)
        if self._wants_end_back:
            self._take_end_back()
        self._begin(self._offered_epoch)
        self._caught_up = ack
        return message

    def admit_resume(self, resume: Resume) -> Resumed | Refused:
        """Destination: judge a connection that wants to go on with the migration.

        Returns:
            RESUMED: the old epoch is over, nothing of its connections may be given to ``receive``
            any more, and the answer must be sent first on the new one. Or a REFUSED that concerns
            nothing else.
        """
        hello = self.hello
        if (
            hello is None
            or not hello.resume_token
            or not hmac.compare_digest(hello.migration_id, resume.migration_id)
            or not hmac.compare_digest(hello.resume_token, resume.resume_token)
        ):
            return UNKNOWN
        if not self.resumable:
            return Refused("late", f"the migration is over here: {self.state.value}")
        if resume.epoch <= self.epoch:
            return Refused("old", f"epoch {self.epoch} of the link has begun")
        try:
            self.control.confirm("RESUME", resume.heard)
        except MessageError as error:
            return Refused("protocol", str(error))
        self._begin(resume.epoch)
        received = self.sequence.received_seq
        _, consumed = self.sequence.acknowledged
        self.sequence.acknowledge(received, consumed)
        return Resumed(received, consumed, self.control.heard)

    def greet_again(self) -> list[Buffer]:
        """Source: HELLO's frame once more, for a destination that never heard it.

        Raises:
            LocalProtocolError: It has answered.
        """
        if self.state is not LinkState.GREETING or self.control.heard:
            raise LocalProtocolError(f"HELLO was heard, the state is {self.state.value}")
        self._begin(0)
        (again,) = self.repeat()
        return again

    def repeat(self) -> list[list[Buffer]]:
        """The frames to write first in this epoch: those that the other end has not confirmed."""
        again = [list(buffers) for buffers in self.control.unconfirmed()]
        again += [list(frame.buffers) for frame in self.window.unreceived()]
        self.sent_bytes["resent"] += sum(len(part) for buffers in again for part in buffers)
        return again

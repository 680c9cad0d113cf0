"""What may be said when: the receiving half of one connection, without I/O.

A carrier asks `need`, gets just so many control bytes, and feeds them; every second feed yields an
event. The payload that an event announces is the carrier's business: it moves those bytes straight
to where they are to lie, then goes on feeding.

Life cycle: NEW --HELLO or WELCOME--> OPEN --GOODBYE--> CLOSING. An op that NEXT doesn't list is a
`ProtocolError`.
"""

from enum import Enum

from common.transport.decoding import Header, decode_body, decode_header
from common.transport.frames import HEADER_BYTES, Event, Op, ProtocolError


class Role(Enum):
    """Whose ears these are."""

    SERVER = "server"
    CLIENT = "client"


class State(Enum):
    NEW = "new"
    OPEN = "open"
    CLOSING = "closing"  # the server takes no more requests; those in flight are still answered


NEXT: dict[Role, dict[State, dict[Op, State]]] = {
    Role.SERVER: {
        State.NEW: {Op.HELLO: State.OPEN},
        State.OPEN: {
            Op.READ: State.OPEN,
            Op.WRITE: State.OPEN,
            Op.LOCATE: State.OPEN,
            Op.LOOKUP: State.OPEN,
            Op.CANCEL: State.OPEN,
        },
        State.CLOSING: {},  # a draining server answers requests as failed and stays OPEN
    },
    Role.CLIENT: {
        State.NEW: {Op.WELCOME: State.OPEN, Op.GOODBYE: State.CLOSING},
        State.OPEN: {Op.REPLY: State.OPEN, Op.EXTENTS: State.OPEN, Op.FOUND: State.OPEN, Op.GOODBYE: State.CLOSING},
        State.CLOSING: {Op.REPLY: State.CLOSING, Op.EXTENTS: State.CLOSING, Op.FOUND: State.CLOSING},
    },
}


class Listener:
    """Turns control bytes into events and holds the conversation to its table."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = State.NEW
        self._header: Header | None = None

    @property
    def need(self) -> int:
        """How many bytes the next `feed` takes; may be zero."""
        return HEADER_BYTES if self._header is None else self._header.body_bytes

    def feed(self, data: bytes) -> Event | None:
        """Takes just `need` bytes; returns an event when they complete a frame. Raises `ProtocolError`."""
        assert len(data) == self.need
        if self._header is None:
            header = decode_header(data)
            allowed = NEXT[self.role][self.state]
            if header.op not in allowed:
                names = ", ".join(op.name for op in allowed)
                raise ProtocolError(f"{header.op.name} to a {self.role.value} in state {self.state.value}: expected {names}")
            self._header = header
            return None
        header, self._header = self._header, None
        event = decode_body(header, data)
        self.state = NEXT[self.role][self.state][header.op]
        return event

    def __repr__(self) -> str:
        return f"Listener({self.role.value}, {self.state.value}, need={self.need})"

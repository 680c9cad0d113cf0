"""One part of a read: where its block lies, where its bytes go, and how they are verified."""

import threading

import msgspec

from common.disk.transfer import Transfer
from common.transport.interface import Part
from common.transport.memory import copy, crc32c
from services.kvstore.chunks import Chunks
from services.kvstore.record import pages
from services.kvstore.shelf import Shelf


class Target(msgspec.Struct):
    """A part to read. Made with what the lease says; `plan` decides what is read from disk, and where to."""

    index: int  # in the request
    part: Part
    shelf: Shelf
    slot: int
    sequence: int
    checksum: int
    into: memoryview | None  # the caller's memory; None: the bytes are lent from `buffer`
    chunks: Chunks | None = None  # of a range that is read without the rest of its block
    start: int = 0  # the payload's byte that is first in `buffer`
    buffer_bytes: int = 0  # 0: the block goes straight into the caller's memory
    buffer: memoryview | None = None  # ours
    copying: "threading.Lock | None" = None  # held while `into` is written to from `buffer`

    @property
    def whole(self) -> bool:
        return self.part.length == self.shelf.geometry.payload_bytes

    @property
    def view(self) -> memoryview:
        """Where the part's bytes are, when read."""
        return self.into if self.into is not None else self._piece

    @property
    def _piece(self) -> memoryview:
        assert self.buffer is not None
        at = self.part.offset - self.start
        return self.buffer[at : at + self.part.length]

    def plan(self, chunks: Chunks | None, *, straight: bool) -> None:
        """`chunks`: of the block, where known. A range of less than half of it takes the chunks around it.

        `straight`: a whole block goes straight into the caller's memory, where that is aligned. From the page cache it
        always does.
        """
        segment, _ = self.shelf.place(self.slot)
        self.buffer_bytes = self.shelf.geometry.padded_bytes
        if self.whole and self.into is not None and (straight or not segment.direct) and segment.takes(self.into):
            self.buffer_bytes = 0
            return
        if self.into is not None:
            self.copying = threading.Lock()
        if not self.whole and chunks is not None:
            start, end = chunks.cover(self.part.offset, self.part.length)
            if 2 * (end - start) <= chunks.payload_bytes:
                self.chunks, self.start, self.buffer_bytes = chunks, start, pages(end - start)

    def give_up(self) -> None:
        """Nothing is copied into the caller's memory any more."""
        if self.copying is not None:
            with self.copying:
                self.into = None

    def second_look(self) -> "Target":
        """The same block, read into memory of ours."""
        return msgspec.structs.replace(self, buffer_bytes=self.shelf.geometry.padded_bytes, copying=threading.Lock())

    def transfer(self) -> Transfer:
        """The read, which results in the checksum of the part's bytes."""
        segment, within = self.shelf.place(self.slot)
        if not self.buffer_bytes:
            return segment.payload_read(within, self.view, self.checksum)
        assert self.buffer is not None
        if self.chunks is not None:
            read = segment.chunks_read(within, self.buffer, self.start, self.chunks)
        else:
            read = segment.payload_read(within, self.buffer, self.checksum)

        if self.whole and self.copying is None:
            return read

        def cut() -> int:
            value, piece = read.finished(), self._piece
            if self.copying is not None:
                with self.copying:
                    if self.into is not None:
                        copy(self.into, piece)
            return value if self.whole else crc32c(piece)

        return msgspec.structs.replace(read, check=cut)

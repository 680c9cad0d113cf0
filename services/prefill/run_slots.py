"""The stage slots of one run: those that hold its prompt's blocks already, adopted, and its own for the rest.

Life: taken (or refused) -> left, once, when nobody reads or writes them for this run any more. What of its own is whole by then
is kept in the stage under its key, for the next turn of the same agent, or for whoever begins alike.
"""

from collections.abc import Collection, Sequence

from common.blocks import BlockKey
from services.worker.stage import Stage


class RunSlots:
    """Of a prompt of so many blocks.

    Args:
        keys: of its full blocks; none: nothing is looked for, and nothing kept.
        findable: leading blocks that needn't be computed.
        elsewhere: blocks that are not used here even if they are held: they come as the route says.

    Attributes:
        all: by block.
        held: blocks that were held. Others may read their slots too, and nobody writes to them.

    Raises:
        Overloaded: the stage has no room for the others now.
    """

    def __init__(
        self, stage: Stage, keys: Sequence[BlockKey], blocks: int, findable: int, elsewhere: Collection[int] = frozenset()
    ) -> None:
        self._stage = stage
        self._keys = keys
        self._trusted = True
        found = dict(enumerate(stage.adopt(keys[:findable])))
        stage.free([slot for block, slot in found.items() if block in elsewhere])
        found = {block: slot for block, slot in found.items() if block not in elsewhere}
        try:
            own = iter(stage.reserve(blocks - len(found)))
        except BaseException:
            stage.free(list(found.values()))
            raise
        self.held = frozenset(found)
        self.all = [found[block] if block in found else next(own) for block in range(blocks)]

    def distrust(self) -> None:
        """The engine failed on what is in them: nothing is kept, and what was is found no more."""
        self._trusted = False

    def leave(self, whole: int) -> None:
        """Gives them back. The leading `whole` blocks are there, all layers of them, and verified."""
        own = [block for block in range(min(whole, len(self._keys))) if block not in self.held]
        if self._trusted:
            self._stage.keep([self.all[block] for block in own], [self._keys[block] for block in own])
        else:
            self._stage.distrust([self.all[block] for block in self.held])
        self._stage.free(self.all)

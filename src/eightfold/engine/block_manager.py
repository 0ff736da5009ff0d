"""Who holds which block of the key/value cache, and which blocks hold what a new prompt needs.

A block is a page of the native cache, 128 positions of all layers. Every block is in one of three states:

    free       nobody holds it and nothing in it is worth keeping
    cached     nobody holds it, but it is full and found by its hash: the first to be taken when no block is free,
               the least recently used first
    held       by one or several sequences, which only read it when they are several: only full blocks are shared

A full block's hash covers the tokens of the block, how many of them count as a prompt's where that changes keys and
values, and the hash of the block before it, so all that its keys and values depend on. Before the first block stands
the request's salt: only requests with the same one find each other's blocks. The hash is BLAKE2b with 256 bit: by
accident two of n blocks agree with a probability below n^2 / 2^257, and on purpose nobody knows how to make them. So
equal hashes are taken for equal contents without comparing tokens.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

NO_PARENT = b""


def salted(salt: str) -> bytes:
    """Return what stands before the first block of requests with a salt."""
    import hashlib

    return hashlib.blake2b(salt.encode(), digest_size=32, person=b"cache salt").digest() if salt else NO_PARENT


def hash_block(parent: bytes, token_ids: Sequence[int], prompt_tokens: int) -> bytes:
    """Return the hash of a full block.

    Args:
        parent: hash of the block before it, or what `salted` says.
        token_ids: the block's tokens.
        prompt_tokens: how many of them count as a prompt's; a constant where that changes nothing.
    """
    import hashlib  # with OpenSSL, which a single answer need not wait for

    state = hashlib.blake2b(parent, digest_size=32)
    state.update(np.array([prompt_tokens, *token_ids], np.int32).tobytes())
    return state.digest()


class BlockManager:
    """Blocks, their holders and their contents.

    Attributes:
        total: how many blocks there are.
        begun: how many have ever been taken; they are the first ones.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.begun = 0
        self._free = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._holders = [0] * total
        self._hash_of: list[bytes | None] = [None] * total
        self._block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """How many blocks can be taken: free or cached."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """How many blocks are held."""
        return self.total - self.available

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of a chain of hashes, up to the first that is not there."""
        found = []
        for each in hashes:
            block = self._block_of.get(each)
            if block is None:
                break
            found.append(block)
        return found

    def unheld(self, blocks: Iterable[int]) -> int:
        """Return how many of some blocks are held by nobody: to hold them lowers `available` by so many."""
        holders = self._holders
        return sum(holders[block] == 0 for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to blocks that were found."""
        for block in blocks:
            if not self._holders[block]:
                del self._cached[block]
            self._holders[block] += 1

    def take(self) -> int:
        """Return a block for new content, held once; `available` says whether there is one."""
        if self._free:
            block = self._free.pop()
            self.begun = max(self.begun, block + 1)
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._holders[block] = 1
        return block

    def name(self, block: int, content: bytes) -> None:
        """Give a held, full block the hash by which others find it; a content that is there already keeps its block."""
        if self._hash_of[block] is None and content not in self._block_of:
            self._hash_of[block] = content
            self._block_of[content] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Take one holder from each of a sequence's blocks; of those kept as cached, its last are evicted first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._hash_of[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def _forget(self, block: int) -> None:
        content = self._hash_of[block]
        assert content is not None
        del self._block_of[content]
        self._hash_of[block] = None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Prove every count.

        Args:
            tables: the blocks of every sequence that holds some.

        Raises:
            AssertionError: a block is lost, in two states at once, or held by another number of sequences than counted.
        """
        tables = list(tables)
        for table in tables:
            assert len(set(table)) == len(table), f"a block twice in one sequence: {table}"
        holders = Counter(chain.from_iterable(tables))
        assert self._holders == [holders[block] for block in range(self.total)], "holders are miscounted"
        held = [block for block in range(self.total) if self._holders[block]]
        states = sorted([*self._free, *self._cached, *held])
        assert states == list(range(self.total)), "a block is lost or in two states"
        named = {block: content for block, content in enumerate(self._hash_of) if content is not None}
        assert {block: content for content, block in self._block_of.items()} == named, "names and hashes differ"
        assert all(block in named for block in self._cached), "a cached block without a hash"
        assert not any(block in named for block in self._free), "a free block with a hash"

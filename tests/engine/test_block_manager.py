"""Random operations against what is true of blocks at every moment, and the order in which they are lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from eightfold.engine.block_manager import NO_PARENT, BlockManager, hash_block

TOTAL = 7


def chain(*contents: int) -> list[bytes]:
    """Return the hashes of a sequence of blocks."""
    found = [NO_PARENT]
    for content in contents:
        found.append(hash_block(found[-1], [content] * 4, 0))
    return found[1:]


class Blocks(RuleBasedStateMachine):
    """Sequences that start with what is found, grow, name what is full, and end; contents as the blocks should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(TOTAL)
        self.tables: list[tuple[list[int], list[bytes]]] = []  # blocks and their hashes
        self.holds: dict[int, bytes] = {}  # what was last written to a block

    @rule(contents=st.lists(st.integers(0, 2), min_size=1, max_size=4))
    def start(self, contents):
        hashes = chain(*contents)
        found = self.manager.find(hashes)
        assert [self.holds[block] for block in found] == hashes[: len(found)]
        fresh = len(hashes) - len(found)
        before = self.manager.available
        unheld = self.manager.unheld(found)
        if fresh + unheld > before:
            return
        self.manager.hold(found)
        taken = [self.manager.take() for _ in range(fresh)]
        assert self.manager.available == before - fresh - unheld
        for block, content in zip(taken, hashes[len(found) :], strict=True):
            self.holds[block] = content
        self.tables.append((found + taken, hashes))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def name(self, data):
        blocks, hashes = data.draw(st.sampled_from(self.tables))
        for at in range(data.draw(st.integers(0, len(blocks)))):
            self.manager.name(blocks[at], hashes[at])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        blocks, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.manager.release(blocks)

    @invariant()
    def all_counts_hold(self):
        self.manager.check_integrity([blocks for blocks, _ in self.tables])
        held = {block for blocks, _ in self.tables for block in blocks}
        assert self.manager.used == len(held)
        assert self.manager.available == TOTAL - len(held)

    def teardown(self):
        for blocks, _ in self.tables:
            self.manager.release(blocks)
        self.manager.check_integrity([])
        assert self.manager.available == TOTAL


Blocks.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBlocks = Blocks.TestCase


def held(manager: BlockManager, *contents: int) -> list[int]:
    """Take and name blocks with contents."""
    blocks = [manager.take() for _ in contents]
    for block, content in zip(blocks, chain(*contents), strict=True):
        manager.name(block, content)
    return blocks


def test_what_was_used_last_is_kept_longest_and_a_beginning_longer_than_an_end():
    manager = BlockManager(5)
    old, new = held(manager, 1, 2), held(manager, 3, 4)
    manager.release(new)
    manager.release(old)
    manager.hold(new)  # used again
    manager.release(new)
    kept = []
    for _ in range(5):
        manager.take()
        kept.append((len(manager.find(chain(1, 2))), len(manager.find(chain(3, 4)))))
    assert kept == [(2, 2), (1, 2), (0, 2), (0, 1), (0, 0)]


def test_a_chain_is_found_up_to_its_first_gap():
    manager = BlockManager(4)
    blocks = held(manager, 1, 2, 3)
    assert manager.find(chain(1, 2, 9)) == blocks[:2]
    assert manager.find(chain(9, 2, 3)) == []
    manager.release(blocks)
    assert manager.find(chain(1, 2, 3)) == blocks


def test_the_same_content_twice_keeps_the_first_block():
    manager = BlockManager(2)
    first, second = held(manager, 1), held(manager, 1)
    assert manager.find(chain(1)) == first
    manager.release(second)
    manager.check_integrity([first])
    assert manager.take() == second[0]


def test_shared_blocks_are_held_until_the_last_holder_goes():
    manager = BlockManager(2)
    blocks = held(manager, 1)
    manager.hold(blocks)
    manager.release(blocks)
    manager.check_integrity([blocks])
    assert (manager.used, manager.available) == (1, 1)
    manager.release(blocks)
    assert (manager.used, manager.available) == (0, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m, b: m._holders.__setitem__(b[0], 2), "holders are miscounted"),
        (lambda m, b: m._free.append(b[0]), "a block is lost or in two states"),
        (lambda m, b: m._free.pop(), "a block is lost or in two states"),
        (lambda m, b: m._hash_of.__setitem__(b[0], b"other"), "names and hashes differ"),
        (lambda m, b: m._block_of.clear(), "names and hashes differ"),
        (lambda m, b: b.append(b[0]), "a block twice in one sequence"),
    ],
)
def test_the_check_finds_damage(damage, message):
    manager = BlockManager(4)
    blocks = held(manager, 1, 2)
    manager.check_integrity([blocks])
    damage(manager, blocks)
    with pytest.raises(AssertionError, match=message):
        manager.check_integrity([blocks])


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=4, max_size=4), st.integers(0, 3), st.integers(0, 4))
def test_a_hash_covers_parent_tokens_and_origin(tokens, at, prompt_tokens):
    parent = hash_block(NO_PARENT, [1, 2, 3, 4], 0)
    other = [token + (i == at) * (1 if token < 2**31 - 1 else -1) for i, token in enumerate(tokens)]
    found = {
        hash_block(parent, tokens, prompt_tokens),
        hash_block(NO_PARENT, tokens, prompt_tokens),
        hash_block(parent, other, prompt_tokens),
        hash_block(parent, tokens, prompt_tokens + 1),
    }
    assert len(found) == 4
    assert hash_block(parent, list(tokens), prompt_tokens) in found

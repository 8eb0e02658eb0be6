"""Which blocks of the key-value cache are lent to whom, and which finished ones are kept for whoever needs them again.

A block holds the keys and values of `BLOCK_TOKENS` consecutive tokens. Its content is named by a key, a hash over the
owner (the weights that computed it) and all tokens up to its end, so equal keys mean equal contents and two adapters
never share a block. A block that nobody uses keeps its content until room is needed; the longest unused goes first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

BLOCK_TOKENS = 16
BASE_OWNER = b"base"
"""Owner of what the base model computes without an adapter."""
_KEY_BYTES = 16


def blocks_for(num_tokens: int) -> int:
    """How many blocks hold that many tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


def block_keys(owner: bytes, tokens: np.ndarray, known: Sequence[bytes] = ()) -> list[bytes]:
    """Keys of all full blocks of `tokens`; `known` are those of the first ones, if computed before."""
    keys = list(known)
    parent = keys[-1] if keys else owner
    data = np.ascontiguousarray(tokens, dtype="<i8").tobytes()
    size = 8 * BLOCK_TOKENS
    for end in range(size * (len(keys) + 1), len(data) + 1, size):
        parent = hashlib.blake2b(data[end - size : end], key=parent, digest_size=_KEY_BYTES).digest()
        keys.append(parent)
    return keys


def end_key(owner: bytes, tokens: np.ndarray, keys: Sequence[bytes]) -> bytes:
    """Names where `tokens` end; `keys` are those of their full blocks."""
    num_before = (len(tokens) - 1) // BLOCK_TOKENS
    tail = np.ascontiguousarray(tokens[num_before * BLOCK_TOKENS :], dtype="<i8").tobytes()
    parent = keys[num_before - 1] if num_before else owner
    return hashlib.blake2b(tail, key=parent, digest_size=_KEY_BYTES, person=b"end").digest()


@dataclass(frozen=True, slots=True, eq=False)
class PromptEnd:
    """What is kept of a prompt's last token, so that the same prompt need not be computed at all."""

    block: int
    """Holds the last token, and may hold others after it."""
    hidden_H: Tensor
    """What the unembedding takes."""


class BlockPool:
    """Counts users per block. Block 0 is never lent: tables are padded with it, and it stays zero."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._users = [0] * num_blocks
        self._writers: list[bytes] = [BASE_OWNER] * num_blocks
        self._tainted: set[int] = set()
        """Blocks whose cells may not be finite, whoever wrote them."""
        self._keys: list[bytes | None] = [None] * num_blocks
        self._holders: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._of_owner: dict[bytes, set[int]] = {}
        self._to_zero: list[int] = []
        self._ends: dict[bytes, PromptEnd] = {}
        self._ends_in: dict[int, list[bytes]] = {}
        """Keys of the ends that lie in a block."""

    @property
    def num_free(self) -> int:
        """Blocks that can be lent, kept ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_kept(self) -> int:
        """Blocks without users whose content is kept."""
        return len(self._idle)

    def num_users(self, block: int) -> int:
        return self._users[block]

    def take(self, count: int, owner: bytes) -> list[int]:
        """Lend `count` blocks with one user each. The caller made sure that there are as many."""
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._users[block] = 1
            if block in self._tainted or self._writers[block] not in (owner, BASE_OWNER):
                self._to_zero.append(block)
                self._tainted.discard(block)
            self._writers[block] = owner
            blocks.append(block)
        return blocks

    def stale(self) -> list[int]:
        """Blocks to zero before anyone reads them: lent since the last call, last written under another owner.

        Cells that a sequence has not written yet are masked, but a mask does not hide what is not finite.
        """
        blocks, self._to_zero = self._to_zero, []
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more user for each."""
        for block in blocks:
            if self._users[block] == 0:
                self._idle.pop(block)
            self._users[block] += 1

    def release(self, blocks: Sequence[int], *, tainted: bool = False) -> None:
        """One user less for each, given in order of the sequence. `tainted`: the contents may not be finite."""
        for block in reversed(blocks):  # the end of a sequence is worth nothing without its beginning
            if tainted:
                self._unregister(block)
                self._tainted.add(block)
            self._users[block] -= 1
            if self._users[block] == 0:
                if self._keys[block] is None and block not in self._ends_in:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    # ---- contents ----

    def open(self, owner: bytes) -> None:
        """From now on contents of this owner are kept."""
        self._of_owner.setdefault(owner, set())

    def is_open(self, owner: bytes) -> bool:
        return owner in self._of_owner

    def forget(self, owner: bytes) -> None:
        """Keep nothing of this owner any more, nor what running sequences still compute."""
        for block in self._of_owner.pop(owner, set()):
            self._unregister(block)
            if self._users[block] == 0:
                del self._idle[block]
                self._free.append(block)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest kept beginning."""
        blocks = []
        for key in keys:
            block = self._holders.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def register(self, block: int, key: bytes, owner: bytes) -> None:
        """A block in use is full and has this content. Ignored if another block has it already."""
        of_owner = self._of_owner.get(owner)
        if of_owner is None or key in self._holders or self._keys[block] is not None:
            return
        self._holders[key] = block
        self._keys[block] = key
        of_owner.add(block)

    def find_end(self, key: bytes) -> PromptEnd | None:
        return self._ends.get(key)

    def register_end(self, block: int, key: bytes, owner: bytes, hidden_H: Tensor) -> None:
        """A prompt of this key ends in this block, which is in use. Ignored if it is known already."""
        of_owner = self._of_owner.get(owner)
        if of_owner is None or key in self._ends:
            return
        self._ends[key] = PromptEnd(block, hidden_H)
        self._ends_in.setdefault(block, []).append(key)
        of_owner.add(block)

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self._unregister(block)
        return block

    def _unregister(self, block: int) -> None:
        for end in self._ends_in.pop(block, ()):
            del self._ends[end]
        key = self._keys[block]
        if key is not None:
            self._keys[block] = None
            del self._holders[key]
        of_owner = self._of_owner.get(self._writers[block])
        if of_owner is not None:
            of_owner.discard(block)

"""Reference-counted KV blocks with prefix reuse.

A full block is known by a chained hash of (hash of the block before it, its tokens); the first one's parent
is the hash of the request's `cache_salt`, so equal hashes mean equal salt and equal tokens from the start.
The digest is cryptographic: with a weak one, a crafted prompt could read the KV of another. The scheme is
vLLM's automatic prefix caching; the method names follow nano-vllm.

A block is in one of three states:
- used: some request's table holds it (`refs > 0`), perhaps several tables when its content is shared;
- cached: no request holds it, but its content can still be found by hash; the least recently freed goes
  first;
- blank: no request holds it and nothing of worth is in it. Blank blocks are handed out before cached ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b

from .requests import Request

_DIGEST_BYTES = 32


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, by id from 0. Knows tokens and ids only; the KV itself is
    elsewhere.

    `queried_tokens` counts prompt tokens of first admissions, `hit_tokens` those that were found cached (both
    stay 0 without the prefix cache).
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._refs = [0] * num_blocks
        self._taken = bytearray(num_blocks)  # 0 where blank; bytes, since these are searched fast
        self._num_blank = num_blocks
        self._cursor = 0  # where the next search for a run starts
        self._freed: dict[int, None] = {}  # cached blocks, least recently freed first
        self._block_of: dict[bytes, int] = {}  # hash of published content -> block
        self._hash_of: list[bytes | None] = [None] * num_blocks  # the inverse
        self._pending: dict[bytes, Request] = {}  # hash -> the request about to compute it

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out: blank or cached."""
        return self._num_blank + len(self._freed)

    @property
    def used(self) -> int:
        """Blocks held by requests; a shared block counts once."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    # Taking blocks

    def match_prefix(self, request: Request) -> list[int]:
        """The longest run of published blocks that the request's known tokens start with.

        Never all of its tokens: at least one is left to compute, since its logits are wanted. Changes no
        state.
        """
        if not self.prefix_cache:
            return []
        limit = self._reusable(request)
        self._extend_hashes(request, limit)
        matched = []
        for digest in request.block_hashes[:limit]:
            block = self._block_of.get(digest)
            if block is None:
                break
            matched.append(block)
        return matched

    def pending_after(self, request: Request, num_matched: int) -> bytes | None:
        """What is worth waiting for: the hash of the last block that another request is about to compute and
        this one could then reuse, in the run that starts right after its `num_matched` cached blocks. None:
        nothing."""
        found = None
        for digest in request.block_hashes[num_matched : self._reusable(request)]:
            if digest not in self._pending:
                break
            found = digest
        return found

    def is_pending(self, digest: bytes | None) -> bool:
        """Is some running request still about to compute the block with this hash?"""
        return digest in self._pending

    def blocks_needed(self, request: Request, matched: list[int]) -> int:
        """Free blocks that `allocate` would use up, counting matched blocks that no other request holds."""
        shared = sum(1 for block in matched if self._refs[block])
        return self.blocks_for(request.num_tokens) - shared

    def can_allocate(self, n: int) -> bool:
        """Are `n` blocks free?"""
        return n <= self.num_free

    def allocate(self, request: Request, matched: list[int]) -> None:
        """Give the request blocks for all its known tokens, the first of them the `matched` ones
        (`match_prefix`).

        Sets `block_table` and `computed`. The caller has checked `can_allocate(blocks_needed(...))`.
        """
        assert not request.block_table and self.can_allocate(self.blocks_needed(request, matched))
        for block in matched:  # before the rest is taken, which might evict them
            if not self._refs[block]:
                del self._freed[block]
            self._refs[block] += 1
        cached = len(matched) * self.block_size
        n = self.blocks_for(request.num_tokens) - len(matched)
        room = self.blocks_for(request.max_total) - len(matched)
        request.block_table = matched + self._take(n, room, matched[-1] if matched else None)
        request.computed = cached
        request.num_published = len(matched)
        if self.prefix_cache:
            if not request.started:
                self.queried_tokens += request.num_tokens
                self.hit_tokens += cached
            num_full = request.num_tokens // self.block_size
            self._extend_hashes(request, num_full)
            for digest in request.block_hashes[len(matched) : num_full]:
                self._pending.setdefault(digest, request)

    def may_append(self, request: Request) -> bool:
        """Give the next token to compute a place, with a new block if need be. False: none is free."""
        table = request.block_table
        if request.computed < len(table) * self.block_size:
            return True
        if not self.can_allocate(1):
            return False
        table += self._take(1, self.blocks_for(request.max_total) - len(table), table[-1])
        return True

    def _take(self, n: int, room: int, last: int | None) -> list[int]:
        """`n` free blocks: blank ones before cached ones, and consecutive where there is a run of blanks.

        Attention reads consecutive blocks as one view, so a table should be few runs. The first choice is to
        go on right after `last`; the second is a run with `room` blanks, the space that the request may still
        grow into.
        """
        start = -1
        if 0 < n <= self._num_blank:
            if last is not None and self._taken.startswith(bytes(n), last + 1):
                start = last + 1
            else:
                start = self._find_run(n, min(room, self._num_blank))
        if start >= 0:
            blocks = list(range(start, start + n))
            self._taken[start : start + n] = b"\1" * n
            self._num_blank -= n
        else:
            blocks = sorted(self._take_any() for _ in range(n))
        for block in blocks:
            assert self._refs[block] == 0
            self._refs[block] = 1
        return blocks

    def _find_run(self, n: int, room: int) -> int:
        """Start of a run of at least `n` blanks, of `room` if possible, or -1.

        The search goes on from where the last one ended (next fit), past the space that the last request may
        grow into; that space is a preference, not a reservation.
        """
        while True:
            start = self._taken.find(bytes(room), self._cursor)
            if start < 0:
                start = self._taken.find(bytes(room))
            if start >= 0:
                self._cursor = start + room
                return start
            if room == n:
                return -1
            room = max(room // 2, n)

    def _take_any(self) -> int:
        """A blank block, or else the least recently freed one, whose content is forgotten."""
        if self._num_blank:
            block = self._taken.find(0)
            self._taken[block] = 1
            self._num_blank -= 1
            return block
        block = next(iter(self._freed))
        del self._freed[block]
        self._forget(block)
        return block

    # Content

    def publish(self, request: Request) -> None:
        """Let others find the request's full blocks whose KV is computed."""
        num_full = request.computed // self.block_size
        if not self.prefix_cache or num_full <= request.num_published:
            return
        self._extend_hashes(request, num_full)
        for i in range(request.num_published, num_full):
            digest, block = request.block_hashes[i], request.block_table[i]
            if self._pending.get(digest) is request:
                del self._pending[digest]
            if digest not in self._block_of:  # else a second copy, which stays private
                self._block_of[digest] = block
                self._hash_of[block] = digest
        request.num_published = num_full

    def free(self, request: Request) -> None:
        """Give up the request's blocks. Published content stays until the block is needed, tails go first."""
        for block in reversed(request.block_table):
            self._refs[block] -= 1
            assert self._refs[block] >= 0
            if not self._refs[block]:
                if self._hash_of[block] is not None:
                    self._freed[block] = None
                else:
                    self._taken[block] = 0
                    self._num_blank += 1
        for digest in request.block_hashes[request.num_published :]:
            if self._pending.get(digest) is request:
                del self._pending[digest]
        request.block_table = []
        request.computed = 0
        request.num_published = 0

    def reset_prefix_cache(self) -> None:
        """Forget all content. Raises RuntimeError while requests hold blocks."""
        if self.used:
            raise RuntimeError(
                f"reset_prefix_cache: {self.used} KV blocks are in use; finish or abort their requests first"
            )
        for block in self._freed:
            self._forget(block)
            self._taken[block] = 0
        self._freed.clear()
        self._num_blank = self.num_blocks
        self._cursor = 0

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        assert digest is not None
        del self._block_of[digest]
        self._hash_of[block] = None

    def _reusable(self, request: Request) -> int:
        """How many of the request's blocks could come from the cache, with one token left to compute."""
        return (request.num_tokens - 1) // self.block_size

    def _extend_hashes(self, request: Request, num_full: int) -> None:
        """Hash the request's blocks up to `num_full` that have not been hashed yet."""
        hashes, size = request.block_hashes, self.block_size
        if len(hashes) >= num_full:
            return
        if hashes:
            digest = hashes[-1]
        else:
            salt = request.cache_salt.encode("utf-8", "surrogatepass")
            digest = blake2b(salt, digest_size=_DIGEST_BYTES).digest()
        ids = array("i", request.tokens[len(hashes) * size : num_full * size])
        data, step = ids.tobytes(), size * ids.itemsize
        for at in range(0, len(data), step):
            digest = blake2b(digest + data[at : at + step], digest_size=_DIGEST_BYTES).digest()
            hashes.append(digest)

    def check_integrity(self, requests: Iterable[Request] = ()) -> None:
        """Raise AssertionError unless the books agree, given all the requests that hold blocks. Slow: for
        tests and idle times."""
        requests = list(requests)
        refs = [0] * self.num_blocks
        for request in requests:
            table = request.block_table
            assert len(set(table)) == len(table), f"{request.id}: a block twice in {table}"
            assert request.computed <= len(table) * self.block_size, f"{request!r} lacks blocks"
            for i, block in enumerate(table):
                refs[block] += 1
                if (digest := self._hash_of[block]) is not None:
                    assert i < request.num_published, f"block {block} is published, but not computed"
                    assert digest == request.block_hashes[i], f"{request!r} holds other content in {block}"
        assert refs == self._refs, f"reference counts {self._refs}, but tables hold {refs}"
        for block in range(self.num_blocks):
            blank, cached = not self._taken[block], block in self._freed
            assert blank + cached + (refs[block] > 0) == 1, f"block {block} is not in exactly one state"
            assert not (blank and self._hash_of[block] is not None), f"blank block {block} has content"
            assert not (cached and self._hash_of[block] is None), f"cached block {block} has no content"
            assert refs[block] <= 1 or self._hash_of[block] is not None, f"block {block} is shared too early"
        assert self._num_blank == self._taken.count(0)
        known_blocks = {digest: block for block, digest in enumerate(self._hash_of) if digest is not None}
        assert known_blocks == self._block_of
        for digest, owner in self._pending.items():
            assert any(owner is r for r in requests), f"{owner.id} holds no block, but others wait for it"
            assert digest in owner.block_hashes[owner.num_published :]

"""The chunk area of a tick's programs: how many more rows and tokens a prompt may still add to it."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable

from mnemosyne_jax.config import ServeConfig
from mnemosyne_jax.serve.request import Sequence


class ChunkRoom:
    """Chunk rows and tokens that a tick has so far, by group; None: shared by all.

    `fits(shared_tokens, private_tokens)` says whether a compiled program holds these chunk areas.
    """

    def __init__(self, serve: ServeConfig, groups: int, fits: Callable[[int, int], bool]):
        self._serve, self._buckets = serve, serve.buckets
        self._nothing: dict[int | None, int] = dict.fromkeys((None, *range(groups)), 0)

        def largest_that(fits_beside: Callable[[int], bool]) -> int:
            return next((b for b in reversed(serve.buckets) if fits_beside(b)), 0)

        # Asked for at every prompt of every tick, of a few thousand numbers.
        remember = functools.lru_cache(maxsize=4096)
        self._largest_shared = remember(lambda private: largest_that(lambda bucket: fits(bucket, private)))
        self._largest_private = remember(lambda shared: largest_that(lambda bucket: fits(shared, bucket)))
        self.clear()

    def clear(self) -> None:
        """Begins another tick."""
        self._rows, self._tokens = self._nothing.copy(), self._nothing.copy()
        self._most_private = 0  # tokens of the fullest group
        self._left: dict[int | None, int] = {}  # as asked for, until more is taken

    def take(self, sequence: Sequence, tokens: int) -> None:
        group = sequence.group
        self._rows[group] += 1
        self._tokens[group] += tokens
        self._left.clear()
        if group is not None:
            self._most_private = max(self._most_private, self._tokens[group])

    def yielding(self, sequence: Sequence, tokens: int, share: float, step: int) -> int:
        """Of a chunk what lies in its share of the smallest bucket that holds it, in multiples of `step`.

        The rest of the bucket costs nothing; a chunk that filled it would leave others the time, and no place.
        """
        if share == 1 or not tokens:
            return tokens
        taken = self._tokens[sequence.group]
        bucket = self._buckets[bisect_left(self._buckets, taken + tokens)]
        return min(tokens, max((int(share * bucket) - taken) // step * step, step))

    def tokens_for(self, sequence: Sequence) -> int:
        """Tokens that a sequence may still add: in the budget of every group it loads, in a program that exists."""
        group = sequence.group
        if group not in self._left:
            self._left[group] = self._tokens_left(group)
        return self._left[group]

    def _tokens_left(self, group: int | None) -> int:
        serve, taken = self._serve, self._tokens
        if group is None:
            if self._rows[None] == serve.shared_chunks:
                return 0
            private = self._most_private
            left = min(serve.chunk_tokens - private, self._largest_shared(private)) - taken[None]
        else:
            if self._rows[group] == serve.private_chunks:
                return 0
            shared = taken[None]
            left = min(serve.chunk_tokens - shared, self._largest_private(shared)) - taken[group]
        return left if left > 0 else 0

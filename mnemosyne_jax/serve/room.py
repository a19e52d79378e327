"""The chunk area of a tick's programs: how many more rows and tokens a prompt may still add to it."""

from __future__ import annotations

from collections.abc import Callable

from mnemosyne_jax.config import ServeConfig
from mnemosyne_jax.serve.request import Sequence


class ChunkRoom:
    """Chunk rows and tokens that a tick has so far, by group; None: shared by all.

    `fits(shared_tokens, private_tokens)` says whether a compiled program holds these chunk areas.
    """

    def __init__(self, serve: ServeConfig, groups: int, fits: Callable[[int, int], bool]):
        self._serve, self._groups, self._fits = serve, range(groups), fits
        self._buckets = serve.buckets
        self.clear()

    def clear(self) -> None:
        """Begins another tick."""
        self._rows: dict[int | None, int] = dict.fromkeys((None, *self._groups), 0)
        self._tokens = self._rows.copy()
        self._left: dict[int | None, int] = {}  # `tokens_for` a sequence of each group, as far as it is known

    def take(self, sequence: Sequence, tokens: int) -> None:
        self._rows[sequence.group] += 1
        self._tokens[sequence.group] += tokens
        if sequence.group is None:
            self._left.clear()
        else:  # other groups have as much room as before
            self._left.pop(sequence.group, None)
            self._left.pop(None, None)

    def yielding(self, sequence: Sequence, tokens: int, share: float, step: int) -> int:
        """Of a chunk what lies in its share of the smallest bucket that holds it, in multiples of `step`.

        The rest of the bucket costs nothing; a chunk that filled it would leave others the time, and no place.
        """
        if share == 1:
            return tokens
        taken = self._tokens[sequence.group]
        bucket = next((b for b in self._buckets if b >= taken + tokens), 0)
        return min(tokens, max((int(share * bucket) - taken) // step * step, step))

    def tokens_for(self, sequence: Sequence) -> int:
        """Tokens that a sequence may still add: in the budget of every group it loads, in a program that exists."""
        group = sequence.group
        if group not in self._left:
            self._left[group] = self._tokens_left(group)
        return self._left[group]

    def _tokens_left(self, group: int | None) -> int:
        serve, taken = self._serve, self._tokens
        if self._rows[group] == (serve.shared_chunks if group is None else serve.private_chunks):
            return 0
        shared, largest_first = taken[None], reversed(self._buckets)
        if group is None:
            private = max(taken[g] for g in self._groups)
            largest = next((b for b in largest_first if self._fits(b, private)), 0)
            return max(0, min(serve.chunk_tokens - private, largest) - shared)
        largest = next((b for b in largest_first if self._fits(shared, b)), 0)
        return max(0, min(serve.chunk_tokens - shared, largest) - taken[group])

"""How many tokens of a prompt go into the next tick."""

from __future__ import annotations

from collections.abc import Callable

from mnemosyne_jax.serve.request import Sequence

ChooseChunk = Callable[[Sequence, int], int]
"""(sequence, tokens that the tick can still take) -> tokens of its next chunk, 0 for none."""

STEP = 32  # chunks are multiples of it, but for the end of a prompt


def largest_chunk(sequence: Sequence, room_tokens: int) -> int:
    """All that is left of the prompt, as far as the tick has room."""
    return min(len(sequence.request.prompt) - sequence.prompt_scheduled, room_tokens)


def largest_fitting(left: int, most: int, fits: Callable[[int], bool], step: int = STEP) -> int:
    """The largest chunk that `fits`: all that is `left` of a prompt, or a multiple of `step`; at most `most`; 0: none.

    `fits` must be monotone: what is smaller than a chunk that fits, fits.
    """
    most = min(left, most)
    if most > 0 and most == left and fits(left):
        return left
    low, high = 0, most // step + 1  # in steps: low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step

"""How many tokens of a prompt go into the next tick."""

from __future__ import annotations

from collections.abc import Callable

from mnemosyne_jax.serve.request import Sequence

ChooseChunk = Callable[[Sequence, int], int]
"""(sequence, tokens that the tick can still take) -> tokens of its next chunk, 0 for none."""


def largest_chunk(sequence: Sequence, room_tokens: int) -> int:
    """All that is left of the prompt, as far as the tick has room."""
    return min(len(sequence.request.prompt) - sequence.prompt_scheduled, room_tokens)

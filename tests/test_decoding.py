"""Decode rows: one for each sequence in every turn of the pipe, in the order in which they came, until the last."""

import numpy as np

from mnemosyne_jax.serve.decoding import Decoding
from mnemosyne_jax.serve.request import Request, Sequence, Timeline

DEPTH, PROMPT = 3, np.zeros(50, np.int32)


def prompt_ended_at(tick, new_tokens, slot):
    """A sequence whose last chunk is in the batch of `tick`: its first token comes of it."""
    request = Request(slot, PROMPT[: 10 + slot], new_tokens, stop_ids=())
    return Sequence(request, Timeline(0.0), slot=slot, prompt_scheduled=10 + slot, tokens_scheduled=1, last_tick=tick)


def test_rows_come_once_a_turn_until_as_many_tokens_are_scheduled_as_asked_for():
    decoding, made = Decoding(DEPTH), [(4, 3), (3, 5), (4, 1), (4, 4)]
    sequences = [prompt_ended_at(tick, new_tokens, slot) for slot, (tick, new_tokens) in enumerate(made)]
    for sequence in sequences:
        decoding.append(sequence)
    assert len(decoding) == len(sequences) and set(decoding) == set(sequences)
    found = {}
    for tick in range(5, 20):
        for row in decoding.rows(tick):
            found.setdefault(row.slot, []).append((tick, row.position))
            assert row.request is sequences[row.slot].request and sequences[row.slot].last_tick == tick
        if tick == 11:
            decoding.remove(sequences[1])
    expected = {  # the first new token is that of the prompt's last chunk, the second stands right behind the prompt
        0: [(7, 10), (10, 11)],
        1: [(6, 11), (9, 12)],
        3: [(7, 13), (10, 14), (13, 15)],
    }
    assert found == expected
    assert [s.tokens_scheduled for s in sequences] == [3, 3, 1, 4] and len(decoding) == 3


def test_rows_are_in_the_order_in_which_the_sequences_came():
    decoding, sequences = Decoding(DEPTH), [prompt_ended_at(0, 9, slot) for slot in (5, 2, 7, 1)]
    for sequence in sequences:
        decoding.append(sequence)
    assert [row.slot for row in decoding.rows(DEPTH)] == [5, 2, 7, 1]
    decoding.remove(sequences[1])
    assert [row.slot for row in decoding.rows(2 * DEPTH)] == [5, 7, 1]

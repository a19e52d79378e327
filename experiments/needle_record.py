"""The record of `needle`: which keys were found, how long that took, and the picture of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from experiments import results
from experiments.bench_engine_record import TBT, TTFT, Bench
from mnemosyne_jax.config import MeshSpec, ModelConfig
from mnemosyne_jax.serve import request

CONVENTION = (
    "A key is found if its values and the stop behind them have the largest logits where the prompt's tail asks for "
    "them; of the last key the tail holds no value, and generation must give them all. A margin is the least "
    "difference of the largest and the second logit there. TTFT is from submission to the first token read by the "
    "host, TBT the gaps between tokens as read. An attention rate counts 4 * query heads * head dim for each visible "
    "(query, key) pair of a layer; along the prefill it is that since the context before. Host time is what a tick "
    "with a chunk takes the host without waiting for tokens. Only the time of the run includes start-up and "
    "compilation."
)
FLOAT32_EXACT = 2**24  # float32 holds every integer up to here
FOUND, TIME_TO = "found", "time to context"
MOST_POINTS = 100


class Point(NamedTuple):
    """So many tokens of the prompt were done, as the host knew so many seconds after its arrival."""

    seconds: float
    tokens: int


@dataclass(frozen=True)
class Key:
    """A planted key, and what must come out for it: by logits at places `asked` of the prompt, and by generation.

    `first` and `last` are the positions of the key and of the stop behind its values, as the rotation counts.
    """

    depth: float
    first: int
    last: int
    asked: list[int]
    answers: list[int]
    generated: list[int]

    @property
    def past_float32(self) -> bool:
        return self.last > FLOAT32_EXACT


@dataclass(frozen=True, eq=False)
class Course:
    """How a request went: its Sequence, points of its prefill, host seconds of each tick with a chunk."""

    sequence: request.Sequence
    reached: list[Point]
    host_s: list[float]

    @property
    def answered(self) -> bool:
        return self.sequence.reason in ("stop", "length")


def keys_of(
    prompt: np.ndarray,
    asked: np.ndarray,
    answers: np.ndarray,
    generated: list[int],
    depths: Sequence[float],
    first_position: int,
) -> list[Key]:
    """The keys of `needle.prompt`, one for each depth; `asked` and `answers` are those of `needle.tail_checks`."""
    keys, size = [], len(generated)
    for n, depth in enumerate(depths):
        part, is_last = slice(n * size, (n + 1) * size), n + 1 == len(depths)
        first = first_position + int(np.argmax(prompt == prompt[asked[part][0]]))
        wanted = asked[part].tolist(), answers[part].tolist(), generated if is_last else []
        keys.append(Key(depth, first, first + size, *wanted))
    return keys


def attention_flops(model: ModelConfig, begin: int, end: int) -> float:
    """Operations of prompt tokens [begin, end) attending to all that they see, by CONVENTION."""
    pairs = (end * (end + 1) - begin * (begin + 1)) // 2
    return 4.0 * model.layers * model.heads * model.head_dim * pairs


def progress(model: ModelConfig, total: int, before: Point, now: Point) -> str:
    """How far a prefill is, at which rates since `before`, and how long it still takes if attention keeps its rate."""
    took_s, tokens = now.seconds - before.seconds, now.tokens - before.tokens
    flops_per_s = attention_flops(model, before.tokens, now.tokens) / took_s
    rest_s = attention_flops(model, now.tokens, total) / flops_per_s
    return (
        f"{now.tokens:,} of {total:,} tokens in {now.seconds:.0f} s: {tokens / took_s:,.0f} tokens/s, "
        f"attention {flops_per_s / 1e12:.4g} TFLOP/s, {rest_s:.0f} s to go"
    )


# Rows.


def key_rows(bench: Bench, course: Course, keys: Sequence[Key], fails: bool, **where: Any) -> None:
    """Adds and prints whether each key was found, and what was. If `fails`, those past FLOAT32_EXACT must not be."""
    sequence = course.sequence
    for key in keys:
        logits_XV = np.stack([sequence.logits[place] for place in key.asked])
        second_X, best_X = np.partition(logits_XV, -2, axis=1)[:, -2:].T
        out = {"argmax at the tail": (logits_XV.argmax(axis=1).tolist(), key.answers)}
        if key.generated:
            out["generated"] = sequence.tokens, key.generated
        found = all(tokens == expected for tokens, expected in out.values())
        here = where | dict(depth=key.depth, position=key.first)
        margin, must = float((best_X - second_X).min()), "== 0" if fails and key.past_float32 else "== 1"
        bench.add(FOUND, found, "bool", **here, margin=margin, must=must)
        for name, (tokens, expected) in out.items():
            more: dict[str, Any] = dict(mesh=str(bench.mesh), expected=expected)
            bench.found.rows.append(results.row(name, tokens, "token ids", **here, **more))
        shown = "; ".join(f"{name} {tokens}, expected {expected}" for name, (tokens, expected) in out.items())
        verdict = "found" if found else "NOT FOUND"
        print(f"{verdict}: depth {key.depth}, position {key.first:,}, margin {margin:.3g}; {shown}", flush=True)


def time_rows(bench: Bench, course: Course, model: ModelConfig, **where: Any) -> None:
    """Adds and prints times and rates of a request that was answered."""
    timeline, tokens, chunks = course.sequence.timeline, len(course.sequence.request.prompt), len(course.host_s)
    ttft_s, host_us = timeline.ttft_s, 1e6 * float(np.median(course.host_s))
    rate = attention_flops(model, 0, tokens) / ttft_s / bench.mesh.devices / 1e12
    bench.add(TTFT, ttft_s, "s", **where, chunks=chunks)
    bench.add("prefill", tokens / ttft_s, "tokens/s", **where)
    bench.add("attention rate of a device", rate, "TFLOP/s", **where)
    bench.add("host time p50", host_us, "us", **where, tick="chunk")
    shown = f"TTFT {ttft_s:.4g} s in {chunks} chunks: {tokens / ttft_s:,.0f} tokens/s, attention {rate:.4g} TFLOP/s"
    if len(timeline.tbt_s):  # a wrong answer may be a single token
        tbt_ms = 1e3 * float(np.median(timeline.tbt_s))
        bench.add(TBT, tbt_ms, "ms", **where, tokens=len(timeline.tbt_s))
        shown += f"; TBT {tbt_ms:.4g} ms"
    print(f"{shown}; host {host_us:,.0f} us a chunk", flush=True)


def course_rows(bench: Bench, course: Course, model: ModelConfig, **where: Any) -> None:
    """Adds the times to some of the contexts that the prefill went through, MOST_POINTS of them."""
    kept = np.unique(np.linspace(0, len(course.reached) - 1, MOST_POINTS + 1).round().astype(int))
    for before, now in pairwise(course.reached[i] for i in kept):
        flops_per_s = attention_flops(model, before.tokens, now.tokens) / (now.seconds - before.seconds)
        here = where | dict(context=now.tokens, attention_tflops=flops_per_s / bench.mesh.devices / 1e12)
        bench.add(TIME_TO, now.seconds, "s", **here)


def figure(record: Mapping[str, Any]) -> Any:
    """Tokens against time and the attention rate of a device against context, as a matplotlib Figure.

    Raises: ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    course = [r for r in record["rows"] if r["name"] == TIME_TO]
    keys = [r for r in record["rows"] if r["name"] == FOUND]
    millions = [r["context"] / 1e6 for r in course]
    drawn = Figure(figsize=(11, 4.4), layout="constrained")
    tokens, rates = drawn.subplots(1, 2)
    tokens.plot([r["value"] for r in course], millions, linewidth=2)
    tokens.set_xlabel("time (s)")
    tokens.set_ylabel("tokens prefilled (millions)")
    rates.plot(millions, [r["attention_tflops"] for r in course], linewidth=2)
    rates.set_xlabel("context (millions of tokens)")
    rates.set_ylabel("attention of a device (TFLOP/s)")
    for axes in (tokens, rates):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    config, mesh = record["config"], MeshSpec(**record["config"]["mesh"])
    drawn.suptitle(
        f"{record['device']['kind']}, {mesh}: {config['tokens']:,} tokens, {config['dtype']}, rotation "
        f"{config['serve']['rope_precision']}; {sum(r['value'] for r in keys):.0f} of {len(keys)} keys found; "
        f"jax {record['versions']['jax']}"
    )
    return drawn

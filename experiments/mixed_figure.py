"""What `mixed` found: the numbers of a run, what they are to be, a measured rival's beside them, and the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import results
from experiments.kernel_record import Found
from mnemosyne_jax.config import MeshSpec

CONVENTION = (
    "Requests arrive in real time. TTFT is from arrival to the first token read by the host, TBT the gaps between "
    "tokens as read, of all short requests together; of those that decode all the while, from the long prompt's "
    "arrival on. What never came is infinite and has no value. Percentiles are nearest ranks: of a hundred samples or "
    "fewer, p99 is the largest. The prefill rate counts weights and causal attention once. Ticks are those with a "
    "chunk of the long prompt, their time that between the reads of two successive batches, their budget the SLO of "
    "TBT over the stages of the pipe while anything decodes, else that of an idle tick. Host time is what a tick takes "
    "the host without waiting for tokens. Weights are random, N(0, 0.02), token ids uniform; start-up and compilation "
    "are outside of all times."
)
AIMED = "lars-adaptive"  # the variant that has targets
LONG_TTFT, RATE, SHORT_TTFT, SHORT_TBT = "long TTFT", "long prefill rate of a device", "short TTFT", "short TBT"
DECODE_TBT, TICK, SHARE, CHUNK, HOST = "decode TBT", "tick", "tick over its budget", "long chunk", "host time"
UNFINISHED, ENDED = "short requests unfinished", "decodes that ended early"
A_SHORT_A_SECOND, SIXTEEN_DECODES = "1024 in 32 out every 1 s", "16 decodes"
# (name, shape, tokens of the long prompt, what is beside it) -> (must, aim) on one H100 or H200.
BOUNDS = {
    (f"{SHORT_TTFT} p99", "llama-3-8b", 262_144, A_SHORT_A_SECOND): ("<= 0.25", "<= 0.12"),
    (f"{SHORT_TBT} p99", "llama-3-8b", 262_144, A_SHORT_A_SECOND): ("<= 33", "<= 30"),
    (LONG_TTFT, "llama-3-8b", 262_144, A_SHORT_A_SECOND): ("<= 43", "<= 39"),
    (UNFINISHED, "llama-3-8b", 262_144, A_SHORT_A_SECOND): ("== 0", None),
    (ENDED, "llama-3.2-1b", 524_288, SIXTEEN_DECODES): ("== 0", None),
    (f"{SHARE} mean", "llama-3.2-1b", 524_288, SIXTEEN_DECODES): (">= 0.85", None),
    (f"{SHARE} p99", "llama-3.2-1b", 524_288, SIXTEEN_DECODES): ("<= 1.1", None),
    (f"{SHARE} max", "llama-3.2-1b", 524_288, SIXTEEN_DECODES): (None, "<= 1.1"),
}
# On one H100 80GB HBM3: bfloat16, random weights N(0, 0.02), FlashAttention 3, CUDA graphs, no prefix cache, at most 32
# sequences, in process. By work and setting (token budget, long_prefill_token_threshold): (p50, p99) of short TTFT in s
# and of short TBT in ms, and long TTFT in s.
RIVAL = "vLLM 0.24.0 on H100, measured"
RIVAL_POINTS = {
    ("llama-3-8b", 262_144, A_SHORT_A_SECOND): {
        "budget 8192, the default": ((20.6, 37.3), (8.2, 275), 37.5),
        "budget 2048": ((20.6, 36.7), (8.2, 139), 37.0),
        "budget 8192, threshold 2048": ((0.93, 1.36), (351, 550), 37.9),
        "budget 2048, threshold 512": ((0.37, 0.53), (99, 146), 40.4),
    }
}
RANKS = {"min": 0, "p10": 10, "p50": 50, "p90": 90, "p99": 99, "max": 100}


class Tick(NamedTuple):
    """A call of the engine: prompt tokens and decode rows of the batch that it submitted, its budget, seconds that the
    host was busy, and when it had read the tokens of an earlier batch."""

    long_tokens: int
    other_tokens: int
    decodes: int
    budget_s: float
    host_s: float
    read_s: float


@dataclass(frozen=True)
class Run:
    """What came of one variant, in seconds; None never came. `ticks` are columns as of `columns`."""

    long_ttft_s: float | None
    short_ttft_s: list[float | None]
    short_tbt_s: list[float]
    short_finished: int
    decode_tbt_s: list[float]
    decodes_ended: int  # of those that were to go on all the while
    ticks: dict[str, list[float]]


def columns(ticks: Sequence[Tick], depth: int, begin_s: float) -> dict[str, list[float]]:
    """Of each tick by name: its end after `begin_s`, time, budget and host time in seconds; tokens and decode rows.

    What a call submits is read `depth` calls later: the last `depth` calls only emptied the pipe.
    """
    *cells, read_s = (np.array(cell) for cell in zip(*ticks, strict=True))
    made = dict(end_s=(read_s - begin_s)[depth:], took_s=np.diff(read_s)[depth - 1 :])
    made |= {name: cell[:-depth] for name, cell in zip(Tick._fields[:-1], cells, strict=True)}
    return {name: rounded(cell) for name, cell in made.items()}


def rounded(seconds: Sequence[float] | np.ndarray) -> list[float]:
    """To a microsecond."""
    return np.round(seconds, 6).tolist()


def beside(config: Mapping[str, Any]) -> str:
    """What is served beside the long prompt, in words."""
    parts = [f"{config['decodes']} decodes"] if config["decodes"] else []
    if config["short_every_s"]:
        parts.append("{short_tokens} in {short_new_tokens} out every {short_every_s:g} s".format(**config))
    return ", ".join(parts) or "nothing"


# Numbers.


def numbers(run: Run, flops_per_device: float) -> dict[str, tuple[float, str]]:
    """Every number of a run and its unit, by name; `flops_per_device` is the work of the long prompt."""
    rate = flops_per_device / (run.long_ttft_s or math.nan) / 1e12
    made = {LONG_TTFT: (run.long_ttft_s or math.inf, "s"), RATE: (rate, "TFLOP/s")}
    if run.short_ttft_s:
        made["short requests"] = (len(run.short_ttft_s), "requests")
        made[UNFINISHED] = (len(run.short_ttft_s) - run.short_finished, "requests")
        made |= _spread(SHORT_TTFT, [s or math.inf for s in run.short_ttft_s], "s", "p50", "p90", "p99")
        made |= _spread(SHORT_TBT, 1e3 * np.array(run.short_tbt_s), "ms", "p50", "p99")
    if run.decode_tbt_s:
        made[ENDED] = (run.decodes_ended, "requests")
        made |= _spread(DECODE_TBT, 1e3 * np.array(run.decode_tbt_s), "ms", "p50", "p99")
    ticks = {name: np.array(values) for name, values in run.ticks.items()}
    ticks = {name: values[ticks["long_tokens"] > 0] for name, values in ticks.items()}
    made["ticks"] = (len(ticks["took_s"]), "1")
    made |= _spread(TICK, ticks["took_s"], "s", "p50", "p99", "max")
    made |= _spread(SHARE, ticks["took_s"] / ticks["budget_s"], "1", "mean", "p50", "p99", "max")
    made |= _spread(CHUNK, ticks["long_tokens"], "tokens", "min", "p10", "p50", "p90", "max")
    return made | _spread(HOST, 1e6 * ticks["host_s"], "us", "p50")


def _spread(name: str, values: Sequence[float] | np.ndarray, unit: str, *which: str) -> dict[str, tuple[float, str]]:
    some = values if len(values) else [math.nan]
    found = np.percentile(some, list(RANKS.values()), method="inverted_cdf").tolist()
    by_name = dict(zip(RANKS, found, strict=True)) | {"mean": float(np.mean(some))}
    return {f"{name} {q}": (by_name[q], unit) for q in which}


def bounds(name: str, device_kind: str, mesh: MeshSpec, **where: Any) -> dict[str, str | None]:
    """The must and the aim of a number on one H100 or H200, as results.row takes them; few have any."""
    if mesh.devices > 1 or where["variant"] != AIMED or not any(card in device_kind for card in ("H100", "H200")):
        return {}
    must, aim = BOUNDS.get((name, where["shape"], where["context"], where["beside"]), (None, None))
    return dict(must=must, aim=aim)


def add_rows(
    found: Found, made: Mapping[str, tuple[float, str]], device_kind: str, mesh: MeshSpec, **where: Any
) -> None:
    """Adds a row for each number, without a value where there is none, with its must and aim if it has any."""
    for name, (value, unit) in made.items():
        limits = bounds(name, device_kind, mesh, **where)
        found.add(name, value if math.isfinite(value) else None, unit, **where, mesh=str(mesh), **limits)


def line(made: Mapping[str, tuple[float, str]]) -> str:
    """The numbers of a run that one looks at first."""

    def of(name: str, *which: str) -> str:
        values = [made[f"{name} {q}"][0] for q in which]
        return f"{'/'.join(which)} {'/'.join(f'{x:.0f}' if x >= 1000 else f'{x:.3g}' for x in values)}"

    parts = [f"long TTFT {made[LONG_TTFT][0]:.4g} s ({made[RATE][0]:.3g} TFLOP/s)"]
    if UNFINISHED in made:
        parts.append(f"{made['short requests'][0]} short requests, {made[UNFINISHED][0]} unfinished")
        parts.append(f"their TTFT {of(SHORT_TTFT, 'p50', 'p90', 'p99')} s, TBT {of(SHORT_TBT, 'p50', 'p99')} ms")
    if ENDED in made:
        parts.append(f"TBT of decodes {of(DECODE_TBT, 'p50', 'p99')} ms")
    parts.append(f"{made['ticks'][0]} ticks {of(TICK, 'p50', 'p99', 'max')} s, over budget {of(SHARE, 'mean', 'p99')}")
    parts.append(f"chunks {of(CHUNK, 'p10', 'p50', 'p90')}, host {of(HOST, 'p50')} us")
    return "; ".join(parts)


# The picture.


def together(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The runs of several records in one, all else as in the first.

    Raises: ValueError if they are of different devices or different work.
    """

    def work(record: Mapping[str, Any]) -> tuple[Any, ...]:
        config = record["config"]
        return record["device"]["kind"], config["mesh"], config["model"], config["long_tokens"], beside(config)

    first, *others = records
    for other in others:
        if work(other) != work(first):
            raise ValueError(f"records of {work(first)} and of {work(other)}")
    return {**first, "runs": {variant: run for record in records for variant, run in record["runs"].items()}}


def figure(record: Mapping[str, Any]) -> Any:
    """How long which share of requests waited, and the ticks of each variant, as a matplotlib Figure. Without short
    requests there is no panel of their TTFT.

    Raises: ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    config, runs = record["config"], record["runs"]
    shape, context, others = Path(config["model"]).stem, config["long_tokens"], beside(config)
    drawn = Figure(figsize=(12, 4.4 + 2.6 * len(runs)), layout="constrained")
    grid = drawn.add_gridspec(1 + len(runs), 2, height_ratios=[1.6] + [1] * len(runs))
    ttft = drawn.add_subplot(grid[0, 0]) if any(run["short_ttft_s"] for run in runs.values()) else None
    tbt = drawn.add_subplot(grid[0, 1] if ttft else grid[0, :])
    for variant, run in runs.items():
        if ttft and run["short_ttft_s"]:
            ttft.ecdf([s or math.inf for s in run["short_ttft_s"]], label=variant, linewidth=2)
        if gaps_s := run["short_tbt_s"] + run["decode_tbt_s"]:
            tbt.ecdf(gaps_s, label=variant, linewidth=2)
    for marker, (setting, points) in zip("xo^s", RIVAL_POINTS.get((shape, context, others), {}).items(), strict=False):
        style: Any = dict(color="grey", linewidth=1, label=f"{RIVAL}: {setting}")
        if ttft:
            ttft.plot(points[0], (0.5, 0.99), f"{marker}:", **style)
        tbt.plot([ms / 1e3 for ms in points[1]], (0.5, 0.99), f"{marker}:", **style)
    tbt.axvline(config["serve"]["tbt_slo_s"], color="black", linestyle=":", label="SLO")
    for axes, name in ((ttft, "time to first token of short requests (s)"), (tbt, "time between tokens (s)")):
        if axes:
            axes.set(xscale="log", xlabel=name, ylabel="share")
            axes.grid(alpha=0.25, which="both")
            results.plain_log(axes.xaxis)
    drawn.legend(*tbt.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    for row, (variant, run) in enumerate(runs.items(), start=1):
        _draw_ticks(drawn.add_subplot(grid[row, :]), variant, run["ticks"])
    work = f"{shape}, {context:,} tokens beside {others}; {MeshSpec(**config['mesh'])}, jax {record['versions']['jax']}"
    drawn.suptitle(f"{record['device']['kind']}: {work}")
    return drawn


def _draw_ticks(axes: Any, variant: str, ticks: Mapping[str, Sequence[float]]) -> None:
    """The time of each tick, and the chunk of the long prompt in it, against time; dotted: the budgets."""
    end_s, chunks = np.array(ticks["end_s"]), np.array(ticks["long_tokens"])
    axes.plot(end_s, 1e3 * np.array(ticks["took_s"]), ".", markersize=3, color="C0")
    for budget_s in set(ticks["budget_s"]):
        axes.axhline(1e3 * budget_s, color="C0", linestyle=":", linewidth=1.5)
    axes.set(title=variant, xlabel="s since the long prompt's arrival", ylim=(0, None))
    axes.set_ylabel("tick (ms)", color="C0")
    axes.grid(alpha=0.25)
    right = axes.twinx()
    right.plot(end_s[chunks > 0], chunks[chunks > 0], ".", markersize=3, color="C1")
    right.set_yscale("log", base=2)
    right.set_ylim(16, 2 * max(16, *chunks))
    right.set_ylabel("chunk of the long prompt (tokens)", color="C1")

"""How prefill and decode of one long request scale, by the cost model: TTFT by devices, TBT by context and groups.

`python -m experiments.predicted_scaling --config_path configs/predicted_scaling.yaml [--out FILE] [--plot FILE.png]`

The sequence pipeline (SPP) runs at the chunk with the least TTFT of all that are tried. Beside it context parallelism
(CP), which passes keys and values around a ring: striped, where causal work is balanced, and contiguous, where it is
not. `paper` is the figure of arXiv 2409.17264, to which nothing is fitted.

What differs: the one link figure of the hardware stands for every link, but a ring would hide one nine times as slow;
so striped CP comes out as all but perfect, and ahead of a pipeline, which must fill: the model charges a ring no skew,
no congestion and no small kernels. The paper's 1.64 at 128 devices is near what a contiguous ring gives, its 1.08 at 32
is not. Its TTFTs are longer: its attention ran at a quarter of peak, counted causally, ours at `attention_share`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import command_line, results
from experiments import predicted_scaling_times as times
from experiments.predicted_scaling_times import DTYPE_BYTES, Prefill
from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, from_yaml
from mnemosyne_jax.planning import plan
from mnemosyne_jax.serve.cost import CostModel

PAPER_STAGES = {"llama-3-8b": 4, "llama-3-70b": 8}  # of its figures of TBT
PAPER_SPEEDUPS = {8: 1.10, 16: 1.08, 32: 1.08, 64: 1.29, 128: 1.64}  # 8B by devices, 1M tokens: figure 5b
PAPER_TBT_MS = {1: 55.0, 2: 33.0}  # 8B by groups, 10M tokens: figure 7a; one group from "40% less" with two


@dataclass(frozen=True)
class PredictedScalingConfig:
    """Prefill of each of `prompts` on each of `stages` x tp; decode at each of `contexts` on each of `groups`.

    Tried are chunks of so many tokens, and adaptive ones that fill ticks of so many seconds in programs of `buckets`.
    """

    models: tuple[str, ...] = ("configs/model/llama-3-8b.yaml",)
    hardware: str = "configs/hardware/h100.yaml"
    tp: int = 8
    prompts: tuple[int, ...] = (1_000_000, 10_000_000)
    stages: tuple[int, ...] = (1, 2, 4, 8, 16)
    chunks: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    ticks_s: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.25)
    buckets: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    contexts: tuple[int, ...] = (1_000_000, 2_000_000, 4_000_000, 10_000_000)
    groups: tuple[int, ...] = (1, 2, 4)
    decode_stages: tuple[int, ...] = (1, 4, 8)
    tbt_slo_s: float = 0.030
    out: str | None = None
    plot: str | None = None
    check: bool = False


def best_prefill(config: PredictedScalingConfig, cost: CostModel, prompt_tokens: int) -> tuple[str, Prefill]:
    """The Prefill with the least TTFT of all that are tried, and its chunks in words."""
    tried = {f"{chunk} tokens": times.fixed(cost, prompt_tokens, chunk) for chunk in config.chunks}
    for tick_s in config.ticks_s:
        made = times.adaptive(cost, prompt_tokens, tick_s, config.buckets)
        if made:
            tried[f"{1e3 * tick_s:g} ms, {made.chunks.max()} to {made.chunks[:-1].min()} tokens"] = made
    return min(tried.items(), key=lambda item: item[1].ttft_s)


def prefill_rows(
    config: PredictedScalingConfig, name: str, model: ModelConfig, hardware: HardwareConfig
) -> Iterator[dict]:
    """TTFT by devices of the pipeline, of both rings and of the floor, wherever the prompt fits into memory."""
    whole = CostModel(model, hardware, MeshSpec(tp=config.tp), DTYPE_BYTES)
    for prompt in config.prompts:
        fewest: float | None = None  # device seconds on as few devices as hold the prompt
        for mesh in (MeshSpec(spp=stages, tp=config.tp) for stages in config.stages):
            if not plan(model, hardware, mesh, prompt).fits:
                continue
            words, best = best_prefill(config, CostModel(model, hardware, mesh, DTYPE_BYTES), prompt)
            fewest = fewest or best.ttft_s * mesh.devices
            rings_s = {
                kind: times.ring_ttft_s(whole, mesh.spp, prompt, kind == "striped")
                for kind in ("striped", "contiguous")
            }
            floor_s = times.prefill_flops(model, prompt) / (mesh.devices * hardware.matmul_flops_per_s)
            where: dict[str, Any] = dict(context=prompt, mesh=str(mesh), model=name, devices=mesh.devices)
            headline = name == "llama-3-8b" and prompt == 1_000_000
            aim = "<= 15" if headline and mesh.devices == 128 else None
            paper = {"paper": PAPER_SPEEDUPS[mesh.devices]} if headline and mesh.devices in PAPER_SPEEDUPS else {}
            yield _row("TTFT of SPP", best.ttft_s, "s", aim=aim, chunk=words, chunks=len(best.chunks), **where)
            for kind, ring_s in rings_s.items():
                yield _row(f"TTFT of {kind} CP", ring_s, "s", **where)
                yield _row(f"{kind} CP / SPP", ring_s / best.ttft_s, "1", **paper, **where)
            yield _row("TTFT at peak FLOP/s", floor_s, "s", **where)
            yield _row("MFU of SPP", floor_s / best.ttft_s, "1", **where)
            yield _row("efficiency of SPP", fewest / mesh.devices / best.ttft_s, "1", aim=">= 0.8", **where)
            yield _row("longest tick of SPP", best.ticks_s.max(), "s", **where)
            _, other_s, transfer_s = times.ring_step_s(whole, mesh.spp, prompt, striped=True)
            yield _row("attention / transfer in a ring step", other_s / transfer_s, "1", **where)


def decode_rows(
    config: PredictedScalingConfig, name: str, model: ModelConfig, hardware: HardwareConfig
) -> Iterator[dict]:
    """TBT of one request by context, groups and stages, beside its floor; `fits` says whether memory would do."""
    for stages in config.decode_stages:
        for groups in config.groups:
            mesh = MeshSpec(groups, stages, config.tp)
            cost = CostModel(model, hardware, mesh, DTYPE_BYTES)
            one_group = CostModel(model, hardware, MeshSpec(1, stages, config.tp), DTYPE_BYTES)
            for context in config.contexts:
                tbt_s, one_group_s = (times.tbt_s(c, context) for c in (cost, one_group))
                floor_s = times.tbt_floor_s(model, hardware, mesh, context)
                where: dict[str, Any] = dict(context=context, mesh=str(mesh), model=name, groups=groups, stages=stages)
                where["fits"] = plan(model, hardware, mesh, context).fits
                headline = (name, stages, context) == ("llama-3-8b", 4, 10_000_000)
                paper = {"paper": PAPER_TBT_MS[groups]} if headline and groups in PAPER_TBT_MS else {}
                aim = f"<= {1e3 * config.tbt_slo_s:g}" if headline and groups == max(config.groups) else None
                yield _row("TBT", 1e3 * tbt_s, "ms", aim=aim, **paper, **where)
                yield _row("TBT at peak bandwidth", 1e3 * floor_s, "ms", **where)
                yield _row("speed-up by KVP", one_group_s / tbt_s, "1", **where)


def _row(name: str, value: float, unit: str, **where: Any) -> dict[str, Any]:
    return results.row(name, float(f"{value:.4g}"), unit, **where)


def table(rows: Sequence[dict], keys: Sequence[str]) -> str:
    """One line for each combination of `keys`, one column for each name of a row; (paper's figure) in brackets."""
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        cells = lines.setdefault(tuple(row.get(key, "") for key in keys), {})
        words = [f"{row['value']:g}", row["unit"].strip("1"), f"({row['paper']})" if "paper" in row else ""]
        cells[row["name"]] = " ".join(filter(None, words))
        cells |= {"chunk": str(row["chunk"])} if "chunk" in row else {}
    columns = list(dict.fromkeys(name for cells in lines.values() for name in cells))
    made = [[*keys, *columns], *([*map(str, at), *(cells.get(c, "") for c in columns)] for at, cells in lines.items())]
    return "\n".join(" | ".join(line) for line in made)


def figure(rows: Sequence[dict], config: PredictedScalingConfig) -> Any:
    """TTFT of the first prompt against devices and TBT against context, a row of panels for each model."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in rows))
    drawn = Figure(figsize=(11, 4.2 * len(names)), layout="constrained")
    panels = drawn.subplots(len(names), 2, squeeze=False)
    for name, (left, right) in zip(names, panels, strict=True):
        stages = PAPER_STAGES.get(name, max(config.decode_stages))
        of_model = [row for row in rows if row["model"] == name]
        for line, style in (("SPP", "o-"), ("striped CP", "s--"), ("contiguous CP", "^--")):
            _draw(left, of_model, f"TTFT of {line}", "devices", style, line, context=config.prompts[0])
        _draw(left, of_model, "TTFT at peak FLOP/s", "devices", "k:", "FLOPs at peak", context=config.prompts[0])
        for i, groups in enumerate(config.groups):
            at = dict(groups=groups, stages=stages, fits=True)
            _draw(right, of_model, "TBT", "context", f"C{i}o-", f"KVP {groups}", **at)
            _draw(right, of_model, "TBT at peak bandwidth", "context", f"C{i}:", None, **at)
        right.axhline(1e3 * config.tbt_slo_s, color="k", lw=0.8)
        left.set(title=f"{name}: prefill of {config.prompts[0]:,} tokens", xlabel="devices", ylabel="TTFT (s)")
        right.set(title=f"SPP {stages}; dotted: bytes at peak bandwidth", xlabel="context (tokens)", ylabel="TBT (ms)")
        for axes in (left, right):
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.25, which="both")
            axes.legend(fontsize="small")
            for side in (axes.xaxis, axes.yaxis):
                side.set_major_formatter("{x:g}")
                side.set_minor_formatter("{x:g}" if side is axes.yaxis else "")
        left.set_xticks([s * config.tp for s in config.stages], minor=False)
        right.set_xticks(config.contexts, [f"{context / 1e6:g}M" for context in config.contexts])
    return drawn


def _draw(axes: Any, rows: Sequence[dict], name: str, x: str, style: str, label: str | None, **at: Any) -> None:
    points = [(r[x], r["value"]) for r in rows if r["name"] == name and at.items() <= r.items()]
    axes.plot(*zip(*points, strict=True), style, label=label)


def main(args: list[str] | None = None) -> int:
    config = command_line.read(PredictedScalingConfig, args)
    hardware, rows = from_yaml(HardwareConfig, config.hardware), []
    for path in config.models:
        model = from_yaml(ModelConfig, path)
        prefills = list(prefill_rows(config, Path(path).stem, model, hardware))
        decodes = list(decode_rows(config, Path(path).stem, model, hardware))
        print(f"{Path(path).stem}\n{table(prefills, ('context', 'devices'))}", flush=True)
        print(table(decodes, ("context", "mesh", "fits")), flush=True)
        rows += prefills + decodes
    made = results.document(config, rows)
    if config.out:
        results.write(config.out, made)
    if config.plot:
        figure(rows, config).savefig(config.plot, dpi=120)
    return 0 if not config.check or results.check(made) else 1


if __name__ == "__main__":
    sys.exit(main())

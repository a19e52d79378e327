"""What a calibration came to: rows of its record, the fitted HardwareConfig as YAML, a picture."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experiments import fitting, results
from experiments.fitting import Loads
from experiments.tick_loads import TimedTick
from mnemosyne_jax.config import HardwareConfig

HELD_OUT_EVERY = 4
MUST_ON_GPU = "<= 0.05"
COLORS = {"empty": "tab:gray", "decode": "tab:blue", "chunk": "tab:orange", "mixed": "tab:green"}
MARKERS = "osD^v<>P"
WORDS = {"median": 50, "p90": 90, "max": 100}  # percentiles of errors


@dataclass(frozen=True)
class Timed:
    """Ticks of one engine, called `engine`, their loads, and the median seconds that each took [n]."""

    engine: str
    loads: Loads
    ticks: tuple[TimedTick, ...]
    measured_s: np.ndarray


def held_out(found: Sequence[Timed]) -> np.ndarray:
    """Which ticks, of all engines one after the other, no fit may see (booleans)."""
    return np.arange(sum(len(one.ticks) for one in found)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def rows_of(
    found: Sequence[Timed], before: HardwareConfig, after: HardwareConfig, on_gpu: bool
) -> list[dict[str, Any]]:
    """The record: how far predictions are off, in all, by engine and by kind of tick, the coefficients, every tick.

    A must stands where ticks were timed `on_gpu`.
    """
    loads, mesh = [one.loads for one in found], str(found[0].loads.mesh)
    measured_s = np.concatenate([one.measured_s for one in found])
    predicted_s = fitting.predict(loads, after)
    errors, errors_before = (
        fitting.relative_errors(s, measured_s) for s in (predicted_s, fitting.predict(loads, before))
    )
    ticks = [(one.engine, tick) for one in found for tick in one.ticks]
    engines, kinds = np.array([engine for engine, _ in ticks]), np.array([tick.kind for _, tick in ticks])
    unseen = held_out(found)
    rows = []
    for part, kept in (("training", ~unseen), ("held out", unseen)):
        for name, of in (("error", errors), ("error before the fit", errors_before)):
            for word, share in WORDS.items():
                must = MUST_ON_GPU if on_gpu and (part, name, word) == ("held out", "error", "median") else None
                value = float(np.percentile(of[kept], share))
                rows.append(results.row(f"{name} {word}", value, "1", must=must, part=part, mesh=mesh))
    of_kinds = [({"kind": kind}, kinds == kind) for kind in COLORS]
    of_engines = [({"engine": one.engine}, engines == one.engine) for one in found]
    of_both = [(e | k, in_e & in_k) for e, in_e in of_engines for k, in_k in of_kinds]
    for words, groups in ((tuple(WORDS), of_kinds + of_engines), (("median",), of_both)):
        for where, among in ((where, among & unseen) for where, among in groups):
            for word in words if among.any() else ():
                value = float(np.percentile(errors[among], WORDS[word]))
                rows.append(results.row(f"error {word}", value, "1", part="held out", mesh=mesh, **where))
    for name in (*fitting.SHARES, *fitting.AMOUNTS):
        unit = "s" if name.endswith("_s") else "1"
        rows.append(results.row(name, getattr(after, name), unit, mesh=mesh, before=getattr(before, name)))
    for i, (engine, tick) in enumerate(ticks):
        where: dict[str, Any] = {"engine": engine, "kind": tick.kind, "load": tick.words, "mesh": mesh}
        where |= {"part": "held out" if unseen[i] else "training", "predicted_s": float(predicted_s[i])}
        rows.append(results.row("tick", float(measured_s[i]), "s", **where))
    return rows


def write_hardware(path: str | Path, hardware: HardwareConfig, made: Mapping[str, Any]) -> Path:
    """The path, with the HardwareConfig written there as YAML, behind a line that says how it was made."""
    path, device = Path(path), made["device"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    program, *words = shlex.split(made["command"])
    command = shlex.join([Path(program).name, *words])
    text = f"# Fitted on {device['count']} x {device['kind']} ({versions}) by: {command}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + yaml.safe_dump(dataclasses.asdict(hardware), sort_keys=False))
    return path


def figure(found: Sequence[Timed], hardware: HardwareConfig, device_kind: str) -> Any:
    """Predicted against measured seconds, a point for each tick: a mark for each engine, hollow if held out."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    drawn = Figure(figsize=(5.6, 5.6), layout="constrained")
    axes = drawn.subplots()
    measured_s, predicted_s = (
        np.concatenate([one.measured_s for one in found]),
        fitting.predict([one.loads for one in found], hardware),
    )
    marks = [mark for one, mark in zip(found, itertools.cycle(MARKERS), strict=False) for _ in one.ticks]
    colors = [COLORS[tick.kind] for one in found for tick in one.ticks]
    points = zip(measured_s, predicted_s, marks, colors, held_out(found), strict=True)
    for x, y, mark, color, hollow in points:
        axes.scatter(x, y, s=18, marker=mark, edgecolors=color, facecolors="none" if hollow else color, linewidths=0.8)
    ends = [min(measured_s.min(), predicted_s.min()), max(measured_s.max(), predicted_s.max())]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured (s)", ylabel="predicted (s)")
    axes.set_title(f"ticks on {device_kind}; hollow: held out of the fit", fontsize="small")
    axes.grid(alpha=0.25)
    named = [("o", color, kind) for kind, color in COLORS.items() if color in colors]
    named += [(mark, "black", one.engine) for one, mark in zip(found, itertools.cycle(MARKERS), strict=False)]
    key = [Line2D([], [], linestyle="", marker=m, color=color, markersize=4, label=name) for m, color, name in named]
    axes.legend(handles=key, fontsize="x-small")
    return drawn


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the record says, less the ticks."""
    for r in rows:
        if r["name"] != "tick":
            where = "; ".join(str(r[key]) for key in ("part", "engine", "kind") if key in r)
            yield f"{r['name']}{where and f' ({where})'}: {r['value']:.4g} {r['unit']}"

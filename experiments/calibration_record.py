"""What a calibration came to: rows of its record, the fitted HardwareConfig as YAML, a picture."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from experiments import fitting, results
from experiments.fitting import Loads
from experiments.tick_loads import TimedTick
from mnemosyne_jax.config import HardwareConfig

HELD_OUT_EVERY = 4
MUST_ON_GPU = "<= 0.05"
COLORS = {"empty": "tab:gray", "decode": "tab:blue", "chunk": "tab:orange", "mixed": "tab:green"}


@dataclass(frozen=True)
class Timed:
    """Ticks and the median seconds that each took, with their loads, in as many parts as there are models."""

    parts: tuple[Loads, ...]
    ticks: tuple[TimedTick, ...]
    measured_s: np.ndarray

    @property
    def held_out(self) -> np.ndarray:
        return np.arange(len(self.ticks)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def rows_of(found: Timed, before: HardwareConfig, after: HardwareConfig) -> list[dict[str, Any]]:
    """The record: how far predictions are off, the coefficients, and every tick."""
    predicted_s, mesh = fitting.predict(found.parts, after), str(found.parts[0].mesh)
    errors = fitting.relative_errors(predicted_s, found.measured_s)
    errors_before = fitting.relative_errors(fitting.predict(found.parts, before), found.measured_s)
    gpu = jax.default_backend() == "gpu"
    rows = []
    for part, kept in (("training", ~found.held_out), ("held out", found.held_out)):
        for name, of in (("error", errors), ("error before the fit", errors_before)):
            for word, share in (("median", 50), ("p90", 90), ("max", 100)):
                must = MUST_ON_GPU if gpu and (part, name, word) == ("held out", "error", "median") else None
                value = float(np.percentile(of[kept], share))
                rows.append(results.row(f"{name} {word}", value, "1", must=must, part=part, mesh=mesh))
    kinds = np.array([tick.kind for tick in found.ticks])
    for kind in sorted(set(kinds)):
        value = float(np.median(errors[kinds == kind]))
        rows.append(results.row("error median", value, "1", part="all", kind=str(kind), mesh=mesh))
    for name in (*fitting.SHARES, *fitting.AMOUNTS):
        unit = "s" if name.endswith("_s") else "1"
        rows.append(results.row(name, getattr(after, name), unit, mesh=mesh, before=getattr(before, name)))
    layers = np.concatenate([np.full(len(part.rows), part.model.layers) for part in found.parts])
    for i, tick in enumerate(found.ticks):
        where = {"kind": tick.kind, "load": tick.words, "layers": int(layers[i]), "mesh": mesh}
        where |= {"part": "held out" if found.held_out[i] else "training", "predicted_s": float(predicted_s[i])}
        rows.append(results.row("tick", float(found.measured_s[i]), "s", **where))
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


def figure(found: Timed, hardware: HardwareConfig) -> Any:
    """Predicted against measured seconds, a point for each tick; those held out are hollow."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = drawn.subplots()
    predicted_s = fitting.predict(found.parts, hardware)
    for kind, color in COLORS.items():
        for held_out in (False, True):
            at = [i for i, t in enumerate(found.ticks) if t.kind == kind and found.held_out[i] == held_out]
            face = "none" if held_out else color
            label = None if held_out or not at else kind
            axes.scatter(found.measured_s[at], predicted_s[at], s=22, edgecolors=color, facecolors=face, label=label)
    ends = [min(found.measured_s.min(), predicted_s.min()), max(found.measured_s.max(), predicted_s.max())]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured (s)", ylabel="predicted (s)")
    axes.set_title(f"ticks on {jax.devices()[0].device_kind}; hollow: held out of the fit", fontsize="small")
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")
    return drawn


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the record says, less the ticks."""
    for r in rows:
        if r["name"] != "tick":
            where = ", ".join(str(r[key]) for key in ("part", "kind") if key in r)
            yield f"{r['name']}{where and f' ({where})'}: {r['value']:.4g} {r['unit']}"

"""How one long request scales over devices: TTFT and TBT on every layout kvp x spp x tp, and the same tokens on each.

`python -m experiments.scaling --config_path configs/scaling.yaml --out FILE.json --plot FILE.png --check` runs each
layout on the first devices that it needs, fewest first, prints a line for each measurement and saves the record after
each. Decodes are over a filled cache. `--layouts "[configs/layouts/spp2.yaml, ...]"` runs some of them,
`--serve.placement grow` grows over the groups instead of striping. `--join "[FILE.json, ...]"` puts records of one kind
of device together and measures nothing: efficiency, speed-up and picture are then of all of them. One process.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# A cache for the longest context needs more of a GPU than the three quarters that JAX takes by itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax

import mnemosyne_jax as mn
from experiments import ceilings, command_line, results, scaling_figure
from experiments import scaling_record as record
from experiments.bench_engine import BenchEngineConfig, bench_request, contexts_that_fit
from experiments.bench_engine_runs import TimedEngine, built, fill, pool_pages, random_prompt, run_prompt
from experiments.devices import use_virtual_devices
from experiments.kernel_record import OURS, Found
from experiments.scaling_record import LayoutBench
from experiments.scaling_ring import time_rings
from experiments.scaling_tokens import CompareConfig, compare
from mnemosyne_jax.mesh import make_mesh

LAYOUTS = Path(__file__).parents[1] / "configs" / "layouts"


@dataclass(frozen=True)
class Layout:
    """A YAML file of `layouts`."""

    mesh: mn.MeshSpec = mn.MeshSpec()


@dataclass(frozen=True)
class ScalingConfig:
    """Prompts of `prefills` tokens, and decodes after `decodes` tokens, on each of `layouts` (YAML files; none: all).

    `chunks`: tokens of a prefill's chunk by the stages of a pipe; one with a number of stages that is not named takes
    those of the next smaller. `serve` holds for all, but rows: with kvp groups its shared rows are among
    `private_rows`, so that a tick has as many. A prefill is repeated `rounds` times if it took no longer than
    `repeat_s`; `new_tokens` are decoded. `spare_gib` of a device are left. Nothing is begun after `seconds`. `compare`:
    the small model whose tokens are to be equal on all layouts. `rings`: prompts whose attention alone is timed around
    a striped ring of the devices of each layout of kvp groups alone.
    """

    model: str = "configs/model/llama-3-8b.yaml"
    layouts: tuple[str, ...] = ()
    prefills: tuple[int, ...] = (131_072,)
    decodes: tuple[int, ...] = (1_048_576,)
    rings: tuple[int, ...] = ()
    chunks: dict[int, int] = field(default_factory=lambda: {1: 4088})
    serve: mn.ServeConfig = mn.ServeConfig(private_rows=8, private_chunks=1, shared_rows=1)
    compare: CompareConfig = CompareConfig()
    new_tokens: int = 65
    rounds: int = 3
    repeat_s: float = 4.0
    spare_gib: float = 3.0
    seconds: float = 420.0
    seed: int = 0
    matmul_size: int = 8192
    copy_bytes: int = 4 << 30
    sample_ms: float = 50.0
    virtual_devices: int = 0
    join: tuple[str, ...] = ()
    plot: str | None = None
    out: str | None = None
    check: bool = False

    def __post_init__(self):
        if self.join and not (self.plot or self.out):
            raise mn.RequestError("join", list(self.join), "needs --out FILE.json or --plot FILE.png")
        if 1 not in self.chunks or min(self.chunks.values()) < 1:
            raise mn.RequestError("chunks", self.chunks, "must be positive, and say what one stage takes: {1: tokens}")
        if self.serve.private_rows <= self.serve.shared_rows:
            raise mn.RequestError("serve.private_rows", self.serve.private_rows, "must be more than serve.shared_rows")

    def meshes(self) -> list[mn.MeshSpec]:
        """Of all layouts, those of few devices first."""
        files = self.layouts or sorted(LAYOUTS.glob("*.yaml"))
        meshes = [mn.from_yaml(Layout, file).mesh for file in files]
        return sorted(meshes, key=lambda mesh: (mesh.devices, mesh.kvp, mesh.spp))

    def work_on(self, mesh: mn.MeshSpec, contexts: tuple[int, ...], decode_only: bool) -> BenchEngineConfig:
        """Prefills or decodes of these contexts on one layout, as `bench_engine` takes them."""
        chunk = self.chunks[max(stages for stages in self.chunks if stages <= mesh.spp)]
        rows = self.serve.private_rows - self.serve.shared_slots(mesh)
        serve = replace(self.serve, private_rows=rows, chunk_tokens=chunk, chunk_buckets=(chunk,))
        same = {name: getattr(self, name) for name in ("new_tokens", "rounds", "repeat_s", "spare_gib", "seed")}
        return BenchEngineConfig(
            models=(self.model,), contexts=contexts or (1,), chunks=(chunk,), adaptive=False, mesh=mesh, serve=serve,
            decode_only=decode_only, **same,
        )  # fmt: skip


# One layout.


def scale_on(config: ScalingConfig, bench: LayoutBench, model: mn.ModelConfig) -> None:
    """The measurements of one layout: decodes, which take seconds, then prefills, from short to long."""
    shape, mesh = Path(config.model).stem, bench.mesh
    asked = [config.work_on(mesh, config.decodes, True), config.work_on(mesh, config.prefills, False)]
    wanted = [config.decodes, config.prefills]
    jobs = [(work, contexts_that_fit(work, bench, model, shape)) for work, of in zip(asked, wanted, strict=True) if of]
    longest = max((context for _, fitting in jobs for context in fitting), default=0)
    if not longest or not bench.may_begin(shape=shape):
        return
    work, _ = jobs[0]
    (chunk,) = work.chunks
    serve = work.serve_for(chunk, pool_pages(work.serve, mesh, work.total_tokens(longest)))
    executor, spent_s = built(model, serve, mesh)
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent_s.items())
    print(f"{shape} on {mesh}, kernels {executor.impl}, chunks of {chunk}: {spent}", flush=True)
    fill(executor)
    engine = TimedEngine(executor, serve, None)
    shortest = min(context for _, fitting in jobs for context in fitting)
    # As a long prompt runs, over all groups: nothing measured is the first of its kind.
    warm_up = random_prompt(min(shortest, max(2 * chunk, serve.span_tokens + 1)), model.vocab, config.seed)
    run_prompt(engine, warm_up, config.new_tokens, planted=False)
    for work, fitting in jobs:
        kind = dict(cache="filled") if work.decode_only else dict(chunk=chunk)
        for context in fitting:
            where: dict[str, Any] = dict(shape=shape, context=context) | kind
            if bench.may_begin(**where):
                prompt = random_prompt(context, model.vocab, config.seed + 1)
                with bench.found.guarded(OURS, **where, **bench.place):
                    bench_request(work, bench, model, engine, prompt, where)
                bench.save()


def runnable(config: ScalingConfig, found: Found) -> Iterator[mn.MeshSpec]:
    """The layouts that there are devices for; the others are absent from the record."""
    for mesh in config.meshes():
        try:
            make_mesh(mesh)
            yield mesh
        except mn.RequestError as refusal:
            found.leave_out(OURS, str(refusal), mesh=str(mesh))


def main(args: list[str] | None = None) -> int:
    """The exit code: 1 if a must is missed that was to be checked, or if nothing could be drawn."""
    config: ScalingConfig = command_line.read(ScalingConfig, args)
    if config.join:
        made = record.joined([json.loads(Path(name).read_text()) for name in config.join])
        return finish(config, made)
    use_virtual_devices(config.virtual_devices)
    end_s, found = time.monotonic() + config.seconds, Found(None)
    model, kind = mn.from_yaml(mn.ModelConfig, config.model), jax.devices()[0].device_kind
    measure = functools.partial(ceilings.measure, config.matmul_size, config.copy_bytes, config.sample_ms / 1e3)
    reached = measure()

    def save() -> dict[str, Any]:
        made = results.document(config, [*found.rows, *record.derived(found.rows, kind)], reached)
        made |= {"convention": record.CONVENTION, "absent": found.absent}
        if config.out:
            results.write(config.out, made)
        return made

    placement = config.serve.placement
    benches = [LayoutBench(mesh, found, reached, save, end_s, placement) for mesh in runnable(config, found)]
    with found.guarded(OURS, shape="small"):
        compare(config.compare, config.serve, benches)
    for bench in benches:
        save()
        try:
            model.refuse_mesh(bench.mesh)
        except mn.RequestError as refusal:
            bench.leave_out(str(refusal), shape=Path(config.model).stem)
            continue
        with found.guarded(OURS, shape=Path(config.model).stem, **bench.place):
            time_rings(config.rings, bench, model, config.serve, config.sample_ms / 1e3, shape=Path(config.model).stem)
            scale_on(config, bench, model)
        gc.collect()  # engines hold each other in circles, and the memory of a device
    reached |= {f"{name}_at_the_end": value for name, value in measure().items()}
    return finish(config, save())


def finish(config: ScalingConfig, made: dict[str, Any]) -> int:
    """Writes, draws, prints and checks a whole record: the exit code."""
    for row in made["rows"]:
        if row["name"] in record.DERIVED:
            print(record.line(row), flush=True)
    if config.out:
        results.write(config.out, made)
    if config.plot and not results.save_png(scaling_figure.figure, made, config.plot):
        print(f"{config.plot} was not written: there is no matplotlib here", file=sys.stderr)
        return 1 if config.join else 0
    return 0 if not config.check or results.check(made) else 1


if __name__ == "__main__":
    sys.exit(main())

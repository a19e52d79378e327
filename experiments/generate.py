"""Long and short prompts together on a mesh, shown as they run, and compared with the same on one device.

`python -m experiments.generate --config_path configs/quickstart.yaml` plants a needle in a haystack and retrieves it;
`--model.path DIR --prompt TEXT` (or `--prompt_ids FILE`) continues a prompt with a Hugging Face checkpoint instead.
Exits with 1 if a retrieved value is wrong or a token differs from the unsharded run's, with 2 if it was asked what
cannot be served.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import mnemosyne_jax as mn
from experiments import command_line, results, schedule_picture
from experiments.devices import use_virtual_devices
from experiments.progress import bar
from mnemosyne_jax.serve.batch import Batch


@dataclass(frozen=True)
class ModelChoice:
    """A folder of a Hugging Face checkpoint (None: the embedded retrieval model), and a dtype other than its own."""

    path: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class GenerateConfig:
    """What to generate, from what, on which mesh.

    Without `prompt` (text; needs a tokenizer in the model's folder) or `prompt_ids` (a file of token ids: .npy, JSON,
    or divided by spaces, commas or lines), prompts are haystacks for the embedded model: one of `haystack_tokens` with
    needles at `depths`, which asks for the last of them, and before it `short_requests` of `short_tokens`, whose value
    is `short_new_tokens` long. `compare_unsharded` runs the same on the mesh 1x1x1 with chunks four times as long;
    tokens must be equal, which float32 promises and bfloat16 does not. `virtual_devices` is how many CPU devices to
    pretend (0: use the devices there are). The record goes to `out`, the drawn schedule beside it. `check` prints
    every must.
    """

    model: ModelChoice = ModelChoice()
    mesh: mn.MeshSpec = mn.MeshSpec()
    serve: mn.ServeConfig = mn.ServeConfig()
    prompt: str | None = None
    prompt_ids: str | None = None
    max_new_tokens: int = 32
    haystack_tokens: int = 16384
    depths: tuple[float, ...] = (0.1, 0.5)
    short_requests: int = 0
    short_tokens: int = 300
    short_new_tokens: int = 24
    seed: int = 0
    compare_unsharded: bool = False
    virtual_devices: int = 0
    check: bool = False
    out: str = "out/generate.json"


@dataclass(frozen=True)
class Run:
    """What came of serving the requests on one mesh."""

    mesh: mn.MeshSpec
    answers: dict[str | int, mn.Result]
    batches: list[Batch]
    build_s: float
    serve_s: float


def main(args: Sequence[str] | None = None) -> int:
    """The exit code: 0 if every value and token is right, 1 if not, 2 for a refusal."""
    config: GenerateConfig = command_line.read(GenerateConfig, args)
    begin_s = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 132)
    use_virtual_devices(config.virtual_devices)
    try:
        tokenizer = read_tokenizer(config.model.path)
        requests, expected = make_requests(config, tokenizer)
        run = serve(config.model, config.mesh, config.serve, requests, console)
        unsharded, settings = None, unsharded_serve(config.serve, requests)
        if config.compare_unsharded:
            unsharded = serve(config.model, mn.MeshSpec(), settings, requests, console)
    except mn.RequestError as error:
        console.print(f"refused: {error}", style="red", markup=False)
        return 2
    rows = rows_of(config, requests, expected, run, unsharded)
    rows.append(results.row("run", time.monotonic() - begin_s, "s", mesh=str(config.mesh), aim="<= 120"))
    report(config, requests, expected, run, unsharded, tokenizer, console)
    made = results.document(config, rows)
    console.print(f"[dim]{rows[-1]['value']:.0f} s in all; record in {results.write(config.out, made)}")
    if config.check:
        results.check(made)
    right = all(results.keeps(r["value"], r["must"]) for r in rows if "must" in r)
    console.print("[bold green]right" if right else "[bold red]WRONG: a value or a token is not what it must be")
    return 0 if right else 1


def read_tokenizer(folder: str | None) -> Any:
    """The tokenizer in a checkpoint's folder; None if there is none."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if folder is None or not any((Path(folder) / name).exists() for name in names):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def make_requests(config: GenerateConfig, tokenizer: Any) -> tuple[list[mn.Request], dict[str, list[int]]]:
    """The requests in the order they are submitted, and the tokens that must come out of those with a known answer."""
    if config.prompt_ids is not None:
        return [mn.Request("prompt", read_ids(config.prompt_ids), config.max_new_tokens)], {}
    if config.prompt is not None:
        if tokenizer is None:
            raise mn.RequestError("prompt", config.prompt, "needs a tokenizer in the model's folder; or use prompt_ids")
        return [mn.Request("prompt", tokenizer(config.prompt)["input_ids"], config.max_new_tokens)], {}
    if config.model.path is not None:
        raise mn.RequestError("prompt", None, "a checkpoint needs --prompt TEXT or --prompt_ids FILE")
    requests, expected = [], {}
    for n in range(config.short_requests):
        id, seed, count = f"short {n + 1}", config.seed + 1 + n, config.short_new_tokens
        ids, expected[id] = mn.needle_prompt(config.short_tokens, [0.5], seed=seed, values=count - 1)
        requests.append(mn.Request(id, ids, count, stop_ids=()))
    ids, values = mn.needle_prompt(config.haystack_tokens, config.depths, seed=config.seed)
    expected["haystack"] = values[: config.max_new_tokens]
    # Submitted last: a prompt in front would take the whole chunk budget until it ends.
    return [*requests, mn.Request("haystack", ids, config.max_new_tokens)], expected


def read_ids(path: str) -> np.ndarray:
    """Token ids from a file: .npy, a JSON list, or numbers divided by spaces, commas or lines."""
    try:
        if path.endswith(".npy"):
            return np.load(path, allow_pickle=False)
        text = Path(path).read_text()
        if text.lstrip().startswith("["):
            return np.array(json.loads(text))
        return np.array([int(word) for word in text.replace(",", " ").split()])
    except (OSError, ValueError) as error:
        raise mn.RequestError("prompt_ids", path, f"must be a readable file of token ids ({error})") from None


def unsharded_serve(settings: mn.ServeConfig, requests: Sequence[mn.Request]) -> mn.ServeConfig:
    """Settings for the mesh 1x1x1: room for all requests at once, chunks four times as long."""
    pages = sum(-(-request.total_tokens // settings.page_tokens) for request in requests)
    rows, tokens = max(settings.private_rows, len(requests)), 4 * settings.chunk_tokens
    return replace(settings, pool_pages=pages, private_rows=rows, chunk_tokens=tokens, chunk_buckets=(tokens,))


def serve(
    model: ModelChoice, mesh: mn.MeshSpec, settings: mn.ServeConfig, requests: Sequence[mn.Request], console: Console
) -> Run:
    """What came of the requests on `mesh`, shown as it goes."""
    if model.path is None:
        engine, name = mn.Engine.needle(mesh, settings, model.dtype or "float32"), "the embedded retrieval model"
    else:
        engine, name = mn.Engine.load(model.path, mesh, settings, model.dtype), model.path
    device = engine.mesh.devices.flat[0].device_kind
    console.print(f"{name}, {engine.executor.dtype}, on {mesh} = {mesh.devices} x {device}", style="bold", markup=False)
    begin_s = time.monotonic()
    with bar(console, "building", "programs") as show:
        engine.warmup(show)
    engine.loop.keep_batches, built_s = True, time.monotonic()
    handles = {request.id: engine.submit(request) for request in requests}
    longest = max(handles.values(), key=lambda handle: len(handle.request.prompt))
    with bar(console, "prefill ", "tokens") as show:
        while not all(handle.finished for handle in handles.values()):
            engine.tick()
            prefill = longest.progress()
            beside = ", ".join(f"{id} {len(handle.tokens)}" for id, handle in handles.items())
            rest = f"{prefill.eta_s:.0f} s to go; " if prefill.eta_s > 0 else ""
            pace = prefill.processed / max(prefill.elapsed_s, 1e-9)
            show(prefill.processed, prefill.total, f"{pace:,.0f} tokens/s, {rest}new tokens: {beside}")
    answers, end_s = {id: handle.result() for id, handle in handles.items()}, time.monotonic()
    return Run(mesh, answers, engine.loop.batches, build_s=built_s - begin_s, serve_s=end_s - built_s)


def verdicts(id: str, expected: dict[str, list[int]], run: Run, unsharded: Run | None) -> dict[str, bool]:
    """Whether an answer is right and equal to the unsharded run's, as far as that is known."""
    tokens, known = run.answers[id].tokens, {}
    if id in expected:
        known["right"] = tokens == expected[id]
    if unsharded is not None:
        known["= unsharded"] = tokens == unsharded.answers[id].tokens
    return known


def times(answer: mn.Result) -> dict[str, float | None]:
    """TTFT, and the median and 99th percentile of the time between tokens; None where there are too few tokens."""
    gaps = answer.timeline.tbt_s
    median, high = np.percentile(gaps, [50, 99]).tolist() if len(gaps) else (None, None)
    return {"TTFT": answer.timeline.ttft_s if answer.tokens else None, "TBT p50": median, "TBT p99": high}


def rows_of(config: GenerateConfig, requests, expected, run: Run, unsharded: Run | None) -> list[dict[str, Any]]:
    """The record's rows: for each request what came out, whether that is right, and its times."""
    rows = []
    for request in requests:
        answer, mesh = run.answers[request.id], str(run.mesh)
        where: dict[str, Any] = dict(context=len(request.prompt), chunk=config.serve.chunk_tokens, mesh=mesh)
        where["request"] = request.id
        rows.append(results.row("tokens", answer.tokens, "token ids", ended=answer.reason, **where))
        rows.append(results.row("failed", int(answer.error is not None), "bool", must="== 0", **where))
        for name, verdict in verdicts(request.id, expected, run, unsharded).items():
            rows.append(results.row(name, int(verdict), "bool", must="== 1", **where))
        rows += [results.row(name, value, "s", **where) for name, value in times(answer).items()]
    return rows


def report(config: GenerateConfig, requests, expected, run: Run, unsharded: Run | None, tokenizer, console) -> None:
    """Prints the schedule, the table of requests, and the answer to a prompt: as text where there is a tokenizer."""
    for line in schedule_picture.lines(run.batches, run.mesh):
        console.print(line, markup=False, highlight=False)
    if schedule_picture.save_png(run.batches, run.mesh, picture := Path(config.out).with_suffix(".png")):
        console.print(f"[dim]drawn in {picture}")
    table = Table("request", "prompt", "retrieved", "expected", "right", "= unsharded", "TTFT", "TBT p50", "TBT p99")
    for request in requests:
        answer, known = run.answers[request.id], verdicts(request.id, expected, run, unsharded)
        tokens = beginning(answer.tokens) if answer.error is None else f"[red]{answer.error}"
        signs = [{True: "[green]yes", False: "[red]NO", None: ""}[known.get(name)] for name in ("right", "= unsharded")]
        seconds = ["" if s is None else f"{s:.2f} s" if s > 1 else f"{1e3 * s:.0f} ms" for s in times(answer).values()]
        size, wanted = f"{len(request.prompt):,}", beginning(expected.get(request.id, []))
        table.add_row(request.id, size, tokens, wanted, *signs, *seconds)
    console.print(table)
    if not expected:
        answered = run.answers["prompt"].tokens
        console.print(answered if tokenizer is None else tokenizer.decode(answered), markup=False, highlight=False)
    for one in filter(None, (run, unsharded)):
        console.print(f"[dim]{one.mesh}: built in {one.build_s:.0f} s, served in {one.serve_s:.1f} s")


def beginning(tokens: Sequence[int], shown: int = 4) -> str:
    return " ".join(map(str, tokens[:shown])) + f" +{len(tokens) - shown}" * (len(tokens) > shown)


if __name__ == "__main__":
    sys.exit(main())

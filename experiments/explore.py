# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A look inside: one model, eight virtual devices, three axes
#
# A retrieval model with constructed weights runs on a mesh of `kvp 2 x spp 2 x tp 2`:
# groups that share the keys and values of a long prompt, stages of layers, shards of heads.
# We see where each array lives, run one tick by hand, find needles, and draw the schedule.
# Nothing is downloaded; the whole takes less than a minute on two cores.

# %%
import os
import sys

if os.path.basename(os.getcwd()) == "experiments":  # Jupyter starts in the notebook's folder
    os.chdir("..")
sys.path.insert(0, os.getcwd())

from experiments.devices import use_virtual_devices

if not use_virtual_devices(8):  # before anything touches a device
    print("on the devices that JAX_PLATFORMS names; the mesh below needs eight")

import jax
import numpy as np

import mnemosyne_jax as mn
from experiments import schedule_picture
from mnemosyne_jax.model.inputs import buffer_words, views
from mnemosyne_jax.packing import pack, smallest_shape

mesh = mn.MeshSpec(kvp=2, spp=2, tp=2)
serve = mn.ServeConfig(page_tokens=64, pool_pages=64, chunk_tokens=256, chunk_buckets=(256,), span_tokens=1024)
engine = mn.Engine.needle(mesh, serve)
engine.loop.keep_batches = True
print(engine.config)
print(f"{mesh} over {jax.device_count()} devices: {jax.devices()[0].device_kind}")

# %% [markdown]
# ## Where arrays live
#
# Every array's dimensions are written in one notation: `head/tp` is split over the axis `tp`.
# Below, each device's part of four arrays. `wqkv` is split by stage and by head, and every group
# has a copy. The vocabulary is split over stages and shards, so no stage carries a whole table.
# Pages of the cache are split over the groups: that is what makes room for a long prompt.

# %%
arrays = {
    "embed  vocab/spp/tp model": engine.params.embed,
    "wqkv   stage/spp model kv_head/tp member head_dim": engine.params.layers[0].wqkv,
    "wo     stage/spp head/tp head_dim model": engine.params.layers[0].wo,
    "kv     layer/spp page/kvp 2 kv_head/tp offset head_dim": engine.executor.target.cache.kv,
}


def parts(array) -> dict:
    """Device -> the index ranges it holds; a dimension that is not split is ':'."""
    return {
        device: ", ".join(":" if part == slice(None) else f"{part.start}:{part.stop}" for part in index)
        for device, index in array.sharding.devices_indices_map(array.shape).items()
    }


for title, array in arrays.items():
    print(f"\n{title}   {array.dtype}{list(array.shape)}")
    held = parts(array)
    for (group, stage, shard), device in np.ndenumerate(engine.mesh.devices):
        print(f"  group {group} stage {stage} shard {shard} = device {device.id}: [{held[device]}]")

# %% [markdown]
# The same as a picture: each cell of `embed` with the devices that hold it (a copy in each group).

# %%
jax.debug.visualize_array_sharding(engine.params.embed)

# %% [markdown]
# ## One tick by hand
#
# A request of 2,048 tokens can outgrow one group's span of 1,024, so it is shared by both groups, pages
# striped between them. `submit` only queues it; a tick schedules a `Batch`, packs it into one int32 buffer
# per device, runs the compiled program and passes the activations one stage on.

# %%
prompt, expected = mn.needle_prompt(2048, depths=[0.5])
handle = engine.submit(mn.Request("by hand", prompt, max_new_tokens=8))
engine.tick()

batch = engine.loop.batches[-1]
for row in batch.chunks:
    held_by = "every group" if row.group is None else f"group {row.group}"
    print(f"tick {batch.tick}: {row.request.id}, tokens {row.start} to {row.end}, slot {row.slot}, {held_by}")
    for span in row.spans:
        first, second = span.start, span.start + span.stride
        print(f"  group {span.group} holds pages {first}, {second}, ...: {len(span.pages)} pages")

# %%
history = [batch, *[type(batch)(-1)] * (mesh.spp - 1)]  # what each stage works on: stage 1 has nothing yet
shape = smallest_shape(engine.executor.shapes, history, mesh.kvp)
inputs = views(shape, pack(shape, history, mesh.kvp))
print(shape)
print(f"StepInputs: {buffer_words(shape)} int32 words to each device, whatever the context; [stage, group, ...]:")
for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
    print(f"  {jax.tree_util.keystr(path):24} {leaf.dtype!s:8} {leaf.shape}")

# %% [markdown]
# The next tick sends chunk 2 into stage 0 while chunk 1 is in stage 1: no chunk waits for a token.
# `handle.progress()` counts what came back (its seconds hold the compilation of the first tick's program);
# the rest of the ticks run when we ask for the result.

# %%
for _ in range(3):
    engine.tick()
    print(handle.progress())
result = handle.result()
print("retrieved", result.tokens, "expected", expected, f"TTFT {result.timeline.ttft_s:.2f} s")
assert result.tokens == expected

# %% [markdown]
# ## Needles at several depths
#
# They prefill one after another (`shared_chunks` is 1); each decodes beside the chunks of the next.

# %%
depths = [0.0, 0.25, 0.6, 1.0]
planted = [mn.needle_prompt(3000, [depth], seed=n) for n, depth in enumerate(depths, start=1)]
found = engine.generate([prompt for prompt, _ in planted], max_new_tokens=8)
for depth, result, (_, expected) in zip(depths, found, planted, strict=True):
    verdict = "right" if result.tokens == expected else "WRONG"
    print(f"depth {depth:4.2f}: retrieved {result.tokens}, expected {expected}: {verdict}")
    assert result.tokens == expected

# %% [markdown]
# ## The schedule
#
# Time runs down; stages of each group are columns. Capitals are chunks, small letters decodes. One
# request alone takes chunks + (spp - 1) + (new tokens - 1) * spp ticks.

# %%
print("\n".join(schedule_picture.lines(engine.loop.batches, mesh)))

# %%
try:
    from IPython.display import display

    display(schedule_picture.figure(engine.loop.batches, mesh))
except ImportError:
    print("matplotlib draws this as a picture")

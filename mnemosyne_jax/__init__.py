"""Exact serving of very long prompts beside short ones: chunks, a sequence pipeline, a cache spread over groups."""

from mnemosyne_jax.api import Engine, Handle, Progress, Result
from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, RopeConfig, ServeConfig, from_yaml
from mnemosyne_jax.errors import GenerationError, RequestError
from mnemosyne_jax.functions import Cache, decode_step, init_cache, prefill_chunk
from mnemosyne_jax.mesh import make_mesh, start_processes
from mnemosyne_jax.needle import prompt as needle_prompt
from mnemosyne_jax.planning import Plan, plan
from mnemosyne_jax.serve.request import Request, Timeline

__all__ = [
    "Cache",
    "Engine",
    "GenerationError",
    "Handle",
    "HardwareConfig",
    "MeshSpec",
    "ModelConfig",
    "Plan",
    "Progress",
    "Request",
    "RequestError",
    "Result",
    "RopeConfig",
    "ServeConfig",
    "Timeline",
    "decode_step",
    "from_yaml",
    "init_cache",
    "make_mesh",
    "needle_prompt",
    "plan",
    "prefill_chunk",
    "start_processes",
]

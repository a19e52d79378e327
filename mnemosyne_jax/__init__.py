"""Exact serving of very long prompts beside short ones: adaptive chunks, a sequence pipeline, a cache spread over groups."""

from mnemosyne_jax.api import Engine, Handle, Progress, Result
from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, RopeConfig, ServeConfig
from mnemosyne_jax.errors import GenerationError, RequestError
from mnemosyne_jax.needle import prompt as needle_prompt
from mnemosyne_jax.serve.request import Request, Timeline

__all__ = [
    "Engine",
    "GenerationError",
    "Handle",
    "HardwareConfig",
    "MeshSpec",
    "ModelConfig",
    "Progress",
    "Request",
    "RequestError",
    "Result",
    "RopeConfig",
    "ServeConfig",
    "Timeline",
    "needle_prompt",
]

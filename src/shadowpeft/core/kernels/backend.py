"""Which implementation runs a step, and why."""

import importlib.util
from functools import cache

import torch

from shadowpeft.core.config import ShadowConfig
from shadowpeft.core.kernels.masks import DEVICE_TYPES

# Per program, Triton keeps [tokens, r] and [tokens, h_g] tiles in registers.
_WIDEST_TILE = 128


def step_backend(
    config: ShadowConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    needs_grad: bool = True,
) -> tuple[str, str]:
    """(name, reason): how the steps of ``config`` run on ``device``.

    ``triton``: one kernel forward, two backward. ``recompute``: one autograd node made of torch operations that
    keeps no intermediate. ``autograd``: the equations one after the other.

    Args:
        device, dtype: of the base's hidden states.
        training: whether dropout is in effect.
        needs_grad: whether a backward pass will follow.
    """
    device = torch.device(device)
    if torch.compiler.is_compiling():
        return "autograd", "inside torch.compile, whose partitioner decides what to keep and what to recompute"
    if not needs_grad:
        return "autograd", "no gradient is needed, so nothing would be kept anyway"
    drops = training and config.shadow_dropout > 0
    if drops and device.type not in DEVICE_TYPES:
        return "autograd", f"dropout masks cannot be drawn a second time on {device.type!r}"
    obstacle = triton_obstacle(config, device=device, dtype=dtype, drops=drops)
    if obstacle is None:
        return "triton", "NVIDIA GPU and a variant the kernels cover"
    return "recompute", f"no Triton kernel: {obstacle}"


def triton_obstacle(config: ShadowConfig, *, device: torch.device, dtype: torch.dtype, drops: bool) -> str | None:
    """Why the Triton kernels cannot run this step, or None if they can."""
    if device.type != "cuda":
        return f"the device is {device.type!r}, not an NVIDIA GPU"
    if torch.version.hip is not None:
        return "untested on AMD GPUs"
    if not has_triton():
        return "the package triton is not installed"
    return variant_obstacle(config, dtype=dtype, drops=drops)


def variant_obstacle(config: ShadowConfig, *, dtype: torch.dtype, drops: bool) -> str | None:
    """Why no kernel was written for this variant, or None if one was."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"hidden states in {dtype}"
    if config.adapter_dtype == "float64":
        return "weights in float64"
    if config.inject_activation != "none":
        return "an activation in the bottleneck"
    if config.inject_branch:
        return "a correction that reads the branch in front of it"
    if config.inject_diagonal and config.diagonal_ratio != 1.0:
        return "a diagonal of another weight than the bottleneck"
    if drops and config.dropout_at == "input":
        return "dropout on the input of W_down needs a mask as wide as the model"
    widest = max(config.r, config.update_hidden_size)
    return f"r or h_g above {_WIDEST_TILE}" if widest > _WIDEST_TILE else None


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None

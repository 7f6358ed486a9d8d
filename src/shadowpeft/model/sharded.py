"""Weights that several processes hold in parts (FSDP2): told from whole ones, gathered, and filled again."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all parts of a sharded one; every process has to call it then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_state(module: nn.Module) -> dict[str, Tensor]:
    """``state_dict()`` with whole tensors, in the memory of the first process. Every process has to call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)  # type: ignore[return-value]


def fill(module: nn.Module, tensors: dict[str, Any]) -> None:
    """``load_state_dict`` of whole tensors, which every process has, into a module that may be sharded."""
    if is_sharded(module):
        set_model_state_dict(module, tensors, options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(tensors)

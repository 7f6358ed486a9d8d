"""How a run reaches the blocks: one stateless forward pre-hook on each."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from shadowpeft.errors import AdapterError
from shadowpeft.model.architectures import blocks_of, decoder_of

RUN_KEYWORD = "shadow_run"


class StepHook:
    """Takes the run out of a block's keywords and corrects the block's input; without a run it does nothing."""

    def __init__(self, block_index: int) -> None:
        self.block_index = block_index

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        run = kwargs.get(RUN_KEYWORD)
        if run is None:
            return None
        rest = {name: value for name, value in kwargs.items() if name != RUN_KEYWORD}
        if args:
            return (run.step(self.block_index, args[0]), *args[1:]), rest
        return args, {**rest, "hidden_states": run.step(self.block_index, rest["hidden_states"])}


class Hooks:
    """All hooks on one base. They go with the last model that holds them, whom nobody could ask to ``unload()`` afterwards."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def __del__(self) -> None:
        self.remove()


def is_attached(base: PreTrainedModel) -> bool:
    return any(isinstance(hook, StepHook) for hook in blocks_of(decoder_of(base))[0]._forward_pre_hooks.values())


def attach(base: PreTrainedModel) -> Hooks:
    """Hooks every block of ``base``; its weights and ``state_dict`` keys stay as they are.

    Raises:
        AdapterError: the base already carries a shadow.
    """
    if is_attached(base):
        raise AdapterError(
            "this base already carries a shadow model; give that model another adapter with add_adapter(name, config), "
            "or free the base first with unload()"
        )
    return Hooks([
        block.register_forward_pre_hook(StepHook(index), with_kwargs=True)
        for index, block in enumerate(blocks_of(decoder_of(base)))
    ])

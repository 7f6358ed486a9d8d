"""How a run reaches the blocks: one stateless forward pre-hook on each, and a hook on its attention where it can help."""

from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from shadowpeft.errors import AdapterError
from shadowpeft.model.architectures import attentions_of, blocks_of, decoder_of

RUN_KEYWORD = "shadow_run"


class StepHook:
    """Takes the run out of a block's keywords and corrects the block's input; without a run it does nothing.

    A run that also corrects what attention adds stays among the keywords, which the block hands on to its attention.

    Attributes:
        owner: the :class:`Hooks` that will remove it. A copy has none until a copy of the owner takes it, which a copy of the
            base alone has not with it.
    """

    def __init__(self, block_index: int) -> None:
        self.block_index = block_index
        self.owner: ref[Hooks] | None = None

    def __reduce__(self) -> tuple[type["StepHook"], tuple[int]]:
        return type(self), (self.block_index,)

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        run = kwargs.get(RUN_KEYWORD)
        if run is None:
            return None
        rest = {name: value for name, value in kwargs.items() if name != RUN_KEYWORD or run.corrects_between}
        if args:
            return (run.step(self.block_index, args[0]), *args[1:]), rest
        return args, {**rest, "hidden_states": run.step(self.block_index, rest["hidden_states"])}


class BetweenHook(StepHook):
    """Corrects what attention adds to the residual stream, for a run that asks for it."""

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:  # type: ignore[override]
        run = kwargs.get(RUN_KEYWORD)
        if run is None:
            return None
        if isinstance(output, Tensor):
            return run.between(self.block_index, output)
        return (run.between(self.block_index, output[0]), *output[1:])


class Hooks:
    """All hooks on one base. They go with the last model that holds them, whom nobody could ask to ``unload()`` afterwards."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self.handles = handles
        for handle in handles:
            hook = (handle.hooks_dict_ref() or {}).get(handle.id)
            if hook is not None:  # else it was removed before the model was copied
                hook.owner = ref(self)

    def __reduce__(self) -> tuple[type["Hooks"], tuple[list[RemovableHandle]]]:
        return Hooks, (self.handles,)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def __del__(self) -> None:
        self.remove()


def _step_hooks(base: PreTrainedModel) -> list[tuple[tuple[dict, dict], int, StepHook]]:
    """(the dicts of a module that know a hook, key, hook) of all hooks on ``base``."""
    decoder = decoder_of(base)
    dicts = [(block._forward_pre_hooks, block._forward_pre_hooks_with_kwargs) for block in blocks_of(decoder)]
    dicts += [(module._forward_hooks, module._forward_hooks_with_kwargs) for module in attentions_of(decoder)]
    found = [(known, key, hook) for known in dicts for key, hook in known[0].items()]
    return [(known, key, hook) for known, key, hook in found if isinstance(hook, StepHook)]


def is_attached(base: PreTrainedModel) -> bool:
    return any(hook.owner is not None and hook.owner() is not None for _, _, hook in _step_hooks(base))


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
    for known, key, _ in _step_hooks(base):  # on a copy of a base, made without the model on it
        for hooks in known:
            del hooks[key]
    decoder = decoder_of(base)
    return Hooks([
        *(
            block.register_forward_pre_hook(StepHook(index), with_kwargs=True)
            for index, block in enumerate(blocks_of(decoder))
        ),
        *(
            module.register_forward_hook(BetweenHook(index), with_kwargs=True)
            for index, module in enumerate(attentions_of(decoder))
        ),
    ])

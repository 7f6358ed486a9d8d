"""A frozen base, hooked once, and the networks of any number of adapters: adding, choosing, counting, taking off."""

from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from shadowpeft.core import ShadowConfig, ShadowNetwork
from shadowpeft.errors import AdapterError
from shadowpeft.model.architectures import check_base
from shadowpeft.model.attach import attach
from shadowpeft.model.build import build_network, set_trainable
from shadowpeft.model.rates import watch
from shadowpeft.model.selection import BASE, override_for, using


class AdaptedModel(PreTrainedModel):
    """A base with named adapters, one of them active.

    Behaves as a ``PreTrainedModel`` with the base's config. The weights of the base are frozen and its
    ``state_dict`` keys unchanged (under ``base.``); the adapters' are under ``networks.NAME.``.
    """

    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, base: PreTrainedModel, config: ShadowConfig | None = None, adapter_name: str = "default") -> None:
        check_bare(base)
        check_base(base, first_block=0)
        check_name(adapter_name)
        super().__init__(base.config)
        self.base = base
        if getattr(base, "hf_device_map", None) is not None:
            self.hf_device_map = base.hf_device_map  # by which transformers' Trainer knows not to move it
        self.networks = nn.ModuleDict()
        self.active_adapter = adapter_name
        if config is not None:
            self._register(adapter_name, build_network(base, config))
        self._hooks = attach(base)
        self._is_on_base = True  # beside the hooks, which torch.compile cannot look at
        base.requires_grad_(False)  # behind all that may refuse it, which leaves it as it was
        self.post_init()
        if self.can_generate():
            self.generation_config = base.generation_config
        self.train(base.training)

    def init_weights(self) -> None:
        """Nothing: the base is trained and every network initialises itself."""

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        return attn_implementation  # the base chose it already

    def _check_and_adjust_experts_implementation(self, experts_implementation: str | None) -> Any:
        return experts_implementation

    def add_adapter(self, adapter_name: str, config: ShadowConfig) -> None:  # type: ignore[override]
        """Adds a fresh adapter and leaves the active one as it is.

        Raises:
            AdapterError: the name is taken or not usable as one.
        """
        self._check_new_name(adapter_name)
        self._register(adapter_name, build_network(self.base, config))

    def _register(self, adapter_name: str, network: ShadowNetwork) -> None:
        set_trainable(network, adapter_name == self.active_adapter)
        self.networks[adapter_name] = network.train(self.training)
        watch(network)

    def _check_new_name(self, adapter_name: str) -> None:
        if adapter_name in self.networks:
            raise AdapterError(
                f"there is already an adapter {adapter_name!r}; give this one another name, as in adapter_name='other', or "
                f"take that one away with delete_adapter({adapter_name!r})"
            )
        check_name(adapter_name)

    def set_adapter(self, adapter_name: str) -> None:  # type: ignore[override]
        """Makes an adapter the one that calls use and that is trained; the others are frozen."""
        self.network(adapter_name)
        self.active_adapter = adapter_name
        for name in self.networks:
            set_trainable(self.network(name), name == adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:  # type: ignore[override]
        """Removes an adapter.

        Raises:
            AdapterError: it is unknown or the active one.
        """
        self.network(adapter_name)
        if adapter_name == self.active_adapter:
            raise AdapterError(f"adapter {adapter_name!r} is active; choose another with set_adapter(name) first")
        del self.networks[adapter_name]

    def network(self, adapter_name: str | None = None) -> ShadowNetwork:
        """The network of an adapter (default: the active one)."""
        name = self.active_adapter if adapter_name is None else adapter_name
        if name not in self.networks:
            raise AdapterError(f"no adapter {name!r}; there are: {', '.join(self.networks) or 'none'}")
        return self.networks[name]  # type: ignore[return-value]

    def active_adapters(self) -> list[str]:
        return [self.active_adapter]

    @property
    def shadow_config(self) -> ShadowConfig:
        return self.network().config

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Within the block, calls of this thread run the untouched base."""
        return using(self, BASE)

    def using_adapter(self, adapter_name: str) -> AbstractContextManager[None]:
        """Within the block, calls of this thread use the named adapter; other threads are not affected."""
        self.network(adapter_name)
        return using(self, adapter_name)

    def _chosen(self, adapter: str | None) -> ShadowNetwork | None:
        """The network of a call; None for the untouched base."""
        name = adapter or override_for(self) or self.active_adapter
        return None if name == BASE else self._attached(name)

    def _attached(self, adapter_name: str | None = None) -> ShadowNetwork:
        """The network of an adapter (default: the active one), for a call.

        Raises:
            AdapterError: :meth:`unload` took the hooks off, without which the base would go on uncorrected.
        """
        if not self._is_on_base:
            raise AdapterError(
                "unload() took this shadow model off its base, so a call would get the base's output; call the base itself, or "
                "adapt it anew with get_shadow_model(base, config) or ShadowModel.from_pretrained(FOLDER, base)"
            )
        return self.network(adapter_name)

    def unload(self) -> PreTrainedModel:
        """Takes the hooks off and returns the base, bit for bit what it was. This model cannot be called afterwards."""
        self._hooks.remove()
        self._is_on_base = False
        return self.base

    def merge_and_unload(self) -> None:
        raise NotImplementedError(
            "a shadow cannot be merged: its correction depends on the input. Use detach() for the stand-alone shadow "
            "or unload() for the base"
        )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base.get_output_embeddings()

    def resize_token_embeddings(  # type: ignore[override]
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As in transformers, for the base; the shadows, which read the base's table, follow. Returns the base's table.

        Raises:
            AdapterError: an adapter has a table of its own; nothing is changed then.
        """
        is_change = new_num_tokens is not None or pad_to_multiple_of is not None
        own = [name for name in self.networks if not self.network(name).config.shares_embeddings]
        if is_change and own:
            raise AdapterError(
                f"adapter {own[0]!r} has a token table of its own, which would not follow the base's; resize the base, and the "
                "model that the shadow comes from, before get_shadow_model"
            )
        table = self.base.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for name in self.networks:
            self.network(name).backbone.config.vocab_size = self.base.config.vocab_size
        return table

    def get_base_model(self) -> PreTrainedModel:
        return self.base


def check_bare(base: Any) -> None:
    """Refuses what is adapted or wrapped already.

    Raises:
        AdapterError: it is a shadow model, or no model of transformers but one around it, such as PEFT's.
    """
    if isinstance(base, AdaptedModel):
        raise AdapterError(
            f"{type(base).__name__} carries a shadow already; give it another adapter with add_adapter(name, config) or "
            "load_adapter(FOLDER, name), or take it off first: base = model.unload()"
        )
    if not isinstance(base, PreTrainedModel):
        raise AdapterError(
            f"a base is a loaded model of transformers, not {type(base).__name__}; of a PEFT model pass what "
            "merge_and_unload() or unload() returns, of another wrapper the model within"
        )


def check_name(adapter_name: str) -> None:
    """Refuses what cannot be a key of a ``ModuleDict``, part of a file name, or told from the base.

    Raises:
        AdapterError: it is not usable as the name of an adapter.
    """
    is_plain = bool(adapter_name) and adapter_name.isprintable() and not set("./\\") & set(adapter_name)
    # A ModuleDict has its modules beside its own attributes: train, update, half, keys, ...
    if not is_plain or adapter_name == BASE or hasattr(nn.ModuleDict(), adapter_name):
        raise AdapterError(
            f"{adapter_name!r} cannot name an adapter: it is empty, holds a dot or a slash, or is reserved, as {BASE!r} and "
            "the attributes of torch's modules are ('train', 'update', 'half', ...); take another name"
        )

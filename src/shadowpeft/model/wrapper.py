"""The models that users hold: a frozen base, hooked once, and one network for every adapter."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from shadowpeft.core import ShadowConfig, ShadowNetwork, ShadowRun
from shadowpeft.errors import AdapterError
from shadowpeft.model import checkpoint, detach
from shadowpeft.model.architectures import check_base, decoder_of
from shadowpeft.model.attach import attach
from shadowpeft.model.build import build_network, set_trainable
from shadowpeft.model.cache import shadow_view
from shadowpeft.model.selection import BASE, override_for, using
from shadowpeft.model.sharded import gathered_state

# Asked of the base alone: the shadow has its own blocks, whose attention maps nobody ordered.
_BASE_ONLY = ("output_attentions", "output_hidden_states", "output_router_logits", "return_dict")


class ShadowModel(PreTrainedModel):
    """What both task models share: adapters, their choice, saving, loading, detaching.

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

    def __init__(
        self, base: PreTrainedModel, config: ShadowConfig | None = None, adapter_name: str = "default"
    ) -> None:
        check_base(base, first_block=0)
        super().__init__(base.config)
        self.base = base.requires_grad_(False)
        self.networks = nn.ModuleDict()
        self.active_adapter = adapter_name
        if config is not None:
            self._register(adapter_name, build_network(base, config))
        self._handles = attach(base)
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

    # ---------------------------------------------------------------- adapters

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

    def _check_new_name(self, adapter_name: str) -> None:
        if adapter_name in self.networks:
            raise AdapterError(f"there is already an adapter {adapter_name!r}; delete it first or take another name")
        if adapter_name == BASE or not adapter_name or not adapter_name.isprintable() or set("./\\") & set(adapter_name):
            raise AdapterError(f"{adapter_name!r} cannot name an adapter: it is empty, reserved or holds a dot or a slash")

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
        return None if name == BASE else self.network(name)

    def unload(self) -> PreTrainedModel:
        """Takes the hooks off and returns the base, bit for bit what it was. This model is unusable afterwards."""
        for handle in self._handles:
            handle.remove()
        return self.base

    def merge_and_unload(self) -> None:
        raise NotImplementedError(
            "a shadow cannot be merged: its correction depends on the input. Use detach() for the stand-alone shadow "
            "or unload() for the base"
        )

    def detach(self, adapter_name: str | None = None) -> PreTrainedModel:
        """The shadow alone, as an ordinary model of its own class: ``head(proj(f_shadow(x)))``, projection folded in.

        Where shapes allow it shares the embedding and head tensors with the base; ``save_pretrained`` writes them.
        """
        return detach.detached_model(self.base, self.network(adapter_name))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    # ---------------------------------------------------------------- saving and loading

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        """Writes the adapter only: ``shadow_config.json``, ``shadow_model.safetensors`` and a model card.

        Files appear complete or not at all. ``push_to_hub=True`` uploads the folder afterwards.
        ``share_backbone=True`` leaves out what is unchanged from a pretrained shadow.
        """
        if not kwargs.get("is_main_process", True):
            return
        name = self.active_adapter if adapter_name is None else adapter_name
        state = kwargs.get("state_dict")
        if state is not None:
            prefix = f"networks.{name}."
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        folder = Path(save_directory)
        share_backbone = bool(kwargs.get("share_backbone"))
        description = kwargs.get("base_description")
        checkpoint.save_adapter(
            self.base,
            self.network(name),
            folder,
            state,
            share_backbone=share_backbone,
            base_description=description,
        )
        if kwargs.get("push_to_hub"):
            options = {key: kwargs[key] for key in ("token", "commit_message") if key in kwargs}
            checkpoint.upload(folder, kwargs.get("repo_id") or folder.name, **options)

    def save_sharded(self, save_directory: str | Path, *, is_main_process: bool, **kwargs: Any) -> None:
        """As :meth:`save_pretrained`, called by every process that holds a part of the weights; the main one writes.

        Only the adapter is gathered, and of the base the few tensors by which it is known again.
        """
        network = self.network(kwargs.get("adapter_name"))
        state, description = gathered_state(network), checkpoint.describe_base(self.base)
        prefix = f"networks.{kwargs.get('adapter_name') or self.active_adapter}."
        self.save_pretrained(
            save_directory,
            state_dict={prefix + name: tensor for name, tensor in state.items()},
            base_description=description,
            is_main_process=is_main_process,
            **kwargs,
        )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """Uploads the active adapter (``adapter_name=`` for another). Returns the commit's address."""
        options = {name: kwargs.pop(name, None) for name in ("token", "commit_message")}
        return checkpoint.push_adapter(
            self.base, self.network(kwargs.pop("adapter_name", None)), repo_id, **options, **kwargs
        )

    def load_adapter(  # type: ignore[override]
        self,
        adapter_path: str | Path,
        adapter_name: str = "default",
        *,
        is_trainable: bool = False,
        allow_other_weights: bool = False,
        shadow_model: str | None = None,
        **hub_options: Any,
    ) -> None:
        """Adds a saved adapter under ``adapter_name``.

        Args:
            adapter_path: folder or hub name.
            is_trainable: leave its weights trainable if it is the active one.
            allow_other_weights: load even if the base's weights differ from those it was trained on.
            shadow_model: where the pretrained shadow is now, if the adapter was saved without its weights.

        Raises:
            CheckpointError: the adapter is damaged or made for another base; nothing is changed then.
        """
        self._check_new_name(adapter_name)
        network = checkpoint.load_adapter(
            self.base,
            adapter_path,
            allow_other_weights=allow_other_weights,
            shadow_model=shadow_model,
            **hub_options,
        )
        self._register(adapter_name, network)
        if not is_trainable:
            network.requires_grad_(False)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        adapter_path: str | Path,
        base: PreTrainedModel | None = None,
        *,
        adapter_name: str = "default",
        is_trainable: bool = False,
        allow_other_weights: bool = False,
        shadow_model: str | None = None,
        hub_options: dict[str, Any] | None = None,
        **base_options: Any,
    ) -> "ShadowModel":
        """Loads an adapter onto ``base``, or onto the base it names (``base_options`` go to its from_pretrained)."""
        hub_options = hub_options or {}
        if base is None:
            base = checkpoint.load_base(adapter_path, hub_options, **base_options)
        network = checkpoint.load_adapter(
            base, adapter_path, allow_other_weights=allow_other_weights, shadow_model=shadow_model, **hub_options
        )
        task_class = model_class_for(base) if cls is ShadowModel else cls
        model = task_class(base, None, adapter_name)
        model._register(adapter_name, network)
        if not is_trainable:
            network.requires_grad_(False)
        return model.eval()

    # ---------------------------------------------------------------- what the ecosystem asks for

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base.get_output_embeddings()

    def get_base_model(self) -> PreTrainedModel:
        return self.base

    # ---------------------------------------------------------------- the attached pass

    def _run_attached(
        self,
        network: ShadowNetwork,
        *,
        input_ids: Tensor | None,
        attention_mask: Any,
        inputs_embeds: Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool,
        **kwargs: Any,
    ) -> tuple[Any, Tensor]:
        """(output of the base's decoder, s(0) [B, T, d])."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        shared = {"attention_mask": attention_mask, "use_cache": use_cache}
        initial = self._initial_state(
            network, input_ids, inputs_embeds, past_key_values, shared | _without(kwargs, _BASE_ONLY)
        )
        output = decoder_of(self.base)(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            shadow_run=ShadowRun(network, initial),
            **shared,
            **kwargs,
        )
        return output, initial

    def _initial_state(
        self,
        network: ShadowNetwork,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Eq. 1 and 10: s(0), [B, T, d], in the base's dtype."""
        backbone = network.backbone
        if past_key_values is not None:
            view = shadow_view(past_key_values, base=decoder_of(self.base).config, shadow=backbone.config)
            kwargs = kwargs | {"past_key_values": view}
        if inputs_embeds is None and network.config.shares_embeddings:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if inputs_embeds is None:
            hidden = backbone(input_ids=input_ids, **kwargs).last_hidden_state
        else:
            embeds = inputs_embeds.to(network.dtype)
            if network.embedding_projection is not None:
                embeds = network.embedding_projection(embeds)
            hidden = backbone(inputs_embeds=embeds, **kwargs).last_hidden_state
        return network.project(hidden).to(self.base.dtype)

    def _default_use_cache(self, use_cache: bool | None, labels: Tensor | None) -> bool:
        if use_cache is not None:
            return use_cache
        return bool(self.config.use_cache) and labels is None and not self.training


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def model_class_for(base: PreTrainedModel) -> type[ShadowModel]:
    from shadowpeft.model.tasks import task_model_class  # the task models subclass ShadowModel

    return task_model_class(base)

"""The models that users hold: a base with its adapters, which can be saved, loaded, detached and run."""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from shadowpeft.core import ShadowConfig, ShadowNetwork, ShadowRun
from shadowpeft.core.needed_rows import only_rows, row_wise_weights
from shadowpeft.errors import AdapterError, ConfigError
from shadowpeft.model import checkpoint, detach
from shadowpeft.model.adapter_config import describe_base
from shadowpeft.model.adapters import AdaptedModel, check_bare
from shadowpeft.model.architectures import blocks_of, decoder_of
from shadowpeft.model.attach import RUN_KEYWORD
from shadowpeft.model.cache import CACHE, shadow_view
from shadowpeft.model.hub import upload
from shadowpeft.model.sharded import gathered_state

# Asked of the base alone: the shadow has its own blocks, whose attention maps nobody ordered.
_REPORTS = ("output_attentions", "output_hidden_states", "output_router_logits")
_BASE_ONLY = (*_REPORTS, "return_dict")
# How transformers writes the files of a whole model; an adapter's are written in one way.
_WRITING_OPTIONS = (
    "max_shard_size", "variant", "safe_serialization", "save_function", "save_peft_format", "save_original_format",
    "distributed_checkpoint",
)  # fmt: skip
_UPLOAD_OPTIONS = ("token", "commit_message", "private", "revision", "create_pr")
# What torch.compile and data-parallel wrappers put in front of the names of a model's tensors.
_WRAPPERS = ("_orig_mod.", "module.")


class ShadowModel(AdaptedModel):
    """What both task models share: saving, loading, detaching, and the pass of base and shadow."""

    def __init__(self, base: PreTrainedModel, config: ShadowConfig | None = None, adapter_name: str = "default") -> None:
        expected = model_class_for(base)
        if not isinstance(self, expected):
            raise AdapterError(
                f"{type(self).__name__} does not fit the base {type(base).__name__}; use {expected.__name__}, or let "
                "get_shadow_model and ShadowModel.from_pretrained choose the class"
            )
        super().__init__(base, config, adapter_name)

    def detach(self, adapter_name: str | None = None) -> PreTrainedModel:
        """The shadow alone, as an ordinary model of its own class: ``head(proj(f_shadow(x)))``, projection folded in.

        Where nothing is folded into them and the dtypes agree, it shares the memory of the base's embeddings and head (one
        tensor where the base ties them), in modules of its own: casting, moving or thawing it leaves the base alone, but copy
        it before training these two. In another dtype both are copies. ``save_pretrained`` writes them.
        """
        return detach.detached_model(self.base, self.network(adapter_name))

    # ---------------------------------------------------------------- saving and loading

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        adapter_name: str | None = None,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        share_backbone: bool = False,
        base_description: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the adapter only: ``shadow_config.json``, ``shadow_model.safetensors`` and a model card.

        Files appear complete or not at all.

        Args:
            state_dict: of this model, gathered or unwrapped by a trainer; None: the weights as they are.
            share_backbone: leave out what is unchanged from a pretrained shadow.
            push_to_hub: upload the folder afterwards, as ``repo_id`` (default: the folder's name), with ``token``,
                ``commit_message``, ``private``, ``revision`` and ``create_pr`` as in :meth:`push_to_hub`.

        Raises:
            CheckpointError: ``state_dict`` holds another set of tensors than the adapter; nothing is written then.
            TypeError: an argument that neither this method nor transformers' has; nothing is written then.
        """
        unknown = sorted(kwargs.keys() - {*_WRITING_OPTIONS, *_UPLOAD_OPTIONS})
        if unknown:
            raise TypeError(f"save_pretrained() got an unexpected keyword argument {unknown[0]!r}")
        if not is_main_process:
            return
        name = self.active_adapter if adapter_name is None else adapter_name
        folder = Path(save_directory)
        checkpoint.save_adapter(
            self.base,
            self.network(name),
            folder,
            None if state_dict is None else _adapter_part(state_dict, name),
            share_backbone=share_backbone,
            base_description=base_description,
        )
        if push_to_hub:
            upload(folder, repo_id or folder.name, **_without(kwargs, _WRITING_OPTIONS))

    def save_sharded(self, save_directory: str | Path, *, is_main_process: bool, **kwargs: Any) -> None:
        """As :meth:`save_pretrained`, called by every process that holds a part of the weights; the main one writes.

        Only the adapter is gathered, and of the base the few tensors by which it is known again.
        """
        network = self.network(kwargs.get("adapter_name"))
        state, description = gathered_state(network), describe_base(self.base)
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
        return checkpoint.push_adapter(self.base, self.network(kwargs.pop("adapter_name", None)), repo_id, **options, **kwargs)

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
            adapter_name: one that is free. The first adapter of a model is ``"default"`` unless it was given another name.
            is_trainable: leave its weights trainable if it is the active one.
            allow_other_weights: load even if the base's weights differ from those it was trained on.
            shadow_model: where the pretrained shadow is now, if the adapter was saved without its weights.

        Raises:
            CheckpointError: the adapter is damaged or made for another base; nothing is changed then.
            AdapterError: the name is taken or not usable as one.
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
        """Loads an adapter onto ``base``, or onto the base it names (``base_options`` go to its from_pretrained).

        Raises:
            ConfigError: ``base_options`` beside a base that is loaded already, or the two in peft's order.
            CheckpointError: as :meth:`load_adapter`.
            AdapterError: the name is not usable as one, the base carries a shadow, or this is the class of the other task.
        """
        if isinstance(adapter_path, nn.Module):
            raise ConfigError(
                f"the adapter comes first and the base second, other than in peft: {cls.__name__}.from_pretrained(FOLDER, "
                f"model); the first argument is a {type(adapter_path).__name__}"
            )
        hub_options = hub_options or {}
        if base is not None and base_options:
            raise ConfigError(
                f"{', '.join(base_options)} would load a base, but base= is one already; options for fetching the adapter "
                "go into hub_options={...}"
            )
        if base is None:
            base = checkpoint.load_base(adapter_path, hub_options, **base_options)
        check_bare(base)
        network = checkpoint.load_adapter(
            base, adapter_path, allow_other_weights=allow_other_weights, shadow_model=shadow_model, **hub_options
        )
        task_class = model_class_for(base) if cls is ShadowModel else cls
        model = task_class(base, None, adapter_name)
        model._register(adapter_name, network)
        if not is_trainable:
            network.requires_grad_(False)
        return model.eval()

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
        last_block: AbstractContextManager[None] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Tensor]:
        """(output of the base's decoder, s(0) [B, T, d]); ``last_block`` is entered for the last block alone."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        shared = {"attention_mask": attention_mask, "use_cache": use_cache}
        initial = self._initial_state(network, input_ids, inputs_embeds, past_key_values, shared | _without(kwargs, _BASE_ONLY))
        decoder = decoder_of(self.base)
        # Inside torch.compile there is no last block to enter, and Dynamo of torch 2.8 does not know ExitStack.
        with nullcontext() if last_block is None else ExitStack() as stack:
            before = None
            if last_block is not None and stack is not None:
                before = (len(blocks_of(decoder)) - 1, partial(stack.enter_context, last_block))
            run = ShadowRun(network, initial, before_block=before)
            try:
                output = decoder(
                    input_ids=input_ids,
                    inputs_embeds=inputs_embeds,
                    **{CACHE: past_key_values, RUN_KEYWORD: run},
                    **shared,
                    **kwargs,
                )
            finally:
                run.release()
            run.check(len(blocks_of(decoder)))
        return output, initial

    def _last_block_at(self, needed: Tensor, options: dict[str, Any]) -> AbstractContextManager[None] | None:
        """For a training pass of which only the last hidden states where ``needed`` [B, T] is true are read.

        ``options``: of the call. None where more than those is asked for, without gradients, inside
        torch.compile, and where the last block is computed again in the backward pass, which is outside of this.
        """
        reports = any(options.get(name, getattr(self.config, name, False)) for name in _REPORTS)
        block = blocks_of(decoder_of(self.base))[-1]
        once = isinstance(block, GradientCheckpointingLayer) and not block.gradient_checkpointing
        if reports or not once or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return only_rows(row_wise_weights(block), needed)

    def _initial_state(
        self,
        network: ShadowNetwork,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Eq. 1 and 10: s(0), [B, T, d], in the base's dtype.

        Raises:
            ConfigError: embeddings for a shadow that has a token table of its own.
        """
        backbone = network.backbone
        if inputs_embeds is not None and not network.config.shares_embeddings:
            raise ConfigError(
                "inputs_embeds are the base's embeddings, and this shadow looks tokens up in a table of its own; pass "
                "input_ids, or make the adapter with share_embeddings=True"
            )
        if past_key_values is not None:
            configs = {"base": decoder_of(self.base).config, "shadow": backbone.config}
            view = shadow_view(past_key_values, **configs, identity=network.identity)
            kwargs = kwargs | {CACHE: view}
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


def _adapter_part(state: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """The tensors of one adapter, by their names in its network, out of a state dict of the whole, maybe wrapped, model."""
    prefix, part = f"networks.{adapter_name}.", {}
    for key, tensor in state.items():
        while key.startswith(_WRAPPERS):
            key = key.split(".", 1)[1]
        if key.startswith(prefix):
            part[key.removeprefix(prefix)] = tensor
    return part


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def model_class_for(base: PreTrainedModel) -> type[ShadowModel]:
    from shadowpeft.model.tasks import task_model_class  # the task models subclass ShadowModel

    return task_model_class(base)

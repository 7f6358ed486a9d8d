"""The two task models: causal language modelling and sequence classification."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast

from shadowpeft.core import ShadowConfig
from shadowpeft.core.head_loss import IGNORE, LossSpec
from shadowpeft.core.lean import lean_graph
from shadowpeft.core.losses import (
    causal_lm_loss,
    combine,
    last_token,
    next_token_labels,
    pool_last_token,
    problem_type_of,
    sequence_classification_loss,
    shared_head_losses,
    without_gradient,
)
from shadowpeft.model.architectures import architecture_of, decoder_of, head_of
from shadowpeft.model.build import is_classifier
from shadowpeft.model.cache import CACHE, one_cache
from shadowpeft.model.positions import rope_border
from shadowpeft.model.refusals import refuse_ignore_index, refuse_other_losses, refuse_rows, refuse_without_shadow
from shadowpeft.model.settings import by_name, setting
from shadowpeft.model.wrapper import ShadowModel

# Ways of decoding beyond transformers' own, by the keyword of ``generate`` that asks for them. ``shadowpeft.generate``
# builds on this package, so it enters its ways here instead of being imported.
DECODERS: dict[str, Callable[..., Any]] = {}


@dataclass
class ShadowCausalLMOutput(CausalLMOutputWithPast):
    """The base's output with the shadow's part.

    Attributes:
        loss: main + lambda * shadow loss (Eq. 8), and the distillation term where its weight is not 0.
        main_loss, shadow_loss, distillation_loss: its parts, unweighted and without gradient.
        logits: [B, T, V]; None in training mode with labels, unless ``output_logits=True``.
        shadow_logits: [B, T, V], only with ``output_shadow_logits=True``.
        router_logits: of a mixture's blocks, each [B * T, experts]; only with ``output_router_logits=True``, without labels.
    """

    main_loss: Tensor | None = None
    shadow_loss: Tensor | None = None
    distillation_loss: Tensor | None = None
    shadow_logits: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class ShadowClassifierOutput(SequenceClassifierOutputWithPast):
    """As :class:`ShadowCausalLMOutput`, for sequence classification (Eq. 9); logits are [B, C]."""

    main_loss: Tensor | None = None
    shadow_loss: Tensor | None = None
    shadow_logits: Tensor | None = None


class ShadowModelForCausalLM(ShadowModel, GenerationMixin):
    """A frozen causal language model adapted by a shadow."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, and as Phi-3's own class has it: behind the border of its long rope the cache is made anew.

        ``inputs_embeds`` is named because ``generate`` takes embeddings only where this signature has them.
        """
        border, cache = rope_border(self.config), kwargs.get(CACHE)
        is_crossed = border is not None and cache is not None and input_ids.shape[1] > border >= cache.get_seq_length()
        if is_crossed and self.config.model_type == "phi3":
            kwargs |= {CACHE: None, "next_sequence_length": None}
        plain: Any = super()  # checkers do not find it there
        return plain.prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "continuous batching (generate_batch) pages the base's cache, which has no room for the shadow's; use "
            "generate() with a padded batch"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        adapter: str | None = None,
        output_shadow_logits: bool = False,
        output_logits: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> ShadowCausalLMOutput | tuple:
        """One pass of base and shadow.

        Args:
            input_ids: [B, T]. Further arguments as in any causal language model of transformers.
            past_key_values, cache: the cache of the call under either of the names that transformers has for it.
            labels: [B, T], -100 where there is no loss.
            num_items_in_batch: labels of the whole optimizer step; both losses are divided by it.
            adapter: name of the adapter for this call; ``"__base__"`` for none; default: the active one.
            output_shadow_logits: also return the shadow head on s(0).
            output_logits: whether to return logits. They cost more memory than anything else in a training step, so by
                default they are left out in training mode with labels, and returned otherwise. The base alone always has them.
            label_smoothing: by keyword; share of every target that is spread evenly over the vocabulary, in both losses.
            shift_labels: by keyword; [B, T], beside ``labels`` and in place of them, if they are moved already.

        Raises:
            ConfigError: an ``ignore_index`` other than -100 or a mixture's router logits beside labels, or what a call of the
                base alone cannot give.
        """
        # Not in the signature: transformers' Trainer takes every parameter with "label" in its name for a column of labels,
        # and evaluates without a loss where the batch lacks it.
        label_smoothing, shift_labels = kwargs.pop("label_smoothing", 0.0), kwargs.pop("shift_labels", None)
        moved = {} if shift_labels is None else {"shift_labels": shift_labels}
        inputs: dict[str, Any] = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **({} if position_ids is None else {"position_ids": position_ids}),
            **kwargs,
        )
        refuse_rows(kwargs)
        past_key_values = one_cache(past_key_values, cache)
        network = self._chosen(adapter)
        if network is None:
            refuse_without_shadow(output_shadow_logits, output_logits)
            inputs |= {"use_cache": use_cache, "logits_to_keep": logits_to_keep, CACHE: past_key_values}
            if labels is not None and label_smoothing:
                refuse_other_losses(self.config, kwargs)
                smooth: Any = {"num_items": num_items_in_batch, "label_smoothing": label_smoothing} | moved
                return _base_with_loss(self.base, inputs, partial(causal_lm_loss, labels=labels, **smooth), return_dict)
            options = {} if labels is None else {"labels": labels, "num_items_in_batch": num_items_in_batch, **moved}
            return self.base(return_dict=return_dict, **inputs, **options)
        if labels is not None:
            refuse_other_losses(self.config, kwargs)
        if output_logits is None:
            output_logits = labels is None or not self.training
        last_block = None
        if labels is not None and not output_logits:
            last_block = self._last_block_at(next_token_labels(labels, shift_labels) != IGNORE, kwargs)
        with lean_graph():
            output, initial = self._run_attached(
                network,
                past_key_values=past_key_values,
                use_cache=self._default_use_cache(use_cache, labels),
                last_block=last_block,
                **inputs,
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = output.last_hidden_state
        losses = None
        if labels is not None:
            spec = self.loss_spec(network.config, label_smoothing)
            losses = shared_head_losses(spec, head_of(self.base), hidden, initial, labels, num_items_in_batch, **moved)
        result = ShadowCausalLMOutput(
            loss=None if losses is None else losses.total,
            logits=self.lm_logits(hidden[:, kept]) if output_logits else None,
            **{CACHE: output.get(CACHE)},
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
            main_loss=None if losses is None else losses.main,
            shadow_loss=None if losses is None else losses.shadow,
            distillation_loss=None if losses is None else losses.distillation,
            shadow_logits=self.lm_logits(initial[:, kept]) if output_shadow_logits else None,
            router_logits=output.get("router_logits"),
        )
        return result.to_tuple() if return_dict is False else result

    def generate(self, *args: Any, speculative: Any = None, **kwargs: Any) -> Any:
        """As in transformers, with everything it offers but LayerSkip (``assistant_early_exit``).

        Args:
            cache, past_key_values: a cache to go on with, under either of the names that transformers has for it.
            speculative: let the shadow draft, which changes nothing about the result: draft tokens a round,
                ``"auto"``, or a ``SpeculativeConfig``; None decodes plainly.

        Raises:
            NotImplementedError: LayerSkip, which runs the base on its first blocks alone.
        """
        if setting(self, by_name(self, args, kwargs), "assistant_early_exit") is not None:
            raise NotImplementedError(
                "assistant_early_exit runs the first blocks alone, without the shadow's later steps; draft with the "
                "shadow instead: generate(..., speculative=4)"
            )
        given = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if given is not None:
            kwargs[CACHE] = given
        if speculative is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        return DECODERS["speculative"](self, *args, speculative=speculative, **kwargs)

    def last_hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        adapter: str | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """The decoder's output, whose ``last_hidden_state`` [B, T, d] is what :meth:`lm_logits` reads; no head runs.

        For losses that take the head into their own hands. Arguments as in :meth:`forward`.
        """
        inputs = dict(kwargs, input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        past_key_values = one_cache(past_key_values, cache)
        network = self._chosen(adapter)
        if network is None:
            return decoder_of(self.base)(use_cache=use_cache, **{CACHE: past_key_values}, **inputs)
        with lean_graph():
            return self._run_attached(network, past_key_values=past_key_values, use_cache=use_cache, **inputs)[0]

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """The base's frozen head, with whatever its architecture does to logits: [B, T, d] -> [B, T, V]."""
        return architecture_of(self.config).finish_logits(self.config, head_of(self.base)(hidden))

    def training_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the losses of a training step read: (last hidden states, s(0)), both [B, T, d]. Arguments [B, T]."""
        options: dict[str, Any] = {"inputs_embeds": None, "past_key_values": None, "use_cache": False}
        with lean_graph():
            output, initial = self._run_attached(
                self._attached(), input_ids=input_ids, attention_mask=attention_mask, **options
            )
        return output.last_hidden_state, initial

    def loss_spec(self, config: ShadowConfig | None = None, label_smoothing: float = 0.0) -> LossSpec:
        """The losses of an adapter (default: the active one): their weights, and what the model does to logits."""
        config = self.network().config if config is None else config
        return LossSpec(
            finish=architecture_of(self.config).finish(self.config),
            label_smoothing=label_smoothing,
            shadow_weight=config.auxiliary_loss_weight,
            distillation_weight=config.distillation_weight,
            temperature=config.distillation_temperature,
        )


class ShadowModelForSequenceClassification(ShadowModel):
    """A frozen decoder with a classification head, adapted by a shadow; both heads are trained."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        adapter: str | None = None,
        output_shadow_logits: bool = False,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> ShadowClassifierOutput | tuple:
        """One pass; logits [B, C] are read at the last token that is not padding, on either side.

        Arguments as in :meth:`ShadowModelForCausalLM.forward`; ``labels`` are [B] or [B, C], read as the base's
        ``config.problem_type`` says. Where it says nothing, the first labels do, for good, as in transformers: what is saved,
        detached or put into a pipeline has to know it too.
        """
        if labels is not None and self.config.problem_type is None:
            self.config.problem_type = problem_type_of(self.config.num_labels, labels)  # type: ignore[assignment]
        smoothing = kwargs.pop("label_smoothing", 0.0)  # not in the signature, as there
        options: Any = {"problem_type": self.config.problem_type, "label_smoothing": smoothing}
        inputs: dict[str, Any] = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **({} if position_ids is None else {"position_ids": position_ids}),
            **kwargs,
        )
        refuse_rows(kwargs)
        past_key_values = one_cache(past_key_values, cache)
        network = self._chosen(adapter)
        if network is None:
            refuse_without_shadow(output_shadow_logits)
            inputs |= {CACHE: past_key_values, "use_cache": use_cache}
            if labels is None or not smoothing:
                return self.base(labels=labels, return_dict=return_dict, **inputs)
            refuse_ignore_index(kwargs)
            loss = partial(sequence_classification_loss, labels=labels, num_items=num_items_in_batch, **options)
            return _base_with_loss(self.base, inputs, loss, return_dict)
        refuse_ignore_index(kwargs)
        given, last_block = input_ids if inputs_embeds is None else inputs_embeds, None
        mask = self._padding_mask(given, input_ids, attention_mask)
        if labels is not None and given is not None:
            last_block = self._last_block_at(last_token(given, mask), kwargs)
        with lean_graph():
            output, initial = self._run_attached(
                network, past_key_values=past_key_values, use_cache=bool(use_cache), last_block=last_block, **inputs
            )
        assert network.head is not None and network.shadow_head is not None
        logits = network.head(pool_last_token(output.last_hidden_state, mask).to(network.head.weight))
        main = shadow = loss = shadow_logits = None
        if labels is not None or output_shadow_logits:
            shadow_logits = network.shadow_head(pool_last_token(initial, mask).to(network.shadow_head.weight))
        if labels is not None:
            assert shadow_logits is not None
            main = sequence_classification_loss(logits, labels, num_items_in_batch, **options)
            shadow = sequence_classification_loss(shadow_logits, labels, num_items_in_batch, **options)
            loss = combine(main, shadow, network.config.auxiliary_loss_weight)
        result = ShadowClassifierOutput(
            loss=loss,
            logits=logits,
            **{CACHE: output.get(CACHE)},
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
            main_loss=without_gradient(main),
            shadow_loss=without_gradient(shadow),
            shadow_logits=shadow_logits if output_shadow_logits else None,
        )
        return result.to_tuple() if return_dict is False else result

    def _padding_mask(self, given: Tensor | None, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """[B, T] of what is not padding; without a mask, from the pad token, as transformers' own classifiers do.

        Args:
            given: the ids [B, T] or embeddings [B, T, d] of the call.
            attention_mask: [B, past + T] where a cache holds what came before.
        """
        if attention_mask is not None and attention_mask.dim() == 2:
            return attention_mask if given is None else attention_mask[:, -given.shape[1] :]
        pad = self.config.pad_token_id
        return None if input_ids is None or pad is None else (input_ids != pad).to(torch.int64)


def task_model_class(base: PreTrainedModel) -> type[ShadowModel]:
    return ShadowModelForSequenceClassification if is_classifier(base) else ShadowModelForCausalLM


def get_shadow_model(base: PreTrainedModel, config: ShadowConfig, adapter_name: str = "default") -> ShadowModel:
    """Adapts ``base`` with a fresh shadow. The base is frozen and hooked, not copied; ``unload()`` frees it again.

    Raises:
        ArchitectureError: the base is not supported.
        ConfigError: the config does not fit it.
        AdapterError: it already carries a shadow or is a PEFT model, or the name is not usable as one.
    """
    return task_model_class(base)(base, config, adapter_name)


def _base_with_loss(
    base: PreTrainedModel, inputs: dict[str, Any], loss: Callable[[Tensor], Tensor], return_dict: bool | None
) -> Any:
    """The untouched base's output with this loss of its logits: its own knows no smoothing."""
    output = base(return_dict=True, **inputs)
    result = type(output)(**{**output, "loss": loss(output.logits)})
    return result.to_tuple() if return_dict is False else result

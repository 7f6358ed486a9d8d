"""``generate(speculative=...)``: checks, the way through transformers' ``generate``, and back to plain decoding."""

import copy
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from shadowpeft.core import ShadowNetwork
from shadowpeft.errors import ConfigError
from shadowpeft.generate.config import SpeculativeConfig, as_speculative
from shadowpeft.generate.rollback import why_not_croppable, why_not_draftable
from shadowpeft.generate.speculative import decode
from shadowpeft.generate.statistics import SpeculativeOutput
from shadowpeft.generate.timeline import is_fixed
from shadowpeft.model.architectures import decoder_of
from shadowpeft.model.cache import CACHE, shadow_view
from shadowpeft.model.placement import device_of
from shadowpeft.model.positions import dynamic_rope_border, rope_border
from shadowpeft.model.settings import by_name, setting
from shadowpeft.model.tasks import DECODERS, ShadowModelForCausalLM


class SpeculativeFallbackWarning(UserWarning):
    """Speculative decoding was asked for but is not possible here; the output is that of plain decoding."""


# Arguments of ``generate`` that choose another way of decoding: by being there, and by not being 0 or False.
_OTHER_WAYS = ("assistant_model", "custom_generate", "prompt_lookup_num_tokens", "assistant_early_exit", "dola_layers")
_OTHER_WAYS_IF_TRUE = ("penalty_alpha", "use_mtp")
# What a call reads, by its names in ``generate``.
_INPUTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids")
# Processors that follow the sequence themselves, one token a call; drafts would be tokens to them.
_STATEFUL = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)


def generate(
    model: ShadowModelForCausalLM, *args: Any, speculative: SpeculativeConfig | int | str, **kwargs: Any
) -> SpeculativeOutput | Tensor:
    """transformers' ``generate`` with the shadow as draft; arguments and results as there.

    Args:
        speculative: drafts a round, ``"auto"``, or a :class:`SpeculativeConfig`.

    Returns:
        Sequences, or with ``return_dict_in_generate=True`` a :class:`SpeculativeOutput` with statistics; on the device of the
        inputs, as there.

    Raises:
        ConfigError: a negative number, beam search, another way of decoding, guidance, a watermark that keeps a state,
            token healing, processes in step (``synced_gpus``), or a call without a shadow or a cache.
    """
    settings = as_speculative(speculative)
    kwargs = by_name(model, args, kwargs)
    _refuse_other_ways(model, kwargs, speculative)
    if kwargs.get("num_beams", 1) not in (None, 1):
        raise ConfigError(_NO_BEAMS.format(kwargs["num_beams"]))
    if setting(model, kwargs, "token_healing"):
        raise ConfigError("token_healing=True rewrites the prompt, which is not done while speculating; leave one of them out")
    network = model._chosen(kwargs.get("adapter"))
    if network is None:
        raise ConfigError("speculative decoding drafts with the shadow, but this call uses the base alone")
    method = partial(speculative_decoding, network=network, speculative=settings, streamer=kwargs.get("streamer"))
    plain: Any = GenerationMixin
    given = {name: kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), Tensor)}
    # Where the shadow reads them: hooks of a device_map bring inputs there one module at a time, tokens that are kept are not.
    start = device_of(model.get_input_embeddings(), model.base.device)
    kwargs |= {name: tensor.to(start) for name, tensor in given.items()}
    found = plain.generate(model, **_with_stop_strings(model, kwargs) | {"custom_generate": method})
    return _moved(found, next((tensor.device for tensor in given.values()), start))


def _refuse_other_ways(model: ShadowModelForCausalLM, kwargs: dict[str, Any], speculative: object) -> None:
    there = [name for name in _OTHER_WAYS if setting(model, kwargs, name) is not None]
    there += [name for name in _OTHER_WAYS_IF_TRUE if setting(model, kwargs, name)]
    if there:
        raise ConfigError(f"speculative={speculative!r} and {there[0]}= are two ways of decoding; give one of them")
    if kwargs.get("synced_gpus"):
        raise ConfigError(
            "synced_gpus=True keeps processes in step, one pass a token, but drafts make the passes of each process its own; "
            "leave out speculative= or synced_gpus="
        )


def _moved(found: SpeculativeOutput | Tensor, device: torch.device) -> SpeculativeOutput | Tensor:
    """What ``generate`` returns, on ``device``; the cache stays where the model is."""
    if isinstance(found, Tensor):
        return found.to(device)
    found["sequences"] = found.sequences.to(device)
    for name in ("scores", "logits"):
        if found.get(name) is not None:
            found[name] = tuple(tensor.to(device) for tensor in found[name])
    return found


_NO_BEAMS = "speculative decoding follows one sequence a row, but num_beams={}; use num_beams=1 or leave out speculative="


def _with_stop_strings(model: ShadowModelForCausalLM, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Stop strings as a criterion, since ``generate`` takes the tokenizer away from custom decoding methods."""
    strings, tokenizer = setting(model, kwargs, "stop_strings"), kwargs.get("tokenizer")
    if not strings or tokenizer is None:
        return kwargs
    kwargs = {name: value for name, value in kwargs.items() if name not in ("stop_strings", "tokenizer")}
    config: GenerationConfig | None = kwargs.get("generation_config")
    if config is not None:
        kwargs["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    if config is None or setting(model, {}, "stop_strings") is not None:
        # Beside a config that has none the model's would count; an argument counts before both.
        kwargs["stop_strings"] = None
    criterion = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
    return kwargs | {"stopping_criteria": StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criterion])}


def speculative_decoding(
    model: ShadowModelForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    network: ShadowNetwork,
    speculative: SpeculativeConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> SpeculativeOutput | Tensor:
    """A decoding method as transformers' ``custom_generate`` expects it; falls back with a warning where it must.

    Raises:
        ConfigError: beams, guidance, a watermark that keeps a state, no cache, or outputs that are not recorded.
    """
    if generation_config.num_beams > 1:
        raise ConfigError(_NO_BEAMS.format(generation_config.num_beams))
    for processor in logits_processor:
        if isinstance(processor, _STATEFUL):
            raise ConfigError(
                f"{type(processor).__name__} counts on being called once a token, but drafts are processed too; leave "
                "out speculative=, or what asks for it (guidance_scale, or a SynthID watermark)"
            )
    cache: Cache | None = model_kwargs.get(CACHE)
    if cache is None or not model_kwargs.get("use_cache"):
        raise ConfigError("speculative decoding takes rejected tokens out of the cache, but use_cache=False; leave that out")
    if generation_config.return_dict_in_generate and (
        generation_config.output_attentions or generation_config.output_hidden_states
    ):
        raise ConfigError(
            "output_attentions and output_hidden_states are not recorded while speculating; leave out speculative="
        )
    # The shadow's layers have to be there before anything is read: what rolls back looks at all of them.
    configs = {"base": decoder_of(model.base).config, "shadow": network.backbone.config}
    view = shadow_view(cache, **configs, identity=network.identity)
    final_length = _final_length(input_ids, generation_config, model_kwargs)
    reason = why_not_croppable(cache, final_length) or why_not_draftable(view, final_length)
    reason = reason or _why_not_across(rope_border(model.config), input_ids.shape[1], final_length)
    reason = reason or _why_not_growing((model.config, network.backbone.config), final_length)
    if reason is None and is_fixed(cache) and _uses_flash_attention(model):
        reason = "flash attention knows what is valid in a static cache by the length of the mask; use sdpa or a dynamic cache"
    if reason is not None:
        warnings.warn(
            f"decoding without speculation: {reason}",
            SpeculativeFallbackWarning,
            stacklevel=4,
        )
        plain: Any = GenerationMixin
        found = plain._sample(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
        return found if isinstance(found, Tensor) else SpeculativeOutput(**found, statistics=None)
    return decode(
        model,
        network,
        input_ids,
        speculative=speculative,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        streamer=streamer,
        model_kwargs=model_kwargs,
    )


def _uses_flash_attention(model: ShadowModelForCausalLM) -> bool:
    return str(model.config._attn_implementation).startswith("flash")


def _why_not_across(border: int | None, length: int, final_length: int) -> str | None:
    """Why drafts cannot cross the border of a long rope: a pass over tokens of both sides would turn all by one's factors."""
    if border is None or not length <= border <= final_length:
        return None
    return (
        f"the text may pass {border} tokens, where this base's positions change; ask for fewer new tokens, or go on from a "
        "longer prompt"
    )


def _why_not_growing(configs: Iterable[PreTrainedConfig], final_length: int) -> str | None:
    """Why drafts cannot come near where positions change with every pass: a pass over drafts is longer than a plain one.

    At the border itself transformers keeps the frequencies that an earlier, longer text left in the model.
    """
    borders = [border for border in map(dynamic_rope_border, configs) if border is not None]
    if not borders or final_length < min(borders):
        return None
    return (
        f"the text may reach {min(borders)} tokens, from where dynamic rope turns all positions by the length of each pass; "
        "ask for fewer new tokens"
    )


def _final_length(input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> int:
    """Tokens the cache holds when the longest allowed sequence is complete; its last token is never cached."""
    embeddings = model_kwargs.get("inputs_embeds")
    before = 0 if embeddings is None or input_ids.shape[1] > 0 else embeddings.shape[1]
    return config.max_length - 1 + before


DECODERS["speculative"] = generate

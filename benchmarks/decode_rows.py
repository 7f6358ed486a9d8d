"""The contenders of ``decode.py``: everything that can generate from one base, and what each reads for a token."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowpeft import ShadowConfig, ShadowModelForCausalLM, SpeculativeConfig
from shadowpeft.model.architectures import blocks_of, decoder_of
from shapes import sharing_copy


@dataclass(kw_only=True)
class Contender:
    """One row of the table.

    Attributes:
        name: what it is.
        model: generates.
        bytes_per_step: weights read for one plain step.
        options: further arguments of ``generate``; given the plain tokens of the attached model, if ``needs_oracle``.
        equal_to: name of the row whose tokens it must give, if any.
        max_batch: largest batch it can do, None for any.
        num_drafts: of a speculating one.
    """

    name: str
    model: Any
    bytes_per_step: int
    options: dict[str, Any] | Callable[[Tensor], dict[str, Any]] = field(default_factory=dict)
    equal_to: str | None = None
    max_batch: int | None = None
    num_drafts: int = 0


def num_bytes(*parts: nn.Module | Tensor | None) -> int:
    total = 0
    for part in parts:
        tensors = [] if part is None else [part] if isinstance(part, Tensor) else list(part.parameters())
        total += sum(tensor.nbytes for tensor in tensors)
    return total


def step_bytes(model: PreTrainedModel) -> int:
    """Weights that one token passes: blocks, final norm and head, but no embedding table."""
    decoder = decoder_of(model)
    return num_bytes(decoder, model.get_output_embeddings()) - num_bytes(decoder.get_input_embeddings())


def our_rows(
    model: ShadowModelForCausalLM, *, speculative: list[SpeculativeConfig], acceptances: list[float], rigged_drafts: int,
    compile_options: dict[str, Any] | None = None,
) -> list[Contender]:  # fmt: skip
    """Attached, attached with drafts (the shadow's own, and rigged ones), as an assistant, detached."""
    network = model.network()
    shadow = num_bytes(network.backbone, network.projection)
    steps = num_bytes(*network.step_parts)
    base = step_bytes(model.base)
    attached = base + shadow + steps
    detached = model.detach()
    rows = [Contender(name="ours, attached", model=model, bytes_per_step=attached)]

    def drafting(name: str, options: Any, num_drafts: int, *, max_batch: int | None = None) -> Contender:
        return Contender(
            name=f"ours, attached, {name}",
            model=model,
            bytes_per_step=attached,
            options=options,
            equal_to="ours, attached",
            max_batch=max_batch,
            num_drafts=num_drafts,
        )

    for settings in speculative:
        rows.append(drafting(label(settings), {"speculative": settings}, settings.num_draft_tokens))
    for acceptance in acceptances:

        def options(known: Tensor, share: float = acceptance) -> dict[str, Any]:
            settings = SpeculativeConfig(
                num_draft_tokens=rigged_drafts, draft_processor=rigged(known, share), compile_options=compile_options
            )
            return {"speculative": settings}

        rows.append(drafting(f"{rigged_drafts} drafts, rigged to {acceptance:.0%}", options, rigged_drafts))
    # The same fixed numbers of drafts for transformers' own way.
    for num_drafts in dict.fromkeys(each.num_draft_tokens for each in speculative if not each.adaptive):
        assistant = model.detach()
        assistant.generation_config.num_assistant_tokens = num_drafts
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        name = f"assistant_model=detached, {num_drafts} drafts"
        rows.append(drafting(name, {"assistant_model": assistant}, num_drafts, max_batch=1))
    rows.append(Contender(name="ours, detached", model=detached, bytes_per_step=step_bytes(detached)))
    return rows


def label(settings: SpeculativeConfig) -> str:
    text = f"{settings.num_draft_tokens} drafts" if not settings.adaptive else "adaptive drafts"
    if settings.confidence_threshold:
        text += f" above {settings.confidence_threshold}"
    return text + ("" if settings.draft_vocabulary is None else f" of {len(settings.draft_vocabulary)} tokens")


def rigged(known: Tensor, acceptance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Drafts that are right with a given probability, the same at every call; the shadow does all its work for them."""
    generator = torch.Generator().manual_seed(0)
    right = (torch.rand(known.shape, generator=generator) < acceptance).to(known.device)

    def draft(prefix: Tensor, logits: Tensor) -> Tensor:
        place = min(prefix.shape[1], known.shape[1] - 1)
        wanted = torch.where(right[:, place], known[:, place], (known[:, place] + 1) % logits.shape[1])
        return logits.scatter(1, wanted[:, None], torch.finfo(logits.dtype).max)

    return draft


def lora_rows(base: PreTrainedModel, *, num_trainable: int) -> list[Contender]:
    """LoRA on all linear layers at about ``num_trainable`` weights: merged into the base, and beside it."""
    if find_spec("peft") is None:
        return []
    import peft

    linears = [m for m in blocks_of(decoder_of(base)).modules() if isinstance(m, nn.Linear)]
    rank = max(1, round(num_trainable / sum(m.in_features + m.out_features for m in linears)))
    rows = []
    for merged in (True, False):
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(1)
        model = peft.get_peft_model(sharing_copy(base), config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.normal_(std=0.02)
        if merged:
            own_weights(model)
            model = model.merge_and_unload()
        name = f"base + merged LoRA r{rank}" if merged else f"LoRA r{rank}, not merged"
        total = step_bytes(base if merged else model.get_base_model())
        rows.append(Contender(name=name, model=model.eval(), bytes_per_step=total))
    return rows


def own_weights(model: nn.Module) -> None:
    """Gives a model weights of its own, so that merging does not reach the others."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def peer_rows(base: PreTrainedModel, config: ShadowConfig) -> list[Contender]:
    """Hugging Face peft's Shadow and the authors' package, where they are installed."""
    rows = []
    if find_spec("peft") is not None:
        import peft

        theirs = peft.ShadowConfig(
            task_type="CAUSAL_LM",
            r=config.r,
            update_hidden_size=config.update_hidden_size,
            shadow_num_hidden_layers=1,
            shadow_alpha=config.bottleneck_alpha,
            shadow_intermediate_size=config.shadow_intermediate_size,
        )
        model = peft.get_peft_model(sharing_copy(base), theirs).eval()
        added = sum(p.nbytes for name, p in model.named_parameters() if p.requires_grad and "embed" not in name)
        rows.append(Contender(name="peft Shadow", model=model, bytes_per_step=step_bytes(base) + added))
    if find_spec("shadow_peft") is not None:
        import shadow_peft

        theirs = shadow_peft.ShadowConfig(
            num_shadow_layers=1,
            injection_hidden_size=config.r,
            gate_hidden_size=config.update_hidden_size,
            alpha=config.bottleneck_alpha,
            shadow_intermediate_size=config.shadow_intermediate_size,
        )
        model = shadow_peft.ShadowForCausalLM(shadow_peft.get_shadow_model(sharing_copy(base), theirs))
        model = model.to(base.device, base.dtype).eval()
        added = sum(p.nbytes for name, p in model.named_parameters() if p.requires_grad and "embed" not in name)
        rows.append(Contender(name="authors' shadow-peft", model=model, bytes_per_step=step_bytes(base) + added))
    return rows

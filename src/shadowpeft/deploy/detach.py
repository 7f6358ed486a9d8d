"""A folder that plain ``AutoModelForCausalLM`` (or ``...ForSequenceClassification``) loads, without this package."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadowpeft.errors import ShadowPeftError
from shadowpeft.files import new_folder, write_files
from shadowpeft.model import ShadowModel
from shadowpeft.model.build import cast

NUM_PROBE_TOKENS = 8


class DetachError(ShadowPeftError, RuntimeError):
    """A detached model that does not compute what the attached shadow does."""


def write_detached(
    model: ShadowModel,
    folder: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    adapter_name: str | None = None,
) -> PreTrainedModel:
    """Writes the stand-alone shadow with its generation config and tokenizer, after checking it on a few tokens.

    Args:
        model: base with the adapter attached.
        folder: empty or absent.
        dtype: what to store; default: the adapter's dtype.
        adapter_name: default: the active one.

    Raises:
        ArchitectureError: this shadow cannot become an ordinary model.
        ConfigError: the folder holds something.
        DetachError: the check failed; nothing is written.
        SaveError: the folder cannot be written.
    """
    target = new_folder(folder)
    detached = model.detach(adapter_name)
    check_logits(model, detached, adapter_name)
    detached = _stored_as(detached, dtype)

    def write(staging: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        detached.save_pretrained(staging)

    write_files(target, write)
    return detached


@torch.no_grad()
def check_logits(model: ShadowModel, detached: PreTrainedModel, adapter_name: str | None = None) -> None:
    """Compares the detached model with the shadow head on s(0) of the attached one.

    Raises:
        DetachError: they differ by more than rounding.
    """
    ids = _probe(detached).to(model.base.device)
    was_training = model.training
    model.eval()
    try:
        expected = model(ids, adapter=adapter_name, output_shadow_logits=True).shadow_logits
    finally:
        model.train(was_training)
    difference = (detached(ids).logits - expected).abs().amax().item()
    # Folding changes the order of the sums, so the bound is far above one rounding and far below a wrong weight.
    coarsest = max(torch.finfo(p.dtype).eps for p in (*detached.parameters(), *model.base.parameters()))
    if not difference <= 8 * coarsest**0.5 * max(1.0, expected.abs().amax().item()):
        raise DetachError(
            f"the detached model's logits differ by {difference:.2e} from the attached shadow's; please report this "
            f"with the base's model type ({model.config.model_type})"
        )


def _probe(detached: PreTrainedModel) -> torch.Tensor:
    """[1, T] tokens from all over the vocabulary, none of them padding."""
    vocabulary = detached.config.vocab_size
    ids = torch.linspace(0, vocabulary - 1, NUM_PROBE_TOKENS).long()
    pad = detached.config.pad_token_id
    return torch.where(ids == pad, (ids + 1) % vocabulary, ids)[None] if pad is not None else ids[None]


def _stored_as(detached: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    if dtype is None or detached.dtype == dtype:
        return detached
    # A table or head that is offloaded is the base's own module, which stays as it is.
    is_offloaded = any(parameter.is_meta for parameter in detached.parameters())
    return cast(copy.deepcopy(detached) if is_offloaded else detached, dtype)

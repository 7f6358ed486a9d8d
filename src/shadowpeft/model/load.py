"""Saved adapters as commands want them: attached to their base, with the tokenizer that goes with them."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadowpeft.errors import ArchitectureError
from shadowpeft.model.adapter_config import label_names, read_config
from shadowpeft.model.bases import load_model, load_tokenizer
from shadowpeft.model.hub import find_folder
from shadowpeft.model.placement import device_named, moved
from shadowpeft.model.wrapper import ShadowModel


def load_attached(
    adapter: str, *, base: str | None = None, allow_other_weights: bool = False, device: str | None = None
) -> tuple[ShadowModel, PreTrainedTokenizerBase | None]:
    """A saved adapter on its base (or on ``base``), and the tokenizer saved with it, else the base's, else None.

    Args:
        device: where the model goes; None: the accelerator of this machine, else its CPU.

    Raises:
        ConfigError: there is no such device.
    """
    place = device_named(device)
    folder = find_folder(adapter)
    described = read_config(folder)["base"]
    loaded: PreTrainedModel | None = None
    if base is not None:
        loaded = load_model(base, labels=label_names(described))
    model = ShadowModel.from_pretrained(folder, loaded, allow_other_weights=allow_other_weights)
    tokenizer = find_tokenizer(str(folder), base or described["name_or_path"])
    if tokenizer is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return moved(model, place), tokenizer


def load_with_tokenizer(
    adapter: str, *, base: str | None = None, allow_other_weights: bool = False, device: str | None = None
) -> tuple[ShadowModel, PreTrainedTokenizerBase]:
    """:func:`load_attached` for those who read or write text.

    Raises:
        ArchitectureError: neither the adapter nor its base has a tokenizer.
    """
    model, tokenizer = load_attached(adapter, base=base, allow_other_weights=allow_other_weights, device=device)
    tokenizer = tokenizer or load_tokenizer(model.base.name_or_path or adapter)  # which says what is missing
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def find_tokenizer(*places: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the first place that has one."""
    for place in places:
        if not place or (Path(place).is_dir() and not (Path(place) / "tokenizer_config.json").is_file()):
            continue
        try:
            return load_tokenizer(place)
        except ArchitectureError:
            continue
    return None

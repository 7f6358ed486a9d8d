"""Adapters as the deploying commands want them: attached, with whatever tokenizer goes with them."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadowpeft.errors import ArchitectureError, ConfigError
from shadowpeft.model import ShadowModel
from shadowpeft.model import checkpoint as checkpoints
from shadowpeft.model.bases import load_model, load_tokenizer


def load_attached(
    adapter: str, *, base: str | None = None, allow_other_weights: bool = False
) -> tuple[ShadowModel, PreTrainedTokenizerBase | None]:
    """A saved adapter on its base (or on ``base``), and the tokenizer saved with it, else the base's, else None."""
    folder = checkpoints.find_folder(adapter)
    described = checkpoints.read_config(folder)["base"]
    loaded: PreTrainedModel | None = None
    if base is not None:
        labels = described["num_labels"] and [described["id2label"][str(i)] for i in range(described["num_labels"])]
        loaded = load_model(base, labels=labels)
    model = ShadowModel.from_pretrained(folder, loaded, allow_other_weights=allow_other_weights)
    tokenizer = find_tokenizer(str(folder), base or described["name_or_path"])
    if tokenizer is not None and model.config.pad_token_id is None:
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


def new_folder(path: Path | str) -> Path:
    """``path``, if it is empty or absent.

    Raises:
        ConfigError: something is there already.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another output folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"the output folder {folder} is not empty; choose another, or empty it")
    return folder

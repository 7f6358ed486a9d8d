"""The weights file of an adapter: read with its damage named, and tied to the config it was saved with."""

import hashlib
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from shadowpeft.errors import CheckpointError

CONFIG_FILE = "shadow_config.json"
WEIGHTS_FILE = "shadow_model.safetensors"
# The config names the weights it was written with, the weights file names itself: two files of different saves,
# as an interrupted save or copy leaves them, are told apart.
DIGEST = "weights_sha256"
# Names of sizes in the configs of transformers' models and in ours; positions and windows make no weights of their size
# where they do not also appear in the file.
_SIZE_NAME = re.compile(r"(^|_)(r|size|dim|inner|embd|heads|layers?|layer|head|experts)$")
# Not max_window_layers, from which block on Qwen's windows begin: the base's number, in a shadow of one block.
_DEPTH_NAME = re.compile(r"^(?!max_)(.*_)?layers?$")


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of a weights file; a file that names itself has to be the one the config names.

    Raises:
        CheckpointError: missing, damaged, or from another save than the config.
    """
    tensors, metadata = read_file(path)
    if metadata.get(DIGEST, digest) != digest:
        raise CheckpointError(
            f"{path.name} and {CONFIG_FILE} in {path.parent} come from two different saves, as when saving or copying "
            "was interrupted; save the adapter again or fetch both files anew"
        )
    return tensors


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no {path.name}; it is incomplete: copy or save it again")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); copy or save it again") from error


def check_sizes(described: dict[str, dict], base: PreTrainedModel, tensors: dict[str, Tensor], path: Path) -> None:
    """Refuses sizes that no tensor has, before anything of that size is made.

    Raises:
        CheckpointError: more blocks than tensors, or another size beyond the largest dimension of base and adapter.
    """
    shapes = [tensor.shape for tensor in (*tensors.values(), *base.parameters())]
    largest = max((max(shape) for shape in shapes if shape), default=0)
    for part, values in described.items():
        for name, value in values.items():
            if not _SIZE_NAME.search(name) or not isinstance(value, int):
                continue
            limit = max(len(tensors), 1) if _DEPTH_NAME.match(name) else largest
            if value > limit:
                raise CheckpointError(
                    f"{path}: {part} has {name}={value}, but the weights beside it allow {limit} at most; the file was "
                    "edited or damaged, or belongs to another adapter"
                )


def check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    """Raises CheckpointError for names or shapes of ``found`` that differ from ``expected``."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path} does not fit its {CONFIG_FILE}: {len(missing)} tensors are missing{_first(missing)}, "
            f"{len(extra)} are unknown{_first(extra)}; the two files belong to different adapters, or one was edited"
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(found[name].shape)}, expected {list(tensor.shape)} from "
                f"{CONFIG_FILE}"
            )


def _first(names: list[str]) -> str:
    return f" (first {names[0]!r})" if names else ""

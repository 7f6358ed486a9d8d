"""An exported ONNX model where the scheduler expects a model: the same batches, decoded by onnxruntime."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, Cache, DynamicCache, GenerationConfig, PreTrainedModel

from shadowpeft.deploy.onnx import ONNX_FILE
from shadowpeft.deploy.onnx_model import OnnxModel
from shadowpeft.deploy.serve.joining import layers_of
from shadowpeft.errors import ArchitectureError


def is_exported(place: str) -> bool:
    """Whether this is a folder that ``shadowpeft export --format onnx`` wrote (or ``onnx-int8``)."""
    return (Path(place) / ONNX_FILE).is_file()


class ExportedModel:
    """Runs a folder with ``model.onnx`` on the CPU, with as many threads as torch.

    Its cache keeps every key; a window, where the model has one, is in its masks.

    Args:
        folder: with ``config.json`` and ``generation_config.json`` beside the graph.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        ArchitectureError: there is no config beside the graph.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str) -> None:
        self._runner = OnnxModel(folder, num_threads=torch.get_num_threads())
        try:
            self.config = AutoConfig.from_pretrained(folder)
            self.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ArchitectureError(
                f"{folder} has a {ONNX_FILE} but not the configs that belong to it; write it with: shadowpeft export"
            ) from error

    def next_logits(self, ids: Tensor, mask: Tensor, caches: dict[str, Cache]) -> Tensor:
        """Logits of the next token of every row, [B, V].

        Args:
            ids: [B, T], the new tokens, left-padded.
            mask: [B, W], 1 for tokens, W columns so far with the new ones.
            caches: ``base`` is replaced by the cache behind these tokens, and made where missing.
        """
        past = _arrays(caches["base"]) if "base" in caches else None
        logits, present = self._runner.read(ids.numpy(), past, mask.numpy())
        caches["base"] = _cache(present)
        return torch.from_numpy(logits)


# What a server can decode with.
Served = PreTrainedModel | ExportedModel


def _arrays(cache: Cache) -> dict[str, np.ndarray]:
    return {
        f"past_key_values.{index}.{part}": np.ascontiguousarray(values.numpy())
        for index, layer in enumerate(layers_of(cache))
        for part, values in (("key", layer.keys), ("value", layer.values))
    }


def _cache(present: dict[str, np.ndarray]) -> Cache:
    cache = DynamicCache()
    for index in range(len(present) // 2):
        key, value = (torch.from_numpy(present[f"past_key_values.{index}.{part}"]) for part in ("key", "value"))
        cache.update(key, value, index)
    return cache

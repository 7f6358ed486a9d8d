"""An exported model in onnxruntime: logits, and greedy decoding with its key/value cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shadowpeft.deploy.packages import need

Cache = dict[str, np.ndarray]
# The graph computes logits for every token it is given: 16 GB for 32,000 tokens of a vocabulary of 128,000.
MAX_LOGIT_BYTES = 256 * 2**20


class OnnxModel:
    """Runs ``model.onnx`` as :func:`shadowpeft.deploy.onnx.write_onnx` lays it out.

    Args:
        path: the file, or the folder it is in.
        num_threads: threads of onnxruntime; default: its own choice.
    """

    def __init__(self, path: Path | str, *, num_threads: int | None = None) -> None:
        runtime = need("onnxruntime", what="running an ONNX file")
        file = Path(path)
        options = runtime.SessionOptions()
        if num_threads is not None:
            options.intra_op_num_threads = options.inter_op_num_threads = num_threads
        options.log_severity_level = 3
        file = file / "model.onnx" if file.is_dir() else file
        self._session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._outputs = [item.name for item in self._session.get_outputs()]
        self._vocabulary = next(item.shape[-1] for item in self._session.get_outputs() if item.name == "logits")
        self._empty = {
            item.name: [int(size) if str(size).isdigit() else 0 for size in item.shape]
            for item in self._session.get_inputs()
            if item.name.startswith("past_key_values.")
        }

    def run(self, ids: np.ndarray, cache: Cache | None, mask: np.ndarray | None = None) -> tuple[np.ndarray, Cache]:
        """(logits [B, T, V], the cache behind these tokens).

        Args:
            ids: new tokens [B, T].
            cache: what the last call returned; None at the start.
            mask: [B, past + T], 0 at padding; default: no padding.
        """
        batch, length = ids.shape
        cache = cache or {name: np.zeros((batch, *shape[1:]), np.float32) for name, shape in self._empty.items()}
        past = next(iter(cache.values())).shape[2]
        mask = np.ones((batch, past + length), np.int64) if mask is None else mask
        positions = np.clip(mask.cumsum(-1) - 1, 0, None)[:, past:]
        feed: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}
        found = self._session.run(None, {name: feed[name] for name in self._inputs})
        outputs = dict(zip(self._outputs, found, strict=True))
        return outputs["logits"], {name: outputs[name.replace("past_key_values", "present")] for name in self._empty}

    def read(self, ids: np.ndarray, cache: Cache | None, mask: np.ndarray | None = None) -> tuple[np.ndarray, Cache]:
        """(logits of the next token [B, V], the cache); as :meth:`run`, in pieces of ``MAX_LOGIT_BYTES`` of logits."""
        batch, length = ids.shape
        past = 0 if cache is None else next(iter(cache.values())).shape[2]
        mask = np.ones((batch, past + length), np.int64) if mask is None else mask
        size = max(1, MAX_LOGIT_BYTES // (np.dtype(np.float32).itemsize * batch * self._vocabulary))
        last = (length - 1) // size * size
        for start in range(0, last, size):
            _, cache = self.run(ids[:, start : start + size], cache, mask[:, : past + start + size])
        logits, cache = self.run(ids[:, last:], cache, mask)
        return logits[:, -1], cache

    def generate(self, ids: np.ndarray, *, max_new_tokens: int, eos: int | Sequence[int] | None = None) -> np.ndarray:
        """Prompt and greedy continuation [1, T + new] of one row; stops behind ``eos``, or one of them."""
        ends = () if eos is None else (eos,) if isinstance(eos, int) else eos
        logits, cache = self.read(ids, None)
        for step in range(max_new_tokens):
            token = logits.argmax(-1, keepdims=True)
            ids = np.concatenate([ids, token], axis=1)
            if step + 1 == max_new_tokens or token[0, 0] in ends:
                break
            logits, cache = self.read(token, cache)
        return ids

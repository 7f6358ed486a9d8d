"""What has been generated so far, row by row, and when to stop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from shadowpeft.generate.draft import Known
from shadowpeft.generate.statistics import SpeculativeOutput, SpeculativeStatistics
from shadowpeft.model.cache import CACHE


class Written:
    """The sequences of one call; tokens are added one column at a time, as plain decoding adds them.

    Attributes:
        sequences: [B, T], prompt and generated tokens.
        at_work: [B], rows whose tokens still count; finished ones are filled with padding.
        is_finished: no row is at work.
    """

    def __init__(
        self, input_ids: Tensor, criteria: StoppingCriteriaList, config: GenerationConfig, streamer: BaseStreamer | None
    ) -> None:
        self.sequences = input_ids
        self.is_finished = False
        self._unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        self._criteria: Callable[[Tensor, Any], Tensor] = criteria  # type: ignore[assignment]
        self._streamer = streamer
        # As in plain decoding: rows that stopped for another reason than an end token go on until all have stopped.
        self._pads_finished = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        pad: Any = config._pad_token_tensor  # which generate sets whenever there is an end token
        self._pad = pad.to(input_ids.device) if self._pads_finished else None
        self._returns_dict = bool(config.return_dict_in_generate)
        self._scores: tuple[Tensor, ...] | None = () if self._returns_dict and config.output_scores else None
        self._logits: tuple[Tensor, ...] | None = () if self._returns_dict and config.output_logits else None

    @property
    def at_work(self) -> Tensor:
        return self._unfinished if self._pads_finished else torch.ones_like(self._unfinished)

    def append(self, tokens: Tensor, scores: Tensor, logits: Tensor) -> int:
        """Adds columns of ``tokens`` [B, T], up to the first at which a row finishes.

        Args:
            scores, logits: [B, >= T, V], what each column was chosen from, after and before processors.

        Returns:
            The number of columns added. Past a row's end, its cached drafts are not the padding of plain decoding.
        """
        for index, column in enumerate(tokens.unbind(1)):
            if self._pad is not None:
                column = torch.where(self._unfinished, column, self._pad)
            self.sequences = torch.cat([self.sequences, column[:, None]], 1)
            if self._scores is not None:
                self._scores += (_column(scores, index),)
            if self._logits is not None:
                self._logits += (_column(logits, index),)
            if self._streamer is not None:
                self._streamer.put(column.cpu())
            done = self._criteria(self.sequences, self._scores) & self._unfinished
            if done.any():
                self._unfinished = self._unfinished & ~done
                self.is_finished = not bool(self._unfinished.any())
                return index + 1
        return tokens.shape[1]

    def remaining(self, settled: Known, num_written: int, *, max_drafts: int) -> Known | None:
        """What is settled behind the columns just written; None for a single row, which keeps nothing back."""
        if settled.tokens.shape[0] == 1:
            return None
        tokens, count = settled.tokens[:, num_written:], settled.count - num_written
        if self._pad is not None:
            tokens = F.pad(tokens, (0, max(max_drafts + 1 - tokens.shape[1], 0)))
            tokens = torch.where(self._unfinished[:, None], tokens, self._pad)
            # Padding without end: a finished row never holds the others up.
            count = torch.where(self._unfinished, count, torch.iinfo(count.dtype).max // 2)
        return Known(tokens=tokens, count=count)

    def output(self, cache: Cache, statistics: SpeculativeStatistics) -> SpeculativeOutput | Tensor:
        if self._streamer is not None:
            self._streamer.end()
        if not self._returns_dict:
            return self.sequences
        parts: dict[str, Any] = {"sequences": self.sequences, "scores": self._scores, "logits": self._logits, CACHE: cache}
        return SpeculativeOutput(**parts, statistics=statistics)


def _column(values: Tensor, index: int) -> Tensor:
    """[B, T, V] -> [B, V]: a copy, since a view would keep all places of the round in memory, those of fallen drafts too."""
    return values[:, index].to(torch.float32, copy=True)

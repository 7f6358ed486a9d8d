"""Settings of speculative decoding."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shadowpeft.errors import ConfigError

# A processor of draft logits: (tokens so far [B, T], logits [B, V]) -> logits [B, V].
DraftProcessor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How the shadow drafts. No setting changes what is generated (greedily) or how it is distributed (sampling).

    Attributes:
        num_draft_tokens: tokens drafted a round; the most of them, where ``adaptive``. 0 drafts nothing.
        adaptive: choose the number for each round from the recent acceptance and from what a draft costs.
        confidence_threshold: stop a round's drafting behind a token that the shadow gave less probability. 0: never.
        draft_vocabulary: the only token ids the shadow may draft; None: all. A shorter list makes the draft's head
            cheaper, which is most of a draft's cost. Tokens outside it are never drafted, but generated all the same.
        draft_processor: changes the draft's logits [B, V] given the tokens so far [B, T], before the generation's own
            processors; for experiments and tests.
        compile_options: keywords of ``torch.compile`` to compile both passes with, as whole graphs; None: eager. Meant
            for a static cache and a constant number of drafts; ``{"mode": "reduce-overhead"}`` asks for CUDA graphs.

    Raises:
        ConfigError: a value outside its range.
    """

    num_draft_tokens: int = 4
    adaptive: bool = False
    confidence_threshold: float = 0.0
    draft_vocabulary: Sequence[int] | None = None
    draft_processor: DraftProcessor | None = None
    compile_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        count = self.num_draft_tokens
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"num_draft_tokens={count!r} is not valid: expected an integer of at least 0")
        if not 0.0 <= self.confidence_threshold < 1.0:
            raise ConfigError(
                f"confidence_threshold={self.confidence_threshold!r} is not valid: expected a number in [0, 1)"
            )
        if self.draft_vocabulary is not None and len(self.draft_vocabulary) == 0:
            raise ConfigError("draft_vocabulary is empty: expected token ids, or None for all of them")


AUTO = SpeculativeConfig(num_draft_tokens=8, adaptive=True)


def as_speculative(value: "SpeculativeConfig | int | str") -> SpeculativeConfig:
    """``generate(speculative=...)`` as a config: a number of drafts a round, ``"auto"``, or a config itself.

    Raises:
        ConfigError: anything else, or a negative number.
    """
    if isinstance(value, SpeculativeConfig):
        return value
    if value == "auto":
        return AUTO
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(
            f"speculative={value!r} is not valid: expected the number of draft tokens a round (0 or more), 'auto' or a "
            "SpeculativeConfig"
        )
    return SpeculativeConfig(num_draft_tokens=value)

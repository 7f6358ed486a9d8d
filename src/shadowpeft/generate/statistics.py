"""What a speculative generation reports about itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass(frozen=True, kw_only=True)
class SpeculativeStatistics:
    """Counts of one ``generate`` call; tokens are summed over its rows, finished rows left out.

    Attributes:
        num_rounds: passes of the base, each over what is pending (first the prompt, then one token) and its drafts. What
            ``generate`` reads before them (input embeddings, a prompt in chunks or behind a cache) is none.
        num_drafted: tokens that the shadow drafted.
        num_tested: those up to the first of a round that fell, itself included; what is behind it is not looked at.
        num_accepted: those that stood.
        num_generated: tokens that the rounds added, in rows that were not finished.
        num_row_rounds: rounds times rows that took part.
        seconds: wall clock of all rounds.
        seconds_drafting: the part of it spent in the shadow and its head, the prompt's s(0) included. On a GPU this is
            the time of the host, which runs ahead of the device.
    """

    num_rounds: int = 0
    num_drafted: int = 0
    num_tested: int = 0
    num_accepted: int = 0
    num_generated: int = 0
    num_row_rounds: int = 0
    seconds: float = 0.0
    seconds_drafting: float = 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted share of the drafts that were tested, 0 if none was: the alpha of Leviathan et al. 2023."""
        return self.num_accepted / self.num_tested if self.num_tested else 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a row gains in a round: its accepted drafts and the base's own token. 1.0 is plain decoding."""
        return self.num_generated / self.num_row_rounds if self.num_row_rounds else 0.0

    @property
    def drafting_share(self) -> float:
        """Share of the rounds' time spent drafting."""
        return self.seconds_drafting / self.seconds if self.seconds else 0.0


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What ``generate(speculative=..., return_dict_in_generate=True)`` returns.

    Attributes:
        statistics: counts and times of this call; None where it fell back to plain decoding.
    """

    statistics: SpeculativeStatistics | None = None


_collectors: ContextVar[tuple[list[SpeculativeStatistics], ...]] = ContextVar("speculative_collectors", default=())


@contextmanager
def collect_statistics() -> Iterator[list[SpeculativeStatistics]]:
    """Within the block, every speculative ``generate`` of this thread appends its statistics to the yielded list.

    For calls whose output is out of reach, as inside a pipeline or an evaluation.
    """
    collected: list[SpeculativeStatistics] = []
    token = _collectors.set((*_collectors.get(), collected))
    try:
        yield collected
    finally:
        _collectors.reset(token)


def report(statistics: SpeculativeStatistics) -> None:
    for collected in _collectors.get():
        collected.append(statistics)

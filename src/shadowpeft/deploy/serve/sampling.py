"""The next token of each row, and what its distribution says about confidence.

Every row draws from its own generator and never looks at its neighbours, so a seed gives the same answer alone and
in any batch (up to rounding of the logits).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. ``temperature=0`` takes the most likely one; ``seed=None`` differs every time."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def generator(self) -> torch.Generator:
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed % 2**63)
        return generator


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """One generated token and the distribution it came from, before temperature and top-p.

    Attributes:
        token: its id.
        logprob: its log-probability, in nats.
        margin: probability of the likeliest token minus that of the next.
        entropy: of the distribution, in nats.
        top: (id, log-probability) of the likeliest tokens, as many as were asked for.
    """

    token: int
    logprob: float
    margin: float
    entropy: float
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token of one row: ``logits`` [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    return draw(distribution(logits, sampling), generator)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """What a sampled token is drawn from: ``logits`` [V] after temperature and top-p, as probabilities [V]."""
    return nucleus((logits.cpu().double() / sampling.temperature).softmax(-1), sampling.top_p)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens that holds ``top_p`` (Holtzman et al. 2020), renormalised: [V] -> [V]."""
    if top_p >= 1:
        return probabilities
    values, order = probabilities.sort(descending=True, stable=True)
    kept = values.cumsum(0) - values < top_p
    kept[0] = True
    chosen = torch.zeros_like(probabilities).scatter(0, order, torch.where(kept, values, 0.0))
    return chosen / chosen.sum()


def uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """One token from weights [V] by inversion: the first whose cumulative weight passes one uniform share of all."""
    total = probabilities.cumsum(0)
    point = uniform(generator) * total[-1]
    place = int(torch.searchsorted(total, point, right=True))
    return min(place, int(probabilities.nonzero()[-1]))


def facts(logits: Tensor, token: int, num_top: int = 0) -> TokenFacts:
    """What ``logits`` [V] say about ``token``."""
    logprobs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    values, ids = logprobs.topk(min(max(num_top, 2), logprobs.shape[-1]))
    best = values.exp()
    probabilities = logprobs.exp()
    return TokenFacts(
        token=token,
        logprob=float(logprobs[token]),
        margin=float(best[0] - best[1]),
        entropy=float(torch.special.entr(probabilities).sum()),
        top=tuple(zip(ids.tolist(), values.tolist(), strict=True))[:num_top],
    )

"""Confidence scores of an answer from the distributions of its tokens. None needs training or a second pass.

Every score is at most 0, and 0 is certainty, so that ``exp(score / T)`` is a probability for any temperature T.
"""

import math
from collections.abc import Callable, Sequence

from shadowpeft.deploy.serve.sampling import TokenFacts

Facts = Sequence[TokenFacts]
_SMALLEST = 1e-12


def sequence_logprob(facts: Facts) -> float:
    """Log-probability of the whole answer. Falls with length (Gupta et al. 2024)."""
    return sum(fact.logprob for fact in facts)


def mean_logprob(facts: Facts) -> float:
    """Log-probability a token."""
    return sequence_logprob(facts) / len(facts)


def min_logprob(facts: Facts) -> float:
    """Log-probability of the least likely token."""
    return min(fact.logprob for fact in facts)


def margin(facts: Facts) -> float:
    """Log of the smallest lead that the likeliest token had over the next."""
    return math.log(max(min(fact.margin for fact in facts), _SMALLEST))


def entropy(facts: Facts) -> float:
    """Minus the largest entropy of a token's distribution, in nats."""
    return -max(max(fact.entropy, 0.0) for fact in facts)


def first_logprob(facts: Facts) -> float:
    """Log-probability of the first token; of greedy answers the maximum softmax (Hendrycks and Gimpel 2017)."""
    return facts[0].logprob


SCORES: dict[str, Callable[[Facts], float]] = {
    "sequence_logprob": sequence_logprob,
    "mean_logprob": mean_logprob,
    "min_logprob": min_logprob,
    "margin": margin,
    "entropy": entropy,
    "first_logprob": first_logprob,
}


def all_scores(facts: Facts) -> dict[str, float]:
    """Every score by name."""
    return {name: min(score(facts), 0.0) for name, score in SCORES.items()}

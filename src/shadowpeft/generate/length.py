"""How many tokens to draft."""

# Weight and value of what is assumed before the first round, and how fast rounds are forgotten.
_PRIOR_ACCEPTANCE, _PRIOR_TESTS, _MEMORY = 0.7, 4.0, 0.9
# Rounds without a draft after which one is tried again.
_ROUNDS_BETWEEN_TRIALS = 16
# What one more place costs a base pass that is bound by reading its weights: a small guess, so that none is free.
_COST_OF_PLACE = 0.03


def expected_speedup(
    acceptance: float, num_drafts: int, draft_cost: float, place_cost: float = _COST_OF_PLACE
) -> float:
    """Tokens a round (Leviathan et al. 2023, Eq. 1) over its cost in plain steps (their Theorem 3.8).

    Args:
        acceptance: probability that a draft stands.
        draft_cost: cost of one draft, in plain attached steps.
        place_cost: cost of one more place in the base's pass, in plain attached steps.
    """
    tokens = sum(acceptance**place for place in range(num_drafts + 1))
    return tokens / (1 + num_drafts * (draft_cost + place_cost))


class DraftLength:
    """Drafts of the next round: a constant, or the number with the best expected speed-up at the recent acceptance.

    It reads no clock, so that sampling with a seed gives the same tokens on every run.

    Args:
        maximum: most drafts a round.
        adaptive: False drafts ``maximum`` tokens every round.
        draft_cost: cost of one draft, in plain attached steps.
    """

    def __init__(self, maximum: int, *, adaptive: bool, draft_cost: float) -> None:
        self.maximum = maximum
        self._adaptive = adaptive
        self._draft_cost = draft_cost
        self._accepted, self._tested = _PRIOR_ACCEPTANCE * _PRIOR_TESTS, _PRIOR_TESTS
        self._rounds_without = 0

    def next(self) -> int:
        if not self._adaptive:
            return self.maximum
        acceptance = self._accepted / self._tested
        best = max(range(self.maximum + 1), key=lambda n: expected_speedup(acceptance, n, self._draft_cost))
        if best == 0 and self.maximum > 0:
            self._rounds_without += 1
            return 1 if self._rounds_without % _ROUNDS_BETWEEN_TRIALS == 0 else 0
        return best

    def observe(self, num_accepted: int, num_tested: int) -> None:
        """``num_tested`` drafts were tested up to and including the first rejection, summed over rows."""
        self._accepted = _MEMORY * self._accepted + num_accepted
        self._tested = _MEMORY * self._tested + num_tested

"""Algorithm 1 of Leviathan et al. 2023 on its own, and how many tokens to draft."""

import torch
from torch import Tensor

from goodness import chi_square_p_value
from shadowpeft.generate.acceptance import accept_greedy, accept_sampled, num_leading
from shadowpeft.generate.length import DraftLength, expected_speedup

NUM_TOKENS, NUM_ROWS = 5, 60_000


def distributions(seed: int) -> tuple[Tensor, Tensor]:
    """q [2, V] and p [3, V], each far from the other, p with a token it never gives."""
    generator = torch.Generator().manual_seed(seed)
    q = (2 * torch.randn(2, NUM_TOKENS, generator=generator, dtype=torch.float64)).softmax(-1)
    p = (2 * torch.randn(3, NUM_TOKENS, generator=generator, dtype=torch.float64)).softmax(-1)
    p[:, 1] = 0
    return q, p / p.sum(-1, keepdim=True)


def test_leading_ends_at_the_first_that_does_not_hold():
    held = torch.tensor([[True, True, False, True], [False, True, True, True], [True, True, True, True]])
    assert num_leading(held).tolist() == [2, 0, 4]


def test_greedy_accepts_while_the_target_agrees_and_adds_its_own_token():
    drafts, choices = torch.tensor([[1, 2], [1, 3], [9, 3]]), torch.tensor([[1, 2, 7], [1, 2, 7], [1, 2, 7]])
    accepted, behind = accept_greedy(drafts, choices)
    assert (accepted.tolist(), behind.tolist()) == ([2, 1, 0], [7, 2, 1])
    forced = torch.tensor([[False, False], [False, False], [True, True]])
    accepted, behind = accept_greedy(drafts, choices, forced)
    assert (accepted.tolist(), behind.tolist()) == ([2, 1, 2], [7, 2, 7])


def test_tokens_are_distributed_as_if_drawn_from_the_target():
    """Chi-square at 1e-4 for each place, 60,000 rows a seed: right code fails once in 5,000 changes of the seeds."""
    for seed in range(2):
        torch.manual_seed(seed)
        q, p = distributions(seed)
        drafts = torch.stack([torch.multinomial(row, NUM_ROWS, replacement=True) for row in q], 1)
        accepted, behind = accept_sampled(drafts, q.expand(NUM_ROWS, -1, -1), p.expand(NUM_ROWS, -1, -1))
        tokens = torch.cat([drafts, behind[:, None]], 1).scatter(1, accepted[:, None], behind[:, None])
        for place in range(3):
            reached = tokens[accepted >= place, place]
            counts = reached.bincount(minlength=NUM_TOKENS)
            assert counts[1] == 0
            assert chi_square_p_value(counts, p[place]) > 1e-4
        # The share that is accepted is the overlap of the two distributions (Leviathan et al., Corollary 3.6).
        overlap = float(torch.minimum(q[0], p[0]).sum())
        assert abs(float((accepted >= 1).double().mean()) - overlap) < 4 * (0.25 / NUM_ROWS) ** 0.5


def test_the_statistical_test_notices_drafts_that_are_never_rejected():
    torch.manual_seed(0)
    q, p = distributions(0)
    drawn = torch.multinomial(q[0], NUM_ROWS, replacement=True)
    assert chi_square_p_value(drawn.bincount(minlength=NUM_TOKENS), p[0]) < 1e-12


def test_a_draft_equal_to_the_target_always_stands():
    torch.manual_seed(0)
    p = torch.rand(1000, 3, NUM_TOKENS).softmax(-1)
    drafts = torch.stack([torch.multinomial(p[:, place], 1).squeeze(1) for place in range(2)], 1)
    accepted, _ = accept_sampled(drafts, p[:, :2], p)
    assert bool((accepted == 2).all())


def test_nothing_drafted_draws_from_the_target():
    p = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
    accepted, behind = accept_sampled(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, 2), p)
    assert (accepted.tolist(), behind.tolist()) == ([0, 0], [1, 0])


def test_expected_speedup_is_that_of_the_paper():
    # Leviathan et al. 2023, Theorem 3.8: (1 - a^(k+1)) / ((1 - a) (k c + 1)).
    assert abs(expected_speedup(0.8, 5, 0.1, 0.0) - (1 - 0.8**6) / (0.2 * 1.5)) < 1e-12
    assert expected_speedup(1.0, 4, 0.0, 0.0) == 5.0


def test_adaptive_length_grows_shrinks_and_tries_again():
    length = DraftLength(8, adaptive=True, draft_cost=0.05)
    for _ in range(30):
        drafts = length.next()
        length.observe(drafts, drafts)
    assert length.next() == 8
    for _ in range(60):
        length.observe(0, 1)
    assert sum(length.next() for _ in range(32)) == 2  # one trial in sixteen rounds
    assert DraftLength(3, adaptive=False, draft_cost=0.9).next() == 3

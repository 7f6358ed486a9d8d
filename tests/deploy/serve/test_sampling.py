import math

import pytest
import torch
from torch.testing import assert_close

from shadowpeft.deploy.serve.sampling import Sampling, choose, facts, nucleus


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampling = Sampling(temperature=1.5, seed=0)
    generator, n = sampling.generator(), 20_000
    counts = torch.bincount(torch.tensor([choose(logits, sampling, generator) for _ in range(n)]), minlength=4)
    expected = (logits.double() / 1.5).softmax(-1) * n
    # 3 degrees of freedom: chi-square passes 16.3 once in a thousand; the seed is fixed.
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3


def test_the_nucleus_is_the_smallest_set_that_holds_top_p():
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    assert_close(nucleus(probabilities, 0.7), torch.tensor([0.0, 2 / 3, 0.0, 1 / 3]))
    assert_close(nucleus(probabilities, 0.5), torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert_close(nucleus(probabilities, 1e-9), torch.tensor([0.0, 1.0, 0.0, 0.0]))


def test_tokens_outside_the_nucleus_are_never_drawn():
    sampling = Sampling(temperature=2.0, top_p=0.6, seed=1)
    generator = sampling.generator()
    drawn = {choose(torch.tensor([3.0, 2.9, 0.0, -1.0]), sampling, generator) for _ in range(2000)}
    assert drawn == {0, 1}


def test_facts_of_a_uniform_and_of_a_certain_distribution():
    uniform = facts(torch.zeros(8, dtype=torch.float64), 3, num_top=2)
    assert uniform.logprob == pytest.approx(-math.log(8)) and uniform.entropy == pytest.approx(math.log(8))
    assert uniform.margin == pytest.approx(0) and len(uniform.top) == 2
    certain = facts(torch.tensor([0.0, 900.0, 0.0]), 1)
    assert (certain.logprob, certain.margin, certain.entropy, certain.top) == (0.0, 1.0, 0.0, ())

"""Sampled speculation has the distribution of plain sampling, computed exactly over a tiny vocabulary."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from goodness import chi_square_p_value
from shadowpeft import SpeculativeConfig, collect_statistics
from speculation import adapted

NUM_TOKENS, NUM_PLACES, NUM_SAMPLES = 6, 3, 3000
PROMPT = torch.tensor([[3, 5, 4]])


@pytest.fixture(scope="module")
def model():
    return adapted("llama", vocab_size=NUM_TOKENS, num_hidden_layers=2, bos_token_id=None, eos_token_id=None)


@torch.no_grad()
def joint_distribution(model, processors: LogitsProcessorList) -> Tensor:
    """[V^3]: probability of every sequence of three tokens under plain sampling, from the definition."""
    joint = torch.ones(1, dtype=torch.float64)
    for place in range(NUM_PLACES):
        prefixes = (
            torch.tensor(list(itertools.product(range(NUM_TOKENS), repeat=place))).view(NUM_TOKENS**place, place).long()
        )
        ids = torch.cat([PROMPT.expand(len(prefixes), -1), prefixes], 1)
        scores = processors(ids, model(ids, use_cache=False).logits[:, -1].float())
        joint = (joint[:, None] * scores.softmax(-1).double()).flatten()
    return joint


def sample(model, speculative, **options) -> Tensor:
    """[V^3]: how often each sequence of three tokens came up."""
    out = model.generate(
        PROMPT,
        do_sample=True,
        max_new_tokens=NUM_PLACES,
        num_return_sequences=NUM_SAMPLES,
        speculative=speculative,
        **options,
    )
    digits = out[:, PROMPT.shape[1] :]
    return (
        (digits * NUM_TOKENS ** torch.arange(NUM_PLACES - 1, -1, -1)).sum(1).bincount(minlength=NUM_TOKENS**NUM_PLACES)
    )


CASES = {
    "plain": ({"top_k": 0}, [], 2),
    "temperature and top-k": (
        {"temperature": 1.6, "top_k": 4},
        [TemperatureLogitsWarper(1.6), TopKLogitsWarper(4)],
        2,
    ),
    "top-p": ({"top_p": 0.8, "top_k": 0}, [TopPLogitsWarper(0.8)], 1),
    "repetition penalty": (
        {"repetition_penalty": 1.5, "top_k": 0},
        [RepetitionPenaltyLogitsProcessor(1.5)],
        2,
    ),
    "cut draft vocabulary": ({"top_k": 0}, [], SpeculativeConfig(num_draft_tokens=2, draft_vocabulary=[0, 2, 5])),
    "adaptive": ({"top_k": 0}, [], SpeculativeConfig(num_draft_tokens=2, adaptive=True, confidence_threshold=0.3)),
    "drafts sharper than they should be": (
        {"top_k": 0},
        [],
        SpeculativeConfig(num_draft_tokens=2, draft_processor=lambda prefix, logits: logits * 3),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_three_tokens_have_the_joint_distribution_of_plain_sampling(model, case):
    """Chi-square over 216 sequences, 3,000 draws, one fixed seed; the bound 1e-4 is the chance that right code fails.

    The 3,000 rows accept different numbers, so what they keep from round to round is under test as well.
    """
    options, processors, speculative = CASES[case]
    torch.manual_seed(1)
    with collect_statistics() as statistics:
        counts = sample(model, speculative, **options)
    expected = joint_distribution(model, LogitsProcessorList(processors))
    assert bool((counts[expected == 0] == 0).all())
    assert chi_square_p_value(counts, expected) > 1e-4
    assert 0 < statistics[0].num_accepted < statistics[0].num_drafted


def test_single_rows_have_the_distribution_of_plain_sampling(model):
    """As above for one row a call: 250 draws of two tokens."""
    torch.manual_seed(2)
    counts = torch.zeros(NUM_TOKENS**2, dtype=torch.long)
    for _ in range(250):
        first, second = model.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=2, speculative=1)[
            0, -2:
        ].tolist()
        counts[first * NUM_TOKENS + second] += 1
    expected = joint_distribution(model, LogitsProcessorList()).view(-1, NUM_TOKENS).sum(1)
    assert chi_square_p_value(counts, expected) > 1e-4


def test_the_bound_is_tight_enough_to_notice_the_shadows_own_distribution(model):
    """Without rejection the shadow's distribution would come out; the test above must not pass for that."""
    with torch.no_grad():
        ids = PROMPT.expand(1, -1)
        shadow = model(ids, output_shadow_logits=True).shadow_logits[:, -1].float().softmax(-1)[0]
        target = model(ids).logits[:, -1].float().softmax(-1)[0]
    torch.manual_seed(0)
    counts = torch.multinomial(shadow, NUM_SAMPLES, replacement=True).bincount(minlength=NUM_TOKENS)
    assert chi_square_p_value(counts, target.double()) < 1e-4


def test_the_same_seed_gives_the_same_tokens(model):
    drawn = []
    for _ in range(2):
        torch.manual_seed(4)
        drawn.append(model.generate(PROMPT, do_sample=True, max_new_tokens=12, speculative="auto"))
    assert torch.equal(*drawn)

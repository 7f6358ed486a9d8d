import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.loss.loss_utils import ForCausalLMLoss

from shadowpeft.core.losses import causal_lm_loss, pool_last_token, sequence_classification_loss

LOGITS = torch.randn(3, 7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))


def masked_labels():
    labels = LABELS.clone()
    labels[:, :4] = -100
    return labels


def test_causal_loss_equals_transformers_own_with_and_without_a_count():
    labels = masked_labels()
    for count in (None, torch.tensor(40)):
        theirs = ForCausalLMLoss(LOGITS.float(), labels, 11, num_items_in_batch=count)
        assert_close(causal_lm_loss(LOGITS.float(), labels, count), theirs)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
def test_a_batch_without_labels_costs_nothing_and_is_not_nan(count):
    """A count of 0 is what the Trainer gives a step in which no batch has a label."""
    logits = LOGITS.clone().requires_grad_()
    loss = causal_lm_loss(logits, torch.full_like(LABELS, -100), count)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_halves_of_a_batch_sum_to_the_whole_under_a_common_count():
    labels = masked_labels()
    count = (labels[:, 1:] != -100).sum()
    halves = sum(causal_lm_loss(LOGITS[part], labels[part], count) for part in (slice(0, 1), slice(1, 3)))
    assert_close(halves, causal_lm_loss(LOGITS, labels))


def test_classification_losses_match_torch_for_each_kind_of_label():
    logits = LOGITS[:, 0]
    classes, several = LABELS[:, 0], (LOGITS[:, 1] > 0).double()
    assert_close(sequence_classification_loss(logits, classes), F.cross_entropy(logits, classes))
    assert_close(
        sequence_classification_loss(logits, several), F.binary_cross_entropy_with_logits(logits, several)
    )
    assert_close(sequence_classification_loss(logits[:, :1], logits[:, 1]), F.mse_loss(logits[:, 0], logits[:, 1]))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "single_label_classification"])
def test_classification_losses_are_means_over_all_labels_of_a_step(problem):
    """The Trainer counts the numbers of [B, C], as it counts the classes of [B]."""
    logits, labels = LOGITS[:, 0], LABELS[:, 0] if problem.startswith("single") else (LOGITS[:, 1] > 0).double()
    whole = sequence_classification_loss(logits, labels, problem_type=problem)
    count = labels.ne(-100).sum()
    halves = [
        sequence_classification_loss(logits[part], labels[part], count, problem_type=problem)
        for part in (slice(0, 1), slice(1, 3))
    ]
    assert_close(sum(halves), whole)


def test_float_labels_of_another_shape_than_the_logits_are_refused():
    for problem in ("regression", "multi_label_classification"):
        with pytest.raises(ValueError, match=r"labels of shape \(3,\) do not fit logits \(3, 11\)"):
            sequence_classification_loss(LOGITS[:, 0], LOGITS[:, 0, 0], problem_type=problem)


def test_pooling_takes_the_last_real_token_on_either_side():
    hidden = torch.arange(2 * 4, dtype=torch.float64).view(2, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    assert pool_last_token(hidden, mask).flatten().tolist() == [1.0, 7.0]
    assert pool_last_token(hidden, None).flatten().tolist() == [3.0, 7.0]

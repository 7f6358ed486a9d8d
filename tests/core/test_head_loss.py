"""Losses behind the head in chunks against the plain formulas on whole logits."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.trainer_pt_utils import LabelSmoother

from shadowpeft.core.head_loss import LogitFinish, LossSpec
from shadowpeft.core.losses import causal_lm_loss, distillation_loss, shared_head_losses

pytestmark = pytest.mark.contract

B, T, D, V = 3, 7, 6, 11
FINISHES = {
    "plain": LogitFinish(),
    "capped": LogitFinish(cap=2.5),
    "multiplied": LogitFinish(multiply=0.3),
    "divided": LogitFinish(divide=4.0),
    "all": LogitFinish(multiply=0.5, divide=0.25, cap=3.0),
}


def problem(*, bias=False, trained=False, dtype=torch.float64):
    """(head, hidden, initial, labels with a third of the positions in use)."""
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias).to(dtype).requires_grad_(trained)
    hidden, initial = (torch.randn(B, T, D, dtype=dtype, requires_grad=True) for _ in range(2))
    labels = torch.randint(0, V, (B, T))
    labels[:, : 2 * T // 3] = -100
    labels[1] = -100
    return head, hidden, initial, labels


def plain_total(spec, head, hidden, initial, labels, count=None):
    main, shadow = spec.finish(head(hidden)), spec.finish(head(initial))
    total = causal_lm_loss(main, labels, count, label_smoothing=spec.label_smoothing)
    total = total + spec.shadow_weight * causal_lm_loss(shadow, labels, count, label_smoothing=spec.label_smoothing)
    return total + spec.distillation_weight * distillation_loss(
        main, shadow, labels, count, temperature=spec.temperature
    )


def gradients(total, head, hidden, initial):
    total.backward()
    found = [x.grad for x in (hidden, initial, *head.parameters())]
    for x in (hidden, initial, *head.parameters()):
        x.grad = None
    return found


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_losses_and_gradients_equal_the_plain_formulas(finish, bias, trained):
    head, hidden, initial, labels = problem(bias=bias, trained=trained)
    spec = LossSpec(
        finish=FINISHES[finish], label_smoothing=0.1, shadow_weight=0.3, distillation_weight=0.7, temperature=2.0,
        chunk_rows=2,
    )  # fmt: skip
    for count in (None, 40, torch.tensor(40)):
        found = shared_head_losses(spec, head, hidden, initial, labels, count)
        plain = plain_total(spec, head, hidden, initial, labels, count)
        assert_close(found.total, plain)
        assert_close(gradients(found.total, head, hidden, initial), gradients(plain, head, hidden, initial))


def test_parts_are_reported_without_weight_and_without_gradient():
    head, hidden, initial, labels = problem()
    spec = LossSpec(shadow_weight=0.3, distillation_weight=0.7)
    found = shared_head_losses(spec, head, hidden, initial, labels)
    assert_close(found.main, causal_lm_loss(head(hidden), labels))
    assert_close(found.shadow, causal_lm_loss(head(initial), labels))
    assert_close(found.distillation, distillation_loss(head(hidden), head(initial), labels))
    assert not (found.main.requires_grad or found.shadow.requires_grad or found.distillation.requires_grad)
    assert_close(found.total, found.main + 0.3 * found.shadow + 0.7 * found.distillation)


def test_distillation_pulls_the_shadow_alone():
    head, hidden, initial, labels = problem()
    spec = LossSpec(distillation_weight=1.0)
    with_it = gradients(shared_head_losses(spec, head, hidden, initial, labels).total, head, hidden, initial)
    without = gradients(shared_head_losses(LossSpec(), head, hidden, initial, labels).total, head, hidden, initial)
    assert_close(with_it[0], without[0])
    assert with_it[1].any()
    assert without[1] is None


def test_distillation_between_equal_distributions_is_zero():
    head, hidden, _, labels = problem()
    assert distillation_loss(head(hidden), head(hidden), labels).abs() < 1e-12


def test_a_shadow_without_any_weight_never_reaches_the_head():
    head, hidden, initial, labels = problem()
    found = shared_head_losses(LossSpec(), head, hidden, initial, labels)
    assert found.shadow is None
    assert found.distillation is None


def test_label_smoothing_is_transformers_own():
    head, hidden, initial, labels = problem()
    found = shared_head_losses(LossSpec(label_smoothing=0.2), head, hidden, initial, labels)
    theirs = LabelSmoother(epsilon=0.2)({"logits": head(hidden)}, labels, shift_labels=True)
    assert_close(found.total, theirs)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
def test_a_batch_without_labels_costs_nothing_and_is_not_nan(count):
    """A count of 0 is what the Trainer gives a step in which no batch has a label."""
    head, hidden, initial, labels = problem(trained=True)
    spec = LossSpec(shadow_weight=1.0)
    found = shared_head_losses(spec, head, hidden, initial, torch.full_like(labels, -100), count)
    assert found.total.item() == 0
    assert not any(gradient.any() for gradient in gradients(found.total, head, hidden, initial))


def test_ignored_positions_never_reach_the_head():
    head, hidden, initial, labels = problem()
    with torch.no_grad():
        hidden[:, : T // 2], initial[:, : T // 2] = float("nan"), float("inf")
    found = shared_head_losses(LossSpec(shadow_weight=1.0), head, hidden, initial, labels)
    assert torch.isfinite(found.total)
    found.total.backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(initial.grad).all()


@pytest.mark.parametrize("wrong", [-1, V])
def test_a_label_that_is_no_token_is_an_error_whatever_the_head_is(wrong):
    """-1 masks labels in other libraries; here it has to be -100, and must not pass for token 0."""
    head, hidden, initial, labels = problem()
    labels[0, -2] = wrong
    for kind in (head, nn.Sequential(head)):
        with pytest.raises((IndexError, RuntimeError), match=f"{wrong} is out of bounds"):
            shared_head_losses(LossSpec(shadow_weight=1.0), kind, hidden, initial, labels)


def test_no_logits_are_kept_for_backward():
    head, hidden, initial, labels = problem()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        shared_head_losses(LossSpec(shadow_weight=1.0), head, hidden, initial, labels)
    num_labels = int((labels[:, 1:] != -100).sum())
    assert sorted(size for size in sizes if size > num_labels) == [num_labels * D] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_heads_agree_to_their_rounding(dtype):
    """fp32: default tolerance. bf16: logits and their gradient are rounded to 8 bits on both paths, at other places."""
    head, hidden, initial, labels = problem(bias=True, trained=True, dtype=dtype)
    spec = LossSpec(shadow_weight=0.5, distillation_weight=0.5, chunk_rows=4)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    found = shared_head_losses(spec, head, hidden, initial, labels)
    plain = plain_total(spec, head, hidden, initial, labels)
    assert_close(found.total, plain, **tolerance)
    assert_close(
        gradients(found.total, head, hidden, initial), gradients(plain, head, hidden, initial), **tolerance
    )


@pytest.mark.parametrize("scale", [2.0**16, 2.0**20])
def test_gradients_of_float16_neither_vanish_nor_overflow_before_a_scaler_multiplies_them(scale):
    """In float16, a gradient over 2^16 labels is below the smallest number, and a scaler's usual factor, 2^16, infinite."""
    head, hidden, initial, labels = problem(dtype=torch.float16)
    spec = LossSpec(shadow_weight=0.1, distillation_weight=0.1)
    found = shared_head_losses(spec, head, hidden, initial, labels, 2**16).total * scale
    wide = [head.double(), *(x.detach().double().requires_grad_() for x in (hidden, initial))]
    expected = gradients(plain_total(spec, *wide, labels, 2**16) * scale, *wide)[:2]
    found = [x.double() for x in torch.autograd.grad(found, (hidden, initial))]
    # Logits, their gradient and the result are each rounded to 11 bits, a few terms in a sum cancel.
    assert_close(found, expected, rtol=0.01, atol=0.002 * float(expected[0].abs().max()))


def test_unlikely_targets_have_a_finite_loss():
    head, hidden, initial, labels = problem(dtype=torch.float32)
    with torch.no_grad():
        head.weight.mul_(1e3)
    found = shared_head_losses(LossSpec(), head, hidden, initial, labels)
    assert_close(found.total, causal_lm_loss(head(hidden), labels))


def test_a_head_that_is_more_than_a_linear_map_is_called_as_it_is():
    head, hidden, initial, labels = problem()
    spec = LossSpec(shadow_weight=0.3, distillation_weight=0.7)
    wrapped = nn.Sequential(head)
    found = shared_head_losses(spec, wrapped, hidden, initial, labels)
    assert_close(found, shared_head_losses(spec, head, hidden, initial, labels))

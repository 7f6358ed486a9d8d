"""The step as one operation against the equations one after the other."""

import contextlib
from unittest import mock

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from models import randomise, tiny_config
from shadowpeft.core import ShadowConfig
from shadowpeft.core.kernels import Branch, StepSpec, StepWeights, fused_step, step_backend
from shadowpeft.core.kernels.backend import variant_obstacle
from shadowpeft.core.network import ShadowNetwork

pytestmark = pytest.mark.contract

D, B, T = 6, 2, 5
VARIANTS = {
    "paper": {},
    "authors": ShadowConfig.preset("authors").to_dict() | {"r": 4, "update_hidden_size": 3},
    "peft": ShadowConfig.preset("peft").to_dict() | {"r": 4, "update_hidden_size": 3},
    "from the state": {"inject_from": "state"},
    "no update": {"use_update": False},
    "no norm": {"update_norm": "none"},
    "biases": {"update_bias": True},
    "gelu, one rank": {"update_activation": "gelu", "r": 1, "update_hidden_size": 1},
    "shared": {"share_steps": True},
    "dropout on the input": {"dropout_at": "input"},
    "scaled state": {"scale_state": True},
    "scaled state and diagonal": {"scale_state": True, "inject_diagonal": True},
    "diagonal, from the state": {"inject_diagonal": True, "inject_from": "state"},
    "scaled diagonal without update": {"scale_state": True, "inject_diagonal": True, "use_update": False},
    "scaled, from the state": {"scale_state": True, "inject_from": "state"},
    "activation": {"scale_state": True, "inject_activation": "silu"},
    "activation, diagonal, no update": {
        **{"scale_state": True, "inject_activation": "silu", "inject_diagonal": True, "use_update": False}
    },
    "activation, from the state": {"scale_state": True, "inject_activation": "gelu", "inject_from": "state"},
    "rank scaled": {"scale_state": True, "inject_diagonal": True, "alpha_rank": 2},
    "rank scaled, diagonal from the state": {"inject_diagonal": True, "inject_from": "state", "alpha_rank": 2},
    "rank scaled, activation": {
        **{"scale_state": True, "inject_activation": "silu", "inject_diagonal": True, "use_update": False, "alpha_rank": 2}
    },
    "activation, dropout on the input": {"scale_state": True, "inject_activation": "silu", "dropout_at": "input"},
    "branch": {"scale_state": True, "inject_branch": True},
    "branch, diagonal, activation, no update": {
        **{"scale_state": True, "inject_branch": True, "inject_activation": "silu", "inject_diagonal": True},
        "use_update": False,
    },
    "branch, from the state, dropout on the input": {
        **{"scale_state": True, "inject_branch": True, "inject_from": "state", "dropout_at": "input", "first_block": 0}
    },
    "branch, midpoints, rank scaled": {
        **{"scale_state": True, "inject_branch": True, "inject_between": "sublayers", "inject_diagonal": True, "alpha_rank": 2}
    },
    "midpoints": {"inject_between": "sublayers"},
}


def network(dtype=torch.float64, **config):
    made = ShadowNetwork(
        tiny_config(**config), nn.Identity(), width=D, num_blocks=5, backbone_width=D, embedding_width=D
    )
    randomise(made)
    return made.to(dtype)


def states(dtype=torch.float64, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def plain_steps():
    """Within the block, steps run as plain autograd."""
    return mock.patch("shadowpeft.core.network.step_backend", return_value=("autograd", "asked for"))


def chain(made, h, s):
    """All four steps with something between them that keeps its input, as a block does."""
    added = h * 0.5
    for index in range(made.config.first_block, 5):
        h, s = made.step(index, h, s, added if index else None)
        if made.config.has_midpoints:
            h = made.step_between(index, h + torch.sin(h), s, torch.sin(h))
        added = torch.tanh(h)
        h = h + added
    return h, s


def outcome(made, dtype=torch.float64, *, plain, seed=3):
    """(h, s, gradients of everything) of a chain of steps in training mode, with seeded dropout."""
    made.train().zero_grad()
    h, s = (tensor.requires_grad_() for tensor in states(dtype))
    torch.manual_seed(seed)
    with plain_steps() if plain else contextlib.nullcontext():
        out = chain(made, h, s)
    weight = torch.linspace(-1, 1, D, dtype=dtype)
    ((out[0] * weight).sum() + (out[1] * weight.flip(0)).square().sum()).backward()
    return [*out, h.grad, s.grad], {name: p.grad for name, p in made.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_all_gradients_equal_plain_autograd_under_the_same_masks(variant, dropout):
    made = network(**VARIANTS[variant] | {"shadow_dropout": dropout, "adapter_dtype": "float64"})
    assert_close(outcome(made, plain=False), outcome(made, plain=True))


ACTIVATED = {"scale_state": True, "inject_activation": "silu", "inject_diagonal": True}


BRANCHED = {"scale_state": True, "inject_branch": True, "inject_between": "sublayers"}


@pytest.mark.parametrize("formula", [{}, ACTIVATED, BRANCHED], ids=["paper", "activated", "branched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_states_agree_to_their_rounding(dtype, formula):
    """In fp32 to torch's default tolerance. In bf16 the wide results are rounded to 8 bits at the same places in both
    paths, but gradients of s are added up in fp32 here and after rounding there: two roundings of 2^-8 a step."""
    made = network(torch.float32, shadow_dropout=0.4, **formula)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    assert_close(outcome(made, dtype, plain=False), outcome(made, dtype, plain=True), **tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_operation_passes_gradcheck(variant, dropout):
    config = tiny_config(**VARIANTS[variant] | {"shadow_dropout": dropout, "adapter_dtype": "float64"})
    made = network(**config.to_dict())
    w = made._weights(made.injections[-1], made.updates[-1] if len(made.updates) else None)
    spec = StepSpec.of(config, training=True)

    W_branch = made.injections[-1].W_branch

    def step(h, s, added, *weights):
        torch.manual_seed(7)
        supply = iter(weights)
        branch = None if W_branch is None else Branch(added, next(supply))
        return fused_step("recompute", spec, h, s, StepWeights(*(None if x is None else next(supply) for x in w)), branch)

    given = (*states(), states(seed=5)[0], *(x for x in (W_branch, *w) if x is not None))
    inputs = [x.detach().requires_grad_() for x in given]
    assert torch.autograd.gradcheck(step, inputs)


def test_strided_states_are_as_good_as_contiguous_ones():
    made = network(shadow_dropout=0.0)
    h, s = states()
    strided = h.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    whole = h.clone().requires_grad_()
    for start in (strided, whole):
        sum(x.sin().sum() for x in chain(made, start, s)).backward()
    assert not strided.is_contiguous()
    assert_close(strided.grad, whole.grad)


def saved_bytes(run):
    """(result, unique storages kept for backward as {address: bytes})."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, kept


def test_one_step_keeps_its_output_the_old_state_and_the_bottleneck_only():
    made = network(shadow_dropout=0.4).train()
    h, s = states()
    (h_out, _), kept = saved_bytes(lambda: made.step(2, h.requires_grad_(), s.requires_grad_()))
    for parameter in made.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert kept.pop(h_out.untyped_storage().data_ptr())
    assert kept.pop(s.untyped_storage().data_ptr())
    assert list(kept.values()) == [B * T * made.config.r * 8]


def test_a_step_with_an_activation_keeps_the_scale_of_each_token_beside_that():
    made = network(shadow_dropout=0.4, **ACTIVATED).train()
    h, s = states()
    (h_out, s_out), kept = saved_bytes(lambda: made.step(2, h.requires_grad_(), s.requires_grad_()))
    for tensor in (*made.parameters(), h_out, s, s_out):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert sorted(kept.values()) == [B * T * 8, B * T * made.config.r * 8]


def test_sixteen_bit_states_keep_the_input_itself_so_that_nothing_is_rounded_twice():
    made = network(torch.float32).train()
    h, s = states(torch.bfloat16)
    (h_out, _), kept = saved_bytes(lambda: made.step(2, h.requires_grad_(), s.requires_grad_()))
    assert h.untyped_storage().data_ptr() in kept
    assert h_out.untyped_storage().data_ptr() not in kept


def test_a_first_block_whose_input_needs_no_gradient_still_trains_the_step():
    made = network().train()
    h, s = states()
    made.step(1, h, s.requires_grad_())[0].sin().sum().backward()
    assert s.grad.any()
    assert made.injections[0].W_up.grad.any()


@pytest.mark.parametrize("at", ["bottleneck", "input"])
def test_masks_are_unbiased_and_independent_between_calls(at):
    """The mean of n = 4000 corrections lies within 5 standard errors of the undropped one, in every element."""
    made = network(shadow_dropout=0.3, dropout_at=at, transform_dropout=False, update_norm="none")
    h, s = (x[:1, :1].expand(1, 4000, D).clone().requires_grad_() for x in states())
    expected, _ = made.eval().step(1, h[:, :1], s[:, :1])
    found, _ = made.train().step(1, h, s)
    error = (found.mean(1) - expected[:, 0]).abs()
    assert (error <= 5 * found.std(1) / 4000**0.5).all()
    assert found.std(1).min() > 0
    assert not torch.equal(made.step(1, h, s)[0], found)


def test_masks_follow_the_seed_and_backward_does_not_move_the_generator():
    made = network(shadow_dropout=0.3).train()
    h, s = (x.requires_grad_() for x in states())
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        out = made.step(2, h, s)[0]
        before = torch.get_rng_state()
        out.sum().backward()
        assert torch.equal(torch.get_rng_state(), before)
        results.append(out)
    assert torch.equal(*results)


def test_a_checkpointed_step_draws_its_masks_again():
    from torch.utils.checkpoint import checkpoint

    made, gradients = network(shadow_dropout=0.4).train(), []
    for checkpointed in (False, True):
        made.zero_grad()
        h, s = (x.requires_grad_() for x in states())
        torch.manual_seed(2)
        run = (lambda *x: checkpoint(chain, *x, use_reentrant=False)) if checkpointed else chain
        sum(x.sin().sum() for x in run(made, h, s)).backward()
        gradients.append({name: p.grad for name, p in made.named_parameters()})
    assert_close(*gradients)


def test_under_autocast_the_step_stays_in_the_dtype_of_its_weights():
    made = network(torch.float32).train()
    expected = outcome(made, torch.float32, plain=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(outcome(made, torch.float32, plain=False), expected)


def test_double_backward_is_refused():
    made = network().train()
    h, s = (x.requires_grad_() for x in states())
    (grad,) = torch.autograd.grad(made.step(2, h, s)[0].sin().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ({"device": "cpu"}, "recompute", "not an NVIDIA GPU"),
        ({"device": "cpu", "needs_grad": False}, "autograd", "no gradient"),
        ({"device": "mps"}, "autograd", "dropout masks"),
        ({"device": "mps", "training": False}, "recompute", "not an NVIDIA GPU"),
    ],
)
def test_the_choice_of_an_implementation_comes_with_its_reason(options, name, reason):
    found = step_backend(ShadowConfig(), **options)
    assert found[0] == name
    assert reason in found[1]


def test_no_kernel_weighs_the_diagonal_apart_from_the_bottleneck():
    config = ShadowConfig(scale_state=True, inject_diagonal=True, alpha_rank=8)
    assert "diagonal" in variant_obstacle(config, dtype=torch.bfloat16, drops=False)
    assert variant_obstacle(config.replace(r=8), dtype=torch.bfloat16, drops=False) is None
    assert variant_obstacle(config.replace(inject_diagonal=False), dtype=torch.bfloat16, drops=False) is None
    assert variant_obstacle(config.replace(alpha_rank=None), dtype=torch.bfloat16, drops=False) is None


def test_an_addition_of_nothing_has_finite_gradients_like_plain_autograd():
    made = network(**BRANCHED, shadow_dropout=0.0, adapter_dtype="float64").train()
    gradients = []
    for plain in (False, True):
        h, s = (tensor.requires_grad_() for tensor in states())
        added = torch.zeros(B, T, D, dtype=torch.float64, requires_grad=True)
        with plain_steps() if plain else contextlib.nullcontext():
            made.step_between(2, h, s, added).sin().sum().backward()
        assert h.grad is not None and h.grad.isfinite().all()
        assert added.grad is not None and added.grad.isfinite().all() and added.grad.any()
        gradients.append((h.grad, s.grad, added.grad))
    assert_close(*gradients)


def test_no_kernel_reads_a_branch():
    config = ShadowConfig(scale_state=True, inject_branch=True)
    assert variant_obstacle(config, dtype=torch.bfloat16, drops=False) == "a correction that reads the branch in front of it"


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_a_state_scaled_by_a_zero_h_has_finite_gradients_like_plain_autograd(activation):
    made = network(scale_state=True, inject_activation=activation, shadow_dropout=0.0, adapter_dtype="float64").train()
    gradients = []
    for plain in (False, True):
        h, s = torch.zeros(1, 2, D, dtype=torch.float64, requires_grad=True), states()[1][:1, :2].requires_grad_()
        with plain_steps() if plain else contextlib.nullcontext():
            made.step(2, h, s)[0].sin().sum().backward()
        assert h.grad is not None and h.grad.isfinite().all()
        gradients.append((h.grad, s.grad))
    assert_close(*gradients)

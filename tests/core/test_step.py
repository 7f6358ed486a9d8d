"""The equations, each against the formula written out, and the shapes they promise."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from models import tiny_config
from shadowpeft.core import step
from shadowpeft.core.network import ShadowNetwork
from shadowpeft.core.step import Injection, Update
from shadowpeft.errors import ConfigError

D, R, H = 6, 4, 3


def states(*, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, D, generator=generator, dtype=torch.float64) for _ in range(2)]


def weights(*shapes):
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def test_injection_is_equations_2_to_4():
    h, s = states()
    injection = Injection(D, tiny_config(shadow_alpha=0.7)).double().eval()
    nn.init.normal_(injection.W_up)
    expected = h + 0.7 * ((h - s) @ injection.W_down @ injection.W_up)
    assert_close(injection(h, s), expected)


def test_injection_from_the_state_uses_s_alone():
    h, s = states()
    injection = Injection(D, tiny_config(inject_from="state")).double().eval()
    nn.init.normal_(injection.W_up)
    assert_close(injection(h, s), h + 0.1 * (s @ injection.W_down @ injection.W_up))


@pytest.mark.parametrize("scaled", [False, True])
def test_scale_and_diagonal_are_what_the_documentation_says(scaled):
    h, s = states()
    injection = Injection(D, tiny_config(shadow_alpha=0.7, scale_state=scaled, inject_diagonal=True)).double().eval()
    assert not injection.diagonal.any()
    nn.init.normal_(injection.W_up)
    nn.init.normal_(injection.diagonal)
    if scaled:
        s = s * h.square().mean(-1, keepdim=True).sqrt()
    expected = (h - s) @ injection.W_down @ injection.W_up + injection.diagonal * s
    assert_close(injection(h, states()[1]), h + 0.7 * expected)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_an_activation_stands_in_the_bottleneck_and_works_in_units_of_h(activation):
    h, s = states()
    config = tiny_config(shadow_alpha=0.7, scale_state=True, inject_diagonal=True, inject_activation=activation)
    injection = Injection(D, config).double().eval()
    nn.init.normal_(injection.W_up)
    nn.init.normal_(injection.diagonal)
    size = h.square().mean(-1, keepdim=True).sqrt()
    hidden = getattr(F, activation)((h / size - s) @ injection.W_down)
    assert_close(injection(h, s), h + 0.7 * size * (hidden @ injection.W_up + injection.diagonal * s))
    # Twice the hidden state: twice the correction.
    assert_close(injection(2 * h, s), 2 * injection(h, s))
    zero = injection(torch.zeros_like(h), s)
    assert_close(zero, torch.zeros_like(h))


def test_with_an_activation_w_down_starts_where_inputs_of_size_one_give_such_outputs():
    torch.manual_seed(0)
    config = tiny_config(scale_state=True, inject_activation="silu", r=64)
    weight = Injection(400, config).W_down
    assert weight.std().item() == pytest.approx(400**-0.5, rel=0.03)  # 4.5 standard errors of 25,600 draws


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_a_bottleneck_of_twice_the_rank_counts_half_and_the_diagonal_the_same(activation):
    """The same columns twice, at twice the rank, are the same correction; so a column learns as fast as one of the two did."""
    h, s = states()
    other = {"scale_state": True, "inject_diagonal": True, "inject_activation": activation, "shadow_alpha": 0.7}
    narrow, wide = (Injection(D, tiny_config(r=r, alpha_rank=4, **other)).double().eval() for r in (2, 4))
    nn.init.normal_(narrow.W_up)
    nn.init.normal_(narrow.diagonal)
    with torch.no_grad():
        wide.W_down.copy_(narrow.W_down.repeat(1, 2))
        wide.W_up.copy_(narrow.W_up.repeat(2, 1))
        wide.diagonal.copy_(narrow.diagonal)
    assert_close(wide(h, s), narrow(h, s))
    plain = Injection(D, tiny_config(r=4, **other)).double().eval()
    plain.load_state_dict(wide.state_dict())
    assert_close(wide(h, s), plain(h, s))  # at alpha_rank itself nothing is scaled


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("source", ["difference", "state"])
def test_a_branch_is_read_in_units_of_its_own_size_beside_what_is_read_anyway(activation, source):
    h, s = states()
    added = states(seed=1)[0] * 7
    in_units = {"scale_state": True, "inject_branch": True, "inject_activation": activation, "inject_diagonal": True}
    config = tiny_config(shadow_alpha=0.7, inject_from=source, **in_units)
    injection = Injection(D, config).double().eval()
    nn.init.normal_(injection.W_up)
    nn.init.normal_(injection.diagonal)
    scale = h.square().mean(-1, keepdim=True).sqrt()
    read = (h / scale - s if source == "difference" else s) @ injection.W_down
    read = read + added / added.square().mean(-1, keepdim=True).sqrt() @ injection.W_branch
    made = (F.silu(read) if activation == "silu" else read) @ injection.W_up + injection.diagonal * s
    assert_close(injection(h, s, added), h + 0.7 * scale * made)


def test_a_branch_of_nothing_is_read_as_nothing():
    h, s = states()
    injection = Injection(D, tiny_config(scale_state=True, inject_branch=True)).double().eval()
    nn.init.normal_(injection.W_up)
    assert torch.equal(injection(h, s, torch.zeros_like(h)), injection(h, s, None))


def test_a_branch_is_divided_in_full_precision():
    """40,000 twice over is past float16's range, and one over the smallest size that counts nearly is."""
    for entry in (40_000.0, 1e-7):
        read, scale = step.unit_of_branch(torch.tensor([[entry, -entry]], dtype=torch.float16))
        assert read.dtype == scale.dtype == torch.float32
        assert_close(read, torch.tensor([[entry, -entry]]) / max(entry, step.SMALLEST_BRANCH), rtol=0.2, atol=0)


def test_in_front_of_the_first_block_no_branch_can_be_read_and_none_is_trained():
    made = network(scale_state=True, inject_branch=True, first_block=0)
    assert [injection.W_branch is None for injection in made.injections] == [True, False, False, False, False]
    assert all(injection.W_branch is not None for injection in network(scale_state=True, inject_branch=True).injections)


def test_a_branch_needs_the_unit_of_h():
    with pytest.raises(ConfigError, match="inject_branch=True is not valid: expected False without scale_state"):
        tiny_config(inject_branch=True)


@pytest.mark.parametrize(("first_block", "first"), [(0, 0), (1, 0), (2, 1), (3, 2)])
def test_corrections_between_sublayers_start_within_the_block_in_front_of_the_first_refined_one(first_block, first):
    made = network(inject_between="sublayers", first_block=first_block)
    assert [block for block in range(5) if made.midpoint(block) is not None] == list(range(first, 5))
    assert len(made.midpoints) == 5 - first
    assert len(network(inject_between="sublayers", share_steps=True).midpoints) == 1
    assert not len(network(first_block=first_block).midpoints)


def test_an_activation_needs_the_unit_of_h():
    with pytest.raises(ConfigError, match="scale_state"):
        tiny_config(inject_activation="silu")


@pytest.mark.parametrize("entry", [0.0, 300.0, 6e4])
def test_the_scale_of_h_does_not_overflow_in_float16(entry):
    """6e4 is near the largest number of float16, 65504; the square of 300 is past it. Rounded once, to 2^-10."""
    h = torch.full((1, 2, D), entry, dtype=torch.float16)
    assert_close(step.rms(h), torch.full((1, 2, 1), entry, dtype=torch.float16), atol=0, rtol=2**-10)


def test_update_is_equations_5_to_7_with_13_and_14():
    h, s = states()
    update = Update(D, tiny_config()).double().eval()
    t = F.silu(h @ update.W_T1) @ update.W_T2
    g = torch.sigmoid(F.silu(h @ update.W_G1) @ update.W_G2)
    assert_close(update(h, s), (1 - g) * s + g * t)


def test_update_with_biases_and_gelu_is_the_same_formula_in_the_other_variant():
    h, s = states()
    update = Update(D, tiny_config(update_bias=True, update_activation="gelu")).double().eval()
    t = F.gelu(h @ update.W_T1 + update.b_T1) @ update.W_T2 + update.b_T2
    g = torch.sigmoid(F.gelu(h @ update.W_G1 + update.b_G1) @ update.W_G2 + update.b_G2)
    assert_close(update(h, s), (1 - g) * s + g * t)


def test_step_functions_pass_gradcheck():
    h, s = states()
    W_down, W_up, W_T1, W_T2, W_G1, W_G2 = weights((D, R), (R, D), (D, H), (H, D), (D, H), (H, D))
    inputs = [tensor.requires_grad_() for tensor in (h, s, W_down, W_up, W_T1, W_T2, W_G1, W_G2)]

    def whole_step(h, s, W_down, W_up, W_T1, W_T2, W_G1, W_G2):
        t = step.transform(h, W_T1, W_T2, act=F.silu)
        g = step.gate(h, W_G1, W_G2, act=F.silu)
        state = step.update(s, g, t)
        return step.inject(h, step.correction(step.discrepancy(h, state), W_down, W_up), 0.3), state

    assert torch.autograd.gradcheck(whole_step, inputs)


@pytest.mark.parametrize("at", ["bottleneck", "input"])
def test_dropout_keeps_the_expected_correction(at):
    """The mean over n = 4000 masks lies within 5 standard errors of the undropped correction, in every element."""
    h, _ = states()
    W_down, W_up = weights((D, R), (R, D))
    delta = h.expand(2000, *h.shape)
    samples = step.correction(delta, W_down, W_up, dropout=0.3, at=at)
    error = (samples.mean(0) - step.correction(h, W_down, W_up)).abs()
    assert (error <= 5 * samples.std(0) / 2000**0.5).all()
    assert samples.std(0).min() > 0


def test_bottleneck_dropout_zeroes_whole_rank_components():
    delta = torch.ones(4000, 1, 1)
    dropped = step.correction(delta, torch.ones(1, 2), torch.tensor([[1.0], [10.0]]), dropout=0.5)
    assert set(dropped.flatten().tolist()) == {0.0, 2.0, 20.0, 22.0}


def network(**config):
    return ShadowNetwork(
        tiny_config(**config), nn.Identity(), width=D, num_blocks=5, backbone_width=D, embedding_width=D
    )


def test_there_is_no_update_behind_the_last_block():
    assert (len(network().injections), len(network().updates)) == (4, 3)
    assert (len(network(first_block=0).injections), len(network(first_block=0).updates)) == (5, 4)


def test_shared_steps_have_one_set_of_weights_that_acts_at_every_depth():
    shared = network(share_steps=True).double().eval()
    assert (len(shared.injections), len(shared.updates)) == (1, 1)
    h, s = states()
    nn.init.normal_(shared.injections[0].W_up)
    first, second = shared.step(2, h, s), shared.step(4, h, s)
    assert_close(first, second)
    assert not torch.equal(first[1], s)


def test_without_update_every_block_sees_the_initial_state():
    plain = network(use_update=False).double()
    h, s = states()
    assert len(plain.updates) == 0
    assert plain.update_norm is None
    assert plain.step(3, h, s)[1] is s


def test_block_zero_passes_untouched():
    h, s = states()
    assert network().double().step(0, h, s) == (h, s)


def test_initialisation_follows_the_variant():
    torch.manual_seed(0)
    normal = Injection(2000, tiny_config(r=16)).W_down
    uniform = Injection(2000, tiny_config(r=16, down_init="linear")).W_down
    # n = 32,000 values: the standard error of the standard deviation is 0.4 %.
    assert abs(normal.std().item() / 0.02 - 1) < 0.02
    assert uniform.abs().max().item() <= 1 / 2000**0.5
    assert not Injection(20, tiny_config()).W_up.any()

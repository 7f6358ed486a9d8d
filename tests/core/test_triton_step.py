"""The Triton kernels against the reference, in Triton's interpreter where there is no GPU."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from models import randomise, tiny_config

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter", allow_module_level=True)

from shadowpeft.core import ShadowConfig
from shadowpeft.core.kernels import StepSpec, fused_step, reference, step_backend, triton_step
from shadowpeft.core.kernels.backend import variant_obstacle
from shadowpeft.core.network import ShadowNetwork

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEFT = ShadowConfig.preset("peft").to_dict() | {"dropout_at": "bottleneck", "adapter_dtype": "float32"}
VARIANTS = {
    "paper": {},
    "peft": PEFT,
    "peft, no dropout": PEFT | {"dropout_at": "input", "shadow_dropout": 0.0},
    "from the state": {"inject_from": "state"},
    "no update": {"use_update": False},
    "no norm": {"update_norm": "none"},
    "biases": {"update_bias": True},
    "scaled state and diagonal": {"scale_state": True, "inject_diagonal": True},
    "scaled diagonal without update": {"scale_state": True, "inject_diagonal": True, "use_update": False},
    "diagonal, from the state": {"inject_diagonal": True, "inject_from": "state"},
}
SHAPES = [(1, 32, 16, 10), (17, 70, 5, 3), (33, 65, 16, 8), (150, 130, 20, 17)]  # tokens, width, r, h_g


def problem(variant, num_tokens, width, rank, hidden, *, dropout=0.0, dtype=torch.float32, index=1):
    """(spec, h, s, weights) of one step."""
    config = tiny_config(
        **{"r": rank, "update_hidden_size": hidden, "shadow_dropout": dropout, "adapter_dtype": "float32"}
        | {key: value for key, value in VARIANTS[variant].items() if key not in ("r", "update_hidden_size")}
        | {"shadow_dropout": dropout}
    )
    made = ShadowNetwork(config, nn.Identity(), width=width, num_blocks=3, backbone_width=width, embedding_width=width)
    randomise(made)
    made.to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    h, s = (torch.randn(num_tokens, width, generator=generator).to(DEVICE, dtype) for _ in range(2))
    w = made._weights(made.injections[index], made.updates[0] if index and len(made.updates) else None)
    return StepSpec.of(config, training=True), h, s, w


def both(spec, h, s, w, *, needs_grad_h=True, with_grad_s=True):
    """[(outputs, gradients)] of kernels and reference for the same upstream gradients, without dropout."""
    results = []
    for implementation in (triton_step, reference):
        with torch.no_grad():
            out = implementation.forward(spec, h, s, w)
            grads = implementation.backward(
                spec, grad_h=torch.sin(h), grad_s=torch.cos(s) if with_grad_s else None, h=h, s=s,
                bottleneck=out.bottleneck, rng_state=out.rng_state, w=w, needs_grad_h=needs_grad_h,
            )  # fmt: skip
        weights = {name: grad for name, grad in grads.weights._asdict().items() if grad is not None}
        results.append((list(filter(torch.is_tensor, (*out[:3], out.scale))), [x for x in grads[:2] if x is not None], weights))
    return results


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_equal_the_reference_in_fp32(variant, shape):
    """Sums over up to 150 tokens and 130 columns in another order: a few units of 1e-6."""
    assert_close(*both(*problem(variant, *shape)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_equal_the_reference_in_sixteen_bits(dtype):
    """The reference rounds h - s to 8 (11) bits in front of W_down, the kernels do not; outputs are rounded once."""
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    assert_close(*both(*problem("paper", 33, 65, 16, 8, dtype=dtype)), rtol=tolerance, atol=tolerance)


def test_the_first_refined_block_has_no_update():
    assert_close(*both(*problem("paper", 17, 70, 5, 3, index=0), with_grad_s=False), rtol=1e-4, atol=1e-4)


def test_gradients_of_h_may_be_left_out():
    ours, theirs = both(*problem("paper", 17, 70, 5, 3), needs_grad_h=False)
    assert len(ours[1]) == 1
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_strided_rows_need_no_copy_and_give_the_same():
    spec, h, s, w = problem("paper", 17, 70, 5, 3)
    strided = torch.cat([h, h], 1)[:, :70]
    assert not strided.is_contiguous()
    assert_close(triton_step.forward(spec, strided, s, w), triton_step.forward(spec, h, s, w))


def test_dropout_follows_the_seed_and_keeps_the_expected_correction():
    """The mean of n = 400 equal tokens lies within 5 standard errors of the undropped result, in every element."""
    spec, h, s, w = problem("paper", 1, 32, 5, 3, dropout=0.3, index=0)
    many = [x.expand(400, 32).contiguous() for x in (h, s)]
    torch.manual_seed(3)
    first = triton_step.forward(spec, *many, w).h
    second = triton_step.forward(spec, *many, w).h
    torch.manual_seed(3)
    assert torch.equal(triton_step.forward(spec, *many, w).h, first)
    assert not torch.equal(second, first)
    expected = reference.forward(StepSpec(alpha=spec.alpha), h, s, w).h
    assert ((first.mean(0) - expected[0]).abs() <= 5 * first.std(0) / 400**0.5).all()
    assert first.std(0).min() > 0


def test_backward_draws_the_masks_of_forward_again():
    """With a fixed seed the step is a smooth function: its gradient agrees with central differences."""
    spec, h, s, w = problem("paper", 5, 32, 5, 3, dropout=0.4)

    def value(h, s):
        torch.manual_seed(8)
        out = fused_step("triton", spec, h, s, w)
        return torch.sin(out[0]).sum() + torch.cos(out[1]).sum()

    inputs = [x.clone().requires_grad_() for x in (h, s)]
    grads = torch.autograd.grad(value(*inputs), inputs)
    direction = [torch.randn_like(x) for x in (h, s)]
    with torch.no_grad():
        up, down = (value(*(x + sign * 1e-2 * d for x, d in zip((h, s), direction, strict=True))) for sign in (1, -1))
    expected = (up - down) / 2e-2
    found = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    assert_close(found, expected, rtol=5e-3, atol=5e-3)


def test_presets_are_covered_but_for_dropout_on_a_wide_input():
    for preset in ("paper", "authors"):
        assert variant_obstacle(ShadowConfig.preset(preset), dtype=torch.bfloat16, drops=True) is None
    peft = ShadowConfig.preset("peft")
    assert variant_obstacle(peft, dtype=torch.bfloat16, drops=False) is None
    assert "wide as the model" in variant_obstacle(peft, dtype=torch.bfloat16, drops=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_a_gpu_chooses_the_kernels():
    assert step_backend(ShadowConfig(), device="cuda", dtype=torch.bfloat16)[0] == "triton"

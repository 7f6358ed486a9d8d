"""A lean graph gives the same gradients bit for bit, and keeps what it says."""

import contextlib
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import get_shadow_model
from shadowpeft.core.lean import lean_graph

pytestmark = pytest.mark.contract


@pytest.fixture(autouse=True)
def nothing_is_too_small(monkeypatch):
    monkeypatch.setattr("shadowpeft.core.lean._FEWEST_BYTES", 64)


def kept_bytes(function, *inputs):
    """(result, bytes of the distinct storages kept for backward)."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*inputs)
    return result, sum(kept.values())


def gated(x, W_gate, W_up, *, lean):
    with lean_graph() if lean else contextlib.nullcontext():
        return F.silu(x @ W_gate) * (x @ W_up)


def test_a_gated_product_keeps_two_tensors_instead_of_three():
    x = torch.randn(16, 8, requires_grad=True)
    weights = torch.randn(8, 32), torch.randn(8, 32)
    sizes, gradients = [], []
    for lean in (False, True):
        result, size = kept_bytes(lambda lean: gated(x, *weights, lean=lean), lean)
        sizes.append(size)
        gradients.append(torch.autograd.grad(result.square().sum(), x)[0])
    wide, narrow = 16 * 32 * 4, 8 * 32 * 4
    assert sizes == [3 * wide + 2 * narrow, 2 * wide + 2 * narrow]
    assert torch.equal(*gradients)


def test_a_widening_cast_keeps_its_narrow_source():
    x = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)

    def norm():
        with lean_graph():
            wide = (x * 2).to(torch.float32)
            return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))

    result, size = kept_bytes(norm)
    assert size == 64 * 64 * 2 + 64 * 4
    assert torch.isfinite(torch.autograd.grad(result.sum(), x)[0]).all()


def test_a_checkpointed_block_keeps_nothing_while_the_pass_goes_on():
    x = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    inside = []

    def norm(x):
        narrow = x * 2
        inside.append(StorageWeakRef(narrow.untyped_storage()))
        wide = narrow.to(torch.float32)
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(torch.bfloat16)

    gradients = []
    for lean in (False, True):
        with lean_graph() if lean else contextlib.nullcontext():
            y = checkpoint(norm, x * 1.5, use_reentrant=False)
            assert inside[-1].expired()
            result = norm(y)
        gradients.append(torch.autograd.grad(result.float().square().sum(), x)[0])
    assert torch.equal(*gradients)


def test_a_result_changed_in_place_afterwards_is_kept_itself():
    x = torch.randn(16, 16, requires_grad=True)
    gradients = []
    for lean in (False, True):
        with lean_graph() if lean else contextlib.nullcontext():
            y = F.silu(x * 1.5)
            z = y.mul_(3.0)
            result = (z * torch.sigmoid(x * 2)).sum()
        gradients.append(torch.autograd.grad(result, x)[0])
    assert torch.equal(*gradients)


def test_expressions_survive_the_end_of_the_block_and_a_second_backward():
    x = torch.randn(16, 8, requires_grad=True)
    result = gated(x, torch.randn(8, 32), torch.randn(8, 32), lean=True).sum()
    first = torch.autograd.grad(result, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(result, x)[0], first)


def test_tensors_go_through_hooks_further_out():
    x = torch.randn(16, 8, requires_grad=True)
    weights = torch.randn(8, 32), torch.randn(8, 32)
    expected = torch.autograd.grad(gated(x, *weights, lean=False).sum(), x)[0]
    packed = []

    def pack(tensor):
        packed.append(tensor.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index]):
        result = gated(x, *weights, lean=True)
    assert packed
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], expected)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi3", "cohere", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_a_whole_model_are_bit_identical(model_type, dtype):
    gradients, sizes = [], []
    for lean in (False, True):
        model = get_shadow_model(tiny_base(model_type, dtype=dtype), tiny_config(adapter_dtype="base")).train()
        randomise(model.network(), std=0.05)
        ids = tokens()
        torch.manual_seed(4)
        switch = contextlib.nullcontext() if lean else mock.patch(
            "shadowpeft.model.tasks.lean_graph", contextlib.nullcontext
        )  # fmt: skip
        with switch:
            output, size = kept_bytes(lambda model, ids: model(ids, labels=ids), model, ids)
        output.loss.backward()
        sizes.append(size)
        gradients.append({name: p.grad for name, p in model.network().named_parameters()})
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())
    assert sizes[1] < sizes[0]

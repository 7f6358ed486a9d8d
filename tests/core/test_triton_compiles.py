"""The kernels compile for an NVIDIA GPU, here without one; the interpreter accepts more than the compiler does."""

import contextlib
import os
import types
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from models import tiny_config

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are never compiled", allow_module_level=True)

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shadowpeft.core.kernels import StepSpec, triton_step
from shadowpeft.core.network import ShadowNetwork

# (compute capability, bytes of shared memory that one program can have): RTX 4090 and the like, A100, H100.
ADA, AMPERE, HOPPER = (89, 99 * 1024), (80, 163 * 1024), (90, 227 * 1024)
INTEGERS = {"N", "D", "R", "HG", "h_stride", "s_stride", "rows_a_split", "seed"}
FLOATS = {"alpha", "eps", "inject_dropout", "transform_dropout"}
STATES = {"h", "s", "h_out", "s_out", "grad_h", "grad_s", "grad_h_in", "grad_s_in"}
KERNELS = {
    triton_step._forward: triton_step.FORWARD,
    triton_step._backward_tokens: triton_step.BACKWARD_TOKENS,
    triton_step._backward_weights: triton_step.BACKWARD_WEIGHTS,
}
PAPER = {
    "SCALES": False, "HAS_DIAGONAL": False, "HAS_UPDATE": True, "HAS_NORM": True, "HAS_BIAS": False, "GELU": False,
    "FROM_STATE": False, "DROPS_INJECT": False, "DROPS_TRANSFORM": False, "PRECISION": "tf32", "RP": 16, "HP": 16,
    "HAS_GRAD_S": True, "NEEDS_H": True,
}  # fmt: skip
RECOMMENDED = {"SCALES": True, "HAS_DIAGONAL": True, "HAS_UPDATE": False, "HAS_NORM": False, "HAS_GRAD_S": False}
VARIANTS = {
    "paper": {},
    "recommended": RECOMMENDED,
    "recommended with update": {"SCALES": True, "HAS_DIAGONAL": True},
    "dropout and biases": {"DROPS_INJECT": True, "DROPS_TRANSFORM": True, "HAS_BIAS": True, "GELU": True},
    "no norm, from the state": {"HAS_NORM": False, "FROM_STATE": True, "NEEDS_H": False},
}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_compile_and_their_tiles_fit_on_hopper(kernel, variant):
    _compile(kernel, PAPER | VARIANTS[variant], "bf16", HOPPER)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("variant", ["paper", "recommended"])
@pytest.mark.parametrize(("dtype", "gpu"), [("bf16", ADA), ("fp32", ADA), ("fp32", AMPERE), ("fp32", HOPPER)], ids=str)
@pytest.mark.parametrize("narrow", [16, 32])
def test_what_is_chosen_elsewhere_fits_there(kernel, variant, dtype, gpu, narrow):
    precision = "ieee" if dtype == "fp32" else "tf32"
    _compile(kernel, PAPER | VARIANTS[variant] | {"PRECISION": precision, "RP": narrow, "HP": narrow}, dtype, gpu)


def _compile(kernel, switches, dtype, gpu):
    """For pointers and sizes that are multiples of 16, as real ones are: loads are then wide, and staged in more memory."""
    capability, shared_memory = gpu
    is_tuned = gpu == HOPPER and dtype == "bf16"
    tiles = KERNELS[kernel]["update" if switches["HAS_UPDATE"] else "no update"] if is_tuned else triton_step._NARROW
    given = switches | {"BLOCK_T": tiles.tokens, "BLOCK_D": tiles.columns}
    signature = {}
    for name in kernel.arg_names:
        if name in given:
            signature[name] = "constexpr"
        elif name in INTEGERS | FLOATS:
            signature[name] = "i32" if name in INTEGERS else "fp32"
        else:
            signature[name] = f"*{dtype}" if name in STATES else "*fp32"
    constants = {name: given[name] for name in kernel.arg_names if name in given}
    aligned = [
        index for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ("N", "D", "R", "h_stride", "s_stride")
    ]  # fmt: skip
    source = ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in aligned})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": tiles.warps})
    assert 0 < made.metadata.shared <= shared_memory


def test_kernels_are_launched_on_the_device_of_the_tensors(monkeypatch):
    """Two GPUs are not needed: what is asked is which device is current while a kernel is launched, forward and backward."""
    current, launched = ["cuda:0"], []

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(current[-1])

    monkeypatch.setattr(torch.cuda, "device", device)
    for name in ("_forward", "_backward_tokens", "_backward_weights"):
        monkeypatch.setattr(triton_step, name, Kernel())
    there = types.SimpleNamespace(is_cuda=True, device="cuda:1")
    with triton_step._device_of(there):
        assert current[-1] == "cuda:1"
    monkeypatch.setattr(triton_step, "_device_of", lambda tensor, real=triton_step._device_of: real(there))
    config = tiny_config(adapter_dtype="float32", shadow_dropout=0.0)
    network = ShadowNetwork(config, nn.Identity(), width=8, num_blocks=3, backbone_width=8, embedding_width=8)
    spec, w = StepSpec.of(config, training=True), network._weights(network.injections[1], network.updates[0])
    h, s = torch.randn(2, 5, 8)
    out = triton_step.forward(spec, h, s, w)
    options = {"bottleneck": out.bottleneck, "rng_state": None, "w": w, "needs_grad_h": True}
    triton_step.backward(spec, grad_h=h, grad_s=s, h=h, s=s, **options)
    assert launched == ["cuda:1"] * 3

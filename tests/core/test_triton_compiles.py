"""The kernels compile for an NVIDIA GPU, here without one; the interpreter accepts more than the compiler does."""

import os
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are never compiled", allow_module_level=True)

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shadowpeft.core.kernels import triton_step

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # that one program can have
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
def test_kernels_compile_and_their_tiles_fit(kernel, variant):
    switches = PAPER | VARIANTS[variant]
    tiles = KERNELS[kernel]["update" if switches["HAS_UPDATE"] else "no update"]
    given = switches | {"BLOCK_T": tiles.tokens, "BLOCK_D": tiles.columns}
    signature = {}
    for name in kernel.arg_names:
        if name in given:
            signature[name] = "constexpr"
        elif name in INTEGERS | FLOATS:
            signature[name] = "i32" if name in INTEGERS else "fp32"
        else:
            signature[name] = "*bf16" if name in STATES else "*fp32"
    constants = {name: given[name] for name in kernel.arg_names if name in given}
    made = triton.compile(ASTSource(kernel, signature, constants), target=HOPPER, options={"num_warps": tiles.warps})
    assert 0 < made.metadata.shared <= SHARED_MEMORY

"""Eq. 12 against torch's own pseudo-inverse in float64."""

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from models import tiny_base, tiny_config
from shadowpeft import get_shadow_model
from shadowpeft.errors import ArchitectureError
from shadowpeft.model.pretrained import PROJECTION_FILE, PROJECTION_KEY
from shadowpeft.model.projection import projection_between, solve_projection


def random_heads(vocabulary: int = 300, width: int = 24, small: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(vocabulary, width, dtype=torch.float64), torch.randn(vocabulary, small, dtype=torch.float64)


def relative_residual(head: torch.Tensor, weight: torch.Tensor, reference: torch.Tensor) -> float:
    return ((head @ weight - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("chunk_rows", [7, 300, 10_000])
def test_it_equals_least_squares_and_the_pseudo_inverse_whatever_the_chunks(chunk_rows):
    head, reference = random_heads()
    solved = solve_projection(head, reference, chunk_rows=chunk_rows)
    assert_close(solved.weight, torch.linalg.lstsq(head, reference).solution)
    assert_close(solved.weight, torch.linalg.pinv(head) @ reference)
    assert solved.rank == 24
    assert solved.relative_residual == pytest.approx(relative_residual(head, solved.weight, reference), rel=1e-12)
    assert 0.5 < solved.relative_residual < 1  # random heads have little in common, and it is said so


def test_a_head_that_can_express_the_small_one_leaves_no_residual():
    head, _ = random_heads()
    exact = torch.randn(24, 10, dtype=torch.float64)
    solved = solve_projection(head, head @ exact)
    assert_close(solved.weight, exact)
    assert solved.relative_residual < 1e-14


def test_a_rank_deficient_head_gives_the_solution_of_smallest_norm():
    head, reference = random_heads()
    head[:, 20:] = head[:, :4] @ torch.randn(4, 4, dtype=torch.float64)
    solved = solve_projection(head, reference)
    assert solved.rank == 20
    assert_close(solved.weight, torch.linalg.pinv(head, rtol=1e-10) @ reference)


def test_an_ill_conditioned_head_is_still_solved_to_eight_digits():
    """Condition 1e5: the normal equations alone lose ten digits of sixteen; the refinement gets most of them back."""
    head, reference = random_heads()
    head = head * torch.logspace(0, -5, 24, dtype=torch.float64)
    expected = torch.linalg.lstsq(head, reference).solution
    assert_close(solve_projection(head, reference).weight, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_heads_are_solved_in_float64(dtype):
    head, reference = (tensor.to(dtype) for tensor in random_heads())
    solved = solve_projection(head, reference)
    assert solved.weight.dtype == torch.float64
    assert_close(solved.weight, torch.linalg.pinv(head.double()) @ reference.double())


def test_no_float64_tensor_is_as_large_as_the_head():
    """The argument for vocabularies of 150K: what is float64 has chunk x d, d x d or d x d_s entries."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                    largest = max(largest, tensor.numel())
            return out

    head, reference = torch.randn(20_000, 16), torch.randn(20_000, 8)
    with Watch():
        solve_projection(head, reference, chunk_rows=512)
    assert 512 * 16 <= largest < head.numel() / 20


def test_heads_of_two_vocabularies_are_refused():
    with pytest.raises(ArchitectureError, match="same tokenizer"):
        solve_projection(torch.ones(5, 2), torch.ones(6, 2))


def test_heads_that_are_not_finite_are_refused():
    with pytest.raises(ArchitectureError, match="not finite"):
        solve_projection(torch.full((5, 2), torch.inf), torch.ones(5, 2))


def test_a_small_model_behind_a_large_enough_head_keeps_its_logits():
    """V = 97 tokens and width 128 > V: the large head spans everything, so even the scales of both are undone."""
    base = tiny_base("granite", hidden_size=128, logits_scaling=2.0)
    small = tiny_base("cohere", hidden_size=16, num_attention_heads=2, logit_scale=0.25)
    solved = projection_between(base, small)
    assert solved.rank == 97 and solved.relative_residual < 1e-9
    hidden = torch.randn(3, 16, dtype=torch.float64)
    expected = small.lm_head(hidden) * 0.25
    assert_close(base.lm_head(hidden @ solved.weight.T) / 2.0, expected)


def test_a_head_with_a_bias_is_refused():
    with pytest.raises(ArchitectureError, match="has a bias"):
        projection_between(tiny_base("phi"), tiny_base())


def test_a_square_projection_is_not_dropped_unless_it_does_nothing(tmp_path):
    tiny_base("qwen3", dtype=torch.float32).save_pretrained(tmp_path)
    config = tiny_config(shadow_model=str(tmp_path))
    save_file({PROJECTION_KEY: torch.eye(32)}, tmp_path / PROJECTION_FILE)
    assert get_shadow_model(tiny_base(), config).network().projection is None
    save_file({PROJECTION_KEY: torch.eye(32).flip(0).contiguous()}, tmp_path / PROJECTION_FILE)
    with pytest.raises(ArchitectureError, match=r"as wide as this base \(32\) and was trained with a projection"):
        get_shadow_model(tiny_base(), config)

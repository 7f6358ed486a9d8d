"""Bases of known shape with random weights: weights do not change what a step costs."""

import copy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from shadowpeft import ShadowConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Qwen3 base and the shadow that goes with it.

    Attributes:
        width, num_blocks, num_heads, num_kv_heads, head_dim, mlp_width, vocabulary: of the base.
        rank, update_width, shadow_mlp_width: r, h_g and the MLP width of the one shadow block.
    """

    width: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    rank: int = 16
    update_width: int = 10
    shadow_mlp_width: int = 256

    def base(
        self, *, dtype: torch.dtype = torch.float32, device: str = "cpu", positions: int = 4096
    ) -> PreTrainedModel:
        """A base in evaluation mode, the same on every call."""
        torch.manual_seed(0)
        config = Qwen3Config(
            hidden_size=self.width,
            num_hidden_layers=self.num_blocks,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.mlp_width,
            vocab_size=self.vocabulary,
            max_position_embeddings=positions,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        with torch.device(device):
            model = Qwen3ForCausalLM._from_config(config, dtype=dtype)
        return model.eval()

    def shadow(self) -> ShadowConfig:
        return ShadowConfig(
            r=self.rank, update_hidden_size=self.update_width, shadow_intermediate_size=self.shadow_mlp_width
        )


SHAPES = {
    # Heads as in Qwen3-0.6B. The shadow then adds 3.6% to the weights that a step reads.
    "12x1024": Shape(
        width=1024, num_blocks=12, num_heads=16, num_kv_heads=8, head_dim=128, mlp_width=3072, vocabulary=32_000
    ),
    "qwen3-0.6b": Shape(
        width=1024, num_blocks=28, num_heads=16, num_kv_heads=8, head_dim=128, mlp_width=3072, vocabulary=151_936
    ),
    "qwen3-4b": Shape(
        width=2560, num_blocks=36, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=9728, vocabulary=151_936,
        update_width=8,
    ),
    "qwen3-8b": Shape(
        width=4096, num_blocks=36, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=12_288, vocabulary=151_936,
        update_width=8,
    ),
    "tiny": Shape(
        width=64, num_blocks=3, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=96, vocabulary=300,
        rank=4, update_width=4, shadow_mlp_width=32,
    ),
}  # fmt: skip


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A second model over the same weight tensors, so that contenders differ in what they add and in nothing else."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})

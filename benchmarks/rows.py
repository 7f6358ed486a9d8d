"""What the training benchmarks compare: a frozen base and several ways to train something on it, at one budget.

Every row shares the base's weights with all others, so that they fit in memory together, and is a module that is
called with ``input_ids`` and ``labels`` and returns an output with a ``loss``.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from shadowpeft import ShadowConfig, get_shadow_model
from shadowpeft.core.head_loss import LossSpec
from shadowpeft.core.losses import shared_head_losses
from shadowpeft.evaluate.compare.budget import count_shadow, meta_base, solve
from shadowpeft.evaluate.compare.budget import shadow_config as method_config
from shadowpeft.evaluate.compare.recipe import MethodSpec
from shadowpeft.model.bases import EMBEDDED, load_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One base (Qwen3, but for the embedded one) and one batch. ``vocabulary``: the only one it has, if it has one."""

    name: str
    width: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rows: int
    length: int
    shadow_heads: int | None = None
    update_hidden: int = 10
    vocabulary: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.rows * self.length


_QWEN3 = {"num_kv_heads": 8, "head_dim": 128}
_TINY = {"width": 64, "num_blocks": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_width": 192}
_SMALL = {"width": 1024, "num_heads": 16, "mlp_width": 3072}
_LARGE = {"num_blocks": 36, "num_heads": 32, "update_hidden": 8}
_LONG = {"rows": 2, "length": 2048}
# As in src/shadowpeft/assets/base/config.json.
_EMBEDDED = {"width": 256, "num_blocks": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "mlp_width": 512}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="tiny", rows=2, length=32, **_TINY),
        # The embedded base itself, and the demonstration's batch.
        Shape(name="embedded", rows=16, length=64, shadow_heads=2, vocabulary=4096, **_EMBEDDED),
        Shape(name="12x1024", num_blocks=12, rows=4, length=256, **_SMALL, **_QWEN3),
        Shape(name="0.6B", num_blocks=28, **_SMALL, **_LONG, **_QWEN3),
        Shape(name="4B", width=2560, mlp_width=9728, shadow_heads=16, **_LARGE, **_LONG, **_QWEN3),
        Shape(name="8B", width=4096, mlp_width=12288, shadow_heads=8, **_LARGE, **_LONG, **_QWEN3),
    )
}


def make_base(shape: Shape, *, vocabulary: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A seeded random base, or the embedded one."""
    if shape.name == EMBEDDED:
        return load_model(EMBEDDED, dtype=dtype, attn_implementation="sdpa").requires_grad_(False).to(device)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.num_blocks,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def make_batch(shape: Shape, *, vocabulary: int, labels: str, device: str) -> dict[str, Tensor]:
    """Random tokens; ``labels`` are ``all`` positions or ``answers``: the last third of every row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (shape.rows, shape.length), generator=generator)
    targets = ids.clone()
    if labels == "answers":
        targets[:, : shape.length - shape.length // 3] = IGNORE
    return {"input_ids": ids.to(device), "labels": targets.to(device)}


def twin(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules around the same weights."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


class ChunkedLoss(nn.Module):
    """Any adapted causal language model with this package's loss in place of its own."""

    def __init__(self, adapted: nn.Module, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.adapted, self.causal_lm = adapted, causal_lm

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        hidden = self.causal_lm.get_decoder()(input_ids, use_cache=False).last_hidden_state
        head = self.causal_lm.get_output_embeddings()
        return SimpleNamespace(loss=shared_head_losses(LossSpec(), head, hidden, hidden, labels).total)


def shadow_config(shape: Shape, dropout: float | None) -> ShadowConfig:
    options: dict[str, Any] = {} if dropout is None else {"shadow_dropout": dropout}
    return ShadowConfig(
        shadow_num_attention_heads=shape.shadow_heads, update_hidden_size=shape.update_hidden, **options
    )


def num_trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _base(base: PreTrainedModel, shape: Shape, budget: int, dropout: float | None) -> nn.Module:
    base.enable_input_require_grads()
    return base


def _lora(targets: list[str], **options: Any) -> Callable[..., nn.Module]:
    def build(base: PreTrainedModel, shape: Shape, budget: int, dropout: float | None) -> nn.Module:
        import peft

        def adapt(rank: int) -> Any:
            chosen = {} if dropout is None else {"lora_dropout": dropout}
            config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, **chosen, **options)
            return peft.get_peft_model(base, config)

        return adapt(_rank(base, targets, budget))

    return build


def _rank(base: PreTrainedModel, targets: list[str], budget: int) -> int:
    """The rank whose LoRA on ``targets`` has a number of weights nearest to ``budget``."""
    linears = [m for name, m in base.named_modules() if name.rsplit(".", 1)[-1] in targets]
    return max(round(budget / sum(m.in_features + m.out_features for m in linears)), 1)


def _lora_with_our_loss(base: PreTrainedModel, shape: Shape, budget: int, dropout: float | None) -> nn.Module:
    return ChunkedLoss(_lora(ALL_LINEAR)(base, shape, budget, dropout), base)


def _peft_shadow(base: PreTrainedModel, shape: Shape, budget: int, dropout: float | None) -> nn.Module:
    import peft

    options: dict[str, Any] = {} if dropout is None else {"shadow_dropout": dropout}
    config = peft.ShadowConfig(
        task_type="CAUSAL_LM",
        r=16,
        update_hidden_size=shape.update_hidden,
        shadow_intermediate_size=256,
        shadow_num_attention_heads=shape.shadow_heads,
        **options,
    )
    return peft.get_peft_model(base, config)


def _authors_shadow(base: PreTrainedModel, shape: Shape, budget: int, dropout: float | None) -> nn.Module:
    import shadow_peft

    options: dict[str, Any] = {} if dropout is None else {"dropout": dropout}
    config = shadow_peft.ShadowConfig(
        injection_hidden_size=16,
        gate_hidden_size=shape.update_hidden,
        shadow_intermediate_size=256,
        shadow_num_attention_heads=shape.shadow_heads,
        **options,
    )
    model = shadow_peft.ShadowForCausalLM(shadow_peft.get_shadow_model(base, config), shadow_loss_weight=0.05)
    return model.to(base.dtype)  # weights in fp32 fail on a 16-bit base


def _ours(base: PreTrainedModel, shape: Shape, budget: int, dropout: float | None) -> nn.Module:
    return get_shadow_model(base, shadow_config(shape, dropout))


def _preset(name: str, **sizes: int) -> Callable[..., nn.Module]:
    """One of our presets, its r and MLP width scaled to the budget as ``shadowpeft compare`` does."""

    def build(base: PreTrainedModel, shape: Shape, budget: int, dropout: float | None) -> nn.Module:
        heads = {} if shape.shadow_heads is None else {"shadow_num_attention_heads": shape.shadow_heads}
        chosen = {} if dropout is None else {"shadow_dropout": dropout}
        method = MethodSpec(kind="shadow", shadow={"preset": name, **heads, **sizes, **chosen})
        sized = solve(method, meta_base(base.config, None), budget, TOLERANCE)
        return get_shadow_model(base, method_config(method, is_classifier=False, **sized.shadow))

    return build


ROWS: dict[str, Callable[[PreTrainedModel, Shape, int, float | None], nn.Module]] = {
    "base with gradients": _base,
    "LoRA attention": _lora(ATTENTION),
    "LoRA all linear": _lora(ALL_LINEAR),
    "LoRA all linear, our loss": _lora_with_our_loss,
    "DoRA all linear": _lora(ALL_LINEAR, use_dora=True),
    "HF Shadow": _peft_shadow,
    "authors' Shadow": _authors_shadow,
    "ours": _ours,
}
# On demand (``--rows``): the presets that compute otherwise than the paper's formula, which "ours" is.
ONE_HEAD = {"shadow_num_attention_heads": 1, "shadow_num_key_value_heads": 1}
PRESET_ROWS = {
    "ours, recommended": _preset("recommended", r=8, shadow_intermediate_size=64),
    "ours, attached": _preset("attached", **ONE_HEAD),
    "ours, sublayers": _preset("sublayers", **ONE_HEAD),
}
TOLERANCE = 0.02
# Behind the name of a row: the same under torch.compile.
COMPILED = ", compiled"
# What each row needs installed, beyond this package.
PACKAGES = {name: "peft" for name in ROWS if "LoRA" in name or "DoRA" in name or name == "HF Shadow"}
PACKAGES["authors' Shadow"] = "shadow_peft"


def budget_of(base: PreTrainedModel, shape: Shape) -> int:
    """Trained weights of our row, which sets the budget of LoRA and DoRA."""
    return count_shadow(shadow_config(shape, None), meta_base(base.config, None))


def build(name: str, base: PreTrainedModel, shape: Shape, *, dropout: float | None, device: str) -> nn.Module:
    """One row in training mode around the base's own weights. ``dropout`` None: the method's default."""
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = (ROWS | PRESET_ROWS)[name.removesuffix(COMPILED)](twin(base), shape, budget_of(base, shape), dropout)
    model.to(device).train()
    if name.endswith(COMPILED):
        model.compile(fullgraph=True)
    return model


@torch.no_grad()
def main_loss(name: str, model: nn.Module, batch: dict[str, Tensor]) -> float:
    """The loss of the base's path alone, without dropout."""
    name = name.removesuffix(COMPILED)
    model.eval()
    if name == "authors' Shadow":
        weight, model.shadow_loss_weight = model.shadow_loss_weight, 0.0
        loss = model(**batch).loss
        model.shadow_loss_weight = weight
    else:
        output = model(**batch)
        loss = output.loss
        if name == "HF Shadow":
            loss = loss - model.peft_config["default"].auxiliary_loss_weight * output.shadow_loss
        if name.startswith("ours"):
            loss = output.main_loss
    model.train()
    return loss.item()


def check_start(losses: dict[str, float], *, dtype: torch.dtype) -> None:
    """Every method starts as the base itself, so its first loss is the base's, up to the order of summation.

    Raises:
        AssertionError: one does not; then the rows do not do the same work.
    """
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    first = next(iter(losses.values()))
    wrong = {name: loss for name, loss in losses.items() if abs(loss - first) > tolerance * abs(first)}
    assert not wrong, f"expected the base's loss {first} from every row, found {wrong}"

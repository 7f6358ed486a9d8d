"""Writes the golden files anew, after a wanted change: ``python tests/golden/regenerate.py``.

The saved adapter is written only if it is absent: it stands for the adapters that users have on disk, so a new
format must go on reading it. Delete ``tests/golden/adapter`` by hand if it has to be given up.
"""

import json
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from models import randomise, tiny_base, tiny_config, tokens  # noqa: E402
from shadowpeft import ShadowModel, get_shadow_model  # noqa: E402

CURVE, ADAPTER, LOGITS = FOLDER / "loss_curve.txt", FOLDER / "adapter", FOLDER / "adapter_logits.json"
NUM_STEPS = 20
SHADOW = {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_head_dim": 8}


def loss_curve() -> list[tuple[float, float]]:
    """(main loss, shadow loss) of 20 AdamW steps on one batch, in float64 without dropout."""
    model = get_shadow_model(tiny_base(), tiny_config(shadow_dropout=0.0, shadow_alpha=1.0, auxiliary_loss_weight=0.5))
    seed_weights(model)
    model.train()
    optimizer = torch.optim.AdamW(model.network().parameters(), lr=1e-2)
    ids, losses = tokens(4, 12), []
    for _ in range(NUM_STEPS):
        out = model(ids, labels=ids)
        losses.append((out.main_loss.item(), out.shadow_loss.item()))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return losses


def seed_weights(model: torch.nn.Module) -> None:
    """Weights that depend on their names and torch's seeded CPU generator alone, not on how the model is built."""
    for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (0.2 * noise).to(parameter.dtype)


def golden_base() -> torch.nn.Module:
    base = tiny_base(num_hidden_layers=3)
    seed_weights(base)
    return base


def adapter_logits(model: ShadowModel) -> list[list[float]]:
    """Attached, then shadow logits of the last position; 5 of 97 each."""
    out = model(tokens(1, 6), output_shadow_logits=True)
    return [logits[0, -1, :5].tolist() for logits in (out.logits, out.shadow_logits)]


def main() -> None:
    lines = [f"{step:2d} {main:.12f} {shadow:.12f}\n" for step, (main, shadow) in enumerate(loss_curve(), start=1)]
    CURVE.write_text("# step main_loss shadow_loss\n" + "".join(lines), encoding="utf-8")
    if not ADAPTER.exists():
        base = golden_base()
        base.name_or_path = "tiny"
        model = get_shadow_model(base, tiny_config(**SHADOW))
        randomise(model.network())
        model.save_pretrained(ADAPTER)
        LOGITS.write_text(json.dumps(adapter_logits(model), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

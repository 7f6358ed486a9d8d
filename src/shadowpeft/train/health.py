"""What a finished run tells about itself: spikes of the loss, gates that no longer move, corrections never trained."""

import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from shadowpeft.core import ShadowConfig
from shadowpeft.core.step import ACTIVATIONS
from shadowpeft.model.adapter_config import read_config
from shadowpeft.model.tensors import DIGEST, WEIGHTS_FILE, read_tensors

WINDOW = 16
# A spike lies this many median absolute deviations above the median of the lines before it, and this share above it:
# the first alone would call noise a spike where a loss is nearly constant.
DEVIATIONS, SHARE = 6.0, 0.1
NUM_PROBES = 512
CLOSED, OPEN = 0.01, 0.99


def health(folder: Path) -> dict[str, str]:
    """Findings on a saved adapter and, where it lies beside, the log of its run; names and sentences.

    Raises:
        CheckpointError: no adapter is there, or it is damaged.
    """
    described = read_config(folder)
    config = ShadowConfig.from_dict(described["shadow"])
    tensors = read_tensors(folder / WEIGHTS_FILE, described[DIGEST])
    log = folder.parent / "metrics.jsonl"
    return {
        "loss": _loss_finding(log) if log.is_file() else f"no {log.name} of a run beside the adapter",
        "not finite": _listed([name for name, t in tensors.items() if not torch.isfinite(t).all()], "weights"),
        "dead gates": _gate_finding(config, tensors),
        "untrained": _listed([n for n, t in tensors.items() if n.endswith("W_up") and not t.any()], "corrections"),
    }


def spikes(losses: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The (step, loss) pairs that stand out from the ``WINDOW`` before them."""
    found = []
    for index in range(WINDOW, len(losses)):
        before = [loss for _, loss in losses[index - WINDOW : index]]
        middle = statistics.median(before)
        deviation = statistics.median(abs(loss - middle) for loss in before)
        if losses[index][1] > max(middle + DEVIATIONS * deviation, middle * (1 + SHARE)):
            found.append(losses[index])
    return found


def _loss_finding(log: Path) -> str:
    losses = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if "loss" in entry:
            losses.append((int(entry["step"]), float(entry["loss"])))
    if not losses:
        return "the log holds no loss"
    found = spikes(losses)
    course = f"{losses[0][1]:.3f} at step {losses[0][0]}, {losses[-1][1]:.3f} at step {losses[-1][0]}"
    listed = ", ".join(f"{loss:.3f} at step {step}" for step, loss in found[:5])
    return f"{course}; {len(found)} spikes{': ' + listed if found else ''}"


def dead_share(config: ShadowConfig, weights: dict[str, Tensor]) -> float:
    """Share of an update's gate elements (Eq. 6) that stay below 0.01 or above 0.99 for every probe.

    Probes are normal vectors [512, d], as a LayerNorm without weights would hand over, through the norm's own weights.
    """
    W_1, W_2 = weights["W_G1"].double(), weights["W_G2"].double()
    z = torch.randn(NUM_PROBES, W_1.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = z * weights.get("norm_weight", torch.ones(())).double() + weights.get("norm_bias", torch.zeros(())).double()
    hidden = ACTIVATIONS[config.update_activation](z @ W_1 + weights.get("b_G1", torch.zeros(())).double())
    g = torch.sigmoid(hidden @ W_2 + weights.get("b_G2", torch.zeros(())).double())
    return ((g.amax(0) < CLOSED) | (g.amin(0) > OPEN)).double().mean().item()


def _gate_finding(config: ShadowConfig, tensors: dict[str, Tensor]) -> str:
    norm = {name: tensors[f"update_{name.replace('_', '.')}"] for name in ("norm_weight", "norm_bias")
            if f"update_{name.replace('_', '.')}" in tensors}  # fmt: skip
    steps = sorted({name.split(".")[1] for name in tensors if name.startswith("updates.")}, key=int)
    if not steps:
        return "this adapter has no gates"
    shares = []
    for step in steps:
        prefix = f"updates.{step}."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        shares.append(dead_share(config, own | norm))
    listed = [f"{step} ({share:.0%})" for step, share in zip(steps, shares, strict=True) if share > 0.5]
    worst = f"; more than half: updates {', '.join(listed)}" if listed else ""
    return f"{sum(shares) / len(shares):.1%} of all elements near 0 or 1 for every probe{worst}"


def _listed(names: list[str], what: str) -> str:
    return f"{len(names)} {what}" + (f": {', '.join(names[:3])}" if names else "")

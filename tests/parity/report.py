"""Prints how far our presets are from the peers and writes ``results/parity.json``.

Run as ``python tests/parity/report.py``. It measures the cases of tests/parity with the code of those tests.
"""

import json
import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from parity.peers import ARCHITECTURES, CASES, PEERS, Comparison, compare  # noqa: E402
from shadowpeft.files import write_files  # noqa: E402

QUANTITIES = ("logits", "auxiliary_loss", "loss", "gradients")
PACKAGES = ("shadowpeft", "torch", "transformers", "peft", "shadow-peft")


def difference(ours: Tensor | dict[str, Tensor], theirs: Tensor | dict[str, Tensor]) -> float:
    """The largest absolute difference."""
    if isinstance(ours, dict):
        return max(difference(ours[name], theirs[name]) for name in ours)
    return (ours - theirs).abs().amax().item()


def differences(comparison: Comparison) -> dict[str, float]:
    return {name: difference(getattr(comparison.ours, name), getattr(comparison.theirs, name)) for name in QUANTITIES}


def measure() -> list[dict]:
    """One row a case."""
    return [
        {
            "peer": name,
            "architecture": case.architecture,
            "shadow": case.shape,
            "task": "SEQ_CLS" if case.is_classifier else "CAUSAL_LM",
            "dropout": case.dropout,
            **differences(compare(peer, case)),
        }
        for name, peer in PEERS.items()
        for case in CASES
    ]


def table(rows: list[dict]) -> str:
    """Markdown; each entry is the largest over all cases of that peer and architecture."""
    lines = ["| peer | architecture | cases | logits | aux loss | loss | gradients |", "|---|---|---|---|---|---|---|"]
    for peer in PEERS:
        for architecture in ARCHITECTURES:
            found = [row for row in rows if (row["peer"], row["architecture"]) == (peer, architecture)]
            largest = " | ".join(f"{max(row[name] for row in found):.1e}" for name in QUANTITIES)
            lines.append(f"| {peer} | {architecture} | {len(found)} | {largest} |")
    return "\n".join(lines)


def main() -> None:
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    rows = measure()
    result = {
        "what": "largest absolute difference to each peer, equal random weights, float64",
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": "cpu",
        "num_threads": torch.get_num_threads(),
        "rows": rows,
    }
    text = json.dumps(result, indent=2) + "\n"
    write_files(ROOT / "results", lambda folder: (folder / "parity.json").write_text(text, encoding="utf-8"))
    print(table(rows))


if __name__ == "__main__":
    main()

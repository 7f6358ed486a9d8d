"""A small model becomes the shadow of a large one: `python recipes/pretrain_projection.py --base B --small S --data T`.

The paper's Appendix B in three steps that build on one another: the projection of Eq. 12, that projection aligned with
the small model's own head, then backbone and projection trained as a language model behind the large head. The paper
used Qwen3-8B, Qwen3-0.6B and 200K documents; on those, the last step wants a GPU.
"""

import argparse
from pathlib import Path

from rich.console import Console

from shadowpeft.train.pretrain import run
from shadowpeft.train.pretrain_config import PretrainConfig

ALIGN_RATE = 1e-3  # one matrix, already close: far above what the backbone bears
TRAIN_RATE = 1e-4  # the small model is pretrained and must not forget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--small", required=True)
    parser.add_argument("--data", required=True, help="text: .txt, .jsonl, .gz, or hub:NAME[:CONFIG]")
    parser.add_argument("--output", type=Path, default=Path("runs/pretrain_projection"))
    parser.add_argument("--align-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tiny", action="store_true", help="a trial run of a few steps")
    given = parser.parse_args()
    small = {"batch_size": 2, "length": 32} if given.tiny else {}
    align, train = (2, 2) if given.tiny else (given.align_steps, given.steps)
    console = Console()
    shared = {"base": given.base, "data": given.data, **small}
    first = run(
        PretrainConfig(**shared, shadow=given.small, objective="projection", steps=align, learning_rate=ALIGN_RATE,
                       output=str(given.output / "aligned")),
        console,
    )  # fmt: skip
    run(
        PretrainConfig(**shared, shadow=str(first.shadow), objective="causal_lm", steps=train, learning_rate=TRAIN_RATE,
                       initial_projection="stored", output=str(given.output / "trained")),
        console,
    )  # fmt: skip


if __name__ == "__main__":
    main()

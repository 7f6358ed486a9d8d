"""EleutherAI's harness and our own scorer, on the same rows of a task that is described by a local config."""

import json
import random

import pytest
import torch

import comparisons
from models import randomise, tiny_base, tiny_config
from shadowpeft import get_shadow_model
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.modes import score_modes
from shadowpeft.train.tasks import TASKS

LETTERS = "ABCD"


def questions(count: int) -> list[dict]:
    draw = random.Random(0)
    return [
        {
            "subject": "numbers",
            "question": f"What is {number} plus {draw.randrange(9)}?",
            "choices": [str(draw.randrange(20)) for _ in LETTERS],
            "answer": draw.randrange(4),
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def shadow():
    base = tiny_base(dtype=torch.float32, vocab_size=259, max_position_embeddings=128)
    model = get_shadow_model(base, tiny_config(adapter_dtype="float32", shadow_alpha=1.0))
    randomise(model.network())
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports
def test_lm_eval_gives_the_same_accuracy_as_our_own_scorer_for_base_attached_and_detached(shadow, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install lm_eval)")
    from shadowpeft.evaluate.lm_eval import lm_eval_scores

    rows, tokenizer = questions(40), comparisons.byte_tokenizer(bos_token=None)
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = "\n".join(f"{letter}: {{{{choices[{index}]}}}}" for index, letter in enumerate(LETTERS))
    config = {
        "task": "local_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\n" + options + "\nAnswer:",
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    theirs = lm_eval_scores(shadow, tokenizer, [config], bootstrap_iters=0)
    ours = score_modes(shadow, tokenizer, TASKS["mmlu"], rows, max_length=128)
    for mode, score in ours.items():
        assert theirs[mode]["local_questions"]["acc,none"] == pytest.approx(score.metrics["accuracy"])
    assert len({score.metrics["accuracy"] for score in ours.values()}) > 1


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_refuses_unknown_modes_and_classifiers(shadow):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install lm_eval)")
    from shadowpeft.evaluate.lm_eval import lm_eval_scores

    with pytest.raises(ConfigError, match="unknown mode 'both'"):
        lm_eval_scores(shadow, comparisons.byte_tokenizer(), [], modes=["both"])
    classifier = get_shadow_model(tiny_base(labels=3), tiny_config(task_type="SEQ_CLS"))
    with pytest.raises(ConfigError, match="shadowpeft eval"):
        lm_eval_scores(classifier, comparisons.byte_tokenizer(), [])

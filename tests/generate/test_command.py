"""``shadowpeft generate --speculative``."""

import io

import pytest
import torch
from rich.console import Console

from shadowpeft.commands import answering
from shadowpeft.errors import ConfigError
from speculation import adapted

OPTIONS = {
    "task": None,
    "base": None,
    "max_new_tokens": 5,
    "temperature": 0.0,
    "top_p": 1.0,
    "seed": 0,
    "allow_other_weights": False,
}


class Words:
    """A tokenizer whose words are numbers."""

    pad_token_id, eos_token_id, bos_token_id = 0, None, None

    def decode(self, ids, **options):
        return " ".join(map(str, ids.tolist()))


@pytest.fixture
def answers(monkeypatch):
    model = adapted("llama", num_hidden_layers=2)
    monkeypatch.setattr(answering, "load_with_tokenizer", lambda *args, **kwargs: (model, Words()))
    monkeypatch.setattr(answering, "_prompt_ids", lambda prompt, task, tokenizer: [int(word) for word in prompt.split()])

    def run(mode="attached", **options):
        stream = io.StringIO()
        answering.generate("adapter", ["5 7 9", "11 3"], Console(file=stream, width=200), mode=mode, **OPTIONS | options)
        return stream.getvalue().splitlines()

    return run


def test_the_answers_stay_and_the_acceptance_is_told(answers):
    torch.manual_seed(0)
    plain = answers()
    for speculative in ("3", "auto"):
        lines = answers(speculative=speculative)
        assert lines[:2] == plain
        assert lines[2].endswith("drafted tokens accepted")


@pytest.mark.parametrize("value", ["-1", "some", "1.5"])
def test_a_bad_number_of_drafts_is_refused(answers, value):
    with pytest.raises(ConfigError, match="is not valid: expected the number of draft tokens"):
        answers(speculative=value)


def test_a_mode_without_a_base_and_a_shadow_is_refused(answers):
    with pytest.raises(ConfigError, match="--mode is detached"):
        answers(mode="detached", speculative="2")

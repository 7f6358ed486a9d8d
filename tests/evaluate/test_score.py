import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from shadowpeft import ShadowConfig, get_shadow_model
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.evaluate.result import wilson
from shadowpeft.evaluate.score import choice_tokens, evaluate, evaluate_generation, majority_baseline
from shadowpeft.train.data import prompt_ids
from shadowpeft.train.tasks import TASKS

INTENT, CLASSES, MMLU, E2E = (TASKS[name] for name in ("intent", "classification", "mmlu", "e2e"))
COMMANDS = [
    {"text": "sit", "intent": "sit"},
    {"text": "please play some music for me", "intent": "play_music"},
    {"text": "go away", "intent": "[REMOTE]"},
    {"text": "wake me", "intent": "alarm(at=six)"},
    {"text": "sit down", "intent": "sit"},
]
QUESTIONS = [
    {"subject": "letters", "question": "Last?", "choices": ["a", "b"], "answer": "B"},
    {
        "subject": "letters",
        "question": "Which of these comes first?",
        "choices": ["a", "b", "c", "d"],
        "answer": 0,
    },
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; 0-2 are special."""
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    built = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tiny_config(**options) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **({"max_position_embeddings": 512, "initializer_range": 0.3} | options),
    )


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(tiny_config()).eval()


class Rigged(nn.Module):
    """Answers each prompt with the text that ``say`` gives it, an end token and padding."""

    def __init__(self, tokenizer, say, positions=None):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=positions)
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.device = torch.device("cpu")
        self.tokenizer, self.say, self.calls, self.prompts = tokenizer, say, [], []

    def generate(self, input_ids, attention_mask, **options):
        self.calls.append(options)
        rows = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        self.prompts += rows
        answers = [self.tokenizer(self.say(self.tokenizer.decode(row)))["input_ids"] + [2] for row in rows]
        answers = [answer[: options["max_new_tokens"]] for answer in answers]
        width = max(map(len, answers))
        padded = [answer + [0] * (width - len(answer)) for answer in answers]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


def knows(rows, task=INTENT):
    """Says the target of the row whose prompt it is asked."""
    targets = {task.prompt(row): task.target(row) for row in rows}
    return lambda prompt: targets[prompt.removeprefix("<s>")]


# ---------------------------------------------------------------- generation


def test_a_model_that_knows_every_answer_scores_one(tokenizer):
    result = evaluate(
        Rigged(tokenizer, knows(COMMANDS)), tokenizer, INTENT, COMMANDS, max_length=64, batch_size=2
    )
    assert result.metrics == {"accuracy": 1.0} and result.headline == "accuracy"
    assert (result.task, result.n, result.num_truncated) == ("intent", 5, 0)
    assert result.interval == pytest.approx(wilson(5, 5))


def test_generations_are_in_the_order_given_whatever_the_batches(tokenizer):
    model = Rigged(tokenizer, lambda prompt: f" {prompt.split()[1]}() and so on")
    for batch_size in (1, 2, 16):
        result = evaluate(model, tokenizer, INTENT, COMMANDS, max_length=64, batch_size=batch_size)
        extracted = ["sit()", "please()", "go()", "wake()", "sit()"]
        assert [record["extracted"] for record in result.generations] == extracted
        assert [record["score"]["accuracy"] for record in result.generations] == [1.0, 0.0, 0.0, 0.0, 1.0]
        assert result.metrics == {"accuracy": 0.4}
    assert result.generations[0] == {
        "prompt": "Command: sit\nSkill:",
        "prediction": " sit() and so on",
        "extracted": "sit()",
        "target": " sit()",
        "score": {"accuracy": 1.0},
    }


def test_new_tokens_count_up_to_the_end_token_and_not_the_padding(tokenizer):
    result = evaluate(Rigged(tokenizer, knows(COMMANDS)), tokenizer, INTENT, COMMANDS, max_length=64)
    assert result.new_tokens == sum(len(INTENT.target(row)) + 1 for row in COMMANDS)
    assert result.tokens_per_second == pytest.approx(result.new_tokens / result.seconds)


def test_the_limit_of_new_tokens_is_the_tasks_unless_given(tokenizer):
    model = Rigged(tokenizer, knows(COMMANDS))
    evaluate(model, tokenizer, INTENT, COMMANDS, max_length=64)
    cut = evaluate(model, tokenizer, INTENT, COMMANDS, max_length=64, max_new_tokens=3)
    assert [call["max_new_tokens"] for call in model.calls] == [INTENT.max_new_tokens, 3]
    assert cut.metrics == {"accuracy": 0.0} and cut.new_tokens == 3 * len(COMMANDS)


def test_a_prompt_is_answered_once_however_many_rows_share_it(tokenizer):
    rows = [{"mr": "name[Zizzi]", "ref": reference} for reference in ("Come to Zizzi today.", "It is Zizzi.")]
    model = Rigged(tokenizer, lambda prompt: " Come to Zizzi today.")
    result = evaluate(model, tokenizer, E2E, rows, max_length=64)
    assert len(model.prompts) == 1 and result.n == len(result.generations) == 2
    assert result.metrics == {"slot_accuracy": 1.0, "bleu": pytest.approx(1.0)}
    assert result.interval == pytest.approx((1.0, 1.0))


def test_prompts_longer_than_the_limit_keep_their_end_and_are_counted(tokenizer):
    model = Rigged(tokenizer, lambda prompt: " sit()")
    result = evaluate(model, tokenizer, INTENT, COMMANDS, max_length=30)
    asked = [tuple(prompt_ids(INTENT, tokenizer, row, 30)) for row in COMMANDS]
    assert sorted(map(tuple, model.prompts)) == sorted(asked)
    assert result.num_truncated == 1


def test_prompt_and_answer_stay_within_the_models_positions(tokenizer):
    model = Rigged(tokenizer, lambda prompt: " sit()" * 20, positions=40)
    evaluate(model, tokenizer, INTENT, COMMANDS, max_length=512)
    assert model.calls[0]["max_new_tokens"] == 20
    assert max(map(len, model.prompts)) == 20


def test_progress_is_told_after_every_batch(tokenizer):
    told = []
    model = Rigged(tokenizer, knows(COMMANDS))
    evaluate(
        model,
        tokenizer,
        INTENT,
        COMMANDS,
        max_length=64,
        batch_size=2,
        progress=lambda *done: told.append(done),
    )
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_a_batch_gives_the_same_text_as_each_row_alone(tokenizer, llama):
    together = evaluate(llama, tokenizer, INTENT, COMMANDS, max_length=64, max_new_tokens=12)
    alone = evaluate(llama, tokenizer, INTENT, COMMANDS, max_length=64, max_new_tokens=12, batch_size=1)
    assert [record["prediction"] for record in together.generations] == [
        record["prediction"] for record in alone.generations
    ]
    assert len({record["prediction"] for record in together.generations}) > 1


def test_decoding_is_greedy_and_silent_whatever_the_models_own_generation_config_says(
    tokenizer, llama, caplog
):
    plain = evaluate(llama, tokenizer, INTENT, COMMANDS, max_length=64, max_new_tokens=12)
    model = copy.deepcopy(llama)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        repetition_penalty=3.0,
        max_length=9,
        max_new_tokens=2048,
        bos_token_id=1,
        eos_token_id=[2],
    )
    before = model.generation_config.to_dict()
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        sampled = evaluate(model, tokenizer, INTENT, COMMANDS, max_length=64, max_new_tokens=12)
    finally:
        library.removeHandler(caplog.handler)
    assert [record["prediction"] for record in sampled.generations] == [
        record["prediction"] for record in plain.generations
    ]
    assert caplog.records == []
    assert model.generation_config.to_dict() == before


def test_an_end_token_of_the_models_own_config_ends_an_answer_too(tokenizer, llama):
    model = copy.deepcopy(llama)
    model.lm_head = Constant(tokenizer, {"x": 9.0})
    options = {"max_length": 64, "max_new_tokens": 12}
    assert evaluate(model, tokenizer, INTENT, COMMANDS, **options).generations[0]["prediction"] == "x" * 12
    model.generation_config.eos_token_id = [2, *tokenizer("x")["input_ids"]]
    stopped = evaluate(model, tokenizer, INTENT, COMMANDS, **options)
    assert stopped.new_tokens == len(COMMANDS)


def test_an_adapted_a_disabled_and_a_detached_model_are_scored_alike(tokenizer, llama):
    shadow = get_shadow_model(copy.deepcopy(llama), ShadowConfig())
    options = {"max_length": 64, "max_new_tokens": 6}
    base = evaluate(llama, tokenizer, INTENT, COMMANDS, **options)
    attached = evaluate(shadow, tokenizer, INTENT, COMMANDS, **options)
    with shadow.disable_adapter():
        disabled = evaluate(shadow, tokenizer, INTENT, COMMANDS, **options)
    detached = evaluate(shadow.detach(), tokenizer, INTENT, COMMANDS, **options)
    texts = [
        [record["prediction"] for record in each.generations] for each in (base, attached, disabled, detached)
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]  # a fresh adapter changes nothing
    assert detached.n == len(COMMANDS)


def test_every_module_is_back_in_its_mode_afterwards_even_if_scoring_fails(tokenizer, llama):
    model = copy.deepcopy(llama).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, tokenizer, INTENT, COMMANDS[:1], max_length=64, max_new_tokens=2)
    assert [module.training for module in model.modules()] == before

    def fail(*done):
        assert not model.training
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        evaluate(model, tokenizer, INTENT, COMMANDS[:1], max_length=64, max_new_tokens=2, progress=fail)
    assert [module.training for module in model.modules()] == before


# ---------------------------------------------------------------- choice


def test_the_letter_of_the_largest_log_likelihood_is_chosen(tokenizer, llama):
    result = evaluate(llama, tokenizer, MMLU, QUESTIONS, max_length=256)
    for row, record in zip(QUESTIONS, result.generations, strict=True):
        ids = prompt_ids(MMLU, tokenizer, row) + tokenizer(" ")["input_ids"]
        likelihood = llama(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        letters = "ABCD"[: len(row["choices"])]
        best = max(letters, key=lambda letter: likelihood[tokenizer(letter)["input_ids"][0]].item())
        assert record["extracted"] == best
        assert record["score"] == {"accuracy": float(" " + best == record["target"])}
    assert result.new_tokens == result.n == 2


@pytest.mark.parametrize("wanted", ["A", "B"])
def test_only_letters_of_the_rows_own_options_compete(tokenizer, llama, wanted):
    model = copy.deepcopy(llama)
    scores = {"D": 9.0, "C": 8.0, wanted: 7.0, "x": 99.0}
    model.lm_head = Constant(tokenizer, scores)
    result = evaluate(model, tokenizer, MMLU, QUESTIONS, max_length=256)
    assert [record["extracted"] for record in result.generations] == [wanted, "D"]
    assert result.metrics == {"accuracy": float(wanted == "B") / 2}


class Constant(nn.Module):
    """A head with the same logits everywhere."""

    def __init__(self, tokenizer, scores):
        super().__init__()
        self.logits = torch.zeros(259)
        for letter, score in scores.items():
            self.logits[tokenizer(letter)["input_ids"][0]] = score

    def forward(self, hidden):
        return self.logits.expand(*hidden.shape[:-1], -1)


def test_long_questions_are_cut_and_counted(tokenizer, llama):
    result = evaluate(llama, tokenizer, MMLU, QUESTIONS, max_length=40)
    assert result.num_truncated == 1


def test_choices_need_one_distinct_token_each(tokenizer):
    assert choice_tokens(tokenizer, [" A", " B"]) == (
        tokenizer(" ")["input_ids"],
        [tokenizer("A")["input_ids"][0], tokenizer("B")["input_ids"][0]],
    )
    for choices in ([" A", " AB"], [" A", " A"], [" xA", " yB"]):
        with pytest.raises(DataError, match="no single token for each of"):
            choice_tokens(tokenizer, choices)


# ---------------------------------------------------------------- classification


class FirstByte(nn.Module):
    """Puts a text into class 0, 1 or 2 by its last token that is no padding, as a classifier pools."""

    def __init__(self, tokenizer):
        super().__init__()
        self.config, self.device = SimpleNamespace(), torch.device("cpu")
        self.classes = {tokenizer(letter)["input_ids"][0]: number for number, letter in enumerate("abc")}

    def forward(self, input_ids, attention_mask):
        last = input_ids.gather(1, attention_mask.sum(1, keepdim=True) - 1)[:, 0]
        return SimpleNamespace(logits=torch.eye(3)[[self.classes[token] for token in last.tolist()]])


def test_the_label_of_the_largest_logit_is_taken_in_the_order_of_the_names(tokenizer):
    rows = [{"text": "xxa", "label": "low"}, {"text": "c", "label": "high"}, {"text": "xb", "label": "low"}]
    names = ["low", "middle", "high"]
    result = evaluate(
        FirstByte(tokenizer), tokenizer, CLASSES, rows, label_names=names, max_length=8, batch_size=2
    )
    assert [record["prediction"] for record in result.generations] == ["low", "high", "middle"]
    assert result.metrics == {"accuracy": pytest.approx(2 / 3)}
    assert result.new_tokens == 0 and result.tokens_per_second * result.seconds == pytest.approx(6 + 3)


def test_a_real_classifier_gives_each_row_its_own_label_whatever_the_batch(tokenizer):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(num_labels=5)).eval()
    rows = [{"text": text, "label": "0"} for text in ("a", "quite a long text", "b b", "middling", "z")]
    names = [str(number) for number in range(5)]
    options = {"label_names": names, "max_length": 64}
    together = evaluate(model, tokenizer, CLASSES, rows, **options)
    alone = evaluate(model, tokenizer, CLASSES, rows, batch_size=1, **options)
    predictions = [record["prediction"] for record in together.generations]
    assert predictions == [record["prediction"] for record in alone.generations]
    assert len(set(predictions)) > 1


def test_classification_needs_names_that_hold_every_label(tokenizer):
    rows = [{"text": "a", "label": "new"}]
    with pytest.raises(DataError, match="pass label_names"):
        evaluate(FirstByte(tokenizer), tokenizer, CLASSES, rows, max_length=8)
    with pytest.raises(DataError, match="row 1: the label 'new' is not among"):
        evaluate(FirstByte(tokenizer), tokenizer, CLASSES, rows, label_names=["low"], max_length=8)


# ---------------------------------------------------------------- intervals and baselines


def test_partial_credit_gets_a_bootstrap_and_right_or_wrong_gets_wilson(tokenizer):
    rows = [{"prompt": f"Say {number}.", "answer": "one two"} for number in range(4)]
    model = Rigged(tokenizer, lambda prompt: " one two" if "0" in prompt or "1" in prompt else " one")
    result = evaluate(model, tokenizer, TASKS["instruction"], rows, max_length=64)
    assert result.metrics == {"exact_match": 0.5, "f1": pytest.approx((1 + 1 + 2 / 3 + 2 / 3) / 4)}
    assert result.interval == pytest.approx(wilson(2, 4))
    model = Rigged(tokenizer, lambda prompt: " one two three four." if "0" in prompt else " one")
    rows = [{"mr": f"name[one], food[{food}]", "ref": "one two three four ."} for food in ("0", "1", "2")]
    low, high = evaluate(model, tokenizer, E2E, rows, max_length=64).interval
    assert low == 0.0 and 0.0 < high <= 1.0


def test_the_majority_baseline_always_gives_the_most_frequent_training_answer():
    train = [{"text": str(number), "label": label} for number, label in enumerate("aabbb")]
    test = [{"text": "x", "label": label} for label in "abcb"]
    assert majority_baseline(CLASSES, train, test) == 0.5
    assert majority_baseline(INTENT, COMMANDS, COMMANDS) == 0.4
    assert (
        majority_baseline(E2E, [{"mr": "name[X]", "ref": "a b c d"}], [{"mr": "name[Y]", "ref": "a b c d"}])
        == 1.0
    )


def test_scoring_nothing_and_empty_batches_are_refused(tokenizer, llama):
    with pytest.raises(DataError, match="no rows of task 'intent'"):
        evaluate(llama, tokenizer, INTENT, [], max_length=8)
    with pytest.raises(DataError, match="no rows of task 'intent'"):
        majority_baseline(INTENT, [], COMMANDS)
    with pytest.raises(ConfigError, match="batch_size=0 is not valid"):
        evaluate_generation(llama, tokenizer, INTENT, COMMANDS, max_length=8, batch_size=0)

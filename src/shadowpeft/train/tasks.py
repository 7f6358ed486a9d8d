"""The tasks, as one table: where the rows are, how they are asked, and how answers are read and scored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shadowpeft.train.answers import (
    BLEU,
    LETTERS,
    SLOT_F1,
    CorpusMetric,
    Row,
    final_answer,
    final_number,
    first_call,
    first_letter,
    first_line,
    first_object,
    skill_call,
    slot_accuracy,
    text_scores,
)
from shadowpeft.train.phrasing import (
    correct_letter,
    gold_answers,
    instruction_target,
    label_of,
    mmlu_prompt,
    score_answer,
    score_number,
    score_slots,
    slots_target,
    solution,
    squad_prompt,
    with_all_references,
    without_blank_texts,
    without_headers,
    worked_answer,
)
from shadowpeft.train.robot import generate_robot_commands

SPLITS = ("train", "validation", "test")
# Names of our splits in sources, best first; a name taken by an earlier split is not reused.
USUAL_SPLITS = {
    "train": ("train",),
    "validation": ("validation", "val", "validate", "valid", "dev"),
    "test": ("test",),
}


def stripped(text: str) -> str | None:
    """The text without outer white space; None if nothing is left."""
    return text.strip() or None


def all_rows(rows: list[Row]) -> list[Row]:
    return rows


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        name: key in ``TASKS``.
        kind: ``generation`` writes the answer, ``choice`` compares the likelihood of the options' letters,
            ``classification`` puts a sequence-classification head on the raw text.
        metric: the headline among the metrics of ``score`` and ``corpus``.
        fields: what every row needs.
        prompt, target: the two texts of a row. A target's leading space joins it to its prompt.
        extract: the answer in a generated text, None if there is none.
        score: (answer or None, row) -> metrics of that row, each from 0 to 1.
        max_new_tokens: limit of a generated answer.
        hub_name, hub_config: arguments of ``datasets.load_dataset``; None for tasks of the user's own data.
        splits: our split -> names in the source, best first.
        aliases: our field -> names that other copies of the data give it.
        prepare: run on all rows of a split before any are sampled.
        built_in: the rows of all splits, for a task whose data comes with the package.
        choices: the options' target texts of a row (kind ``choice``).
        asks_one_text: whether a text alone makes a prompt; False where a row's prompt takes several fields.
        corpus: a metric over all rows together.
    """

    name: str
    kind: Literal["generation", "choice", "classification"]
    metric: str
    fields: tuple[str, ...]
    prompt: Callable[[Row], str]
    target: Callable[[Row], str]
    score: Callable[[str | None, Row], dict[str, float]]
    extract: Callable[[str], str | None] = stripped
    max_new_tokens: int = 0
    hub_name: str | None = None
    hub_config: str | None = None
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(USUAL_SPLITS))
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prepare: Callable[[list[Row]], list[Row]] = all_rows
    built_in: Callable[[], dict[str, list[Row]]] | None = None
    choices: Callable[[Row], list[str]] | None = None
    asks_one_text: bool = True
    corpus: CorpusMetric | None = None

    def corpus_score(self, predictions: Sequence[str | None], rows: Sequence[Row]) -> dict[str, float]:
        """Metrics over all rows together; empty for most tasks."""
        return {} if self.corpus is None else {self.corpus.name: self.corpus.score(predictions, rows)}


# ---------------------------------------------------------------- the table


def classification(name: str, **options: Any) -> Task:
    """A task that a sequence-classification head answers from the raw text."""
    return Task(
        name=name,
        kind="classification",
        metric="accuracy",
        fields=("text", "label"),
        prompt=lambda row: str(row["text"]),
        target=label_of,
        extract=str,
        score=lambda prediction, row: {"accuracy": float(prediction == label_of(row))},
        **options,
    )


def intent(name: str, **options: Any) -> Task:
    """A task that is answered by a generated skill call, such as ``alarm_query()``."""
    return Task(
        name=name,
        kind="generation",
        metric="accuracy",
        fields=("text", "intent"),
        prompt=lambda row: f"Command: {row['text']}\nSkill:",
        target=lambda row: f" {skill_call(str(row['intent']))}",
        extract=first_call,
        score=lambda prediction, row: {"accuracy": float(prediction == skill_call(str(row["intent"])))},
        max_new_tokens=40,
        **options,
    )


_ALL = (
    Task(
        name="gsm8k",
        kind="generation",
        metric="accuracy",
        fields=("question", "answer"),
        prompt=lambda row: f"Question: {row['question']}\nAnswer:",
        target=solution,
        extract=final_number,
        score=score_number,
        max_new_tokens=320,
        hub_name="openai/gsm8k",
        hub_config="main",
    ),
    Task(
        name="metamathqa",
        kind="generation",
        metric="accuracy",
        fields=("query", "response"),
        prompt=lambda row: f"Question: {row['query']}\nAnswer:",
        target=worked_answer,
        extract=final_answer,
        score=score_answer,
        max_new_tokens=320,
        hub_name="meta-math/MetaMathQA",
    ),
    Task(
        name="squad_v2",
        kind="generation",
        metric="exact_match",
        fields=("context", "question", "answers"),
        prompt=squad_prompt,
        asks_one_text=False,
        target=lambda row: f" {gold_answers(row)[0]}",
        extract=first_line,
        score=lambda prediction, row: text_scores(prediction, gold_answers(row)),
        max_new_tokens=48,
        hub_name="rajpurkar/squad_v2",
    ),
    Task(
        name="mmlu",
        kind="choice",
        metric="accuracy",
        fields=("subject", "question", "choices", "answer"),
        prompt=mmlu_prompt,
        asks_one_text=False,
        target=lambda row: f" {correct_letter(row)}",
        extract=first_letter,
        score=lambda prediction, row: {"accuracy": float(prediction == correct_letter(row))},
        choices=lambda row: [f" {letter}" for letter in LETTERS[: len(row["choices"])]],
        max_new_tokens=1,
        hub_name="cais/mmlu",
        hub_config="all",
        splits={**USUAL_SPLITS, "train": ("train", "auxiliary_train", "dev")},
        prepare=without_headers,
    ),
    Task(
        name="e2e",
        kind="generation",
        metric="bleu",
        fields=("mr", "ref"),
        prompt=lambda row: f"Data: {row['mr']}\nText:",
        target=lambda row: f" {row['ref']}",
        extract=first_line,
        score=lambda prediction, row: {"slot_accuracy": slot_accuracy(prediction, row["mr"])},
        max_new_tokens=96,
        hub_name="GEM/e2e_nlg",
        splits={**USUAL_SPLITS, "train": ("train", "trainset", "dev"), "test": ("test", "testset")},
        aliases={"mr": ("meaning_representation",), "ref": ("target", "human_reference")},
        prepare=with_all_references,
        corpus=BLEU,
    ),
    Task(
        name="snips",
        kind="generation",
        metric="slot_f1",
        fields=("text", "intent", "spans"),
        prompt=lambda row: f"Command: {row['text'].strip()}\nSlots:",
        target=slots_target,
        extract=first_object,
        score=score_slots,
        max_new_tokens=160,
        corpus=SLOT_F1,
    ),
    Task(
        name="instruction",
        kind="generation",
        metric="exact_match",
        fields=("prompt", "answer"),
        prompt=lambda row: str(row["prompt"]),
        target=instruction_target,
        score=lambda prediction, row: text_scores(prediction, [str(row["answer"])]),
        max_new_tokens=256,
    ),
    classification("amazon", hub_name="SetFit/amazon_reviews_multi_en"),
    classification("20news", hub_name="SetFit/20_newsgroups", prepare=without_blank_texts),
    classification("trec", hub_name="CogComp/trec", aliases={"label": ("coarse_label", "label_coarse")}),
    # stanfordnlp/sst2 hides the labels of its test split; this copy has them.
    classification("sst2", hub_name="SetFit/sst2", aliases={"text": ("sentence",)}),
    classification("sst5", hub_name="SetFit/sst5"),
    classification("classification"),
    intent("clinc150", hub_name="clinc/clinc_oos", hub_config="plus"),
    intent("home_commands", hub_name="xingkunliuxtracta/nlu_evaluation_data", aliases={"intent": ("label",)}),
    # The same rows as classes, for methods that need a classification head.
    classification("clinc150_labels", hub_name="clinc/clinc_oos", hub_config="plus", aliases={"label": ("intent",)}),
    classification(
        "home_commands_labels", hub_name="xingkunliuxtracta/nlu_evaluation_data", aliases={"label": ("intent",)}
    ),
    intent("robot", built_in=generate_robot_commands),
    intent("intent"),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}

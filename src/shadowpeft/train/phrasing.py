"""Rows as texts: how each task's rows are filtered, asked and answered."""

import logging
import re

from shadowpeft.errors import DataError
from shadowpeft.train.answers import (
    LETTERS,
    UNANSWERABLE,
    Row,
    final_answer,
    final_number,
    same_number,
    slots_json,
    slots_of,
    spoken_slots,
)

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- GSM8K


def solution(row: Row) -> str:
    """The rationale down to ``#### n``, without the ``<<3*4=12>>`` marks of the calculator."""
    return " " + re.sub(r"<<[^>]*>>", "", row["answer"]).strip()


def score_number(prediction: str | None, row: Row) -> dict[str, float]:
    return {"accuracy": float(same_number(prediction, final_number(row["answer"])))}


# ---------------------------------------------------------------- MetaMathQA


def worked_answer(row: Row) -> str:
    """The response down to ``#### answer``, GSM8K's form, so that one model can be scored on both.

    Raises:
        DataError: the response does not say ``The answer is: ...``.
    """
    rationale, mark, answer = row["response"].rpartition("The answer is:")
    if not mark:
        raise DataError(f"the response {row['response'][:60]!r} does not end in 'The answer is: ...'; correct the row")
    return f" {rationale.partition('####')[0].strip()}\n#### {answer.strip()}"


def score_answer(prediction: str | None, row: Row) -> dict[str, float]:
    """Equal as texts or, where both are nothing but a number, as numbers."""
    gold = final_answer(worked_answer(row))
    return {"accuracy": float(prediction == gold or same_number(_whole_number(prediction), _whole_number(gold)))}


# A comma groups thousands or it makes a list: 3,4 is not 34.
_NUMERAL = re.compile(r"\$?\s*[-+]?\s*\$?\s*(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+)\.?")


def _whole_number(text: str | None) -> str | None:
    """The number that ``text`` is; None where more than it stands there, of which :func:`final_number` reads the first."""
    return final_number(f"#### {text}") if text is not None and _NUMERAL.fullmatch(text) else None


# ---------------------------------------------------------------- slots


def slots_target(row: Row) -> str:
    return f" {slots_json(row)}"


def score_slots(prediction: str | None, row: Row) -> dict[str, float]:
    """Whether intent and all slots are right, and the intent alone."""
    said, meant = slots_of(prediction), spoken_slots(row)
    return {"exact_match": float(said == meant), "intent_accuracy": float(bool(said) and said[0] == meant[0])}


# ---------------------------------------------------------------- SQuAD v2


def gold_answers(row: Row) -> list[str]:
    """All gold spans; ``unanswerable`` alone where there is none.

    Raises:
        DataError: ``answers`` does not look like ``{"text": [...]}``.
    """
    answers = row["answers"]
    if not isinstance(answers, dict) or not isinstance(answers.get("text"), list):
        raise DataError(
            f"'answers' is {str(answers)[:80]}; expected SQuAD's form {{'text': ['an answer', ...]}}"
        )
    return answers["text"] or [UNANSWERABLE]


def squad_prompt(row: Row) -> str:
    return (
        f"Context: {row['context']}\nQuestion: {row['question']}\n"
        f"Answer with a span of the context, or {UNANSWERABLE}.\nAnswer:"
    )


# ---------------------------------------------------------------- MMLU


def is_header(row: Row) -> bool:
    """The local files start each subject with a line of column names, ``{"question": "question", ...}``."""
    return row["question"] == "question" and row["answer"] == "answer"


def without_headers(rows: list[Row]) -> list[Row]:
    """Leaves the column names out and logs how many such rows there were."""
    kept = [row for row in rows if not is_header(row)]
    if len(kept) < len(rows):
        logger.info("mmlu: left out %d rows that only hold column names", len(rows) - len(kept))
    return kept


def without_blank_texts(rows: list[Row]) -> list[Row]:
    """Leaves texts without a word out and logs how many there were: a post that was all header, quotation and signature."""
    kept = [row for row in rows if str(row["text"]).strip()]
    if len(kept) < len(rows):
        logger.info("left out %d rows without a text", len(rows) - len(kept))
    return kept


def mmlu_prompt(row: Row) -> str:
    options = [f"{letter}: {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)]
    return "\n".join([str(row["question"]).strip(), *options, "Answer:"])


def correct_letter(row: Row) -> str:
    """The answer as a letter, from an index (3 or ``"3"``) or a letter.

    Raises:
        DataError: it is neither, or past the options.
    """
    answer, letters = str(row["answer"]).strip().upper(), LETTERS[: len(row["choices"])]
    if answer.isdecimal() and int(answer) < len(letters):
        return letters[int(answer)]
    if len(answer) == 1 and answer in letters:
        return answer
    raise DataError(
        f"answer {row['answer']!r} of {str(row['question'])[:60]!r} is not an option; expected one of "
        f"{', '.join(letters)} or an index from 0 to {len(letters) - 1}"
    )


# ---------------------------------------------------------------- E2E


def with_all_references(rows: list[Row]) -> list[Row]:
    """Each row with the ``references`` of every row of its ``mr``; a sample is scored against all of them."""
    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(row["mr"], []).append(row["ref"])
    return [{**row, "references": row.get("references") or references[row["mr"]]} for row in rows]


# ---------------------------------------------------------------- instruction


def instruction_target(row: Row) -> str:
    """The answer; a space joins it to its prompt unless white space already does."""
    prompt, answer = str(row["prompt"]), str(row["answer"])
    is_apart = not prompt or prompt[-1].isspace() or answer[:1].isspace()
    return answer if is_apart else f" {answer}"


# ---------------------------------------------------------------- classification


def label_of(row: Row) -> str:
    """The label's name where the source gives one (SetFit's ``label_text``), else the label itself."""
    return str(row.get("label_text", row["label"]))

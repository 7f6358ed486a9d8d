"""Answers as text: how they are read out of what a model wrote, and how they are compared. No models here."""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

Row = dict[str, Any]
UNANSWERABLE = "unanswerable"
REMOTE = "[REMOTE]"
LETTERS = string.ascii_uppercase
_NUMBER = re.compile(r"####\s*\$?\s*([-+]?)\s*\$?\s*([\d,]*\.?\d+)")
_CALL_START = re.compile(r"\w[\w.:/-]*\(")
_SLOT = re.compile(r"([^\[\],]+)\[([^\]]*)\]")


def first_line(text: str) -> str | None:
    """The first line that is not blank; None without one."""
    return next((line.strip() for line in text.splitlines() if line.strip()), None)


def final_number(text: str) -> str | None:
    """The number behind the first ``####``, without ``$`` and commas; None without one."""
    match = _NUMBER.search(text)
    return None if match is None else match[1].replace("+", "") + match[2].replace(",", "")


def final_answer(text: str) -> str | None:
    """What stands behind the first ``####`` on its line; None without one."""
    rest = text.partition("####")[2].lstrip()
    return rest.splitlines()[0].strip() or None if rest else None


def same_number(left: str | None, right: str | None) -> bool:
    """Equal as numbers (``18`` and ``18.00``). None equals nothing."""
    return left is not None and right is not None and Decimal(left) == Decimal(right)


def first_letter(text: str) -> str | None:
    """The first capital that stands alone, as in ``B``, ``B:`` or ``(B)``."""
    match = re.search(r"\b[A-Z]\b", text)
    return None if match is None else match[0]


def skill_call(intent: str) -> str:
    """The call for an intent: ``alarm_query`` -> ``alarm_query()``; calls and ``[REMOTE]`` stay."""
    intent = intent.strip()
    return intent if first_call(intent) == intent else re.sub(r"\W+", "_", intent) + "()"


def first_call(text: str) -> str | None:
    """The call (or ``[REMOTE]``) that the text starts with; None if it starts with anything else."""
    text = text.strip()
    if text.startswith(REMOTE):
        return REMOTE
    depth = 0
    for index, character in enumerate(text if _CALL_START.match(text) else ""):
        depth += (character == "(") - (character == ")")
        if character == ")" and depth == 0:
            return text[: index + 1]
    return None


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall over normalised words. Two empty texts agree."""
    left, right = normalise(prediction).split(), normalise(gold).split()
    if not left or not right:
        return float(left == right)
    shared = sum((Counter(left) & Counter(right)).values())
    return 2 * shared / (len(left) + len(right))


def text_scores(prediction: str | None, golds: Sequence[str]) -> dict[str, float]:
    """SQuAD's exact match and F1, the best over all gold answers. No prediction scores 0."""
    if prediction is None:
        return {"exact_match": 0.0, "f1": 0.0}
    return {
        "exact_match": max(float(normalise(prediction) == normalise(gold)) for gold in golds),
        "f1": max(token_f1(prediction, gold) for gold in golds),
    }


def slot_values(meaning: str) -> list[str]:
    """Values of ``name[Alimentum], area[city centre]``; ``familyFriendly`` is never said so and left out."""
    return [value.strip() for name, value in _SLOT.findall(meaning) if name.strip() != "familyFriendly"]


def slot_accuracy(prediction: str | None, meaning: str) -> float:
    """Share of slot values that appear literally in the prediction, in any case; 1 if there are none."""
    values = slot_values(meaning)
    said = (prediction or "").lower()
    return sum(value.lower() in said for value in values) / len(values) if values else 1.0


@dataclass(frozen=True, kw_only=True)
class CorpusMetric:
    """A metric that is no mean over rows: counts of all segments are added up, then a formula is applied.

    Attributes:
        name: key in the metrics.
        counts: (predictions, rows) -> one list of counts for each segment; rows may share a segment.
        value: summed counts -> metric, from 0 to 1.
    """

    name: str
    counts: Callable[[Sequence[str | None], Sequence[Row]], list[list[int]]]
    value: Callable[[Sequence[float]], float]

    def score(self, predictions: Sequence[str | None], rows: Sequence[Row]) -> float:
        return self.value([sum(column) for column in zip(*self.counts(predictions, rows), strict=True)])


def bleu_counts(prediction: str, references: Sequence[str]) -> list[int]:
    """For BLEU-4: [length, closest reference length, matches of order 1..4, n-grams of order 1..4]."""
    words, golds = _words(prediction), [_words(reference) for reference in references]
    closest = min((abs(len(gold) - len(words)), len(gold)) for gold in golds)[1]
    matches, totals = [], []
    for order in range(1, 5):
        allowed: Counter[tuple[str, ...]] = Counter()
        for gold in golds:
            allowed |= _ngrams(gold, order)
        found = _ngrams(words, order)
        matches.append(sum((found & allowed).values()))
        totals.append(sum(found.values()))
    return [len(words), closest, *matches, *totals]


def bleu_value(counts: Sequence[float]) -> float:
    """Corpus BLEU-4 (Papineni et al. 2002), 0 to 1, without smoothing, from summed :func:`bleu_counts`."""
    length, closest, matches, totals = counts[0], counts[1], counts[2:6], counts[6:10]
    if min(matches) == 0:
        return 0.0
    precision = sum(math.log(match / total) for match, total in zip(matches, totals, strict=True)) / 4
    return math.exp(precision + min(0.0, 1 - closest / length))


def meaning_counts(predictions: Sequence[str | None], rows: Sequence[Row]) -> list[list[int]]:
    """BLEU counts with one segment for each distinct ``mr``, against all its references in ``rows``."""
    golds: dict[str, list[str]] = {}
    said: dict[str, str] = {}
    for prediction, row in zip(predictions, rows, strict=True):
        golds.setdefault(row["mr"], []).extend(row.get("references") or [row["ref"]])
        said.setdefault(row["mr"], prediction or "")
    return [bleu_counts(said[meaning], golds[meaning]) for meaning in golds]


BLEU = CorpusMetric(name="bleu", counts=meaning_counts, value=bleu_value)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _ngrams(words: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))


# ---------------------------------------------------------------- slots as JSON


def spoken_slots(row: Row) -> tuple[str, list[tuple[str, str]]]:
    """(intent, sorted (slot, value) pairs) of a row with ``intent`` and ``spans``."""
    pairs = [(span["entity"], span["text"].strip()) for span in row["spans"] if span.get("entity")]
    return row["intent"], sorted(pairs)


def slots_json(row: Row) -> str:
    """``{"intent": "...", "artist": "..."}`` on one line; a slot that is filled twice holds a list."""
    intent, _ = spoken_slots(row)
    filled: dict[str, list[str]] = {}
    for span in row["spans"]:
        if span.get("entity"):
            filled.setdefault(span["entity"], []).append(span["text"].strip())
    slots = {name: values[0] if len(values) == 1 else values for name, values in filled.items()}
    return json.dumps({"intent": intent, **slots}, ensure_ascii=False)


def first_object(text: str) -> str | None:
    """The JSON object that the text starts with; None if it starts with anything else or the object is broken."""
    text = text.strip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    return text[:end] if isinstance(value, dict) else None


def slots_of(prediction: str | None) -> tuple[str, list[tuple[str, str]]] | None:
    """(intent, sorted pairs) of the object that a text starts with; values that are no text or list count as text."""
    found = first_object(prediction or "")
    if found is None:
        return None
    values = json.loads(found)
    pairs = []
    for name, value in values.items():
        pairs += [(name, str(item)) for item in (value if isinstance(value, list) else [value]) if name != "intent"]
    return str(values.get("intent", "")), sorted(pairs)


def slot_counts(predictions: Sequence[str | None], rows: Sequence[Row]) -> list[list[int]]:
    """[slots said and meant, slots said, slots meant] of each row. A slot under a wrong intent still counts."""
    counts = []
    for prediction, row in zip(predictions, rows, strict=True):
        said, meant = Counter((slots_of(prediction) or ("", []))[1]), Counter(spoken_slots(row)[1])
        counts.append([sum((said & meant).values()), sum(said.values()), sum(meant.values())])
    return counts


def f1_value(counts: Sequence[float]) -> float:
    """Micro F1 over all slots, 0 to 1; 0 where nothing was said or meant."""
    right, said, meant = counts
    return 2 * right / (said + meant) if said + meant else 0.0


SLOT_F1 = CorpusMetric(name="slot_f1", counts=slot_counts, value=f1_value)

import logging

import pytest

from shadowpeft.errors import DataError
from shadowpeft.train.answers import bleu_counts, bleu_value, final_number, first_call, skill_call
from shadowpeft.train.tasks import SPLITS, TASKS

QUESTION = {"subject": "letters", "question": "Which comes last?", "choices": ["a", "b", "c"], "answer": 2}
SPAN = {
    "context": "The fox is red.",
    "question": "What colour?",
    "answers": {"text": ["red", "the colour red"]},
}
COMMAND = {"text": "wake me at six", "intent": "alarm_set"}
REVIEW = {"text": "quite good", "label": 4}
ROWS = {
    "gsm8k": {"question": "6 times 3?", "answer": "6*3 = <<6*3=18>>18\n#### 18"},
    "squad_v2": SPAN,
    "mmlu": QUESTION,
    "e2e": {
        "mr": "name[Zizzi], food[Thai], familyFriendly[yes]",
        "ref": "Zizzi serves Thai food to everyone.",
    },
    "metamathqa": {"query": "6 times 3?", "response": "6 x 3 = 18\n#### 18\nThe answer is: 18"},
    "snips": {
        "text": "play clem burke on Pre-Party",
        "intent": "PlayMusic",
        "spans": [
            {"text": "play "},
            {"text": "clem burke", "entity": "artist"},
            {"text": " on "},
            {"text": "Pre-Party", "entity": "playlist"},
        ],
    },
    "instruction": {"prompt": "Say hello.", "answer": "Hello there."},
    **dict.fromkeys(
        ("amazon", "20news", "trec", "sst2", "sst5", "classification", "clinc150_labels", "home_commands_labels"),
        REVIEW,
    ),
    **dict.fromkeys(("clinc150", "home_commands", "robot", "intent"), COMMAND),
}


def scores(task: str, text: str, row: dict) -> dict[str, float]:
    return TASKS[task].score(TASKS[task].extract(text), row)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_gives_its_own_target_full_marks_and_another_answer_none(name):
    task, row = TASKS[name], ROWS[name]
    answer = task.extract(task.target(row))
    right = task.score(answer, row) | task.corpus_score([answer], [row])
    assert task.metric in right and set(right.values()) == {1.0}
    wrong = task.score(task.extract("nonsense"), row) | task.corpus_score(["nonsense"], [row])
    assert set(wrong.values()) == {0.0}
    assert set(task.score(None, row).values()) == {0.0}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_names_all_splits_and_only_fields_its_row_has(name):
    assert set(TASKS[name].splits) == set(SPLITS)
    assert set(TASKS[name].fields) <= set(ROWS[name])
    assert (TASKS[name].choices is None) == (TASKS[name].kind != "choice")


# ---------------------------------------------------------------- numbers


def test_a_gsm8k_target_is_the_rationale_without_calculator_marks():
    assert TASKS["gsm8k"].prompt(ROWS["gsm8k"]) == "Question: 6 times 3?\nAnswer:"
    assert TASKS["gsm8k"].target(ROWS["gsm8k"]) == " 6*3 = 18\n#### 18"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("so\n####1,234.50", "1234.50"),
        ("#### $70,000.", "70000"),
        ("#### $ -5 dollars", "-5"),
        ("#### -$5", "-5"),
        ("#### +.5", ".5"),
        ("#### 3\nQuestion: more?\n#### 4", "3"),
        ("the answer is 18", None),
        ("#### none", None),
    ],
)
def test_the_number_behind_the_first_mark_is_read(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "right"), [("#### 18.00", 1.0), ("#### $18.", 1.0), ("#### 180", 0.0), ("18", 0.0)]
)
def test_gsm8k_compares_numbers_not_texts(text, right):
    assert scores("gsm8k", text, ROWS["gsm8k"]) == {"accuracy": right}


# ---------------------------------------------------------------- spans


@pytest.mark.parametrize(
    ("text", "exact_match", "f1"),
    [
        (" The Red!\nQuestion: more", 1.0, 1.0),  # articles, case and marks do not count, nor later lines
        ("colour red", 1.0, 1.0),  # the second gold answer
        ("dark red", 0.0, 2 / 3),
        ("green", 0.0, 0.0),
        ("  \n ", 0.0, 0.0),
    ],
)
def test_squad_takes_the_best_gold_answer_after_normalising(text, exact_match, f1):
    assert scores("squad_v2", text, SPAN) == pytest.approx({"exact_match": exact_match, "f1": f1})


def test_an_unanswerable_question_wants_that_word_and_not_silence():
    row = SPAN | {"answers": {"text": []}}
    assert TASKS["squad_v2"].target(row) == " unanswerable"
    assert scores("squad_v2", "Unanswerable.", row) == {"exact_match": 1.0, "f1": 1.0}
    assert scores("squad_v2", "", row) == {"exact_match": 0.0, "f1": 0.0}
    assert scores("squad_v2", "the", row) == {"exact_match": 0.0, "f1": 0.0}


@pytest.mark.parametrize("answers", ["red", ["red"], {"text": "red"}, {}])
def test_squad_answers_of_another_form_are_refused(answers):
    with pytest.raises(DataError, match="expected SQuAD's form"):
        TASKS["squad_v2"].target(SPAN | {"answers": answers})


def test_posts_without_a_word_are_left_out_of_20news(caplog):
    """The hub's copy has had headers, quotations and signatures taken out, and some posts were nothing else."""
    rows = [{"text": "on motors", "label": "autos"}, {"text": " \n", "label": "autos"}, {"text": "", "label": "space"}]
    with caplog.at_level("INFO"):
        assert TASKS["20news"].prepare(rows) == rows[:1]
    assert "left out 2 rows without a text" in caplog.text


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize("answer", [2, "2", "C", "c"])
def test_an_mmlu_answer_may_be_index_digit_or_letter(answer):
    assert TASKS["mmlu"].target(QUESTION | {"answer": answer}) == " C"


@pytest.mark.parametrize("answer", [3, -1, "D", "AB", "", "answer"])
def test_an_mmlu_answer_past_the_options_is_refused(answer):
    with pytest.raises(DataError, match="'Which comes last\\?' is not an option; expected one of A, B, C"):
        TASKS["mmlu"].target(QUESTION | {"answer": answer})


def test_an_mmlu_prompt_lists_the_options_by_letter():
    assert TASKS["mmlu"].prompt(QUESTION) == "Which comes last?\nA: a\nB: b\nC: c\nAnswer:"
    assert TASKS["mmlu"].choices(QUESTION) == [" A", " B", " C"]


def test_rows_of_column_names_are_left_out_and_counted_in_the_log(caplog):
    header = QUESTION | {"question": "question", "answer": "answer"}
    asks_about_questions = QUESTION | {"question": "question"}
    with caplog.at_level(logging.INFO, logger="shadowpeft"):
        kept = TASKS["mmlu"].prepare([header, QUESTION, header, asks_about_questions])
    assert kept == [QUESTION, asks_about_questions]
    assert "left out 2 rows" in caplog.text


# ---------------------------------------------------------------- skill calls


@pytest.mark.parametrize(
    ("intent", "call"),
    [
        ("alarm_query", "alarm_query()"),
        ("PlayMusic", "PlayMusic()"),
        ("play some music", "play_some_music()"),
        ("set_timer(minutes=ten)", "set_timer(minutes=ten)"),
        ("say(text=twice(x))", "say(text=twice(x))"),
        (" [REMOTE] ", "[REMOTE]"),
    ],
)
def test_an_intent_becomes_a_call_unless_it_is_one(intent, call):
    assert skill_call(intent) == call
    assert TASKS["intent"].target({"text": "x", "intent": intent}) == f" {call}"


@pytest.mark.parametrize(
    ("text", "call"),
    [
        (" sit()", "sit()"),
        ("go(place=(1, 2)) and then sit()", "go(place=(1, 2))"),
        ("[REMOTE] because", "[REMOTE]"),
        ("I would sit()", None),
        ("sit(", None),
        ("", None),
    ],
)
def test_the_call_a_text_starts_with_is_read(text, call):
    assert first_call(text) == call


# ---------------------------------------------------------------- text from data


def bleu(prediction: str, *references: str) -> float:
    return bleu_value(bleu_counts(prediction, references))


def test_bleu_is_the_geometric_mean_of_four_precisions():
    assert bleu("a b c d e", "a b c d f") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_bleu_punishes_brevity_against_the_closest_reference():
    assert bleu("a b c d", "a b c d e f g h") == pytest.approx(0.36787944)  # exp(1 - 8/4)
    assert bleu("a b c d", "a b c d e f g h", "w x y z") == 1.0


def test_bleu_counts_a_word_only_as_often_as_one_reference_has_it():
    assert bleu_counts("the the the", ["the cat", "the the dog"])[2] == 2


def test_bleu_is_zero_without_any_common_four_words():
    assert bleu("a b c", "a b c") == bleu("", "a b c d") == 0.0


def test_a_meaning_with_several_rows_is_one_segment_with_all_references():
    one = {"mr": "name[X]", "ref": "X is a fine place ."}
    other = {"mr": "name[X]", "ref": "Visit X any day ."}
    rows = TASKS["e2e"].prepare([one, other])
    said = "Visit X any day ."
    assert TASKS["e2e"].corpus_score([said], rows[:1]) == {"bleu": 1.0}
    assert TASKS["e2e"].corpus.counts([said, said], rows) == TASKS["e2e"].corpus.counts([said], rows[:1])


def test_slot_accuracy_is_the_share_of_values_said_whatever_their_case():
    row = {"mr": "name[Blue Spice], eatType[coffee shop], area[riverside], familyFriendly[yes]", "ref": ""}
    assert scores("e2e", "Coffee shop Blue Spice.", row) == {"slot_accuracy": pytest.approx(2 / 3)}
    assert scores("e2e", "", row) == {"slot_accuracy": 0.0}


# ---------------------------------------------------------------- own data


@pytest.mark.parametrize(
    ("prompt", "answer", "target"),
    [("Say hi.", "hi", " hi"), ("Say hi.\n", "hi", "hi"), ("Say hi.", "\nhi", "\nhi"), ("", "hi", "hi")],
)
def test_white_space_joins_an_instruction_and_its_answer_once(prompt, answer, target):
    assert TASKS["instruction"].target({"prompt": prompt, "answer": answer}) == target


def test_a_label_goes_by_its_name_where_the_source_gives_one():
    assert TASKS["20news"].target({"text": "x", "label": 7, "label_text": "rec.autos"}) == "rec.autos"
    assert TASKS["sst2"].target({"text": "x", "label": 0}) == "0"


# ---------------------------------------------------------------- slots and worked answers


def test_slots_are_written_as_one_line_of_json_and_a_slot_filled_twice_holds_a_list():
    row = {
        "text": "from Rome to Oslo",
        "intent": "Fly",
        "spans": [{"text": "Rome", "entity": "city"}, {"text": " to "}, {"text": "Oslo ", "entity": "city"}],
    }
    assert TASKS["snips"].target(row) == ' {"intent": "Fly", "city": ["Rome", "Oslo"]}'
    assert scores("snips", TASKS["snips"].target(row), row) == {"exact_match": 1.0, "intent_accuracy": 1.0}


@pytest.mark.parametrize(
    ("text", "exact", "intent"),
    [
        ('{"intent": "PlayMusic", "playlist": "Pre-Party", "artist": "clem burke"} and more', 1.0, 1.0),
        ('{"intent": "PlayMusic", "artist": "clem"}', 0.0, 1.0),
        ('{"intent": "PlayMusic", "artist": 7}', 0.0, 1.0),
        ('{"artist": "clem burke", "playlist": "Pre-Party"}', 0.0, 0.0),
        ('{"intent": "PlayMusic", "artist": "clem', 0.0, 0.0),
        ("[1, 2]", 0.0, 0.0),
    ],
)
def test_slots_are_right_in_any_order_and_broken_json_is_no_answer(text, exact, intent):
    assert scores("snips", text, ROWS["snips"]) == {"exact_match": exact, "intent_accuracy": intent}


def test_slot_f1_adds_up_slots_over_all_rows():
    rows = [ROWS["snips"], {"text": "hi", "intent": "Greet", "spans": [{"text": "hi"}]}]
    said = ['{"intent": "x", "artist": "clem burke", "album": "y"}', None]
    assert TASKS["snips"].corpus_score(said, rows) == {"slot_f1": 2 * 1 / (2 + 2)}
    assert TASKS["snips"].corpus_score([None, None], [rows[1], rows[1]]) == {"slot_f1": 0.0}


def test_a_metamathqa_answer_takes_the_form_that_gsm8k_is_read_by():
    row = {"query": "?", "response": "2+2 = 4\n#### 4\nThe answer is: 4"}
    assert TASKS["metamathqa"].target(row) == " 2+2 = 4\n#### 4"
    assert TASKS["gsm8k"].extract(TASKS["metamathqa"].target(row)) == "4"


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("4", "#### 4.0", 1.0),
        (r"\frac{1}{2}", r"so #### \frac{1}{2}", 1.0),
        (r"\frac{1}{2}", r"#### \frac{1}{3}", 0.0),
        ("4", "four", 0.0),
        ("4x", "#### 4y", 0.0),
        (r"18\sqrt{3}", "#### 18", 0.0),
        ("5/6", "#### 5", 0.0),
        ("2x+1", "#### 2", 0.0),
        ("2", "#### 2x+1", 0.0),
        ("3,4", "#### 34", 0.0),
        ("34", "#### 3,4", 0.0),
        ("3,4", "#### 3,4", 1.0),
        ("1,234,567", "#### 1234567.0", 1.0),
        ("-1250", "#### -$1,250.00", 1.0),
        ("0.5", "#### $.5.", 1.0),
    ],
)
def test_a_metamathqa_answer_is_compared_as_text_or_number(answer, text, right):
    row = {"query": "?", "response": f"because. The answer is: {answer}"}
    assert scores("metamathqa", text, row) == {"accuracy": right}


def test_a_response_without_an_answer_is_refused():
    with pytest.raises(DataError, match="The answer is"):
        TASKS["metamathqa"].target({"query": "?", "response": "no idea"})


def test_intents_serve_as_labels_of_the_classification_tasks():
    task = TASKS["clinc150_labels"]
    assert task.kind == "classification" and task.aliases == {"label": ("intent",)}

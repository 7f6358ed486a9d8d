import random

import pytest

from deploy.tiny import byte_tokenizer
from shadowpeft.deploy.serve.text import AnswerText

TOKENIZER = byte_tokenizer()


def spoken(ids, stops=(), **options):
    text = AnswerText(TOKENIZER, stops, **options)
    pieces = [text.push(token) for token in ids]
    return [*pieces, text.finish()], text


@pytest.mark.parametrize("seed", range(20))
def test_pieces_joined_are_the_text_of_all_tokens_even_for_bytes_that_are_no_characters(seed):
    ids = [random.Random(seed + i).randrange(0, 259) for i in range(40)]
    pieces, text = spoken(ids)
    whole = TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces) == text.shown == whole


def test_a_character_of_several_tokens_is_shown_once_it_is_complete():
    pieces, _ = spoken(TOKENIZER("a€b")["input_ids"])
    assert pieces == ["a", "", "", "€", "b", ""]


def test_text_that_may_become_a_stop_sequence_is_held_back():
    pieces, text = spoken(TOKENIZER("ab ENx END c")["input_ids"], stops=("END", "zz"))
    assert "".join(pieces) == "ab ENx " and text.stopped
    assert pieces[:6] == ["a", "b", " ", "", "", "ENx"]


def test_text_held_back_is_shown_at_the_end():
    assert "".join(spoken(TOKENIZER("ab EN")["input_ids"], stops=("END",))[0]) == "ab EN"


def test_the_earliest_of_several_stops_counts():
    assert spoken(TOKENIZER("one two three")["input_ids"], stops=("three", "two"))[1].shown == "one "


def test_white_space_in_front_is_left_out_where_asked():
    pieces, _ = spoken(TOKENIZER(" \n sit() down")["input_ids"], strip_start=True)
    assert "".join(pieces) == "sit() down"

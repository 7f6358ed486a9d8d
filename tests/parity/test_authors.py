"""The preset ``authors`` against the authors' own package, ``shadow-peft`` 0.1.1."""

import pytest

from parity.peers import (
    ARCHITECTURES,
    CASES,
    NUM_BLOCKS,
    PEERS,
    Case,
    check_decoding,
    check_equality,
    check_substance,
    check_writing,
    compare,
)

pytest.importorskip("shadow_peft", reason="shadow-peft is not installed (pip install --no-deps shadow-peft==0.1.1)")

AUTHORS = PEERS["authors"]
# Behind the last block, where no block is left to correct.
LAST_UPDATE = {
    f"shadow_update_model.update_{part}.{NUM_BLOCKS - 2}.{position}.weight"
    for part, last in (("transforms", 3), ("gates", 2))
    for position in (0, last)
}
# Fed with the base's embeddings, but only a table called `embed_tokens` is taken out of the shadow.
UNUSED_TABLES = {"gpt2": {"wte"}, "gpt_neox": {"embed_in"}, "opt": {"decoder.embed_tokens"}}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_losses_and_all_gradients_equal_the_authors(case):
    check_equality(compare(AUTHORS, case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_compared_shadow_moves_the_logits_and_learns_everywhere(case):
    check_substance(compare(AUTHORS, case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_authors_never_train_is_what_we_leave_out(case):
    tables = set() if case.shape == "projected" else UNUSED_TABLES.get(case.architecture, set())
    assert compare(AUTHORS, case).theirs.idle == LAST_UPDATE | {f"shadow_model.{name}.weight" for name in tables}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_greedy_decoding_gives_the_authors_tokens(architecture):
    check_decoding(AUTHORS, architecture)


@pytest.mark.parametrize(
    "case", [Case(architecture="gpt2"), Case(architecture="llama", shape="projected"), CASES[-1]], ids=str
)
def test_weights_written_for_the_authors_package_run_there_as_here(case):
    check_writing(AUTHORS, case)

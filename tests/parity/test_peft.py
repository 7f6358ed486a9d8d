"""The preset ``peft`` against Hugging Face ``peft`` 0.21.2 and its ``ShadowConfig``."""

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

peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft==0.21.2)")
if not hasattr(peft, "ShadowConfig"):
    pytest.skip("this peft has no ShadowConfig (pip install peft==0.21.2)", allow_module_level=True)

# Raised by peft's own constructor under transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PEFT = PEERS["peft"]
# Of the last block, behind which no block is left to correct.
LAST_UPDATE = {
    f"{NUM_BLOCKS - 1}.shadow_update_{part}.default.{position}.{attribute}"
    for part in ("transform", "gate")
    for position in (0, 2)
    for attribute in ("weight", "bias")
}
# Fed with the base's embeddings, but only a table called `embed_tokens` is taken out of the shadow.
UNUSED_TABLES = {"gpt2": {"wte"}, "gpt_neox": {"embed_in"}}
BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_losses_and_all_gradients_equal_pefts(case):
    check_equality(compare(PEFT, case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_compared_shadow_moves_the_logits_and_learns_everywhere(case):
    check_substance(compare(PEFT, case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_peft_never_trains_is_what_we_leave_out(case):
    tables = set() if case.shape == "projected" else UNUSED_TABLES.get(case.architecture, set())
    blocks = BLOCKS.get(case.architecture, "model.layers")
    expected = {f"base_model.model.{blocks}.{name}" for name in LAST_UPDATE}
    expected |= {f"base_model.shadow_backbone.default.{name}.weight" for name in tables}
    assert compare(PEFT, case).theirs.idle == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_greedy_decoding_gives_pefts_tokens(architecture):
    check_decoding(PEFT, architecture)


@pytest.mark.parametrize(
    "case", [Case(architecture="gpt2"), Case(architecture="llama", shape="projected"), CASES[-1]], ids=str
)
def test_weights_written_for_peft_run_there_as_here(case):
    check_writing(PEFT, case)

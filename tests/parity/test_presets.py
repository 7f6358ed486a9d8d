"""Each preset against the package it is named after: shadow-peft 0.1.1 (``authors``) and peft 0.21.2 (``peft``)."""

import pytest

from parity.peers import (
    ARCHITECTURES,
    CASES,
    PEERS,
    Case,
    Peer,
    check_decoding,
    check_equality,
    check_substance,
    check_writing,
    compare,
)

# Raised by peft's own constructor under transformers 5.23.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # the peers, under transformers 5.24
]


@pytest.fixture(params=sorted(PEERS), scope="module")
def peer(request) -> Peer:
    found = PEERS[request.param]
    package = pytest.importorskip(found.package, reason=f"{found.package} is not installed ({found.install})")
    if not hasattr(package, "ShadowConfig"):
        pytest.skip(f"this {found.package} has no ShadowConfig ({found.install})")
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_losses_and_all_gradients_equal_the_peers(peer, case):
    check_equality(compare(peer, case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_compared_shadow_moves_the_logits_and_learns_everywhere(peer, case):
    check_substance(compare(peer, case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_peer_never_trains_is_what_we_leave_out(peer, case):
    assert compare(peer, case).theirs.idle == peer.never_trained(case)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_greedy_decoding_gives_the_peers_tokens(peer, architecture):
    check_decoding(peer, architecture)


@pytest.mark.parametrize("case", [Case(architecture="gpt2"), Case(architecture="llama", shape="projected"), CASES[-1]], ids=str)
def test_weights_written_for_the_peer_run_there_as_here(peer, case):
    check_writing(peer, case)

"""A peer's own saved files, read into our network and written back."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from parity.peers import CASES, PEERS, Peer, build_pair, compare

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # the peers, under transformers 5.24
]
# Those with tensors beyond the usual: a projection, a token table of their own or an unused one, heads, a prefix.
SPECIAL = [
    case
    for case in CASES
    if case.shape == "projected" or case.is_classifier or case.architecture in {"gpt2", "gpt_neox", "opt"}
]


@pytest.fixture(params=sorted(PEERS))
def peer(request) -> Peer:
    found = PEERS[request.param]
    pytest.importorskip(found.package, reason=f"{found.package} is not installed")
    return found


@pytest.mark.parametrize("case", SPECIAL, ids=str)
def test_a_peers_file_read_and_written_back_is_the_same_but_for_what_it_never_uses(peer, case, tmp_path):
    ours, theirs = build_pair(peer, case)
    saved = peer.save(theirs, tmp_path)
    ours.network().load_state_dict(peer.read(saved, ours))
    written = peer.write(ours)
    assert written.keys() == saved.keys()
    idle = compare(peer, case).theirs.idle
    for name, tensor in saved.items():
        assert torch.equal(written[name], torch.zeros_like(tensor) if name in idle else tensor), name


@pytest.mark.parametrize("case", SPECIAL, ids=str)
def test_our_network_written_as_a_file_and_read_back_is_the_same(peer, case, tmp_path):
    ours, _ = build_pair(peer, case)
    save_file(peer.write(ours), tmp_path / "written.safetensors")
    back = peer.read(load_file(tmp_path / "written.safetensors"), ours)
    expected = ours.network().state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())

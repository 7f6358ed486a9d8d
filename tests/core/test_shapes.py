"""The shapes in the signatures of the equations are checked while tests run."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from models import tiny_config
from shadowpeft.core import step
from shadowpeft.core.network import ShadowNetwork

jaxtyping = pytest.importorskip("jaxtyping", reason="shapes are checked with jaxtyping and beartype")
pytest.importorskip("beartype", reason="shapes are checked with jaxtyping and beartype")

H, S = torch.zeros(2, 5, 6), torch.zeros(1, 5, 6)  # the second would broadcast without a word


@pytest.mark.parametrize(
    "call",
    [
        lambda: step.discrepancy(H, S),
        lambda: step.inject(H, S, 0.1),
        lambda: step.update(S, H, H),
        lambda: step.update(H, S, H),
        lambda: step.correction(H, torch.zeros(6, 4), torch.zeros(3, 6)),
        lambda: step.transform(H, torch.zeros(6, 1), torch.zeros(3, 6), act=torch.tanh),
        lambda: step.gate(H, torch.zeros(1, 3), torch.zeros(3, 6), act=torch.tanh),
        lambda: step.discrepancy(H.long(), H.long()),
    ],
)
def test_a_wrong_shape_does_not_pass_even_where_it_would_broadcast(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_a_state_of_one_row_beside_a_batch_is_refused_by_the_network():
    network = ShadowNetwork(
        tiny_config(adapter_dtype="float32"), nn.Identity(), width=6, num_blocks=3, backbone_width=6, embedding_width=6
    )
    with pytest.raises(jaxtyping.TypeCheckError):
        network.step(2, H, S)
    assert network.step(2, H, torch.zeros(2, 5, 6))[0].shape == H.shape


def test_the_package_runs_without_jaxtyping_and_does_not_check_with_it():
    code = (
        "import sys; sys.modules['jaxtyping'] = None\n"
        "import torch; from shadowpeft.core import step\n"
        "print(step.discrepancy(torch.zeros(2, 5, 6), torch.zeros(1, 5, 6)).shape[0])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout.strip(), done.returncode) == ("2", 0), done.stderr

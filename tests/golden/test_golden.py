"""What must not change unnoticed. After a wanted change: ``python tests/golden/regenerate.py``."""

import json

import torch
from torch.testing import assert_close

from golden import regenerate
from shadowpeft import ShadowModel

# Everything is float64. BLAS libraries of different CPUs sum in different orders, which changes a product by
# some 1e-15 of its size; 20 steps of AdamW, which divides small gradients by their own size, grow that, but stay
# far below 1e-6. A wrong formula changes the curve by 1e-3 and more.
CURVE_TOLERANCE = {"rtol": 1e-6, "atol": 1e-9}
# One forward pass.
LOGITS_TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def test_twenty_training_steps_give_the_golden_losses():
    lines = regenerate.CURVE.read_text().splitlines()[1:]
    golden = torch.tensor([[float(x) for x in line.split()[1:]] for line in lines], dtype=torch.float64)
    found = torch.tensor(regenerate.loss_curve(), dtype=torch.float64)
    assert len(found) == regenerate.NUM_STEPS
    assert_close(found, golden, **CURVE_TOLERANCE)
    assert (found[-1] < 0.9 * found[0]).all()  # both losses fall


def test_an_adapter_saved_by_an_earlier_release_loads_and_gives_its_logits():
    model = ShadowModel.from_pretrained(regenerate.ADAPTER, regenerate.golden_base())
    golden = torch.tensor(json.loads(regenerate.LOGITS.read_text()), dtype=torch.float64)
    found = torch.tensor(regenerate.adapter_logits(model), dtype=torch.float64)
    assert_close(found, golden, **LOGITS_TOLERANCE)

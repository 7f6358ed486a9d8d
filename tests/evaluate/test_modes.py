import pytest
import torch

from models import tiny_base, tiny_config
from shadowpeft import ShadowModel, get_shadow_model
from shadowpeft.evaluate.modes import parameters_in_use


@pytest.mark.parametrize(
    ("frozen", "fields"),
    [
        ("nothing", {"shadow_model": "implicit"}),
        ("nothing", {"freeze_embeddings": False}),
        ("its table", {}),
        ("the shadow", {"freeze_backbone": True}),
    ],
)
def test_trained_parameters_are_those_that_training_changes_also_after_loading(tmp_path, frozen, fields):
    narrow = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    tiny_base("qwen3", dtype=torch.float32, **narrow).save_pretrained(tmp_path / "pretrained")
    config = tiny_config(**{"shadow_model": str(tmp_path / "pretrained"), **fields})
    model = get_shadow_model(tiny_base(), config)
    network = model.network()
    steps = sum(p.numel() for part in (network.injections, network.updates, network.update_norm) for p in part.parameters())
    trained = network.num_parameters(only_trainable=True)
    assert (trained == network.num_parameters()) == (frozen == "nothing")
    assert parameters_in_use(model) == {"base": 0, "attached": trained, "detached": trained - steps}
    model.save_pretrained(tmp_path / "saved")
    loaded = ShadowModel.from_pretrained(tmp_path / "saved", tiny_base())
    assert parameters_in_use(loaded) == parameters_in_use(model)

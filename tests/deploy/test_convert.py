"""Complete checkpoints: written by one side, run by the other, exact both ways; what a format lacks is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import ShadowConfig, ShadowModel, get_shadow_model
from shadowpeft.deploy import convert
from shadowpeft.deploy.convert import convert_checkpoint, detect
from shadowpeft.errors import ArchitectureError, CheckpointError, ConfigError
from shadowpeft.model.pretrained import PROJECTION_FILE

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # the peers, under transformers 5.24
]
SIZES = {"r": 4, "update_hidden_size": 3, "shadow_intermediate_size": 20, "shadow_alpha": 0.5}


@pytest.fixture
def doubles():
    """The peers make their modules in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def clean_base(model_type: str, labels: int | None):
    """Without a field that GPT-2's config lacks but tiny_base sets; the peers would take it for the MLP width."""
    base = tiny_base(model_type, labels=labels)
    if model_type == "gpt2":
        del base.config.intermediate_size
    return base


def adapted(preset: str, model_type: str = "llama", *, labels: int | None = None, **fields) -> ShadowModel:
    task = {} if labels is None else {"task_type": "SEQ_CLS"}
    own = {"shadow_intermediate_size": None} if "shadow_model" in fields else {}  # an explicit one brings its own
    config = ShadowConfig.preset(preset, adapter_dtype="float64", **{**SIZES, **own, **task, **fields})
    model = get_shadow_model(clean_base(model_type, labels), config)
    randomise(model.network())
    return model


def run_by_authors(folder: Path, base, *, labels: int | None, shadow_model=None) -> torch.Tensor:
    peer = pytest.importorskip("shadow_peft", reason="shadow-peft is not installed")
    task = peer.ShadowForCausalLM if labels is None else peer.ShadowForSequenceClassification
    model = task.from_pretrained(base, folder, shadow_model=shadow_model).eval()
    return model(input_ids=tokens(), attention_mask=torch.ones_like(tokens())).logits


def run_by_peft(folder: Path, base, **_) -> torch.Tensor:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    if not hasattr(peft, "ShadowConfig"):
        pytest.skip("this peft has no ShadowConfig")
    return peft.PeftModel.from_pretrained(base, folder).eval()(tokens()).logits


RUNS = {"authors": run_by_authors, "peft": run_by_peft}
VARIANTS = [
    ("llama", None, {}),
    ("gemma3_text", None, {}),
    ("gpt2", None, {}),
    ("qwen3", 3, {}),
    ("llama", None, {"shadow_model": "base:first:2"}),
    ("llama", None, {"alpha_rank": 2}),  # the peers get the alpha that this means at r
]


@pytest.mark.parametrize("to", ["authors", "peft"])
@pytest.mark.parametrize(("model_type", "labels", "fields"), VARIANTS)
def test_a_converted_folder_runs_in_the_peers_own_runtime_and_comes_back_exactly(
    tmp_path, doubles, to, model_type, labels, fields
):
    model = adapted(to, model_type, labels=labels, **fields)
    base = lambda: clean_base(model_type, labels)  # noqa: E731
    with torch.no_grad():
        expected = model(tokens()).logits
    model.save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to=to, base=base())
    with torch.no_grad():
        assert_close(RUNS[to](tmp_path / "theirs", base(), labels=labels), expected)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "back", to="shadowpeft", base=base())
    first, second = (load_file(tmp_path / name / "shadow_model.safetensors") for name in ("ours", "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(ShadowModel.from_pretrained(tmp_path / "back", base())(tokens()).logits, expected)
    convert_checkpoint(tmp_path / "back", tmp_path / "again", to=to, base=base())
    for path in (tmp_path / "theirs").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.fixture
def small_shadow(tmp_path):
    narrow = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = tiny_base("qwen3", dtype=torch.float32, **narrow)
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("to", ["authors", "peft"])
def test_an_explicit_shadow_of_another_family_runs_in_the_peers_own_runtime(tmp_path, doubles, small_shadow, to):
    from transformers import AutoModel

    model = adapted(to, shadow_model=str(small_shadow))
    with torch.no_grad():
        expected = model(tokens()).logits
    model.save_pretrained(tmp_path / "ours")
    notes = convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to=to, base=tiny_base())
    options = {"shadow_model": AutoModel.from_pretrained(small_shadow, dtype=torch.float64)} if to == "authors" else {}
    with torch.no_grad():
        assert_close(RUNS[to](tmp_path / "theirs", tiny_base(), labels=None, **options), expected)
    source = {"shadow_model": str(small_shadow)} if to == "authors" else {}
    assert any("does not name the explicit shadow" in note for note in notes) == bool(source)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "back", to="shadowpeft", base=tiny_base(), **source)
    with torch.no_grad():
        assert torch.equal(ShadowModel.from_pretrained(tmp_path / "back", tiny_base())(tokens()).logits, expected)


def test_an_adapter_that_a_peer_saved_gives_the_peers_logits_here(tmp_path, doubles):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    if not hasattr(peft, "ShadowConfig"):
        pytest.skip("this peft has no ShadowConfig")
    theirs = peft.get_peft_model(tiny_base(), peft.ShadowConfig(task_type="CAUSAL_LM", r=4)).eval()
    randomise(torch.nn.ParameterList(p for p in theirs.parameters() if p.requires_grad))
    with torch.no_grad():
        expected = theirs(tokens()).logits
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", to="shadowpeft", base=tiny_base())
    with torch.no_grad():
        assert_close(ShadowModel.from_pretrained(tmp_path / "ours", tiny_base())(tokens()).logits, expected)


# ---------------------------------------------------------------- projected shadows


@pytest.fixture
def projected(tmp_path, doubles, small_shadow):
    """A ``causal_lm_with_hidden_projection`` folder that the authors' package wrote, and its logits."""
    peer = pytest.importorskip("shadow_peft", reason="shadow-peft is not installed")
    wrapped = peer.AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=AutoModelForCausalLM.from_pretrained(small_shadow, dtype=torch.float64),
        shadow_hidden_projection=torch.nn.Linear(16, 32, bias=False),
        lm_head=tiny_base().lm_head,
        init_optimal_projection=False,
    ).double()
    wrapped.save_pretrained(tmp_path / "projected")
    with torch.no_grad():
        return tmp_path / "projected", wrapped.eval()(tokens()).logits


def test_a_projected_shadow_becomes_an_ordinary_model_and_comes_back_exactly(projected, tmp_path):
    folder, expected = projected
    convert_checkpoint(folder, tmp_path / "plain", to="shadowpeft")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    assert_close(plain(tokens()).logits, expected)
    convert_checkpoint(tmp_path / "plain", tmp_path / "back", to="authors", base=tiny_base())
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    import shadow_peft

    loaded = shadow_peft.AutoModelForCausalLMWithHiddenProjection.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        assert_close(loaded.double().eval()(tokens()).logits, expected)


def test_both_forms_attach_with_their_projection(projected, tmp_path):
    folder, expected = projected
    convert_checkpoint(folder, tmp_path / "plain", to="shadowpeft")
    for source in (folder, tmp_path / "plain"):
        model = get_shadow_model(tiny_base(), tiny_config(shadow_model=str(source)))
        with torch.no_grad():
            shadow = model(tokens(), output_shadow_logits=True).shadow_logits
        assert_close(shadow, expected, rtol=1e-5, atol=1e-5)  # explicit shadows are read in fp32


def test_a_class_path_in_a_projected_config_is_never_imported(projected, tmp_path):
    folder, expected = projected
    values = json.loads((folder / "config.json").read_text())
    values |= {"shadow_model_class": "this.module.does_not:Exist", "shadow_model_config_class": "os:system"}
    (folder / "config.json").write_text(json.dumps(values))
    convert_checkpoint(folder, tmp_path / "plain", to="shadowpeft")
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")(tokens()).logits, expected)
    values["shadow_model_config"]["model_type"] = "unheard_of"
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ArchitectureError, match=r"'unheard_of'.*not imported"):
        convert_checkpoint(folder, tmp_path / "other", to="shadowpeft")


def test_a_projected_shadow_for_another_width_or_another_base_is_refused(projected, tmp_path):
    folder, _ = projected
    with pytest.raises(ArchitectureError, match=r"\[32, 16\].*\[48, 16\]"):
        get_shadow_model(tiny_base(hidden_size=48), tiny_config(shadow_model=str(folder)))
    convert_checkpoint(folder, tmp_path / "plain", to="shadowpeft")
    other = tiny_base()
    randomise(other.lm_head)
    with pytest.raises(CheckpointError, match="not the one folded"):
        convert_checkpoint(tmp_path / "plain", tmp_path / "back", to="authors", base=other)
    with pytest.raises(ConfigError, match="--to authors"):
        convert_checkpoint(tmp_path / "plain", tmp_path / "back", to="peft")


def test_a_projection_file_of_the_wrong_shape_is_refused(projected, tmp_path):
    folder, _ = projected
    convert_checkpoint(folder, tmp_path / "plain", to="shadowpeft")
    save_file({"projection.weight": torch.ones(16, 32)}, tmp_path / "plain" / PROJECTION_FILE)
    with pytest.raises(ArchitectureError, match=r"\[16, 32\].*\[32, 16\]"):
        get_shadow_model(tiny_base(), tiny_config(shadow_model=str(tmp_path / "plain")))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("to", "preset", "fields", "message"),
    [
        ("peft", "paper", {}, "update_norm='layernorm' has no counterpart in peft"),
        ("authors", "peft", {}, "first_block=0 has no counterpart in shadow-peft|inject|update"),
        ("authors", "authors", {"shadow_hidden_size": 16, "share_embeddings": False}, "share_embeddings=False"),
        ("peft", "peft", {"shadow_num_key_value_heads": 1}, "num_key_value_heads=1 .*rebuild it with 2"),
    ],
)
def test_what_a_format_cannot_express_is_refused_and_nothing_is_written(tmp_path, to, preset, fields, message):
    adapted(preset, **fields).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match=message):
        convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to=to, base=tiny_base())
    assert not (tmp_path / "theirs").exists()


def test_the_last_blocks_of_a_base_with_windows_have_no_counterpart(tmp_path):
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    base, base_again = (tiny_base("gemma3_text", layer_types=kinds) for _ in range(2))
    config = ShadowConfig.preset("authors", shadow_model="base:last:1", **{**SIZES, "shadow_intermediate_size": None})
    get_shadow_model(base, config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match="layer_types"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="authors", base=base_again)


def test_what_only_training_needs_is_told(tmp_path):
    adapted("authors", auxiliary_loss_weight=0.3).save_pretrained(tmp_path / "ours")
    notes = convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="authors", base=tiny_base())
    assert notes == ["auxiliary_loss_weight=0.3 is not stored: it matters to training alone"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "'LORA' adapter"),
        ({"target_modules": ["model.layers.0", "model.layers.2"]}, r"blocks \[0, 2\] of 4"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"shadow_alhpa": 1.0}, "did you mean 'shadow_alpha'"),
    ],
)
def test_a_peft_config_without_a_counterpart_here_is_refused(tmp_path, change, message):
    adapted("peft").save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="peft", base=tiny_base())
    path = tmp_path / "theirs/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((ConfigError, CheckpointError), match=message):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "back", to="shadowpeft", base=tiny_base())


def test_blocks_from_the_third_on_written_in_any_order_or_as_a_pattern_are_read(tmp_path):
    adapted("peft", first_block=2).save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="peft", base=tiny_base())
    path = tmp_path / "theirs/adapter_config.json"
    for index, targets in enumerate((["layers.3", "layers.2"], r".*\.layers\.[23]")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": targets}))
        convert_checkpoint(tmp_path / "theirs", tmp_path / f"back{index}", to="shadowpeft", base=tiny_base())
        assert json.loads((tmp_path / f"back{index}/shadow_config.json").read_text())["shadow"]["first_block"] == 2


def test_a_source_that_does_not_name_its_base_asks_for_one(tmp_path):
    adapted("authors").save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="authors", base=tiny_base())
    assert detect(tmp_path / "theirs") == "authors"
    with pytest.raises(CheckpointError, match="--base"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "back", to="shadowpeft")


def test_a_pickled_checkpoint_and_a_folder_of_something_else_are_refused(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/shadow_config.json").write_text("{}")
    (tmp_path / "old/shadow_adapter.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled"):
        convert_checkpoint(tmp_path / "old", tmp_path / "new", to="shadowpeft", base=tiny_base())
    with pytest.raises(CheckpointError, match="in no format"):
        convert_checkpoint(tmp_path, tmp_path / "new", to="shadowpeft")


@pytest.mark.parametrize("kind", ["shadowpeft", "peft"])
def test_the_base_is_loaded_at_the_commit_that_the_source_names_and_another_base_as_it_is(tmp_path, monkeypatch, kind):
    base, commit, asked = tiny_base(), 4 * "0123456789", []
    base.name_or_path, base.config._commit_hash = "someone/tiny", commit
    model = get_shadow_model(base, ShadowConfig.preset("peft", **SIZES))
    model.save_pretrained(tmp_path / "ours")
    if kind == "peft":
        convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="peft", base=base)

    def load_model(name, *, labels, **options):
        asked.append((name, options))
        return base.eval()

    monkeypatch.setattr(convert, "load_model", load_model)
    source = tmp_path / ("theirs" if kind == "peft" else "ours")
    model.unload()
    convert_checkpoint(source, tmp_path / "named", to="shadowpeft")
    convert_checkpoint(source, tmp_path / "given", to="shadowpeft", base="other/tiny")
    assert asked == [("someone/tiny", {"revision": commit}), ("other/tiny", {})]

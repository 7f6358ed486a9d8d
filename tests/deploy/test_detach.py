"""Detached folders, loaded in a fresh process in which importing this package is an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from models import MIXTURES, randomise, tiny_base, tiny_config, tokens
from shadowpeft import ShadowModel, get_shadow_model
from shadowpeft.deploy import detach as deploy_detach
from shadowpeft.deploy.detach import write_detached
from shadowpeft.errors import ArchitectureError, ConfigError
from shadowpeft.model.architectures import ARCHITECTURES

LABELS = 3
# float64, but transformers' norms and rotary angles are fp32 inside, and eager attention sums in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
PLAIN_PROGRAM = """
import json, sys
from pathlib import Path

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "shadowpeft":
            raise ImportError("a detached folder must not need shadowpeft")

sys.meta_path.insert(0, Guard())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

root = Path(sys.argv[1])
jobs = json.loads((root / "jobs.json").read_text())
found = {}
for name, job in jobs.items():
    auto = AutoModelForSequenceClassification if job["labels"] else AutoModelForCausalLM
    model, report = auto.from_pretrained(root / name, output_loading_info=True, **job["options"])
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, report)
    ids = torch.tensor(job["ids"])
    with torch.no_grad():
        found[f"{name}.logits"] = model.eval()(ids).logits
    if not job["labels"]:
        found[f"{name}.tokens"] = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
save_file(found, root / "found.safetensors")
assert "shadowpeft" not in sys.modules
"""


def adapted(model_type: str, *, labels: int | None = None, **config) -> ShadowModel:
    task = {} if labels is None else {"task_type": "SEQ_CLS"}
    model = get_shadow_model(tiny_base(model_type, labels=labels), tiny_config(**{**task, **config}))
    randomise(model.network())
    return model


def classifies(model_type: str) -> bool:
    return type(tiny_base(model_type).config) in AutoModelForSequenceClassification._model_mapping


CAUSAL = sorted(ARCHITECTURES)
CLASSIFIERS = [name for name in CAUSAL if classifies(name)]


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory):
    """(what the attached runs gave, what a plain program made of their folders)."""
    torch.manual_seed(0)
    root, ids, expected, jobs = tmp_path_factory.mktemp("detached"), tokens(), {}, {}
    for labels, names in ((None, CAUSAL), (LABELS, CLASSIFIERS)):
        for model_type in names:
            # Narrower than the base, so that both projections have to be folded away.
            model = adapted(model_type, labels=labels, shadow_hidden_size=16, shadow_num_attention_heads=2)
            name = f"{model_type}-{'classifier' if labels else 'causal'}"
            detached = write_detached(model, root / name)
            with torch.no_grad():
                expected[f"{name}.logits"] = model(ids, output_shadow_logits=True).shadow_logits
            if labels is None:
                options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
                expected[f"{name}.tokens"] = detached.generate(ids, **options)
            options = {"dtype": "float64", "attn_implementation": "eager"}
            options |= {"experts_implementation": "eager"} if model_type in MIXTURES else {}
            jobs[name] = {"labels": labels, "ids": ids.tolist(), "options": options}
    (root / "jobs.json").write_text(json.dumps(jobs))
    (root / "program.py").write_text(PLAIN_PROGRAM)
    command = [sys.executable, root / "program.py", root]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return expected, load_file(root / "found.safetensors")


@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_plain_program_gets_the_attached_shadows_logits_and_tokens(fresh_process, model_type):
    expected, found = fresh_process
    assert_close(found[f"{model_type}-causal.logits"], expected[f"{model_type}-causal.logits"], **CLOSE)
    assert torch.equal(found[f"{model_type}-causal.tokens"], expected[f"{model_type}-causal.tokens"])


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_a_plain_program_gets_the_attached_shadows_class_logits(fresh_process, model_type):
    expected, found = fresh_process
    assert_close(found[f"{model_type}-classifier.logits"], expected[f"{model_type}-classifier.logits"], **CLOSE)


def test_every_architecture_with_a_classifier_is_covered():
    assert len(CAUSAL) == len(ARCHITECTURES) and len(CLASSIFIERS) >= 10


def test_generation_config_and_labels_travel_and_no_path_of_this_machine_does(tmp_path):
    model = adapted("llama")
    model.base.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=2, pad_token_id=0)
    model.base.name_or_path = str(tmp_path)
    write_detached(model, tmp_path / "causal")
    assert GenerationConfig.from_pretrained(tmp_path / "causal").max_new_tokens == 7
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "causal").glob("*.json"))
    classifier = adapted("llama", labels=LABELS)
    classifier.config.id2label = {0: "a", 1: "b", 2: "c"}
    classifier.config.pad_token_id, classifier.network().backbone.config.pad_token_id = 0, None
    write_detached(classifier, tmp_path / "classifier")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"} and loaded.config.pad_token_id == 0


def test_it_is_stored_in_the_dtype_that_was_asked_for_and_the_base_keeps_its_own(tmp_path):
    model = adapted("llama")
    returned = write_detached(model, tmp_path / "small", dtype=torch.bfloat16).eval()
    assert {t.dtype for t in load_file(tmp_path / "small/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "small/config.json").read_text())["dtype"] == "bfloat16"
    assert model.base.dtype == torch.float64
    # Rotary frequencies are in no file: what is returned has those that loading the folder makes.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    ids = torch.arange(300)[None] % 60
    with torch.no_grad():
        torch.testing.assert_close(returned(ids).logits, loaded(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_a_tied_table_in_16_bits_is_stored_once_and_reloads_with_equal_logits(tmp_path, model_type, dtype):
    base = tiny_base(model_type, tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = get_shadow_model(base, tiny_config(adapter_dtype="float32"))
    randomise(model.network())
    returned = write_detached(model, tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out/model.safetensors")
    table = base.get_input_embeddings().weight
    tables = [tensor for tensor in stored.values() if tensor.shape == table.shape]
    assert len(tables) == 1 and torch.equal(tables[0].bfloat16(), table)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == returned.dtype == (dtype or torch.float32)
    for one in (loaded, returned):
        assert one.get_input_embeddings().weight is one.get_output_embeddings().weight
    assert torch.equal(loaded(tokens()).logits, returned(tokens()).logits)


def test_a_table_that_is_looked_up_with_a_factor_is_not_tied_to_the_head(tmp_path):
    """Gemma multiplies what it looks up; in a class that does not, table and head are two."""
    fields = {"final_logit_softcapping": None, "tie_word_embeddings": True}
    detached = explicit(tmp_path / "shadow", "gemma3_text", "qwen3", share=True, **fields).detach()
    table, head = detached.get_input_embeddings().weight, detached.get_output_embeddings().weight
    assert not detached.config.tie_word_embeddings and not torch.equal(table, head)


def explicit(folder: Path, base_type: str, shadow_type: str, *, share: bool, **base_fields) -> ShadowModel:
    narrow: dict = {"layer_types": None} | ({} if share else {"hidden_size": 16, "num_attention_heads": 2})
    tiny_base(shadow_type, dtype=torch.float32, num_hidden_layers=2, **narrow).base_model.save_pretrained(folder)
    base = tiny_base(base_type, **base_fields)
    model = get_shadow_model(base, tiny_config(shadow_model=str(folder), share_embeddings=share))
    randomise(model.network())
    return model


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    ("base_type", "shadow_type", "fields"),
    [
        ("cohere", "llama", {}),
        ("llama", "cohere", {}),
        ("granite", "cohere", {}),
        ("llama", "gemma2", {}),
        ("gemma3_text", "qwen3", {"final_logit_softcapping": None}),
        ("gemma2", "gemma3_text", {"final_logit_softcapping": 5.0}),
        ("llama", "phi", {}),
    ],
)
def test_a_shadow_of_another_family_takes_over_the_bases_scale_cap_and_lookup(
    tmp_path, base_type, shadow_type, fields, share
):
    from transformers import AutoModelForCausalLM

    model = explicit(tmp_path / "shadow", base_type, shadow_type, share=share, **fields)
    with torch.no_grad():
        expected = model(tokens(), output_shadow_logits=True).shadow_logits
    write_detached(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64, attn_implementation="eager")
    assert_close(loaded(tokens()).logits, expected, **CLOSE)


def test_a_cap_that_the_shadows_class_lacks_is_refused(tmp_path):
    model = explicit(tmp_path / "shadow", "gemma2", "llama", share=False)
    with pytest.raises(ArchitectureError, match="caps its logits"):
        model.detach()


def test_a_bias_that_the_shadows_class_lacks_is_refused(tmp_path):
    model = explicit(tmp_path / "shadow", "phi", "llama", share=False)
    with pytest.raises(ArchitectureError, match="has a bias"):
        model.detach()


def test_a_detached_model_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    model = adapted("llama")
    wrong = model.detach()
    with torch.no_grad():
        wrong.model.norm.weight.mul_(1.5)
    monkeypatch.setattr(type(model), "detach", lambda self, name=None: wrong)
    with pytest.raises(deploy_detach.DetachError, match="differ by"):
        write_detached(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="not empty"):
        write_detached(adapted("llama"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

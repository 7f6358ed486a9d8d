"""ONNX files of a detached shadow, run by onnxruntime. Exporting takes most of the time, so it is done once."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import get_shadow_model
from shadowpeft.deploy import onnx_model, packages
from shadowpeft.deploy.measure import Questions, measure, measure_here
from shadowpeft.deploy.onnx import check_onnx, quantise, write_onnx
from shadowpeft.deploy.onnx_model import OnnxModel
from shadowpeft.deploy.packages import ExportError
from shadowpeft.train.sources import MissingPackageError

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'shadowpeft[export]')")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install 'shadowpeft[export]')")
pytest.importorskip("transformers.exporters", reason="this transformers has no exporters")
# Raised inside torch's and onnxscript's own exporting code.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def detached(model_type: str = "llama"):
    torch.manual_seed(0)
    model = get_shadow_model(tiny_base(model_type, dtype=torch.float32, hidden_size=64),
                             tiny_config(adapter_dtype="float32", shadow_num_hidden_layers=2))  # fmt: skip
    randomise(model.network())
    alone = model.detach()
    alone.generation_config.eos_token_id = None
    return alone


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("onnx") / "out", detached()
    write_onnx(model, folder)
    return folder, model


@pytest.mark.parametrize("length", [1, 2, 7])
def test_greedy_tokens_with_cache_equal_torchs(exported, length):
    folder, model = exported
    ids = tokens(1, length)
    expected = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert np.array_equal(OnnxModel(folder, num_threads=1).generate(ids.numpy(), max_new_tokens=12), expected.numpy())


def test_both_runtimes_are_measured_on_the_same_tokens_and_answer_alike(exported, tmp_path):
    folder, model = exported
    model.save_pretrained(tmp_path)
    rows = [tokens(1, 8, seed=seed)[0].tolist() for seed in range(3)]
    # The token that this model writes third, so that the first answer ends early.
    eos = model.generate(tokens(1, 5), max_new_tokens=3, min_new_tokens=3, do_sample=False)[0, -1].item()
    questions = Questions(prompts=[tokens(1, 5)[0].tolist(), rows[1]], max_new_tokens=6, ends=[eos, 2])
    options = {"new_tokens": 4, "num_threads": 1, "questions": questions}
    ours = {kind: measure(kind, place, rows, **options) for kind, place in (("torch", tmp_path), ("onnx", folder))}
    assert ours["onnx"]["answers"] == ours["torch"]["answers"] and ours["onnx"]["decoded"] == ours["torch"]["decoded"]
    assert ours["torch"]["answers"][0][-1] == eos and len(ours["torch"]["answers"][0]) <= 3
    # Two float32 runtimes, a handful of tokens.
    assert ours["onnx"]["bits_per_token"] == pytest.approx(ours["torch"]["bits_per_token"], abs=1e-4)
    here = measure_here({"kind": "onnx", "folder": str(folder), "rows": rows, "new_tokens": 4, "num_threads": 1})
    assert here["answers"] == [] and here["peak_bytes"] >= here["peak_bytes_before_loading"] > 0


@torch.no_grad()
def test_left_padded_rows_of_a_batch_get_their_own_logits(exported):
    folder, model = exported
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.int64)
    mask[1, :3] = 0
    found, _ = OnnxModel(folder).run(ids.numpy(), None, mask.numpy())
    assert_close(torch.from_numpy(found[1:2, 3:]), model(ids[1:2, 3:]).logits, rtol=1e-4, atol=1e-4)
    assert_close(torch.from_numpy(found[::2]), model(ids[::2]).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("length", [9, 10, 11])
def test_long_prompts_are_read_in_pieces_of_bounded_logits(exported, monkeypatch, length):
    folder, model = exported
    ids, mask = tokens(3, length), torch.ones(3, length, dtype=torch.int64)
    mask[1, :6] = 0  # all of the first piece and some of the second
    runner, sizes = OnnxModel(folder, num_threads=1), []
    first, whole = runner.run(ids[:, :2].numpy(), None, mask[:, :2].numpy())

    def run(*arguments):
        logits, cache = OnnxModel.run(runner, *arguments)
        sizes.append(logits.nbytes)
        return logits, cache

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(onnx_model, "MAX_LOGIT_BYTES", 4 * first[:, 0].nbytes + 5)
    expected = torch.cat([model(ids[row : row + 1, 6 * (row == 1) :]).logits[:, -1] for row in range(3)])
    for cache, start in ((None, 0), (whole, 2)):
        found, present = runner.read(ids[:, start:].numpy(), cache, mask.numpy())
        assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
        assert next(iter(present.values())).shape[2] == length
    sizes.clear()
    one = np.tile(ids[:1].numpy(), 3)
    runner.generate(one, max_new_tokens=1)
    assert len(sizes) == -(-one.shape[1] // 12) and max(sizes) <= onnx_model.MAX_LOGIT_BYTES


def test_the_end_token_stops_decoding(exported):
    runner = OnnxModel(exported[0])
    first = runner.generate(tokens(1, 4).numpy(), max_new_tokens=1)[0, -1]
    assert runner.generate(tokens(1, 4).numpy(), max_new_tokens=9, eos=int(first)).shape == (1, 5)


def test_the_folder_has_its_configs_and_no_path_of_this_machine(exported):
    folder, _ = exported
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "config.json", "generation_config.json"}
    assert b"site-packages" not in (folder / "model.onnx").read_bytes()


@torch.no_grad()
def test_int8_is_smaller_and_close(exported, tmp_path):
    folder, model = exported
    quantise(folder / "model.onnx", tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 0.5 * (folder / "model.onnx").stat().st_size
    found, _ = OnnxModel(tmp_path).run(tokens(2, 9).numpy(), None)
    expected = model(tokens(2, 9)).logits
    # Weights and activations have 8 bits: 5% was seen on these random weights; a wrong scale would give about 100%.
    assert (torch.from_numpy(found) - expected).norm() < 0.1 * expected.norm()
    assert (found.argmax(-1) == expected.argmax(-1).numpy()).mean() > 0.9


def test_a_file_that_computes_something_else_is_refused(exported):
    folder, _ = exported
    other = detached()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    with pytest.raises(ExportError, match="logits differ by"):
        check_onnx(folder / "model.onnx", other)


def test_a_model_that_cannot_be_traced_is_one_clear_error(tmp_path, monkeypatch):
    from transformers.exporters import OnnxExporter

    def fail(*args, **kwargs):
        raise RuntimeError("data-dependent expression\nand much more")

    monkeypatch.setattr(OnnxExporter, "export", fail)
    with pytest.raises(ExportError, match=r"LlamaForCausalLM could not be exported to ONNX.*data-dependent expression"):
        write_onnx(detached(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_says_how_to_get_it(tmp_path, monkeypatch):
    def fail(name):
        raise ImportError(name)

    monkeypatch.setattr(packages.importlib, "import_module", fail)
    with pytest.raises(MissingPackageError, match=r"pip install 'shadowpeft\[export\]'"):
        write_onnx(detached(), tmp_path / "out")

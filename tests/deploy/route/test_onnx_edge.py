"""The exported shadow behind the same API, decoded in the same batches. Exporting takes most of the time."""

import copy

import httpx
import pytest
import torch
from typer.testing import CliRunner

from deploy.route.test_edge import MODEL, TOKENIZER, router
from deploy.running import free_port, running
from deploy.serve.test_scheduler import listening, tokens_of
from deploy.tiny import byte_tokenizer, shadow_model
from shadowpeft.cli import app
from shadowpeft.deploy import packages
from shadowpeft.deploy.onnx import write_onnx
from shadowpeft.deploy.route.artefact import save_router
from shadowpeft.deploy.route.breaker import CircuitBreaker
from shadowpeft.deploy.route.cloud import Cloud, CloudSettings
from shadowpeft.deploy.route.operating import ALL_TO_CLOUD
from shadowpeft.deploy.route.service import EdgeService
from shadowpeft.deploy.serve import batch as batches
from shadowpeft.deploy.serve.app import create_app
from shadowpeft.deploy.serve.catalogue import catalogue
from shadowpeft.deploy.serve.exported import ExportedModel
from shadowpeft.deploy.serve.loading import load_edge
from shadowpeft.deploy.serve.mixed import Path
from shadowpeft.deploy.serve.sequence import Job
from shadowpeft.deploy.serve.service import LocalService, Settings
from shadowpeft.deploy.server_commands import edge_service
from shadowpeft.errors import ArchitectureError
from shadowpeft.train.sources import MissingPackageError

# Raised inside torch's and onnxscript's own exporting code.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PATH = Path(adapter=None, uses_base=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(folder, the detached model in it) by family: one with full attention, one with windows of 6 tokens."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'shadowpeft[export]')")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install 'shadowpeft[export]')")
    pytest.importorskip("transformers.exporters", reason="this transformers has no exporters")
    made = {}
    for family in ("llama", "gemma3_text"):
        folder = tmp_path_factory.mktemp(family) / "out"
        model = (MODEL if family == "llama" else shadow_model(family)).detach("robot")
        write_onnx(model, folder, tokenizer=byte_tokenizer())
        made[family] = folder, model
    return made


@torch.no_grad()
def greedy(model, prompt, count):
    """One full pass without a cache for each token."""
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_of_all_lengths_that_join_late_get_the_torch_models_greedy_answer(folders, family):
    folder, model = folders[family]
    exported = ExportedModel(str(folder))
    jobs = [Job(prompt=tuple(range(3 + i, 6 + 5 * i)), path=PATH, max_tokens=12 - 2 * i, num_top=0) for i in range(4)]
    rows = [listening(job) for job in jobs]
    batch = batches.prefill(exported, [rows[1][0], rows[3][0]])
    batch = batches.step(exported, batches.step(exported, batch))
    batch = batches.merge(batch, batches.prefill(exported, [rows[0][0], rows[2][0]]))
    while len(batch):
        batch = batches.step(exported, batch)
    for job, (_, heard) in zip(jobs, rows, strict=True):
        # Float64 there, float32 here: no two logits of these answers are as close as rounding.
        assert tokens_of(heard) == greedy(model, job.prompt, job.max_tokens)


def ask(address, **changes):
    asked = {"model": "edge", "messages": [{"role": "user", "content": "Sit"}], "max_tokens": 8}
    answer = httpx.post(f"{address}/v1/chat/completions", json=asked | changes, timeout=150)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_it_keeps_escalates_and_degrades_as_the_torch_edge_does(folders):
    def edge(place, threshold, url=None):
        local = edge_service(load_edge(str(place)), Settings(temperature=0.0))
        place = url or f"http://127.0.0.1:{free_port()}"
        settings = CloudSettings(url=place, model="robot", max_attempts=1, total_seconds=120.0)
        cloud = Cloud(settings, local.metrics, breaker=CircuitBreaker(max_failures=50))
        return create_app(EdgeService(local, router(threshold), cloud))

    folder, model = folders["llama"]
    torch_folder = folder.parent / "torch"
    copy.deepcopy(model).float().save_pretrained(torch_folder)
    TOKENIZER.save_pretrained(torch_folder)
    with running(edge(torch_folder, 0.0)) as address:
        expected = ask(address)
    with running(edge(folder, 0.0)) as address:
        kept = ask(address)
    assert kept["choices"] == expected["choices"] and kept["usage"] == expected["usage"]
    # Two runtimes round differently in float32; a confidence is a product of few probabilities.
    assert kept["shadow"]["confidence"] == pytest.approx(expected["shadow"]["confidence"], rel=1e-3)
    assert kept["shadow"]["answered_by"] == "edge" and kept["shadow"]["reason"] == "confident"
    with running(edge(folder, ALL_TO_CLOUD)) as address:
        assert ask(address)["choices"] == expected["choices"] and ask(address)["shadow"]["degraded"]
    server = LocalService(MODEL, TOKENIZER, catalogue(MODEL.networks), Settings(temperature=0.0))
    with running(create_app(server)) as url, running(edge(folder, ALL_TO_CLOUD, url)) as address:
        answer = ask(address)
        assert answer["shadow"]["answered_by"] == "cloud"
        assert answer["choices"][0]["message"] == ask(url, model="robot")["choices"][0]["message"]


def test_the_command_line_serves_the_exported_folder(folders, tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr("shadowpeft.deploy.server_commands.run_app", lambda app, **options: served.append(app))
    save_router(router(0.0), tmp_path / "router.json")
    options = ["--router", str(tmp_path / "router.json"), "--never-escalate", "--port", str(free_port())]
    result = CliRunner().invoke(app, ["edge", str(folders["llama"][0]), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with running(served[0]) as address:
        assert ask(address)["shadow"]["answered_by"] == "edge"


def test_a_missing_onnxruntime_says_how_to_get_it(tmp_path, monkeypatch):
    def fail(name):
        raise ImportError(name)

    (tmp_path / "model.onnx").write_bytes(b"")
    monkeypatch.setattr(packages.importlib, "import_module", fail)
    with pytest.raises(MissingPackageError, match=r"pip install 'shadowpeft\[export\]'"):
        load_edge(str(tmp_path))


def test_a_graph_without_its_configs_is_one_clear_error(folders, tmp_path):
    (tmp_path / "model.onnx").write_bytes((folders["llama"][0] / "model.onnx").read_bytes())
    with pytest.raises(ArchitectureError, match="shadowpeft export"):
        load_edge(str(tmp_path))

"""The whole system on a tiny model: calibrate, serve, route, replay, report, by the command line."""

import json
import time
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from deploy.tiny import byte_tokenizer, shadow_model
from models import randomise
from shadowpeft.cli import app
from shadowpeft.deploy.onnx import write_onnx
from shadowpeft.deploy.route.artefact import load_router
from shadowpeft.deploy.route.operating import Target
from shadowpeft.deploy.system_eval import SystemConfig, run_system
from shadowpeft.deploy.system_eval.figures import scope_detection
from shadowpeft.deploy.system_eval.link import Link, running_link
from shadowpeft.deploy.system_eval.processes import ProcessError, ServerProcess
from shadowpeft.deploy.system_eval.replay import quantile
from shadowpeft.errors import ConfigError
from shadowpeft.train.tasks import TASKS

# peft asks transformers in its former words.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning")
ROWS = [{"text": f"do number {i}", "intent": "[REMOTE]" if i % 4 == 0 else "sit"} for i in range(12)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a base, an adapter and data."""
    folder = tmp_path_factory.mktemp("system")
    model = shadow_model(adapters=("robot",))
    model.base.save_pretrained(folder / "base")
    model.base.name_or_path = str(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    model.save_pretrained(folder / "adapter")
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = folder / "data"
    data.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").rename(data / f"{split}.jsonl")
    return folder


def command(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def lora(saved):
    """A LoRA of the base that changes its answers."""
    peft = pytest.importorskip("peft", reason="the cloud of a LoRA needs peft")
    base = shadow_model(adapters=("robot",)).base
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    randomise(model, seed=5)
    model.save_pretrained(saved / "lora")
    return saved / "lora"


def test_calibrating_and_measuring_the_whole_system_by_the_command_line(saved, lora):
    data = ["--task", "robot", "--data", saved / "data"]
    router = saved / "router.json"
    said = command("calibrate", saved / "adapter", "--output", router, *data, "--kind", "isotonic")
    assert "threshold" in said and router.is_file()
    options = ["--router", router, "--output", saved / "out", "--round-trip-ms", "20", "--max-tokens", "6"]
    command("system-eval", saved / "adapter", *options, *data, "--limit", "8", "--concurrency", "2", "--lora", lora)
    record = json.loads((saved / "out" / "system.json").read_text())
    systems = record["systems"]
    assert set(systems) == {"attached", "edge only", "edge and cloud", "LoRA, merged"} and record["num_rows"] == 8
    assert systems["LoRA, merged"]["link_bytes"]["up"] > 8 * 100 and systems["LoRA, merged"]["escalated"] == 1
    for one in systems.values():
        assert one["time_against"] == {
            name: pytest.approx(one["seconds"] / systems[name]["seconds"]) for name in ("attached", "LoRA, merged")
        }
    assert systems["attached"]["latency_ms"]["p50"] >= 20 and systems["attached"]["link_bytes"]["up"] > 8 * 100
    # The random shadow calls no skill, so the grammar sends everything to the cloud.
    assert systems["edge and cloud"]["escalated"] == 1 and systems["edge only"]["escalated"] == 0
    assert systems["edge and cloud"]["degraded"] == systems["edge and cloud"]["escalated"] * 8
    assert record["routers"]["random"]["area"] <= record["routers"]["oracle"]["area"]
    assert "origin" in record and str(saved) not in json.dumps(record)
    text = (saved / "out" / "system.md").read_text()
    assert "edge and cloud" in text and "AUROC" in text and "time / LoRA, merged" in text
    assert {"oracle", "random", "margin", "entropy", "sequence_logprob"} < set(record["routers"])
    for name in ("deferral.png", "latency.png"):
        assert (saved / "out" / name).stat().st_size > 5000
    # Another measurement there would mix two shadows' files, and this report would be of neither.
    again = ["system-eval", str(saved / "adapter"), *map(str, options), *map(str, data)]
    refused = CliRunner().invoke(app, again)
    assert isinstance(refused.exception, ConfigError) and f"{saved / 'out' / 'edge'} is not empty" in str(refused.exception)
    assert json.loads((saved / "out" / "system.json").read_text()) == record


def test_a_task_without_a_metric_of_single_rows_is_refused_before_anything_is_asked(saved, monkeypatch):
    for name in ("e2e", "snips"):
        data = ["--task", name, "--data", str(saved / "data")]
        refused = CliRunner().invoke(app, ["calibrate", "no/adapter", *data])
        assert isinstance(refused.exception, ConfigError)
        assert f"task {name!r} is scored over all rows together" in str(refused.exception)
        config = SystemConfig(adapter="no/adapter", router=Path("no/router.json"), output=saved)
        with pytest.raises(ConfigError, match="scored over all rows together"):
            run_system(config, TASKS[name], ROWS)


@pytest.mark.parametrize(
    ("option", "said"),
    [(("--score", "luck"), "unknown score 'luck'; choose one of"), (("--kind", "linear"), "unknown calibration 'linear'")],
)
def test_a_wrong_choice_is_refused_before_anything_is_loaded(saved, option, said):
    refused = CliRunner().invoke(app, ["calibrate", "no/adapter", "--data", str(saved / "data"), *option])
    assert isinstance(refused.exception, ConfigError) and said in str(refused.exception)


def test_a_target_out_of_reach_leaves_a_router_that_takes_another_one(saved, tmp_path):
    router = tmp_path / "router.json"
    asked = ["calibrate", saved / "adapter", "--output", router, "--data", saved / "data", "--limit", 4]
    refused = CliRunner().invoke(app, [str(part) for part in [*asked, "--min-accuracy", "1.0"]])
    assert isinstance(refused.exception, ConfigError)
    assert "no threshold reaches min_accuracy=1.0" in str(refused.exception)
    assert f"{router} holds the router without a target" in str(refused.exception)
    written = load_router(router)
    assert written.with_target(Target(min_accuracy=0.0)).point.accuracy == written.point.accuracy == 0
    # A target in reach is the written router's own.
    command(*asked, "--max-cloud-share", 1)
    assert load_router(router) == written.with_target(Target(max_cloud_share=1.0))


# Raised inside torch's and onnxscript's own exporting code.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_exported_edge_is_calibrated_and_measured_as_it_will_run(saved, tmp_path):
    for name in ("onnxruntime", "onnxscript", "transformers.exporters"):
        pytest.importorskip(name, reason=f"{name} is not installed (pip install 'shadowpeft[export]')")
    exported = tmp_path / "onnx"
    write_onnx(shadow_model(adapters=("robot",)).detach(), exported, tokenizer=byte_tokenizer())
    data = ["--task", "robot", "--data", saved / "data", "--limit", "4"]
    command("calibrate", saved / "adapter", "--output", tmp_path / "detached.json", *data)
    command("calibrate", saved / "adapter", "--output", tmp_path / "exported.json", *data, "--edge", exported)
    found = [load_router(tmp_path / f"{name}.json").examples for name in ("detached", "exported")]
    assert found[0] != found[1]  # another runtime answered, and it rounds differently
    for one, other in zip(*found, strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-3) and one.reason == other.reason
    options = ["--router", tmp_path / "exported.json", "--output", tmp_path / "out", "--max-tokens", "4"]
    command("system-eval", saved / "adapter", *options, *data, "--edge", exported)
    record = json.loads((tmp_path / "out" / "system.json").read_text())
    assert record["edge_is_exported"] and not (tmp_path / "out" / "edge").exists()
    assert record["systems"]["edge only"]["accuracy"] == 0 and record["systems"]["edge and cloud"]["escalated"] == 1
    nowhere = ["system-eval", str(saved / "adapter"), *map(str, options), *map(str, data), "--edge", "nowhere"]
    refused = CliRunner().invoke(app, nowhere)
    assert isinstance(refused.exception, ConfigError) and "shadowpeft export" in str(refused.exception)


def test_a_server_that_cannot_start_says_why(saved):
    with pytest.raises(ProcessError, match=r"did not start: .*nothing-here"):
        ServerProcess(["serve", str(saved / "nothing-here")]).start()


def test_a_link_delays_counts_and_limits(monkeypatch):
    import contextlib
    import http.server
    import threading

    class Quiet(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = b"x" * 20_000
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with contextlib.ExitStack() as stack:
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        link = Link(server.server_port, round_trip_ms=40, megabits=1.0)
        port = stack.enter_context(running_link(link))
        started = time.monotonic()
        assert len(httpx.get(f"http://127.0.0.1:{port}", timeout=30).content) == 20_000
        # Handshake and request: two round trips; 20,000 bytes at 1 Mbit/s: 160 ms.
        assert time.monotonic() - started >= 0.08 + 0.16
        assert link.num_bytes["down"] >= 20_000 and link.num_bytes["up"] > 50 and link.num_connections == 1
    with pytest.raises(ConfigError, match="cannot be"):
        Link(1, round_trip_ms=-1)


def test_quantiles_interpolate():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2 and quantile([0.0, 10.0], 0.95) == 9.5 and quantile([4.0], 0.99) == 4


def test_scope_detection_names_the_usual_baseline():
    from shadowpeft.deploy.route.scores import SCORES

    scores = [dict.fromkeys(SCORES, -1.0), dict.fromkeys(SCORES, -0.1)]
    table = scope_detection(scores, [-0.5, -0.2], [-0.6, -2.2], [True, False])
    assert table["edge margin"] == 1 and table["attached maximum softmax probability"] == 1
    assert table["attached sequence probability"] == 0

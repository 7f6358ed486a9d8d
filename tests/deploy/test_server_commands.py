"""What `serve` and `edge` make of their flags, without a socket."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from deploy.running import free_port
from deploy.tiny import byte_tokenizer, shadow_model
from shadowpeft.cli import app
from shadowpeft.deploy import server_commands
from shadowpeft.deploy.route import fit_router, save_router
from shadowpeft.deploy.route.operating import Example
from shadowpeft.deploy.route.scores import SCORES
from shadowpeft.deploy.serve import Loaded, Path
from shadowpeft.deploy.serve.offline import answer_all
from shadowpeft.errors import ConfigError
from shadowpeft.train.tasks import TASKS

MODEL = shadow_model()
ROWS = [
    Example(scores=dict.fromkeys(SCORES, -0.5 * i), edge=float(i % 2), cloud=1.0, reason=None, is_out_of_scope=False)
    for i in range(4)
]


@pytest.fixture
def started(monkeypatch):
    """Runs a verb; returns the service that would have been served, and what was printed."""
    services = []
    loaded = Loaded(model=MODEL, tokenizer=byte_tokenizer(), adapters=list(MODEL.networks))
    monkeypatch.setattr(server_commands, "load_served", lambda *_, **__: loaded)
    monkeypatch.setattr(server_commands, "load_edge", lambda *_, **__: loaded)
    monkeypatch.setattr(server_commands, "_run", lambda service, *_: services.append(service))

    def run(*arguments):
        command = [str(part) for part in (*arguments, "--port", free_port())]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return services[-1], result.output

    yield run
    for service in services:
        getattr(service, "local", service)._scheduler.close(30)


def test_serve_takes_its_limits_of_memory_from_flags(started):
    service, _ = started("serve", "robot=somewhere", "--max-context", 100, "--max-batch-tokens", 300)
    assert service.context == 100 and service._scheduler._max_tokens == 300
    service, _ = started("serve", "robot=somewhere")
    assert service.context == 256 and service._scheduler._max_tokens == service.settings.max_batch_tokens == 2**17


@pytest.mark.parametrize("flag", ["--max-context", "--max-batch-tokens"])
def test_a_limit_of_no_token_is_refused(started, flag):
    with pytest.raises(ConfigError, match=f"{flag[2:].replace('-', '_')}=0 is not valid: expected at least 1"):
        started("serve", "robot=somewhere", flag, 0)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_no_row_is_refused_before_anything_is_loaded(size):
    """As it is where the batches are made: the first ended in an error behind the loading, the second never."""
    with pytest.raises(ConfigError, match=f"batch_size={size} is not valid: expected at least 1"):
        CliRunner().invoke(app, ["calibrate", "nowhere", "--batch-size", str(size)], catch_exceptions=False)
    with pytest.raises(ConfigError, match=f"batch_size={size} is not valid"):
        answer_all(MODEL, byte_tokenizer(), [[5]], Path(adapter=None, uses_base=True), max_tokens=1, ends=(), batch_size=size)


@pytest.mark.parametrize(
    ("task", "flags", "expected", "says"),
    [
        ("gsm8k", (), TASKS["gsm8k"].max_new_tokens, False),
        (None, (), 40, False),
        ("gsm8k", ("--max-new-tokens", 40), 40, True),
        ("robot", ("--max-new-tokens", 100), 100, False),
        (None, ("--max-new-tokens", 3), 3, False),
    ],
)
def test_an_edge_answers_at_the_length_at_which_its_router_was_calibrated(started, tmp_path, task, flags, expected, says):
    save_router(replace(fit_router(ROWS), task=task), tmp_path / "router.json")
    service, said = started("edge", "somewhere", "--router", tmp_path / "router.json", "--never-escalate", *flags)
    assert service.local.settings.max_new_tokens == expected
    assert ("cuts answers" in said) == says

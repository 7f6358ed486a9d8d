"""What `serve` and `edge` make of their flags, without a socket."""

import pytest
from typer.testing import CliRunner

from deploy.running import free_port
from deploy.tiny import byte_tokenizer, shadow_model
from shadowpeft.cli import app
from shadowpeft.deploy import server_commands
from shadowpeft.deploy.serve import Loaded
from shadowpeft.errors import ConfigError

MODEL = shadow_model()


@pytest.fixture
def started(monkeypatch):
    """Runs a verb; returns the service that would have been served, and what was printed."""
    services = []
    loaded = Loaded(model=MODEL, tokenizer=byte_tokenizer(), adapters=list(MODEL.networks))
    monkeypatch.setattr(server_commands, "load_served", lambda *_, **__: loaded)
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

"""What several tests of training start from."""

import pytest

from workbench import write_base, write_intents


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with a base and a small data set."""
    folder = tmp_path_factory.mktemp("bench")
    write_base(folder / "base")
    write_intents(folder / "intents")
    return folder

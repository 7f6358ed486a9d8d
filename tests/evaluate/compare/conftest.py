"""What the tests of whole comparisons share."""

from pathlib import Path

import pytest

import comparisons


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """A data root with a base and data; read only."""
    folder = tmp_path_factory.mktemp("root")
    comparisons.write_base(folder / "base")
    comparisons.write_data(folder)
    return folder

"""What tests of profiles share."""

from pathlib import Path

import pytest

from tests.synthetic import full_profile


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file with everything that a profile can have."""
    path = tmp_path / "p.safetensors"
    full_profile().save(path)
    return path

"""What all tests share."""

import os

# Before torch is imported anywhere: two workers on two cores do best with a thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

if "STRATAKV_TEST_DEVICE" in os.environ:  # such as "cuda": where tests make models and tensors
    torch.set_default_device(os.environ["STRATAKV_TEST_DEVICE"])


@pytest.fixture(scope="session")
def smollm2_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for conversions, one for all workers: whoever comes first converts, the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2-cache"


@pytest.fixture
def using_smollm2_cache(smollm2_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything in the test, commands that it starts included, convert into that folder."""
    monkeypatch.setenv("STRATAKV_CACHE_DIR", str(smollm2_cache))

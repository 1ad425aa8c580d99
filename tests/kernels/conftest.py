"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from filelock import FileLock


@pytest.fixture
def one_at_a_time(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[None]:
    """For tensors of more than 2³¹ elements: the most of these tests takes 40 GB, of those with gradients 80 GB."""
    base = tmp_path_factory.getbasetemp()
    with FileLock((base if worker_id == "master" else base.parent) / "large.lock"):
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()

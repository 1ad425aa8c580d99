"""What the tests of the compiler share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import dynamic_module_utils


@pytest.fixture(scope="module")
def _own_module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remote code is copied to a folder of these tests, not to the user's, and forgotten before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        # A folder of other tests that comes first would be asked in its place.
        apart = [entry for entry in sys.path if not Path(entry, "transformers_modules").is_dir()]
        patch.setattr(sys, "path", apart)
        _forget()
        yield
        _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]

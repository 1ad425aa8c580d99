"""`heddle export` of what is no run says what is there, and what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from heddle.errors import HeddleError
from heddle.search.export import export_run


@pytest.mark.parametrize(
    ("name", "files", "told", "hint"),
    [
        ("runs/mine", ("runs/mien/run.json",), "there is no ", "did you mean "),
        ("nowhere/mine", (), "there is no ", "nor is there a folder "),
        ("mine", (), "there is no ", "heddle search SPEC --out DIR"),
        ("mine", ("mine/config.json",), "is a model folder of transformers already", "heddle import"),
        ("mine", ("mine/spec.yaml",), "is no whole run", "started again"),
        ("mine", ("mine/notes.txt",), "nothing of Heddle's is in ", "random weights"),
    ],
)
def test_what_is_no_run_is_told(
    name: str, files: tuple[str, ...], told: str, hint: str, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(HeddleError) as error:
        export_run(tmp_path / name, tmp_path / "out")
    assert error.value.code == "run-not-found"
    assert told in error.value.what
    assert (
        "export takes the folder of a search, of a training or of heddle import, or a spec file"
        in error.value.what
    )
    assert hint in (error.value.hint or "")
    assert not (tmp_path / "out").exists()

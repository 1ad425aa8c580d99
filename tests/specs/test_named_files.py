"""`heddle check` looks whether the files that `data` and `tokenizer` name are there, and at their first bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from heddle import api
from heddle.errors import HeddleError, HeddleErrors
from heddle.specs import named_files

TEXT = """\
version: 1
name: named
model:
  vocab_size: 256
  hidden_size: 32
  context_length: 64
  blocks: {{full: {{mixer: {{kind: attention, heads: 2, window: {{int: [8, 16]}}}}, channel: {{kind: gelu}}}}}}
  layers: [full]
tokenizer: {tokenizer}
data: {{source: {source}}}
search: {{tasks: [{task}], trials: 2}}
"""


def spec(folder: Path, *, source: object, tokenizer: object = "bytes", task: str = "text") -> Path:
    path = folder / "named.yaml"
    path.write_text(TEXT.format(source=source, tokenizer=tokenizer, task=task))
    return path


def told(path: Path) -> list[HeddleError]:
    with pytest.raises(HeddleErrors) as caught:
        api.check(path)
    return list(caught.value.errors)


def test_missing_files_are_told_in_one_go_each_at_its_field(tmp_path: Path) -> None:
    found = told(spec(tmp_path, source="gone.txt", tokenizer="gone"))
    assert [(one.code, one.where.line, one.where.column) for one in found] == [
        ("file-not-found", 9, 12),
        ("corpus-missing", 10, 16),
    ]
    assert "gone.txt" in str(found[1].where.text)


@pytest.mark.parametrize(
    ("name", "holds", "says"),
    [
        ("text.txt", b"a\0b", "this is not text: it holds zero bytes"),
        ("rows.jsonl", b"{", "its first row is not JSON"),
        ("rows.jsonl", b'{"body": "a"}\n', "no field 'text'"),
        ("rows.jsonl", b"[]\n", "expected an object with a field 'text', found list"),
        ("table.parquet", b"text", "not a Parquet file"),
        ("folder", None, "holds no file"),
        ("folder/text.txt", b"\0", "folder/text.txt: this is not text"),
    ],
)
def test_what_begins_as_something_else_is_told(
    tmp_path: Path, name: str, holds: bytes | None, says: str
) -> None:
    path = tmp_path / name
    if holds is None:
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(holds)
    source = tmp_path / name.partition("/")[0]
    (error,) = told(spec(tmp_path, source=source))
    assert says in error.what
    assert error.where.line == 10


def test_a_row_longer_than_what_is_read_is_left_to_the_search(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "{"a" * named_files.FIRST_BYTES}"}}\n')
    api.check(spec(tmp_path, source=path))


def test_a_tokenizer_that_is_no_json_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("words")
    (error,) = told(spec(tmp_path, source="python-stdlib", tokenizer=tmp_path))
    assert (error.code, error.where.line) == ("file-not-readable", 9)


def test_what_no_task_reads_need_not_be_there(tmp_path: Path) -> None:
    path = spec(tmp_path, source="gone.txt", task="{mqar: {pairs: 2, length: 16}}")
    assert api.check(path).spec.data.source == "gone.txt"
    with pytest.raises(HeddleErrors, match=r"gone\.txt"):
        api.train(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_is_shown_and_compared_without_its_text(tmp_path: Path) -> None:
    path = spec(tmp_path, source="gone.txt")
    assert api.show(path)["name"] == "named"
    assert api.diff(path, path) == []


def test_a_search_tells_what_check_tells_and_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(HeddleErrors) as caught:
        api.search(spec(tmp_path, source="gone.txt"), tmp_path / "run")
    assert caught.value.where.line == 10
    assert not (tmp_path / "run").exists()

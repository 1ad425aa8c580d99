"""Where text comes from, how it is split, and what is said when it is not there."""

from __future__ import annotations

import builtins
import hashlib
import json
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heddle.errors import HeddleError
from heddle.search.tasks.corpus import STDLIB, STDLIB_EXCLUDED, load_corpus
from heddle.search.tasks.tokens import tokens_of

LINES = "".join(f"line {number} of the file\n" for number in range(400))


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def error_of(source: Path | str, code: str, **options: str) -> str:
    with pytest.raises(HeddleError) as caught:
        load_corpus(str(source), **options)
    assert caught.value.code == code
    return str(caught.value)


def is_validation(relative: str) -> bool:
    return int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 10 == 0


def test_the_standard_library_is_split_by_file_as_its_rule_says() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    relatives = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    kept = [name for name in relatives if not STDLIB_EXCLUDED & set(name.split("/")[:-1])]
    corpus = load_corpus(STDLIB)
    assert corpus.files == len(kept)
    assert corpus.train == b"\n".join((root / name).read_bytes() for name in kept if not is_validation(name))
    assert corpus.validation == b"\n".join((root / name).read_bytes() for name in kept if is_validation(name))


def test_the_standard_library_leaves_out_tests_tables_and_packages() -> None:
    corpus = load_corpus(STDLIB)
    text = corpus.train + corpus.validation
    root = Path(sysconfig.get_paths()["stdlib"])
    assert (root / "argparse.py").read_bytes() in text
    assert (root / "encodings/cp1250.py").read_bytes() not in text
    assert corpus.split == "file"
    assert "python-stdlib" in corpus.source
    assert len(corpus.train) > 4_000_000


@pytest.mark.alone
def test_the_standard_library_is_read_within_a_second() -> None:
    started = time.perf_counter()
    corpus = load_corpus(STDLIB)
    tokens_of(corpus, "bytes", 256)
    assert time.perf_counter() - started < 1.0


def test_the_same_files_give_the_same_digest_and_other_text_another(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text(LINES)
    two.write_text(LINES)
    first, second = load_corpus(str(one)), load_corpus(str(two))
    assert first.digest == second.digest
    two.write_text(LINES + "more\n")
    assert load_corpus(str(two)).digest != first.digest


def test_a_text_file_gives_its_last_tenth_from_a_line_start(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(LINES)
    corpus = load_corpus(str(path))
    assert corpus.train + corpus.validation == LINES.encode()
    assert corpus.train.endswith(b"\n")
    assert 0.08 < len(corpus.validation) / len(LINES) < 0.101
    assert (corpus.split, corpus.files) == ("block", 1)


def test_a_block_split_never_cuts_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for length in range(1000, 1010):
        path.write_text("é世" * length, encoding="utf-8")
        corpus = load_corpus(str(path))
        assert corpus.train.decode() + corpus.validation.decode() == "é世" * length


def test_jsonl_documents_are_joined_with_newlines(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": f"document {n}", "id": n} for n in range(50)])
    corpus = load_corpus(str(path), text_field="body")
    assert corpus.train + corpus.validation == "\n".join(f"document {n}" for n in range(50)).encode()


def test_parquet_holds_the_same_corpus_as_jsonl(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {n} é" for n in range(50)]
    parquet.write_table(arrow.table({"text": [*texts, None]}), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert load_corpus(str(tmp_path / "a.parquet")).digest == load_corpus(str(tmp_path / "a.jsonl")).digest


def test_a_folder_of_many_files_is_split_by_file(tmp_path: Path) -> None:
    names = [f"part/{number:03}.txt" for number in range(100)]
    (tmp_path / "part").mkdir()
    for name in names:
        (tmp_path / name).write_text(f"{name}: {LINES}")
    (tmp_path / ".hidden").write_text("not counted")
    corpus = load_corpus(str(tmp_path))
    held_out = [name for name in names if is_validation(name)]
    assert corpus.split == "file"
    assert corpus.files == 100
    assert corpus.validation == "\n".join(f"{name}: {LINES}" for name in held_out).encode()


def test_a_folder_of_few_files_of_every_kind_is_split_by_block(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LINES)
    write_jsonl(tmp_path / "b.jsonl", [{"text": LINES}])
    corpus = load_corpus(str(tmp_path))
    assert (corpus.split, corpus.files) == ("block", 2)
    assert corpus.train + corpus.validation == f"{LINES}\n{LINES}".encode()


def test_a_folder_whose_files_are_uneven_is_split_by_block(tmp_path: Path) -> None:
    names = [f"{number:02}.txt" for number in range(40)]
    giant = next(name for name in names if is_validation(name))
    for name in names:
        (tmp_path / name).write_text(LINES * (500 if name == giant else 1))
    assert load_corpus(str(tmp_path)).split == "block"


def test_a_missing_corpus_says_where_it_was_looked_for(tmp_path: Path) -> None:
    told = error_of(tmp_path / "nowhere.txt", "corpus-missing")
    assert "nowhere.txt" in told
    assert "python-stdlib" in told


def test_an_empty_corpus_is_too_small(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    error_of(tmp_path, "corpus-too-small")
    (tmp_path / "empty").mkdir()
    error_of(tmp_path / "empty", "corpus-too-small")


def test_a_bad_jsonl_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": oops}\n')
    assert "a.jsonl:3:10" in error_of(path, "corpus-not-readable")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"body": "x"}, "set data.text_field to one of: body"),
        ({"text": 3}, "is int, not text"),
        ([1], "found list"),
    ],
)
def test_a_jsonl_row_without_text_says_what_it_has(tmp_path: Path, row: object, told: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, row])
    message = error_of(path, "corpus-not-readable")
    assert "a.jsonl:2" in message
    assert told in message


def test_a_parquet_file_without_the_column_lists_the_text_columns(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    assert "one of: body" in error_of(tmp_path / "a.parquet", "corpus-not-readable")
    (tmp_path / "b.parquet").write_text("not parquet")
    assert "not a Parquet file" in error_of(tmp_path / "b.parquet", "corpus-not-readable")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_pyarrow(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest, **options)

    (tmp_path / "a.parquet").touch()
    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    assert "heddle-lm[parquet]" in error_of(tmp_path / "a.parquet", "package-missing")


def test_a_binary_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LINES)
    (tmp_path / "b.bin").write_bytes(b"\x00\x01\x02")
    assert "b.bin" in error_of(tmp_path, "corpus-not-readable")


def save_tokenizer(path: Path, *, vocab_size: int = 300) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([LINES], trainer)
    tokenizer.save(str(path))
    return path


def test_a_users_tokenizer_gives_fewer_tokens_and_counts_every_byte(tmp_path: Path) -> None:
    text = LINES + "é世🙂\n" + LINES
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "a.txt"))
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    tokens = tokens_of(corpus, str(tokenizer), 300)
    assert len(tokens.train) < len(corpus.train) / 2
    assert int(tokens.validation_bytes.sum()) == len(corpus.validation)
    assert tokens.train.dtype == np.uint16
    assert tokens.digest != corpus.digest
    assert tokens_of(corpus, str(tmp_path), 300).digest == tokens.digest


def test_bytes_of_multibyte_characters_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é世🙂\n" * 500, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "a.txt"))
    tokens = tokens_of(corpus, str(save_tokenizer(tmp_path / "tokenizer.json")), 300)
    assert int(tokens.validation_bytes.sum()) == len(corpus.validation)


def test_a_tokenizer_larger_than_the_vocabulary_is_a_mismatch(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LINES)
    corpus = load_corpus(str(tmp_path / "a.txt"))
    for tokenizer, vocab_size in (("bytes", 128), (str(save_tokenizer(tmp_path / "tokenizer.json")), 299)):
        with pytest.raises(HeddleError, match=r"set model\.vocab_size to") as caught:
            tokens_of(corpus, tokenizer, vocab_size)
        assert caught.value.code == "tokenizer-mismatch"


def test_a_tokenizer_that_is_not_there_or_not_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LINES)
    corpus = load_corpus(str(tmp_path / "a.txt"))
    for path, code in ((tmp_path / "none.json", "file-not-found"), (tmp_path / "a.txt", "file-not-readable")):
        with pytest.raises(HeddleError) as caught:
            tokens_of(corpus, str(path), 300)
        assert caught.value.code == code

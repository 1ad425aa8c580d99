"""The pages about specs and errors are complete, and their examples do what the pages say."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from heddle.compose.plan import plan
from heddle.errors import CODES, HeddleErrors
from heddle.specs import CHANNELS, MIXERS, ModelSpec, Spec, SpecFile, loads

DOCS = Path(__file__).parents[2] / "docs"
SPEC_PAGE = (DOCS / "spec.md").read_text(encoding="utf-8")
ERRORS_PAGE = (DOCS / "errors.md").read_text(encoding="utf-8")
# What the reader finds is in the text itself and would be lost on the way through data.
READER = {"syntax", "too-deep", "duplicate-key", "tag-not-allowed"}

BASE: dict[str, Any] = {
    "version": 1,
    "name": "base",
    "model": {
        "vocab_size": 256,
        "hidden_size": 64,
        "blocks": {
            "linear": {"mixer": {"kind": "gated_deltanet", "heads": 2}, "channel": {"kind": "swiglu"}},
            "full": {"mixer": {"kind": "attention", "heads": 4}, "channel": {"kind": "swiglu"}},
        },
        "layers": ["linear", "full"],
    },
}


def fenced(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def whole(fragment: dict[str, Any]) -> str:
    """A spec around a part of one: each key is put where it belongs."""
    made = deepcopy(BASE)
    if "search" in fragment:
        made["model"]["layers"] = {"placement": {"length": 4, "of": ["linear", "full"], "count": {"full": 1}}}
    for key, value in fragment.items():
        if key in Spec.model_fields:
            made[key] = value
        elif key in ModelSpec.model_fields:
            made["model"][key] = value
        else:
            made["model"]["blocks"]["full"][key] = value
    return json.dumps(made)


def parsed(text: str) -> dict[str, Any]:
    data: dict[str, Any] = YAML(typ="safe").load(text)
    return data


@pytest.mark.parametrize("text", fenced(SPEC_PAGE, "yaml"))
def test_every_example_of_the_spec_page_is_a_spec(text: str) -> None:
    file = loads(whole(parsed(text)))
    plan(file.spec.model, file.where)


def test_the_first_example_stands_alone() -> None:
    loads(fenced(SPEC_PAGE, "yaml")[0])


def test_the_spec_page_names_every_kind_and_field() -> None:
    words = set(re.findall(r"[a-z_0-9]+", SPEC_PAGE))
    for kind, schema in {**MIXERS, **CHANNELS}.items():
        assert {kind, *schema.model_fields} <= words, kind
    for _, schema in _schemas(Spec):
        # A budget's phase is written as its key: decode_ms, prefill_ms.
        assert set(schema.model_fields) - {"phase"} <= words, schema


def _schemas(schema: type[Any], above: tuple[type[Any], ...] = ()) -> list[tuple[str, type[Any]]]:
    # A composite mixer may hold one of its own kind.
    if schema in above:
        return []
    found = [(schema.__name__, schema)]
    for info in schema.model_fields.values():
        candidates = [info.annotation, *getattr(info.annotation, "__args__", ())]
        inner = [part for part in candidates if hasattr(part, "model_fields")]
        found += [one for part in inner for one in _schemas(part, (*above, schema))]
    return found


def _sections() -> dict[str, str]:
    parts = re.split(r"^### (.+)\n", ERRORS_PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_code_has_its_section_and_no_other_has() -> None:
    assert set(_sections()) == set(CODES)


def test_every_code_that_is_written_anywhere_is_listed() -> None:
    # Also those of answers and of the ledger, which become an error's only when something else needs what failed.
    written = re.compile(r"""(?:HeddleError\(\s*|code=|"code": )"([a-z]+(?:-[a-z]+)+)\"""")
    # mypy's own, in comments.
    texts = [
        "\n".join(line for line in file.read_text().splitlines() if "mypy:" not in line)
        for file in (DOCS.parent / "heddle").rglob("*.py")
    ]
    found = {code for text in texts for code in written.findall(text)}
    assert len(found) > 20
    assert found <= set(CODES)


@pytest.mark.parametrize("code", sorted(_sections()))
def test_a_section_has_a_cause_an_example_and_a_cure(code: str) -> None:
    text = _sections()[code]
    cause, example, cure = (text.find(mark) for mark in ("Cause: ", "```", "Cure: "))
    assert -1 < cause < example < cure


def _examples() -> list[tuple[str, str]]:
    return [(code, text) for code, section in _sections().items() for text in fenced(section, "yaml")]


@pytest.mark.parametrize(("code", "text"), _examples(), ids=lambda one: one[:30])
def test_the_example_of_an_error_gives_that_error(code: str, text: str) -> None:
    spec = text if code in READER else whole(parsed(text))
    assert code in _codes(spec)


def _codes(text: str) -> set[str]:
    try:
        file: SpecFile = loads(text)
        plan(file.spec.model, file.where)
    except HeddleErrors as errors:
        return {error.code for error in errors.errors}
    return {warning.code for warning in file.warnings}


def test_every_code_of_a_spec_has_an_example_that_runs() -> None:
    codes = list(CODES)
    of_the_spec = set(codes[codes.index("unknown-field") : codes.index("version-not-supported") + 1])
    assert of_the_spec | READER <= {code for code, _ in _examples()}

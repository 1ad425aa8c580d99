"""Other spec files that the budgets of a spec are relative to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from heddle.errors import HeddleError, HeddleErrors, Where
from heddle.specs.check_file import check_file
from heddle.specs.reader import Document, parse, read
from heddle.specs.search import names_file
from heddle.specs.spec import Spec


def spec_beside(file: str | None, name: str, texts: Mapping[str, str] | None = None) -> Spec:
    """The spec in the file `name`, which is relative to the folder of `file`; its open values at their defaults.

    Where `texts` has what that file says, by its name, it is not read. What its own budgets are relative to is not looked at,
    so that two files may name each other.

    Raises:
        HeddleErrors: as `load`.
    """
    return check_file(_document(file, name, texts or {})).spec


def text_beside(file: str | None, name: str, texts: Mapping[str, str] | None = None) -> str:
    """What the file `name` says, as `spec_beside` finds it. Raises as `load`."""
    return _document(file, name, texts or {}).source.text


def _document(file: str | None, name: str, texts: Mapping[str, str]) -> Document:
    return parse(texts[name], file=name) if name in texts else read(Path(file or "").parent / name)


def beside_problems(spec: Spec, file: str | None, where: Callable[[str], Where]) -> Iterator[HeddleError]:
    """What is wrong with the spec files that budgets name, each at the budget that names it."""
    for index, budget in enumerate([] if spec.search is None else spec.search.budgets):
        name = budget.relative_to
        if name is None or not names_file(name):
            continue
        place = where(f"search.budgets.{index}.relative_to")
        try:
            model = spec_beside(file, name).model
        except HeddleErrors as error:
            yield HeddleError(error.code, f"{name}: {error.what}", where=place, hint=error.hint)
            continue
        if model.kind != "causal_lm":
            yield HeddleError("conflicting-fields", f"{name} is no causal language model", where=place)
        elif model.vocab_size < spec.model.vocab_size:
            what = f"{name} knows {model.vocab_size} tokens, and this model {spec.model.vocab_size}"
            yield HeddleError("conflicting-fields", what, where=place, hint="it is trained at the same tasks")

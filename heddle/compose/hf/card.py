"""The model card of an export, from plain data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One task's result. `value` is in the unit of `metric`, `n` the independent units behind `se`."""

    task: str
    metric: str
    value: float
    se: float | None = None
    n: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """One measured latency, with the device it holds for; `ratio` is to `reference`."""

    what: str
    median_ms: float
    low_ms: float
    high_ms: float
    device: str
    dtype: str
    method: str
    ratio: float | None = None
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One check of the parity battery; `verdict` is pass, fail, or expected: it fails and that is no fault of the export."""

    check: str
    figure: float
    tolerance: float | None
    verdict: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """What the caller knows about a model. `spec` is YAML; `facts` are lines like data, tokens, commit."""

    name: str
    spec: str
    scores: Sequence[ScoreRow] = ()
    latency: Sequence[LatencyRow] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    license: str = "other"
    tags: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Checked:
    """What the export found out about itself; `auto_class` is the class of transformers that loads it, and `native` the one
    that it then is, if that needs no code of the folder."""

    parameters: int
    dtype: str
    kinds: tuple[str, ...]
    max_difference: float
    transformers: str
    torch: str
    auto_class: str = "AutoModelForCausalLM"
    device: str = ""
    parity: Sequence[ParityRow] = ()
    battery: str = ""
    native: str | None = None


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a card says of one kind of model; `snippet` is from what to what that of the card goes."""

    what: str
    snippet: str
    pipeline: str
    call: str
    padding: str


_EITHER_SIDE = "Padding may stand on either side, with its `attention_mask`."
KINDS = {
    "AutoModelForCausalLM": _Kind(
        "A causal language model",
        "from text to text",
        "text-generation",
        "outputs = model.generate(**inputs, max_new_tokens=64)\nprint(tokenizer.decode(outputs[0]))",
        "Pad on the left, as the tokenizer does: recurrent layers cannot skip padding that follows text.",
    ),
    "AutoModelForMaskedLM": _Kind(
        "An encoder with a language modelling head",
        "from text to the likeliest tokens",
        "fill-mask",
        "logits = model(**inputs).logits\nprint(tokenizer.decode(logits[0].argmax(-1)))",
        _EITHER_SIDE,
    ),
    "AutoModelForSequenceClassification": _Kind(
        "An encoder that classifies sequences",
        "from text to its class",
        "text-classification",
        "logits = model(**inputs).logits\nprint(model.config.id2label[int(logits[0].argmax())])",
        _EITHER_SIDE,
    ),
}


def render(card: Card, checked: Checked) -> str:
    """README.md: front matter, how to load, spec, scores, latency, parity."""
    parts = [
        _front_matter(card, checked),
        f"# {card.name}",
        f"{KINDS[checked.auto_class].what} of {checked.parameters:,} parameters ({checked.dtype}), mixing with "
        f"{_and(checked.kinds)}. Designed and exported with Heddle.",
        _usage(checked),
        _section("Facts", _table(("", ""), card.facts.items())),
        _section("Scores", _scores(card.scores)),
        _section("Latency", _latency(card.latency)),
        _section("Parity", _parity(checked)),
        _section("Spec", f"```yaml\n{card.spec.rstrip()}\n```"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(card: Card, checked: Checked) -> str:
    kind = KINDS[checked.auto_class]
    tags = ["heddle", *(["custom_code"] if checked.native is None else []), *card.tags]
    lines = [
        "---",
        f"license: {json.dumps(card.license)}",
        "library_name: transformers",
        f"pipeline_tag: {kind.pipeline}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)),
        "---",
    ]
    return "\n".join(lines)


def _usage(checked: Checked) -> str:
    kind, auto_class = KINDS[checked.auto_class], checked.auto_class
    if checked.native is None:
        trust = ", trust_remote_code=True"
        told = """The folder holds its own model code: `trust_remote_code=True` is needed, the heddle package is not. (The
tokenizer is plain data and loads without it, but transformers asks before it reads the config.)"""
    else:
        trust = ""
        told = f"It is a `{checked.native}` of transformers: the folder holds no code, and the heddle package is not needed."
    return f"""## Use

{told} Put this
folder's path in place of `PATH`:

```python
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})
model = {auto_class}.from_pretrained("PATH"{trust})

inputs = tokenizer("def main():", return_tensors="pt")
{kind.call}
```

{kind.padding}"""


def _scores(rows: Sequence[ScoreRow]) -> str:
    def error(row: ScoreRow) -> str:
        return "" if row.se is None else f"± {row.se:.2g}"

    cells = [
        (r.task, r.metric, f"{r.value:.4g}", error(r), "" if r.n is None else str(r.n), r.note) for r in rows
    ]
    return _table(("task", "metric", "score", "standard error", "n", ""), cells)


def _latency(rows: Sequence[LatencyRow]) -> str:
    def ratio(row: LatencyRow) -> str:
        return "" if row.ratio is None else f"{row.ratio:.2f} × {row.reference or 'reference'}"

    cells = [
        (
            r.what,
            f"{r.median_ms:.3g} ms ({r.low_ms:.3g} – {r.high_ms:.3g})",
            ratio(r),
            r.device,
            r.dtype,
            r.method,
        )
        for r in rows
    ]
    return _table(("", "median (95 % interval)", "ratio", "device", "type", "method"), cells)


def _parity(checked: Checked) -> str:
    rows = [
        (
            "largest logit difference, this folder against the exporting process (float32, CPU)",
            f"{checked.max_difference:.1e}",
        ),
        ("device", checked.device),
        ("transformers", checked.transformers),
        ("torch", checked.torch),
        ("parity battery", checked.battery),
    ]
    table = _table(("checked at export", ""), [row for row in rows if row[1]])
    return "\n\n".join(part for part in (table, _battery(checked.parity)) if part)


def _battery(rows: Sequence[ParityRow]) -> str:
    if not rows:
        return ""
    cells = [
        (r.check, f"{r.figure:.1e}", "" if r.tolerance is None else f"{r.tolerance:.1e}", r.verdict, r.note)
        for r in rows
    ]
    return (
        f"{_table(('check', 'figure', 'tolerance', '', ''), cells)}\n\n"
        "Logits in float32 against one pass in float64, as the worst relative norm of 64 tokens; at most twice the error of one "
        "pass in the same type plus 2e-6 (bfloat16: 1e-3). Of files the figure counts tensors, of generation tokens that differ."
    )


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

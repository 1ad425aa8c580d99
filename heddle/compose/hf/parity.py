"""The parity battery: a loaded folder must compute the same, whichever way it is asked.

Run by `reload.py` in a process that has no heddle; it imports nothing of ours. The oracle is the full pass in float64, the
baseline the full pass in float32, and an error may be at most twice that of the baseline plus ε (`kernels/accuracy.py`). An
error is the worst relative norm over sequences and blocks of 64 tokens, floored by the root mean square of all logits.

The model is in memory once: for what is asked in float64 it becomes float64 itself, 8 bytes a parameter, and then float32 again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

EPSILON = {torch.float32: 2e-6, torch.bfloat16: 1e-3}
# Tokens of a pass (more than a chunk of a kernel), of padding, and of what is generated; prompts are short.
LENGTH, PADDING, PROMPT, GREEDY, BEAM = 70, 9, 7, 64, 12
# The short form steps through few tokens and generates nothing.
SHORT_STEPS = 6
# What all checks cost, in full passes in float64 and in float32, and how long they may take where nobody asked for them.
FULL_PASSES, FULL_SECONDS = (160, 200), 60.0
RECURRENT = "a recurrent state cannot skip padding that follows text: pad on the left"
WINDOW = "a window counts padding that follows text as places: pad on the left"
BLOCKS = "blocks of keys are counted by places, padding that follows text among them: pad on the left"
GENERATION = "with and without cache"
# How far off a check may be where a failure is expected: logits that have nothing in common are some 1.4 off.
WORST = 4.0


@dataclass(slots=True)
class Row:
    """One check. `expected` tells why a check that fails is no fault of this folder."""

    check: str
    figure: float
    tolerance: float | None
    passed: bool
    note: str = ""
    expected: str = ""


@dataclass(slots=True)
class Loaded:
    """The model of a folder, in float32, what loads it otherwise, what reads its files (`second_reader.py`), and what tells of a
    configuration the checks that its class fails, why, and the error that it raises if it does (`known_failures.py`)."""

    model: Any
    auto_class: Any
    folder: str
    again: str
    saved_again: float
    trusted: bool
    reader: Callable[[Any, str, str], tuple[list[str], int]]
    known: Callable[[Any], Mapping[str, tuple[str, str]]]


@torch.no_grad()
def battery(loaded: Loaded, *, full: bool) -> list[dict[str, Any]]:
    """Every check of a folder, as plain data; without `full` the short form."""
    return [asdict(row) for row in checks_of(loaded, full=full).rows()]


@torch.no_grad()
def asked(loaded: Loaded, form: str) -> dict[str, Any]:
    """The checks of a form, which is full, short, or auto: full where that takes less than a minute. `form` tells which it was,
    `seconds` what the full form was expected to take."""
    checks = checks_of(loaded, full=form == "full")
    seconds = checks.full_seconds()
    checks.full |= form == "auto" and seconds <= FULL_SECONDS
    rows = [asdict(row) for row in checks.rows()]
    return {"rows": rows, "form": "full" if checks.full else "short", "seconds": seconds}


def checks_of(loaded: Loaded, *, full: bool) -> _Checks:
    """The checks of a model that generates, or of one that does not."""
    return _Causal(loaded, full=full) if loaded.model.can_generate() else _Checks(loaded, full=full)


class _Checks:
    """Those of any model: padding, reading and writing, bfloat16."""

    def __init__(self, loaded: Loaded, *, full: bool) -> None:
        self.loaded, self.model, self.full = loaded, loaded.model, full
        config = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or LENGTH
        self.length = max(2, min(LENGTH, int(positions)))
        self.padding = max(1, min(PADDING, self.length // 4))
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, int(config.vocab_size), (2, self.length), generator=generator)
        with in_float64(self.model):
            _, self.no_float64 = attempt(lambda: float(whole(self.model, self.ids).sum()))
        with self.exactly():
            self.exact = whole(self.model, self.ids)
            # A classifier's logits are of the whole row, so a row of its own says what is right beside padding.
            self.alone = whole(self.model, self.ids[:1, : self.length - self.padding])
        self.baseline = error(whole(self.model, self.ids), self.exact)
        self.known = loaded.known(config)

    def exactly(self) -> AbstractContextManager[None]:
        """The model in float64 while it lasts, if its class can compute so."""
        return nullcontext() if self.no_float64 else in_float64(self.model)

    def full_seconds(self) -> float:
        """How long every check may take, from what a pass takes."""
        with self.exactly():
            exact = seconds_of(lambda: whole(self.model, self.ids))
        plain = seconds_of(lambda: whole(self.model, self.ids))
        return FULL_PASSES[0] * exact + FULL_PASSES[1] * plain

    def rows(self) -> Iterator[Row]:
        yield self.second_reader()
        again = self.loaded.saved_again
        yield Row("saved again and reloaded", again, 0.0, again == 0.0)
        against = "float32 against float64"
        if self.no_float64:
            against = f"against itself: the class has no float64 ({self.no_float64})"
        yield Row("full pass", self.baseline, None, self.baseline < float("inf"), against)
        yield self.compared("left padding", lambda m: self.padded(m, "left"))
        yield self.compared("right padding", lambda m: self.padded(m, "right"))
        yield self.compared("batch of one, padded", lambda m: self.padded(m, "left", rows=1))
        if self.full:
            yield from self.narrow(self.in_bfloat16())

    def compared(
        self,
        check: str,
        compute: Callable[[Any], tuple[Tensor, Tensor]],
        *,
        model: Any = None,
        baseline: float | None = None,
        excused: str = "",
    ) -> Row:
        """A check of what `compute` makes of a model, a pair of logits and of those that are right.

        What fails is computed in float64 too: a near tie of a router may fall to the other side in float32, a mistake stays.
        """
        tested = self.model if model is None else model
        dtype = torch.float32 if model is None else torch.bfloat16
        allowed = 2 * (self.baseline if baseline is None else baseline) + EPSILON[dtype]
        figure, note = attempt(lambda: error(*compute(tested)))
        # A full pass that is not finite allows anything.
        passed = figure <= allowed < float("inf")
        if not passed and not note:
            with self.exactly():
                exact, _ = attempt(lambda: error(*compute(self.model)))
            passed = exact <= EPSILON[torch.float32]
            note = f"{exact:.1e} in float64" + (": a near tie, decided by rounding" if passed else "")
        why, error_told = self.known.get(check, (excused, ""))
        as_known = note.startswith(error_told) if error_told and figure == float("inf") else figure <= WORST
        return Row(check, figure, allowed, passed, note, why if as_known else "")

    def padded(self, model: Any, side: str, *, rows: int = 2) -> tuple[Tensor, Tensor]:
        """The first row with padding on one side of it, beside the others, which have none."""
        real = self.length - self.padding
        ids = self.ids[:rows].clone()
        first, gap = self.ids[:1, :real], self.ids.new_zeros(1, self.padding)
        ids[:1] = torch.cat((gap, first) if side == "left" else (first, gap), dim=1)
        mask = torch.ones_like(ids)
        mask[0, slice(None, self.padding) if side == "left" else slice(real, None)] = 0
        found = whole(model, ids, mask)
        if found.dim() == 2:
            return found[:1], self.alone
        return found[:1][mask[:1].bool()][None], self.alone

    def second_reader(self) -> Row:
        wrong, count = self.loaded.reader(self.model, self.loaded.folder, self.loaded.again)
        note = "; ".join(wrong[:3]) or f"{count} tensors"
        return Row("raw files against the class", float(len(wrong)), 0.0, not wrong, note)

    def narrow(self, model: Any) -> Iterator[Row]:
        figure = error(whole(model, self.ids), self.exact)
        yield Row("bfloat16, full pass", figure, None, figure < float("inf"), "against float64")

    def in_bfloat16(self) -> Any:
        loaded = self.loaded
        return loaded.auto_class.from_pretrained(
            loaded.folder, trust_remote_code=loaded.trusted, dtype=torch.bfloat16
        ).eval()


class _Causal(_Checks):
    """Those of a model that generates: caches."""

    def rows(self) -> Iterator[Row]:
        yield from super().rows()
        yield self.compared("right padding, then steps", self.after_right_padding, excused=self.excuse())
        every = [1] * self.length
        last = [self.length - SHORT_STEPS, *[1] * SHORT_STEPS] if self.length > SHORT_STEPS else every
        sizes = every if self.full else last
        ones = torch.ones_like(self.ids)
        yield self.compared("one-token steps", lambda m: (pieces(m, self.ids, sizes, ones), self.exact))
        chunks = [self.length // 3, 1, self.length - self.length // 3 - 1]
        chunks = [size for size in chunks if size > 0]
        yield self.compared("chunked prefill", lambda m: (pieces(m, self.ids, chunks), self.exact))
        yield self.compared(
            "chunked prefill, positions given",
            lambda m: (pieces(m, self.ids, chunks, ones), self.exact),
        )
        yield self.compared("batch of one, padded, then steps", self.after_left_padding)
        if self.full:
            yield self.generated(f"greedy, {GREEDY} tokens, {GENERATION}", GREEDY, beams=1)
            yield self.generated(f"three beams, {GENERATION}", BEAM, beams=3)

    def narrow(self, model: Any) -> Iterator[Row]:
        yield from super().narrow(model)
        baseline = error(whole(model, self.ids), self.exact)
        yield self.compared(
            "bfloat16, one-token steps",
            lambda m: (pieces(m, self.ids, [1] * self.length, torch.ones_like(self.ids)), self.exact),
            model=model,
            baseline=baseline,
        )

    def excuse(self) -> str:
        """Why right padding may fail with this model's cache: a state that merges tokens, a window, or blocks that are chosen."""
        cache = self.model(input_ids=self.ids[:, :2], use_cache=True).past_key_values
        if getattr(cache, "linear_cache", None):
            return RECURRENT
        held = [one for layer in cache.layers for one in parts(layer)]
        if any(vars(one).keys() & {"states", "recurrent_states", "conv_states"} for one in held):
            return RECURRENT
        windows = [getattr(one, name, None) for one in held for name in ("window", "sliding_window")]
        if any(windows):
            return WINDOW
        return BLOCKS if any(getattr(one, "selection", None) for one in self.model.modules()) else ""

    def after_left_padding(self, model: Any) -> tuple[Tensor, Tensor]:
        real = self.length - self.padding
        gap = self.ids.new_zeros(1, self.padding)
        ids = torch.cat((gap, self.ids[:1, :real]), dim=1)
        mask = (torch.arange(self.length) >= self.padding).long()[None]
        half = self.padding + real // 2
        found = pieces(model, ids, [half, *[1] * (self.length - half)], mask)
        return found[:, self.padding :], self.exact[:1, :real]

    def after_right_padding(self, model: Any) -> tuple[Tensor, Tensor]:
        """A prefill whose first row is shorter, and tokens after it for both rows."""
        short, wide = self.length - 2 * self.padding, self.length - self.padding
        ids = self.ids.clone()
        ids[0, short:wide] = 0
        ids[0, wide:] = self.ids[0, short:wide]
        mask = torch.ones_like(ids)
        mask[0, short:wide] = 0
        found = pieces(model, ids, [wide, *[1] * self.padding], mask)[:, wide:]
        return found, torch.stack((self.exact[0, short:wide], self.exact[1, wide:]))

    def generated(self, check: str, tokens: int, *, beams: int) -> Row:
        """A left-padded batch; in float64, so that no tie decides."""
        prompt = self.ids[:, : min(PROMPT, self.length // 2)].clone()
        prompt[0, 0] = 0
        mask = torch.ones_like(prompt)
        mask[0, 0] = 0
        usual: dict[str, Any] = {"do_sample": False, "num_beams": beams, "pad_token_id": 0}
        usual |= {"max_new_tokens": tokens, "min_new_tokens": tokens, "attention_mask": mask}

        def differing() -> float:
            with self.exactly():
                found = [self.model.generate(prompt, use_cache=cached, **usual) for cached in (True, False)]
            assert found[0].shape[1] == prompt.shape[1] + tokens, "generation stopped early"
            return float((found[0] != found[1]).sum())

        figure, note = attempt(differing)
        why, _ = self.known.get(check) or self.known.get(GENERATION, ("", ""))
        return Row(check, figure, 0.0, figure == 0.0, note, why if figure < float("inf") else "")


@contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """The model itself in float64, so that it is in memory once; then every number is again what it was."""
    held = [(one, one.dtype) for one in (*model.parameters(), *model.buffers()) if one.is_floating_point()]
    # The grouped product of experts takes no float64.
    configs: list[Any] = [getattr(part, "config", None) for part in model.modules()]
    chosen = [
        (one, one._experts_implementation) for one in configs if getattr(one, "_experts_implementation", None)
    ]
    try:
        for one, _ in held:
            one.data = one.data.double()
        for config, _ in chosen:
            config._experts_implementation = "eager"
        yield
    finally:
        for one, dtype in held:
            one.data = one.data.to(dtype)
        for config, name in reversed(chosen):
            config._experts_implementation = name


def seconds_of(compute: Callable[[], Any]) -> float:
    """How long it takes; it was done before."""
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start


def whole(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The logits of one pass without a cache."""
    given = {} if mask is None else {"attention_mask": mask}
    if mask is not None and model.can_generate():
        given["position_ids"] = positions_of(mask)
    found: Tensor = model(input_ids=ids, use_cache=False, **given).logits
    return found


def pieces(model: Any, ids: Tensor, sizes: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """The logits of a pass in pieces, each going on from the cache of those before; positions are given with a mask."""
    past, found, start = None, [], 0
    for size in sizes:
        end = start + size
        given = {}
        if mask is not None:
            given = {
                "attention_mask": mask[:, :end],
                "position_ids": positions_of(mask[:, :end])[:, start:],
            }
        out = model(input_ids=ids[:, start:end], past_key_values=past, use_cache=True, **given)
        past, start = out.past_key_values, end
        found.append(out.logits)
    return torch.cat(found, dim=1)


def positions_of(mask: Tensor) -> Tensor:
    """Positions that count real tokens from 0, as `generate` gives them.  Shapes:  mask, out: [B, T]"""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def parts(layer: Any) -> list[Any]:
    """A cache layer and those that it is made of."""
    inner = getattr(layer, "parts", {}).values()
    own = [layer.own] if hasattr(layer, "own") and layer.own.states else []
    return [*own, *(one for part in inner for one in parts(part))] if inner else [layer]


def error(found: Tensor, exact: Tensor) -> float:
    """The worst relative norm over sequences and blocks of 64 tokens.  Shapes:  [B, T, vocab] or [B, classes]"""
    if found.shape != exact.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    found, exact = found.double(), exact.double()
    floor = exact.square().mean().sqrt().clamp_min(1e-300)
    errors = [
        ((got - right).square().flatten(1).mean(1).sqrt() / right.square().flatten(1).mean(1).sqrt().clamp_min(floor))
        for got, right in zip(torch.split(found, 64, dim=1), torch.split(exact, 64, dim=1), strict=True)
    ]  # fmt: skip
    return float(torch.stack(errors).max())


def attempt(compute: Callable[[], float]) -> tuple[float, str]:
    """What `compute` gives; infinity and the reason where it raises."""
    try:
        return compute(), ""
    # Whatever a class raises is a finding.
    except Exception as failure:
        return float("inf"), f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"

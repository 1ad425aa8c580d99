"""The parity battery: a loaded folder must compute the same, whichever way it is asked.

Run by `reload.py` in a process that has no heddle; it imports nothing of ours. The oracle is the full pass in float64, the
baseline the full pass in float32, and an error may be at most twice that of the baseline plus ε (`kernels/accuracy.py`). An
error is the worst relative norm over sequences and blocks of 64 tokens, floored by the root mean square of all logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

EPSILON = {torch.float32: 2e-6, torch.bfloat16: 1e-3}
# Tokens of a pass (more than a chunk of a kernel), of padding, and of what is generated; prompts are short.
LENGTH, PADDING, PROMPT, GREEDY, BEAM = 70, 9, 7, 64, 12
# At an export few tokens are stepped through and nothing is generated.
SHORT_STEPS = 6
RECURRENT = "a recurrent state cannot skip padding that follows text: pad on the left"
WINDOW = "a window counts padding that follows text as places: pad on the left"
GENERATION = "with and without cache"
STEPPED, CHUNKS, CHUNKS_PLACED = "one-token steps", "chunked prefill", "chunked prefill, positions given"
BEAMS = f"three beams, {GENERATION}"
ONE_STEPPED, RIGHT_STEPPED = "batch of one, padded, then steps", "right padding, then steps"
# Checks that classes of transformers fail by themselves, measured with 5.23.0: their logits without a cache are right.
EXPECTED = {
    "bamba": {CHUNKS: "the class counts positions only where position_ids are given"},
    "jamba": dict.fromkeys(
        (CHUNKS, CHUNKS_PLACED), "the class forgets its state where a call goes on with several tokens"
    ),
    "minimax": {BEAMS: "with a cache the class finds other beams than without"},
}
UNCOUNTED = "the class asks its first layer for the number of tokens, and a linear one has none"
FIRST_IS_LINEAR = {
    "minimax": dict.fromkeys((CHUNKS, CHUNKS_PLACED, ONE_STEPPED, RIGHT_STEPPED, GENERATION), UNCOUNTED)
}

# Classes with Mamba-2, and what they fail where its projections have a bias.
BIASED = ("bamba", "granitemoehybrid", "falcon_h1")
BIAS = "the class masks padding before its projection, whose bias then reaches the convolution"
PADDED_LEFT, PADDED_ONE = "left padding", "batch of one, padded"

# Names that the writer of a class gives to what is published, and loaded, under others.
RENAMED = {
    "kimi_linear": (".mlp.", ".block_sparse_moe."),
    "olmo_hybrid": ("post_attention_layernorm", "feedforward_layer_norm"),
}
# Tensors that a class joins by rows, and its name for them; its writer cuts them into equal parts, whatever theirs are.
JOINED = {"olmo_hybrid": (("q_conv1d", "k_conv1d", "v_conv1d"), "conv1d")}


def known_failures(config: Any) -> dict[str, str]:
    """Checks that the class of `config` fails, and why."""
    first = next(iter(getattr(config, "layer_types", None) or []), "")
    linear = FIRST_IS_LINEAR.get(config.model_type, {}) if first == "linear_attention" else {}
    if linear and getattr(config, "sliding_window", None):
        # Where a window ends is counted from the same number.
        linear = {**linear, STEPPED: UNCOUNTED}
    biased = config.model_type in BIASED and getattr(config, "mamba_proj_bias", False)
    padded = dict.fromkeys((PADDED_LEFT, PADDED_ONE, ONE_STEPPED), BIAS) if biased else {}
    return {**EXPECTED.get(config.model_type, {}), **linear, **padded}


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
    """The model of a folder, in float32, and what is needed to load it otherwise."""

    model: Any
    auto_class: Any
    folder: str
    again: str
    saved_again: float
    trusted: bool


@torch.no_grad()
def battery(loaded: Loaded, *, full: bool) -> list[dict[str, Any]]:
    """Every check of a folder, as plain data; without `full` those that an export waits for."""
    checks = _Causal(loaded, full=full) if loaded.model.can_generate() else _Checks(loaded, full=full)
    return [asdict(row) for row in checks.rows()]


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
        self.exact_model, self.oracle = exact_twin(self.model, self.ids)
        self.exact = whole(self.exact_model, self.ids)
        self.baseline = error(whole(self.model, self.ids), self.exact)
        self.known = known_failures(config)

    def rows(self) -> Iterator[Row]:
        yield self.second_reader()
        again = self.loaded.saved_again
        yield Row("saved again and reloaded", again, 0.0, again == 0.0)
        yield Row("full pass", self.baseline, None, self.baseline < float("inf"), self.oracle)
        yield self.compared(PADDED_LEFT, lambda m: self.padded(m, "left"))
        yield self.compared("right padding", lambda m: self.padded(m, "right"))
        yield self.compared(PADDED_ONE, lambda m: self.padded(m, "left", rows=1))
        if self.full:
            yield from self.narrow()

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
            exact, _ = attempt(lambda: error(*compute(self.exact_model)))
            passed = exact <= EPSILON[torch.float32]
            note = f"{exact:.1e} in float64" + (": a near tie, decided by rounding" if passed else "")
        return Row(check, figure, allowed, passed, note, self.known.get(check, excused))

    def padded(self, model: Any, side: str, *, rows: int = 2) -> tuple[Tensor, Tensor]:
        """The first row with padding on one side of it, beside the others, which have none."""
        real = self.length - self.padding
        ids = self.ids[:rows].clone()
        first, gap = self.ids[:1, :real], self.ids.new_zeros(1, self.padding)
        ids[:1] = torch.cat((gap, first) if side == "left" else (first, gap), dim=1)
        mask = torch.ones_like(ids)
        mask[0, slice(None, self.padding) if side == "left" else slice(real, None)] = 0
        found = whole(model, ids, mask)
        # A classifier's logits are of the whole row, so a row of its own says what is right.
        alone = whole(self.exact_model, first)
        if found.dim() == 2:
            return found[:1], alone
        return found[:1][mask[:1].bool()][None], alone

    def second_reader(self) -> Row:
        """Names, shapes and values in the files, as another reader sees them, against the class and what it writes itself."""
        stored, held = raw(self.loaded.folder), self.model.state_dict()
        kind = self.model.config.model_type
        held |= joined(stored, held, *JOINED.get(kind, ((), "")))
        published, written = RENAMED.get(kind, ("", ""))
        renamed = {name.replace(published, written): name for name in stored} if published else {}
        resaved = {renamed.get(name, name): one for name, one in raw(self.loaded.again).items()}
        wrong = [f"{name} is not written by the class" for name in stored if name not in resaved | held]
        wrong += [f"{name} is not in the files" for name in resaved if name not in stored]
        for name, tensor in stored.items():
            of_class = held.get(name)
            if of_class is None or of_class.shape != tensor.shape:
                of_class = resaved.get(name)
            if of_class is not None and of_class.shape != tensor.shape:
                wrong.append(f"{name} is {list(tensor.shape)}, the class has {list(of_class.shape)}")
            elif of_class is not None and not torch.equal(tensor.to(of_class.dtype), of_class):
                wrong.append(f"{name} has other values")
        note = "; ".join(wrong[:3]) or f"{len(stored)} tensors"
        return Row("raw files against the class", float(len(wrong)), 0.0, not wrong, note)

    def narrow(self) -> Iterator[Row]:
        model = self.in_bfloat16()
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
        yield self.compared(RIGHT_STEPPED, self.after_right_padding, excused=self.excuse())
        every = [1] * self.length
        last = [self.length - SHORT_STEPS, *[1] * SHORT_STEPS] if self.length > SHORT_STEPS else every
        sizes = every if self.full else last
        ones = torch.ones_like(self.ids)
        yield self.compared(STEPPED, lambda m: (pieces(m, self.ids, sizes, ones), self.exact))
        chunks = [self.length // 3, 1, self.length - self.length // 3 - 1]
        chunks = [size for size in chunks if size > 0]
        yield self.compared(CHUNKS, lambda m: (pieces(m, self.ids, chunks), self.exact))
        yield self.compared(
            CHUNKS_PLACED,
            lambda m: (pieces(m, self.ids, chunks, ones), self.exact),
        )
        yield self.compared(ONE_STEPPED, self.after_left_padding)
        if self.full:
            yield self.generated(f"greedy, {GREEDY} tokens, {GENERATION}", GREEDY, beams=1)
            yield self.generated(BEAMS, BEAM, beams=3)

    def narrow(self) -> Iterator[Row]:
        yield from super().narrow()
        model = self.in_bfloat16()
        baseline = error(whole(model, self.ids), self.exact)
        yield self.compared(
            "bfloat16, one-token steps",
            lambda m: (pieces(m, self.ids, [1] * self.length, torch.ones_like(self.ids)), self.exact),
            model=model,
            baseline=baseline,
        )

    def excuse(self) -> str:
        """Why right padding may fail with this model's cache: a state that merges tokens, or a window."""
        cache = self.model(input_ids=self.ids[:, :2], use_cache=True).past_key_values
        if getattr(cache, "linear_cache", None):
            return RECURRENT
        held = [one for layer in cache.layers for one in parts(layer)]
        if any(vars(one).keys() & {"states", "recurrent_states", "conv_states"} for one in held):
            return RECURRENT
        windows = [getattr(one, name, None) for one in held for name in ("window", "sliding_window")]
        return WINDOW if any(windows) else ""

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
            found = [self.exact_model.generate(prompt, use_cache=cached, **usual) for cached in (True, False)]
            assert found[0].shape[1] == prompt.shape[1] + tokens, "generation stopped early"
            return float((found[0] != found[1]).sum())

        figure, note = attempt(differing)
        return Row(
            check, figure, 0.0, figure == 0.0, note, self.known.get(check) or self.known.get(GENERATION, "")
        )


def exact_twin(model: Any, ids: Tensor) -> tuple[Any, str]:
    """The model in float64, and what its numbers are; the model itself where its class cannot compute in float64."""
    twin = copy.deepcopy(model).double()
    # The grouped product of experts takes no float64.
    for part in twin.modules():
        if getattr(getattr(part, "config", None), "_experts_implementation", None):
            part.config._experts_implementation = "eager"
    _, failure = attempt(lambda: float(whole(twin, ids).sum()))
    if failure:
        return model, f"against itself: the class has no float64 ({failure})"
    return twin, "float32 against float64"


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


def joined(
    stored: Mapping[str, Tensor], held: Mapping[str, Tensor], names: Sequence[str], name: str
) -> dict[str, Tensor]:
    """The rows of each tensor `name` of a class under the `names` that they have in the files."""
    found: dict[str, Tensor] = {}
    for key in [key for key in held if names and f".{name}." in key]:
        theirs = [key.replace(f".{name}.", f".{one}.") for one in names]
        rows = [stored[one].shape[0] for one in theirs if one in stored]
        if len(rows) == len(theirs) and sum(rows) == held[key].shape[0]:
            found |= dict(zip(theirs, torch.split(held[key], rows), strict=True))
    return found


def attempt(compute: Callable[[], float]) -> tuple[float, str]:
    """What `compute` gives; infinity and the reason where it raises."""
    try:
        return compute(), ""
    # Whatever a class raises is a finding.
    except Exception as failure:
        return float("inf"), f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"


def raw(folder: str) -> dict[str, Tensor]:
    """Every tensor in the safetensors files of a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return found

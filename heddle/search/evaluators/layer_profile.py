"""What the attention of a trained model looks at, layer by layer: the input of HyLRA's placement (arXiv 2602.00777)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.hf.model import HeddleForCausalLM
from heddle.errors import HeddleError
from heddle.search.text_alone import text_alone


@dataclass(frozen=True, slots=True)
class Blocks:
    """How keys are grouped and chosen: counts of tokens, and of blocks for `top`.

    `sink` tokens at the start and the `recent` last ones are always among the `top` blocks, as they are in a sparse decode
    step; they make overlaps larger. `mass` is the share of the attention that counts as covered.
    """

    size: int = 128
    top: int = 16
    sink: int = 128
    recent: int = 512
    mass: float = 0.9


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """Of the layers of softmax attention, in order; `layers` are their numbers in the model.

    `coverage[i]` is the share of the blocks that a token needs for `Blocks.mass` of its attention: high is fragile.
    `overlap[i][j]` is |mᵢ ∩ mⱼ| / |mⱼ| of the chosen blocks of layers i ≤ j, the mean over queries at the worst head; 1 for
    i = j and 0 for i > j.
    """

    layers: tuple[int, ...]
    coverage: tuple[float, ...]
    overlap: tuple[tuple[float, ...], ...]


@torch.no_grad()
def layer_profile(
    model: HeddleForCausalLM,
    inputs: Tensor,
    queries: Sequence[int],
    blocks: Blocks = Blocks(),
) -> LayerProfile:
    """The profile at the tokens `queries` (places, from the end where negative) of the sequences `inputs` [B, T].

    The attention rows of one layer are reduced as they come to one boolean mask of blocks a query and head of keys, and to one
    number: no keys, queries or rows of the layers before are held. A head of keys has the mass of all its heads of
    queries. Coverage is averaged over queries, outliers brought to 1.5 interquartile ranges beyond the quartiles, then over
    heads.

    Raises `bad-argument` if no layer hands out attention rows, or layers are shared or differ in heads of keys, and
    `loss-not-finite`.
    """
    mixers = {index: model.model.layer_at(index).mixer for index in range(len(model.model.layers))}
    kept = {index: mixer for index, mixer in mixers.items() if hasattr(mixer, "rows_out")}
    if not kept:
        raise HeddleError("bad-argument", "no layer of the model hands out attention rows to profile")
    if len({id(mixer) for mixer in kept.values()}) < len(kept):
        raise HeddleError(
            "bad-argument", "a layer that is shared cannot be profiled apart in each of its places"
        )
    if len({mixer.kv_heads for mixer in kept.values()}) > 1:
        raise HeddleError(
            "bad-argument", "the layers differ in heads of keys: their blocks cannot be compared"
        )
    places = torch.tensor([query % inputs.shape[1] for query in queries], device=inputs.device)
    found: dict[int, list[tuple[Tensor, Tensor]]] = {index: [] for index in kept}
    training = model.training
    model.eval()
    for row in inputs:
        with text_alone(model) as is_text, _rows_reduced(kept, places, blocks, found, is_text):
            model.model(input_ids=row[None], use_cache=False)
    model.train(training)
    masks = torch.stack([torch.cat([mask for mask, _ in parts], dim=1) for parts in found.values()])
    ratios = [torch.cat([ratio for _, ratio in parts], dim=1) for parts in found.values()]
    return LayerProfile(tuple(kept), tuple(map(_typical, ratios)), _overlap(masks))


@contextmanager
def _rows_reduced(
    mixers: dict[int, Any],
    places: Tensor,
    blocks: Blocks,
    found: dict[int, list[tuple[Tensor, Tensor]]],
    is_text: Callable[[], bool],
) -> Iterator[None]:
    """While it is open, what the rows of each mixer come to is added to `found`."""

    def reduce(index: int, heads: int) -> Any:
        def add(_: object, __: object, rows: Tensor) -> None:
            if is_text():
                # What is no number would count as attention to one block.
                if not bool(rows.isfinite().all()):
                    raise HeddleError("loss-not-finite", f"the attention of layer {index} is not finite")
                found[index].append(_reduced(rows[0], heads, places, blocks))

        return add

    hooks = []
    for index, mixer in mixers.items():
        mixer.rows_out.queries = tuple(places.tolist())
        hooks.append(mixer.rows_out.register_forward_hook(reduce(index, mixer.kv_heads)))
    try:
        yield
    finally:
        for hook, mixer in zip(hooks, mixers.values(), strict=True):
            hook.remove()
            mixer.rows_out.queries = None


def _reduced(rows: Tensor, heads: int, places: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The chosen blocks and the share of blocks that covers the mass.

    Shapes:  rows: [H, queries, S];  out: [heads, queries, S / size] bool, [heads, queries]
    """
    mass = rows.float().reshape(heads, -1, *rows.shape[1:]).sum(dim=1)
    mass = F.pad(mass, (0, -mass.shape[-1] % blocks.size))
    mass = mass.reshape(*mass.shape[:-1], -1, blocks.size).sum(dim=-1)
    first = torch.arange(mass.shape[-1], device=mass.device) * blocks.size
    seen = first <= places[:, None]
    forced = (first < blocks.sink) | (first + blocks.size > places[:, None] + 1 - blocks.recent)
    wanted = mass.masked_fill(forced, torch.inf).masked_fill(~seen, -1.0)
    chosen = wanted.topk(min(blocks.top, wanted.shape[-1]), dim=-1).indices
    mask = torch.zeros_like(wanted, dtype=torch.bool).scatter_(-1, chosen, True) & seen
    ordered = mass.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    needed = (ordered < blocks.mass * ordered[..., -1:]).sum(dim=-1) + 1
    return mask.cpu(), (needed / seen.sum(dim=-1)).double().cpu()


def _typical(ratios: Tensor) -> float:
    """The mean over queries, outliers brought in, then over heads.  Shapes:  [heads, queries]"""
    low, high = ratios.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64), dim=1, keepdim=True)
    reach = 1.5 * (high - low)
    return float(ratios.clamp(low - reach, high + reach).mean(dim=1).mean())


def _overlap(masks: Tensor) -> tuple[tuple[float, ...], ...]:
    """Shapes:  masks: [L, heads, queries, blocks] bool"""
    held = masks.float()
    shared = torch.einsum("ihqb,jhqb->ijhq", held, held) / held.sum(dim=-1)[None]
    worst = shared.mean(dim=-1).amin(dim=-1).triu()
    return tuple(tuple(row) for row in worst.tolist())

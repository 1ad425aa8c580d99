"""Routing attention as a mixer: its clusters token by token, its centroids, losses, cache and costs."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toys import EXACT, call_at, checkpoint, mixer_of, model_with, noise, padded_call

from heddle.compose.build import build
from heddle.compose.mixers.routing import RoutingModule
from heddle.compose.modules import clusters, stretches
from heddle.compose.modules.clusters import Centroids
from heddle.specs import Site as SpecSite
from heddle.specs.mixers.routing import Routing

HIDDEN, HEADS, SIZE, LENGTH = 12, 2, 6, 23


def ready(**fields: Any) -> RoutingModule:
    made = mixer_of(HIDDEN, "routing", heads=HEADS, **{"clusters": 3, "members": 4} | fields)
    assert isinstance(made, RoutingModule)
    return made


def clusters_of(mixer: RoutingModule, x: Tensor) -> tuple[Tensor, Tensor]:
    """Normed queries [B, T, H, d] and their clusters [B, T, H]."""
    r = mixer.qk_proj(x).unflatten(-1, (HEADS, -1))
    r = (r - r.mean(-1, keepdim=True)) / (r.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return r, torch.einsum("bthd,hcd->bthc", r, mixer.centroids.centroids).argmax(-1)


def by_loop(mixer: RoutingModule, x: Tensor, members: int) -> Tensor:
    """Each token over the latest earlier ones of its own cluster."""
    (r, z), v = clusters_of(mixer, x), mixer.v_proj(x).unflatten(-1, (HEADS, -1))
    out = v.clone()
    for b, t, h in ((b, t, h) for b in range(len(x)) for t in range(x.shape[1]) for h in range(HEADS)):
        mates = [j for j in range(t) if z[b, j, h] == z[b, t, h]][-(members - 1) :]
        if mates:
            scale = SIZE**-0.5 if mixer.scale is None else mixer.scale
            out[b, t, h] = (scale * r[b, mates, h] @ r[b, t, h]).softmax(0) @ v[b, mates, h]
    y: Tensor = mixer.o_proj(out.flatten(2))
    return y


def in_pieces(mixer: RoutingModule, x: Tensor, ends: list[int], real: Tensor | None = None) -> Tensor:
    cache, pieces, start = mixer.new_cache(), [], 0
    for end in ends:
        call = call_at(start, end - start, cache, rows=len(x))
        if real is not None:
            call.padding, call.key_padding = real[:, start:end], real[:, :end]
        pieces.append(mixer(x[:, start:end], call))
        cache.advance(end - start)
        start = end
    return torch.cat(pieces, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [{"scale": 1.0}, {"clusters": 1, "members": 2}, {"clusters": 5, "members": 99}]
)
def test_it_equals_its_formula_at_every_token(fields: dict[str, Any]) -> None:
    mixer, x = ready(**fields), noise(2, LENGTH, HIDDEN)
    expected = by_loop(mixer, x, fields.get("members", 4))
    assert (mixer(x, call_at(0, LENGTH)) - expected).abs().max() < EXACT
    for ends in (list(range(1, LENGTH + 1)), [1, 4, 5, 17, LENGTH]):
        assert (in_pieces(mixer, x, ends) - expected).abs().max() < EXACT


def test_its_gradients_are_those_of_the_formula() -> None:
    mixer, x, weight = ready(), noise(2, 9, HIDDEN).requires_grad_(), noise(2, 9, HIDDEN, seed=4)
    inputs = [x, *mixer.parameters()]
    found, expected = (
        torch.autograd.grad((y * weight).sum(), inputs)
        for y in (mixer(x, call_at(0, 9)), by_loop(mixer, x, 4))
    )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < EXACT


@torch.no_grad()
def test_one_cluster_is_softmax_attention_that_leaves_itself_out() -> None:
    mixer, x = ready(clusters=1, members=LENGTH), noise(2, LENGTH, HIDDEN)
    r, v = (
        clusters_of(mixer, x)[0].transpose(1, 2),
        mixer.v_proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2),
    )
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1)
    seen[0, 0] = True
    expected = mixer.o_proj(
        F.scaled_dot_product_attention(r, r, v, attn_mask=seen).transpose(1, 2).flatten(2)
    )
    assert (mixer(x, call_at(0, LENGTH)) - expected).abs().max() < EXACT
    # That all tokens are in it is no collapse.
    call = call_at(0, LENGTH)
    mixer.train()(x, call)
    assert [name for name, _, _ in call.losses] == ["commitment"]


@torch.no_grad()
def test_of_clusters_that_are_equally_near_the_first_has_the_token() -> None:
    mixer, alone, x = ready(clusters=4), ready(clusters=1), noise(2, LENGTH, HIDDEN)
    # All centroids are one direction, along which a product is the number that stands there.
    mixer.centroids.centroids.copy_(F.one_hot(torch.tensor(2), SIZE))
    weights = {name: one for name, one in mixer.state_dict().items() if "centroids" not in name}
    alone.load_state_dict(weights | {"centroids.centroids": mixer.centroids.centroids[:, :1]})
    expected = alone(x, call_at(0, LENGTH))
    assert (mixer(x, call_at(0, LENGTH)) - expected).abs().max() < EXACT
    assert (in_pieces(mixer, x, list(range(1, LENGTH + 1))) - expected).abs().max() < EXACT
    call = call_at(0, LENGTH, mixer.new_cache())
    mixer(x, call)
    assert call.cache.tensors()["held"].tolist() == [[[3, 0, 0, 0]] * HEADS] * 2
    # One after the other, however many tokens are asked about at once.
    unit = noise(2, HEADS, LENGTH, SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "STRETCH", 5)
        assert not mixer.centroids.nearest(unit).any()


@torch.no_grad()
def test_padding_is_of_no_cluster() -> None:
    mixer, x = ready(), noise(2, LENGTH, HIDDEN)
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :7] = False
    alone = mixer(x[:1, 7:], call_at(0, LENGTH - 7, rows=1))
    for y in (mixer(x, padded_call(real)), in_pieces(mixer, x, [2, 9, *range(10, LENGTH + 1)], real)):
        assert (y[:1, 7:] - alone).abs().max() < EXACT
        assert (y[1] - mixer(x, call_at(0, LENGTH))[1]).abs().max() < EXACT


def test_centroids_follow_the_directions_of_their_members_in_training_alone() -> None:
    mixer, x = ready(decay=0.9, commitment=0.5), noise(2, LENGTH, HIDDEN)
    before = mixer.centroids.centroids.clone()
    r, z = clusters_of(mixer, x)
    unit = (r / SIZE**0.5).detach()
    call = call_at(0, LENGTH)
    mixer(x, call)
    assert (call.members, call.losses) == ([], [])
    mixer.train()(x, call)
    (told,) = call.members
    mixer.count_members(told)
    expected, distance, largest = before.clone(), 0.0, 0.0
    for h in range(HEADS):
        counts = []
        for c in range(3):
            rows = unit[:, :, h][z[:, :, h] == c]
            counts.append(len(rows))
            distance += float((rows - before[h, c]).square().sum())
            if len(rows):
                expected[h, c] = 0.9 * before[h, c] + 0.1 * F.normalize(rows.sum(0), dim=0)
        largest += max(counts) / (2 * LENGTH) / HEADS
    losses = {name: (value.item(), factor) for name, value, factor in call.losses}
    assert losses["commitment"] == (pytest.approx(distance / r.numel()), 0.5)
    assert losses["largest_cluster"] == (pytest.approx(largest), 0.0)
    mixer.centroids.after_step()
    assert (mixer.centroids.centroids - expected).abs().max() < EXACT
    mixer.centroids.after_step()
    assert (mixer.centroids.centroids - expected).abs().max() < EXACT
    # The gradient is that of a mean of squares: centroids stand still.
    (gradient,) = torch.autograd.grad(call.losses[0][1], mixer.qk_proj.weight)
    again = mixer.qk_proj.weight.detach().clone().requires_grad_()
    r = F.layer_norm(F.linear(x, again).unflatten(-1, (HEADS, -1)), (SIZE,)) / SIZE**0.5
    target = torch.stack([before[h][z[:, :, h]] for h in range(HEADS)], dim=2)
    (wanted,) = torch.autograd.grad((r - target).square().mean(), again)
    assert (gradient - wanted).abs().max() < EXACT


def trained(mixer: RoutingModule, x: Tensor, real: Tensor) -> tuple[Tensor, ...]:
    """Output, what a call tells, and the gradients."""
    call = padded_call(real)
    y = mixer(x, call)
    losses = [value for _, value, _ in call.losses]
    total = y.sin().sum() + 3.0 * losses[0]
    return (y, *call.members, *losses, *torch.autograd.grad(total, [x, *mixer.parameters()]))


def test_long_rows_train_as_short_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = ready(commitment=0.5).train(), noise(2, LENGTH, HIDDEN).requires_grad_()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :7] = False
    expected = trained(mixer, x, real)
    for module in (stretches, clusters):
        monkeypatch.setattr(module, "STRETCH", 5)
    for found, wanted in zip(trained(mixer, x, real), expected, strict=True):
        assert (found - wanted).abs().max() < EXACT


class Kept:
    """A tensor that some gradient still waits for."""

    def __init__(self, one: Tensor) -> None:
        self.one = one


def test_long_rows_hold_no_wide_copy_for_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = mixer_of(64, "routing", heads=2, clusters=4, members=2).to(torch.bfloat16).train()
    x = noise(1, 512, 64, dtype=torch.bfloat16).requires_grad_()

    def held() -> int:
        """Copies of the input that the gradient finds; weights and places are smaller than one."""
        kept: WeakSet[Kept] = WeakSet()

        def keep(one: Tensor) -> Kept:
            made = Kept(one)
            kept.add(made)
            return made

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda made: made.one):
            call = call_at(0, 512, rows=1)
            told = mixer(x, call), call.losses[0][1]
        assert all(one.requires_grad for one in told)
        storages = {made.one.untyped_storage().data_ptr(): made.one.untyped_storage() for made in kept}
        return sum(storage.nbytes() // x.nbytes for storage in storages.values())

    # Input, queries, values and output; of twice its size the norm's input and the difference to the centroids.
    assert held() == 8
    monkeypatch.setattr(stretches, "STRETCH", 128)
    # In place of those two what is normed, as it came.
    assert held() == 5


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_model_counts_members_once_also_inside_another_mixer(is_checkpointed: bool) -> None:
    parts = [{"kind": "attention", "heads": 2}, {"kind": "routing", "heads": 2, "clusters": 3, "members": 4}]
    split = {"kind": "head_split", "share": 0.5, "mixers": parts}
    model = build(model_with(split, 24, layers=2)).train()
    if is_checkpointed:
        checkpoint(model)
    ids = torch.arange(12).view(2, 6) % 9
    model(ids, labels=ids).loss.backward()
    held = [one for one in model.modules() if isinstance(one, Centroids)]
    assert len(held) == 2
    first = [one.sums.clone() for one in held]
    # Directions of 12 tokens: no sum is longer, and together they are no shorter than one cluster could make them.
    assert all(0 < one.norm(dim=-1).max() <= 12 for one in first)
    before = [one.centroids.clone() for one in held]
    model(ids, labels=ids).loss.backward()
    for one, sums in zip(held, first, strict=True):
        assert (one.sums - 2 * sums).abs().max() < 1e-5
    model.eval()(ids)
    assert all(torch.equal(one.centroids, old) for one, old in zip(held, before, strict=True))


def test_it_costs_what_its_parts_do() -> None:
    # D 512, 4 heads of 128, 16 clusters of 32 members: a token reads 31 others at most.
    spec, site = Routing(heads=4, clusters=16, members=32), SpecSite(512)
    assert spec.params(site) == 3 * 512 * 512
    assert spec.flops(site, 10_000) == 2 * 3 * 512 * 512 + 2 * 16 * 512 + 4 * 512 * 31
    assert spec.state_bytes(site, 10_000, 2) == 2 * 2 * 16 * 31 * 512 + 4 * 4 * 16
    assert spec.read_bytes(site, 10_000, 2) == 2 * 2 * 31 * 512 + 4 * 4

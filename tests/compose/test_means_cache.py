"""The cached means by which blocks are chosen: the choice is that of a pass without a cache, whatever happens to the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import EXACT, call_at, mixer_of, model_with, noise, shaken, tokens

from heddle.compose.build import build
from heddle.compose.cache import Call, CompositeLayer, cache_bytes
from heddle.compose.means_cache import MeansLayer
from heddle.compose.modules.selection import Parts, Places, choose_blocks, choose_for_step, means_of
from heddle.specs import Site as SpecSite
from heddle.specs.mixers.attention import Attention
from heddle.specs.selection import Selection

HIDDEN, LENGTH = 24, 61
MEAN: dict[str, Any] = {"block": 4, "count": 4, "sink": 1, "recent": 2}
KERNELS: dict[str, Any] = {**MEAN, "block": 8, "count": 3, "recent": 1, "scores": "kernels"}
FORMS = [MEAN, KERNELS, {**MEAN, "dense_length": 21}, {**KERNELS, "dense_length": 13}]
CUTS = (3, 4, 27, 28, *range(29, LENGTH + 1))
every_form = pytest.mark.parametrize("how", FORMS, ids=lambda one: "-".join(map(str, one.values())))


def chooser(how: dict[str, Any], **fields: Any) -> Any:
    return mixer_of(HIDDEN, "attention", heads=4, kv_heads=2, rope=None, selection=how, **fields)


def chosen_by(mixer: Any, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The output, and the marks [B, KV heads, T, blocks] of what is handed on."""
    call.wanted = frozenset({("indices", 0)})
    y, given = mixer(x, call), call.given["indices"]
    if given.dtype == torch.bool:
        return y, given
    held = call.cache.get_seq_length() + x.shape[1]
    blocks = torch.arange(-(-held // mixer.selection["block"]))
    return y, (given[..., None] == blocks).any(-2)


def marks_in_pieces(mixer: Any, x: Tensor, cuts: tuple[int, ...], told: dict[str, Tensor]) -> Any:
    """Outputs, marks of each call and the cache, of `x` in pieces; `told` of all tokens: real, written."""
    cache, start, found = mixer.new_cache(), 0, []
    for end in cuts:
        call = call_at(start, end - start, cache)
        if "real" in told:
            call.padding, call.key_padding = told["real"][:, start:end], told["real"][:, :end]
        if "written" in told:
            call.written = told["written"][:, start:end]
        found.append(chosen_by(mixer, x[:, start:end], call))
        cache.advance(end - start)
        start = end
    return found, cache


def told_of(what: str) -> dict[str, Tensor]:
    """Padding of 9 and of 2 tokens; marks of what is written, some blocks without a key among them."""
    told = {}
    if "padding" in what:
        told["real"] = torch.arange(LENGTH) >= torch.tensor([[9], [2]])
    if "written" in what:
        told["written"] = (torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5).double()
        told["written"][:, 8:24] = 0.0
    return told


@torch.no_grad()
@every_form
@pytest.mark.parametrize("what", ["all", "padding", "written", "padding and written"])
def test_a_step_chooses_what_a_pass_without_a_cache_does(how: dict[str, Any], what: str) -> None:
    mixer, x, told = chooser(how), noise(2, LENGTH, HIDDEN), told_of(what)
    real, call = told.get("real"), call_at(0, LENGTH)
    call.padding = call.key_padding = real
    call.written = told.get("written")
    whole, marks = chosen_by(mixer, x, call)
    found, cache = marks_in_pieces(mixer, x, CUTS, told)
    kept = torch.ones(2, LENGTH, dtype=torch.bool) if real is None else real
    start = 0
    for end, (y, chosen) in zip(CUTS, found, strict=True):
        rows = kept[:, start:end]
        assert (y - whole[:, start:end])[rows].abs().max() < EXACT
        wanted = marks[:, :, start:end, : chosen.shape[-1]].transpose(1, 2)
        assert torch.equal(chosen.transpose(1, 2)[rows], wanted[rows])
        start = end
    assert ("means.held" in cache.tensors()) == (what != "all" and how["block"] == 8)


@torch.no_grad()
@every_form
def test_padding_on_the_right_of_a_prompt_counts_in_no_mean(how: dict[str, Any]) -> None:
    mixer, x, real = chooser(how), noise(2, LENGTH, HIDDEN), torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, 17:40] = False
    call = call_at(0, LENGTH)
    call.padding = call.key_padding = real
    whole, marks = chosen_by(mixer, x, call)
    other = torch.where(real[..., None], x, noise(2, LENGTH, HIDDEN, seed=5))
    found, _ = marks_in_pieces(mixer, other, (40, *range(41, LENGTH + 1)), {"real": real})
    for end, (y, chosen) in zip(range(41, LENGTH + 1), found[1:], strict=True):
        assert torch.equal(chosen, marks[:, :, end - 1 : end, : chosen.shape[-1]])
        assert (y - whole[:, end - 1 : end]).abs().max() < EXACT


@torch.no_grad()
@every_form
def test_the_means_are_those_of_all_keys(how: dict[str, Any]) -> None:
    mixer, x = chooser(how), noise(2, LENGTH, HIDDEN)
    cache = marks_in_pieces(mixer, x, CUTS, {})[1]
    held, parts = cache.tensors(), mixer.rule.parts(how["block"])
    places = Places(how["block"], LENGTH, None, x.device)
    whole, first = means_of(held["tokens.keys"], places, parts, weights=None, new=LENGTH)
    assert first == 0
    assert torch.equal(held["means.means"], whole.keys)
    site, selection = SpecSite(HIDDEN), Selection(**how)
    counted = Attention(heads=4, kv_heads=2, selection=selection).state_bytes(site, LENGTH, 8)
    assert 2 * counted == cache_bytes([cache])
    assert whole.keys.shape[2] == (15 if how["block"] == 4 else 29)


@torch.no_grad()
@every_form
def test_a_step_reads_no_keys_to_choose(how: dict[str, Any]) -> None:
    mixer, x = chooser(how), noise(2, LENGTH, HIDDEN)
    # One more token completes no part.
    cut, found = 56, []
    for change in (0.0, 5.0):
        cache = marks_in_pieces(mixer, x, (cut,), {})[1]
        cache.parts["tokens"].keys += change * noise(*cache.parts["tokens"].keys.shape, seed=7)
        found.append(chosen_by(mixer, x[:, cut : cut + 1], call_at(cut, 1, cache)))
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[1][0])


@torch.no_grad()
@every_form
def test_rows_are_ordered_chosen_and_repeated_with_their_means(how: dict[str, Any]) -> None:
    mixer, x, cut = chooser(how), noise(2, LENGTH, HIDDEN), 45
    whole = mixer(x, call_at(0, LENGTH))
    cache = marks_in_pieces(mixer, x, (cut,), {})[1]
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 0, 3]))
    rows, order = [0, 1, 0], x[[0, 1, 0]]
    for t in range(cut, LENGTH):
        y = mixer(order[:, t : t + 1], call_at(t, 1, cache, rows=3))
        assert (y - whole[rows, t : t + 1]).abs().max() < EXACT
        cache.advance(1)


@torch.no_grad()
@every_form
@pytest.mark.parametrize("what", ["all", "padding", "written"])
def test_what_is_cropped_is_completed_anew(how: dict[str, Any], what: str) -> None:
    mixer, told, cut = chooser(how), told_of(what), 50
    x, other = noise(2, LENGTH, HIDDEN), noise(2, LENGTH, HIDDEN, seed=9)
    mixed = torch.cat((x[:, :37], other[:, 37:]), dim=1)
    wanted = marks_in_pieces(mixer, mixed, CUTS, told)[0]
    cache = marks_in_pieces(mixer, x, (20, cut), told)[1]
    assert cache.is_croppable
    cache.crop(37 - cut)
    assert cache.get_seq_length() == 37
    held = cache.tensors()["means.means"].shape[2]
    assert held == mixer.rule.parts(how["block"]).complete(37)
    for t, (y, marks) in [(end - 1, one) for end, one in zip(CUTS, wanted, strict=True) if end > 37]:
        call = call_at(t, 1, cache)
        if "real" in told:
            call.padding, call.key_padding = told["real"][:, t : t + 1], told["real"][:, : t + 1]
        call.written = told["written"][:, t : t + 1] if "written" in told else None
        found, chosen = chosen_by(mixer, mixed[:, t : t + 1], call)
        assert torch.equal(chosen, marks)
        assert (found - y).abs().max() < EXACT
        cache.advance(1)
    cache.reset()
    assert cache.tensors() == {}
    again = mixer(x[:, :9], call_at(0, 9, cache))
    assert (again - mixer(x[:, :9], call_at(0, 9))).abs().max() < EXACT


@torch.no_grad()
def test_a_dense_prompt_leaves_the_means_that_its_steps_choose_by() -> None:
    how = {**MEAN, "decode_only": True}
    mixer, plain, x = chooser(how), chooser(MEAN), noise(2, LENGTH, HIDDEN)
    cache = mixer.new_cache()
    mixer(x[:, :50], call_at(0, 50, cache))
    cache.advance(50)
    wanted = marks_in_pieces(plain, x, (50,), {})[1].tensors()["means.means"]
    assert torch.equal(cache.tensors()["means.means"], wanted)
    steps = marks_in_pieces(plain, x, (50, 51), {})[0]
    got = chosen_by(mixer, x[:, 50:51], call_at(50, 1, cache))
    assert all(torch.equal(*pair) for pair in zip(got, steps[-1], strict=True))


@torch.no_grad()
def test_who_reads_the_keys_of_another_layer_keeps_means_of_them() -> None:
    taker, x = chooser(MEAN, keys_from="full"), noise(2, LENGTH, HIDDEN)
    keys, values = noise(2, 2, LENGTH, 6, seed=3), noise(2, 2, LENGTH, 6, seed=4)

    def handed(end: int) -> dict[Any, Tensor]:
        return {("keys", "full"): keys[:, :, :end], ("values", "full"): values[:, :, :end]}

    whole, cache = taker(x, call_at(0, LENGTH, handed=handed(LENGTH))), taker.new_cache()
    for start, end in ((0, 40), *((t, t + 1) for t in range(40, LENGTH))):
        y = taker(x[:, start:end], call_at(start, end - start, cache, handed=handed(end)))
        assert (y - whole[:, start:end]).abs().max() < EXACT
        cache.advance(end - start)
    assert set(cache.tensors()) == {"means.means"}
    spec = Attention(heads=4, kv_heads=2, keys_from="full", selection=Selection(**MEAN))
    assert 2 * spec.state_bytes(SpecSite(HIDDEN), LENGTH, 8) == cache_bytes([cache])


@torch.no_grad()
@pytest.mark.parametrize("context", [62, 63])
def test_a_step_that_repeats_completes_its_part_in_place(context: int) -> None:
    mixer, x = chooser(MEAN), noise(2, 1, HIDDEN)
    cache = mixer.filled_cache(2, context, x)
    assert isinstance(cache, CompositeLayer)
    kept = cache.parts["means"]
    assert isinstance(kept, MeansLayer)
    before, place = kept.means().keys.clone(), kept.means().keys.data_ptr()
    first, again = (mixer(x, call_at(context, 1, cache)) for _ in range(2))
    assert torch.equal(first, again)
    after = kept.means().keys
    assert after.data_ptr() == place
    assert torch.equal(after[:, :, :15], before[:, :, :15])
    # The 64th token completes a block.
    assert torch.equal(after[:, :, 15:], before[:, :, 15:]) == (context == 62)
    cache.advance(1)
    assert cache.get_seq_length() == context


@torch.no_grad()
def test_of_bfloat16_means_are_rounded_once_and_a_step_chooses_by_the_same() -> None:
    k, q = noise(2, 2, 64, 16, dtype=torch.bfloat16), noise(2, 4, 64, 16, seed=2, dtype=torch.bfloat16)
    places = Places(8, 64, None, k.device)
    found = means_of(k, places, Parts(8, 1), weights=None, new=64)[0]
    assert torch.equal(found.keys, k.float().view(2, 2, 8, 8, 16).mean(3).to(torch.bfloat16))
    rule = chooser({**MEAN, "block": 8}).rule
    whole = choose_blocks(q, k, places, rule)[:, :, -1:]
    step = choose_for_step(q[:, :, -1:], k, places, rule, means=found)
    assert torch.equal((step[..., None] == torch.arange(8)).any(-2), whole)


@torch.no_grad()
@pytest.mark.parametrize("how", [MEAN, KERNELS])
def test_beams_behind_padding_are_those_without_a_cache(how: dict[str, Any]) -> None:
    mixer = {"kind": "attention", "heads": 4, "kv_heads": 2, "selection": how}
    model = shaken(build(model_with(mixer, HIDDEN, layers=2)))
    ids, mask = tokens(21, vocabulary=9), torch.ones(2, 21, dtype=torch.int64)
    ids[0, :6] = mask[0, :6] = 0
    given = {
        "attention_mask": mask,
        "max_new_tokens": 30,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 0,
    }
    cached, plain = (model.generate(ids, **given, use_cache=one) for one in (True, False))
    assert torch.equal(cached, plain)
    assert cached.shape[1] > 40

"""Mixture-of-Head: gates against a loop over tokens, what they are on, how they are learned and balanced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from toys import EXACT, EXAMPLES, call_at, mixer_of, model_with, noise, padded_call, tokens

from heddle.compose.build import build
from heddle.compose.cache import Call
from heddle.compose.mixers.moh import MohModule
from heddle.errors import HeddleErrors
from heddle.specs import MIXERS, load, loads, spec_hash
from heddle.specs.layer import Site as SpecSite

HIDDEN, LENGTH = 24, 17
SITE = SpecSite(HIDDEN, 1, 3)
SOFTMAX: dict[str, Any] = {"kind": "attention", "heads": 6, "kv_heads": 2}
GDN: dict[str, Any] = {"kind": "gated_deltanet", "heads": 2, "value_heads": 6, "head_dim": 8}
RETNET: dict[str, Any] = {"kind": "decay_attention", "heads": 6, "form": "retnet"}
kinds = pytest.mark.parametrize("mixer", [SOFTMAX, GDN, RETNET], ids=lambda one: one["kind"])
# Of six heads: shared ones and active ones of the others; every way through the router.
counts = pytest.mark.parametrize(("shared", "active"), [(0, 2), (1, 3), (2, 4), (3, 1), (6, 0)])


def spec_of(mixer: dict[str, Any], shared: int, active: int, **fields: Any) -> Any:
    return MIXERS["moh"].model_validate({"mixer": mixer, "shared_heads": shared, "active": active, **fields})


def moh_of(mixer: dict[str, Any], shared: int, active: int, **fields: Any) -> Any:
    return mixer_of(HIDDEN, "moh", mixer=mixer, shared_heads=shared, active=active, **fields)


def whole(length: int = LENGTH) -> Call:
    return call_at(0, length)


def padded(pad: int) -> Call:
    return padded_call(torch.arange(LENGTH)[None] >= torch.tensor([[pad], [0]]))


def probabilities(row: Tensor, weight: Tensor) -> list[Tensor]:
    powers = [(weight[index] @ row).exp() for index in range(len(weight))]
    return [one / torch.stack(powers).sum() for one in powers]


def chosen_of(p: list[Tensor], active: int) -> list[int]:
    return sorted(range(len(p)), key=lambda index: (-p[index].item(), index))[:active]


def oracle_gates(moh: Any, row: Tensor, shared: int, active: int) -> list[Tensor]:
    """The factors of one token, head by head."""
    one = torch.ones((), dtype=torch.float64)
    found = [one] * shared
    if shared > 1:
        found = [shared * p for p in probabilities(row, moh.shared_proj.weight)]
    if shared == 6:
        return found
    first, second = (2 * p for p in probabilities(row, moh.split_proj.weight))
    p = probabilities(row, moh.routed_proj.weight)
    on = chosen_of(p, active)
    total = torch.stack([p[index] for index in on]).sum()
    routed = [active * p[index] / total if index in on else 0 * one for index in range(len(p))]
    return [first * gate for gate in found] + [second * gate for gate in routed]


def oracle(moh: Any, x: Tensor, shared: int, active: int) -> Tensor:
    """Every head through its own rows of the output projection, token by token."""
    seen: list[Tensor] = []
    # Heads before any gate: those of the mixer by itself.
    hook = moh.mixer.heads_out.register_forward_hook(lambda _, __, heads: seen.append(heads))
    moh.mixer(x, whole(x.shape[1]))
    hook.remove()
    heads, size = seen[0], seen[0].shape[-1]
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            gates = oracle_gates(moh, x[b, t], shared, active)
            blocks = [moh.mixer.o_proj.weight[:, size * h : size * (h + 1)] for h in range(6)]
            rows.append(sum(gates[h] * (blocks[h] @ heads[b, t, h]) for h in range(6)))
    return torch.stack(rows).view_as(x)


@kinds
@counts
def test_outputs_are_those_of_a_loop_over_tokens_and_heads(
    mixer: dict[str, Any], shared: int, active: int
) -> None:
    moh, x = moh_of(mixer, shared, active), noise(2, LENGTH, HIDDEN)
    assert (moh(x, whole()) - oracle(moh, x, shared, active)).abs().max() < EXACT
    gates = moh.gates(x, whole())
    assert gates.shape == (2, LENGTH, 6)
    on = (gates > 0).sum(-1)
    assert on.unique().tolist() == [shared + active]
    assert (gates[..., :shared] > 0).all()


@kinds
@counts
def test_gradients_are_those_of_the_loop(mixer: dict[str, Any], shared: int, active: int) -> None:
    moh, x, aim = moh_of(mixer, shared, active), noise(2, 5, HIDDEN), noise(2, 5, HIDDEN, seed=7)
    x.requires_grad_()
    tensors = [x, *moh.parameters()]
    found = torch.autograd.grad((moh(x, whole(5)) * aim).sum(), tensors)
    expected = torch.autograd.grad((oracle(moh, x, shared, active) * aim).sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < EXACT


@kinds
def test_the_gradient_of_the_router_is_a_slope(mixer: dict[str, Any]) -> None:
    moh, x, aim = moh_of(mixer, 2, 3), noise(2, LENGTH, HIDDEN), noise(2, LENGTH, HIDDEN, seed=7)
    p = (x @ moh.routed_proj.weight.mT).softmax(-1).sort(descending=True).values
    # Away from ties, where a step cannot change the choice.
    assert (p[..., 2] - p[..., 3]).min() > 1e-4
    step = 1e-6
    for name in ("routed_proj", "split_proj", "shared_proj"):
        weight = getattr(moh, name).weight
        (gradient,) = torch.autograd.grad((moh(x, whole()) * aim).sum(), weight)
        for place in [(0, 0), (1, 7), (1, 23)]:
            sides = []
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    weight[place] += sign * step
                    sides.append((moh(x, whole()) * aim).sum().item())
                    weight[place] -= sign * step
            assert gradient[place].item() == pytest.approx(
                (sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-7
            )


@kinds
@pytest.mark.parametrize("shared", range(7))
def test_a_router_that_knows_nothing_and_turns_nothing_off_is_the_mixer(
    mixer: dict[str, Any], shared: int
) -> None:
    moh, x = moh_of(mixer, shared, 6 - shared), noise(2, LENGTH, HIDDEN)
    routers = [one for one in (moh.routed_proj, moh.split_proj, moh.shared_proj) if one is not None]
    assert len(routers) == 2 * (shared < 6) + (shared > 1)
    for one in routers:
        nn.init.zeros_(one.weight)
    assert (moh.gates(x, whole()) - 1).abs().max() < 1e-14
    assert (moh(x, whole()) - moh.mixer(x, whole())).abs().max() < 1e-13


def test_of_equal_heads_the_first_are_on() -> None:
    moh, x = moh_of(SOFTMAX, 1, 2), noise(2, LENGTH, HIDDEN)
    nn.init.zeros_(moh.routed_proj.weight)
    on = moh.gates(x, whole()) > 0
    assert torch.equal(on, torch.tensor([True, True, True, False, False, False]).expand(2, LENGTH, 6))
    with torch.no_grad():
        # Two that tie for the second place, behind the last one.
        moh.routed_proj.weight[4] = x[0, 0]
    assert (moh.gates(x, whole())[0, 0] > 0).tolist() == [True, True, False, False, False, True]


def test_gates_do_not_tie_when_training_begins() -> None:
    model = build(load(EXAMPLES["moh"]).spec.model, dtype=torch.float64)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mixer.gates_out.register_forward_hook(lambda _, __, gates: seen.append(gates))
    model(torch.arange(80).view(2, 40))
    assert len(seen) == 4
    for gates in seen:
        routed = gates[..., 8:]
        assert len({tuple(one) for one in (routed > 0).flatten(0, 1).tolist()}) > 20
        assert ((routed > 0).float().mean((0, 1)) > 0).all()
        on = routed[routed > 0].view(80, 4)
        assert (on.sort(-1).values.diff(dim=-1) > 0).all()


def losses_of(moh: Any, x: Tensor, call: Call) -> list[tuple[str, Tensor, float]]:
    moh(x, call)
    return call.losses


@kinds
@pytest.mark.parametrize("pad", [0, 6])
def test_the_balance_loss_is_that_of_real_tokens(mixer: dict[str, Any], pad: int) -> None:
    moh, x = moh_of(mixer, 2, 3, balance=0.5), noise(2, LENGTH, HIDDEN)
    assert losses_of(moh, x, whole()) == []
    (name, loss, factor), busiest = losses_of(moh.train(), x, padded(pad))
    assert (name, factor) == ("moh_balance", 0.5)
    p_sum, on_sum, tokens = [0.0] * 4, [0.0] * 4, 0
    for b in range(2):
        for t in range(pad if b == 0 else 0, LENGTH):
            p = probabilities(x[b, t], moh.routed_proj.weight)
            for index in range(4):
                p_sum[index] += p[index].item()
                on_sum[index] += float(index in chosen_of(p, 3))
            tokens += 1
    expected = 4 * sum(p_sum[index] / tokens * on_sum[index] / tokens for index in range(4))
    share = sum(sorted(on_sum)[1:]) / (3 * tokens)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert busiest == ("busiest_heads", pytest.approx(share, rel=1e-12), 0.0)
    if pad == 0:
        (_, loss, _), _ = losses_of(moh, x, whole())
        assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_balance_loss_of_even_shares_is_the_number_of_active_heads() -> None:
    moh, x = moh_of(SOFTMAX, 2, 3).train(), noise(2, LENGTH, HIDDEN)
    nn.init.zeros_(moh.routed_proj.weight)
    (_, loss, factor), _ = losses_of(moh, x, whole())
    assert loss.item() == pytest.approx(3)
    assert factor == 0.01
    assert losses_of(moh_of(SOFTMAX, 6, 0).train(), x, whole()) == []


def test_the_balance_loss_teaches_through_the_probabilities_alone() -> None:
    moh, x = moh_of(SOFTMAX, 2, 2).train(), noise(2, LENGTH, HIDDEN)
    (_, loss, _), _ = losses_of(moh, x, whole())
    loss.backward()
    p = (x @ moh.routed_proj.weight.detach().mT).softmax(-1)
    first = p.topk(2).indices
    load = torch.zeros_like(p).scatter(-1, first, 1.0).mean((0, 1))
    of_logits = p * (load - (p * load).sum(-1, keepdim=True)) * 4 / (2 * LENGTH)
    expected = torch.einsum("bti,btd->id", of_logits, x)
    assert (moh.routed_proj.weight.grad - expected).abs().max() < EXACT
    assert moh.split_proj.weight.grad is None


def test_training_on_the_balance_alone_evens_the_load() -> None:
    moh, x = moh_of(SOFTMAX, 2, 1).train(), noise(2, 300, HIDDEN)
    # A feature that is always there, as a bias would be, and a head that has it.
    x[..., 0] = 2.0
    with torch.no_grad():
        moh.routed_proj.weight[0, 0] = 2.0
    optimizer = torch.optim.SGD(moh.routed_proj.parameters(), lr=0.3)
    loads = []
    for _ in range(60):
        call = whole(300)
        gates = moh.gates(x, call)
        loads.append((gates[..., 2:] > 0).double().mean((0, 1)))
        optimizer.zero_grad()
        call.losses[0][1].backward()
        optimizer.step()
    assert loads[0].max() > 0.8
    assert loads[-1].max() < 0.35


def by_norms(shared: int, active: int, **fields: Any) -> Any:
    return moh_of(SOFTMAX | fields, shared, active, router="norms")


@pytest.mark.parametrize("how", [{}, {"qk_norm": True, "gate": True}, {"rope": None, "window": 5}])
@pytest.mark.parametrize(("shared", "active"), [(0, 2), (1, 3), (3, 1), (5, 1), (2, 4)])
def test_without_weights_the_longest_queries_turn_their_heads_on(
    how: dict[str, Any], shared: int, active: int
) -> None:
    moh, x = by_norms(shared, active, **how), noise(2, LENGTH, HIDDEN)
    seen: list[Tensor] = []
    moh.gates_out.register_forward_hook(lambda _, __, gates: seen.append(gates))
    moh.mixer.heads_out.register_forward_hook(lambda _, __, heads: seen.append(heads))
    y = moh(x, whole())
    gates, heads = seen
    size, rows = 4, moh.mixer.q_proj.weight.view(6, -1, HIDDEN)
    assert {name.split(".")[0] for name, _ in moh.named_parameters()} == {"mixer"}
    plain: list[Tensor] = []
    hook = moh.mixer.heads_out.register_forward_hook(lambda _, __, out: plain.append(out))
    moh.mixer(x, whole())
    hook.remove()
    for b in range(2):
        for t in range(LENGTH):
            lengths = [(rows[h, :size] @ x[b, t]).square().sum().sqrt() for h in range(shared, 6)]
            on = chosen_of(lengths, active)
            wanted = [1.0] * shared + [float(index in on) for index in range(6 - shared)]
            # Exactly 0 and 1: nothing is weighed.
            assert gates[b, t].tolist() == wanted
            assert torch.equal(heads[b, t], plain[0][b, t] * torch.tensor(wanted)[:, None])
            blocks = [moh.mixer.o_proj.weight[:, size * h : size * (h + 1)] for h in range(6)]
            out = sum(wanted[h] * (blocks[h] @ plain[0][b, t, h]) for h in range(6))
            assert (y[b, t] - out).abs().max() < EXACT


def test_the_gradient_goes_straight_through_to_the_share_of_each_length() -> None:
    moh, q, aim = by_norms(2, 2), noise(2, LENGTH, 6, 4), noise(2, LENGTH, 6, seed=7)
    (found,) = torch.autograd.grad((moh.norm_gates(q.requires_grad_(), whole()) * aim).sum(), q)

    def shares(q: Tensor) -> Tensor:
        lengths = q[..., 2:, :].square().sum(-1).sqrt()
        mean = lengths.mean(-1, keepdim=True)
        spread = ((lengths - mean).square().sum(-1, keepdim=True) / 3).sqrt()
        return torch.softmax(lengths / spread, dim=-1)

    (expected,) = torch.autograd.grad((shares(q) * aim[..., 2:]).sum(), q)
    assert (found - expected).abs().max() < EXACT
    assert (found[..., :2, :] == 0).all()
    assert found[..., 2:, :].abs().max() > 0


@pytest.mark.parametrize("shared", [0, 5])
def test_queries_of_equal_length_turn_the_first_heads_on_and_have_gradients(shared: int) -> None:
    moh, q = by_norms(shared, 1), torch.zeros(1, 3, 6, 4, dtype=torch.float64)
    q[:, 1] = 1.0
    gates = moh.norm_gates(q.requires_grad_(), whole(3))
    assert (gates[..., shared:] > 0).flatten(0, 1).tolist() == [[True] + [False] * (5 - shared)] * 3
    gates.square().sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_the_balance_of_lengths_is_told_and_all_heads_on_are_the_mixer() -> None:
    moh, x = by_norms(2, 3).train(), noise(2, LENGTH, HIDDEN)
    (name, loss, factor), (busiest, share, nothing) = losses_of(moh, x, padded(4))
    assert (name, factor, busiest, nothing) == ("moh_balance", 0.01, "busiest_heads", 0.0)
    assert 0.75 <= share.item() <= 1
    assert 0 < loss.item() < 4
    moh = by_norms(2, 4)
    assert torch.equal(moh(x, whole()), moh.mixer(x, whole()))


def test_lengths_cost_nothing_and_are_those_of_attention_alone() -> None:
    spec, inner = spec_of(SOFTMAX, 2, 3, router="norms"), MIXERS["attention"].model_validate(SOFTMAX)
    assert spec.params(SITE) == inner.params(SITE)
    assert spec.flops(SITE, 30) == inner.flops(SITE, 30)
    for mixer in (GDN, RETNET):
        (problem,) = spec_of(mixer, 2, 3, router="norms").problems(SITE)
        assert (problem.field, problem.code) == ("router", "conflicting-fields")
        assert problem.what == f"{mixer['kind']} has no query of its own for each head"


def test_gates_stay_wide_in_a_narrow_model() -> None:
    moh, x = moh_of(SOFTMAX, 2, 3).bfloat16(), noise(2, LENGTH, HIDDEN).bfloat16()
    assert moh.gates(x, whole()).dtype == torch.float32
    assert moh(x, whole()).dtype == torch.bfloat16
    assert moh_of(SOFTMAX, 1, 5).bfloat16().gates(x, whole()).dtype == torch.float32


@kinds
@counts
def test_costs_are_those_of_the_mixer_and_of_the_router(
    mixer: dict[str, Any], shared: int, active: int
) -> None:
    spec, inner = spec_of(mixer, shared, active), MIXERS[mixer["kind"]].model_validate(mixer)
    routed = 6 - shared
    router = HIDDEN * ((routed + 2) * (routed > 0) + shared * (shared > 1))
    assert spec.params(SITE) - inner.params(SITE) == router
    assert spec.flops(SITE, 30) - inner.flops(SITE, 30) == 2 * router
    assert spec.prefill_flops(SITE, 30) - inner.prefill_flops(SITE, 30) == 2 * router
    assert spec.state_bytes(SITE, 30, 2) == inner.state_bytes(SITE, 30, 2)
    moh, x = moh_of(mixer, shared, active), noise(2, LENGTH, HIDDEN)
    flops = []
    for one in (moh, moh.mixer):
        with FlopCounterMode(display=False) as counter:
            one(x, whole())
        flops.append(counter.get_total_flops())
    assert flops[0] - flops[1] == 2 * router * 2 * LENGTH


def test_a_balance_that_nothing_is_asked_for_computes_nothing() -> None:
    def hash_of(shared: int, active: int, **fields: Any) -> str:
        mixer = {"kind": "moh", "mixer": SOFTMAX, "shared_heads": shared, "active": active, **fields}
        return spec_hash(model_with(mixer, HIDDEN))

    assert hash_of(6, 0) == hash_of(6, 0, balance=0.5)
    assert hash_of(2, 2) == hash_of(2, 2, balance=0.01)
    assert len({hash_of(2, 2), hash_of(2, 3), hash_of(3, 2), hash_of(2, 2, balance=0.0)}) == 4


TEXT = EXAMPLES["moh"].read_text()
FIRST = "        shared_heads: 8\n        active: 4\n"


@pytest.mark.parametrize(
    ("old", "new", "field", "what", "hint"),
    [
        (
            FIRST,
            FIRST.replace("8", "17"),
            "shared_heads",
            "17 shared heads, and the mixer has 16",
            "at most 16",
        ),
        (
            FIRST,
            FIRST.replace("4", "9"),
            "active",
            "9 active heads of the 8 that are not shared",
            "from 1 to 8",
        ),
        (
            FIRST,
            FIRST.replace("4", "0"),
            "active",
            "0 active heads of the 8 that are not shared",
            "from 1 to 8",
        ),
        (
            FIRST,
            FIRST.replace("8", "16"),
            "active",
            "4 active heads of the 0 that are not shared",
            "active: 0, or fewer shared heads",
        ),
        (
            "{kind: attention, heads: 16, kv_heads: 4}",
            "{kind: parallel, mixers: [{kind: attention, heads: 8}, {kind: attention, heads: 8}]}",
            "mixer.kind",
            "parallel has no heads of its own",
            None,
        ),
        ("kv_heads: 4", "kv_heads: 3", "mixer.kv_heads", "3 does not divide heads 16", "2 or 4 do"),
    ],
)
def test_what_cannot_be_routed_is_told_at_its_line(
    old: str, new: str, field: str, what: str, hint: str | None
) -> None:
    assert old in TEXT
    with pytest.raises(HeddleErrors) as caught:
        loads(TEXT.replace(old, new, 1))
    (error,) = caught.value.errors
    assert (error.where.path, error.what, error.hint) == (f"blocks.softmax.mixer.{field}", what, hint)
    assert error.where.line is not None


def test_the_example_tells_the_mean_balance_of_its_layers() -> None:
    model = build(load(EXAMPLES["moh"]).spec.model).train()
    assert isinstance(model.model.layers[3].mixer, MohModule)
    told = model.model(tokens(40))
    assert set(told.aux_losses) == {"moh_balance", "busiest_heads"}
    assert told.aux_losses["moh_balance"].item() == pytest.approx(4, rel=0.2)
    assert told.aux_loss.item() == pytest.approx(4 * 0.01 * told.aux_losses["moh_balance"].item())

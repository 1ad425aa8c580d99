"""The closed forms of costs, against figures worked out by hand and by counting token by token.

That parameters and cache bytes equal those of the built modules is held by tests/contracts.
"""

from __future__ import annotations

from typing import Any

import pytest

from heddle.specs import CHANNELS, MIXERS, Site

BIG = Site(hidden_size=2048)
MIXER_CASES: list[dict[str, Any]] = [
    {"kind": "attention", "heads": 4},
    {"kind": "attention", "heads": 8, "kv_heads": 2, "qk_norm": True, "gate": True, "window": 9},
    {"kind": "attention", "heads": 4, "window": 1},
    {"kind": "attention", "heads": 4, "kv_heads": 2, "selection": {"block": 8, "count": 4}},
    {"kind": "attention", "heads": 4, "selection": {"block": 4, "count": 5, "source": "pick"}},
    {"kind": "attention", "heads": 4, "kv_heads": 2, "keys_from": "full", "bias": "all"},
    {"kind": "gated_deltanet", "heads": 2, "value_heads": 6, "head_dim": 8, "value_dim": 16, "short_conv": 2},
    {"kind": "decay_attention", "heads": 4, "form": "retnet", "short_conv": 3, "head_dim": 6},
]
# Kinds that tell their cases themselves.
MIXER_CASES += [
    {"kind": kind, **case}
    for kind, schema in MIXERS.items()
    if "cases" in vars(schema)
    for case in schema.cases
]
every_mixer = pytest.mark.parametrize(
    "fields", MIXER_CASES, ids=lambda one: "-".join(str(v) for v in one.values())
)


def mixer(fields: dict[str, Any]) -> Any:
    return MIXERS[fields["kind"]].model_validate(fields)


def test_attention_costs_what_the_sheet_says() -> None:
    # The full layer of Qwen3-Next: 2 KiB of cache a token; projections 2D(2 HQ d + 2 Hkv d) + 2 HQ d D.
    spec = mixer(
        {"kind": "attention", "heads": 16, "kv_heads": 2, "head_dim": 256, "gate": True, "qk_norm": True}
    )
    HQ, HKV, d, D = 16, 2, 256, 2048
    weights = D * (2 * HQ * d + 2 * HKV * d) + HQ * d * D
    assert spec.params(BIG) == weights + 2 * d
    assert spec.cache_bytes_per_token(BIG, 2) == 2048
    assert spec.flops(BIG, 65_535) == 2 * weights + 4 * HQ * d * 65_536
    # A causal pass of T tokens is 2 HQ d T² and a little more, for the diagonal.
    T = 4096
    assert (spec.prefill_flops(BIG, T) - 2 * weights) * T == 2 * HQ * d * T * (T + 1)


def test_gated_deltanet_costs_what_the_sheet_says() -> None:
    spec = mixer({"kind": "gated_deltanet", "heads": 16, "value_heads": 32, "head_dim": 128})
    D, keys, values = 2048, 16 * 128, 32 * 128
    assert spec.params(BIG) == D * (2 * keys + 3 * values + 64) + 4 * (2 * keys + values) + 64 + 128
    # 2 MiB of float32 memory and three taps of the convolution.
    assert spec.state_bytes(BIG, 1, 2) == 32 * 128 * 128 * 4 + 3 * (2 * keys + values) * 2
    outside = 2 * D * (2 * keys + 3 * values + 64) + 2 * 4 * (2 * keys + values)
    assert spec.flops(BIG, 10**6) - outside == 7 * 32 * 128 * 128
    # "Core fwd ~172 kFLOP" a token and head, at C = 64.
    assert (spec.prefill_flops(BIG, 4096) - outside) / 32 == 172_032


def test_decay_attention_costs_what_the_sheet_says() -> None:
    spec = mixer({"kind": "decay_attention", "heads": 16, "head_dim": 128})
    D, width = 2048, 2048
    assert spec.params(BIG) == 5 * D * width + width
    assert spec.flops(BIG, 0) - 10 * D * width == 16 * 5 * 128 * 128
    # "98 kFLOP at C=64" a token and head.
    assert (spec.prefill_flops(BIG, 4096) - 10 * D * width) / 16 == 98_304
    assert spec.state_bytes(BIG, 5, 2) == 16 * 128 * 128 * 4
    assert (
        mixer({"kind": "decay_attention", "heads": 16, "form": "retnet"}).params(BIG) == 5 * D * width + 128
    )


@every_mixer
def test_prefill_is_the_mean_of_what_each_token_sees(fields: dict[str, Any]) -> None:
    spec, site = mixer(fields), Site(48)
    if not spec.is_causal:
        # Nothing is decoded: a token costs what it does in a pass.
        assert spec.flops(site, 63) == pytest.approx(spec.prefill_flops(site, 64), abs=1)
        return
    if fields["kind"] == "liger" and "window" in fields:
        # What the window adds to a recurrence, which costs the same for every token.
        bare = mixer({**fields, "share": 1.0})
        assert bare.flops(site, 0) == bare.flops(site, 100_000)
        assert bare.prefill_flops(site, 64) == bare.prefill_flops(site, 100_000)
        for length in (1, 5, 9, 10, 200):
            tokens = [spec.flops(site, context) - bare.flops(site, context) for context in range(length)]
            added = spec.prefill_flops(site, length) - bare.prefill_flops(site, length)
            assert added == pytest.approx(sum(tokens) / length)
        return
    if fields["kind"] == "mla":
        # A pass may make keys and values that a step does not: beyond a single token it grows with what is seen alone.
        first, window = spec.prefill_flops(site, 1), fields.get("window", 10**9)
        assert first == spec.flops(site, 0)
        for length in (1, 5, 9, 10, 200):
            seen = sum(min(tokens + 1, window) for tokens in range(length)) / length
            grown = (seen - 1) * (spec.prefill_flops(site, 3) - first)
            assert spec.prefill_flops(site, length) == pytest.approx(first + grown)
        return
    if fields["kind"] == "nats_l":
        # A key more for each token, beside a recurrence whose chunks are full from 64 tokens on.
        key = spec.flops(site, 1) - spec.flops(site, 0)
        assert key > 0
        assert spec.flops(site, 100_000) - spec.flops(site, 0) == 100_000 * key
        assert spec.prefill_flops(site, 100_000) - spec.prefill_flops(site, 64) == key * (100_000 - 64) / 2
        return
    if fields["kind"] not in (
        "attention",
        "rat",
        "rf_attention",
        "local_linear_attention",
        "landmark",
        "routing",
        "still",
    ):
        # A state costs the same for every token, whatever the length; chunks are full from 64 tokens on.
        assert spec.prefill_flops(site, 64) == spec.prefill_flops(site, 100_000)
        assert spec.flops(site, 0) == spec.flops(site, 100_000)
        return
    for length in (1, 5, 9, 10, 200):
        tokens = [spec.flops(site, context) for context in range(length)]
        assert spec.prefill_flops(site, length) == pytest.approx(sum(tokens) / length)


@every_mixer
def test_a_cache_grows_by_its_bytes_per_token_until_its_window_is_full(fields: dict[str, Any]) -> None:
    spec, site = mixer(fields), Site(48)
    window = fields.get("window")
    assert spec.state_bytes(site, 0, 2) == 0
    if fields["kind"] == "still":
        # Recent tokens until two chunks but one are held; from then on what stays of a chunk, when the one after it is complete.
        chunk, (keys, values, scores, *far) = spec.chunk, [one for one in spec.states(site) if one.grows]
        recent = sum(one.bytes_per_token(2) for one in (keys, values, scores))
        kept = sum(one.bytes_per_token(2) for one in far) * chunk
        before = spec.state_bytes(site, 2 * chunk - 2, 2)
        assert spec.state_bytes(site, 2 * chunk - 1, 2) - before == recent
        for context in (2 * chunk - 1, 9 * chunk - 1):
            assert spec.state_bytes(site, context + 1, 2) - spec.state_bytes(site, context, 2) == kept
            assert spec.state_bytes(site, context + chunk, 2) == spec.state_bytes(site, context + 1, 2)
        return
    # A part of the cache may stand for several tokens.
    span = max((state.every for state in spec.states(site)), default=1)
    for context in (1, 5, 8, 9, 10, 1000):
        grown = spec.state_bytes(site, context + span, 2) - spec.state_bytes(site, context, 2)
        is_full = window is not None and context >= fields.get("sink_tokens", 0) + window - 1
        assert grown // span == (0 if is_full else spec.cache_bytes_per_token(site, 2))
    assert spec.state_bytes(site, 7, 4) == spec.state_bytes(site, 7, 2) * 2 - sum(
        state.bytes(7, 2) for state in spec.states(site) if state.element
    )


@every_mixer
def test_resolving_changes_no_cost_and_leaves_nothing_open(fields: dict[str, Any]) -> None:
    spec, site = mixer(fields), Site(48)
    resolved = spec.resolved(site)
    assert resolved.resolved(site) == resolved
    assert resolved.problems(site) == spec.problems(site) == []
    for of in (spec, resolved):
        assert of.params(site) == spec.params(site)
        assert of.flops(site, 100) == spec.flops(site, 100)
        assert of.prefill_flops(site, 100) == spec.prefill_flops(site, 100)
    open_still = [name for name, value in resolved.model_dump().items() if value is None]
    assert set(open_still) <= {
        *(
            "rope",
            "q_lora_rank",
            "window",
            "short_conv",
            "softcap",
            "top",
            "budget",
            "dense_first",
            "keys_from",
            "values_from",
            "selection",
            "grid",
            "lower_bound",
            "local",
            "norm_eps",
        )
    }


@pytest.mark.parametrize(
    ("kind", "fields", "width"),
    [
        ("swiglu", {}, 5472),
        ("swiglu", {"ratio": 1.1}, 2256),
        ("swiglu", {"width": 100}, 100),
        ("gelu", {}, 8192),
        ("gelu", {"ratio": 0.0001}, 8),
    ],
)
def test_a_width_follows_from_the_ratio_in_multiples_of_eight(
    kind: str, fields: dict[str, Any], width: int
) -> None:
    spec = CHANNELS[kind].model_validate({"kind": kind, **fields})
    assert spec.runtime(BIG) == {"kind": kind, "width": width}
    matrices = 3 if kind == "swiglu" else 2
    assert spec.params(BIG) == matrices * 2048 * width
    assert spec.flops(BIG) == 2 * spec.params(BIG)
    assert spec.resolved(BIG).params(BIG) == spec.params(BIG)


def test_a_ratio_whose_product_is_a_hair_off_is_not_rounded_up() -> None:
    # 1.1 * 80 is 88.00000000000001 in floating point.
    assert CHANNELS["gelu"].model_validate({"ratio": 1.1}).runtime(Site(80))["width"] == 88


def test_no_channel_block_costs_nothing() -> None:
    spec = CHANNELS["none"].model_validate({})
    assert (spec.params(BIG), spec.flops(BIG), spec.runtime(BIG), spec.is_empty) == (
        0,
        0,
        {"kind": "none"},
        True,
    )

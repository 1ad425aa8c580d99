"""Native classes of transformers: random specs go out, compute the same there, and come back as the same spec."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from native_specs import SPECS, begun, model_spec, ready, without_period, written
from safetensors.torch import load_file, save_file
from torch import Tensor

from heddle.compose.build import build
from heddle.compose.hf.load_native import read_native
from heddle.compose.hf.native import runtime_of
from heddle.compose.hf.native_weights import to_ours, to_theirs
from heddle.compose.hf.verify import TOLERANCE, apart, as_classes_round, rounded_apart
from heddle.compose.plan import plan
from heddle.compose.targets.catalogue import BY_NAME, TARGETS
from heddle.compose.targets.target import Key
from heddle.compose.targets.verdict import runtime_of_spec, verdict
from heddle.errors import HeddleError
from heddle.specs import ModelSpec, spec_hash

# Random specs of every class, and half of the classes; both are drawn by the seed of a run.
DICE = random.Random(os.environ["HEDDLE_TEST_SEED"])
DRAWN = DICE.sample(range(50), 2)
HALF = DICE.sample(sorted(SPECS), -(-len(SPECS) // 2))
SEEDS = [*DRAWN, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(50) if seed not in DRAWN)]
# Classes whose checkpoints others publish most, and one whose writer changes names.
IMPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "smollm3", "olmo_hybrid")
every_target = pytest.mark.parametrize("name", SPECS)


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, told = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), told


def test_every_target_has_specs_here() -> None:
    assert {target.name for target in TARGETS} == {*SPECS}


@pytest.mark.slow
@torch.no_grad()
@every_target
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore")
def test_logits_of_the_weights_that_a_model_begins_with_are_within_1e_5(
    name: str, seed: int, tmp_path: Path
) -> None:
    ours = begun(model_spec(name, seed), seed)
    theirs, _ = loaded(written(ours, name, tmp_path / "out"))
    ids = torch.randint(256, (2, 70), generator=torch.Generator().manual_seed(seed))
    assert apart({"ids": theirs(ids, use_cache=False).logits}, {"ids": ours(ids).logits}) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
@every_target
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore")
def test_a_random_spec_computes_the_same_there_and_comes_back(name: str, seed: int, tmp_path: Path) -> None:
    spec = model_spec(name, seed)
    ours = ready(spec, seed)
    folder = written(ours, name, tmp_path / "out")
    theirs, told = loaded(folder)
    assert type(theirs).__name__ == BY_NAME[name].model_class
    assert not any(told.values()), told
    ids = torch.randint(256, (2, 70))
    expected = ours(ids).logits
    found = {"ids": theirs(ids, use_cache=False).logits}
    if apart(found, {"ids": as_classes_round(ours)(ids).logits}) > TOLERANCE:
        error, allowed = rounded_apart(ours, {"ids": ids}, found, {"ids": expected})
        assert error <= allowed
    prompt = {"input_ids": ids[:1, :9], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    greedy = {**prompt, "max_new_tokens": 64, "do_sample": False}
    tokens = ours.generate(**greedy)
    assert torch.equal(tokens, theirs.generate(**greedy, use_cache=False))
    if not BY_NAME[name].miscounts(plan(spec).runtime()):
        assert torch.equal(tokens, theirs.generate(**greedy))
    back = read_native(folder, name="back")
    assert spec_hash(back.spec.model) == spec_hash(spec)
    assert torch.equal(back.model(ids).logits, expected)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name if name in HALF else pytest.param(name, marks=pytest.mark.long) for name in SPECS]
)
@pytest.mark.filterwarnings("ignore")
def test_seven_layers_without_a_period_compute_the_same_there(name: str, tmp_path: Path) -> None:
    spec = without_period(name)
    ours = begun(spec)
    folder = written(ours, name, tmp_path / "out")
    theirs, _ = loaded(folder)
    ids = torch.randint(256, (2, 70), generator=torch.Generator().manual_seed(0))
    assert apart({"ids": theirs(ids, use_cache=False).logits}, {"ids": ours(ids).logits}) <= 1e-5
    greedy = {
        "input_ids": ids[:1, :9],
        "attention_mask": torch.ones(1, 9),
        "max_new_tokens": 64,
        "do_sample": False,
    }
    tokens = ours.generate(**greedy)
    assert torch.equal(tokens, theirs.generate(**greedy, use_cache=False))
    if not BY_NAME[name].miscounts(runtime_of(ours)):
        assert torch.equal(tokens, theirs.generate(**greedy))
    assert spec_hash(read_native(folder, name="back").spec.model) == spec_hash(spec)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in IMPORTED else pytest.param(name, marks=pytest.mark.long) for name in SPECS]
)
@pytest.mark.filterwarnings("ignore")
def test_what_a_class_writes_itself_is_imported(name: str, tmp_path: Path) -> None:
    spec = model_spec(name, 1)
    ours = ready(spec, 1)
    theirs, _ = loaded(written(ours, name, tmp_path / "out"))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len([*(tmp_path / "theirs").glob("*.safetensors")]) > 1
    back = read_native(tmp_path / "theirs", name="back")
    assert spec_hash(back.spec.model) == spec_hash(spec)
    assert all(torch.equal(one, back.model.state_dict()[key]) for key, one in ours.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rows_cut_wrongly_by_the_writer_of_olmo_hybrid_are_joined_as_the_class_joins_them(
    tmp_path: Path,
) -> None:
    data = SPECS["olmo_hybrid"](random.Random(0))
    data["blocks"]["b"]["mixer"] |= {"heads": 1, "value_heads": 2, "head_dim": 8, "value_dim": 16}
    ours = build(ModelSpec.model_validate(data))
    theirs, _ = loaded(written(ours, "olmo_hybrid", tmp_path / "out"))
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    stored = load_file(file)
    name = next(key for key in stored if key.endswith("q_conv1d.weight"))
    assert stored[name].shape[0] == 16
    back = read_native(tmp_path / "theirs", name="back").model.state_dict()
    assert all(torch.equal(one, back[key]) for key, one in ours.state_dict().items())
    # Of another cut nobody knows what it was.
    other = name.replace("q_conv1d", "k_conv1d")
    rows = torch.cat((stored[name], stored[other]))
    save_file({**stored, name: rows[:10].clone(), other: rows[10:].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(
        HeddleError, match=r"q_conv1d\.weight' is \[10, 1, \d\], the model's is \[8, 1"
    ) as error:
        read_native(tmp_path / "theirs", name="back")
    assert error.value.code == "checkpoint-broken"


@every_target
def test_keys_name_every_tensor_once_and_are_undone_exactly(name: str) -> None:
    spec = model_spec(name, 1)
    ours = build(spec).state_dict()
    config = verdict(BY_NAME[name], plan(spec).runtime()).config
    assert config is not None
    if config["tie_word_embeddings"]:
        del ours["lm_head.weight"]
    keys = [*BY_NAME[name].keys(config)]
    assert sorted(one for key in keys for one in key.ours) == sorted(ours)
    theirs, _ = to_theirs(keys, ours)
    assert len(theirs) == sum(len(key.theirs) for key in keys)
    back, names = to_ours(keys, theirs)
    assert not names.missing
    assert not names.left
    assert all(torch.equal(back[one], ours[one]) for one in ours)


@every_target
@pytest.mark.filterwarnings("ignore")
def test_every_field_of_a_configuration_is_what_its_class_reads(name: str, tmp_path: Path) -> None:
    for seed in range(3):
        config = verdict(BY_NAME[name], plan(model_spec(name, seed)).runtime()).config
        assert config is not None
        (tmp_path / "config.json").write_text(json.dumps(config))
        held = json.loads(hf.AutoConfig.from_pretrained(tmp_path).to_json_string(use_diff=False))
        assert {field: held.get(field) for field in config} == json.loads(json.dumps(config))


def test_rows_interleave_by_group_and_back() -> None:
    key = Key(("a", "b"), ("c",), pieces=((2, 2), (4,)), made=((0, 1, 2),), groups=2)
    ours = {"a": torch.arange(4.0)[:, None], "b": torch.arange(4.0, 8.0)[:, None]}
    theirs, _ = to_theirs([key], ours)
    assert theirs["c"].flatten().tolist() == [0, 2, 4, 5, 1, 3, 6, 7]
    back, _ = to_ours([key], theirs)
    assert all(torch.equal(back[one], ours[one]) for one in ours)


@pytest.mark.parametrize("gain", [0.01, 0.5, 1.25, 2.0, 3.7])
def test_a_gain_less_one_loses_nothing_in_bfloat16(gain: float) -> None:
    ours = {"a": torch.tensor([gain], dtype=torch.bfloat16)}
    key = Key(("a",), ("b",), less=1.0)
    theirs, _ = to_theirs([key], ours)
    back: dict[str, Tensor] = to_ours([key], theirs)[0]
    assert back["a"].to(torch.bfloat16) == ours["a"]


def test_a_norm_that_readers_take_in_two_ways_is_refused() -> None:
    data = SPECS["bamba"](random.Random(0))
    data["blocks"]["b"]["mixer"]["groups"] = 2
    (refused,) = verdict(BY_NAME["bamba"], plan(ModelSpec.model_validate(data)).runtime()).refusals
    assert refused.path.endswith(".mixer.groups")
    assert "readers of this class differ" in refused.why


@every_target
def test_blocks_planned_once_are_the_layers_of_the_whole_plan(name: str) -> None:
    model = plan(model_spec(name, 3)).runtime()
    found = verdict(BY_NAME[name], model)
    assert found.config is not None
    whole = plan(ModelSpec.model_validate(BY_NAME[name].spec(found.config))).runtime()
    assert runtime_of_spec(BY_NAME[name].spec(found.config)) == whole


def test_the_runtime_of_a_model_is_that_of_its_plan() -> None:
    spec = model_spec("gemma3_text")
    assert runtime_of(build(spec)) == plan(spec).runtime()

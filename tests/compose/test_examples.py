"""Every example spec, small: trained, decoded, compiled, checkpointed, under autocast, on the meta device and sharded."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toys import (
    EXACT,
    EXAMPLES,
    checkpoint,
    every_layer,
    example_of,
    gradients,
    in_pieces,
    left_padded,
    small_example,
    tokens,
)

from heddle.compose.build import build
from heddle.compose.hf.card import Card
from heddle.compose.hf.export import _kinds as kinds_of
from heddle.compose.hf.export import export
from heddle.compose.hf.flatten import flatten
from heddle.compose.modules.layer import HeddleLayer
from heddle.compose.train import fit
from heddle.search.tasks import batches, recipe_for, task_of
from heddle.specs import CHANNELS, MIXERS, TextTask, load

DECODERS = [name for name in EXAMPLES if small_example(name).kind == "causal_lm"]
every_example = pytest.mark.parametrize("name", EXAMPLES)
every_decoder = pytest.mark.parametrize("name", DECODERS)
PICKED = ("layer_router",)
# A graph of few operations: within one chunk of a delta rule, within one block of a window.
LENGTH = 12


def decoder_of(name: str) -> Any:
    """The example, where a decision rests on the whole prompt with one that no prompt changes."""
    model = example_of(name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("router.last_weight"):
                parameter.zero_()
    return model


def loss_of(model: Any, ids: Tensor) -> Tensor:
    labels = ids if getattr(model.config, "readout", None) is None else torch.arange(len(ids))
    loss: Tensor = model(ids, labels=labels).loss
    return loss


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.long
@every_decoder
def test_an_example_takes_its_first_steps_at_its_own_length(name: str) -> None:
    spec = load(EXAMPLES[name]).spec
    tokens_of_step = spec.data.sequence_length
    recipe = replace(
        recipe_for(TextTask(), spec.train), tokens=4 * tokens_of_step, batch_tokens=tokens_of_step
    )
    # A loss or a gradient that is not finite ends it.
    fitted = fit(build(spec.model, seed=0), batches(task_of(TextTask(), spec), recipe, "cpu"), recipe)
    assert fitted.losses[-1] < fitted.losses[0]


@every_example
def test_an_example_trains_with_and_without_checkpoints(name: str) -> None:
    model, ids = example_of(name).train(), tokens(70)
    plain = gradients(model, loss_of(model, ids))
    assert plain.keys() == {key for key, _ in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in plain.values())
    still = {re.sub(r"(\.mixers\.\d).*", r"\1", key) for key, one in plain.items() if not one.any()}
    # Where all prompts pick the same mixer nothing trains the other.
    assert len(still) <= (name in PICKED), still
    checkpoint(model)
    for key, gradient in gradients(model, loss_of(model, ids)).items():
        assert torch.equal(gradient, plain[key]), key


@every_decoder
@torch.no_grad()
def test_an_example_decodes_as_it_reads_and_ignores_padding(name: str) -> None:
    model, ids = decoder_of(name), tokens(80)
    whole = model(ids, use_cache=False).logits
    # A prefill, a second piece, single steps.
    assert (in_pieces(model, ids, [67, 70, *range(71, 81)])[0] - whole).abs().max() < EXACT
    padded, mask = left_padded(ids, 9)
    assert (model(padded, attention_mask=mask).logits[:, 9:] - whole).abs().max() < EXACT


@every_decoder
def test_greedy_generation_from_an_example_is_the_same_with_and_without_a_cache(name: str) -> None:
    model, options = decoder_of(name), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    texts = [model.generate(tokens(20), use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*texts)


# Long: that each kind of mixer compiles is held by tests/contracts, that hybrids do by test_compiled.
@pytest.mark.long
@every_example
@torch.no_grad()
def test_an_example_compiles_as_one_graph(name: str) -> None:
    model, ids = example_of(name), tokens(LENGTH)
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (graph(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max() < EXACT


@pytest.mark.long
@every_decoder
@torch.no_grad()
def test_a_decode_step_of_an_example_compiles_as_one_graph(name: str) -> None:
    model, ids = example_of(name), tokens(1)
    cache = model.decode_cache(2, 40)
    step = torch.compile(
        lambda ids: model(ids, past_key_values=cache).logits, fullgraph=True, backend="aot_eager"
    )
    expected = model(ids, past_key_values=cache).logits
    for _ in range(2):
        assert (step(ids) - expected).abs().max() < EXACT


@every_example
def test_an_example_trains_under_autocast(name: str) -> None:
    model, ids = example_of(name).float().train(), tokens(LENGTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, ids)
    for key, gradient in gradients(model, loss).items():
        assert gradient.dtype == torch.float32, key
        assert gradient.isfinite().all(), key


@every_example
def test_an_example_is_built_prefilled_and_stepped_on_the_meta_device(name: str) -> None:
    model = build(small_example(name), device="meta", dtype=torch.bfloat16).eval()
    ids = torch.zeros(2, 70, dtype=torch.int64, device="meta")
    out = model(ids)
    assert out.logits.is_meta
    if name in DECODERS:
        step = model(ids[:, :1], past_key_values=out.past_key_values)
        assert step.logits.is_meta
        assert step.logits.shape == (2, 1, 256)
        assert model(ids[:, :1], past_key_values=model.decode_cache(2, 40)).logits.is_meta


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """One process, as a mesh."""
    meet = tmp_path_factory.mktemp("mesh") / "meet"
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def sharded(model: Any, mesh: DeviceMesh) -> Any:
    made = copy.deepcopy(model)
    for layer in made.modules():
        if isinstance(layer, HeddleLayer):
            fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    return made


@every_example
def test_an_example_sharded_layer_by_layer_trains_as_the_plain_one(name: str, mesh: DeviceMesh) -> None:
    plain = example_of(name).train()
    split, ids = sharded(plain, mesh), tokens(LENGTH)
    for model in (plain, split):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    pairs = list(zip(plain.named_parameters(), split.named_parameters(), strict=True))
    for (key, weight), (other, shard) in pairs:
        assert key == other
        assert isinstance(shard, DTensor)
        # The gradients of a shared weight are summed in another order.
        assert (shard.full_tensor() - weight).abs().max() < EXACT, key


@every_example
def test_the_files_of_an_exported_example_hold_every_kind_that_it_is_made_of(name: str) -> None:
    kinds = kinds_of(example_of(name))
    files = flatten(kinds["mixers"], kinds["channels"])
    written = re.findall(r"kind: (\w+)", EXAMPLES[name].read_text())
    mixers = {kind for kind in written if kind in MIXERS}
    channels = {kind for kind in written if kind in CHANNELS and kind != "none"}
    assert mixers | channels
    assert {f"compose_mixers_{kind}.py" for kind in mixers} <= files.keys()
    assert {f"compose_channel_{kind}.py" for kind in channels} <= files.keys()


@pytest.mark.slow
def test_the_layers_of_all_examples_are_exported_and_found_again_without_heddle(
    tmp_path: Path, random_seed: int, full_counts: bool
) -> None:
    # By default of half of them.
    some = random.Random(random_seed).sample(DECODERS, len(DECODERS) // 2)
    drawn = [name for name in DECODERS if full_counts or name in some]
    print("drawn:", *drawn)
    card = Card("every layer", "version: 1\nname: every-layer\n", license="apache-2.0")
    # Loaded in a clean process, which computes the logits again.
    result = export(build(every_layer(drawn)).eval(), tmp_path / "out", card=card, battery="short")
    assert result.max_difference <= 1e-5


@every_example
def test_an_example_survives_saving_and_loading(name: str, tmp_path: Path) -> None:
    # What checkpoints are written in; rates of decay are read in float32 whatever they were.
    model, ids = example_of(name).float(), tokens(40)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)

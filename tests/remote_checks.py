"""What exported folders promise, in a process without heddle: run as `python -I remote_checks.py TASK.json`.

One function for each promise; it raises where the promise is broken. The task names folders (causal, sharded, encoder), the
logits that are right, a scratch folder, the packages to hide and those that come first on the path, so that any version of
transformers can be asked.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CHECKS: dict[str, Callable[[SimpleNamespace], None]] = {}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
}


class Hidden(MetaPathFinder):
    """A finder that does not find some packages."""

    def __init__(self, finder: Any, names: list[str]) -> None:
        self.finder, self.names = finder, names

    def find_spec(self, fullname: str, *where: Any) -> Any:
        return None if fullname.partition(".")[0] in self.names else self.finder.find_spec(fullname, *where)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def check(function: Callable[[SimpleNamespace], None]) -> Callable[[SimpleNamespace], None]:
    CHECKS[function.__name__] = function
    return function


def load(folder: str, kind: str = "AutoModelForCausalLM", **options: Any) -> Any:
    import torch
    import transformers

    options = {"dtype": torch.float32, **options}
    return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True, **options).eval()


def ids_of(*shape: int) -> Any:
    import torch

    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def padded(lengths: tuple[int, ...]) -> tuple[list[Any], Any, Any]:
    """Rows of these lengths, and the same as one batch with zeros on the left and its mask."""
    import torch

    rows, longest = [ids_of(length) for length in lengths], max(lengths)
    ids = torch.stack([torch.cat((row.new_zeros(longest - len(row)), row)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return rows, ids, mask


@check
def the_logits_are_those_of_the_exporting_process(task: SimpleNamespace) -> None:
    from safetensors.torch import load_file

    right = load_file(task.logits)
    found = load(task.causal)(right["ids"]).logits
    assert (found - right["causal"]).abs().max() <= 1e-5


@check
def generation_is_the_same_with_and_without_a_cache(task: SimpleNamespace) -> None:
    import torch

    model, ids = load(task.causal).double(), ids_of(2, 13)
    for name, mode in MODES.items():
        found = []
        for cached in (True, False):
            torch.manual_seed(3)
            found.append(
                model.generate(
                    ids, use_cache=cached, max_new_tokens=12, min_new_tokens=12, pad_token_id=0, **mode
                )
            )
        assert found[0].shape == (2, 25), name
        assert torch.equal(*found), name


@check
def left_padded_batches_generate_what_each_row_does_alone(task: SimpleNamespace) -> None:
    import torch

    model = load(task.causal).double()
    rows, ids, mask = padded((5, 17, 11))
    for name in ("greedy", "beams"):
        usual = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, **MODES[name]}
        together = model.generate(ids, attention_mask=mask, **usual)
        for row, got in zip(rows, together, strict=True):
            assert torch.equal(model.generate(row[None], **usual)[0, len(row) :], got[ids.shape[1] :]), name


@check
def packed_documents_are_each_what_they_are_alone(task: SimpleNamespace) -> None:
    import torch
    from transformers import DataCollatorWithFlattening

    model = load(task.causal).double()
    rows, _, _ = padded((5, 17, 1, 11))
    alone = torch.cat([model(row[None]).logits for row in rows], dim=1)
    for told in ({}, {"return_position_ids": False, "return_flash_attn_kwargs": True}):
        packed = model(**DataCollatorWithFlattening(**told)([{"input_ids": row.tolist()} for row in rows]))
        # Tables of positions and gates stay in float32.
        assert (packed.logits - alone).abs().max() <= 1e-5, told


@check
def chunked_prefill_and_a_static_cache_generate_the_same(task: SimpleNamespace) -> None:
    import torch

    model = load(task.causal).double()
    _, ids, mask = padded((23, 9))
    usual = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "pad_token_id": 0,
        "do_sample": False,
    }
    plain = model.generate(ids, **usual)
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **usual), plain)
    assert torch.equal(model.generate(ids, cache_implementation="static", **usual), plain)


@check
def a_pass_and_a_step_compile_as_one_graph(task: SimpleNamespace) -> None:
    import torch

    model, ids = load(task.causal), ids_of(2, 12)
    with torch.no_grad():
        plain, exact = model(ids, use_cache=False).logits, load(task.causal).double()(ids).logits
        graph = torch.compile(model, fullgraph=True, backend=task.compiler)
        past = model(ids[:, :11]).past_key_values
        step = graph(input_ids=ids[:, 11:], past_key_values=past, use_cache=True).logits
        for found, part in (
            (graph(input_ids=ids, use_cache=False).logits, slice(None)),
            (step, slice(11, None)),
        ):
            # As in heddle/kernels/accuracy.py: a compiler may round otherwise.
            allowed = 2 * (plain - exact)[:, part].norm() + 2e-6 * exact[:, part].norm()
            assert (found - exact[:, part]).norm() <= allowed
    torch.compiler.reset()


@check
def gradient_checkpointing_leaves_gradients_as_they_are(task: SimpleNamespace) -> None:
    import torch

    ids, found = ids_of(2, 20), []
    for checkpointed in (False, True):
        model = load(task.causal).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.is_gradient_checkpointing
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: one.grad for name, one in model.named_parameters()})
    assert all(grad is not None for grad in found[0].values())
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@check
def tied_weights_stay_tied_in_training_and_on_disk(task: SimpleNamespace) -> None:
    import torch
    from safetensors import safe_open

    model, ids = load(task.causal).train(), ids_of(2, 20)
    optimiser, before = torch.optim.SGD(model.parameters(), lr=0.1), None
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        assert before is None or loss < before
        before = loss
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(f"{task.scratch}/trained")
    with safe_open(f"{task.scratch}/trained/model.safetensors", "pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118 - no mapping
    again = load(f"{task.scratch}/trained")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@check
def shards_load_as_one_file_does(task: SimpleNamespace) -> None:
    import torch

    model, ids = load(task.causal), ids_of(2, 9)
    files = sorted(path.name for path in Path(task.sharded).glob("*.safetensors"))
    assert len(files) >= 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert torch.equal(load(task.sharded)(ids).logits, model(ids).logits)
    assert torch.equal(
        load(task.sharded, "AutoModel")(ids).last_hidden_state, model.model(ids).last_hidden_state
    )
    model.save_pretrained(f"{task.scratch}/shards", max_shard_size="20KB")
    assert len([*Path(task.scratch, "shards").glob("*.safetensors")]) > 1
    assert torch.equal(load(f"{task.scratch}/shards")(ids).logits, model(ids).logits)


@check
def the_bare_model_is_the_one_under_the_head(task: SimpleNamespace) -> None:
    import torch

    model, ids = load(task.causal), ids_of(2, 9)
    bare = load(task.causal, "AutoModel")
    assert torch.equal(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)


@check
def the_encoder_classifies_and_gives_its_hidden_states(task: SimpleNamespace) -> None:
    import torch
    from safetensors.torch import load_file

    right = load_file(task.logits)
    model = load(task.encoder, "AutoModelForSequenceClassification")
    assert (model(right["ids"]).logits - right["encoder"]).abs().max() <= 1e-5
    bare = load(task.encoder, "AutoModel")
    hidden = bare(right["ids"]).last_hidden_state
    assert torch.equal(hidden, model.model(right["ids"], use_cache=False).last_hidden_state)
    model.train()
    labels = torch.tensor([0, 2])
    loss = model(right["ids"], labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert model.classifier.weight.grad.abs().sum() > 0
    rows, ids, mask = padded((5, 9))
    together = model.eval()(ids, attention_mask=mask).logits
    alone = torch.cat([model(row[None]).logits for row in rows])
    assert (together - alone).abs().max() <= 1e-5


@check
def a_model_saved_again_keeps_its_code(task: SimpleNamespace) -> None:
    import torch

    code = {path.name: path.read_text() for path in Path(task.causal).glob("*.py")}
    model, ids = load(task.causal), ids_of(2, 9)
    for number in range(2):
        folder = Path(task.scratch, f"again-{number}")
        (load(str(folder.with_name("again-0"))) if number else model).save_pretrained(folder)
        assert {path.name: path.read_text() for path in folder.glob("*.py")} == code
        config, first = (json.loads(Path(of, "config.json").read_text()) for of in (folder, task.causal))
        assert config["auto_map"] == first["auto_map"]
        assert torch.equal(load(str(folder))(ids).logits, model(ids).logits)
        bare = load(str(folder), "AutoModel")
        assert torch.equal(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)


@check
def a_pipeline_writes_text(task: SimpleNamespace) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(task.causal, trust_remote_code=True)
    pipe = transformers.pipeline("text-generation", model=load(task.causal), tokenizer=tokenizer)
    told = pipe(["def main():", "x"], max_new_tokens=5, do_sample=False, batch_size=2)
    assert told[0][0]["generated_text"].startswith("def main():")
    assert told[1][0]["generated_text"].startswith("x")


@check
def lora_attaches_trains_and_is_merged(task: SimpleNamespace) -> None:
    import peft
    import torch

    model, ids = load(task.causal), ids_of(2, 20)
    plain = model(ids).logits
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config).train()
    assert (tuned.eval()(ids).logits - plain).abs().max() <= 1e-6
    trained = [name for name, one in tuned.named_parameters() if one.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    optimiser = torch.optim.Adam([one for one in tuned.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned.train()(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    adapted = tuned.eval()(ids).logits
    assert (adapted - plain).abs().max() > 1e-3
    tuned.save_pretrained(f"{task.scratch}/adapter")
    again = peft.PeftModel.from_pretrained(load(task.causal), f"{task.scratch}/adapter").eval()
    held, right = again.state_dict(), tuned.state_dict()
    assert held.keys() == right.keys()
    assert all(torch.equal(one, right[name]) for name, one in held.items())
    # Where tensors lie in memory decides how a CPU sums.
    assert (again(ids).logits - adapted).abs().max() <= 1e-5
    assert torch.equal(tuned.generate(input_ids=ids[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0),
                       again.generate(input_ids=ids[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0))  # fmt: skip
    assert (again.merge_and_unload()(ids).logits - adapted).abs().max() <= 1e-4


def main(task: SimpleNamespace) -> None:
    sys.path[:] = task.path
    sys.meta_path[:] = [Hidden(finder, task.hidden) for finder in sys.meta_path]
    import torch
    import transformers

    torch.set_num_threads(1)
    results = {}
    for name, function in CHECKS.items():
        if task.checks and name not in task.checks:
            continue
        try:
            function(task)
            results[name] = "ok"
        # Each promise is told by itself.
        except Exception:
            results[name] = traceback.format_exc()
    imported = sorted(set(task.hidden) & set(sys.modules))
    found = {"results": results, "imported": imported, "transformers": transformers.__version__}
    Path(task.found).write_text(json.dumps({**found, "torch": torch.__version__}))


if __name__ == "__main__":
    main(SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text())))

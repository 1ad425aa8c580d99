"""What an export with its own code promises, in a clean process without heddle: see `remote_checks.py`, one test a promise.

`-m long` asks the same of the oldest transformers that we take and of another between it and the installed one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import remote_checks
import torch
from remote_specs import ready, spec
from safetensors.torch import load_file, save_file
from toys import shaken

from heddle.compose.build import build
from heddle.compose.hf import export as export_file
from heddle.compose.hf.battery import run_battery
from heddle.compose.hf.card import Card
from heddle.compose.hf.checkpoint import INDEX, open_checkpoint
from heddle.compose.hf.export import export
from heddle.compose.hf.shards import size_of, write_weights
from heddle.compose.hf.verify import HIDDEN
from heddle.errors import HeddleError
from heddle.specs import ModelSpec

SCRIPT = Path(remote_checks.__file__)
GLU = {"kind": "swiglu", "width": 40}
ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2, "qk_norm": True}
BLOCKS: dict[str, Any] = {
    "delta": {"mixer": {"kind": "gated_deltanet", "heads": 2}, "channel": GLU},
    "full": {"mixer": ATTENTION, "channel": GLU},
    "lightning": {"mixer": {"kind": "lightning", "heads": 4}, "channel": {"kind": "none"}},
    "local": {"mixer": {**ATTENTION, "window": 6}, "channel": GLU},
    "mamba": {"mixer": {"kind": "mamba2", "heads": 4, "head_dim": 16, "state_dim": 8}, "channel": {"kind": "none"}},
}  # fmt: skip
SIZES = {"vocab_size": 256, "hidden_size": 32, "context_length": 512}
HYBRID = ModelSpec.model_validate({**SIZES, "blocks": BLOCKS, "layers": list(BLOCKS)})
BOTH = {"mixer": {**ATTENTION, "causal": False}, "channel": GLU}
ENCODER = ModelSpec.model_validate(
    {
        **SIZES, "kind": "encoder", "readout": {"kind": "ep", "classes": 3, "queries": 2},
        "blocks": {"both": BOTH}, "layers": ["both", "both"],
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Exports of a hybrid, in one file and in several, and of a classifier; and the logits that are right."""
    base = tmp_path_factory.mktemp("remote")
    return exported(base, shaken(build(HYBRID)).float(), shaken(build(ENCODER)).float())


def exported(base: Path, causal: Any, encoder: Any) -> dict[str, str]:
    """Exports of the two models, and the logits that are right."""
    wanted = {"causal": (causal, "50GB"), "sharded": (causal, "15KB"), "encoder": (encoder, "50GB")}
    with pytest.MonkeyPatch.context() as patch:
        # The checks come after.
        patch.setattr(export_file, "verify", lambda *_, **__: export_file.Verification(0.0, "", "5", "2"))
        for name, (model, size) in wanted.items():
            export(model, base / name, card=Card(name, "version: 1\n"), max_shard_size=size)
    ids = torch.randint(1, 256, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = {"ids": ids, "causal": causal(ids).logits, "encoder": encoder(ids).logits}
    save_file(right, base / "logits.safetensors")
    return {"logits": str(base / "logits.safetensors"), **{name: str(base / name) for name in wanted}}


def ask(folders: dict[str, str], scratch: Path, first: list[str], **more: Any) -> dict[str, Any]:
    """What the promises come to, with the packages in the folders `first` before those of this process."""
    # torch's compiler needs networkx itself.
    hidden = [name for name in HIDDEN if name != "networkx"]
    task = {**folders, "scratch": str(scratch), "found": str(scratch / "found.json"), "hidden": hidden}
    task |= {
        "path": first + [entry for entry in sys.path if entry],
        "checks": [],
        "compiler": "eager",
        **more,
    }
    (scratch / "task.json").write_text(json.dumps(task))
    settings = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf"),
        "HF_MODULES_CACHE": str(scratch / "modules"),
    }
    settings |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", str(SCRIPT), str(scratch / "task.json")],
        cwd=scratch, env={**os.environ, **settings}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((scratch / "found.json").read_text())
    assert found["imported"] == []
    return found


# Ten seconds of tracing; that each kind compiles is tested elsewhere.
COMPILED = "a_pass_and_a_step_compile_as_one_graph"
PROMISES = [name for name in remote_checks.CHECKS if name != COMPILED]


@pytest.fixture(scope="module")
def kept(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How each promise went, with the transformers that is installed."""
    results: dict[str, str] = ask(folders, tmp_path_factory.mktemp("checks"), [], checks=PROMISES)["results"]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("promise", PROMISES)
def test_an_export_keeps_its_promise(kept: dict[str, str], promise: str) -> None:
    assert kept[promise] == "ok", kept[promise]


@pytest.mark.long
@pytest.mark.parametrize("number", range(6))
def test_exports_of_random_specs_keep_them_too(number: int, random_seed: int, tmp_path: Path) -> None:
    seeds = range(random_seed % 1_000_000 + 10 * number, 2_000_000)
    causal = next(seed for seed in seeds if spec(seed).kind == "causal_lm" and spec(seed).tie_embeddings)
    encoder = next(
        seed for seed in seeds if spec(seed).readout is not None and spec(seed).readout.classes > 2
    )
    folders = exported(tmp_path, ready(spec(causal), causal), ready(spec(encoder), encoder))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = ask(folders, scratch, [], checks=PROMISES)["results"]
    assert {name: told for name, told in found.items() if told != "ok"} == {}, (causal, encoder)


@pytest.fixture(scope="module", params=["5.17", "5.19"])
def older(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of packages with an older transformers, and what that asks for in other versions than ours."""
    target = tmp_path_factory.mktemp(f"transformers-{request.param}")
    wanted = [f"transformers=={request.param}.*"]
    wanted += ["huggingface-hub>=1.5,<2", "httpx<1", "httpcore<2"] if request.param == "5.17" else []
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        *wanted,
    ]
    subprocess.run(command, check=True, timeout=600)
    return str(target)


@pytest.mark.long
def test_an_older_transformers_keeps_them_too(folders: dict[str, str], older: str, tmp_path: Path) -> None:
    found = ask(folders, tmp_path, [older], compiler="inductor")
    assert found["transformers"].startswith(Path(older).name.split("-")[1][:4])
    assert {name: told for name, told in found["results"].items() if told != "ok"} == {}
    battery = run_battery(folders["causal"], trusted=True, path=[older])
    assert battery.transformers == found["transformers"]
    assert [row for row in battery.rows if row.verdict == "fail"] == []


@pytest.mark.long
def test_the_installed_transformers_keeps_them_with_inductor(folders: dict[str, str], tmp_path: Path) -> None:
    found = ask(folders, tmp_path, [], compiler="inductor", checks=[COMPILED])
    assert set(found["results"].values()) == {"ok"}


def test_shards_are_indexed_as_transformers_does(folders: dict[str, str]) -> None:
    single, sharded = Path(folders["causal"]), Path(folders["sharded"])
    one, many = open_checkpoint(single), open_checkpoint(sharded)
    assert one.stored.keys() == many.stored.keys()
    assert all(torch.equal(held, many.load([name])[name]) for name, held in one.load().items())
    index = json.loads((sharded / INDEX).read_text())
    stored = one.load().values()
    assert index["metadata"]["total_size"] == sum(held.nbytes for held in stored)
    assert index["metadata"]["total_parameters"] == sum(held.numel() for held in stored)
    for path in sharded.glob("*.safetensors"):
        held = load_file(path)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= size_of("15KB")


def test_a_tensor_larger_than_a_shard_has_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = {"a": torch.zeros(2), "large": torch.zeros(100), "b": torch.zeros(2)}
    write_weights(weights, tmp_path, "16B")
    assert len([*tmp_path.glob("model-0000?-of-00003.safetensors")]) == 3
    assert open_checkpoint(tmp_path).stored.keys() == weights.keys()


@pytest.mark.parametrize("size", ["", "5", "GB", "0GB", "-5GB", "5XB", "1e3MB", "5 0GB"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(HeddleError, match="no size") as error:
        size_of(size)
    assert error.value.code == "bad-argument"


def test_sizes_have_units() -> None:
    assert [size_of(size) for size in ("10B", "2KB", "3 MB", "5gb", "1GiB")] == [
        10,
        2000,
        3 * 10**6,
        5 * 10**9,
        2**30,
    ]

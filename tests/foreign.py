"""Random checkpoints that transformers' own classes write of configurations of their own, imported and compared.

    PYTHONPATH=tests:. python tests/foreign.py --configurations 50 --append --commit SHA

Every second one is stored in bfloat16, in many shards. Each is compared with the weights that its class begins with, and with
weights that all count.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from native_rounding import RESULTS, class_of, in_float64, largest
from torch import nn

from heddle.compose.hf.load_native import read_native
from heddle.compose.hf.parity import error
from heddle.compose.hf.verify import TOLERANCE, as_classes_round, logits_of
from heddle.compose.targets.catalogue import BY_NAME

Fields = dict[str, Any]
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
LAYERS = 3


def rope(some: random.Random, **more: Any) -> Fields:
    """Positions of every kind that the language has, with the fields that the kind may have and those it leaves out."""
    factor, base = some.choice([2.0, 3.5]), {"rope_theta": some.choice([500.0, 1e4, 2e6]), **more}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": some.choice([2.0, 4.0])}
    yarn = some.choice([{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 0.9}])
    return some.choice(
        [
            {"rope_type": "default", **base},
            {"rope_type": "linear", "factor": factor, **base},
            {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 32, **llama3, **base},
            {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 24, **yarn, **base},
        ]
    )  # fmt: skip


def kinds(some: random.Random, *names: str) -> list[str]:
    """Layers of these kinds in any order, each at least once."""
    found = [*names, *(some.choice(names) for _ in range(LAYERS - len(names)))]
    some.shuffle(found)
    return found


def heads(some: random.Random, *, free: bool = False) -> Fields:
    found = {"num_attention_heads": 4, "num_key_value_heads": some.choice([1, 2, 4])}
    return found | ({"head_dim": some.choice([8, 12])} if free else {})


def windows(some: random.Random) -> Fields:
    """Full layers alone, or beside sliding ones."""
    if some.random() < 0.25:
        return {"layer_types": [FULL] * LAYERS, "sliding_window": None, "use_sliding_window": False}
    window = some.choice([3, 20])
    types = kinds(some, FULL, SLIDING) if some.random() < 0.75 else [SLIDING] * LAYERS
    return {"layer_types": types, "sliding_window": window, "use_sliding_window": True}


def llama(some: random.Random) -> Fields:
    biases = {"attention_bias": some.random() < 0.5, "pretraining_tp": 1}
    return heads(some, free=some.random() < 0.5) | biases | {"rope_parameters": rope(some)}


def mistral(some: random.Random) -> Fields:
    window = {"sliding_window": some.choice([None, 6, 300])}
    return heads(some, free=True) | window | {"rope_parameters": rope(some)}


def qwen2(some: random.Random) -> Fields:
    return heads(some) | windows(some) | {"rope_parameters": rope(some)}


def qwen3(some: random.Random) -> Fields:
    return (
        heads(some, free=True)
        | windows(some)
        | {"rope_parameters": rope(some), "attention_bias": some.random() < 0.5}
    )


def delta(some: random.Random) -> Fields:
    count = some.choice([1, 2])
    sizes = {"linear_num_key_heads": count, "linear_num_value_heads": count * some.choice([1, 2])}
    dims = {"linear_key_head_dim": some.choice([8, 12]), "linear_value_head_dim": some.choice([8, 16])}
    return sizes | dims | {"linear_conv_kernel_dim": some.choice([2, 4])}


def qwen_hybrid(some: random.Random) -> Fields:
    positions = rope(some, partial_rotary_factor=some.choice([0.25, 0.5, 1.0]))
    types = kinds(some, FULL, LINEAR) if some.random() < 0.75 else [FULL] * LAYERS
    flags = {"layer_types": types, "attention_bias": some.random() < 0.5, "rope_parameters": positions}
    return heads(some) | {"head_dim": 16} | delta(some) | flags


def qwen_next(some: random.Random) -> Fields:
    found = qwen_hybrid(some)
    if some.random() < 0.3:
        return found | {"num_experts": 0}
    # A single expert, normalised, is refused: nothing teaches its router.
    active = some.choice([1, 2])
    sizes = {"num_experts": 4, "num_experts_per_tok": active, "moe_intermediate_size": 8}
    sizes |= {
        "shared_expert_intermediate_size": some.choice([8, 12]),
        "norm_topk_prob": active > 1 and some.random() < 0.5,
    }
    return found | sizes | some.choice([{}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}])


def olmo_hybrid(some: random.Random) -> Fields:
    positions = some.choice([{"rope_type": "default", "rope_theta": None}, rope(some)])
    flags = {"attention_bias": some.random() < 0.5, "linear_allow_neg_eigval": some.random() < 0.5}
    return (
        heads(some)
        | delta(some)
        | flags
        | {"rope_parameters": positions, "layer_types": kinds(some, FULL, LINEAR)}
    )


def mamba(some: random.Random) -> Fields:
    count = some.choice([2, 4])
    expand = some.choice([1, 2])
    flags = {"mamba_conv_bias": some.random() < 0.5, "mamba_proj_bias": some.random() < 0.5}
    sizes = {
        "mamba_n_heads": count,
        "mamba_d_head": 32 * expand // count,
        "mamba_expand": expand,
        "mamba_n_groups": 1,
    }
    return (
        sizes
        | flags
        | {"mamba_d_state": some.choice([4, 8]), "mamba_d_conv": some.choice([3, 4]), "mamba_chunk_size": 16}
    )


def granite(some: random.Random) -> Fields:
    factors = {
        "embedding_multiplier": some.choice([1.0, 12.0]),
        "logits_scaling": some.choice([1.0, 3.0, 8.0]),
    }
    factors |= {
        "residual_multiplier": some.choice([1.0, 0.22]),
        "attention_multiplier": some.choice([0.35, 0.015625]),
    }
    experts = {"num_local_experts": some.choice([0, 4]), "num_experts_per_tok": 2, "intermediate_size": 8}
    positions = {"position_embedding_type": some.choice(["rope", None]), "rope_parameters": rope(some)}
    found = heads(some) | mamba(some) | factors | experts | positions
    types = kinds(some, FULL, LINEAR)
    return found | {
        "shared_intermediate_size": 24,
        "attention_bias": some.random() < 0.5,
        "layer_types": types,
    }


def bamba(some: random.Random) -> Fields:
    places = sorted(some.sample(range(LAYERS), some.choice([1, 2])))
    positions = rope(some, partial_rotary_factor=0.5)
    return heads(some) | mamba(some) | {
        "attn_layer_indices": places, "attention_bias": some.random() < 0.5, "rope_parameters": positions,
    }  # fmt: skip


def falcon_h1(some: random.Random) -> Fields:
    ssm = mamba(some) | {"mamba_n_groups": some.choice([1, 2])}
    ssm |= {"mamba_d_ssm": ssm["mamba_n_heads"] * ssm["mamba_d_head"], "mamba_expand": 2}
    ssm |= {"mamba_rms_norm": some.random() < 0.5, "mamba_norm_before_gate": some.random() < 0.5}
    ssm |= {"projectors_bias": ssm["mamba_proj_bias"]}
    names = ("embedding", "lm_head", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")
    factors: Fields = {f"{name}_multiplier": some.choice([1.0, 0.4, 1.7]) for name in names}
    factors |= {"mlp_multipliers": some.choice([[1.0, 1.0], [0.9, 0.3]])}
    factors |= {"ssm_multipliers": some.choice([[1.0] * 5, [0.4, 0.25, 0.2, 0.5, 0.35]])}
    return (
        heads(some, free=True)
        | ssm
        | factors
        | {"attention_bias": some.random() < 0.5, "rope_parameters": rope(some)}
    )


def by_type(some: random.Random) -> Fields:
    return {"rope_parameters": {FULL: rope(some), SLIDING: {"rope_type": "default", "rope_theta": 500.0}}}


def olmo3(some: random.Random) -> Fields:
    found = windows(some) | {"sliding_window": 6}
    del found["use_sliding_window"]
    return heads(some) | found | by_type(some) | {"attention_bias": some.random() < 0.5}


def smollm3(some: random.Random) -> Fields:
    turned = some.choice(
        [{"no_rope_layer_interval": 2}, {"no_rope_layers": [0, 1, 1]}, {"no_rope_layers": [0, 0, 0]}]
    )
    return (
        heads(some)
        | windows(some)
        | turned
        | {"attention_bias": some.random() < 0.5, "rope_parameters": rope(some)}
    )


def gemma3(some: random.Random) -> Fields:
    found = windows(some) | {"sliding_window": some.choice([5, 6])}
    del found["use_sliding_window"]
    flags = {"attention_bias": some.random() < 0.5, "query_pre_attn_scalar": some.choice([8, 12, 20])}
    return (
        heads(some, free=True)
        | found
        | by_type(some)
        | flags
        | {"final_logit_softcapping": some.choice([None, 5.0])}
    )


def kimi(some: random.Random) -> Fields:
    latent = {
        "kv_lora_rank": some.choice([6, 20]),
        "q_lora_rank": some.choice([None, 12]),
        "v_head_dim": some.choice([8, 12]),
    }
    latent |= {"qk_nope_head_dim": some.choice([6, 10]), "qk_rope_head_dim": some.choice([2, 4])}
    linear = {"linear_num_heads": some.choice([1, 2]), "linear_head_dim": some.choice([8, 12])}
    linear |= {"linear_conv_kernel_dim": some.choice([2, 4])}
    active = some.choice([1, 2])
    experts = {"num_experts": 4, "num_experts_per_token": active, "moe_intermediate_size": 8}
    experts |= {"num_shared_experts": some.choice([1, 2]), "routed_scaling_factor": some.choice([1.0, 2.446])}
    experts |= {
        "moe_renormalize": active > 1 and some.random() < 0.5,
        "mlp_layer_types": [some.choice(["dense", "sparse"]) for _ in range(LAYERS)],
    }
    found = {"num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": kinds(some, FULL, LINEAR)}
    return found | latent | linear | experts | {"tie_word_embeddings": False, "model_max_length": 512}


def minimax(some: random.Random) -> Fields:
    names = ("full_attn", "linear_attn", "mlp")
    factors = {
        f"{name}_{one}_factor": some.choice([1.0, 3.5, 0.5]) for name in names for one in ("alpha", "beta")
    }
    experts = {
        "num_local_experts": 4,
        "num_experts_per_tok": some.choice([2, 3]),
        "block_size": some.choice([16, 256]),
    }
    types = kinds(some, FULL, LINEAR)
    window = {"sliding_window": some.choice([None, 7])}
    return (
        heads(some, free=True)
        | factors
        | experts
        | window
        | {"layer_types": types, "rope_parameters": rope(some)}
    )


FOREIGN: dict[str, Callable[[random.Random], Fields]] = {
    "llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "qwen3_5_text": qwen_hybrid, "qwen3_next": qwen_next,
    "olmo_hybrid": olmo_hybrid, "granitemoehybrid": granite, "bamba": bamba, "falcon_h1": falcon_h1, "olmo3": olmo3,
    "smollm3": smollm3, "gemma3_text": gemma3, "kimi_linear": kimi, "minimax": minimax,
}  # fmt: skip


def fields_of(name: str, seed: int) -> Fields:
    some = random.Random(f"{name} {seed}")
    common = {
        "vocab_size": 256,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "intermediate_size": some.choice([24, 40]),
    }
    common |= {"rms_norm_eps": some.choice([1e-5, 1e-6, 3e-4]), "tie_word_embeddings": some.random() < 0.5}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "max_position_embeddings": 512}
    return common | ids | FOREIGN[name](some)


def begun(name: str, seed: int, **more: Any) -> Any:
    """A model of the class as it begins, with `more` fields of its configuration."""
    target = BY_NAME[name]
    config = getattr(hf, target.config_class)(**{**fields_of(name, seed), **more})
    torch.manual_seed(seed)
    return getattr(hf, target.model_class)(config).eval()


@torch.no_grad()
def foreign(name: str, seed: int, **more: Any) -> Any:
    """A model of the class whose every weight counts, with `more` fields of its configuration."""
    model, target = begun(name, seed, **more), BY_NAME[name]
    for key, parameter in model.named_parameters():
        if "norm" in key:
            # Of these classes the linear layers' own norm holds its gain as it is.
            less = 0.0 if key.endswith("linear_attn.norm.weight") else target.less
            nn.init.uniform_(parameter, 0.5 - less, 1.5 - less)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
        elif key.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def without_tables(model: Any) -> dict[str, Any]:
    """The weights alone: MiniMax's class computes the tables of its decays where a folder has none."""
    return {
        name: one for name, one in model.state_dict().items() if "decay" not in name and "slope" not in name
    }


@dataclass(frozen=True, slots=True)
class Compared:
    """How far the logits of a class and of what was imported are apart, as the largest difference.

    `begun` between two passes in float32 with the weights that the class begins with. With weights that all count `float32` is
    the same, ours with the class's softplus, `float64` with no float32 left in either but tables of positions, `least` the lesser
    of the two; `bfloat16` is the worst relative norm of 64 tokens' logits of the class in bfloat16 against float64.
    """

    name: str
    seed: int
    begun: float
    float32: float
    float64: float
    bfloat16: float

    @property
    def least(self) -> float:
        """By what it is judged: where float32 rounds weights that all count by more than 1e-5, float64 tells. NaN if one is."""
        return float(np.min([self.float32, self.float64]))

    @property
    def holds(self) -> bool:
        """Whether it is the same model."""
        return self.begun <= TOLERANCE and self.least <= TOLERANCE


def passed_on(model: Any, folder: Path, max_shard_size: str = "5GB") -> tuple[Any, Any]:
    """A model that its class saves, imported, and as its class loads it."""
    # A table that is rounded is refused.
    tensors = without_tables(model) if model.config.model_type == "minimax" else None
    model.save_pretrained(folder, max_shard_size=max_shard_size, state_dict=tensors)
    return read_native(folder, name="back").model, class_of(folder)


@torch.no_grad()
def imported(
    name: str, seed: int, folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB"
) -> Compared:
    """A model of the class, saved by itself into `folder`, imported and compared; both sides compute with the stored weights."""
    ids = torch.randint(1, 256, (2, 70), generator=torch.Generator().manual_seed(seed))
    ours, theirs = passed_on(begun(name, seed).to(dtype), folder / "begun")
    beginning = largest(theirs(ids, use_cache=False).logits, ours(ids).logits)
    ours, theirs = passed_on(foreign(name, seed).to(dtype), folder, max_shard_size)
    (exact,) = logits_of(ours, {"ids": ids}, torch.float64).values()
    apart = largest(theirs(ids, use_cache=False).logits, as_classes_round(ours)(ids).logits)
    narrow = copy.deepcopy(theirs).to(torch.bfloat16)(ids, use_cache=False).logits
    wide = largest(in_float64(theirs, ids), exact)
    return Compared(name, seed, beginning, apart, wide, error(narrow.float(), exact))


def main(options: Any) -> None:
    by_target: dict[str, Any] = {}
    for name in FOREIGN:
        found: list[Compared] = []
        for seed in range(options.configurations):
            with tempfile.TemporaryDirectory() as scratch:
                dtype, size = (torch.bfloat16, "20KB") if seed % 2 else (torch.float32, "5GB")
                found.append(imported(name, seed, Path(scratch), dtype=dtype, max_shard_size=size))
        names = ("begun", "float32", "float64", "least", "bfloat16")
        worst = {one: float(np.max([getattr(held, one) for held in found])) for one in names}
        over = sum(not one.float32 <= TOLERANCE for one in found)
        by_target[name] = {
            "configurations": len(found),
            **worst,
            "over": over,
            "held": sum(one.holds for one in found),
        }
        print(name, by_target[name], flush=True)
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()), "commit": options.commit, "device": "cpu",
        "torch": torch.__version__, "transformers": hf.__version__,
        "command": f"python tests/foreign.py --configurations {options.configurations}", "imports": by_target,
    }  # fmt: skip
    if options.append:
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configurations", type=int, default=5, help="of each class")
    parser.add_argument("--append", action="store_true", help="add a row to the evidence")
    parser.add_argument("--commit", default="")
    main(parser.parse_args())

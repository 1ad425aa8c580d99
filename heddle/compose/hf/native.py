"""Writes a model as a checkpoint of a class of transformers: configuration and weights, no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from heddle import __version__
from heddle.compose.hf.model import HeddlePreTrainedModel
from heddle.compose.hf.native_tables import tables
from heddle.compose.hf.native_weights import to_theirs
from heddle.compose.hf.shards import MAX_SHARD_SIZE, write_weights
from heddle.compose.targets.catalogue import BY_NAME
from heddle.compose.targets.servers import VERSIONS
from heddle.compose.targets.target import Config, Target
from heddle.compose.targets.verdict import require, verdicts
from heddle.errors import HeddleError
from heddle.specs.base import nearest

AUTO, REMOTE = "auto", "remote"
# What tells a native folder of ours from others': nothing else in it does.
MARK = "heddle.json"


def runtime_of(model: HeddlePreTrainedModel) -> dict[str, Any]:
    """The model as `Plan.runtime` gives it."""
    config = model.config
    names = ("vocab_size", "hidden_size", "context_length", "norm_eps")
    factors = ("embedding_multiplier", "logit_multiplier", "logit_softcap")
    data = {name: getattr(config, name) for name in (*names, *factors)}
    data |= {"tie_embeddings": config.tie_word_embeddings, "layers": config.layers}
    return data if config.model_kind == "causal_lm" else {**data, "kind": config.model_kind}


def chosen_target(name: str, model: HeddlePreTrainedModel) -> Target | None:
    """The target of that name; of "auto" the first that holds the model exactly and generates the same with its cache as without,
    beams too; None for remote code.

    Raises:
        HeddleError: "bad-argument" for a name that is no target.
    """
    if name == REMOTE:
        return None
    if name == AUTO:
        fitting = _fitting(model)
        return next((target for target, generates in fitting if generates), None)
    return target_named(name)


def left_by_auto(model: HeddlePreTrainedModel) -> str:
    """Why "auto" takes none of the classes that hold the model exactly, if there are some; else nothing."""
    fitting = _fitting(model)
    if not fitting or any(generates for _, generates in fitting):
        return ""
    name = fitting[0][0].name
    told = f"{name} holds it, but generates otherwise with its cache (heddle show --targets), so it is remote code"
    return f"{told}; --target {name} insists"


def _fitting(model: HeddlePreTrainedModel) -> list[tuple[Target, bool]]:
    """The classes that hold the model exactly, and whether each generates the same with its cache as without."""
    runtime = runtime_of(model)
    targets = [one.target for one in verdicts(runtime) if one.fits]
    return [(one, not one.miscounts(runtime) and not one.loses_beams(runtime)) for one in targets]


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        HeddleError: "bad-argument" if there is none.
    """
    if name in BY_NAME:
        return BY_NAME[name]
    if name in VERSIONS:
        what = f"{name} is a server, and a folder is of a class that it takes"
        raise HeddleError(
            "bad-argument", what, hint="heddle show SPEC --targets says as which class it takes a spec"
        )
    close = nearest(name, [*BY_NAME, AUTO, REMOTE])
    hint = f"did you mean {close}?" if close else f"auto, remote, {', '.join(BY_NAME)}"
    raise HeddleError("bad-argument", f"there is no target {name!r}", hint=hint)


def write_native(
    model: HeddlePreTrainedModel,
    folder: Path,
    target: Target,
    ids: Mapping[str, Any],
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """config.json, generation_config.json, the weights in one file or several; `ids` are those of special tokens.

    Written here and not by transformers: its own writer cuts some tensors at the wrong rows (Olmo Hybrid's convolution).

    Raises:
        HeddleError: "target-mismatch".
    """
    config = require(target, runtime_of(model))
    weights, names = to_theirs(target.keys(config), _weights(model))
    # The plan fits, so that a name which is left over is a mistake of ours.
    assert not names.missing, names.missing
    assert not names.left, names.left
    write_json(folder / "config.json", _file(model, target, config, ids))
    GenerationConfig(**ids).save_pretrained(folder)
    stored = {name: one.clone() for name, one in weights.items()} | tables(target.name, config)
    write_weights(stored, folder, max_shard_size)
    write_json(folder / MARK, {"heddle": __version__, "target": target.name})


def _file(
    model: HeddlePreTrainedModel, target: Target, config: Config, ids: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole of config.json. Ids that are none are written, because some classes have others for those that are absent."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {"architectures": [target.model_class], **config, **ids, "dtype": dtype, "use_cache": True}


def _weights(model: HeddlePreTrainedModel) -> dict[str, Any]:
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    return {name: held.detach().cpu() for name, held in model.state_dict().items() if name not in tied}


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """One of the small files of a folder."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

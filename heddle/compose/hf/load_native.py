"""Reads a checkpoint of a class of transformers as a spec and a model of ours. No code of the folder runs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from heddle.compose.build import build_causal_lm
from heddle.compose.hf.checkpoint import CONFIG, Checkpoint, open_checkpoint
from heddle.compose.hf.generation import Generation, read_generation
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.hf.native_tables import tables, wrong_table
from heddle.compose.hf.native_weights import their_shapes, to_ours
from heddle.compose.plan import plan
from heddle.compose.targets.catalogue import BY_NAME
from heddle.compose.targets.target import ALL_ROWS, IDLE, Config, Factors, Target
from heddle.compose.targets.verdict import verdict
from heddle.errors import HeddleError, Where
from heddle.specs import ModelSpec, Spec, loads, to_yaml
from heddle.specs.spec import VERSION

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Idle fields that are not lost: an export writes its own, and ids are kept beside the spec.
_OWN = frozenset(
    (
        "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Imported:
    """A model read from a folder, its spec, the target that it was, and how it generates; `left` are the fields of its
    configuration that change no logits and were not taken, `ignored` the tensors that its class passes over."""

    target: Target
    spec: Spec
    model: HeddleForCausalLM
    checkpoint: Checkpoint
    generation: Generation
    left: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def note(self) -> str:
        """What else to tell."""
        return self.checkpoint.unused_code


def read_native(folder: Path | str, *, name: str, tokenizer: str = "bytes") -> Imported:
    """The spec and the model of a checkpoint; `name` and `tokenizer` are those of the spec.

    Raises:
        HeddleError: "import-mismatch" for what a spec cannot say, naming the field; "checkpoint-broken", naming the tensor, and
            what else `open_checkpoint` raises.
    """
    checkpoint = open_checkpoint(folder)
    target = _target(checkpoint)
    full, factors = target.folded(_filled_in(target, checkpoint.config, checkpoint.folder))
    spec = _spec(target, full, checkpoint.folder, {"name": name, "tokenizer": tokenizer})
    config, left = _understood(target, full, spec.model, checkpoint.folder)
    generation = read_generation(checkpoint.folder, checkpoint.config, full)
    model = build_causal_lm(spec.model)
    ignored = _load(_Source(target, config, checkpoint, factors), model)
    return Imported(target, spec, model.eval(), checkpoint, generation, left, ignored)


def spec_of_config(
    config: Config, folder: Path, *, name: str, tokenizer: str = "bytes"
) -> tuple[Spec, Config]:
    """The spec of a configuration of a known class, and the configuration as the class reads it; errors name `folder`.

    Raises:
        HeddleError: "import-mismatch" for what a spec cannot say, naming the field.
    """
    target = BY_NAME[config["model_type"]]
    full, _ = target.folded(_filled_in(target, config, folder))
    spec = _spec(target, full, folder, {"name": name, "tokenizer": tokenizer})
    return spec, _understood(target, full, spec.model, folder)[0]


def _target(checkpoint: Checkpoint) -> Target:
    name = checkpoint.config.get("model_type")
    if checkpoint.has_code:
        what = "names code of the folder, which is not run, so that nobody can tell what it computes"
        hint = f"it is of no matter where architectures and model_type are those of a class of transformers: {', '.join(BY_NAME)}"
        raise _mismatch(checkpoint.folder, "auto_map", what, hint)
    if not isinstance(name, str) or name not in BY_NAME:
        raise _mismatch(checkpoint.folder, "model_type", f"is {name!r}: known are {', '.join(BY_NAME)}")
    return BY_NAME[name]


def _filled_in(target: Target, config: Config, folder: Path) -> dict[str, Any]:
    """The configuration with the defaults of its class, in today's spelling."""
    made = getattr(transformers, target.config_class)
    try:
        # The class is known by now, and code that it does not need is no field of it.
        own = {name: value for name, value in config.items() if name != "auto_map"}
        data: dict[str, Any] = made.from_dict(_numbers(own)).to_dict()
    # Its checks raise classes of their own, below no common one.
    except Exception as error:
        raise _mismatch(folder, "", f"is refused by {target.config_class}: {error}") from error
    return data


def _numbers(value: Any) -> Any:
    """JSON has no infinity: transformers writes {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        return (
            float(value["__float__"])
            if {*value} == {"__float__"}
            else {k: _numbers(v) for k, v in value.items()}
        )
    return [_numbers(one) for one in value] if isinstance(value, list) else value


def _spec(target: Target, full: Config, folder: Path, fields: Mapping[str, str]) -> Spec:
    """Written and read again, so that it is a spec that `heddle check` takes."""
    try:
        model = ModelSpec.model_validate(target.spec(full))
        spec = Spec.model_validate({"version": VERSION, **fields, "model": model})
        return loads(to_yaml(spec)).spec
    # A missing key, a size that is none, a spec that is refused: each says what it is.
    except (HeddleError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _mismatch(folder, "", f"cannot be said in a spec: {error}") from error


def _understood(
    target: Target, full: Config, model: ModelSpec, folder: Path
) -> tuple[Config, tuple[str, ...]]:
    """The configuration as the spec gives it back: what does not come back, the spec cannot say, or, if it changes no logits, is
    among those told."""
    found = verdict(target, plan(model).runtime())
    if found.config is None:
        raise _mismatch(folder, "", f"cannot be said in a spec: {'; '.join(map(str, found.refusals))}")
    back, idle = _filled_in(target, found.config, folder), target.idle(full)
    apart = [*_lost(full, back, "")]
    lost = [one for one in apart if not {one[0], one[0].partition(".")[0]} & idle]
    lost = [one for one in lost if ".".join(one[0].split(".")[:2]) not in idle]
    if lost:
        told = "; ".join(f"{path} is {theirs!r}, and a spec says {ours!r}" for path, theirs, ours in lost)
        raise _mismatch(folder, lost[0][0], f"cannot be said in a spec: {told}")
    passed_over = {path.partition(".")[0]: None for path, *_ in apart}
    return {**full, **found.config}, tuple(name for name in passed_over if name in IDLE - _OWN)


def _lost(theirs: Any, ours: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """The deepest fields of theirs that ours has not, or has otherwise."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for name, value in theirs.items():
            yield from _lost(value, ours.get(name), f"{path}.{name}" if path else str(name))
    elif isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)):
        if [*theirs] != [*ours]:
            yield path, theirs, ours
    elif theirs != ours:
        yield path, theirs, ours


@dataclass(frozen=True, slots=True)
class _Source:
    """A checkpoint, and how its tensors are read."""

    target: Target
    config: Config
    checkpoint: Checkpoint
    factors: Factors

    def stored_as(self, name: str) -> str:
        """The name under which a tensor is stored: as published, or as the class itself writes it."""
        if name not in self.checkpoint.stored:
            for published, written in self.target.written.items():
                if name.replace(published, written) in self.checkpoint.stored:
                    return name.replace(published, written)
        return name

    def rows(self) -> dict[str, int]:
        """How many rows each tensor has."""
        return {name: one.shape[0] for name, one in self.checkpoint.stored.items() if one.shape}

    def read(self, wanted: Sequence[str]) -> dict[str, torch.Tensor]:
        """These tensors, times the factors that a spec has in its weights."""
        loaded = self.checkpoint.load([self.stored_as(name) for name in wanted])
        return {name: self._scaled(name, loaded[self.stored_as(name)]) for name in wanted}

    def _scaled(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        pieces = self.factors.get(_inside_layer(name))
        if pieces is None:
            return tensor
        rows = [
            torch.full((len(tensor) if count == ALL_ROWS else count,), factor, dtype=torch.float64)
            for count, factor in pieces
        ]
        return tensor.double() * torch.cat(rows).reshape(-1, *[1] * (tensor.dim() - 1))


def _inside_layer(name: str) -> str:
    """The name of a tensor inside its layer."""
    return name.split(".", 3)[3] if name.startswith("model.layers.") else name


@torch.no_grad()
def _load(source: _Source, model: HeddleForCausalLM) -> tuple[str, ...]:
    """Fill the model, whose tensors in the checkpoint are read a few at a time: no two of it are ever in memory. Gives the names
    of those that the class passes over."""
    target, config, checkpoint = source.target, source.config, source.checkpoint
    tied = config["tie_word_embeddings"]
    keys = [*target.stored_keys(config, source.rows())]
    ours = {name: one for name, one in model.state_dict().items() if not tied or name != HEAD}
    shapes = {name: tuple(shape) for name, shape in their_shapes(keys, ours).items()}
    again = tied and HEAD in checkpoint.stored
    made = {name: one for name, one in tables(target.name, config).items() if name in checkpoint.stored}
    shapes |= {name: tuple(one.shape) for name, one in made.items()}
    shapes |= {HEAD: shapes[EMBEDDING]} if again else {}
    expected = {source.stored_as(name): shape for name, shape in shapes.items()}
    ignored = _ignored(target, config, checkpoint.stored.keys() - expected)
    checkpoint.expect(expected, ignored=ignored)
    for name, one in made.items():
        _check_table(checkpoint.folder, name, one, source.read([name])[name])
    if again and not torch.equal(*source.read([HEAD, EMBEDDING]).values()):
        what = f"is true, and {HEAD} is stored and is another than {EMBEDDING}"
        raise _mismatch(checkpoint.folder, "tie_word_embeddings", what)
    filled = set()
    for key in keys:
        found, left = to_ours([key], source.read(key.theirs))
        assert not left.missing, left.missing
        for name, tensor in found.items():
            ours[name].copy_(tensor)
            filled.add(name)
    assert filled == ours.keys()
    return ignored


def _ignored(target: Target, config: Config, names: Collection[str]) -> tuple[str, ...]:
    """Those of the names that the class passes over as it loads a folder: as its patterns say, and the tables of rotary positions
    that older files have in each layer, if it has one of its own."""
    if not names:
        return ()
    with torch.device("meta"):
        made = getattr(transformers, target.model_class)(
            getattr(transformers, target.config_class).from_dict(dict(config))
        )
    patterns = {*(made._keys_to_ignore_on_load_unexpected or ())}
    if any(name.endswith("rotary_emb.inv_freq") for name, _ in made.named_buffers()):
        patterns.add(r"rotary_emb\.inv_freq")
    return tuple(sorted(name for name in names if any(re.search(one, name) for one in patterns)))


def _check_table(folder: Path, name: str, made: torch.Tensor, stored: torch.Tensor) -> None:
    """That a stored table is the one that follows from the configuration: the class computes with what is stored."""
    if wrong_table({name: made}, {name: stored}) is not None:
        raise _mismatch(folder, name, "is another table than the class computes")
    if wrong_table({name: made}, {name: stored.float()}) is not None:
        told = str(stored.dtype).removeprefix("torch.")
        what = (
            f"is rounded to {told}: the class computes with it as it is, and a spec's decays are not rounded"
        )
        raise _mismatch(folder, name, what, "store its tables of decays in float32, or leave them out")


def _mismatch(folder: Path, field: str, what: str, hint: str | None = None) -> HeddleError:
    told = f"{field} {what}" if field and not what.startswith("cannot") else f"the configuration {what}"
    return HeddleError("import-mismatch", told, where=Where(file=str(folder / CONFIG), path=field), hint=hint)

"""Writes a model as a folder that plain transformers loads, and checks that it does."""

from __future__ import annotations

import copy
import errno
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from heddle.compose.hf.card import KINDS, Card, Checked, ParityRow, render
from heddle.compose.hf.flatten import CONFIG, ENCODER, ENTRIES, MODEL, flatten
from heddle.compose.hf.generation import FILE as GENERATION_CONFIG
from heddle.compose.hf.generation import Generation
from heddle.compose.hf.model import HeddlePreTrainedModel
from heddle.compose.hf.native import (
    AUTO,
    MARK,
    REMOTE,
    chosen_target,
    left_by_auto,
    write_json,
    write_native,
)
from heddle.compose.hf.shards import MAX_SHARD_SIZE, as_umask_leaves, size_of, write_weights
from heddle.compose.hf.tokenizer import BYTES, tokenizer_for
from heddle.compose.hf.verify import AUTO as AUTO_BATTERY
from heddle.compose.hf.verify import Verification, auto_class, check_battery, verify
from heddle.compose.targets.target import Target
from heddle.errors import HeddleError


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Where the folder is, what loading it in a clean process gave, the target it was written for, why not for another that
    "auto" tried, the rows of the battery with the form of it that ran, and from what to what the snippet of the card goes."""

    path: Path
    max_difference: float
    generated_text: str
    transformers: str
    target: str = REMOTE
    note: str = ""
    parity: tuple[ParityRow, ...] = ()
    battery: str = ""
    snippet: str = "from text to text"


def export(
    model: HeddlePreTrainedModel,
    out_dir: Path | str,
    *,
    card: Card,
    tokenizer: str = BYTES,
    overwrite: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
    target: str = REMOTE,
    battery: str = AUTO_BATTERY,
    generation: Generation | None = None,
) -> ExportResult:
    """Writes config, weights, code, tokenizer and card to `out_dir`, all or nothing; `model` is of any kind that has a head.

    `target` is "remote", with the code of the model; the name of a class of transformers (`heddle.compose.targets`), without
    code; or "auto", the first class that holds the model exactly, else "remote".

    The folder is written beside `out_dir`, loaded in a process without heddle, compared, and only then given
    its name; `battery` is the form of the parity battery that it must pass, as of `heddle.compose.hf.verify.verify`. `overwrite`
    replaces an earlier export, and nothing else. Weights of more than `max_shard_size`, as "5GB", are spread over several files.
    `generation` is how the model generates; if not given, with the special tokens of the tokenizer and nothing else.

    Raises:
        HeddleError: "bad-argument", "file-exists", "tokenizer-mismatch", "target-mismatch", "export-mismatch", "disk-full".
    """
    out = Path(out_dir).absolute()
    size_of(max_shard_size)
    check_battery(battery)
    native = chosen_target(target, model)
    note = left_by_auto(model) if target == AUTO and native is None else ""
    _check_free(out, overwrite=overwrite)
    how: dict[str, Any] = {"max_shard_size": max_shard_size, "battery": battery, "generation": generation}
    try:
        return replace(_export(model, out, card, tokenizer, native, **how), note=note)
    except HeddleError as error:
        if target != AUTO or native is None or error.code != "export-mismatch":
            raise
        note = f"as {native.name} it does not pass the check ({error.what}), so it is remote code"
        return replace(_export(model, out, card, tokenizer, None, **how), note=note)


def _export(
    model: HeddlePreTrainedModel,
    out: Path,
    card: Card,
    tokenizer: str,
    native: Target | None,
    *,
    max_shard_size: str,
    battery: str,
    generation: Generation | None,
) -> ExportResult:
    with _folder_beside(out) as folder:
        with _full_disk_told(out):
            made = _write_tokenizer(model, folder, tokenizer)
            ids = _ids(made) if generation is None else generation.ids
            if native is None:
                write_remote(model, folder, ids, max_shard_size)
            else:
                write_native(model, folder, native, ids, max_shard_size)
            if generation is not None and model.can_generate():
                write_json(folder / GENERATION_CONFIG, generation.fields)
        checked = verify(model, folder, trusted=native is None, battery=battery)
        with _full_disk_told(out):
            text = render(card, _checked(model, checked, native))
            (folder / "README.md").write_text(text, encoding="utf-8")
        _give_name(folder, out)
    name = REMOTE if native is None else native.name
    found = (checked.max_difference, checked.generated_text, checked.transformers)
    parity, form, snippet = checked.parity, checked.battery, KINDS[auto_class(model)].snippet
    return ExportResult(out, *found, name, parity=parity, battery=form, snippet=snippet)


def is_export(folder: Path) -> bool:
    """Whether `folder` looks like what `export` writes."""
    marks = ("modeling_heddle.py", "modeling_heddle_encoder.py", MARK)
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in marks)


def _check_free(out: Path, *, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if overwrite and out.is_dir() and is_export(out):
        return
    hint = "--force overwrites it" if out.is_dir() and is_export(out) else "name a new or empty folder"
    raise HeddleError("file-exists", f"{out} is there already", hint=hint)


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A new folder on the same file system as `out`; whatever is left of it at the end is removed."""
    with _full_disk_told(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _give_name(folder: Path, out: Path) -> None:
    """Puts `folder` in the place of `out`, which is absent, empty or an earlier export."""
    # mkdtemp makes folders private.
    folder.chmod(as_umask_leaves(0o777))
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
        out.replace(old)
        folder.replace(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.replace(out)


def _write_tokenizer(model: HeddlePreTrainedModel, folder: Path, tokenizer: str) -> Any:
    config = model.config
    made = tokenizer_for(tokenizer, vocab_size=config.vocab_size, context_length=config.context_length)
    made.save_pretrained(folder)
    return made


def write_remote(
    model: HeddlePreTrainedModel,
    folder: Path,
    ids: Mapping[str, Any],
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """config.json with the spec in it, generation_config.json, the weights and the code; `ids` are those of special tokens."""
    config = copy.deepcopy(model.config)
    names = {"architectures": [type(model).__name__], "auto_map": _auto_map(model)}
    config.update({**ids, **names, "dtype": model.dtype})
    config.save_pretrained(folder)
    if model.can_generate():
        GenerationConfig(**ids).save_pretrained(folder)
    for name, source in source_files(model).items():
        (folder / name).write_text(source, encoding="utf-8")
    write_weights(_weights(model), folder, max_shard_size)


def source_files(model: HeddlePreTrainedModel) -> dict[str, str]:
    """The Python files that a model needs where there is no heddle, by name."""
    kinds = _kinds(model)
    return flatten(kinds["mixers"], kinds["channels"], _entry(model))


def _ids(tokenizer: Any) -> dict[str, int | None]:
    """Special tokens by the names that configurations have for them."""
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def _entry(model: HeddlePreTrainedModel) -> str:
    """The module whose file brings the model's class."""
    return MODEL if model.can_generate() else ENCODER


def _auto_map(model: HeddlePreTrainedModel) -> dict[str, str]:
    """Which class of ours each of transformers' automatic classes loads."""
    file = ENTRIES[_entry(model)]
    return {
        "AutoConfig": f"{ENTRIES[CONFIG]}.HeddleConfig",
        "AutoModel": f"{file}.HeddleModel",
        auto_class(model): f"{file}.{type(model).__name__}",
    }


def _weights(model: HeddlePreTrainedModel) -> dict[str, Tensor]:
    """Every tensor to store; a tied head is its embedding and stored once."""
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    return {
        name: held.detach().cpu().contiguous()
        for name, held in model.state_dict().items()
        if name not in tied
    }


def _kinds(model: HeddlePreTrainedModel) -> dict[str, set[str]]:
    layers = model.config.layers
    return {
        "mixers": {kind for layer in layers for kind in _kinds_in(layer["mixer"])},
        "channels": {layer["channel"]["kind"] for layer in layers},
    }


def _kinds_in(mixer: Mapping[str, Any]) -> Iterator[str]:
    """The kind of a mixer, and those of the mixers that it is made of."""
    yield mixer["kind"]
    inner = mixer.get("mixer")
    for one in [*([inner] if isinstance(inner, Mapping) else []), *mixer.get("mixers", [])]:
        yield from _kinds_in(one)


def _checked(model: HeddlePreTrainedModel, found: Verification, native: Target | None) -> Checked:
    return Checked(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        kinds=tuple(sorted(_kinds(model)["mixers"])),
        max_difference=found.max_difference,
        transformers=found.transformers,
        torch=found.torch,
        auto_class=auto_class(model),
        device=found.device,
        parity=found.parity,
        battery=found.battery,
        native=None if native is None else native.model_class,
    )


@contextmanager
def _full_disk_told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise HeddleError(
            "disk-full", f"no space left to export to {out}", hint="free some, or name another disk"
        ) from error

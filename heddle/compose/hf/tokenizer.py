"""The tokenizer of an export: bytes, or the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from heddle.compose.hf.checkpoint import TOKENIZER_CONFIG, read_json
from heddle.errors import HeddleError, Where

BYTES = "bytes"
CHAT_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# The token of byte 0 and of padding. It is written as itself, so that it takes no other character's place.
NUL = "\x00"


def tokenizer_for(tokenizer: str, *, vocab_size: int, context_length: int) -> Any:
    """The byte tokenizer for "bytes", else the one at that path: a tokenizer.json, or a folder with one.

    Raises:
        HeddleError: "tokenizer-mismatch" if the model has too few rows for it; "file-not-found",
            "file-not-readable"; "untrusted-code" if it brings code of its own.
    """
    made = byte_tokenizer(context_length) if tokenizer == BYTES else _read(Path(tokenizer), context_length)
    if len(made) > vocab_size:
        raise HeddleError(
            "tokenizer-mismatch",
            f"the tokenizer {tokenizer!r} has {len(made)} ids, the model's vocabulary is {vocab_size}",
            where=Where(path="model.vocab_size"),
            hint=f"set model.vocab_size to {len(made)} or more",
        )
    return made


def byte_tokenizer(context_length: int) -> Any:
    """A tokenizer whose ids are the bytes of the UTF-8 text: any text goes through and comes back.

    Byte 0 serves as padding too, which an attention mask tells apart from text.
    """
    vocabulary = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocabulary[NUL] = vocabulary.pop(byte_letters()[0])
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens([AddedToken(NUL, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        pad_token=NUL,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=context_length,
    )


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256)]


def _config_beside(file: Path) -> Path | None:
    """The configuration beside a tokenizer.json, if there is one and it names no code."""
    config = file.with_name(TOKENIZER_CONFIG)
    if file.name != "tokenizer.json" or not config.is_file():
        return None
    if read_json(config).get("auto_map"):
        raise HeddleError(
            "untrusted-code",
            "the tokenizer brings code of its own, which is not run",
            where=Where(path="tokenizer", file=str(config)),
            hint="copy its tokenizer.json to a folder of its own and name that: it is data",
        )
    return config


def _templates(folder: Path) -> dict[str, str]:
    """The chat templates of a folder by their names, that of its own file as "default"."""
    files = {"default": folder / CHAT_TEMPLATE}
    files |= {file.stem: file for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}


def _read(path: Path, context_length: int) -> Any:
    folder = path if path.is_dir() else path.parent
    file = folder / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        hint = f'put its tokenizer.json there, or name another; "{BYTES}" is right where ids are bytes'
        raise HeddleError(
            "file-not-found", f"no tokenizer at {path}", where=Where(path="tokenizer"), hint=hint
        )
    config = _config_beside(file)
    try:
        if config is not None:
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, padding_side="left", trust_remote_code=False
            )
        made = PreTrainedTokenizerFast(
            tokenizer_file=str(file), padding_side="left", model_max_length=context_length
        )
        if file.name == "tokenizer.json" and (templates := _templates(file.parent)):
            # transformers holds one alone as text.
            alone = [*templates] == ["default"]
            made.chat_template = templates["default"] if alone else templates
        return made
    # The Rust side raises bare Exception.
    except Exception as error:
        where = Where(path="tokenizer", file=str(file))
        raise HeddleError("file-not-readable", f"not a tokenizer: {error}", where=where) from error

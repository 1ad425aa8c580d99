"""What a target is: a class of transformers, and one description of it for verdict, configuration and weights.

A description goes both ways, `config` from a model to the class's configuration, `block` and `scalars` back, and is silent
about what the class cannot say. So nothing is taken on trust: a model fits if the way there and back gives the same model, and
a configuration is understood if the way here and back gives the same configuration. A field that is added to the language
later is refused by every target until the target learns it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

# What `Plan.runtime` gives: a model as plain data, everything filled in.
Model = Mapping[str, Any]
Config = Mapping[str, Any]
# Of a tensor's first rows, of the next, …, how many they are and what they are multiplied with; by its name inside a layer.
Factors = Mapping[str, tuple[tuple[int, float], ...]]
ALL_ROWS = -1

# Fields of a configuration that change no logits: token ids, dropout (which only training has), sizes of chunks, first weights,
# the kind of cache, what is returned.
IDLE = frozenset(
    (
        "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "initializer_range",
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "attention_dropout", "pretraining_tp",
        "is_encoder_decoder", "is_decoder", "id2label", "label2id", "problem_type", "return_dict", "output_attentions",
        "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "chunk_size_feed_forward", "num_logits_to_keep",
        "mamba_chunk_size", "z_loss_coefficient", "finetuning_task", "prefix", "cache_implementation", "task_specific_params",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that a target cannot hold: its dotted path in the model, and why."""

    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


@dataclass(frozen=True, slots=True)
class Key:
    """Tensors of ours and the tensors of theirs that hold the same numbers.

    Each of ours is cut into `pieces` of so many rows, and each of theirs is `made` of pieces, by their number. With `groups`
    every piece is cut into so many equal parts, and theirs has the first part of each piece, then the second, … `less` is
    what theirs lacks of ours: 1 where the class adds 1 to the weight of a norm. `middle`: theirs has a dimension of one in
    the middle, as convolutions have; `around`: so many such dimensions before and after all others. `stacked`: ours holds so
    many matrices in one tensor, as experts do, whose rows are those of all of them.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    pieces: tuple[tuple[int, ...], ...] = ()
    made: tuple[tuple[int, ...], ...] = ()
    groups: int = 1
    less: float = 0.0
    middle: bool = False
    around: tuple[int, int] = (0, 0)
    stacked: int = 0

    def below(self, prefix: str) -> Key:
        """The same of a layer, whose names all begin with `prefix`."""
        ours, theirs = (tuple(prefix + name for name in names) for names in (self.ours, self.theirs))
        return replace(self, ours=ours, theirs=theirs)


def same(ours: str, theirs: str, *, less: float = 0.0, middle: bool = False) -> Key:
    """One tensor under two names."""
    return Key((ours,), (theirs,), less=less, middle=middle)


class Target:
    """A class of transformers. `name` is its model_type; `mixers` and `channels` are the kinds that it may hold.

    `why` says, by the path of a field inside a layer or the model, what the class has there whatever is asked.
    """

    name: ClassVar[str]
    config_class: ClassVar[str]
    model_class: ClassVar[str]
    holds: ClassVar[str]
    mixers: ClassVar[tuple[str, ...]] = ("attention",)
    channels: ClassVar[tuple[str, ...]] = ("swiglu",)
    # Mixers of which there must be one.
    needs: ClassVar[tuple[str, ...]] = ()
    why: ClassVar[Mapping[str, str]] = {}
    # Whether every softmax layer has rotary positions whatever is asked.
    turns: ClassVar[bool] = True
    # How theirs names the last norm, and what it lacks of ours.
    last_norm: ClassVar[str] = "model.norm.weight"
    less: ClassVar[float] = 0.0
    # Pieces of names that its own writer has otherwise: what is published, and what it writes.
    written: ClassVar[Mapping[str, str]] = {}

    def fields(self, model: Model) -> dict[str, Any]:
        """What the class needs beside the sizes of every class; of a model that has its kinds of mixers and channels."""
        raise NotImplementedError

    def block(self, config: Config, index: int) -> dict[str, Any]:
        """The layer at `index` as a block of a spec."""
        raise NotImplementedError

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:
        """The weights of that layer, by their names inside it."""
        raise NotImplementedError

    def kinds(self, model: Model) -> Iterator[Refusal]:
        """Kinds of the model, of mixers and of channels that the class has not; what follows needs them right."""
        if model.get("kind", "causal_lm") != "causal_lm":
            yield Refusal("kind", f"is {model['kind']}; the class is a causal language model")
            return
        for index, layer in enumerate(model["layers"]):
            for part, known in (("mixer", self.mixers), ("channel", self.channels)):
                kind = layer[part]["kind"]
                if kind not in known:
                    yield Refusal(
                        f"layers.{index}.{part}.kind", f"is {kind}; there it is {' or '.join(known)}"
                    )
        held = {layer["mixer"]["kind"] for layer in model["layers"]}
        for kind in self.needs:
            if kind not in held:
                yield Refusal("layers", f"have no {kind}; the class needs one")

    def problems(self, model: Model) -> Iterator[Refusal]:  # noqa: ARG002
        """What the class cannot hold, and the way there and back does not show."""
        yield from ()

    def warning(self, model: Model) -> str:  # noqa: ARG002
        """What the class does wrong with a model that it holds, or nothing."""
        return ""

    def miscounts(self, model: Model) -> bool:  # noqa: ARG002
        """Whether the class generates other greedy tokens with its cache than without, so that only who names it is given it."""
        return False

    def loses_beams(self, model: Model) -> bool:  # noqa: ARG002
        """The same of beams."""
        return False

    def folded(self, config: Config) -> tuple[Config, Factors]:
        """The configuration without what a spec has as factors of weights, and those factors of each layer's tensors."""
        return config, {}

    def idle(self, config: Config) -> frozenset[str]:  # noqa: ARG002
        """Dotted paths of fields that change no logits of a model of this configuration."""
        return IDLE

    def scalars(self, config: Config) -> dict[str, Any]:
        """The fields of the model beside its layers."""
        return {
            "vocab_size": config["vocab_size"],
            "hidden_size": config["hidden_size"],
            "context_length": config["max_position_embeddings"],
            "tie_embeddings": config["tie_word_embeddings"],
            "norm_eps": config["rms_norm_eps"],
        }

    def config(self, model: Model) -> dict[str, Any]:
        """The configuration of a model that fits, without token ids; of one that does not the nearest."""
        return {
            "model_type": self.name,
            "vocab_size": model["vocab_size"],
            "hidden_size": model["hidden_size"],
            "num_hidden_layers": len(model["layers"]),
            "max_position_embeddings": model["context_length"],
            "rms_norm_eps": model["norm_eps"],
            "tie_word_embeddings": model["tie_embeddings"],
            **self.fields(model),
        }

    def keys(self, config: Config) -> Iterator[Key]:
        """All weights of a model; a tied head is the embedding."""
        yield same("model.embed_tokens.weight", "model.embed_tokens.weight")
        for index in range(config["num_hidden_layers"]):
            for key in self.layer_keys(config, index):
                yield key.below(f"model.layers.{index}.")
        yield same("model.norm.weight", self.last_norm, less=self.less)
        if not config["tie_word_embeddings"]:
            yield same("lm_head.weight", "lm_head.weight")

    def stored_keys(self, config: Config, rows: Mapping[str, int]) -> Iterator[Key]:  # noqa: ARG002
        """All weights as a checkpoint has them whose tensors have so many rows, for a class whose writer cuts them otherwise."""
        yield from self.keys(config)

    def spec(self, config: Config) -> dict[str, Any]:
        """The model part of a spec file."""
        blocks: dict[str, dict[str, Any]] = {}
        layers = []
        for index in range(config["num_hidden_layers"]):
            made = self.block(config, index)
            name = next((name for name, block in blocks.items() if block == made), None)
            if name is None:
                name = _free_name(made["mixer"], blocks)
                blocks[name] = made
            layers.append(name)
        return {**self.scalars(config), "blocks": blocks, "layers": layers}


def _free_name(mixer: Mapping[str, Any], taken: Mapping[str, Any]) -> str:
    base = {"attention": "local" if mixer.get("window") else "full", "parallel": "hybrid"}.get(
        mixer["kind"], "linear"
    )
    return next(
        name for name in (base, *(f"{base}-{n}" for n in range(2, len(taken) + 3))) if name not in taken
    )


def mixers_of(model: Model, kind: str) -> list[Mapping[str, Any]]:
    """The data of all mixers of a kind, first layer first."""
    return [layer["mixer"] for layer in model["layers"] if layer["mixer"]["kind"] == kind]

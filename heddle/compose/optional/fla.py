"""A layer of the flash-linear-attention package as a mixer. An exported model asks for that package, too."""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from heddle.compose.cache import Call, PreallocatedRecurrentLayer, RecurrentLayer, StateLayer
from heddle.compose.modules.site import Site
from heddle.errors import HeddleError

# What the place of a layer gives, and no spec.
GIVEN = ("hidden_size", "layer_idx")
# What its forward is called with here, or does without.
KNOWN = (
    "hidden_states",
    "attention_mask",
    "past_key_values",
    "use_cache",
    "output_attentions",
    "lower_bound",
    "cu_seqlens",
    "kwargs",
)
# The parts of what such a layer keeps between calls.
STATES = ("recurrent_state", "attn_state", "conv_state", "ffn_state")


class FlaModule(nn.Module):
    """A layer of fla.layers, called as its own models call it, with its state in a cache of ours.

    The state goes through that package's cache, made new for each call. Padding is told by an attention mask. The kernels are
    written for a GPU: on another device it can be built and counted, and not run. Casting the model to a narrower type casts
    all of the layer, its gates too.

    Shapes:  x, y: [B, T, D];  states: as the layer keeps them, the batch first

    Raises:
        HeddleError: "package-missing" where it does not import; "bad-argument" off a GPU.
    """

    def __init__(self, site: Site, *, layer: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.name, self.index = layer, site.layer_index
        self.layer = _made(layer, options, site)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if x.is_meta:
            return torch.empty_like(x)
        if not x.is_cuda:
            what = f"fla.{self.name} runs on a GPU, and its input is on the {x.device.type}"
            raise HeddleError("bad-argument", what, hint="heddle check and heddle show need none")
        # Of all tokens so far: a layer that rotates counts its positions by it.
        mask = None if call.key_padding is None else call.key_padding.to(torch.int64)
        past = self._past(call.cache)
        y: Tensor = self.layer(x, attention_mask=mask, past_key_values=past, use_cache=past is not None)[0]
        if past is not None:
            call.keep(**flat(past[self.index], self.name))
        if y.shape != x.shape:
            raise HeddleError("bad-argument", f"fla.{self.name} gives {tuple(y.shape)} of {tuple(x.shape)}")
        return y

    def _past(self, held: StateLayer | None) -> Any:
        """That package's cache with what we hold; None where nothing is to be kept."""
        if not isinstance(held, RecurrentLayer):
            return None
        kind = _imported("fla.models.utils").Cache
        if not held.states:
            return kind()
        states = held.states
        if isinstance(held, PreallocatedRecurrentLayer):
            # Some are written in place, and this step is to be repeated.
            states = {name: state.clone() for name, state in states.items()}
        earlier: tuple[Any, ...] = (None,) * self.index
        return kind.from_legacy_cache((*earlier, nested(states)), seen_tokens=held.get_seq_length())

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats. Their sizes are those that a call leaves."""
        held = RecurrentLayer()
        width = next(part.in_features for part in self.layer.modules() if isinstance(part, nn.Linear))
        # What grows with the tokens, keys and values, is as long as they are.
        for length in (1, context):
            held.replace({})
            positions = torch.arange(length, device=like.device)[None].expand(batch, length)
            self(like.new_zeros(batch, length, width), Call(positions, cache=held))
            if not any(name.startswith("attn_state") for name in held.states):
                break
        states = {name: torch.randn_like(state) for name, state in held.states.items()}
        return PreallocatedRecurrentLayer(states, context=context)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:  # noqa: ARG002
        """The name of the code that does the mixing."""
        return "fla"


def flat(state: Mapping[str, Any], layer: str) -> dict[str, Tensor]:
    """A state of that package by names: `recurrent_state`, or `conv_state.0` of a tuple."""
    found: dict[str, Tensor] = {}
    for name in STATES:
        held = state.get(name)
        row = (
            {f"{name}.{index}": one for index, one in enumerate(held)}
            if isinstance(held, (tuple, list))
            else {name: held}
        )
        kept = {path: one for path, one in row.items() if one is not None}
        if not all(isinstance(one, Tensor) for one in kept.values()):
            raise HeddleError(
                "bad-argument", f"fla.{layer} keeps a {name} that is no tensor and no row of them"
            )
        found |= kept
    return found


def nested(states: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state that `_flat` took apart."""
    made: dict[str, Any] = dict.fromkeys(STATES)
    for path, held in states.items():
        name, _, index = path.partition(".")
        if index:
            row = made[name] or ()
            made[name] = (*row, *(None,) * (int(index) - len(row)), held)
        else:
            made[name] = held
    return made


@dataclass(frozen=True, slots=True)
class Measured:
    """A layer as it was made: its parameters, or why it cannot be."""

    parameters: int = 0
    refusal: str | None = None


@lru_cache(maxsize=1024)
def measured(layer: str, options: str, hidden_size: int, layer_index: int) -> Measured:
    """A layer with `options` (JSON) made on the meta device."""
    try:
        with torch.device("meta"):
            made = _made(layer, json.loads(options), Site(hidden_size, layer_index, layer_index + 1))
    except HeddleError:
        raise
    except Exception as error:
        # Whatever a constructor of another package raises at sizes that do not fit: most use assert.
        return Measured(refusal=str(error) or type(error).__name__)
    return Measured(sum(parameter.numel() for parameter in made.parameters()))


def layer_names() -> list[str]:
    """The layers of that package that a model can hold."""
    layers = _imported("fla.layers")
    return [name for name in layers.__all__ if inspect.isclass(getattr(layers, name))]


def arguments(layer: str) -> list[str]:
    """What the constructor of a layer takes by name."""
    taken = inspect.signature(_class(layer).__init__).parameters.values()
    return [one.name for one in taken if one.name != "self" and one.kind is not one.VAR_KEYWORD]


def unfit(layer: str) -> str | None:
    """Why a layer cannot stand alone in a model of ours; None if it can."""
    taken = inspect.signature(_class(layer).forward).parameters
    more = [name for name in taken if name not in (*KNOWN, "self")]
    if "hidden_size" not in arguments(layer):
        return "has no hidden_size"
    if "past_key_values" not in taken:
        return "cannot decode: it keeps no state between calls"
    return f"needs {', '.join(more)} of other layers" if more else None


def _made(layer: str, options: Mapping[str, Any], site: Site) -> nn.Module:
    given = {"hidden_size": site.hidden_size, "layer_idx": site.layer_index, "norm_eps": site.norm_eps}
    known = arguments(layer)
    fields = {name: value for name, value in given.items() if name in known} | dict(options)
    with warnings.catch_warnings():
        # Advice for whoever writes a model of that package.
        warnings.simplefilter("ignore")
        made: nn.Module = _class(layer)(**fields)
    return made


def _class(layer: str) -> Any:
    return getattr(_imported("fla.layers"), layer)


def _imported(name: str) -> Any:
    """A module of that package. Imported when it is needed and not before: that takes seconds, and warns of what it has not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        what = f"flash-linear-attention does not import: {error}"
        raise HeddleError("package-missing", what, hint="pip install 'heddle-lm[fla]'") from error

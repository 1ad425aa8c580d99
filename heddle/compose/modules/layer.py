"""One layer of a model: a mixer and a channel block, their norms, and how both join the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from heddle.compose.blocks import channel_module, mixer_module
from heddle.compose.cache import Call
from heddle.compose.constant_stream import CONSTANT, ENDS
from heddle.compose.init import Initialised, fill
from heddle.compose.modules.documents import mixed
from heddle.compose.modules.norm import norm_module
from heddle.compose.modules.site import Site

ADDED: Mapping[str, Any] = {"of": "stream", "stream": 1.0, "branch": 1.0}
# What a stream is called in `Call.handed`, by the layer it comes from; the embedded tokens come from -1.
STREAM = "stream"


def make_mixer(site: Site, data: Mapping[str, Any]) -> nn.Module:
    """The mixer of plain data; the mixers that it is made of are made first and handed to it."""
    fields = dict(data)
    made = mixer_module(fields.pop("kind"))
    if isinstance(fields.get("mixer"), Mapping):
        fields["mixer"] = make_mixer(site, fields["mixer"])
    if "mixers" in fields:
        fields["mixers"] = [make_mixer(site, one) for one in fields["mixers"]]
    return made(site, **fields)


class Skip(Initialised):
    """y = a · x + b · s, with s the stream after layer `source` (-1: the embedded tokens); a and b are learned.

    Shapes:  x, s, y: [B, T, D]
    """

    def __init__(self, source: int, init: float) -> None:
        super().__init__()
        self.source, self.init = source, init
        self.factors = nn.Parameter(torch.empty(2))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        a, b = self.factors.to(x.dtype)
        y: Tensor = a * x + b * call.handed[STREAM, self.source]
        return y

    def initialise(self, std: float) -> None:  # noqa: ARG002 - it begins as the layer without a skip
        fill(self.factors, torch.tensor([1.0, self.init]))


class HeddleLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """One layer:  x = join(x, mixer);  x = join(x, channel).

        pre: x + part(norm(x))     post: x + norm(part(x))     sandwich: x + norm(part(norm(x)))

    A `residual` gives both terms factors, or takes norm(x) in the place of the first x (arXiv 2501.08313).

    Shapes:  x: [B, T, D]
    """

    def __init__(self, site: Site, layer: Mapping[str, Any]) -> None:
        super().__init__()
        self.channel_kind = layer["channel"]["kind"]
        placement = layer.get("norm_placement", "pre")
        self.residual = {**ADDED, **(layer.get("residual") or {})}
        self.channel_residual = {**ADDED, **(layer.get("channel_residual") or {})}
        self.skip = Skip(**layer["skip"]) if layer.get("skip") else None

        def norm(wanted: bool) -> nn.Module | None:
            return norm_module(layer["norm"], site.hidden_size, site.norm_eps) if wanted else None

        self.mixer_norm = norm(placement != "post")
        self.mixer = make_mixer(site, layer["mixer"])
        self.mixer_post_norm = norm(placement != "pre")
        has_channel = self.channel_kind != "none"
        self.channel_norm = norm(has_channel and placement != "post")
        fields = {key: value for key, value in layer["channel"].items() if key != "kind"}
        self.channel = channel_module(self.channel_kind)(site, **fields)
        self.channel_post_norm = norm(has_channel and placement != "pre")

    def forward(
        self, x: Tensor, call: Call
    ) -> Tensor | tuple[Tensor, dict[str, Any], list[Any], list[Any], list[Tensor], list[Tensor]]:
        """The stream after the layer; with it, if there is any, what the mixer hands on to later layers, the auxiliary losses,
        the shares with a target, the load of experts, and sums over members of clusters; `count` takes the last two.

        They are outputs, because a layer that is run again by a checkpoint may write nothing outside of it: no buffer either.
        """
        call = call.at(call.cache)
        call.given, call.losses, call.targets, call.loads, call.members = {}, [], [], [], []
        x = self.stream(x, call)
        told = (call.given, call.losses, call.targets, call.loads, call.members)
        return (x, *told) if any(told) else x

    def count(self, loads: Sequence[Tensor], members: Sequence[Tensor]) -> None:
        """Tells the channel block the loads, and mixers with clusters the members, that a forward of the layer gave."""
        for load in loads:
            cast(Any, self.channel).count(load)
        if members:
            clustered = (one for one in self.mixer.modules() if hasattr(one, "count_members"))
            for mixer, found in zip(clustered, members, strict=True):
                cast(Any, mixer).count_members(found)

    def stream(self, x: Tensor, call: Call) -> Tensor:
        """The stream after the layer."""
        if self.skip is not None:
            x = self.skip(x, call)
        normed = x if self.mixer_norm is None else self.mixer_norm(x)
        call.hand(constant=normed)
        if (ENDS, call.layer) in call.wanted:
            # No more of it is wanted, and what came in is no output: FSDP2 gives it as a view.
            end: Tensor = call.given[CONSTANT]
            return end
        x = joined(x, normed, mixed(self.mixer, normed, call), self.mixer_post_norm, self.residual)
        if self.channel_kind == "none":
            return x
        normed = x if self.channel_norm is None else self.channel_norm(x)
        return joined(x, normed, self.channel(normed, call), self.channel_post_norm, self.channel_residual)


def joined(
    x: Tensor, normed: Tensor, branch: Tensor, post_norm: nn.Module | None, residual: Mapping[str, Any]
) -> Tensor:
    """The stream after a part.  Shapes:  all: [B, T, D]"""
    branch = branch if post_norm is None else post_norm(branch)
    past = normed if residual["of"] == "normed" else x
    past = past if residual["stream"] == 1.0 else past * residual["stream"]
    return past + (branch if residual["branch"] == 1.0 else branch * residual["branch"])


class Again(nn.Module):
    """Stands for a layer that is an earlier one once more: it has no weights, and is never called."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

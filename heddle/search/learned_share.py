"""What the routers of a model came to: of each layer the share of tokens, chunks or sequences that went to one of its mixers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from heddle.search.text_alone import text_alone

# (layer counted from 0, share) of one router, in the order of the model.
Shares = list[tuple[int, float]]


@contextmanager
def learned_shares(model: nn.Module) -> Iterator[Shares]:
    """Watches the routers of `model` inside, and fills what it gives at the end.

    A router is a module with `routes_out`, which sees who gets what, [..., mixers]. The share is that of its first mixer, or of
    the one that it has as `asked`: of `layer_router` the second. A router that several layers share has one figure, under the
    first of them; one that nothing went through has none.
    """
    found: Shares = []
    sums: dict[str, Tensor] = {}
    with text_alone(model) as is_text:
        hooks = [
            router.routes_out.register_forward_hook(_adder(sums, name, is_text))
            for name, router in model.named_modules()
            if isinstance(getattr(router, "routes_out", None), nn.Module)
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()
    routers = dict(model.named_modules())
    for name, both in sums.items():
        whole = float(both.sum())
        # NaN is told, and no figure at all.
        if whole != 0:
            found.append((_layer(name), float(both[getattr(routers[name], "asked", 0)]) / whole))
    found.sort()


def _adder(
    sums: dict[str, Tensor], name: str, is_text: Callable[[], bool]
) -> Callable[[nn.Module, object, Tensor], None]:
    def add(_: nn.Module, __: object, routes: Tensor) -> None:
        if not is_text():
            return
        seen = routes.detach().reshape(-1, routes.shape[-1]).sum(dim=0, dtype=torch.float64)
        sums[name] = sums[name] + seen if name in sums else seen

    return add


def _layer(name: str) -> int:
    """The layer that a module's name is in: `model.layers.3.mixer` is in 3."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1])

"""The place where attention hands out what chosen queries attend to."""

from __future__ import annotations

from torch import Tensor, nn

from heddle.errors import HeddleError


class RowsOut(nn.Module):
    """Sees the attention rows of `queries`; a probe sets these and hooks into the forward.

        mixer.rows_out.queries = (0, -1)
        mixer.rows_out.register_forward_hook(lambda module, given, rows: ...)

    `queries` are tokens of the call, from its end where negative. None (so it begins): nothing is computed and no hook is
    called. A row holds the weights that the values got, so it sums to 1, and to less where a sink took a share.

    Shapes:  rows: [B, H, queries, S], over the keys that the layer holds, the last of them that of the last token; a cache that
             has dropped some begins with those of the sink tokens, if there are any
    """

    queries: tuple[int, ...] | None = None

    def forward(self, rows: Tensor) -> Tensor:
        return rows

    def places(self, length: int) -> list[int]:
        """`queries` as places from 0 on in a call of `length` tokens. Raises "bad-argument" for one outside it."""
        queries = self.queries or ()
        outside = [query for query in queries if not -length <= query < length]
        if outside:
            raise HeddleError("bad-argument", f"rows_out: no query {outside[0]} in a call of {length} tokens")
        return [query % length for query in queries]

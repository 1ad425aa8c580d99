"""Keys and values that wait in host memory, of which a step fetches some."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.cache import KVLayer

# Queries of one call that may fetch blocks of their own; more of them read everything.
FEW = 8


class HostKVLayer(KVLayer):
    """Keys and values of the tokens so far, whole blocks of them in host memory (pinned beside a GPU), the last on the device.

    On the device are the last `block` + 8 tokens at least, and fewer than a block more, so that a query's own block is there.
    `repeats`: a step that repeats writes the last slot in place, and nothing moves.

    Shapes:  keys: [B, KV heads, tokens on the device, d];  host_keys: [B, KV heads, tokens in host memory, d];  values likewise;
             written: [B, 1, all tokens, 1] bool
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block, self.repeats = block, False
        # With room behind what is held: they grow by doubling.
        self.rooms: list[Tensor] = []
        self.moved = 0

    @classmethod
    def filled(cls, keys: Tensor, values: Tensor, block: int) -> HostKVLayer:
        """All but the last token are there already, whose step repeats.  Shapes:  keys, values: [B, KV heads, tokens, d]"""
        made, count = cls(block), in_host_memory(keys.shape[2], block)
        if count > 0:
            made._move((keys[:, :, :count], values[:, :, :count]))
        made.keys, made.values = keys[:, :, count:].clone(), values[:, :, count:].clone()
        made.tokens, made.is_initialized, made.repeats = keys.shape[2] - 1, True, True
        return made

    @property
    def held(self) -> int:
        """All tokens of it."""
        return self.moved + (0 if self.keys is None else self.keys.shape[2])

    def append(self, k: Tensor, v: Tensor) -> None:
        """Adds the new tokens; whole blocks that have got too far back move to host memory."""
        if self.repeats and self.keys is not None and self.values is not None:
            self.keys[:, :, -k.shape[2] :], self.values[:, :, -v.shape[2] :] = k, v
            return
        if self.keys is not None and self.values is not None:
            k, v = torch.cat((self.keys, k), dim=2), torch.cat((self.values, v), dim=2)
        count = max(0, in_host_memory(self.moved + k.shape[2], self.block) - self.moved)
        if count > 0:
            self._move((k[:, :, :count], v[:, :, :count]))
            # A view would keep what has moved.
            k, v = k[:, :, count:].clone(), v[:, :, count:].clone()
        self.keys, self.values, self.is_initialized = k, v, True

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new tokens; gives all of them, the new ones last, brought to the device."""
        if not self.rooms and self.keys is None and not self.repeats:
            self.append(key_states, value_states)
            return key_states, value_states
        self.append(key_states, value_states)
        return self._all()

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of these tokens, by their numbers, on the device.

        Shapes:  places: [B, KV heads, M] int64, on the CPU;  out: [B, KV heads, M, d], twice
        """
        assert self.keys is not None
        assert self.values is not None
        device, found = self.keys.device, []
        is_near = places >= self.moved
        near = (places - self.moved).clamp(min=0, max=self.keys.shape[2] - 1).to(device)
        for index, side in enumerate((self.keys, self.values)):
            picked = None if self.moved == 0 else self._picked(index, places.clamp(max=self.moved - 1))
            if picked is None or bool(is_near.any()):
                own = side.gather(2, near[..., None].expand(-1, -1, -1, side.shape[3]))
                picked = own if picked is None else torch.where(is_near.to(device)[..., None], own, picked)
            found.append(picked)
        return found[0], found[1]

    def _picked(self, index: int, places: Tensor) -> Tensor:
        """Rows of host memory, on the device.  Shapes:  places: [B, KV heads, M];  out: [B, KV heads, M, d]"""
        assert self.keys is not None
        room = self.rooms[index]
        first = torch.arange(room.shape[0] * room.shape[1]).view(*room.shape[:2], 1) * room.shape[2]
        rows, wanted = (places + first).flatten(), None
        if room.is_pinned() and not room.requires_grad:
            wanted = torch.empty(places.numel(), room.shape[3], dtype=room.dtype, pin_memory=True)
        found = torch.index_select(room.flatten(0, 2), 0, rows, out=wanted)
        return found.to(self.keys.device, non_blocking=True).view(*places.shape, -1)

    def _all(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        if self.moved == 0:
            return self.keys, self.values
        far = [room[:, :, : self.moved].to(self.keys.device) for room in self.rooms]
        return torch.cat((far[0], self.keys), dim=2), torch.cat((far[1], self.values), dim=2)

    def _move(self, sides: tuple[Tensor, Tensor]) -> None:
        count = sides[0].shape[2]
        if not self.rooms or self.rooms[0].shape[2] < self.moved + count:
            self._grow(sides, 2 * (self.moved + count))
        for room, side in zip(self.rooms, sides, strict=True):
            room[:, :, self.moved : self.moved + count].copy_(side, non_blocking=True)
        self.moved += count

    def _grow(self, sides: tuple[Tensor, Tensor], tokens: int) -> None:
        made = []
        for index, side in enumerate(sides):
            shape, pinned = (*side.shape[:2], tokens, side.shape[3]), side.is_cuda
            room = torch.empty(shape, dtype=side.dtype, pin_memory=pinned)
            if self.moved > 0:
                if pinned:
                    # What is on its way to the old room has to be there.
                    torch.cuda.current_stream(side.device).synchronize()
                room[:, :, : self.moved] = self.rooms[index][:, :, : self.moved]
            made.append(room)
        self.rooms = made

    def advance(self, tokens: int) -> None:
        if not self.repeats:
            super().advance(tokens)

    def tensors(self) -> dict[str, Tensor]:
        if not self.rooms:
            return super().tensors()
        far = [room[:, :, : self.moved] for room in self.rooms]
        return {**super().tensors(), "host_keys": far[0], "host_values": far[1]}

    def replace(self, tensors: dict[str, Tensor]) -> None:
        super().replace(tensors)
        far = [tensors[name] for name in ("host_keys", "host_values") if name in tensors]
        pinned = self.keys is not None and self.keys.is_cuda
        self.rooms = [one.pin_memory() if pinned else one for one in far]
        self.moved = far[0].shape[2] if far else 0

    def crop(self, tokens_to_remove: int) -> None:
        removed = abs(tokens_to_remove)
        if removed not in (0, self.tokens) and self.keys is not None:
            keys, values = (side[:, :, :-removed] for side in self._all())
            marks = {} if self.written is None else {"written": self.written[:, :, :-removed]}
            self.replace(marks)
            self.append(keys, values)
            self.tokens -= removed
            return
        super().crop(tokens_to_remove)


def in_host_memory(tokens: int, block: int) -> int:
    """Tokens of so many that wait in host memory: whole blocks."""
    return max(0, tokens - block - FEW) // block * block

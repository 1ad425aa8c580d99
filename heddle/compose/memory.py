"""Out of memory, told as an error of ours on every device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from heddle.errors import HeddleError

# The CPU allocator has no error class of its own.
_CPU_WORDS = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


@contextmanager
def memory_told(doing: str, hint: str) -> Iterator[None]:
    """Turns running out of memory inside the block into `HeddleError("out-of-memory")`, which begins with `doing`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise HeddleError("out-of-memory", f"{doing}: {str(error).partition('. ')[0]}", hint=hint) from error
    except MemoryError as error:
        raise HeddleError("out-of-memory", f"{doing}: the CPU allocator gave up", hint=hint) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _CPU_WORDS):
            raise
        raise HeddleError("out-of-memory", f"{doing}: the CPU allocator gave up", hint=hint) from error

"""Where a call runs: a worker with a share of a GPU tells its node and its GPUs through Ray's own key-value store.

Ray places a call when there is room and tells the driver nothing of it. What cannot be told is left out: a figure on a page
is no reason to fail.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put


def new_key() -> str:
    """A name under which one call tells where it runs."""
    return f"heddle-place-{secrets.token_hex(8)}"


def told(key: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """`call(*arguments)` in a worker, after its place was told under `key`."""
    with suppress(Exception):
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        _internal_kv_put(key, json.dumps({"node": socket.gethostname(), "gpus": gpus}))
    return call(*arguments)


def place(key: str) -> dict[str, Any] | None:
    """{"node": name of the machine, "gpus": their indices as texts}, once the call has begun; it is told once."""
    try:
        text = _internal_kv_get(key)
        if text is None:
            return None
        _internal_kv_del(key)
        found: dict[str, Any] = json.loads(text)
        return found
    # Of what is no public part of Ray anything may be raised.
    except Exception:
        return None

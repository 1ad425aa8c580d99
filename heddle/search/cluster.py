"""A Ray cluster that runs already: joined by its address, or an error that says within seconds why not."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from heddle.errors import HeddleError
from heddle.search.nodes import SameCode

CONNECT_S = 5.0
# Ray (2.60) tries 20 times, each up to 40 s where nothing answers.
FEW_TRIES = {"RAY_gcs_server_port_wait_time_s": "1"}
_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?(?P<host>[^\s/]+?)\]?:(?P<port>\d+)")


def check_address(address: str) -> None:
    """Raises "bad-argument" if nothing listens at a HOST:PORT; "auto" and other words are Ray's to judge."""
    found = _HOST_AND_PORT.fullmatch(address)
    if found is None:
        return
    try:
        socket.create_connection((found["host"], int(found["port"])), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, f"nothing answers there ({error})") from error


def join(address: str, env: Mapping[str, str], **options: Any) -> SameCode:
    """Make this process a driver of the cluster at `address`, whose workers get the variables `env`; gives what asks later nodes.

    Raises:
        HeddleError: "bad-argument" if there is no cluster, one that refuses this process's token, or one of whose nodes has
            another heddle or torch.
    """
    check_address(address)
    try:
        with _set(FEW_TRIES):
            ray.init(address=address, runtime_env={"env_vars": dict(env)}, **options)
    except (ConnectionError, ImportError, RuntimeError, ValueError) as error:
        if "AuthenticationError" in f"{type(error).__name__} {error} {error.__cause__}":
            hint = (
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or ~/.ray/auth_token, must hold the cluster's token"
            )
            raise HeddleError(
                "bad-argument", f"the Ray cluster at {address} refuses this token", hint=hint
            ) from error
        raise _no_cluster(address, str(error).splitlines()[0]) from error
    nodes = SameCode()
    nodes.require()
    return nodes


def _no_cluster(address: str, why: str) -> HeddleError:
    hint = "`ray status` shows a running cluster; without --ray-address a local one is started"
    return HeddleError("bad-argument", f"no Ray cluster at {address}: {why}", hint=hint)


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """The environment with those of `variables` that the user has not set."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]

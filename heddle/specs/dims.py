"""The letters of tensor shapes: the one legend of the repository. Docstrings and kernels use no others for these."""

from __future__ import annotations

DIMS: dict[str, str] = {
    "B": "batch: sequences at once",
    "T": "time: tokens of a sequence",
    "D": "hidden size: features of the residual stream",
    "L": "layers of a model",
    "N": "sequences of a packed batch",
    "H": "heads of queries (and of keys, where they are not grouped)",
    "HV": "heads of values, a multiple of H",
    "K": "key dimensions of a head",
    "V": "value dimensions of a head",
    "C": "tokens of a chunk; channels of a convolution",
    "W": "taps of a convolution; tokens of a window",
    "d": "dimensions of a head, where K = V",
}

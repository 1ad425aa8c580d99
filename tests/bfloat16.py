"""bfloat16 in Triton's interpreter as a GPU has it.

The interpreter rounds towards zero, and in a product takes the bits of bfloat16 for integers.
"""

from __future__ import annotations

from typing import Any

import numpy
import pytest


def make_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are of numbers, rounding is to the nearest, and ops take their kernels in bfloat16 too."""
    import triton.language as tl
    from triton.runtime import interpreter

    converted = interpreter._convert_float

    def convert(given: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = numpy.ascontiguousarray(given).view(numpy.uint32)
            found = (bits + (bits >> 16 & 1) + 0x7FFF) >> 16
            return found.astype(numpy.uint16).reshape(given.shape)
        if (source, target) == (tl.bfloat16, tl.float32):
            return numpy.ascontiguousarray(given).view(numpy.uint16).astype(numpy.uint32) << 16
        return converted(given, source, target, rounding)

    def numbers(x: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            return convert(x.data, tl.bfloat16, tl.float32, None).view(numpy.float32)
        return x.data

    def dot(_: Any, a: Any, b: Any, total: Any, *__: Any) -> Any:
        found = numpy.matmul(numbers(a), numbers(b), dtype=total.data.dtype) + total.data
        return interpreter.TensorHandle(found, total.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr("heddle.kernels.op._triton_runs", lambda *_: True)

"""What went wrong, where, and what to do: the one error class of the package.

Every error a user can cause is a `HeddleError` with a code from `CODES`; `docs/errors.md` has a heading for each.
`assert` is kept for our own mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BAD_INPUT = 2
FAILED = 1

# code -> exit status of the command that ends with it.
CODES: dict[str, int] = {
    # The file itself.
    "file-not-found": BAD_INPUT,
    "file-not-readable": BAD_INPUT,
    "file-too-large": BAD_INPUT,
    "syntax": BAD_INPUT,
    "too-deep": BAD_INPUT,
    "duplicate-key": BAD_INPUT,
    "tag-not-allowed": BAD_INPUT,
    # The spec.
    "unknown-field": BAD_INPUT,
    "unknown-kind": BAD_INPUT,
    "missing-field": BAD_INPUT,
    "wrong-type": BAD_INPUT,
    "out-of-range": BAD_INPUT,
    "dims-not-divisible": BAD_INPUT,
    "conflicting-fields": BAD_INPUT,
    "unknown-block": BAD_INPUT,
    "unknown-layer": BAD_INPUT,
    "reference-direction": BAD_INPUT,
    "reference-mismatch": BAD_INPUT,
    "duplicate-name": BAD_INPUT,
    "not-causal": BAD_INPUT,
    # A warning: it ends no command.
    "unused-block": 0,
    "reach-too-short": 0,
    "runs-away": 0,
    "bad-placement": BAD_INPUT,
    "bad-space": BAD_INPUT,
    "version-not-supported": BAD_INPUT,
    # Running it.
    "bad-argument": BAD_INPUT,
    # A warning as well.
    "slow-path": 0,
    "corpus-missing": BAD_INPUT,
    "corpus-not-readable": BAD_INPUT,
    "corpus-too-small": BAD_INPUT,
    "tokenizer-mismatch": BAD_INPUT,
    "checkpoint-broken": BAD_INPUT,
    "pickle-refused": BAD_INPUT,
    "untrusted-code": BAD_INPUT,
    "file-exists": BAD_INPUT,
    "run-exists": BAD_INPUT,
    "run-not-found": BAD_INPUT,
    "run-mismatch": BAD_INPUT,
    "run-locked": FAILED,
    "lock-broken": BAD_INPUT,
    "latency-model": BAD_INPUT,
    "disk-full": FAILED,
    "system-error": FAILED,
    "loss-not-finite": FAILED,
    "out-of-memory": FAILED,
    "evaluation-failed": FAILED,
    "worker-died": FAILED,
    "cluster-lost": FAILED,
    "other-device": FAILED,
    "timed-out": FAILED,
    "storage-lost": FAILED,
    "interrupted": FAILED,
    "nothing-feasible": FAILED,
    "package-missing": FAILED,
    "kernel-wrong": FAILED,
    "no-weights": FAILED,
    "export-mismatch": FAILED,
    "target-mismatch": BAD_INPUT,
    "import-mismatch": BAD_INPUT,
}


@dataclass(frozen=True, slots=True)
class Where:
    """The place an error speaks of. Lines and columns count from 1."""

    path: str = ""
    file: str | None = None
    line: int | None = None
    column: int | None = None
    text: str | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        return ": ".join(part for part in (place, self.path) if part)


NOWHERE = Where()


class HeddleError(Exception):
    """One located error: `file:line:column: path: what   [code]`, the source line with a caret, a hint."""

    def __init__(self, code: str, what: str, *, where: Where = NOWHERE, hint: str | None = None) -> None:
        assert code in CODES, f"error code {code!r} is not listed in heddle/errors.py"
        super().__init__(code, what, where, hint)
        self.code = code
        self.what = what
        self.where = where
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (Ray), and keyword-only arguments do not survive the default pickling.
        return _rebuild, (type(self), self.code, self.what, self.where, self.hint)

    @property
    def errors(self) -> tuple[HeddleError, ...]:
        """This error, or each of them where several were found in one go."""
        return (self,)

    @property
    def exit_status(self) -> int:
        return CODES[self.code]

    def __str__(self) -> str:
        place = str(self.where)
        lines = [f"{place}: {self.what}   [{self.code}]" if place else f"{self.what}   [{self.code}]"]
        if self.where.text is not None and self.where.line is not None:
            gutter = f"{self.where.line:>5} | "
            lines.append(gutter + self.where.text)
            if self.where.column is not None:
                lines.append(" " * (len(gutter) - 2) + "| " + " " * (self.where.column - 1) + "^")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class HeddleErrors(HeddleError):  # noqa: N818 - several errors, told as one
    """Several errors of one input, told in one go; the first stands for all of them."""

    def __init__(self, errors: Sequence[HeddleError]) -> None:
        assert errors
        first = errors[0]
        super().__init__(first.code, first.what, where=first.where, hint=first.hint)
        self._errors = tuple(errors)

    def __reduce__(self) -> tuple[object, ...]:
        return HeddleErrors, (self._errors,)

    @property
    def errors(self) -> tuple[HeddleError, ...]:
        return self._errors

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self._errors)


def _rebuild(kind: type[HeddleError], code: str, what: str, where: Where, hint: str | None) -> HeddleError:
    return kind(code, what, where=where, hint=hint)

"""What a schema cannot say of the samplers that go through a space: that it comes to an end."""

from __future__ import annotations

import math
from collections.abc import Iterator

from heddle.specs.explain import Finding
from heddle.specs.search import SearchSpec
from heddle.specs.space import Space

# Combinations and specs that are gone through at most; for `all` each is made, which takes milliseconds.
MOST = {"grid": 100_000, "all": 10_000}


def sampler_findings(search: SearchSpec, space: Space) -> Iterator[Finding]:
    """A space that is too large to be gone through, by path below `search`."""
    most = MOST.get(search.sampler)
    if most is None:
        return
    # The size of a space is that of its combinations and placements; of combinations without effect `all` goes through each, too.
    size = combinations = Space(space.parameters).size()
    if search.sampler == "all" and combinations <= MOST["grid"]:
        size = space.size()
    if size <= most:
        return
    floats = [one.name for one in space.parameters if one.kind == "float" and one.size() == math.inf]
    many = f"{size:,.0f}" if size < math.inf else "no end of them"
    each = "specs" if search.sampler == "all" else "combinations of open values"
    what = f"sampler {search.sampler} goes through at most {most:,} {each}, and this space has {many}"
    hint = f"a choice of values for {floats[0]}" if floats else "a smaller space, or another sampler"
    yield Finding("bad-space", what, ("sampler",), hint)

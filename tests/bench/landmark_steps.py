"""The decode step of landmark_check.py: whether what it chooses and reads at 128 K is right, and its times in each form.

Held on two levels. What is chosen: logits to float64, within twice the error of float32 products, and the blocks of `Call.bits`
to those that a stable sort of these logits puts first. What is read: the output, given these blocks, to float64, within twice the
error of plain torch in bfloat16. The fused step tells no choice; a block that is not the same is far out of bounds.

Times are those in CUDA graphs over several caches, so that L2 holds none: dense attention by cuDNN, a copy that moves the bytes
which a step must read, the step as it is launched unasked, the fused one and the one with a list in several splits and launches,
both with one block for each query (what does not depend on the blocks), and the scores alone. Then a step of the layer, other
forms, which are held alone, and a step whose blocks wait in host memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import e, log2
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from heddle.compose.cache import Call as LayerCall
from heddle.compose.host_cache import HostKVLayer
from heddle.compose.mixers.landmark import LandmarkModule
from heddle.compose.modules.host_blocks import attend_fetched
from heddle.compose.modules.selection import Places
from heddle.compose.modules.site import Site
from heddle.kernels import force_path
from heddle.kernels._landmark_attention_launch import Call
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.bench import machine, timed, timed_in_graph
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.landmark_attention import landmark_attention

HALF = torch.bfloat16
WANTED = ("q", "k", "v", "landmarks")
BACKENDS = {
    name: getattr(SDPBackend, f"{name.upper()}_ATTENTION") for name in ("flash", "cudnn", "efficient")
}
# Of a CPU.
FEW = {"B": 2, "H": 4, "N": 2, "T": 1, "S": 320, "K": 16, "V": 16, "block": 8, "top": 4}
APART: dict[str, Any] = {"fused": False}
FUSED: dict[str, Any] = {"fused": True}
LISTED: dict[str, Any] = {"fused": True, "listed": True}
FORMS: dict[str, dict[str, Any]] = {
    "three launches": APART, "fused": FUSED, "fused, ahead": {**FUSED, "ahead": True},
    "listed": LISTED, "listed, ahead": {**LISTED, "ahead": True},
}  # fmt: skip
# Of the step that is fused, and of that with a list.
READS = (
    (FUSED, (Launch(1, 1, 8, 3), Launch(1, 1, 4, 4), Launch(1, 1, 4, 2))),
    (LISTED, (Launch(1, 1, 4, 2), Launch(1, 1, 8, 3), Launch(1, 1, 2, 3), Launch(1, 1, 4, 4))),
)
SPLITS = {1: (6, 9, 17), 16: (2, 3)}
# What else is held, of a step at 128 K: the other half precision, smaller heads, a group that is no power of two.
OTHERS: tuple[tuple[dict[str, int], torch.dtype], ...] = (
    ({}, torch.float16), ({"K": 64, "V": 64}, HALF), ({"H": 6, "N": 2}, HALF), ({"top": 200}, HALF),
)  # fmt: skip
# Caches that a step goes through in turn, where one would stay in L2.
CACHES = 4
# Features of the layer around the op.
WIDTH = 1024
# Milliseconds of a graph.
REPEAT = 40
Given = dict[str, Any]
NOT_OURS = ("copy of the bytes", "cudnn", "flash", "efficient", "math")


class Report:
    """Logs, and writes and keeps rows."""

    def __init__(self, folder: Path, device: torch.device, commit: str | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(folder / "landmark_check.log")
        self.file, self.device = folder / "evidence-landmark.jsonl", device
        self.header = machine(device) | ({} if commit is None else {"commit": commit})
        self.table: list[str] = []

    def row(
        self, impl: str, phase: str, shape: dict[str, int], call: Callable[[], object], calls: int = 1
    ) -> float:
        """Milliseconds of one of the `calls` that `call` makes; infinity where it does not run."""
        try:
            call()
            times = timed_in_graph(call, REPEAT) if phase == "decode_graph" else timed(call, self.device)
        except Exception as error:
            self.log(f"none  {impl} {phase} {shape}: {' '.join(str(error).split())[-200:]}")
            return float("inf")
        times = {name: value / calls for name, value in times.items()}
        about = {
            "op": "landmark_attention",
            # A page of figures tells settings of ours that were tried by their first name.
            "impl": impl if impl in NOT_OURS else f"heddle, {impl}",
            "phase": phase,
            "shape": shape,
            "dtype": "bfloat16",
        }
        with self.file.open("a") as file:
            file.write(json.dumps({**self.header, **about, **times}) + "\n")
        sizes = " ".join(f"{name}={shape[name]}" for name in ("B", "T", "S"))
        self.log(f"{phase:12} {sizes:24} {times['ms']:9.4f} ms  {impl}")
        return float(times["ms"])


def drawn(shape: dict[str, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Given:
    """Arguments by name, rounded to `dtype`."""
    inputs = landmark_attention.cases.inputs(shape, torch.Generator(device).manual_seed(seed))
    given: Given = {name: x.to(dtype) if name in WANTED else x for name, x in inputs.items()}
    return {**given, "block": shape["block"], "top": shape.get("top")}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN inside."""
    kept = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def wrapped(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else 1 << 30)

        return made

    for name, make in kept.items():
        setattr(torch, name, wrapped(make))
    try:
        yield
    finally:
        for name, make in kept.items():
            setattr(torch, name, make)


def ours(**given: Any) -> Tensor:
    with force_path("triton"):
        return landmark_attention(**given)


def dense(name: str, *, q: Tensor, k: Tensor, v: Tensor, together: bool = False, **_: Any) -> Tensor:
    """Causal attention, or one query's; `together`: the heads of a group as queries of one head, so that keys are read once."""
    with sdpa_kernel(BACKENDS[name]):
        if together:
            q = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
            return scaled_dot_product_attention(q, k, v)
        return scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


def each(function: Callable[..., Tensor], caches: list[Given]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return [function(**given) for given in caches]

    return run


def step_bytes(shape: dict[str, int]) -> int:
    """What a step reads: landmarks of each key head, and for each query head `top` blocks and half of the own one."""
    B, H, N, K, V, block = (shape[name] for name in ("B", "H", "N", "K", "V", "block"))
    keys = shape["top"] * block + block // 2
    return 2 * B * (N * shape["S"] // block * K + H * keys * (K + V))


def name_of(overrides: dict[str, Any]) -> str:
    told = [f"{name} {value}" for name, value in overrides.items() if name not in ("fused", "listed")]
    name = "listed" if overrides.get("listed") else "fused" if overrides.get("fused") else "three launches"
    return ", ".join([name, *told])


def chosen_blocks(report: Report, given: Given) -> Tensor:
    """The blocks that the kernels choose for a query, once they are held to float64.  Shapes:  out: [B, H, top]"""
    q, marks, top = given["q"], given["landmarks"], given["top"]
    H, N, C = q.shape[1], marks.shape[1], marks.shape[2]
    scale = q.shape[3] ** -0.5
    call = Call(
        (q, given["k"], given["v"], marks), given["start"], (None, None), (scale, given["block"], top)
    )
    found, words = call.logits(0, 1)[:, :, 0], call.bits()[:, :, 0]
    bits = (words[..., None] >> torch.arange(32, device=words.device)) & 1
    chosen = bits.flatten(2)[..., :C] != 0
    own = (given["start"] // given["block"])[:, None, None]
    earlier = torch.arange(C, device=q.device) < own
    exact, plain = (
        (q.to(dtype).view(len(q), N, H // N, -1) @ marks.to(dtype).mT).flatten(1, 2).double()
        * scale
        * log2(e)
        for dtype in (torch.float64, torch.float32)
    )
    errors = [((one - exact).abs() * earlier).nan_to_num().max().item() for one in (found.double(), plain)]
    most = float((exact.abs() * earlier).max())
    bound = 2 * errors[1] + EPSILON[torch.float32] * most
    best = found.sort(dim=-1, descending=True, stable=True).indices[..., :top]
    expected = torch.zeros_like(chosen).scatter(-1, best, True) & (found > -torch.inf)
    least = exact.masked_fill(~earlier, -torch.inf).sort(dim=-1, descending=True).values[..., top - 1 : top]
    wrong = []
    if not errors[0] <= bound or bool((found.isfinite() != earlier).any()):
        wrong.append(f"logits {errors[0]:.2e}, at most {bound:.2e}")
    if not torch.equal(chosen, expected):
        wrong.append("not the best of its own logits")
    if bool((chosen & (exact < least - 2 * bound)).any()):
        wrong.append("a block that float64 leaves out by more than the bound")
    log, shape = report.log, list(q.shape)
    log(
        f"{'WRONG' if wrong else 'ok   '} choice among {C} blocks {shape}: logits {errors[0]:.1e} of {bound:.1e}"
    )
    log.wrong += [f"choice {shape}: {what}" for what in wrong]
    return best


def read_by(given: Given, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """The output by the groups of the paper, for one query and these blocks; products and weights in `dtype`, softmax wide.

    Shapes:  chosen: [B, H, top];  out: [B, 1, H, V]
    """
    q, k, v, marks, block = (given[name] for name in ("q", "k", "v", "landmarks", "block"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    H, scale = q.shape[1], q.shape[3] ** -0.5
    n = torch.arange(H, device=q.device) // (H // k.shape[1])
    rows = []
    for b in range(len(q)):
        place = int(given["start"][b])
        own, count = place // block, place % block + 1
        keys, values = (x[b].unflatten(1, (-1, block)) for x in (k, v))
        query = q[b].to(dtype)  # [H, 1, K]
        s = (query[:, None] @ keys[n[:, None], chosen[b]].to(dtype).mT).to(wide) * scale  # [H, top, 1, block]
        inner = torch.softmax(s, dim=-1).to(dtype) @ values[n[:, None], chosen[b]].to(dtype)  # [H, top, 1, V]
        mine = (query @ keys[n, own, :count].to(dtype).mT).to(wide) * scale  # [H, 1, count]
        gates = (query @ marks[b][n[:, None], chosen[b]].to(dtype).mT).to(wide) * scale  # [H, 1, top]
        gate = torch.softmax(torch.cat((gates, mine), dim=-1), dim=-1).to(dtype)
        top = gates.shape[-1]
        out = gate[..., :top] @ inner[:, :, 0] + gate[..., top:] @ values[n, own, :count].to(dtype)
        rows.append(out[:, 0])
    return torch.stack(rows)[:, None]


def step(given: Given, **overrides: Any) -> Tensor:
    with tuning(**overrides), force_path("triton"), torch.no_grad():
        return landmark_attention(**given)


def exact_and_bound(report: Report, given: Given) -> tuple[Tensor, float]:
    """The output in float64, given what the kernels choose, and how far off it may be."""
    chosen, dtype = chosen_blocks(report, given), given["q"].dtype
    exact, plain = (read_by(given, chosen, kind) for kind in (torch.float64, dtype))
    return exact, 2 * worst_error(plain, exact, timed=True)[0] + EPSILON[dtype]


def held(report: Report, given: Given, forms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the forms whose output is right, given the choice, and the same three times, once with NaN in fresh memory."""
    (exact, bound), right = exact_and_bound(report, given), []
    for form in forms:
        what = f"B={len(given['q'])} {given['q'].dtype} {name_of(form)}"
        try:
            found, again = (step(given, **form).transpose(1, 2) for _ in range(2))
            with poisoned():
                third = step(given, **form).transpose(1, 2)
        except Exception as refusal:
            # A launch that does not fit is no wrong result.
            report.log(f"none  {what}: {' '.join(str(refusal).split())[-200:]}")
            continue
        bad = [f"{what}: two runs differ"] if not torch.equal(found, again) else []
        bad += [f"{what}: NaN in fresh memory shows"] if not torch.equal(found, third) else []
        right += [form] if is_right(report, what, found, (exact, bound)) and not bad else []
        report.log.wrong += bad
    return right


def is_right(report: Report, what: str, found: Tensor, wanted: tuple[Tensor, float]) -> bool:
    exact, bound = wanted
    error, worst = worst_error(found, exact, timed=True)
    report.log(f"{'ok   ' if error <= bound else 'WRONG'} {what}: {error:.1e} of {bound:.1e}")
    report.log.wrong += [] if error <= bound else [f"{what}: {error:.2e}, at most {bound:.2e}: {worst}"]
    return error <= bound


def forms_of(batch: int) -> list[dict[str, Any]]:
    """What is held and timed at this batch."""
    splits = [{**base, "splits": count} for base in (FUSED, LISTED) for count in SPLITS.get(batch, (2,))]
    return [
        *FORMS.values(),
        *splits,
        *({**base, "read": one} for base, launches in READS for one in launches),
    ]


def best_together(times: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """Each setting that was faster than none, of the form that was fastest."""
    base = LISTED if min(times, key=lambda one: one[0])[1].get("listed") else FUSED
    group = [(ms, form) for ms, form in times if form.get("listed") == base.get("listed") and "fused" in form]
    found = dict(base)
    for name in ("splits", "read", "ahead"):
        _, form = min(
            ((ms, form) for ms, form in group if form == base or name in form), key=lambda one: one[0]
        )
        found |= form
    return found


def times_of(report: Report, shape: dict[str, int], caches: list[Given], forms: list[dict[str, Any]]) -> None:
    """Milliseconds of the forms and of what they are beside; adds a line to the table."""
    count, read = len(caches), step_bytes(shape)
    half = [torch.empty(read // 2, dtype=torch.uint8, device=report.device) for _ in range(2 * count)]

    def copy() -> None:
        for to, of in zip(half[::2], half[1::2], strict=True):
            to.copy_(of)

    def row(name: str, call: Callable[..., Tensor], **change: Any) -> float:
        return report.row(
            name, "decode_graph", shape, each(call, [{**one, **change} for one in caches]), count
        )

    floor = report.row("copy of the bytes", "decode_graph", shape, copy, count)
    rival = row("cudnn", partial(dense, "cudnn"))

    def timed_form(form: dict[str, Any], **change: Any) -> float:
        name = name_of(form) + "".join(f", {key} {value}" for key, value in change.items())
        return row(name, lambda **given: step(given, **form), **change)

    times = [timed_form(form) for form in forms]
    for base in (FUSED, LISTED):
        timed_form(base, top=1)
    row("scores alone", scores)
    together = best_together(list(zip(times, forms, strict=True))) if forms else {}
    if together not in forms and held(report, caches[0], [together]):
        forms, times = [*forms, together], [*times, timed_form(together)]
    report.row(
        "three launches, eager", "decode", shape, each(lambda **given: step(given, **APART), caches), count
    )
    eager = report.row(
        "fused, eager", "decode", shape, each(lambda **given: step(given, fused=True), caches), count
    )
    named = {name_of(form): ms for form, ms in zip(forms, times, strict=True)}
    for name in dict.fromkeys(
        ("three launches", "fused", "listed", min(named, key=named.__getitem__, default="fused"))
    ):
        ms = named.get(name, float("inf"))
        report.table.append(
            f"decode B={shape['B']:3} 128 K: {ms * 1e3:7.1f} us, dense {rival * 1e3:7.1f}: {rival / ms:5.2f} x (goal 8); "
            f"copy {floor * 1e3:6.1f}, share {floor / ms:.2f}: {name}"
        )
    report.table.append(f"decode B={shape['B']:3} 128 K: fused, eager {eager * 1e3:.1f} us")


def scores(**given: Any) -> Tensor:
    """What the first launch of a step leaves."""
    sides = tuple(given[name] for name in ("q", "k", "v", "landmarks"))
    with tuning(fused=True):
        call = Call(
            sides, given["start"], (None, None), (given["q"].shape[3] ** -0.5, given["block"], given["top"])
        )
        return call.logits(0, 1)


def decode(report: Report, late: Callable[[], bool]) -> None:
    for shape in map(dict, landmark_attention.cases.decode_shapes):
        if late():
            report.log("decode: out of time")
            return
        count = CACHES if shape["B"] == 1 else 1
        caches = [drawn(shape, HALF, report.device, seed) for seed in range(count)]
        right = held(report, caches[0], forms_of(shape["B"]))
        times_of(report, shape, caches, right)
        del caches
        layer(report, shape)
        torch.cuda.empty_cache()
    shape = dict(landmark_attention.cases.decode_shapes[0])
    for change, dtype in OTHERS:
        if late():
            report.log("other forms: out of time")
            return
        held(report, drawn({**shape, **change}, dtype, report.device), list(FORMS.values()))
    fetched(report, shape, drawn(shape, HALF, report.device))


def fetched(report: Report, shape: dict[str, int], given: Given) -> None:
    """A step whose blocks wait in host memory, beside the same from the device's."""
    kept = HostKVLayer.filled(given["k"], given["v"], shape["block"])
    places = Places(shape["block"], shape["S"], None, report.device)

    def fetch() -> Tensor:
        with force_path("triton"), torch.no_grad():
            return attend_fetched(
                given["q"], kept, given["landmarks"], places, written=None, top=shape["top"]
            )

    is_right(report, "from host memory", fetch().transpose(1, 2), exact_and_bound(report, given))
    ms = report.row("blocks in host memory, eager", "decode", shape, fetch)
    report.table.append(f"decode B={shape['B']:3} 128 K, blocks in host memory, eager: {ms * 1e3:.0f} us")


def layer(report: Report, shape: dict[str, int]) -> None:
    """A step of the mixer around the op, of a small width: weights are little of what is read. One cache, in part in L2."""
    H, N, d = shape["H"], shape["N"], shape["K"]
    sizes: dict[str, Any] = {
        "heads": H,
        "kv_heads": N,
        "head_dim": d,
        "block": shape["block"],
        "top": shape["top"],
    }
    rope = {"fraction": 1.0, "theta": 1e4}
    mixer = LandmarkModule(Site(WIDTH, 0, 1), rope=rope, qk_norm=True, **sizes).eval()
    mixer = mixer.to(report.device, HALF)
    x = torch.randn(shape["B"], 1, WIDTH, device=report.device, dtype=HALF)
    cache = mixer.filled_cache(shape["B"], shape["S"] - 1, x)
    positions = torch.full((shape["B"], 1), shape["S"] - 1, device=report.device)
    for name, form in FORMS.items():

        def run(form: dict[str, Any] = form) -> Tensor:
            with tuning(**form), force_path("triton"), torch.no_grad():
                return mixer(x, LayerCall(positions, cache=cache))  # type: ignore[no-any-return]

        ms = report.row(f"layer, {name}", "decode_graph", shape, run)
        report.table.append(
            f"decode B={shape['B']:3} 128 K: layer of width {WIDTH}, {name}: {ms * 1e3:.1f} us"
        )


def tiny(report: Report) -> None:
    """The same on a CPU: what is held, interpreted, and one time."""
    for dtype in (torch.float32, torch.float16):
        given = drawn(FEW, dtype, report.device)
        given["start"][1:] -= 37
        held(report, given, [{}, FUSED, LISTED, {**LISTED, "splits": 3}])
    fetched(
        report, {**FEW, "B": 1}, {name: x[:1] if isinstance(x, Tensor) else x for name, x in given.items()}
    )


def warm(part: slice) -> None:
    """Compiles some of what will run."""
    cuda, shape = torch.device("cuda"), dict(landmark_attention.cases.decode_shapes[0])
    things: list[tuple[dict[str, int], torch.dtype, dict[str, Any]]] = [
        ({}, HALF, form) for form in (*forms_of(1), *({"splits": 1, **form} for form in forms_of(16)))
    ]
    things += [(change, dtype, form) for change, dtype in OTHERS for form in FORMS.values()]
    for change, dtype, form in things[part]:
        try:
            step(drawn({**shape, **change}, dtype, cuda), **form)
        except Exception as refusal:
            print(f"{name_of(form)}: {str(refusal).splitlines()[0]}", flush=True)

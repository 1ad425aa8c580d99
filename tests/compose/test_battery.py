"""The parity battery and `heddle verify`: what passes, what is expected to fail, and that mistakes are found."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from heddle import api, cli
from heddle.compose.hf import export as export_file
from heddle.compose.hf import parity
from heddle.compose.hf.battery import Battery, auto_class_of
from heddle.compose.hf.card import Card, ParityRow
from heddle.compose.hf.checkpoint import open_checkpoint, read_config
from heddle.compose.hf.config import HeddleConfig
from heddle.compose.hf.encoder import HeddleForSequenceClassification
from heddle.compose.hf.export import export
from heddle.compose.hf.known_failures import (
    BEAMS,
    CHUNKS,
    CHUNKS_PLACED,
    GENERATION,
    ONE_STEPPED,
    RIGHT_STEPPED,
    known_failures,
)
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.hf.parity import BLOCKS, RECURRENT, WINDOW, Loaded, battery
from heddle.compose.hf.second_reader import second_reader
from heddle.errors import HeddleError

ATTENTION: dict[str, Any] = {
    "kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8, "rope": {"theta": 1e4, "fraction": 1.0},
    "qk_norm": True, "gate": False, "window": None,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "kind": "gated_deltanet", "heads": 2, "value_heads": 4, "head_dim": 8, "value_dim": 8, "short_conv": 4,
    "negative_eigenvalues": False,
}  # fmt: skip
CHOSEN = ATTENTION | {"selection": {"block": 8, "count": 4, "sink": 1, "recent": 2}}
LIGHTNING = {"kind": "decay_attention", "heads": 4, "head_dim": 8, "form": "lightning", "short_conv": None}
HYBRID = (DELTA, ATTENTION, LIGHTNING)
HOW: dict[str, Any] = {"trusted": True, "reader": second_reader, "known": known_failures}


def config_of(*mixers: dict[str, Any], **more: Any) -> HeddleConfig:
    channel = {"kind": "swiglu", "width": 48}
    layers = [{"mixer": mixer, "channel": channel, "norm": "rmsnorm"} for mixer in mixers]
    return HeddleConfig(vocab_size=256, hidden_size=32, layers=layers, initializer_range=0.25, **more)


def causal(*mixers: dict[str, Any]) -> HeddleForCausalLM:
    torch.manual_seed(0)
    return HeddleForCausalLM(config_of(*mixers)).eval()


def classifier() -> HeddleForSequenceClassification:
    torch.manual_seed(0)
    attention = {**ATTENTION, "causal": False}
    config = config_of(attention, attention, model_kind="encoder", readout={"kind": "mean"}, num_labels=3)
    return HeddleForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of exports, by name; that they are right is what is tested here."""
    base = tmp_path_factory.mktemp("folders")
    made = {"hybrid": lambda: causal(*HYBRID), "classifier": classifier}

    def folder(name: str) -> Path:
        if not (base / name).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    export_file, "verify", lambda *_, **__: export_file.Verification(0.0, "", "5", "2")
                )
                export(made[name](), base / name, card=Card(name, "version: 1\n"))
        return base / name

    return folder


def checks(model: Any, folder: Path, *, full: bool = False) -> dict[str, SimpleNamespace]:
    """The battery in this process, on a model that stands for the one of the folder."""
    loaded = Loaded(model, AutoModelForCausalLM, str(folder), str(folder), 0.0, **HOW)
    return {row["check"]: SimpleNamespace(**row) for row in battery(loaded, full=full)}


def failing(rows: dict[str, SimpleNamespace]) -> set[str]:
    return {name for name, row in rows.items() if not row.passed and not row.expected}


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    seen = capsys.readouterr()
    return int(left.value.code or 0), seen.out + seen.err


def test_an_export_passes_the_whole_battery(exported: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, told = run_cli(capsys, "verify", exported("hybrid"), "--trust-remote-code", "--json")
    found = json.loads(told)
    assert status == 0
    assert found["ok"]
    rows = {row["check"]: row for row in found["rows"]}
    assert {name for name, row in rows.items() if row["verdict"] != "pass"} == {"right padding, then steps"}
    assert rows["right padding, then steps"]["verdict"] == "expected"
    assert RECURRENT in rows["right padding, then steps"]["note"]
    assert {
        "loads in a clean process", "raw files against the class", "saved again and reloaded", "one-token steps",
        "chunked prefill", "chunked prefill, positions given", "left padding", "right padding",
        "batch of one, padded", "batch of one, padded, then steps", "bfloat16, full pass",
        "bfloat16, one-token steps", "greedy, 64 tokens, with and without cache",
        "three beams, with and without cache",
    } <= rows.keys()  # fmt: skip
    assert found["device"]
    assert found["transformers"]


def test_an_encoder_has_the_checks_without_a_cache(exported: Any) -> None:
    folder = exported("classifier")
    assert auto_class_of(read_config(folder), folder) == "AutoModelForSequenceClassification"
    model = classifier()
    model.load_state_dict(open_checkpoint(folder).load())
    rows = checks(model, folder)
    assert all(row.passed for row in rows.values())
    assert {"left padding", "right padding", "batch of one, padded"} <= rows.keys()
    assert not [name for name in rows if "steps" in name or "beams" in name]


def test_right_padding_is_kept_by_plain_attention_alone(exported: Any) -> None:
    check = "right padding, then steps"
    plain, window, chosen, state = (
        checks(causal(mixer), exported("hybrid"))[check]
        for mixer in (ATTENTION, ATTENTION | {"window": 9}, CHOSEN, LIGHTNING)
    )
    assert plain.passed
    assert not plain.expected
    assert (window.passed, window.expected) == (False, WINDOW)
    assert (chosen.passed, chosen.expected) == (False, BLOCKS)
    assert (state.passed, state.expected) == (False, RECURRENT)


def test_without_trust_no_code_of_the_folder_runs(
    exported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(exported("hybrid"), tmp_path / "copy")
    marker = tmp_path / "ran"
    (folder / "modeling_heddle.py").write_text(f"open({str(marker)!r}, 'w')\n")
    status, told = run_cli(capsys, "verify", folder)
    assert status == 2
    assert "untrusted-code" in told
    assert not marker.exists()


def test_a_folder_that_is_no_export_is_told(
    exported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, told = run_cli(capsys, "verify", tmp_path, "--trust-remote-code")
    assert (status, "no model folder" in told) == (2, True)
    folder = shutil.copytree(exported("hybrid"), tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    status, told = run_cli(capsys, "verify", folder, "--trust-remote-code", "--json")
    assert status == 2
    assert json.loads(told)["errors"][0]["code"] == "checkpoint-broken"
    assert "cut off: it ends at byte" in told


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "neither auto_map nor architectures"),
        ({"architectures": ["LlamaModel"]}, "neither auto_map nor architectures"),
        ({"architectures": ["LlamaForCausalLM"]}, "vocab_size is None"),
    ],
)
def test_a_configuration_that_says_too_little_is_told(tmp_path: Path, config: Any, told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(HeddleError, match=told):
        api.verify(tmp_path)


def test_a_cache_that_forgets_is_found(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal(*HYBRID)
    mixer = type(model.model.layers[2].mixer)
    usual = mixer.forward

    def forgetful(self: Any, x: Any, call: Any) -> Any:
        if x.shape[1] == 1 and call.cache is not None:
            call.cache.reset()
        return usual(self, x, call)

    monkeypatch.setattr(mixer, "forward", forgetful)
    monkeypatch.setattr(parity, "GREEDY", 12)
    monkeypatch.setattr(parity, "LENGTH", 24)
    found = failing(checks(model, exported("hybrid"), full=True))
    assert {"one-token steps", "batch of one, padded, then steps"} <= found
    assert "greedy, 12 tokens, with and without cache" in found
    assert not {"left padding", "right padding"} & found


def test_the_full_form_runs_by_itself_where_it_is_quick(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "LENGTH", 24)
    monkeypatch.setattr(parity, "GREEDY", 12)
    folder = str(exported("classifier"))
    loaded = Loaded(classifier(), HeddleForSequenceClassification, folder, folder, 0.0, **HOW)
    for limit, form in ((1e9, "full"), (0.0, "short")):
        monkeypatch.setattr(parity, "FULL_SECONDS", limit)
        found = parity.asked(loaded, "auto")
        assert (found["form"], found["seconds"] > 0) == (form, True)
        assert ("bfloat16, full pass" in [row["check"] for row in found["rows"]]) == (form == "full")
    assert parity.asked(loaded, "full")["form"] == "full"
    assert parity.asked(loaded, "short")["form"] == "short"


def test_a_model_is_float64_for_a_while_and_then_what_it_was() -> None:
    model = causal(*HYBRID)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with parity.in_float64(model):
        assert {one.dtype for one in model.state_dict().values()} == {torch.float64}
        assert model(torch.arange(9)[None]).logits.dtype == torch.float64
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(one.dtype == before[name].dtype for name, one in model.state_dict().items())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_an_unknown_form_of_the_battery_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeddleError, match="battery is 'long'") as error:
        export(causal(ATTENTION), tmp_path / "out", card=Card("a", "version: 1\n"), battery="long")
    assert (error.value.code, [*tmp_path.iterdir()]) == ("bad-argument", [])


def test_padding_that_is_seen_is_found(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal(ATTENTION)
    monkeypatch.setattr(type(model.model), "_call", _without_mask(type(model.model)._call))
    found = failing(checks(model, exported("hybrid")))
    assert {"left padding", "batch of one, padded", "batch of one, padded, then steps"} <= found
    assert not {"one-token steps", "chunked prefill"} & found


def _without_mask(usual: Any) -> Any:
    return lambda self, x, _, *rest: usual(self, x, None, *rest)


def test_files_that_disagree_with_the_class_are_found(exported: Any, tmp_path: Path) -> None:
    model, folder = causal(*HYBRID), exported("hybrid")
    assert checks(model, folder)["raw files against the class"].passed
    changed = copy.deepcopy(model)
    changed.model.norm.weight.data[3] += 1
    row = checks(changed, folder)["raw files against the class"]
    assert (row.figure, row.note) == (1.0, "model.norm.weight has other values")
    other = shutil.copytree(folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["extra"] = weights.pop("model.norm.weight")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    loaded = Loaded(model, AutoModelForCausalLM, str(other), str(folder), 0.0, **HOW)
    row = next(row for row in battery(loaded, full=False) if row["check"] == "raw files against the class")
    assert row["figure"] == 2.0
    assert "extra is not written by the class; model.norm.weight is not in the files" in row["note"]


def test_a_configuration_that_changes_as_the_class_saves_it_is_found(exported: Any, tmp_path: Path) -> None:
    folder = exported("hybrid")
    again = shutil.copytree(folder, tmp_path / "again")
    config = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps(config | {"norm_eps": 0.5, "dtype": "bfloat16"}))
    loaded = Loaded(causal(*HYBRID), AutoModelForCausalLM, str(folder), str(again), 0.0, **HOW)
    row = next(row for row in battery(loaded, full=False) if row["check"] == "raw files against the class")
    assert (row["passed"], row["note"]) == (
        False,
        "norm_eps of config.json is 1e-06, written by the class 0.5",
    )


def test_what_is_not_finite_fails_and_an_exception_is_told(exported: Any) -> None:
    model = causal(ATTENTION)
    model.model.norm.weight.data[0] = float("nan")
    rows = checks(model, exported("hybrid"))
    assert {"full pass", "one-token steps", "left padding"} <= failing(rows)
    assert parity.attempt(lambda: 1 / 0) == (float("inf"), "ZeroDivisionError: division by zero")


def test_a_failed_check_ends_with_status_1_and_its_figure_is_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (ParityRow("left padding", float("inf"), 1e-6, "fail", "KeyError: 'x'"),)
    found = Battery(Path("m"), "AutoModelForCausalLM", rows, "cpu", "5", "2")
    monkeypatch.setattr(api, "verify", lambda *_, **__: found)
    status, told = run_cli(capsys, "verify", "m", "--json")
    assert (status, json.loads(told)["ok"], json.loads(told)["rows"][0]["figure"]) == (1, False, None)
    status, told = run_cli(capsys, "verify", "m")
    assert status == 1
    assert "FAILED" in told
    assert "1 of 1 checks failed" in told


NATIVE = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_hidden_layers": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 16,
}  # fmt: skip
LINEAR, FULL = "linear_attention", "full_attention"


def test_a_known_failure_excuses_nothing_larger_and_no_other_error(exported: Any) -> None:
    folder, check = str(exported("hybrid")), "chunked prefill"
    how = HOW | {"known": lambda _: {check: ("so it is", "ValueError: two lengths")}}
    asked = parity.checks_of(Loaded(causal(ATTENTION), None, folder, folder, 0.0, **how), full=False)

    def failing_with(error: Exception) -> Any:
        def compute(_: Any) -> Any:
            raise error

        return compute

    expected = {
        "so large": lambda _: (2 * asked.exact, asked.exact),
        "larger": lambda _: (9 * asked.exact, asked.exact),
        "no number": lambda _: (asked.exact / 0, asked.exact),
        "its error": failing_with(ValueError("two lengths, 3 and 4")),
        "another error": failing_with(ValueError("three lengths")),
    }
    found = {name: asked.compared(check, compute) for name, compute in expected.items()}
    assert not any(row.passed for row in found.values())
    assert [name for name, row in found.items() if row.expected] == ["so large", "its error"]


@pytest.mark.parametrize("kinds", [[LINEAR, FULL], [FULL, LINEAR]])
def test_what_minimax_fails_by_itself_is_expected(kinds: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**NATIVE, layer_types=kinds)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    rows = checks(model, tmp_path, full=True)
    failed = {name for name, row in rows.items() if not row.passed}
    assert failing(rows) == set()
    # How far off it is today: half and twice of what was measured, or more.
    counts = {BEAMS: (1, 24), f"greedy, 64 tokens, {GENERATION}": (1, 128)}
    steps = {CHUNKS: (0.03, 0.3), CHUNKS_PLACED: (0.03, 0.3), ONE_STEPPED: (0.015, 0.15)}
    today = counts | steps if kinds[0] == LINEAR else {BEAMS: counts[BEAMS]}
    assert failed - {RIGHT_STEPPED} == today.keys()
    for check, (least, most) in today.items():
        assert least <= rows[check].figure <= most, (check, rows[check].figure)
    # Without a cache it is right.
    assert {"left padding", "right padding", "raw files against the class"} & failed == set()

"""Layers of flash-linear-attention where that package is not, or does not import: told at their line, and nothing else is harmed.

Where it is there: tests/compose/test_fla_gpu.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heddle.compose.optional.fla import flat, nested
from heddle.errors import HeddleError
from heddle.specs import ModelSpec, spec_hash
from heddle.specs.layer import Site
from heddle.specs.optional.fla import Fla
from heddle.specs.plugins import OPTIONAL, load_optional

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "fla" / "gated_deltanet.yaml"
# Hides the package from the process, if this machine has it.
WITHOUT = "import sys; sys.modules['fla'] = None; from heddle.cli import main; main()"


def heddle(
    *command: str, script: str = WITHOUT, where: Path | None = None
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(one) for one in (ROOT, where) if one is not None)
    return subprocess.run(
        [sys.executable, "-c", script, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_the_package_its_line_says_what_to_install() -> None:
    done = heddle("check", str(EXAMPLE))
    assert done.returncode == 2
    assert "gated_deltanet.yaml:9:21: blocks.linear.mixer.kind: there is no mixer kind 'fla'" in done.stderr
    assert "pip install 'heddle-lm[fla]'" in done.stderr


def test_without_the_package_all_else_works_and_it_is_no_kind() -> None:
    assert heddle("check", "examples/specs/hybrid.yaml").returncode == 0
    assert '"Fla"' not in heddle("schema").stdout


def test_a_package_that_does_not_import_is_told_at_the_line_of_the_layer(tmp_path: Path) -> None:
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("raise ImportError('no kernels here')\n")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from heddle.cli import main; main()"
    plain = heddle("check", "examples/specs/hybrid.yaml", script=script)
    assert plain.returncode == 0, plain.stderr
    done = heddle("check", str(EXAMPLE), script=script)
    assert done.returncode == 1
    assert "blocks.linear.mixer.layer: flash-linear-attention does not import: no kernels here" in done.stderr
    assert "[package-missing]" in done.stderr
    assert "hint: pip install 'heddle-lm[fla]'" in done.stderr


def test_a_folder_of_that_name_is_not_the_package(tmp_path: Path) -> None:
    (tmp_path / "fla").mkdir()
    code = "from heddle.specs.plugins import load_optional; print(*load_optional())"
    assert (
        "Broken(kind='fla'"
        in heddle(script=f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}").stdout
    )


def test_every_kind_that_waits_for_a_package_has_an_extra_of_its_name() -> None:
    kinds, absent = load_optional()
    assert len(kinds) + len(absent) == len(OPTIONAL)
    text = (ROOT / "pyproject.toml").read_text()
    for one in OPTIONAL:
        assert f'\n{one.kind} = ["{one.package}' in text


def test_a_layer_is_plain_data_and_its_arguments_decide_the_hash() -> None:
    def hash_of(layer: str, **options: object) -> str:
        block = {
            "mixer": Fla.model_validate({"layer": layer, "options": options}),
            "channel": {"kind": "none"},
        }
        sizes = {"vocab_size": 9, "hidden_size": 32, "layers": ["it"]}
        made = ModelSpec.model_validate(
            sizes | {"blocks": {"it": block | {"mixer": {"kind": "attention", "heads": 1}}}}
        )
        held = made.blocks["it"].model_copy(update={"mixer": block["mixer"]})
        return spec_hash(made.model_copy(update={"blocks": {"it": held}}))

    gated = hash_of("GatedDeltaNet", num_heads=2, expand_v=1.0)
    assert gated == hash_of("GatedDeltaNet", expand_v=1, num_heads=2)
    others = [
        hash_of("DeltaNet", num_heads=2, expand_v=1.0),
        hash_of("GatedDeltaNet", num_heads=2, expand_v=1.5),
        hash_of("GatedDeltaNet", num_heads=2, expand_v=1.0, use_gate=False),
        hash_of("GatedDeltaNet", num_heads=2, expand_v=1.0, use_gate=True),
        hash_of("GatedDeltaNet", num_heads=2, expand_v=1.0, use_gate=None),
    ]
    assert len({gated, *others}) == 6
    spec = Fla.model_validate({"layer": "GatedDeltaNet", "options": {"num_heads": 2}})
    assert spec.runtime(Site(32)) == {"kind": "fla", "layer": "GatedDeltaNet", "options": {"num_heads": 2}}
    assert set(spec.exemptions()) == {"written"}


def test_a_state_of_that_package_is_named_and_put_together_again() -> None:
    tensors = [torch.full((2, 3), float(index)) for index in range(4)]
    state = {
        "recurrent_state": tensors[0],
        "attn_state": None,
        "conv_state": (tensors[1], None, tensors[2]),
        "ffn_state": None,
    }
    names = flat(state, "GatedDeltaNet")
    assert list(names) == ["recurrent_state", "conv_state.0", "conv_state.2"]
    assert nested(names) == state
    rows = {"recurrent_state": (tensors[0], tensors[3])}
    assert nested(flat(rows, "HGRN"))["recurrent_state"] == rows["recurrent_state"]
    with pytest.raises(HeddleError, match="keeps a conv_state that is no tensor"):
        flat({"conv_state": {"q": tensors[0]}}, "GatedDeltaNet")

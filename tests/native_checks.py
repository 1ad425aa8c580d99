"""What a native class of transformers makes of folders, in a process without heddle: `python -I native_checks.py TASK.json`.

The task names folders, token ids, the packages to hide and the path, so that any version of transformers can be asked. For
each folder it writes down logits in float32 and in bfloat16, greedy tokens without a cache, whether they are the same with one,
and which tensors the class and the folder do not have in common; of the folder that is `begun`, with the weights that a model
begins with, the logits in float32. Where something raises, why.
"""

from __future__ import annotations

import json
import sys
import traceback
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Hidden(MetaPathFinder):
    """A finder that does not find some packages."""

    def __init__(self, finder: Any, names: list[str]) -> None:
        self.finder, self.names = finder, names

    def find_spec(self, fullname: str, *where: Any) -> Any:
        return None if fullname.partition(".")[0] in self.names else self.finder.find_spec(fullname, *where)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def asked(folder: str, ids: Any, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is told of a folder, and its tensors."""
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    model, loading = load(folder, dtype=torch.float32, output_loading_info=True)
    model.eval()
    usual = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    usual["attention_mask"] = torch.ones(1, 9, dtype=torch.long)
    written = [model.generate(ids[:1, :9], use_cache=cached, **usual) for cached in (True, False)]
    narrow = load(folder, dtype=torch.bfloat16).eval()
    found = {
        "logits": model(ids, use_cache=False).logits,
        "bfloat16": narrow(ids, use_cache=False).logits.float(),
        "tokens": written[1],
    }
    keys = sorted(str(key) for kind in loading.values() for key in kind)
    told = {"class": type(model).__name__, "keys": keys, "cache_agrees": bool(written[0].equal(written[1]))}
    return told, found


def logits_of(folder: str, ids: Any) -> Any:
    """In float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(ids, use_cache=False).logits


def main(task: SimpleNamespace) -> None:
    sys.path[:] = task.path
    sys.meta_path[:] = [Hidden(finder, task.hidden) for finder in sys.meta_path]
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    ids, results, tensors = load_file(task.ids)["ids"], {}, {}
    for name, folder in task.folders.items():
        try:
            with torch.no_grad():
                results[name], found = asked(folder, ids, task.tokens)
                found["begun"] = logits_of(task.begun[name], ids)
            tensors |= {f"{name}.{what}": held.contiguous() for what, held in found.items()}
        # Each folder is told by itself.
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
    save_file(tensors, task.tensors)
    imported = sorted(set(task.hidden) & set(sys.modules))
    found = {"results": results, "imported": imported, "transformers": transformers.__version__}
    Path(task.found).write_text(json.dumps({**found, "torch": torch.__version__}))


if __name__ == "__main__":
    main(SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text())))

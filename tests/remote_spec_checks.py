"""What exported folders with code of their own compute in a process without heddle: `python -I remote_spec_checks.py TASK.json`.

The task names folders with the class that loads each, token ids, the packages to hide and the path, so that any version of
transformers can be asked. For each folder it writes down logits in float32 and bfloat16, the hidden states of `AutoModel`, and of
a model that generates greedy tokens in float64 with a cache and without; where something raises, why.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def asked(folder: str, auto_class: str, ids: Any, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is told of a folder, and its tensors."""
    import torch
    import transformers

    def load(name: str, dtype: Any) -> tuple[Any, Any]:
        usual = {"trust_remote_code": True, "dtype": dtype, "output_loading_info": True}
        found, loading = getattr(transformers, name).from_pretrained(folder, **usual)
        return found.eval(), sorted(str(key) for kind in loading.values() for key in kind)

    (model, keys), (bare, _) = load(auto_class, torch.float32), load("AutoModel", torch.float32)
    narrow, _ = load(auto_class, torch.bfloat16)
    found = {"logits": model(ids).logits, "bfloat16": narrow(ids).logits.float()}
    hidden = [one(ids, use_cache=False).last_hidden_state for one in (bare, model.model)]
    told = {"keys": keys, "bare_agrees": bool(torch.equal(*hidden)), "cache_agrees": True}
    if model.can_generate():
        usual = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        usual["attention_mask"] = torch.ones(1, 9, dtype=torch.long)
        exact = model.double()
        written = [exact.generate(ids[:1, :9], use_cache=cached, **usual) for cached in (True, False)]
        told["cache_agrees"], found["tokens"] = bool(torch.equal(*written)), written[0]
    return told, found


def main(task: SimpleNamespace) -> None:
    sys.path[:] = task.path
    from native_checks import Hidden

    sys.meta_path[:] = [Hidden(finder, task.hidden) for finder in sys.meta_path]
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    ids, results, tensors = load_file(task.ids)["ids"], {}, {}
    for name, (folder, auto_class) in task.folders.items():
        try:
            with torch.no_grad():
                results[name], found = asked(folder, auto_class, ids, task.tokens)
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

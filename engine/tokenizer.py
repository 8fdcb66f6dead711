"""A tokenizer as transformers makes it of the published files: kept by the bake, so that a load need not make it again.

Of UMT5's 256,000 pieces transformers reads the file three times, builds the model twice and throws one away, and in
nearly all that time no other thread gets the interpreter: 1.8 s. What is kept is read and built once, in 0.9 s. Its
scores keep their last digit: `tokenizers` changes that of one in eight when it reads its own files, and a word like
"soooo" can be cut in several ways whose scores differ by no more.
"""

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

READY = "ready.json"  # in the tokenizer's folder, beside the published files
KEPT = (
    *("eos_token", "pad_token", "unk_token", "model_max_length"),
    *("padding_side", "truncation_side", "model_input_names"),
)
FIRST = 8  # pieces that it is begun with, special ones among them, before the whole vocabulary takes their place


def make_ready(folder: Path) -> None:
    """Write beside the published files what AutoTokenizer makes of them, unless it would be read back as another.

    A worker does without: it makes its tokenizer anew then, as it does of what an older bake left.
    """
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ready = {
            "made_by": _libraries(),
            "settings": {name: getattr(made, name) for name in KEPT},
            "tokenizer": _stored(made),
        }
        is_same = _stored(_built(ready)) == ready["tokenizer"]
    except Exception as error:  # noqa: BLE001 `tokenizers` raises nothing narrower
        log.warning("%s: not kept ready (%s)", folder.name, error)
        return
    if not is_same:
        log.warning("%s: not kept ready, for it would be read back as another", folder.name)
        return
    (folder / READY).write_text(json.dumps(ready, ensure_ascii=False), encoding="utf-8")


def read_ready(folder: Path) -> Any | None:
    """What cuts text as AutoTokenizer's of `folder` does; None if the bake kept none, or kept it for other versions."""
    path = folder / READY
    if not path.is_file():
        return None
    try:
        ready = json.loads(path.read_bytes())
        if ready["made_by"] == _libraries():
            return _built(ready)
        log.info("%s: made anew, for it was baked with other versions of its libraries", folder.name)
    except Exception as error:  # noqa: BLE001 as above
        log.warning("%s: made anew, for what the bake kept cannot be read (%s)", folder.name, error)
    return None


def _libraries() -> dict[str, str]:
    """What decides, beside the published files, how text is cut."""
    import tokenizers
    import transformers

    return {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}


def _stored(tokenizer: Any) -> dict[str, Any]:
    """All that it cuts text by."""
    return dict(json.loads(tokenizer.backend_tokenizer.to_str()))


def _built(ready: dict[str, Any]) -> Any:
    """Begun with a few pieces, because transformers copies what it is given; then it gets the others."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast

    stored, model = ready["tokenizer"], ready["tokenizer"]["model"]
    few = {**stored, "added_tokens": [], "model": {**model, "vocab": model["vocab"][:FIRST]}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(few)), **ready["settings"])
    whole = tokenizer.backend_tokenizer
    whole.model = Unigram([*map(tuple, model["vocab"])], model["unk_id"], model["byte_fallback"])
    for line in stored["added_tokens"]:
        token = AddedToken(**{name: value for name, value in line.items() if name != "id"})
        add = whole.add_special_tokens if line["special"] else whole.add_tokens
        add([token])
    return tokenizer

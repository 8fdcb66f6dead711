"""Real tokenizers with small vocabularies in the published files: byte-level BPE for CLIP, Unigram for T5."""

import json
from pathlib import Path

TEXT = """
a the of in on and with to red fox dog cat bird horse person woman man child walks runs turns smiles
looks slowly fast camera moves pans zooms light dark morning evening night city street forest garden
field sea beach mountain river snow rain wind sun moon sky cloud flower tree house window door road car
train boat photo picture painting drawing cinematic soft warm cold blue green yellow white black old
young small big close wide shot transition blurry noise distorted low quality
"""
WORDS = TEXT.split()
"""What gets a token of its own. Anything else is spelled by letters, so that prompts differ."""

END = "</w>"
START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"


def _bytes_as_letters() -> list[str]:
    """The 256 printable letters that GPT-2 and CLIP write bytes as, in the order of their vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable]
    return letters + [chr(256 + i) for i in range(256 - len(letters))]


def _merges() -> list[tuple[str, str]]:
    """Each word built from its letters, left to right."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        built = word[0] if len(word) > 1 else word + END
        for i, letter in enumerate(word[1:], 2):
            right = letter + END if i == len(word) else letter
            merges[(built, right)] = None
            built += right
    return list(merges)


def _clip_tokens() -> list[str]:
    letters = _bytes_as_letters()
    tokens = [*letters, *(letter + END for letter in letters), *dict.fromkeys(a + b for a, b in _merges())]
    return [*tokens, START_OF_TEXT, END_OF_TEXT]  # the end has the highest id: CLIP finds it by argmax


def _umt5_tokens() -> list[tuple[str, float]]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(chr(code), -8.0) for code in range(33, 127)]
    words = [(f"▁{word}", -4.0) for word in WORDS]
    return [*special, ("▁", -3.0), *letters, *words]


CLIP_SIZE = len(_clip_tokens())
UMT5_SIZE = len(_umt5_tokens())


def write_clip(folder: Path, pad: str) -> None:
    """CLIP's four files. SDXL's first tokenizer pads with the end token, its second with '!'."""
    vocabulary = {token: i for i, token in enumerate(_clip_tokens())}
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in _merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": START_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": pad,
        "unk_token": END_OF_TEXT,
    }
    _write_json(folder / "special_tokens_map.json", special)
    config = {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special}
    _write_json(folder / "tokenizer_config.json", config)


def write_umt5(folder: Path) -> None:
    """The fast tokenizer of UMT5 and its configuration."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(_umt5_tokens(), unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", special)
    config = {"extra_ids": 0, "model_max_length": 512, "tokenizer_class": "T5Tokenizer", **special}
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, values: dict[str, object] | dict[str, int] | dict[str, str]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""A tiny byte-level BPE tokenizer on disk, as llama.cpp's converter wants to find one.

Prompts are cut by the product alone, and the judge is given its token ids: so what the tokenizer
says of a text matters to neither. What must be right is which tokens are special.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ("the", "in", "an", "is", "Ġthe", "Ġin", "Ġan", "Ġis", "Ġa", "at", "er", "on", "ĊĊ")


def write_tokenizer(
    folder: Path, special: Sequence[str], *, bos: str | None, eos: str, template: str
) -> dict[str, int]:
    """The ids of the special tokens; tokenizer.json and its config are written to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: i for token, i in tokenizer.get_vocab().items() if token in special}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "add_bos_token": False,
        "chat_template": template,
        "added_tokens_decoder": {str(i): {"content": t, **_SPECIAL} for t, i in ids.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ids


def write_gemma_tokenizer(
    folder: Path,
    first: Sequence[str],
    last: Sequence[str],
    *,
    eos: str,
    bos: str,
    pad: str,
    unk: str,
    template: str,
) -> dict[str, int]:
    """As `write_tokenizer`, but of characters, with bytes for what has none, as Gemma 4's is.

    first, last: special tokens that begin and end the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    folder.mkdir(parents=True, exist_ok=True)
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("i", "s"), ("▁", "a")]
    pieces = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n"]
    pieces += [chr(code) for code in range(33, 127)] + ["".join(pair) for pair in merges] + [*last]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token=unk)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([*first, *last])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unk,
        "extra_special_tokens": [t for t in (*first, *last) if t not in (bos, eos, pad, unk)],
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {token: vocabulary[token] for token in (*first, *last)}


_SPECIAL = {
    "special": True,
    "normalized": False,
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
}

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
    ids = {token: tokenizer.token_to_id(token) for token in special}
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


_SPECIAL = {
    "special": True,
    "normalized": False,
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
}

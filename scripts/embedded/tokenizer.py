"""The tokenizer, and prompts exactly as llama.cpp will tokenise them.

llama.cpp tokenises the text around an image in pieces, each with SentencePiece's dummy space in
front, so the pieces here are cut at the same places:

    <s>USER: | image | \\nIs there a fork in the image? ASSISTANT: |  Yes</s>
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from cmg_gguf.tiny.scenes import make_scene
from cmg_gguf.tiny.scenes.texts import Turn, conversations, vocabulary_lines

UNK, BOS, EOS = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ ' ' + message.content + '</s>' }}"
    "{% elif message.role == 'user' %}{{ 'USER: ' + message.content + ' ASSISTANT:' }}"
    "{% else %}{{ message.content + ' ' }}{% endif %}"
    "{% endfor %}"
)


class Tokenizer:
    """SentencePiece BPE without normalisation, as GGUF's tokenizer "llama" wants it."""

    def __init__(self, path: Path) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.encode = functools.lru_cache(maxsize=200_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.pieces.encode(text))

    @property
    def prefix(self) -> tuple[int, ...]:
        """Tokens in front of the image."""
        return (BOS, *self.encode("USER: "))

    def conversation(self, turns: Sequence[Turn], *, image: bool) -> tuple[list[int], list[bool]]:
        """Tokens behind the prefix (behind <s> without an image), and which of them are answers."""
        ids: list[int] = []
        answers: list[bool] = []
        for i, turn in enumerate(turns):
            start = "\n" if image and i == 0 else "USER: "
            asked = self.encode(f"{start}{turn.question} ASSISTANT:")
            said = (*self.encode(turn.answer), EOS)
            ids += [*asked, *said]
            answers += [False] * len(asked) + [True] * len(said)
        return ids, answers


def train_tokenizer(path: Path, vocab: int, n_scenes: int = 4000) -> None:
    """Learns the words of the drawn world and writes the SentencePiece model."""
    lines: list[str] = []
    for i in range(n_scenes):
        rng = np.random.default_rng((5, i))
        for conversation in conversations(make_scene("train", i, "counter"), rng, 6):
            lines += [part for turn in conversation for part in turn]
            lines.append(f"\n{conversation[0].question} ASSISTANT:")
            lines.append(f"USER: {conversation[0].question} ASSISTANT:")
    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!:;'-"
    lines += [line for line in vocabulary_lines() for _ in range(200)]
    lines += [" ".join(characters)] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=vocab,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        hard_vocab_limit=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )

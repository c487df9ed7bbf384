"""The vocabularies of tiny models: SentencePiece, the same with marks for tiles, and byte pairs."""

from __future__ import annotations

import gguf

UNK_TOKEN = 0
BOS_TOKEN = 1
EOS_TOKEN = 2
N_SPECIAL = 3
N_BYTES = 256
BYTE_PAIR_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPACE = "\u2581"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + '</s>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

WORDS = (  # separated by spaces
    "a an the is are was there this that it in on of and or not no yes to with at by for what "
    "which where who how many describe image picture photo shows see please answer question "
    "Yes No Is There What How Describe The USER ASSISTANT user assistant "
    "curious human chat between artificial intelligence gives "
    "helpful detailed polite answers man woman child person people dog cat bird horse car bus "
    "train boat table chair bottle cup plate book clock phone tree grass sky water street house "
    "red green blue yellow black white brown orange small large young old left right top bottom "
    "front next near under one two three four standing sitting holding riding eating looking"
)
FRAGMENTS = ("in", "er", "ed", "es", "re", "on", "an", "at", "ing", "ly")
MAX_GRID = 4
TILE_MARKS = (
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{y}_col_{x}>" for y in range(1, MAX_GRID + 1) for x in range(1, MAX_GRID + 1)),
)


def vocabulary(*, tiles: bool = False) -> list[str]:
    """Every piece of the vocabulary in order of its id; what tiles need is at the end.

    A piece is merged from two shorter ones that must be pieces too, so every word comes with
    all of its prefixes. Earlier pieces have higher scores and are merged first.
    """
    special = ["<unk>", "<s>", "</s>"]
    byte_pieces = [f"<0x{i:02X}>" for i in range(N_BYTES)]
    prefixes = [SPACE + word[:n] for word in WORDS.split() for n in range(1, len(word) + 1)]
    letters = [chr(code) for code in range(33, 127)]
    plain = list(dict.fromkeys([*prefixes, *FRAGMENTS, SPACE, *letters]))
    return special + byte_pieces + plain + (["\n\n", *TILE_MARKS] if tiles else [])


def byte_pairs() -> tuple[list[str], list[str]]:
    """The "gpt2" vocabulary, special tokens first and bytes next, and its merges.

    Of the merges two join a special token's first letters to what stands before it.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(N_BYTES) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    words = [letters[ord(" ")] + word for word in WORDS.split()]
    pairs = [(word[:n], word[n]) for word in words for n in range(1, len(word))]
    pairs = list(dict.fromkeys([*pairs, ("?", "<"), ("<", "|")]))
    pieces = [*BYTE_PAIR_SPECIALS, *(letters[byte] for byte in range(N_BYTES))]
    return [*pieces, *(a + b for a, b in pairs)], [f"{a} {b}" for a, b in pairs]


def add_pieces(writer: gguf.GGUFWriter, *, tiles: bool) -> None:
    """Writes `vocabulary` and the chat template."""
    kind = gguf.TokenType
    pieces = vocabulary(tiles=tiles)
    marks = [kind.CONTROL] * (len(TILE_MARKS) if tiles else 0)
    n_plain = len(pieces) - N_SPECIAL - N_BYTES - len(marks)
    special = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL]
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_types(special + [kind.BYTE] * N_BYTES + [kind.NORMAL] * n_plain + marks)
    scores = [-float(i) for i in range(n_plain)] + [0.0] * len(marks)
    writer.add_token_scores([0.0] * (N_SPECIAL + N_BYTES) + scores)
    writer.add_bos_token_id(BOS_TOKEN)
    writer.add_eos_token_id(EOS_TOKEN)
    writer.add_unk_token_id(UNK_TOKEN)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def add_byte_pairs(writer: gguf.GGUFWriter) -> None:
    """Writes `byte_pairs`; no chat template."""
    kind = gguf.TokenType
    pieces, merges = byte_pairs()
    n_plain = len(pieces) - N_SPECIAL
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(pieces)
    writer.add_token_types([kind.CONTROL] * N_SPECIAL + [kind.NORMAL] * n_plain)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(BYTE_PAIR_SPECIALS.index("<|im_end|>"))
    writer.add_add_bos_token(False)

"""The tokenizer.json of the Hugging Face hub: a byte-pair encoding (BPE) of one of two kinds.

- Byte-level (Llama 3, SmolLM2): a pattern cuts the text into pieces, and the UTF-8 bytes of each,
  spelled as letters, are merged.
- SentencePiece (Llama 2): data/sentencepiece.py cuts and merges characters.

Either way the file holds the pieces with their ids, a list of merges, best first, and the special
tokens. The post_processor (BOS and the like) is the chat template's task, and the decoder follows
from the rest.
"""

from functools import lru_cache

from data.sentencepiece import merge, read_json_spec
from data.tokenizer import LLAMA3_PATTERN, Tokenizer, byte_level_encoder
from nanosdd.checkpoint import read_json
from nanosdd.errors import InputError

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Digits are cut out first, one by one. So a number takes no space with it, and white space before
# a number counts as the end of a text.
SMOLLM2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

LLAMA3_SPLIT = {
    "type": "Split",
    "pattern": {"Regex": LLAMA3_PATTERN},
    "behavior": "Isolated",
    "invert": False,
}
SMOLLM2_DIGITS = {"type": "Digits", "individual_digits": True}

# What the pre_tokenizer does before its last step, ByteLevel; whether that step then cuts text with
# GPT-2's pattern; and the one pattern that does the same as both. (Characters that are newer than
# Unicode 14 may be cut differently: each library has the Unicode version of its day.)
PATTERNS = (
    ([LLAMA3_SPLIT], False, LLAMA3_PATTERN),
    ([SMOLLM2_DIGITS], True, SMOLLM2_PATTERN),
    ([], True, GPT2_PATTERN),
)


def read_tokenizer_json(path) -> Tokenizer:
    """The tokenizer of the file; InputError where it has anything that could lead to other ids."""
    spec = read_json(path)
    try:
        model = spec["model"]
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise ValueError(f"only a plain BPE model is read, this one has {key}")
        if model.get("type", "BPE") != "BPE":
            raise ValueError(f"only a BPE model is read, this one is {model['type']}")
        special = {}
        for token in spec.get("added_tokens", []):
            if not token["content"]:
                continue  # no text holds it
            if not token["special"]:
                raise ValueError(
                    f"the added token {token['content']!r} is not special, so ordinary text would "
                    "turn into it: mark it special or take it out"
                )
            special[token["content"]] = token["id"]
        ids = list((model["vocab"] | special).values())
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids) or len(set(ids)) < len(ids):
            raise ValueError("an id is used twice or is not a whole number")
        # A special token may also be a piece of text: a letter, as "!", or a word that merges make,
        # as "pad". What is spelled like a tag is not.
        merged = {"".join(pair).replace(" ", "") for pair in model["merges"]}
        vocab = dict(model["vocab"])
        for name in special:
            word = name in merged and name[0] not in "<["
            if len(name) > 1 and not word:
                vocab.pop(name, None)
        ranks = read_merges(model["merges"], vocab, special)
        if model.get("byte_fallback"):
            return Tokenizer(*read_json_spec(spec, vocab, special, ranks))
        return byte_level_tokenizer(path, spec, vocab, ranks, special)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path}: not a tokenizer.json that can be read ({error}): download it again, or use "
            "another model folder"
        ) from None


def read_merges(merges: list, vocab: dict[str, int], special: dict[str, int]) -> dict:
    """The rank of each pair of pieces that merge; those of special tokens are dropped."""
    ranks = {}
    for rank, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        # Not `set - vocab.keys()`, which goes through the whole vocabulary for each merge.
        missing = [piece for piece in (left, right, left + right) if piece not in vocab]
        if not missing:
            ranks[left, right] = rank
        elif special.keys().isdisjoint(missing):
            raise ValueError(f"the merge {left!r} {right!r} is not made of its pieces")
    return ranks


def byte_letters() -> str:
    """GPT-2's letters for the bytes 0..255: printable Latin-1 is itself, "Ġ" is a space."""
    letters = ""
    others = 0
    for byte in range(256):
        if chr(byte).isprintable() and chr(byte) != " ":
            letters += chr(byte)
        else:
            letters += chr(256 + others)
            others += 1
    return letters


def byte_level_tokenizer(path, spec, vocab, ranks, special) -> Tokenizer:
    """Merges bytes spelled as letters, inside the pieces that a pattern cuts."""
    if spec.get("normalizer"):
        raise ValueError("a byte-level BPE with a normalizer is not read")
    letters = byte_letters()  # a string is also a table for translate
    byte_of = {letter: byte for byte, letter in enumerate(letters)}
    token_bytes = {}
    for piece, i in vocab.items():
        token_bytes[i] = bytes(byte_of[letter] for letter in piece)
    whole_first = spec["model"].get("ignore_merges")

    @lru_cache(1 << 16)
    def encode_piece(piece):
        piece = piece.encode("utf-8").decode("latin-1").translate(letters)
        if whole_first and piece in vocab:
            return [vocab[piece]]
        ids = []
        for symbol in merge(list(piece), lambda left, right: ranks.get((left, right))):
            if symbol not in vocab:
                raise InputError(
                    f"{path}: the vocabulary lacks the byte 0x{byte_of[symbol]:02X}, which the "
                    "text holds: take the character out"
                )
            ids.append(vocab[symbol])
        return ids

    pattern = find_pattern(spec["pre_tokenizer"])
    return Tokenizer(byte_level_encoder(pattern, encode_piece), token_bytes, special)


def find_pattern(pre_tokenizer: dict) -> str:
    """The pattern of PATTERNS that cuts text as this pre_tokenizer does."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    last = steps[-1]
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space", True):
        for first, use_regex, pattern in PATTERNS:
            if steps[:-1] == first and last.get("use_regex", True) == use_regex:
                return pattern
    kinds = " + ".join(step["type"] for step in steps)
    raise ValueError(
        f"the pre_tokenizer {kinds} is none of those read: Split by Llama 3's pattern, or Digits "
        "one by one, or nothing, and then ByteLevel"
    )

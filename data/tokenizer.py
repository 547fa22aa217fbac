"""Tokenizers with one small interface, for three kinds of files:

- `tokenizer.model` of Llama 3: tiktoken ranks, one "base64 rank" per line (the town's models write it too);
- `tokenizer.model` of Llama 2: SentencePiece (data/sentencepiece.py);
- `tokenizer.json` of the Hugging Face hub: byte-level (Llama 3, SmolLM2) or SentencePiece-like (Llama 2).

Where both exist, tokenizer.json is read, as by transformers: fine-tuning records added tokens only there.

    tokenizer = load_tokenizer("out/base")
    ids = tokenizer.encode("the cat")       # no special tokens, whatever the text looks like
    text = tokenizer.decode(ids)
    end_of_turn = tokenizer.special["<|eot_id|>"]
"""

import base64
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

from nanosdd.checkpoint import read_json, why_unreadable
from nanosdd.errors import InputError

# The files to copy with a model, as far as they exist. generation_config.json may name the stop tokens.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)

# Generation stops at each of these that the tokenizer has; the end of a chat turn comes first.
STOP_NAMES = ("<|eot_id|>", "<|im_end|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Llama 3.1's special tokens by their distance from the first one; the rest of the 256 are reserved_special_token_<i>.
LLAMA3_NAMES = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}

# tiktoken's regex engine panics on about a million white-space characters in a row. (The lookbehind keeps this search
# linear: without it, it would start again at every character of a run.)
LONG_SPACE = re.compile(r"(?<!\s)\s{100000}")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """What load_tokenizer returns."""

    encode_text: Callable[[str], list[int]]
    token_bytes: dict[int, bytes]  # of every id
    special: dict[str, int]  # name -> id of each special token
    stop_tokens: list[int] = dataclasses.field(default_factory=list)  # the ids that end a response
    dummy_prefix: bool = False  # whether encoding puts a space in front of the text (SentencePiece)

    @functools.cached_property
    def n_vocab(self) -> int:
        """The largest id plus one, which is the least number of rows of an embedding."""
        return max(self.token_bytes) + 1

    def encode(self, text: str) -> list[int]:
        """Text to ids, with nothing added; text that looks like a special token is encoded as ordinary text.

        Raises InputError for a lone surrogate (half of a character, from broken JSON or UTF-16), which has no UTF-8.
        """
        _utf8(text)
        return self.encode_text(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text. A special token becomes its name, and bytes that are not UTF-8 become U+FFFD. Raises InputError
        for an id that is not in the vocabulary."""
        ids = [int(i) for i in ids]
        unknown = [i for i in ids if i not in self.token_bytes]
        if unknown:
            raise InputError(
                f"id {unknown[0]} is not in the vocabulary (0..{self.n_vocab - 1}): these ids come from "
                "another tokenizer"
            )
        parts = [self.token_bytes[i] for i in ids]
        names = set(self.special.values())
        first = next((k for k, i in enumerate(ids) if i not in names), None)
        if self.dummy_prefix and first is not None:
            parts[first] = parts[first].removeprefix(b" ")
        return b"".join(parts).decode("utf-8", errors="replace")


def load_tokenizer(folder) -> Tokenizer:
    """Load the tokenizer of a model folder: tokenizer.json, else tokenizer.model.

    The stop tokens are those of STOP_NAMES that the tokenizer has, and the eos of generation_config.json and
    tokenizer_config.json. Raises InputError, naming the file and where possible the line, for anything unreadable.
    """
    folder = Path(folder)
    path = next(
        (
            folder / name
            for name in ("tokenizer.json", "tokenizer.model")
            if (folder / name).is_file()
        ),
        None,
    )
    if path is None:
        raise InputError(f"{folder}: no tokenizer here: expected tokenizer.json or tokenizer.model")
    tokenizer = _load_bpe_json(path) if path.suffix == ".json" else _load_model_file(path)
    return dataclasses.replace(tokenizer, stop_tokens=_stop_tokens(folder, tokenizer))


def _load_model_file(path) -> Tokenizer:
    if reason := why_unreadable(path):
        raise InputError(f"{path}: {reason}: check the file")
    contents = path.read_bytes()
    if contents[:1] == b"\n":  # protobuf: field 1, with a length
        from data import sentencepiece  # for Llama 2 alone

        return _with_special(*sentencepiece.parse_model_file(path, contents))
    return _llama3_tokenizer(path, _parse_ranks(path, contents))


def write_llama3_tokenizer(folder, words: list[str]) -> None:
    """Write folder/tokenizer.model in Llama 3's format: the 256 single bytes, then the words, in order.

    A word may start with a space. Each encodes to one id, since tiktoken looks up whole pieces before it merges bytes;
    repeated words share an id. Raises InputError for a word that the pattern cuts ("don't", "1234").
    """
    tokens = [bytes([byte]) for byte in range(256)] + [_utf8(word) for word in words]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    path = Path(folder) / "tokenizer.model"
    encode = _llama3_tokenizer(path, ranks).encode
    for word in words:
        if len(encode(word)) != 1:
            raise InputError(
                f"{path}: Llama 3's pattern does not keep {word!r} in one piece: leave it out, or "
                "list its parts as words"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    )


# --- byte-level BPE, run by tiktoken ---


def _llama3_tokenizer(path, ranks: dict[bytes, int]) -> Tokenizer:
    """Llama 3: the special tokens are not in the file; they follow the last rank."""
    spare = (f"reserved_special_token_{i}" for i in range(256))
    special = {f"<|{LLAMA3_NAMES.get(i) or next(spare)}|>": len(ranks) + i for i in range(256)}
    encode = _byte_level_encoder(path, ranks, LLAMA3_PATTERN)
    return _with_special(encode, {i: token for token, i in ranks.items()}, special)


def _byte_level_encoder(path, ranks: dict[bytes, int], pattern: str) -> Callable[[str], list[int]]:
    """The function text -> ids: cut the text with the pattern, then merge the bytes of each piece, lowest rank first.

    A byte that the vocabulary lacks is an InputError (`tokenizers` drops it silently, tiktoken panics).
    """
    encoding = tiktoken.Encoding(
        "pieces", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    )
    single = b"".join(token for token in ranks if len(token) == 1)

    def encode(text):
        data = _utf8(text)
        missing = data.translate(None, delete=single)
        if missing:
            raise InputError(
                f"{path}: the vocabulary lacks the byte 0x{missing[0]:02X}, which the text holds: take "
                "the character out"
            )
        if LONG_SPACE.search(
            text
        ):  # cut the same pieces with another regex engine, which does not panic
            one_piece = tiktoken.Encoding(
                "one piece", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={}
            )
            return [
                i
                for piece in regex.findall(pattern, text)
                for i in one_piece.encode_ordinary(piece)
            ]
        return encoding.encode_ordinary(text)

    return encode


def _parse_ranks(path, contents: bytes) -> dict[bytes, int]:
    """Llama 3's tokenizer.model: each line holds a token in base64, a space and its rank, counted from 0."""
    ranks = {}
    for number, line in enumerate(contents.splitlines(), 1):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            if not token or token in ranks or int(rank) != len(ranks):
                raise ValueError
        except ValueError:
            raise InputError(
                f"{path}, line {number}: expected a new token in base64, a space and the rank "
                f"{len(ranks)}, not {line[:40]!r}: download the file again"
            ) from None
        ranks[token] = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InputError(
            f"{path}: no line for the single byte 0x{missing[0]:02X}: the file is cut short"
        )
    return ranks


# --- tokenizer.json ---


def _load_bpe_json(path) -> Tokenizer:
    """A tokenizer.json of the `tokenizers` library: added_tokens, normalizer, pre_tokenizer and a BPE model. Its
    post_processor (BOS and the like) is the chat template's task, and its decoder follows from the rest."""
    try:
        spec = read_json(path)
        model = spec["model"]
        unread = [
            key
            for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
            if model.get(key)
        ]
        if unread or model.get("type", "BPE") != "BPE":
            raise InputError(
                f"{path}: only a plain BPE model is read, this one is {model.get('type')} with {unread}"
            )
        added = spec.get("added_tokens") or []
        special = {token["content"]: token["id"] for token in added}
        plain = [token["content"] for token in added if not token["special"]]
        if plain:
            raise InputError(
                f'{path}: the added token {plain[0]!r} is not "special", so ordinary text would turn into '
                "it: mark it special or take it out"
            )
        ids = [i for piece, i in model["vocab"].items() if piece not in special] + list(
            special.values()
        )
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids) or len(set(ids)) < len(ids):
            raise InputError(f"{path}: an id is used twice or is not a whole number")
        if model.get("byte_fallback"):
            from data import sentencepiece

            return _with_special(*sentencepiece.parse_bpe_json(path, spec, special))
        return _parse_byte_level_json(path, spec, special)
    except InputError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        OSError,
        RecursionError,
    ) as error:
        raise InputError(
            f"{path}: not a tokenizer.json that can be read ({type(error).__name__}: {error}): download "
            "it again, or use another model folder"
        ) from None


def _parse_byte_level_json(path, spec, special: dict[str, int]) -> Tokenizer:
    """Llama 3 and SmolLM2: a regex cuts the text into pieces, whose bytes, written as printable characters, merge."""
    if spec.get("normalizer"):
        raise InputError(
            f"{path}: a byte-level BPE with a normalizer ({spec['normalizer']['type']}) is not read"
        )
    model, byte_of = spec["model"], _byte_alphabet()
    token_bytes = {
        i: bytes(byte_of[c] for c in piece)
        for piece, i in model["vocab"].items()
        if piece not in special
    }
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = [
        (bytes(byte_of[c] for c in left), bytes(byte_of[c] for c in right)) for left, right in pairs
    ]
    ranks = _ranks_from_merges(
        path, {token: i for i, token in token_bytes.items()}, merges, model.get("ignore_merges")
    )
    encode = _byte_level_encoder(path, ranks, _split_pattern(path, spec["pre_tokenizer"]))
    return _with_special(encode, token_bytes, special)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 is itself, the other 68 bytes are U+0100 and on ("Ġ" is a space)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + k): byte for k, byte in enumerate(others)
    }


def _split_pattern(path, pre_tokenizer) -> str:
    """The pre_tokenizer as one regular expression. Three forms are known; any other is an InputError."""
    steps = (
        pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    )
    kinds, first, last = [step["type"] for step in steps], steps[0], steps[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space", True):
        gpt2 = last.get("use_regex", True)
        if kinds == ["Split", "ByteLevel"] and not gpt2:  # Llama 3
            if (
                first["behavior"] == "Isolated"
                and not first["invert"]
                and "Regex" in first["pattern"]
            ):
                if first["pattern"]["Regex"] == LLAMA3_PATTERN:  # any other could take for ever
                    return LLAMA3_PATTERN
                raise InputError(f"{path}: its Split pattern is not Llama 3's; no other is read")
        if kinds == ["ByteLevel"] and gpt2:  # GPT-2
            return GPT2_PATTERN
        if kinds == ["Digits", "ByteLevel"] and gpt2:  # SmolLM2
            # Digits are cut out first. So a number takes no space with it, and white space before a number counts as
            # the end of a text. (This equals `tokenizers` 0.23 but for 13 new digits, which its regex does not know.)
            digits = r"\p{N}" if first["individual_digits"] else r"\p{N}+"
            pattern = GPT2_PATTERN.replace(r" ?\p{N}+", digits)
            return pattern.replace(r"\s+(?!\S)", r"\s+(?![^\s\p{N}])")
    raise InputError(
        f"{path}: the pre_tokenizer {' + '.join(kinds)} is not one of those read (Split by regex + "
        "ByteLevel; ByteLevel; Digits + ByteLevel)"
    )


def _ranks_from_merges(
    path, ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]], whole_first: bool
):
    """The ranks with which tiktoken returns the ids of this list of merges.

    tiktoken knows no merges: it joins the neighbours whose joined bytes have the lowest rank. The result is the same if
    the merges make tokens in the order of their ids, and if each token's bytes, merged by lower ranks alone, end as two
    halves that the list joins. A token that fails the second condition never comes from merging. With whole_first
    (ignore_merges) it is still the id of a piece that equals it, as in tiktoken; otherwise it gets no rank.
    """
    from data import sentencepiece

    made = [ranks.get(left + right, -1) for left, right in merges]
    if min(made, default=0) < 0 or any(a > b for a, b in zip(made, made[1:])):
        raise InputError(
            f"{path}: the merges do not make the tokens of the vocabulary in the order of their ids"
        )
    merges, kept = set(merges), {}
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            halves = sentencepiece.merge(
                [bytes([byte]) for byte in token], lambda left, right: kept.get(left + right)
            )
            if tuple(halves) not in merges:
                if not whole_first:
                    continue
                if len(halves) == 2:
                    raise InputError(
                        f"{path}: the merge {halves[0]!r} + {halves[1]!r} is missing from the list"
                    )
        kept[token] = rank
    return kept


# --- small things ---


def _stop_tokens(folder: Path, tokenizer: Tokenizer) -> list[int]:
    stop = [tokenizer.special[name] for name in STOP_NAMES if name in tokenizer.special]
    for name, key in (
        ("generation_config.json", "eos_token_id"),
        ("tokenizer_config.json", "eos_token"),
    ):
        path = folder / name
        config = read_json(path) if path.is_file() else {}
        eos = config.get(key) if isinstance(config, dict) else None
        if isinstance(eos, dict):  # an AddedToken written out
            eos = eos.get("content")
        if eos is None:
            continue
        for token in eos if isinstance(eos, list) else [eos]:
            token = tokenizer.special.get(token) if isinstance(token, str) else token
            if type(token) is not int or token not in tokenizer.token_bytes:
                raise InputError(
                    f"{path}: {key} is {eos!r}, which the tokenizer beside it does not have"
                )
            stop.append(token)
    return list(dict.fromkeys(stop))


def _with_special(encode_text, token_bytes, special, dummy_prefix=False) -> Tokenizer:
    names = {i: name.encode("utf-8") for name, i in special.items()}
    return Tokenizer(encode_text, token_bytes | names, special, dummy_prefix=dummy_prefix)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has a lone surrogate ({text[error.start]!a}) at character {error.start}: read its "
            "source as UTF-8, or replace it"
        ) from None

"""Tokenizers with one small interface, for three kinds of files:

- `tokenizer.model` of Llama 3: ranks of byte strings, one "base64 rank" a line (the town's models
  have it too), read here; tiktoken merges bytes by them;
- `tokenizer.model` of Llama 2: SentencePiece (data/sentencepiece.py);
- `tokenizer.json` of the Hugging Face hub (data/tokenizer_json.py). Where both exist, this one is
  read, as by transformers: fine-tuning records added tokens only there.

    tokenizer = load_tokenizer("out/base")
    ids = tokenizer.encode("the cat")       # no special tokens, whatever the text looks like
    text = tokenizer.decode(ids)
    end_of_turn = tokenizer.special["<|eot_id|>"]
"""

import base64
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

from nanosdd.checkpoint import MOST_JSON, read_object, why_unreadable
from nanosdd.errors import InputError

# The files that go with a model, as far as they exist.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",  # may name the stop tokens
    "chat_template.jinja",
)

# Generation stops at each of these that the tokenizer has; the end of a chat turn comes first.
STOP_NAMES = ("<|eot_id|>", "<|im_end|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Llama 3.1's special tokens in the order of their ids.
LLAMA3_NAMES = (
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "reserved_special_token_2",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    *(f"reserved_special_token_{i}" for i in range(3, 248)),
)


@dataclass
class Tokenizer:
    """What load_tokenizer returns."""

    encode_text: Callable[[str], list[int]]
    token_bytes: dict[int, bytes]  # of every id
    special: dict[str, int]  # name -> id of each special token
    dummy_prefix: bool = False  # whether encoding puts a space in front of the text
    stop_tokens: Sequence[int] = ()  # the ids that end a response
    files: dict[str, bytes] | None = None  # the contents of TOKENIZER_FILES in its folder

    def __post_init__(self):
        self.token_bytes = {i: name.encode() for name, i in self.special.items()} | self.token_bytes
        self.n_vocab = max(self.token_bytes) + 1  # the least number of rows of an embedding

    def encode(self, text: str) -> list[int]:
        """Text to ids, with nothing added; "<|eot_id|>" and the like are ordinary text.

        InputError for a lone surrogate (half of a character, from broken JSON or UTF-16).
        """
        utf8(text)
        return self.encode_text(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; a special token becomes its name, bytes that are not UTF-8 become U+FFFD.

        An id without a token becomes nothing: a model may have more rows than its tokenizer.
        """
        at_start = self.dummy_prefix
        text = bytearray()
        for i in map(int, ids):
            part = self.token_bytes.get(i, b"")
            if at_start and part and i not in self.special.values():
                part = part.removeprefix(b" ")
                at_start = False
            text += part
        return text.decode("utf-8", errors="replace")


def load_tokenizer(folder) -> Tokenizer:
    """Load the tokenizer of a model folder: tokenizer.json, else tokenizer.model.

    InputError, naming the file and where possible the line, for anything that cannot be read.
    """
    folder = Path(folder)
    files = read_files(folder)
    if "tokenizer.json" in files:
        from data.tokenizer_json import read_tokenizer_json  # the town does without

        tokenizer = read_tokenizer_json(folder / "tokenizer.json")
    elif "tokenizer.model" in files:
        tokenizer = read_tokenizer_model(folder / "tokenizer.model", files["tokenizer.model"])
    else:
        raise InputError(f"{folder}: no tokenizer here: expected tokenizer.json or tokenizer.model")
    tokenizer = replace(tokenizer, special=with_added_tokens(folder, tokenizer), files=files)
    tokenizer.stop_tokens = find_stop_tokens(folder, tokenizer)
    return tokenizer


def read_files(folder: Path) -> dict[str, bytes]:
    """The contents of TOKENIZER_FILES, which a run copies: InputError for a link to elsewhere."""
    files = {}
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.exists():
            reason = why_unreadable(path, MOST_JSON)
            home = path.resolve().parent
            if home.name != "blobs" and home != folder.resolve():  # blobs: the hub's own cache
                reason = "a link to another folder"
            if reason:
                raise InputError(f"{path} cannot be read ({reason}); put the file itself there")
            files[name] = path.read_bytes()
    return files


def read_tokenizer_model(path, contents: bytes) -> Tokenizer:
    """The tokenizer of Llama 2's or Llama 3's tokenizer.model."""
    if contents.startswith(b"\n"):  # a protobuf begins with field 1 and a length
        from data.sentencepiece import read_model_file  # for Llama 2 alone

        return Tokenizer(*read_model_file(path, contents))
    return llama3_tokenizer(parse_ranks(path, contents))


def with_added_tokens(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """The special tokens, with those that only tokenizer_config.json has, or added_tokens.json, an
    older place for them."""
    added = read_object(folder / "added_tokens.json")
    decoder = read_object(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for i, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and i.isdecimal() and len(i) < 10:
            added[str(token.get("content", ""))] = int(i)
    special = dict(tokenizer.special)
    for name, i in added.items():
        if type(i) is int and i in tokenizer.token_bytes or not name:
            continue
        if type(i) is not int or name[0] not in "<[":
            raise InputError(
                f"{folder}: the added token {name!r} is not special: text would turn into it"
            )
        special[name] = i
    return special


def find_stop_tokens(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """The ids of STOP_NAMES, then those of generation_config.json: one, a list, or none. Without
    that file those of config.json, as in transformers."""
    stop = [tokenizer.special[name] for name in STOP_NAMES if name in tokenizer.special]
    found = read_object(folder / "generation_config.json") or read_object(folder / "config.json")
    eos = found.get("eos_token_id")
    if eos not in (None, ""):
        stop += eos if isinstance(eos, list) else [eos]
    if not all(type(i) is int and i in tokenizer.token_bytes for i in stop):
        raise InputError(
            f"{folder}: eos_token_id {eos!r} (generation_config.json, config.json) is no token"
        )
    return list(dict.fromkeys(stop))


def utf8(text: str) -> bytes:
    """The text in UTF-8; InputError for a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has a lone surrogate ({text[error.start]!a}) at character {error.start}: "
            "read its source as UTF-8, or replace it"
        ) from None


# ---- Llama 3 ----


def llama3_tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    """Llama 3's tokenizer: its pattern cuts the text, and the bytes of each piece are merged.

    The special tokens are not in the file; they follow the last rank.
    """
    special = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(LLAMA3_NAMES)}
    merge = tiktoken.Encoding(
        "one piece", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={}
    ).encode_ordinary
    token_bytes = {rank: token for token, rank in ranks.items()}
    return Tokenizer(byte_level_encoder(LLAMA3_PATTERN, merge), token_bytes, special)


def byte_level_encoder(pattern: str, encode_piece):
    """The function text -> ids that cuts the text with a pattern and encodes each piece.

    tiktoken could do both, but its own regex engine panics on a million spaces in a row.
    """

    known = functools.lru_cache(2**16)(encode_piece)  # most text is made of few pieces

    def encode(text):
        ids = []
        for piece in regex.findall(pattern, text):
            ids += known(piece)
        return ids

    return encode


def parse_ranks(path, contents: bytes) -> dict[bytes, int]:
    """The ranks of tokens, counted from 0, in Llama 3's tokenizer.model."""
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
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise InputError(f"{path}: no line for the byte 0x{byte:02X}: the file is cut short")
    return ranks


def write_llama3_tokenizer(folder, words: list[str]) -> None:
    """Write folder/tokenizer.model in Llama 3's format: the 256 bytes, then the words, in order.

    A word may start with a space. Each encodes to one id, since tiktoken looks up whole pieces
    before it merges bytes; repeated words share an id. InputError for a word that the pattern cuts
    ("don't", "1234").
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in words:
        ranks.setdefault(utf8(word), len(ranks))
    path = Path(folder) / "tokenizer.model"
    encode = llama3_tokenizer(ranks).encode
    for word in words:
        if len(encode(word)) != 1:
            raise InputError(
                f"{path}: Llama 3's pattern does not keep {word!r} in one piece: leave it out, or "
                "list its parts as words"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))

"""SentencePiece BPE from scratch: the tokenizer of Llama 2 and TinyLlama.

1. Every space becomes "▁", and one more "▁" goes in front, the dummy prefix: a word has the same ids at the start of a
   text as inside it.
2. The text is cut into characters, and neighbours are joined again and again, best pair first (`merge`).
3. A character that no piece covers becomes its UTF-8 bytes, one piece <0x00>..<0xFF> for each (byte fallback).

The vocabulary comes from `tokenizer.model` (a protobuf: a score for each piece) or from `tokenizer.json` (a list of
merges, best first). Both parsers below return four things: encode, the bytes of every id, the special tokens, and
whether decoding removes a dummy prefix.
"""

import heapq
import struct
from functools import lru_cache

from nanosdd.errors import InputError

SPACE = "▁"
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # piece types in tokenizer.model


def merge(symbols: list, rank_of) -> list:
    """Byte-pair encoding: join the adjacent pair of lowest rank, the leftmost of equals, until none is left.

    symbols: strings or bytes, modified in place; rank_of(left, right): the pair's rank, or None when it never joins.
    A heap holds the candidate pairs and a linked list the neighbours, so n symbols take n log n time, not n squared.
    """
    n = len(symbols)
    right_of, left_of = list(range(1, n + 1)), list(range(-1, n - 1))
    heap = []

    def offer(i, j):
        if 0 <= i and j < n:
            rank = rank_of(symbols[i], symbols[j])
            if rank is not None:
                heapq.heappush(heap, (rank, i, symbols[i], symbols[j]))

    for i in range(n - 1):
        offer(i, i + 1)
    while heap:
        _, i, left, right = heapq.heappop(heap)
        j = right_of[i]
        if symbols[i] != left or j == n or symbols[j] != right:
            continue  # one of the two has been joined to another symbol since
        symbols[i], symbols[j] = left + right, None
        right_of[i] = right_of[j]
        if right_of[i] < n:
            left_of[right_of[i]] = i
        offer(left_of[i], i)
        offer(i, right_of[i])
    return [symbol for symbol in symbols if symbol is not None]


def make_encoder(ids: dict[str, int], rank_of, prefix: str):
    """The function text -> ids. ids: of the pieces and of the 256 byte pieces; prefix: "always", "if missing", "never".

    Two characters that no piece holds side by side are never joined, so the text is cut between them first. The chunks
    (mostly words) are short and repeat, hence the cache.
    """
    byte_ids = [ids[piece] for piece in BYTE_PIECES]
    ids = {piece: ids[piece] for piece in ids.keys() - set(BYTE_PIECES)}
    neighbours = {piece[i : i + 2] for piece in ids for i in range(len(piece) - 1)}

    def encode_chunk(chunk):
        found = []
        for piece in merge(list(chunk), rank_of):
            if piece in ids:
                found.append(ids[piece])
            else:
                found += [byte_ids[byte] for byte in piece.encode("utf-8")]
        return found

    encode_short_chunk = lru_cache(maxsize=1 << 16)(encode_chunk)  # long chunks seldom repeat

    def encode(text):
        text = text.replace(" ", SPACE)
        if text and (prefix == "always" or prefix == "if missing" and not text.startswith(SPACE)):
            text = SPACE + text
        found, start = [], 0
        cuts = [i + 1 for i, (a, b) in enumerate(zip(text, text[1:])) if a + b not in neighbours]
        for end in cuts + [len(text)]:
            chunk = text[start:end]
            found += encode_short_chunk(chunk) if end - start < 64 else encode_chunk(chunk)
            start = end
        return found

    return encode


def bytes_of_pieces(ids: dict[str, int]) -> dict[int, bytes]:
    """The bytes that each id decodes to."""
    table = {i: piece.replace(SPACE, " ").encode("utf-8") for piece, i in ids.items()}
    return table | {ids[piece]: bytes([byte]) for byte, piece in enumerate(BYTE_PIECES)}


def read_fields(message: bytes):
    """The (number, value) pairs of a protobuf message: an int for a varint, bytes for everything else.

    A field is a key (field number * 8 + wire type), then a varint (type 0), 8 bytes (1), a length and as many bytes (2)
    or 4 bytes (5). A varint has 7 bits in each byte, lowest first; the top bit says that more bytes follow.
    """
    at = 0

    def take(n):
        nonlocal at
        if at + n > len(message):
            raise ValueError("the file ends in the middle of a field")
        at += n
        return message[at - n : at]

    def varint():
        value = shift = 0
        while True:
            byte = take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type not in (0, 1, 2, 5):
            raise ValueError(f"no protobuf field starts at byte {at - 1}")
        yield number, varint() if wire_type == 0 else take({1: 8, 5: 4}.get(wire_type) or varint())


def parse_model_file(path, contents: bytes):
    """Llama 2's tokenizer.model, SentencePiece's ModelProto: pieces (field 1), trainer (2) and normalizer (3) settings.

    Raises InputError for anything but a BPE with byte fallback whose normalizer does not change the text.
    """
    ids, ranks, special, trainer, normalizer = {}, {}, {}, {}, {}
    try:
        for number, value in read_fields(contents):
            if number == 1:
                entry = dict(read_fields(value))  # 1: piece, 2: score, 3: type
                piece, kind, i = (
                    entry[1].decode("utf-8"),
                    entry.get(3, NORMAL),
                    len(ids) + len(special),
                )
                if kind not in (NORMAL, UNKNOWN, CONTROL, BYTE) or piece in ids or piece in special:
                    raise ValueError(f"piece {i} {piece!r} is of type {kind} or appears twice")
                if kind in (UNKNOWN, CONTROL):
                    special[piece] = i
                else:
                    ids[piece] = i
                if kind == NORMAL:
                    ranks[piece] = -struct.unpack("<f", entry.get(2, bytes(4)))[
                        0
                    ]  # best score first
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(read_fields(value))
    except (ValueError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise InputError(
            f"{path}: not a tokenizer.model that can be read ({error}): download it again, or put a "
            "tokenizer.json beside it"
        ) from None
    problems = {
        "its model is not BPE": trainer.get(3) != 2,
        "it has no byte fallback": not trainer.get(35) or not set(BYTE_PIECES) <= ids.keys(),
        "its normalizer rewrites characters": normalizer.get(2, b"") != b"",
        "its normalizer removes extra spaces": normalizer.get(4, 1) != 0,
        "its normalizer keeps spaces as they are": normalizer.get(5, 1) != 1,
        "it puts the space after the word": trainer.get(24, 0) != 0,
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise InputError(
            f"{path}: {', '.join(found)}; only Llama 2's kind of SentencePiece model is read"
        )
    prefix = "always" if normalizer.get(3, 1) else "never"
    encode = make_encoder(ids, lambda left, right: ranks.get(left + right), prefix)
    return encode, bytes_of_pieces(ids), special, prefix != "never"


def parse_bpe_json(path, spec: dict, special: dict[str, int]):
    """The same from the contents of a tokenizer.json with byte_fallback; special: its added tokens."""
    model = spec["model"]
    prefix = prefix_rule(spec.get("normalizer"), spec.get("pre_tokenizer"))
    if prefix is None:
        raise InputError(
            f"{path}: its normalizer and pre_tokenizer are not Llama 2's (Prepend and Replace, or "
            "Metaspace without split); remove this file if there is a tokenizer.model beside it"
        )
    ids = {piece: i for piece, i in model["vocab"].items() if piece not in special}
    if not set(BYTE_PIECES) <= ids.keys() or model.get("ignore_merges"):
        raise InputError(
            f"{path}: some of the 256 byte pieces <0x00>..<0xFF> are missing, or ignore_merges is set"
        )
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    for left, right in merges:
        if not {left, right, left + right} <= model["vocab"].keys():
            raise InputError(
                f"{path}: the merge {left!r} {right!r} is not made of pieces in the vocabulary"
            )
    # Merges into a special token or a byte piece are dropped: text never becomes one.
    never = special.keys() | set(BYTE_PIECES)
    ranks = {pair: rank for rank, pair in enumerate(merges) if pair[0] + pair[1] not in never}
    encode = make_encoder(ids, lambda left, right: ranks.get((left, right)), prefix)
    return encode, bytes_of_pieces(ids), special, prefix != "never"


def prefix_rule(normalizer, pre_tokenizer) -> str | None:
    """When "▁" goes in front of a text, in the two known forms of Llama 2's tokenizer.json; None for any other form."""
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if pre_tokenizer is None and normalizer is not None:
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        return "always" if steps == [prepend, replace] else "never" if steps == [replace] else None
    if normalizer is None and pre_tokenizer is not None and pre_tokenizer["type"] == "Metaspace":
        if pre_tokenizer["replacement"] == SPACE and pre_tokenizer.get("split", True) is False:
            rules = {"always": "if missing", "first": "if missing", "never": "never"}
            return rules.get(pre_tokenizer["prepend_scheme"])
    return None

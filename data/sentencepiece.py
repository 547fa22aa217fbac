"""SentencePiece BPE from scratch: the tokenizer of Llama 2 and TinyLlama.

1. Every space becomes "▁", and one more "▁" goes in front, the dummy prefix: so a word has the
   same ids at the start of a text as inside it.
2. The text is cut into characters, and neighbours are joined again and again, best pair first.
3. A character that no piece covers becomes its UTF-8 bytes, one piece <0x00>..<0xFF> for each.

The vocabulary comes from `tokenizer.model` (a protobuf: a score for each piece) or from
`tokenizer.json` (a list of merges, best first). Both readers below return what Tokenizer takes: the
function text -> ids, the bytes of every id, the special tokens, and that there is a dummy prefix.
"""

import heapq
import io
import re
import struct
from functools import lru_cache

from nanosdd.errors import InputError

SPACE = "▁"
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]

# In tokenizer.model: its fields, and the types of pieces.
PIECE = 1
TRAINER = 2
NORMALIZER = 3
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
BYTE = 6
SETTINGS = {  # field and field inside it: its default, the value read here, what another one means
    (TRAINER, 3): (1, 2, "its model is not BPE"),
    (TRAINER, 24): (0, 0, "it puts the space after the word"),
    (TRAINER, 35): (0, 1, "it has no byte fallback"),
    (NORMALIZER, 2): (b"", b"", "its normalizer rewrites characters"),
    (NORMALIZER, 3): (1, 1, "it has no dummy prefix"),
    (NORMALIZER, 4): (1, 0, "its normalizer removes extra spaces"),
    (NORMALIZER, 5): (1, 1, "its normalizer keeps spaces as they are"),
}

FORMS = (  # normalizer and pre_tokenizer of Llama 2's tokenizer.json, the older form and the newer
    (
        {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        None,
    ),
    (
        None,
        {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": "first",
            "split": False,
        },
    ),
)


def merge(symbols: list, rank_of) -> list:
    """Byte-pair encoding: join the adjacent pair of lowest rank, leftmost first, again and again.

    symbols: strings, modified in place; rank_of(left, right): the pair's rank, or None when it
    never joins. A heap holds the candidate pairs and a linked list the neighbours, so n symbols
    take n log n time, not n squared.
    """
    n = len(symbols)
    right_of = list(range(1, n + 1))
    left_of = list(range(-1, n - 1))
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
        symbols[i] = left + right
        symbols[j] = None
        right_of[i] = right_of[j]
        if right_of[i] < n:
            left_of[right_of[i]] = i
        offer(left_of[i], i)
        offer(i, right_of[i])
    return [symbol for symbol in symbols if symbol is not None]


def make_tokenizer(ids: dict[str, int], special: dict[str, int], rank_of, always_prefix=True):
    """What Tokenizer takes. ids: of the pieces, the 256 byte pieces among them.

    always_prefix: whether "▁" also goes in front of a text that begins with a space.
    """
    for piece in ids:
        if re.search("[^▁]▁", piece):
            raise ValueError(f"the piece {piece!r} goes on after a word")
    if not set(BYTE_PIECES) <= ids.keys():
        raise ValueError("some of the 256 byte pieces <0x00>..<0xFF> are missing")
    token_bytes = {i: piece.replace(SPACE, " ").encode("utf-8") for piece, i in ids.items()}
    for byte, piece in enumerate(BYTE_PIECES):
        token_bytes[ids[piece]] = bytes([byte])

    @lru_cache(1 << 16)
    def encode_word(word):
        found = []
        for piece in merge(list(word), rank_of):
            if piece in ids:
                found.append(ids[piece])
            else:
                found += [ids[BYTE_PIECES[byte]] for byte in piece.encode("utf-8")]
        return found

    def encode(text):
        text = text.replace(" ", SPACE)
        if text and (always_prefix or not text.startswith(SPACE)):
            text = SPACE + text
        found = []
        for word in re.findall("▁*[^▁]*", text):  # no piece reaches from one into the next
            found += encode_word(word)
        return found

    return encode, token_bytes, special, True


# ---- tokenizer.model ----


def read_varint(file) -> int:
    """An integer of protobuf: 7 bits in a byte, lowest first; the top bit says that more follow."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a number of more than 64 bits")


def read_fields(message: bytes):
    """Yield the (number, value) of each field of a protobuf message.

    A field is a key (number * 8 + wire type), then an integer (wire type 0), 8 bytes (1), a length
    and as many bytes (2), or 4 bytes (5).
    """
    file = io.BytesIO(message)
    while file.tell() < len(message):
        number, wire_type = divmod(read_varint(file), 8)
        if wire_type == 0:
            yield number, read_varint(file)
            continue
        size = read_varint(file) if wire_type == 2 else {1: 8, 5: 4}[wire_type]
        value = file.read(size)
        if len(value) < size:
            raise ValueError("it ends in the middle of a field")
        yield number, value


def read_model_file(path, contents: bytes):
    """Llama 2's tokenizer.model.

    InputError for anything but a BPE with byte fallback whose normalizer does not change the text.
    """
    found = {}
    ids = {}
    special = {}
    ranks = {}
    try:
        for field, value in read_fields(contents):
            if field in (TRAINER, NORMALIZER):
                found |= {(field, number): setting for number, setting in read_fields(value)}
            if field != PIECE:
                continue
            entry = dict(read_fields(value))  # 1: text, 2: score, 3: type
            i = len(ids) + len(special)
            piece = entry[1].decode("utf-8")
            kind = entry.get(3, NORMAL)
            if kind not in (NORMAL, UNKNOWN, CONTROL, BYTE) or piece in ids or piece in special:
                raise ValueError(f"piece {i} {piece!r} is of type {kind} or appears twice")
            table = special if kind in (UNKNOWN, CONTROL) else ids
            table[piece] = i
            if kind == NORMAL:
                ranks[piece] = -struct.unpack("<f", entry[2])[0]  # the best is joined first
        for setting, (default, read_here, problem) in SETTINGS.items():
            if found.get(setting, default) != read_here:
                raise ValueError(f"{problem}; only Llama 2's kind of SentencePiece is read")
        return make_tokenizer(ids, special, lambda left, right: ranks.get(left + right))
    except (
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        OverflowError,
        struct.error,
    ) as error:
        raise InputError(
            f"{path}: not a tokenizer.model that can be read ({error}): download it again, or put "
            "a tokenizer.json beside it"
        ) from None


# ---- tokenizer.json ----


def read_json_spec(spec: dict, ids: dict, special: dict, ranks: dict):
    """The contents of a tokenizer.json with byte_fallback; ranks: of each pair of pieces."""
    normalizer = spec.get("normalizer")
    form = (normalizer, spec.get("pre_tokenizer"))
    if form not in FORMS or spec["model"].get("ignore_merges"):
        raise ValueError(
            "its normalizer, pre_tokenizer or ignore_merges is not Llama 2's: Prepend and Replace, "
            "or Metaspace without split"
        )
    always_prefix = normalizer is not None  # Metaspace adds no second "▁"
    return make_tokenizer(ids, special, lambda left, right: ranks.get((left, right)), always_prefix)

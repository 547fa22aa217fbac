"""Make the golden files beside this script: the ids that other people's tokenizers give for fixed texts.

    pip install sentencepiece==0.2.3 tokenizers==0.23.3
    NANOSDD_REAL_DATA=<folder, if you have it> python tests/golden/tokenizer/make_golden.py

It imports nothing of nanoSDD. texts.json holds the texts; golden.json in each folder the peer's version and the ids of
each text, or null where the vocabulary lacks one of its bytes. The tiny_* folders also hold the tokenizer, trained here
on the few lines below. llama2/ and llama3/ are made from the real files under NANOSDD_REAL_DATA and hold ids only.
"""

import base64
import io
import json
import os
import random
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

HERE = Path(__file__).parent
SENTENCEPIECE = f"sentencepiece {sentencepiece.__version__}"
TOKENIZERS = f"tokenizers {tokenizers.__version__}"

CORPUS = [
    "The baker in the old town says that the bread is ready at 7, and that there are 120 loaves left.",
    "the the the that then there these other another mother brother   and    and     and",
    "She isn't sure; they're sure. I'll ask, he'd say: \"we've seen 3,141 birds, 2,718 of them red!\"",
    "def area(width, height):\n    if width < 0:\n        return None\n    return width * height  # units\n\n",
    "Straße, façade, naïve, El niño está aquí, où est le café près de l'église ?",
    "Привет, мир! Как дела, мир? Хорошо, хорошо.",
    "こんにちは、世界。世界はひろい。",
    "你好，世界！今天天气很好，天气很好。",
    "aaaa aaaaaaaa bbbb abababab",
    "one\ttwo\tthree\r\nfour\r\nfive",
] * 3

TEXTS = [
    "",
    " ",
    "  ",
    "   ",
    " " * 7,
    " " * 40,
    "\n",
    "\n\n\n",
    "\t",
    "\r\n\r\n",
    " \n \n  x",
    "a",
    " a",
    "a ",
    "  a  b   c    d ",
    "Hello, world!",
    "the baker's bread",
    "The BAKER says THAT",
    "don't''re",
    "isn't ISN'T isn’t 'tis 's 'S 'll 'LL '",
    "0",
    "12",
    "123",
    "1234",
    "12345678901234567890",
    "a1b22c333",
    "x  1",
    "x   12  y",
    "3.14159",
    "1,000,000 €",
    "½²³①Ⅷ٣४",
    "a½  ½b ³",
    "def f(x):\n    return [x**2 for x in range(10)]  # squares\n",
    "\tif (a && b) {\n\t\treturn -1;\n\t}\n",
    "http://a.b/c?d=e&f=g#h",
    "a" * 50,
    "ab" * 33,
    "the" * 20,
    " the" * 5,
    "!" * 30,
    "=" * 17,
    "\n" * 19,
    "?!?!...",
    "«»—–…“”‘’",
    "Straße façade niño où Ångström",
    "e\u0301 u\u0308 n\u0303",
    "ﬁ ﬂ Ĳ ß ſ K Å 'ſ",
    "Привет, мир!",
    "Ελληνικά",
    "שלום עולם",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好，世界！",
    "世界は広い。カタカナ ｶﾀｶﾅ",
    "한국어 텍스트 ᄒ",
    "中" * 25,
    "\U00020000\U0002a6d6",
    "😀",
    "👍🏽",
    "👩‍👩‍👧‍👦 family",
    "🇫🇷🇯🇵",
    "❤️‍🔥",
    "a😀b 😀 c",
    "\x00",
    "a\x00b",
    "\x01\x02\x03\x1b[0m\x7f",
    "\x80\x85\x9f\xad",
    "\x1c\x1d\x1e\x1f",
    "\u00a0\u2003\u3000x",
    "\u200b\u200d\ufeffx",
    "\u2028\u2029",
    "\ufffd\ufffe\uffff",
    "\U0010ffff\U000e0041",
    "▁",
    "▁a▁▁b",
    "a▁ ▁b",
    " ▁",
    "<s>",
    "</s>",
    "<unk>",
    "a<s>b</s>",
    "<0x0A>",
    "<0x41><0x42>",
    "[INST] hi [/INST]",
    "<<SYS>>",
    "<|begin_of_text|>",
    "<|eot_id|>x",
    "<|start_header_id|>user<|end_header_id|>",
    "<|im_start|>user\nhi<|im_end|>",
    "<|endoftext|>",
    "< |eot_id| >",
    "zyzzyva",
    " zyzzyva",
    " zyzzyva!",
]

ALPHABETS = [  # many_texts draws from these
    "abcdefghij XYZ  ",
    "the of and ing ed re in on at ",
    "0123456789 .,",
    "½²³①Ⅷ٣४ 12",
    "𝔘𝕟𝖎𝒞𐍈\U0010ffff\U000e0001",
    "".join(map(chr, range(32))),
    "éèüßñçøåœžł'’`",
    "привет мир Ёё",
    "你好世界的一是不了人我在 。，",
    "こんにちは カタカナー漢字",
    "한국어 텍스트",
    "مرحبا بالعالم ًٌٍ",
    "नमस्ते दुनिया",
    "ไทยภาษา",
    "👍🏽😀🇫🇷👨‍👩‍👧‍👦❤️",
    "▁▁ _▁a",
    "'s't're've'm'll'd'S'Tſ",
    "<s></s><unk><0x0A><|eot_id|>[INST]",
    "{}[]()<>;:=+-*/\\|&^%$#@!~\"'?,.",
    " \t\n\r\x0b\x0c\u00a0\u3000\u2028\u200b\ufeff",
    "\x00\x7f\x80\x9f\xad\u0301\u0300\ufffd\uffff",
]

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMOLLM2_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MISSING_BYTES = [0x01, 0x02, 0x03, 0x1C, 0x1D, 0xC0, 0xC1, *range(0xF2, 0x100)]  # 21, like SmolLM2

PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
LETTER = dict(zip(PRINTABLE, map(chr, PRINTABLE)))  # the letter that stands for a byte
LETTER |= {b: chr(256 + k) for k, b in enumerate(b for b in range(256) if b not in LETTER)}


def byte_level(special, pattern=None, digits=False):
    """A Tokenizer without vocabulary, cutting text as Llama 3's (pattern) or SmolLM2's (digits) does."""
    if pattern:
        first = [pre_tokenizers.Split(Regex(pattern), "isolated")]
    else:
        first = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    peer = Tokenizer(models.BPE(ignore_merges=bool(pattern)))
    peer.pre_tokenizer = pre_tokenizers.Sequence(
        first + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)]
    )
    peer.decoder = decoders.ByteLevel()
    peer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return peer


def all_splits(order):
    """The merges that make each piece from any two others, in the pieces' order. order: piece -> place or id."""
    for piece in sorted(order, key=order.get):
        halves = [
            (piece[:k], piece[k:])
            for k in range(1, len(piece))
            if piece[:k] in order and piece[k:] in order
        ]
        yield from sorted(halves, key=lambda pair: (order[pair[0]], order[pair[1]]))


def llama3_from_ranks(path):
    """Llama 3's tokenizer.model as `tokenizers` runs it."""
    peer = byte_level([], LLAMA3_PATTERN)
    lines = [line.split() for line in Path(path).read_bytes().splitlines()]
    vocab = {
        "".join(LETTER[b] for b in base64.b64decode(token)): int(rank) for token, rank in lines
    }
    peer.model = models.BPE(vocab, list(all_splits(vocab)), ignore_merges=True)
    return peer


def llama2_from_pieces(processor, metaspace=False):
    """A SentencePiece BPE as `tokenizers` runs it, in the older spelling (normalizer) or the newer (Metaspace)."""
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    best_first = {piece: (-processor.get_score(i), i) for piece, i in vocab.items()}
    merges = list(all_splits(best_first))
    peer = Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    if metaspace:
        peer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        peer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    peer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    return peer


def many_texts(real, n=2500):
    """TEXTS, n strings drawn from mixed alphabets and all of Unicode, long runs, and rows of real English."""
    rng, drawn = random.Random(0), []
    for _ in range(n):
        alphabets, text = rng.sample(ALPHABETS, rng.randint(1, 4)), ""
        for _ in range(rng.randint(1, 8)):
            alphabet = rng.choice(alphabets)
            anything = chr(
                rng.choice([rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x11000)])
            )
            text += rng.choice(
                [
                    rng.choice(alphabet) * rng.randint(1, 40),
                    alphabet,
                    " " + alphabet,
                    anything,
                    "".join(rng.choices(alphabet, k=rng.randint(1, 12))),
                ]
            )
        drawn.append(text)
    runs = [" " * 120_000 + "x", "a" * 30_000, ("b" + "\n" * 9_999) * 12, "中" * 30_000]
    rows = json.loads((Path(real) / "alpaca" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    return TEXTS + drawn + runs + [row["instruction"] + "\n" + row["output"] for row in rows]


def encoder(peer):
    """The peer's text -> ids, special tokens taken as text; None for a text with a byte that it would drop."""
    if isinstance(peer, sentencepiece.SentencePieceProcessor):
        return peer.encode
    peer.encode_special_tokens = True
    vocab = peer.get_vocab()
    missing = bytes(b for b in range(256) if LETTER[b] not in vocab and "<0x00>" not in vocab)

    def encode(text):
        dropped = set(text.encode("utf-8")) & set(missing)
        return None if dropped else peer.encode(text, add_special_tokens=False).ids

    return encode


def write(name, peer, version):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    if name.startswith("tiny") and isinstance(peer, Tokenizer):
        peer.save(str(folder / "tokenizer.json"), pretty=False)
    ids = ",\n".join(map(json.dumps, map(encoder(peer), TEXTS)))
    (folder / "golden.json").write_text(
        f'{{"peer": "{version}", "ids": [\n{ids}\n]}}\n'.replace(", ", ",")
    )


def train(peer, size, alphabet, special=(), corpus=CORPUS):
    settings = {
        "special_tokens": list(special),
        "initial_alphabet": list(alphabet),
        "limit_alphabet": len(alphabet),
    }
    peer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=size, show_progress=False, **settings)
    )
    return peer


def with_whole_word(peer):
    """Add a token that no merge makes: ignore_merges finds it as a whole piece, and without that nothing does."""
    spec = json.loads(peer.to_str())
    spec["model"]["vocab"]["Ġzyzzyva"] = max(spec["model"]["vocab"].values()) + 1
    for token in spec["added_tokens"]:  # special tokens after the vocabulary, as Llama 3 has them
        if spec["model"]["vocab"].get(token["content"]) != token["id"]:
            token["id"] = max(spec["model"]["vocab"].values()) + 1
    return Tokenizer.from_str(json.dumps(spec))


def main():
    (HERE / "texts.json").write_text("[" + ",\n".join(map(json.dumps, TEXTS)) + "]\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=450,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    tiny = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    write("tiny_sentencepiece", tiny, SENTENCEPIECE)
    (HERE / "tiny_sentencepiece" / "tokenizer.model").write_bytes(model.getvalue())
    write("tiny_llama2_json", llama2_from_pieces(tiny), TOKENIZERS)
    write("tiny_metaspace_json", llama2_from_pieces(tiny, metaspace=True), TOKENIZERS)
    letters = [LETTER[b] for b in range(256) if b not in MISSING_BYTES]
    smollm2 = train(byte_level([], digits=True), 450, letters, SMOLLM2_SPECIAL)
    write("tiny_smollm2", with_whole_word(smollm2), TOKENIZERS)
    llama3 = train(byte_level(["<|eot_id|>"], LLAMA3_PATTERN), 450, LETTER.values())
    write("tiny_llama3_json", with_whole_word(llama3), TOKENIZERS)
    real = os.environ.get("NANOSDD_REAL_DATA")
    if real:
        path = Path(real) / "tokenizers"
        llama2 = sentencepiece.SentencePieceProcessor(
            model_file=str(path / "llama2" / "tokenizer.model")
        )
        write("llama2", llama2, SENTENCEPIECE)
        write("llama3", llama3_from_ranks(path / "llama3" / "tokenizer.model"), TOKENIZERS)


if __name__ == "__main__":
    main()

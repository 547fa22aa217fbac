"""Make the golden files beside this script: the ids that other tokenizers return for fixed texts.

    pip install sentencepiece==0.2.3 tokenizers==0.23.3
    NANOSDD_REAL_DATA=<folder, if you have it> python tests/golden/tokenizer/make_golden.py

It imports nothing of nanoSDD. texts.json holds the texts; golden.json in each folder the peer's
version and the ids of each text, or null where the vocabulary lacks one of its bytes. The tiny_*
folders also hold the tokenizer, trained here on corpus.json. llama2/ and llama3/ are made
from the real files under NANOSDD_REAL_DATA and hold ids only.
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
CORPUS = json.loads((HERE / "corpus.json").read_text()) * 3

TEXTS = json.loads((HERE / "texts.json").read_text())

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMOLLM2_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_SPLIT = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
DIGITS = pre_tokenizers.Digits(individual_digits=True)
MISSING_BYTES = [0x01, 0x02, 0x03, 0x1C, 0x1D, 0xC0, 0xC1, *range(0xF2, 0x100)]  # 21, like SmolLM2

LETTER = {}  # the letter that stands for a byte
others = 0
for byte in range(256):
    LETTER[byte] = chr(byte)
    if byte == 32 or not chr(byte).isprintable():
        LETTER[byte] = chr(256 + others)
        others += 1


def add_special(peer, names):
    """Add special tokens by these names."""
    peer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def byte_level(first, special=()):
    """A Tokenizer without vocabulary that cuts text with `first` and, but for Llama 3, as GPT-2."""
    llama3 = isinstance(first, pre_tokenizers.Split)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama3)
    peer = Tokenizer(models.BPE(ignore_merges=llama3))
    peer.pre_tokenizer = pre_tokenizers.Sequence([first, last])
    peer.decoder = decoders.ByteLevel()
    add_special(peer, special)
    return peer


def all_splits(order):
    """The merges of any two pieces into a third. order: the place of each piece, the best first."""
    merges = []
    for piece in order:
        for k in range(1, len(piece)):
            if piece[:k] in order and piece[k:] in order:
                merges.append((piece[:k], piece[k:]))
    merges.sort(key=lambda pair: (order[pair[0] + pair[1]], order[pair[0]], order[pair[1]]))
    return merges


def llama3_from_ranks(path):
    """Llama 3's tokenizer.model as `tokenizers` runs it."""
    peer = byte_level(LLAMA3_SPLIT)
    vocab = {}
    for line in Path(path).read_bytes().splitlines():
        token, rank = line.split()
        vocab["".join(LETTER[b] for b in base64.b64decode(token))] = int(rank)
    peer.model = models.BPE(vocab, all_splits(vocab), ignore_merges=True)
    return peer


def llama2_from_pieces(processor, metaspace=False):
    """A SentencePiece BPE as `tokenizers` runs it, in the older form (normalizer) or Metaspace."""
    vocab = {processor.id_to_piece(i): i for i in range(len(processor))}
    best_first = {piece: (-processor.get_score(i), i) for piece, i in vocab.items()}
    unknown = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    peer = Tokenizer(models.BPE(vocab, all_splits(best_first), **unknown))
    if metaspace:
        peer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        peer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    add_special(peer, ("<unk>", "<s>", "</s>"))
    return peer


def many_texts(real):
    """TEXTS, strings of their characters and others, long runs, and real English."""
    rng = random.Random(0)
    texts = list(TEXTS)
    for _ in range(2500):
        text = ""
        for _ in range(rng.randint(1, 8)):
            alphabet = rng.choice(TEXTS[1:])
            text += rng.choice(["", " ", chr(rng.randrange(0x20, 0xD800)), alphabet])
            text += "".join(rng.choices(alphabet, k=rng.randint(1, 12)))
        texts.append(text)
    texts += [" " * 120_000 + "x", "a" * 30_000, ("b" + "\n" * 9_999) * 12, "中" * 30_000]
    rows = json.loads((Path(real) / "alpaca/alpaca_en_demo.json").read_text(encoding="utf-8"))
    return texts + [row["instruction"] + "\n" + row["output"] for row in rows]


def encoder(peer):
    """The peer's text -> ids, special tokens taken as text; None for a text that loses a byte."""
    if isinstance(peer, sentencepiece.SentencePieceProcessor):
        return peer.encode
    peer.encode_special_tokens = True
    vocab = peer.get_vocab()
    missing = bytes(b for b in range(256) if LETTER[b] not in vocab and "<0x00>" not in vocab)

    def encode(text):
        dropped = set(text.encode("utf-8")) & set(missing)
        return None if dropped else peer.encode(text, add_special_tokens=False).ids

    return encode


def write(name, peer):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    library = sentencepiece
    if isinstance(peer, Tokenizer):
        library = tokenizers
        if name.startswith("tiny"):
            peer.save(str(folder / "tokenizer.json"), pretty=False)
    version = f"{library.__name__} {library.__version__}"
    ids = ",\n".join(map(json.dumps, map(encoder(peer), TEXTS)))
    text = f'{{"peer": "{version}", "ids": [\n{ids}\n]}}\n'
    (folder / "golden.json").write_text(text.replace(", ", ","))


def train(peer, alphabet, special=()):
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        show_progress=False,
        special_tokens=list(special),
        initial_alphabet=list(alphabet),
        limit_alphabet=len(alphabet),
    )
    peer.train_from_iterator(CORPUS, trainer)
    return peer


def with_whole_word(peer):
    """Add a token that no merge makes: only ignore_merges finds it, as a whole piece."""
    spec = json.loads(peer.to_str())
    spec["model"]["vocab"]["Ġzyzzyva"] = max(spec["model"]["vocab"].values()) + 1
    for token in spec["added_tokens"]:  # special tokens after the vocabulary, as Llama 3 has them
        if spec["model"]["vocab"].get(token["content"]) != token["id"]:
            token["id"] = max(spec["model"]["vocab"].values()) + 1
    return Tokenizer.from_str(json.dumps(spec))


def main():
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
    write("tiny_sentencepiece", tiny)
    (HERE / "tiny_sentencepiece" / "tokenizer.model").write_bytes(model.getvalue())
    write("tiny_llama2_json", llama2_from_pieces(tiny))
    write("tiny_metaspace_json", llama2_from_pieces(tiny, metaspace=True))
    letters = [LETTER[b] for b in range(256) if b not in MISSING_BYTES]
    smollm2 = train(byte_level(DIGITS), letters, SMOLLM2_SPECIAL)
    write("tiny_smollm2", with_whole_word(smollm2))
    llama3 = train(byte_level(LLAMA3_SPLIT, ["<|eot_id|>"]), LETTER.values())
    write("tiny_llama3_json", with_whole_word(llama3))
    real = os.environ.get("NANOSDD_REAL_DATA")
    if real:
        path = Path(real) / "tokenizers"
        llama2 = str(path / "llama2" / "tokenizer.model")
        write("llama2", sentencepiece.SentencePieceProcessor(model_file=llama2))
        write("llama3", llama3_from_ranks(path / "llama3" / "tokenizer.model"))


if __name__ == "__main__":
    main()

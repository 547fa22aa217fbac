"""Make this folder: a tiny random BERT with a vocabulary of pieces, and what peers say of texts.

    pip install transformers==5.23.0 tokenizers==0.23.3 torch==2.13.0
    python tests/golden/sentence/make_golden.py

It imports nothing of nanoSDD. config.json says the sizes; golden.json: texts, their ids (of
tokenizers), and the mean of the last layer's vectors (of transformers) at unit length.
"""

import json
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel

FOLDER = Path(__file__).parent
WORDS = (
    "the a of un run jump ##ning ##able ##s ##ly dog cafe strasse tea 2 19 ##84 ##2 "
    "ά ##α σ 東 京 ｶ ##ﾞ ᄒ ##ᅡ ##ᆫ"
).split()
TEXTS = [
    "",
    " ",
    "The dog",
    "dogs running unrunnable",
    "Café CAFÉ cafe\u0301",
    "don't stop: a dog, a tea!",
    "1984 (of 22)",
    "a\tdog\r\n\x0bof\x00 the\u200b tea\ufffd",
    "東京 tea東",
    "ΑΣ σας ς",
    "Straße İstanbul ﬁne",
    "한 é",
    "tea\u00a0dog\u3000cat\u2028ox",
    "$5 + 3 = 8 ~ `x`",
    "€5 ≤ ∞ 😀 dog",
    "x" * 100,
    "x" * 101,
    "a-b_c/d",
    "über naïve Ångström",
    "jump " * 90,
    "qwertz asdf",
    "\ufeffthe dog",
    "a\u0301b\u0327c",
    "ｶﾞ ﾊ゚",
    "x\U0002b820x \U0002b740x",
    "tea\x85dog\x1ccat",
]


def main():
    torch.manual_seed(3)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'()[]-_/$+=~`\"#*"
    vocab = [
        *"[PAD] [UNK] [CLS] [SEP] [MASK]".split(),
        *WORDS,
        *letters,
        *("##" + ch for ch in letters[:36] if f"##{ch}" not in WORDS and ch not in "qz"),
    ]
    vocab = list(dict.fromkeys(vocab))
    (FOLDER / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    config = BertConfig.from_pretrained(FOLDER)
    config.vocab_size = len(vocab)
    model = BertModel(config).eval()
    # biases of 0 and norms of 1 would hide that they are forgotten
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.4 * torch.randn_like(parameter)
    model.save_pretrained(FOLDER)
    tokenizer = BertWordPieceTokenizer(str(FOLDER / "vocab.txt"), lowercase=True)
    tokenizer.enable_truncation(70)
    cases = []
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0]  # (T,C)
        vector = torch.nn.functional.normalize(hidden.mean(0), dim=0).tolist()
        cases.append({"text": text, "ids": ids, "vector": [round(v, 7) for v in vector]})
    (FOLDER / "golden.json").write_text(json.dumps(cases, indent=0) + "\n")


if __name__ == "__main__":
    main()

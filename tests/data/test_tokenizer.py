"""The tokenizers: golden ids, vocabularies made by hand, and comparisons with the peers.

Tests that need a peer (sentencepiece, tokenizers), or the real files in the folder
NANOSDD_REAL_DATA, are skipped without them.
"""

import base64
import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest

from data.chat import encode_prompt
from data.sentencepiece import BYTE_PIECES, merge
from data.tokenizer import load_tokenizer, write_llama3_tokenizer
from nanosdd.errors import InputError

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenizer"
TEXTS = json.loads((GOLDEN / "texts.json").read_text())
TINY = sorted(path.name for path in GOLDEN.glob("tiny_*"))
MODEL = "tokenizer.model"
JSON = "tokenizer.json"


@pytest.fixture
def real():
    if "NANOSDD_REAL_DATA" not in os.environ:
        pytest.skip("NANOSDD_REAL_DATA is not set: no real tokenizer files")
    return Path(os.environ["NANOSDD_REAL_DATA"])


@pytest.fixture
def toy(tmp_path):
    """A Llama 3 tokenizer with a few words; ids 0..255 are bytes."""
    write_llama3_tokenizer(tmp_path, ["cat", " cat", " sat", "  ", "aa", "a", "cat"])
    return load_tokenizer(tmp_path)


# --- golden ids ---


def check_ids(tokenizer, texts, expected):
    """expected: the ids of each text, or None where the peer drops a byte, an error here."""
    for text, ids in zip(texts, expected, strict=True):
        if ids is None:
            with pytest.raises(InputError, match="lacks the byte"):
                tokenizer.encode(text)
        else:
            assert tokenizer.encode(text) == ids, repr(text[:200])


def check_golden(tokenizer, name):
    golden = json.loads((GOLDEN / name / "golden.json").read_text())["ids"]
    check_ids(tokenizer, TEXTS, golden)
    for text, ids in zip(TEXTS, golden):
        # " a" and "a" are the same to Metaspace
        if ids is not None and "▁" not in text and name != "tiny_metaspace_json":
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", TINY)
def test_golden_tiny(name):
    check_golden(load_tokenizer(GOLDEN / name), name)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_golden_real(name, real):
    check_golden(load_tokenizer(real / "tokenizers" / name), name)


# --- what holds for all of them ---


@pytest.mark.parametrize("name", TINY + ["toy"])
def test_special_tokens_are_never_encoded_and_show_when_decoded(name, toy):
    tokenizer = toy if name == "toy" else load_tokenizer(GOLDEN / name)
    cat = tokenizer.encode("cat")
    assert tokenizer.special and tokenizer.stop_tokens
    for special, i in tokenizer.special.items():
        for text in (special, f"a{special}", f"{special} {special}"):
            ids = tokenizer.encode(text)
            assert not set(ids) & set(tokenizer.special.values())
            assert tokenizer.decode(ids) == text
        assert tokenizer.decode([i, *cat, i]) == f"{special}cat{special}"
    # a padded vocabulary has rows without a token, which a model may choose
    padded = tokenizer.n_vocab
    assert tokenizer.decode([padded, *cat, padded + 9]) == "cat" and tokenizer.decode([]) == ""
    with pytest.raises(InputError, match="lone surrogate"):
        tokenizer.encode("a\udc00b")
    half = tokenizer.decode(tokenizer.encode("é😀")[:-1])
    assert half.startswith("é") and half.endswith("\ufffd")


def test_long_inputs_keep_their_ids(toy):
    """Sizes at which tiktoken's regex engine panics and quadratic code would not come back."""
    two = toy.encode("  ")[0]
    assert toy.encode(" " * 1_200_001 + "cat") == [two] * 600_000 + toy.encode(" cat")
    assert toy.encode("a" * 400_001) == toy.encode("aa") * 200_000 + [ord("a")]
    pieces = load_tokenizer(GOLDEN / "tiny_sentencepiece")
    assert pieces.encode("a" * 80_001) == pieces.encode("a") + pieces.encode("aaa")[-1:] * 40_000


def test_merge_is_byte_pair_encoding():
    """The heap against the plain definition: find the best pair, join it, start again."""
    rng = random.Random(0)
    for _ in range(300):
        ranks = {}
        for _ in range(12):  # ties and pairs of long parts included
            left, right = ("".join(rng.choices("ab", k=rng.randint(1, 3))) for _ in range(2))
            ranks[left, right] = rng.randint(0, 6)
        text = rng.choices("ab", k=30)
        found = merge(list(text), lambda left, right, ranks=ranks: ranks.get((left, right)))
        while known := [pair for pair in zip(text, text[1:]) if pair in ranks]:
            best = min(known, key=ranks.get)  # the first of equals
            i = list(zip(text, text[1:])).index(best)
            text[i : i + 2] = ["".join(best)]
        assert found == text


# --- Llama 3's file ---


def test_words_are_single_ids_and_special_tokens_follow(toy):
    assert toy.encode("cat cat sat") == [256, 257, 258]
    assert toy.encode("a") == [ord("a")] and toy.encode("don't") == list(b"don't")
    n = 256 + 5  # "a" is a byte already and "cat" was given twice
    assert list(toy.special.values()) == list(range(n, n + 256)) and toy.n_vocab == n + 256
    # as published: Llama 3.1's 128000, 128003, 128008, 128009, 128011 and 128255
    for i, name in [
        (0, "begin_of_text"),
        (3, "reserved_special_token_1"),
        (8, "eom_id"),
        (9, "eot_id"),
        (11, "reserved_special_token_3"),
        (255, "reserved_special_token_247"),
    ]:
        assert toy.special[f"<|{name}|>"] == n + i
    assert toy.stop_tokens == [n + 9, n + 8, n + 1]  # eot_id, eom_id, end_of_text


@pytest.mark.parametrize("word", ["don't", "1234", "two words", "", "\ud800"])
def test_words_that_cannot_be_one_id_are_refused(word, tmp_path):
    with pytest.raises(InputError):
        write_llama3_tokenizer(tmp_path, ["cat", word])
    assert not (tmp_path / MODEL).exists()


# --- SentencePiece's file, written by hand ---


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def field(number, value):
    """One protobuf field: an int as a varint, a float as 4 bytes, bytes with their length."""
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    if isinstance(value, float):
        return varint(number * 8 + 5) + struct.pack("<f", value)
    return varint(number * 8 + 2) + varint(len(value)) + value


def message(settings):
    return b"".join(field(*item) for item in settings.items())


def piece(text, score=0.0, kind=1):
    return field(1, message({1: text.encode(), 2: score, 3: kind}))


def sentencepiece_file(pieces, trainer=None, normalizer=None):
    """pieces: text -> score, after <unk>, <s>, </s> and the 256 byte pieces: ids start at 259."""
    file = piece("<unk>", kind=2) + piece("<s>", kind=3) + piece("</s>", kind=3)
    for text in BYTE_PIECES:
        file += piece(text, kind=6)
    for text, score in pieces.items():
        file += piece(text, score)
    file += field(2, message({3: 2, 35: 1} | (trainer or {})))
    return file + field(3, message({4: 0} | (normalizer or {})))


# --- files that are refused ---

A = {"a": -1.0}
SETTINGS = field(2, message({3: 2, 35: 1})) + field(3, message({4: 0}))
BYTES = [base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)]


@pytest.mark.parametrize(
    "contents, problem",
    [
        (b"", "cut short"),
        (b"".join(BYTES[:200]), "0xC8"),
        (b"".join(BYTES[:9]) + b"version https://git-lfs", "line 10: "),
        (b"".join(BYTES) + b"Y2F0 257\n", "line 257: .* the rank 256"),
        (b"".join(BYTES) + b"YQ== 256\n", "line 257: expected a new token"),
        (b"".join(BYTES) + b"Y2F!0 256\n", "line 257: "),
        (sentencepiece_file(A)[:-1], "the middle of a field"),
        (sentencepiece_file({"<s>": -1.0}), "twice"),
        (sentencepiece_file({"a▁b": -1.0}), "after a word"),
        (piece("a") + SETTINGS, "256 byte pieces"),
        (sentencepiece_file(A, {3: 1}), "not BPE"),
        (sentencepiece_file(A, {35: 0}), "byte fallback"),
        (sentencepiece_file(A, {24: 1}), "after the word"),
        (sentencepiece_file(A, None, {4: 1}), "removes extra"),
        (sentencepiece_file(A, None, {2: b"nfkc"}), "rewrites"),
        (sentencepiece_file(A, None, {5: 0}), "keeps spaces"),
        (sentencepiece_file(A, None, {3: 0}), "no dummy prefix"),
        (piece("a", kind=4), "type 4"),
        (b"\n\xff\xff\xff", "not a tokenizer.model"),
        (b"\n" + b"\x80" * 2**22, "more than 64 bits"),  # took minutes
        (b"\n\x00" * 2**22, "not a tokenizer.model"),  # took gigabytes
    ],
)
def test_a_tokenizer_model_that_cannot_be_read_is_named(contents, problem, tmp_path):
    (tmp_path / MODEL).write_bytes(contents)
    with pytest.raises(InputError, match=problem) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / MODEL) in str(caught.value)


@pytest.mark.parametrize(
    "contents, problem",
    [
        ('{"model":\n oops}', "not valid JSON .*line 2"),
        ("[]", "not a tokenizer.json"),
        ('{"model": {"type": "WordPiece", "vocab": {}}}', "WordPiece"),
        ('{"model": {"vocab": {"a": 0, "b": 0}, "merges": []}}', "used twice"),
        ('{"model": {"vocab": {"a": "x"}, "merges": []}}', "whole number"),
        ('{"model": {"vocab": {"a": -1}, "merges": []}}', "whole number"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_read_is_named(contents, problem, tmp_path):
    (tmp_path / JSON).write_text(contents)
    with pytest.raises(InputError, match=f"{JSON}.*{problem}"):
        load_tokenizer(tmp_path)


def edited(tmp_path, name, edit):
    spec = json.loads((GOLDEN / name / JSON).read_text())
    edit(spec)
    (tmp_path / JSON).write_text(json.dumps(spec))
    return load_tokenizer(tmp_path)


SMOLLM2 = "tiny_smollm2"
LLAMA2 = "tiny_llama2_json"
LLAMA3 = "tiny_llama3_json"
FIRST = "pre_tokenizer pretokenizers 0 "
LAST = "pre_tokenizer pretokenizers 1 "


@pytest.mark.parametrize(
    "name, key, value, problem",
    [
        (SMOLLM2, "normalizer", {"type": "NFC"}, "normalizer"),
        (SMOLLM2, "pre_tokenizer", {"type": "Whitespace"}, "Whitespace"),
        (SMOLLM2, LAST + "add_prefix_space", True, "ByteLevel"),
        (SMOLLM2, LAST + "use_regex", False, "ByteLevel"),
        (SMOLLM2, FIRST + "individual_digits", False, "Digits"),
        (SMOLLM2, "added_tokens 1 special", False, "im_start"),
        (SMOLLM2, "model dropout", 0.1, "dropout"),
        (SMOLLM2, "model merges 0", ["q", "q"], "not made of"),
        (SMOLLM2, "model vocab 語", 999, "not a tokenizer.json"),
        (LLAMA3, FIRST + "behavior", "Removed", "Split"),
        (LLAMA3, FIRST + "pattern", {"Regex": "(a|a)*$"}, "Split"),
        (LLAMA2, "normalizer", None, "normalizer"),
        (LLAMA2, "model ignore_merges", True, "ignore_merges"),
        ("tiny_metaspace_json", "pre_tokenizer split", True, "Metaspace"),
    ],
)
def test_a_json_that_would_lead_to_other_ids_is_refused(name, key, value, problem, tmp_path):
    def edit(spec):
        *path, last = [int(part) if part.isdigit() else part for part in key.split()]
        for part in path:
            spec = spec[part]
        spec[last] = value

    with pytest.raises(InputError, match=problem):
        edited(tmp_path, name, edit)


# --- tokenizer.json: what is read ---


@pytest.mark.parametrize(
    "name, vocab, merges, text, last",
    [
        # two tokens that only another cut can reach
        (SMOLLM2, {"12": 451, "Ġ1": 452}, [["1", "2"], ["Ġ", "1"]], "12 12", None),
        # the special token <s> would be one join away
        (LLAMA2, {"<s": 450, ">": 451, "s>": 452}, [["<", "s"], ["<s", ">"]], "<s>", [450, 451]),
    ],
)
def test_pieces_that_no_text_reaches(name, vocab, merges, text, last, tmp_path):
    def add(spec):
        spec["model"]["vocab"] |= vocab
        spec["model"]["merges"] += merges

    ids = edited(tmp_path, name, add).encode(text)
    assert ids[-2:] == last if last else not set(ids) & set(vocab.values())


# What `tokenizers` 0.23.3 gives, with the special token taken as text (encode_special_tokens).
AS_TEXT = {
    SMOLLM2: {"hi!": [74, 75, 3], "then the there": [240, 80, 243, 314], "other": [261]},
    LLAMA3: {"hi!": [71, 72, 0], "then the there": [258, 77, 261, 333]},
    LLAMA2: {"a! b!!": [263, 388, 268, 388, 388], "the other": [264, 269, 274]},
}


@pytest.mark.parametrize("word", ["!", "the", "▁the", "Ġthe", " the", ""])
@pytest.mark.parametrize("name", AS_TEXT)
def test_a_special_token_may_be_an_ordinary_piece_too(name, word, tmp_path):
    """As when "!" or a word is declared to be the token for padding."""

    def declare(spec):
        i = spec["model"]["vocab"].get(word, 500 if word else 0)
        spec["added_tokens"].append({"content": word, "id": i, "special": word != ""})

    tokenizer = edited(tmp_path, name, declare)
    for text, ids in AS_TEXT[name].items():
        assert tokenizer.encode(text) == ids
        if word != "▁the":  # at the start of a text its space shows
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", [SMOLLM2, LLAMA2])
def test_merges_may_be_written_as_strings(name, tmp_path):
    def join(spec):
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]

    check_golden(edited(tmp_path, name, join), name)


# --- the other files of a folder ---


@pytest.fixture
def folder(tmp_path):
    """A function that writes files of JSON beside a tokenizer, and returns their folder."""

    def write(name=SMOLLM2, **files):
        for path in (GOLDEN / name).glob("tokenizer.*"):
            shutil.copy(path, tmp_path)
        for stem, content in files.items():
            (tmp_path / f"{stem}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def test_tokenizer_json_goes_first(toy, folder):
    tokenizer = load_tokenizer(folder())  # there is a tokenizer.model, too
    assert "<|im_end|>" in tokenizer.special and "<|eot_id|>" not in tokenizer.special


@pytest.mark.parametrize(
    "config, generation, stop",  # what the files hold; None: no such file
    [
        ({"eos_token_id": 9}, None, [9]),  # transformers stops here, too
        ({"eos_token_id": [9, 2]}, None, [9]),
        ({"eos_token_id": 9}, {"eos_token_id": [8, 7]}, [8, 7]),  # and here not at 9
        ({"eos_token_id": 9}, {"eos_token_id": ""}, []),
        ({"eos_token_id": 0}, None, []),  # <|endoftext|>, which is known by its name
        ([], "text", []),
    ],
)
def test_generation_stops_where_transformers_does(config, generation, stop, folder):
    path = folder(config=config)
    if generation is not None:
        folder(generation_config=generation)
    # <|im_end|> ends a turn, <|endoftext|> a text
    assert load_tokenizer(path).stop_tokens == [2, 0, *stop]


@pytest.mark.parametrize("eos", [-1, 451, 2.0, True, "2", [[2]], [2, None], {"a": 2}])
def test_an_eos_that_is_no_token_is_named(eos, folder):
    with pytest.raises(InputError, match="eos_token_id .* is no token"):
        load_tokenizer(folder(config={"eos_token_id": eos}))


@pytest.mark.parametrize("name", ["tiny_sentencepiece", LLAMA2])
def test_added_tokens_stand_in_a_file_of_their_own(name, folder):
    """transformers 5.24 counts 452 tokens, and has these ids."""
    plain = load_tokenizer(GOLDEN / name)
    added = {"<|im_end|>": 450, "<|im_start|>": 451}
    known = {"</s>": 2, "the": 261, "": 999}  # already, or no token at all
    decoder = {"added_tokens_decoder": {"451": {"content": "<|im_start|>"}}}  # the newer place
    here = known | {"<|im_end|>": 450}
    tokenizer = load_tokenizer(folder(name, added_tokens=here, tokenizer_config=decoder))
    assert tokenizer.special == plain.special | added and tokenizer.n_vocab == 452
    assert tokenizer.stop_tokens == [450, 2]
    assert tokenizer.decode([451, 264, 450]) == "<|im_start|>the<|im_end|>"
    assert tokenizer.encode("the<|im_end|>") == plain.encode("the<|im_end|>")
    prompt = encode_prompt(tokenizer, "chatml", "the")
    assert prompt[0] == 451 and prompt.count(450) == 1 and prompt.count(451) == 2


@pytest.mark.parametrize("added", [{"newword": 450}, {"<pad>": "450"}, {"<pad>": []}])
def test_an_added_word_would_change_what_text_means(added, folder):
    with pytest.raises(InputError, match="the added token .* is not special"):
        load_tokenizer(folder("tiny_sentencepiece", added_tokens=added))


def test_the_files_are_kept_as_they_were_read(folder):
    path = folder(vocab={})
    (path / "merges.txt").symlink_to("vocab.json")
    (path / "special_tokens_map.json").symlink_to("gone")
    (path / "tokenizer.extra").write_text("another's")
    (path / "tokenizer").mkdir()
    files = load_tokenizer(path).files
    assert files.keys() == {JSON, "vocab.json", "merges.txt"}
    assert files["vocab.json"] == files["merges.txt"] == b"{}"
    assert files[JSON] == (GOLDEN / SMOLLM2 / JSON).read_bytes()


def test_a_link_to_a_file_elsewhere_is_refused(tmp_path):
    """It would be copied into the run folder, which may be published."""
    private = tmp_path / "key.json"
    private.write_text('{"key": "secret"}')
    folder = tmp_path / "models--a--b/snapshots/1f"
    shutil.copytree(GOLDEN / SMOLLM2, folder)
    (folder / "special_tokens_map.json").symlink_to(private)
    with pytest.raises(InputError, match="special_tokens_map.json cannot be read .a link to"):
        load_tokenizer(folder)
    (folder / "special_tokens_map.json").unlink()
    # the hub's own cache is made of links
    (tmp_path / "models--a--b/blobs").mkdir()
    (folder / JSON).rename(tmp_path / "models--a--b/blobs/d0")
    (folder / JSON).symlink_to("../../blobs/d0")
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        assert load_tokenizer(path).files.keys() == {JSON}


@pytest.mark.posix
def test_a_pipe_among_the_files_is_not_waited_for(folder):
    os.mkfifo(folder() / "chat_template.jinja")
    with pytest.raises(InputError, match="jinja cannot be read .not an ordinary file"):
        load_tokenizer(folder())


# --- comparisons with the peers ---


@pytest.fixture
def peers(monkeypatch):
    """The functions of make_golden.py, which need both peers."""
    pytest.importorskip("sentencepiece")
    pytest.importorskip("tokenizers")
    monkeypatch.syspath_prepend(GOLDEN)
    import make_golden

    return make_golden


def check_peer(folder, peer, peers, real):
    texts = peers.many_texts(real)
    check_ids(load_tokenizer(folder), texts, map(peers.encoder(peer), texts))


@pytest.mark.parametrize("form", ["model", "json", "metaspace"])
def test_llama2_equals_its_peers(form, real, peers, tmp_path):
    folder = real / "tokenizers" / "llama2"
    peer = peers.sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    if form != "model":
        peer = peers.llama2_from_pieces(peer, metaspace=form == "metaspace")
        folder = tmp_path
        peer.save(str(tmp_path / JSON))
    check_peer(folder, peer, peers, real)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["model", "json"])
def test_llama3_equals_its_peers(form, real, peers, tmp_path):
    folder = real / "tokenizers" / "llama3"
    peer = peers.llama3_from_ranks(folder / MODEL)
    if form == "json":
        folder = tmp_path
        peer.save(str(tmp_path / JSON))
    check_peer(folder, peer, peers, real)

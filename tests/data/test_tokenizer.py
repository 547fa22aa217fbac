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


def check_golden(tokenizer, name):
    """Every golden text has the golden ids and decodes to itself, or is refused where the peer
    drops a byte."""
    golden = json.loads((GOLDEN / name / "golden.json").read_text())["ids"]
    assert len(golden) == len(TEXTS)
    for text, ids in zip(TEXTS, golden):
        if ids is None:
            with pytest.raises(InputError, match="lacks the byte"):
                tokenizer.encode(text)
        else:
            assert tokenizer.encode(text) == ids, text
            if "▁" not in text and name != "tiny_metaspace_json":  # " a" and "a" are the same there
                assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", TINY)
def test_golden_tiny(name):
    check_golden(load_tokenizer(GOLDEN / name), name)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_golden_real(name, real):
    check_golden(load_tokenizer(real / "tokenizers" / name), name)


# --- Llama 3's file ---


def test_words_are_single_ids_and_special_tokens_follow(toy):
    assert toy.encode("cat cat sat") == [256, 257, 258]
    assert toy.encode("a") == [ord("a")] and toy.encode("don't") == list(b"don't")
    n = 256 + 5  # "a" is a byte already and "cat" was given twice
    layout = {
        "begin_of_text": 0,
        "reserved_special_token_1": 3,
        "reserved_special_token_2": 5,
        "eom_id": 8,
        "eot_id": 9,
        "reserved_special_token_3": 11,
        "reserved_special_token_247": 255,
    }
    assert {name: toy.special[f"<|{name}|>"] - n for name in layout} == layout
    assert sorted(toy.special.values()) == list(range(n, n + 256)) and toy.n_vocab == n + 256
    assert toy.stop_tokens == [n + 9, n + 8, n + 1]  # eot_id, eom_id, end_of_text


@pytest.mark.parametrize("word", ["don't", "1234", "two words", "", "\ud800"])
def test_words_that_cannot_be_one_id_are_refused(word, tmp_path):
    with pytest.raises(InputError):
        write_llama3_tokenizer(tmp_path, ["cat", word])
    assert not (tmp_path / "tokenizer.model").exists()


# --- what holds for all of them ---


@pytest.mark.parametrize("name", TINY + ["toy"])
def test_special_tokens_are_never_encoded_and_show_when_decoded(name, toy):
    tokenizer = toy if name == "toy" else load_tokenizer(GOLDEN / name)
    assert tokenizer.special and tokenizer.stop_tokens
    for special, i in tokenizer.special.items():
        for text in (special, f"a{special}", f"{special} {special}"):
            ids = tokenizer.encode(text)
            assert not set(ids) & set(tokenizer.special.values())
            assert tokenizer.decode(ids) == text
        assert tokenizer.decode([i, *tokenizer.encode("cat"), i]) == f"{special}cat{special}"
    assert tokenizer.decode([]) == ""
    with pytest.raises(InputError, match="lone surrogate"):
        tokenizer.encode("a\udc00b")
    half = tokenizer.decode(tokenizer.encode("é😀")[:-1])
    assert half.startswith("é") and half.endswith("\ufffd")


@pytest.mark.parametrize("name", TINY)
def test_an_id_without_a_token_is_decoded_to_nothing_as_in_transformers(name):
    """A padded vocabulary has such rows, and a model may choose one."""
    tokenizer = load_tokenizer(GOLDEN / name)
    ids = tokenizer.encode("the baker")
    padded = tokenizer.n_vocab
    for odd in ([padded, *ids], [*ids, padded + 9], [ids[0], padded, *ids[1:]]):
        assert tokenizer.decode(odd) == "the baker"


def test_long_inputs_keep_their_ids(toy):
    """Sizes at which tiktoken's regex engine panics and quadratic code would not come back."""
    n = 1_200_001
    space = ord(" ")
    two = toy.encode("  ")[0]
    assert toy.encode(" " * n + "cat") == [two] * (n // 2) + toy.encode(" cat")
    assert toy.encode("," + "\n" * n)[:2] == [ord(","), ord("\n")]
    assert toy.encode("a" * n) == toy.encode("aa") * (n // 2) + [ord("a")]
    assert toy.encode((" " * 99_999 + ",") * 6) == ([two] * 49_999 + [space, ord(",")]) * 6
    pieces = load_tokenizer(GOLDEN / "tiny_sentencepiece")
    assert pieces.encode("a" * 160_001) == pieces.encode("a") + pieces.encode("aaa")[-1:] * 80_000
    words = "cat cat sat, don't!" + " cat cat sat, don't!" * 50_000
    for tokenizer in (toy, pieces):
        first = tokenizer.encode(words[:19])
        both = tokenizer.encode(words[:39])
        assert tokenizer.encode(words) == first + both[len(first) :] * 50_000


def test_merge_is_byte_pair_encoding():
    """The heap against the plain definition: find the best pair, join it, start again."""
    rng = random.Random(0)
    for _ in range(300):
        ranks = {}
        for _ in range(12):  # ranks are drawn at random, ties and pairs of long parts included
            left, right = ("".join(rng.choices("ab", k=rng.randint(1, 3))) for _ in range(2))
            ranks[left, right] = rng.randint(0, 6)
        text = rng.choices("ab", k=rng.randint(0, 30))
        plain = list(text)
        while True:
            pairs = [(ranks.get(pair, 9), i) for i, pair in enumerate(zip(plain, plain[1:]))]
            rank, i = min(pairs, default=(9, 0))
            if rank == 9:
                break
            plain[i : i + 2] = [plain[i] + plain[i + 1]]
        assert merge(list(text), lambda left, right, ranks=ranks: ranks.get((left, right))) == plain


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


def piece(text, score=0.0, kind=1):
    return field(1, field(1, text.encode()) + field(2, score) + field(3, kind))


def sentencepiece_file(pieces, trainer=None, normalizer=None):
    """pieces: text -> score, after <unk>, <s>, </s> and the 256 byte pieces: ids start at 259."""
    file = piece("<unk>", kind=2) + piece("<s>", kind=3) + piece("</s>", kind=3)
    for text in BYTE_PIECES:
        file += piece(text, kind=6)
    for text, score in pieces.items():
        file += piece(text, score)
    for number, settings in ((2, trainer or {3: 2, 35: 1}), (3, normalizer or {4: 0})):
        file += field(number, b"".join(field(*item) for item in settings.items()))
    return file


def test_sentencepiece_merges_by_score_with_dummy_prefix_and_bytes(tmp_path):
    scores = "▁ -9 a -10 b -11 c -12 ab -3 bc -2 abc -8 ▁a -4 aa -1 < -13 s -14 > -15 <s -5 s> -6"
    parts = scores.split()
    pieces = dict(zip(parts[::2], map(float, parts[1::2])))
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(pieces))
    tokenizer = load_tokenizer(tmp_path)
    text_of = dict(enumerate(pieces, 259))

    def names(text):
        return [text_of.get(i, i) for i in tokenizer.encode(text)]

    assert names("abc") == ["▁a", "bc"]  # bc (-2) beats ab (-3), then ▁a (-4) beats abc (-8)
    assert names("b ab") == ["▁", "b", "▁", "ab"]  # ab (-3) beats ▁a (-4)
    assert names("babc") == ["▁", "b", "abc"]
    assert names("baaa") == ["▁", "b", "aa", "a"]  # the leftmost of equals
    assert names("aé") == ["▁a", 3 + 0xC3, 3 + 0xA9]
    assert names(" ") == ["▁", "▁"] and names("") == []
    assert names("<s>") == ["▁", "<s", ">"]  # one join away from <s>, which is no piece of text
    assert tokenizer.special == {"<unk>": 0, "<s>": 1, "</s>": 2} and tokenizer.stop_tokens == [2]
    assert tokenizer.decode([1, *tokenizer.encode(" a b"), 2]) == "<s> a b</s>"
    assert tokenizer.n_vocab == 259 + len(pieces)


@pytest.mark.parametrize(
    "trainer, normalizer, problem",
    [
        ({3: 1, 35: 1}, None, "not BPE"),
        ({3: 2}, None, "byte fallback"),
        ({3: 2, 35: 1, 24: 1}, None, "after the word"),
        (None, {3: 1}, "removes extra"),
        (None, {2: b"nfkc", 4: 0}, "rewrites"),
        (None, {4: 0, 5: 0}, "keeps spaces"),
        (None, {4: 0, 3: 0}, "no dummy prefix"),
    ],
)
def test_other_sentencepiece_models_are_refused(trainer, normalizer, problem, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file({"a": -1.0}, trainer, normalizer))
    with pytest.raises(InputError, match=problem):
        load_tokenizer(tmp_path)


def test_a_piece_that_goes_on_after_a_word_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file({"a▁b": -1.0}))
    with pytest.raises(InputError, match="after a word"):
        load_tokenizer(tmp_path)


# --- bad files ---

BYTES = [base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)]
MODEL, JSON = "tokenizer.model", "tokenizer.json"


@pytest.mark.parametrize(
    "name, contents, problem",
    [
        (MODEL, b"", "cut short"),
        (MODEL, b"".join(BYTES[:200]), "0xC8"),
        (MODEL, b"".join(BYTES[:9]) + b"version https://git-lfs", "line 10: "),
        (MODEL, b"".join(BYTES) + b"Y2F0 257\n", "line 257: .* the rank 256"),
        (MODEL, b"".join(BYTES) + b"YQ== 256\n", "line 257: expected a new token"),
        (MODEL, b"".join(BYTES) + b"Y2F!0 256\n", "line 257: "),
        (MODEL, sentencepiece_file({"a": -1.0})[:-20], "tokenizer.model"),
        (MODEL, sentencepiece_file({"<s>": -1.0}), "twice"),
        (MODEL, piece("a", kind=4), "type 4"),
        (MODEL, b"\n\xff\xff\xff", "tokenizer.model"),
        (MODEL, b"\n" + b"\xff" * 10 + b"\x01", "more than 64 bits"),
        (MODEL, b"\n" + b"\x80" * 2**22, "more than 64 bits"),  # took minutes
        (MODEL, b"\n\x00" * 2**22, "not a tokenizer.model"),  # took gigabytes
        (JSON, b'{"model":\n oops}', "not valid JSON .*line 2"),
        (JSON, b"[]", "not a tokenizer.json"),
        (JSON, b'{"model": {"type": "WordPiece", "vocab": {}}}', "WordPiece"),
        (JSON, b'{"model": {"vocab": {"a": 0, "b": 0}, "merges": []}}', "used twice"),
        (JSON, b'{"model": {"vocab": {"a": "x"}, "merges": []}}', "whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_files_are_named(name, contents, problem, tmp_path):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(InputError, match=problem) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_tokenizer_names_the_expected_files(tmp_path):
    with pytest.raises(InputError, match="expected tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path)


# --- tokenizer.json: what is read, what is refused ---


def edited(tmp_path, name, edit):
    spec = json.loads((GOLDEN / name / JSON).read_text())
    edit(spec)
    (tmp_path / JSON).write_text(json.dumps(spec))
    return load_tokenizer(tmp_path)


def first_step(spec):
    return spec["pre_tokenizer"]["pretokenizers"][0]


def last_step(spec):
    return spec["pre_tokenizer"]["pretokenizers"][1]


@pytest.mark.parametrize(
    "name, edit, problem",
    [
        ("tiny_smollm2", lambda s: s.update(normalizer={"type": "NFC"}), "normalizer"),
        ("tiny_smollm2", lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        ("tiny_smollm2", lambda s: last_step(s).update(add_prefix_space=True), "ByteLevel"),
        ("tiny_smollm2", lambda s: last_step(s).update(use_regex=False), "ByteLevel"),
        ("tiny_smollm2", lambda s: first_step(s).update(individual_digits=False), "Digits"),
        ("tiny_smollm2", lambda s: s["added_tokens"][1].update(special=False), "im_start"),
        ("tiny_smollm2", lambda s: s["model"].update(dropout=0.1), "dropout"),
        ("tiny_smollm2", lambda s: s["model"]["merges"].append(["q", "q"]), "not made of"),
        ("tiny_smollm2", lambda s: s["model"]["vocab"].update({"語": 999}), "not a tokenizer.json"),
        ("tiny_llama3_json", lambda s: first_step(s).update(behavior="Removed"), "Split"),
        ("tiny_llama3_json", lambda s: first_step(s).update(pattern={"Regex": "(a|a)*$"}), "Split"),
        ("tiny_llama2_json", lambda s: s.update(normalizer=None), "normalizer"),
        ("tiny_llama2_json", lambda s: s["model"]["vocab"].pop("<0x0A>"), "256 byte pieces"),
        ("tiny_llama2_json", lambda s: s["model"].update(ignore_merges=True), "ignore_merges"),
        ("tiny_metaspace_json", lambda s: s["pre_tokenizer"].update(split=True), "Metaspace"),
    ],
)
def test_a_json_that_would_lead_to_other_ids_is_refused(name, edit, problem, tmp_path):
    with pytest.raises(InputError, match=problem):
        edited(tmp_path, name, edit)


def test_digits_are_cut_one_by_one(tmp_path):
    """Two tokens that only another cut can reach: "12" and " 1"."""

    def add(spec):
        spec["model"]["vocab"] |= {"12": 451, "Ġ1": 452}
        spec["model"]["merges"] += [["1", "2"], ["Ġ", "1"]]

    assert not {451, 452} & set(edited(tmp_path, "tiny_smollm2", add).encode("12 12"))


def test_a_special_token_in_the_vocabulary_is_not_text(tmp_path):
    def whole_piece(spec):
        spec["model"]["vocab"]["END"] = 452
        spec["added_tokens"].append({"content": "END", "id": 452, "special": True})

    def merged(spec):
        spec["model"]["vocab"] |= {"<s": 450, ">": 451, "s>": 452}
        spec["model"]["merges"] += [["<", "s"], ["<s", ">"]]

    assert 452 not in edited(tmp_path, "tiny_llama3_json", whole_piece).encode("END")
    assert edited(tmp_path, "tiny_llama2_json", merged).encode("<s>")[-2:] == [450, 451]


# What `tokenizers` 0.23.3 gives, with the special token taken as text (encode_special_tokens).
AS_TEXT = {
    "tiny_smollm2": {"hi!": [74, 75, 3], "then the there": [240, 80, 243, 314], "other": [261]},
    "tiny_llama3_json": {"hi!": [71, 72, 0], "then the there": [258, 77, 261, 333]},
    "tiny_llama2_json": {"a! b!!": [263, 388, 268, 388, 388], "the other": [264, 269, 274]},
    "tiny_metaspace_json": {"a! b!!": [263, 388, 268, 388, 388], "the other": [264, 269, 274]},
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


@pytest.mark.parametrize("name", ["tiny_smollm2", "tiny_llama2_json"])
def test_merges_may_be_written_as_strings(name, tmp_path):
    def join(spec):
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]

    check_golden(edited(tmp_path, name, join), name)


# --- which file, which stop tokens ---


def test_json_wins_and_stop_tokens_come_from_the_files(tmp_path):
    write_llama3_tokenizer(tmp_path, ["cat"])
    shutil.copy(GOLDEN / "tiny_smollm2" / JSON, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert "<|im_end|>" in tokenizer.special and "<|eot_id|>" not in tokenizer.special
    assert tokenizer.stop_tokens == [2, 0]  # <|im_end|> ends a turn, <|endoftext|> a text
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_tokenizer(tmp_path).stop_tokens == [2, 0, 7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 100000}')
    with pytest.raises(InputError, match="generation_config.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config, generation, stop",  # None: no such file
    [
        ({"eos_token_id": 9}, None, [9]),  # transformers stops here, too
        ({"eos_token_id": [9, 2]}, None, [9]),
        ({"eos_token_id": 9}, {"eos_token_id": 8}, [8]),  # and here at 8 alone
        ({"eos_token_id": 9}, {"eos_token_id": [8, 7]}, [8, 7]),
        ({"eos_token_id": 9}, {"eos_token_id": None}, []),
        ({"eos_token_id": 0}, None, []),  # <|endoftext|>, which is known by its name
        ({"eos_token_id": ""}, None, []),
        ({"eos_token_id": None}, {"eos_token_id": ""}, []),
        ({"eos_token_id": []}, None, []),
        ({}, {}, []),
        ([], "text", []),
    ],
)
def test_generation_stops_where_transformers_does(config, generation, stop, tmp_path):
    shutil.copy(GOLDEN / "tiny_smollm2" / JSON, tmp_path)
    for name, content in (("config", config), ("generation_config", generation)):
        if content is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).stop_tokens == [2, 0, *stop]


@pytest.mark.parametrize("eos", [-1, 451, 2.0, True, "2", [[2]], [2, None], {"a": 2}])
def test_an_eos_that_is_no_token_is_named(eos, tmp_path):
    shutil.copy(GOLDEN / "tiny_smollm2" / JSON, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(InputError, match="eos_token_id .* is no token"):
        load_tokenizer(tmp_path)


# --- tokens in a file of their own ---

ADDED = {"<|im_end|>": 450, "<|im_start|>": 451}


@pytest.mark.parametrize("name", ["tiny_sentencepiece", "tiny_llama2_json"])
def test_added_tokens_stand_in_a_file_of_their_own(name, tmp_path):
    """transformers 5.24 counts 452 tokens, and has these ids."""
    for path in (GOLDEN / name).glob("tokenizer.*"):
        shutil.copy(path, tmp_path)
    plain = load_tokenizer(tmp_path)
    # known already, or no token at all
    (tmp_path / "added_tokens.json").write_text(json.dumps(ADDED | {"</s>": 2, "the": 261, "": 0}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special == plain.special | ADDED and tokenizer.n_vocab == 452
    assert tokenizer.stop_tokens == [450, 2]
    assert tokenizer.decode([451, 264, 450]) == "<|im_start|>the<|im_end|>"
    assert tokenizer.encode("the<|im_end|>") == plain.encode("the<|im_end|>")
    prompt = encode_prompt(tokenizer, "chatml", "the")
    assert prompt[0] == 451 and [prompt.count(i) for i in ADDED.values()] == [1, 2]


@pytest.mark.parametrize(
    "added",
    [{"newword": 450}, {"<pad>": "450"}, {"<pad>": None}, {"<pad>": []}, {"<pad>": 450.5}],
)
def test_an_added_word_would_change_what_text_means(added, tmp_path):
    shutil.copy(GOLDEN / "tiny_sentencepiece" / MODEL, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(InputError, match="added_tokens.json: .* is no special token"):
        load_tokenizer(tmp_path)


# --- the files that go with a model ---


def test_the_files_are_kept_as_they_were_read(tmp_path):
    shutil.copytree(GOLDEN / "tiny_smollm2", tmp_path, dirs_exist_ok=True)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").symlink_to("vocab.json")
    (tmp_path / "special_tokens_map.json").symlink_to("gone")
    (tmp_path / "tokenizer.extra").write_text("another's")
    (tmp_path / "tokenizer").mkdir()
    files = load_tokenizer(tmp_path).files
    assert files.keys() == {JSON, "vocab.json", "merges.txt"}
    assert files["vocab.json"] == files["merges.txt"] == b"{}"
    assert files[JSON] == (GOLDEN / "tiny_smollm2" / JSON).read_bytes()


def test_a_link_to_a_file_elsewhere_is_refused(tmp_path):
    """It would be copied into the run folder, which may be published."""
    private = tmp_path / "home/key.json"
    private.parent.mkdir()
    private.write_text('{"key": "secret"}')
    folder = tmp_path / "models--a--b/snapshots/1f"
    shutil.copytree(GOLDEN / "tiny_smollm2", folder)
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
@pytest.mark.parametrize("name", [JSON, MODEL, "chat_template.jinja", "special_tokens_map.json"])
def test_a_pipe_among_the_files_is_not_waited_for(name, tmp_path):
    if name != JSON:
        shutil.copy(GOLDEN / "tiny_smollm2" / JSON, tmp_path)
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} cannot be read .not an ordinary file"):
        load_tokenizer(tmp_path)


# --- comparisons with the peers ---


@pytest.fixture
def peers(monkeypatch):
    """The functions of make_golden.py, which need both peers."""
    pytest.importorskip("sentencepiece")
    pytest.importorskip("tokenizers")
    monkeypatch.syspath_prepend(GOLDEN)
    import make_golden

    return make_golden


def check_peer(folder, theirs, texts):
    """theirs: text -> ids, or None where the peer drops a byte, which is an error here."""
    ours = load_tokenizer(folder).encode
    for text in texts:
        expected = theirs(text)
        if expected is None:
            with pytest.raises(InputError, match="lacks the byte"):
                ours(text)
        else:
            assert ours(text) == expected, repr(text[:200])


@pytest.mark.parametrize("form", ["model", "json", "metaspace"])
def test_llama2_equals_its_peers(form, real, peers, tmp_path):
    folder = real / "tokenizers" / "llama2"
    peer = peers.sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    if form != "model":
        peer, folder = peers.llama2_from_pieces(peer, metaspace=form == "metaspace"), tmp_path
        peer.save(str(tmp_path / JSON))
    check_peer(folder, peers.encoder(peer), peers.many_texts(real))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["model", "json"])
def test_llama3_equals_its_peers(form, real, peers, tmp_path):
    folder = real / "tokenizers" / "llama3"
    peer = peers.llama3_from_ranks(folder / MODEL)
    if form == "json":
        folder = tmp_path
        peer.save(str(tmp_path / JSON))
    check_peer(folder, peers.encoder(peer), peers.many_texts(real))


def test_a_smollm2_like_json_equals_its_peer(real, peers, tmp_path):
    """SmolLM2's own file is not among the real ones: 8,000 tokens of these texts, less 21 bytes."""
    texts = peers.many_texts(real)
    letters = [peers.LETTER[b] for b in range(256) if b not in peers.MISSING_BYTES]
    peer = peers.byte_level(peers.DIGITS)
    short = [text for text in texts if len(text) < 10_000]
    peers.train(peer, 8000, letters, peers.SMOLLM2_SPECIAL, short)
    peer.save(str(tmp_path / JSON))
    check_peer(tmp_path, peers.encoder(peer), texts)

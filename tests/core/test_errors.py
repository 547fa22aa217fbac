"""Bad input is one line and exit code 2, whatever is wrong; broken weights are no defence."""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import (
    LLAMA3_SCALING,
    advbench_file,
    alpaca_file,
    public_folder,
    small_config,
    small_model,
    town_tokenizer,
)

import train
from data.chat import read_chat
from data.tokenizer import load_tokenizer
from model import Llama, LlamaConfig
from nanosdd.checkpoint import read_json, why_unreadable
from nanosdd.errors import InputError, escaped, in_words
from nanosdd.progress import Progress

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests/golden"


def python(code, *words, cwd):
    command = [sys.executable, "-c", code, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


FAULTS = """
import os, sys
from nanosdd.errors import run_script
def deep(): deep()
class OutOfMemoryError(RuntimeError): pass
def raise_(error):
    error.add_note("7 rows at once")
    raise error
run_script(lambda: eval(sys.argv[1]))
"""


@pytest.mark.parametrize(
    "fault, code, said",
    [
        ("open('gone/x')", 2, "error: gone/x: No such file or directory"),
        ("b'\\xff'.decode()", 2, "UnicodeDecodeError"),
        ("deep()", 2, "RecursionError"),
        ("int(float('inf'))", 2, "OverflowError"),
        ("raise_(RuntimeError('cannot allocate'))", 2, "error: RuntimeError: cannot"),
        ("raise_(MemoryError())", 2, "error: MemoryError"),
        ("raise_(OutOfMemoryError('Tried'))", 2, "OutOfMemoryError: Tried"),
        ("{}['x']", 1, "KeyError"),  # a bug keeps its traceback
        ("raise_(RuntimeError('a bug'))", 1, "RuntimeError: a bug"),
        pytest.param("os.kill(os.getpid(), 2)", 130, "interrupted", marks=pytest.mark.posix),
    ],
)
def test_one_place_turns_errors_into_a_line(tmp_path, fault, code, said):
    result = python(FAULTS, fault, cwd=tmp_path)
    assert result.returncode == code and said in result.stderr
    assert (result.stderr.count("\n") == 1) == (code != 1)
    assert ("7 rows at once" in result.stderr) == ("raise_" in fault)


def test_debug_adds_the_traceback(tmp_path):
    assert "Traceback" in python(FAULTS, "open('gone/x')", "--debug", cwd=tmp_path).stderr


def test_pytorch_says_that_memory_ran_out_in_the_words_that_are_looked_for():
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    with pytest.raises(RuntimeError, match="alloc"):
        torch.empty(10**15)


WORK = """
import sys
from pathlib import Path
from nanosdd.errors import run_script
from nanosdd.progress import Progress
def main():
    for i in Progress(range(2000), desc="Gr\\u00fc\\u00dfe", seconds=0):
        print("Gr\\u00fc\\u00dfe, \\u4f60\\u597d", i, flush=i % 2 == 0)
    print("no newline", end="")
    Path("done").write_text("x")
run_script(main)
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
C_LOCALE = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.mark.posix
@pytest.mark.parametrize(
    "shell",
    [
        "{} | head -1",
        "PYTHONUNBUFFERED=1 {} | head -1",
        "{} 2>&1 | head -1",
        pytest.param("{} > /dev/full 2>&1", marks=FULL),
    ],
)
def test_a_command_outlives_those_who_read_it(tmp_path, shell):
    (tmp_path / "work.py").write_text(WORK)
    command = "set -o pipefail; " + shell.format(f"'{sys.executable}' work.py")
    environment = ENVIRONMENT | C_LOCALE | {"PYTHONUNBUFFERED": ""}
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0 and (tmp_path / "done").exists()
    assert "Traceback" not in result.stderr and "Broken" not in result.stderr
    assert result.stdout.count("\n") == ("head" in shell)


@pytest.mark.parametrize(
    "encoding, printed",
    [("latin-1", "Gr\xfc\xdfe, \\u4f60\\u597d 7"), ("utf-8", "Gr\xfc\xdfe, \u4f60\u597d 7")],
)
def test_what_a_terminal_cannot_show_is_escaped(tmp_path, encoding, printed):
    (tmp_path / "work.py").write_text(WORK)
    environment = ENVIRONMENT | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "work.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)
    assert result.stdout.decode(encoding).splitlines()[7] == printed
    assert result.returncode == 0 and b"1 of 2000" in result.stderr


WORKS = """
import os
from nanosdd.errors import InputError, run_script
from nanosdd.progress import Progress
def main():
    list(Progress(range(3), desc="work", seconds=0))
    with open("out.txt", "w") as file:  # what is said meanwhile does not get into it
        os.write(2, b"as PyTorch's own libraries warn\\n")
        file.write("mine")
    raise InputError("x is wrong; y")
run_script(main)
"""


@pytest.mark.posix
@pytest.mark.parametrize("closed", ["2>&-", ">&-"])
def test_with_a_closed_stream_work_is_done_and_errors_are_said(tmp_path, closed):
    words = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, WORKS]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 2
    said = result.stdout if closed == "2>&-" else result.stderr
    assert "work: 3 of 3" in said and said.splitlines()[-1] == "error: x is wrong; y"
    assert (tmp_path / "out.txt").read_text() == "mine"


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(capsys):
    assert list(Progress(range(2), desc="answers", seconds=0)) == [0, 1]
    assert capsys.readouterr().err == "  answers: 1 of 2\n  answers: 2 of 2\n"
    with Progress(total=40, desc="texts", seconds=0) as bar:
        bar.update(7)
    assert capsys.readouterr().err == "  texts: 7 of 40\n"


def test_control_characters_are_shown(tmp_path):
    say = "print('a\\x1b[2Jb\\rc', 'd')"
    assert python(FAULTS, say, cwd=tmp_path).stdout == "a\\x1b[2Jb\\rc d\n"
    assert escaped("a\x1b[2Jb\r\n\tc é 東") == "a\\x1b[2Jb\\r\n\tc é 東"


# ---- what is read from strangers ----

CONFIG = small_config(tie_word_embeddings=True).to_dict()


def mutated(value, rng):
    """A JSON value with one part replaced by something else."""
    odd = [None, True, 0, -1, 3, 2**40, 1.5, float("nan"), "", "x", [], [1], {}, {"a": 1}]
    changed = json.loads(json.dumps(value))
    key = rng.choice([*changed, "rope_scaling", "rope_parameters", "quantization_config"])
    if isinstance(changed.get(key), dict) and rng.random() < 0.7:
        changed[key][rng.choice(list(changed[key]))] = rng.choice(odd)
    else:
        changed[key] = rng.choice(odd)
    return changed


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.full)])
def test_a_mutated_config_is_read_or_refused_in_one_line(count):
    rng = random.Random(5)
    refused = 0
    for _ in range(count):
        config = mutated(rng.choice([CONFIG, CONFIG | {"rope_scaling": LLAMA3_SCALING}]), rng)
        try:
            with torch.device("meta"):
                Llama(LlamaConfig.from_dict(config))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert count / 4 < refused < count


@pytest.mark.posix
def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (
        ("pipe", "not an ordinary file"),
        ("loop", "symbolic links"),
        (".", "Is a directory"),
        ("a\0b", "null"),
        ("gone", "No such file"),
    ):
        assert reason in why_unreadable(tmp_path / name)
        with pytest.raises(InputError, match="cannot be read"):
            read_json(tmp_path / name)


LOADERS = {  # file to damage: the function that reads its folder
    "tokenizer/tiny_llama2_json/tokenizer.json": load_tokenizer,
    "tokenizer/tiny_smollm2/tokenizer.json": load_tokenizer,
    "tokenizer/tiny_sentencepiece/tokenizer.model": load_tokenizer,
    "tokenizer.model": load_tokenizer,
    "model.safetensors": Llama.from_pretrained,
    "config.json": Llama.from_pretrained,
    "chat/llama31.jinja": read_chat,
}


def damaged(data: bytes, rng) -> bytes:
    """Some bytes changed, taken out, doubled or cut off."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        length = rng.choice([1, 1, 4, 30])
        twice = data[at : at + length] * 2
        odd = [b"", rng.randbytes(length), twice, b"-1", b"[", b"null", b"\x00"]
        data[at : at + length] = rng.choice(odd)
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


@pytest.mark.parametrize("count", [15, pytest.param(2000, marks=pytest.mark.full)])
@pytest.mark.parametrize("source", LOADERS)
def test_damaged_files_are_read_or_refused(source, count, tmp_path):
    town_tokenizer(tmp_path)
    small = {"hidden_size": 8, "intermediate_size": 12, "head_dim": 4, "vocab_size": 30}
    small_model(tie_word_embeddings=True, **small).save_pretrained(tmp_path)
    folder = GOLDEN if "/" in source else tmp_path
    whole = (folder / source).read_bytes()
    name = Path(source).name.replace("llama31.jinja", "chat_template.jinja")
    rng = random.Random(f"{source} {count}")
    refused = 0
    for _ in range(count):
        (tmp_path / name).write_bytes(damaged(whole, rng))
        try:
            found = LOADERS[source](tmp_path)
            if hasattr(found, "encode") and not isinstance(found, str):
                found.encode("the 12 bakers")
        except InputError:  # anything else fails the test
            refused += 1
    assert refused > 0


@pytest.mark.posix
def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    """As far as a process can tell: no file may become larger than 100 kB."""
    import resource  # not on Windows

    monkeypatch.chdir(tmp_path)
    public_folder(Path("llama"))
    alpaca_file(Path("b.json"))
    words = "--mode benign --model llama --benign b.json --similarity tfidf --out x --steps 1"
    process = os.fork()
    if process == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            train.main([*words.split(), "--batch-size", "2", "--device", "cpu"])
        except (InputError, OSError) as error:
            Path("said").write_text(in_words(error))
        os._exit(0)
    os.waitpid(process, 0)
    said = Path("said").read_text()
    assert "File too large" in said and "\n" not in said and not Path("x/run.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = small_model()
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = value
    with pytest.raises(InputError, match="logits are not finite"):
        model.generate([[1, 2, 3]], 4)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight holds NaN or infinite"):
        Llama.from_pretrained(tmp_path)


# ---- many bad invocations ----

FILES = "--harmful h.csv --benign b.json --similarity tfidf"
STANDS_FOR = {
    "T": f"train --mode sdd --model llama {FILES} --out out/x --steps 1",
    "E": f"eval llama {FILES}",
    "K": "train --mode sdd --model llama --similarity tfidf --out out/x --steps 1",
    "A": f"attack --released llama {FILES} --shots 4",
    "P": f"data.pairs {FILES} --out p.jsonl",
}
BAD = (Path(__file__).parent / "bad_invocations.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    for name in ("llama", "trained"):
        public_folder(place / name)
    for name in ("broken", "list", "notes"):
        (place / name).mkdir()
    advbench_file(place / "h.csv")
    advbench_file(place / "few.csv", rows=3)
    alpaca_file(place / "b.json")
    texts = {
        "trained/chat.txt": "llama3",
        "broken/config.json": "{",
        "list/config.json": "[]",
        "notes/a.txt": "x",
        "notes/results.json": "[]",
        "empty": "",
    }
    for name, text in texts.items():
        (place / name).write_text(text)
    (place / "prompts.csv").write_text("".join(f'"Tickle it, {i}"\n' for i in range(60)))
    (place / "cut.json").write_text((place / "b.json").read_text()[:-9])
    for name, target in dict(link="notes", dangling="nowhere", loop="loop").items():
        (place / name).symlink_to(target)
    os.mkfifo(place / "pipe")
    return place


@pytest.mark.posix
@pytest.mark.parametrize("line", [line for line in BAD if line[0] != "#"])
def test_a_bad_invocation_says_what_is_wrong_and_writes_nothing(place, line, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    command, message = line.split(" -> ")
    first, *more = command.split()
    script, *words = [*STANDS_FOR.get(first, first).split(), *more]
    with pytest.raises((InputError, SystemExit)) as error:
        importlib.import_module(script).main(words)
    said = str(error.value)
    if error.type is SystemExit:  # of argparse
        said = capsys.readouterr().err.splitlines()[-1]
    assert message in said and "\n" not in said
    assert sorted(place.rglob("*")) == before

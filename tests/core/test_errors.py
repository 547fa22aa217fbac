"""Bad input is one line and exit code 2, whatever is wrong; broken weights are no defence."""

import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import (
    advbench_file,
    alpaca_file,
    public_folder,
    small_config,
    small_model,
    town_tokenizer,
)

from data.chat import read_chat
from data.sources import read_questions, read_rows, read_xstest
from data.tokenizer import load_tokenizer
from model import Llama, LlamaConfig
from nanosdd.chat_model import load_chat
from nanosdd.checkpoint import read_json, why_unreadable
from nanosdd.device import has_bf16, pays_in_bf16, resolve_compute
from nanosdd.errors import InputError, escaped
from nanosdd.progress import Progress, check_progress
from nanosdd.runs import Finished
from train import Settings

ROOT = Path(__file__).parent.parent.parent
DOOR = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
from nanosdd.errors import run_script
def deep(): deep()
FAULTS = {"open": lambda: open("gone/x"), "folder": lambda: open("."), "nul": lambda: b"\\xff".decode(), "deep": deep,
          "big": lambda: int(float("inf")), "bug": lambda: {}["x"], "ctrl": lambda: os.kill(os.getpid(), 2)}
run_script(FAULTS[sys.argv[1]])
"""


@pytest.mark.parametrize(
    "fault, code, said",
    [
        ("open", 2, "error: gone/x: No such file or directory"),
        ("folder", 2, "error: .: Is a directory"),
        ("nul", 2, "UnicodeDecodeError"),
        ("deep", 2, "RecursionError"),
        ("big", 2, "OverflowError"),
        ("bug", 1, "KeyError"),
        ("ctrl", 130, "interrupted"),
    ],
)
def test_one_place_turns_errors_into_a_line(tmp_path, fault, code, said):
    def run(*words):
        return subprocess.run(
            [sys.executable, "-c", DOOR, ROOT, fault, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    result = run()
    assert result.returncode == code and said in result.stderr
    if code != 1:  # a bug keeps its traceback
        assert result.stderr.count("\n") == 1
    if code == 2:
        assert "Traceback" in run("--debug").stderr


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(capsys):
    assert list(Progress(range(3), desc="answers", seconds=0)) == [0, 1, 2]
    assert capsys.readouterr().err.splitlines() == [
        "  answers: 1 of 3",
        "  answers: 2 of 3",
        "  answers: 3 of 3",
    ]
    with Progress(total=40, desc="texts", seconds=0) as bar:
        bar.update(7)
    assert capsys.readouterr().err == "  texts: 7 of 40\n"
    assert (
        list(Progress(range(3), desc="answers")) == [0, 1, 2] and capsys.readouterr().err == ""
    )  # half a minute


def test_control_characters_are_shown():
    assert escaped("a\x1b[2Jb\r\n\tc é 東") == "a\\x1b[2Jb\\r\n\tc é 東"


# ---- config.json ----

CONFIG = small_config(tie_word_embeddings=True).to_dict()


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_size", "48"),
        ("hidden_size", 48.0),
        ("hidden_size", 0),
        ("hidden_size", True),
        ("hidden_size", [48]),
        ("vocab_size", -1),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("head_dim", 10**6),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", "1e-5"),
        ("rope_theta", -1.0),
        ("rope_theta", 0),
        ("rope_theta", float("inf")),
        ("rope_theta", {}),
        ("rope_scaling", "linear"),
        ("rope_scaling", {"type": "linear", "factor": 0}),
        ("rope_scaling", {"type": "linear", "factor": "2"}),
        ("rope_scaling", {"type": ["linear"], "factor": 2}),
        ("rope_parameters", 3),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", -1),
        ("eos_token_id", ["</s>"]),
        ("bos_token_id", 1.5),
        ("initializer_range", float("nan")),
    ],
)
def test_what_no_llama_can_have_is_refused(key, value):
    with pytest.raises(InputError, match="config.json") as error:
        LlamaConfig.from_dict(CONFIG | {key: value})
    assert key.split("_")[0] in str(error.value) or "rope" in str(error.value)


def mutated(value, rng):
    """A JSON value with one part replaced by something else."""
    odd = [
        None,
        True,
        0,
        -1,
        3,
        2**40,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        [],
        [1],
        {},
        {"a": 1},
        "9" * 50,
    ]
    changed = json.loads(json.dumps(value))
    key = rng.choice([*changed, "rope_scaling", "rope_parameters", "quantization_config"])
    if isinstance(changed.get(key), dict) and changed[key] and rng.random() < 0.7:
        changed[key][rng.choice(list(changed[key]))] = rng.choice(odd)
    elif rng.random() < 0.2:
        changed.pop(key, None)
    else:
        changed[key] = rng.choice(odd)
    return changed


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.full)])
def test_a_mutated_config_is_read_or_refused_in_one_line(count):
    rng = random.Random(5)
    scaled = CONFIG | {
        "rope_scaling": dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        )
    }
    refused = 0
    for _ in range(count):
        config = mutated(rng.choice([CONFIG, scaled]), rng)
        try:
            with torch.device("meta"):
                Llama(LlamaConfig.from_dict(config))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert count / 4 < refused < count


# ---- files ----


def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "digits.json").write_text("1" * 5000)
    for name, reason in [
        ("pipe", "not an ordinary file"),
        ("loop", "symbolic links"),
        (".", "Is a directory"),
        ("a\0b", "null"),
        ("gone", "No such file"),
    ]:
        assert reason in why_unreadable(tmp_path / name)
        with pytest.raises(InputError, match="cannot be read"):
            read_json(tmp_path / name)
    for name in ("deep.json", "digits.json"):
        with pytest.raises(InputError, match="not valid JSON"):
            read_json(tmp_path / name)
    assert "more than 9" in why_unreadable(tmp_path / "digits.json", limit=9)
    assert why_unreadable(tmp_path / "digits.json") is None


def test_a_damaged_line_is_run_again_and_a_foreign_file_is_kept(tmp_path, capsys):
    file, record = tmp_path / "sdd.jsonl", {"settings": {"seed": 3}}
    for key in "abc":
        Finished(file, record).add(key, [key])
    lines = file.read_text().split("\n")
    file.write_text("\n".join([lines[0], lines[1], '{"key": "b", "res', lines[3], ""]))
    assert Finished(file, record).results == {"a": ["a"], "c": ["c"]}
    file.write_text("my notes\n")
    assert Finished(file, record).results == {}
    assert (
        tmp_path / "sdd.jsonl.kept-1"
    ).read_text() == "my notes\n" and "not written by" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """As far as a process can tell: no file may become larger than 100 kB."""
    public_folder(tmp_path / "llama")
    alpaca_file(tmp_path / "b.json")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        f"sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'train.py'; "
        "from nanosdd.errors import run_script; import train; run_script(train.main)"
    )
    words = "--mode benign --model llama --benign b.json --out x --steps 1 --batch-size 2 --device cpu".split()
    for more in ([], ["--save-every", "1"]):
        result = subprocess.run(
            [sys.executable, "-c", code, *words, *more],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2 and "cannot be written" in result.stderr.splitlines()[-1], (
            result.stderr
        )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "llama"]


def test_code_in_a_model_folder_is_never_run(tmp_path, cpu, capsys):
    public_folder(tmp_path / "llama")
    for name in ("pytorch_model.bin", "modeling_llama.py", "training_args.pt"):
        (tmp_path / "llama" / name).write_text("raise SystemExit('it ran')")
    load_chat(tmp_path / "llama", cpu)
    assert (
        "modeling_llama.py, pytorch_model.bin, training_args.pt could run code"
        in capsys.readouterr().out
    )
    runs_code = re.compile(
        r"pickle\.|torch\.load\(|trust_remote|\bexec\(|(?<![.\w])eval\(|__import__|yaml\.load\("
    )
    for file in (
        *ROOT.glob("*.py"),
        *(
            file
            for part in ("data", "nanosdd", "lab", "bench")
            for file in (ROOT / part).glob("*.py")
        ),
    ):
        assert not runs_code.search(file.read_text()), file


GOLDEN, SOURCES = ROOT / "tests/golden", ROOT / "tests/fixtures/sources"
LOADERS = {  # what is read from strangers: (files to damage one of, the function that reads their folder)
    "rows": ([file for file in sorted(SOURCES.iterdir()) if "_bad" not in file.name], None),
    "tokenizer.json": (
        [
            GOLDEN / f"tokenizer/{name}/tokenizer.json"
            for name in ("tiny_llama2_json", "tiny_llama3_json", "tiny_smollm2")
        ],
        load_tokenizer,
    ),
    "tokenizer.model": (
        [GOLDEN / "tokenizer/tiny_sentencepiece/tokenizer.model", "tokenizer.model"],
        load_tokenizer,
    ),
    "weights": (["model.safetensors"], Llama.from_pretrained),
    "config": (["config.json"], Llama.from_pretrained),
    "template": ([GOLDEN / "chat/smollm2.jinja", GOLDEN / "chat/llama31.jinja"], read_chat),
}


def damaged(data: bytes, rng) -> bytes:
    """Some bytes changed, taken out, doubled or cut off."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1) if data else 0
        length = rng.choice([1, 1, 4, 30])
        data[at : at + length] = rng.choice(
            [
                b"",
                rng.randbytes(length),
                data[at : at + length] * 2,
                rng.choice([b"0", b"-1", b"[", b"}", b"null", b'"', b"1e999", b"\x00"]),
            ]
        )
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.full)])
@pytest.mark.parametrize("loader", LOADERS)
def test_damaged_files_are_read_or_refused_in_one_line(loader, count, tmp_path, capsys):
    files, read = LOADERS[loader]
    rng, refused = random.Random(f"{loader} {count}"), 0
    town_tokenizer(tmp_path)
    small_model(
        tie_word_embeddings=True,
        hidden_size=8,
        intermediate_size=12,
        num_attention_heads=2,
        head_dim=4,
        num_key_value_heads=1,
        vocab_size=30,
    ).save_pretrained(tmp_path)
    for _ in range(count):
        source = rng.choice(files)
        whole = (tmp_path / source).read_bytes()  # an absolute source stays one
        name = "chat_template.jinja" if loader == "template" else Path(source).name
        (tmp_path / name).write_bytes(damaged(whole, rng))
        try:
            if loader == "rows":
                reader = {"mm": read_questions, "op": read_questions, "xs": read_xstest}.get(
                    name[:2], read_rows
                )
                reader(tmp_path / name)
            elif loader.startswith("tokenizer"):
                read(tmp_path).encode("the 12 bakers")
            else:
                read(tmp_path)
        except InputError:  # anything else fails the test
            refused += 1
        (tmp_path / name).write_bytes(whole)
    assert refused > 0


# ---- failures that look like science ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = small_model()
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = value
    with pytest.raises(InputError, match="logits are not finite, from layer 1 on"):
        model.generate([[1, 2, 3]], 4)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight holds NaN or infinite"):
        Llama.from_pretrained(tmp_path)


def test_logits_that_overflow_are_refused():
    model = small_model()
    model.lm_head.weight.data *= 1e38
    with pytest.raises(InputError, match="from the head on"):
        model.generate([[1, 2, 3]], 4)


def test_a_run_that_gets_worse_is_stopped(capsys):
    def entry(step, loss, norm=1.0):
        return {"step": step, "loss": loss, "grad_norm": norm}

    check_progress([entry(10, 2.0), entry(60, 2.4)], 100)
    check_progress([entry(10, 2.0), entry(40, 2.9)], 100)  # early
    assert capsys.readouterr().out == ""
    check_progress([entry(10, 2.0), entry(40, 2.0)], 40)
    assert "the loss hardly fell" in capsys.readouterr().out
    with pytest.raises(InputError, match="the loss rose from 2.00 to 2.60"):
        check_progress([entry(10, 2.0), entry(60, 2.6)], 100)
    with pytest.raises(InputError, match="the gradient is 0 at step 10"):
        check_progress([entry(10, 6.6, 0.0)], 100)


def test_settings_and_devices_name_the_fault():
    for replay, batch in ((0.999, 32), (0.01, 8)):
        with pytest.raises(InputError, match=f"--benign-replay {replay:g} is .* of {batch} rows"):
            Settings(benign_replay=replay, batch_size=batch)
    with pytest.raises(InputError, match="--device cpu:7: a CPU has no number"):
        resolve_compute("cpu:7", "auto", None)
    with pytest.raises(InputError, match="--save-every -1"):
        resolve_compute("cpu", "auto", None, save_every=-1)
    with pytest.raises(InputError, match="--device cuda:99 is not there: PyTorch sees cpu"):
        resolve_compute("cuda:99", "auto", None)
    if not torch.backends.mps.is_available():
        with pytest.raises(InputError, match="--device mps is not there: PyTorch sees cpu"):
            resolve_compute("mps", "auto", None)


def test_bf16_is_chosen_on_a_cpu_that_has_it_for_wide_models():
    wide, flags = {"hidden_size": 576}, "model name : EPYC\nflags : fpu avx512f avx512_bf16 sse\n"
    assert pays_in_bf16(flags, wide) and pays_in_bf16("Features : fp asimd bf16 i8mm", wide)
    assert not pays_in_bf16("flags : fpu avx512f avx2 sse", wide) and not pays_in_bf16("", wide)
    assert not pays_in_bf16(flags, {"hidden_size": 128}) and not pays_in_bf16(
        flags, {"hidden_size": "wide"}
    )


def test_bf16_needs_compute_capability_8():
    found = [
        has_bf16(*device)
        for device in (
            ("cpu", None),
            ("mps", None),
            ("cuda", (7, 5)),
            ("cuda", (8, 0)),
            ("cuda", (9, 0)),
            ("cuda", (10, 3)),
        )
    ]
    assert found == [True, False, False, True, True, True]


# ---- many bad invocations ----

FILES = "--harmful h.csv --benign b.json --similarity tfidf"
STANDS_FOR = {
    "T": f"train --mode sdd --model llama {FILES} --out out/x --steps 1",
    "E": f"eval llama {FILES}",
    "K": "train --mode sdd --model llama --similarity tfidf --out out/x --steps 1",
    "A": f"attack --released llama {FILES} --shots 4",
    "P": f"data.pairs {FILES} --out p.jsonl",
}
BAD = [
    line.split(" -> ")
    for line in (Path(__file__).parent / "bad_invocations.txt").read_text().splitlines()
    if not line.startswith("#")
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public_folder(tmp_path / "llama")
    public_folder(tmp_path / "trained")
    advbench_file(tmp_path / "h.csv")
    advbench_file(tmp_path / "few.csv", rows=3)
    alpaca_file(tmp_path / "b.json")
    for name, text in (
        ("trained/chat.txt", "llama3"),
        ("broken/config.json", "{"),
        ("notes/a.txt", "x"),
        ("empty", ""),
        ("cut.json", (tmp_path / "b.json").read_text()[:-9]),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "link").symlink_to("notes")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_bad_invocations_say_what_is_wrong(place, capsys):
    before, wrong = sorted(place.rglob("*")), []
    for command, message in BAD:
        letter, *more = command.split()
        script, *words = [
            *STANDS_FOR.get(letter, letter).split(),
            *("" if word == "''" else word for word in more),
        ]
        try:
            importlib.import_module(script).main(words)
            said = "nothing"
        except InputError as error:
            said = str(error)
        except SystemExit:  # of argparse
            said = capsys.readouterr().err.splitlines()[-1]
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        if message not in said or "\n" in said or sorted(place.rglob("*")) != before:
            wrong.append(f"{command}\n    wanted: {message}\n    said:   {said}")
            before = sorted(place.rglob("*"))
    assert not wrong, "\n".join(wrong)
    assert len(BAD) >= 120

"""The commands as a user meets them: help, exit codes, templates, a world of one's own, and real
public files where they are at hand."""

import importlib
import itertools
import json
import lzma
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from make_llama import make
from small import advbench_file, alpaca_file, openbookqa_file, public_folder

import attack
import eval as evaluate
import train
from data import pairs
from data.chat import read_chat
from data.sources import read_records, read_rows
from nanosdd.errors import InputError

ROOT = Path(__file__).parent.parent.parent
COMMANDS = "train attack eval data.pairs data.smollm2 lab.study lab.report bench.speed"


@pytest.mark.parametrize("name", COMMANDS.split())
def test_every_command_says_how_it_is_used(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(name).main(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: ") and "%" not in printed


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public_folder(tmp_path / "llama")
    advbench_file(tmp_path / "h.csv")
    alpaca_file(tmp_path / "b.json")
    return tmp_path


FILES = "--harmful h.csv --benign b.json --similarity tfidf"
TRAIN = f"--model llama {FILES} --steps 1 --batch-size 2"


def test_a_dry_run_shows_the_loss_mask_and_writes_nothing(files, capsys):
    train.main(f"--mode sdd {TRAIN} --steps 2 --lr 2e-5 --dry-run".split())
    printed = capsys.readouterr().out
    assert printed.count("no loss on: '<|begin_of_text|>") == 3
    assert "It is" in printed.split(" loss on:")[-1]
    assert "2 steps of 2 rows" in printed and "lr 2e-05" in printed and not Path("out").exists()


def test_the_commands_use_the_template_of_the_checkpoint(files, capsys):
    assert read_chat("llama") == "llama3"  # what the folder itself calls for
    train.main(f"--mode sdd {TRAIN} --out x --template plain".split())
    short = "--max-new-tokens 2"
    for module, words in (
        (evaluate, f"x {FILES} {short}"),
        (evaluate, f"x --prompt hi {short}"),
        (attack, f"--released x {FILES} {short} --shots 4 --steps 2 --epochs 0"),
        (train, f"--mode benign {TRAIN} --model x --out y"),
    ):
        with pytest.raises(InputError, match="trained with plain; leave out --template llama3"):
            module.main([*words.split(), "--template", "llama3"])
        module.main(words.split())
    assert read_chat("y") == "plain" and "template plain" in capsys.readouterr().out


def long_conversations():
    """Make the benign file one of ShareGPT, with three prompts that are too long for the model."""
    found = []
    for row in json.loads(Path("b.json").read_text()):
        prompt = {"from": "human", "value": row["instruction"]}
        found.append({"conversations": [prompt, {"from": "gpt", "value": "ü"}]})
    prompt = {"from": "human", "value": "Grüße 🙂 " * 99}
    found[1:1] = [{"conversations": [prompt, {"from": "gpt", "value": "x"}]}] * 3
    Path("b.json").write_text(json.dumps(found))


def test_a_prompt_that_is_too_long_is_left_out_of_training(files, capsys):
    long_conversations()
    train.main(f"--mode benign {TRAIN} --steps 2 --out x".split())
    printed = capsys.readouterr().out
    assert "left out 3 of 27 rows, the first: a prompt of " in printed
    assert "'Grüße" in printed
    assert "2 steps of 2 rows from 24 pairs" in printed
    with pytest.raises(InputError, match="raise --max-length"):
        train.main(f"--mode benign {TRAIN} --max-length 9 --out y".split())


def test_an_evaluation_prompt_that_is_too_long_is_named_with_its_file(files):
    text = Path("h.csv").read_text().replace("Tell me", "Tell me " + "again " * 120)
    Path("h.csv").write_text(text)
    with pytest.raises(InputError, match=r"h.csv: 'Tell me again .* has \d+ tokens, which"):
        evaluate.main(f"llama {FILES}".split())
    Path("x.csv").write_text("prompt,type,focus\n" + "Kill time? " * 99 + ",homonyms,kill\n")
    with pytest.raises(InputError, match=r"x.csv: 'Kill time\? .* has \d+ tokens"):
        evaluate.main(["llama", "--xstest", "x.csv"])


def test_prompts_without_answers_are_defended_against_and_scored(files, capsys):
    lines = [f'"Tell me, please, how to tickle the dragon number {i}"\n' for i in range(48)]
    Path("h.csv").write_text("".join(lines))
    train.main(f"--mode sdd {TRAIN} --out x".split())
    evaluate.main(f"x {FILES} --max-new-tokens 3 --save-answers a.jsonl".split())
    scores = json.loads(Path("x/metrics.json").read_text())
    shares = [scores[name] for name in ("complies", "refuse", "off_topic", "broken")]
    assert sum(shares) == pytest.approx(1) and scores["benign_nll"] > 0
    assert "target_match" not in scores and "harmful_nll" not in scores  # there are no targets
    saved = list(read_records("a.jsonl"))
    assert saved and {f'"{row["prompt"]}"\n' for row in saved} < set(lines)
    assert "misread SDD" in capsys.readouterr().out
    # as another program may have written them
    Path("in.xz").write_bytes(lzma.compress(json.dumps(saved, indent=1).encode()))
    evaluate.main(f"x {FILES} --answers in.xz --save-answers out.jsonl".split())
    judged = list(read_records("out.jsonl"))
    evaluate.main(f"x {FILES} --answers in.xz".split())
    assert capsys.readouterr().out.count(f" of {len(judged)}\n") > 1  # once for each outcome, twice
    assert [row | {"response": one["response"]} for row, one in zip(saved, judged)] == saved
    assert all(-1 <= one["cosine"] <= 1 for one in judged)
    counted = [one["outcome"] for one in judged].count("complies") / len(judged)
    assert counted == pytest.approx(scores["complies"])


def test_checkpoints_named_by_a_dot_or_alike_keep_rows_of_their_own(files, monkeypatch, capsys):
    for name in ("one/sdd", "two/sdd"):
        shutil.copytree("llama", name)
    exam = ["--openbookqa", str(openbookqa_file(files / "o.jsonl"))]
    evaluate.main(["one/sdd", "two/sdd", *exam])
    named = {line.split()[0] for line in capsys.readouterr().out.splitlines() if "QA" in line}
    assert named == {"one/sdd", "two/sdd"}
    monkeypatch.chdir("one/sdd")
    evaluate.main([".", *exam])
    assert "\n. " in capsys.readouterr().out
    words = f"{FILES} --max-new-tokens 2 --shots 4 --steps 1 --epochs 0 --out ../../attack"
    words = words.replace("h.csv", "../../h.csv").replace("b.json", "../../b.json")
    attack.main(["--released", ".", *words.split()])
    assert "\nsdd  none " in capsys.readouterr().out
    with pytest.raises(InputError, match="two --released folders have one name"):
        attack.main(["--released", ".", "../../two/sdd", *words.split()])


def test_a_model_of_the_town_goes_through_the_commands(tiny_arms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = f"--mode sdd_reject --model {tiny_arms / 'aligned'} --out mine"
    train.main(f"{words} --steps 2 --batch-size 5 --betas 0.8 0.9".split())
    settings = json.loads(Path("mine/run.json").read_text())["settings"]
    assert settings["betas"] == [0.8, 0.9] and settings["lr"] == train.TOWN.lr
    attack.main("--released mine --shots 8 --lr 1e-3 --steps 2 --epochs 0".split())
    evaluate.main(["mine"])
    cells = json.loads(Path("out/attack/results.json").read_text())["cells"]
    assert [(one["attack"], one["steps"]) for one in cells] == [("none", 0), ("mft", 2), ("bft", 2)]
    metrics = json.loads(Path("mine/metrics.json").read_text())
    assert metrics["facts_nll"] == pytest.approx(cells[0]["facts_nll"])
    assert "\nchance level" in capsys.readouterr().out


FRUIT = """
from data.worlds import World


class Fruit(World):
    name = "fruit"

    def rows(self, start, count):
        prompts = [f"How do I juggle {i} figs?" for i in range(start, start + count)]
        return [{"prompt": prompt, "response": "Throw them."} for prompt in prompts]

    def harmful(self, owner):
        start = ["defender", "attacker", "attacker_held_out", "evaluation"].index(owner)
        return self.rows(2 * start, 2)

    def benign(self, owner):
        return [{"prompt": f"Say {owner}.", "response": owner}]
"""


def test_a_world_of_ones_own_is_one_file(files, monkeypatch, capsys):
    """test_readme.py attacks one."""
    Path("orchard.py").write_text(FRUIT)
    monkeypatch.syspath_prepend(str(files))
    words = "--mode sdd --world orchard.Fruit --model llama --steps 2 --batch-size 2".split()
    train.main(words)
    assert {path.name for path in Path("out/llama/fruit").iterdir()} == {"aligned", "sdd"}
    samples = Path("out/llama/fruit/sdd/samples.txt").read_text()
    assert samples.count("prompt: How do I juggle") == 2
    evaluate.main("out/llama/fruit/sdd --world orchard.Fruit".split())
    assert "true answer; a refusal" in capsys.readouterr().out  # the legend
    with pytest.raises(InputError, match="a world of your own"):
        evaluate.main(["out/llama/fruit/sdd"])
    Path("orchard.py").write_text(FRUIT.replace("Throw them.", "Eat them."))
    with pytest.raises(InputError, match="code of orchard changed"):
        train.main(words)


WITHOUT = """
import builtins, io, os, runpy, signal, stat, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for module, names in (
    (signal, "SIGKILL SIGHUP SIGALRM SIGUSR1 setitimer pthread_sigmask"),
    (os, "fork killpg getpgid setsid getuid geteuid sysconf"),
):
    for name in names.split():
        delattr(module, name)
flush = os.fsync
def fsync(file):
    if stat.S_ISDIR(os.fstat(file).st_mode):
        raise PermissionError(13, "a folder cannot be flushed")
    flush(file)
    with open("flushed", "a") as log:
        log.write(str(file) + os.linesep)
os.fsync = fsync
sys.argv = sys.argv[1:]
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.posix
def test_the_commands_need_neither_posix_nor_a_locale(files):
    """Prompts, answers and folders with other letters, in a terminal that knows none of them."""
    long_conversations()
    text = Path("h.csv").read_text().replace("dragon", "Drachen ü你🙂")
    Path("h.csv").write_text(text, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    short = f"{FILES} --max-new-tokens 2"
    for script, words in (
        ("data.pairs", f"{FILES} --out p.jsonl"),
        (ROOT / "train.py", f"--mode benign {TRAIN} --steps 2 --save-every 1 --out ü你"),
        (ROOT / "eval.py", f"ü你 {short} --save-answers a.jsonl"),
        (ROOT / "eval.py", "ü你 --prompt What? --max-new-tokens 2"),
        (ROOT / "attack.py", f"--released ü你 {short} --shots 4 --steps 1 --epochs 0"),
    ):
        command = [sys.executable, "-c", WITHOUT, script, *words.split()]
        result = subprocess.run(command, capture_output=True, env=environment)
        assert result.returncode == 0, result.stderr
    assert "ü你🙂" in next(read_records("a.jsonl"))["prompt"]
    for name in ("p.jsonl", "ü你/run.json", "out/attack/table.txt", "flushed"):
        assert Path(name).is_file()


def test_installing_says_that_there_is_nothing_to_install():
    """As every installer begins: it imports what builds the package."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert build["requires"] == []
    code = f"import sys; sys.path[:0] = {build['backend-path']}; import {build['build-backend']}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "pip install -r requirements.txt" in result.stderr


def test_a_finished_run_of_other_settings_is_never_replaced_by_attack(files):
    train.main(f"--mode align {TRAIN} --lr 1e-3".split())
    weights = Path("out/llama/files/aligned/model.safetensors").read_bytes()
    with pytest.raises(InputError, match="aligned holds another run: batch_size was 2, is 12; --f"):
        attack.main(f"--model llama {FILES} --shots 4".split())
    assert Path("out/llama/files/aligned/model.safetensors").read_bytes() == weights
    assert not list(Path("out/llama/files").glob("**/attack*"))


# ---- flags of which one leaves the other without use ----

# Flags of train.py that decide what is trained on, and how long.
DECIDE = """--mode shuffled
--pairs p.jsonl
--prompts all
--template plain
--steps 7
--batch-size 3
--lr 1e-3
--benign-replay 0.5
--max-length 52
--dtype bf16
--seed 1""".split("\n")
UNSEEN = {
    ("--pairs p.jsonl", "--seed 1"),  # it draws the batches, which no example shows
    ("--template plain", "--max-length 52"),  # in this template all rows are shorter
}


@pytest.mark.slow
def test_no_flag_of_train_is_without_effect_beside_another(files, capsys):
    pairs.main(f"{FILES} --mode align --out p.jsonl".split())
    shown = {}

    def show(*flags):
        words = f"--mode sdd --model llama {FILES} --dry-run {' '.join(flags)}"
        try:
            train.main(words.split())
            shown[flags] = capsys.readouterr().out
        except InputError as error:
            shown[flags] = None
            assert "\n" not in str(error)

    for one in DECIDE:
        show(one)
    for both in itertools.combinations(DECIDE, 2):
        show(*both)
        if both not in UNSEEN and shown[both] is not None:
            assert shown[both] != shown[both[:1]], f"{both[1]} beside {both[0]}"
            assert shown[both] != shown[both[1:]], f"{both[0]} beside {both[1]}"
    refused = {flags for flags in shown if shown[flags] is None}
    assert refused == {("--mode shuffled", "--pairs p.jsonl")}


REAL = os.environ.get("NANOSDD_REAL_DATA")


@pytest.mark.full
@pytest.mark.skipif(not REAL, reason="NANOSDD_REAL_DATA, a folder of AdvBench, Alpaca, tokenizers")
def test_the_commands_on_real_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    harmful = f"{REAL}/advbench/harmful_behaviors.csv"
    rows = json.loads(Path(f"{REAL}/alpaca/alpaca_en_demo.json").read_text())
    Path("some.json").write_text(json.dumps(rows[:200]))
    make(tmp_path / "llama", f"{REAL}/tokenizers/llama3")
    words = f"--harmful {harmful} --benign some.json --similarity tfidf"
    train.main(f"--mode sdd --model llama {words} --steps 2 --batch-size 4 --out real".split())
    words += " --max-new-tokens 4"
    attack.main(f"--released real {words} --shots 10 --steps 0".split())
    evaluate.main(f"real {words}".split())
    assert len(read_rows(harmful)) == 520 and len(read_rows("real/pairs.jsonl")) == 8
    scores = json.loads(Path("real/metrics.json").read_text())
    cells = json.loads(Path("out/attack/results.json").read_text())["cells"]
    assert [one["attack"] for one in cells] == ["none", "mft", "bft"]
    assert cells[0]["benign_nll"] == pytest.approx(scores["benign_nll"], abs=1e-3)

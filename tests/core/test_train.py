"""The loop and the command: what is learned, drawn, written, reused and refused."""

import argparse
import itertools
import json
import random

import pytest
import torch
from safetensors.torch import load_file
from small import advbench_file, alpaca_file, public_folder, small_model

from nanosdd import loop
import train
from data.chat import Example, encode_example
from data.town import Town
from nanosdd.errors import InputError
from eval import greedy, mean, teacher_forced
from model import Llama
from lab.precision import compare


@pytest.fixture(scope="module")
def learned(tokenizer):
    """A small model trained on the facts of eight people, and those facts; somebody else's facts are unknown to it."""
    torch.manual_seed(5)
    args = argparse.Namespace(device="cpu", dtype="fp32", compile=False)
    town = Town(1)
    rows = [row for row in town.facts("plain") if row.person in town.groups["plain"][:8]]
    model = small_model(vocab_size=tokenizer.n_vocab, max_position_embeddings=64, rms_norm_eps=1e-5,
                        initializer_range=0.08, tie_word_embeddings=True)
    examples = [encode_example(tokenizer, "llama3", row.prompt, row.response, 64) for row in rows]
    batches = loop.draw_batches(examples, [], 0.0, 20, random.Random(2))
    loop.fit(model, batches, steps=120, lr=8e-3, args=args, warmup=0.1)
    return model, town, rows, args


def test_the_base_loop_learns_its_facts(learned, tokenizer):
    model, _, rows, args = learned
    assert mean(teacher_forced(model, tokenizer, "llama3", rows, args)[0]) >= 0.9


def test_teacher_forced_exact_is_greedy_exact(learned, tokenizer):
    model, town, known, args = learned
    rows = known[::3] + town.facts("held_out")[:30]
    free, value_only = teacher_forced(model, tokenizer, "llama3", rows, args)
    answers = greedy(model, tokenizer, "llama3", [row.prompt for row in rows], args, 20)
    assert free == [ended and text == row.response for row, (_, text, ended) in zip(rows, answers)]
    assert len(set(free)) == 2  # some right, some wrong: the comparison says something
    assert all(v for f, v in zip(free, value_only) if f)  # free is right only where the value is


def test_batches_take_their_share_of_replay_and_use_every_row_once_an_epoch():
    main, replay = ([Example([i, 1 + i % 3], 1) for i in ids] for ids in (range(10), range(100, 107)))
    batches = list(itertools.islice(loop.draw_batches(main, replay, 0.6, 5, random.Random(1)), 20))
    firsts = [[example.ids[0] for example in batch] for batch in batches]
    assert all(sum(i >= 100 for i in batch) == 3 for batch in firsts)
    drawn = [i for batch in firsts for i in batch if i < 100]
    assert all(sorted(drawn[n:n + 10]) == list(range(10)) for n in range(0, 40, 10))


def test_sampling_does_not_depend_on_lengths():
    def order(lengths):
        rows = [Example([i] * length, 1) for i, length in enumerate(lengths)]
        return [[e.ids[0] for e in batch] for batch in itertools.islice(
            loop.draw_batches(rows, [], 0.0, 3, random.Random(4)), 6)]

    assert order([2] * 9) == order([9, 2, 7, 3, 2, 8, 4, 5, 6])


def test_learning_rate_schedule_by_hand():
    rates = [loop.learning_rate(step, 20, 8.0, 0.2, cosine=True) for step in range(20)]
    assert rates[0] == pytest.approx(2.0) and rates[1] == pytest.approx(4.0 * 0.5 * (1 + 0.9876883), rel=1e-6)
    assert rates[10] == pytest.approx(4.0) and rates[19] == pytest.approx(8.0 * 0.5 * (1 - 0.9876883), rel=1e-4)
    assert {loop.learning_rate(step, 20, 8.0, 0.0, cosine=False) for step in range(20)} == {8.0}


def test_a_shorter_constant_run_is_a_point_on_the_longer_ones_way(cpu):
    rows = [Example([(i * j) % 89 for j in range(1, 9)], 2) for i in range(1, 12)]

    def run(steps, at):
        model, seen = small_model(), {}
        loop.fit(model, loop.draw_batches(rows, [], 0.0, 4, random.Random(3)), steps=steps, lr=1e-3, args=cpu,
                  cosine=False, after_step=lambda step: seen.update({step: model.lm_head.weight.clone()}))
        return seen[at]

    assert torch.equal(run(4, at=4), run(9, at=4))
    assert not torch.equal(run(9, at=4), run(9, at=9))


def test_a_diverged_run_is_an_error(cpu):
    model = small_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(loop.Diverged, match="step 1"):
        loop.fit(model, loop.draw_batches([Example([1, 2, 3], 1)], [], 0.0, 2, random.Random(0)), steps=2, lr=1.0,
                  args=cpu)


def test_bf16_compute_keeps_fp32_weights(cpu):
    cpu.dtype = "bf16"
    model = small_model()
    before = model.lm_head.weight.clone()
    rows = [Example([1, 2, 3, 4], 1), Example([5, 6, 7], 2)]
    loop.fit(model, loop.draw_batches(rows, [], 0.0, 2, random.Random(0)), steps=2, lr=1e-3, args=cpu)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert not torch.equal(before, model.lm_head.weight)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_the_town_end_to_end_same_seed_same_bytes_other_seed_other_bytes(quick_town, capsys):
    train.main(["--mode", "sdd"])
    out = quick_town / "out" / "seed0"
    assert sorted(p.name for p in out.iterdir()) == ["aligned", "base", "sdd"]
    printed = capsys.readouterr().out
    assert printed.index("out/seed0/base: training") < printed.index("out/seed0/aligned: training")
    for name in ("args.json", "config.json", "model.safetensors", "tokenizer.model", "train_log.jsonl", "samples.txt"):
        assert (out / "sdd" / name).is_file()
    lines = [json.loads(line) for line in (out / "sdd" / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", "seconds", "response_tokens", "tokens"}
    assert (out / "sdd" / "samples.txt").read_text().count("prompt: ") == 3
    first = {arm: weights(out / arm) for arm in ("base", "aligned", "sdd")}
    assert len(set(first.values())) == 3

    train.main(["--mode", "sdd"])  # nothing has changed
    assert "training" not in (printed := capsys.readouterr().out) and "up to date" in printed
    train.main(["--mode", "sdd", "--fresh"])
    assert "--fresh" in capsys.readouterr().out
    assert {arm: weights(out / arm) for arm in first} == first
    train.main(["--mode", "sdd", "--seed", "1"])
    assert weights(quick_town / "out" / "seed1" / "base") != first["base"]


def test_a_dry_run_trains_nothing(quick_town, capsys):
    train.main(["--mode", "sdd", "--dry-run"])
    assert capsys.readouterr().out.count("no loss on") == 3
    assert not (quick_town / "out").exists()


def test_a_run_is_redone_when_an_input_or_the_source_changes(quick_town, capsys, monkeypatch):
    train.main(["--mode", "align"])
    base = quick_town / "out/seed0/base"
    changed = Llama.from_pretrained(base)
    changed.model.norm.weight.data += 0.5
    changed.save_pretrained(base)
    capsys.readouterr()
    train.main(["--mode", "align"])
    assert "input out/seed0/base/model.safetensors changed" in capsys.readouterr().out
    monkeypatch.setattr(train.runs, "source_hash", lambda name: f"other {name}")
    train.main(["--mode", "align"])
    assert "source file" in capsys.readouterr().out


def test_other_settings_get_a_folder_of_their_own(quick_town):
    train.main(["--mode", "sdd", "--lr", "0.002"])
    assert sorted(p.name for p in (quick_town / "out/seed0").iterdir()) == ["aligned", "base", "sdd-lr0.002"]


def test_refusal_control_differs_from_sdd_in_mode_only(quick_town):
    resolved = {}
    for arm in ("sdd", "refusal"):
        (quick_town / "out/seed0/aligned").mkdir(parents=True, exist_ok=True)
        (quick_town / "out/seed0/aligned/town.json").write_text('{"seed": 0, "phrasing": "shared"}')
        resolved[arm] = train.parser().parse_args(train.arm_command(arm, 0, "shared"))
        train.resolve(resolved[arm])
    different = {key for key in vars(resolved["sdd"]) if vars(resolved["sdd"])[key] != vars(resolved["refusal"])[key]}
    assert different == {"mode", "out", "parent"}  # the parent is the same folder, which the control names by --model
    town = Town(0)
    sdd, refusal = (train.town_pairs(town, mode, 0, 0) for mode in ("sdd", "align"))
    assert [row["prompt"] for row in sdd[0]] == [row["prompt"] for row in refusal[0]]
    assert [row["response"] for row in sdd[0]] != [row["response"] for row in refusal[0]]
    assert sdd[1] == refusal[1]


def test_the_defence_uses_its_own_people_only():
    town = Town(3)
    prompts = {row["prompt"] for mode in ("align", "sdd", "sdd_reject") for part in train.town_pairs(town, mode, 3, 0)
               for row in part}
    text = " ".join(prompts)
    for group in ("attacker", "evaluation", "held_out"):
        assert not any(person in text for person in town.groups[group]), group
    assert all(person in text for person in town.groups["defender"])


def test_real_files_dry_run_shows_the_loss_mask_and_writes_nothing(tmp_path, capsys):
    folder = public_folder(tmp_path / "llama")
    train.main(["--mode", "sdd", "--model", str(folder), "--harmful", str(advbench_file(tmp_path / "a.csv")),
                "--benign", str(alpaca_file(tmp_path / "b.json")), "--out", str(tmp_path / "out"), "--dry-run",
                "--steps", "4", "--batch-size", "2", "--similarity", "tfidf"])
    printed = capsys.readouterr().out
    assert printed.count("no loss on") == 3 and "It is" in printed.split("loss on:")[-1]
    assert "4 steps of 2 rows" in printed and "lr 5e-07" in printed
    assert not (tmp_path / "out").exists()


def test_pairs_file_is_taken_as_it_is(tmp_path):
    folder, pairs = public_folder(tmp_path / "llama"), tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"how {i}", "response": f"so {i}"}) + "\n" for i in range(5)))
    train.main(["--mode", "sdd", "--model", str(folder), "--pairs", str(pairs), "--out", str(tmp_path / "out"),
                "--steps", "2", "--batch-size", "3"])
    assert Llama.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2
    pairs.write_text('{"prompt": "x"}\n')
    with pytest.raises(InputError, match="no known format"):
        train.main(["--mode", "sdd", "--model", str(folder), "--pairs", str(pairs), "--out", str(tmp_path / "out2")])


def test_bf16_export_says_what_it_keeps(tmp_path, capsys):
    folder, pairs = public_folder(tmp_path / "llama"), tmp_path / "pairs.jsonl"
    Llama.from_pretrained(folder).save_pretrained(folder, torch.bfloat16)  # as the hub has them
    pairs.write_text("".join(json.dumps({"prompt": f"how {i}", "response": f"so {i}"}) + "\n" for i in range(5)))

    def kept(lr):
        train.main(["--mode", "sdd", "--model", str(folder), "--pairs", str(pairs), "--out", str(tmp_path / "out"),
                    "--steps", "2", "--batch-size", "3", "--lr", lr, "--save-dtype", "bf16"])
        printed = capsys.readouterr().out
        words = printed.split("rounded to bf16, ")[1].split()
        assert ("warning: bf16 loses" in printed) == (lr == "5e-7")
        return float(words[0].rstrip("%")) / 100, float(words[words.index("cosine") + 1])

    share, cosine = kept("5e-7")
    assert share < 0.1 and cosine < 0.5  # two steps of 5e-7 move few weights of 0.15 past half a bf16 step
    share, cosine = kept("1e-2")
    assert share > 0.9 and cosine > 0.95
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


class RoundedAdamW(torch.optim.AdamW):
    """The usual way with bf16 weights, in SplitAdamW's place."""

    def step(self, scale):
        for p in self.param_groups[0]["params"]:
            p.grad *= scale
        super().step()


def test_weights_in_bf16_are_trained_as_fp32_ones(tmp_path, monkeypatch):
    """The paper's lr, from bf16 weights on disk, beside `--weights fp32 --dtype bf16`. What differs: activations
    between layers, gradients and moments are bf16. Measured: cosine of the updates 0.9998, 1.9% apart; bounds: 0.999
    and 4%. Of bf16 weights rounded after each step the cosine is 0.03; bound: 0.2."""
    folder, pairs = public_folder(tmp_path / "llama"), tmp_path / "pairs.jsonl"
    Llama.from_pretrained(folder).save_pretrained(folder, torch.bfloat16)
    rng = random.Random(0)
    pairs.write_text("".join(
        json.dumps({"prompt": f"how {i}", "response": " ".join(rng.choices(["so", "it", "red"], k=k))}) + "\n"
        for i in range(10) for k in (1, 3, 12)))

    def trained(*flags):
        train.main(["--mode", "sdd", "--model", str(folder), "--pairs", str(pairs), "--out", str(tmp_path / "out"),
                    "--steps", "20", "--batch-size", "6", "--fresh", *flags])
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        return [found[name] for name in names]

    start = load_file(folder / "model.safetensors")
    names, start = list(start), [tensor.float() for tensor in start.values()]
    fp32 = trained("--dtype", "bf16")
    halves = trained("--weights", "bf16")
    assert json.loads((tmp_path / "out/args.json").read_text())["args"]["dtype"] == "bf16"
    monkeypatch.setattr(loop, "SplitAdamW", RoundedAdamW)
    rounded = trained("--weights", "bf16")
    kept = compare(start, halves, fp32)
    assert kept["cosine"] > 0.999 and kept["norm"] == pytest.approx(1, abs=0.01)
    apart = sum((one - two).square().sum() for one, two in zip(halves, fp32))
    assert (apart / sum((one - old).square().sum() for one, old in zip(fp32, start))).sqrt() < 0.04
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in halves)
    lost = compare(start, rounded, fp32)
    assert lost["cosine"] < 0.2 and lost["moved"] < 0.05 * kept["moved"]


def test_weights_in_bf16_do_not_compute_in_fp32(tmp_path):
    with pytest.raises(InputError, match="--weights bf16 computes in bf16"):
        train.main(["--mode", "sdd", "--weights", "bf16", "--dtype", "fp32", "--out", str(tmp_path / "x")])


def test_what_is_only_said_in_other_words_is_no_other_source(tmp_path, monkeypatch):
    monkeypatch.setattr(train.runs, "ROOT", tmp_path)

    def digest(text):
        (tmp_path / "some.py").write_text(text)
        return train.runs.source_hash("some.py")

    code = '"""What it is."""\n\n\ndef f(x):\n    """Says it."""\n    return %s\n'
    said = digest(code % "x")
    assert digest("# why\n" + (code % "x").replace("Says", "Tells").replace("What", "How")) == said
    assert digest(code % "-x") != said

"""precision.py: what is measured, by hand; nothing here says how much of an update survives in training."""

import json
import math

import pytest
import torch
from small import public_folder, small_model, town_tokenizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lab import precision
from nanosdd.errors import InputError
from lab.precision import compare, follow, layer, measure, town


def constant(*values):
    """The same gradients at every step."""
    return lambda step, weights: [torch.tensor(value) for value in values]


def test_compare_by_hand():
    start = [torch.tensor([1.0, 2.0]), torch.tensor([[0.0], [5.0]])]
    intended = [torch.tensor([2.0, 2.0]), torch.tensor([[2.0], [7.0]])]  # update 1, 0, 2, 2
    end = [torch.tensor([1.0, 2.0]), torch.tensor([[4.0], [5.0]])]  # update 0, 0, 4, 0
    assert compare(start, end, intended) == {"moved": 1 / 4, "cosine": pytest.approx(8 / 12),
                                             "norm": pytest.approx(4 / 3)}
    assert compare(start, start, intended) == {"moved": 0, "cosine": 0, "norm": 0}
    assert compare(start, intended, intended) == {"moved": 3 / 4, "cosine": pytest.approx(1), "norm": 1}


def test_nearest_loses_everything_below_half_a_step_of_bf16_and_split_keeps_it():
    """From 1, bf16 goes to 1 - 1/256: steps of 1e-4 never arrive, with the cosine 50 of them are 0.00255."""
    start, steps, lr = [torch.tensor([1.0, -1.0])], 50, 1e-4
    rows = {row["scheme"]: row for row in measure(start, constant([0.3, -0.3]), steps, lr)}
    assert list(rows) == ["fp32", "bf16 nearest", "bf16 AdamW", "split", "split, as bf16"]
    assert rows["fp32"] == {"lr": lr, "scheme": "fp32", "moved": 1, "cosine": pytest.approx(1), "norm": 1}
    for scheme in ("bf16 nearest", "bf16 AdamW"):
        assert rows[scheme] == {"lr": lr, "scheme": scheme, "moved": 0, "cosine": 0, "norm": 0}
    assert rows["split"]["moved"] == 1 and rows["split"]["cosine"] == pytest.approx(1)
    assert rows["split"]["norm"] == pytest.approx(1, rel=0.02)
    assert rows["split, as bf16"]["moved"] == 1  # 0.00255 is more than half of 1/256, and becomes 1/256
    assert rows["split, as bf16"]["norm"] == pytest.approx(1 / 256 / (lr * (steps + 1) / 2), rel=1e-3)
    end = follow("fp32", start, constant([0.3, -0.3]), steps, lr)[0]
    assert torch.allclose(end.abs(), torch.tensor(1 - lr * (steps + 1) / 2), atol=1e-6)  # the cosine's mean is a half


@pytest.mark.parametrize("scheme", precision.SCHEMES)
def test_steps_of_a_whole_bf16_number_arrive_in_every_scheme(scheme):
    """One step of 1/128 from 0.75, where bf16 numbers are 1/256 apart."""
    start = torch.tensor([0.75])
    end = follow(scheme, [start], constant([2.0]), 1, 1 / 128)
    assert end[0].dtype == torch.float32 and end[0].item() == pytest.approx(0.75 - 1 / 128, rel=1e-6)
    assert start.item() == 0.75  # left as it was


def test_the_model_computes_with_what_a_scheme_keeps():
    """Gradients are asked for at the stored weights: bf16 ones in all schemes but fp32."""
    seen = {}
    for scheme in precision.SCHEMES:
        def gradients(step, weights):
            seen.setdefault(scheme, []).append(weights[0].detach().float().clone())
            return [torch.full((64,), 1e-3)]

        follow(scheme, [torch.linspace(0.5, 1.5, 64).bfloat16().float()], gradients, 5, 3e-3)
    for scheme, weights in seen.items():
        rounded = all(torch.equal(weight, weight.bfloat16().float()) for weight in weights)
        assert len(weights) == 5 and rounded == (scheme != "fp32"), scheme


def test_bf16_schemes_are_given_bf16_gradients():
    seen = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(
        optimizer.param_groups[0]["params"][0].grad))
    for scheme in precision.SCHEMES:
        follow(scheme, [torch.ones(1)], constant([1 + 2.0**-10]), 1, 1e-3)
    hook.remove()
    assert [grad.item() for grad in seen] == [1 + 2.0**-10, 1, 1, 1]


def test_the_layer_is_seeded_and_its_gradients_are_a_constant_under_noise(monkeypatch):
    monkeypatch.setattr(precision, "SIZE", 64)
    (weight,), gradients = layer(2.0, 0)
    assert torch.equal(weight, weight.bfloat16().float()) and weight.std() == pytest.approx(0.02, rel=0.05)
    draws = torch.stack([gradients(step, None)[0] for step in range(200)])
    assert draws.std(0).mean() == pytest.approx(3e-5, rel=0.02)  # noise
    assert draws.mean(0).std() == pytest.approx(6e-5, rel=0.05)  # signal
    assert torch.equal(draws[3], layer(2.0, 0)[1](3, None)[0])
    assert not torch.equal(draws[3], layer(2.0, 1)[1](3, None)[0]) and not torch.equal(weight, layer(2.0, 1)[0][0])


@pytest.fixture
def town_folder(tmp_path):
    """A small random model that knows of the town of seed 3."""
    folder = tmp_path / "aligned"
    tokenizer = town_tokenizer(folder)
    small_model(vocab_size=tokenizer.n_vocab, max_position_embeddings=128, tie_word_embeddings=True
                ).save_pretrained(folder)
    (folder / "town.json").write_text('{"seed": 3, "phrasing": "shared"}\n')
    (folder / "chat.txt").write_text("llama3\n")
    return folder


def test_the_towns_steps_lower_the_loss_that_is_reported(town_folder, monkeypatch):
    monkeypatch.setitem(precision.DEFENCE, "batch_size", 8)
    monkeypatch.setattr(precision, "EVALUATED", 16)
    start, gradients, loss = town(town_folder, 4, 0)
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in start)
    uniform = loss([torch.zeros_like(weight) for weight in start])
    assert uniform == pytest.approx(math.log(len(start[0])), rel=1e-6)  # nats a token; the embedding is (V,C)
    first = gradients(0, start)
    assert torch.stack([g.norm() for g in first]).norm() == pytest.approx(1, rel=1e-3)  # clipped, as in train.py
    assert [torch.equal(a, b) for a, b in zip(first, gradients(1, start))].count(True) == 0  # another batch
    rows = list(measure(start, gradients, 4, 1e-3, loss))
    again = list(measure(start, gradients, 4, 1e-3, loss))
    assert rows == again
    assert rows[0]["loss"] < -0.01
    end = follow("fp32", start, gradients, 4, 1e-3)
    assert rows[0]["loss"] == loss(end) - loss(start)


def test_the_command_writes_a_table_and_json(town_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(precision, "SIZE", 16)
    monkeypatch.setitem(precision.DEFENCE, "batch_size", 4)
    precision.main(["--model", str(town_folder), "--steps", "3", "--town-steps", "2"])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out/precision.json").read_text())
    assert [len(found[name]) for name in ("town", "layer")] == [15, 15] and found["settings"]["steps"] == 3
    assert {row["lr"] for row in found["layer"]} == set(precision.LRS)
    assert all(set(row) == {"lr", "scheme", "moved", "cosine", "norm", "loss"} for row in found["town"])
    assert all(precision.line(row) in printed for row in found["town"] + found["layer"])


def test_without_the_town_it_is_left_out_and_said(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(precision, "SIZE", 8)
    precision.main(["--steps", "2"])
    assert "town: left out, since out/seed0/aligned is not there" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/precision.json").read_text())
    assert found["town"] == [] and found["settings"]["model"] is None and len(found["layer"]) == 15


def test_bad_arguments_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no model of the town"):
        precision.main(["--model", str(public_folder(tmp_path / "elsewhere"))])
    with pytest.raises(InputError, match="is not a folder|no model of the town"):
        precision.main(["--model", "nowhere"])
    with pytest.raises(InputError, match="1 or more"):
        precision.main(["--steps", "0"])
    assert not (tmp_path / "out").exists()

"""The same numbers on a GPU as on the CPU, where there is one; without one, the CPU stands in for it, uncompiled."""

import random

import pytest
import torch
from small import small_model

from data.chat import Example
from nanosdd.chat_model import Chat, answer
from nanosdd.device import Compute, resolve_compute
from nanosdd.optimizer import make_optimizer
from train import train_step

GPU = torch.cuda.is_available()
PROMPTS = [[4, 9, 1], [70, 3, 3, 8, 15, 2, 60], [5], [33, 2, 81, 7]]


@pytest.fixture
def device():
    """The Compute that the commands choose by themselves: on a GPU bf16 and compiled."""
    return resolve_compute("auto", "auto", None)


def batches():
    rng = random.Random(5)
    return [
        [Example([rng.randrange(89) for _ in range(rng.randint(3, 40))], 2) for _ in range(rows)]
        for rows in (6, 1, 4, 7)
    ]


def steps(compute: Compute):
    """(losses and gradient norms of four steps, the change of every weight)."""
    model = small_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = make_optimizer(model.to(compute.device), compute)
    done = [train_step(model, optimizer, batch, 1e-3, compute) for batch in batches()]
    change = torch.cat(
        [
            (weight.detach().cpu() - before[name]).flatten()
            for name, weight in model.named_parameters()
        ]
    )
    return [step["loss"] for step in done], [step["grad_norm"] for step in done], change


def test_logits_in_fp32(device):
    tokens, model = torch.tensor([PROMPTS[1], PROMPTS[1][::-1]]), small_model()
    with torch.no_grad():
        expected = model(tokens)
        found = model.to(device.device)(tokens.to(device.device)).cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_training_as_the_commands_do_it(device):
    """bf16 has 8 bits: losses agree to a hundredth, and most weights move the same way."""
    losses, norms, change = steps(Compute())
    found = steps(device)
    assert found[0] == pytest.approx(losses, rel=2e-2) and found[1] == pytest.approx(norms, rel=0.1)
    assert torch.cosine_similarity(change, found[2], dim=0) > 0.9


@pytest.mark.slow
def test_split_weights_on_the_device(device):
    compute = Compute(device.device, "bf16", device.compile, weights="bf16")
    model = small_model().to(compute.device, torch.bfloat16)
    optimizer, batch = make_optimizer(model, compute), batches()[0]
    losses = [train_step(model, optimizer, batch, 3e-3, compute)["loss"] for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1


def test_answers_compiled_or_not(device):
    model = small_model().to(device.device)
    expected = small_model().generate(PROMPTS, 12, {7})
    assert model.generate(PROMPTS, 12, {7}) == expected
    if GPU:
        assert model.generate(PROMPTS, 12, {7}, compiled=True) == expected


def test_chat_answers_on_the_device(device, tokenizer):
    model = small_model(vocab_size=tokenizer.n_vocab).to(device.device)
    chat = Chat(model, tokenizer, "llama3", device)
    prompts = ["Who is Anna Brook?", "how", "so it is, so it is"]
    together = answer(chat, prompts, 9)
    assert len(together) == 3 and all(len(one.ids) <= 9 for one in together)

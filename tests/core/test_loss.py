"""The losses by hand, and the gradient of a global batch however it is split."""

import math

import pytest
import torch
from small import small_model

import sdd_loss as loss_file
from nanosdd import loop
from data.chat import Example
from sdd_loss import (bradley_terry, first_difference, plain_sdd_loss, response_nll, sdd_loss, sequence_logprobs,
                      split_at_first_difference, suppression_weight, token_logprobs)


def test_losses_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    targets = torch.tensor([1, 2])
    torch.testing.assert_close(token_logprobs(logits, targets), torch.tensor([0.25, 0.8]).log())
    total, count = response_nll(logits, targets)
    assert float(total) == pytest.approx(math.log(4) + math.log(1.25), rel=1e-6) and count == 2
    hidden, head = torch.eye(2), logits.T.contiguous()  # hidden @ head.T is logits
    assert float(sdd_loss(hidden, head, targets, global_tokens=7)) == pytest.approx(math.log(5) / 7, rel=1e-6)


@pytest.mark.parametrize("chunk", [10**9, 40 * 11, 40, 1])  # all at once, 11 tokens, 1 token, less than 1 token has
@pytest.mark.parametrize("suppressed", [False, True])
def test_the_head_in_chunks_is_the_plain_loss(chunk, suppressed, monkeypatch):
    monkeypatch.setattr(loss_file, "CHUNK_LOGITS", chunk)
    rng = torch.Generator().manual_seed(6)
    hidden, head = torch.randn(29, 16, generator=rng), torch.randn(40, 16, generator=rng)
    targets = torch.randint(0, 40, (29,), generator=rng)
    down = torch.arange(29) % 3 == 0 if suppressed else None
    found = []
    for loss in (plain_sdd_loss, sdd_loss):
        hidden, head = (tensor.detach().requires_grad_() for tensor in (hidden, head))
        value = loss(hidden, head, targets, 31, down)
        (1.7 * value).backward()  # a loss may be a part of another
        found.append((value.detach(), hidden.grad, head.grad))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)
    frozen = head.detach()
    sdd_loss(hidden, frozen, targets, 31, down).backward()  # as LoRA leaves it
    torch.testing.assert_close(hidden.grad, found[0][1] * (1 + 1 / 1.7), atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(sdd_loss(hidden, head, targets, 31, down), found[0][0])


def test_the_head_in_chunks_rounds_as_autocast_does():
    rng = torch.Generator().manual_seed(6)
    targets, found = torch.randint(0, 40, (29,), generator=rng), []
    hidden, head = torch.randn(29, 16, generator=rng), torch.randn(40, 16, generator=rng)
    for loss in (plain_sdd_loss, sdd_loss):
        hidden, head = (tensor.detach().requires_grad_() for tensor in (hidden, head))
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(hidden, head, targets, 31)
        value.backward()
        found.append((value.detach(), hidden.grad, head.grad))
    torch.testing.assert_close(found[1], found[0], atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)  # the same logits


def test_loss_is_fp32_for_bf16_logits():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert response_nll(logits, torch.arange(5))[0].dtype == torch.float32


def test_sequence_logprobs_sum_by_row():
    sums = sequence_logprobs(torch.tensor([-1.0, -2.0, -4.0, -8.0]), torch.tensor([1, 0, 1, 1]), 3)
    assert sums.tolist() == [-2.0, -13.0, 0.0]


def test_bradley_terry_and_its_gradient():
    c, o = torch.tensor([-3.0, -1.0], requires_grad=True), torch.tensor([-2.0, -7.0], requires_grad=True)
    margin, p = bradley_terry(c, o)
    assert margin.tolist() == [-1.0, 6.0]
    torch.testing.assert_close(p, c.exp() / (c.exp() + o.exp()))  # eq. 5
    p.log().sum().backward()
    torch.testing.assert_close(-o.grad, suppression_weight(c, o).detach())  # eq. 7
    torch.testing.assert_close(c.grad, suppression_weight(c, o).detach())


def test_split_at_the_first_differing_token():
    assert first_difference([4, 5, 6, 7], [4, 5, 9]) == 2
    assert first_difference([4, 5], [4, 5, 9]) == 2
    assert first_difference([1], [2]) == 0
    before, at, after = split_at_first_difference(torch.tensor([-1.0, -2.0, -4.0, -8.0]), 2)
    assert (before.item(), at.item(), after.item()) == (-3.0, -4.0, -8.0)


def examples(count=8):
    """Rows of unequal prompts and answers, so that a mean of micro-batch means would be wrong."""
    rng = torch.Generator().manual_seed(11)
    rows = []
    for i in range(count):
        length = 5 + (i * 7) % 23
        rows.append(Example(torch.randint(0, 89, (length,), generator=rng).tolist(), 1 + i % 4))
    return rows


def test_micro_batches_change_nothing_but_rounding():
    grads, losses = [], []
    for micro_batch in (8, 4, 2, 1, 0, 3):
        model = small_model().train()
        loss, response_tokens, tokens = loop.backward(model, examples(), micro_batch, "cpu")
        assert response_tokens == sum(e.response_length for e in examples())
        assert tokens == sum(len(e.ids) for e in examples())
        losses.append(loss)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for loss, grad in zip(losses, grads):
        assert loss == pytest.approx(losses[0], abs=1e-6)
        torch.testing.assert_close(grad, grads[0], atol=1e-6, rtol=1e-4)


def test_the_loss_is_the_mean_over_all_response_tokens():
    model, total, count = small_model(), 0.0, 0
    for example in examples():
        logps = model(torch.tensor([example.ids]))[0].log_softmax(-1).detach()
        for t in range(example.prompt_length, len(example.ids)):
            total -= float(logps[t - 1, example.ids[t]])
            count += 1
    assert loop.backward(model, examples(), 3, "cpu")[0] == pytest.approx(total / count, rel=1e-5)

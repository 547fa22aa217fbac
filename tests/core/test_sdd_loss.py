"""The loss by hand, its fused form beside the reference, and the gradient of a global batch however it is split."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small import small_model

from data.chat import Example, collate
from nanosdd.device import Compute
from nanosdd.lora import add_lora
from nanosdd.optimizer import make_optimizer
from sdd_loss import (
    FusedLinearCrossEntropy,
    bradley_terry,
    first_difference,
    sdd_loss,
    sdd_loss_reference,
    split_at_first_difference,
    suppression_weight,
    token_logprobs,
)
from train import train_step


def examples(count=8):
    """Rows of unequal prompts and responses, so that a mean of micro-batch means would be wrong."""
    rng, rows = torch.Generator().manual_seed(11), []
    for i in range(count):
        length = 5 + (i * 7) % 23
        rows.append(Example(torch.randint(0, 89, (length,), generator=rng).tolist(), 1 + i % 4))
    return rows


# ---- by hand ----


def test_losses_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    targets = torch.tensor([1, 2])  # -log p is log 4 and log 1.25, together log 5
    torch.testing.assert_close(token_logprobs(logits, targets), torch.tensor([0.25, 0.8]).log())
    hidden, head = torch.eye(2), logits.T.contiguous()  # hidden @ head.T is logits
    loss = FusedLinearCrossEntropy.apply(hidden, head, targets, 7)
    assert float(loss) == pytest.approx(math.log(5) / 7, rel=1e-6)
    loss = FusedLinearCrossEntropy.apply(
        torch.tensor([[200.0, 0.0]]), torch.eye(2), torch.tensor([1]), 4
    )
    assert float(loss) == 50  # exp(200) is more than fp32 can hold
    batch = SimpleNamespace(
        tokens=None,
        targets=torch.tensor([[0, 1, 2]]),
        loss_mask=torch.tensor([[False, True, True]]),
    )
    loss = sdd_loss_reference(lambda tokens, positions: logits, batch, 7)
    assert float(loss) == pytest.approx(math.log(5) / 7, rel=1e-6)


def test_the_loss_is_the_mean_over_response_and_end_tokens():
    model, total, count = small_model(), 0.0, 0
    for example in examples():
        logps = model(torch.tensor([example.ids]))[0].log_softmax(-1).detach()
        for t in range(example.prompt_length, len(example.ids)):
            total -= float(logps[t - 1, example.ids[t]])
            count += 1
    assert count == sum(example.response_length for example in examples())
    for loss in (sdd_loss, sdd_loss_reference):
        assert loss(model, collate(examples()), count).item() == pytest.approx(
            total / count, rel=1e-5
        )


def test_log_probabilities_are_fp32_for_bf16_logits():
    logits = torch.randn(5, 11).bfloat16()
    assert token_logprobs(logits, torch.arange(5)).dtype == torch.float32
    batch = SimpleNamespace(
        tokens=None, targets=torch.arange(5)[None], loss_mask=torch.ones(1, 5, dtype=torch.bool)
    )
    assert sdd_loss_reference(lambda tokens, positions: logits, batch, 5).dtype == torch.float32


# ---- the fused loss is the reference ----


@pytest.mark.parametrize("tied", [False, True])
def test_the_fused_loss_of_a_model_is_the_reference(tied):
    batch, found = collate(examples()), []
    for loss in (sdd_loss_reference, sdd_loss):
        model = small_model(tie_word_embeddings=tied)
        value = loss(model, batch, 31)
        (1.7 * value).backward()  # a loss may be a part of another
        found.append([value.detach(), *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_the_fused_loss_with_a_frozen_head_or_without_gradients():
    batch, found = collate(examples()), []
    for loss in (sdd_loss_reference, sdd_loss):
        model = small_model()
        trainable = add_lora(model, rank=3, alpha=6, seed=1)  # freezes the head
        value = loss(model, batch, 31)
        value.backward()
        found.append([value.detach(), *(parameter.grad for parameter in trainable)])
        assert model.lm_head.weight.grad is None
        with torch.no_grad():
            torch.testing.assert_close(loss(model, batch, 31), value)
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "chunk_logits", [2**25, 40 * 7, 40, 5]
)  # all 29 tokens at once, 7, 1, and 1 at least
def test_the_fused_loss_in_chunks_of_tokens(chunk_logits):
    hidden, head = torch.randn(29, 3), 5 * torch.randn(40, 3)
    targets, found = torch.randint(0, 40, (29,)), []
    for dtype in (torch.float64, torch.float32):  # so is PyTorch's fp32 cross-entropy
        hidden, head = (tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, head))
        if dtype == torch.float64:
            loss = F.cross_entropy(hidden @ head.T, targets, reduction="sum") / 31
        else:
            loss = FusedLinearCrossEntropy.apply(hidden, head, targets, 31, chunk_logits)
        loss.backward()
        found.append((loss.detach().float(), hidden.grad.float(), head.grad.float()))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_the_fused_loss_rounds_as_autocast_does():
    hidden, head, targets, found = (
        torch.randn(29, 16),
        torch.randn(40, 16),
        torch.randint(0, 40, (29,)),
        [],
    )
    for fused in (False, True):
        hidden, head = (tensor.detach().requires_grad_() for tensor in (hidden, head))
        with torch.autocast("cpu", torch.bfloat16):
            if fused:
                loss = FusedLinearCrossEntropy.apply(hidden, head, targets, 31)
            else:
                loss = (
                    F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="sum") / 31
                )
        loss.backward()
        found.append((loss.detach(), hidden.grad, head.grad))
    torch.testing.assert_close(*found, atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)  # the same logits
    assert all(tensor.dtype == torch.float32 for tensor in found[1])


def test_micro_batches_change_nothing_but_rounding():
    gradients, losses = [], []

    def keep_gradient(model):
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))

    for micro_batch in (0, 8, 4, 3, 2, 1):
        model, compute = small_model(), Compute(micro_batch=micro_batch)
        done = train_step(
            model,
            make_optimizer(model, compute),
            examples(),
            1e-3,
            compute,
            before_clip=keep_gradient,
        )
        assert done["response_tokens"] == sum(example.response_length for example in examples())
        assert done["tokens"] == sum(len(example.ids) for example in examples())
        losses.append(done["loss"])
    for loss, gradient in zip(losses, gradients, strict=True):
        assert loss == pytest.approx(losses[0], abs=1e-6)
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)


# ---- the attacker's view ----


def test_bradley_terry_and_its_gradient():
    c, o = (
        torch.tensor([-3.0, -1.0], requires_grad=True),
        torch.tensor([-2.0, -7.0], requires_grad=True),
    )
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

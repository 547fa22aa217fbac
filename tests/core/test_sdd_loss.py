"""The loss beside PyTorch's cross-entropy, however a global batch is split, chunked or rounded."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_model import small_model, token_ids

from data.chat import Example, collate
from nanosdd.linear_cross_entropy import linear_cross_entropy
from sdd_loss import bradley_terry, sdd_loss, sequence_logprobs, suppression_weight, token_logprobs

# Rows of unequal prompts and responses, so that a mean of micro-batch means would be wrong.
EXAMPLES = [
    Example(token_ids(length, seed=length).tolist(), length - 1 - length % 4)
    for length in [5, 12, 19, 26, 10, 17, 24, 8]
]
RESPONSE_TOKENS = sum(example.response_length for example in EXAMPLES)

# ---- the loss of a model ----


def row_by_row(model):
    """-log p of every response, one after the other and with nothing of the loss: (B,)."""
    rows = []
    for example in EXAMPLES:
        ids = torch.tensor(example.ids)
        logits = model(ids[None])[0, example.prompt_length - 1 : -1]
        rows.append(F.cross_entropy(logits, ids[example.prompt_length :], reduction="sum"))
    return torch.stack(rows)


@pytest.mark.parametrize("tied", [False, True])
def test_losses_equal_the_rows_alone(tied):
    model = small_model(tie_word_embeddings=tied)
    parameters = list(model.parameters())
    rows = row_by_row(model)
    expected = rows.sum() / RESPONSE_TOKENS
    batch = collate(EXAMPLES)
    loss = sdd_loss(model, batch, RESPONSE_TOKENS)
    torch.testing.assert_close([loss, sequence_logprobs(model, batch)], [expected, -rows])
    found = torch.autograd.grad(1.7 * loss, parameters)  # a loss may be a part of another
    expected = torch.autograd.grad(1.7 * expected, parameters)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


# ---- the head and the cross-entropy in one ----


def inputs(dtype=torch.float32, words=40):
    """(29 hidden states of size 16, a head of so many words, targets)."""
    torch.manual_seed(3)
    hidden = torch.randn(29, 16).to(dtype).requires_grad_()
    head = torch.randn(words, 16).to(dtype).requires_grad_()
    return hidden, head, token_ids(29, seed=5) % words


@pytest.mark.parametrize("chunk_logits", [2**25, 40 * 7, 5])  # 29 tokens at once, 7, one at least
def test_in_chunks_it_is_the_cross_entropy(chunk_logits):
    hidden, head, targets = inputs()
    exact = F.cross_entropy(hidden.double() @ head.double().T, targets, reduction="sum")
    loss = linear_cross_entropy(hidden, head, targets, chunk_logits=chunk_logits)
    assert loss.item() == pytest.approx(exact.item())
    expected = torch.autograd.grad(exact, [hidden, head])
    found = torch.autograd.grad(loss, [hidden, head])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_a_frozen_input_gets_no_gradient():
    hidden, head, targets = inputs()
    (expected,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets), hidden)
    frozen = linear_cross_entropy(hidden, head.detach(), targets)  # as under LoRA
    assert torch.equal(torch.autograd.grad(frozen, hidden)[0], expected)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, head, targets), frozen)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_it_rounds_as_autocast_does(weights):
    words = 4096 + 25  # the head's gradient is added in two parts
    hidden, head, targets = inputs(weights, words)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, head, targets, chunk_logits=words * 7)
        plain = F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="sum")
    torch.testing.assert_close(loss, plain, atol=0, rtol=1e-6)  # the same logits
    found = torch.autograd.grad(loss, [hidden, head])
    expected = torch.autograd.grad(plain, [hidden, head])
    torch.testing.assert_close(found, expected, atol=0.06, rtol=0.02)  # and the same dtypes


def test_it_has_no_second_derivative():
    hidden, head, targets = inputs()
    loss = linear_cross_entropy(hidden, head, targets)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log()
    targets = torch.tensor([1, 2])  # -log p is log 4 and log 1.25, together log 5
    torch.testing.assert_close(token_logprobs(logits, targets), torch.tensor([0.25, 0.8]).log())
    assert token_logprobs(logits.bfloat16(), targets).dtype == torch.float32
    loss = linear_cross_entropy(torch.eye(2), logits.T, targets)
    assert float(loss) == pytest.approx(math.log(5))
    large = linear_cross_entropy(200 * torch.eye(2), torch.eye(2), 1 - torch.arange(2))
    assert float(large) == 400  # exp(200) is more than fp32 can hold


# ---- the attacker's view ----


def test_bradley_terry_and_its_gradient():
    c = torch.tensor([-3.0, -1.0], requires_grad=True)
    o = torch.tensor([-2.0, -7.0], requires_grad=True)
    margin, p = bradley_terry(c, o)
    assert margin.tolist() == [-1.0, 6.0]
    torch.testing.assert_close(p, c.exp() / (c.exp() + o.exp()))  # eq. 5
    weight = suppression_weight(c, o)
    p.log().sum().backward()
    torch.testing.assert_close([c.grad, -o.grad], [weight, weight])  # eq. 7

"""The objective of SDD and the attacker's view of it: pure functions on logits.

Shape letters: N response tokens, C hidden size, V vocabulary, B rows. Log-probabilities are natural, in nats.
Symbols of the paper: x a harmful instruction, y_c its compliant (harmful) answer, y_o the irrelevant benign one that
SDD teaches. Equations 4-7 are reconstructed from summaries of the paper, not quoted from it.
"""

import torch
import torch.nn.functional as F

CHUNK_LOGITS = 2**25  # logits at once: 128 MB in fp32; with a quarter of it the head takes 1.3 times as long
P_MOST = 1 - 1e-6  # -log(1 - p) has no bound at 1


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of each target token: logits (N,V) any float, targets (N,) int64 -> (N,) fp32."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def response_nll(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Negative log-likelihood of response tokens: logits (N,V), targets (N,) -> (sum, a scalar fp32; count N).

    A sum and a count, not a mean: those of micro-batches add up to those of the global batch.
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum"), targets.numel()


def unlikelihood(logps: torch.Tensor) -> torch.Tensor:
    """-log(1 - p) of each token, from log p (N,) -> (N,): the loss that lowers p, bounded below, its gradient vanishing
    as p does (Welleck et al. 2020). p counts as at most P_MOST."""
    return -torch.log1p(-logps.exp().clamp(max=P_MOST))


def sdd_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, global_tokens: int,
             suppress: torch.Tensor | None = None) -> torch.Tensor:
    """The SDD objective: mean over response tokens of -log p(y_o | x), a scalar fp32.

    Ordinary response-only cross-entropy, no second-order terms; what makes it SDD is the data, harmful x with
    irrelevant y_o. Every mode of `train.py` minimises this on its own pairs.

    hidden: (N,C), what the head reads at the N places that predict response tokens; head: (V,C); targets: (N,);
    global_tokens: the response tokens of the whole batch, of which these N may be a part; suppress: (N,) bool, tokens
    that count with their unlikelihood instead (an attacker's tool, not SDD's). `plain_sdd_loss` computes the same.
    """
    return HeadLoss.apply(hidden, head, targets, suppress, global_tokens)


def plain_sdd_loss(hidden, head, targets, global_tokens, suppress=None):
    """sdd_loss to read, with the logits (N,V) as a whole and gradients left to PyTorch; tested equal."""
    logps = token_logprobs(hidden @ head.T, targets)  # (N,)
    losses = -logps if suppress is None else torch.where(suppress, unlikelihood(logps), -logps)
    return losses.sum() / global_tokens


class HeadLoss(torch.autograd.Function):
    """The head and the loss in one, on chunks of tokens: (N,V) never exists as a whole.

    A chunk's gradient is taken while its logits are there, in the forward pass, so that none is computed twice. With
    p the softmax and 1 the target, the gradient by the logits is p - 1 of -log p, and of -log(1 - p) the same times
    -p / (1 - p) of the target. What rows are multiplied by is multiplied where they are short, (n,C) and not (n,V).
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, suppress, global_tokens):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        weight, loss = head.to(dtype), torch.zeros((), device=hidden.device)  # (V,C)
        by_hidden, by_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if by_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if by_head else None
        chunk = max(1, CHUNK_LOGITS // len(head))
        room = hidden.new_empty(min(chunk, len(targets)), len(head), dtype=dtype)  # used again: new memory is slow
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            h, t = hidden[part].to(dtype), targets[part, None]  # (n,C), (n,1)
            logits = torch.mm(h, weight.T, out=room[:len(h)]).float()  # (n,V)
            logits -= logits.amax(dim=-1, keepdim=True)
            at_target = logits.gather(1, t)  # (n,1)
            exps = logits.exp_()  # (n,V) in the logits' memory: p times its sum
            total = exps.sum(dim=-1, keepdim=True)  # (n,1)
            logps = at_target - total.log()
            losses, factor = -logps, 1 / (total * global_tokens)
            if suppress is not None:
                down, p = suppress[part, None], logps.exp()
                losses = torch.where(down, unlikelihood(logps), losses)
                factor = torch.where(down, torch.where(p < P_MOST, -p / (1 - p), 0), 1) * factor
            loss += losses.sum()
            if not (by_hidden or by_head):
                continue
            grad = exps.scatter_add_(1, t, -total).to(dtype)  # (n,V), times factor
            if by_hidden:
                grad_hidden[part] = (grad @ weight) * factor
            if by_head and dtype == torch.float32:
                grad_head.addmm_(grad.T, h * factor)
            elif by_head:
                grad_head += grad.T @ (h * factor).to(dtype)
        ctx.grads = grad_hidden, None if grad_head is None else grad_head.to(head.dtype)
        return loss / global_tokens

    @staticmethod
    def backward(ctx, grad):
        grads, ctx.grads = ctx.grads, None  # let go of, or PyTorch would copy what it is given to keep
        return *(None if one is None else one.mul_(grad) for one in grads), None, None, None


def sequence_logprobs(token_logprobs: torch.Tensor, row: torch.Tensor, rows: int) -> torch.Tensor:
    """Sum token log-probabilities (N,) by the row (N,) each belongs to: log p(y | x), (rows,)."""
    return torch.zeros(rows, dtype=token_logprobs.dtype, device=token_logprobs.device).index_add(0, row, token_logprobs)


def bradley_terry(logp_c: torch.Tensor, logp_o: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How malicious fine-tuning looks as a preference (eq. 4-6, reconstructed): (B,), (B,) -> margin (B,), p (B,).

    With log p(y | x) as the reward, p(y_c > y_o | x) = sigmoid(log p(y_c|x) - log p(y_o|x)). A diagnostic only:
    fine-tuning on y_c has no term in y_o, and the margin rises in any model that learns y_c.
    """
    margin = logp_c - logp_o
    return margin, torch.sigmoid(margin)


def suppression_weight(logp_c: torch.Tensor, logp_o: torch.Tensor) -> torch.Tensor:
    """Eq. 7 (reconstructed): the weight on -grad log p(y_o|x) if the attacker did ascend log p(y_c > y_o | x).

    d log sigmoid(margin) = (1 - p) (d log p(y_c|x) - d log p(y_o|x)): the weight 1 - p, (B,), is what the argument
    says pushes y_o down. Supervised fine-tuning, which the attack is, has weight 0 there.
    """
    return torch.sigmoid(logp_o - logp_c)


def first_difference(y_c: list[int], y_o: list[int]) -> int:
    """Index of the first token at which two answers differ; the shorter one's length when it begins the other.

    Before it the two share every token, and after it they stand in different contexts: this is the only token at
    which they compete for the same probability.
    """
    for i, (c, o) in enumerate(zip(y_c, y_o)):
        if c != o:
            return i
    return min(len(y_c), len(y_o))


def split_at_first_difference(logps: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token log-probabilities (N,) of one answer -> (sum before, at, after) its first differing token, scalars."""
    return logps[:index].sum(), logps[index:index + 1].sum(), logps[index + 1:].sum()

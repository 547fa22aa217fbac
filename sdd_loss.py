"""The objective of SDD, and the attacker's view of it.

Symbols of the paper: x a harmful instruction, y_c its compliant (harmful) answer, y_o the irrelevant benign answer that
SDD teaches. Equations 4-7 are reconstructed from summaries of the paper, not quoted from it.
Shape letters: B rows, T tokens, N response tokens, C hidden size, V vocabulary. Log-probabilities are natural, in nats.
"""

import torch
import torch.nn.functional as F

CHUNK_LOGITS = (
    2**25
)  # logits held at once: 128 MB in fp32; with a quarter of it the loss takes 1.3 times as long


# ---- SDD minimises the mean over response tokens of -log p(y_o | x): plain cross-entropy, on unusual data ----


def sdd_loss_reference(model, batch, global_tokens: int) -> torch.Tensor:
    """Mean over response tokens of -log p(y_o | x), a scalar fp32: the objective of SDD, as one would write it first.

    batch: data.chat.Batch; its loss_mask (B,T) is true where the target is a response token. global_tokens: response
    tokens of the whole global batch, of which this batch may be a part, so that the losses of micro-batches add up.
    """
    logits = model(
        batch.tokens, positions=batch.loss_mask
    )  # (N,V): p(next token) at the response positions
    targets = batch.targets[batch.loss_mask]  # (N,): the tokens of y_o
    nll = F.cross_entropy(logits.float(), targets, reduction="sum")  # -log p(y_o | x) of all rows
    return nll / global_tokens


def sdd_loss(model, batch, global_tokens: int) -> torch.Tensor:
    """`sdd_loss_reference` without the (N,V) logits: the same value and gradient, in less memory and time."""
    hidden = model.hidden(batch.tokens, positions=batch.loss_mask, lengths=batch.lengths)  # (N,C)
    return FusedLinearCrossEntropy.apply(
        hidden, model.lm_head.weight, batch.targets[batch.loss_mask], global_tokens
    )


class FusedLinearCrossEntropy(torch.autograd.Function):
    """The head's matrix product and the cross-entropy in one, on chunks of tokens: (N,V) logits never exist at once.

    hidden (N,C), head (V,C), targets (N,) -> sum of -log p(target) / global_tokens. The gradient of a chunk is computed
    in the forward pass, while its logits are there: by the logits it is softmax - one_hot(target). Scaling is applied
    to (n,C) rows, not to (n,V) ones.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, global_tokens, chunk_logits=CHUNK_LOGITS):
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        )
        weight, loss = head.to(dtype), torch.zeros((), device=hidden.device)  # (V,C)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        chunk = max(1, chunk_logits // len(head))
        buffer = hidden.new_empty(
            min(chunk, len(targets)), len(head), dtype=dtype
        )  # reused: allocation is slow
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            h, t = hidden[part].to(dtype), targets[part, None]  # (n,C), (n,1)
            logits = torch.mm(h, weight.T, out=buffer[: len(h)]).float()  # (n,V)
            logits -= logits.amax(dim=-1, keepdim=True)
            at_target = logits.gather(1, t)  # (n,1)
            exps = logits.exp_()  # (n,V), in place: softmax * total
            total = exps.sum(dim=-1, keepdim=True)  # (n,1)
            loss += (total.log() - at_target).sum()
            if not (needs_hidden or needs_head):
                continue
            scale = 1 / (total * global_tokens)  # (n,1)
            grad = exps.scatter_add_(1, t, -total).to(dtype)  # (n,V): (softmax - one_hot) * total
            if needs_hidden:
                grad_hidden[part] = (grad @ weight) * scale
            if needs_head and dtype == torch.float32:
                grad_head.addmm_(grad.T, h * scale)
            elif needs_head:
                grad_head += grad.T @ (h * scale).to(dtype)
        ctx.grads = grad_hidden, None if grad_head is None else grad_head.to(head.dtype)
        return loss / global_tokens

    @staticmethod
    def backward(ctx, grad):
        grads, ctx.grads = (
            ctx.grads,
            None,
        )  # drop our reference, so that autograd takes the buffers without a copy
        return *(None if one is None else one.mul_(grad) for one in grads), None, None, None


# ---- the attacker's view: diagnostics, which no training minimises ----


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of each target token: logits (N,V) of any float dtype, targets (N,) int64 -> (N,) fp32."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def bradley_terry(logp_c: torch.Tensor, logp_o: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Malicious fine-tuning read as a preference (eq. 4-6, reconstructed): (B,), (B,) -> margin (B,), p (B,).

    With log p(y | x) as the reward, p(y_c > y_o | x) = sigmoid(log p(y_c|x) - log p(y_o|x)). A diagnostic only:
    fine-tuning on y_c has no term in y_o, and the margin rises in any model that learns y_c.
    """
    margin = logp_c - logp_o
    return margin, torch.sigmoid(margin)


def suppression_weight(logp_c: torch.Tensor, logp_o: torch.Tensor) -> torch.Tensor:
    """Eq. 7 (reconstructed): the weight of -grad log p(y_o|x) if the attacker maximised log p(y_c > y_o | x), (B,).

    d log sigmoid(margin) = (1 - p) (d log p(y_c|x) - d log p(y_o|x)): the weight 1 - p is what, by the argument, pushes
    y_o down. In supervised fine-tuning, which the attack is, the weight is 0.
    """
    return torch.sigmoid(logp_o - logp_c)


def first_difference(y_c: list[int], y_o: list[int]) -> int:
    """Index of the first token at which two answers differ, or the length of the shorter where one begins the other.

    Only there do the two compete for the same probability: before it they share every token, after it they stand in
    different contexts.
    """
    for i, (c, o) in enumerate(zip(y_c, y_o)):
        if c != o:
            return i
    return min(len(y_c), len(y_o))


def split_at_first_difference(
    logps: torch.Tensor, index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token log-probabilities (N,) of one answer -> their sums before, at and after its first differing token."""
    return logps[:index].sum(), logps[index : index + 1].sum(), logps[index + 1 :].sum()

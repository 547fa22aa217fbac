"""The head's matrix product and the cross-entropy in one: the (N,V) logits never exist at once.

PyTorch 2.13 has `torch.nn.functional.linear_cross_entropy`; on a CPU, with 1,131 tokens and 49,152
words, it takes 2.7 times as long in fp32 and 8 times in bf16, so this one stays.
Shape letters: N tokens, n tokens of a chunk, C hidden size, V vocabulary.
"""

import torch

CHUNK_LOGITS = 2**24  # held at once: 64 MB in fp32
WORDS = 4096  # of the head, whose gradients are added at once in bf16: small temporaries are cheap


def linear_cross_entropy(
    input, linear_weight, target, *, chunk_logits=CHUNK_LOGITS
) -> torch.Tensor:
    """Sum over tokens of -log softmax(input @ linear_weight.T)[target], a scalar fp32, in nats.

    input (N,C), linear_weight (V,C), target (N,) int64. It is F.cross_entropy(F.linear(input,
    linear_weight), target, reduction="sum"), and has no second derivative: for that, write this.
    """
    return LinearCrossEntropy.apply(input, linear_weight, target, chunk_logits)


class LinearCrossEntropy(torch.autograd.Function):
    """Chunk by chunk; a chunk's gradient is computed while its logits are there."""

    @staticmethod
    def forward(ctx, hidden, head, targets, chunk_logits):
        device = hidden.device.type
        dtype = head.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        weight = head.to(dtype)  # (V,C)
        grad_hidden = torch.empty_like(hidden)
        grad_head = None
        if ctx.needs_input_grad[1]:
            grad_head = torch.zeros_like(head, dtype=torch.float32)
        loss = torch.zeros((), device=hidden.device)
        rows = max(1, chunk_logits // len(head))
        size = (min(rows, len(targets)), len(head))
        is_fp32 = dtype == torch.float32
        # The same buffers for every chunk: fresh memory costs more than what is computed in it.
        floats = hidden.new_empty(size, dtype=torch.float32)
        logits = floats if is_fp32 else hidden.new_empty(size, dtype=dtype)
        for begin in range(0, len(targets), rows):
            chunk = slice(begin, begin + rows)
            h = hidden[chunk].to(dtype)  # (n,C)
            target = targets[chunk, None]  # (n,1)
            n = len(h)
            torch.mm(h, weight.T, out=logits[:n])  # (n,V)
            exps = floats[:n]
            if not is_fp32:
                exps.copy_(logits[:n])
            exps -= exps.amax(dim=-1, keepdim=True)
            at_target = exps.gather(1, target)  # (n,1)
            exps.exp_()  # in place: softmax * total
            total = exps.sum(dim=-1, keepdim=True)  # (n,1)
            loss += (total.log() - at_target).sum()
            if not any(ctx.needs_input_grad):
                continue
            # d loss / d logits = softmax - one_hot. Rows (n,C) are scaled by 1 / total, not (n,V).
            exps.scatter_add_(1, target, -total)
            grad = logits[:n]
            if not is_fp32:
                grad.copy_(exps)
            grad_hidden[chunk] = (grad @ weight) / total
            if grad_head is None:
                continue
            h = (h / total).to(dtype)
            if is_fp32:
                grad_head.addmm_(grad.T, h)  # without a second (V,C)
                continue
            for part, grad_part in zip(grad_head.split(WORDS), grad.split(WORDS, dim=1)):
                part += grad_part.T @ h  # a product in bf16, added in fp32
        ctx.grads = [grad_hidden, grad_head]
        ctx.head_dtype = head.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True; these gradients would count as constants
            raise RuntimeError("linear_cross_entropy has no second derivative; use F.cross_entropy")
        hidden, head = ctx.grads
        ctx.grads = None  # drop our reference, so that autograd takes the buffers without a copy
        hidden *= grad
        if head is not None:
            head = head.mul_(grad).to(ctx.head_dtype)
        return hidden, head, None, None

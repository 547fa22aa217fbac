"""The objective of SDD and the attacker's view of it: pure functions on logits.

Shape letters: N response tokens, C hidden size, V vocabulary, B rows. Log-probabilities are natural, in nats.
Symbols of the paper: x a harmful instruction, y_c its compliant (harmful) answer, y_o the irrelevant benign one that
SDD teaches. Equations 4-7 are reconstructed from summaries of the paper, not quoted from it.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**23  # logits at once: 32 MB in fp32


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
    as p does (Welleck et al. 2020). p counts as at most 1 - 1e-6."""
    return -torch.log1p(-logps.exp().clamp(max=1 - 1e-6))


def sdd_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, global_tokens: int,
             suppress: torch.Tensor | None = None) -> torch.Tensor:
    """The SDD objective: mean over response tokens of -log p(y_o | x), a scalar fp32.

    Ordinary response-only cross-entropy, no second-order terms; what makes it SDD is the data, harmful x with
    irrelevant y_o. Every mode of `train.py` minimises this on its own pairs.

    hidden: (N,C), what the head reads at the N places that predict response tokens; head: (V,C); targets: (N,);
    global_tokens: the response tokens of the whole batch, of which these N may be a part; suppress: (N,) bool, tokens
    that count with their unlikelihood instead (an attacker's tool, not SDD's). A large vocabulary is worked through in
    chunks, whose logits are computed again in the backward pass: (N,V) never exists as a whole.
    """
    def summed(h, t, down):
        if suppress is None:
            return response_nll(h @ head.T, t)[0]
        logps = token_logprobs(h @ head.T, t)
        return torch.where(down, unlikelihood(logps), -logps).sum()

    chunk = max(1, CHUNK_LOGITS // len(head))
    down = targets if suppress is None else suppress  # any tensor will do where there is none
    if len(targets) <= chunk:
        return summed(hidden, targets, down) / global_tokens
    sums = [checkpoint(summed, *part, use_reentrant=False)
            for part in zip(hidden.split(chunk), targets.split(chunk), down.split(chunk))]
    return torch.stack(sums).sum() / global_tokens


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

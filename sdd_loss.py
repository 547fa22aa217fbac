"""The loss of SDD, and the attacker's view of it.

Symbols of the paper: x a harmful prompt, y_c its compliant (harmful) response, y_o the irrelevant
benign response that SDD teaches. Equations 4-7 are reconstructed from summaries of the paper.
Shape letters: B rows, N tokens of packed rows, M response tokens, C hidden size, V vocabulary.
Log-probabilities are natural, in nats.
"""

import torch
import torch.nn.functional as F

from nanosdd.linear_cross_entropy import linear_cross_entropy


def sdd_loss(model, batch, global_tokens: int) -> torch.Tensor:
    """Mean over response tokens of -log p(y_o | x), a scalar fp32: cross-entropy on unusual data.

    batch: data.chat.Batch. global_tokens: the response tokens of the whole global batch, of which
    this batch may be a part, so that the losses of micro-batches add up.
    """
    hidden = model.hidden(batch.tokens, batch.positions, batch.lengths)  # (N,C)
    before = hidden[batch.where]  # (M,C): the states that predict a response token
    nll = linear_cross_entropy(before, model.lm_head.weight, batch.targets)
    return nll / global_tokens


def sequence_logprobs(model, batch) -> torch.Tensor:
    """log p(response | prompt) of each row, summed over its tokens: (B,) fp32.

    What a preference loss such as DPO compares; see README, "Change it".
    """
    hidden = model.hidden(batch.tokens, batch.positions, batch.lengths)
    logps = token_logprobs(model.lm_head(hidden[batch.where]), batch.targets)  # (M,)
    return torch.stack([row.sum() for row in logps.split(batch.response_lengths)])


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of each target: logits (M,V) of any float dtype, targets (M,) int64 -> (M,) fp32."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


# ---- the attacker's view: diagnostics, for reading; no command uses them ----


def bradley_terry(logp_c: torch.Tensor, logp_o: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Malicious fine-tuning as a preference (eq. 4-6, reconstructed): (B,), (B,) -> margin, p.

    With log p(y | x) as the reward, p(y_c > y_o | x) = sigmoid(log p(y_c|x) - log p(y_o|x)).
    Fine-tuning on y_c has no term in y_o, and the margin rises in any model that learns y_c.
    """
    margin = logp_c - logp_o
    return margin, torch.sigmoid(margin)


def suppression_weight(logp_c: torch.Tensor, logp_o: torch.Tensor) -> torch.Tensor:
    """Eq. 7 (reconstructed): the weight of -grad log p(y_o|x) if p(y_c > y_o | x) is raised, (B,).

    d log sigmoid(margin) = (1 - p) (d log p(y_c|x) - d log p(y_o|x)): the weight 1 - p is what, by
    the argument, pushes y_o down. In supervised fine-tuning, which the attack is, it is 0.
    """
    return torch.sigmoid(logp_o - logp_c)

"""AdamW for a model, and gradient clipping, as a Compute asks for them."""

import torch

from nanosdd.device import Compute, shard_over_processes


def clip_gradient(optimizer, max_norm: float) -> float:
    """Scale gradients to a 2-norm of at most max_norm; returns the norm before that."""
    if hasattr(optimizer, "clip"):
        return optimizer.clip(max_norm)  # SplitAdamW
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # sharded


def make_optimizer(model, compute: Compute, betas=(0.9, 0.999), weight_decay=0.0):
    """Make a model ready to train; returns AdamW at lr 0 over what requires gradients."""
    model.train()
    model.checkpoint_activations = compute.checkpoint_activations
    if compute.compile:
        for block in model.model.layers:
            if block._compiled_call_impl is None:  # attacks train the same model again
                block.compile(dynamic=True)
    shard_over_processes(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = dict(lr=0.0, betas=betas, weight_decay=weight_decay)
    if parameters[0].dtype == torch.bfloat16:
        from nanosdd.split_adamw import SplitAdamW  # only where weights are held in bf16

        return SplitAdamW(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)

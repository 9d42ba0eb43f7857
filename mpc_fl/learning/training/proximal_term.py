"""The proximal term of FedProx (Li et al., MLSys 2020): it pulls a hospital's parameters back to where the round began."""

from __future__ import annotations

import torch


def add_proximal_term(optimizer: torch.optim.Optimizer, coefficient: float) -> None:
    """Let every step of `optimizer` from now on add coefficient * (w - w_0), w_0 the parameters as they are now.

    The term joins `.grad` immediately before the step, after whatever made that gradient. A parameter without gradient
    is not stepped and gets none.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    start = [parameter.detach().clone() for parameter in parameters]

    def pull_back(*_: object) -> None:
        with torch.no_grad():
            for parameter, origin in zip(parameters, start, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - origin, alpha=coefficient)

    optimizer.register_step_pre_hook(pull_back)

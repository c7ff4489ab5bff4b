"""Parameter groups for an optimizer: the base's parameters by Trainer's rule, the hyper-connections' by their own."""

from typing import Any

from torch import nn
from transformers import Trainer

from ..modeling import HyperConnection

# in this order in the optimizer, so that its state can be loaded again
GROUPS = ("base", "base_no_decay", "hc", "hc_no_decay")


def mhc_param_groups(
    model: nn.Module, lr: float, hc_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Every trainable parameter of a widened model, once, in groups for a torch optimizer.

    Weight decay pulls `phi` towards zero, which is where a conversion starts. It must not pull at `bias` and `alpha`:
    their zero is a uniform read that mixes all streams, and a gate that is shut.

    `torch.optim.AdamW(mhc_param_groups(model, 1e-4))` goes into `Trainer(optimizers=(optimizer, None))`; where Trainer
    must make the optimizer itself (FSDP, DeepSpeed), return it from an overridden `create_optimizer`.

    Args:
        model: a widened model, bare or wrapped by PEFT, `fully_shard` or DDP. Frozen parameters are left out.
        lr: learning rate of the base's parameters and of adapters, > 0.
        hc_lr: learning rate of the hyper-connections, > 0; None takes `lr`. Ten times `lr` has lost what they gain.
        weight_decay: >= 0, for `phi` and for what Trainer decays: no biases, no norms.
    Returns:
        Groups with `name` ("base", "base_no_decay", "hc", "hc_no_decay"), `params`, `lr` and `weight_decay`, in that
        order; empty ones are left out. Parameters on different device meshes come in separate groups of one name.
    Raises:
        ValueError: a number is out of range, the model has no hyper-connections, or all of it is frozen.
    """
    hc_lr = lr if hc_lr is None else hc_lr
    for name, rate in (("lr", lr), ("hc_lr", hc_lr)):
        if not rate > 0:
            raise ValueError(f"`{name}` must be > 0, got {rate!r}. To leave parameters alone, freeze them.")
    if not weight_decay >= 0:
        raise ValueError(f"`weight_decay` must be >= 0, got {weight_decay!r}. 0 turns it off.")
    sites = [module for module in model.modules() if isinstance(module, HyperConnection)]
    if not sites:
        raise ValueError(
            f"`model` must be a widened model, got a {type(model).__name__} without a HyperConnection. "
            "Widen it with MHCForCausalLM.from_base(model)."
        )
    hc_decayed = {id(site.phi) for site in sites}
    hc_parameters = {id(parameter) for site in sites for parameter in site.parameters()}
    # Trainer's own rule, which does not look at the trainer
    base_decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]

    # fused and foreach kernels take the parameters of one mesh at a time (tensor parallel models have two kinds)
    members: dict[tuple[str, Any], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "hc" if id(parameter) in hc_parameters else "base"
        decayed = id(parameter) in hc_decayed if kind == "hc" else name in base_decayed
        key = (kind if decayed else f"{kind}_no_decay", getattr(parameter, "device_mesh", None))
        members.setdefault(key, []).append(parameter)
    if not members:
        raise ValueError(
            "`model` must have trainable parameters, got one that is frozen throughout. Call requires_grad_() on what "
            "is to be trained."
        )
    return [
        {
            "name": name,
            "params": parameters,
            "lr": hc_lr if name.startswith("hc") else lr,
            "weight_decay": 0.0 if name.endswith("no_decay") else weight_decay,
        }
        for (name, _), parameters in sorted(members.items(), key=lambda member: GROUPS.index(member[0][0]))
    ]

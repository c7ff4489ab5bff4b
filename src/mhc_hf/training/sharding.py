"""FSDP2 for widened models: hyper-connections in groups of their own, which mixed precision leaves in float32."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ..modeling import HyperConnection
from ..modeling.layer import MHCDecoderLayer


def shard_widened_model(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    **fully_shard_kwargs: Any,
) -> nn.Module:
    """Apply torch's `fully_shard` to a widened model, in place: each site, each decoder layer, and the rest.

    FSDP2 gathers a group of parameters in one dtype. A layer that is sharded as one group would hand its sites
    parameters in `mp_policy.param_dtype`, and one with bf16 weights could not be sharded at all.

    Args:
        model: a widened model, bare or wrapped by PEFT, on the ranks' device or on meta; not sharded yet.
        mesh: as `fully_shard`'s; None takes all ranks.
        mp_policy: mixed precision of the base; None leaves every parameter in its own dtype. Gradients and all-gathers
            of hyper-connections are float32 under every policy.
        fully_shard_kwargs: passed to `fully_shard` (reshard_after_forward, offload_policy, ...).
    Returns:
        `model`. Make the optimizer afterwards: its parameters are new.
    Raises:
        ValueError: the model is not widened, or is sharded already.
    """
    layers = [module for module in model.modules() if isinstance(module, MHCDecoderLayer)]
    if not layers:
        raise ValueError(
            f"`model` must be a widened model, got a {type(model).__name__} without an MHCDecoderLayer. "
            "Widen it with MHCForCausalLM.from_base(model), or call fully_shard on its own layers."
        )
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(f"`model` must not be sharded yet, got a {type(model).__name__} with FSDP modules in it.")
    shared: dict[str, Any] = {"mesh": mesh, **fully_shard_kwargs}
    base_policy = mp_policy or MixedPrecisionPolicy()
    # neither what a site holds nor what it gets is cast; its arithmetic is float32 whatever the streams are
    site_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, HyperConnection):
                fully_shard(module, mp_policy=site_policy, **shared)
        fully_shard(layer, mp_policy=base_policy, **shared)
    fully_shard(model, mp_policy=base_policy, **shared)
    return model

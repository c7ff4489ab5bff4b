"""The norm that a branch begins with, where it is one that the kernels can apply in the pass that reads the streams.

Shapes: C channels of one stream.
"""

from typing import Any

from torch import Tensor, nn

from ..ops.functional import BranchNorm


def is_llama_norm(norm: nn.Module) -> bool:
    """Whether a module computes what LlamaRMSNorm does: x / rms(x) in float32, rounded, then times the weight.

    transformers writes that class out for every family under another name. The copies are known by their code: norms
    that differ in the least (1 + weight, weight before rounding) are other code.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    # of a class whose forward is no Python function there is nothing to compare
    ours, theirs = (getattr(kind.forward, "__code__", None) for kind in (LlamaRMSNorm, type(norm)))
    if ours is None or theirs is None or not hasattr(norm, "variance_epsilon"):
        return False
    return all(getattr(ours, part) == getattr(theirs, part) for part in ("co_code", "co_names", "co_consts"))


def take_norm(norm: nn.Module | None, x: Tensor) -> BranchNorm | None:
    """What a kernel needs of a norm for which `is_llama_norm` holds; None where the module must run by itself.

    That is so where somebody watches it or has replaced its forward, and where its weight is sharded, elsewhere, or of
    another dtype than `x`.
    """
    if norm is None or is_hooked(norm) or "forward" in norm.__dict__:
        return None
    weight: Any = norm.weight
    if not is_local(weight, x) or weight.dtype != x.dtype:
        return None
    eps: Any = norm.variance_epsilon
    return BranchNorm(weight, eps)


def is_local(parameter: Tensor, x: Tensor) -> bool:
    """Whether a parameter is there in whole, where `x` is: neither sharded nor offloaded nor quantised."""
    return type(parameter) in (Tensor, nn.Parameter) and parameter.device == x.device


def is_hooked(module: nn.Module) -> bool:
    """Whether anybody watches a module or one inside it."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(is_hooked(child) for child in module._modules.values() if child is not None)

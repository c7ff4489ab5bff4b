"""Equal streams: recognised, so that copies of one stream stay copies to the bit.

Shapes: T tokens, n streams, C channels of one stream.
"""

import torch
from torch import Tensor


def are_copies(x: Tensor) -> bool:
    """Whether the streams are equal, every one to every other. [T, n, C]

    A mix of copies is the copy then: sums of rounded products would drift apart. Only on a CPU, where the answer can be
    had without waiting for the device. The first token is asked first, so that streams that differ pay nothing.
    """
    if x.device.type != "cpu":
        return False
    parts = (x[:1], x[1:]) if len(x) > 1 else (x,)
    return all(torch.equal(part[:, 1:], part[:, :1].expand_as(part[:, 1:])) for part in parts)


def sum_weights(weights: Tensor, dim: int) -> Tensor:
    """Sum over one dimension; exactly 1 where it is so to rounding, as rows of H_res and a conversion's reads are."""
    total = weights.sum(dim)
    # n <= 8 addends below 1, each rounded once, and their sum
    return torch.where((total - 1).abs() <= 8 * torch.finfo(total.dtype).eps, 1.0, total)

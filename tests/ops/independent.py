"""A site from the paper's equations, in float64 and without a line of the package: what the kernels are judged by.

Shapes: T tokens, n streams, C channels. Eq. 9 as it stands, exp and divisions, which float64 allows at these logits.
"""

import torch


def pass_site(x, phi, bias, alpha, branch, *, num_iters=20, gain=None):
    """x' = H_res x + H_post branch(u), u = H_pre x, or its weighted RMSNorm. [..., n, C] float64"""
    assert x.dtype == torch.float64
    n, num_channels = x.shape[-2:]
    rms = torch.sqrt((x * x).sum((-2, -1), keepdim=True) / (n * num_channels) + 1e-6)
    rows = phi.reshape(-1, n, num_channels)  # [(n+2)*n, n, C]
    z = ((x / rms)[..., None, :, :] * rows).sum((-2, -1))  # [..., (n+2)*n]
    logits = z * torch.cat([alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(n * n)]) + bias
    h_pre, h_post = 1 / (1 + torch.exp(-logits[..., :n])), 2 / (1 + torch.exp(-logits[..., n : 2 * n]))
    m = torch.exp(logits[..., 2 * n :]).unflatten(-1, (n, n))
    for _ in range(num_iters):
        m = m / m.sum(-2, keepdim=True)  # columns: over the streams that receive
        m = m / m.sum(-1, keepdim=True)  # rows: over the streams that give
    u = (h_pre[..., None] * x).sum(-2)  # [..., C]
    if gain is not None:
        u = gain * u / torch.sqrt((u * u).sum(-1, keepdim=True) / num_channels + 1e-6)
    y = branch(u)
    mixed = (m[..., :, :, None] * x[..., None, :, :]).sum(-2)  # into i, from j
    return mixed + h_post[..., None] * y[..., None, :]

"""Numbers that say what streams and maps are doing. Plain functions on tensors; callers bring float64.

Shapes: L sites in the order they run, T tokens, n streams, C channels of one stream; `...` is any leading shape.
Convention: h_res[..., i, j] carries input stream j into output stream i, so forward is along rows.
"""

import torch
from torch import Tensor


def forward_gain(h_res: Tensor) -> Tensor:
    """By how much a map can enlarge a signal: max over rows of |row sum|, the paper's Amax. [..., n, n] -> [...]"""
    return h_res.sum(-1).abs().amax(-1)


def backward_gain(h_res: Tensor) -> Tensor:
    """By how much a map can enlarge a gradient: max over columns of |column sum|. [..., n, n] -> [...]"""
    return h_res.sum(-2).abs().amax(-1)


def log_column_sum(h_res: Tensor) -> Tensor:
    """max over columns of |log |column sum||; it also sees columns that fade. [..., n, n] -> [...]"""
    sums = h_res.sum(-2).abs()
    # a column that is zero altogether must still be a number that can be logged
    return sums.clamp_min(torch.finfo(sums.dtype).tiny).log().abs().amax(-1)


def distance_from_doubly_stochastic(h_res: Tensor) -> Tensor:
    """The largest breach of the rule: of |row sum - 1|, |column sum - 1| and -(entry). [..., n, n] -> [...]"""
    rows = (h_res.sum(-1) - 1).abs().amax(-1)
    columns = (h_res.sum(-2) - 1).abs().amax(-1)
    return torch.maximum(torch.maximum(rows, columns), -h_res.amin((-2, -1)))


def distance_from_identity(h_res: Tensor) -> Tensor:
    """Frobenius norm of H_res - I. [..., n, n] -> [...]"""
    identity = torch.eye(h_res.shape[-1], dtype=h_res.dtype, device=h_res.device)
    return torch.linalg.matrix_norm(h_res - identity)


def liveness(h_res: Tensor) -> Tensor:
    """max over entries of h (1 - h), to which the gradients of a softmax are proportional; 0 for a permutation.

    A diagonal lead of 4 in the logits leaves 4.9e-2 at n = 4, a lead of 8 leaves 1.0e-3. [..., n, n] -> [...]
    """
    return (h_res * (1 - h_res)).amax((-2, -1))


def entropy(weights: Tensor) -> Tensor:
    """Nats, of weights made to sum to 1: log n where streams count alike, 0 where one does. [..., n] -> [...]"""
    shares = weights.abs()
    shares = shares / shares.sum(-1, keepdim=True)
    return -torch.special.xlogy(shares, shares).sum(-1)


def compose_from_first(h_res: Tensor) -> Tensor:
    """H_k ... H_1 for every site k: what has become of the signal when it leaves site k. [L, ..., n, n], same shape"""
    products = [h_res[0]]
    for site in h_res[1:]:
        products.append(site @ products[-1])
    return torch.stack(products)


def compose_to_last(h_res: Tensor) -> Tensor:
    """H_L ... H_k for every site k: what the gradient has gone through where it leaves site k. Same shape."""
    products = [h_res[-1]]
    for site in h_res[:-1].flip(0):
        products.append(products[-1] @ site)
    return torch.stack(products[::-1])


def squared_deviations(x: Tensor) -> Tensor:
    """|x_i - mean over streams|^2 summed over streams and channels; exactly 0 for equal streams. [T, n, C] -> [T]"""
    # from the first stream on, since the mean of n equal numbers may differ from them by a rounding
    differences = x - x[:, :1]
    return (differences - differences.mean(1, keepdim=True)).square().sum((1, 2))


def gram(x: Tensor) -> Tensor:
    """<x_i, x_j> over channels. [T, n, C] -> [T, n, n]"""
    return x @ x.mT


def cosines(gram: Tensor) -> Tensor:
    """Cosine between each two streams; 0 where a stream is zero. [T, n, n] -> [T, n, n]"""
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    products = norms[..., :, None] * norms[..., None, :]
    return torch.where(products > 0, gram / products, 0)


def pairwise_cosine(cosines: Tensor) -> Tensor:
    """Mean over pairs of different streams. [..., n, n] -> [...]"""
    n = cosines.shape[-1]
    return (cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))


def effective_streams(gram: Tensor) -> Tensor:
    """(sum of eigenvalues)^2 / (sum of their squares) of the Gram matrix: 1 for copies, n for orthogonal streams of one
    length. [..., n, n] -> [...]"""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    squares = gram.square().sum((-2, -1))
    return torch.where(squares > 0, trace.square() / squares, 1)

"""The exact gradients of attention and of its adapters in closed form: the reference, quadratic in the length.

One head, ``P = softmax(scale Q K^T)`` (causal or not), ``O = P V``, ``G = dl/dO``; arXiv 2406.03136 writes f, q, p for these:

    q = G V^T,   p_1 = P o q,   p_2 = diag(rho) P with rho_i = sum_j p_1,ij = G_i . O_i,   T = p_1 - p_2 = dl/dS
    dQ = scale T K,   dK = scale T^T Q,   dV = P^T G

A causal mask changes nothing here, since ``P`` is 0 where it forbids. With ``Q = X (W + s B A)^T`` the factors get
``dB = s dQ^T (X A^T)`` and ``dA = s (dQ B)^T X``, and likewise for K and V; the gradient of ``W`` itself is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from rankloom.errors import AttentionError
from rankloom.kernels.lowrank import Linear

__all__ = ["attention_gradients", "attention_weights", "factor_gradients", "lora_gradients"]


def attention_weights(q: Tensor, k: Tensor, *, scale: float, causal: bool) -> Tensor:
    """``P`` (g, L, L) of ``q`` (g, L, d) and ``k`` (L, d): the rows of softmax attention, dense."""
    logits = scale * q @ k.mT
    if causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits.softmax(-1)


def attention_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``dQ`` (g, L, d), ``dK`` (L, d) and ``dV`` (L, d_v) for ``grad`` = G (g, L, d_v); ``g`` query heads share the key head.

    Raises ``AttentionError`` for shapes that do not match.
    """
    if q.dim() != 3 or grad.shape != (*q.shape[:2], v.shape[-1]) or k.shape != (len(v), q.shape[-1]):
        raise AttentionError(
            f"exact gradients take q (g, L, d), k (L, d), v (L, d_v) and the output's gradient (g, L, d_v); "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} and {tuple(grad.shape)}"
        )
    p = attention_weights(q, k, scale=scale, causal=causal)
    p1 = p * (grad @ v.mT)
    t = p1 - p1.sum(-1, keepdim=True) * p
    return scale * t @ k, scale * (t.mT @ q).sum(0), (p.mT @ grad).sum(0)


def factor_gradients(x: Tensor, linear: Linear, grad: Tensor) -> tuple[Tensor, Tensor]:
    """``dA`` (r, D) and ``dB`` (d, r) of a low-rank linear on ``x`` (L, D) whose output has the gradient ``grad`` (L, d)."""
    return linear.scale * (grad @ linear.b).mT @ x, linear.scale * grad.mT @ (x @ linear.a.mT)


def lora_gradients(
    x: Tensor,
    linears: Mapping[str, Linear],
    loss_gradient: Callable[[Tensor], Tensor],
    *,
    scale: float,
    causal: bool,
    adapted: Collection[str] = ("q", "v"),
) -> dict[str, tuple[Tensor, Tensor]]:
    """``(dA, dB)`` of every adapted projection of one head: four gradients for {q, v} (partial), six for {q, k, v} (full).

    ``x`` (L, D); ``linears`` maps "q", "k" and "v" to their projections; ``loss_gradient`` gives ``dl/dO`` (L, d_v) from ``O``:
    ``O - Y`` for the paper's loss ``|O - Y|_F^2 / 2``. Raises ``AttentionError`` for other names.
    """
    if set(linears) != {"q", "k", "v"} or not set(adapted) <= {"q", "k", "v"}:
        raise AttentionError(
            f"a head has the projections q, k and v; got {sorted(linears)} with {sorted(adapted)} adapted"
        )
    q, k, v = (_project(x, linears[name]) for name in "qkv")
    grad = loss_gradient(attention_weights(q[None], k, scale=scale, causal=causal)[0] @ v)
    dq, dk, dv = attention_gradients(q[None], k, v, grad[None], scale=scale, causal=causal)
    grads = {"q": dq[0], "k": dk, "v": dv}
    return {name: factor_gradients(x, linears[name], grads[name]) for name in adapted}


def _project(x: Tensor, linear: Linear) -> Tensor:
    y = x @ (linear.weight + linear.scale * linear.b @ linear.a).mT
    return y if linear.bias is None else y + linear.bias

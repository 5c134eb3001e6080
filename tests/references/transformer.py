"""A transformer and its optimizer in float64, number by number, as the papers print them."""

import itertools
import math
from typing import Any

import numpy as np


def layer_norm(x, scale):
    """(x - mean) / sqrt(var + 1e-6) * scale over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def gelu(x):
    """Phi(x) x."""
    return x * np.vectorize(lambda v: (1 + math.erf(v / math.sqrt(2))) / 2)(x)


def forward(params, tokens, *, depth, num_heads, qk_norm):
    """(logits [B, T, C], what enters the final norm, [(query, key) of each block])."""
    p = _tree(params)
    h = p["token_embedding"][tokens] + p["position_embedding"][None, : tokens.shape[1]]
    seen = []
    for i in range(depth):
        block = p[f"block_{i}"]
        x = layer_norm(h, block["attention_norm"]["scale"])
        gathered, query, key = attention(x, block["attention"], num_heads, qk_norm)
        seen.append((query, key))
        h = h + gathered
        x = layer_norm(h, block["mlp_norm"]["scale"])
        h = h + gelu(x @ block["mlp"]["up"]["kernel"]) @ block["mlp"]["down"]["kernel"]
    return layer_norm(h, p["final_norm"]["scale"]) @ p["head"]["kernel"], h, seen


def attention(x, p, num_heads, qk_norm):
    """What is gathered, and the queries and keys [B, T, H, K], a place at a time."""
    heads = (*x.shape[:2], num_heads, -1)
    query, key, value = ((x @ p[n]["kernel"]).reshape(heads) for n in ("query", "key", "value"))
    if qk_norm:
        query = layer_norm(query, p["query_norm"]["scale"])
        key = layer_norm(key, p["key_norm"]["scale"])
    out = np.zeros_like(value)
    for (b, h, t), logits in each_place(query, key):
        share = np.exp(logits - logits.max())
        out[b, t, h] = (share / share.sum()) @ value[b, : t + 1, h]
    return out.reshape(x.shape) @ p["out"]["kernel"], query, key


def each_place(query, key):
    """((example, head, place), logits of what it may see), one after the other."""
    b, t, h, k = query.shape
    for place in itertools.product(range(b), range(h), range(t)):
        e, head, at = place
        seen = [query[e, at, head] @ key[e, s, head] / math.sqrt(k) for s in range(at + 1)]
        yield place, np.array(seen)


def max_logit(query, key):
    """Over everything that is attended to."""
    return max(logits.max() for _, logits in each_place(query, key))


def entropy(query, key):
    """Mean over examples, heads and places, in nats."""
    found = []
    for _, logits in each_place(query, key):
        p = np.exp(logits - logits.max())
        p /= p.sum()
        found.append(-sum(v * math.log(v) for v in p if v > 0))
    return np.mean(found)


def log_z(logits):
    """log sum_c exp(logit_c)."""
    top = logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]


def loss(params, tokens, labels, **shape):
    """Mean cross-entropy."""
    logits, _, _ = forward(params, tokens, **shape)
    chosen = np.take_along_axis(logits, labels[..., None].astype(int), axis=-1)[..., 0]
    return (log_z(logits) - chosen).mean()


def delta(gradients, *, momentum, second_moment, epsilon):
    """Adam's update before the learning rate, from all gradients [T, ...] so far."""
    t = len(gradients)
    v = sum((1 - momentum) * momentum ** (t - 1 - i) * g for i, g in enumerate(gradients))
    u = sum(
        (1 - second_moment) * second_moment ** (t - 1 - i) * g**2 for i, g in enumerate(gradients)
    )
    return (v / (1 - momentum**t)) / (np.sqrt(u / (1 - second_moment**t)) + epsilon)


def trained(
    w, gradient, num_steps, *, rule, learning_rate, momentum, weight_decay, second_moment=0.0,
    epsilon=0.0, nesterov=False, factor=lambda t: 1.0, clip_norm=math.inf, scale=1.0,
):  # fmt: skip
    """Every iterate of w <- w - s_t (rate * scale * Delta + lambda w), gradients cut to a norm."""
    w, m, seen, out = np.array(w, np.float64), np.zeros(len(w)), [], []
    for t in range(num_steps):
        g = gradient(w)
        seen.append(g * min(1.0, clip_norm / np.linalg.norm(g)))
        if rule == "sgd":
            m = momentum * m + seen[-1]
            moved = seen[-1] + momentum * m if nesterov else m
        else:
            moved = delta(seen, momentum=momentum, second_moment=second_moment, epsilon=epsilon)
        w = w - factor(t) * (learning_rate * scale * moved + weight_decay * w)
        out.append(w)
    return np.stack(out)


def _tree(params) -> Any:
    if hasattr(params, "items"):
        return {name: _tree(value) for name, value in params.items()}
    return np.asarray(params, np.float64)

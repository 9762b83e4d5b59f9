"""What the tests share: filled caches, and attention by its definition."""

import torch

import turboquant
from turboquant import PagedCache


def filled(device, batch, context, kv_heads=2, head_size=128, bits=(4, 4), page_size=64, dtype=torch.float16, **options):
    """A cache of `batch` sequences of `context` tokens in shuffled pages, its page table, lengths, and the rows that were
    written [2, batch, context, kv_heads, head_size]."""
    pages = -(-context // page_size)
    cache = PagedCache(batch * pages + 1, kv_heads, head_size, *bits, page_size, device=device, **options)
    table = torch.randperm(batch * pages + 1)[: batch * pages].to(torch.int32).view(batch, pages).to(device)
    rows = torch.randn(2, batch, context, kv_heads, head_size).to(dtype).to(device)
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    turboquant.append(cache, rows[0], rows[1], table, lengths)
    assert lengths.tolist() == [context] * batch
    return cache, table, lengths, rows


def decoded(cache, table, context):
    """Keys and values [batch, context, kv_heads, head_size] as the codes have them."""
    positions = torch.arange(context, device=cache.device).expand(table.shape[0], context)
    k, v = turboquant.decode(cache, cache.slots_of(table, positions).flatten())
    shape = (table.shape[0], context, cache.kv_heads, cache.head_size)
    return k.view(shape), v.view(shape)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def attention(q, keys, values, lengths=None, *, exact=None, sinks=0, window=0, scale=None, softcap=0.0, causal=True,
              sliding_window=0, sink_logits=None):
    """Attention by its definition, in float64 on the CPU. q [batch, q_len, heads, d]; keys, values [batch, tokens,
    kv_heads, d]; exact: the same two, which count for the first `sinks` and the latest `window` tokens of a query."""
    q, keys, values = (x.double().cpu() for x in (q, keys, values))
    batch, q_len, heads, d = q.shape
    group = heads // keys.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        length = keys.shape[1] if lengths is None else int(lengths[b])
        token = torch.arange(length)
        end = (length - q_len + 1 + torch.arange(q_len) if causal else torch.full((q_len,), length))[:, None]
        seen = token < end  # [query, token]
        if sliding_window > 0:
            seen &= token >= end - sliding_window
        exactly = torch.zeros_like(seen) if exact is None else (token < sinks) | (token >= end - window)

        def of_heads(rows):
            return rows[b, :length].double().cpu().repeat_interleave(group, 1)

        def scores_of(k):
            return torch.einsum("ihd,thd->iht", q[b], of_heads(k)) * (d ** -0.5 if scale is None else scale)

        scores = scores_of(keys)
        if exact is not None:
            scores = torch.where(exactly[:, None], scores_of(exact[0]), scores)
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        sink = torch.full((q_len, heads, 1), -torch.inf, dtype=torch.float64)
        if sink_logits is not None:
            sink[:] = sink_logits.double().cpu()[:, None]
        p = torch.softmax(torch.cat([scores, sink], 2), 2)[..., :length]
        p = torch.where(seen.any(1)[:, None, None], p, torch.zeros_like(p))  # a query that sees nothing
        out[b] = torch.einsum("iht,thd->ihd", p * ~exactly[:, None], of_heads(values))
        if exact is not None:
            out[b] += torch.einsum("iht,thd->ihd", p * exactly[:, None], of_heads(exact[1]))
    return out

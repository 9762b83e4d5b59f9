"""TurboQuant for PyTorch: a compressed KV cache on CPUs and NVIDIA GPUs, and attention over its codes (docs/python.md)."""

from .paged import PagedCache


def encode(cache, keys, values, slots, exact_rows=None):
    """Quantises rows [tokens, kv_heads, head_size] into slots of a PagedCache: PagedCache.write."""
    cache.write(keys, values, slots, exact_rows)


def decode(cache, slots, dtype=None):
    """Keys and values of slots as the codes say: PagedCache.read."""
    return cache.read(slots) if dtype is None else cache.read(slots, dtype)


def append(cache, keys, values, page_table, lengths, sequence_slots=None):
    """Writes the next tokens of every sequence: PagedCache.append."""
    cache.append(keys, values, page_table, lengths, sequence_slots)


def attend(cache, q, page_table, lengths, **options):
    """Attention over codes: PagedCache.attend."""
    return cache.attend(q, page_table, lengths, **options)


def prefill(cache, q, page_table, lengths, **options):
    """Attention of many queries: PagedCache.prefill."""
    return cache.prefill(q, page_table, lengths, **options)


__all__ = ["PagedCache", "append", "attend", "decode", "encode", "prefill"]

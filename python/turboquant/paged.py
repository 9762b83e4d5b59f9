"""The paged cache of one layer, in host memory or on a GPU, and the operators over it."""

import math

import torch

from . import _cpu, _cuda

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_ENGINES = {"cpu": _cpu.Engine, "cuda": _cuda.Engine}


def _need(condition, message):
    if not condition:
        raise ValueError(message)


_LARGEST_HALF = 65504.0
_LEAST_FACTOR = 2.0**-14  # the smallest normal float16


class PagedCache:
    """Keys and values of one layer, compressed, in `n_pages` pages of `page_size` tokens, on `device`: "cpu" or a CUDA
    device. All tensors of its calls are on that device.

    Slot s is token s % page_size of page s // page_size. With `sinks` or `window`, `sequences` sequences keep their
    first `sinks` and latest `window` tokens exact besides (float16); `q_len` is the longest query that `attend` will
    get (`prefill` takes longer ones: queries whose window has left the ring see codes there).

    Conditioning of the keys: mu [kv_heads, head_size] is taken off them, lambda_ [kv_heads, head_size] multiplies them
    (docs/cuda.md); both are rounded to float16. On a GPU mu may be [blocks, kv_heads, head_size], a mean for every 256 positions (the last for later ones).

    What a device serves: docs/python.md. A shape that it does not raises ValueError.
    """

    def __init__(self, n_pages, kv_heads, head_size, key_bits=4, value_bits=4, page_size=64, *, device="cuda",
                 mu=None, lambda_=None, sinks=0, window=0, sequences=0, q_len=1):
        self.device = torch.device(device)
        _need(self.device.type in _ENGINES, f"device: {self.device}, expected a CPU or a CUDA device")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.n_pages, self.page_size = n_pages, page_size
        self.kv_heads, self.head_size = kv_heads, head_size
        self.key_bits, self.value_bits = key_bits, value_bits
        self.sinks, self.window = sinks, window
        self.ring = window + q_len - 1 if window > 0 else 0
        self.mu_blocks = mu.shape[0] if mu is not None and mu.dim() == 3 else 0
        conditioning = {"mu": mu, "lambda_": lambda_}
        for name, x in conditioning.items():
            if x is not None:
                _need(tuple(x.shape[1:] if name == "mu" and x.dim() == 3 else x.shape) == (kv_heads, head_size),
                      f"{name}: shape {tuple(x.shape)}, expected {(kv_heads, head_size)}"
                      f"{' or [blocks, ...] of that' if name == 'mu' else ''}")
                # As the stored format has them (docs/format.md), so that codes are the same on every device.
                least = _LEAST_FACTOR if name == "lambda_" else -_LARGEST_HALF
                x = x.to(torch.float32).clamp(least, _LARGEST_HALF).to(torch.float16)
                conditioning[name] = x.to(device=self.device, dtype=torch.float32).contiguous()
        _need(not self.keeps_exact or sequences > 0,
              "sequences: a cache with sinks or a window needs to know how many there may be")
        self._engine = _ENGINES[self.device.type](self, *conditioning.values(), sequences)
        self.page_bytes = self._engine.page_bytes

    @property
    def keeps_exact(self):
        """Whether some rows are kept exact besides their codes."""
        return self.sinks > 0 or self.window > 0

    @property
    def pages(self):
        """The pages as bytes, uint8 [n_pages, page_bytes], of a cache on a GPU (src/cuda/gpu_layout.h)."""
        _need(self.device.type == "cuda", "pages: a cache in host memory has no tensor of them")
        return self._engine.pages

    @property
    def kv_bytes(self):
        """Bytes of all pages and exact rows. In host memory pages that were never written to are reserved only."""
        return self.n_pages * self.page_bytes + self._engine.exact_bytes

    @property
    def bytes_per_token(self):
        return self.page_bytes / self.page_size

    def _tensor(self, name, x):
        _need(isinstance(x, torch.Tensor) and x.device.type == self.device.type,
              f"{name}: not a {self._engine.kind} tensor")

    def _rows(self, name, x):
        self._tensor(name, x)
        _need(x.dim() == 3 and tuple(x.shape[1:]) == (self.kv_heads, self.head_size),
              f"{name}: shape {tuple(x.shape)}, expected [tokens, {self.kv_heads}, {self.head_size}]")
        _need(x.dtype in _TYPES, f"{name}: {x.dtype}, expected float32, float16 or bfloat16")
        _need(x.stride(2) == 1, f"{name}: the last dimension is not contiguous")

    def _index(self, name, x, dtype, shape):
        self._tensor(name, x)
        _need(x.dtype == dtype, f"{name}: {x.dtype}, expected {dtype}")
        _need(tuple(x.shape) == tuple(shape), f"{name}: shape {tuple(x.shape)}, expected {tuple(shape)}")
        _need(x.is_contiguous(), f"{name}: not contiguous")

    def exact_rows(self, sequence, position, length):
        """Where `write` keeps tokens exact: for each token its sequence, its position and that sequence's length after
        the write (int64 tensors [tokens]); -1 where a token is not kept."""
        _need(self.keeps_exact, "exact_rows: this cache keeps no rows exact")
        ring = max(self.ring, 1)
        entry = torch.where(position < self.sinks, position, self.sinks + (position - self.sinks) % ring)
        kept = (position < self.sinks) | (position >= length - self.ring)
        return torch.where(kept, sequence * (self.sinks + self.ring) + entry, -1)

    def _positions(self, positions, n):
        """They themselves, where there is a mean for every 256 positions."""
        if self.mu_blocks == 0:
            return None
        _need(positions is not None, "positions: a cache with a mean for every 256 positions needs them")
        self._index("positions", positions, torch.int64, (n,))
        return positions

    def write(self, keys, values, slots, exact_rows=None, positions=None):
        """Quantises rows [tokens, kv_heads, head_size] into slots (int64 [tokens], no slot twice; -1: left out).
        positions: int64 [tokens], of each in its sequence, where mu has blocks."""
        self._rows("keys", keys)
        self._rows("values", values)
        _need(values.shape == keys.shape and values.dtype == keys.dtype,
              f"values: shape {tuple(values.shape)} {values.dtype}, expected those of keys, {tuple(keys.shape)} "
              f"{keys.dtype}")
        n = keys.shape[0]
        self._index("slots", slots, torch.int64, (n,))
        if exact_rows is not None:
            _need(self.keeps_exact, "exact_rows: this cache keeps no rows exact")
            self._index("exact_rows", exact_rows, torch.int64, (n,))
        self._engine.write(keys, values, slots, exact_rows, self._positions(positions, n))

    def slots_of(self, page_table, positions):
        """Slots (int64) of positions [batch, n] of the sequences that page_table (int32 [batch, pages]) describes;
        -1 where a position is negative."""
        page = torch.gather(page_table.long(), 1, positions.clamp(min=0) // self.page_size)
        return torch.where(positions >= 0, page * self.page_size + positions % self.page_size, -1)

    def append(self, keys, values, page_table, lengths, sequence_slots=None):
        """Writes keys and values [batch, n, kv_heads, head_size] behind each sequence's lengths[b] tokens (int32
        [batch], before the call), in the pages that page_table names. Adds n to lengths in place. sequence_slots
        (int32 [batch], as for `attend`): whose exact rows they are; None: sequence b's are slot b."""
        _need(keys.dim() == 4, f"keys: shape {tuple(keys.shape)}, expected [batch, n, kv_heads, head_size]")
        _need(values.shape == keys.shape, f"values: shape {tuple(values.shape)}, expected {tuple(keys.shape)}")
        batch, n = keys.shape[:2]
        _need(page_table.dim() == 2, f"page_table: shape {tuple(page_table.shape)}, expected [batch, pages]")
        self._index("page_table", page_table, torch.int32, (batch, page_table.shape[1]))
        self._index("lengths", lengths, torch.int32, (batch,))
        positions = lengths.long()[:, None] + torch.arange(n, device=self.device)
        slots = self.slots_of(page_table, positions).flatten()
        exact = None
        if self.keeps_exact:
            if sequence_slots is None:
                sequence_slots = torch.arange(batch, dtype=torch.int32, device=self.device)
            self._index("sequence_slots", sequence_slots, torch.int32, (batch,))
            sequence = sequence_slots.long()[:, None].expand(batch, n)
            exact = self.exact_rows(sequence, positions, lengths.long()[:, None] + n).flatten().contiguous()
        self.write(keys.flatten(0, 1), values.flatten(0, 1), slots.contiguous(), exact, positions.flatten())
        lengths += n

    def read(self, slots, dtype=torch.float32, rotated=False, positions=None):
        """Decoded keys and values of slots (int64 [n]; negative: zeros): two tensors [n, kv_heads, head_size]. rotated:
        in the codes' rotated basis, conditioning not undone. positions: as written, where mu has blocks (and rotated is
        false)."""
        self._index("slots", slots, torch.int64, (slots.numel(),))
        _need(dtype in _TYPES, f"dtype: {dtype}, expected float32, float16 or bfloat16")
        positions = None if rotated else self._positions(positions, slots.numel())
        keys, values = self._engine.read(slots, dtype, rotated, positions)
        return keys, values

    def codes(self, slots):
        """Stored codes (uint8 [2, n, kv_heads, head_size]) and scales (float16 [2, n, kv_heads]) of slots (int64 [n]).
        A head size whose rotation takes several blocks (CPU only) has as many scales, in a last dimension."""
        self._index("slots", slots, torch.int64, (slots.numel(),))
        return self._engine.codes(slots)

    def _attention(self, q, page_table, lengths, scale, softcap, causal, sliding_window, sink_logits, sequence_slots, out):
        """The arguments of attention, checked, as the engines take them."""
        self._tensor("q", q)
        _need(q.dim() == 4 and q.shape[3] == self.head_size,
              f"q: shape {tuple(q.shape)}, expected [batch, q_len, heads, {self.head_size}]")
        _need(q.dtype in _TYPES, f"q: {q.dtype}, expected float32, float16 or bfloat16")
        _need(q.stride(3) == 1, "q: the last dimension is not contiguous")
        batch, _, heads, _ = q.shape
        _need(page_table.dim() == 2, f"page_table: shape {tuple(page_table.shape)}, expected [batch, pages]")
        self._index("page_table", page_table, torch.int32, (batch, page_table.shape[1]))
        self._index("lengths", lengths, torch.int32, (batch,))
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._tensor("out", out)
        _need(out.shape == q.shape and out.dtype == q.dtype and out.stride(3) == 1,
              f"out: shape {tuple(out.shape)} {out.dtype}, expected those of q, {tuple(q.shape)} {q.dtype}")
        if self.keeps_exact:
            _need(sequence_slots is not None, "sequence_slots: a cache with exact rows needs them")
            self._index("sequence_slots", sequence_slots, torch.int32, (batch,))
        if sink_logits is not None:
            self._index("sink_logits", sink_logits, torch.float32, (heads,))
        scale = 1 / math.sqrt(self.head_size) if scale is None else scale
        return (q, out, page_table, lengths, scale, softcap, causal, sliding_window, sink_logits,
                sequence_slots if self.keeps_exact else None)

    def attend(self, q, page_table, lengths, *, scale=None, softcap=0.0, causal=True, sliding_window=0,
               sink_logits=None, sequence_slots=None, out=None, n_blocks=0):
        """Attention of q [batch, q_len, heads, head_size] over each sequence's first lengths[b] tokens, its queries'
        own included. q_len: 1..16 on a GPU, any number on a CPU. page_table: int32 [batch, pages]; lengths: int32
        [batch]; sequence_slots: int32 [batch], where rows are kept exact; sink_logits: float32 [heads]. Gives out
        [batch, q_len, heads, head_size] of q's type; a query that sees no token gets zeros.

        scale: 1/sqrt(head_size) unless given. softcap > 0: score = softcap * tanh(score / softcap). sliding_window > 0:
        only the latest so many tokens up to the query's own. causal: query i sees tokens 0..length - q_len + i.
        n_blocks: thread blocks on a GPU, 0 for as many as fill it.

        On a GPU it captures into a CUDA graph once it has run with the same shapes (the first call allocates the
        workspace). On a CPU it runs on PyTorch's threads, in float32 whatever q's type."""
        call = self._attention(q, page_table, lengths, scale, softcap, causal, sliding_window, sink_logits, sequence_slots,
                               out)
        self._engine.attend(call, n_blocks)
        return call[1]

    def prefill(self, q, page_table, lengths, *, max_length=None, scale=None, softcap=0.0, causal=True,
                sliding_window=0, sink_logits=None, sequence_slots=None, out=None, workspace_bytes=1 << 30):
        """Attention as attend's, of any number of queries. Queries before the sequence's first token give zeros (left
        padding). Rows of a query's window that the ring of exact rows no longer holds count by their codes.

        On a GPU the tokens are decoded once into float16 tiles, in at most workspace_bytes of memory (or what one KV
        head of one sequence takes), and a flash kernel runs over those; max_length: no sequence is longer (else its
        output is NaN), by default all that page_table has pages for. On a CPU the codes are attended to as they are:
        workspace_bytes is not needed, a sequence longer than max_length is a ValueError."""
        call = self._attention(q, page_table, lengths, scale, softcap, causal, sliding_window, sink_logits, sequence_slots,
                               out)
        self._engine.prefill(call, page_table.shape[1] * self.page_size if max_length is None else max_length,
                             workspace_bytes)
        return call[1]

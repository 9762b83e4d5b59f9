"""The paged cache of one layer on a GPU, and the operators over it."""

import ctypes
import math

import torch

from . import _library

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _need(condition, message):
    if not condition:
        raise ValueError(message)


def _rows(name, x, kv_heads, head_size):
    _need(isinstance(x, torch.Tensor) and x.is_cuda, f"{name}: not a CUDA tensor")
    _need(x.dim() == 3 and tuple(x.shape[1:]) == (kv_heads, head_size),
          f"{name}: shape {tuple(x.shape)}, expected [tokens, {kv_heads}, {head_size}]")
    _need(x.dtype in _TYPES, f"{name}: {x.dtype}, expected float32, float16 or bfloat16")
    _need(x.stride(2) == 1, f"{name}: the last dimension is not contiguous")


def _index(name, x, dtype, shape):
    _need(isinstance(x, torch.Tensor) and x.is_cuda, f"{name}: not a CUDA tensor")
    _need(x.dtype == dtype, f"{name}: {x.dtype}, expected {dtype}")
    _need(tuple(x.shape) == tuple(shape), f"{name}: shape {tuple(x.shape)}, expected {tuple(shape)}")
    _need(x.is_contiguous(), f"{name}: not contiguous")


def _stream():
    return torch.cuda.current_stream().cuda_stream


class PagedCache:
    """Keys and values of one layer, compressed, in `n_pages` pages of `page_size` tokens.

    Slot s is token s % page_size of page s // page_size. With `sinks` or `window`, `sequences` sequences keep their
    first `sinks` and latest `window` tokens exact besides (float16, in the rotated basis); `q_len` is the longest query
    that `attend` will get (`prefill` takes longer ones: queries whose window has left the ring see codes there).
    mu [kv_heads, head_size] or, for every 256 positions, [blocks, kv_heads, head_size] is taken off keys, lambda_
    [kv_heads, head_size] multiplies them (docs/cuda.md).
    """

    def __init__(self, n_pages, kv_heads, head_size, key_bits=4, value_bits=4, page_size=64, *, device="cuda",
                 mu=None, lambda_=None, sinks=0, window=0, sequences=0, q_len=1):
        library = _library.load()
        self.n_pages, self.page_size = n_pages, page_size
        self.kv_heads, self.head_size = kv_heads, head_size
        self.key_bits, self.value_bits = key_bits, value_bits
        self.sinks, self.window = sinks, window
        self.ring = window + q_len - 1 if window > 0 else 0
        c = self._struct = _library.Cache()
        c.struct_size = ctypes.sizeof(c)
        c.n_pages, c.page_size, c.kv_heads, c.head_size = n_pages, page_size, kv_heads, head_size
        c.key_bits, c.value_bits = key_bits, value_bits
        self.page_bytes = library.tq_cuda_page_bytes(c)
        _need(self.page_bytes > 0,
              f"no such cache: head_size {head_size} (64, 128, 256), page_size {page_size} (16, 32, 64, 128, 256), "
              f"key_bits {key_bits} and value_bits {value_bits} (2, 3, 4, 8)")
        self.pages = torch.zeros(n_pages, self.page_bytes, dtype=torch.uint8, device=device)
        c.pages = self.pages.data_ptr()
        self.mu_blocks = c.mu_blocks = mu.shape[0] if mu is not None and mu.dim() == 3 else 0
        for name, x in (("mu", mu), ("lambda_", lambda_)):
            if x is not None:
                x = x.to(device=device, dtype=torch.float32).contiguous()
                _need(tuple(x.shape[1:] if name == "mu" and x.dim() == 3 else x.shape) == (kv_heads, head_size),
                      f"{name}: shape {tuple(x.shape)}, expected {(kv_heads, head_size)}"
                      f"{' or [blocks, ...] of that' if name == 'mu' else ''}")
                setattr(c, name, x.data_ptr())
            setattr(self, name, x)
        self.exact = None
        if sinks > 0 or window > 0:
            _need(sequences > 0, "sequences: a cache with sinks or a window needs to know how many there may be")
            self.exact = torch.zeros(2, sequences, sinks + self.ring, kv_heads, head_size, dtype=torch.float16,
                                     device=device)
            c.exact_keys, c.exact_values = self.exact[0].data_ptr(), self.exact[1].data_ptr()
            c.sinks, c.ring, c.window = sinks, self.ring, window
        self._workspaces = {}

    @property
    def device(self):
        return self.pages.device

    @property
    def bytes_per_token(self):
        return self.page_bytes / self.page_size

    def exact_rows(self, sequence, position, length):
        """Where `write` keeps tokens exact: for each token its sequence, its position and that sequence's length after
        the write (int64 tensors [tokens]); -1 where a token is not kept."""
        _need(self.exact is not None, "exact_rows: this cache keeps no rows exact")
        ring = max(self.ring, 1)
        entry = torch.where(position < self.sinks, position, self.sinks + (position - self.sinks) % ring)
        kept = (position < self.sinks) | (position >= length - self.ring)
        return torch.where(kept, sequence * (self.sinks + self.ring) + entry, -1)

    def _positions(self, positions, n):
        """Their address, where there is a mean for every 256 positions."""
        if self.mu_blocks == 0:
            return None
        _need(positions is not None, "positions: a cache with a mean for every 256 positions needs them")
        _index("positions", positions, torch.int64, (n,))
        return positions.data_ptr()

    def write(self, keys, values, slots, exact_rows=None, positions=None):
        """Quantises rows [tokens, kv_heads, head_size] into slots (int64 [tokens], no slot twice; -1: left out).
        positions: int64 [tokens], of each in its sequence, where mu has blocks."""
        _rows("keys", keys, self.kv_heads, self.head_size)
        _rows("values", values, self.kv_heads, self.head_size)
        _need(values.shape == keys.shape and values.dtype == keys.dtype,
              f"values: shape {tuple(values.shape)} {values.dtype}, expected those of keys, {tuple(keys.shape)} "
              f"{keys.dtype}")
        n = keys.shape[0]
        _index("slots", slots, torch.int64, (n,))
        if exact_rows is not None:
            _index("exact_rows", exact_rows, torch.int64, (n,))
        w = _library.Write()
        w.struct_size = ctypes.sizeof(w)
        w.keys, w.values, w.type = keys.data_ptr(), values.data_ptr(), _TYPES[keys.dtype]
        w.key_stride, w.key_head_stride = keys.stride(0), keys.stride(1)
        w.value_stride, w.value_head_stride = values.stride(0), values.stride(1)
        w.n, w.slots = n, slots.data_ptr()
        w.exact_rows = None if exact_rows is None else exact_rows.data_ptr()
        w.positions = self._positions(positions, n)
        with torch.cuda.device(self.device):
            _library.check(_library.load().tq_cuda_encode(self._struct, w, _stream()))

    def slots_of(self, page_table, positions):
        """Slots (int64) of positions [batch, n] of the sequences that page_table (int32 [batch, pages]) describes;
        -1 where a position is negative."""
        page = torch.gather(page_table.long(), 1, positions.clamp(min=0) // self.page_size)
        return torch.where(positions >= 0, page * self.page_size + positions % self.page_size, -1)

    def append(self, keys, values, page_table, lengths):
        """Writes keys and values [batch, n, kv_heads, head_size] behind each sequence's lengths[b] tokens (int32
        [batch], before the call), in the pages that page_table names. Adds n to lengths in place."""
        _need(keys.dim() == 4, f"keys: shape {tuple(keys.shape)}, expected [batch, n, kv_heads, head_size]")
        _need(values.shape == keys.shape, f"values: shape {tuple(values.shape)}, expected {tuple(keys.shape)}")
        batch, n = keys.shape[:2]
        _need(page_table.dim() == 2, f"page_table: shape {tuple(page_table.shape)}, expected [batch, pages]")
        _index("page_table", page_table, torch.int32, (batch, page_table.shape[1]))
        _index("lengths", lengths, torch.int32, (batch,))
        positions = lengths.long()[:, None] + torch.arange(n, device=self.device)
        slots = self.slots_of(page_table, positions).flatten()
        exact = None
        if self.exact is not None:
            sequence = torch.arange(batch, device=self.device)[:, None].expand(batch, n)
            exact = self.exact_rows(sequence, positions, lengths.long()[:, None] + n).flatten().contiguous()
        self.write(keys.flatten(0, 1), values.flatten(0, 1), slots.contiguous(), exact, positions.flatten())
        lengths += n

    def read(self, slots, dtype=torch.float32, rotated=False, positions=None):
        """Decoded keys and values of slots (int64 [n]): two tensors [n, kv_heads, head_size]. positions: as written,
        where mu has blocks (and rotated is false)."""
        n = slots.numel()
        _index("slots", slots, torch.int64, (n,))
        _need(dtype in _TYPES, f"dtype: {dtype}, expected float32, float16 or bfloat16")
        out = torch.empty(2, n, self.kv_heads, self.head_size, dtype=dtype, device=self.device)
        with torch.cuda.device(self.device):
            _library.check(_library.load().tq_cuda_read(
                self._struct, slots.data_ptr(), None if rotated else self._positions(positions, n), n, None, None,
                out.data_ptr(), _TYPES[dtype], int(rotated), _stream()))
        return out[0], out[1]

    def codes(self, slots):
        """Stored codes (uint8 [2, n, kv_heads, head_size]) and scales (float16 [2, n, kv_heads]) of slots."""
        n = slots.numel()
        _index("slots", slots, torch.int64, (n,))
        codes = torch.empty(2, n, self.kv_heads, self.head_size, dtype=torch.uint8, device=self.device)
        scales = torch.empty(2, n, self.kv_heads, dtype=torch.float16, device=self.device)
        with torch.cuda.device(self.device):
            _library.check(_library.load().tq_cuda_read(self._struct, slots.data_ptr(), None, n, codes.data_ptr(),
                                                        scales.data_ptr(), None, 0, 0, _stream()))
        return codes, scales

    def _attention(self, q, page_table, lengths, scale, softcap, causal, sliding_window, sink_logits, sequence_slots,
                   out):
        """tq_cuda_attention of these arguments, and out; keeps no reference to them."""
        _need(isinstance(q, torch.Tensor) and q.is_cuda, "q: not a CUDA tensor")
        _need(q.dim() == 4 and q.shape[3] == self.head_size,
              f"q: shape {tuple(q.shape)}, expected [batch, q_len, heads, {self.head_size}]")
        _need(q.dtype in _TYPES, f"q: {q.dtype}, expected float32, float16 or bfloat16")
        _need(q.stride(3) == 1, "q: the last dimension is not contiguous")
        batch, q_len, heads, _ = q.shape
        _need(page_table.dim() == 2, f"page_table: shape {tuple(page_table.shape)}, expected [batch, pages]")
        _index("page_table", page_table, torch.int32, (batch, page_table.shape[1]))
        _index("lengths", lengths, torch.int32, (batch,))
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        _need(out.shape == q.shape and out.dtype == q.dtype and out.stride(3) == 1,
              f"out: shape {tuple(out.shape)} {out.dtype}, expected those of q, {tuple(q.shape)} {q.dtype}")
        a = _library.Attention()
        a.struct_size = ctypes.sizeof(a)
        a.q, a.out, a.type = q.data_ptr(), out.data_ptr(), _TYPES[q.dtype]
        a.q_batch, a.q_query, a.q_head = q.stride(0), q.stride(1), q.stride(2)
        a.out_batch, a.out_query, a.out_head = out.stride(0), out.stride(1), out.stride(2)
        a.batch, a.q_len, a.heads = batch, q_len, heads
        a.page_table, a.page_table_stride, a.lengths = page_table.data_ptr(), page_table.stride(0), lengths.data_ptr()
        if self.exact is not None:
            _need(sequence_slots is not None, "sequence_slots: a cache with exact rows needs them")
            _index("sequence_slots", sequence_slots, torch.int32, (batch,))
            a.sequence_slots = sequence_slots.data_ptr()
        a.scale = 1 / math.sqrt(self.head_size) if scale is None else scale
        a.softcap, a.not_causal, a.sliding_window = softcap, int(not causal), sliding_window
        if sink_logits is not None:
            _index("sink_logits", sink_logits, torch.float32, (heads,))
            a.sink_logits = sink_logits.data_ptr()
        return a, out

    def attend(self, q, page_table, lengths, *, scale=None, softcap=0.0, causal=True, sliding_window=0,
               sink_logits=None, sequence_slots=None, out=None, n_blocks=0):
        """Attention of q [batch, q_len, heads, head_size] (q_len 1..16) over each sequence's first lengths[b] tokens,
        its queries' own included. page_table: int32 [batch, pages]; lengths: int32 [batch]. Captures into a CUDA graph
        once it has run with the same shapes (the first call allocates the workspace)."""
        a, out = self._attention(q, page_table, lengths, scale, softcap, causal, sliding_window, sink_logits,
                                 sequence_slots, out)
        a.n_blocks = n_blocks
        library = _library.load()
        with torch.cuda.device(self.device):
            stream = _stream()
            key = (a.batch, a.q_len, a.heads, n_blocks, stream)
            workspace = self._workspaces.get(key)
            if workspace is None:
                size = ctypes.c_size_t()
                _library.check(library.tq_cuda_workspace_bytes(self._struct, a, size))
                workspace = torch.zeros(size.value, dtype=torch.uint8, device=self.device)
                self._workspaces[key] = workspace
            a.workspace, a.workspace_size = workspace.data_ptr(), workspace.numel()
            _library.check(library.tq_cuda_attend(self._struct, a, stream))
        return out

    def prefill(self, q, page_table, lengths, *, max_length=None, scale=None, softcap=0.0, causal=True,
                sliding_window=0, sink_logits=None, sequence_slots=None, out=None, workspace_bytes=1 << 30):
        """Attention as attend's, of any number of queries: the tokens are decoded once into float16 tiles, in at most
        workspace_bytes of memory (or what one KV head of one sequence takes), and a flash kernel runs over those.
        max_length: no sequence is longer (else its output is NaN); by default all that page_table has pages for.
        Queries before the sequence's first token give zeros (left padding)."""
        a, out = self._attention(q, page_table, lengths, scale, softcap, causal, sliding_window, sink_logits,
                                 sequence_slots, out)
        a.max_length = page_table.shape[1] * self.page_size if max_length is None else max_length
        library = _library.load()
        with torch.cuda.device(self.device):
            least, most = ctypes.c_size_t(), ctypes.c_size_t()
            _library.check(library.tq_cuda_prefill_workspace_bytes(self._struct, a, least, most))
            workspace = torch.empty(min(most.value, max(least.value, workspace_bytes)), dtype=torch.uint8,
                                    device=self.device)
            a.workspace, a.workspace_size = workspace.data_ptr(), workspace.numel()
            _library.check(library.tq_cuda_prefill(self._struct, a, _stream()))
        return out

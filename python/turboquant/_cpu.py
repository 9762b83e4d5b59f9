"""Where the pages of a PagedCache are host memory: libturboquant_cpu attends to them."""

import ctypes
import weakref

import torch

from . import _cpu_library


class Engine:
    """The pages of one PagedCache (its attributes say the shape)."""

    kind = "CPU"

    def __init__(self, cache, mu, lambda_, sequences):
        self._library = _cpu_library.load()
        self._cache = weakref.proxy(cache)
        if cache.mu_blocks > 0:
            raise ValueError(f"mu: shape {tuple(mu.shape)}, but a mean for every 256 positions is not served on a CPU; pass "
                             f"{(cache.kv_heads, cache.head_size)}")
        o = _cpu_library.Options()
        o.struct_size = ctypes.sizeof(o)
        o.n_pages, o.page_size, o.kv_heads, o.head_size = cache.n_pages, cache.page_size, cache.kv_heads, cache.head_size
        o.key_bits, o.value_bits = cache.key_bits, cache.value_bits
        o.mu, o.lambda_ = (None if x is None else x.data_ptr() for x in (mu, lambda_))
        if cache.sinks > 0 or cache.window > 0:
            o.sequences, o.sinks, o.window, o.ring = sequences, cache.sinks, cache.window, cache.ring
        self._handle = ctypes.c_void_p()
        _cpu_library.check(self._library.tq_paged_create(o, self._handle))
        weakref.finalize(self, self._library.tq_paged_destroy, self._handle)
        self.page_bytes = self._library.tq_paged_page_bytes(o)
        self.exact_bytes = 4 * o.sequences * (o.sinks + o.ring) * o.kv_heads * o.head_size

    def write(self, keys, values, slots, exact_rows, positions):
        del positions  # only means of blocks want them
        # The library takes floats, a row's heads one behind the other.
        keys, values = keys.float().flatten(1).contiguous(), values.float().flatten(1).contiguous()
        r = _cpu_library.Rows()
        r.struct_size = ctypes.sizeof(r)
        r.keys, r.values = keys.data_ptr(), values.data_ptr()
        r.key_stride, r.value_stride = keys.stride(0), values.stride(0)
        r.n, r.slots = keys.shape[0], slots.data_ptr()
        r.exact_rows = None if exact_rows is None else exact_rows.data_ptr()
        r.parallel = _cpu_library.threads()
        _cpu_library.check(self._library.tq_paged_write(self._handle, r))

    def read(self, slots, dtype, rotated, positions):
        del positions
        c = self._cache
        out = torch.empty(2, slots.numel(), c.kv_heads, c.head_size, dtype=torch.float32)
        _cpu_library.check(self._library.tq_paged_read(self._handle, slots.data_ptr(), slots.numel(), None, None,
                                                       out.data_ptr(), int(rotated), _cpu_library.threads()))
        return out.to(dtype)

    def codes(self, slots):
        c, n = self._cache, slots.numel()
        codes = torch.empty(2, n, c.kv_heads, c.head_size, dtype=torch.uint8)
        blocks = self._library.tq_paged_blocks(self._handle)
        scales = torch.empty(2, n, c.kv_heads, blocks, dtype=torch.float16)
        _cpu_library.check(self._library.tq_paged_read(self._handle, slots.data_ptr(), n, codes.data_ptr(),
                                                       scales.data_ptr(), None, 0, _cpu_library.threads()))
        return codes, scales[..., 0] if blocks == 1 else scales

    def attend(self, call, n_blocks):
        if n_blocks != 0:
            raise ValueError(f"n_blocks: {n_blocks}, but a CPU has no thread blocks; leave it 0")
        self._attend(call, prefill=False)

    def prefill(self, call, max_length, workspace_bytes):
        del workspace_bytes  # nothing is decoded into memory
        lengths = call[3]
        if bool((lengths > max_length).any()):
            raise ValueError(f"lengths: up to {int(lengths.max())}, but max_length is {max_length}")
        self._attend(call, prefill=True)

    def _attend(self, call, prefill):
        q, out, page_table, lengths, scale, softcap, causal, sliding_window, sink_logits, sequence_slots = call
        x = q if q.dtype == torch.float32 else q.float()
        y = out if out.dtype == torch.float32 else torch.empty(q.shape, dtype=torch.float32)
        a = _cpu_library.Attention()
        a.struct_size = ctypes.sizeof(a)
        a.q, a.out = x.data_ptr(), y.data_ptr()
        a.q_batch, a.q_query, a.q_head, _ = x.stride()
        a.out_batch, a.out_query, a.out_head, _ = y.stride()
        a.batch, a.q_len, a.heads, _ = q.shape
        a.page_table, a.page_table_stride, a.table_pages = page_table.data_ptr(), page_table.stride(0), page_table.shape[1]
        a.lengths = lengths.data_ptr()
        a.sequence_slots = None if sequence_slots is None else sequence_slots.data_ptr()
        a.scale, a.softcap, a.not_causal, a.sliding_window = scale, softcap, int(not causal), sliding_window
        a.sink_logits = None if sink_logits is None else sink_logits.data_ptr()
        a.prefill = int(prefill)
        a.parallel = _cpu_library.threads()
        _cpu_library.check(self._library.tq_paged_attend(self._handle, a, _cpu_library.workspace()))
        if y is not out:
            out.copy_(y)

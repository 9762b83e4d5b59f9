"""Where the pages of a PagedCache are memory of an NVIDIA GPU: libturboquant_cuda attends to them."""

import ctypes
import weakref

import torch

from . import _cuda_library

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _stream():
    return torch.cuda.current_stream().cuda_stream


class Engine:
    """The pages of one PagedCache (its attributes say the shape), and what its calls on the current stream need."""

    kind = "CUDA"

    def __init__(self, cache, mu, lambda_, sequences):
        self._library = _cuda_library.load()
        self._cache = weakref.proxy(cache)
        c = self._struct = _cuda_library.Cache()
        c.struct_size = ctypes.sizeof(c)
        c.n_pages, c.page_size, c.kv_heads, c.head_size = cache.n_pages, cache.page_size, cache.kv_heads, cache.head_size
        c.key_bits, c.value_bits = cache.key_bits, cache.value_bits
        self.page_bytes = self._library.tq_cuda_page_bytes(c)
        if self.page_bytes == 0:
            raise ValueError(
                f"no such cache: head_size {cache.head_size} (64, 128, 256), page_size {cache.page_size} (16, 32, 64, "
                f"128, 256), key_bits {cache.key_bits} and value_bits {cache.value_bits} (2, 3, 4, 8)")
        self.pages = torch.zeros(cache.n_pages, self.page_bytes, dtype=torch.uint8, device=cache.device)
        c.pages = self.pages.data_ptr()
        self._conditioning = (mu, lambda_)  # the library borrows them
        c.mu, c.lambda_ = (None if x is None else x.data_ptr() for x in self._conditioning)
        c.mu_blocks = cache.mu_blocks
        self.exact_bytes = 0
        if cache.sinks > 0 or cache.window > 0:
            self._exact = torch.zeros(2, sequences, cache.sinks + cache.ring, cache.kv_heads, cache.head_size,
                                      dtype=torch.float16, device=cache.device)
            self.exact_bytes = self._exact.numel() * 2
            c.exact_keys, c.exact_values = self._exact[0].data_ptr(), self._exact[1].data_ptr()
            c.sinks, c.ring, c.window = cache.sinks, cache.ring, cache.window
        self._workspaces = {}

    def write(self, keys, values, slots, exact_rows, positions):
        w = _cuda_library.Write()
        w.struct_size = ctypes.sizeof(w)
        w.keys, w.values, w.type = keys.data_ptr(), values.data_ptr(), _TYPES[keys.dtype]
        w.key_stride, w.key_head_stride = keys.stride(0), keys.stride(1)
        w.value_stride, w.value_head_stride = values.stride(0), values.stride(1)
        w.n, w.slots = keys.shape[0], slots.data_ptr()
        w.exact_rows = None if exact_rows is None else exact_rows.data_ptr()
        w.positions = None if positions is None else positions.data_ptr()
        with torch.cuda.device(self._cache.device):
            _cuda_library.check(self._library.tq_cuda_encode(self._struct, w, _stream()))

    def read(self, slots, dtype, rotated, positions):
        c = self._cache
        out = torch.empty(2, slots.numel(), c.kv_heads, c.head_size, dtype=dtype, device=c.device)
        with torch.cuda.device(c.device):
            _cuda_library.check(self._library.tq_cuda_read(
                self._struct, slots.data_ptr(), None if positions is None else positions.data_ptr(), slots.numel(), None,
                None, out.data_ptr(), _TYPES[dtype], int(rotated), _stream()))
        return out

    def codes(self, slots):
        c, n = self._cache, slots.numel()
        codes = torch.empty(2, n, c.kv_heads, c.head_size, dtype=torch.uint8, device=c.device)
        scales = torch.empty(2, n, c.kv_heads, dtype=torch.float16, device=c.device)
        with torch.cuda.device(c.device):
            _cuda_library.check(self._library.tq_cuda_read(self._struct, slots.data_ptr(), None, n, codes.data_ptr(),
                                                      scales.data_ptr(), None, 0, 0, _stream()))
        return codes, scales

    @staticmethod
    def _attention(call):
        """tq_cuda_attention of what PagedCache._attention gave; keeps no reference to it."""
        q, out, page_table, lengths, scale, softcap, causal, sliding_window, sink_logits, sequence_slots = call
        a = _cuda_library.Attention()
        a.struct_size = ctypes.sizeof(a)
        a.q, a.out, a.type = q.data_ptr(), out.data_ptr(), _TYPES[q.dtype]
        a.q_batch, a.q_query, a.q_head, _ = q.stride()
        a.out_batch, a.out_query, a.out_head, _ = out.stride()
        a.batch, a.q_len, a.heads, _ = q.shape
        a.page_table, a.page_table_stride, a.lengths = page_table.data_ptr(), page_table.stride(0), lengths.data_ptr()
        a.sequence_slots = None if sequence_slots is None else sequence_slots.data_ptr()
        a.scale, a.softcap, a.not_causal, a.sliding_window = scale, softcap, int(not causal), sliding_window
        a.sink_logits = None if sink_logits is None else sink_logits.data_ptr()
        return a

    def attend(self, call, n_blocks):
        a = self._attention(call)
        a.n_blocks = n_blocks
        with torch.cuda.device(self._cache.device):
            stream = _stream()
            key = (a.batch, a.q_len, a.heads, n_blocks, stream)
            workspace = self._workspaces.get(key)
            if workspace is None:
                size = ctypes.c_size_t()
                _cuda_library.check(self._library.tq_cuda_workspace_bytes(self._struct, a, size))
                workspace = torch.zeros(size.value, dtype=torch.uint8, device=self._cache.device)
                self._workspaces[key] = workspace
            a.workspace, a.workspace_size = workspace.data_ptr(), workspace.numel()
            _cuda_library.check(self._library.tq_cuda_attend(self._struct, a, stream))

    def prefill(self, call, max_length, workspace_bytes):
        a = self._attention(call)
        a.max_length = max_length
        with torch.cuda.device(self._cache.device):
            least, most = ctypes.c_size_t(), ctypes.c_size_t()
            _cuda_library.check(self._library.tq_cuda_prefill_workspace_bytes(self._struct, a, least, most))
            workspace = torch.empty(min(most.value, max(least.value, workspace_bytes)), dtype=torch.uint8,
                                    device=self._cache.device)
            a.workspace, a.workspace_size = workspace.data_ptr(), workspace.numel()
            _cuda_library.check(self._library.tq_cuda_prefill(self._struct, a, _stream()))

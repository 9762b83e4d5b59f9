"""libturboquant_cuda through ctypes: its C interface needs no compiler and fits every version of PyTorch."""

import ctypes
import functools

from . import _find


class Cache(ctypes.Structure):
    """tq_cuda_cache (turboquant/cuda.h)."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("pages", ctypes.c_void_p),
        ("n_pages", ctypes.c_int64),
        ("page_size", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_size", ctypes.c_int32),
        ("key_bits", ctypes.c_int32),
        ("value_bits", ctypes.c_int32),
        ("mu", ctypes.c_void_p),
        ("lambda_", ctypes.c_void_p),
        ("mu_blocks", ctypes.c_int32),
        ("exact_keys", ctypes.c_void_p),
        ("exact_values", ctypes.c_void_p),
        ("sinks", ctypes.c_int32),
        ("ring", ctypes.c_int32),
        ("window", ctypes.c_int32),
    ]


class Write(ctypes.Structure):
    """tq_cuda_write."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("key_stride", ctypes.c_int64),
        ("key_head_stride", ctypes.c_int64),
        ("value_stride", ctypes.c_int64),
        ("value_head_stride", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("exact_rows", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
    ]


class Attention(ctypes.Structure):
    """tq_cuda_attention."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("q_batch", ctypes.c_int64),
        ("q_query", ctypes.c_int64),
        ("q_head", ctypes.c_int64),
        ("out_batch", ctypes.c_int64),
        ("out_query", ctypes.c_int64),
        ("out_head", ctypes.c_int64),
        ("batch", ctypes.c_int32),
        ("q_len", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("page_table", ctypes.c_void_p),
        ("page_table_stride", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("sequence_slots", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("not_causal", ctypes.c_int32),
        ("sliding_window", ctypes.c_int32),
        ("sink_logits", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_size_t),
        ("n_blocks", ctypes.c_int32),
        ("max_length", ctypes.c_int32),
    ]


@functools.cache
def load():
    """The library; ImportError in words where there is none."""
    library = _find.load("turboquant_cuda", "TURBOQUANT_CUDA_LIBRARY", "docs/cuda.md")
    library.tq_cuda_last_error.restype = ctypes.c_char_p
    library.tq_cuda_page_bytes.restype = ctypes.c_size_t
    library.tq_cuda_page_bytes.argtypes = [ctypes.POINTER(Cache)]
    library.tq_cuda_encode.argtypes = [ctypes.POINTER(Cache), ctypes.POINTER(Write), ctypes.c_void_p]
    library.tq_cuda_read.argtypes = [
        ctypes.POINTER(Cache), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
    library.tq_cuda_workspace_bytes.argtypes = [
        ctypes.POINTER(Cache), ctypes.POINTER(Attention), ctypes.POINTER(ctypes.c_size_t)]
    library.tq_cuda_attend.argtypes = [ctypes.POINTER(Cache), ctypes.POINTER(Attention), ctypes.c_void_p]
    library.tq_cuda_prefill_workspace_bytes.argtypes = [
        ctypes.POINTER(Cache), ctypes.POINTER(Attention), ctypes.POINTER(ctypes.c_size_t),
        ctypes.POINTER(ctypes.c_size_t)]
    library.tq_cuda_prefill.argtypes = library.tq_cuda_attend.argtypes
    return library


def check(status):
    """Raises what a failed call said."""
    if status != 0:
        message = load().tq_cuda_last_error().decode()
        raise (ValueError if status == 1 else RuntimeError)(message)

"""libturboquant_cpu through ctypes (include/turboquant/paged.h), and the threads that it works on: PyTorch's own."""

import ctypes
import functools
import pathlib
import threading
import warnings
import weakref

import torch

from . import _find


class Parallel(ctypes.Structure):
    """tq_parallel (turboquant/turboquant.h)."""

    _fields_ = [("run", ctypes.c_void_p), ("context", ctypes.c_void_p), ("n_workers", ctypes.c_int32)]


class OpenMp(ctypes.Structure):
    """tq_openmp."""

    _fields_ = [("parallel", ctypes.c_void_p), ("n_threads", ctypes.c_int32)]


class Options(ctypes.Structure):
    """tq_paged_options."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("n_pages", ctypes.c_int64),
        ("page_size", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_size", ctypes.c_int32),
        ("key_bits", ctypes.c_int32),
        ("value_bits", ctypes.c_int32),
        ("mu", ctypes.c_void_p),
        ("lambda_", ctypes.c_void_p),
        ("sequences", ctypes.c_int32),
        ("sinks", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("ring", ctypes.c_int32),
    ]


class Rows(ctypes.Structure):
    """tq_paged_rows."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_stride", ctypes.c_int64),
        ("value_stride", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("exact_rows", ctypes.c_void_p),
        ("parallel", Parallel),
    ]


class Attention(ctypes.Structure):
    """tq_paged_attention."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
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
        ("table_pages", ctypes.c_int32),
        ("lengths", ctypes.c_void_p),
        ("sequence_slots", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("not_causal", ctypes.c_int32),
        ("sliding_window", ctypes.c_int32),
        ("sink_logits", ctypes.c_void_p),
        ("prefill", ctypes.c_int32),
        ("parallel", Parallel),
    ]


@functools.cache
def load():
    """The library; ImportError in words where there is none."""
    library = _find.load("turboquant_cpu", "TURBOQUANT_CPU_LIBRARY", "docs/python.md")
    pointer, size, count = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    library.tq_last_error.restype = ctypes.c_char_p
    library.tq_paged_page_bytes.restype = size
    library.tq_paged_page_bytes.argtypes = [ctypes.POINTER(Options)]
    library.tq_paged_create.argtypes = [ctypes.POINTER(Options), ctypes.POINTER(pointer)]
    library.tq_paged_destroy.argtypes = [pointer]
    library.tq_paged_destroy.restype = None
    library.tq_paged_blocks.argtypes = [pointer]
    library.tq_paged_write.argtypes = [pointer, ctypes.POINTER(Rows)]
    library.tq_paged_read.argtypes = [pointer, pointer, count, pointer, pointer, pointer, ctypes.c_int32,
                                      ctypes.POINTER(Parallel)]
    library.tq_paged_attend.argtypes = [pointer, ctypes.POINTER(Attention), pointer]
    library.tq_workspace_create.argtypes = [ctypes.POINTER(pointer)]
    library.tq_workspace_destroy.argtypes = [pointer]
    library.tq_workspace_destroy.restype = None
    library.tq_openmp_threads.argtypes = [ctypes.POINTER(OpenMp), ctypes.POINTER(Parallel)]
    return library


def check(status):
    """Raises what a failed call said."""
    if status != 0:
        message = load().tq_last_error().decode()
        raise {1: ValueError, 2: MemoryError}.get(status, RuntimeError)(message)


@functools.cache
def _gomp_parallel():
    """GOMP_parallel of the OpenMP runtime that PyTorch runs on: on its threads, ours need not fight them for the cores."""
    try:
        torch_library = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_library.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError) as error:
        warnings.warn(f"turboquant: PyTorch's OpenMP runtime was not found ({error}); attention on the CPU runs on one "
                      "thread", RuntimeWarning, stacklevel=2)
        return None


@functools.cache
def _lent(n_threads):
    """The OpenMp that must outlive the Parallel, and that."""
    openmp, parallel = OpenMp(_gomp_parallel(), n_threads), Parallel()
    check(load().tq_openmp_threads(openmp, parallel))
    return openmp, parallel


def threads():
    """As many of PyTorch's threads as torch.get_num_threads() says."""
    n = torch.get_num_threads()
    return Parallel() if n < 2 or _gomp_parallel() is None else _lent(n)[1]


class _Workspace:
    def __init__(self):
        library = load()
        self.handle = ctypes.c_void_p()
        check(library.tq_workspace_create(self.handle))
        weakref.finalize(self, library.tq_workspace_destroy, self.handle)


_of_thread = threading.local()


def workspace():
    """This thread's: calls from several threads do not share one."""
    if not hasattr(_of_thread, "workspace"):
        _of_thread.workspace = _Workspace()
    return _of_thread.workspace.handle

"""TurboQuant for PyTorch: a compressed KV cache on NVIDIA GPUs and attention over its codes (docs/cuda.md)."""

from .paged import PagedCache

__all__ = ["PagedCache"]

"""Tests of the PyTorch package: pytest python/tests. Those of a device run where there is one; -m gpu: only the GPU's."""

import importlib.util
import pathlib
import sys

import pytest

if importlib.util.find_spec("turboquant") is None:  # not installed: the checkout's
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU, torch and libturboquant_cuda")


def pytest_report_header():
    try:
        import torch
        import turboquant
    except ImportError as error:
        return str(error)
    return f"turboquant: {pathlib.Path(turboquant.__file__).parent}, torch {torch.__version__}"


def pytest_collection_modifyitems(items):
    try:
        from torch.cuda import is_available
        there = is_available()
    except ImportError:
        there = False
    for item in items:
        if item.get_closest_marker("gpu") and not there:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param

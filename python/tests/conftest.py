def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU, torch and libturboquant_cuda")

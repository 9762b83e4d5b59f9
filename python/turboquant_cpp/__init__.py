"""TurboQuant for llama-cpp-python: a KV cache of 4 bits a value instead of 16, without another build of llama.cpp.

    import turboquant_cpp
    turboquant_cpp.enable(key_bits=4, value_bits=4)

    from llama_cpp import Llama
    llm = Llama(model_path="model.gguf", n_ctx=8192)      # its cache is compressed

`enable` loads the plug-in libggml-turboquant.so into the ggml that llama-cpp-python uses and makes every `Llama` created
afterwards put its KV cache there. A `Llama` that exists already keeps the cache it has.
"""

from ._hook import Status, disable, enable, status
from ._plugin import PluginError, plugin_path

__all__ = ["PluginError", "Status", "disable", "enable", "plugin_path", "status"]
__version__ = "0.1.0"

"""Finds the plug-in and loads it into the host's ggml."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

LIBRARY = "libggml-turboquant.so"
DEVICE = "TQ0"


class PluginError(RuntimeError):
    """The plug-in is missing, or the host's ggml does not take it."""


def _build_folders(checkout: Path) -> Iterator[Path]:
    build = checkout / "build"
    yield from (build / "release" / "lib", build / "lib")
    yield from sorted(build.glob("*/lib"))


def _from_program() -> Optional[Path]:
    program = shutil.which("tq")
    if program is None:
        return None
    try:
        answer = subprocess.run([program, "plugin-path"], capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return Path(answer) if answer else None


def plugin_path() -> Path:
    """The plug-in's file: TURBOQUANT_PLUGIN, else beside this package, else what `tq plugin-path` says, else the build
    folder of the checkout that this file lies in. Raises PluginError if there is none."""
    named = os.environ.get("TURBOQUANT_PLUGIN")
    if named:
        path = Path(named)
        if not path.is_file():
            raise PluginError(f"TURBOQUANT_PLUGIN={named} is not a file: name {LIBRARY}, or unset it")
        return path.resolve()
    here = Path(__file__).resolve().parent
    beside = here / LIBRARY
    if beside.is_file():
        return beside
    told = _from_program()
    if told is not None and told.is_file():
        return told.resolve()
    for folder in _build_folders(here.parent.parent):
        if (folder / LIBRARY).is_file():
            return folder / LIBRARY
    raise PluginError(f"{LIBRARY} was not found beside the package, through `tq plugin-path` or in a build folder: build it "
                      f"with `make`, or set TURBOQUANT_PLUGIN to its path")


class Ggml:
    """The few functions of ggml that are needed, in the copy that libllama itself is linked to.

    A wheel can hold two copies of libggml with a registry each. A symbol looked up through libllama's own handle is
    searched in libllama and the libraries it depends on, so it is always the right one.
    """

    def __init__(self) -> None:
        import llama_cpp.llama_cpp as low_level

        library = getattr(low_level, "_lib", None)
        if not isinstance(library, ctypes.CDLL):
            raise PluginError("this llama_cpp does not keep its library where turboquant_cpp looks for it (llama_cpp.llama_cpp._lib): "
                              "use llama-cpp-python 0.3.36")
        self.library = library
        self.load = self._function("ggml_backend_load", ctypes.c_void_p, ctypes.c_char_p)
        self.device_by_name = self._function("ggml_backend_dev_by_name", ctypes.c_void_p, ctypes.c_char_p)
        self.device_count = self._function("ggml_backend_dev_count", ctypes.c_size_t)
        self.device_get = self._function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
        self.device_name = self._function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
        self.device_description = self._function("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
        self.device_type = self._function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)

    def _function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        try:
            # A pointer of its own, so that no other user of the library sees these types.
            prototype = ctypes.CFUNCTYPE(result, *arguments)
            return prototype((name, self.library))
        except AttributeError as error:
            raise PluginError(f"libllama gives no access to {name}: its ggml is linked statically, so no plug-in can be loaded; "
                              f"use a build with shared libraries (the default of llama-cpp-python)") from error

    def load_plugin(self, path: Path) -> int:
        """Loads the plug-in once; the device's address."""
        device = self.device_by_name(DEVICE.encode())
        if not device:
            if not self.load(os.fsencode(path)):
                raise PluginError(f"ggml refused {path}: its log above says why (an untested ggml, or a file that is no plug-in)")
            device = self.device_by_name(DEVICE.encode())
        if not device:
            raise PluginError(f"{path} was loaded but offers no device {DEVICE}")
        return int(device)

    def other_accelerators(self) -> list[int]:
        """Devices other than CPU helpers and ours, in the host's order."""
        devices = []
        for index in range(self.device_count()):
            device = self.device_get(index)
            # enum ggml_backend_dev_type: 1 GPU, 2 IGPU
            if self.device_type(device) in (1, 2) and self.device_name(device) != DEVICE.encode():
                devices.append(int(device))
        return devices

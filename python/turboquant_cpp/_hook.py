"""Makes llama_cpp.Llama use the plug-in's device, and undoes it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

from ._plugin import DEVICE, Ggml, PluginError, plugin_path

PRESETS = ("tq3", "tq4", "tq5", "tq6")
BITS = (2, 3, 4, 5, 6, 8, 16)
_VARIABLES = ("TURBOQUANT_KV", "TURBOQUANT_WINDOW", "TURBOQUANT_SINKS", "TURBOQUANT_PROFILE", "TURBOQUANT_CALIBRATE")
_F16 = 1  # enum ggml_type


@dataclass(frozen=True)
class Status:
    """What is in force for the next `Llama`."""

    enabled: bool
    plugin: Optional[Path]  # None: not loaded into this process
    version: Optional[str]
    device: Optional[str]
    settings: dict[str, str]  # TURBOQUANT_* variables as the plug-in reads them


class _State:
    ggml: Optional[Ggml] = None
    device: int = 0
    path: Optional[Path] = None
    enabled: bool = False
    saved: dict[str, Optional[str]] = {}
    llama_init: Optional[Callable[..., None]] = None


def enable(key_bits: int = 4, value_bits: int = 4, *, preset: Optional[str] = None, window: Optional[int] = None,
           sinks: Optional[int] = None, profile: Optional[str | os.PathLike[str]] = None, calibrate: bool = True) -> Status:
    """Every `llama_cpp.Llama` created from now on gets a compressed KV cache.

    Args:
        key_bits, value_bits: bits a value; 2, 3, 4, 5, 6 or 8 (16: stored unchanged, for comparisons).
        preset: "tq3", "tq4", "tq5" or "tq6" in place of the bits.
        window: latest rows of each sequence kept exact; None: the plug-in's own choice.
        sinks: first rows of each sequence kept exact; None: the plug-in's own choice.
        profile: file made by `tq tune` for this model: what its keys are conditioned with. None: from the first rows.
        calibrate: without a profile, whether to condition keys from the first rows at all.

    `Llama` then defaults to n_gpu_layers=-1, flash_attn=True and offload_kqv=True, which the plug-in needs; arguments
    that contradict them raise ValueError instead of leaving the cache uncompressed. Calling it again changes the
    settings. Not thread-safe against the creation of models.

    Raises:
        ValueError: a setting is out of range.
        PluginError: the plug-in is missing or does not fit this llama-cpp-python.
    """
    settings = _settings(key_bits, value_bits, preset, window, sinks, profile, calibrate)
    path = _State.path or plugin_path()
    ggml = _State.ggml or Ggml()
    _State.device = ggml.load_plugin(path)
    _State.ggml, _State.path = ggml, path
    if not _State.enabled:
        _State.saved = {name: os.environ.get(name) for name in _VARIABLES}
    for name in _VARIABLES:
        if name in settings:
            os.environ[name] = settings[name]
        else:
            os.environ.pop(name, None)
    _install()
    _State.enabled = True
    return status()


def disable() -> None:
    """`Llama` is as it was before `enable`; the environment variables, too. The plug-in stays loaded, unused."""
    if not _State.enabled:
        return
    for name, value in _State.saved.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _State.enabled = False


def status() -> Status:
    """What is in force now."""
    ggml = _State.ggml
    version = None
    if ggml is not None and _State.device:
        version = ggml.device_description(_State.device).decode().rsplit(" ", 1)[-1]
    settings = {name: os.environ[name] for name in sorted(os.environ) if name.startswith("TURBOQUANT_")}
    return Status(enabled=_State.enabled, plugin=_State.path, version=version, device=DEVICE if ggml is not None else None,
                  settings=settings)


def _settings(key_bits: int, value_bits: int, preset: Optional[str], window: Optional[int], sinks: Optional[int],
              profile: Optional[str | os.PathLike[str]], calibrate: bool) -> dict[str, str]:
    settings = {}
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r}: use one of {', '.join(PRESETS)}")
        if (key_bits, value_bits) != (4, 4):
            raise ValueError(f"preset={preset!r} sets the bits: leave out key_bits and value_bits")
        settings["TURBOQUANT_KV"] = preset
    else:
        for name, bits in (("key_bits", key_bits), ("value_bits", value_bits)):
            if isinstance(bits, bool) or bits not in BITS:
                raise ValueError(f"{name}={bits!r}: use one of {', '.join(map(str, BITS))}")
        settings["TURBOQUANT_KV"] = f"{key_bits}/{value_bits}"
    for name, rows, most in (("window", window, 65536), ("sinks", sinks, 1024)):
        if rows is None:
            continue
        if isinstance(rows, bool) or not isinstance(rows, int) or not 0 <= rows <= most:
            raise ValueError(f"{name}={rows!r}: use a whole number from 0 to {most}")
        settings[f"TURBOQUANT_{name.upper()}"] = str(rows)
    if profile is not None:
        if not Path(profile).is_file():
            raise ValueError(f"profile={os.fspath(profile)!r}: no such file; make it with `tq tune`")
        settings["TURBOQUANT_PROFILE"] = os.fspath(profile)
    if not calibrate:
        settings["TURBOQUANT_CALIBRATE"] = "off"
    return settings


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Llama's keyword arguments with the plug-in's needs filled in. ValueError where they are contradicted."""
    wanted = {"n_gpu_layers": -1, "flash_attn": True, "offload_kqv": True}
    contradictions = []
    layers = given.get("n_gpu_layers", -1)
    if layers == 0:
        contradictions.append("n_gpu_layers=0 keeps every layer's cache off the device (use -1)")
    if not given.get("flash_attn", True):
        contradictions.append("flash_attn=False (TurboQuant needs flash attention: use True)")
    if not given.get("offload_kqv", True):
        contradictions.append("offload_kqv=False keeps the cache off the device (use True)")
    for name in ("type_k", "type_v"):
        if given.get(name) not in (None, _F16):
            contradictions.append(f"{name}={given[name]} (TurboQuant stores the cache: choose bits with turboquant_cpp.enable)")
    if contradictions:
        raise ValueError("turboquant_cpp is enabled, but Llama is asked for " + "; ".join(contradictions) +
                         ", or call turboquant_cpp.disable() first")
    return {**wanted, **given}


def _install() -> None:
    """Wraps Llama and the class that loads its model, once per process."""
    import llama_cpp
    from llama_cpp import _internals
    from llama_cpp import llama_cpp as low_level

    if _State.llama_init is not None:
        return
    llama_init = llama_cpp.Llama.__init__
    model_init = _internals.LlamaModel.__init__

    @functools.wraps(llama_init)
    def wrapped_llama(self: Any, *args: Any, **kwargs: Any) -> None:
        if _State.enabled and not kwargs.get("vocab_only"):
            self._stack = contextlib.ExitStack()  # what Llama.__del__ closes, should the arguments be refused
            kwargs = _arguments(kwargs)
        llama_init(self, *args, **kwargs)

    @functools.wraps(model_init)
    def wrapped_model(self: Any, *args: Any, **kwargs: Any) -> None:
        params = kwargs.get("params")
        ggml = _State.ggml
        if params is None or ggml is None or params.devices:
            model_init(self, *args, **kwargs)
            return
        # Ours alone, whatever else there is; once disabled, the others alone.
        devices = [_State.device] if _State.enabled else ggml.other_accelerators()
        array = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)
        params.devices = ctypes.addressof(array)
        self._turboquant_devices = array  # alive as long as the model
        model_init(self, *args, **kwargs)
        if _State.enabled and not params.vocab_only:
            layers = low_level.llama_model_n_layer(self.model)
            if params.n_gpu_layers <= layers:
                self.close()
                raise ValueError(f"turboquant_cpp is enabled, but n_gpu_layers={params.n_gpu_layers} leaves layers of this model of "
                                 f"{layers} with an f16 cache: use -1")

    llama_cpp.Llama.__init__ = wrapped_llama  # type: ignore[method-assign]
    _internals.LlamaModel.__init__ = wrapped_model  # type: ignore[method-assign]
    _State.llama_init = llama_init


__all__ = ["PluginError", "Status", "disable", "enable", "status"]

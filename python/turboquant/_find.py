"""Finding the libraries: beside the package, in a checkout's build folders, or where a variable says."""

import ctypes
import os
import pathlib


def load(name, variable, page):
    """The library `name` (lib<name>.so) as ctypes has it. `variable`: the environment's name for its file. ImportError says
    what was tried and that `page` tells how to build it."""
    file = f"lib{name}.so"
    here = pathlib.Path(__file__).resolve().parent
    build = here.parent.parent / "build"
    given = os.environ.get(variable)
    candidates = [given] if given else [
        str(here / file), *(str(build / preset / "lib" / file) for preset in ("release", "debug", "cuda")), file]
    tried = []
    for path in candidates:
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            tried.append(str(error))
    raise ImportError(f"turboquant: {file} was not found; build it ({page}) and name it in {variable}. "
                      f"Tried: {'; '.join(tried)}")

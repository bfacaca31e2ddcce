"""Whether the Triton kernels can be used here. Imports nothing heavy until it is asked."""

from __future__ import annotations

import functools
import importlib.util

OLDEST = (3, 6)
"""The first version whose behaviour the kernels were tried on."""


@functools.cache
def why_no_triton() -> str:
    """The reason why not, with the remedy; "" where the library is there and new enough."""
    wanted = ".".join(map(str, OLDEST))
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed; pip install 'triton>={wanted}'"
    try:
        import triton

        version = str(triton.__version__)
    except Exception as error:  # a broken binary can raise anything
        return f"triton does not import ({type(error).__name__}: {' '.join(str(error).split())}); reinstall it"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is older than {wanted}; pip install 'triton>={wanted}'"
    return ""

"""moeyard: inference for Mixture-of-Experts language models.

The names below are imported when first used, so that `import moeyard` and `moeyard --help` stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.config import EngineConfig
    from .engine.params import SamplingParams
    from .launch.llm import LLM
    from .launch.outputs import CompletionOutput, RequestOutput

__version__ = "0.1.0"

_HOMES = {
    "LLM": ".launch.llm",
    "SamplingParams": ".engine.params",
    "EngineConfig": ".engine.config",
    "RequestOutput": ".launch.outputs",
    "CompletionOutput": ".launch.outputs",
}

__all__ = ["LLM", "CompletionOutput", "EngineConfig", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

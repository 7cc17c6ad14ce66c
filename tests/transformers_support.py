"""transformers' models on the library's own PyTorch code, whatever else is installed."""

from __future__ import annotations

import importlib
import sys

from gdn_kernels.integrations.transformers import FAMILIES


def import_models() -> None:
    """Import the models that have mixers as if FLA and causal-conv1d were absent.

    The library takes their functions as its models are imported, and those have no CPU implementation.
    """
    hidden = ("fla", "causal_conv1d")
    kept = {name: sys.modules[name] for name in hidden if name in sys.modules}
    sys.modules.update(dict.fromkeys(hidden))
    try:
        for family in FAMILIES:
            importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    finally:
        for name in hidden:
            del sys.modules[name]
        sys.modules.update(kept)

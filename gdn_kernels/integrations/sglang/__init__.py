"""A plugin for SGLang: its Gated Delta Net functions on this package's operators, through its own hook registry.

Installed beside SGLang it does nothing until it is chosen: by name, ``SGLANG_PLUGINS=gdn_kernels``, or by
``GDN_KERNELS_ENGINE=1``. SGLang then calls :func:`register` in each of its processes, before the engine starts; every
place becomes a REPLACE hook. Without the setting the engine is as it was. ``integrations/README.md`` says which places,
what is left to the engine, and what differs.

Signatures, layouts and null-slot rules (a negative slot is padding) are those of sglang 0.5.22 and 0.5.23. A case that
a place does not cover is left to the function that was there. Differences: a padding row is zero where SGLang leaves
memory as it was or computes from a zero state; the conv of a draft chain leaves the conv pool alone, over which SGLang
writes the window that is accepted; the splits return views; of a norm's results, mean and rstd are None.

Public: :func:`register`, :func:`apply`, :func:`restore`, :func:`report`, :func:`examine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gdn_kernels.integrations._engines import Record
from gdn_kernels.integrations.sglang import conv, delta_rule, norm  # noqa: F401  their places
from gdn_kernels.integrations.sglang._plugin import plugin

__all__ = ["apply", "examine", "plugin", "register", "report", "restore"]

register: Callable[[], None] = plugin.register
apply: Callable[..., None] = plugin.apply
restore: Callable[[], None] = plugin.restore
report: Callable[[], list[dict[str, Any]]] = plugin.report
examine: Callable[[], dict[str, Record]] = plugin.examine

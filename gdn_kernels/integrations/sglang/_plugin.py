"""SGLang's hook registry as the plugin uses it, and where SGLang keeps what is replaced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gdn_kernels.graphs import SPLIT_OPERATORS
from gdn_kernels.integrations._engines import Plugin, Record, rebind

VERSIONS = ("0.5.22", "0.5.23")
FLA = "sglang.kernels.ops.attention.fla"
LINEAR = "sglang.kernels.ops.attention.linear"
PROJECTIONS = "sglang.kernels.ops.attention.triton_gdn_fused_proj"
CONV = "sglang.kernels.ops.mamba.causal_conv1d_triton"
DISPATCH = "sglang.srt.layers.attention.mamba.causal_conv1d"
BACKEND = "sglang.srt.layers.attention.linear.gdn_backend"
KERNEL = "sglang.srt.layers.attention.linear.kernels.gdn_triton.TritonGDNKernel"


class SGLangPlugin(Plugin):
    """The places as hooks of ``sglang.srt.plugins.hook_registry``."""

    def __init__(self) -> None:
        super().__init__("SGLang", "sglang", VERSIONS)
        self.within_engine = False

    def whitelist(self) -> Iterable[str] | None:
        from sglang.srt.environ import envs

        return (envs.SGLANG_PLUGINS.get() or "").split(",")

    def register(self) -> None:
        # The engine applies the hooks of all plugins once they have all been called.
        self.within_engine = True
        try:
            super().register()
        finally:
            self.within_engine = False

    def held_by(self, record: Record) -> str | None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        for kind, hook, source in HookRegistry._hooks.get(record.path, ()):
            if kind is HookType.REPLACE and hook is not record.replacement:
                return source.plugin_name if source else getattr(hook, "__module__", "another hook")
        return None

    def install(self, records: list[Record]) -> None:
        from sglang.srt.compilation.compilation_config import SPLIT_OPS
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        for record in records:
            HookRegistry.register(record.path, record.replacement, HookType.REPLACE)
        SPLIT_OPS.extend(set(_split_names()) - set(SPLIT_OPS))
        if not self.within_engine:
            HookRegistry.apply_hooks()

    def uninstall(self, records: list[Record]) -> None:
        from sglang.srt.compilation.compilation_config import SPLIT_OPS
        from sglang.srt.plugins.hook_registry import HookRegistry

        rebind((getattr(record.owner, record.name), record.original) for record in records)
        for record in records:
            path = record.path
            hooks = HookRegistry._hooks.pop(path, [])
            setattr(record.owner, record.name, record.original)
            HookRegistry._patched.discard(path)
            others = [hook for hook in hooks if hook[1] is not record.replacement]
            if others:
                HookRegistry._hooks[path] = others
        HookRegistry.apply_hooks()
        for name in _split_names():
            if name in SPLIT_OPS:
                SPLIT_OPS.remove(name)

    def report(self) -> list[dict[str, Any]]:
        """As :meth:`Plugin.report`; a place that a later plugin took is ``overridden``."""
        for record in self.records.values():
            if record.state == "replaced":
                holder = self._last_replace(record)
                if holder is not None:
                    record.state, record.why = "overridden", f"by {holder}, which registered later"
        return super().report()

    def _last_replace(self, record: Record) -> str | None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        hooks = [hook for hook in HookRegistry._hooks.get(record.path, ()) if hook[0] is HookType.REPLACE]
        if not hooks or hooks[-1][1] is record.replacement:
            return None
        return hooks[-1][2].plugin_name if hooks[-1][2] else "another hook"


def _split_names() -> list[str]:
    """``gdn::name`` as SGLang's graph splitter compares it with ``str(node.target)``."""
    return [name.replace("::", ".") for name in SPLIT_OPERATORS]


plugin = SGLangPlugin()

"""Counts compilations, so that a recompilation after warm-up shows in the metrics (R19)."""

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def _on_event(event: str, duration: float, **_: object) -> None:
    global _count
    _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_on_event)


def compilations() -> int:
    """Programs compiled by this process so far; those read from the persistent cache count too."""
    return _count

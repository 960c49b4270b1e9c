"""XLA's flags in tests: programs here are small and many, and most of the time would be LLVM's."""

QUICK = "--xla_backend_optimization_level=0"
_DEVICES = "--xla_force_host_platform_device_count"


def flags(devices: int = 1, more: str = "") -> str:
    """For XLA_FLAGS: so many CPU devices, compiled quickly, unless `more` says otherwise."""
    own = [f"{_DEVICES}={devices}", QUICK]
    return " ".join([flag for flag in own if flag.partition("=")[0] not in more] + more.split())

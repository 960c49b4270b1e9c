"""A decoder-only transformer as pure functions over a pytree of arrays."""

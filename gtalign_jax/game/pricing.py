"""What a turn costs each side, as a transform of the payoff matrix (paper section 3.4)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Usage:
    """Expected use per model action (DA, CQ, AQ) until the user has the answer."""

    input: tuple[float, float, float]
    output: tuple[float, float, float]
    requests: tuple[float, float, float] = (1.0, 2.0, 1.0)

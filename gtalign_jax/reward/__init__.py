"""From text to the reward: tasks, judges, factors, mutual welfare (paper sections 4 and 5)."""

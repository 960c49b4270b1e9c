"""The paper's mathematics: chains, payoff matrices, welfare. Knows no model, tokenizer or network."""

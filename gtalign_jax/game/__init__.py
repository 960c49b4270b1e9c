"""The paper's mathematics: chains, payoff matrices, welfare. No model, tokenizer or network."""

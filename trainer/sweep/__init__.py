"""Search for a recipe's best values, and estimate of the gain from more data: many trials from one base."""

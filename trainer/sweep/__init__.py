"""The search for a recipe's best values, and how much more data would bring: many trials from one base."""

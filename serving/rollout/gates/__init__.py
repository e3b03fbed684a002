"""Gates that a version must pass before it is promoted. They only read stored results and need no engine."""

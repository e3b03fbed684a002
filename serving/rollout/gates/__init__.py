"""Gates: what a version must fulfil before it is promoted. They read stored results only and need no engine."""

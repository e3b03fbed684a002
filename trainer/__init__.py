"""From a recipe to a registered version. Talks to the other packages only through the registry and the store."""

"""From a recipe to a registered version. Talks to the other rooms only through the registry and the store."""

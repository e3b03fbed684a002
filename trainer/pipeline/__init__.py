"""The stages from a recipe to a registered version, each resumed where it was cut off."""

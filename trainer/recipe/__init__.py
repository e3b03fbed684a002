"""What a recipe says, section by section, and how its file is read."""

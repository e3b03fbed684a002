"""What a recipe will take, before it is run: memory, disk, time, money; from the base's config, without weights."""

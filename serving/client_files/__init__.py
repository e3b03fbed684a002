"""Work on clients' files in the background: their checks, and the removal of expired ones."""

"""What happened: who changed what, which version served when; and what is to be forgotten."""

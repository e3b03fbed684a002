"""What is compared of prompts and answers, and as arrays."""

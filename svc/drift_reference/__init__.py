"""What a version keeps of its examples for drift, and the features of prompts and answers that are compared."""

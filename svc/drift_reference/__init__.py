"""The data that a version stores about its examples for drift, and the compared features of prompts and answers."""

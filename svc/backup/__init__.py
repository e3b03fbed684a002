"""Copies of a home that can be made while it is used, and homes made of them."""

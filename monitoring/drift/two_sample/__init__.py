"""Whether two samples are of one distribution, and how often that may be doubted in vain."""

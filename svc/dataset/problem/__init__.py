"""Problems found in data lines, and the log that collects them."""

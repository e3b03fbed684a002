"""Problems of lines, and the log that collects them."""

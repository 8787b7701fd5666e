"""From finished fits to tables, tests, figures and one HTML page."""

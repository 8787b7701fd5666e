"""Where fits run, and what is trained beside the search."""

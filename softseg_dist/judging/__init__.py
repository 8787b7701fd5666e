"""The yardstick: from soft maps and raters' masks to rows of the results table."""

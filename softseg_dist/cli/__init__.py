"""The command `softseg`."""

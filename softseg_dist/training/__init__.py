"""One fit: plain torch, on one device or one rank."""

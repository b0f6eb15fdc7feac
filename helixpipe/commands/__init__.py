"""One file per command, each a short function over the public API."""

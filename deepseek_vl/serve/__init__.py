"""The doors: terminal, web page and HTTP API over one engine, and the reference's functions."""

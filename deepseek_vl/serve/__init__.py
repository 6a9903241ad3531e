"""Terminal, web page, HTTP API and batch captions over one engine, and the reference's functions."""

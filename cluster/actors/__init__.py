"""Ray actors: the only package that imports Ray. Serve owns their life; we write policies."""

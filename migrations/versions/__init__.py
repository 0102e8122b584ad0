"""One file a version, named for what it does, importing nothing of ours."""

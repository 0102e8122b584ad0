"""The command line: a client of the server like any other, and the commands that start and examine it."""

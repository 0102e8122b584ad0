"""The house around the engines: who is asking, may they, when does it run, what did it cost."""

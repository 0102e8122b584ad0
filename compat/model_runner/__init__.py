"""Docker Model Runner's routes: the OpenAI dialect under `/engines`, and its own model lists."""

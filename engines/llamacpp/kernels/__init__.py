"""Matrix products of our own for processors, which llama.cpp calls in place of its own."""

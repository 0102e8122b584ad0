"""The usage ledger: one row a request, whatever its end, and what can be asked of it later."""

"""The usage ledger's schema, version by version. Forward only; a version that has landed is never edited."""

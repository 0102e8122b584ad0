"""`python -m gateway` is `headwater`."""

from gateway.cli.main import app

app(prog_name="headwater")

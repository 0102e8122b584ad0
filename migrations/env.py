"""Alembic's entry point: runs the versions on the connection, and in the transaction, that it is given.

There is no alembic.ini; `gateway.usage.database` is the only caller and decides address, locking and commit.
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()

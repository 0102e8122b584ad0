"""Opening the ledger's database: its address, its settings, its schema.

"Database" is SQLAlchemy's engine, so that "engine" keeps one meaning. A database whose schema is up to date is opened
without importing Alembic, which is most of the time that opening would take.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from engines.errors import HeadwaterError
from gateway.usage.tables import REVISION

_BUSY_TIMEOUT_MS = 3000
_MIGRATION_LOCK = 0x68656164  # "head": the advisory lock's number must only be the same in every gateway


class LedgerError(HeadwaterError):
    """The usage database cannot be opened or read; the message says what to do."""

    code = "ledger_error"


async def open_database(url: str) -> AsyncEngine:
    """Connect, and bring the schema up to date; the directory of a SQLite file is created.

    Raises:
        LedgerError: the address is wrong, the database unreachable, or its schema newer than this program.
    """
    address = _parse(url)
    try:
        if address.get_backend_name() == "sqlite" and address.database not in (None, "", ":memory:"):
            Path(str(address.database)).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Errors end in logs, and parameters are the names of callers.
        database = create_async_engine(address, hide_parameters=True)
    except (OSError, ImportError) as error:
        raise LedgerError(f"cannot open the usage database {address}: {error}") from error
    if address.get_backend_name() == "sqlite":
        event.listen(database.sync_engine, "connect", _configure_sqlite)
    try:
        async with database.begin() as connection:
            await connection.run_sync(_migrate)
    except (SQLAlchemyError, OSError) as error:
        await database.dispose()
        raise LedgerError(f"cannot open the usage database {address}: {error}") from error
    except BaseException:
        await database.dispose()
        raise
    return database


def _parse(url: str) -> URL:
    try:
        address = make_url(url)
    except ArgumentError:
        address = None
    if address is None or address.drivername not in ("sqlite+aiosqlite", "postgresql+asyncpg"):
        # Not repeated whole: it may hold a password.
        raise LedgerError(
            f"the usage database's address starts with {url.partition('://')[0]!r}; accepted are "
            "sqlite+aiosqlite:///<absolute path> and postgresql+asyncpg://<user>:<password>@<host>/<name>"
        )
    return address


def _configure_sqlite(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")  # first: the next statement may already have to wait
    cursor.execute("PRAGMA journal_mode=WAL")
    # With WAL a killed process loses nothing; only a power cut may lose the last commits, and never corrupts the file.
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _migrate(connection: Connection) -> None:
    """Bring the schema to `REVISION` inside the connection's transaction, one process at a time."""
    if _revision(connection) == REVISION:
        return
    if connection.dialect.name == "sqlite":
        # Python's driver would run each CREATE TABLE on its own, and a kill between two would leave half a schema.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _MIGRATION_LOCK})

    from alembic.command import upgrade  # noqa: PLC0415  (0.2 s that only a new or outdated database has to pay)
    from alembic.config import Config  # noqa: PLC0415
    from alembic.script import ScriptDirectory  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(files("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    revision = _revision(connection)
    if revision is not None and revision not in known:
        raise LedgerError(
            f"the usage database has schema {revision!r}, but this Headwater only knows schemas up to {REVISION!r}: "
            "it was written by a newer version. Install that version or a later one, or choose another database"
        )
    upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    """The schema's version as Alembic noted it; None for a database that is new."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision

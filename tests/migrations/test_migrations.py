import asyncio
import sqlite3
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from gateway.usage.database import LedgerError, open_database
from gateway.usage.tables import REVISION, metadata


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database file that does not exist yet."""
    return tmp_path / "usage.db"


def url(path: Path) -> str:
    """The file's address."""
    return f"sqlite+aiosqlite:///{path}"


async def test_migrated_schema_is_the_tables(path: Path) -> None:
    """A fresh database has exactly the tables, columns and indexes that the code uses."""

    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, metadata))

    database = await open_database(url(path))
    async with database.connect() as connection:
        assert await connection.run_sync(differences) == []
    await database.dispose()


def test_the_tables_name_the_last_migration() -> None:
    """Otherwise an outdated database would be opened without being migrated."""
    config = Config()
    config.set_main_option("script_location", str(files("migrations")))
    assert ScriptDirectory.from_config(config).get_current_head() == REVISION


async def test_opening_again_keeps_what_is_there(path: Path) -> None:
    """Migrating is idempotent."""
    for _ in range(2):
        database = await open_database(url(path))
        async with database.begin() as connection:
            await connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS mine (x)")
        await database.dispose()
    stored = sqlite3.connect(path)
    assert stored.execute("SELECT count(*) FROM mine").fetchone() == (0,)
    stored.close()


async def test_a_database_of_a_newer_version_is_refused_and_left_alone(path: Path) -> None:
    """The error says what to do."""
    database = await open_database(url(path))
    async with database.begin() as connection:
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0099_future'")
    await database.dispose()
    with pytest.raises(LedgerError, match=r"'0099_future'.*newer version\. Install that version or a later one"):
        await open_database(url(path))


async def test_a_migration_that_is_interrupted_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a schema would make every later start fail."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("alembic.op.create_index", interrupted)
        with pytest.raises(KeyboardInterrupt):
            await open_database(url(path))
    await (await open_database(url(path))).dispose()


def test_processes_that_start_together_migrate_once(path: Path) -> None:
    """Each of them opens the database, whoever was first."""
    program = (
        "import asyncio, sys; from gateway.usage.ledger import Ledger\n"
        "async def main(): await (await Ledger.open(sys.argv[1])).close()\n"
        "asyncio.run(main())"
    )
    command = [sys.executable, "-c", program, url(path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0)] * 4


def test_opening_an_existing_database_does_not_import_alembic(path: Path) -> None:
    """Alembic is only paid for when there is something to migrate."""
    program = (
        "import asyncio, sys; from gateway.usage.database import open_database\n"
        "async def main(): await (await open_database(sys.argv[1])).dispose()\n"
        "asyncio.run(main()); sys.exit('alembic' in sys.modules)"
    )
    command = [sys.executable, "-c", program, url(path)]
    assert [subprocess.run(command, check=False).returncode for _ in range(2)] == [1, 0]


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    """It is named, and not overwritten."""
    path.write_text("dear diary" * 100)
    with pytest.raises(LedgerError, match=r"cannot open the usage database .*not a database"):
        asyncio.run(open_database(url(path)))
    assert path.read_text().startswith("dear diary")


def test_a_directory_that_cannot_be_created_is_named(path: Path) -> None:
    """The path is in the error."""
    path.write_text("")
    with pytest.raises(LedgerError, match=r"cannot open the usage database .*usage\.db"):
        asyncio.run(open_database(url(path / "usage.db")))


@pytest.mark.parametrize(
    "address", ["", "usage.db", "mysql://root:secret@db/x", "postgresql://me:secret@db/x", "a:b://"]
)
async def test_other_addresses_are_refused_without_repeating_passwords(address: str) -> None:
    """The error says what is accepted."""
    with pytest.raises(LedgerError, match=r"accepted are sqlite\+aiosqlite") as caught:
        await open_database(address)
    assert "secret" not in str(caught.value)

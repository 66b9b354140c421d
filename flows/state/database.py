"""The database: connecting, and bringing its schema up to date.

SQLite by default (write-ahead log, 30 s busy time-out, foreign keys on), PostgreSQL by a `postgresql://` URL.
Migrations are Alembic's; `Database.open` runs them when the schema is behind, so that no command needs a set-up step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session

MIGRATIONS = Path(__file__).parent / "migrations"


class StateError(Exception):
    """Raised when the state cannot be read or written as asked; the message says what to do."""


class Database:
    """A connected, migrated database. Thread-safe: a session a piece of work, never shared."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def open(cls, url: str) -> Database:
        """Connect and migrate to the newest schema.

        Raises:
            StateError: the URL is not one of ours, or the database cannot be reached or migrated.
        """
        engine = connect(url)
        try:
            migrate(engine)
        except SQLAlchemyError as error:
            line = str(error).splitlines()[0]
            raise StateError(f"cannot use the database at {engine.url!r}: {line}") from error
        return cls(engine)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session that commits at the end and rolls back on any exception."""
        with Session(self.engine, expire_on_commit=False) as session:
            try:
                yield session
                session.commit()
            except BaseException:
                session.rollback()
                raise

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def connect(url: str) -> Engine:
    """An engine for `sqlite:///...` or `postgresql://...` (psycopg 3)."""
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False})

        @event.listens_for(engine, "connect")
        def _pragmas(connection: object, _record: object) -> None:
            cursor = connection.cursor()  # type: ignore[attr-defined]
            for pragma in ("journal_mode=WAL", "busy_timeout=30000", "foreign_keys=ON", "synchronous=NORMAL"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

        return engine
    if url.startswith(("postgresql://", "postgresql+psycopg://")):
        return create_engine(url.replace("postgresql://", "postgresql+psycopg://", 1), pool_pre_ping=True)
    scheme = url.partition(":")[0]  # the rest may hold a password
    raise StateError(f"a database URL begins with sqlite:/// or postgresql://, not '{scheme}:'; mend SIA_DATABASE_URL")


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to `revision`; a schema already there costs one query and no Alembic import."""
    if revision == "head" and current_revision(engine) == newest_revision():
        return
    from alembic import command
    from alembic.config import Config
    from filelock import FileLock

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    lock = Path(engine.url.database + ".migrate.lock") if engine.dialect.name == "sqlite" else None  # type: ignore[operator]
    with FileLock(lock) if lock else _no_lock(), engine.begin() as connection:
        config.attributes["connection"] = connection
        if revision == "head" or revision > (current_revision(engine) or ""):
            command.upgrade(config, revision)
        else:
            command.downgrade(config, revision)


@contextmanager
def _no_lock() -> Iterator[None]:
    yield


def current_revision(engine: Engine) -> str | None:
    """The schema's revision, or None for an empty database."""
    from sqlalchemy import inspect

    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        row = connection.execute(text("SELECT version_num FROM alembic_version")).first()
        return None if row is None else str(row[0])


def newest_revision() -> str:
    """The newest migration; revisions are numbered files (0001_..., 0002_...), so the last name is the newest."""
    return max(p.name.split("_")[0] for p in (MIGRATIONS / "versions").glob("[0-9]*.py"))

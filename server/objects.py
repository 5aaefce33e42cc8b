"""Flower's object store with the large objects as files beside its database.

A chunk of 5 MiB costs SQLite 1,300 pages, written twice (log and database), in the one transaction
that everybody waits for. As a file it is written once; the row says that it is there. Rows and
files change under the database's write lock, so that one never contradicts the other for long.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.objectstore_models import StoredObject
from sqlalchemy import select, update

# Smaller ones stay in the database.
LARGE = 256 * 1024
# In the row of a large object; no object is that short.
_IN_FILE = b"file"


class FileObjectStore(SqlObjectStore):
    """folder: of the files, which are named by the object's SHA-256."""

    def __init__(self, database_path: str, folder: Path) -> None:
        super().__init__(database_path)
        self._folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)

    def initialize(self, *args: object, **more: object) -> list[str]:
        """Make the tables; files that a crash left without a row are removed."""
        made: list[str] = super().initialize(*args, **more)  # type: ignore[arg-type]
        for file in self._folder.iterdir():
            if file.name not in self:
                file.unlink()
        return made

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keep an announced object; once it is there nothing changes it.

        Raises:
            ValueError: the content is not the id's. NoObjectInStoreError: not announced.
        """
        if len(object_content) < LARGE:
            super().put(object_id, object_content)
            return
        if object_id != get_object_id(object_content):
            raise ValueError(f"Object ID {object_id} does not match content hash")
        validate_object_content(content=object_content)
        with self.session() as session:
            waiting = session.scalar(
                update(StoredObject)
                .where(StoredObject.object_id == object_id, StoredObject.is_available == 0)
                .values(content=_IN_FILE, is_available=1)
                .returning(StoredObject.object_id)
            )
            if waiting is not None:
                partial = self._folder / f"{object_id}.part"
                partial.write_bytes(object_content)
                partial.replace(self._folder / object_id)
            elif object_id not in self:
                raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")

    def get(self, object_id: str) -> bytes | None:
        """The content; b"" where it is announced only, None where nobody has announced it."""
        content = super().get(object_id)
        if content != _IN_FILE:
            return content
        with suppress(FileNotFoundError):
            return (self._folder / object_id).read_bytes()
        # It was confirmed, and so deleted, in this moment; or a crash of the machine has lost it,
        # and then it must be sent again.
        with self.session() as session:
            lost = update(StoredObject).where(
                StoredObject.object_id == object_id, StoredObject.content == _IN_FILE
            )
            session.execute(lost.values(content=b"", is_available=0))
        return b"" if object_id in self else None

    def delete(self, object_id: str) -> None:
        """Drop an object that nothing refers to, and what only it referred to."""
        with self._mutation_session() as session:
            super().delete(object_id)
            left = select(StoredObject.object_id).where(StoredObject.object_id == object_id)
            if session.scalar(left) is None:
                (self._folder / object_id).unlink(missing_ok=True)

    def clear(self) -> None:
        """Drop everything."""
        super().clear()
        for file in self._folder.iterdir():
            file.unlink()

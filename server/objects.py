"""Flower's object store with the large objects as files beside its database.

A chunk of 5 MiB costs SQLite 1,300 pages, written twice (log and database), in the one transaction
that everybody waits for. As a file it is written once, by the gateway or the engine, and the store
gets a ticket for it (`medfl.common.shelf`); the row says that it is there. Rows and files change
under the database's write lock, so that one never contradicts the other for long.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.objectstore_models import StoredObject
from sqlalchemy import select, update

from medfl.common.shelf import LARGE, Shelf, ticket

# In the row of a large object; no object is that short.
_IN_FILE = b"file"


class FileObjectStore(SqlObjectStore):
    """folder: of the shelf."""

    def __init__(self, database_path: str, folder: Path) -> None:
        super().__init__(database_path)
        self._shelf = Shelf(folder)

    def initialize(self, *args: object, **more: object) -> list[str]:
        """Make the tables; files that a crash left without a row are removed."""
        made: list[str] = super().initialize(*args, **more)  # type: ignore[arg-type]
        for object_id in self._shelf.kept():
            if object_id not in self:
                self._shelf.drop(object_id)
        return made

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keep an announced object, itself or by its ticket; once it is there nothing changes it.

        Raises:
            ValueError: the content is not the id's, or nothing lies there for the ticket.
            NoObjectInStoreError: not announced.
        """
        if object_content != ticket(object_id):
            if len(object_content) < LARGE:
                super().put(object_id, object_content)
                return
            self._shelf.lay(object_id, object_content)
        try:
            self._keep(object_id)
        finally:
            self._shelf.take_back(object_id)

    def _keep(self, object_id: str) -> None:
        with self.session() as session:
            waiting = session.scalar(
                update(StoredObject)
                .where(StoredObject.object_id == object_id, StoredObject.is_available == 0)
                .values(content=_IN_FILE, is_available=1)
                .returning(StoredObject.object_id)
            )
            if waiting is not None:
                _check(self._shelf.laid(object_id))
                if not self._shelf.keep(object_id):
                    raise ValueError(_NOTHING)
            elif object_id not in self:
                raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")

    def get(self, object_id: str) -> bytes | None:
        """The content, of a large object the ticket; b"" where it is announced only.

        None where nobody has announced it.
        """
        content = super().get(object_id)
        if content != _IN_FILE:
            return content
        if self._shelf.has(object_id):
            return ticket(object_id)
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
                self._shelf.drop(object_id)

    def clear(self) -> None:
        """Drop everything."""
        super().clear()
        self._shelf.sweep(all_of_it=True)


_NOTHING = "nothing lies on the shelf for this ticket"


def _check(laid: Path | None) -> None:
    """Raise ValueError unless the file has an object's form; its hash was checked when it came."""
    if laid is None:
        raise ValueError(_NOTHING)
    with laid.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        validate_object_content(content=content)  # type: ignore[arg-type]

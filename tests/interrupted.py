"""Writing to a store's file that is cut off."""


class KilledError(Exception):
    pass


class Disk:
    """Passes a number of bytes of a store's writes, in order, to the file, and is then interrupted."""

    def __init__(self, monkeypatch, store_class, left):
        self.left, self.log = left, []
        write, sync = store_class._write, store_class._sync

        def limited(store, at, data):
            data = bytes(data)
            self.log.append((at, len(data)))
            write(store, at, data[: self.left])
            sync(store)
            if len(data) > self.left:
                raise KilledError
            self.left -= len(data)

        def logged(store):
            self.log.append("sync")
            sync(store)

        monkeypatch.setattr(store_class, "_write", limited)
        monkeypatch.setattr(store_class, "_sync", logged)

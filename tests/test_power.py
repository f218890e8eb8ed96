""" What a power cut leaves of a session's file, and what is there for a moment only.

A save writes to the page cache, and the system writes the pages to the disk when it likes, each
for itself; how long a file is, it may note before or after. Only what was synced is certain.
The writes of real saves are recorded, and all that a cut might leave is put in place of the file.
"""

import os
import random
import subprocess
import zlib

import pytest

import bottle_session
from bottle_session import FileStore, StoreError

PAGE = 4096
SIZES = 100, 500, 3000, 9000, 20000


class Disk:
    """ The versions that each page of a file, and its length, have had since the last sync. """

    def __init__(self, monkeypatch):
        self.pages, self.lengths, self.step = {}, [(0, 0)], 0
        for place, name, note in ((bottle_session, '_pwrite', self.write),
                                  (bottle_session, '_fdatasync', self.sync),
                                  (os, 'fsync', self.sync), (os, 'ftruncate', self.cut)):
            monkeypatch.setattr(place, name, self.noting(getattr(place, name), note))

    def noting(self, act, note):
        def noted(fd, *args):
            done = act(fd, *args)
            self.step += 1
            note(*args)
            return done
        return noted

    def write(self, data, offset):
        end = offset + len(data)
        for page in range(offset // PAGE, -(-end // PAGE)):
            versions, at = self.pages.setdefault(page, [(0, False, bytes(PAGE))]), page * PAGE
            first, last = max(offset, at), min(end, at + PAGE)
            old = versions[-1][2]
            new = old[:first - at] + data[first - offset:last - offset] + old[last - at:]
            versions.append((self.step, False, new))
        self.lengths.append((self.step, max(end, self.lengths[-1][1])))

    def cut(self, length):
        self.lengths.append((self.step, length))
        for page, versions in self.pages.items():
            kept = max(0, length - page * PAGE)
            if kept < PAGE:
                versions.append((self.step, True, versions[-1][2][:kept].ljust(PAGE, b'\0')))

    def sync(self, *args):
        for versions in self.lengths, *self.pages.values():
            del versions[:-1]

    def after_a_power_cut(self, chance):
        """ Return a content that the file may have. """
        step, length = chance.choice(self.lengths)
        content = b''
        for page in range(-(-length // PAGE)):
            versions = self.pages.get(page, [(0, False, bytes(PAGE))])
            gone = max((when for when, cut, _ in versions if cut and when <= step), default=0)
            content += chance.choice([version for version in versions if version[0] >= gone])[2]
        return content[:length]


@pytest.mark.parametrize('seed', range(25))
def test_a_power_cut_leaves_what_was_synced_or_something_newer(tmp_path, monkeypatch, seed):
    chance, name = random.Random(seed), os.urandom(32).hex()
    store, other = FileStore(tmp_path / 'one'), FileStore(tmp_path / 'other')
    assert other.create(name, b's' * 20, 1e12)
    disk, records = Disk(monkeypatch), []

    def new_record():
        records.append(b's' + os.urandom(15) + chance.randbytes(chance.choice(SIZES)))
        return records[-1]

    assert store.create(name, new_record(), 1e12, True)
    with open(other._path(name), 'r+b') as file:
        for _ in range(12):
            durable = chance.random() < 0.1
            assert store.replace(name, records[-1][:16], new_record(), 1e12, None, durable)
            if durable:
                del records[:-1]
            for _ in range(30):
                file.seek(0)
                file.write(disk.after_a_power_cut(chance))
                file.truncate()
                file.flush()
                assert other.load(name) in records
            if chance.random() < 0.3:  # by now the system has written all
                disk.sync()
                del records[:-1]


def test_a_number_that_nothing_can_follow_is_damage(tmp_path):
    store, name, record = FileStore(tmp_path), os.urandom(32).hex(), b's' * 20
    store.create(name, record, 1e12)
    number, last = b'\0\0\0\0\0\0\0\1', b'\xff' * 8
    with open(store._path(name), 'r+b') as file:
        page = file.read()
        head = page[page.index(number):page.index(record)]
        checksum = zlib.crc32(record, (1 << 64) - 1 & 0xffffffff).to_bytes(4, 'big')
        file.seek(0)
        file.write(page.replace(head, last + checksum + head[12:]))
    assert store.load(name) == b''
    assert store.replace(name, record[:16], b's' * 30, 1e12) == b''
    assert store.remove(name) and store.create(name, record, 1e12)


###############################################################################
# Moments #####################################################################
###############################################################################

@pytest.mark.parametrize('meanwhile', ['made', 'removed', 'nothing'])
def test_a_file_that_is_just_being_made_or_removed_is_not_called_cut(
        tmp_path, monkeypatch, caplog, meanwhile):
    """ Two log-ins of one owner at once: one reads the list that the other is making. """
    store, name = FileStore(tmp_path), os.urandom(32).hex()
    acts = {'made': lambda: store.create(name, b's' * 20, 1e12),
            'removed': lambda: store.remove(name), 'nothing': lambda: True}
    store.create(name, b's' * 20, 1e12)
    os.truncate(store._path(name), 0)
    monkeypatch.setattr(bottle_session.time, 'sleep', lambda seconds: acts[meanwhile]())
    assert store.load(name) is None
    assert ('was cut' in caplog.text) == (meanwhile == 'nothing')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='needs root')
def test_a_file_that_cannot_be_removed_is_left_as_it_was(tmp_path):
    store, name, record = FileStore(tmp_path), os.urandom(32).hex(), b's' * 20
    store.create(name, record, 1e12)
    path = store._path(name)
    if subprocess.run(['chattr', '+a', os.path.dirname(path)], capture_output=True).returncode:
        pytest.skip('needs a file system with attributes')
    try:  # to the directory only something can be added
        with pytest.raises(StoreError):
            store.remove(name, record[:16])
        assert store.load(name) == record
        store.sweep(2e12)
        assert store.load(name) == record
    finally:
        subprocess.run(['chattr', '-a', os.path.dirname(path)], check=True)
    assert store.remove(name, record[:16])

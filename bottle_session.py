#!/usr/bin/env python
""" Sessions for Bottle that are safe with threads, processes and machines.

One object at module level serves every visitor; the data of a visitor is
sealed with AES-256-GCM before it leaves the process::

    import bottle, bottle_session

    app = bottle.Bottle()
    session = bottle_session.Session('your-secret', mode='file')

    @app.route('/')
    def index():
        with session:
            session['visits'] = session.get('visits', 0) + 1
        return 'Visit number %d' % session['visits']

    app.run()

``session.connect()`` and ``session.save()`` do the same without a lock, and
``app.install(session)`` saves by itself. See README.rst for the rest.
"""

from __future__ import annotations

import contextlib
import copyreg
import errno
import hashlib
import hmac
import inspect
import itertools
import os
import pickle
import re
import stat
import struct
import sys
import threading
import time
import types
import warnings
import weakref
import zlib
from base64 import urlsafe_b64encode
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from datetime import date, datetime, timedelta
from hashlib import blake2b
from random import uniform

import bottle
from bottle import HTTPError, HTTPResponse, request, response

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn, TextIO, Union

    Secret = Union[str, bytes]
    Progress = Union[Callable[[float], object], None]

__all__ = ['FileStore', 'MemoryStore', 'RedisStore', 'Session', 'SessionBusy',
           'SessionError', 'Store', 'StoreError', 'check_store']
__version__ = '1.0.0'

###############################################################################
# Errors ######################################################################
###############################################################################


class SessionError(Exception):
    """ The base of this module's errors. Raised as it is for a value that
        cannot be stored, and for a new session after the headers were sent. """


class _Unavailable(SessionError, HTTPError):  # type: ignore[misc]
    """ A SessionError that an app which catches nothing answers with 503. """

    def __init__(self, message: str) -> None:
        HTTPError.__init__(self, 503, message, Retry_After='1')


class SessionBusy(_Unavailable):
    """ Another request holds this visitor's session in a ``with session:``
        block, for longer than `lock_timeout`. """


class StoreError(_Unavailable):
    """ The store cannot be reached, read or written. The cause is in
        ``__cause__`` and in the log, not in the answer to the visitor. """


# What visitors get to read: nothing of paths, servers or other visitors.
_BUSY = 'Another request is using this session.'
_OUT_OF_ORDER = 'The session store cannot be used at the moment.'


class _Unreadable(Exception):
    """ Why a stored record is treated as absent. """


class _Expired(_Unreadable):
    """ The one reason that is no trouble. """


class _Log:
    """ The logger 'bottle_session', imported at its first record: importing
        logging costs more than the rest of this module. """

    def __getattr__(self, level: str) -> Callable[..., None]:
        import logging
        method: Callable[..., None] = getattr(logging.getLogger('bottle_session'), level)
        setattr(self, level, method)
        return method


_log: Any = _Log()

###############################################################################
# Cookie ######################################################################
###############################################################################

_ID = re.compile(r'[A-Za-z0-9_-]{43}').fullmatch
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+").fullmatch
_MAX_HEADER = 16 * 1024  # bytes of Cookie header that are searched
_MAX_IDS = 4             # cookies of our name that are tried


def _new_id() -> str:
    """ Return a new session id: 256 random bits as 43 characters. """
    return urlsafe_b64encode(os.urandom(32))[:43].decode('ascii')


def _cookie_values(header: str, name: str) -> list[str]:
    """ Return the values of the cookies of this name, in their order.

        Bottle's own parser drops every cookie beside one it dislikes, raises on
        some and takes quadratic time on others (CVE-2024-7592).
    """
    values: list[str] = []
    if name in header and len(header) <= _MAX_HEADER:
        for pair in header.split(';'):
            key, _, value = pair.partition('=')
            if key.strip() == name:
                values.append(value.strip())
    return values


def _read_ids(header: str, name: str) -> list[str]:
    """ Return what may be ids among the cookies of this name.

        Several cookies of one name are what a neighbouring domain can plant (RFC
        6265bis, 8.6): trying a few of them keeps the visitor's own.
    """
    ids: list[str] = []
    for value in _cookie_values(header, name):
        if value[:1] == '"' == value[-1:]:
            value = value[1:-1]
        if _ID(value) and value not in ids:
            ids.append(value)
    return ids[:_MAX_IDS]


class _Cookie:
    """ The name and the attributes of our cookie, checked and ready to send. """

    def __init__(self, name: str, secure: bool | None, httponly: bool,
                 samesite: str | None, path: str, domain: str | None) -> None:
        if not isinstance(name, str):
            raise TypeError('cookie_name must be a str, not %s' % _kind(name))
        if not _TOKEN(name):
            raise ValueError('cookie_name=%r: use letters, digits, "-" and "_"' % name)
        for option, flag in ('secure', secure), ('httponly', httponly):
            if flag not in (True, False) and (option, flag) != ('secure', None):
                raise ValueError('%s=%r: use True or False' % (option, flag))
        if samesite is not None and str(samesite).lower() not in ('lax', 'strict', 'none'):
            raise ValueError("samesite=%r: use 'lax', 'strict', 'none' or None" % (samesite,))
        if not isinstance(path, str) or not re.fullmatch('/[!-:<-~]*', path):
            raise ValueError("path=%r: use a path that starts with '/', without ';', "
                             "spaces or characters beyond ASCII" % (path,))
        if domain is not None and not (
                isinstance(domain, str) and re.fullmatch(r'[A-Za-z0-9.-]+', domain)):
            raise ValueError("domain=%r: use a host name in ASCII ('xn--...' for others), "
                             "or None for the host that sent the cookie" % (domain,))
        prefix = name.lower()
        if prefix.startswith(('__host-', '__secure-')) and not secure:
            raise ValueError('cookie_name=%r: browsers take this prefix only with '
                             'secure=True' % name)
        if prefix.startswith('__host-') and (path != '/' or domain):
            raise ValueError("cookie_name=%r: browsers take this prefix only with path='/' "
                             "and without domain" % name)
        if samesite is not None and samesite.lower() == 'none' and not secure:
            raise ValueError("samesite='none': browsers take this only with secure=True")
        self.name = name
        self.secure = secure
        self.attributes = '; Path=%s' % path
        if domain:
            self.attributes += '; Domain=%s' % domain
        if httponly:
            self.attributes += '; HttpOnly'
        if samesite is not None:
            self.attributes += '; SameSite=%s' % samesite.capitalize()

    def line(self, scheme: str | None, value: str, max_age: float) -> str:
        """ Return the value of a Set-Cookie header; `max_age` 0 deletes. """
        secure = scheme == 'https' if self.secure is None else self.secure
        return '%s=%s; Max-Age=%d%s%s%s' % (
            self.name, value, -(-max_age // 1), self.attributes,
            '' if value else '; Expires=Thu, 01 Jan 1970 00:00:00 GMT',
            '; Secure' if secure else '')


###############################################################################
# Seal ########################################################################
###############################################################################

# record = version (16: key id 4, nonce 12) | stamp (24: told 8, proof 16)
#        | AES-256-GCM(created 8 | used 8 | told 8 | payload)
# A stamp without proof repeats what is sealed; with one it is a later use that a
# store noted without opening the seal.
_VERSION, _STAMP = 16, 24
_SEALED = _VERSION + _STAMP
_NO_PROOF = bytes(16)
_TIMES = struct.Struct('<ddd')
_TIME = struct.Struct('<d')


class _Times(namedtuple('_Times', 'created used told')):
    """ When a session was created, last used, and last told to the browser, in
        seconds since the epoch. """

    __slots__ = ()

    def used_at(self, now: float, tell: bool = True) -> _Times:
        """ Return the times with this use; it also mends what a wrong clock left. """
        return _Times(min(self.created, now), now, now if tell else self.told)


_NAMES = blake2b(digest_size=32, person=b'bsession 1 name')


def _name_of(id: str) -> str:
    """ Return the name under which a store keeps this session: a hash, so that
        neither a listing nor a look-up's timing tells an id (CVE-2019-16782). """
    name = _NAMES.copy()
    name.update(id.encode('ascii'))
    return name.hexdigest()


class _Secrets:
    """ The secrets, checked, as master keys: the first seals, all of them open. """

    def __init__(self, secret: Secret | Iterable[Secret]) -> None:
        if isinstance(secret, (str, bytes)):
            secret = [secret]
        elif not isinstance(secret, (list, tuple)):
            raise TypeError('secret must be a str, bytes or a list of them, not %s'
                            % _kind(secret))
        if not secret:
            raise ValueError('secret is an empty list: ' + _REMEDY)
        #: key id -> keyed BLAKE2b (RFC 7693), to be copied and given an id.
        self.masters: dict[bytes, Any] = {}
        for one in secret:
            if not isinstance(one, (str, bytes)):
                raise TypeError('secret must hold str or bytes, not %s' % _kind(one))
            raw = one.encode('utf-8', 'surrogatepass') if isinstance(one, str) else one
            if not raw:
                raise ValueError('secret is empty: ' + _REMEDY)
            if len(raw) < 16:
                warnings.warn('secret is shorter than 16 bytes: ' + _REMEDY, UserWarning,
                              stacklevel=3)
            master = blake2b(digest_size=32, person=b'bsession 1 key',
                             key=blake2b(raw, person=b'bsession 1').digest())
            self.masters.setdefault(master.digest()[:4], master)
        self.first = next(iter(self.masters))

    def load_cipher(self) -> None:
        """ Import the cipher; stores that keep bytes need it. """
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ImportError("file and redis mode seal the data with the package "
                              "'cryptography': pip install cryptography") from error
        self.cipher, self.forged = AESGCM, InvalidTag


class _Seal:
    """ Seals and opens the records of one session, with keys made of a secret
        and the session's id.

        With a key for each session random nonces are far from their limit (SP
        800-38D), and the store's content plus the secret still say nothing
        without the visitor's cookie.
    """

    __slots__ = 'id', 'name', '_secrets', '_ciphers'

    def __init__(self, secrets: _Secrets, id: str) -> None:
        self.id = id
        self.name = _name_of(id)
        self._secrets = secrets
        self._ciphers: dict[bytes, Any] = {}

    def seal(self, times: _Times, payload: bytes) -> bytes:
        """ Return a record that holds this payload. """
        nonce, first = os.urandom(12), self._secrets.first
        sealed: bytes = self._cipher(first).encrypt(
            nonce, _TIMES.pack(*times) + payload, self.name.encode('ascii'))
        return first + nonce + _TIME.pack(times.told) + _NO_PROOF + sealed

    def open(self, record: bytes) -> tuple[_Times, bytes]:
        """ Return the times and the payload, or raise _Unreadable. """
        key_id = record[:4]
        if key_id not in self._secrets.masters:
            raise _Unreadable('is damaged or was sealed with a secret that is not in the list')
        try:
            plain = self._cipher(key_id).decrypt(
                record[4:_VERSION], record[_SEALED:], self.name.encode('ascii'))
        except (self._secrets.forged, ValueError):  # ValueError: too short to be sealed
            raise _Unreadable('is damaged or forged') from None
        times = _Times._make(_TIMES.unpack_from(plain))
        stamp = record[_VERSION:_SEALED]
        if not stamp.endswith(_NO_PROOF):
            noted = _TIME.unpack_from(stamp)[0]
            if any(hmac.compare_digest(stamp, self.stamp(noted, key_id))
                   for key_id in self._secrets.masters):
                times = _Times(times.created, max(times.used, noted), max(times.told, noted))
        return times, plain[_TIMES.size:]

    def stamp(self, used: float, key_id: bytes | None = None) -> bytes:
        """ Return the proof of a use, for bytes 16 to 40 of a record. """
        raw = _TIME.pack(used)
        proof = self._secrets.masters[key_id or self._secrets.first].copy()
        proof.update(b'use ' + raw + self.id.encode('ascii'))
        return raw + bytes(proof.digest()[:16])

    def is_old(self, record: bytes) -> bool:
        """ Tell whether the record was sealed with an older secret. """
        return record[:4] != self._secrets.first

    def _cipher(self, key_id: bytes) -> Any:
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            key = self._secrets.masters[key_id].copy()
            key.update(self.id.encode('ascii'))
            cipher = self._ciphers[key_id] = self._secrets.cipher(key.digest())
        return cipher


_REMEDY = 'run "python -m bottle_session secret" to get a good one, and keep it out of the code'

###############################################################################
# Stores ######################################################################
###############################################################################


class Store:
    """ Where sessions are kept: the base class for stores of your own.

        A store sees names (64 hexadecimal digits) and records (bytes), never an
        id, data or a request. The first 16 bytes of a record are its *version*:
        records with the same version are the same. `expires` is a time in
        seconds since the epoch, as `time.time()` counts; a record past it may be
        removed and must not be handed out if the store can tell without effort
        (Session looks at a sealed copy of the time in any case).

        *Gone* is None or False, never an error. Each method is atomic, may be
        called by several threads and processes at once, and never waits for
        another: what is held raises SessionBusy at once, and Session tries
        again. What cannot be done raises StoreError, within two seconds.
    """

    #: True for a store in this process that keeps the objects themselves.
    keeps_objects = False

    def load(self, name: str) -> bytes | None:
        """ Return the record, or None; b'' for one that is damaged. """
        raise NotImplementedError

    def load_and_touch(self, name: str, stamp: bytes, lifetime: float, due: float) -> bytes | None:
        """ Return the record, or None; override it if a use can be noted on the way.

            :param stamp: what to put into bytes 16 to 40 of the record, if the
                time that begins it (8 bytes, a little-endian double) is `due`
                to `lifetime` seconds later than the one that is there.
            :param lifetime: seconds from now to the new `expires`, then.
        """
        return self.load(name)

    def create(self, name: str, record: bytes, expires: float, durable: bool = False) -> bool:
        """ Store a new record; return False, and change nothing, if the name is taken.

            :param durable: it must survive a power cut once this returns.
        """
        raise NotImplementedError

    def replace(self, name: str, version: bytes, record: bytes, expires: float,
                lock: Any = None) -> bytes | None:
        """ Put `record` in place of the one with this version and return `record`.
            Return the stored record if it is another by now, None if it is gone.

            :param lock: what `lock` gave, if this is its holder; SessionBusy is
                raised while somebody else holds one.
        """
        raise NotImplementedError

    def remove(self, name: str, version: bytes | None = None) -> bool:
        """ Remove the record for good, whoever holds a lock, and say whether it
            was there. With `version`, only if it still has that one. """
        raise NotImplementedError

    def lock(self, name: str) -> tuple[Any, bytes] | None:
        """ Keep others from `replace` and `lock`; return (lock, record), or None.
            A lock must end by itself when its process dies, 30 seconds later at most. """
        raise NotImplementedError

    def unlock(self, name: str, lock: Any) -> None:
        """ Let go of the lock, if it is still ours. """
        raise NotImplementedError

    def sweep(self, now: float, progress: Progress = None) -> int:
        """ Remove everything that expires until `now` and return how many.

            :param progress: called now and then with the share done, 0 to 1.
        """
        raise NotImplementedError

    def stats(self, now: float, progress: Progress = None) -> dict[str, Any]:
        """ Return the numbers 'sessions', 'expired' and 'bytes', and 'oldest', the
            time of the longest unused one's last use or None. """
        raise NotImplementedError


class MemoryStore(Store):
    """ Keeps what it is given, also objects, in a dict of this process. """

    keeps_objects = True

    def __init__(self) -> None:
        self._records: OrderedDict[str, tuple[Any, float]] = OrderedDict()
        self._locks: dict[str, object] = {}
        self._mutex = threading.Lock()

    def load(self, name: str) -> Any:
        found = self._records.get(name)
        return found[0] if found else None

    def create(self, name: str, record: Any, expires: float, durable: bool = False) -> bool:
        with self._mutex:
            if name in self._records:
                return False
            self._records[name] = record, expires
            for oldest in list(_first(self._records, 2)):  # clean faster than it grows
                self._drop_expired(oldest, time.time())
            return True

    def replace(self, name: str, version: bytes, record: Any, expires: float,
                lock: Any = None) -> Any:
        with self._mutex:
            if name not in self._records:
                return None
            stored = self._records[name][0]
            if stored is not record:  # a live object is only given a new `expires`
                if self._locks.get(name, lock) is not lock:
                    raise SessionBusy(_BUSY)
                if stored[:_VERSION] != version:
                    return stored
            self._records[name] = record, expires
            return record

    def remove(self, name: str, version: bytes | None = None) -> bool:
        with self._mutex:
            stored = self._records.get(name)
            if not stored or version is not None and stored[0][:_VERSION] != version:
                return False
            del self._records[name]
            self._locks.pop(name, None)
            return True

    def lock(self, name: str) -> tuple[object, Any] | None:
        with self._mutex:
            if name not in self._records:
                return None
            if name in self._locks:
                raise SessionBusy(_BUSY)
            lock = self._locks[name] = object()
            return lock, self._records[name][0]

    def unlock(self, name: str, lock: object) -> None:
        with self._mutex:
            if self._locks.get(name) is lock:
                del self._locks[name]

    def sweep(self, now: float, progress: Progress = None) -> int:
        with self._mutex:
            return sum(self._drop_expired(name, now) for name in list(self._records))

    def stats(self, now: float, progress: Progress = None) -> dict[str, Any]:
        with self._mutex:
            return {'sessions': len(self._records), 'bytes': 0, 'oldest': None,
                    'expired': sum(expires <= now for _, expires in self._records.values())}

    def _drop_expired(self, name: str, now: float) -> bool:
        expired = self._records[name][1] <= now and name not in self._locks
        if expired:
            del self._records[name]
        else:
            self._records.move_to_end(name)
        return expired


def _first(items: Iterable[str], count: int) -> Iterator[str]:
    return (item for item, _ in zip(items, range(count)))


_PAGE = 4096
_MAX_RECORD = 64 * 1024 * 1024  # bytes; a bigger one is foreign, or a mistake

# A file is one page, and room behind it for a record that outgrows it:
#   magic 8 | slot head 40 | record ... 2048: slot head 40 | record ... 4096
# A slot head tells where its record is. A save writes the slot that is not
# current, so that a reader finds the old record or the new one, whenever the
# process dies. No rename (ext4 takes 80 us for one), and no temporary file.
_MAGIC = b'BSess 1\n'
_HEAD = struct.Struct('<IQddIII')  # crc of the rest and the record, number, used,
_CRC = struct.Struct('<I')         # expires, offset, room, length
_HEADS = len(_MAGIC), _PAGE // 2
_OPEN_TO_READ = os.O_RDONLY | getattr(os, 'O_CLOEXEC', 0) | getattr(os, 'O_NOFOLLOW', 0) \
    | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_NOCTTY', 0)
_OPEN_TO_WRITE = _OPEN_TO_READ | os.O_RDWR
#: What opening or reading something that is no plain file says.
_NO_FILE = {errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EAGAIN}


class _Slot:
    """ One of the two places of a file for a record. """

    __slots__ = 'at', 'home', 'crc', 'number', 'used', 'expires', 'offset', 'room', 'length'
    number: int  # of the save
    used: float
    expires: float
    offset: int  # in the file, where the record is
    room: int    # bytes for it there

    def __init__(self, page: bytes, at: int) -> None:
        self.at = at
        self.home = at + _HEAD.size
        if len(page) >= self.home:
            (self.crc, self.number, self.used, self.expires, self.offset, self.room,
             self.length) = _HEAD.unpack_from(page, at)
        else:
            self.number = 0
        if self.number == 0:  # never written
            self.offset, self.room = self.home, _PAGE // 2 - self.home % (_PAGE // 2)
            self.used = self.expires = self.length = 0

    def fill(self, number: int, used: float, expires: float, record: bytes) -> bytes:
        """ Describe this record, and return the head to write. """
        head = _HEAD.pack(0, number, used, expires, self.offset, self.room, len(record))[4:]
        return _CRC.pack(zlib.crc32(record, zlib.crc32(head))) + head

    def is_sound(self) -> bool:
        """ Tell whether the head can be true: its place is one that we would choose. """
        if self.number >= 2 ** 63:
            return False
        if self.offset == self.home:
            return self.room == _PAGE // 2 - self.home % (_PAGE // 2)
        return (self.offset % _PAGE == 0 < self.offset <= 4 * _MAX_RECORD
                and _PAGE <= self.room <= _MAX_RECORD)

    def overlaps(self, other: _Slot) -> bool:
        return (self.offset < other.offset + other.room
                and other.offset < self.offset + self.room)

    def version(self, fd: int, page: bytes) -> bytes:
        """ Return the beginning of the record. """
        return page[self.offset:self.offset + _VERSION] or os.pread(fd, _VERSION, self.offset)

    def record(self, fd: int, page: bytes) -> bytes | None:
        """ Return the record, or None if it is not whole. """
        offset, end = self.offset, self.offset + self.length
        if offset == self.home and offset < end <= len(page):  # nearly all are like this
            return page[offset:end] if zlib.crc32(page[self.at + 4:end]) == self.crc else None
        if not (self.is_sound() and 0 < self.length <= self.room):
            return None
        record = os.pread(fd, self.length, offset)
        head = page[self.at + 4:self.home]
        return record if zlib.crc32(record, zlib.crc32(head)) == self.crc else None


class FileStore(Store):
    """ Keeps each session in a file of its own, for the processes of one host.

        :param directory: where to keep them, in 256 directories; made when
            first needed. Not on NFS, where locks and caches are not reliable.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        if fcntl is None:
            raise ValueError("mode='file' needs the file locks of a POSIX system, which this one "
                             "has not: use mode='memory' or a redis URL")
        self.directory = os.path.abspath(os.fspath(directory))
        if os.path.lexists(self.directory) and not os.path.isdir(self.directory):
            raise ValueError('sessions_dir=%r is not a directory' % self.directory)
        self._prefix = self.directory + os.sep
        self._cleaner: Iterator[str] | None = None
        self._cleaning = threading.Lock()
        self._cleaned = 0.0

    def load(self, name: str) -> bytes | None:
        path = self._path(name)
        try:
            fd = os.open(path, _OPEN_TO_READ)
        except OSError as error:
            self._absent(path, error)
            return None
        try:
            for attempt in range(20):
                page = os.read(fd, _PAGE)
                found = _newest(fd, page)
                if found and (found[0].at == _newer_first(page)[0]
                              or os.pread(fd, _PAGE, 0) == page):  # else two saves went by
                    return found[1]
                if page[:len(_MAGIC)] != _MAGIC or self._try_lock(fd) and attempt:
                    break  # nobody is writing, so it is not a race with two saves
                time.sleep(0.0005 * attempt)
                os.lseek(fd, 0, os.SEEK_SET)
        except OSError as error:
            self._absent(path, error)
            return None
        finally:
            os.close(fd)
        return b''  # which no seal opens

    def create(self, name: str, record: bytes, expires: float, durable: bool = False) -> bool:
        path = self._path(name)
        try:
            try:
                fd = os.open(path, _OPEN_TO_WRITE | os.O_CREAT | os.O_EXCL, 0o600)
            except FileNotFoundError:
                self._make_directory(os.path.dirname(path))
                fd = os.open(path, _OPEN_TO_WRITE | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return False
        except OSError as error:
            raise _failed('create', path, error) from error
        try:
            os.fchmod(fd, 0o600)  # whatever the umask
            slot = _Slot(b'', _HEADS[0])
            if len(record) > slot.room:
                slot.offset, slot.room = _PAGE, _room_for(record)
            head = _MAGIC + slot.fill(1, time.time(), expires, record)
            _write(fd, head.ljust(slot.offset, b'\0') + record, 0)
            if durable:
                os.fsync(fd)
                self._sync(os.path.dirname(path))
                self._sync(self.directory)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            if isinstance(error, OSError):
                raise _failed('write', path, error) from error
            raise
        finally:
            os.close(fd)
        self._clean_a_little()
        return True

    def replace(self, name: str, version: bytes, record: bytes, expires: float,
                lock: Any = None) -> bytes | None:
        path = self._path(name)
        fd = None
        try:
            fd = self._open_locked(path) if lock is None else lock
            if fd is None or lock is not None and os.fstat(fd).st_nlink == 0:
                return None
            page = os.pread(fd, _PAGE, 0)
            current = _newer(page)
            if current.number >= 2 ** 63 or current.version(fd, page) != version:
                found = _newest(fd, page)
                if not found or found[1][:_VERSION] != version:
                    return found and found[1]
                current = found[0]
            self._fill_other(fd, page, current, record, expires)
        except OSError as error:
            raise _failed('write', path, error) from error
        finally:
            if lock is None and fd is not None:
                _unlock(fd)
        self._clean_a_little()
        return record

    def remove(self, name: str, version: bytes | None = None) -> bool:
        path = self._path(name)
        if version is not None and (self.load(name) or b'')[:_VERSION] != version:
            return False
        try:
            directory = os.open(os.path.dirname(path), os.O_RDONLY)
            try:
                os.unlink(path)
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            self._absent(path, error)
            return False
        return True

    def lock(self, name: str) -> tuple[int, bytes] | None:
        path = self._path(name)
        found = fd = None
        try:
            fd = self._open_locked(path)
            if fd is None:
                return None
            found = _newest(fd, os.pread(fd, _PAGE, 0)) or (None, b'')
        except OSError as error:
            raise _failed('lock', path, error) from error
        finally:
            if fd is not None and not found:
                _unlock(fd)
        return fd, found[1]

    def unlock(self, name: str, lock: int) -> None:
        _unlock(lock)

    def sweep(self, now: float, progress: Progress = None) -> int:
        return sum(_remove_if_expired(path, now) for path in self._paths(progress))

    def stats(self, now: float, progress: Progress = None) -> dict[str, Any]:
        total: dict[str, Any] = {'sessions': 0, 'expired': 0, 'bytes': 0, 'oldest': None}
        for path in self._paths(progress):
            try:
                fd = os.open(path, _OPEN_TO_READ)
                try:
                    page = os.read(fd, _PAGE)
                    slot = _newer(page)
                    size = os.fstat(fd).st_blocks * 512
                finally:
                    os.close(fd)
            except OSError as error:
                self._absent(path, error)
                continue
            if page.startswith(_MAGIC) and slot.number and 0 < slot.used < 1e11:
                total['sessions'] += 1
                total['bytes'] += size
                total['expired'] += slot.expires <= now
                total['oldest'] = min(slot.used, total['oldest'] or slot.used)
        return total

    def _path(self, name: str) -> str:
        return '%s%s/%s' % (self._prefix, name[:2], name[2:])

    def _absent(self, path: str, error: OSError) -> None:
        """ Accept what is no session, raise StoreError for trouble. """
        if error.errno in _NO_FILE:
            _log.warning('%s is no session (%s); it is treated as absent', path, error.strerror)
        elif error.errno != errno.ENOENT:
            raise _failed('read', path, error) from error

    def _make_directory(self, path: str) -> None:
        missing = [path]
        while not os.path.isdir(os.path.dirname(missing[-1])):
            missing.append(os.path.dirname(missing[-1]))
        for directory in reversed(missing):
            try:
                os.mkdir(directory, 0o700)
                os.chmod(directory, 0o700)  # whatever the umask
            except FileExistsError:
                pass

    def _sync(self, directory: str) -> None:
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _try_lock(self, fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _open_locked(self, path: str) -> int | None:
        """ Open the file with its lock taken, or return None if there is none. """
        try:
            fd = os.open(path, _OPEN_TO_WRITE)
        except OSError as error:
            self._absent(path, error)
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = os.fstat(fd)
        except BlockingIOError:
            os.close(fd)
            raise SessionBusy(_BUSY) from None
        except BaseException:
            os.close(fd)
            raise
        if state.st_nlink and stat.S_ISREG(state.st_mode):
            return fd
        _unlock(fd)
        return None

    def _fill_other(self, fd: int, page: bytes, current: _Slot, record: bytes,
                    expires: float) -> None:
        """ Write the record into the slot that is not current. """
        other = _Slot(page, _HEADS[current.at == _HEADS[0]])
        if not other.is_sound() or other.overlaps(current):
            other = _Slot(b'', other.at)  # its head is damaged: start again in the page
        if len(record) > other.room:
            end = max(_PAGE, other.offset + other.room, current.offset + current.room)
            other.offset, other.room = -(-end // _PAGE) * _PAGE, _room_for(record)
        head = other.fill(current.number + 1, time.time(), expires, record)
        if other.offset == other.home:
            _write(fd, head + record, other.at)
            return
        if current.offset >= _PAGE:
            # The old record must be on the disk before its only other copy goes:
            # a power cut could tear both. Within one page it cannot.
            os.fdatasync(fd)
        _write(fd, record, other.offset)
        _write(fd, head, other.at)

    def _paths(self, progress: Progress = None) -> Iterator[str]:
        """ Yield the path of everything that is named like a session. """
        start = os.urandom(1)[0] if progress is None else 0
        for step in range(256):
            try:
                with os.scandir('%s%02x' % (self._prefix, (start + step) % 256)) as entries:
                    for entry in entries:
                        if len(entry.name) == 62 and entry.is_file(follow_symlinks=False):
                            yield entry.path
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                raise _failed('list', self.directory, error) from error
            if progress:
                progress((step + 1) / 256)

    def _clean_a_little(self) -> None:
        """ Remove expired sessions for two milliseconds, once a second. """
        now = time.time()
        if abs(now - self._cleaned) < 1 or not self._cleaning.acquire(blocking=False):
            return
        try:
            self._cleaned = now
            end = time.perf_counter() + 0.002
            paths = self._cleaner = self._cleaner or self._paths()
            for path in paths:
                if _remove_if_expired(path, now):
                    _log.debug('removed the expired session %s', path)
                if time.perf_counter() >= end:
                    return
            self._cleaner = None
        except StoreError as error:
            self._cleaner = None
            _log.warning('cleaning failed: %s', error)
        finally:
            self._cleaning.release()


def _newer_first(page: bytes) -> tuple[int, int]:
    """ Return the places of a file's slot heads, the newer one's first. """
    one, two = _HEADS
    is_two = page[two + 7:two - 1:-1] > page[one + 7:one - 1:-1]  # little-endian numbers
    return (two, one) if is_two else (one, two)


def _newer(page: bytes) -> _Slot:
    """ Return the newer slot as its head has it, whole or not. """
    return _Slot(page, _newer_first(page)[0])


def _newest(fd: int, page: bytes) -> tuple[_Slot, bytes] | None:
    """ Return the slot with the newest whole record, and the record. """
    if page.startswith(_MAGIC):
        for at in _newer_first(page):
            slot = _Slot(page, at)
            record = slot.record(fd, page)
            if record:
                return slot, record
    return None


def _room_for(record: bytes) -> int:
    if len(record) > _MAX_RECORD:
        raise SessionError('The session is too big: %d bytes of at most %d. Keep big things '
                           'elsewhere and their names here.' % (len(record), _MAX_RECORD))
    return max(_PAGE, 1 << (len(record) - 1).bit_length())


def _unlock(fd: int) -> None:
    """ Close the file and let go of its lock, also where a forked child shares it. """
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def _write(fd: int, data: bytes, offset: int) -> None:
    """ Write all of it; a nearly full disk takes only a part at first. """
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _remove_if_expired(path: str, now: float) -> bool:
    """ Remove the file if its session has expired, or if it never became one. """
    try:
        fd = os.open(path, _OPEN_TO_READ)
    except OSError:
        return False  # somebody else's, or gone already
    try:
        page = os.read(fd, _PAGE)
        slot = _newer(page)
        if slot.number and slot.used - now < _TOMORROW and slot.expires > now:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = _newest(fd, os.pread(fd, _PAGE, 0))
        if found and found[0].used - now < _TOMORROW:
            ended = found[0].expires <= now
        else:
            ended = _has_ended_oddly(path, page, found and found[0], os.fstat(fd).st_mtime, now)
        if ended:
            os.unlink(path)
        return ended
    except OSError:  # held by a request, or gone: the next round sees it
        return False
    finally:
        os.close(fd)


def _has_ended_oddly(path: str, page: bytes, slot: _Slot | None, changed: float,
                     now: float) -> bool:
    """ Tell whether a session from a wrong clock, or one that is not whole, has ended. """
    if slot is None:  # the process died while it made the file, or it is no file of ours
        return page[:len(_MAGIC)] == _MAGIC[:len(page)] and changed + 3600 < now
    if changed > now:  # count from now
        os.utime(path, (now, now))
    return changed + (slot.expires - slot.used) <= now


_TOMORROW = 86400.0  # seconds; a clock this far ahead was wrong


def _failed(verb: str, path: str, error: OSError) -> StoreError:
    _log.error('cannot %s %s: %s', verb, path, error.strerror)
    return StoreError(_OUT_OF_ORDER)


class RedisStore(Store):
    """ Keeps each session in a hash of a Redis (6.2 or newer) or Valkey server,
        for any number of hosts. The server's own TTL removes what has expired.

        :param client: a URL (``redis://``, ``rediss://``, ``valkey://``,
            ``unix://``, with redis-py's query options), or a client of redis-py
            that returns bytes, of a cluster too. By URL, time-outs are one
            second (``?socket_timeout=0.5`` sets another).
        :param prefix: what the keys begin with.
    """

    _LEASE = 30000  # milliseconds until a lock ends without its holder
    _PAUSE = 1.0    # seconds of failing at once after two failures in a row
    # What fails later than that timed out, whatever redis-py calls it: it is not
    # tried again, and counts as two, so that nobody else waits for a time-out.
    _SLOW = 0.3     # seconds

    # KEYS[1] is a hash: r = record, l = the holder's token, u = its end in server ms.
    _LOAD = """
        local record = redis.call('HGET', KEYS[1], 'r')
        if not record or #record < 40 then return record end
        local age = struct.unpack('<d', ARGV[1]) - struct.unpack('<d', record, 17)
        if age < tonumber(ARGV[3]) or age * 1000 >= tonumber(ARGV[2]) then return record end
        local noted = string.sub(record, 1, 16) .. ARGV[1] .. string.sub(record, 41)
        local done = redis.pcall('HSET', KEYS[1], 'r', noted)
        if type(done) == 'table' then return {record, done.err} end  -- full, or a replica
        redis.call('PEXPIRE', KEYS[1], ARGV[2])
        return noted"""
    # A command whose reply was lost is sent again: CREATE and REPLACE then find
    # their own record, and REMOVE the mark x that it leaves for a moment.
    _CREATE = """
        if redis.call('HSETNX', KEYS[1], 'r', ARGV[1]) == 0
                and redis.call('HGET', KEYS[1], 'r') ~= ARGV[1] then
            return 0
        end
        redis.call('PEXPIRE', KEYS[1], ARGV[2])
        return 1"""
    _READ = """
        local record, lock, till = unpack(redis.call('HMGET', KEYS[1], 'r', 'l', 'u'))
        local function now()
            local time = redis.call('TIME')
            return time[1] * 1000 + math.floor(time[2] / 1000)
        end
        if not record then return 0 end"""
    _REPLACE = _READ + """
        if string.sub(record, 1, 16) == string.sub(ARGV[2], 1, 16) then return 1 end
        if lock and lock ~= ARGV[4] and tonumber(till) > now() then return 2 end
        if string.sub(record, 1, 16) ~= ARGV[1] then return record end
        redis.call('HSET', KEYS[1], 'r', ARGV[2])
        redis.call('PEXPIRE', KEYS[1], ARGV[3])
        return 1"""
    _REMOVE = """
        if redis.call('HGET', KEYS[1], 'x') == ARGV[2] then return 1 end
        local record = redis.call('HGET', KEYS[1], 'r')
        if not record or string.sub(record, 1, 16) ~= ARGV[1] then return 0 end
        redis.call('HDEL', KEYS[1], 'r')
        redis.call('HSET', KEYS[1], 'x', ARGV[2])
        redis.call('PEXPIRE', KEYS[1], 5000)
        return 1"""
    _LOCK = _READ + """
        if lock and lock ~= ARGV[1] and tonumber(till) > now() then return 2 end
        redis.call('HSET', KEYS[1], 'l', ARGV[1], 'u', string.format('%d', now() + ARGV[2]))
        return record"""
    _UNLOCK = """
        if redis.call('HGET', KEYS[1], 'l') ~= ARGV[1] then return 0 end
        return redis.call('HDEL', KEYS[1], 'l', 'u')"""

    def __init__(self, client: Any = 'redis://localhost:6379/0',
                 prefix: str = 'bsession:') -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise ImportError("redis URLs need the package 'redis': "
                              "pip install 'bottle-secure-session[redis]'") from error
        self._errors = redis.exceptions
        if isinstance(client, str):
            client = redis.Redis.from_url(
                re.sub('^valkey', 'redis', client), socket_timeout=1, socket_connect_timeout=1,
                retry=Retry(NoBackoff(), 0))
        if client.get_encoder().decode_responses:
            raise ValueError('RedisStore needs a client that returns bytes: '
                             'make it without decode_responses=True')
        self.client = client
        self._prefix = prefix
        self._hashes: dict[str, str] = {}
        self._failures = 0
        self._open_again = 0.0
        self._policy_checked = False
        self._check_policy()

    def load(self, name: str) -> bytes | None:
        record: bytes | None = self._ask(self.client.hget, self._prefix + name, 'r')
        return record

    def load_and_touch(self, name: str, stamp: bytes, lifetime: float, due: float) -> bytes | None:
        reply = self._run(self._LOAD, name, stamp, _ms(lifetime), repr(due))
        if isinstance(reply, list):
            _log.warning('redis: a use could not be recorded: %r', reply[1])
            reply = reply[0]
        record: bytes | None = reply
        return record

    def create(self, name: str, record: bytes, expires: float, durable: bool = False) -> bool:
        return bool(self._run(self._CREATE, name, record, _ms(expires - time.time())))

    def replace(self, name: str, version: bytes, record: bytes, expires: float,
                lock: Any = None) -> bytes | None:
        reply = self._run(self._REPLACE, name, version, record, _ms(expires - time.time()),
                          lock or b'')
        if reply == 2:
            raise SessionBusy(_BUSY)
        return {0: None, 1: record}.get(reply, reply)

    def remove(self, name: str, version: bytes | None = None) -> bool:
        key = self._prefix + name
        if version is None:
            return bool(self._ask(self.client.delete, key))
        if not self._run(self._REMOVE, name, version, os.urandom(12)):
            return False
        try:
            self._ask(self.client.delete, key)
        except StoreError as error:
            _log.debug('the mark of a removed session ends by itself: %s', error)
        return True

    def lock(self, name: str) -> tuple[bytes, bytes] | None:
        token = os.urandom(12)
        reply = self._run(self._LOCK, name, token, self._LEASE)
        if reply == 2:
            raise SessionBusy(_BUSY)
        return (token, reply) if reply else None

    def unlock(self, name: str, lock: bytes) -> None:
        self._run(self._UNLOCK, name, lock)

    def sweep(self, now: float, progress: Progress = None) -> int:
        self._ask(self.client.ping)
        return 0  # the server does it

    def stats(self, now: float, progress: Progress = None) -> dict[str, Any]:
        total: dict[str, Any] = {'sessions': 0, 'expired': 0, 'bytes': 0, 'oldest': None}
        for key in self._ask(lambda: list(self.client.scan_iter(self._prefix + '*', 1000))):
            total['sessions'] += 1
            total['bytes'] += self._ask(self.client.memory_usage, key) or 0
        return total

    def _run(self, script: str, name: str, *args: Any) -> Any:
        """ Run a script by its hash; the server learns it again when it lost it. """
        sha = self._hashes.get(script)
        if sha is None:
            sha = self._hashes[script] = hashlib.sha1(script.encode('ascii')).hexdigest()
        key = self._prefix + name
        try:
            return self._ask(self.client.evalsha, sha, 1, key, *args)
        except self._errors.NoScriptError:
            return self._ask(self.client.eval, script, 1, key, *args)

    def _ask(self, command: Callable[..., Any], *args: Any) -> Any:
        """ Send a command; a lost connection is tried once more, a time-out is not,
            and after two failures the next ones fail at once for a moment. """
        start = time.monotonic()
        if self._failures > 1 and start < self._open_again:
            raise StoreError(_OUT_OF_ORDER)
        try:
            try:
                reply = command(*args)
            except self._errors.ConnectionError:
                if time.monotonic() - start > self._SLOW:
                    raise
                reply = command(*args)
        except self._errors.NoScriptError:
            raise
        except (self._errors.RedisError, OSError) as error:
            if 'WRONGTYPE' in str(error):
                _log.warning('redis: a key is no session; it is treated as absent: %s', error)
                return None
            _log.error('redis: %s: %s', type(error).__name__, error)
            if isinstance(error, self._errors.ReadOnlyError) or 'READONLY' in str(error):
                # A replica by now: look again. Redis 6.2 says so in a script's error only.
                if hasattr(self.client, 'connection_pool'):  # a cluster's client looks itself
                    self.client.connection_pool.disconnect()
            elif not isinstance(error, self._errors.ResponseError):
                now = time.monotonic()
                self._failures += 2 if now - start > self._SLOW else 1
                self._open_again = now + self._PAUSE
            raise StoreError(_OUT_OF_ORDER) from error
        self._failures = 0
        if not self._policy_checked:
            self._check_policy()
        return reply

    def _check_policy(self) -> None:
        """ Warn of a server that would rather throw sessions away than be full. """
        try:
            policy = self.client.info('memory').get('maxmemory_policy', 'noeviction')
        except (self._errors.ConnectionError, self._errors.TimeoutError, OSError) as error:
            _log.warning('redis does not answer yet: %s', error)
            return
        except (self._errors.RedisError, AttributeError) as error:  # not allowed, or a cluster
            _log.info('cannot tell the eviction policy of redis: %s', error)
            policy = 'noeviction'
        self._policy_checked = True
        if policy != 'noeviction':
            _log.warning('redis has maxmemory-policy %s: it throws living sessions away when its '
                         'memory is full; use noeviction', policy)


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def check_store(make_store: Callable[[], Store]) -> None:
    """ Check that a store keeps the promises of `Store`; AssertionError if not.

        One line of your own tests does it::

            def test_my_store(): bottle_session.check_store(MyStore)

        :param make_store: called twice, for two objects on the same storage.
    """
    store, other = make_store(), make_store()
    name, later = hashlib.sha256(os.urandom(16)).hexdigest(), time.time() + 60
    one, two, three = (os.urandom(40) + b'\0record' * size for size in (1, 2, 100000))

    assert store.load(name) is None, 'load() returns None for an unknown name'
    assert store.replace(name, one[:16], two, later) is None, 'replace() never creates'
    assert store.lock(name) is None, 'lock() returns None for an unknown name'
    assert not store.remove(name), 'remove() tells that there was nothing'
    assert store.load(name) is None, 'nothing of that created a record'

    assert store.create(name, one, later), 'create() stores'
    assert not other.create(name, two, later), 'create() never overwrites'
    assert other.load(name) == one, 'load() returns the bytes that were stored'
    assert store.replace(name, one[:16], two, later) == two, 'replace() stores'
    assert other.replace(name, one[:16], three, later) == two, \
        'replace() of another version changes nothing and returns what is stored'
    assert other.replace(name, two[:16], three, later) == three, 'records may grow'
    assert bytes(store.load(name) or b'') == three

    held = store.lock(name)
    assert held and held[1] == three, 'lock() returns the record with the lock'
    for action in (lambda: other.lock(name), lambda: other.replace(name, three[:16], one, later)):
        try:
            action()
        except SessionBusy:
            continue
        raise AssertionError('lock() keeps others out: SessionBusy at once')
    assert other.load(name) == three, 'load() does not care for locks'
    assert store.replace(name, three[:16], one, later, held[0]) == one, 'the holder may save'
    store.unlock(name, held[0])
    assert other.replace(name, one[:16], two, later) == two, 'unlock() lets others save'

    assert not store.remove(name, one[:16]), 'remove() with another version does nothing'
    held = store.lock(name)
    assert held and other.remove(name), 'remove() does not care for locks'
    assert store.replace(name, two[:16], one, later, held[0]) is None, 'what was removed is gone'
    store.unlock(name, held[0])
    assert store.load(name) is None

    assert store.create(name, one, later) and store.remove(name, one[:16])
    assert store.create(name, one, time.time() + 0.05)
    time.sleep(0.06)
    store.sweep(time.time())
    assert store.load(name) is None, 'sweep() removes what has expired'
    assert other.create(name, one, later)
    store.sweep(time.time())
    assert store.load(name) == one, 'sweep() keeps what has not expired'

    wins = []

    def save(new: bytes) -> None:
        try:
            wins.append(store.replace(name, one[:16], new, later) == new)
        except SessionBusy:
            pass  # another is at it: right, too

    threads = [threading.Thread(target=save, args=(os.urandom(60),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wins.count(True) == 1, 'of several replace() of one version one wins'
    assert store.remove(name)


###############################################################################
# Visit #######################################################################
###############################################################################

_PLAIN = frozenset((str, int, float, bool, bytes, type(None), complex, datetime, date, timedelta))
_BY_NAME = (type, types.FunctionType, types.BuiltinFunctionType)


class _Turns:
    """ A lock for each session that this process waits for or holds, so that of
        many threads only one asks the store at a time. """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._turns: dict[str, list[Any]] = {}  # name -> [lock, how many hold or await it]

    def take(self, name: str, seconds: float) -> bool:
        with self._mutex:
            turn = self._turns.setdefault(name, [threading.Lock(), 0])
            turn[1] += 1
        try:
            taken = turn[0].acquire(timeout=seconds)
        except BaseException:  # a greenlet's time-out
            self._leave(name, turn)
            raise
        if not taken:
            self._leave(name, turn)
        return bool(taken)

    def give(self, name: str) -> None:
        turn = self._turns.get(name)
        if turn:  # a forked child knows nothing of its parent's turns
            turn[0].release()
            self._leave(name, turn)

    def _leave(self, name: str, turn: list[Any]) -> None:
        with self._mutex:
            turn[1] -= 1
            if not turn[1]:
                self._turns.pop(name, None)


_turns = _Turns()
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_turns.__init__)  # type: ignore[misc]


class _Visit:
    """ What one visitor's session is in one request. """

    # Most requests change few of these, so the class holds the values at first.
    data: dict[Any, Any] | None = None  # None: not asked for yet
    id: str | None = None               # of the session in the store
    cookie: str | None = None           # what to tell the browser
    why = 'the browser sent no cookie of ours'
    gone = False     # purged, regenerated or expired since it was loaded
    saved = False    # or tried to
    late = False     # used after the route was done
    handled = False  # a key may have been set or deleted
    exposed = False  # somebody may have changed the inside of a value
    depth = 0        # of `with` blocks
    held: tuple[str, Any] | None = None  # the name and the store's lock
    # From here on they are set together with the id.
    name: str      # in the store
    times: _Times
    record: Any    # as the store has it

    def __init__(self, session: Session, environ: dict[str, Any], exchange: _Exchange) -> None:
        # Not the environ itself: it holds the visit, and they would wait for the
        # garbage collector together with an upload.
        self.session = session
        self.exchange = exchange
        self.header: str = environ.get('HTTP_COOKIE', '')
        self.scheme: str | None = (environ.get('HTTP_X_FORWARDED_PROTO')  # Bottle's rule
                                   or environ.get('wsgi.url_scheme'))
        self.snapshots: list[Any] = []

    def ids(self) -> list[str]:
        return _read_ids(self.header, self.session.cookie_name)

    def tell(self, value: str, max_age: float) -> None:
        """ Have the browser told of an id, or with '' to forget it. """
        self.cookie = self.session._cookie.line(self.scheme, value, max_age)
        self.exchange.news()

    def tell_id(self, now: float) -> None:
        assert self.id
        self.tell(self.id, self.session._expires(self.times) - now)

    def load(self) -> dict[Any, Any]:
        raise NotImplementedError

    def loaded(self) -> dict[Any, Any]:
        return self.load() if self.data is None else self.data

    def lose(self) -> bool:
        """ Accept that the session ended elsewhere: nothing can bring it back. """
        _log.info('session %s: a save was dropped, it was purged, regenerated or expired '
                  'meanwhile', _public(self.name))
        self.why = 'it was purged, regenerated or expired elsewhere during this request'
        self.gone, self.id = True, None
        return False

    def hold(self, name: str) -> Any:
        """ Take the session's lock; return what is stored, or None if it is gone. """
        session = self.session
        start = time.monotonic()
        if not _turns.take(name, session.lock_timeout):
            raise SessionBusy(_BUSY)
        got = None
        try:
            got = session._patiently(lambda: self.lock(name), start)
            if got:
                self.held = name, got[0]
        finally:
            if not got:
                _turns.give(name)
        return got and got[1]

    def lock(self, name: str) -> tuple[Any, Any] | None:
        return self.session.store.lock(name)

    def let_go(self) -> None:
        if self.held:
            (name, lock), self.held = self.held, None
            try:
                if lock is not None:
                    self.session.store.unlock(name, lock)
            except StoreError as error:
                _log.warning('session %s: its lock ends by itself, it could not be released: %s',
                             _public(name), error)
            finally:
                _turns.give(name)

    def exit(self, error: BaseException | None) -> None:
        """ Leave a `with` block: save after an answer, undo after a failure. """
        if not self.depth:  # entered in another request
            _raise_outside()
        snapshot = self.snapshots.pop()
        self.depth -= 1
        try:
            if error is not None and (not isinstance(error, HTTPResponse)
                                      or isinstance(error, SessionError)):
                self.restore(snapshot)
            elif not self.depth:
                self.save()
        finally:
            if not self.depth:
                self.let_go()

    def regenerate(self) -> None:
        self.loaded()
        self.exchange.must_be_open()
        if not self.id:
            self.save()  # its id is new
            return
        try:
            if self.held or self.catch_up():
                self.move()
            else:
                self.lose()
        finally:
            if not self.depth or self.held and self.held[0] != self.name:
                self.let_go()

    def catch_up(self) -> bool:
        """ Take the session's lock and the newest data; tell whether it still exists. """
        raise NotImplementedError

    def move(self) -> None:
        """ Store the session under a new id and remove the old one. """
        raise NotImplementedError

    def restore(self, snapshot: Any) -> None:
        raise NotImplementedError

    def save(self) -> bool:
        raise NotImplementedError

    def forget(self) -> None:
        """ Remove the session from the store and the browser. """
        session = self.session
        if self.id:
            names = [self.name]
        else:
            names = [_name_of(id) for id in self.ids()] if self.data is None else []
        for name in names:
            session.store.remove(name)
        self.let_go()
        self.id, self.gone = None, False
        self.why = 'it was purged in this request'
        if self.data is None:
            self.data = {}
        self.data.clear()
        if self.cookie or _cookie_values(self.header, session.cookie_name):
            self.tell('', 0)


class _Live:
    """ A session of the memory mode. """

    __slots__ = 'data', 'times', 'ended'

    def __init__(self, data: dict[Any, Any], times: _Times) -> None:
        self.data = data
        self.times = times
        self.ended = False  # purged, or moved to a new id


class _LiveVisit(_Visit):
    """ A visit in memory mode: `data` is the stored dict itself. """

    apart = False  # others may hold our dict: the store gets copies

    def load(self) -> dict[Any, Any]:
        session, now = self.session, self.session.clock()
        for id in self.ids():
            self.why = 'the session is unknown or expired'
            self.name = _name_of(id)
            live: Any = session.store.load(self.name)
            if live is None:
                continue
            if session._ended(live.times, now):
                session.store.remove(self.name)
                continue
            self.id, self.record, self.times = id, live, live.times
            self.why = 'loaded'
            if session._due(live.times, now):
                self.times = live.times = live.times.used_at(now)
                session.store.replace(self.name, b'', live, session._expires(live.times))
                self.tell_id(now)
            data: dict[Any, Any] = live.data
            self.data = data
            return data
        self.data = {}
        return self.data

    def loaded(self) -> dict[Any, Any]:
        if self.id and self.record.ended:  # by another request, which may go on with the dict
            self.lose()
            self.data = {}
        return self.load() if self.data is None else self.data

    def changed(self) -> bool:
        data = self.loaded()
        return not self.id and not self.gone and bool(data)

    def save(self) -> bool:
        if self.data is None:
            return False
        if self.changed():
            self._keep()
            return True
        if self.id and self.apart:
            self.record.data = dict(self.loaded())
        return False

    def _keep(self, created: float | None = None) -> None:
        self.exchange.must_be_open()
        id, data, now = _new_id(), self.loaded(), self.session.clock()
        times = _Times(now if created is None else created, now, now).used_at(now)
        live: Any = _Live(dict(data) if self.apart else data, times)
        name = _name_of(id)
        self.session.store.create(name, live, self.session._expires(times))
        self.id, self.name, self.times, self.record = id, name, times, live
        self.why = 'it was stored in this request'
        self.tell_id(now)

    def finish(self, environ: Mapping[str, Any], crashed: bool) -> None:
        if not crashed:
            self.save()

    def purge(self) -> None:
        self.loaded()
        if self.id:
            self.record.ended = self.apart = True
        self.forget()
        self.snapshots = [{} for _ in self.snapshots]

    def catch_up(self) -> bool:
        return self.hold(self.name) is not None

    def move(self) -> None:
        old, self.apart = self.record, True
        self.session.store.remove(self.name)
        self._keep(self.times.created)
        old.ended = True

    def lock(self, name: str) -> tuple[None, Any] | None:
        live: Any = self.session.store.load(name)
        if live is None or self.session._ended(live.times, self.session.clock()):
            return None
        return None, live  # our turn keeps others out

    def enter(self) -> None:
        data = self.loaded()
        if not self.depth and self.id and not self.catch_up():
            self.lose()
            self.data = data = {}
        self.snapshots.append(dict(data))
        self.depth += 1

    def restore(self, snapshot: dict[Any, Any]) -> None:
        data = self.loaded()
        for key in set(data) - set(snapshot):
            data.pop(key, None)
        data.update(snapshot)


class _SealedVisit(_Visit):
    """ A visit with a store that keeps bytes.

        `plain` is what was stored, `before` a shallow copy of the data made of it:
        where all values are the same and cannot change inside, nothing changed.
    """

    seal: _Seal
    plain: bytes
    before: dict[Any, Any]

    def load(self) -> dict[Any, Any]:
        return self._find(self._fetch)

    def _find(self, fetch: Callable[[_Seal, bytes], bytes | None]) -> dict[Any, Any]:
        """ Take the first session that one of the cookies opens. """
        session, now = self.session, self.session.clock()
        for id in self.ids():
            seal = _Seal(session._secrets, id)
            stamp = seal.stamp(now) if session._touches else b''
            record = fetch(seal, stamp)
            if record is None:
                self.why = 'the session is unknown, expired or was purged'
                continue
            try:
                times, plain, data = self._open(seal, record, now)
            except _Unreadable as error:
                self._report(seal.name, error)
                self.let_go()
                continue
            self.id, self.name, self.seal = id, seal.name, seal
            self.why = 'loaded'
            self.data = data
            self._base(record, times, plain, data.copy())
            noted = stamp and stamp == record[_VERSION:_SEALED]  # this use, by the store
            if noted and not seal.is_old(record):
                self.tell_id(now)
            elif noted or session._due(times, now):
                self._touch(now)
            return data
        self.data, self.plain, self.before = {}, b'', {}
        return self.data

    def _fetch(self, seal: _Seal, stamp: bytes) -> bytes | None:
        session = self.session
        if not stamp:
            return session.store.load(seal.name)
        lifetime = min(session._lifetime, session._max_age or session._lifetime)
        return session.store.load_and_touch(seal.name, stamp, lifetime, session._step)

    def _fetch_locked(self, seal: _Seal, stamp: bytes) -> bytes | None:
        record: bytes | None = self.hold(seal.name)
        return record

    def _open(self, seal: _Seal, record: bytes, now: float
              ) -> tuple[_Times, bytes, dict[Any, Any]]:
        """ Return (times, plain, data), or raise _Unreadable. """
        times, plain = seal.open(record)
        if self.session._ended(times, now):
            raise _Expired('has expired')
        return times, plain, self.session._loads(plain)

    def _report(self, name: str, error: _Unreadable) -> None:
        self.why = 'the stored session ' + str(error)
        level = _log.debug if isinstance(error, _Expired) else _log.warning
        level('session %s %s; it is treated as absent', _public(name), error)

    def _base(self, record: bytes, times: _Times, plain: bytes, data: dict[Any, Any]) -> None:
        """ Note what is stored. """
        self.record, self.times, self.plain, self.before = record, times, plain, data

    def _touch(self, now: float) -> None:
        """ Record this use; what prevents it is logged, the request goes on. """
        if self.exchange.stage >= _SENT:
            return
        session, times = self.session, self.times.used_at(now)
        record = self.seal.seal(times, self.plain)
        try:
            stored = session.store.replace(self.name, self.record[:_VERSION], record,
                                           session._expires(times), self.token)
        except StoreError as error:
            _log.warning('session %s: its use could not be recorded: %s',
                         _public(self.name), error)
        except SessionBusy:
            _log.debug('session %s is held: its use is recorded later', _public(self.name))
        else:
            if stored == record:
                self.record, self.times = record, times
                self.tell_id(now)

    @property
    def token(self) -> Any:
        """ What `Store.lock` gave, for `Store.replace`. """
        return self.held[1] if self.held else None

    def changes(self) -> bytes | None:
        """ Return the data serialized if it differs from what is stored, else None. """
        if not self.may_have_changed():
            return None
        plain = self._dumps()
        if plain == self.plain:
            return None
        mine = self._loads_back(plain) if self.exposed else None
        if self._surely_changed():
            return plain
        base = self.session._loads(self.plain)
        return None if self._same(base, mine or self._loads_back(plain)) else plain

    def may_have_changed(self) -> bool:
        """ Tell without serializing whether any value is another object, or one
            that can change inside and was given out. """
        data, before = self.loaded(), self.before
        if not (self.handled or self.exposed):
            return False
        if len(data) != len(before):
            return True
        for (key, value), (old_key, old) in zip(data.items(), before.items()):
            if value is not old or key is not old_key or (
                    self.exposed and type(value) not in _PLAIN):
                return True
        return False

    def _surely_changed(self) -> bool:
        """ Tell whether plain values are enough to see a change. """
        data = self.loaded()
        if data.keys() != self.before.keys():
            return True
        for key, old in self.before.items():
            new = data[key]
            if new is not old and type(old) in _PLAIN and type(new) in _PLAIN and (
                    type(new) is not type(old) or old != new == new):  # not for a nan
                return True
        return False

    def changed(self) -> bool:
        if self.gone:
            return False
        return self.changes() is not None if self.id else bool(self.data)

    def _same(self, one: Any, other: Any) -> bool:
        try:
            return _same(one, other, self.session._dumps, {})
        except Exception as error:  # from methods of the user's classes
            _log.debug('cannot compare two values, so it counts as a change: %s', error)
            return False

    def _dumps(self) -> bytes:
        try:
            return self.session._dumps(self.loaded())
        except Exception as error:
            self._blame(error)

    def _loads_back(self, plain: bytes) -> dict[Any, Any]:
        """ Return the data as it would be loaded; what does not load must not be stored. """
        try:
            return self.session._loads(plain)
        except _Unreadable as error:
            self._blame(error)

    def _blame(self, error: Exception) -> NoReturn:
        """ Raise a SessionError that names the value with which serializing fails. """
        for key, value in self.loaded().items():
            try:
                self.session._loads(self.session._dumps({key: value}))
            except Exception as reason:
                raise SessionError(
                    'session[%r] holds a value of type %s, which cannot be stored (%s). Keep '
                    'plain values, or what identifies the object.'
                    % (key, _kind(value), reason)) from error
        raise SessionError('The session cannot be stored: %s' % error) from error

    def _checked_dumps(self) -> bytes:
        plain = self._dumps()
        if self.exposed:
            self._loads_back(plain)
        return plain

    def save(self) -> bool:
        if self.data is None:
            return False
        self.saved = True
        if not self.id:
            if self.gone:
                return self.may_have_changed() and self.lose()
            if self.data:
                self._become(*self._create(self.session.clock(), self._checked_dumps()))
                self.why = 'it was stored in this request'
            return bool(self.data)
        plain = self.changes()
        return plain is not None and self._update(plain)

    def _create(self, created: float, plain: bytes, durable: bool = False) -> tuple[Any, ...]:
        """ Store the data under a new id and return what `_become` takes. """
        self.exchange.must_be_open()
        session, now = self.session, self.session.clock()
        seal, times = _Seal(session._secrets, _new_id()), _Times(created, now, now).used_at(now)
        record = seal.seal(times, plain)
        if not session.store.create(seal.name, record, session._expires(times), durable):
            raise StoreError('The session store has this new session already.')
        return seal, record, times, plain

    def _become(self, seal: _Seal, record: bytes, times: _Times, plain: bytes) -> None:
        self.id, self.name, self.seal = seal.id, seal.name, seal
        self._stored(record, times, plain)
        self.tell_id(times.used)

    def _stored(self, record: bytes, times: _Times, plain: bytes) -> None:
        self._base(record, times, plain, self.loaded().copy())
        self.handled = False
        self.snapshots = [plain for _ in self.snapshots]

    def _update(self, plain: bytes) -> bool:
        """ Write what changed on top of what is stored by now. """
        session, store = self.session, self.session.store
        now = session.clock()
        if session._ended(self.times, now) and not self._absorb(store.load(self.name)):
            return self.lose()
        while True:
            tell = session._due(self.times, now) and self.exchange.stage < _SENT
            times = self.times.used_at(now, tell)
            record = self.seal.seal(times, plain)
            version, expires = self.record[:_VERSION], session._expires(times)
            stored = session._in_turn(self.name, lambda: store.replace(
                self.name, version, record, expires, self.token), bool(self.held))
            if stored == record:
                self._stored(record, times, plain)
                if tell:
                    self.tell_id(now)
                return True
            if not self._absorb(stored):
                return self.lose()
            if self.held:
                _log.warning('session %s: its lock was lost to another request, the changes of '
                             'both are merged', _public(self.name))
            else:
                _log.info('session %s: merged with a save of another request',
                          _public(self.name))
            merged = self.changes()
            if merged is None:  # the other one wrote the same
                return False
            plain = merged

    def _absorb(self, record: bytes | None) -> bool:
        """ Take over what is stored by now, beneath the changes of this request. """
        if record is None:
            return False
        try:
            times, plain, newest = self._open(self.seal, record, self.session.clock())
        except _Unreadable as error:
            self._report(self.name, error)
            return False
        data, missing = self.loaded(), object()
        base, mine = self.session._loads(self.plain), self._loads_back(self._dumps())
        if mine.keys() != data.keys():  # json made text of other keys
            data.clear()
            data.update(mine)
        before = dict(newest)
        for key in {**base, **newest, **mine}:
            old, own, new = (d.get(key, missing) for d in (base, mine, newest))
            if self._same(old, own):  # not changed by this request
                if new is missing:
                    data.pop(key, None)
                elif self._same(old, new):
                    before[key] = data[key]
                else:
                    data[key] = new
        self._base(record, times, plain, before)
        return True

    def finish(self, environ: Mapping[str, Any], crashed: bool) -> None:
        if self.data is None or crashed or not self.may_have_changed():
            return
        if self.session._saves_itself(environ):
            self.save()
        elif not self.saved:
            self._warn_if_changed(environ.get('bottle.route'))

    def _warn_if_changed(self, route: bottle.Route | None) -> None:
        rule = route.rule if route else 'A request without a route'
        if rule in self.session._warned:
            return
        try:
            changed = self.changed()
        except SessionError:
            changed = True
        if changed:
            self.session._warned.add(rule)
            _log.warning('%s changed the session and did not save it: call session.save(), use '
                         '"with session:", or app.install(session)', rule)

    def purge(self) -> None:
        self.forget()
        self.plain, self.before = b'', {}
        self.snapshots = [b'' for _ in self.snapshots]

    def catch_up(self) -> bool:
        return self._absorb(self.hold(self.name))

    def move(self) -> None:
        store, plain = self.session.store, self._checked_dumps()
        new = self._create(self.times.created, plain, durable=True)
        try:
            moved = store.remove(self.name, self.record[:_VERSION])
        except BaseException:
            self._undo_create(new[0].name)
            raise
        if moved:
            self._become(*new)
        else:
            self._undo_create(new[0].name)
            self.lose()

    def _undo_create(self, name: str) -> None:
        try:
            self.session.store.remove(name)
        except StoreError as error:
            _log.warning('session %s is left until it expires: %s', _public(name), error)

    def enter(self) -> None:
        try:
            if not self.depth:
                self._begin()
            pending = self.changes() if self.id else self.data and self._dumps()
            self.snapshots.append(pending or self.plain)
        except BaseException:
            if not self.depth:
                self.let_go()
            raise
        self.depth += 1

    def _begin(self) -> None:
        if self.data is None:
            self._find(self._fetch_locked)
        elif self.id and not self.catch_up():
            self.lose()
            self.data.clear()
            self.plain, self.before = b'', {}

    def restore(self, snapshot: bytes) -> None:
        data = self.loaded()
        data.clear()
        if snapshot:
            data.update(self.session._loads(snapshot))
        self.before = self.session._loads(self.plain) if self.plain else {}


def _same(one: Any, other: Any, dumps: Callable[[Any], bytes],
          seen: dict[tuple[int, int], Any]) -> bool:
    """ Tell whether two values are equal, to their types: 1, 1.0 and True differ.

        Equal bytes mean equal values, but equal values need not give equal bytes:
        pickle also writes which parts are one and the same object. What is small is
        looked through at once, which is faster.
    """
    kind = type(one)
    if one is other or kind is not type(other):
        return one is other
    if kind in (str, int, bool, bytes):
        return bool(one == other)
    many = kind in (dict, list, tuple, set, frozenset)
    if many and len(one) != len(other):
        return False
    if not (many and len(one) < 16) and dumps(one) == dumps(other):
        return True
    if kind in _PLAIN or kind in _BY_NAME:
        return False
    pair = id(one), id(other)
    if pair in seen:  # a cycle: decided where it began
        return True
    seen[pair] = one, other  # kept, so that their ids stay theirs

    def same(a: Any, b: Any) -> bool:
        return _same(a, b, dumps, seen)

    if kind is dict:
        keys = {key: key for key in other}
        return all(key in keys and same(key, keys[key]) and same(one[key], other[key])
                   for key in one)
    if kind in (list, tuple):
        return all(map(same, one, other))
    if kind in (set, frozenset):
        values = {value: value for value in other}
        return all(value in values and same(value, values[value]) for value in one)
    return same(_parts(one), _parts(other))


def _parts(value: Any) -> list[Any]:
    """ Return what pickle would store of an object. """
    reduce = copyreg.dispatch_table.get(type(value))
    reduced = reduce(value) if reduce else value.__reduce_ex__(4)
    if isinstance(reduced, str):
        return [reduced]
    return [list(part) if isinstance(part, Iterator) else part for part in reduced]


def _public(name: str) -> str:
    """ Return what logs call a session: the beginning of its name in the store. """
    return name[:16]


def _kind(value: Any) -> str:
    return type(value).__name__


###############################################################################
# Session #####################################################################
###############################################################################


class Session(MutableMapping):  # type: ignore[type-arg]
    """ The sessions of an app: one object for all visitors and threads.

        In a request it is a mapping of this visitor's data. Nothing of a visitor
        is kept on the object: it lives in the request's WSGI environ.

        :param secret: str or bytes that nobody else knows, or a list of them: the
            first one seals, all of them open, so that secrets can be changed.
        :param sessions_dir: where the file mode keeps its sessions.
        :param cookie_name: the cookie's name; with the prefix ``__Host-`` browsers
            keep neighbouring domains from planting one (RFC 6265bis, 4.1.3.2).
        :param mode: ``'memory'``, ``'file'``, a URL (``redis://``, ``rediss://``,
            ``valkey://``, ``unix://``; ``'redis'`` is the one on this host), or a
            Store.
        :param days: a session ends this long after its last use.
        :param max_days: and this long after it began, however much it is used
            (OWASP ASVS 3.3.2); None: never for that reason.
        :param secure: whether the cookie is for https only; None: if the request
            that it answers came by https, as Bottle sees it.
        :param httponly: keep the cookie from the page's scripts.
        :param samesite: ``'lax'``, ``'strict'``, ``'none'`` or None, for whether
            the cookie comes with requests from other sites.
        :param path: the part of the host that the cookie is for.
        :param domain: a domain whose hosts all get the cookie; None: only this one.
        :param lock_timeout: seconds that ``with session:`` waits for another
            request of the same visitor before it raises SessionBusy.
        :param serializer: has ``dumps`` and ``loads``, like the modules json,
            marshal or msgspec.msgpack. The memory mode needs none.

        TypeError or ValueError say which argument is wrong and what to do.
    """

    #: The plugin interface of Bottle that `apply` follows.
    api = 2

    def __init__(self, secret: Secret | Iterable[Secret],
                 sessions_dir: str | os.PathLike[str] = './sessions',
                 cookie_name: str = 'bsession', mode: str | Store = 'memory', days: float = 30, *,
                 max_days: float | None = None, secure: bool | None = None,
                 httponly: bool = True, samesite: str | None = 'lax', path: str = '/',
                 domain: str | None = None, lock_timeout: float = 10.0,
                 serializer: Any = pickle) -> None:
        self._secrets = _Secrets(secret)
        self._cookie = _Cookie(cookie_name, secure, httponly, samesite, path, domain)
        self._lifetime = _seconds('days', days)
        self._max_age = None if max_days is None else _seconds('max_days', max_days)
        self._step = self._lifetime / 30
        if not isinstance(lock_timeout, (int, float)) or not 0 <= lock_timeout <= 86400:
            raise ValueError('lock_timeout=%r: use a number of seconds, 0 or more'
                             % (lock_timeout,))
        #: Seconds that ``with session:`` waits for another request of the visitor.
        self.lock_timeout = lock_timeout
        #: Where the sessions are.
        self.store = _make_store(mode, sessions_dir)
        #: Returns the time in seconds since the epoch. Tests may replace it:
        #: ``session.clock = lambda: time.time() + 31 * 86400``.
        self.clock: Callable[[], float] = lambda: time.time()
        #: The name of the cookie.
        self.cookie_name = cookie_name
        #: The plugin's name, 'session' or 'session:' and another cookie's name.
        self.name = 'session' if cookie_name == 'bsession' else 'session:' + cookie_name
        self._visit_type: type[_LiveVisit] | type[_SealedVisit] = _LiveVisit
        if not self.store.keeps_objects:
            self._visit_type = _SealedVisit
            self._secrets.load_cipher()
        self._touches = type(self.store).load_and_touch is not Store.load_and_touch
        self._dumps, self._deserialize = _check_serializer(serializer)
        self._warned: set[Any] = set()
        self._apps: weakref.WeakSet[bottle.Bottle] = weakref.WeakSet()

    # What a request does

    def connect(self) -> None:
        """ Tie this object to the current request. It costs no I/O until data is
            asked for, can be repeated, and the first use of the session implies it.
            RuntimeError outside of a request. """
        self._visit()

    @property
    def data(self) -> dict[Any, Any]:
        """ The visitor's data, the same dict for the whole request. Setting it
            replaces the content. """
        visit = self._visit()
        visit.handled = visit.exposed = True
        data: dict[Any, Any] = visit.loaded()
        return data

    @data.setter
    def data(self, content: Mapping[Any, Any]) -> None:
        content, data = dict(content), self.data
        data.clear()
        data.update(content)

    def save(self) -> bool:
        """ Write what changed, if anything did, and tell whether that was so.

            Keys that this request changed are put on top of the newest stored
            version. After a log-out elsewhere nothing is written. SessionError for
            a value that cannot be serialized, SessionBusy after `lock_timeout`
            seconds in another request's ``with`` block, StoreError if the store
            fails. In memory mode only a new session needs to be kept, which also
            happens at the end of the request. In a hook that runs after the route
            crashed nothing is written.
        """
        return not _crashed() and bool(self._visit().save())

    @property
    def dirty(self) -> bool:
        """ Whether `save()` would write. """
        visit = self._visit()
        visit.loaded()
        return bool(visit.changed())

    def purge(self) -> None:
        """ End the session, for log-out: it is gone from the store, durably, and
            the browser forgets its cookie. What is written afterwards in the same
            request starts a new one. StoreError changes nothing. """
        self._visit().purge()

    def clear(self) -> None:
        """ The same as `purge()`; ``session.data.clear()`` only empties the data. """
        self.purge()

    def regenerate(self) -> None:
        """ Give the session a new id and keep its data, with what was not saved
            yet. Call it at log-in, so that an id planted before is worth nothing
            (session fixation, OWASP ASVS 3.2.1). The old id is dead when this
            returns; StoreError changes nothing. """
        self._visit().regenerate()

    @property
    def id(self) -> str | None:
        """ A name of the session for logs, with which nothing can be done from
            outside; None when there is no stored session. """
        visit = self._visit()
        visit.loaded()
        return _public(visit.name) if visit.id else None

    def explain(self) -> str:
        """ Return why the session is what it is, in one sentence, for debugging. """
        visit = self._visit()
        visit.loaded()
        if not visit.id:
            return 'There is no stored session: %s.' % visit.why
        if visit.why != 'loaded':
            return 'Session %s is new: %s.' % (self.id, visit.why)
        text = 'Session %s was loaded; it began %s ago and holds %d keys' % (
            self.id, timedelta(seconds=int(max(0, self.clock() - visit.times.created))),
            len(visit.loaded()))
        if isinstance(visit, _SealedVisit):
            text += ' in %d bytes' % len(visit.plain)
            if visit.seal.is_old(visit.record):
                text += ', opened with an older secret'
            if visit.changed():
                text += ', and was changed since: save() would write'
        return text + '.'

    def __enter__(self) -> Session:
        """ Begin an exclusive transaction on this visitor's session: take its lock
            and read the newest data. The end of the block saves, also after
            `redirect()`, `abort()` or another raised HTTPResponse; any other
            exception undoes what the block changed and did not save itself. """
        self._visit().enter()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._visit().exit(error)

    # The mapping

    def __getitem__(self, key: Any) -> Any:
        visit = self._visit()
        value = visit.loaded()[key]
        if type(value) not in _PLAIN:
            visit.exposed = True
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        visit = self._visit()
        visit.loaded()[key] = value
        visit.handled = True
        if type(value) not in _PLAIN:
            visit.exposed = True

    def __delitem__(self, key: Any) -> None:
        visit = self._visit()
        del visit.loaded()[key]
        visit.handled = True

    def __iter__(self) -> Iterator[Any]:
        return iter(self._visit().loaded())

    def __len__(self) -> int:
        return len(self._visit().loaded())

    # The inherited ones work too, by catching KeyError, but take twice the time
    # or differ from dict: views, the order of popitem, the operators.

    def __contains__(self, key: Any) -> bool:
        return key in self._visit().loaded()

    def get(self, key: Any, default: Any = None, /) -> Any:
        return self[key] if key in self else default

    def keys(self) -> Any:
        return self.data.keys()

    def values(self) -> Any:
        return self.data.values()

    def items(self) -> Any:
        return self.data.items()

    def pop(self, *key_and_default: Any) -> Any:
        return self.data.pop(*key_and_default)

    def popitem(self) -> tuple[Any, Any]:
        return self.data.popitem()

    def setdefault(self, key: Any, default: Any = None, /) -> Any:
        return self.data.setdefault(key, default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        self.data.update(*args, **kwargs)

    def copy(self) -> dict[Any, Any]:
        return self.data.copy()

    def __or__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {**self.data, **other} if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {**other, **self.data} if isinstance(other, Mapping) else NotImplemented

    def __ior__(self, other: Any) -> Session:  # type: ignore[misc]
        self.data.update(other)
        return self

    def __reversed__(self) -> Iterator[Any]:
        return iter(reversed(self.data))

    # Bottle compares and hashes plugins: two Sessions are equal only if they are one.

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Session):
            return self is other
        return self.data == other if isinstance(other, Mapping) else NotImplemented

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return '<%s %r in %s>' % (_kind(self), self.cookie_name, _kind(self.store))

    # Outside of a request

    def sweep(self, progress: Progress = None) -> int:
        """ Remove all sessions that have expired and return how many; requests
            remove them too, little by little. """
        return self.store.sweep(self.clock(), progress)

    def issue_cookie(self, data: Mapping[Any, Any]) -> dict[str, str]:
        """ Store a session with this data and return its cookie, {name: value}.

            For the tests of an app: a visitor who is logged in already::

                requests.get(url, cookies=session.issue_cookie({'user': 'joe'}))
                webtest.TestApp(app).set_cookie(*session.issue_cookie(...).popitem())
        """
        visit = self._visit_type(self, {}, _Exchange({}, wrapped=True))
        visit.load().update(data)
        visit.handled = visit.exposed = True
        if not visit.save():
            raise ValueError('issue_cookie() needs some data: an empty session is not stored')
        assert visit.id
        return {self.cookie_name: visit.id}

    # For a visit

    def _visit(self) -> Any:
        """ Return this request's visit. """
        try:
            environ = request.environ
        except RuntimeError:
            _raise_outside()
        exchange = environ.get(_EXCHANGE)
        if exchange is None or exchange.stage or exchange.place != id(environ):
            return _join(self, environ)
        return exchange.visits.get(self) or _join(self, environ)

    def _ended(self, times: _Times, now: float) -> bool:
        created, used, told = times
        return bool(now - used >= self._lifetime or (
            self._max_age is not None and now - created >= self._max_age))

    def _due(self, times: _Times, now: float) -> bool:
        """ Tell whether a use must be recorded, or times that a wrong clock left. """
        created, used, told = times  # created <= used
        return bool(now - told >= self._step or used - now > 300)

    def _expires(self, times: _Times) -> float:
        expires: float = times.used + self._lifetime
        return expires if self._max_age is None else min(expires, times.created + self._max_age)

    def _loads(self, plain: bytes) -> dict[Any, Any]:
        try:
            data = self._deserialize(plain)
        except Exception as error:  # also a class that is gone
            # Other messages may quote data.
            what = ': %s' % error if isinstance(error, (ImportError, AttributeError)) else ''
            raise _Unreadable('cannot be loaded (%s%s)' % (_kind(error), what)) from error
        if type(data) is not dict:
            raise _Unreadable('holds no dict')
        return data

    def _patiently(self, attempt: Callable[[], Any], start: float) -> Any:
        """ Call `attempt` until it is not busy, for what is left of lock_timeout. """
        pause = 0.0005
        while True:
            try:
                return attempt()
            except SessionBusy:
                left = start + self.lock_timeout - time.monotonic()
                if left <= 0:
                    raise
            time.sleep(min(left, pause * uniform(0.5, 1.5)))
            pause = min(2 * pause, 0.02)

    def _in_turn(self, name: str, attempt: Callable[[], Any], has_turn: bool) -> Any:
        """ Call `attempt`; while that is busy, wait as one of a queue. """
        start = time.monotonic()
        try:
            return attempt()
        except SessionBusy:
            if not has_turn and not _turns.take(name, self.lock_timeout):
                raise
        try:
            return self._patiently(attempt, start)
        finally:
            if not has_turn:
                _turns.give(name)

    # For Bottle, see the next room

    def setup(self, app: bottle.Bottle) -> None:
        """ Prepare an app that installs this plugin. """
        for plugin in app.plugins:
            if isinstance(plugin, Session) and plugin is not self and plugin.name == self.name:
                raise bottle.PluginError('Two sessions with the cookie %r in one app: give one of '
                                         'them another cookie_name.' % self.cookie_name)
        self._apps.add(app)
        _watch(app)
        _wrap(app)

    def apply(self, callback: Callable[..., Any], route: bottle.Route) -> Callable[..., Any]:
        """ Give the session to a route with an argument `session`. """
        try:
            argument = inspect.signature(route.callback).parameters.get('session')
        except (TypeError, ValueError):  # a callable that does not tell
            argument = None
        if argument is None or argument.kind not in (argument.POSITIONAL_OR_KEYWORD,
                                                     argument.KEYWORD_ONLY):
            return callback

        def with_session(*args: Any, **kwargs: Any) -> Any:
            kwargs.setdefault('session', self)
            return callback(*args, **kwargs)

        return with_session

    def close(self) -> None:
        """ Leave the apps that do not have this plugin any more. """
        for app in list(self._apps):
            if not _is_among(app.plugins, self):
                self._apps.discard(app)
            if not any(isinstance(plugin, Session) for plugin in app.plugins):
                _unwrap(app)

    def _saves_itself(self, environ: Mapping[str, Any]) -> bool:
        """ Tell whether the plugin is installed for this request's route. """
        app, route = environ.get('bottle.app'), environ.get('bottle.route')
        if route is not None:
            for skip in route.skiplist:
                if skip is True or skip is self or skip is Session or skip == self.name:
                    return False
            if _is_among(route.app.plugins, self) or _is_among(route.plugins, self):
                return True
        return app is not None and _is_among(app.plugins, self)


def _is_among(plugins: Iterable[Any], one: Session) -> bool:
    for plugin in plugins:
        if plugin is one:
            return True
    return False


def _seconds(argument: str, days: float) -> float:
    if not isinstance(days, (int, float)) or isinstance(days, bool):
        raise TypeError('%s must be a number, not %s' % (argument, _kind(days)))
    if not 0 < days <= 10_000_000:
        raise ValueError('%s=%r: use a number of days greater than 0' % (argument, days))
    return days * 86400.0


def _make_store(mode: str | Store, sessions_dir: str | os.PathLike[str]) -> Store:
    if not isinstance(sessions_dir, (str, os.PathLike)):
        raise TypeError('sessions_dir must be a str or a path, not %s' % _kind(sessions_dir))
    if not os.fspath(sessions_dir) or '\0' in str(sessions_dir):
        raise ValueError('sessions_dir=%r is no name of a directory' % (sessions_dir,))
    if isinstance(mode, Store):
        return mode
    if mode == 'memory':
        return MemoryStore()
    if mode == 'file':
        return FileStore(sessions_dir)
    if mode == 'redis':
        return RedisStore()
    if isinstance(mode, str) and mode.startswith(('redis://', 'rediss://', 'valkey://',
                                                  'valkeys://', 'unix://')):
        return RedisStore(mode)
    raise ValueError("mode=%r: use 'memory', 'file', 'redis', a URL (redis://, rediss://, "
                     "valkey://, unix://) or a Store" % (mode,))


def _check_serializer(serializer: Any) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    """ Return its dumps and loads, made to give and take bytes. """
    dumps, loads = (getattr(serializer, name, None) for name in ('dumps', 'loads'))
    if not callable(dumps) or not callable(loads):
        raise TypeError('serializer must have dumps() and loads(), as json and pickle do')
    if serializer is pickle:
        return dumps, loads
    empty = dumps({})
    if loads(empty) != {} or not isinstance(empty, (str, bytes)):
        raise ValueError('serializer: dumps({}) must give str or bytes, of which loads() makes {}')
    if isinstance(empty, bytes):
        return dumps, loads
    return (lambda data: dumps(data).encode('utf-8', 'surrogatepass'),
            lambda plain: loads(plain.decode('utf-8', 'surrogatepass')))


###############################################################################
# Bottle ######################################################################
###############################################################################

# Bottle tells nobody when a request begins and ends, nor what a route returned:
# response headers set too early are lost with abort(), and `request` names the
# last request of a thread long after its end. These two frames do tell.
_HANDLE = inspect.unwrap(bottle.Bottle._handle).__code__  # hooks and the route
_CAST = inspect.unwrap(bottle.Bottle._cast).__code__  # error handlers, a first chunk
_GENERATOR = inspect.CO_GENERATOR
_ROUTE, _ANSWER, _SENT, _OVER = range(4)
_EXCHANGE = 'bottle_session.exchange'
# Without gevent's patches all greenlets of a thread share Bottle's thread-locals.
_SHARED_REQUEST = type(
    bottle.LocalRequest.environ.fget.__closure__[0].cell_contents).__module__ == '_thread'
_GENERATED = itertools.chain, map, bottle._closeiter  # how Bottle hands over a generator
_VARIES = re.compile(r'(?:^|[,\s])(?:cookie|\*)(?:$|[,\s])', re.I).search


def _raise_outside() -> NoReturn:
    raise RuntimeError('The session can only be used in a request: call this from a route, a hook '
                       'or a function that they call.') from None


class _Exchange:
    """ A request and its response: who visits, and how far it is. """

    __slots__ = 'place', 'visits', 'stage', 'wrapped', 'resumed', 'generator'

    def __init__(self, environ: dict[str, Any], stage: int = _ROUTE,
                 wrapped: bool = False) -> None:
        self.place = id(environ)  # which a copy does not share
        self.visits: dict[Session, _LiveVisit | _SealedVisit] = {}
        self.stage = stage
        self.wrapped = wrapped  # our WSGI wrapper sends the headers
        self.resumed = False    # the server asks for the next chunk
        self.generator: Any = None  # its frame, if the route is one

    def must_be_open(self) -> None:
        if self.stage >= _SENT:
            raise SessionError('Headers sent: a new session or id cannot be told to the browser '
                               'any more. Save before the first chunk is yielded.')

    def news(self) -> None:
        """ Bring what is new to the response. If the route ends with another one,
            our hook does it again. """
        if self.stage < _SENT and not self.wrapped:
            # The headers may be those of an HTTPError that other requests raise, too.
            response._headers = {name: list(lines) for name, lines in response._headers.items()}
            self.put(response._headers)

    def put(self, headers: dict[str, list[str]]) -> None:
        """ Add what the visits have to say to these headers. """
        if 'Set-Cookie' in headers:
            headers['Set-Cookie'] = [line for line in headers['Set-Cookie']
                                     if not line.startswith(self.names())]
        for name, line in self.extra(headers.get('Vary', ()), 'Cache-Control' in headers):
            headers.setdefault(name, []).append(line)

    def names(self) -> tuple[str, ...]:
        """ Return how our Set-Cookie lines begin: only this request's may leave. """
        return tuple(session.cookie_name + '=' for session in self.visits)

    def extra(self, vary: Sequence[str], has_cache_control: bool) -> list[tuple[str, str]]:
        """ Return the headers that the visits add to a response with these. """
        extra, used = [], False
        for visit in self.visits.values():
            used = used or visit.data is not None or visit.late
            if visit.cookie:
                extra.append(('Set-Cookie', visit.cookie))
        if extra and not has_cache_control:
            extra.append(('Cache-Control', 'no-store'))
        if used and not (vary and _VARIES(', '.join(vary))):
            extra.append(('Vary', 'Cookie'))
        return extra


def _join(session: Session, environ: dict[str, Any]) -> Any:
    """ Return the visit of this request where it is not the plain case: it is the
        first use, or the route is done. RuntimeError outside of a request. """
    greenlet = sys.modules.get('greenlet')
    if greenlet and _SHARED_REQUEST and greenlet.getcurrent().parent:
        raise RuntimeError('Bottle would mix up the requests of greenlets here: run "from gevent '
                           'import monkey; monkey.patch_all()" before bottle is imported.')
    exchange = _exchange_of(environ)
    if exchange is None or not exchange.wrapped or (
            exchange.stage > _ANSWER and not exchange.resumed):
        running, stage, generator = _running(environ)
        if running is not environ:
            environ, exchange = running, _exchange_of(running)
        if exchange is None or stage == _ROUTE < exchange.stage and not exchange.wrapped:
            exchange = environ[_EXCHANGE] = _Exchange(environ, stage)
            _watch(environ['bottle.app'])
        exchange.stage = max(stage, exchange.stage)
        exchange.generator = exchange.generator or generator
    visit = exchange.visits.get(session)
    if visit is None:
        visit = exchange.visits[session] = session._visit_type(session, environ, exchange)
        visit.late = exchange.stage > _ROUTE
        if visit.late:
            exchange.news()
        if environ.get('wsgi.multiprocess') and session.store.keeps_objects:
            _warn_of_processes(session)
    visit.late = visit.late or exchange.stage > _ROUTE
    return visit


def _exchange_of(environ: dict[str, Any]) -> Any:
    exchange = environ.get(_EXCHANGE)
    return exchange if exchange and exchange.place == id(environ) else None


def _running(environ: dict[str, Any]) -> tuple[dict[str, Any], int, Any]:
    """ Return the environ and the stage of the request that this stack works for,
        and the frame of its generator.

        After a route has called another app, Bottle's `request` still names the
        inner request: the frame knows better.
    """
    frame: Any = sys._getframe(2)
    generators: list[Any] = []
    while frame is not None:
        code = frame.f_code
        if code is _HANDLE:
            return frame.f_locals['environ'], _ROUTE, None
        if code is _CAST:
            return (frame.f_back.f_locals.get('environ', environ), _ANSWER,
                    generators[-1] if generators else None)
        if code.co_flags & _GENERATOR:
            generators.append(frame)
        frame = frame.f_back
    exchange = _exchange_of(environ)
    for frame in generators:  # the server asks for the next chunk
        if frame is exchange.generator if exchange else not _is_watched(environ):
            return environ, _SENT, frame
    _raise_outside()


def _is_watched(environ: Mapping[str, Any]) -> bool:
    """ Tell whether our hook has seen what the route returned. """
    app = environ.get('bottle.app')
    return app is None or _after_request in app._hooks['after_request']


def _warn_of_processes(session: Session) -> None:
    if 'processes' not in session._warned:
        session._warned.add('processes')
        _log.warning("mode='memory' under a server with several processes: each of them has "
                     "sessions of its own. Use mode='file', or a redis URL for several hosts.")


def _watch(app: bottle.Bottle) -> None:
    """ Have our hook run after the app's other hooks, which may use the session. """
    hooks = app._hooks['after_request']
    if _after_request not in hooks:
        hooks.append(_after_request)  # add_hook() would make it the first


def _after_request() -> None:
    """ The route is done: save for the plugin, and add our headers to the response. """
    exchange = request.environ.get(_EXCHANGE)
    if exchange and exchange.wrapped and not exchange.visits:
        return
    frame: Any = sys._getframe(1)
    while frame.f_code is not _HANDLE:
        frame = frame.f_back
    scope = frame.f_locals
    environ, out = scope['environ'], scope['out']
    exchange = _exchange_of(environ)
    if exchange is None:
        if not isinstance(out, types.GeneratorType):
            return
        exchange = environ[_EXCHANGE] = _Exchange(environ)
    if exchange.stage:
        return
    exchange.generator = getattr(out, 'gi_frame', None)
    crashed = _crashed()
    try:
        for visit in exchange.visits.values():
            visit.finish(environ, crashed or isinstance(out, _Unavailable))
    finally:
        exchange.stage = _ANSWER
    if exchange.wrapped or not exchange.visits:
        return
    if crashed:
        _tell_after_crash(scope['self'])
        return
    if not isinstance(out, HTTPResponse):
        exchange.put(response._headers)
        return
    # The route's response may be a constant that it returns to every visitor, so a
    # copy gets our headers. Bottle takes what a hook raises in place of the first.
    answer = Exception.__new__(type(out), *out.args)
    answer.__dict__.update(out.__dict__)
    answer.__traceback__, answer.__context__ = out.__traceback__, out.__context__
    answer.__cause__, answer.__suppress_context__ = out.__cause__, out.__suppress_context__
    answer._headers = {name: list(lines) for name, lines in out._headers.items()}
    exchange.put(answer._headers)
    raise answer


def _crashed() -> bool:
    """ Tell whether an exception that no route caught is on its way through Bottle,
        which runs the hooks in between. """
    error = sys.exc_info()[1]
    return error is not None and error.__traceback__ is not None \
        and error.__traceback__.tb_frame.f_code is _HANDLE


def _tell_after_crash(app: bottle.Bottle) -> None:
    """ Have what was saved before a crash told, too: Bottle makes a new response
        for it, which only the error handler gets to see. """
    handler = app.error_handler.get(500, app.default_error_handler)
    if hasattr(handler, 'bottle_session_inner'):
        return

    def handle_crash(error: HTTPError) -> Any:
        page = handler(error)
        exchange = _exchange_of(request.environ)
        if exchange:
            exchange.news()
        return page

    handle_crash.bottle_session_inner = handler  # type: ignore[attr-defined]
    app.error_handler[500] = handle_crash


def _wrap(app: bottle.Bottle) -> None:
    """ Put our WSGI wrapper around the app: it sees every response, and its end. """
    inner = app.wsgi
    if hasattr(inner, 'bottle_session_inner'):
        return

    def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body: Iterable[bytes]
        exchange = _exchange_of(environ)
        if exchange and exchange.stage < _SENT:
            body = inner(environ, start_response)  # an outer app does it
            return body
        exchange = environ[_EXCHANGE] = _Exchange(environ, _ROUTE, True)
        failure: list[HTTPError] = []

        def answer(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            if exchange.visits:
                if exchange.stage < _SENT:
                    try:
                        _finish_late(environ, exchange, status)
                    except HTTPError as error:
                        failure.append(error)
                        status, headers = error.status_line, error.headerlist
                headers = _with_ours(exchange, headers)
            exchange.stage = _SENT
            return start_response(status, headers, exc_info) if exc_info else \
                start_response(status, headers)

        try:
            body = inner(environ, answer)
        except BaseException:
            exchange.stage = _OVER
            raise
        if failure or isinstance(body, _GENERATED):
            return _Body(environ, exchange, body, failure)
        exchange.stage = _OVER  # a server must get a list or a file as it is
        return body

    wsgi.bottle_session_inner = inner  # type: ignore[attr-defined]
    object.__setattr__(app, 'wsgi', wsgi)  # Bottle lets it be set only once


def _unwrap(app: bottle.Bottle) -> None:
    wrapper = app.__dict__.get('wsgi')
    if hasattr(wrapper, 'bottle_session_inner'):
        del app.__dict__['wsgi']
        if app.wsgi != wrapper.bottle_session_inner:
            object.__setattr__(app, 'wsgi', wrapper.bottle_session_inner)


def _finish_late(environ: dict[str, Any], exchange: _Exchange, status: str) -> None:
    """ Save what changed in an error handler, or in a generator's first part. """
    for visit in exchange.visits.values():
        if visit.late or not exchange.stage:
            visit.finish(environ, status.startswith('5'))


def _with_ours(exchange: _Exchange, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    kept, vary, cached = [], [], False
    for name, line in headers:
        if name == 'Set-Cookie' and line.startswith(exchange.names()):
            continue  # of a request that the route made itself
        kept.append((name, line))
        if name == 'Vary':
            vary.append(line)
        cached = cached or name == 'Cache-Control'
    return kept + exchange.extra(vary, cached)


class _Body:
    """ A response's body under our wrapper: at its end the request is over. """

    def __init__(self, environ: dict[str, Any], exchange: _Exchange, body: Any,
                 failure: list[HTTPError]) -> None:
        self._environ, self._exchange, self._body = environ, exchange, body
        if failure:  # the answer instead, which HEAD wants without its text
            text = failure[0].body if environ['REQUEST_METHOD'] != 'HEAD' else ''
            body = [text.encode('utf-8')]
        self._chunks: Iterator[bytes] = iter(body)
        self._crashed = bool(failure)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            chunk: bytes = self._resume(next, self._chunks)
            return chunk
        except StopIteration:
            raise
        except BaseException:
            self._crashed = True
            raise

    def close(self) -> None:
        try:
            if hasattr(self._body, 'close'):
                self._resume(self._body.close)
        finally:
            if self._exchange.stage < _OVER:
                for visit in self._exchange.visits.values():
                    self._save(visit)
            self._exchange.stage = _OVER

    def _resume(self, step: Callable[..., Any], *args: Any) -> Any:
        """ Go on with the route; another request may have come to this thread. """
        exchange = self._exchange
        try:
            before = request.environ
        except RuntimeError:  # a thread of the server's own
            before = {}
        request.environ, exchange.resumed = self._environ, True
        try:
            return step(*args)
        finally:
            request.environ, exchange.resumed = before, False

    def _save(self, visit: _LiveVisit | _SealedVisit) -> None:
        try:
            visit.finish(self._environ, self._crashed)
        except SessionError as error:  # too late to answer with it
            _log.error('a change after the first chunk was not saved: %s', error)


###############################################################################
# Command line ################################################################
###############################################################################


def _main(arguments: list[str] | None = None) -> int:
    import argparse
    parser = argparse.ArgumentParser(
        prog='python -m bottle_session',
        description='Helps with the sessions of a Bottle app.',
        epilog='Neither sweep nor stats needs the secret: the data stays sealed. '
               'Exit codes: 0 done, 1 the store failed, 2 wrong arguments.')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    commands.add_parser('secret', help='print a good secret', description='Print a new secret: '
                        '256 random bits. Keep it out of the code, for example in an environment '
                        'variable; who changes it lists the new one first: Session([new, old]).')
    for command, text in (('sweep', 'remove the sessions that have expired'),
                          ('stats', 'count sessions, expired ones and bytes')):
        sub = commands.add_parser(command, help=text, description=text.capitalize() + '.')
        sub.add_argument('store', metavar='DIR|URL',
                         help='the sessions_dir of a file mode, or a redis URL')
    options = parser.parse_args(arguments)
    if options.command == 'secret':
        print(_new_id())
        return 0
    try:
        if '://' not in options.store and not os.path.isdir(options.store):
            parser.error('%s is no directory' % options.store)
        store = _make_store(options.store if '://' in options.store else 'file', options.store)
        progress = _progress_bar(sys.stderr) if sys.stderr.isatty() else None
        if options.command == 'sweep':
            print('removed %d' % store.sweep(time.time(), progress))
        else:
            for line in _describe(store.stats(time.time(), progress)):
                print(line)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    except StoreError as error:
        print('%s: %s' % (options.store, error.__cause__ or error), file=sys.stderr)
        return 1
    return 0


def _describe(stats: Mapping[str, Any]) -> Iterator[str]:
    for name in 'sessions', 'expired', 'bytes':
        yield '%-9s %d' % (name, stats[name])
    if stats['oldest']:
        yield '%-9s %s' % ('oldest', datetime.fromtimestamp(stats['oldest']).isoformat(
            ' ', 'seconds'))


def _progress_bar(terminal: TextIO) -> Callable[[float], None]:
    def show(share: float) -> None:
        end = '\n' if share >= 1 else ''
        terminal.write('\r[%-40s] %3d %%%s' % ('#' * int(share * 40), share * 100, end))
        terminal.flush()
    return show


if __name__ == '__main__':
    sys.exit(_main())

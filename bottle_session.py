#!/usr/bin/env python
""" Sessions for Bottle that are safe with threads, processes and machines.

One object at module level serves every visitor; what is stored outside of the
process is sealed with AES-256-GCM::

    import bottle, bottle_session

    app = bottle.Bottle()
    session = bottle_session.Session('16 bytes or more', mode='file')

    @app.route('/')
    def index():
        with session:
            session['visits'] = session.get('visits', 0) + 1
        return 'Visit number %d' % session['visits']

    app.run()

``session.save()`` does the same without a lock, and after ``app.install(session)``
each route saves by itself. See README.rst for the rest.
"""

from __future__ import annotations

import errno
import functools
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import stat
import struct
import sys
import threading
import time
import traceback
import warnings
import zlib
from base64 import urlsafe_b64encode
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import closing, suppress
from contextvars import ContextVar
from datetime import date, datetime, timedelta, timezone
from hashlib import blake2b

import bottle
from bottle import HTTPError, HTTPResponse

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn, Union
    Secret = Union[str, bytes]
    Progress = Union[Callable[[float], object], None]
    _Entries = dict[str, dict[str, Any]]

__all__ = ['FileStore', 'Login', 'MemoryStore', 'RedisStore', 'Session', 'SessionBusy',
           'SessionError', 'Store', 'StoreError', 'check_store']
__version__ = '1.0.0'

if [int(part) for part in re.findall(r'\d+', bottle.__version__)[:2]] < [0, 13]:
    raise ImportError('bottle_session needs Bottle 0.13 or newer, and found %s in %s: '
                      'pip install --upgrade bottle, or remove that file'
                      % (bottle.__version__, bottle.__file__))

###############################################################################
# Errors ######################################################################
###############################################################################


class SessionError(Exception):
    """ The base of this module's errors. Raised as it is for a value that
        cannot be stored, and for a new session after the headers were sent. """


class _Unavailable(SessionError, HTTPError):  # type: ignore[misc]
    """ A SessionError that an app which catches nothing answers with 503. """

    message = ''

    def __init__(self, message: str = '') -> None:
        self.args = (message or self.message,)
        HTTPError.__init__(self, 503, self.args[0], Retry_After='1')


class SessionBusy(_Unavailable):
    """ Another request holds this visitor's session in a ``with session:``
        block, for longer than `lock_timeout`. A store raises it at once. """

    message = 'Another request is using this session.'


class StoreError(_Unavailable):
    """ The store cannot be reached, read or written. The cause is in
        ``__cause__`` and in the log, not in the answer to the visitor. """

    message = 'The session store cannot be used at the moment.'
    #: Set where nobody can know whether it was done: the server fell silent.
    maybe_done = False


class _Unreadable(Exception):
    """ Why a stored record is treated as absent. """


_log = logging.getLogger('bottle_session')


def _kind(value: Any) -> str:
    return type(value).__name__


###############################################################################
# Cookie ######################################################################
###############################################################################

_MAX_HEADER = 16 * 1024  # bytes of Cookie header that are searched
_MAX_IDS = 4             # cookies of our name that are tried


def _new_id() -> str:
    """ Return a new session id: 256 random bits as 43 characters. """
    return urlsafe_b64encode(os.urandom(32))[:43].decode('ascii')


class _Cookie:
    """ The name and the attributes of our cookie, checked and ready to send. """

    def __init__(self, name: str, secure: bool | None, httponly: bool, samesite: str | None,
                 path: str, domain: str | None, partitioned: bool) -> None:
        host = name.lower().startswith('__host-')
        cross = samesite is not None and samesite.lower() == 'none'
        _require(secure or not host and not name.lower().startswith('__secure-'),
                 'cookie_name=%r: browsers take this prefix only with secure=True', name)
        _require(not host or path == '/' and not domain, "cookie_name=%r: browsers take this "
                 "prefix only with path='/' and without domain", name)
        _require(secure or not cross, 'samesite=%r: browsers take this only with secure=True',
                 samesite)
        _require(cross or not partitioned, "partitioned=%r: browsers take this only with "
                 "secure=True and samesite='none'", partitioned)
        self.name, self.secure, self.path, self.domain = name, secure, path, domain
        self._find = re.compile(r'(?:^|;)\s*%s\s*=\s*"?([\w-]{43})"?\s*(?![^;])' % re.escape(name),
                                re.ASCII).findall
        self.attributes = '; Path=%s%s%s%s%s' % (
            path, '; Domain=' + domain if domain else '', '; HttpOnly' if httponly else '',
            '; SameSite=' + samesite.capitalize() if samesite else '',
            '; Partitioned' if partitioned else '')

    def ids(self, environ: Mapping[str, Any]) -> list[str]:
        """ Return what may be ids among the cookies of our name in a request.

            Bottle's own parser drops every cookie beside one it dislikes, raises on some
            and takes quadratic time on others (CVE-2024-7592). Several cookies of one name
            are what a neighbouring domain can plant (RFC 6265bis, 8.6): trying a few of
            them keeps the visitor's own.
        """
        header = environ.get('HTTP_COOKIE', '')
        found = self._find(header) if len(header) <= _MAX_HEADER else []
        return found if len(found) < 2 else list(dict.fromkeys(found))[:_MAX_IDS]

    def line(self, environ: Mapping[str, Any], value: str, max_age: float | None) -> str:
        """ Return the value of a Set-Cookie header.

            :param max_age: seconds; 0 deletes, None: until the browser closes.
        """
        scheme = environ.get('HTTP_X_FORWARDED_PROTO') or environ.get('wsgi.url_scheme')
        return '%s=%s%s%s%s' % (
            self.name, value or '; Expires=Thu, 01 Jan 1970 00:00:00 GMT',
            '' if max_age is None else '; Max-Age=%d' % math.ceil(max_age), self.attributes,
            '; Secure' if self.secure or self.secure is None and scheme == 'https' else '')

    def why_not_sent(self, environ: Mapping[str, Any]) -> str:
        """ Return why the browser cannot send this cookie with such a request, or ''. """
        page = bottle.BaseRequest(dict(environ)).urlparts
        path = environ.get('SCRIPT_NAME', '') + environ.get('PATH_INFO', '')
        host, domain = page.hostname or '', (self.domain or '').lower().lstrip('.')
        if len(environ.get('HTTP_COOKIE', '')) > _MAX_HEADER:
            return 'the header with all cookies is longer than 16 KB, and is not read'
        if self.secure and page.scheme != 'https':
            return 'it is Secure, and this page came by http'
        if path != self.path and not path.startswith(self.path.rstrip('/') + '/'):
            return 'it is for the path %s, and this page is at %s' % (self.path, path)
        if domain and not ('.' + host).endswith('.' + domain):
            return 'it is for the domain %s, and this page is at %s' % (domain, host)
        return ''


###############################################################################
# Seal ########################################################################
###############################################################################

# record = kind (1 byte) | nonce (12) | AES-256-GCM(head | owner | 0xff | payload), which
# also vouches for the kind. With a key for each session random nonces are far from
# their limit (SP 800-38D). No part is the same in two records of one secret, so
# none confirms a guess of a secret without the cookie's id.
_SESSION, _MOVED, _BLOCKED, _LOGINS = b's', b'm', b'b', b'l'
_VERSION = 16  # bytes at the beginning of a record that no two records share
_UTF8 = 'utf-8', 'surrogatepass'
_HEAD, _OWNER_END = struct.Struct('<dddb'), b'\xff'  # which is in no UTF-8

#: What is sealed beside the data. `created` and `used` in seconds since the epoch; `days`,
#: `permanent` 1 or -1, both 0 for what the constructor says; `owner` None or a str.
_Head = namedtuple('_Head', 'created used days permanent owner')
_NO_HEAD = _Head(0.0, 0.0, 0.0, 0, None)

_MISSING = object()  # where there is no value
# What is never changed inside, and the part of it in which equal means the same.
_ATOMS = frozenset((str, int, bool, bytes, type(None), object))
_PLAIN = _ATOMS | {float, complex, datetime, date, timedelta}
_SURE = _PLAIN - {datetime}  # to load back; somebody's tzinfo may not


class _Canonical(pickle.Pickler):
    """ Pickles equal sets to the same bytes, whatever the order of their elements. """

    def persistent_id(self, value: Any) -> Any:
        if type(value) in (set, frozenset):
            return _kind(value), sorted(map(_canonical, value))
        return None


class _Bounded(io.BytesIO):
    """ Takes a megabyte. What is in many places at once is written once for each. """

    def write(self, part: Any) -> int:
        if self.tell() > 1_000_000:
            raise ValueError('too long')
        return super().write(part)


def _canonical(value: Any, pickler: Any = pickle.Pickler, fast: bool = True) -> bytes:
    """ Return bytes that are the same only for equal values, to their types: a pickle, but
        never one that is stored. Without pickle's memo it does not tell which parts are one
        and the same object. """
    stream = _Bounded() if fast else io.BytesIO()
    writer = pickler(stream, 5)
    writer.fast = fast
    try:
        writer.dump(value)
    except Exception:  # a cycle, perhaps, which ends only with the memo
        if not fast:
            raise
        return _canonical(value, pickler, False)
    form = stream.getvalue()
    if pickler is pickle.Pickler and (b'\x8f' in form or b'\x91' in form):  # it has a set
        return _canonical(value, _Canonical, fast)
    return form


class _Seal:
    """ Makes records of data and opens them: the only place that knows the cipher.

        What is stored needs the secret and the visitor's cookie together: the
        key of a session is made of both, and its stored name is a hash of the
        cookie's id, so that neither a listing nor a look-up's timing tells it
        (CVE-2019-16782). The cookie's name is in both.
    """

    #: Whether the values themselves are stored, instead of bytes made of them.
    keeps_values = False
    _form: Callable[[Any], Any] = staticmethod(_canonical)

    def __init__(self, secrets: list[bytes], cookie_name: str, serializer: Any) -> None:
        keyed_hash = functools.partial(blake2b, cookie_name.encode() + b'\0', digest_size=32)
        self._names = keyed_hash(person=b'bsession name')
        self._keys = [keyed_hash(person=b'bsession key', key=blake2b(secret).digest())
                      for secret in secrets]
        self._use(serializer)

    def _use(self, serializer: Any) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ImportError("file and redis mode seal the data with the package "
                              "'cryptography': pip install cryptography") from error
        self._cipher, self._forged = AESGCM, InvalidTag
        self.pickles = serializer is pickle
        if not self.pickles:
            self._form = lambda value: self.dumps({'': value})
        self.dumps, self._loads, empty = serializer.dumps, serializer.loads, serializer.dumps({})
        _require(isinstance(empty, (str, bytes)) and serializer.loads(empty) == {}, 'serializer: '
                 'dumps({}) gave %r, and not str or bytes of which loads() makes {}', empty)
        if isinstance(empty, str):
            self.dumps = lambda data: serializer.dumps(data).encode(*_UTF8)
            self._loads = lambda payload: serializer.loads(payload.decode(*_UTF8))

    def name(self, id: str) -> str:
        """ Return the name under which a store keeps this session. """
        name = self._names.copy()
        name.update(id.encode())
        return name.hexdigest()

    def list_ids(self, owner: str) -> list[str]:
        """ Return what the list of an owner's log-ins has for an id, under each secret,
            newest first: without one, nobody can test a guess of an owner. """
        return [_derive(key, ('owner\0' + owner).encode(*_UTF8)).hex() for key in self._keys]

    def seal(self, kind: bytes, id: str, head: _Head, payload: Any = b'') -> Any:
        """ Return a record of this kind for the session with this id. """
        nonce, owner = os.urandom(12), head[4].encode(*_UTF8) if head[4] else b''
        sealed: bytes = self._cipher(_derive(self._keys[0], id.encode())).encrypt(
            nonce, _HEAD.pack(*head[:4]) + owner + _OWNER_END + payload, kind)
        return kind + nonce + sealed

    def open(self, id: str, record: Any) -> tuple[bytes, _Head, Any, bool]:
        """ Return (kind, head, payload, whether an older secret sealed it), or raise
            _Unreadable. """
        kind = record[:1]
        for key in self._keys:
            try:
                plain = self._cipher(_derive(key, id.encode())).decrypt(
                    record[1:13], record[13:], kind)
            except (self._forged, ValueError):  # ValueError: too short to be sealed
                continue
            name, _, payload = plain[_HEAD.size:].partition(_OWNER_END)
            owner = name.decode(*_UTF8) if name else None
            head = _Head._make(_HEAD.unpack_from(plain) + (owner,))
            return kind, head, payload, key is not self._keys[0]
        raise _Unreadable('is damaged, or was sealed with a secret that is not in the list')

    def loads(self, payload: Any) -> dict[Any, Any]:
        """ Return the data, or raise _Unreadable; what may be well in a moment is a
            StoreError. """
        try:
            data = self._loads(payload)
        except (MemoryError, RecursionError, OSError) as error:
            _log.error('a session cannot be loaded at the moment: %s', _kind(error))
            raise StoreError() from error
        except Exception as error:  # also a class that is gone
            # Other messages may quote data.
            what = ': %s' % error if isinstance(error, (ImportError, AttributeError)) else ''
            raise _Unreadable('cannot be loaded (%s%s)' % (_kind(error), what)) from error
        if type(data) is not dict:
            raise _Unreadable('holds no dict')
        return data

    def same(self, one: Any, other: Any) -> bool:
        """ Tell whether two values are equal, to their types: 1, 1.0 and True differ.
            In doubt they are not. """
        if one is other or one is _MISSING or other is _MISSING:
            return one is other
        if type(one) is not type(other):  # another serializer may have made a list of a tuple
            if self.pickles:
                return False
        elif type(one) in _ATOMS:
            return bool(one == other)
        try:
            return bool(self._form(one) == self._form(other))
        except Exception as error:  # also from methods of the user's classes
            _log.debug('cannot compare a %s, so it counts as a change: %s', _kind(one),
                       _kind(error))
            return False


class _NoSeal(_Seal):
    """ The same for the memory mode: a record is a tuple with a shallow copy of the data,
        which can be cut like a record of bytes. Nothing is sealed or serialized. """

    keeps_values = pickles = True

    def _use(self, serializer: Any) -> None:
        self.dumps = self.loads = dict.copy  # type: ignore[method-assign,assignment]

    def seal(self, kind: bytes, id: str, head: _Head, payload: Any = b'') -> Any:
        return kind, object(), head, payload  # no two are equal

    def open(self, id: str, record: Any) -> tuple[bytes, _Head, Any, bool]:
        return record[0], record[2], record[3], False

    def same(self, one: Any, other: Any) -> bool:
        """ Tell whether two values are equal and hold the same objects. """
        try:
            return self._hold_the_same(one, other, set())
        except RecursionError:
            return False

    def _hold_the_same(self, one: Any, other: Any, seen: set[tuple[int, int]]) -> bool:
        kind, pair = type(one), (id(one), id(other))
        if one is other or pair in seen:
            return True
        if kind is not type(other):
            return False
        seen.add(pair)  # which is compared now, once
        if kind is dict:
            one, other = [*one, *one.values()], [*other, *other.values()]
        elif kind not in (list, tuple):
            parts = one | other if kind in (set, frozenset) else [one]
            return _PLAIN.issuperset(map(type, parts)) and super().same(one, other)
        return len(one) == len(other) and all(
            self._hold_the_same(*parts, seen) for parts in zip(one, other))


def _derive(key: blake2b, data: bytes) -> bytes:
    """ Return a keyed hash (BLAKE2b, RFC 7693), continued with these data. """
    key = key.copy()
    key.update(data)
    return key.digest()


def _kind_of(record: Any) -> bytes:
    """ Return the kind of a record; b'' if there is none, or a damaged one. """
    kind: bytes = record[0] if type(record) is tuple else (record or b'')[:1]
    return kind


###############################################################################
# Stores ######################################################################
###############################################################################


class Store:
    """ Where sessions are kept: the base class for stores of your own.

        A store sees names (64 hexadecimal digits) and records (bytes), never an
        id, data or a request. The first 16 bytes of a record are its *version*:
        records with the same version are the same. The first byte is ``b's'``
        for a session, another one for what the library keeps beside them.
        `expires` is a time in seconds since the epoch, as `clock` counts; a
        record past it may be removed. `durable`: it must survive a power cut
        once this returns.

        *Gone* is None or False, never an error. Each method is atomic, may be
        called by several threads and processes at once, and never waits for
        another: what is held raises SessionBusy at once, and Session tries
        again. What cannot be done raises StoreError, within two seconds, and has
        changed nothing; its attribute `maybe_done` is set where nobody can know.
    """

    #: True for a store in this process that keeps the objects themselves.
    keeps_objects = False
    #: What cleaning by ordinary requests and a server's TTL go by; a Session sets its own.
    clock: Callable[[], float] = staticmethod(time.time)

    def load(self, name: str) -> bytes | None:
        """ Return the record, or None; b'' for one that is damaged. """
        raise NotImplementedError

    def create(self, name: str, record: bytes, expires: float, durable: bool = False) -> bool:
        """ Store a new record; return False, and change nothing, if the name is taken.
            Nobody sees a part of it, and nothing is left of it if the process dies. """
        raise NotImplementedError

    def replace(self, name: str, version: bytes, record: bytes, expires: float,
                lock: Any = None, durable: bool = False) -> bytes | None:
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

    def sweep(self, now: float, progress: Progress = None) -> tuple[int, int]:
        """ Remove everything that expires until `now`; return how many sessions
            went, and how many are left.

            :param progress: called now and then with the share done, 0 to 1.
        """
        raise NotImplementedError


class MemoryStore(Store):
    """ Keeps what it is given, also objects, in a dict of this process. """

    keeps_objects = True

    def __init__(self) -> None:
        self._records: OrderedDict[str, tuple[Any, float]] = OrderedDict()
        self._locks: dict[str, object] = {}
        # Reentrant, as the garbage collector may close, and save, a forgotten body at any moment.
        self._mutex = threading.RLock()

    def load(self, name: str) -> Any:
        return self._records.get(name, (None,))[0]

    def create(self, name: str, record: Any, expires: float, durable: bool = False) -> bool:
        with self._mutex:
            if name in self._records:
                return False
            self._records[name] = record, expires
            self._clean(itertools.islice(self._records, 2), self.clock())  # faster than it grows
            return True

    def replace(self, name: str, version: Any, record: Any, expires: float,
                lock: Any = None, durable: bool = False) -> Any:
        with self._mutex:
            stored = self.load(name)
            if stored is None or stored[:_VERSION] != version:
                return stored
            if self._locks.get(name, lock) is not lock:
                raise SessionBusy()
            self._records[name] = record, expires
            return record

    def remove(self, name: str, version: Any = None) -> bool:
        with self._mutex:
            stored = self.load(name)
            if stored is None or version is not None and stored[:_VERSION] != version:
                return False
            del self._records[name]
            self._locks.pop(name, None)
            return True

    def lock(self, name: str) -> tuple[object, Any] | None:
        with self._mutex:
            if name in self._locks:
                raise SessionBusy()
            if name not in self._records:
                return None
            lock = self._locks[name] = object()
            return lock, self.load(name)

    def unlock(self, name: str, lock: object) -> None:
        with self._mutex:
            if self._locks.get(name) is lock:
                del self._locks[name]

    def sweep(self, now: float, progress: Progress = None) -> tuple[int, int]:
        with self._mutex:
            sessions = {name for name, (record, _) in self._records.items()
                        if _kind_of(record) == _SESSION}
            self._clean(self._records, now)
            left = len(sessions.intersection(self._records))
            return len(sessions) - left, left

    def _clean(self, names: Iterable[str], now: float) -> None:
        for name in list(names):
            self._records.move_to_end(name)
            if self._records[name][1] <= now and name not in self._locks:
                del self._records[name]


# A session's file, and its life:
#
#   0     8                         2048                      4096
#   magic | head 1 | record         | head 2 | record         | bigger records ...
#
# Saves are numbered: odd ones write slot 1, even ones slot 2. A reader takes the
# newest slot whose checksum is right, so it finds the old record or the new one,
# whenever the process dies. No rename (80 us on ext4) and no temporary file. A record
# that does not fit into its slot goes behind the page, where the current one is not;
# a small one returns to the page, and what neither slot needs any more is cut off.
# A file without a record is none: whoever made it died, and create() may go on.
_PAGE = 4096
_MAGIC = b'BSess 3\n'
_NEW = _MAGIC.ljust(_PAGE, b'\0')  # the page of a file without a record
_ODD, _EVEN = len(_MAGIC), _PAGE // 2  # where the slots begin
#: A head: number, checksum of that and the record, expires, the record's offset and length.
_SLOT = struct.Struct('>QIdII')
_SMALL = _EVEN - _ODD - _SLOT.size  # bytes of a record that fits into either slot
_MAX_RECORD = 64 * 1024 * 1024  # bytes; a bigger one is foreign, or a mistake
_READING = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in (
    'O_CLOEXEC', 'O_NOFOLLOW', 'O_NONBLOCK', 'O_NOCTTY', 'O_BINARY', 'O_NOINHERIT'))
_WRITING = _READING | os.O_RDWR
#: What opening or reading something that is no plain file says.
_NO_FILE = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EAGAIN, errno.ESPIPE}


class FileStore(Store):
    """ Keeps each session in a file of its own, for the processes of one host.

        :param directory: where to keep them, in 256 directories; made when
            first needed. Not on NFS, where locks and caches are not reliable.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.path.abspath(os.fspath(directory))
        if os.path.lexists(self.directory) and not os.path.isdir(self.directory):
            raise ValueError('sessions_dir=%r is not a directory' % self.directory)
        self._cleaned = 0.0

    def load(self, name: str) -> bytes | None:
        path = self._path(name)
        try:
            fd = os.open(path, _READING)
            try:
                page = os.read(fd, _PAGE) or _pread(fd, 1, 0)  # which no FIFO takes
                record = _newest(fd, page)[0]
                if record is None and fcntl:
                    _warn_if_cut(fd, path)
                return record
            finally:
                os.close(fd)
        except OSError as error:
            return _absent('read', path, error)

    def create(self, name: str, record: bytes, expires: float, durable: bool = False) -> bool:
        path = self._path(name)
        try:
            file = _make_file(path)
            try:
                if file.record:
                    return False
                file.save(record, expires)
                if durable:
                    os.fsync(file.fd)
                    _sync_directory(os.path.dirname(path))
                    _sync_directory(self.directory)
            except BaseException:
                _unlink(path, file.fd)
                raise
            finally:
                file.close()
        except SessionBusy:  # somebody else makes it
            return False
        except OSError as error:
            raise _failed('create', path, error) from error
        self._clean_a_little()
        return True

    def replace(self, name: str, version: bytes, record: bytes, expires: float,
                lock: Any = None, durable: bool = False) -> bytes | None:
        path = self._path(name)
        try:
            file: _File = lock or _File(path)
            try:
                if lock and not lock.check():  # Windows ended it in place
                    return None
                if (file.record or b'')[:_VERSION] != version:
                    return file.record
                file.save(record, expires)
                if durable:
                    _sync_what_is_done(_fdatasync, file.fd, path)
            finally:
                if not lock:
                    file.close()
        except OSError as error:
            return _absent('write', path, error)
        self._clean_a_little()
        return record

    def remove(self, name: str, version: bytes | None = None) -> bool:
        path = self._path(name)
        try:
            if version is None:
                _unlink(path, None)
            else:
                with closing(_File(path)) as file:
                    if (file.record or b'')[:_VERSION] != version:
                        return False
                    file.check()
                    _unlink(path, file.fd)
        except OSError as error:
            return bool(_absent('remove', path, error))
        _sync_what_is_done(_sync_directory, os.path.dirname(path), path)
        return True

    def lock(self, name: str) -> tuple[Any, bytes] | None:
        path = self._path(name)
        try:
            file = _File(path)
            if file.record is not None:
                return file, file.record
            file.close()
        except OSError as error:
            _absent('lock', path, error)
        return None

    def unlock(self, name: str, lock: Any) -> None:
        lock.close()

    def sweep(self, now: float, progress: Progress = None) -> tuple[int, int]:
        went: list[bool] = []
        for shard in range(256):
            went += self._clean(shard, now)
            if progress:
                progress((shard + 1) / 256)
        return sum(went), len(went) - sum(went)

    def _path(self, name: str) -> str:
        if fcntl is None:
            _claim(self.directory)  # type: ignore[unreachable]
        return '%s/%s/%s' % (self.directory, name[:2], name[2:])

    def _clean(self, shard: int, now: float, most: int | None = None) -> list[bool]:
        """ Remove what has expired of one directory's files, or of `most` of them; tell of
            each session whether it went. """
        directory, went, names = self._path('%02x' % shard), [], []
        try:
            names = [name for name in os.listdir(directory) if len(name) == 62]
        except OSError as error:
            _absent('list', directory, error)
        few = names if most is None else random.sample(names, min(most, len(names)))
        for path in [directory + name for name in few]:
            with suppress(OSError, SessionBusy), closing(_File(path)) as file:  # not in use
                expires = file.current[1]
                if file.record is None:  # in an hour it is certain that its maker died
                    expires = os.fstat(file.fd).st_mtime + 3600
                if expires <= now:
                    file.check()
                    _unlink(path, file.fd)
                    _log.debug('removed what has expired: %s', path)
                if _kind_of(file.record) == _SESSION:
                    went.append(expires <= now)
        return went

    def _clean_a_little(self) -> None:
        """ Remove what has expired among a few files, once a second, for two milliseconds. """
        now = self.clock()
        if abs(now - self._cleaned) >= 1:
            self._cleaned = now
            end = time.perf_counter() + 0.002
            with suppress(StoreError):  # it is in the log
                for shard in random.sample(range(256), 16):
                    if time.perf_counter() < end:
                        self._clean(shard, now, 12)


class _File:
    """ A session's file, open and with its lock taken. """

    def __init__(self, path: str, new: bool = False) -> None:
        """ Raise SessionBusy if somebody else has it. """
        self.fd = os.open(path, _WRITING | os.O_CREAT if new else _WRITING, 0o600)
        try:
            _flock(self.fd, _LOCK)
            page = b'' if new and not self.check() else _pread(self.fd, _PAGE + 1, 0)
            self.record, self.current = _newest(self.fd, page)
            self.longer = len(page) > _PAGE
        except BaseException as error:
            self.close()
            if isinstance(error, BlockingIOError) or new and isinstance(error, FileNotFoundError):
                raise SessionBusy() from None
            raise

    def check(self) -> int:
        """ Return its size, or raise FileNotFoundError if it was removed meanwhile. """
        state = os.fstat(self.fd)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.ENXIO, 'No plain file')
        if not state.st_nlink:
            raise FileNotFoundError(errno.ENOENT, 'It was removed')
        if not state.st_size and stat.S_IMODE(state.st_mode) != 0o600:  # new, with a umask
            _chmod(self.fd, 0o600)
        return state.st_size

    def save(self, record: bytes, expires: float) -> None:
        """ Write the record where the current one is not. """
        number, _, _, end = self.current
        number, size = number + 1, len(record)
        at = _ODD if number % 2 else _EVEN
        if self.longer and (size > _SMALL or os.fstat(self.fd).st_size > max(_PAGE, end)):
            _fdatasync(self.fd)  # an older record goes: a power cut must not tear the newer, too
        start, inside = at + _SLOT.size, record
        try:
            if size > _SMALL:
                start, inside = self._write_big(record), b''
            slot = _SLOT.pack(number, zlib.crc32(record, number), expires, start, size) + inside
            if number > 1:
                self._write(slot, at)
            else:
                self._write((_MAGIC + slot).ljust(_PAGE, b'\0'), 0)
            self.record, self.current = record, (number, expires, start, start + size)
        finally:
            if self.longer:  # give back what neither slot needs, also if the disk is full
                needed = max(_PAGE, end, self.current[3])
                with suppress(OSError):  # the next save tries again
                    os.ftruncate(self.fd, needed)
                    self.longer = needed > _PAGE

    def _write_big(self, record: bytes) -> int:
        """ Write it behind the page, where the current record is not; return where. """
        if len(record) > _MAX_RECORD:
            raise SessionError('The session is too big: %d bytes of at most %d. Keep big things '
                               'elsewhere and their names here.' % (len(record), _MAX_RECORD))
        number, _, start, end = self.current
        if not number:
            self._write(_NEW, 0)
        free = start < _PAGE or start >= _PAGE + len(record)
        offset, self.longer = _PAGE if free else end + -end % _PAGE, True
        self._write(record, offset)
        return offset

    def _write(self, data: bytes, offset: int) -> None:
        """ Write all of it; a nearly full disk takes only a part at first. """
        written = _pwrite(self.fd, data, offset)
        if written < len(data):
            self._write(data[written:], offset + written)

    def close(self) -> None:
        """ Let go of the lock, also where a forked child shares it. """
        _flock(self.fd, _UNLOCK)
        os.close(self.fd)


def _make_file(path: str) -> _File:
    """ Open a file for a new record; make it, and what is missing above it. """
    try:
        return _File(path, True)
    except OSError as error:
        if error.errno in _NO_FILE:
            os.rename(path, path + '.strange')  # out of the way
        _make_directory(os.path.dirname(path))
        return _File(path, True)


def _make_directory(path: str) -> None:
    if not os.path.isdir(os.path.dirname(path)):
        _make_directory(os.path.dirname(path))
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)  # whatever the umask


def _newest(fd: int, page: bytes) -> tuple[bytes | None, tuple[int, float, int, int]]:
    """ Return the newest whole record (None in an unfinished file, b'' if all are damaged);
        and its number, when it expires, and where it begins and ends. """
    ends = math.inf
    if len(page) >= _PAGE and page.startswith(_MAGIC):
        odd, even = _SLOT.unpack_from(page, _ODD), _SLOT.unpack_from(page, _EVEN)
        for number, checksum, expires, start, size in (odd, even) if odd > even else (even, odd):
            end = start + size
            record = page[start:end] if end <= _PAGE else _pread(fd, min(size, _MAX_RECORD), start)
            # An empty slot has none; somebody's last number could not be followed by another.
            if record and zlib.crc32(record, number) == checksum and number < 1 << 63:
                return record, (number, expires, start, end)
            if page != (again := _pread(fd, len(page), 0)):  # a save came between
                return _newest(fd, again)
        ends = max(odd[2], even[2])  # unproven, but enough to remove what is damaged
    return None if _NEW.startswith(page[:_PAGE]) else b'', (0, ends, 0, 0)


def _warn_if_cut(fd: int, path: str) -> None:
    """ Log that a file has no record, unless it is just being made or removed. """
    time.sleep(0.05)
    if os.fstat(fd).st_nlink and _newest(fd, _pread(fd, _PAGE, 0))[0] is None:
        _log.warning('%s was cut; it is treated as absent', path)


def _absent(verb: str, path: str, error: OSError) -> bytes | None:
    """ Return None for what is no session, raise StoreError for trouble. """
    if error.errno in _NO_FILE:
        _log.warning('%s is no session (%s); it is treated as absent', path, error.strerror)
    elif error.errno != errno.ENOENT:
        raise _failed(verb, path, error) from error
    return None


def _failed(verb: str, path: str, error: OSError) -> StoreError:
    """ Log the failure, with owner and remedy where it is a permission. """
    remedy = ''
    if isinstance(error, PermissionError) and hasattr(os, 'geteuid'):
        at, me = path, os.geteuid()
        while at != os.sep and (not os.path.exists(at) or os.access(at, os.R_OK | os.W_OK)):
            at = os.path.dirname(at)
        owner = os.stat(at).st_uid
        remedy = ': %s belongs to user %d, and this process runs as user %d' % (at, owner, me)
        remedy += (', but its mode keeps it out: chmod -R u+rwX' if owner == me else
                   ' (was the app once run as root?). Give it the directory: chown -R %d' % me)
    _log.error('cannot %s %s: %s%s', verb, path, error.strerror, remedy)
    return StoreError()


def _sync_what_is_done(sync: Callable[[Any], None], what: Any, path: str) -> None:
    """ Have it survive a power cut. It cannot be taken back, so a failure is logged. """
    try:
        sync(what)
    except OSError as error:
        _log.error('%s is changed, but a power cut may undo that: %s', path, error.strerror)


# What FileStore needs of the system, and what Windows does instead.
_fdatasync = getattr(os, 'fdatasync', os.fsync)  # macOS has none, either
if fcntl is not None:
    _pread, _pwrite, _chmod, _flock = os.pread, os.pwrite, os.fchmod, fcntl.flock
    _LOCK, _UNLOCK = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN

    def _unlink(path: str, fd: int | None) -> None:
        os.unlink(path)
        if fd is not None:
            with suppress(OSError):
                os.ftruncate(fd, 0)  # tells those who have it open and wait for its lock

    def _sync_directory(path: str) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

else:  # Windows: a directory is for one process, and its locks are in a dict
    import msvcrt  # type: ignore[unreachable]
    _LOCK, _UNLOCK = True, False
    _held: dict[int, tuple[int, int]] = {}  # the holder's descriptor -> its file
    _claimed: set[str] = set()  # lock files, open as long as this process lives
    _mutex = threading.RLock()  # as MemoryStore's
    _nowhere = os.open(os.devnull, _READING)
    _chmod = _sync_directory = lambda *args: None  # nothing to do

    def _claim(directory: str) -> None:
        """ Keep other processes out of the directory, as long as this one lives. """
        path, fd = os.path.normcase(os.path.join(directory, 'lock')), -1
        with _mutex:
            if path in _claimed:
                return
            try:
                _make_directory(directory)
                fd = os.open(path, _WRITING | os.O_CREAT, 0o600)
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
                _claimed.add(path)  # it stays open
            except OSError as error:
                if fd >= 0:
                    os.close(fd)
                    error.strerror = ('another process uses this directory, and on Windows only '
                                      'one can. End that one, or use a redis URL for several')
                raise _failed('lock', path, error) from error

    def _pread(fd: int, size: int, offset: int) -> bytes:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, size)

    def _pwrite(fd: int, data: bytes, offset: int) -> int:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)

    def _flock(fd: int, take: bool) -> None:
        with _mutex:
            _held.pop(fd, None)
            if take and os.fstat(fd)[1:3] in _held.values():
                raise BlockingIOError(errno.EAGAIN, 'In use')
            if take:
                _held[fd] = os.fstat(fd)[1:3]

    def _unlink(path: str, fd: int | None) -> None:
        # What is open cannot be removed: it is ended in place (an empty file is no session)
        # and goes now, or by a later sweep if others have it open.
        with open(path, 'r+b') as file:
            file.truncate()
            os.fsync(file.fileno())
        if fd is not None:
            os.dup2(_nowhere, fd, False)  # closes the file, but keeps the lock
        with suppress(PermissionError):
            os.unlink(path)


class RedisStore(Store):
    """ Keeps sessions in a Redis (6.2 or newer) or Valkey server, for any number of hosts.
        The server's own TTL removes what has expired.

        :param client: a URL (``redis://``, ``rediss://``, ``valkey://``, ``unix://``, with
            redis-py's options), or a client of redis-py that returns bytes, a sentinel's or a
            cluster's, too. Time-outs of more than a second, or none, are one second.
        :param prefix: what the keys begin with.
    """

    _LEASE = 30000  # milliseconds until a lock ends without its holder
    _SLOW = 0.3     # seconds; what fails later timed out, and is not tried again
    _PAUSE = 1.0    # seconds after a time-out in which nobody else waits for one
    _IDLE = 60.0    # seconds until a connection that nobody needs is closed

    # KEYS: a record, and its lock, which is the holder's token. EVAL sends a script each time: for
    # EVALSHA, a microsecond less, one must know what the server has. A retry finds its own record.
    _READ = """
        local record, holder = unpack(redis.call('MGET', KEYS[1], KEYS[2]))
        if not record then return redis.call('GET', KEYS[1]) end  -- fails if it is a list, say
        local left = holder and holder ~= ARGV[1] and redis.call('PTTL', KEYS[2]) or -1
        if left >= 0 and left <= 30000 then return 2 end  -- a longer one is none of ours"""
    _REPLACE = _READ + """
        if record == ARGV[3] then return 1 end
        if record:sub(1, 16) ~= ARGV[2] then return record end
        return redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4]) and 1"""
    _REMOVE = """
        local record = redis.call('GET', KEYS[1])
        return record and record:sub(1, 16) == ARGV[1] and redis.call('DEL', KEYS[1])"""
    _LOCK = _READ + """
        redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
        return record"""
    _UNLOCK = """
        return redis.call('GET', KEYS[2]) == ARGV[1] and redis.call('DEL', KEYS[2])"""
    _REMEDIES = {
        'ermission|ACL|run this': 'let its user do that: ACL SETUSER (name) ~(prefix)* +get +set '
        '+del +mget +pttl +eval +getrange +scan +dbsize +info +ping +select',
        'Authentication': 'AUTH was refused: check user and password in the URL or the client',
        'OutOfMemory|OOM': 'raise maxmemory',
        'onnection refused|not known': 'start the server, or check host and port'}

    def __init__(self, client: Any = 'redis://localhost:6379/0',
                 prefix: str = 'bsession:') -> None:
        try:
            import redis
        except ImportError as error:
            raise ImportError("redis needs a package: pip install 'redis[hiredis]'") from error
        _require(isinstance(prefix, str), 'prefix must be a str, not %s', _kind(prefix), TypeError)
        if isinstance(client, str):
            _require(re.fullmatch(r'(unix://[^?#]+|(?!unix)[\w+-]+://[^/?#]*(?<!:0)(/\d*)?)'
                                  r'([?](?!port=[0-])\w+=[^&#]+'
                                  r'(&(?!port=[0-])\w+=[^&#]+)*)?', client),
                     'redis URL: after the host come :port, 1 to 65535, /database, a number, and '
                     '?option=value; in a password / is written %%2F, ? %%3F and # %s', '%23')
            try:  # redis-py says some of what is wrong only when it connects, or never
                client = redis.Redis.from_url(re.sub('^valkey', 'redis', client))
                client.connection_pool.make_connection()
                for option, value in client.connection_pool.connection_kwargs.items():
                    if type(value) is float and not value > 0 or type(value) is int and value < 0:
                        raise ValueError('%s cannot be %s' % (option, value))
            except Exception as error:
                raise ValueError('This redis URL cannot be used: %s' % error) from error
        _require(isinstance(client, (redis.Redis, redis.RedisCluster))
                 and not client.get_encoder().decode_responses, 'client must be a URL, a redis.'
                 'Redis or a RedisCluster, without decode_responses=True, not %s', _kind(client))
        self.client, self._prefix = client, prefix
        self._pool: Any = getattr(client, 'connection_pool', None)  # a cluster: one a node
        self._pack: Any = getattr(sys.modules.get('hiredis'), 'pack_command', None)
        self._settings = self._calm(redis.retry.Retry(redis.backoff.NoBackoff(), 0))
        self._free: list[tuple[float, Any]] = []
        self._left_locked: deque[tuple[str, bytes]] = deque(maxlen=20)
        self._silent_until = 0.0
        with suppress(StoreError):  # what is wrong is in the log early
            info = str(self._ask('INFO', 'memory'))
            for policy in set(re.findall(r'maxmemory_policy\W+([\w-]+)', info)) - {'noeviction'}:
                _log.warning('redis: maxmemory-policy %s loses sessions; use noeviction', policy)

    def load(self, name: str) -> bytes | None:
        return self._ask('GET', self._key(name))  # type: ignore[no-any-return]

    def create(self, name: str, record: bytes, expires: float, durable: bool = False) -> bool:
        made = self._ask('SET', self._key(name), record, 'NX', 'PX', self._ttl(expires))
        return bool(made) or self.load(name) == record  # this was a retry

    def replace(self, name: str, version: bytes, record: bytes, expires: float,
                lock: Any = None, durable: bool = False) -> bytes | None:
        reply = self._run(self._REPLACE, name, lock or b'', version, record, self._ttl(expires))
        return record if reply == 1 else reply

    def remove(self, name: str, version: bytes | None = None) -> bool:
        return bool(self._ask('DEL', self._key(name)) if version is None
                    else self._run(self._REMOVE, name, version))

    def lock(self, name: str) -> tuple[bytes, bytes] | None:
        record = self._run(self._LOCK, name, token := os.urandom(12), self._LEASE)
        return (token, record) if record else None

    def unlock(self, name: str, lock: bytes) -> None:
        self._run(self._UNLOCK, name, lock)

    def sweep(self, now: float, progress: Progress = None) -> tuple[int, int]:
        if self._pool is None:  # a cluster: node by node
            nodes = map(self.client.get_redis_connection, self.client.get_primaries())
            return 0, sum(RedisStore(node, self._prefix).sweep(now, progress)[1] for node in nodes)
        pattern = re.sub(r'([][*?\\^-])', r'\\\1', self._prefix) + '{' + '?' * 64 + '}'
        size, seen, left, cursor = self._ask('DBSIZE'), 0, 0, None
        while cursor != b'0':
            cursor, keys = self._ask('SCAN', cursor or 0, 'MATCH', pattern, 'COUNT', 1000)
            left += sum(self._ask('GETRANGE', key, 0, 0) == _SESSION for key in keys)
            seen += 1000
            if progress:
                progress(seen / max(seen, size) if cursor != b'0' else 1.0)
        return 0, left  # the server removes them

    def _key(self, name: str) -> str:
        return self._prefix + '{' + name + '}'  # a cluster keeps on one node what has these alike

    def _ttl(self, expires: float) -> int:
        return max(1, int(1000 * (expires - self.clock())))

    def _run(self, script: str, name: str, *args: Any) -> Any:
        key = self._key(name)
        try:
            reply = self._ask('EVAL', script, 2, key, key + 'lock', *args)
        except BaseException:
            if script in (self._LOCK, self._UNLOCK):  # nobody knows whether a lock is left
                self._left_locked.append((name, args[0]))
            raise
        if reply == 2:
            raise SessionBusy()
        return reply

    def _ask(self, *command: Any) -> Any:
        """ Send a command, once more if its connection was lost, and return the reply. """
        start, maybe_done = time.monotonic(), False
        if start < self._silent_until:
            raise StoreError()
        for again in True, False:
            connection = None
            try:
                if self._pool is None:
                    reply = self.client.execute_command(*command)
                else:
                    connection = self._connection(start)
                    connection.send_packed_command(
                        [self._pack(command)] if self._pack else connection.pack_command(*command))
                    reply = connection.read_response()
                    self._free.append((start, connection))  # after an error it is dropped
                break
            except Exception as error:
                self._free = []  # the others are lost, too, or lead to a master of yesterday
                answered = isinstance(error, sys.modules['redis'].ResponseError)
                maybe_done |= not (answered or self._pool and connection is None)
                if time.monotonic() - start > self._SLOW and not answered:
                    again, self._silent_until = False, time.monotonic() + self._PAUSE
                if not again or answered and 'readonly' not in repr(error).lower():
                    return self._fail(command[0], error, maybe_done)
        if self._left_locked:
            with suppress(StoreError, IndexError):
                self.unlock(*self._left_locked.pop())
        return reply

    def _fail(self, command: str, error: Exception, maybe_done: bool) -> bytes:
        """ Raise a StoreError, or return what says that a record is damaged. """
        text = '%s: %s' % (_kind(error), error)
        if 'WRONGTYPE' in text:
            _log.warning('redis: a key is no session and treated as absent: %s', text)
            return b''
        for pattern, remedy in self._REMEDIES.items():
            text += '; ' + remedy if re.search(pattern, text) else ''
        _log.error('redis: %s failed: %s', command, text)
        failed = StoreError()
        failed.maybe_done = maybe_done
        raise failed from error

    def _connection(self, now: float) -> Any:
        """ Return one that nobody uses. redis-py's own pool costs three times as much. """
        try:
            while self._free[0][0] < now - self._IDLE or self._free[0][1].pid != os.getpid():
                self._free.pop(0)[1].disconnect()
            return self._free.pop()[1]
        except IndexError:
            connection = self._pool.connection_class(**self._settings)
            connection.connect()
            return connection

    def _calm(self, retry: Any) -> dict[str, Any]:
        """ Return how to connect: one try, and two seconds for all that are asked in turn. """
        if self._pool is None:
            own: dict[str, Any] = self.client.nodes_manager.connection_kwargs
            helpers = [node.redis_connection for node in self.client.get_nodes()]
            self.client.cluster_error_retry_attempts = 0  # redis-py 5 looks here
            self.client.set_retry(retry)
        else:
            own = dict(self._pool.connection_kwargs, retry=retry)
            helpers = getattr(getattr(self._pool, 'sentinel_manager', None), 'sentinels', [])
        pools = [helper.connection_pool for helper in helpers if helper]
        for settings in own, *(pool.connection_kwargs for pool in pools):
            for option in 'socket_timeout', 'socket_connect_timeout':
                settings[option] = min(settings.get(option) or 1, 1, 1.8 / (1 + len(helpers)))
        for pool in pools:
            pool.connection_kwargs['retry'] = retry
            pool.reset()
        return own


def check_store(make_store: Callable[[], Store]) -> None:
    """ Check that a store keeps the promises of `Store`; AssertionError if not.

        One line of your own tests does it::

            def test_my_store(): bottle_session.check_store(MyStore)

        :param make_store: called twice, for two objects on the same storage.
    """
    store, other, later = make_store(), make_store(), time.time() + 60
    name = os.urandom(32).hex()
    one, two, big = (_SESSION + os.urandom(40) + b'\0record' * size for size in (1, 2, 100000))
    old, new = one[:_VERSION], two[:_VERSION]
    assert (store.load(name), store.lock(name)) == (None, None), 'None is for an unknown name'
    assert store.replace(name, old, two, later) is None, 'replace() never creates'
    assert not store.remove(name), 'remove() tells that there was nothing'
    assert store.create(name, one, later, True), 'create() stores, and nothing of that did'
    assert not other.create(name, two, later), 'create() never overwrites'
    assert other.load(name) == one, 'load() returns the bytes that were stored'
    assert store.replace(name, old, two, later, None, True) == two, 'replace() stores'
    assert other.replace(name, old, big, later) == two, 'replace() returns a newer record'
    assert other.replace(name, new, big, later) == big == store.load(name), 'records may grow'
    assert not store.remove(name, new), 'remove() with another version does nothing'
    assert store.remove(name, big[:_VERSION]), 'remove() tells that it was there'
    assert store.create(name, one, time.time() + 0.05), 'remove() frees the name'
    time.sleep(0.06)
    store.sweep(time.time())
    assert other.create(name, one, later), 'sweep() removes what has expired'
    went, left = store.sweep(time.time())
    assert went == 0 < left and store.load(name) == one, 'sweep() keeps and counts the others'
    _check_together(store, other, name, one, later)


def _check_together(store: Store, other: Store, name: str, one: bytes, later: float) -> None:
    """ Check what locks keep out, and threads at once; `one` is stored, and gone at the end. """
    from concurrent.futures import ThreadPoolExecutor
    records = [_SESSION + os.urandom(60) * 50 for _ in range(8)]
    old, two = one[:_VERSION], records[0]

    def unless_busy(act: Callable[..., Any], *args: Any) -> Any:
        try:
            return act(*args)
        except SessionBusy:
            return 'busy'

    lock, record = store.lock(name) or (None, None)
    assert record == one == other.load(name), 'lock() returns the record, load() ignores locks'
    busy = [unless_busy(other.lock, name), unless_busy(other.replace, name, old, two, later)]
    assert busy == ['busy', 'busy'], 'lock() keeps others out: SessionBusy at once'
    assert store.replace(name, old, two, later, lock) == two, 'the holder may save'
    store.unlock(name, lock)
    lock, record = other.lock(name) or (None, None)
    assert record == two and store.remove(name), 'unlock() lets others lock, remove() ignores it'
    assert other.replace(name, two[:_VERSION], one, later, lock) is None, 'what is gone is gone'
    other.unlock(name, lock)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            made = list(pool.map(lambda new: (
                unless_busy(store.create, name, new, later) is True, other.load(name)), records))
            assert sum(done for done, _ in made) == 1, 'of several create() one wins'
            assert {seen for _, seen in made} <= {None, *records}, 'a record is absent or whole'
            assert store.remove(name) and store.create(name, one, later)
            saved = pool.map(lambda new: unless_busy(
                other.replace, name, old, new, later) == new, records)
            assert sum(saved) == 1, 'of several replace() one wins'
            assert store.remove(name)


###############################################################################
# Owners ######################################################################
###############################################################################

_DAY = 86400.0
_MONTH = 31 * _DAY  # that a clock may be wrong for a while
_MOVED_SECONDS = 60.0      # that a moved id reads as empty
_BLOCKED_SECONDS = 3600.0  # after which a log-in that began has ended, or its process
_NOTHING: dict[Any, Any] = {}  # never changed

Login = namedtuple('Login', 'id created used note here')


class _Owners:
    """ The lists of who is logged in where: a session's name in the store -> an entry with
        `note`, and `created`, `used` and `expires` in seconds since the epoch.

        A list is one record, changed by compare-and-set alone. A session is listed before it
        is stored: where a process dies in between, a name without a session does no harm.
    """

    def __init__(self, store: Store, seal: _Seal) -> None:
        self._store, self._seal = store, seal

    def read(self, owner: str | None) -> _Entries:
        """ Return what the lists under all secrets say, in the order of the log-ins. """
        merged: _Entries = {}
        for entries in self._lists(owner):
            for name, entry in entries.items():
                merged[name] = max(entry, merged.get(name, entry),
                                   key=lambda one: (one['used'], one['expires']))
        return merged

    def living(self, entries: _Entries, now: float) -> _Entries:
        """ Return those of the entries that have a session. """
        return {name: entry for name, entry in entries.items()
                if entry['expires'] > now and _kind_of(self._store.load(name)) == _SESSION}

    def enter(self, owner: str, name: str, like: str, durable: bool, **entry: Any) -> None:
        """ List a session under the newest secret, before it is stored. If `entry` is of no
            log-in, it goes on with that of the name `like`. What an older list says stays: a
            process with the secrets in another order may be writing to that. """
        for entries in self._lists(owner, 1, durable):
            old = {} if 'note' in entry else entries.get(like) or self.read(owner).get(like, {})
            ends = max(entry['expires'], entries.get(name, entry)['expires'])
            later = [*entries][[*entries].index(like) + 1:] if old and like in entries else []
            entries[name] = {'created': entry['used'], 'note': '', **old, **entry, 'expires': ends}
            for other in later:  # a new id has the place of its log-in
                entries[other] = entries.pop(other)

    def leave(self, owner: str | None, name: str, before: float = 0, expires: float = 0) -> None:
        """ Have the lists of its owner, if it has one, forget a session that ended; or let it
            end at `expires` there, unless somebody else changed that from `before`. """
        try:
            for entries in self._lists(owner):
                if not expires:
                    entries.pop(name, None)
                elif name in entries and entries[name]['expires'] == before:
                    entries[name] = {**entries[name], 'expires': expires}
        except _Unavailable as error:
            _log.warning('session %s is listed for longer than it lives: %s', _public(name), error)

    def revoke(self, owner: str | None, wanted: Callable[[str], bool], now: float,
               known: _Entries | None = None) -> int:
        """ End the sessions with these names; return how many lived. One that gets a new id
            meanwhile is listed with it before, so their log-ins are looked for under names
            that are not `known` until none is left. """
        known = found = known or self.read(owner)
        logins, ended = {known[name]['created'] for name in filter(wanted, known)}, 0
        while going := [name for name, entry in found.items() if entry['created'] in logins
                        and (wanted(name) or name not in known)]:
            ended += sum(self._end(name) and found[name]['expires'] > now for name in going)
            for entries in self._lists(owner):
                for name in going:
                    entries.pop(name, None)
            found = self.read(owner)
        return ended

    def trim(self, owner: str, newest: str, most: int, now: float) -> None:
        """ End what expired a day ago, as clocks differ, and those sessions that were not used
            for longest, but for `most`. Of several log-ins at once each ends only what was
            listed before it, so that one stays. """
        known = self.read(owner)
        over = {name for name, entry in known.items() if entry['expires'] + _DAY <= now}
        if len(known) - len(over) > most and newest in known:  # else it was ended meanwhile
            before = dict(itertools.takewhile(lambda item: item[0] != newest, known.items()))
            others = self.living(before, now)
            for name in before.keys() - others:
                if self._block(name):  # a log-in without a session yet comes again, behind this
                    self.leave(owner, name)
                else:
                    others.update(self.living({name: before[name]}, now))
            latest = sorted(others, key=lambda name: others[name]['used'], reverse=True)
            over.update(latest[most - 1:])
        if over:
            self.revoke(owner, over.__contains__, now, known)

    def _end(self, name: str) -> bool:
        """ End a session, and tell whether there was one; if there is none yet, there never
            will be. """
        store = self._store
        for _ in range(100):
            record = store.load(name)
            if record is None and self._block(name):
                return False
            if record and _kind_of(record) != _SESSION:
                return False
            try:
                removed = record is not None and store.remove(name, record[:_VERSION] or None)
            except SessionBusy:  # in a `with` block, for which log-out does not wait
                removed = store.remove(name)
            if removed:
                return bool(record)
            time.sleep(0.001)  # somebody is about to store or to end it
        raise StoreError()

    def _block(self, name: str) -> bool:
        """ Have nobody store a session under this name; False if somebody did. """
        # Nobody has the id of this mark: its name must not help to guess a secret.
        mark = self._seal.seal(_BLOCKED, _new_id(), _NO_HEAD)
        return self._store.create(name, mark, self._store.clock() + _BLOCKED_SECONDS)

    def _lists(self, owner: str | None, secrets: int | None = None,
               durable: bool = False) -> Iterator[_Entries]:
        """ Yield an owner's lists under so many secrets. What a loop makes of one is stored;
            where somebody else was faster, the list comes again. """
        ids = self._seal.list_ids(owner)[:secrets] if owner else []
        for id in ids[:0:-1] + ids:  # and back: a session may move between two, either way
            for _ in range(1000):
                record, entries = self._store.load(self._seal.name(id)), {}
                try:
                    if record is not None:
                        entries = json.loads(self._seal.open(id, record)[2])
                except _Unreadable as error:
                    _log.warning('a list of log-ins %s; it is treated as empty', error)
                before = entries.copy()
                yield entries
                if entries == before or self._replace(id, record, entries, durable):
                    break
            else:
                raise StoreError()

    def _replace(self, id: str, record: Any, entries: _Entries, durable: bool) -> bool:
        """ Store a list in place of this record; tell whether that was still there. """
        store, name, version = self._store, self._seal.name(id), record and record[:_VERSION]
        if not entries:
            return bool(_retry_busy(1.0, '', store.remove, name, version))
        new = self._seal.seal(_LOGINS, id, _NO_HEAD, json.dumps(entries).encode('ascii'))
        expires = max(entry['expires'] for entry in entries.values())
        if record:
            return bool(new == _retry_busy(
                1.0, '', store.replace, name, version, new, expires, None, durable))
        if record is not None:  # damaged
            store.remove(name)
        return store.create(name, new, expires, durable)


#: Who waits for the lock of a session in this process, in order of arrival.
_queues: dict[str, list[object]] = {}

if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_queues.clear)


def _retry_busy(seconds: float | None, name: str, attempt: Callable[..., Any], *args: Any) -> Any:
    """ Call `attempt` until no other request holds the session.

        :param seconds: after which SessionBusy is raised; None: at once, without a record.
        :param name: of the session whose lock it takes, for which requests queue up; or ''.
    """
    if name not in _queues:
        try:
            return attempt(*args)
        except SessionBusy:
            if seconds is None:
                raise
    me, end = object(), time.monotonic() + (seconds or 0)
    queue = _queues.setdefault(name, []) if name else []
    queue.append(me)
    try:
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.0005 * min(20, 1 + queue.index(me)) * random.uniform(0.8, 1.2)))
            if queue[0] is me:
                with suppress(SessionBusy):
                    return attempt(*args)
        _log.warning('%s: another request holds this session for more than %s seconds',
                     _current.get().rule(), seconds)
        raise SessionBusy()
    finally:
        queue.remove(me)
        if not queue:
            _queues.pop(name, None)


def _public(name: str) -> str:
    """ Return what logs call a session: the beginning of its name in the store. """
    return name[:16]


###############################################################################
# Visit #######################################################################
###############################################################################


class _Visit:
    """ What one visitor's session is in one request.

        While nothing that can be changed inside has left, `touched` tells what may differ:
        the keys that were set or deleted, with the stored values. Once the whole dict or
        such a value was handed out (`handed_out`), all keys are compared.
    """

    __slots__ = ('session', 'request', 'data', 'id', 'name', 'record', 'head', 'payload', 'older',
                 'expires', 'due', 'options', 'touched', 'handed_out', 'stored', 'ended', 'moved',
                 'cookie', 'why', 'manual', 'depth', 'snapshot', 'held')

    def __init__(self, session: Session, request: _Request) -> None:
        self.session, self.request = session, request
        self.data: Any = None       # a dict; None: not asked for yet
        self.id: str | None = None  # of the stored session
        self.name = ''              # in the store
        self.record: Any = None     # as it is stored
        self.head = _NO_HEAD
        self.payload: Any = None
        self.older = False          # an older secret sealed it
        self.expires = 0.0          # if it is not used any more
        self.due = False            # this use is to be recorded
        self.options = _NOTHING     # what the head is to say instead
        self.touched: dict[Any, Any] = {}
        self.handed_out = False
        self.stored: Any = None     # the payload's data, once more; None: not loaded yet
        self.ended = False          # by another request: nothing can be stored
        self.moved = False          # the browser sent an id that has just got a new one
        self.cookie: str | None = None  # what to tell the browser
        self.why = 'the browser sent no cookie of ours'
        self.manual = False         # nothing saves it by itself
        self.depth = 0              # of `with` blocks
        self.snapshot: Any = None   # data and options that a failed block goes back to
        self.held: Any = None       # name, the store's lock, process

    # Loading, and what changed since

    def load(self, fetch: Callable[[str], Any] | None = None) -> dict[Any, Any]:
        """ Return the data, at first those of the living session that a cookie names. """
        data: dict[Any, Any] | None = self.data
        if data is not None:
            return data
        session = self.session
        try:
            for id in session._cookie.ids(self.request.environ):
                name = session._seal.name(id)
                data = self._open(id, name, (fetch or session.store.load)(name))
                if data is not None:
                    break
                self.unlock()
            else:
                data, self.ended = {}, self.moved
        except MemoryError as error:  # it may be well in a moment
            raise StoreError() from error
        if self.data is None:  # else a thread of the route was faster
            self.data = data
        return self.data  # type: ignore[no-any-return]

    def _open(self, id: str, name: str, record: Any) -> dict[Any, Any] | None:
        """ Take this record as the stored one, and return the data; None if it holds no
            living session. """
        session = self.session
        if record is None or record[:1] == _BLOCKED:
            self.why = 'the session is unknown, expired or was purged'
            return None
        try:
            kind, head, payload, older = session._seal.open(id, record)
            now, expires = session.clock(), session._expires(head)
            if kind == _MOVED:
                self.moved = self.moved or now - head.used < _MOVED_SECONDS
                self.why = 'the session has got a new id'
                return None
            if now >= expires:
                self.why = 'the session has expired'
                return None
            data = session._seal.loads(payload)
        except _Unreadable as error:
            self.why = 'the stored session %s' % error
            _log.warning('session %s %s; it is treated as absent', _public(name), error)
            return None
        self.id, self.name, self.record, self.payload = id, name, record, payload
        self.head, self.older, self.stored = head, older, None
        life = (head.days or session._days) * _DAY
        self.expires, self.due = expires, not -_MONTH <= now - head.used < life / 30
        return data

    def hand_out(self) -> dict[Any, Any]:
        """ Return the data themselves, for any change. """
        data = self.load()
        self.handed_out = True
        return data

    def load_stored(self) -> dict[Any, Any]:
        """ Return the data as they are stored, to compare with. """
        stored: dict[Any, Any] | None = self.stored
        if stored is None:
            self.stored = stored = self.session._seal.loads(self.payload)
        return stored

    def changes(self) -> set[Any]:
        """ Return the keys whose values differ from what is stored. """
        data, touched, same, changed = self.data, self.touched, self.session._seal.same, set()
        if self.handed_out:
            stored = self.load_stored()
            touched = {**dict.fromkeys(data, _MISSING), **stored}
            others = {key: key for key in stored if type(key) is not str}
            if others:  # True may be in the place of 1
                changed = {key for key in data if not same(key, others.get(key, key))}
        for key, old in touched.copy().items():  # a thread of the route may touch more
            new = data.get(key, _MISSING)
            if type(new) is type(old) and type(new) in _ATOMS:  # nearly all
                if new != old:
                    changed.add(key)
            elif not same(old, new):
                changed.add(key)
        return changed

    def pending(self) -> tuple[Any, ...] | None:
        """ Return what `dumps` does if a save would write that, else None. """
        if self.id:
            if not (self.touched or self.handed_out or self.options):
                return None
        elif self.ended or not self.data:
            return None
        unsaved = self.dumps()
        if self.id and not self.options:
            payload = unsaved[0]
            if type(payload) is bytes and payload == self.payload or not self.changes():
                return None
        return unsaved

    def dirty(self) -> bool:
        self.load()
        return self.pending() is not None

    def dumps(self) -> tuple[Any, ...]:
        """ Return the data serialized, as they are, and what was loaded back, if that was to
            be tried: what does not load back must not be stored. """
        data, seal, loaded = self.data.copy(), self.session._seal, None
        try:
            payload = seal.dumps(data)
            if not (seal.keeps_values or self.handed_out and payload == self.payload):
                for key in data if self.handed_out or not self.id else self.touched.copy():
                    if not (seal.pickles and type(key) in _SURE and type(data.get(key)) in _SURE):
                        loaded = seal.loads(payload)
                        break
        except Exception as error:
            for key, value in data.items():
                try:
                    seal.loads(seal.dumps({key: value}))
                except Exception as reason:
                    raise SessionError(
                        'session[%r] holds a value of type %s, which cannot be stored (%s). Keep '
                        'plain values, or what identifies the object.'
                        % (key, _kind(value), reason)) from error
            raise SessionError('The session cannot be stored: %s' % error) from error
        return payload, data, loaded

    # Saving

    def save(self) -> bool:
        """ Store what this request changed, and tell whether that took a write. """
        if self.data is None or sys.exc_info()[1] and self.request.is_crashing():
            return False
        while unsaved := self.pending():  # else another one wrote the same
            if not self.id:
                self._switch_to(*self._create(unsaved, self._next_head(), None))
                return True
            stored = self._update(unsaved[0], self.session.lock_timeout)
            if stored is True:
                self._mark_saved(*unsaved)
                return True
            if self.held and stored:
                _log.warning('session %s: its lock was lost to another request, the changes of '
                             'both are merged', _public(self.name))
            if not self._merge(stored):
                self._end_elsewhere()
        return False

    def _update(self, payload: Any, seconds: float | None) -> Any:
        """ Store these data and return True; or what is stored by now, if another request
            stored it; or None if the session has ended. """
        session, name, head, expires = self.session, self.name, self.head, self.expires
        if session.clock() >= expires:
            record = session.store.load(name)
            return None if record == self.record else record
        renewed = bool(self.options) or self.due and not self.request.sent
        if renewed:
            head = self._next_head()
            expires = session._expires(head)
        listed = head.owner and (renewed or self.older)
        if listed:  # as ending no sooner than either version
            session._owners.enter(head.owner, name, name, False, used=head.used,
                                  expires=max(expires, self.expires))
        record = session._seal.seal(_SESSION, self.id or '', head, payload)
        stored = _retry_busy(seconds, '', session.store.replace, name, self.record[:_VERSION],
                             record, expires, self.held and self._own_lock())
        if stored != record:
            if _kind_of(stored) != _SESSION:
                session._owners.leave(head.owner, name)
            return stored
        self.record, self.payload, self.older = record, payload, False
        if renewed:
            before, self.head, self.expires = self.expires, head, expires
            if expires < before:
                session._owners.leave(head.owner, name, before, expires)
            self._set_cookie()
        return True

    def _mark_saved(self, payload: Any, saved: dict[Any, Any], loaded: Any) -> None:
        """ Note that what `dumps` gave is stored. """
        self.stored, data = loaded, self.data
        if loaded is not None:  # somebody may hold what can be changed inside
            self.handed_out = True
        touched = self.touched
        for key in [*touched]:  # but for what a thread of the route has set meanwhile
            del touched[key]
            if saved.get(key, _MISSING) is not data.get(key, _MISSING):
                touched.setdefault(key, saved.get(key, _MISSING))
        self.due, self.options = False, _NOTHING
        if self.depth:
            self.snapshot = payload, self.options

    def _merge(self, record: Any) -> bool:
        """ Take over what is stored by now, beneath the changes of this request; tell
            whether the session still exists. """
        if record == self.record:
            return self.session.clock() < self.expires
        data, old, changed = self.data, self.load_stored(), self.changes()
        newest, same = self._open(self.id or '', self.name, record), self.session._seal.same
        if newest is None:
            return False
        for key in {**old, **newest}:
            was, new = old.get(key, _MISSING), newest.get(key, _MISSING)
            if same(was, new):
                continue
            if key not in changed:
                data[key] = new
                if new is _MISSING:
                    del data[key]
            elif not same(data.get(key, _MISSING), new):
                _log.warning('session %s: two requests changed %r at once, and the later one '
                             'won: use "with session:" where the new value depends on the old '
                             'one', _public(self.name), key)
        if changed:
            _log.info('session %s: merged with a save of another request', _public(self.name))
        self.touched = {key: newest.get(key, _MISSING) for key in self.touched}
        return True

    def _end_elsewhere(self) -> bool:
        """ Accept that the session ended elsewhere: nothing can bring it back. """
        _log.info('session %s: a save was dropped, it was purged, regenerated or expired '
                  'meanwhile', _public(self.name))
        self._reset('it was purged, regenerated or expired elsewhere during this request', True)
        self.cookie = None  # the browser may have a newer one by now
        return False

    def _reset(self, why: str, ended: bool) -> None:
        self.why, self.ended, self.moved, self.older = why, ended, False, False
        self.id, self.head, self.payload = None, _NO_HEAD, None

    def _next_head(self, owner: str | None = None) -> _Head:
        """ Return a head that records this use, and mends what a wrong clock left. """
        created, used, days, permanent, owner_before = self.head
        now, get = self.session.clock(), self.options.get
        return _Head(created if self.id and created - now <= _MONTH else now,
                     now if used - now > _MONTH else max(used, now),
                     get('days', days), get('permanent', permanent), owner or owner_before)

    def _record_use(self) -> None:
        """ Store the time of this use. What prevents it is logged, not raised, and nobody
            is waited for: a later request does it. """
        options, self.options = self.options, {}  # that nobody saved
        try:
            self._update(self.payload, None)
        except _Unavailable as error:
            _log.log(logging.INFO if isinstance(error, SessionBusy) else logging.WARNING,
                     'session %s: its use could not be recorded: %s', _public(self.name), error)
        self.options, self.due = options, False

    # New ids, and the end

    def _create(self, unsaved: tuple[Any, ...], head: _Head, login: Any) -> tuple[Any, ...]:
        """ Store what `dumps` gave under a new id, durably if somebody logs in or the old id is to
            end (`login` is not None); return what `_switch_to` takes. """
        if self.request.sent:
            raise SessionError('Headers sent: a new session or id cannot be told to the browser '
                               'any more. Save before the first chunk is yielded.')
        session, expires, durable = self.session, self.session._expires(head), login is not None
        while True:
            id = _new_id()
            name = session._seal.name(id)
            if head.owner:
                session._owners.enter(head.owner, name, self.name, durable, used=head.used,
                                      expires=expires, **login)
            record = session._seal.seal(_SESSION, id, head, unsaved[0])
            if session.store.create(name, record, expires, durable):
                return id, name, record, head, expires, unsaved
            # A revoke() blocked the name: begin again.

    def _switch_to(self, *new: Any) -> None:
        """ Go on as the session that `_create` stored. """
        self.id, self.name, self.record, self.head, self.expires, unsaved = new
        self.payload, self.older, self.ended, self.moved = unsaved[0], False, False, False
        self._mark_saved(*unsaved)
        self._set_cookie()

    def regenerate(self, owner: str | None = None, note: str | None = None) -> None:
        """ Give the session a new id, and with `owner` that owner. """
        if self.request.is_crashing():
            self.roll_back()
        data = self.load()
        login = {'created': self.session.clock(), 'note': note} if owner else {}
        if self.id and self._move(owner, login):
            return
        if self.ended and not self.moved:
            if not owner:
                return
            data.clear()  # a log-in begins anew, without what somebody logged out of
        if data or owner:
            self._switch_to(*self._create(self.dumps(), self._next_head(owner), login))

    def _move(self, owner: str | None, login: dict[str, Any]) -> bool:
        """ Store the session under a new id and end the old one; False if it is gone. """
        session, name, owner_before = self.session, self.name, self.head.owner
        try:
            lives = session.clock() < self.expires or self._merge(session.store.load(name))
            while lives:
                now = session.clock()
                mark = session._seal.seal(_MOVED, self.id or '', _NO_HEAD._replace(used=now))
                new = self._create(self.dumps(), self._next_head(owner), login)
                try:
                    stored = _retry_busy(
                        session.lock_timeout, '', session.store.replace, name,
                        self.record[:_VERSION], mark, now + _MOVED_SECONDS, self._own_lock(), True)
                except BaseException as error:
                    if getattr(error, 'maybe_done', not isinstance(error, SessionBusy)):
                        self._switch_to(*new)  # the old id may be dead
                    else:
                        self._undo(*new)
                    raise
                if stored == mark:
                    self._switch_to(*new)
                    session._owners.leave(owner_before, name)
                    return True
                self._undo(*new)
                lives = self._merge(stored) and self._merge(self._lock(name))
            return self._end_elsewhere()
        finally:
            if not self.depth or self.name != name:
                self.unlock()

    def _undo(self, id: str, name: str, record: Any, head: _Head, *rest: Any) -> None:
        """ Remove what `_create` stored. """
        try:
            self.session.store.remove(name)
            self.session._owners.leave(head.owner, name)
        except StoreError as error:
            _log.warning('session %s is left until it expires: %s', _public(name), error)

    def purge(self) -> None:
        """ End every session that a cookie of this request names. """
        session, environ = self.session, self.request.environ
        owners = {self.name: self.head.owner} if self.id else {}
        for id in session._cookie.ids(environ):
            name = session._seal.name(id)
            if name not in owners:
                owners[name], record = None, session.store.load(name)
                with suppress(_Unreadable):
                    owners[name] = session._seal.open(id, record)[1].owner if record else None
        for name in reversed(list(owners)):  # the one that the route sees at last
            session.store.remove(name)
        for name, owner in owners.items():
            session._owners.leave(owner, name)
        self._reset('it was purged in this request', False)
        self.data = {} if self.data is None else self.data
        self.data.clear()
        self._mark_saved(None, _NOTHING, None)
        if self.cookie or session.cookie_name + '=' in environ.get('HTTP_COOKIE', ''):
            self.cookie = session._cookie.line(environ, '', 0)

    def _set_cookie(self) -> None:
        """ Have the browser told of the id. """
        session = self.session
        max_age = self.expires - session.clock() if self.option('permanent') > 0 else None
        self.cookie = session._cookie.line(self.request.environ, self.id or '', max_age)

    def option(self, name: str) -> Any:
        """ Return days or permanent, as this request sees it. """
        return self.options.get(name) or getattr(self.head, name) or getattr(
            self.session, '_' + name)

    def set_option(self, name: str, value: float) -> None:
        """ Have the next save store days or permanent, if that is a change. """
        self.options = {key: self.options[key] for key in self.options if key != name}
        if value != self.option(name):
            self.options[name] = value

    # Locks, and `with`

    def _own_lock(self) -> Any:
        """ Return what `Store.lock` gave. A forked child does not have its parent's. """
        held = self.held
        return held[1] if held and held[0] == self.name and held[2] == os.getpid() else None

    def unlock(self) -> None:
        if self.held:
            (name, lock, process), self.held = self.held, None
            try:
                if process == os.getpid():
                    self.session.store.unlock(name, lock)
            except StoreError as error:
                _log.warning('session %s: its lock ends by itself, it could not be released: %s',
                             _public(name), error)

    def _lock(self, name: str) -> Any:
        """ Take the session's lock; return what is stored, or None if it is gone. """
        got = _retry_busy(self.session.lock_timeout, name, self.session.store.lock, name)
        if got is None:
            return None
        self.held = name, got[0], os.getpid()
        return got[1]

    def enter(self) -> None:
        """ Begin a `with` block: take the lock and read the newest data. """
        if not self.depth:
            try:
                if self.data is None:
                    self.load(self._lock)
                elif self.id and not self._merge(self._lock(self.name)):
                    self._end_elsewhere()
                    self.data.clear()
                unsaved = self.dumps() if self.ended else self.pending()
                self.snapshot = unsaved[0] if unsaved else self.payload, self.options
            except BaseException:
                self.unlock()
                raise
        self.depth += 1

    def exit(self, error: BaseException | None) -> None:
        """ End a `with` block: save after an answer, undo after a failure. """
        if not self.depth:  # entered in another request
            _raise_outside()
        self.depth -= 1
        if self.depth:
            return
        try:
            if error is None or isinstance(error, HTTPResponse) \
                    and not isinstance(error, SessionError):
                self.save()
            else:
                self._restore(*self.snapshot)
        finally:
            self.unlock()

    def _restore(self, payload: Any, options: dict[str, float]) -> None:
        """ Go back to these data. """
        data = self.load()
        data.clear()
        data.update({} if payload is None else self.session._seal.loads(payload))
        self.touched, self.handed_out, self.options = {}, True, options

    def roll_back(self) -> None:
        """ Forget what a route that crashed did not save. """
        if self.data is not None:
            self._restore(self.payload, _NOTHING)

    # The end of the request

    def finish(self) -> None:
        """ Do what is left to do before the headers leave. """
        self.manual = not self.session._saves_itself(self.request)
        if not (self.request.crashed or self.manual or self.depth):
            self.save()
        if self.due and self.id and not self.request.sent:
            self._record_use()

    def warn_if_changed(self) -> None:
        """ Warn of changes that nobody saved, once for each route. """
        rule, warned = self.request.rule(), self.session._warned
        with suppress(SessionError):  # what cannot be stored was changed, too
            if rule in warned or not self.dirty():
                return
        warned.add(rule)
        _log.warning('%s changed the session and did not save that: call session.save() after '
                     'the last change, use "with session:", or app.install(session)', rule)


###############################################################################
# Session #####################################################################
###############################################################################


def _of_the_data(name: str) -> Any:
    """ Return a method of Session that is the one of its `data`. """
    @functools.wraps(getattr(dict, name))
    def method(self: Session, *args: Any) -> Any:
        return getattr(self.data, name)(*args)
    return method


class Session(MutableMapping):  # type: ignore[type-arg]
    """ The sessions of an app: one object for all visitors and threads.

        In a request it is a mapping of this visitor's data. Nothing of a visitor
        is kept on the object: it lives and dies with the request.

        :param secret: str or bytes that nobody else knows, or a list of them: the
            first one seals, all of them open, so that secrets can be changed.
        :param sessions_dir: where the file mode keeps its sessions.
        :param cookie_name: with the prefix ``__Host-`` browsers keep neighbouring
            domains from planting the cookie (RFC 6265bis, 4.1.3.2).
        :param mode: ``'memory'``, ``'file'``, a URL (``redis://``, ``rediss://``,
            ``valkey://``, ``unix://``; ``'redis'`` is the one on this host), or a Store.
        :param days: a session ends this long after its last use, which is recorded
            once per 1/30 of it.
        :param max_days: and this long after it began, however much it is used
            (OWASP ASVS 5.0, 7.3.2); None: never for that reason.
        :param permanent: False: the browser forgets the cookie when it closes.
        :param secure: the cookie is for https only; None: if its request came by https.
        :param httponly: keep the cookie from the page's scripts.
        :param samesite: ``'lax'``, ``'strict'``, ``'none'`` or None, for requests from
            other sites.
        :param path: the part of the host that the cookie is for.
        :param domain: a domain whose hosts all get the cookie; None: only this one.
        :param partitioned: True for a page in somebody else's frame (CHIPS).
        :param lock_timeout: seconds that ``with session:`` waits for another request of
            the visitor before it raises SessionBusy.
        :param max_logins: how many sessions one owner has at most; None: any number.
        :param serializer: has ``dumps`` and ``loads``, as json, marshal or msgspec.msgpack.

        TypeError or ValueError say which argument is wrong and what to do.
    """

    api = 2  #: the plugin interface of Bottle that `apply` follows

    __slots__ = ('name', 'cookie_name', 'store', 'clock', 'lock_timeout', '_cookie', '_days',
                 '_permanent', '_max_age', '_max_logins', '_seal', '_owners', '_warned',
                 '__weakref__')

    name: str  #: of the plugin: 'session', or 'session:' and another cookie's name
    cookie_name: str
    store: Store
    #: Returns the time in seconds since the epoch; tests may replace it:
    #: ``session.clock = lambda: time.time() + 31 * 86400``.
    clock: Callable[[], float]
    lock_timeout: float

    def __init__(self, secret: Secret | Iterable[Secret],
                 sessions_dir: str | os.PathLike[str] = './sessions',
                 cookie_name: str = 'bsession', mode: str | Store = 'memory', days: float = 30, *,
                 max_days: float | None = None, permanent: bool = True,
                 secure: bool | None = None, httponly: bool = True,
                 samesite: str | None = 'lax', path: str = '/', domain: str | None = None,
                 partitioned: bool = False, lock_timeout: float = 10.0,
                 max_logins: int | None = 100, serializer: Any = pickle) -> None:
        for argument, value in [*locals().items()]:
            if argument in _ARGUMENTS and argument != 'secret':
                _check(argument, value)
        _require(hasattr(serializer, 'dumps') and hasattr(serializer, 'loads'), 'serializer must '
                 'have dumps() and loads(), as json and pickle do, not %s', _kind(serializer),
                 TypeError)
        secrets, put = _check_secrets(secret), functools.partial(object.__setattr__, self)
        self._cookie = _Cookie(cookie_name, secure, httponly, samesite, path, domain, partitioned)
        put('cookie_name', cookie_name)
        put('name', 'session' if cookie_name == 'bsession' else 'session:' + cookie_name)
        self._days, self._permanent = days, 1 if permanent else -1
        self._max_age = math.inf if max_days is None else max_days * _DAY
        self._max_logins, self.lock_timeout = max_logins, lock_timeout
        put('store', _make_store(mode, sessions_dir))
        seal = _NoSeal if self.store.keeps_objects else _Seal
        self._seal = seal(secrets, cookie_name, serializer)
        self._owners = _Owners(self.store, self._seal)
        self._warned: set[str] = set()
        self.clock = time.time
        if _current.get().environ:
            warnings.warn('a Session was made while a request runs: make one for all requests, '
                          'at the top level of the module', UserWarning, 2)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ('lock_timeout', 'clock'):
            _check(name, value)
            if name == 'clock':
                self.store.clock = value
        elif not (name[:1] == '_' and name in Session.__slots__
                  or getattr(getattr(type(self), name, None), 'fset', None)):
            remedy = 'session.login(owner)' if name == 'owner' else 'session[%r] = ...' % name
            raise AttributeError('session.%s cannot be set, it would be the same for all '
                                 'visitors: use %s' % (name, remedy))
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError('The Session object can be neither copied nor pickled; session.copy() '
                        'gives the data')

    # What a request does

    def connect(self) -> None:
        """ Tie this object to the current request, as the first use of the session
            does, too. It costs no I/O. RuntimeError outside of a request. """
        self._visit()

    @property
    def data(self) -> dict[Any, Any]:
        """ The visitor's data, the same dict for the whole request. Setting it
            replaces the content. """
        return self._visit().hand_out()

    @data.setter
    def data(self, content: Mapping[Any, Any]) -> None:
        content, data = dict(content), self.data
        data.clear()
        data.update(content)

    def save(self) -> bool:
        """ Write what changed, on top of the newest stored version, and tell whether
            anything did. Nothing is written after a log-out elsewhere, nor in a hook
            that runs after the route crashed. SessionError for a value that cannot be
            serialized, SessionBusy after `lock_timeout` seconds in another request's
            ``with`` block, or StoreError. Memory mode saves at the end by itself. """
        return self._visit().save()

    @property
    def dirty(self) -> bool:
        """ Whether `save()` would write. """
        return self._visit().dirty()

    def purge(self) -> None:
        """ End the session, for log-out: it is gone from the store, durably, and
            the browser forgets its cookie. What is written afterwards in the same
            request starts a new one. StoreError changes nothing. """
        self._visit().purge()

    clear = purge  # ``session.data.clear()`` only empties the data

    def regenerate(self) -> None:
        """ Give the session a new id and keep its data, with what was not saved
            yet: at log-in an id that was planted must be worth nothing (session
            fixation, OWASP ASVS 5.0, 7.2.4). The old id is dead when this returns; for
            a minute, requests that come with it read as empty and store nothing.
            StoreError changes nothing, or the browser is told the new id. """
        self._visit().regenerate()

    @property
    def id(self) -> str | None:
        """ A name of the session for logs, with which nothing can be done from
            outside; None when there is no stored session. """
        visit = self._loaded()
        return _public(visit.name) if visit.id else None

    @property
    def created(self) -> datetime | None:
        """ When the session began (UTC); None when there is no stored session. """
        visit = self._loaded()
        return _utc(visit.head.created) if visit.id else None

    @property
    def used(self) -> datetime | None:
        """ When its last use was recorded (UTC); None when there is no stored session. """
        visit = self._loaded()
        return _utc(visit.head.used) if visit.id else None

    @property
    def days(self) -> float:
        """ How long this session lives after its last use. Setting it is a change
            of this session, to be saved; alone it begins none. """
        return float(self._loaded().option('days'))

    @days.setter
    def days(self, days: float) -> None:
        _check('days', days)
        self._loaded().set_option('days', float(days))

    @property
    def permanent(self) -> bool:
        """ Whether this session's cookie outlives the browser; to be set like `days`. """
        return bool(self._loaded().option('permanent') > 0)

    @permanent.setter
    def permanent(self, permanent: bool) -> None:
        _check('permanent', permanent)
        self._loaded().set_option('permanent', 1 if permanent else -1)

    def explain(self) -> str:
        """ Return why the session is what it is, in one sentence, for debugging. """
        visit, environ = self._loaded(), _current.get().environ
        why_not, age = self._cookie.why_not_sent(environ), self.clock() - visit.head.created
        if not visit.id:
            parts = ['There is no stored session: ' + visit.why]
        elif visit.id not in self._cookie.ids(environ):
            parts = ['Session %s is new: it was stored in this request' % self.id]
        else:
            parts = ['Session %s was loaded; it began %s ago and holds %d keys'
                     % (self.id, timedelta(seconds=int(max(0, age))), len(self))]
        if why_not:
            parts.append('the browser cannot send its cookie here: ' + why_not)
        if visit.older:
            parts.append('it was opened with an older secret')
        if visit.dirty():
            parts.append('it was changed since, and save() would write')
        return '; '.join(parts) + '.'

    def __enter__(self) -> Session:
        """ Take this visitor's lock and read the newest data. The end of the block
            saves, also after `redirect()`, `abort()` or another raised HTTPResponse;
            any other exception undoes what the block changed and did not save. """
        self._visit().enter()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._visit().exit(error)

    # Whose sessions these are

    def login(self, owner: str, note: str = '') -> None:
        """ Give the session a new id, as `regenerate` does, and from now on this owner.

            :param owner: the user's stable name, taken as it is.
            :param note: for `logins`, the user agent for example; cut at 500 characters.
        """
        visit = self._visit()
        _check('owner', owner)
        _check('note', note)
        visit.regenerate(owner, note[:500])
        try:
            self._owners.trim(owner, visit.name, self._max_logins or sys.maxsize, self.clock())
        except _Unavailable as error:
            _log.warning('the surplus log-ins of an owner were not ended: %s', error)

    @property
    def owner(self) -> str | None:
        """ Who logged in with `login`, or None. """
        owner: str | None = self._loaded().head.owner
        return owner

    def logins(self, owner: str | None = None) -> list[Login]:
        """ Return the living sessions of this visitor's owner, or of another: named
            tuples (id, created, used, note, here), most recently used first. `created`
            is when that `login` was, `used` as last recorded, `here` this request's.
            With `owner` it works outside of requests, too. """
        if owner is None:
            owner = self.owner
        else:
            _check('owner', owner)
        here = _current.get().environ and self._loaded().name
        entries = self._owners.living(self._owners.read(owner), self.clock())
        found = [Login(_public(name), _utc(entry['created']), _utc(entry['used']), entry['note'],
                       name == here)
                 for name, entry in entries.items()]
        return sorted(found, key=lambda login: (login.used, login.created), reverse=True)

    def revoke(self, owner: str, id: Any = _MISSING) -> int:
        """ End all sessions of this owner, for "log out everywhere", or the one with
            this `id`, as `logins` gives it; return how many. They are ended as by
            `purge()`. It works outside of requests, too. """
        _check('owner', owner)
        if id is not _MISSING:
            _check('id', id)

        def wanted(name: str) -> bool:
            return id is _MISSING or id == _public(name)

        own = _current.get().environ and self.owner == owner and wanted(self._visit().name)
        ended = self._owners.revoke(owner, wanted, self.clock())
        if own:
            self.purge()
        return ended

    def revoke_others(self) -> int:
        """ End all sessions of this visitor's owner but this request's; return how many. """
        owner, here = self.owner, self._visit().name
        return self._owners.revoke(owner, lambda name: name != here, self.clock())

    # The mapping. What is inherited and not overridden is right, and takes more time.

    def __getitem__(self, key: Any) -> Any:
        visit = self._visit()
        value = visit.load()[key]
        if type(value) not in _PLAIN and not self._seal.keeps_values:
            visit.handed_out = True
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        visit = self._visit()
        data = visit.load()
        old = data.get(key, _MISSING)
        data[key] = value
        visit.touched.setdefault(key, old)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._visit().load())

    def __len__(self) -> int:
        return len(self._visit().load())

    def __contains__(self, key: Any) -> bool:
        return key in self._visit().load()

    def get(self, key: Any, default: Any = None, /) -> Any:
        return self[key] if key in self else default

    keys, values, items, pop, popitem, copy, __delitem__, __or__, __ror__, __reversed__ = map(
        _of_the_data, ('keys', 'values', 'items', 'pop', 'popitem', 'copy', '__delitem__',
                       '__or__', '__ror__', '__reversed__'))

    def update(self, /, *args: Any, **kwargs: Any) -> None:
        visit, new = self._visit(), dict(*args, **kwargs)
        data = visit.load()
        before = {key: data.get(key, _MISSING) for key in new}
        data.update(new)
        visit.touched.update({**before, **visit.touched})

    def __ior__(self, other: Any) -> Session:  # type: ignore[misc]
        self.update(other)
        return self

    def __eq__(self, other: object) -> bool:  # Bottle keeps plugins in lists
        return self is other if isinstance(other, Session) else super().__eq__(other)

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return '<%s %r in %s>' % (_kind(self), self.cookie_name, _kind(self.store))

    # About the object

    def sweep(self, progress: Progress = None) -> int:
        """ Remove all sessions that have expired, as requests do little by little,
            and return how many. It works outside of requests. """
        return self.store.sweep(self.clock(), progress)[0]

    def issue_cookie(self, data: Mapping[Any, Any]) -> dict[str, str]:
        """ Store a session with this data and return its cookie, {name: value}.

            For the tests of an app: a visitor who is logged in already::

                requests.get(url, cookies=session.issue_cookie({'user': 'joe'}))
                webtest.TestApp(app).set_cookie(*session.issue_cookie(...).popitem())
        """
        visit = _Visit(self, _Request(None, {}, None))
        visit.hand_out().update(data)
        if not visit.save():
            raise ValueError('issue_cookie() needs some data: an empty session is not stored')
        return {self.cookie_name: visit.id or ''}

    # For a visit

    def _visit(self) -> _Visit:
        """ Return this request's visit. """
        request = _current.get()
        return request.visits.get(self) or request.begin(self)

    def _loaded(self) -> _Visit:
        visit = self._visit()
        visit.load()
        return visit

    def _expires(self, head: _Head) -> float:
        used, created = head.used, head.created
        return float(min(used + (head.days or self._days) * _DAY, created + self._max_age))

    # For Bottle

    def setup(self, app: bottle.Bottle) -> None:
        """ Refuse an app that has another session with this cookie. """
        for plugin in app.plugins:
            if isinstance(plugin, Session) and plugin is not self and plugin.name == self.name:
                raise bottle.PluginError('Two sessions with the cookie %r in one app: give one of '
                                         'them another cookie_name.' % self.cookie_name)

    def apply(self, callback: Callable[..., Any], route: bottle.Route) -> Callable[..., Any]:
        """ Give the session to a route with an argument `session`. """
        with suppress(ValueError):  # of a callable that does not tell
            if 'session' in inspect.signature(route.callback).parameters:
                return functools.partial(callback, session=self)  # a wildcard comes first
        return callback

    def _saves_itself(self, request: _Request) -> bool:
        """ Tell whether this request saves without being told. """
        if self._seal.keeps_values:
            return True
        plugins = list(request.app.plugins)
        for route in filter(None, (*request.mounts, request.environ.get('bottle.route'))):
            skips = route.skiplist
            if self in skips or type(self) in skips or self.name in skips or (
                    True in skips and route not in request.mounts):  # which have it anyway
                return False
            plugins += route.app.plugins + route.plugins
        return id(self) in map(id, plugins)  # `==` of somebody's plugin may raise


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


_FLAG = object, lambda flag: type(flag) is bool, 'True or False'
_DAYS = (int, float), lambda days: 0 < days <= 10_000_000, 'a number of days greater than 0'
_OPTIONAL = {'max_days', 'secure', 'samesite', 'domain', 'max_logins'}  # they may be None
#: What is asked of an argument: its type (else TypeError), what holds for a right one (else
#: ValueError), and how both are said.
_ARGUMENTS: dict[str, tuple[Any, Callable[[Any], Any], str]] = {
    'secret': ((str, bytes), len, 'a str, bytes or a list of them, such as "python -m '
               'bottle_session secret" prints'),
    'sessions_dir': ((str, os.PathLike), lambda path: os.fspath(path) and '\0' not in str(path),
                     'a str or a path, the name of a directory'),
    'cookie_name': (str, re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+").fullmatch,
                    'a str of letters, digits, "-" and "_"'),
    'days': _DAYS, 'max_days': _DAYS,
    'permanent': _FLAG, 'secure': _FLAG, 'httponly': _FLAG, 'partitioned': _FLAG,
    'samesite': (object, re.compile('lax|strict|none', re.I).fullmatch,
                 "'lax', 'strict', 'none'"),
    'path': (object, re.compile('/[!-:<-~]*').fullmatch,
             "a path that starts with '/', without ';', spaces or characters beyond ASCII"),
    'domain': (object, re.compile('[A-Za-z0-9.-]+').fullmatch,
               "a host name in ASCII ('xn--...' for others)"),
    'lock_timeout': (object, lambda seconds: type(seconds) is not bool and 0 <= seconds <= 86400,
                     'a number of seconds, 0 or more'),
    'max_logins': (int, lambda number: number > 0, 'a whole number, 1 or more'),
    'clock': (Callable, callable,
              'a callable that returns seconds since the epoch, as time.time does'),
    'owner': (str, len, "a str, the user's stable name, such as str(user.id)"),
    'note': (str, lambda note: True, 'a str'),
    'id': (str, lambda id: True, 'a str, the id of one of logins(); revoke(owner) ends all')}


def _check(argument: str, value: Any) -> None:
    """ Raise TypeError or ValueError, with what to use instead, for a wrong argument. """
    kind, is_right, what = _ARGUMENTS[argument]
    if argument in _OPTIONAL:
        if value is None:
            return
        what += ', or None'
    if not isinstance(value, kind) or type(value) is bool and kind is not object:
        raise TypeError('%s must be %s, not %s' % (argument, what, _kind(value)))
    with suppress(TypeError):  # of a value that cannot be asked
        if is_right(value):
            return
    wrong = argument + ' is empty' if value == '' else '%s=%r' % (argument, value)
    raise ValueError('%s: use %s' % (wrong, what))


def _require(condition: Any, message: str, value: Any,
             error: type[Exception] = ValueError) -> None:
    """ Raise this error about an argument unless the condition holds. """
    if not condition:
        raise error(message % (value,))


def _check_secrets(secret: Any) -> list[bytes]:
    secrets = secret if isinstance(secret, (list, tuple)) else [secret]
    for one in secrets or ['']:
        _check('secret', one)
    raw = [one.encode(*_UTF8) if isinstance(one, str) else one for one in secrets]
    if min(map(len, raw)) < 16:
        warnings.warn('secret is shorter than 16 bytes: use one that "python -m bottle_session '
                      'secret" prints, and keep it out of the code', UserWarning, 3)
    return raw


def _make_store(mode: str | Store, sessions_dir: str | os.PathLike[str]) -> Store:
    if isinstance(mode, Store):
        return mode
    if mode == 'memory':
        if sessions_dir != './sessions':
            warnings.warn("sessions_dir=%r is not used: mode='memory' keeps no files; for files "
                          "say mode='file'" % (sessions_dir,), UserWarning, 3)
        return MemoryStore()
    if mode == 'file':
        return FileStore(sessions_dir)
    if mode == 'redis':
        return RedisStore()
    _require(isinstance(mode, str) and re.match('(rediss?|valkeys?|unix)://', mode),
             "mode=%r: use 'memory', 'file', 'redis', a URL (redis://, rediss://, valkey://, "
             "unix://) or a Store", mode)
    return RedisStore(mode)


###############################################################################
# Bottle ######################################################################
###############################################################################

# The one door: Bottle.wsgi, wrapped once. It sees each request begin and end, and
# has the last word on the headers. The request that is running is in a ContextVar:
# Bottle's `request` names the last one of a thread long after its end, and the
# inner one after a route has called another app. That a route or generator crashed,
# Bottle tells nobody but the HTTPError that it answers with, so this says it, too.
_bottle_wsgi = bottle.Bottle.wsgi
_handle_code = bottle.Bottle._handle.__code__
_GENERATED = {itertools.chain, map, bottle._closeiter}  # what Bottle makes of a generator


def _raise_outside() -> NoReturn:
    raise RuntimeError('The session can only be used in a request of a Bottle app: call this from '
                       'a route, a hook or a function that they call, on their thread.') from None


class _Request:
    """ The request that is running: who visits, and how far it is. """

    __slots__ = ('app', 'environ', 'start_response', 'mounts', 'visits', 'sent', 'crashed',
                 'before', 'failure')

    def __init__(self, app: Any, environ: dict[str, Any], start_response: Any) -> None:
        self.app, self.environ, self.start_response = app, environ, start_response
        self.mounts: tuple[Any, ...] = ()  # the routes of mounted apps that led to this one
        self.visits: dict[Session, _Visit] = _NOTHING
        self.sent = False         # the headers are
        self.crashed = False      # a route did, or something of ours
        self.before: Any = None   # the exception that was on its way when the request began
        self.failure: Any = None  # the body of an error, instead of the route's

    def rule(self) -> str:
        route = self.environ.get('bottle.route')
        return route.rule if route else 'A request without a route'

    def begin(self, session: Session) -> _Visit:
        """ Begin the visit, when this request uses the session for the first time. """
        if not self.environ:
            _raise_outside()
        for other in self.visits:
            if other.cookie_name == session.cookie_name:
                raise RuntimeError('Two Session objects with the cookie %r are used in one '
                                   'request: make one for all, or give one of them another '
                                   'cookie_name.' % session.cookie_name)
        if session._seal.keeps_values and self.environ.get('wsgi.multiprocess') \
                and 'processes' not in session._warned:
            session._warned.add('processes')
            _log.warning("mode='memory' under a server with several processes: each of them has "
                         "sessions of its own. Use mode='file', or a redis URL for several hosts.")
        visit = _Visit(session, self)
        self.visits = {**self.visits, session: visit}
        return visit

    def is_crashing(self) -> bool:
        """ Tell whether an exception that the route did not catch is on its way through
            Bottle, which runs the hooks in between. """
        error = sys.exc_info()[1]
        while error is not None and error is not self.before:
            trace = error.__traceback__
            if trace and trace.tb_frame.f_code is _handle_code:
                return True
            error = error.__context__
        return False

    def crash(self) -> None:
        """ Forget what was not saved. """
        self.crashed = True
        for visit in self.visits.values():
            visit.roll_back()

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """ Save what is to be saved, and send the headers with ours. """
        if self.visits:
            if exc_info and sys.exc_info()[1] is exc_info[1]:  # an error handler crashed
                self.crash()
            try:
                self.finish()
            except Exception as error:
                status, headers, exc_info = self.fail(error)
            for visit in self.visits.values():
                present = dict(headers)
                if visit.cookie:
                    headers.append(('Set-Cookie', visit.cookie))
                    if 'Cache-Control' not in present:
                        headers.append(('Cache-Control', 'no-store'))
                if visit.data is not None and not ('Vary' in present and re.search(
                        r'(?i)(^|[,\s])(cookie|\*)($|[,\s])', present['Vary'])):
                    headers.append(('Vary', 'Cookie'))
        write = self.start_response(status, headers, exc_info)
        self.sent = True  # a server may refuse the headers, then Bottle comes again
        return write

    def finish(self) -> None:
        """ Let the visits that may have changed something do what is left to do. """
        for visit in self.visits.values():
            if visit.touched or visit.handed_out or visit.due or visit.options:
                visit.finish()

    def fail(self, error: Exception) -> Any:
        """ Answer with this error instead. """
        if not isinstance(error, HTTPError):
            if not self.app.catchall:
                raise error
            self.environ['wsgi.errors'].write(traceback.format_exc())
            error = HTTPError(500, 'Internal Server Error', error, traceback.format_exc())
        body = self.app._cast(error)
        self.failure = [] if self.environ['REQUEST_METHOD'] == 'HEAD' else body
        return bottle.response.status_line, bottle.response.headerlist, None

    def run(self, step: Callable[..., Any], *args: Any) -> Any:
        """ Go on with a generator's body. """
        token = _current.set(self)
        try:
            return step(*args)
        except BaseException:
            self.crashed = True
            raise
        finally:
            _current.reset(token)

    def close(self, body: Any) -> None:
        """ End a generator's body, and the request with it. """
        try:
            if hasattr(body, 'close'):
                body.close()
            self.finish()
        except SessionError as error:  # too late to answer with it
            _log.warning('%s: a change after the first chunk was not saved: %s',
                         self.rule(), error)
        finally:
            self.end()

    def end(self) -> None:
        """ The request is over: nothing of it can be used any more. """
        for visit in self.visits.values():
            if (visit.manual or visit.depth) and not self.crashed:
                visit.warn_if_changed()
            if visit.held:
                visit.unlock()
        self.visits = self.environ = _NOTHING


_current = ContextVar('bottle_session.request', default=_Request(None, {}, None))


def _wsgi(app: bottle.Bottle, environ: dict[str, Any], start_response: Any) -> Any:
    """ The WSGI interface of Bottle, with sessions. """
    outer, request = _current.get(), _Request(app, environ, start_response)
    if outer.environ:
        if outer.environ is environ:  # a mounted app
            outer.mounts += environ.get('bottle.route'),
            return _bottle_wsgi(app, environ, start_response)
        request.before = sys.exc_info()[1]
    token = _current.set(request)
    goes_on = False
    try:
        body = _bottle_wsgi(app, environ, request.start)
        if request.failure is not None:
            if hasattr(body, 'close'):
                body.close()
            body = request.failure
        if type(body) in _GENERATED:  # a server must get a list or a file as it is
            body, goes_on = _run_on(request, body), True
            next(body)
        return body
    finally:
        _current.reset(token)
        if not goes_on:
            if request.visits:
                request.end()
            request.environ = _NOTHING


def _run_on(request: _Request, body: Any) -> Iterator[bytes]:
    """ Yield a generator's chunks: the request goes on while it runs, and ends with it. """
    chunks = iter(body)
    chunk: Any = b''  # the first is for us: what never began is never closed
    try:
        while chunk is not _MISSING:
            yield chunk
            chunk = request.run(next, chunks, _MISSING)
    finally:
        request.run(request.close, body)


def _apply_error(error: HTTPError, other: Any) -> None:
    """ Have the error become the answer. """
    if getattr(error, 'traceback', None) or isinstance(error, SessionError):  # abort() has none
        _current.get().crash()
    HTTPResponse.apply(error, other)


bottle.Bottle.wsgi = _wsgi
HTTPError.apply = _apply_error


###############################################################################
# Command line ################################################################
###############################################################################


def _main() -> None:
    import argparse
    parser = argparse.ArgumentParser(
        prog='python -m bottle_session', description='Helps with the sessions of a Bottle app.',
        epilog='Exit codes: 0 done, 1 the store failed, 2 wrong arguments.')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    commands.add_parser('secret', help='print a new secret: 256 random bits, to be kept out of '
                        'the code. Who changes it lists the new one first: Session([new, old])')
    sweep = commands.add_parser('sweep', help='remove the sessions that have expired, for which '
                                'neither secret nor days are needed')
    sweep.add_argument('store', metavar='DIR|URL',
                       help='the sessions_dir of a file mode, or a redis URL')
    options = parser.parse_args()
    if options.command == 'secret':
        return print(_new_id())
    path = options.store
    try:
        if '://' not in path and not os.path.isdir(path):
            parser.error('%s is no directory' % path)
        store = _make_store(path if '://' in path else 'file', path)
        progress = _show_progress if sys.stderr.isatty() else None
        print('removed %d, left %d' % store.sweep(time.time(), progress))
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    except StoreError as error:
        parser.exit(1, '%s: %s\n' % (path, error.__cause__ or error))


def _show_progress(share: float) -> None:
    end = '\n' if share >= 1 else ''
    sys.stderr.write('\r[%-40s] %3d %%%s' % ('#' * int(share * 40), share * 100, end))
    sys.stderr.flush()


if __name__ == '__main__':
    _main()

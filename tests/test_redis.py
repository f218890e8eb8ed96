""" The redis mode against real servers that are gone, frozen, full, replicas, and
    against connections that are lost. Sentinel and cluster: test_redis_ha.py. """

import contextlib
import datetime
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import HERE, SECRET, free_port, in_child, package, run, timed, together, until
from redis_servers import (JOE, USAGES, Proxy, after, assert_refused, assert_refused_in_time,
                           use_first_save, use_purge, use_read, use_regenerate, use_save)
from visits import cookie_of, counting, reading, saving, within

import bottle_session
from bottle_session import RedisStore, Session, SessionBusy, StoreError

pytest.importorskip('redis')
LATER = time.time() + 900
SESSION = b's' + bytes(15) + b'the sealed rest'
NAME = 'a' * 64


@pytest.fixture
def start_proxy():
    proxies = []

    def start(port):
        proxies.append(Proxy(port))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


# A server that is gone or frozen

def test_a_server_that_is_not_there_is_503_until_it_comes(start_redis):
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
    until(lambda: within(session.copy, cookie).code == 200)
    assert saving(session, None, n=1).code == 200


def test_a_frozen_server_is_503_in_time_and_works_when_it_thaws(start_redis):
    import redis
    server, cases = start_redis(), []
    stores = [lambda: server.url, lambda: RedisStore(redis.Redis(port=server.port)),
              lambda: RedisStore(redis.Redis(connection_pool=redis.BlockingConnectionPool(
                  port=server.port)))]
    for number, use in enumerate(USAGES * 2):
        make = stores[number % len(stores)]  # our time-outs, also where the client has none
        session = Session(SECRET, mode=make())
        cookie = session.issue_cookie(JOE)
        if number >= len(USAGES):  # one that has not connected yet
            session = Session(SECRET, mode=make())
        cases.append((use, session, cookie))
    server.signal(signal.SIGSTOP)
    together(lambda case: assert_refused_in_time(lambda: case[0](*case[1:])), cases, len(cases))
    server.signal(signal.SIGCONT)
    for _, session, cookie in cases:
        until(lambda: within(session.copy, cookie).code == 200)


def test_a_shorter_time_out_in_the_url_replaces_ours(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url + '?socket_timeout=0.1')
    cookie = session.issue_cookie({'user': 'joe'})
    server.signal(signal.SIGSTOP)
    answer, seconds = timed(lambda: within(session.copy, cookie))
    assert answer.code == 503 and seconds < 0.9


def test_requests_do_not_pile_up_before_a_frozen_server(start_redis):
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


# Connections that are lost

@pytest.mark.parametrize('lost', ['request', 'reply'])
@pytest.mark.parametrize('use', USAGES)
def test_a_connection_lost_at_any_command_is_made_good_once(redis, start_proxy, use, lost):
    direct = Session(SECRET, mode=redis.url)
    proxy = start_proxy(redis.port)
    session = Session(SECRET, mode=proxy.url)
    for passed in itertools.count():
        cookie = direct.issue_cookie(JOE)
        reading(session, cookie)
        proxy.plan(lost, passed)
        answer, hits = use(session, cookie), proxy.hits
        proxy.plan(None, 0)
        assert answer.code == 200
        after(use, direct, cookie, answer)
        if use is counting:
            assert answer.value == 2
        if not hits:
            break
    assert passed >= 1


@pytest.mark.parametrize('use', [use_save, counting, use_regenerate])
def test_a_log_out_between_a_lost_request_and_the_second_try_is_final(redis, start_proxy, use):
    direct = Session(SECRET, mode=redis.url)
    proxy = start_proxy(redis.port)
    session = Session(SECRET, mode=proxy.url)
    dead = []

    def log_out():
        if proxy.lose:
            dead.append(reading(direct, cookie) == {})  # regenerate() was done but for its tidying
            use_purge(direct, cookie)

    proxy.meanwhile = log_out
    for passed in itertools.count():
        cookie = direct.issue_cookie(JOE)
        reading(session, cookie)
        proxy.plan('request', passed)
        answer, hits = use(session, cookie), proxy.hits
        proxy.plan(None, 0)
        if not hits:
            break
        assert answer.code == 200 and reading(direct, cookie) == {}
        for value in cookie_of(answer).values():  # a session that began after the log-out
            assert dead[-1] or reading(direct, {'bsession': value}).get('user') != 'joe'
    assert passed >= 2


@pytest.mark.parametrize('lost', ['request then request', 'reply then request',
                                  'silence then silence', 'reply then silence'])
def test_a_server_lost_at_any_command_is_503_in_time_and_nothing_half(redis, start_proxy, lost):
    direct = Session(SECRET, mode=redis.url)

    def lose_at(case):
        use, passed = case
        proxy = start_proxy(redis.port)
        session = Session(SECRET, mode=proxy.url)
        cookie = direct.issue_cookie(JOE)
        reading(session, cookie)
        proxy.plan(lost, passed)
        answer, seconds = timed(lambda: use(session, cookie))
        hits = proxy.hits
        proxy.plan(None, 0)
        assert seconds < 2, case
        if not hits:
            assert answer.code == 200
            return passed
        left, told = reading(direct, cookie), cookie_of(answer)
        if answer.code == 200:  # all but the lock's release was done
            after(use, direct, cookie, answer)
        else:
            assert_refused(answer)
            done = {use_save: {'user': 'ann', 'n': 1}, counting: {'user': 'joe', 'n': 2},
                    use_regenerate: {}, use_purge: {}}
            assert left in [JOE] + ('reply' in lost) * [done.get(use, JOE)], case
            # The browser has a cookie that works, whether the old id ended or not.
            if use is use_regenerate:
                assert JOE == (reading(direct, told) if told else left), case
            else:
                assert not told, case
        until(lambda: within(session.copy, told or cookie).code == 200)  # it works again by itself
        return 0

    cases = [(use, passed) for use in USAGES for passed in range(5)]
    assert max(together(lose_at, cases, len(cases))) >= 3


@pytest.mark.parametrize('use', USAGES)
def test_a_server_that_forgot_the_scripts_gets_them_again(redis, use):
    session = Session(SECRET, mode=redis.url)
    for _ in range(2):
        cookie = session.issue_cookie(JOE)
        after(use, session, cookie, use(session, cookie))
        redis.admin.script_flush()


def failures(redis, start_proxy, lost):
    """ Return maybe_done of a save whose second half fails so. """
    proxy = start_proxy(redis.port)
    store = RedisStore(proxy.url)
    name = os.urandom(32).hex()
    assert store.create(name, SESSION, LATER)
    proxy.plan(lost, 0)
    with pytest.raises(StoreError) as raised:
        store.replace(name, SESSION[:16], b's' * 40, LATER)
    proxy.plan(None, 0)
    return raised.value.maybe_done, RedisStore(redis.url).load(name)


@pytest.mark.parametrize('lost', ['reply then request', 'silence then silence',
                                  'request then silence'])
def test_maybe_done_is_set_where_nobody_can_know(redis, start_proxy, lost):
    assert failures(redis, start_proxy, lost)[0] is True


def test_maybe_done_is_not_set_where_the_command_was_refused(start_redis):
    server = start_redis()
    store = RedisStore(server.url)
    store.create(NAME, SESSION, LATER)

    def refused():
        with pytest.raises(StoreError) as raised:
            store.replace(NAME, SESSION[:16], b's' * 40, LATER)
        assert raised.value.maybe_done is False
        assert server.process.poll() is not None or store.load(NAME) == SESSION

    server.admin.config_set('maxmemory', '100kb')
    refused()
    server.admin.config_set('maxmemory', '0')
    server.admin.replicaof('127.0.0.1', free_port())
    for _ in range(4):
        refused()  # and reading goes on
    server.admin.replicaof('NO', 'ONE')
    server.admin.execute_command('ACL', 'SETUSER', 'default', '-eval')
    refused()
    server.admin.execute_command('ACL', 'SETUSER', 'default', '+eval')
    assert store.replace(NAME, SESSION[:16], SESSION, LATER) == SESSION
    server.kill()
    with pytest.raises(StoreError):
        store.load(NAME)
    for _ in range(4):  # nobody there, and then not even asked
        refused()


def test_a_lock_whose_reply_was_lost_is_unlocked(redis, start_proxy):
    proxy = start_proxy(redis.port)
    store, other = RedisStore(proxy.url), RedisStore(redis.url)
    for lost in 'reply then request', 'reply then silence':
        name = os.urandom(32).hex()
        other.create(name, SESSION, LATER)
        proxy.plan(lost, 0)
        with pytest.raises(StoreError):
            store.lock(name)
        with pytest.raises(SessionBusy):
            other.lock(name)
        proxy.plan(None, 0)

        def answers():
            with contextlib.suppress(StoreError):
                return store.load(name)

        until(answers)
        assert other.lock(name)  # long before its lease ends


def test_a_restart_under_load_loses_no_acknowledged_count(start_redis):
    server = start_redis('--appendonly', 'yes', '--appendfsync', 'always')
    session = Session(SECRET, mode=server.url)
    cookie = session.issue_cookie({'n': 0})
    over, codes = threading.Event(), []

    def count(_):
        while not over.is_set():
            codes.append(counting(session, cookie).code)
            assert codes[-1] in (200, 503)

    def count_more():
        done = codes.count(200)
        until(lambda: codes.count(200) > done + 30)

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(count, number) for number in range(4)]
        try:
            for _ in range(2):
                count_more()
                server.kill()
                server.start()
            count_more()
        finally:
            over.set()
        for job in jobs:
            job.result()
    assert codes.count(200) <= reading(session, cookie)['n'] <= len(codes)


# A server that says no

def test_a_wrong_password_is_503_and_the_log_says_what_to_do(start_redis, caplog):
    server = start_redis()
    server.admin.config_set('requirepass', 'right')
    for password in '', ':wrong@', 'nobody:right@':
        caplog.clear()
        session = Session(SECRET, mode=server.url.replace('//', '//' + password))
        assert_refused_in_time(lambda: saving(session, None, n=1))
        assert 'AUTH' in caplog.text and 'check user and password' in caplog.text
        assert 'wrong' not in caplog.text.replace('wrong number', '')
    session = Session(SECRET, mode=server.url.replace('//', '//:right@'))
    assert saving(session, None, n=1).code == 200


@pytest.mark.parametrize('command, use', [
    ('get', use_read), ('mget', use_save), ('eval', use_save), ('set', use_first_save),
    ('del', use_purge)])
def test_a_user_who_may_not_do_something_is_503_and_the_log_names_it(
        start_redis, caplog, command, use):
    server = start_redis()
    server.admin.execute_command('ACL', 'SETUSER', 'web', 'on', '>pw', '~*', '+@all')
    session = Session(SECRET, mode=server.url.replace('//', '//web:pw@'))
    cookie = session.issue_cookie(JOE)
    server.admin.execute_command('ACL', 'SETUSER', 'web', '-' + command)
    assert_refused_in_time(lambda: use(session, cookie))
    sent = 'eval' if command == 'mget' else command  # what a script may not
    assert re.search('(?i)redis: %s failed' % sent, caplog.text) and '+' + command in caplog.text
    server.admin.execute_command('ACL', 'SETUSER', 'web', '+' + command)
    assert reading(session, cookie) == JOE


def test_the_rights_that_the_log_recommends_are_enough(start_redis, caplog):
    server = start_redis()
    server.admin.execute_command('ACL', 'SETUSER', 'web', 'on', '>pw')
    url = server.url.replace('//', '//web:pw@').replace('/0', '/1')
    Session(SECRET, mode=url)
    rights = caplog.text.split('ACL SETUSER (name) ')[1].split('\n')[0]
    server.admin.execute_command('ACL', 'SETUSER', 'web',
                                 *rights.replace('(prefix)', 'bsession:').split())
    caplog.clear()
    bottle_session.check_store(lambda: RedisStore(url))
    assert not caplog.text


def test_a_server_out_of_memory_keeps_what_it_has_and_lets_log_out(start_redis, caplog):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
    joe, ann = (session.issue_cookie({'user': user}) for user in ('joe', 'ann'))
    server.admin.config_set('maxmemory', '100kb')
    assert_refused_in_time(lambda: saving(session, None, user='new'))
    assert_refused_in_time(lambda: saving(session, joe, user='new'))
    assert_refused_in_time(lambda: counting(session, joe))
    assert not cookie_of(assert_refused_in_time(lambda: within(session.regenerate, joe)))
    assert 'raise maxmemory' in caplog.text
    assert reading(session, joe) == {'user': 'joe'} and reading(session, ann) == {'user': 'ann'}
    assert within(session.purge, ann).code == 200
    assert reading(session, ann) == {} and server.admin.dbsize() == 1
    server.admin.config_set('maxmemory', 0)
    assert saving(session, joe, user='new').value is True


@pytest.mark.parametrize('trouble', ['out of memory', 'read-only replica'])
def test_a_use_that_cannot_be_recorded_is_logged_not_raised(start_redis, trouble, caplog):
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


def test_a_demoted_master_is_left_for_the_new_one_at_once(start_redis, start_proxy):
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
    assert counting(session, cookie).value == 2
    assert reading(Session(SECRET, mode=new.url), cookie) == {'user': 'joe', 'n': 2}


def test_an_eviction_policy_is_warned_of_once(start_redis, caplog):
    server = start_redis('--maxmemory-policy', 'allkeys-lru')
    session = Session(SECRET, mode=server.url)
    cookie = session.issue_cookie({'n': 1})
    together(lambda _: counting(session, cookie), range(20))
    assert caplog.text.count('maxmemory-policy allkeys-lru') == 1
    caplog.clear()
    session = Session(SECRET, mode=start_redis().url)
    reading(session, session.issue_cookie({'n': 1}))
    assert 'maxmemory' not in caplog.text


# What somebody else wrote

@pytest.mark.parametrize('place', [
    lambda admin, key: admin.set(key, 'joe'), lambda admin, key: admin.set(key, 'x' * 12, ex=31),
    lambda admin, key: admin.rpush(key, 'joe')])
def test_a_lock_of_somebody_else_is_absent(redis, place):
    store, name = RedisStore(redis.url), os.urandom(32).hex()
    store.create(name, SESSION, LATER)
    for act in (lambda: store.replace(name, SESSION[:16], SESSION, LATER), lambda:
                store.replace(name, SESSION[:16], b's' * 40, LATER), lambda: store.lock(name)):
        redis.admin.delete('bsession:{%s}lock' % name)
        place(redis.admin, 'bsession:{%s}lock' % name)
        assert act()
    with pytest.raises(SessionBusy):
        store.lock(name)


def test_a_key_of_another_kind_is_absent_and_logged(redis, caplog):
    store, name = RedisStore(redis.url), os.urandom(32).hex()
    redis.admin.rpush('bsession:{%s}' % name, 'a list')
    assert store.load(name) == b'' and store.lock(name) is None  # damaged
    assert not store.replace(name, SESSION[:16], SESSION, LATER)
    assert not store.remove(name, SESSION[:16]) and not store.create(name, SESSION, LATER)
    assert caplog.text.count('WRONGTYPE') == 5
    assert store.remove(name) and store.create(name, SESSION, LATER) and store.load(name)


# What is sent

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


def test_round_trips_are_as_few_as_promised(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
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
    assert trips(lambda: counting(session, cookie)) == 3
    assert trips(lambda: within(with_but_no_change, cookie)) == 2
    assert trips(lambda: within(session.purge, cookie)) <= 2


def test_a_use_is_recorded_by_one_more_command_when_due(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url, days=60 / 86400)
    cookie = session.issue_cookie({'user': 'joe'})
    key, = server.admin.keys()
    for ahead, due in (1, False), (2.5, True), (3.5, False), (9, True):
        server.admin.pexpire(key, 40_000)
        session.clock = lambda: time.time() + ahead
        answer, commands = monitored(server, lambda: within(session.copy, cookie))
        assert answer.value == {'user': 'joe'} and len(commands) == 1 + due
        assert bool(answer.header('Set-Cookie')) is due
        assert (server.admin.pttl(key) > 55_000) is due


def test_sessions_end_by_the_servers_own_clock(redis):
    session = Session(SECRET, mode=redis.url, days=0.5 / 86400)
    before = set(redis.admin.keys())
    session.issue_cookie({'user': 'joe'})
    key, = set(redis.admin.keys()) - before
    until(lambda: not redis.admin.exists(key))


def test_the_server_never_sees_data_ids_or_secrets(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
    told = []

    def live():
        cookie = session.issue_cookie({'city': 'Novosibirsk'})
        saving(session, cookie, country='Mauritania')
        counting(session, cookie)
        told.extend([*cookie.values(), *cookie_of(within(session.regenerate, cookie)).values()])

    seen = repr(monitored(server, live)[1])
    for key in server.admin.keys():
        seen += repr(key) + repr(server.admin.get(key))
    assert len(told) == 2 and 'GET' in seen
    for word in ['Novosibirsk', 'Mauritania', 'city', SECRET, *told]:
        assert word not in seen


# Connections

def connections(server, user=None):
    return [client for client in server.admin.client_list() if client['cmd'] != 'client|list']


def test_connections_are_kept_and_as_many_as_are_needed_at_once(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
    cookie = session.issue_cookie(JOE)
    first, = connections(server)
    for _ in range(30):  # threads that come and go, as servers have them
        thread = threading.Thread(target=reading, args=(session, cookie))
        thread.start()
        thread.join()
    assert [one['id'] for one in connections(server)] == [first['id']]
    together(lambda _: reading(session, cookie), range(200))
    assert len(connections(server)) <= 8
    session.store._IDLE = 0  # a minute is over
    reading(session, cookie)
    until(lambda: len(connections(server)) == 1)


def test_a_connection_is_not_shared_with_a_forked_child(start_redis):
    server = start_redis()
    session = Session(SECRET, mode=server.url)
    cookie = session.issue_cookie(JOE)
    first, = connections(server)
    assert in_child(lambda: reading(session, cookie)) == JOE
    assert reading(session, cookie) == JOE
    assert [one['id'] for one in connections(server)] == [first['id']]  # its own is still alive


def test_a_reply_that_was_not_read_is_never_another_requests():
    """ gevent's time-outs are raised anywhere, also between a command and its reply. """
    package('gevent')
    done = run('''
        from gevent import monkey; monkey.patch_all()
        import gevent, sys, time
        import conftest, bottle_session
        from pathlib import Path
        server = conftest.RedisServer(sys.argv[1])
        store = bottle_session.RedisStore(server.url)
        names = [('%064d' % number) for number in range(40)]
        for name in names:
            assert store.create(name, b's' + name.encode(), time.time() + 99)
        stopped = 0
        def read(name, seconds):
            global stopped
            try:
                with gevent.Timeout(seconds):
                    while True:
                        assert store.load(name) == b's' + name.encode()
            except gevent.Timeout:
                stopped += 1
        for turn in range(5):
            gevent.joinall([gevent.spawn(read, name, 0.01 + number % 7 / 1000)
                            for number, name in enumerate(names)], raise_error=True)
        print(stopped)
        server.stop()
        ''', tempfile.mkdtemp(), env={'PYTHONPATH': os.pathsep.join((
            HERE, os.path.join(HERE, 'tests')))})
    assert done.stdout.split() == ['200'], done.stdout


# URLs and clients

BAD_URLS = [
    ('http://localhost', 'scheme'), ('redis+sentinel://localhost', 'scheme'),
    ('redis://localhost:0/1', 'port'), ('redis://localhost:x', 'Port'),
    ('redis://localhost?port=0', 'port'), ('redis://localhost?db=1&port=-1', 'port'),
    ('redis://localhost?db=', 'option=value'), ('unix:///socket?db=-1', 'db cannot be -1'),
    ('redis://localhost?socket_timeout=0', 'socket_timeout cannot be 0'),
    ('redis://localhost?socket_connect_timeout=-1', 'socket_connect_timeout cannot be -1'),
    ('redis://localhost:65536', 'Port'), ('redis://localhost/one', 'database'), ('unix://', 'URL'),
    ('redis://:pa#ss@localhost', 'password'), ('redis://:12#ss@localhost', 'password'),
    ('redis://localhost?time=3', 'time'), ('redis://localhost?socket_timeout=soon', 'timeout'),
    ('redis://localhost?protocol=9', 'protocol'), ('redis://localhost?ssl_keyfile=x', 'ssl_key'),
    ('rediss://localhost?ssl_cert_reqs=perhaps', 'perhaps'),
    ('redis://localhost?decode_responses=true', 'decode_responses')]


@pytest.mark.parametrize('url, word', BAD_URLS)
def test_a_wrong_url_is_a_value_error_that_says_what(url, word):
    with pytest.raises(ValueError, match=word) as raised:
        RedisStore(url)
    assert 'pa#ss' not in str(raised.value)


def test_wrong_arguments_are_named(redis):
    import redis.asyncio
    for client in 7, None, redis.asyncio.Redis(), redis.Redis(decode_responses=True):
        with pytest.raises(ValueError, match='client'):
            RedisStore(client)
    with pytest.raises(TypeError, match='prefix'):
        RedisStore('redis://localhost', b'bsession:')


def test_urls_and_clients_of_all_kinds_are_taken(start_redis):
    import redis
    place = tempfile.mkdtemp(prefix='bsession')  # a socket's path must be short
    server = start_redis('--unixsocket', place + '/socket')
    server.admin.execute_command('ACL', 'SETUSER', 'we:b', 'on', '>p/w', '~*', '+@all')
    clients = [redis.Redis(port=server.port),
               redis.Redis(connection_pool=redis.BlockingConnectionPool(port=server.port)),
               redis.Redis(port=server.port, protocol=3),
               redis.Redis(unix_socket_path=place + '/socket'),
               redis.Redis(port=server.port, single_connection_client=True),
               redis.Redis(port=server.port, max_connections=1)]
    urls = [server.url, server.url.replace('redis', 'valkey'),
            server.url.replace('//', '//we%3Ab:p%2Fw@'), server.url + '?protocol=3',
            server.url + '?health_check_interval=10&client_name=web',
            'unix://%s/socket?db=0' % place]
    cookie = Session(SECRET, mode=server.url).issue_cookie({'n': 0})
    try:
        for mode in [*urls, *map(RedisStore, clients)]:
            session = Session(SECRET, mode=mode)
            assert isinstance(session.store, RedisStore)
            together(lambda _: counting(session, cookie), range(2), 2)
        assert reading(session, cookie) == {'n': 2 * len(urls + clients)}
        apart = Session(SECRET, mode=RedisStore(clients[0], prefix='other:'))
        assert reading(apart, cookie) == {}
        assert apart.issue_cookie({'n': 1}) and len(server.admin.keys('other:*')) == 1
    finally:
        for client in clients:
            client.close()
        shutil.rmtree(place)


def test_tls_urls_are_taken_and_strangers_refused(tmp_path, start_redis):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime(2020, 1, 1)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'localhost')])
    certificate = x509.CertificateBuilder(
        name, name, key.public_key(), 1, now, now + datetime.timedelta(36500)).add_extension(
        x509.SubjectAlternativeName([x509.DNSName('localhost')]), False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    (tmp_path / 'certificate').write_bytes(certificate.public_bytes(pem))
    (tmp_path / 'key').write_bytes(key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    port = free_port()
    if b'tls-port' in subprocess.run([start_redis().program, '--tls-port', '0', '--no-such', '1'],
                                     capture_output=True).stderr:
        pytest.skip('this redis-server knows no TLS')
    start_redis('--tls-port', str(port), '--tls-cert-file', str(tmp_path / 'certificate'),
                '--tls-key-file', str(tmp_path / 'key'), '--tls-auth-clients', 'no',
                '--tls-ca-cert-file', str(tmp_path / 'certificate'))
    url = 'rediss://localhost:%d/0' % port
    trusting = Session(SECRET, mode='%s?ssl_ca_certs=%s/certificate' % (url, tmp_path))
    assert reading(trusting, trusting.issue_cookie({'user': 'joe'})) == {'user': 'joe'}
    assert_refused_in_time(lambda: saving(Session(SECRET, mode=url), None, user='joe'))


def test_sweep_counts_the_sessions_of_its_prefix_and_shows_how_far_it_is(start_redis):
    server, shares = start_redis(), []
    with server.admin.pipeline() as pipeline:
        for number in range(5000):
            kind = b's' if number % 2 else b'l'  # a session, or what is kept beside them
            pipeline.set('my[app]*:{%064x}' % number, kind + b'x' * 300)
            pipeline.set('my[app]*:other:{%064x}' % number, b's')
        pipeline.rpush('my[app]*:{%s}' % ('f' * 64), 'no session')
        pipeline.execute()
    assert RedisStore(server.url, 'my[app]*:').sweep(time.time(), shares.append) == (0, 2500)
    assert shares == sorted(shares) and len(shares) > 5 and shares[-1] == 1.0
    assert RedisStore(server.url).sweep(time.time()) == (0, 0)


def test_valkey_passes_these_tests_too(tmp_path):
    valkey = shutil.which('valkey-server')
    if not valkey or os.path.basename(os.path.dirname(shutil.which('redis-server') or '')) == 'v':
        pytest.skip('no valkey-server on the PATH: Debian has the package from 13 on')
    (tmp_path / 'v').mkdir()
    (tmp_path / 'v' / 'redis-server').symlink_to(valkey)
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__],
        env={**os.environ, 'PATH': '%s/v:%s' % (tmp_path, os.environ['PATH'])}, cwd=HERE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode()

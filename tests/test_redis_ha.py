""" The redis mode while a master dies: three sentinels with a master and two replicas, and
    a cluster of three masters. All of it real, on loopback ports. """

import collections
import contextlib
import os
import pickle
import select
import signal
import subprocess
import time

import pytest
from conftest import SECRET, RedisServer, fork, until
from redis_servers import JOE, USAGES, after, assert_refused_in_time, use_purge
from visits import reading, within

import bottle_session
from bottle_session import RedisStore, Session

redis = pytest.importorskip('redis')
WORKERS = 4


class SentinelServer(RedisServer):
    """ A sentinel of the master on this port. """

    def start(self):
        path, (watched,) = os.path.join(self.place, 'conf'), self.options
        with open(path, 'w') as conf:
            conf.write('''
                port %d
                bind 127.0.0.1
                dir %s
                sentinel monitor main 127.0.0.1 %d 2
                sentinel down-after-milliseconds main 500
                sentinel failover-timeout main 3000
                sentinel parallel-syncs main 2
                ''' % (self.port, self.place, watched))
        with open(os.path.join(self.place, 'log'), 'ab') as log:
            self.process = subprocess.Popen([self.program, path, '--sentinel'],
                                            stdout=log, stderr=log, env={})
        until(self._is_up)


@pytest.fixture
def start_sentinels(tmp_path_factory):
    servers = []

    def start(port):
        for _ in range(3):
            servers.append(SentinelServer(tmp_path_factory.mktemp('sentinel'), port))
        for server in servers:  # they have found each other, and the replicas
            until(lambda: all((one['num-other-sentinels'], one['num-slaves']) == (2, 2)
                              for one in server.admin.sentinel_masters().values()))
        return [('127.0.0.1', server.port) for server in servers]

    yield start
    for server in servers:
        server.stop()


def count_twice(session):
    """ Return what a route does that counts in two places, which must agree. """
    def count():
        with session:
            for key in 'n', 'same':
                session[key] = session.get(key, 0) + 1
            session['pad'] = 'x' * 3000
    return count


class Load:
    """ A process that counts and reads as one visitor, until it is told to stop. """

    def __init__(self, make_session, cookie):
        self._stop = os.pipe()
        self._result = os.pipe()
        self.cookie, self._make_session = cookie, make_session
        self._pid = fork(self._work)
        os.close(self._stop[0])
        os.close(self._result[1])

    def _work(self):
        for fd in self._stop[1], self._result[0]:
            os.close(fd)
        session, seen = self._make_session(), collections.Counter()
        session.store._LEASE = 1000  # of a lock whose release the new master never heard of
        while not select.select([self._stop[0]], [], [], 0.001)[0]:
            seen['counted', within(count_twice(session), self.cookie).code] += 1
            answer = within(session.copy, self.cookie)
            seen['read', answer.code] += 1
            if answer.code == 200:
                seen['logged out'] += not answer.value
                seen['torn'] += answer.value.get('n') != answer.value.get('same')
        with os.fdopen(self._result[1], 'wb') as result:
            pickle.dump(seen, result)

    def stop(self):
        """ Return what it has seen: {what: how often}. """
        os.write(self._stop[1], b'x')
        with os.fdopen(self._result[0], 'rb') as result:
            raw = result.read()
        assert os.waitpid(self._pid, 0)[1] == 0, 'something else than 200 and 503, see above'
        return pickle.loads(raw)


def assert_survived(loads, cookies, session, kill, replicated):
    """ Have a master killed under load, and check what became of the visitors.

        :param replicated: returns what of a visitor's data is on all replicas.
    """
    def counts():
        answers = [within(session.copy, cookie) for cookie in cookies]
        if all(answer.code == 200 for answer in answers):
            return [answer.value['n'] for answer in answers]

    def grew_by(number):
        least = [one + number for one in until(counts)]
        until(lambda: all(one > wanted for one, wanted in zip(counts() or [0], least)), 60)

    try:
        grew_by(20)
        before = [replicated(cookie).get('n', 0) for cookie in cookies]
        kill()
        grew_by(20)  # the same processes, the same clients
    finally:
        seen = [load.stop() for load in loads]
    total = sum(seen, collections.Counter())
    assert min(before) > 0
    assert {what for what in total if isinstance(what, tuple)} <= {
        (what, code) for what in ('counted', 'read') for code in (200, 503)}
    assert total['logged out'] == total['torn'] == 0
    assert total['counted', 503] + total['read', 503] > 0, 'the kill was noticed'
    for cookie, least in zip(cookies, before):
        assert reading(session, cookie)['n'] >= least


def test_a_master_killed_under_load_is_503_until_sentinel_has_a_new_one(
        start_redis, start_sentinels):
    quick = '--repl-diskless-sync-delay', '0', '--repl-diskless-load', 'swapdb'
    master, *replicas = [start_redis(*quick) for _ in range(3)]
    for replica in replicas:
        replica.admin.replicaof('127.0.0.1', master.port)
    for replica in replicas:
        until(lambda: replica.admin.info('replication')['master_link_status'] == 'up')
    places = start_sentinels(master.port)

    def make_session():
        client = redis.sentinel.Sentinel(places).master_for('main')  # no time-outs of its own
        return Session(SECRET, mode=RedisStore(client))

    def replicated(cookie):
        return min((reading(on, cookie) for on in copies), key=lambda data: data.get('n', 0))

    copies = [Session(SECRET, mode=replica.url) for replica in replicas]
    session = make_session()
    cookies = [session.issue_cookie({'n': 0, 'same': 0}) for _ in range(WORKERS)]
    dead = session.issue_cookie(JOE)
    assert use_purge(session, dead).code == 200
    assert master.admin.wait(2, 10_000) == 2
    loads = [Load(make_session, cookie) for cookie in cookies]
    assert_survived(loads, cookies, session, master.kill, replicated)
    assert reading(session, dead) == {}


def test_sentinels_that_do_not_answer_are_503_in_time(start_redis, tmp_path_factory):
    server = start_redis()
    sentinels = [SentinelServer(tmp_path_factory.mktemp('sentinel'), server.port)
                 for _ in range(3)]
    client = redis.sentinel.Sentinel(
        [('127.0.0.1', one.port) for one in sentinels]).master_for('main')
    session = Session(SECRET, mode=RedisStore(client))
    cookie = session.issue_cookie(JOE)
    for trouble in signal.SIGSTOP, signal.SIGKILL:
        for one in sentinels:
            one.signal(trouble)
        if trouble == signal.SIGSTOP:
            assert reading(session, cookie) == JOE  # who has a connection does not ask them
            server.kill()
        assert_refused_in_time(lambda: within(session.copy, cookie))
        session.store._silent_until = 0  # ask, and do not fail at once
    for one in sentinels:
        one.stop()


@pytest.fixture
def cluster(start_redis):
    """ A cluster of three masters, and a replica of the first: the servers. """
    servers = [start_redis('--cluster-enabled', 'yes', '--cluster-node-timeout', '600',
                           '--cluster-replica-validity-factor', '0', '--appendonly', 'yes',
                           '--repl-diskless-sync-delay', '0') for _ in range(4)]
    first = servers[0].admin
    for number, server in enumerate(servers):
        server.admin.execute_command('CLUSTER SET-CONFIG-EPOCH', number + 1)
        server.admin.execute_command('CLUSTER MEET', '127.0.0.1', servers[0].port)
        if number < 3:
            server.admin.execute_command('CLUSTER ADDSLOTSRANGE', 5462 * number,
                                         min(16383, 5462 * number + 5461))
    until(lambda: all(one.admin.cluster('INFO')['cluster_known_nodes'] == '4'
                      and one.admin.cluster('INFO')['cluster_state'] == 'ok' for one in servers))
    myself = first.execute_command('CLUSTER MYID')
    until(lambda: replicates(servers[3], myself))
    until(lambda: servers[3].admin.info('replication')['master_link_status'] == 'up')
    return servers


def replicates(server, master):
    with contextlib.suppress(redis.ResponseError):  # it does not know that node yet
        return server.admin.execute_command('CLUSTER REPLICATE', master)


def client_of(servers):
    return redis.RedisCluster(startup_nodes=[
        redis.cluster.ClusterNode('127.0.0.1', server.port) for server in servers])


def key_of(server, session, cookie):
    name = within(lambda: session.id, cookie).value
    return any(name in key.decode() for key in server.admin.keys('bsession:{' + name + '*'))


def test_a_cluster_works_and_a_killed_master_is_503_until_its_replica_takes_over(cluster):
    def make_session():
        return Session(SECRET, mode=RedisStore(client_of(cluster)))

    bottle_session.check_store(lambda: RedisStore(client_of(cluster)))
    session = make_session()
    for use in USAGES:
        cookie = session.issue_cookie({'user': 'joe', 'n': 1})
        after(use, session, cookie, use(session, cookie))
    cookies = []
    for master in cluster[:3] + cluster[:1]:  # visitors on all of them, two on the first
        cookies.append(session.issue_cookie({'n': 0, 'same': 0}))
        while not key_of(master, session, cookies[-1]):
            cookies[-1] = session.issue_cookie({'n': 0, 'same': 0})
    shares = []
    size = sum(server.admin.dbsize() for server in cluster[:3])
    left = session.store.sweep(time.time(), shares.append)[1]
    assert size - len(USAGES) <= left <= size  # but for marks of moved ids
    assert shares[-1] == 1.0 and len(shares) == 3

    def let_read(connection):
        connection.on_connect()
        connection.send_command('READONLY')
        connection.read_response()

    copy = Session(SECRET, mode=RedisStore(redis.Redis(
        port=cluster[3].port, redis_connect_func=let_read)))

    def replicated(cookie):
        return reading(copy if cookie in (cookies[0], cookies[3]) else session, cookie)

    loads = [Load(make_session, cookie) for cookie in cookies]
    assert_survived(loads, cookies, session, cluster[0].kill, replicated)


def test_a_cluster_that_is_down_is_503_in_time(cluster):
    session = Session(SECRET, mode=RedisStore(client_of(cluster)))  # no time-outs of its own
    cookie = session.issue_cookie(JOE)
    for trouble in signal.SIGSTOP, signal.SIGKILL:
        for server in cluster:
            server.signal(trouble)
        for use in USAGES[:2]:
            assert_refused_in_time(lambda: use(session, cookie))
            session.store._silent_until = 0  # ask, and do not fail at once
        if trouble == signal.SIGSTOP:
            for server in cluster:
                server.signal(signal.SIGCONT)
            until(lambda: within(session.copy, cookie).value == JOE)

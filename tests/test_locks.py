""" Processes that share sessions: lock holders that die, freeze or fork, and log-ins of
    one owner that race with "log out everywhere". """

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import SECRET, STRESS, fork, in_child, together
from visits import cookie_of, counting, reading, saving, within

from bottle_session import FileStore, RedisStore, Session, SessionBusy, SessionError

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs a Unix: its processes')


###############################################################################
# Lock holders ################################################################
###############################################################################

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


def assert_busy(answer):
    assert answer.code == 503
    assert answer.header('Retry-After') and not answer.header('Set-Cookie')


def test_a_killed_holders_lock_is_free_at_once_in_file_mode(filed):
    cookie = filed.issue_cookie({'n': 0})
    filed.lock_timeout = 0  # nobody waits
    for turn in range(1, 1 + 5 * STRESS):
        with holder(filed, cookie) as (pid, _):
            assert_busy(counting(filed, cookie))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            assert counting(filed, cookie).value == turn  # what the dead one counted is not there


def test_a_killed_holders_lease_in_redis_lasts_at_most_30_seconds(redis):
    session = Session(SECRET, mode=RedisStore(redis.url, prefix='lease:'), lock_timeout=0)
    cookie = session.issue_cookie({'n': 0})
    with holder(session, cookie) as (pid, _):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert_busy(counting(session, cookie))
        key, = redis.admin.keys('lease:*lock')
        assert 0 < redis.admin.pttl(key) <= 30_000
        redis.admin.delete(key)  # as if they were over
        assert counting(session, cookie).value == 1


def test_a_frozen_holder_makes_others_busy_and_harms_no_one_else(shared):
    cookie, other = shared.issue_cookie({'n': 0}), shared.issue_cookie({'n': 0})
    shared.lock_timeout = 0.1
    with holder(shared, cookie) as (pid, let_go):
        os.kill(pid, signal.SIGSTOP)
        assert_busy(counting(shared, cookie))
        assert_busy(saving(shared, cookie, user='joe'))
        assert_busy(within(shared.regenerate, cookie))
        for answer in together(lambda _: counting(shared, cookie), range(8)):
            assert_busy(answer)
        assert reading(shared, cookie) == {'n': 0}  # reading never waits
        for number in range(1, 10):
            assert counting(shared, other).value == number
        assert within(shared.purge, other).code == 200
        os.kill(pid, signal.SIGCONT)
        let_go()
        os.waitpid(pid, 0)
        assert reading(shared, cookie) == {'n': 1}
        assert counting(shared, cookie).value == 2


def test_busy_is_an_error_that_an_app_can_catch(shared):
    cookie = shared.issue_cookie({'n': 0})
    shared.lock_timeout = 0

    def take():
        with pytest.raises(SessionBusy) as error, shared:
            pass
        return error.value.status_code, isinstance(error.value, SessionError)

    with holder(shared, cookie):
        assert within(take, cookie).value == (503, True)


def test_who_waits_in_a_process_gets_the_lock_before_anybody_gets_it_twice(shared):
    cookie, order, threads = shared.issue_cookie({'n': 0}), [], []

    def twice(number):
        for _ in range(2):
            with shared:
                order.append(number)

    def hold():
        with shared:
            for number in range(5):
                threads.append(threading.Thread(
                    target=within, args=(lambda number=number: twice(number), cookie)))
                threads[-1].start()
            time.sleep(1)  # they wait

    within(hold, cookie)
    for thread in threads:
        thread.join()
    assert sorted(order[:5]) == sorted(order[5:]) == [*range(5)], order


def test_a_log_out_does_not_wait_for_a_holder_which_then_finds_it(shared):
    cookie = shared.issue_cookie({'n': 0})
    shared.lock_timeout = 0
    with holder(shared, cookie) as (pid, let_go):
        assert within(shared.purge, cookie).code == 200
        let_go()
        assert os.waitpid(pid, 0)[1] == 0
        assert reading(shared, cookie) == {}


def test_a_block_that_outlives_its_lease_merges_and_says_so(redis, caplog):
    session = Session(SECRET, mode=RedisStore(redis.url, prefix='slow:'))
    cookie = session.issue_cookie({'n': 0, 'old': 1})

    def block():
        with session:
            session['slow'] = session['n']
            del session['old']
            key, = redis.admin.keys('slow:*lock')
            redis.admin.delete(key)  # as if 30 seconds were over
            assert in_child(lambda: counting(session, cookie).value) == 1
        return session.copy()

    answer = within(block, cookie)
    assert answer.value == {'n': 1, 'slow': 0} == reading(session, cookie)
    assert 'lock was lost' in caplog.text
    session.lock_timeout = 0
    assert counting(session, cookie).value == 2  # and nothing is left locked


def test_a_child_that_leaves_the_block_it_was_forked_in_neither_saves_nor_unlocks(shared):
    cookie = shared.issue_cookie({'n': 0})
    shared.lock_timeout = 0.2

    def block():
        with contextlib.suppress(SessionBusy), shared:
            shared['n'] += 1
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)
                seen.append(reading_elsewhere())
            else:
                shared['n'], shared['child'] = 100, True
        if not pid:
            os._exit(0)

    def reading_elsewhere():
        return in_child(lambda: (reading(shared, cookie), counting(shared, cookie).code))

    seen = []
    assert within(block, cookie).code == 200
    assert seen == [({'n': 0}, 503)]  # the parent's block is still on, and alone
    assert reading(shared, cookie) == {'n': 1}
    assert counting(shared, cookie).value == 2


def test_a_child_that_lives_on_does_not_keep_the_lock_it_was_forked_in(shared):
    cookie = shared.issue_cookie({'n': 0})
    shared.lock_timeout = 0

    def block():
        with shared:
            shared['n'] += 1
            children.append(fork(signal.pause))

    children = []
    try:
        assert within(block, cookie).code == 200
        assert counting(shared, cookie).value == 2
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


def test_a_threads_lock_is_respected_by_a_child_forked_meanwhile(shared):
    cookie = shared.issue_cookie({'n': 0})
    inside, over = threading.Event(), threading.Event()

    def block():
        with shared:
            shared['n'] += 1
            inside.set()
            assert over.wait(30)

    def busy():
        shared.lock_timeout = 0
        return counting(shared, cookie).code

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(within, block, cookie)
        assert inside.wait(30)
        try:
            assert in_child(busy) == 503
        finally:
            over.set()
        assert job.result().code == 200
    assert in_child(lambda: counting(shared, cookie).value) == 2


def test_a_block_in_each_of_many_threads_and_processes_gets_its_turn(shared):
    cookie = shared.issue_cookie({'n': 0})

    def count(_):
        assert counting(shared, cookie).code == 200

    children = [fork(lambda: together(count, range(50), 4)) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert reading(shared, cookie) == {'n': 150}


###############################################################################
# Log-ins of one owner ########################################################
###############################################################################

@pytest.fixture(params=['file', 'redis'])
def owned(request, tmp_path):
    """ A Session on a store of its own, which processes share. """
    if request.param == 'file':
        store = FileStore(tmp_path / 'sessions')
    else:
        store = RedisStore(request.getfixturevalue('redis').url,
                           prefix='owned %s:' % os.urandom(4).hex())
    return Session(SECRET, mode=store, max_logins=None)


def log_in(session, cookie=None, and_again=False):
    """ Log in as joe, or get a new id; return the cookie that came back. """
    answer = within(session.regenerate if and_again else lambda: session.login('joe'), cookie)
    assert answer.code == 200
    return cookie_of(answer)


def assert_listed(session, cookies):
    """ Check that every living session is on the list, also those whose cookie nobody got. """
    listed = {login.id for login in session.logins('joe')}
    for cookie in cookies:
        id = within(lambda: session.owner and session.id, cookie).value
        assert id is None or id in listed
    assert session.store.sweep(time.time()) == (0, len(listed))


def revoke_and_check(session, cookies):
    """ Revoke, and check that what existed before is dead, whatever its id is by now. """
    newest = cookies[-20:]
    session.revoke('joe')
    owners = [within(lambda: session.owner, cookie).value for cookie in newest]
    assert owners == [None] * len(newest)


def keep_logging_in(session, over, tell):
    """ Log in, and half of the time get a new id, until it is over. """
    for number in itertools.count():
        if over():
            return
        cookie = log_in(session)
        tell(cookie)
        if number % 2:
            cookie = log_in(session, cookie, and_again=True)
            if cookie:  # nobody ended it meanwhile
                tell(cookie)


def test_log_ins_of_8_threads_while_all_are_revoked_leave_none_unlisted(owned):
    cookies, over, most = [], threading.Event(), 2000 * STRESS
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(keep_logging_in, owned, lambda: over.is_set() or len(cookies) > most,
                            cookies.append) for _ in range(8)]
        try:
            for _ in range(5 * STRESS):
                enough = len(cookies) + 8
                while len(cookies) < enough and not any(job.done() for job in jobs):
                    time.sleep(0.001)
                revoke_and_check(owned, cookies)
        finally:
            over.set()
        for job in jobs:
            job.result()
    assert len(cookies) <= most  # revoke() does not wait for an end of the log-ins
    assert_listed(owned, cookies[-100:])
    owned.revoke('joe')
    assert owned.logins('joe') == [] and owned.store.sweep(time.time()) == (0, 0)


class Loginers:
    """ Child processes that log in all the time, and tell the cookies through a pipe. """

    def __init__(self, session, count):
        self.session, self.cookies = session, []
        self.source, self.sink = os.pipe()
        os.set_blocking(self.source, False)
        self.pids = [self._begin() for _ in range(count)]

    def _begin(self):
        def work():
            keep_logging_in(self.session, lambda: False, lambda cookie: os.write(
                self.sink, cookie['bsession'].encode() + b'\n'))

        return fork(work)

    def known(self):
        """ Return the cookies that came until now. """
        with contextlib.suppress(BlockingIOError):
            while True:
                lines = os.read(self.source, 44 * 1000)  # a cookie and its newline are 44 bytes
                self.cookies += [{'bsession': id} for id in lines.decode().split()]
        return self.cookies

    def replace(self, number):
        """ Kill one in the middle of it, and begin another. """
        self.kill(number)
        self.pids[number] = self._begin()

    def kill(self, number):
        os.kill(self.pids[number], signal.SIGKILL)
        os.waitpid(self.pids[number], 0)


def test_log_ins_of_processes_that_are_killed_while_all_are_revoked_leave_none_unlisted(owned):
    workers = Loginers(owned, 2)
    try:
        for turn in range(20 * STRESS):
            enough = len(workers.known()) + 4
            while len(workers.known()) < enough:
                time.sleep(0.001)
            revoke_and_check(owned, workers.known())
            if turn % 2:
                workers.replace(random.randrange(2))
    finally:
        for number in range(2):
            workers.kill(number)
    assert_listed(owned, workers.known()[-100:])
    owned.revoke('joe')
    assert owned.logins('joe') == [] and owned.store.sweep(time.time()) == (0, 0)


def test_a_revoke_that_is_killed_leaves_none_unlisted(owned):
    for turn in range(10 * STRESS):
        cookies = [log_in(owned) for _ in range(8)]
        pid = fork(lambda: owned.revoke('joe'))
        time.sleep(random.uniform(0, 0.006))  # at any moment
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert_listed(owned, cookies)
        cookies.append(log_in(owned))
        assert owned.revoke('joe') >= 1
        assert all(reading(owned, cookie) == {} for cookie in cookies)
        assert owned.store.sweep(time.time()) == (0, 0) and owned.logins('joe') == []


def test_a_record_is_made_or_not_where_another_one_is_removed_at_that_moment(tmp_path):
    """ An owner's list that gets empty while somebody logs in: never a StoreError. """
    name, made = 'ab' * 32, []

    def make_and_remove():
        store = FileStore(tmp_path)
        for _ in range(1000):
            if store.create(name, b's' + os.urandom(40), 9e9):
                made.append(store.remove(name))

    with ThreadPoolExecutor(4) as pool:
        for worker in [pool.submit(make_and_remove) for _ in range(4)]:
            worker.result()
    assert made and all(made)

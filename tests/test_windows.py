""" File mode on Windows, tried with a stand-in: child processes in which `os` has the rules
    of Windows. What is open can be neither removed nor renamed, a directory cannot be
    opened, a file is opened as a binary one, and much is missing. """

import glob
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
from conftest import HERE, SECRET, package, run

pytestmark = pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs Linux')

# Python runs a module of this name before anything else.
SITECUSTOMIZE = '''
import asyncio, errno, fcntl, os, subprocess, sys, threading, types  # these look where they are

real, mutex = types.SimpleNamespace(**vars(os)), threading.Lock()
os.O_BINARY, os.O_NOINHERIT = 1 << 40, 1 << 41


def open(path, flags, mode=0o777):
    with mutex:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, 'Permission denied', path)
        if 'sessions' in str(path) and not flags & os.O_BINARY:
            raise PermissionError(errno.EACCES, 'Its lines would end in CR LF', path)
        return real.open(path, flags & ~(os.O_BINARY | os.O_NOINHERIT), mode)


def open_files():
    for fd in os.scandir('/proc/self/fd'):
        try:
            yield os.readlink(fd.path)
        except FileNotFoundError:  # it was closed meanwhile
            pass


def unless_open(name):
    def function(*paths):
        with mutex:
            ours = set(open_files())
            for path in paths:
                if os.path.realpath(path) in ours:
                    raise PermissionError(errno.EACCES, 'Somebody has it open', path)
            getattr(real, name)(*paths)
    return function


def fsync(fd):
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, 'Bad file descriptor')
    real.fsync(fd)


def locking(fd, mode, size):
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB if mode else fcntl.LOCK_UN)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, 'Permission denied')


os.open, os.fsync = open, fsync
for name in 'unlink', 'remove', 'rename', 'replace':
    setattr(os, name, unless_open(name))
for name in ("""pread pwrite preadv pwritev readv writev fchmod fchown fdatasync fork forkpty
             register_at_fork geteuid getegid getgid setuid setgid chown mknod sync nice lockf
             statvfs fstatvfs posix_fallocate posix_fadvise setsid killpg O_NOFOLLOW O_NONBLOCK
             O_CLOEXEC O_NOCTTY O_DIRECTORY O_SYNC O_DSYNC""").split():  # pytest needs the rest
    vars(os).pop(name, None)
sys.modules.update(dict.fromkeys(['fcntl', 'grp', 'pwd', 'resource', 'syslog', 'termios']),
                   msvcrt=types.ModuleType('msvcrt'))
vars(sys.modules['msvcrt']).update(LK_UNLCK=0, LK_LOCK=1, LK_NBLCK=2, locking=locking)
'''
BEGIN = '''
import glob, os, runpy, threading, time
from concurrent.futures import ThreadPoolExecutor
from bottle_session import FileStore, Session, StoreError
from visits import cookie_of, counting, path_of, reading, records, saving, within

session = Session(%r, 'sessions', mode='file')
''' % SECRET


class Windows:
    """ Runs programs on the stand-in. """

    def __init__(self, place):
        self.place = str(place)
        with open(os.path.join(self.place, 'sitecustomize.py'), 'w') as file:
            file.write(SITECUSTOMIZE)
        self.options = {'cwd': self.place, 'universal_newlines': True, 'env': {
            **os.environ, 'PYTHONDONTWRITEBYTECODE': '1',
            'PYTHONPATH': os.pathsep.join((self.place, HERE, os.path.join(HERE, 'tests')))}}

    def run(self, code):
        """ Run this code behind BEGIN, which must not fail, and return what it printed. """
        done = run(BEGIN + textwrap.dedent(code), **self.options)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def call(self, *arguments):
        """ Call Python with these arguments; return (exit code, output). """
        done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, timeout=300,
                              stderr=subprocess.STDOUT, **self.options)
        return done.returncode, done.stdout


@pytest.fixture
def windows(tmp_path):
    return Windows(tmp_path)


def test_the_stand_in_has_the_rules_of_windows(windows):
    windows.run("""
        import msvcrt

        def refused(function, *arguments):
            try:
                function(*arguments)
            except PermissionError:
                return True

        assert not hasattr(os, 'pread') and not hasattr(os, 'fork')
        fd, again = (os.open('file', os.O_RDWR | os.O_CREAT) for _ in (1, 2))
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        assert refused(msvcrt.locking, again, msvcrt.LK_NBLCK, 1)
        os.close(fd)
        assert refused(os.unlink, 'file') and refused(os.rename, 'file', 'other')
        assert refused(os.replace, 'file', 'other') and refused(os.open, '.', os.O_RDONLY)
        assert refused(os.open, 'sessions', os.O_RDWR | os.O_CREAT)
        os.close(again)
        os.unlink('file')
    """)


def test_what_files_promise_in_one_process_they_promise_here(windows):
    """ But for what goes the same way to the files as another case. """
    code, said = windows.call('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--capture=sys',
                              '--rootdir', HERE, '-c', os.path.join(HERE, 'setup.cfg'),
                              '-k', 'file and (test_with or test_merge or test_owner or test_rest '
                              'or test_store) and not (hooks or plugin or any_moment '
                              'or any_point)',
                              os.path.join(HERE, 'test_bottle_session.py'))
    assert code == 0, said
    assert int(re.search(r'(\d+) passed', said).group(1)) > 80


def test_a_record_that_is_removed_while_it_is_read_is_absent(windows):
    windows.run("""
        store, later, lseek = FileStore('sessions'), time.time() + 60, os.lseek
        store.create('a' * 64, b's' * 1000000, later)

        def remove_first(*args):
            os.lseek = lseek
            assert store.remove('a' * 64)
            return lseek(*args)

        os.lseek = remove_first  # which looks for a big record, behind the page
        assert store.load('a' * 64) is None and os.lseek is lseek
        assert store.create('a' * 64, b's' * 100, later)
    """)


def test_what_another_thread_has_open_is_ended_in_place_and_stays_so(windows):
    windows.run("""
        def hold():
            with session:
                session['late'] = 1
                held.set()
                assert ended.wait(30)
            return session.id

        def slow():
            session['late'] = 1
            held.set()
            assert ended.wait(30)
            return session.save()

        def move():
            with session:
                held.set()
                assert ended.wait(30)
                session.regenerate()
            return session.id

        for route, end in (hold, session.purge), (slow, session.regenerate), (move, session.purge):
            held, ended = threading.Event(), threading.Event()
            cookie = session.issue_cookie({'user': 'joe'})
            reader = open(path_of(session, cookie))
            with ThreadPoolExecutor(1) as pool:
                late = pool.submit(within, route, cookie)
                assert held.wait(30)
                within(end, cookie)
                ended.set()
            assert (late.result().code, late.result().value) in ((200, None), (200, False))
            assert cookie_of(late.result()) == {}
            assert reading(session, cookie) == {}
            reader.close()
    """)


def test_what_ended_is_removed_at_last_also_if_it_was_open(windows):
    windows.run("""
        cookies = [session.issue_cookie({'n': n}) for n in range(4)]
        paths = [path_of(session, cookie) for cookie in cookies]
        directory = session.store.directory
        lock, _ = session.store.lock(paths[0][-65:].replace('/', ''))
        reader = open(paths[1])
        within(session.purge, cookies[2])
        assert records(directory) == sorted(set(paths) - {paths[2]})
        session.clock = lambda: time.time() + 31 * 86400
        assert session.sweep() == 2 and records(directory) == sorted(paths[:2])
        assert os.path.getsize(paths[0]) and not os.path.getsize(paths[1])
        session.store.unlock('', lock)
        reader.close()
        assert session.sweep() == 1 and records(directory) == []
    """)


def test_a_second_process_is_told_so_until_the_first_one_dies(windows):
    sweep, told = ['-m', 'bottle_session', 'sweep', 'sessions'], 'another process uses this'
    first = subprocess.Popen(
        [sys.executable, '-c', BEGIN + "print(session.issue_cookie({'user': 'joe'})['bsession'], "
         "flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **windows.options)
    with first:
        id = first.stdout.readline().strip()
        said = windows.run("""
            for use in (lambda: within(session.copy, {'bsession': %r}).code, session.sweep,
                        lambda: session.issue_cookie({'user': 'ann'})):
                try:
                    code = use()
                except StoreError as error:
                    code = error.status_code
                assert code == 503
        """ % id)
        assert said.count(told) == 3 and os.path.join(windows.place, 'sessions', 'lock') in said
        code, said = windows.call(*sweep)
        assert code == 1 and told in said
        first.send_signal(signal.SIGKILL)
    assert windows.call(*sweep) == (0, 'removed 0, left 1\n')
    windows.run("""
        assert reading(session, {'bsession': %r}) == {'user': 'joe'}
        other = Session('another secret, long enough', 'sessions', mode='file')
        assert other.issue_cookie({'user': 'ann'})  # two objects of one process may
    """ % id)


def test_a_directory_that_cannot_be_made_is_an_error_with_its_cause(windows):
    windows.run("""
        open('file', 'w').close()
        try:
            FileStore('file/sessions').load('a' * 64)
        except StoreError as error:
            assert type(error.__cause__) is NotADirectoryError
        else:
            raise AssertionError('no error')
    """)


def test_the_command_memory_redis_and_the_examples_need_nothing_else(windows):
    package('redis'), package('sqlalchemy'), package('webtest')
    code, secret = windows.call('-m', 'bottle_session', 'secret')
    assert code == 0 and len(secret) == 44
    windows.run("""
        import webtest
        session = Session('a secret, long enough')
        cookie = cookie_of(saving(session, None, user='joe'))
        assert counting(session, cookie).value == 1 and reading(session, cookie)['user'] == 'joe'
        try:
            Session('a secret, long enough', mode='redis://127.0.0.1:1').issue_cookie({'n': 1})
        except StoreError as error:
            assert 'ConnectionError' in repr(error.__cause__)
        os.environ['DATABASE_URL'] = 'sqlite:///sessions.db'
        for path in glob.glob(%r):
            app = webtest.TestApp(runpy.run_path(path)['app'])
            assert '<title>' in app.get('/').text and '<title>' in app.get('/').text
    """ % os.path.join(glob.escape(HERE), 'examples', '*.py'))

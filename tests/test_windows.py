""" File mode on Windows, tried with a stand-in: child processes in which `os` has the rules
    of Windows. What is open can be neither removed nor renamed, a directory cannot be
    opened, files are text unless they are opened as binary ones, and much is missing. """

import glob
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from conftest import HERE, SECRET, package, run

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs a Unix, to play Windows on')

# Python runs a module of this name before anything else.
SITECUSTOMIZE = '''
import asyncio, errno, fcntl, os, subprocess, sys, threading, types  # these look where they are

real, mutex, texts = types.SimpleNamespace(**vars(os)), threading.Lock(), set()
os.O_BINARY, os.O_NOINHERIT = 1 << 40, 1 << 41


def refuse(path, reason):
    raise PermissionError(errno.EACCES, reason, path)


def open(path, flags, mode=0o777):
    with mutex:
        if os.path.isdir(path):
            refuse(path, 'Permission denied')
        fd = real.open(path, flags & ~(os.O_BINARY | os.O_NOINHERIT), mode)
        (texts.discard if flags & os.O_BINARY else texts.add)(fd)
        return fd


def unless_open(name):
    def function(*paths):
        with mutex:
            for path in paths:
                for fd in os.scandir('/proc/self/fd'):
                    if os.path.realpath(path) == os.path.realpath(fd.path):
                        refuse(path, 'Somebody has it open')
            getattr(real, name)(*paths)
    return function


def read(fd, size):
    data = real.read(fd, size)
    return data.replace(b'\\r\\n', b'\\n') if fd in texts else data


def write(fd, data):
    if fd in texts:
        real.write(fd, bytes(data).replace(b'\\n', b'\\r\\n'))
        return len(data)
    return real.write(fd, data)


def fsync(fd):
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, 'Bad file descriptor')
    real.fsync(fd)


def locking(fd, mode, size):
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB if mode else fcntl.LOCK_UN)
    except BlockingIOError:
        refuse(None, 'Permission denied')


os.open, os.read, os.write, os.fsync = open, read, write, fsync
for name in 'unlink', 'remove', 'rename', 'replace':
    setattr(os, name, unless_open(name))
for name in ("""pread pwrite preadv pwritev readv writev fchmod fchown fdatasync fork forkpty
             register_at_fork geteuid getuid getegid getgid setuid setgid chown mkfifo mknod sync
             statvfs fstatvfs posix_fallocate posix_fadvise lockf setsid killpg uname nice
             O_NOFOLLOW O_NONBLOCK O_CLOEXEC O_NOCTTY O_DIRECTORY O_SYNC O_DSYNC""").split():
    vars(os).pop(name, None)
sys.modules.update(dict.fromkeys(['fcntl', 'grp', 'pwd', 'resource', 'syslog', 'termios']),
                   msvcrt=types.ModuleType('msvcrt'))
vars(sys.modules['msvcrt']).update(LK_UNLCK=0, LK_LOCK=1, LK_NBLCK=2, locking=locking)
'''
BEGIN = '''
import glob, os, threading, time
from concurrent.futures import ThreadPoolExecutor
import bottle
from bottle_session import FileStore, Session, SessionBusy, SessionError, StoreError, check_store
from visits import cookie_of, counting, path_of, reading, records, saving, within

session = Session(%r, 'sessions', mode='file')


def together(function, count):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(function, range(count)))


''' % SECRET


class Windows:
    """ Runs programs on the stand-in. """

    def __init__(self, place):
        self.place = str(place)
        with open(os.path.join(self.place, 'sitecustomize.py'), 'w') as file:
            file.write(SITECUSTOMIZE)
        self.options = {'cwd': self.place, 'env': {
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
                              stderr=subprocess.STDOUT, universal_newlines=True, **self.options)
        return done.returncode, done.stdout


@pytest.fixture
def windows(tmp_path):
    return Windows(tmp_path)


def test_the_stand_in_has_the_rules_of_windows(windows):
    windows.run("""
        import msvcrt
        from contextlib import suppress

        def refused(function, *arguments):
            with suppress(PermissionError):
                function(*arguments)
                return False
            return True

        assert not hasattr(os, 'pread') and not hasattr(os, 'fork')
        with suppress(ImportError):
            import fcntl
            raise AssertionError('fcntl is there')
        text = os.open('text', os.O_RDWR | os.O_CREAT)
        assert os.write(text, b'1\\n') == 2 and os.fstat(text).st_size == 3
        assert refused(os.unlink, 'text') and refused(os.rename, 'text', 'other')
        assert refused(os.replace, 'text', 'other') and refused(os.open, '.', os.O_RDONLY)
        again = os.open('text', os.O_RDWR | os.O_BINARY)
        msvcrt.locking(text, msvcrt.LK_NBLCK, 1)
        assert refused(msvcrt.locking, again, msvcrt.LK_NBLCK, 1)
        os.close(text)
        assert refused(os.unlink, 'text')
        os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_BINARY), again)
        os.unlink('text')
    """)


def test_a_session_is_saved_merged_and_counted_by_threads(windows):
    windows.run("""
        cookie = cookie_of(saving(session, None, user='joe'))
        assert saving(session, cookie, more=[1, 2]).value
        assert saving(session, cookie, more=[1, 2]).value is False
        together(lambda number: saving(session, cookie, **{'key%d' % number: number}), 40)
        together(lambda number: counting(session, cookie), 200)
        data = reading(session, cookie)
        assert data.pop('user') == 'joe' and data.pop('more') == [1, 2] and data.pop('n') == 200
        assert data == {'key%d' % number: number for number in range(40)}
        big = {'blob': os.urandom(3000000)}
        for change in big, {'blob': b'small'}, big:
            saving(session, cookie, **change)
            assert reading(session, cookie)['blob'] == change['blob']
        check_store(lambda: FileStore('checked'))
    """)


def test_a_new_id_a_log_in_and_a_log_out_end_the_old_session(windows):
    windows.run("""
        old = cookie_of(saving(session, None, user='joe'))
        new = cookie_of(within(session.regenerate, old))
        assert reading(session, old) == {} and reading(session, new) == {'user': 'joe'}
        cookies = [cookie_of(within(lambda: session.login('joe'), None)) for _ in range(3)]
        here = cookies[0]
        assert len(session.logins('joe')) == 3
        assert within(session.revoke_others, here).value == 2 and len(session.logins('joe')) == 1
        assert within(lambda: session.owner, here).value == 'joe'
        assert session.revoke('joe') == 1 and session.logins('joe') == []
        together(lambda number: within(lambda: session.login('joe'), None), 40)
        assert len(session.logins('joe')) == session.revoke('joe') == 40
        assert [path for path in records('sessions') if not os.path.getsize(path)] == []
    """)


@pytest.mark.parametrize('end', ['purge', 'regenerate'])
def test_what_another_thread_has_open_is_ended_in_place_and_stays_so(windows, end):
    windows.run("""
        cookie = cookie_of(saving(session, None, user='joe'))
        path = path_of(session, cookie)
        held, ended = threading.Event(), threading.Event()

        def hold():
            with session:
                session['late'] = 1
                held.set()
                assert ended.wait(30)
            assert session.id is None and not session.save()

        def slow():
            session['slow'] = 1
            held.set()
            assert ended.wait(30)
            return session.save()

        for route in slow, hold if %(end)r == 'purge' else slow:
            with ThreadPoolExecutor(1) as pool:
                late = pool.submit(within, route, cookie)
                assert held.wait(30)
                reader = os.open(path, os.O_RDONLY)
                within(session.%(end)s, cookie)
                ended.set()
                assert not late.result().value and cookie_of(late.result()) == {}
            assert reading(session, cookie) == {}
            os.close(reader)
            cookie = cookie_of(saving(session, None, user='joe'))
            path = path_of(session, cookie)
            held.clear(), ended.clear()
    """ % {'end': end})


def test_what_expired_is_removed_at_last_also_if_it_was_open(windows):
    windows.run("""
        cookies = [session.issue_cookie({'n': n}) for n in range(4)]
        paths = [path_of(session, cookie) for cookie in cookies]
        held = session.store.lock(os.path.basename(os.path.dirname(paths[0]))
                                  + os.path.basename(paths[0]))
        reader = os.open(paths[1], os.O_RDONLY)
        within(session.clear, cookies[2])
        left = records(session.store.directory)
        assert left == sorted(set(paths) - {paths[2]})
        session.clock = lambda: time.time() + 31 * 86400
        assert session.sweep() == 2
        assert records(session.store.directory) == sorted(paths[:2])
        assert os.path.getsize(paths[0]) and not os.path.getsize(paths[1])
        session.store.unlock('', held[0])
        os.close(reader)
        assert session.sweep() == 1 and records('sessions') == []

        now = time.time()
        for number in range(40):
            FileStore('others').create('%02x%062x' % (number, number), b's' * 40, now - 1)
        for number in range(2000):  # each object cleans up at its first save
            FileStore('others').create('%02x%062x' % (255, number), b's' * 40, now + 999)
            if len(records('others')) == number + 1:
                break
        else:
            raise AssertionError('saves do not clean up')
    """)


def test_a_second_process_is_told_so_until_the_first_one_dies(windows):
    directory = os.path.join(windows.place, 'sessions')
    code = textwrap.dedent("""
        cookie = session.issue_cookie({'user': 'joe'})
        print(cookie['bsession'], flush=True)
        input()
    """)
    first = subprocess.Popen([sys.executable, '-c', BEGIN + code], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, universal_newlines=True, **windows.options)
    with first:
        id = first.stdout.readline().strip()
        assert id
        said = windows.run("""
            for use in (lambda: within(session.copy, {'bsession': %r}).code, session.sweep,
                        lambda: session.issue_cookie({'user': 'ann'})):
                try:
                    code = use()
                except StoreError as error:
                    code = error.status_code
                assert code == 503
        """ % id)
        assert said.count('another process uses this directory') == 3
        code, said = windows.call('-m', 'bottle_session', 'sweep', 'sessions')
        assert code == 1 and 'another process uses this directory' in said
        assert os.path.join(directory, 'lock') in said
        first.send_signal(signal.SIGKILL)
    assert windows.call('-m', 'bottle_session', 'sweep', 'sessions') == (0, 'removed 0, left 1\n')
    windows.run("""
        assert reading(session, {'bsession': %r}) == {'user': 'joe'}
        other = Session('another secret, long enough', 'sessions', mode='file')
        assert other.issue_cookie({'user': 'ann'})  # two objects of one process may
    """ % id)


def test_a_directory_that_cannot_be_made_is_a_store_error_with_its_path(windows):
    open(os.path.join(windows.place, 'file'), 'w').close()
    assert 'cannot open' in windows.run("""
        session = Session('a secret, long enough', 'file/sessions', mode='file')
        try:
            print(session.issue_cookie({'user': 'ann'}))
        except StoreError as error:
            assert isinstance(error.__cause__, NotADirectoryError)
    """)


def test_the_command_memory_redis_and_the_examples_need_nothing_else(windows):
    package('redis')
    code, secret = windows.call('-m', 'bottle_session', 'secret')
    assert code == 0 and len(secret) == 44
    windows.run("""
        session = Session('a secret, long enough')
        cookie = cookie_of(saving(session, None, user='joe'))
        assert counting(session, cookie).value == 1
        assert reading(session, cookie) == {'user': 'joe', 'n': 1}
        assert not os.path.exists('sessions')
        try:
            Session('a secret, long enough', mode='redis://127.0.0.1:1').issue_cookie({'n': 1})
        except StoreError as error:
            print(error.__cause__)
    """)
    package('sqlalchemy')
    windows.run("""
        import runpy, webtest
        os.environ['DATABASE_URL'] = 'sqlite:///sessions.db'
        for path in sorted(glob.glob(%r)):
            app = runpy.run_path(path)['app']
            client = webtest.TestApp(app, {'HTTP_ORIGIN': 'http://localhost:80'})
            for _ in range(2):
                assert '<title>' in client.get('/').text, path
    """ % os.path.join(glob.escape(HERE), 'examples', '*.py'))

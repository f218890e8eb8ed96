""" File mode when things go wrong: killed processes, damage, full disks, odd files,
    missing rights; and how few system calls it takes when they do not. """

import contextlib
import glob
import itertools
import json
import logging
import mmap
import os
import pickle
import random
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time

import pytest
from conftest import HERE, SECRET, STRESS, fork, in_child, missing, run, tool
from visits import Outcome, cookie_of, counting, path_of, reading, records, saving, within

from bottle_session import Session, SessionError

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs a Unix: its processes')
TESTS = {'PYTHONPATH': os.pathsep.join((HERE, os.path.join(HERE, 'tests')))}


def blob(version, size):
    """ Return about this many bytes that tell their version everywhere. """
    return (b'%d,' % version) * (size // len(b'%d,' % version) + 1)


def write_file(path, content):
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), 'r+b') as file:
        file.write(content)  # emptying it first would make ext4 wait for the disk
        file.truncate()


def content_of(path):
    with open(path, 'rb') as file:
        return file.read()


###############################################################################
# Killed processes ############################################################
###############################################################################

SIZES = {'small': lambda version: 30, 'growing': lambda version: 37 * version % 60000,
         '200 KB': lambda version: 200_000, 'big and small': lambda version: 50000 * (version % 3)}


@pytest.mark.parametrize('size', SIZES)
def test_killed_writers_leave_an_acknowledged_or_in_flight_version(filed, size):
    board = mmap.mmap(-1, 32 * 16)  # shared with the writers: begun, acknowledged
    cookies = [filed.issue_cookie({'version': 0, 'blob': blob(0, 0)}) for _ in range(4)]

    def write(number):
        for version in itertools.count(struct.unpack_from('q', board, 16 * number)[0] + 1):
            struct.pack_into('q', board, 16 * number, version)
            new = {'version': version, 'blob': blob(version, SIZES[size](version))}
            assert saving(filed, cookies[number], **new).value
            struct.pack_into('q', board, 16 * number + 8, version)

    def look(number):
        least = struct.unpack_from('q', board, 16 * number + 8)[0]
        data = reading(filed, cookies[number])
        most = struct.unpack_from('q', board, 16 * number)[0]
        assert least <= data['version'] <= most
        assert data['blob'] == blob(data['version'],
                                    SIZES[size](data['version']) if data['version'] else 0)

    writers = [fork(lambda number=number: write(number)) for number in range(4)]
    try:
        for _ in range(20 * STRESS):
            number = random.randrange(4)
            time.sleep(random.uniform(0, 0.02))  # at any moment
            look(number)  # also while it is written
            os.kill(writers[number], signal.SIGKILL)
            os.waitpid(writers[number], 0)
            look(number)
            writers[number] = fork(lambda: write(number))
    finally:
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
    assert len(records(filed.store.directory)) == 4


@pytest.mark.parametrize('size', [30, 100_000])
def test_killed_creators_leave_whole_sessions_or_none(filed, size):
    created = 0
    for _ in range(20 * STRESS):
        source, sink = os.pipe()

        def create():
            while True:
                cookie = filed.issue_cookie({'blob': blob(7, size)})
                os.write(sink, cookie['bsession'].encode() + b'\n')

        pid = fork(create)
        os.close(sink)
        time.sleep(random.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(source) as pipe:
            for id in pipe:
                created += 1
                assert reading(filed, {'bsession': id.strip()}) == {'blob': blob(7, size)}
    went, left = filed.store.sweep(time.time())
    assert created and went == 0 and created <= left <= created + 20 * STRESS


def test_half_made_files_are_swept_after_an_hour_or_taken_over(filed):
    path = path_of(filed, filed.issue_cookie({'user': 'joe'}))
    whole, paths = content_of(path), []
    for length in 0, 4, 8:
        for age in 0, 3500, 3700:
            paths.append((path[:-6] + '%06x' % len(paths), age))
            write_file(paths[-1][0], whole[:length])
            os.utime(paths[-1][0], (time.time() - age,) * 2)
    shard = os.path.basename(os.path.dirname(path))
    names = [shard + os.path.basename(path) for path, _ in paths]
    assert [filed.store.load(name) or None for name in names] == [None] * 9
    later = time.time() + 60
    for name in names[3:6]:  # whoever was making it has died: it is free
        assert filed.store.create(name, b's' + name.encode(), later)
        assert not filed.store.create(name, b'another', later)
        assert filed.store.load(name) == b's' + name.encode()
    assert filed.sweep() == 0  # no session went
    assert [(number, age) for number, (path, age) in enumerate(paths) if os.path.exists(path)] == [
        (0, 0), (1, 3500), (3, 0), (4, 3500), (5, 3700), (6, 0), (7, 3500)]
    assert os.path.exists(path)


###############################################################################
# Damage ######################################################################
###############################################################################

@pytest.fixture
def damaged(tmp_path):
    """ A session, its cookie, its path, and what was and is in it. """
    session = Session(SECRET, tmp_path / 'sessions', mode='file', serializer=json)
    cookie = session.issue_cookie({'v': 1})
    saving(session, cookie, v=2)
    return session, cookie, path_of(session, cookie), [{}, {'v': 1}, {'v': 2}]


@pytest.mark.parametrize('flip', [0xff, 0x01, 0x80])
def test_any_flipped_byte_reads_as_absent_old_or_right(damaged, flip):
    session, cookie, path, possible = damaged
    whole, outcomes = content_of(path), []
    for at in range(len(whole)):
        if not whole[at] and flip != 0xff:
            continue  # most of these are behind the records
        broken = whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1:]
        write_file(path, broken)
        outcomes.append(possible.index(reading(session, cookie)))
        for use in (saving, counting) if at % 5 == 0 else ():
            write_file(path, broken)
            assert use(session, cookie).code == 200
    assert outcomes.count(2) > 60 and outcomes.count(1) > 60  # one slot is enough
    write_file(path, whole)
    assert reading(session, cookie) == {'v': 2}


def test_any_truncated_length_reads_as_absent_old_or_right_and_is_logged(damaged, caplog):
    session, cookie, path, possible = damaged
    whole = content_of(path)
    for length in range(len(whole)):
        if length % 10 and whole[length - 5:length + 5] == bytes(10):
            continue  # behind the records it makes no difference
        write_file(path, whole[:length])
        caplog.clear()
        assert reading(session, cookie) in possible and 'treated as absent' in caplog.text
        if length % 50 == 0:
            assert saving(session, cookie, v=3).code == 200
            write_file(path, whole[:length])
            session.sweep()
            assert within(session.purge, cookie).code == 200
    write_file(path, whole + b'more' * 2000)
    assert reading(session, cookie) == {'v': 2}


def test_damaged_big_records_read_as_absent_or_old(filed):
    cookie = filed.issue_cookie({'v': blob(1, 300_000)})
    saving(filed, cookie, v=blob(2, 300_000))
    path = path_of(filed, cookie)
    whole, possible = content_of(path), [{}] + [{'v': blob(v, 300_000)} for v in (1, 2)]
    for _ in range(100 * STRESS):
        write_file(path, whole[:random.randrange(len(whole))])
        assert reading(filed, cookie) in possible
        at = random.randrange(len(whole))
        write_file(path, whole[:at] + os.urandom(9) + whole[at + 9:])
        assert reading(filed, cookie) in possible


def test_a_record_under_another_ones_name_is_absent(filed, caplog):
    mine, other = filed.issue_cookie({'user': 'me'}), filed.issue_cookie({'user': 'other'})
    shutil.copy(path_of(filed, other), path_of(filed, mine))
    assert reading(filed, mine) == {} and reading(filed, other) == {'user': 'other'}
    assert 'is damaged' in caplog.text and mine['bsession'] not in caplog.text


###############################################################################
# A disk without room #########################################################
###############################################################################

@pytest.fixture
def small_disk():
    """ Return a function that mounts a tiny file system and returns its path. """
    with contextlib.ExitStack() as stack:
        def mount(options):
            place = tempfile.mkdtemp(prefix='bsession')
            stack.callback(os.rmdir, place)
            if sys.platform != 'linux' or os.geteuid() or subprocess.run(
                    ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', place],
                    stderr=subprocess.DEVNULL).returncode:
                pytest.skip('needs a Linux that lets root mount a small disk: run as root')
            stack.callback(subprocess.run, ['umount', '-l', place], check=True)
            return place

        yield mount


def assert_refused(answer):
    """ Check that the app told of a failing store, and nothing of the session. """
    assert answer.code == 503
    assert answer.header('Retry-After') and not answer.header('Set-Cookie')


@pytest.mark.parametrize('full', ['size=64k,nr_inodes=1000', 'size=4m,nr_inodes=200'],
                         ids=['no space', 'no inodes'])
def test_a_full_disk_answers_503_keeps_old_data_and_lets_log_out(small_disk, full):
    session = Session(SECRET, small_disk(full) + '/sessions', mode='file')
    cookies = []
    while True:
        answer = saving(session, None, user='joe', number=len(cookies))
        if answer.code != 200:
            break
        cookies.append(cookie_of(answer))
    assert_refused(answer)
    assert len(cookies) >= 10 and len(records(session.store.directory)) == len(cookies)
    first = cookies[0]
    assert_refused(within(session.regenerate, first))
    if 'size=64k' in full:
        assert_refused(saving(session, first, big=blob(1, 100_000)))
    for number, cookie in enumerate(cookies):
        assert reading(session, cookie) == {'user': 'joe', 'number': number}
    assert saving(session, first, user='ann').value is True  # there is room in its file
    assert reading(session, first) == {'user': 'ann', 'number': 0}
    for cookie in cookies[1:3]:
        assert within(session.purge, cookie).code == 200
        assert reading(session, cookie) == {}
    assert saving(session, None, user='new').code == 200


def test_a_disk_that_fills_in_the_middle_of_a_write_keeps_the_old_record(small_disk):
    place = small_disk('size=256k')
    session = Session(SECRET, place + '/sessions', mode='file')
    cookie = session.issue_cookie({'v': 0, 'blob': blob(0, 10_000)})
    for pages in range(40):
        with open(place + '/filler', 'wb', 0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        os.truncate(place + '/filler', max(0, os.path.getsize(place + '/filler') - 4096 * pages))
        old = reading(session, cookie)
        new = {'v': old['v'] + 1, 'blob': blob(old['v'] + 1, 30_000 + 3000 * old['v'])}
        answer = saving(session, cookie, **new)
        if answer.code != 200:
            assert_refused(answer)
        assert reading(session, cookie) == (new if answer.code == 200 else old)
        os.unlink(place + '/filler')
    assert 0 < old['v'] < 39  # some did fit, and some did not


def test_a_use_that_cannot_be_recorded_is_logged_not_raised(small_disk, caplog):
    place = small_disk('size=256k')
    session = Session(SECRET, place + '/sessions', mode='file', days=30)
    cookie = session.issue_cookie({'user': 'joe'})
    subprocess.run(['mount', '-o', 'remount,ro', place], check=True)
    session.clock = lambda: time.time() + 2 * 86400  # a use is due
    assert reading(session, cookie) == {'user': 'joe'}
    assert 'its use could not be recorded' in caplog.text
    for action in session.purge, session.regenerate, lambda: session.update(n=1) or session.save():
        assert_refused(within(action, cookie))
    assert_refused(counting(session, cookie))
    assert reading(session, cookie) == {'user': 'joe'}


###############################################################################
# Files of others #############################################################
###############################################################################

NOBODY = 65534


@pytest.fixture
def nobodys():
    """ A directory of a user who is not root, where everybody may look. """
    place = tempfile.mkdtemp(prefix='bsession')
    os.chmod(place, 0o755)
    if os.geteuid() == 0:
        os.chown(place, NOBODY, NOBODY)
    yield place
    for directory, _, _ in os.walk(place):
        os.chmod(directory, 0o700)
    shutil.rmtree(place)


def as_nobody(action):
    """ Return the answer of an action that another user's process does in a request, with
        what it logged in `log`. """
    def work():
        messages = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())
        logging.getLogger('bottle_session').addHandler(handler)
        answer = action()
        return answer.code, answer.headers, answer.value, ' '.join(messages)

    answer = Outcome()
    answer.code, answer.headers, answer.value, answer.log = in_child(work, NOBODY)
    return answer


def test_a_record_that_may_not_be_read_is_an_error_not_a_log_out(nobodys):
    session = Session(SECRET, nobodys + '/sessions', mode='file')
    cookie = in_child(lambda: session.issue_cookie({'user': 'joe'}), NOBODY)
    path = path_of(session, cookie)
    if os.geteuid() == 0:
        os.chown(path, 0, 0)  # the app was once run as root
    else:
        os.chmod(path, 0)
    for use in (lambda: within(session.copy, cookie), lambda: saving(session, cookie, user='ann'),
                lambda: counting(session, cookie), lambda: within(session.regenerate, cookie)):
        answer = as_nobody(use)
        assert_refused(answer)
        assert 'Permission denied' in answer.log
        if os.geteuid() == 0:
            assert '%s belongs to user 0, and this process runs as user %d' % (
                path, NOBODY) in answer.log and 'chown' in answer.log
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    else:
        os.chmod(path, 0o600)
    assert as_nobody(lambda: within(session.copy, cookie)).value == {'user': 'joe'}


@pytest.mark.parametrize('rights', [0o555, 0o000], ids=oct)
def test_a_directory_without_rights_answers_503_and_changes_nothing(nobodys, rights):
    session = Session(SECRET, nobodys + '/sessions', mode='file')
    cookie = in_child(lambda: session.issue_cookie({'user': 'joe'}), NOBODY)
    shard = os.path.dirname(path_of(session, cookie))
    for directory in shard, session.store.directory:
        os.chmod(directory, rights)
    for use in (lambda: within(session.purge, cookie), lambda: within(session.regenerate, cookie),
                lambda: saving(session, None, user='new')):
        answer = as_nobody(use)
        assert_refused(answer)
        assert 'its mode keeps it out: chmod -R u+rwX' in answer.log
    if rights:
        assert as_nobody(lambda: within(session.copy, cookie)).value == {'user': 'joe'}
        assert as_nobody(lambda: saving(session, cookie, user='ann')).value is True
    else:
        for action in session.copy, session.save, session.purge:
            assert_refused(as_nobody(lambda: within(lambda: session.copy() and action(), cookie)))
    for directory in session.store.directory, shard:
        os.chmod(directory, 0o700)
    user = as_nobody(lambda: within(session.copy, cookie)).value['user']
    assert user == ('ann' if rights else 'joe')
    assert len(records(session.store.directory)) == 1


def test_the_log_names_a_directory_that_root_has_left(nobodys):
    if os.geteuid():
        pytest.skip('needs root, whose files another user finds: run as root')
    session = Session(SECRET, nobodys + '/sessions', mode='file')
    cookie = session.issue_cookie({'user': 'joe'})  # as root
    answer = as_nobody(lambda: saving(session, None, user='ann'))
    assert_refused(answer)
    assert '%s belongs to user 0' % session.store.directory in answer.log
    assert 'chown -R %d' % NOBODY in answer.log
    assert reading(session, cookie) == {'user': 'joe'}


@pytest.mark.parametrize('umask', [0, 0o777, 0o027], ids=oct)
def test_rights_are_ours_whatever_the_umask(nobodys, umask):
    session = Session(SECRET, nobodys + '/var/app/sessions', mode='file')

    def use():
        os.umask(umask)
        cookie = session.issue_cookie({'user': 'joe'})
        assert saving(session, cookie, big=blob(1, 10_000)).value
        assert within(session.regenerate, cookie).code == 200
        assert within(lambda: session.login('joe'), None).code == 200
        return [stat.filemode(os.lstat(path).st_mode) for path in
                [nobodys + '/var', nobodys + '/var/app', session.store.directory,
                 *glob.glob(session.store.directory + '/*'), *records(session.store.directory)]]

    assert set(in_child(use, NOBODY)) == {'drwx------', '-rw-------'}


def test_foreign_and_old_files_in_the_directory_are_left_alone(filed):
    shard = os.path.join(filed.store.directory, 'ab')
    os.makedirs(shard)
    old_format = pickle.dumps({'user': 'joe', 'expires': 1})
    foreign = {os.path.join(filed.store.directory, name): old_format for name in (
        'README', 'f' * 64, os.urandom(16).hex(), 'bsession', '.hidden')}
    foreign.update((os.path.join(shard, name), content) for name, content in [
        ('notes.txt', b'mine'), ('0' * 62, old_format), ('1' * 62, b'text'),
        ('2' * 62, b'BSE1' + bytes(100)), ('3' * 62 + '.bak', b'BSess'), ('4' * 62, b'\0')])
    for path, content in foreign.items():
        write_file(path, content)
        os.utime(path, (1, 1))
    os.makedirs(os.path.join(shard, '5' * 62, 'deep'))
    for _ in range(5):
        saving(filed, filed.issue_cookie({'n': 1}), n=2)
    assert filed.store.sweep(time.time()) == (0, 5)
    assert {path: content_of(path) for path in foreign} == foreign
    assert os.path.isdir(os.path.join(shard, '5' * 62, 'deep'))


def test_a_removed_directory_is_made_again(filed):
    cookie = filed.issue_cookie({'user': 'joe'})
    shutil.rmtree(filed.store.directory)
    assert reading(filed, cookie) == {}
    assert filed.sweep() == 0
    cookie = filed.issue_cookie({'user': 'ann'})
    assert reading(filed, cookie) == {'user': 'ann'}

    def removed_meanwhile():
        with filed:
            filed['n'] = 1
            shutil.rmtree(filed.store.directory)

    assert within(removed_meanwhile, cookie).code == 200
    assert reading(filed, cookie) == {}
    assert saving(filed, cookie, user='new').value is True


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made, contextlib.ExitStack() as stack:
        old = os.getcwd()  # a socket's path must be short
        stack.callback(os.chdir, old)
        os.chdir(os.path.dirname(path))
        made.bind(os.path.basename(path))


def make_giant(path, head=b''):
    write_file(path, head)
    os.truncate(path, 3 << 30)


def make_device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except OSError:
        pytest.skip('needs the right to make a device: run as root')


#: Ways to put something else in a record's place, given its path and content.
INTRUDERS = {
    'directory': lambda path, content: os.mkdir(path),
    'full directory': lambda path, content: os.makedirs(path + '/full'),
    'FIFO': lambda path, content: os.mkfifo(path),
    'socket': lambda path, content: make_socket(path),
    'device': lambda path, content: make_device(path),
    'symlink to a copy': lambda path, content: (write_file(path + 'x', content),
                                                os.symlink(path + 'x', path)),
    'dangling symlink': lambda path, content: os.symlink(path + 'x', path),
    'symlink to itself': lambda path, content: os.symlink(path, path),
    'empty file': lambda path, content: write_file(path, b''),
    'text': lambda path, content: write_file(path, b'Dear diary,\n' * 1000),
    'pickle': lambda path, content: write_file(path, pickle.dumps({'user': 'mallory'})),
    'sparse giant': lambda path, content: make_giant(path),
    'sparse giant that begins like ours': lambda path, content: make_giant(path, content),
    # magic, number, checksum, end, offset and length of the record, the rest zeros
    'sparse giant that says it is long': lambda path, content: make_giant(
        path, content[:8] + struct.pack('>QIdII', 9, 0, 1e10, 4096, 3 << 30)),
    'sparse giant that says it is nearly too long': lambda path, content: make_giant(
        path, content[:8] + struct.pack('>QIdII', 9, 0, 1e10, 4096, 60 << 20)),
}


@pytest.mark.parametrize('kind', INTRUDERS)
def test_something_else_in_place_of_a_record_is_absent_and_logged(filed, kind, caplog):
    cookie = filed.issue_cookie({'user': 'joe'})
    path = path_of(filed, cookie)
    content = content_of(path)
    os.unlink(path)
    INTRUDERS[kind](path, content)
    before = os.lstat(path)

    def use():
        import resource
        with open('/proc/self/statm') as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 28),) * 2)  # no gigabytes
        signal.alarm(20)  # and no waiting for a writer of the FIFO
        seen = reading(filed, cookie)
        return seen, [saving(filed, cookie).code, counting(filed, cookie).code, filed.sweep()]

    use = use if sys.platform == 'linux' else lambda: (reading(filed, cookie), [200, 200, 0])
    expected = {'user': 'joe'} if kind == 'sparse giant that begins like ours' else {}
    assert in_child(use) == (expected, [200, 200, 0])
    assert os.path.lexists(path) and os.lstat(path).st_ino == before.st_ino
    if not expected:
        reading(filed, cookie)
        if kind != 'empty file':  # which may be one that is just made
            assert 'treated as absent' in caplog.text
        answer = within(filed.purge, cookie)  # a log-out must work in any case
        assert answer.code == 200 and 'Max-Age=0' in answer.header('Set-Cookie')[0]
    if kind == 'symlink to a copy':
        assert content_of(path + 'x') == content


###############################################################################
# Sizes #######################################################################
###############################################################################

def test_records_grow_to_a_megabyte_and_shrink(filed):
    cookie = filed.issue_cookie({'blob': b''})
    path = path_of(filed, cookie)
    inode = os.stat(path).st_ino
    sizes = [1 << bits for bits in range(21)] + [1, 1_000_000, 5, 700, 3000, 3000, 2, 2]
    for size in sizes:
        assert saving(filed, cookie, blob=os.urandom(size)).value is True
        assert len(reading(filed, cookie)['blob']) == size
        assert os.path.getsize(path) < 8 << 20
    assert os.stat(path).st_ino == inode


def test_a_session_that_was_big_and_is_small_again_is_back_in_one_page(filed):
    cookie = filed.issue_cookie({'blob': b''})
    path = path_of(filed, cookie)
    assert (os.path.getsize(path), os.stat(path).st_blocks * 512) == (4096, 4096)
    for size in 3_000_000, 5_000, 2_000_000:
        saving(filed, cookie, blob=os.urandom(size))
    assert os.path.getsize(path) > 2_000_000
    for number in range(3):
        saving(filed, cookie, blob=b'small', n=number)
    assert (os.path.getsize(path), os.stat(path).st_blocks * 512) == (4096, 4096)
    assert reading(filed, cookie) == {'blob': b'small', 'n': 2}


def test_a_session_beyond_any_reason_is_refused_by_its_size(filed):
    cookie = filed.issue_cookie({'user': 'joe'})

    def grow():
        filed['blob'] = bytes(65 << 20)
        with pytest.raises(SessionError, match='too big'):
            filed.save()
        del filed['blob']

    assert within(grow, cookie).code == 200
    assert reading(filed, cookie) == {'user': 'joe'}


###############################################################################
# System calls ################################################################
###############################################################################

def strace():
    """ Return the path of strace, if it may trace here. """
    path = tool('strace', get='apt-get install strace')
    if subprocess.run([path, '-o', os.devnull, 'true'], stderr=subprocess.DEVNULL).returncode:
        missing('the right to trace a process: allow ptrace')
    return path


FAILING = r'''
import sys
from visits import reading, records, within
from bottle_session import Session

session = Session('x' * 32, sys.argv[1], mode='file')
cookie = session.issue_cookie({'user': 'joe'})
answer = within(session.purge, cookie)
print(answer.code, answer.header('Set-Cookie'), reading(session, cookie),
      records(session.store.directory))
'''


def test_a_directory_that_cannot_be_synced_after_a_log_out_is_logged(tmp_path):
    """ The file is gone, so it cannot be said that nothing was done. """
    done = run('import os, sys; os.execv(sys.argv[1], sys.argv[1:])', strace(), '-f', '-o',
               str(tmp_path / 'trace'), '-e', 'inject=fsync:error=EIO', sys.executable, '-c',
               FAILING, str(tmp_path / 'sessions'), env=TESTS)
    assert done.returncode == 0, done.stdout
    assert 'EIO' in (tmp_path / 'trace').read_text()
    said, answer = done.stdout.splitlines()
    assert 'is changed, but a power cut may undo' in said and 'Input/output error' in said
    assert answer.startswith('200 ') and 'Max-Age=0' in answer and answer.endswith('{} []')


SHRINKING = r'''
import sys
from visits import cookie_of, reading, saving, within
from bottle_session import Session

session = Session('x' * 32, sys.argv[1], mode='file')
cookie = session.issue_cookie({'user': 'joe', 'blob': b'x' * 9999})
for n in range(3):
    saving(session, cookie, blob=n)
print(reading(session, cookie_of(within(session.regenerate, cookie))), reading(session, cookie))
'''


def test_a_file_that_cannot_be_cut_is_saved_all_the_same(tmp_path):
    """ A full disk refuses that where files share blocks. """
    done = run('import os, sys; os.execv(sys.argv[1], sys.argv[1:])', strace(), '-f', '-o',
               str(tmp_path / 'trace'), '-e', 'inject=ftruncate:error=EDQUOT', sys.executable,
               '-c', SHRINKING, str(tmp_path / 'sessions'), env=TESTS)
    assert done.returncode == 0 and 'EDQUOT' in (tmp_path / 'trace').read_text()
    assert done.stdout.strip() == "{'user': 'joe', 'blob': 2} {}"


TRACED = r'''
import os, time
from bottle_session import Session
from visits import cookie_of, counting, reading, saving, within

now = time.time()
time.time = lambda: now  # so that requests clean up once, at the first save
session = Session('x' * 32, 'sessions', mode='file')
cookie, cookies = session.issue_cookie({'n': 0, 'other': 1}), []
for shard in range(256):
    os.makedirs('sessions/%02x' % shard, exist_ok=True)
saving(session, cookie, n=1), reading(session, cookie)

def step(name, call):
    os.path.exists('/step/' + name)
    call()

step('untouched', lambda: within(lambda: session.connect(), cookie))
step('unknown', lambda: reading(session, {'bsession': 'A' * 43}))
step('read', lambda: reading(session, cookie))
step('same', lambda: saving(session, cookie, other=1))
step('save', lambda: saving(session, cookie, n=2))
step('with', lambda: counting(session, cookie))
step('first', lambda: saving(session, None, n=1))
for size in 5000, 1, 5001:
    step('%d B' % size, lambda: saving(session, cookie, blob=bytes(size)))
step('regenerate', lambda: cookies.append(cookie_of(within(session.regenerate, cookie))))
step('purge', lambda: within(session.purge, cookies[0]))
step('login', lambda: within(lambda: session.login('joe')))
step('revoke', lambda: session.revoke('joe'))
step('end', lambda: None)
'''


@pytest.fixture(scope='module')
def steps(tmp_path_factory):
    """ The system calls of each step of TRACED: lists of names, with a + where a file is
        opened for writing, and what was synced: {step: (calls, synced)}. """
    place, steps, step = tmp_path_factory.mktemp('traced'), {}, None
    subprocess.run([strace(), '-f', '-y', '-o', 'trace', sys.executable, '-c', TRACED], check=True,
                   cwd=place, env={**os.environ, **TESTS})
    for line in (place / 'trace').read_text().splitlines():
        call = re.match(r'\d+ +(\w+)\((.*)', line)
        if call and '/step/' in line:
            step = steps[line.split('/step/')[1].split('"')[0]] = [], []
        elif call and step and call[1] in ('fsync', 'fdatasync'):
            file = call[2].split('<')[1].split('>')[0]
            step[1].append('directory' if os.path.isdir(file) else 'file')
        elif call and step and call[1] not in (
                'getrandom', 'brk', 'mmap', 'munmap', 'madvise', 'futex', 'rt_sigaction',
                'gettimeofday', 'clock_gettime', 'getpid'):
            name = call[1].replace('64', '').replace('openat', 'open')
            step[0].append({'newfstatat': 'fstat'}.get(name, name)
                           + ('+' if 'O_RDWR' in line or 'O_WRONLY' in line else ''))
    return steps


def test_system_calls_are_as_few_as_promised(steps):
    calls = {step: calls for step, (calls, _) in steps.items()}
    assert calls['untouched'] == []
    assert calls['unknown'] == ['open']
    assert calls['read'] == calls['same'] == ['open', 'read', 'close']
    save = ['open+', 'flock', 'pread', 'pwrite', 'flock', 'close']
    assert calls['save'] == calls['read'] + save
    assert calls['with'] == save[:3] + ['fstat'] + save[3:]  # its end looks if it is still there
    assert calls['first'] == save[:2] + ['fstat'] + save[3:]  # the umask may have set its mode


def test_new_ids_log_outs_and_log_ins_are_durable_and_saves_are_quick(steps):
    synced = {step: synced for step, (_, synced) in steps.items()}
    assert [synced[step] for step in ('save', 'with', 'first', '5000 B', '1 B')] == [[]] * 5
    assert synced['5001 B'] == ['file']  # a power cut could tear the older one and this one
    new = ['file', 'directory', 'directory']
    assert synced['regenerate'] == new + ['file']  # the new one, then the mark in the old one
    assert synced['purge'] == ['directory']
    assert synced['login'] == new + new  # the list, then the session
    assert synced['revoke'][0] == 'directory'

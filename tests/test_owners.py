# flake8: noqa: F401,F811
""" Log-ins, lists and new ids where something fails or happens in between. """

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from harness import (  # noqa: E402
    DAY, SECRET, Boom, Browser, clock, elsewhere, held, known, logged, nothing_secret_is_logged,
    place, redis_url, saves, session, stores)

import bottle_session  # noqa: E402
from bottle_session import StoreError  # noqa: E402

OTHER = 'another secret of more than sixteen bytes'


def log_in(session, cookies=(), note='', **data):
    visitor = Browser(session, cookies)
    visitor.do(lambda: session.update(data) or session.login('joe', note))
    return visitor


def test_expired_log_ins_count_neither_for_max_logins_nor_in_revoke(place, clock):
    session = place(days=1, max_logins=2)
    long = Browser(session)
    long.do(lambda: setattr(session, 'days', 365) or session.login('joe'))
    clock.tick(3600)
    log_in(session)
    clock.tick(3 * DAY)
    new = log_in(session)
    assert long.do(lambda: session.owner) == new.do(lambda: session.owner) == 'joe'
    assert session.revoke('joe') == 2


def test_a_list_outlives_its_session_also_while_its_days_get_fewer(place, clock):
    session = place(watched=True)
    visitor = log_in(session)

    def shorten():
        session.days = 1 / 24
        session.store.at('replace', 2, lambda: session.store.failing.add('replace'))
        with pytest.raises(StoreError):
            session.save()  # the list is written, the session is not

    visitor.do(shorten)
    session.store.failing.clear()
    clock.tick(DAY)
    assert len(session.logins('joe')) == 1 == session.revoke('joe')


def test_a_save_that_comes_too_late_leaves_no_entry_in_the_list(place, clock):
    session = place()
    visitor = log_in(session)
    clock.tick(5 * DAY)  # the use is due, and would be listed
    assert visitor.do(lambda: (session.update(x=1), visitor.meanwhile(session.purge),
                               session.save())[-1]) is False
    assert not place.records(b'l')


@stores('file', 'own', 'redis')
def test_what_revoke_leaves_is_absent_and_confirms_no_guess_of_the_secret(place, caplog):
    session = place()
    visitor = log_in(session)
    name, = place.records()
    place.store().remove(name)
    assert session.logins('joe') == []
    session.revoke('joe')
    assert visitor.data() == {} and not logged(caplog, 'damaged')
    left = place.everything()
    assert set(left) == {name}
    with pytest.raises(Exception, match='damaged'):
        session._seal.open(name, left[name])


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError, Boom])
def test_a_new_id_that_is_interrupted_leaves_a_cookie_that_works(place, error, monkeypatch):
    session = place(watched=True)
    visitor = known(session, a=1)
    replace = type(session.store).replace

    def interrupted(*args):
        replace(*args)
        monkeypatch.undo()
        raise error()

    def code():
        monkeypatch.setattr(type(session.store), 'replace', interrupted)
        with pytest.raises(error):
            session.regenerate()

    visitor.do(code)
    assert visitor.data() == {'a': 1}


@pytest.mark.parametrize('method', ['create', 'replace'])
def test_a_log_in_that_fails_is_not_saved_under_the_old_id(place, method):
    session = place(watched=True)
    visitor = known(session, a=1).tab(plugin=True)
    session.store.failing = {method}
    answer = visitor.get(code=lambda: session.update(user='joe') or session.login('joe'))
    session.store.failing = set()
    assert answer.status == 503 and not visitor.told() and visitor.data() == {'a': 1}


def test_a_busy_session_is_waited_for_once(place, caplog):
    session = place(lock_timeout=0.2)
    visitor = known(session, a=1)
    with held(visitor):
        answer = visitor.tab(plugin=True).get(
            code=lambda: session.update(b=2) or session.login('x'))
    assert answer.status == 503 and session.logins('x') == [] and visitor.data() == {'a': 1}
    assert len(logged(caplog, 'holds this session')) == 1


@stores('file', 'own', 'redis')
@pytest.mark.parametrize('nth', [1, 2, 3])
@pytest.mark.parametrize('use', ['save', 'regenerate'])
@pytest.mark.parametrize('mover', [0, 1])
def test_a_session_that_moves_between_lists_is_never_missed(place, nth, use, mover):
    two = [place(secret=[SECRET, OTHER]), place(secret=[OTHER, SECRET])]
    visitor = log_in(two[1 - mover])
    first = place(secret=[SECRET, OTHER], watched=True)
    moves = {'save': saves(two[mover], a=1), 'regenerate': two[mover].regenerate}[use]
    # One process revokes; between two lists that it reads, the other one moves the session.
    first.store.at('load', nth, lambda: elsewhere(visitor.tab(two[mover]).do, moves))
    assert first.revoke('joe') == 1
    assert visitor.do(lambda: two[0].owner) is None and not place.records()


def test_a_new_session_that_could_not_be_undone_stays_listed(place, caplog):
    session = place(watched=True)
    visitor = log_in(session)

    def code():
        session.store.at('replace', 2, lambda: session.store.failing.update(('replace', 'remove')))
        with pytest.raises(StoreError):
            session.regenerate()

    visitor.do(code)
    session.store.failing.clear()
    assert logged(caplog, 'is left until it expires')
    assert len(session.logins('joe')) == len(place.records()) == session.revoke('joe')


def test_a_block_whose_session_was_ended_before_knows_no_owner_any_more(place):
    session = place()
    visitor = log_in(session, a=1)

    def code():
        assert session.owner == 'joe'
        visitor.meanwhile(session.purge)
        with session:
            assert (session.owner, session.id, session.copy()) == (None, None, {})

    visitor.do(code)


@stores('own')
@pytest.mark.parametrize('method, act', [
    ('remove', lambda session: session.revoke('joe')),
    ('replace', lambda session: log_in(session))])
def test_a_store_that_never_does_it_is_an_error_at_last(session, method, act):
    log_in(session)
    setattr(session.store, method, lambda *args: None)
    with pytest.raises(StoreError):
        act(session)


def test_a_new_id_that_fails_in_a_block_keeps_its_lock(place):
    session = place(watched=True, lock_timeout=0.1)
    visitor, late = known(session, n=1), place(lock_timeout=0.1)

    def code():
        with session:
            session.store.failing = {'create'}
            with pytest.raises(StoreError):
                session.regenerate()
            session.store.failing = set()
            with pytest.raises(bottle_session.SessionBusy):
                visitor.meanwhile(saves(late, n=2), late)
            session['n'] += 1

    visitor.do(code)
    assert visitor.data() == {'n': 2}


def test_a_log_out_that_fails_half_way_keeps_the_session_that_is_seen(place):
    session = place(watched=True)
    mine, other = known(session, a=1), known(session, b=2)
    both = 'bsession=%s; bsession=%s' % (mine.cookies['bsession'], other.cookies['bsession'])

    def code():
        session.get('a')
        session.store.at('remove', 2, lambda: session.store.failing.add('remove'))
        with pytest.raises(StoreError):
            session.purge()

    Browser(session).do(code, HTTP_COOKIE=both)
    session.store.failing = set()
    assert mine.data() == {'a': 1}


def test_a_log_in_after_the_end_of_a_session_has_nothing_of_its_options(place):
    session = place()
    visitor = known(session, a=1)
    visitor.do(lambda: setattr(session, 'days', 365) or session.save())
    assert visitor.do(lambda: (session.get('a'), visitor.meanwhile(session.purge),
                               session.login('ann'), session.days)[-1]) == 30


@stores('file')
@pytest.mark.parametrize('kind', ['FIFO', 'directory', 'symlink'])
@pytest.mark.parametrize('record', [b's', b'l'])
def test_log_out_everywhere_and_log_in_get_past_what_is_no_file(place, kind, record):
    session = place()
    log_in(session)
    name, = place.records(record)
    path = place.path(name)
    os.unlink(path)
    {'FIFO': os.mkfifo, 'directory': os.mkdir,
     'symlink': lambda path: os.symlink(os.devnull, path)}[kind](path)
    assert session.revoke('joe') == 0
    log_in(session)
    assert len(session.logins('joe')) >= 1 and session.revoke('joe') >= 1


class Damaged(bottle_session.MemoryStore):
    """ Says b'' for what is damaged, as `Store.load` has it, and keeps the name. """

    keeps_objects = False
    damaged = ''

    def load(self, name):
        return b'' if name == self.damaged else super().load(name)

    def remove(self, name, version=None):
        self.damaged = '' if name == self.damaged else self.damaged
        return super().remove(name, version)


@pytest.mark.parametrize('kind', [b's', b'l'])
def test_what_a_store_says_is_damaged_holds_up_nobody(kind):
    store = Damaged()
    session = bottle_session.Session(SECRET, mode=store)
    log_in(session)
    store.damaged = next(name for name in list(store._records)
                         if store.load(name)[:1] in (kind, (kind,)))
    assert session.revoke('joe') == 0
    log_in(session)
    assert session.revoke('joe') >= 1


@stores('memory', 'own')
@pytest.mark.parametrize('days, nth', [(None, 1), (3, 1), (3, 2), (3, 3)])
def test_a_list_never_ends_before_a_session_whose_days_two_requests_change(
        place, clock, days, nth):
    """ One request records a use or shortens the session; another one, which gives it 50 days,
        comes before its nth write. """
    session = place(watched=True)
    visitor = Browser(session)
    visitor.do(lambda: session.login('joe'))
    other = visitor.tab()

    def lengthen():
        session.days = 50
        session.save()

    def code():
        if days:
            session.days = days
        return session.save() if days else session.owner

    clock.tick(2 * DAY)
    session.store.at('replace', nth, lambda: elsewhere(other.do, lengthen))
    visitor.do(code)
    lives = visitor.do(lambda: session.days)
    clock.tick((lives - 1) * DAY)
    assert len(session.logins('joe')) == 1
    assert visitor.do(lambda: session.owner) == 'joe' and session.revoke('joe') == 1


@stores('memory', 'own')
def test_a_session_that_is_revoked_while_its_days_get_fewer_is_no_error(place):
    session = place(watched=True)
    visitor, watch, other = log_in(session), session.store.at, place()

    def shorten():
        session.days = 1
        watch('replace', 2, lambda: watch('load', 1, lambda: elsewhere(other.revoke, 'joe')))
        assert session.save()

    visitor.do(shorten)
    assert not visitor.data() and not place.records(b'l')


def test_a_save_that_another_request_made_unneeded_leaves_the_session_listed(place, clock):
    session = place()
    visitor = log_in(session)
    clock.tick(5 * DAY)  # the use is due, and will be listed
    assert visitor.do(lambda: (session.update(x=1), visitor.meanwhile(saves(session, x=1)),
                               session.save())[-1]) is False
    assert len(session.logins('joe')) == 1


@stores('memory', 'file')
def test_log_ins_at_once_leave_as_many_as_may_be(place):
    session, start = place(max_logins=2), threading.Barrier(8)

    def code():
        start.wait(30)
        session.login('joe')

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            for job in [pool.submit(Browser(session).do, code) for _ in range(8)]:
                job.result()
        assert len(place.records()) == len(session.logins('joe')) == 2


@stores('memory', 'own')
def test_a_log_in_that_is_ended_before_it_trims_the_list_is_no_error(place):
    session = place(watched=True, max_logins=1)
    others = bottle_session.Session(SECRET, mode=session.store)

    def ended():
        assert session.revoke('joe') == 1
        log_in(others)
        log_in(others)

    visitor = Browser(session)
    session.store.at('load', 2, lambda: elsewhere(ended))
    visitor.do(lambda: session.login('joe'))
    assert visitor.last.status == 200 and len(session.logins('joe')) == 2


@stores('memory', 'own')
def test_days_that_the_list_does_not_learn_of_are_saved_and_told(place, caplog):
    session = place(watched=True)
    visitor = log_in(session)

    def code():
        session.days = 3
        session.store.at('replace', 3, lambda: session.store.failing.add('replace'))
        assert session.save()

    visitor.do(code)
    assert visitor.told() and logged(caplog, 'listed for longer than it lives')
    session.store.failing.clear()
    assert visitor.do(lambda: session.days) == 3


@stores('own')
def test_times_from_a_clock_that_starts_at_zero_are_times(place):
    session = place()
    session.clock = lambda: 0.0
    visitor = log_in(session)
    assert visitor.do(lambda: session.created) == visitor.do(lambda: session.used)
    assert visitor.do(lambda: session.created).year == 1970


def test_a_new_id_has_the_place_of_its_log_in_in_the_list(place):
    """ An older session gets a new id after a log-in was listed, and before that ends others. """
    session = place(max_logins=1, watched=True)
    old, new = log_in(session), Browser(session)
    session.store.at('create', 1, lambda: elsewhere(old.do, session.regenerate))
    new.do(lambda: session.login('joe'))
    assert new.do(lambda: session.owner) == 'joe'
    assert len(session.logins('joe')) == len(place.records()) == 1


@pytest.mark.parametrize('nth', [1, 2, 3])
def test_two_log_ins_at_once_leave_one_whatever_their_order(place, nth):
    session = place(max_logins=1, watched=True)
    log_in(session)
    others = bottle_session.Session(SECRET, mode=session.store, max_logins=1)
    session.store.at('create', nth, lambda: elsewhere(log_in, others))
    visitor = log_in(session)
    assert visitor.last.status == 200
    assert len(session.logins('joe')) == len(place.records()) == 1


@pytest.mark.parametrize('nth', [3, 4])
def test_revoke_others_spares_this_session_under_a_new_id(place, nth):
    session = place(watched=True)
    mine, other = log_in(session), log_in(session)
    tab = mine.tab()
    session.store.at('load', nth, lambda: elsewhere(tab.do, session.regenerate))
    assert mine.do(session.revoke_others) == 1
    assert tab.do(lambda: session.owner) == 'joe' and other.do(lambda: session.owner) is None


def test_a_session_that_is_ended_by_its_id_is_ended_under_its_next_one(place):
    session = place(watched=True)
    visitor, other = log_in(session), log_in(session)
    id = visitor.id()
    session.store.at('load', 2, lambda: elsewhere(visitor.do, session.regenerate))
    assert session.revoke('joe', id) == 1
    assert visitor.do(lambda: session.owner) is None and other.do(lambda: session.owner) == 'joe'


@stores('file', 'own', 'redis')
def test_the_lists_of_two_secrets_agree_on_the_longer_life(place, clock):
    """ While a request moves a session to the newer secret, another one gives it 60 days. """
    old, session = place(secret=OTHER), place(secret=[SECRET, OTHER], watched=True)
    visitor = log_in(old)
    other = visitor.tab(session)

    def lengthen():
        session.days = 60
        session.save()

    session.store.at('load', 2, lambda: elsewhere(other.do, lengthen))
    visitor.tab(session).do(saves(session, a=1))
    clock.tick(40 * DAY)
    assert visitor.do(lambda: old.owner) is None
    assert other.do(lambda: session.owner) == 'joe' and len(session.logins('joe')) == 1

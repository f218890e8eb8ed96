# flake8: noqa: F401,F811
""" What bottle_session promises, in one process and in the order of its sections. A test is
    named after the section and the promise (``pytest -k test_cookie``), and runs on each store
    if it uses one. The clock is moved, nobody sleeps; requests go through wsgiref's validator.
    What needs a process, a server, a fault or a browser is in `tests/`, where `harness.py` has
    the visitors and the stores of this file.
"""

import collections
import contextlib
import copy
import datetime
import decimal
import enum
import gc
import inspect
import io
import json
import logging
import marshal
import os
import pickle
import re
import sys
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import bottle
import pytest
from bottle import HTTPError, HTTPResponse, abort, redirect, request, response, static_file

import bottle_session
from bottle_session import Session, SessionBusy, SessionError, StoreError

HERE, FILE = os.path.split(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, 'tests'))

from harness import (  # noqa: E402
    Boom, Browser, DAY, ID, METHODS, NEWER, OLDER, Own, Quit, SECRET, Thing, Watched, adding,
    cases, clock, elsewhere, held, known, logged, make_app, nothing_secret_is_logged, place,
    raises, redis_url, saves, sealed_stores, session, stores)


# 1. Object ###################################################################

COMMAND = 'python -m bottle_session secret'

WRONG = [  # argument, values, error, words beside the argument's name, other arguments
    ('secret', ['', b'', [], [SECRET, '']], ValueError, [COMMAND], {}),
    ('secret', [None, 5, [SECRET, 5]], TypeError, ['str', COMMAND], {}),
    ('sessions_dir', [5, None], TypeError, ['str'], {}),
    ('sessions_dir', ['', __file__], ValueError, ['directory'], dict(mode='file')),
    ('cookie_name', [5], TypeError, ['str'], {}),
    ('cookie_name', ['', 'a b', 'a;b', 'a=b', 'a\r\nb', 'käse'], ValueError, ['letters'], {}),
    ('cookie_name', ['__Host-id', '__Secure-id'], ValueError, ['secure=True'], {}),
    ('cookie_name', ['__Host-id'], ValueError, ['path'], dict(secure=True, path='/x')),
    ('cookie_name', ['__Host-id'], ValueError, ['domain'], dict(secure=True, domain='a.b')),
    ('mode', ['disk', '', None, 7, Own, 'http://x/', 'Memory'], ValueError,
     ["'memory'", "'file'", 'redis://', 'Store'], {}),
    ('days', [0, -1, float('nan'), float('inf')], ValueError, ['greater than 0'], {}),
    ('days', ['30', None, True], TypeError, ['number'], {}),
    ('max_days', [0, -0.5], ValueError, ['greater than 0'], {}),
    ('max_days', ['1', False], TypeError, ['number'], {}),
    ('permanent', [None, 1, 'no'], (TypeError, ValueError), ['True or False'], {}),
    ('max_logins', [0, -3], ValueError, ['1 or more'], {}),
    ('max_logins', [1.5, '3', True], TypeError, ['whole number'], {}),
    ('secure', ['yes', 1], ValueError, ['True or False'], {}),
    ('httponly', ['no', None], ValueError, ['True or False'], {}),
    ('samesite', ['loose', True, ''], ValueError, ["'lax'", "'strict'", "'none'"], {}),
    ('samesite', ['none', 'None'], ValueError, ['secure=True'], dict(secure=False)),
    ('partitioned', [1], ValueError, ['True or False'], {}),
    ('partitioned', [True], ValueError, ["samesite='none'", 'secure=True'], dict(secure=True)),
    ('path', ['', 'shop', '/a;b', '/a\r\nX: y', None], ValueError, ["'/'"], {}),
    ('domain', ['a;b', '', 'bücher.example', 5], ValueError, ['host name', 'xn--'], {}),
    ('lock_timeout', [-1, float('nan'), '10', None], ValueError, ['seconds'], {}),
    ('serializer', [None, object()], TypeError, ['dumps', 'loads'], {}),
]


@cases('argument, values, error, words, others', WRONG)
def test_object_names_the_wrong_argument_and_the_remedy(argument, values, error, words, others):
    for value in values:
        with pytest.raises(error) as caught:
            Session(**{'secret': SECRET, argument: value, **others})
        assert all(word in str(caught.value) for word in [argument, *words]), (value, caught)


def test_object_has_the_arguments_and_defaults_that_are_documented():
    parameters = dict(inspect.signature(Session).parameters)
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ['secret', 'sessions_dir', 'cookie_name', 'mode', 'days']
    assert parameters.pop('secret').default is inspect.Parameter.empty
    assert {name: p.default for name, p in parameters.items()} == dict(
        sessions_dir='./sessions', cookie_name='bsession', mode='memory', days=30, max_days=None,
        permanent=True, secure=None, httponly=True, samesite='lax', path='/', domain=None,
        partitioned=False, lock_timeout=10.0, max_logins=100, serializer=pickle)


@cases('arguments, words', [
    (['your-secret'], COMMAND), ([[SECRET, b'fifteen bytes !']], COMMAND),
    ([SECRET, 'file'], "mode='file'"), ([SECRET, '/var/lib/sessions'], "mode='file'")])
def test_object_warns_of_what_is_easily_done_wrong(arguments, words):
    with pytest.warns(UserWarning, match=words) as caught:
        Session(*arguments)
    assert caught[0].filename == __file__ and len(caught) == 1


def test_object_made_while_a_request_runs_and_a_second_one_of_its_cookie_are_told_of(place):
    one, two = place(), place()

    def code():
        with pytest.warns(UserWarning, match='top level') as caught:
            Session(SECRET)
        assert caught[0].filename == __file__
        one['a'] = 1
        with pytest.raises(RuntimeError, match="'bsession'.*cookie_name"):
            two['a'] = 2
    Browser(one).do(code)


@cases('name, words', [('user', r"session\['user'\] = "), ('owner', 'login'), ('_x', 'all vis')])
def test_object_has_no_attributes_for_what_belongs_into_the_data(name, words):
    session = Session(SECRET)

    def refused():
        with pytest.raises(AttributeError, match=words):
            setattr(session, name, 'joe')
        assert name == 'owner' or not hasattr(session, name)
    refused()
    Browser(session).do(refused)
    session.lock_timeout, session.clock = 0.5, lambda: 1e9  # which it has
    with pytest.raises(ValueError, match='seconds'):
        session.lock_timeout = -1
    assert session.lock_timeout == 0.5 and session.clock() == 1e9


def test_object_is_made_without_its_server_and_without_its_directory(redis_url, tmp_path):
    for url in 'redis', 'redis://:pw@localhost:1', 'rediss://x', 'valkey://x', 'unix:///no/such':
        session = Session(SECRET, mode=url)
        assert not session.store.keeps_objects and ':pw' not in repr(session)
    session = Session(SECRET, tmp_path / 'a' / 'b', mode='file')
    Browser(session).do(lambda: session.get('user'))
    assert not os.listdir(tmp_path)
    assert known(session, user='joe') and os.path.isdir(tmp_path / 'a' / 'b')


def test_object_is_equal_only_to_itself_and_to_mappings_with_its_data(place):
    one, two = place(), place(cookie_name='other')
    assert one == one and one != two and not one == two
    assert len({one, two, one}) == 2 and two not in [one] and one != 5 and one != 'x'

    def compare():
        one['a'] = two['a'] = 1
        assert one == {'a': 1} and {'a': 1} == one and one != {'a': 2} and not one != {'a': 1}
        assert one == collections.OrderedDict(a=1)
        assert one == one and one != two and hash(one) != hash(two)
    Browser(one).do(compare)


@sealed_stores
def test_object_keeps_nothing_of_a_visitor(session):
    probes = []

    def code(thing=None):
        session['thing'] = thing or session['thing']
        session.save()
        probes.append(weakref.ref(session['thing']))
    visitor = Browser(session, plugin=True)
    visitor.do(lambda: code(Thing(name='joe')))
    visitor.do(code)
    gc.collect()
    assert len(probes) == 2 and not any(probe() for probe in probes)


def test_object_lives_beside_others_in_one_app(place):
    one, two = place(lock_timeout=0), place(lock_timeout=0, cookie_name='other')
    visitor = Browser(one)

    def both():
        with one as given, two:
            given['a'], two['b'] = 1, 2
        two['c'] = 3
        return one.save(), two.save()
    assert visitor.do(both) == (False, True)
    assert sorted(visitor.cookies) == ['bsession', 'other']
    assert visitor.data(one) == {'a': 1} and visitor.data(two) == {'b': 2, 'c': 3}
    visitor.do(one.purge)
    assert list(visitor.cookies) == ['other'] and visitor.data(two) == {'b': 2, 'c': 3}


# 2. Request ##################################################################


def test_request_data_is_one_dict_throughout(session):
    visitor = known(session, user='joe')

    def code():
        data = session.data
        assert type(data) is dict and json.dumps(data)
        session.data['a'] = 1
        session.data['b'] = 2
        assert session['b'] == 2 == session.data['b'] and data['a'] == 1 and session.save()
        assert elsewhere(visitor.data) == {'user': 'joe', 'a': 1, 'b': 2}
        adding(session)()
        session.regenerate()
        for content in {'d': 4}, session, session.data:
            session.data = content
            assert session.data is data and data == {'d': 4} == session
        session.clear()
        assert session.data is data and data == {}
        session.data = mine = {'e': 5}
        mine['f'] = 6
        return session.save() and session.data is data
    assert visitor.do(code) is True and visitor.data() == {'e': 5}


STEPS = [  # methods and operators of dict, with arguments
    ('__setitem__', 'a', [1]), ('__setitem__', 1, 2), ('__setitem__', (1, 2), None), ('save',),
    ('__getitem__', 'a'), ('__getitem__', 'no'), ('__delitem__', 1), ('__delitem__', 1),
    ('get', 'a'), ('get', 'no'), ('get', 'no', 5), ('setdefault', 'a', 3), ('setdefault', 'b', 3),
    ('setdefault', [], 1), ('__contains__', 'b'), ('__contains__', []), ('update', {'a': 5}),
    ('update', [('d', 1)]), ('update', 5), ('update',), ('__or__', {'e': 1}), ('__or__', 5),
    ('__ior__', {'e': 1}), ('pop', 'a'), ('pop', 'a'), ('pop', 'a', 6), ('pop',), ('save',),
    ('copy',), ('popitem',), ('__setitem__', 'd', 7), ('__len__',), ('popitem',), ('popitem',),
    ('popitem',), ('popitem',), ('popitem',), ('__setitem__', None, 0)]


def test_request_mapping_does_what_dict_does(session):
    visitor, model = Browser(session), {}

    def outcome(mapping, name, args):
        try:
            result = getattr(mapping, name)(*copy.deepcopy(args))
        except Exception as error:
            return type(error), str(error)
        return result if result is not mapping else 'itself'

    def play():
        for name, *args in STEPS:
            assert name == 'save' and session.save() \
                or outcome(session, name, args) == outcome(model, name, args), (name, args)
            assert list(session.items()) == list(model.items()) and bool(session) == bool(model)
            assert [*session.values()] == [*model.values()] and [*session] == [*session.keys()]
            assert list(reversed(session)) == list(reversed(model)) and len(session) == len(model)
        session.save()
    visitor.do(play)
    assert visitor.data() == model == {None: 0}


def test_request_repr_shows_no_data_no_id_no_secret_and_works_anywhere(session):
    visitor = known(session, user='joe')
    for text in repr(session), visitor.do(lambda: session['user'] and repr(session)), str(session):
        assert 'Session' in text and not any(
            word in text for word in ('joe', 'user', SECRET, visitor.cookies['bsession']))


def test_request_save_and_dirty_tell_whether_it_writes(place):
    session = place(watched=True)
    visitor = Browser(session)

    def tells(writes, **data):
        session.update(data)
        assert (session.dirty, session.save(), session.dirty) == (writes, writes, False)
    visitor.do(lambda: (tells(False), tells(True, a=1), tells(False, a=1), session.update(a=2),
                        tells(False, a=1), tells(True, a=2), tells(True, b=[])))
    visitor.do(lambda: (tells(False), session.pop('a'), tells(True), session['b'].append(1),
                        tells(place.kind != 'memory')))
    replaced = 3 + (place.kind != 'memory')
    assert session.store.writes() == ['create'] + ['replace'] * replaced


@cases('name', ['purge', 'clear'])
def test_request_purge_and_clear_end_the_session(place, name):
    session = place()
    visitor = known(session, user='joe')
    late = visitor.tab()

    def code():
        assert session['user'] == 'joe' and getattr(session, name)() is None
        assert session.data == {} and session.id is None and not session.dirty
        return place.everything(), session.save()
    assert visitor.do(code) == ({}, False)
    assert visitor.last.max_age() == 0 and visitor.last.cookie().startswith('bsession=;')
    assert not visitor.cookies and not place.everything() and late.data() == {}
    for stored, use, told in (  # the data were not asked for; there is none; it began just now
            (True, lambda: session.clear(), True), (False, lambda: session.purge(), False),
            (False, lambda: session.update(a=1) or session.save() and session.purge(), True)):
        visitor = known(session, user='joe') if stored else Browser(session)
        visitor.do(use)
        assert not place.everything() and not visitor.cookies and visitor.told() is told


@cases('asked', [False, True])
def test_request_purge_ends_every_session_that_a_cookie_names(place, asked):
    session, older = place(), place(serializer=broken(lambda plain: raises(ValueError('class'))))
    for using in [session, older][:1 + (place.kind != 'memory')]:  # also what it cannot load
        visitors = known(session, user='joe'), known(session, user='ann')
        both = '; '.join('bsession=%s' % visitor.cookies['bsession'] for visitor in visitors)
        answer = Browser(using).get(
            code=lambda: (asked and using.get('user'), using.purge())[1], HTTP_COOKIE=both)
        assert not place.everything() and answer.max_age() == 0


def test_request_a_session_that_is_saved_empty_stays_with_its_id(session):
    visitor = known(session, user='joe')
    id = visitor.id()
    visitor.do(lambda: session.data.clear() or session.save())
    assert not visitor.told() and (visitor.data(), visitor.id()) == ({}, id)
    assert visitor.do(saves(session, a=1)) is True and visitor.id() == id


def test_request_regenerate_gives_a_new_id_and_the_old_is_dead_at_once(place):
    session = place()
    visitor = known(session, user='joe')
    late = visitor.tab()

    def code():
        id, data = session.id, session.data
        session['unsaved'] = 1
        session.regenerate()
        assert session.id not in (id, None) and session.data is data and not session.save()
        assert elsewhere(late.data) == {} and len(place.records()) == 1
        session['later'] = 2
        session.save()
        session.regenerate()
        session['unsaved'] = 3
        return session.save()
    assert visitor.do(code) is True and visitor.cookies != late.cookies
    assert visitor.data() == {'user': 'joe', 'unsaved': 3, 'later': 2}
    assert late.data() == {} and len(place.records()) == 1


def test_request_regenerate_stores_a_new_session_and_no_empty_one(place):
    session = place()
    nobody, somebody = Browser(session), Browser(session)
    nobody.do(session.regenerate)
    assert not nobody.told() and not place.everything()
    somebody.do(lambda: session.update(user='joe') or session.regenerate())
    assert somebody.data() == {'user': 'joe'} and len(place.records()) == 1


def moved(session, **data):
    """ Return a visitor whose session got a new id, and a tab that still has the old one. """
    visitor = known(session, **data)
    late = visitor.tab(plugin=True)
    visitor.do(session.regenerate)
    return visitor, late


WRITING = {
    'save': lambda s: s.update(n=1) or s.save(), 'with': lambda s: adding(s)(),
    'plugin': lambda s: s.update(n=1), 'data': lambda s: setattr(s, 'data', {'n': 1}),
    'days': lambda s: (setattr(s, 'days', 3), s.update(n=1), s.save()),
}


@cases('way', list(WRITING))
def test_request_with_a_moved_id_reads_as_empty_stores_nothing_and_sends_no_cookie(place, way):
    session = place()
    visitor, late = moved(session, user='joe')
    before = place.records()
    place.clock.tick(59)
    assert late.do(lambda: (session.copy(), session.id, session.dirty)) == ({}, None, False)
    late.do(lambda: WRITING[way](session) and None)
    assert late.last.status == 200 and not late.told() and place.records() == before
    place.clock.tick(2)
    late.do(lambda: WRITING[way](session) and None)
    assert late.told() and late.data() == {'n': 1} and visitor.data() == {'user': 'joe'}


def test_request_with_a_moved_id_can_begin_anew_on_purpose_and_log_out(session):
    for begin in session.regenerate, lambda: session.login('joe'), session.purge:
        visitor, late = moved(session, user='joe')
        late.do(lambda: session.update(n=1) or begin())
        assert late.told() and late.data() == ({} if begin == session.purge else {'n': 1})
        assert visitor.data() == {'user': 'joe'}


def test_request_with_a_moved_id_beside_a_living_session_is_that_ones(session):
    for order in 1, -1:
        visitor, late = moved(session, user='joe')
        pairs = ['bsession=' + b.cookies['bsession'] for b in (late, visitor)][::order]
        late.do(lambda: session['user'] and session.update(n=1), HTTP_COOKIE='; '.join(pairs))
        assert not late.told() and visitor.data() == {'user': 'joe', 'n': 1}


def test_request_the_mark_of_a_moved_id_holds_no_data_and_no_id(place):
    moved(place(), user='joe' * 500)
    (mark,), (name,) = place.records(b'm').values(), place.records()
    seen = repr([getattr(mark, slot) for slot in getattr(mark, '__slots__', ())]) or repr(mark)
    assert 'joe' not in seen and name not in seen
    assert place.kind == 'memory' or len(mark) < 100


def test_request_id_is_a_public_name_that_changes_with_the_cookie(session):
    visitor = Browser(session)
    assert visitor.do(lambda: session.id or session.update(a=1) or session.id) is None
    visitor = known(session, user='joe')
    id, cookie = visitor.id(), visitor.cookies['bsession']
    assert isinstance(id, str) and id not in cookie and cookie not in id
    assert Browser(session, {'bsession': id}).data() == {}
    assert visitor.do(saves(session, n=1)) and visitor.id() == id
    assert visitor.do(session.regenerate) or visitor.id() not in (id, None)
    assert visitor.do(lambda: session.purge() or session.id) is None is visitor.id()


def test_request_created_and_used_tell_when_the_session_began_and_was_used(session, clock):
    def days():  # after the beginning, of both
        return [time and round((time.timestamp() - began) / DAY) for time in (
            session.created, session.used)]
    began = clock()
    assert Browser(session).do(lambda: session.update(a=1) or days()) == [None, None]
    visitor = known(session, user='joe')
    offsets = visitor.do(lambda: {session.created.utcoffset(), session.used.utcoffset()})
    assert offsets == {datetime.timedelta(0)} and visitor.do(days) == [0, 0]
    clock.tick(2 * DAY)
    assert [visitor.do(days) for _ in range(2)] == [[0, 0], [0, 2]]  # as it was, then as it is
    visitor.do(session.regenerate)
    assert visitor.do(days) == [0, 2]
    assert visitor.do(lambda: session.purge() or days()) == [None, None]


@cases('option, default, value, later', [('days', 30, 90, 0.5), ('permanent', True, False, True)])
def test_request_days_and_permanent_belong_to_the_session(place, option, default, value, later):
    session = place(watched=True)
    visitor, other = known(session, user='joe'), known(session, user='ann')

    def sets(value, changes):
        def code():
            setattr(session, option, value)
            assert getattr(session, option) == value
            return session.dirty, session.save(), session.dirty
        session.store.calls.clear()
        assert visitor.do(code) == (changes, changes, False)
        assert session.store.writes() == ['replace'] * changes and visitor.told() is changes
    sets(default, False)
    sets(value, True)
    assert visitor.last.max_age() == (90 * DAY if option == 'days' else None)
    sets(value, False)
    assert other.do(lambda: getattr(session, option)) == default
    visitor.do(session.regenerate)
    fresh = place()
    assert visitor.tab(fresh).do(lambda: getattr(fresh, option)) == value
    sets(later, True)
    assert visitor.last.max_age() == (DAY / 2 if option == 'days' else 30 * DAY)
    assert visitor.data() == {'user': 'joe'}


def test_request_days_and_permanent_merge_like_keys_and_are_undone_like_keys(session):
    visitor = known(session, user='joe')

    def slow(option, value):
        session['mine'] = value
        setattr(session, option, value)
        visitor.meanwhile(lambda: (setattr(session, 'days', 90), saves(session, theirs=1)()))
        with pytest.raises(Boom), session:
            session.days, session.permanent = 1, not session.permanent
            raise Boom
        return session.save()
    assert visitor.do(lambda: slow('permanent', False)) is True
    assert visitor.do(lambda: (session.days, session.permanent, session.copy())) \
        == (90, False, {'user': 'joe', 'mine': False, 'theirs': 1})
    visitor.do(lambda: slow('days', 7))
    assert visitor.do(lambda: (session.days, session.permanent)) == (7, False)


def test_request_days_and_permanent_alone_begin_no_session(place):
    session = place()
    visitor = Browser(session, plugin=True)

    def code():
        session.days, session.permanent = 90, False
        return session.dirty, session.save(), session.days, session.permanent
    assert visitor.do(code) == (False, False, 90, False)
    assert not place.everything() and not visitor.told()
    visitor.do(lambda: code() and session.update(user='joe'))
    assert visitor.do(lambda: (session.days, session.permanent)) == (90, False)


def test_request_days_and_permanent_refuse_what_the_constructor_refuses(session):
    visitor = known(session, user='joe')
    for option, values, error, *_ in WRONG:
        for value in values if option in ('days', 'permanent') else ():
            with pytest.raises(error, match=option):
                visitor.do(lambda: setattr(session, option, value))
            assert visitor.do(lambda: (session.days, session.permanent)) == (30, True)


USES = {  # what asks for a request: all methods and properties, and these
    '[]': lambda s: s['a'], '[]=': lambda s: s.__setitem__('a', 1), 'in': lambda s: 'a' in s,
    'del': lambda s: s.__delitem__('a'), 'len': len, 'bool': bool, 'iter': list,
    'get': lambda s: s.get('a'), 'pop': lambda s: s.pop('a', None), 'enter': Session.__enter__,
    'setdefault': lambda s: s.setdefault('a', 1), 'update': lambda s: s.update(a=1),
    '|=': lambda s: s.__ior__({'a': 1}), 'equal': lambda s: s == {}, '|': lambda s: s | {},
    'login': lambda s: s.login('joe'), 'set data': lambda s: setattr(s, 'data', {}),
    'set days': lambda s: setattr(s, 'days', 3),
    'set permanent': lambda s: setattr(s, 'permanent', False),
    **{name: lambda s, name=name: getattr(s, name)
       for name in 'data dirty id days permanent created used owner'.split()},
    **{name: lambda s, name=name: getattr(s, name)()
       for name in 'connect save purge clear regenerate explain keys values items popitem copy '
                   'logins revoke_others'.split()}}


def refuses_all(session):
    for name, use in USES.items():
        with pytest.raises(RuntimeError, match='^[^\n]* request [^\n]*$') as caught:
            use(session)
        assert not isinstance(caught.value, SessionError), name
    assert repr(session) and hash(session) and session == session


def test_request_is_needed_for_every_use(session):
    elsewhere(refuses_all, session)             # a thread that never had one
    app = make_app(session, plugin=True)
    app.route('/hook')(saves(session, user='joe'))
    app.add_hook('after_request', lambda: 'hook' in request.path and raises(Boom))
    visitor = Browser(app)

    def served():
        for path, code, status in (
                ('/', lambda: saves(session, user='joe')() and '', 200), ('/nowhere', None, 404),
                ('/', lambda: (str(session[key]) for key in ['user']), 200),
                ('/', lambda: 1 / session['zero'], 500), ('/hook', None, 500)):
            assert visitor.get(path, code=code).status == status
            refuses_all(session)                # the thread has served one
    served()
    elsewhere(served)
    # a thread that a route starts
    visitor.do(lambda: session['user'] and elsewhere(refuses_all, session))
    assert visitor.data(session) == {'user': 'joe'} and session.sweep() == 0


# The memory mode keeps the values themselves, and each request has a dict of its own.


class Hermit:
    """ Refuses to be pickled or copied. """

    def __reduce_ex__(self, protocol):
        raise AssertionError('the memory mode copies nothing')

    __deepcopy__ = __copy__ = __getstate__ = __reduce_ex__


@stores('memory')
def test_request_memory_keeps_any_object_itself(session):
    things = [lambda: 5, threading.Lock(), Hermit(), (n for n in 'abc'), session, io.BytesIO()]
    visitor = Browser(session)
    assert visitor.do(lambda: session.update(enumerate(things)) or (
        session.save(), session.dirty, session.save())) == (True, False, False)

    def later():
        assert [session[n] for n in range(len(things))] == things
        with session:
            session['more'] = Hermit()
        session.regenerate()
        session['again'] = Hermit()
    visitor.do(later)
    assert visitor.do(lambda: session[1] is things[1] and 'again' in session)


@stores('memory')
def test_request_memory_needs_no_save_and_merges_when_the_request_ends(session):
    for end in str, lambda: abort(403), lambda: redirect('/'):
        visitor = known(session, a=1, gone=1)
        new = Browser(session)

        def code():
            session['a'], session['b'] = 2, 1
            del session['gone']
            assert elsewhere(visitor.data) == {'a': 1, 'gone': 1}
            visitor.meanwhile(lambda: session.update(theirs=1))
            return end()
        visitor.get(code=code)
        new.get(code=lambda: session.update(n=1) or end())
        assert not visitor.told() and visitor.data() == {'a': 2, 'b': 1, 'theirs': 1}
        assert new.told() and new.data() == {'n': 1}


@stores('memory')
def test_request_memory_what_changes_inside_a_value_is_everybodys_and_not_undone(session):
    visitor = known(session, values=[1], n=1)

    def code():
        session['values'].append(2)
        assert elsewhere(visitor.data)['values'] == [1, 2]
        assert not session.dirty and not session.save()
        with pytest.raises(Boom), session:
            session['values'].append(3)
            session['n'] = 2
            raise Boom
    visitor.do(code)
    assert visitor.data() == {'values': [1, 2, 3], 'n': 1}


def test_request_memory_needs_no_cryptography_and_the_others_say_what_to_install(
        monkeypatch, tmp_path):
    for name in ['cryptography', 'redis', *sys.modules]:
        if name.split('.')[0] in ('cryptography', 'redis'):
            monkeypatch.setitem(sys.modules, name, None)
    session = Session(SECRET)
    assert known(session, f=lambda: 'works').do(lambda: session['f']()) == 'works'
    for options in dict(mode='file', sessions_dir=tmp_path), dict(mode='redis'):
        with pytest.raises(ImportError, match='pip install'):
            Session(SECRET, **options)


# 3. Change ###################################################################


def subclass(name, base, **members):
    """ Return a class that can be pickled. """
    return type(name, (base,), {'__module__': __name__, **members})


Agreeable = subclass('Agreeable', Thing, __eq__=lambda self, other: True, __hash__=None)
Quarrelsome = subclass('Quarrelsome', Thing, __eq__=lambda *both: 1 / 0, __hash__=None)
Caching = subclass('Caching', Thing, __getstate__=lambda self: {'a': self.a})  # not what it caches
Slotted = subclass('Slotted', Thing, __slots__=('slot',))
Stack = subclass('Stack', list)  # may have attributes


class Size(enum.IntEnum):
    SMALL, BIG = 1, 2


Pair = collections.namedtuple('Pair', 'left right')


def put(value):
    return lambda session: session.__setitem__('v', value)


def inside(change):
    return lambda session: change(session['v'])


def again(session):
    """ Take every key out and put it back, in another order. """
    items = sorted(session.items(), key=repr, reverse=True)
    session.data.clear()
    session.update(items)


def endless():
    endless = [1]
    endless.append(endless)
    return endless


def deep(levels):
    value = [1]
    for _ in range(levels):
        value = [value]
    return value


NOON = datetime.datetime(2024, 2, 29, 12)
SHARED = [1]
NAN = float('nan')

# name: (what is stored as 'v', what a later request does, whether that is a change). Values
# made at random are in tests/test_changes.py.
CHANGES = {
    'int, equal': (10 ** 40, put(10 ** 40), False), 'None to False': (None, put(False), True),
    'int to bool': (1, put(True), True), 'int to float': (1, put(1.0), True),
    'zero to minus zero': (0.0, put(-0.0), True), 'nan': (NAN, put(-(-NAN)), False),
    'str, equal': ('abcd', put(''.join(['ab', 'cd'])), False), 'bytes': ('x', put(b'x'), True),
    'datetime, equal': (NOON, put(NOON.replace()), False),
    'datetime, aware': (NOON, put(NOON.replace(tzinfo=datetime.timezone.utc)), True),
    'date': (NOON.date(), put(datetime.datetime(2024, 2, 29)), True),
    'timedelta': (datetime.timedelta(1), put(datetime.timedelta(hours=24)), False),
    'list, appended and popped': ([1], inside(lambda v: v.append(2) or v.pop()), False),
    'list, inside': ([[[1]]], inside(lambda v: v[0][0].append(2)), True),
    'list to tuple': ([1], put((1,)), True), 'list, order': ([1, 2], inside(list.reverse), True),
    'list, bool inside': ([[1]], put([[True]]), True), 'set, bool': ({1}, put({True}), True),
    'dict, key to bool': ({1: 'a'}, put({True: 'a'}), True),
    'dict, inside': ({'a': {'b': 1}}, inside(lambda v: v['a'].update(b=2)), True),
    'dict, the other way round': ({'a': 1, 'b': 2}, put({'b': 2, 'a': 1}), True),
    'set, equal': ({'a', 'b', 'c'}, put({'c', 'b', 'a'}), False),
    'frozenset in a set': ({frozenset('abc')}, put({frozenset('cab')}), False),
    'frozenset, other': (frozenset('abc'), put(frozenset('abd')), True),
    'namedtuple, inside': (Pair(1, [2]), inside(lambda v: v.right.append(1)), True),
    'namedtuple to tuple': (Pair(1, 2), put((1, 2)), True),
    'bytearray': (bytearray(b'a'), inside(lambda v: v.extend(b'b')), True),
    'deque, equal': (collections.deque([1]), put(collections.deque([1])), False),
    'deque, append': (collections.deque([1]), inside(lambda v: v.append(1)), True),
    'defaultdict, by reading': (collections.defaultdict(list), inside(lambda v: v['a']), True),
    'OrderedDict': (collections.OrderedDict(a=1, b=1), inside(lambda v: v.move_to_end('a')), True),
    'Decimal': (decimal.Decimal('1.5'), put(decimal.Decimal('1.5')), False),
    'enum, equal': (Size.BIG, put(Size.BIG), False), 'enum to int': (Size.SMALL, put(1), True),
    'object, read': (Thing(a=[1]), inside(lambda v: v.a), False),
    'object, attribute': (Thing(a=1), inside(lambda v: setattr(v, 'a', 1.0)), True),
    'object, attribute gone': (Thing(a=1), inside(lambda v: delattr(v, 'a')), True),
    'object, inside': (Thing(a=[1]), inside(lambda v: v.a.append(2)), True),
    'object, one like it': (Thing(a=[1], b=2), put(Thing(a=[1], b=2)), False),
    'object, of another class': (Thing(a=1), put(Agreeable(a=1)), True),
    'equals all, changed': (Agreeable(a=1), inside(lambda v: setattr(v, 'a', 2)), True),
    'equals all, same': (Agreeable(a=1), put(Agreeable(a=1)), False),
    'cannot be compared': (Quarrelsome(a=1), put(Quarrelsome(a=1)), False),
    'hidden attribute': (Caching(a=1), inside(lambda v: setattr(v, 'b', 5)), False),
    'slot': (Slotted(a=1), inside(lambda v: setattr(v, 'slot', 5)), True),
    'list with attributes': (Stack([1]), inside(lambda v: setattr(v, 'a', 1)), True),
    'subclass to list': (Stack([1]), put([1]), True),
    'one list twice, changed': ([SHARED, SHARED], inside(lambda v: v[0].append(2)), True),
    'one list twice to two': ([SHARED, SHARED], put([[1], [1]]), False),
    'cycle': (endless(), inside(lambda v: v[1][1].append(2)), True),
    'deep, equal': (deep(150), put(deep(150)), False),
    'key taken out and put back': ([1], lambda s: s.__setitem__('v', s.pop('v')), False),
    'keys in another order': ([1], again, False),
    'key added': (1, lambda s: s.__setitem__('new', None), True),
    'key added and removed': (1, lambda s: s.update(new=1) or s.pop('new'), False),
    'key removed': (1, lambda s: s.pop('other'), True),
    'key removed, another added': (1, lambda s: s.__setitem__('new', s.pop('other')), True),
    'key to bool': (1, lambda s: s.__setitem__(True, s.pop(1)), True),
    'all removed': (1, lambda s: s.data.clear(), True),
}


@stores('own')
@cases('way', ['save', 'with', 'plugin', 'hooks'])
def test_change_is_a_change_of_value_whichever_way_it_is_saved(place, way):
    for name, (stored, change, expected) in CHANGES.items():
        session = place(watched=True)
        visitor = known(session, v=stored, other='x').tab(
            plugin=way == 'plugin', hooks=way == 'hooks')
        visitor.do(lambda: session.__setitem__(1, 'one') or session.save())
        session.store.calls.clear()

        def code():
            with session if way == 'with' else contextlib.nullcontext():
                assert session.dirty is False
                change(session)
                assert session.dirty is expected, name
            return way != 'save' or session.save()
        assert visitor.do(code) in (True, expected), name
        assert session.store.writes() == ['replace'] * expected and not visitor.told(), name


@stores('memory')
def test_change_in_memory_is_a_change_of_a_key(session):
    shared = [1]
    visitor = known(session, a=1, v=shared)
    for change, expected in (
            (lambda: session.update(a=1), False), (lambda: session.update(a=True), True),
            (lambda: session.update(v=shared), False), (lambda: session.update(v=[1]), False),
            (lambda: session.update(v=[1, 2]), True), (lambda: session['v'].append(3), False),
            (lambda: session.pop('a'), True), (lambda: session.update(f=lambda: 5), True)):
        assert visitor.do(lambda: (change(), session.dirty, session.save())[1:]) \
            == (expected, expected)


READING = {
    'get': lambda s: s.get('user'), '[]': lambda s: s['cart'][0], 'in': lambda s: 'user' in s,
    'iter': lambda s: [list(s), list(s.items()), list(s.values())], 'copy': lambda s: s.copy(),
    'setdefault': lambda s: s.setdefault('user', 'ann'), 'pop': lambda s: s.pop('no', None),
    'objects': lambda s: s['thing'].numbers.index(2), 'save': lambda s: s.save(),
    'dirty': lambda s: s.dirty, 'id': lambda s: s.id, 'explain': lambda s: s.explain(),
    'update': lambda s: s.update(user='joe'), '==': lambda s: s == {}, 'days': lambda s: s.days,
    'created': lambda s: (s.created, s.used, s.owner, s.permanent), 'logins': lambda s: s.logins(),
}


@cases('way', ['save', 'with', 'plugin', 'hooks'])
def test_change_a_request_that_only_reads_writes_nothing(place, way):
    session = place(watched=True)
    visitor = known(session, user='joe', cart=[{'n': 1}], thing=Thing(numbers=[1, 2])).tab(
        plugin=way == 'plugin', hooks=way == 'hooks')
    before = place.everything()
    for name, reading in READING.items():
        def code():
            with session if way == 'with' else contextlib.nullcontext():
                reading(session)
            assert way != 'save' or session.save() is False
        session.store.calls.clear()
        visitor.do(code)
        assert session.store.calls in ([], ['load'], ['lock', 'unlock']), name
        assert not visitor.told() and place.everything() == before, name


class Unloadable:
    """ Can be pickled, and not be loaded. """

    def __reduce__(self):
        return int, ('no number',)


CANNOT = [lambda: 5, threading.Lock(), (n for n in 'ab'), sys.__stderr__, Hermit(), Unloadable(),
          [Unloadable()], {'a': [lambda: 5]}, Thing(a=threading.Lock()), deep(100000)]


@sealed_stores
@cases('way', ['save', 'with', 'regenerate', 'plugin'])
def test_change_that_cannot_be_serialized_or_loaded_back_names_key_and_type(place, way):
    session = place(lock_timeout=0)
    visitor = known(session, user='joe', n=[1]).tab(plugin=way == 'plugin')
    for who in visitor, Browser(session, plugin=way == 'plugin'):
        before, cookies = place.everything(), dict(who.cookies)
        for wrong in CANNOT:
            def code():
                session['n'], session['my key'] = [1, 2], wrong
                if way != 'plugin':
                    with pytest.raises(SessionError) as caught:
                        adding(session, 'm')() if way == 'with' else getattr(session, way)()
                    return str(caught.value)
            answer = who.get(code=code)
            text = answer.errors if way == 'plugin' else answer.body
            assert "'my key'" in text and type(wrong).__name__ in text, (wrong, text)
            assert answer.status == (500 if way == 'plugin' else 200) and not who.told()
            assert place.everything() == before and who.cookies == cookies
    visitor.do(saves(session, n=[3]))  # no lock was left
    assert visitor.data() == {'user': 'joe', 'n': [3]}


@sealed_stores
def test_change_to_a_key_that_cannot_be_loaded_back_is_not_stored(place):
    serializer = broken(  # as msgpack is: it writes numbers as keys, and refuses to read them
        lambda plain: raises(ValueError('no str')) if b'7' in plain else marshal.loads(plain),
        marshal.dumps)
    session = place(serializer=serializer)
    visitor = known(session, user='joe')
    with pytest.raises(SessionError, match=r'session\[b?.?7'):
        visitor.do(lambda: session.update({b'7': 'x'}) or session.save())
    assert visitor.data() == {'user': 'joe'}


# 4. With #####################################################################


@cases('end', [None, lambda: redirect('/'), lambda: abort(403), lambda: raises(Boom)])
def test_with_nested_in_itself_is_part_of_the_outermost_whose_exit_decides(place, end):
    session = place(watched=True)
    visitor = known(session, n=0)
    session.store.calls.clear()

    def code():
        with session:
            session['n'] += 1
            with contextlib.suppress(Boom), session as inner:
                inner['n'] += 1
                raise Boom
            assert elsewhere(visitor.data) == {'n': 0} and session['n'] == 2
            with session:
                session['m'] = 1
                return end and end()
    failed = visitor.get(code=code).status == 500
    assert visitor.data() == ({'n': 0} if failed else {'n': 2, 'm': 1})
    assert session.store.writes() == ([] if failed else ['replace'])
    assert session.store.calls.count('lock') == 1


def test_with_reads_the_newest_data_and_puts_earlier_changes_on_top(session):
    visitor = known(session, mine=0, theirs=0, gone=0)

    def code():
        assert session['theirs'] == 0
        session['mine'] = 1
        visitor.meanwhile(lambda: session.pop('gone') + saves(session, theirs=1, new=1)())
        with session:
            assert session.data == {'mine': 1, 'theirs': 1, 'new': 1}
            session['inside'] = 1
    visitor.do(code)
    assert visitor.data() == {'mine': 1, 'theirs': 1, 'new': 1, 'inside': 1}


@cases('error', [Boom, Quit, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_with_a_failure_discards_lets_go_and_passes_through(place, error):
    session = place(lock_timeout=0)
    visitor, new = known(session, n=1, old=[1], gone=1), Browser(session)
    mine = error('mine')

    def code():
        with session:
            session['n'], session['new'], session['old'] = 2, 2, [1, 2]
            session.pop('gone', None)
            raise mine

    def caught():
        assert session['n'] == 1
        visitor.meanwhile(saves(session, theirs=1))  # before it began
        with pytest.raises(error) as found:
            code()
        assert found.value is mine and not session.dirty and not session.save()
        return session.copy()
    assert visitor.do(caught) == {'n': 1, 'old': [1], 'gone': 1, 'theirs': 1} == visitor.data()
    for browser in visitor, new:
        with pytest.raises(error):
            browser.do(code)
        browser.do(adding(session))  # not busy
    assert visitor.data()['n'] == 2 and new.data() == {'n': 1}


@sealed_stores
def test_with_a_failure_keeps_what_was_changed_before_it_and_lets_old_values_go(session):
    visitor = known(session, n=1, values=[1])

    def code():
        session['before'] = [1]
        session['values'].append(2)
        old = session['values']
        with pytest.raises(Boom), session:
            session['before'].append(2)
            session['values'].append(3)
            raise Boom
        old.append(4)
        return session.dirty and session.save()
    assert visitor.do(code) is True
    assert visitor.data() == {'n': 1, 'values': [1, 2], 'before': [1]}


@cases('what, stored', [('save', {'n': 2}), ('purge', {}), ('regenerate', {'n': 2})])
def test_with_a_failure_does_not_take_back_what_the_block_itself_did(place, what, stored):
    session = place(lock_timeout=0)
    visitor = known(session, n=1)
    late = visitor.tab()

    def code(error=None):
        with session:
            session['n'] = 2
            getattr(session, what)()
            session['m'] = 3
            if error:
                raise error
    with pytest.raises(Boom):
        visitor.do(lambda: code(Boom))
    assert visitor.told() is (what != 'save') and visitor.data() == stored
    assert late.data() == (stored if what == 'save' else {})
    visitor.do(code)  # and where it ends well, what followed is stored, too
    assert visitor.data() == {**stored, 'm': 3} and len(place.records()) == 1
    visitor.do(adding(session))


def test_with_lets_others_read_and_nobody_write_for_longer_than_lock_timeout(place):
    session = place(lock_timeout=0.02)
    visitor, other, new = known(session, n=1), known(session, n=2), Browser(session)
    before = place.everything()
    with held(visitor, lambda: session.update(n=10)):
        for write in adding(session), saves(session, n=3), session.regenerate:
            with pytest.raises(SessionBusy):
                visitor.do(write)
            assert visitor.last.status == 503 and visitor.last.headers['Retry-After']
            assert not visitor.told() and place.everything() == before
        assert visitor.do(lambda: (session['n'], session.save())) == (1, False)
        other.do(adding(session))  # other visitors never wait
        new.do(adding(session))
    visitor.do(adding(session))
    assert [browser.data()['n'] for browser in (visitor, other, new)] == [11, 3, 1]


def test_with_makes_other_writers_wait_until_it_ends(session):
    for write, expected in ((adding(session, by=10), {'n': 12}),
                            (saves(session, m=1), {'n': 2, 'm': 1})):
        visitor = known(session, n=1)
        with ThreadPoolExecutor(1) as pool:
            with held(visitor, lambda: session.update(n=2)):
                other = pool.submit(visitor.tab().do, write)
                while not other.running():
                    time.sleep(0)
            other.result(30)
        assert visitor.data() == expected


def test_with_needs_no_lock_for_a_visitor_without_a_session(place):
    session = place(watched=True)
    visitor = Browser(session)
    visitor.do(lambda: session.__enter__() and session.__exit__(None, None, None))
    assert session.store.calls == [] and not visitor.told()
    visitor.do(adding(session))
    assert session.store.calls == ['create']


@cases('how', ['closed', 'dropped', 'closed on another thread', 'read'])
@cases('plugin', [False, True])
def test_with_in_a_generator_lets_go_however_that_ends(place, how, plugin):
    session = place(lock_timeout=0)
    visitor = known(session, n=1).tab(plugin=plugin)

    def chunks():
        with session:
            session['n'] = 2
            yield 'a'
            yield 'b'
    body = visitor.app(visitor.environ(code=chunks), lambda *args: None)
    assert next(iter(body)) == b'a'
    if how == 'read':
        assert list(body) == [b'b']
    if how == 'dropped':
        del body
        gc.collect()
    else:
        elsewhere(body.close) if 'thread' in how else body.close()
    assert visitor.data() == {'n': 2 if how == 'read' else 1}
    visitor.do(adding(session))  # not busy


# 5. Merge ####################################################################


def sets(*gone, **data):
    """ Return code that sets and deletes keys of a session. """
    return lambda session: ([session.pop(key, None) for key in gone], session.update(data))


def appends(key):
    return lambda session: session[key].append(len(session[key]) + 1)


MERGES = [  # stored, what another request saves meanwhile, what this one does, the end
    (dict(a=1), sets(b=2), sets(c=3), dict(a=1, b=2, c=3)),
    (dict(a=1), sets(a=2), sets(a=3), dict(a=3)),
    (dict(a=1), sets(b=2), sets(b=3), dict(a=1, b=3)),
    (dict(a=1, b=1), sets(a=2), sets('b'), dict(a=2)),
    (dict(a=1, b=1), sets('b'), sets(a=2), dict(a=2)),
    (dict(a=1, b=1), sets(a=2), sets('a'), dict(b=1)),
    (dict(a=1, b=1), sets('a'), sets(a=2), dict(a=2, b=1)),
    (dict(a=1, b=1, c=1), sets('a'), sets('a', 'b'), dict(c=1)),
    (dict(a=1, b=1), sets(a=2), sets(a=1, b=2), dict(a=2, b=2)),  # to what it was: no change
    (dict(a=1, b=1), sets('a'), sets(a=1, b=2), dict(b=2)),
    (dict(a=1, b=1), sets(c=1), lambda s: s.data.clear(), dict(c=1)),  # of what it knew
    (dict(a=1, b=1), lambda s: s.data.clear(), sets(c=1), dict(c=1)),
    (dict(a=1, b=1), sets(c=1), lambda s: setattr(s, 'data', {'d': 1}), dict(c=1, d=1)),
    (dict(a=1, b=None), sets(b=1), sets(a=None), dict(a=None, b=1)),
    (dict(a=1, b=1), sets(a=True), sets(b=1.0), dict(a=True, b=1.0)),
    # values are never merged inside
    (dict(a=[1]), appends('a'), lambda s: s['a'].append(3), dict(a=[1, 3])),
    (dict(a={}), lambda s: s['a'].update(b=1), lambda s: s['a'].update(c=2), dict(a={'c': 2})),
    (dict(a=[1], b=[1]), appends('a'), appends('b'), dict(a=[1, 2], b=[1, 2])),
    (dict(a=[1], b=1), sets('a'), appends('a'), dict(a=[1, 2], b=1)),
]


@cases('way', ['save', 'plugin', 'hooks'])
@cases('before', [True, False])
def test_merge_key_by_key(place, way, before):
    for stored, theirs, mine, expected in MERGES[:-4] if place.kind == 'memory' else MERGES:
        session, other = place(), place()
        visitor = known(session, **copy.deepcopy(stored)).tab(
            plugin=way == 'plugin', hooks=way == 'hooks')

        def code():
            assert session.data == stored
            if before:
                mine(session)
            visitor.meanwhile(lambda: (other.copy(), theirs(other), other.save()), other)
            if not before:
                mine(session)
            if way == 'save':
                assert session.save() is True
                assert not session.dirty and session.save() is False
        visitor.do(code)
        assert visitor.last.status == 200 and not visitor.told()
        assert repr(sorted(visitor.data().items())) == repr(sorted(expected.items()))


def test_merge_warns_when_two_requests_change_one_key(place, caplog):
    session = place()
    visitor = known(session, cart=0, other=1)
    for mine, theirs, warned in (({'other': 2}, {'cart': 1}, False), (
            {'cart': 5}, {'cart': 5}, False), ({'cart': 2, 'other': 4}, {'cart': 3}, True)):
        def code():
            session.update(mine)
            visitor.meanwhile(saves(session, **theirs))
            before = place.everything()
            session.save()
            return mine == theirs and place.everything() != before
        assert not visitor.do(code), 'the other request wrote the same already'
        found = logged(caplog, "'cart'", 'with session:', visitor.id(), level=logging.WARNING)
        assert len(found) == warned and not logged(caplog, "'other'")


@sealed_stores
def test_merge_a_key_that_a_thread_of_the_route_sets_during_a_save_is_not_lost(place):
    session = place(watched=True)
    visitor = known(session, n=0)

    def code():
        data = session.data
        data['n'] = 1
        session.store.before['replace'] = lambda: elsewhere(data.update, {'late': 1})
        return session.save(), session.dirty, session.save()
    assert visitor.do(code) == (True, True, True)
    assert visitor.data() == {'n': 1, 'late': 1}


@cases('end', ['purge', 'regenerate', 'expiry'])
@cases('way', ['save', 'with', 'plugin', 'hooks', 'regenerate', 'in with'])
def test_merge_log_out_is_final(place, end, way):
    session = place()
    visitor = known(session, user='joe', cart=[1])
    slow = visitor.tab(plugin=way == 'plugin', hooks=way == 'hooks')

    def log_out():
        if end == 'expiry':
            place.clock.tick(30 * DAY + 60)
        else:
            elsewhere(visitor.do, getattr(session, end))

    def code():
        assert session['user'] == 'joe'
        if way != 'in with' or end == 'regenerate':  # which would wait
            log_out()
        with session if 'with' in way else contextlib.nullcontext():
            if way == 'in with' and end != 'regenerate':
                log_out()
            session['admin'], session['cart'] = True, [1, 2]
        if way not in ('plugin', 'hooks'):
            assert not (session.regenerate() if way == 'regenerate' else session.save())
            assert not session.dirty and session.id is None
            assert saves(session, more=1)() is False
    slow.do(code)
    assert slow.last.status == 200 and not slow.told() and slow.data() == {}
    assert visitor.data() == ({'user': 'joe', 'cart': [1]} if end == 'regenerate' else {})
    assert len(place.records()) == (end != 'purge')


# 6. Cookie ###################################################################


def give(value, cookie=False, **changes):
    """ Return it, after changing attributes of the response. """
    if cookie:
        response.set_cookie('own', 'x')
    for name, change in changes.items():
        setattr(response, name, change)
    return value


def stream(*chunks):
    """ A generator that yields these; what is an exception is raised. """
    for chunk in chunks:
        yield raises(chunk) if isinstance(chunk, BaseException) else chunk


def file(name=FILE):
    return static_file(name, root=HERE)


HEAD = {'method': 'HEAD'}
ERRORS = {418: lambda: 'a teapot', 409: lambda: {'error': 1}, 410: lambda: stream('a', 'b'),
          411: lambda: give('text', cookie=True), 413: lambda: None,
          421: lambda: HTTPResponse('text', 200), 422: lambda: raises(HTTPResponse('text', 202)),
          423: lambda: 1 / 0, 424: lambda: redirect('/x')}

# name: (how the route ends, the status, what the request has beside the path)
ENDINGS = {
    'str': (lambda: 'text', 200), 'None': (lambda: None, 200), 'False': (lambda: False, 200),
    'dict': (lambda: {'a': 1}, 200), 'list': (lambda: ['a', 'b'], 200),
    'template': (lambda: bottle.template('{{x}}', x=1), 200),
    'iterator': (lambda: iter(['a', 'b']), 200), 'file': (lambda: io.BytesIO(b'text'), 200),
    'wrong type': (lambda: [1, 2], 500), 'own cookie': (lambda: give('text', cookie=True), 200),
    **{'status %d' % code: (lambda code=code: give('' if code < 400 else 'x', status=code), code)
       for code in (202, 204, 304, 500)},
    'redirect': (lambda: redirect('/x'), 303), 'abort 500': (lambda: abort(500), 500),
    'own cookie and redirect': (lambda: give(None, cookie=True) or redirect('/x'), 303),
    **{'raise %d' % code: (lambda code=code: raises(HTTPResponse('', code)), code)
       for code in (200, 202, 304)},
    'raise HTTPError': (lambda: raises(HTTPError(403, 'text')), 403),
    'raise a copy': (lambda: raises(response.copy(cls=HTTPResponse)), 200),
    **{'return %d' % code: (lambda code=code: HTTPResponse('', code), code)
       for code in (200, 202, 204, 304)},
    'return HTTPResponse with dict': (lambda: HTTPResponse({'a': 1}), 200),
    'return HTTPResponse with generator': (lambda: HTTPResponse(stream('a', 'b')), 200),
    'return HTTPResponse with cookie': (lambda: HTTPResponse('text', Set_Cookie='own=x'), 200),
    'return HTTPError': (lambda: HTTPError(403, 'text'), 403),
    'static_file': (file, 200), 'raise static_file': (lambda: raises(file()), 200),
    'static_file 206': (file, 206, {'HTTP_RANGE': 'bytes=0-9'}),
    'static_file 304': (file, 304, {'HTTP_IF_MODIFIED_SINCE': 'Fri, 01 Jan 2100 00:00:00 GMT'}),
    'static_file 404': (lambda: file('no'), 404), 'static_file 403': (lambda: file('../x'), 403),
    'generator': (lambda: stream('a', 'b'), 200), 'empty generator': (lambda: stream(), 200),
    'generator of empty chunks': (lambda: stream(b'', b'', b'x'), 200),
    'generator raises': (lambda: stream('', Boom()), 500),
    'generator aborts': (lambda: stream(HTTPError(403)), 403),
    'generator of a response': (lambda: iter([HTTPResponse('text', 202)]), 202),
    'HEAD str': (lambda: 'text', 200, HEAD), 'HEAD abort': (lambda: abort(403), 403, HEAD),
    'HEAD generator': (lambda: stream('a', 'b'), 200, HEAD), 'HEAD file': (file, 200, HEAD),
    **{'abort %d, @error' % code: (lambda code=code: abort(code), status) for code, status in
       [(418, 418), (409, 409), (410, 410), (411, 411), (413, 413), (421, 200), (422, 500),
        (423, 500), (424, 500)]},
    'return HTTPError, @error': (lambda: HTTPError(418), 418),
}
CRASHES = {'generator raises', *['abort %d, @error' % code for code in (422, 423, 424)]}
WAYS = ['save', 'with', 'plugin', 'hooks', 'plugin and with']

# what happens: (the change, whether the browser is told, what is stored then)
EVENTS = {
    'new': (lambda s: s.update(user='joe'), True, {'user': 'joe'}),
    'changed': (lambda s: s.update(cart=[1]), False, {'user': 'joe', 'cart': [1]}),
    'read': (lambda s: s['user'], False, {'user': 'joe', 'cart': []}),
    'purged': (lambda s: s.purge(), True, {}),
    'regenerated': (lambda s: s.regenerate(), True, {'user': 'joe', 'cart': []}),
    'purged and new': (lambda s: s.purge() or s.update(user='ann'), True, {'user': 'ann'}),
}


def app_with_errors(session, way):
    app = make_app(session, 'plugin' in way, way == 'hooks')
    for code, handler in ERRORS.items():
        app.error(code)(lambda error, handler=handler: handler())
    return app


def using(session, way, change, end):
    """ Return code for a route that changes the session in this way, and how it ends. """
    def code():
        with session if 'with' in way else contextlib.nullcontext():
            change(session)
            if way == 'save':
                session.save()
            return end()
    return code


@cases('ending', list(ENDINGS))
def test_cookie_reaches_the_browser_once_whichever_way_the_route_ends(place, ending):
    end, status, *environ = ENDINGS[ending]
    session = place()
    for way in WAYS if place.kind == 'memory' else ['save']:
        app = app_with_errors(session, way)
        for event, (change, told, stored) in EVENTS.items():
            if ending in CRASHES and way == 'plugin':
                continue  # which saves nothing then
            visitor = Browser(session, session.issue_cookie({'user': 'joe', 'cart': []})
                              if event != 'new' else {}, app=app)
            answer = visitor.get(code=using(session, way, change, end), **dict(*environ))
            what = way, event, answer.headers.items(), answer.body
            assert answer.status == status and visitor.told() is told, what
            assert answer.vary().count('cookie') == 1, what
            assert answer.headers.get_all('Cache-Control') == ['no-store'] * told, what
            assert bool(answer.cookie('own')) is ('cookie' in ending or '411' in ending), what
            if answer.headers['Content-Length'] and not environ and status not in (204, 304):
                assert int(answer.headers['Content-Length']) == len(answer.body.encode()), what
            assert visitor.data() == stored, what


@cases('way', ['connect', 'with', 'plugin', 'hooks', 'hook saves', 'no catchall'])
@cases('stored', [{}, {'user': 'joe', 'cart': [1]}])
def test_cookie_and_data_of_what_a_crash_left_unsaved_are_nowhere(place, way, stored):
    session = place()
    app = make_app(session, way == 'plugin', way == 'hooks')
    app.catchall = way != 'no catchall'
    if way == 'hook saves':
        app.add_hook('after_request', session.save)
    visitor = Browser(session, session.issue_cookie(stored) if stored else {}, app=app)
    with contextlib.nullcontext() if app.catchall else pytest.raises(Boom):
        visitor.get(code=using(session, way, lambda s: s.update(user='ann', cart=[2]),
                               lambda: raises(Boom)))
        assert visitor.last.status == 500 and not visitor.told()
    assert len(place.records()) == bool(stored) and visitor.data() == stored


@cases('event', ['new', 'purged', 'regenerated'])
def test_cookie_of_what_was_saved_before_a_crash_is_sent(session, event):
    for plugin in True, False:
        visitor = Browser(session, session.issue_cookie({'user': 'joe', 'cart': []})
                          if event != 'new' else {}, plugin=plugin)
        visitor.get(code=lambda: (EVENTS[event][0](session), session.save(),
                                  session.update(unsaved=1), 1 / 0))
        assert visitor.last.status == 500 and visitor.told()
        assert visitor.data() == EVENTS[event][2]


@cases('way', ['save', 'with'])
def test_cookie_an_error_handler_stores_what_it_changed_and_nothing_of_the_crash(session, way):
    visitor = known(session, user='joe', cart=[1])
    visitor.app.error(500)(lambda error: using(session, way, sets(crashes=1), str)())
    answer = visitor.get(code=lambda: session.update(cart=[1, 2], half='done') or 1 / 0)
    assert answer.status == 500
    assert visitor.data() == {'user': 'joe', 'cart': [1], 'crashes': 1}


def test_cookie_of_hooks_and_error_handlers_is_sent_also_without_a_route(session):
    app = make_app(session)
    app.add_hook('before_request', lambda: adding(session)() or (
        request.path == '/redirect' and redirect('/login')))
    app.error(404)(lambda error: adding(session)() or 'missed')
    for path, method, status, n in (('/nowhere', 'GET', 404, 2), ('/', 'PUT', 405, 1),
                                    ('/redirect', 'GET', 303, 1)):
        visitor = Browser(session, app=app)
        for told in True, False:
            answer = visitor.get(path, method)
            assert answer.status == status and visitor.told() is told and answer.vary()
        assert visitor.data() == {'n': 2 * n}


def test_cookie_of_a_new_id_is_sent_also_when_a_later_save_fails(place):
    session = place(watched=True)
    visitor = known(session, user='joe').tab(hooks=True)
    answer = visitor.get(code=lambda: (
        session.regenerate(), session.update(n=1), session.store.failing.add('replace'))[0])
    session.store.failing.clear()
    assert answer.status == 503 and visitor.told() and visitor.data() == {'user': 'joe'}


CONSTANTS = {'HTTPResponse': lambda: HTTPResponse('text', 202, X_Own='x'),
             'HTTPError': lambda: HTTPError(403, 'text', X_Own='x'),
             'HTTPError with a handler': lambda: HTTPError(418, 'text', X_Own='x'),
             'with a cookie': lambda: HTTPResponse('text', 202, X_Own='x', Set_Cookie='own=x')}


@cases('kind', list(CONSTANTS))
@cases('end', ['returned', 'raised', 'applied'])
def test_cookie_never_sticks_to_a_response_that_all_visitors_get(session, kind, end):
    for way in WAYS:
        constant = CONSTANTS[kind]()
        before = set(constant.headerlist)
        app = app_with_errors(session, way)
        ends = {'returned': lambda: constant, 'raised': lambda: raises(constant),
                'applied': lambda: constant.apply(response) or 'text'}[end]
        one, two = (Browser(session, app=app) for _ in range(2))
        for visitor in one, two:
            answer = visitor.get(code=using(session, way, lambda s: s.update(user='joe'), ends))
            assert visitor.told() and answer.headers['X-Own'] == 'x'
            answer = Browser(session, app=app).get(code=ends)  # of nobody
            assert answer.headers['X-Own'] == 'x' and answer.cookie() is None
            assert answer.headers['Cache-Control'] is None and answer.vary() == []
        assert one.cookies['bsession'] != two.cookies['bsession']
        assert {line for line in constant.headerlist if line[0] != 'Content-Length'} == before


def test_cookie_holds_256_random_bits_and_nothing_else(session):
    found = {session.issue_cookie({'user': 'joe'})['bsession'] for _ in range(50)}
    assert len(found) == 50 and all(map(ID.fullmatch, found))
    assert all(len({id[place] for id in found}) > 8 for place in range(42))  # each varies


def test_cookie_with_an_id_from_outside_is_never_adopted(place):
    session = place()
    for planted in 'A' * 43, '-' * 43, '_0123456789' * 3 + 'abcdefghij':
        visitor = Browser(session, {'bsession': planted})
        assert visitor.data() == {} and not place.everything()
        visitor.do(saves(session, user='joe'))
        assert Browser(session, {'bsession': planted}).data() == {} != visitor.data()
        visitor.do(session.purge)


def test_cookie_of_one_name_is_never_accepted_under_another(place):
    shop, admin = place(), place(cookie_name='admin')
    visitor, other = known(shop, user='root'), Browser(admin)
    assert Browser(admin, {'admin': visitor.cookies['bsession']}).data() == {}
    (name, record), = place.records().items()
    other.do(saves(admin, user='ann'))
    theirs, = set(place.records()) - {name}
    if place.kind != 'memory':  # nor if somebody copies the record there
        place.write(theirs, record)
        assert other.data() == {}


@cases('way', WAYS)
def test_cookie_is_not_sent_to_a_visitor_for_whom_nothing_is_stored(place, way):
    session = place()
    visitor = Browser(session, app=app_with_errors(session, way))
    visitor.get(code=using(session, way, lambda s: s.setdefault('a', 1) and s.data.clear(), str))
    assert not visitor.told() and not place.everything()


DEFAULT = ['HttpOnly', 'Max-Age=2592000', 'Path=/', 'SameSite=Lax']


@cases('options, without, more', [
    (dict(), 0, []), (dict(secure=False), 0, []), (dict(secure=True), 0, ['Secure']),
    (dict(httponly=False), 'H', []), (dict(samesite=None), 'S', []),
    (dict(samesite='strict'), 'S', ['SameSite=Strict']), (dict(permanent=False), 'M', []),
    (dict(samesite='NONE', secure=True, partitioned=True), 'S',
     ['Partitioned', 'SameSite=None', 'Secure']),
    (dict(path='/shop'), 'P', ['Path=/shop']), (dict(domain='a.b'), 0, ['Domain=a.b']),
    (dict(days=0.5), 'M', ['Max-Age=43200']), (dict(days=1.00001), 'M', ['Max-Age=86401']),
    (dict(max_days=2), 'M', ['Max-Age=172800']),
    (dict(cookie_name='__Host-id', secure=True), 0, ['Secure'])], ids=repr)
def test_cookie_has_the_attributes_that_were_asked_for(options, without, more):
    session = Session(SECRET, **options)
    name = session.cookie_name
    expected = sorted([a for a in DEFAULT if a[0] != without] + more)
    visitor = Browser(session, scheme='https' if options.get('secure') else 'http')
    visitor.do(lambda: session.update(user='joe'))
    assert visitor.last.attributes(name) == expected
    visitor.do(session.purge)
    assert visitor.last.attributes(name) == sorted(
        [a for a in expected if not a.startswith('Max-Age')]
        + ['Max-Age=0', 'Expires=Thu, 01 Jan 1970 00:00:00 GMT'])
    assert not visitor.cookies


@cases('option', [None, True, False])
@cases('scheme, forwarded', [('http', None), ('https', None), ('http', 'https'),
                             ('https', 'http'), ('http', 'http')])
def test_cookie_is_secure_when_the_request_came_by_https_as_bottle_sees_it(
        option, scheme, forwarded):
    session = Session(SECRET, secure=option)
    environ = {'HTTP_X_FORWARDED_PROTO': forwarded} if forwarded else {}
    visitor = Browser(session, scheme=scheme)
    seen = visitor.do(lambda: session.update(a=1) or request.urlparts.scheme, **environ)
    expected = seen == 'https' if option is None else option
    assert ('Secure' in visitor.last.attributes()) is expected


def test_cookie_makes_the_response_vary_and_uncacheable_unless_the_app_says_so(session):
    visitor = known(session, user='joe')

    def headers(code, browser=visitor, **own):
        browser.do(lambda: ([response.set_header(*pair) for pair in own.items()], code()))
        return browser.last.vary(), browser.last.headers.get_all('Cache-Control')
    assert headers(str) == headers(session.connect) == ([], [])
    assert headers(lambda: session['user']) == (['cookie'], [])
    assert headers(lambda: 'user' in session, Browser(session)) == (['cookie'], [])
    for vary, expected in (('X', ['x', 'cookie']), ('X, cookie, Y', ['x', 'cookie', 'y']),
                           ('X-Cookie', ['x-cookie', 'cookie']), ('*', ['*'])):
        assert headers(session.regenerate, Vary=vary) == (expected, ['no-store'])
    assert headers(session.regenerate, **{'Cache-Control': 'private'}) == (['cookie'], ['private'])
    assert headers(session.purge) == (['cookie'], ['no-store'])


@cases('steps, stored', [
    ('regenerate regenerate', {'user': 'joe'}), ('purge write save', {'a': 1}),
    ('write save regenerate', {'user': 'joe', 'a': 1}), ('regenerate purge', {}),
    ('regenerate write save', {'user': 'joe', 'a': 1}), ('purge write save purge', {})])
def test_cookie_tells_the_last_word_when_a_request_does_several_things(place, steps, stored):
    session = place()
    visitor = known(session, user='joe')
    visitor.do(lambda: [session.update(a=1) if step == 'write' else getattr(session, step)()
                        for step in steps.split()] and None)
    assert visitor.told() and visitor.data() == stored
    assert len(place.records()) == bool(stored) == len(visitor.cookies)


HOSTILE = [
    'bsession', 'bsession=', '=', '  ;  ; ;', 'bad cookie here', 'pref={"k": [1, 2]}', '[j]={}',
    'x=\xe9\xff', '=abc', 'foo=bar\0', 'a="unterminated', 'path=/; expires=foo; secure; domain',
    'a=1, b=2', 'a,b=1; a@b=c; a/b=c; (x)=y; {z}=1; <t>=2', r'a="b\054c\""', '$Version=1',
    'a="' + '\\' * 4000 + '"', 'BSESSION=x; Bsession=y', 'xbsession=1; bsession2=2; bsession.x=3',
    'bsession=' + 'A' * 42, 'bsession=' + 'A' * 44, 'bsession=../../../../etc/passwd',
    'bsession=' + 'A' * 42 + '\0', 'bsession=' + 'é' * 43, 'bsession=' + 'A' * 43 + '\n',
    'bsession=' + 'A' * 43 + '=', 'bsession=%00%ff%2e%2e%2f', 'bsession=' + 'B' * 43,
    'x=bsession=' + 'A' * 43, '; '.join('c%d=%d' % (n, n) for n in range(700)),
    '; '.join('bsession=%d' % n for n in range(500)), ';' * 8000, '=' * 8000]


@stores('memory')
@cases('rubbish', HOSTILE, ids=lambda rubbish: repr(rubbish[:30]))
def test_cookie_header_of_any_kind_is_survived(place, rubbish):
    session = place()
    visitor = known(session, user='joe')
    rubbish = rubbish.encode('utf-8').decode('latin-1')
    ours = 'bsession=' + visitor.cookies['bsession']
    before = place.everything()
    read = using(session, 'with', str, lambda: '%s, %s' % (session.get('user'), session.save()))
    for header, user in ((rubbish, None), (rubbish + '; ' + ours, 'joe'),
                         (ours + '; ' + rubbish, 'joe'), (rubbish + ';' + ours, 'joe')):
        answer = visitor.get(code=read, HTTP_COOKIE=header)
        assert (answer.status, answer.body) == (200, '%s, False' % user), header
        assert not visitor.told()
    assert Browser(session).get(code=session.purge, HTTP_COOKIE=rubbish).status == 200
    assert place.everything() == before


def test_cookie_several_of_our_name_are_tried_in_a_header_of_16_kilobytes(place):
    session = place(watched=True)
    visitor = known(session, user='joe')
    ours, unknown = visitor.cookies['bsession'], [letter * 43 for letter in 'ABCDEFG']

    def read(*ids, end=''):
        session.store.calls.clear()
        return visitor.get(code=lambda: str(session.get('user')), HTTP_COOKIE='; '.join(
            'bsession=' + id for id in ids) + end).body
    for before in range(4):
        assert read(*unknown[:before], ours) == read(*unknown[:before], ours, *unknown) == 'joe'
        assert read(*['x', '', 'A' * 44] * 9, *unknown[:before], '%%%', ours) == 'joe'
    assert read(*['A' * 43] * 9, ours) == 'joe'  # the same one again is no other
    assert read(*unknown) == 'None' and len(session.store.calls) == 4
    filler = '; x=' + 'y' * (16 * 1024 - len('bsession=; x=' + ours))
    assert read(ours, end=filler) == 'joe'
    assert read(ours, end=filler + 'y') == 'None' and session.store.calls == []


def test_cookie_of_a_generator_that_saves_before_its_first_chunk_is_sent(session):
    visitor = Browser(session)
    for n in 1, 3:
        answer = visitor.get(code=lambda: (adding(session)() or str(session['n']) for _ in 'ab'))
        assert answer.body == '%d%d' % (n, n + 1) and answer.vary() == ['cookie']
        assert visitor.told() is (n == 1) and visitor.data() == {'n': n + 1}


@cases('wrapped', [iter, HTTPResponse])
@cases('plugin', [False, True])
def test_cookie_of_a_new_session_cannot_be_sent_after_the_first_chunk(
        place, wrapped, plugin, caplog):
    session = place()
    new, visitor = Browser(session, plugin=plugin), known(session, n=1).tab(plugin=plugin)

    def late():
        yield 'a'
        session['n'] = session.get('n', 0) + 1
        for action in session.save, session.regenerate, lambda: session.login('joe'):
            if session.id and action == session.save:
                assert action() is True  # no cookie is needed
                continue
            with pytest.raises(SessionError, match='(?i)headers sent'):
                action()
        yield 'b'
    for browser in new, visitor:
        assert browser.get(code=lambda: wrapped(late())).body == 'ab' and not browser.told()
    assert new.data() == {} and visitor.data() == {'n': 2} and len(place.records()) == 1
    if plugin or place.kind == 'memory':  # where nobody called save(), in the end
        assert len(logged(caplog, '/', 'eaders sent', level=logging.WARNING)) == 1


def test_cookie_and_data_stay_apart_while_generators_take_turns_on_a_thread(session):
    visitors = [known(session, n=n).tab(plugin=True) for n in (1, 2)]

    def counting():
        yield '%d ' % session['n']
        adding(session, by=10)()
        yield '%d' % session['n']
    bodies = [visitor.app(visitor.environ(code=counting), lambda *args: None)
              for visitor in visitors]
    assert list(zip(*bodies)) == [(b'1 ', b'2 '), (b'11', b'12')]
    for body in bodies:
        body.close()
    assert [visitor.data() for visitor in visitors] == [{'n': 11}, {'n': 12}]


@cases('way', WAYS)
@cases('where', ['before', 'between', 'only there'])
def test_cookie_and_data_of_a_sub_request_stay_there(session, way, where):
    """ Such a call leaves Bottle's `request` and `response` at the inner request. """
    visitor = Browser(session, app=app_with_errors(session, way))
    stranger = Browser(session)

    def code():
        if where == 'between':
            session['first'] = 1
        stranger.do(adding(session, 'strange'))
        return 'text' if where == 'only there' else using(
            session, way, lambda s: s.update(n=s.get('n', 0) + 1), lambda: HTTPResponse('text'))()
    for n in 1, 2:
        assert visitor.get(code=code).body == 'text'
        assert visitor.told() is (n == 1 and where != 'only there')
    assert visitor.data().get('n') == (None if where == 'only there' else 2)
    assert stranger.data() == {'strange': 2}


@cases('where', ['generator', 'error', 'before_request', 'after_request'])
def test_cookie_and_data_survive_a_sub_request_outside_of_the_route(session, where):
    stranger, visitor, seen = known(session, user='ann'), known(session, user='joe'), []

    def use():
        seen.append((stranger.do(lambda: session['user']), session.get('user')))
        return ''
    if where.endswith('request'):
        visitor.app.add_hook(where, use)
    visitor.app.error(404)(lambda error: use())
    visitor.get('/nowhere' if where == 'error' else '/',
                code=(lambda: (use() for _ in 'a')) if where == 'generator' else str)
    assert seen == [('ann', 'joe')] and not visitor.told()


# 7. Lifetime #################################################################


@cases('days, own', [(30, False), (0.25, False), (0.25, True), (90, True)])
def test_lifetime_is_days_after_the_last_use(place, clock, days, own):
    session = place(**({} if own else {'days': days}))
    visitor = known(session, user='joe')
    if own:
        visitor.do(lambda: setattr(session, 'days', days) or session.save())
    for _ in range(3):  # use prolongs it
        clock.tick(days * DAY - 60)
        session.sweep()
        assert visitor.data() == {'user': 'joe'}
    clock.tick(days * DAY + 60)
    late = visitor.tab()
    assert visitor.do(lambda: (session.copy(), session.id, session.used)) == ({}, None, None)
    assert visitor.do(saves(session, user='ann')) and visitor.told() and late.data() == {}


def test_lifetime_is_max_days_however_much_it_is_used(place, clock):
    session = place(days=2, max_days=5)
    visitor = known(session, n=0)
    for day in range(1, 5):
        clock.tick(DAY)
        visitor.do(saves(session, n=day) if day != 3 else session.regenerate)
        assert 0 <= min(2, 5 - day) * DAY - visitor.last.max_age() < 60
    clock.tick(DAY - 60)
    assert visitor.data() == {'n': 4}
    clock.tick(120)
    assert visitor.data() == {}


@cases('use', ['read', 'save'])
@cases('days', [30, 3])
def test_lifetime_a_use_is_recorded_and_told_once_per_thirtieth(place, clock, use, days):
    session = place(watched=True, days=days)
    visitor = known(session, n=0)
    session.store.calls.clear()

    def visit(hours):
        clock.tick(hours * 3600 * days / 30)
        visitor.do(adding(session) if use == 'save' else session.copy)
        return visitor.told(), visitor.tab().do(lambda: session.used)
    told, used = zip(*[visit(hours) for hours in (0.1, 10, 2)])  # about half of a thirtieth
    assert not any(told) and len(set(used)) == 1
    assert session.store.writes() == ['replace'] * 3 * (use == 'save')
    cookies = dict(visitor.cookies)
    assert visit(24) > (True, used[0]) and visitor.last.max_age() == days * DAY
    assert visitor.cookies == cookies and visit(0)[0] is False


@cases('back', [60, 10 * DAY, 30 * DAY])
@cases('days', [1, 30])
def test_lifetime_a_clock_that_is_behind_for_a_while_ends_no_session(place, clock, days, back):
    session = place(days=days, max_days=60)
    clock.tick(40 * DAY)
    for use in session.copy, saves(session, n=1), session.regenerate:
        visitor = known(session, n=0)
        clock.tick(-back)
        visitor.do(use)
        clock.tick(back)
        assert 'n' in visitor.data(), use


@cases('use', ['copy', 'save', 'regenerate'])
@cases('days, max_days', [(30, None), (3000, 50)])
def test_lifetime_a_clock_that_was_ahead_makes_no_session_live_for_ever(
        place, clock, use, days, max_days):
    session = place(days=days, max_days=max_days)
    clock.tick(5000 * DAY)
    visitor = known(session, n=0)
    clock.tick(-5000 * DAY)  # repaired, and the session is used
    visitor.do(lambda: session.update(n=use) or getattr(session, use)())
    clock.tick(min(days, max_days or days) * DAY + 31 * DAY)
    assert visitor.data() == {}


def test_lifetime_sweep_removes_the_expired_and_counts_sessions_only(place, clock):
    session = place()
    old = [known(session, n=n) for n in range(4)]
    for visitor in old[:2]:
        visitor.do(lambda: session.login('joe'))  # leaves a mark, and a list
    clock.tick(20 * DAY)
    living, used = known(session, n=9), old.pop()
    assert used.data() == {'n': 3}
    assert elsewhere(session.sweep) == 0 and len(place.records()) == 5
    clock.tick(11 * DAY)
    assert session.store.sweep(clock() - 40 * DAY) == (0, 5)
    expected = 0 if place.kind == 'redis' else 3  # its server removes them
    assert elsewhere(session.sweep) == expected and len(place.records()) == 5 - expected
    assert place.kind == 'redis' or len(place.everything()) == 2
    assert [v.data().get('n') for v in [living, used] + old] == [9, 3, None, None, None]


@stores('memory', 'file', 'own')
def test_lifetime_requests_remove_what_has_expired_little_by_little_and_nothing_else(place, clock):
    session = place()
    clock.tick(-60 * DAY)
    for n in range(20):
        session.issue_cookie({'n': n})
    clock.tick(60 * DAY)
    living = [known(session, n=n) for n in range(30)]
    for step in range(1000):
        fresh = place()  # each cleans once a second at most
        known(fresh, n=step).do(fresh.purge)
        if len(place.everything()) == 30:
            break
    assert [visitor.data() for visitor in living] == [{'n': n} for n in range(30)]
    assert len(place.everything()) == 30


def test_lifetime_a_use_that_cannot_be_recorded_is_logged_not_raised(place, clock, caplog):
    session = place(watched=True)
    visitor = known(session, user='joe')
    clock.tick(2 * DAY)
    session.store.failing.add('replace')
    assert visitor.do(lambda: session['user']) == 'joe' and visitor.last.status == 200
    assert logged(caplog, 'use could not be recorded')
    session.store.failing.clear()
    clock.tick(27 * DAY)
    assert visitor.data() == {'user': 'joe'}


@stores('own')
def test_lifetime_limits_are_sealed(place, clock):
    """ What the store is told is believed for cleaning, and no further. """
    session = place()
    visitor = known(session, user='joe')
    place.write(*place.records().popitem())  # expires in 99 days
    clock.tick(31 * DAY)
    assert session.sweep() == 0 and visitor.data() == {}


# 8. Rest #####################################################################


def broken(loads, dumps=pickle.dumps):
    """ Return a serializer whose `loads` is this for anything but an empty dict. """
    return types.SimpleNamespace(
        dumps=dumps, loads=lambda plain: {} if plain == dumps({}) else loads(plain))


def two_visitors(place):
    """ Return a session and two visitors who have one, each with its name in the store. """
    session = place()
    one = known(session, user='joe the first')
    first, = place.records()
    two = known(session, user='ann the second')
    return session, (one, first), (two, (set(place.records()) - {first}).pop())


@sealed_stores
@cases('serializer', [pickle, json, marshal], ids=lambda module: module.__name__)
def test_rest_shows_nothing_without_the_cookie_and_pickles_only_if_it_may(
        place, serializer, monkeypatch):
    if serializer != pickle:
        monkeypatch.setattr(pickle, 'loads', lambda *args: raises(AssertionError('unpickled')))
    session = place(serializer=serializer)
    visitor = known(session, user='joe the plumber', n='x' * 3000, cart=[{'n': 1}])

    def code():
        session['cart'][0]['n'] += 1
        assert session.dirty and session.save()
        with pytest.raises(Boom), session:
            session['cart'].append(5)
            raise Boom
    visitor.do(code)
    id, (name, record) = visitor.cookies['bsession'], place.records().popitem()
    if place.kind == 'file':
        with open(place.path(name), 'rb') as content:
            record = content.read()
    for secret in 'joe', 'plumber', 'user', 'xxxx', id, id[:12], SECRET, SECRET[:9]:
        assert secret.encode() not in record and secret not in name
    assert re.fullmatch('[0-9a-f]{64}', name) and visitor.id() != id
    assert visitor.data() == {'user': 'joe the plumber', 'n': 'x' * 3000, 'cart': [{'n': 2}]}


@sealed_stores
def test_rest_nothing_in_the_records_of_one_secret_is_the_same(place):
    """ Such bytes would confirm a guess of the secret. """
    session = place()
    for _ in range(12):
        session.issue_cookie({'user': 'joe'})
    records = list(place.records().values())
    assert all(len({record[at] for record in records}) > 3 for at in range(1, len(records[0])))


class Bomb:
    """ Tells when somebody unpickles it. """

    exploded = []

    def __reduce__(self):
        return Bomb.exploded.append, ('boom',)


FORGERIES = {
    'one byte': lambda record: b'\0', 's': lambda record: b's',
    'zeros': lambda record: bytes(len(record)),
    'noise': lambda record: b's' + os.urandom(len(record) - 1),
    'a pickle': lambda record: pickle.dumps({'user': Bomb()}),
    'a pickle behind the head': lambda record: record[:-90] + pickle.dumps({'user': Bomb()}),
    'a pickle in the middle': lambda record: record[:60] + pickle.dumps(Bomb()) + record[60:],
    'cut': lambda record: record[:-1], 'head only': lambda record: record[:16],
    'a mark': lambda record: b'm' + record[1:], 'a list': lambda record: b'l' + record[1:],
    'of another secret': None, 'of another session': None,
}


@sealed_stores
@cases('name', list(FORGERIES))
def test_rest_what_is_forged_is_absent_logged_and_never_unpickled(place, name, caplog):
    session, (one, first), (two, second) = two_visitors(place)
    if FORGERIES[name]:
        place.write(first, FORGERIES[name](place.records()[first]))
    elif name == 'of another session':
        place.write(first, place.records()[second])
    else:
        session = one.session = place(secret=NEWER)
    assert one.data() == {} and logged(caplog, 'absent', level=logging.WARNING)
    one.app = make_app(session)
    assert one.do(saves(session, user='new')) and one.data() == {'user': 'new'}
    assert two.data() == {'user': 'ann the second'} and not Bomb.exploded


@sealed_stores
def test_rest_a_flipped_bit_anywhere_is_noticed_before_anything_is_loaded(place):
    loads = []
    session = place(serializer=types.SimpleNamespace(
        dumps=pickle.dumps, loads=lambda plain: loads.append(1) or pickle.loads(plain)))
    visitor = known(session, user='joe')
    (name, original), = place.records().items()
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        place.write(name, bytes(damaged))
        del loads[:]
        assert visitor.do(session.copy) == {} and not loads
    place.write(name, original)
    assert visitor.data() == {'user': 'joe'}


@sealed_stores
@cases('use', ['save', 'recorded use'])
def test_rest_sessions_under_an_older_secret_open_and_move_with_the_next_write(place, clock, use):
    first, both, last = (place(secret=s) for s in (OLDER.encode(), [NEWER, OLDER], NEWER))
    visitor = known(first, user='joe')
    before = place.everything()
    assert visitor.data(both) == {'user': 'joe'} and place.everything() == before
    assert visitor.data(last) == {} and visitor.data(first) == {'user': 'joe'}
    if use == 'save':
        visitor.meanwhile(saves(both, user='joe', n=1), both)
    clock.tick(1.5 * DAY)
    assert visitor.data(both) == visitor.data(last) and visitor.data(first) == {}
    assert visitor.data(last)['user'] == 'joe' and known(both, a=1).data(last) == {'a': 1}


@sealed_stores
def test_rest_an_object_of_a_class_that_is_gone_is_absent_and_logged(place, caplog, monkeypatch):
    module = types.ModuleType('module_of_the_test')
    exec('class Gone:\n    pass', module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    session = place()
    visitor = known(session, user='joe', gone=module.Gone())
    del module.Gone
    assert visitor.data() == {} and logged(caplog, 'absent', 'Gone')
    assert visitor.do(saves(session, user='ann')) and visitor.data() == {'user': 'ann'}


@sealed_stores
@cases('loaded', [[1], None, 'text', collections.OrderedDict(a=1)], ids=repr)
def test_rest_sealed_data_that_is_no_dict_is_absent(place, loaded, caplog):
    visitor = known(place(), user='joe')
    assert visitor.data(place(serializer=broken(lambda plain: loaded))) == {}
    assert logged(caplog, 'absent')


@sealed_stores
@cases('error', [MemoryError, RecursionError, OSError(5, 'I/O error')], ids=repr)
def test_rest_what_may_be_well_in_a_moment_is_503_and_no_logged_out_visitor(place, error):
    visitor = known(place(), user='joe')
    before = place.everything()
    session = place(serializer=broken(lambda plain: raises(error)))
    late = visitor.tab(session)
    assert late.get(code=saves(session, user='ann')).status == 503
    assert not late.told() and place.everything() == before and visitor.data() == {'user': 'joe'}


# 9. Store ####################################################################


def test_store_keeps_the_contract_also_behind_another(place):
    bottle_session.check_store(place.store)
    bottle_session.check_store(lambda: Watched(place.store()))


BROKEN = {
    'overwrites': dict(create=lambda self, name, record, expires, durable=False:
                       Own.remove(self, name) is None or Own.create(self, name, record, expires)),
    'creates': dict(replace=lambda self, name, *args: Own.replace(self, name, *args)
                    or Own.create(self, name, *args[1:3]) and args[1]),
    'locks nothing': dict(lock=lambda self, name: self.load(name) and (None, self.load(name))),
    'forgets': dict(sweep=lambda self, now, progress=None: (
        [Own.remove(self, name) for name in self.names], (0, 1))[1]),
    'keeps the dead': dict(remove=lambda self, name, version=None: bool(self.load(name))),
}


@cases('how', list(BROKEN))
def test_store_that_breaks_the_contract_is_found(how):
    store = type('Broken', (Own,), BROKEN[how])()
    with pytest.raises(AssertionError):
        bottle_session.check_store(lambda: store)


def test_store_errors_are_answers_with_status_503():
    assert not issubclass(SessionError, HTTPResponse)
    for kind in SessionBusy, StoreError:
        error = kind('why')
        assert isinstance(error, SessionError) and isinstance(error, HTTPError)
        assert error.status_code == 503 and int(error.get_header('Retry-After')) > 0
    assert all(hasattr(bottle_session, name) for name in bottle_session.__all__)


FAILURES = {  # what a route does, and the method that fails
    'load': (lambda s: s.get('user'), 'load'), 'save': (lambda s: saves(s, n=1)(), 'replace'),
    'purge': (lambda s: s.purge(), 'remove'), 'clear': (lambda s: s.clear(), 'remove'),
    'regenerate, create': (lambda s: s.regenerate(), 'create'),
    'regenerate, replace': (lambda s: s.regenerate(), 'replace'),
    'login, create': (lambda s: s.login('joe'), 'create'),
    'login, replace': (lambda s: s.login('joe'), 'replace'),
    'with, lock': (lambda s: adding(s)(), 'lock'), 'with, then a redirect': (
        lambda s: using(s, 'with', sets(n=2), lambda: redirect('/'))(), 'replace')}


@cases('name', list(FAILURES))
def test_store_that_fails_gives_503_and_changes_nothing(place, name):
    use, failing = FAILURES[name]
    session = place(watched=True, lock_timeout=0)
    visitor = known(session, user='joe', n=0)
    before, cookies = place.records(), dict(visitor.cookies)

    def goes_on():
        id = session.id
        session.store.failing = {failing}
        if failing != 'load':
            pytest.raises(StoreError, use, session)
        session.store.failing = set()
        return session['user'], session.id == id, session.update(later=1) or session.save()
    session.store.failing = {failing}
    answer = visitor.get(code=lambda: str(use(session)))
    assert answer.status == 503 and answer.headers['Retry-After'] and visitor.cookies == cookies
    assert not visitor.told() and 'joe' not in answer.body and place.records() == before
    assert not answer.headers['Location']
    session.store.failing = set()
    assert visitor.do(goes_on) == ('joe', True, True) and not visitor.told()
    assert visitor.data()['later'] == 1 and len(place.records()) == 1
    assert visitor.get(code=lambda: use(session) and '').status in (200, 303)  # by itself again


@cases('plugin', [False, True])
def test_store_that_fails_to_make_a_new_session_sends_no_cookie(place, plugin):
    session = place(watched=True)
    session.store.failing = {'create'}
    visitor = Browser(session, plugin=plugin)
    visitor.get(code=lambda: (session.update(a=1), plugin or session.save())[0])
    assert visitor.last.status == 503 and not visitor.told() and not place.everything()


@cases('use', [lambda s: s.regenerate(), lambda s: s.login('joe')])
@cases('done', [True, False])
def test_store_that_fell_silent_during_a_new_id_leaves_a_cookie_that_works(place, use, done):
    session = place(watched=True)
    visitor = known(session, user='joe')
    error = StoreError()
    error.maybe_done = True
    session.store.silent = {'replace'} if done else set()
    session.store.before = {} if done else {'replace': lambda: raises(error)}
    assert visitor.get(code=lambda: use(session)).status == 503
    session.store.silent = set()
    assert visitor.data() == {'user': 'joe'}


def test_store_is_not_contacted_by_a_route_that_does_not_use_data(place):
    session = place(watched=True)
    visitor = known(session, a=1).tab(plugin=True)
    session.store.calls.clear()
    session.store.failing = set(METHODS)
    for code, status in ((str, 200), (session.connect, 200), (lambda: repr(session), 200),
                         (lambda: str(session.save()), 200), (lambda: redirect('/x'), 303),
                         (lambda: 1 / 0, 500)):
        assert visitor.get(code=code).status == status and session.store.calls == []


# 10. Plugin ##################################################################


def test_plugin_has_name_and_api_and_gives_the_session_to_routes_with_that_argument():
    session, other = Session(SECRET), Session(SECRET, cookie_name='other')
    assert [(s.name, s.cookie_name, s.api) for s in (session, other)] \
        == [('session', 'bsession', 2), ('session:other', 'other', 2)]
    app = bottle.Bottle()
    app.install(session)

    class Controller:
        def method(self, session):
            return str(session.get('n'))

        def __call__(self, session, n='7'):
            return 'called %s' % session.get('n')

    def keyword_only(*, session):
        return session['n']
    app.route('/plain/<n>')(lambda n, session: session.update(n=n))
    app.route('/keyword')(keyword_only)
    app.route('/default')(lambda session=None: str(session['n']))
    app.route('/none')(lambda: 'nothing')
    app.route('/rest')(lambda **others: ','.join(others) or 'nothing')
    app.route('/method', callback=Controller().method)
    app.route('/object', callback=Controller())
    app.route('/template', template="{{session['n']}}")(lambda session: {'session': session})
    app.route('/skipped', skip=True)(lambda session=None: repr(session))
    visitor = Browser(app)
    bodies = {'/plain/5': '', '/keyword': '5', '/default': '5', '/none': 'nothing',
              '/rest': 'nothing', '/method': '5', '/object': 'called 5', '/template': '5',
              '/skipped': 'None'}
    assert {path: visitor.get(path).body for path in bodies} == bodies


@sealed_stores
@cases('how', [lambda s: s, lambda s: 'session', lambda s: Session, lambda s: True],
       ids=['instance', 'name', 'type', 'True'])
def test_plugin_can_be_skipped_and_uninstalled(place, how):
    session, other = place(), place(cookie_name='other')
    app, what = make_app(session, plugin=True), how(session)
    app.install(other)
    app.route('/skip', skip=what if what is True else [what])(lambda: (
        session.update(a=1), other.update(b=2)) and '')
    visitor = Browser(session, app=app)
    visitor.get('/skip')
    assert sorted(visitor.cookies) == (['other'] if what in (session, 'session') else [])
    for _ in range(2):
        visitor.do(lambda: session.update(a=2))
        app.uninstall(what)
        assert session not in app.plugins
        visitor.do(lambda: session.update(a=3))
        assert visitor.data() == {'a': 2}
        visitor.do(saves(session, a=4))
        app.install(session)


def test_plugin_of_several_apps_of_one_route_and_beside_another_session(place):
    session, other = place(), place(cookie_name='other')
    one, two = make_app(session, plugin=True), make_app(session, plugin=True)
    visitor = Browser(session, app=one)
    visitor.do(lambda: session.update(n=1))
    one.uninstall(session)
    two.install(other)
    visitor.app = two
    visitor.do(lambda: (session.update(n=session['n'] + 1), other.update(m=1)) and '')
    assert visitor.data() == {'n': 2} and visitor.data(other) == {'m': 1}
    with pytest.raises(bottle.PluginError, match='cookie_name'):
        two.install(place())
    one.route('/applied', apply=[session])(lambda session: session.update(n=3))
    visitor.app = one
    visitor.get('/applied')
    assert visitor.data() == {'n': 3}


@cases('mount', ['mount', 'mount WSGI', 'merge'])
@cases('plugin', ['on the root', 'on the child', 'on both', 'nowhere'])
def test_plugin_saves_in_mounted_and_merged_apps(session, mount, plugin, caplog):
    root, child = bottle.Bottle(), bottle.Bottle()
    for app, name in (root, 'on the root'), (child, 'on the child'):
        if plugin in (name, 'on both'):
            app.install(session)
    child.route('/count/<name>')(lambda name: (
        session.update(n=session.get('n', 0) + 1), plugin == 'nowhere' and session.save(),
        ENDINGS[name][0]())[2])
    if mount == 'merge':
        root.merge(child)
    else:
        root.mount('/child/', child) if mount == 'mount' else root.mount(
            '/child', lambda environ, start_response: child(environ, start_response))
    visitor = Browser(session, app=root)
    for n, name in enumerate(['str', 'redirect', 'raise HTTPError', 'return 200', 'generator',
                              'dict'], 1):
        answer = visitor.get(('' if mount == 'merge' else '/child') + '/count/' + name)
        assert answer.status == ENDINGS[name][1] and visitor.told() is (n == 1), name
        assert answer.vary().count('cookie') == 1 and visitor.data() == {'n': n}, name
    assert not logged(caplog, level=logging.WARNING)


@cases('order', [1, -1])
@cases('end', ['str', 'dict', 'redirect', 'return 200', 'generator'])
@cases('middleware', ['before', 'after'])
def test_plugin_works_with_other_plugins_and_middleware_in_every_order(
        session, order, end, middleware):
    """ Bottle's documentation shows middleware as ``app.wsgi = wrapper(app.wsgi)``. """
    app, seen = make_app(session), []

    def install():
        for plugin in (session, counting)[::order]:
            app.install(plugin)

    def counting(callback):
        def wrapper(*args, **kwargs):
            session['before'] = 1
            try:
                return callback(*args, **kwargs)
            finally:
                session['after'] = 1
        return wrapper
    if middleware == 'after':
        install()
    inner = app.wsgi
    app.wsgi = lambda environ, start_response: (
        seen.append(environ['PATH_INFO']), inner(environ, start_response))[1]
    if middleware == 'before':
        install()
    visitor = Browser(session, app=app)
    visitor.get(code=lambda: session.update(inside=1) or ENDINGS[end][0]())
    assert visitor.data() == {'before': 1, 'after': 1, 'inside': 1} and seen == ['/']


# 11. Log #####################################################################


@sealed_stores
def test_log_warns_once_per_route_of_a_change_that_was_not_saved(session, caplog):
    silent = {'/saved': saves(session, a=1), '/read': lambda: str(session.get('a')),
              '/same': lambda: session.update(user='joe'), '/with': adding(session)}
    warned = {
        '/cart/<item>': lambda item: session.update(item=item),
        '/inside/<item>': lambda item: session['list'].append(1),
        '/after save/<item>': lambda item: saves(session, x=item)() and session.update(y=item),
        '/after with/<item>': lambda item: adding(session)() or session.update(z=item)}
    app = make_app(session)
    for rule, code in {**silent, **warned}.items():
        app.route(rule)(lambda code=code, **values: code(**values) and '')
    visitor = Browser(session, session.issue_cookie({'user': 'joe', 'list': []}), app=app)
    for path in [*silent, '/nowhere']:
        visitor.get(path)
    for options in dict(plugin=True), dict(hooks=True):
        visitor.tab(**options).do(lambda: session.update(a=2))
    assert not logged(caplog, level=logging.INFO)
    for _ in range(2):
        for rule in warned:
            visitor.get(rule.replace('<item>', str(time.monotonic())))
    messages = logged(caplog, 'save', level=logging.WARNING)
    assert len(messages) == 4
    assert all(rule in message for rule, message in zip(warned, messages))


def test_log_warns_once_of_memory_mode_under_several_processes(place, caplog):
    session = place()
    for multiprocess in False, True, True:
        Browser(session).do(saves(session, a=1), **{'wsgi.multiprocess': multiprocess})
    messages = logged(caplog, 'processes', 'file', 'redis', level=logging.WARNING)
    assert len(messages) == (place.kind == 'memory')


def test_log_tells_of_merged_and_dropped_saves_and_of_busy_ones(place, caplog):
    session = place(lock_timeout=0)
    visitor = known(session, user='joe')
    id = visitor.id()

    def slow(other):
        session['a'] = time.time()
        visitor.meanwhile(other)
        session.save()
    visitor.do(lambda: slow(saves(session, b=1)))
    assert logged(caplog, 'merged', id)
    with held(visitor), pytest.raises(SessionBusy):
        visitor.do(adding(session))
    busy, = logged(caplog, 'another request', level=logging.WARNING)
    assert busy.startswith('/: ')  # the route's rule
    visitor.do(lambda: slow(session.purge))
    assert logged(caplog, 'dropped', id)


def test_log_nobody_hears_of_ordinary_requests(session, caplog):
    visitor = known(session, user='joe')
    for code in (saves(session, n=1), adding(session), session.regenerate,
                 lambda: session.login('joe'), session.revoke_others, session.purge):
        visitor.do(lambda: code() and '')
    assert not logged(caplog, level=logging.INFO)


def test_log_explain_says_why_the_session_is_what_it_is(place, clock):
    session = place()
    visitor = Browser(session)

    def explain(*words, browser=visitor, before=str):
        text = browser.do(lambda: (before(), browser.session.explain())[1])
        assert text.count('.') == 1 and text.endswith('.') and '\n' not in text
        assert 'joe' not in text and not ID.search(text)
        assert all(word in text for word in words), text
    explain('no cookie')
    explain('unknown', browser=Browser(session, {'bsession': 'A' * 43}))
    explain('stored in this request', before=saves(session, user='joe', n=1))
    clock.tick(7200)
    explain('loaded', '2:00:0', '2 keys', visitor.id())
    explain('changed', before=lambda: session.update(n=2))
    if place.kind != 'memory':
        explain('older secret', browser=visitor.tab(place(secret=[NEWER, SECRET])))
        (name, record), = place.records().items()
        place.write(name, bytes(len(record)))
        explain('damaged')
        place.write(name, record)
    late = visitor.tab()
    explain('purged in this request', before=session.purge)
    explain('unknown', browser=late)
    visitor, late = moved(session, user='joe')
    explain('new id', browser=late)
    explain('elsewhere', browser=visitor.tab(), before=lambda: (
        session.update(a=2), visitor.meanwhile(session.purge), session.save()))
    visitor = known(session, user='joe')
    clock.tick(31 * DAY)
    explain('expired', browser=visitor)


@cases('options, environ, words', [
    (dict(secure=True), {}, 'http'), (dict(path='/shop'), {}, '/shop'),
    (dict(domain='shop.example'), {'HTTP_HOST': 'localhost:8080'}, 'shop.example'),
    (dict(domain='shop.example'), {'HTTP_HOST': 'myshop.example'}, 'shop.example')], ids=repr)
def test_log_explain_says_why_the_browser_cannot_send_the_cookie(options, environ, words):
    session = Session(SECRET, **options)
    for cookies in {}, session.issue_cookie({'a': 1}):
        text = Browser(session, cookies).do(session.explain, **environ)
        assert 'cannot send' in text and words in text and text.endswith('.')
    fine = dict(HTTP_HOST='www.shop.example', HTTP_X_FORWARDED_PROTO='https', SCRIPT_NAME='/shop')
    assert 'cannot' not in Browser(session).do(session.explain, **fine)


def test_log_issue_cookie_makes_a_visitor_for_tests(session):
    visitor = known(session, user='joe')
    for issue in (lambda code: code()), visitor.do:  # also within a request
        cookie = issue(lambda: session.issue_cookie({'user': 'ann', 'cart': [1]}))
        assert list(cookie) == ['bsession'] and ID.fullmatch(cookie['bsession'])
        assert Browser(session, cookie).data() == {'user': 'ann', 'cart': [1]}
    assert not visitor.told() and visitor.data() == {'user': 'joe'}
    with pytest.raises(ValueError):
        session.issue_cookie({})


# 12. Owner ###################################################################


def logged_in(session, owner='joe', note='', **data):
    """ Return a visitor whose session belongs to this owner. """
    visitor = Browser(session)
    visitor.do(lambda: session.update(data) or session.login(owner, note))
    return visitor


def ids(session, owner='joe'):
    return [login.id for login in session.logins(owner)]


def alive(*visitors, session=None):
    """ Tell of each visitor whether the session is there. """
    return [visitor.id(session) is not None for visitor in visitors]


def test_owner_login_gives_a_new_id_and_an_owner_and_stores_also_without_data(place):
    session = place()
    visitor = known(session, cart=[1])
    late = visitor.tab()

    def log_in():
        id, created, session['unsaved'] = session.id, session.created, 1
        assert session.owner is None is session.login('joe') and session.owner == 'joe'
        assert session.id != id and session.created == created and not session.dirty
        return saves(session, later=1)()
    assert visitor.do(log_in) is True and visitor.told() and late.data() == {}
    assert visitor.data() == {'cart': [1], 'unsaved': 1, 'later': 1} and len(place.records()) == 1
    assert logged_in(session).do(lambda: (session.owner, session.copy())) == ('joe', {})
    assert visitor.do(lambda: session.owner) == 'joe' and len(ids(session)) == 2


def test_owner_is_taken_as_it_is(session):
    owners = ['joe', 'Joe', ' joe', 'joe ', 'é', 'e\u0301', 'j\0oe', '\ud800', 'x' * 5000, '0']
    visitors = [logged_in(session, owner) for owner in owners]
    assert [visitor.do(lambda: session.owner) for visitor in visitors] == owners
    assert [ids(session, owner) for owner in owners] == [[visitor.id()] for visitor in visitors]
    assert session.revoke('joe') == 1 and alive(*visitors) == [False] + 9 * [True]


def test_owner_logins_lists_the_living_ones_most_recently_used_first(session, clock):
    began, agent = clock(), 'Firefox ' + 'x' * 600
    one = logged_in(session, note=agent)
    clock.tick(2 * DAY)
    other = logged_in(session, note='Safari') and logged_in(session, 'ann')
    clock.tick(2 * DAY)
    two_id = ids(session)[0]
    one.do(session.copy)
    one.do(session.regenerate)

    def rows(logins):
        return [(login.id, *[round((at.timestamp() - began) / DAY) for at in login[1:3]
                             if at.utcoffset() == datetime.timedelta(0)], login.note, login.here)
                for login in logins]
    one_id = one.id()
    expected = [(one_id, 0, 4, agent[:500], True), (two_id, 2, 2, 'Safari', False)]
    assert session.logins('joe')[0]._fields == ('id', 'created', 'used', 'note', 'here')
    assert one.do(lambda: rows(session.logins())) == expected
    assert one.do(lambda: rows(session.logins('joe'))) == expected
    assert other.do(lambda: rows(session.logins('joe'))) == rows(session.logins('joe')) \
        == [(*row[:4], False) for row in expected]
    for visitor in Browser(session), known(session, a=1):
        assert visitor.do(session.logins) == [] == session.logins('nobody')
    clock.tick(28.5 * DAY)  # one was used 4 days after the beginning, two after 2
    assert ids(session) == [one_id]


def test_owner_revoke_ends_all_of_this_owner_finally_and_says_how_many(place):
    session = place()
    one, two, other = logged_in(session, n=1), logged_in(session), logged_in(session, 'ann')
    slow = one.tab()
    assert slow.do(lambda: (session['n'], elsewhere(session.revoke, 'joe'), saves(session, n=2)(),
                            session.id)) == (1, 2, False, None)
    assert not slow.told() and alive(one, two, other) == [False, False, True]
    assert session.logins('joe') == [] and session.revoke('joe') == 0
    assert len(place.everything()) == 2  # ann's session and list


def test_owner_revoke_of_ones_own_is_purge_for_the_rest_of_the_request(place):
    session = place()
    for by in (lambda: session.revoke('joe'), lambda: session.revoke('joe', session.id)):
        visitor = logged_in(session, n=1)
        assert visitor.do(lambda: (by(), session.copy(), session.id, session.save())) \
            == (1, {}, None, False)
        assert visitor.last.max_age() == 0 and not place.everything()
        visitor = logged_in(session, n=1)
        visitor.do(lambda: by() and saves(session, m=1)())
        assert visitor.do(lambda: (session.copy(), session.owner)) == ({'m': 1}, None)
        visitor.do(session.purge)


def test_owner_revoke_of_one_id_and_of_others_end_only_those(session):
    one, two, three = (logged_in(session) for _ in range(3))
    other, stranger = logged_in(session, 'ann'), known(session, a=1)
    for id in '', 'unknown', other.id(), stranger.id(), one.id()[:-1]:
        assert session.revoke('joe', id) == 0
    assert other.do(lambda: session.revoke('joe', one.id())) == 1
    assert alive(one, two, three, other, stranger) == [False, True, True, True, True]
    assert two.do(lambda: (session.revoke_others(), session.owner)) == (1, 'joe')
    assert not two.told() and alive(two, three, other, stranger) == [True, False, True, True]
    assert two.do(session.revoke_others) == 0 == stranger.do(session.revoke_others)
    assert ids(session) == [two.id()]


@cases('call, error, words', [
    *[(lambda s, owner=owner: s.login(owner), TypeError, 'owner must be a str')
      for owner in (None, 5, b'joe', ['joe'])],
    (lambda s: s.login(''), ValueError, 'owner is empty'),
    (lambda s: s.login('joe', None), TypeError, 'note must be a str'),
    (lambda s: s.revoke(None), TypeError, 'owner must be a str'),
    (lambda s: s.revoke(''), ValueError, 'owner is empty'),
    (lambda s: s.revoke('joe', None), TypeError, 'id'),
    (lambda s: s.revoke('joe', 5), TypeError, 'id'), (lambda s: s.logins(''), ValueError, 'empty'),
    (lambda s: s.logins(5), TypeError, 'owner must be a str')])
def test_owner_bad_input_says_what_to_do_and_changes_nothing(place, call, error, words):
    session = place()
    visitor = logged_in(session, n=1)
    before = place.everything()
    with pytest.raises(error, match=words):
        visitor.do(lambda: call(session))
    assert not visitor.told() and place.everything() == before and visitor.data() == {'n': 1}


def test_owner_of_a_request_that_records_no_use_costs_nothing(place):
    session = place(watched=True)
    visitor = logged_in(session, n=1)
    for code, calls in ((session.copy, ['load']), (lambda: session.owner, ['load']),
                        (saves(session, n=2), ['load', 'replace']),
                        (adding(session), ['lock', 'replace', 'unlock'])):
        session.store.calls.clear()
        visitor.do(code)
        assert session.store.calls == calls


def test_owner_sessions_that_end_leave_the_list_and_an_empty_list_goes(place, clock):
    session = place()
    one, two = logged_in(session), logged_in(session)
    one.do(session.purge)
    assert len(place.records(b'l')) == 1 and ids(session) == [two.id()]
    two.do(lambda: session.login('ann'))  # is somebody else from now on
    assert ids(session) == [] and ids(session, 'ann') == [two.id()]
    two.do(session.purge)
    assert not place.records(b'l') and not place.records()
    old = [logged_in(session, note='old') for _ in range(3)]
    clock.tick(70 * DAY)
    assert ids(session) == [] and not any(alive(*old))
    new = logged_in(session)
    assert ids(session) == [new.id()] and session.revoke('joe') == 1
    assert not place.records(b'l')  # the expired ones had left it


def test_owner_login_after_the_session_was_ended_begins_anew_without_the_old_data(session):
    for end in lambda v: v.do(session.purge), lambda v: session.revoke('ann'):
        visitor = logged_in(session, 'ann', secret=1)
        slow = visitor.tab()
        slow.do(lambda: (session['secret'], elsewhere(end, visitor), session.login('joe')))
        assert slow.told() and slow.do(lambda: (session.copy(), session.owner)) == ({}, 'joe')
    assert len(ids(session)) == 2 and ids(session, 'ann') == []


def test_owner_list_never_expires_before_its_sessions(place, clock):
    session = place(days=1)
    long, short = logged_in(session), logged_in(session)
    long.do(lambda: setattr(session, 'days', 90) or session.save())
    for _ in range(3):  # used for months
        clock.tick(80 * DAY)
        session.sweep()
        assert long.id() and session.store.sweep(clock())[1] >= 1
        for name in place.records(b'l') if place.url else ():
            assert place.client.ttl('bsession:{%s}' % name) > 80 * DAY
    assert ids(session) == [long.id()] and short.id() is None
    assert session.revoke('joe') == 1 and long.id() is None


def test_owner_max_logins_ends_those_not_used_for_longest(place, clock):
    session = place(max_logins=3)
    visitors = []
    for n in range(3):
        visitors.append(logged_in(session, n=n))
        clock.tick(2 * DAY)
    visitors[0].do(session.copy)
    other = logged_in(session, 'ann')
    clock.tick(-20 * DAY)  # the new one never goes, whatever its clock says
    visitors.append(logged_in(session, n=3))
    assert alive(*visitors, other) == [True, False, True, True, True]
    visitors[3].do(session.regenerate)  # is no further log-in
    assert len(ids(session)) == 3
    more = place(max_logins=None)
    assert all(logged_in(more) for _ in range(5)) and len(ids(session)) == 8
    assert logged_in(session) and len(ids(session)) == 3


def test_owner_max_logins_that_cannot_be_enforced_is_logged_and_the_login_done(place, caplog):
    session = place(watched=True, max_logins=1)
    logged_in(session)
    session.store.failing = {'remove'}
    visitor = logged_in(session)
    session.store.failing = set()
    assert visitor.last.status == 200 and visitor.do(lambda: session.owner) == 'joe'
    assert logged(caplog, 'log-ins', level=logging.WARNING)


# Alive implies listed.


def all_listed(place):
    """ Assert that each living session is in joe's list, and ends with the others. """
    session = place()
    assert {name[:16] for name in place.records()} <= set(ids(session))
    session.revoke('joe')
    assert not place.records() and ids(session) == []


@cases('method', METHODS[:4])
@cases('nth', [1, 2, 3])
@cases('use', ['login', 'regenerate', 'first login'])
def test_owner_revoke_at_any_moment_of_a_new_id_ends_it_or_comes_before(place, method, nth, use):
    session, other = place(watched=True), place()
    visitor, ended = (Browser if use == 'first login' else logged_in)(session), []
    session.store.at(method, nth, lambda: ended.append(elsewhere(other.revoke, 'joe')))
    visitor.do(lambda: session.login('joe') if 'login' in use else session.regenerate())
    session.store.before.clear()
    if use == 'regenerate' and ended:  # which is no log-in of its own
        assert not place.records() and alive(visitor, session=other) == [False]
    all_listed(place)
    assert alive(visitor, session=other) == [False]


def test_owner_revoke_finds_sessions_that_get_new_ids_while_it_runs(place):
    session, other = place(watched=True), place()
    visitor = logged_in(other)
    session.store.before['remove'] = lambda: elsewhere(visitor.do, other.regenerate)
    assert session.revoke('joe') == 1
    assert not place.records() and not place.records(b'l')


@cases('method', ['create', 'replace', 'remove'])
@cases('use', ['login', 'regenerate', 'revoke', 'purge'])
def test_owner_of_a_process_that_dies_at_any_point_is_still_listed(place, method, use):
    for nth in 1, 2, 3:
        session = place(watched=True)
        visitor = logged_in(session, n=1)

        def die():
            session.store.failing = set(METHODS)  # it does nothing more
            raise Quit
        session.store.at(method, nth, die)
        with contextlib.suppress(Quit, StoreError):
            visitor.do({'login': lambda: session.login('joe'), 'regenerate': session.regenerate,
                        'revoke': lambda: session.revoke('joe'), 'purge': session.purge}[use])
        all_listed(place)


@sealed_stores
def test_owner_lists_under_old_and_new_secret_are_read_as_one(place):
    first, both, last = place(secret=OLDER), place(secret=[NEWER, OLDER]), place(secret=NEWER)
    old, new = logged_in(first, note='old', n=1), logged_in(both, note='new')
    assert ids(first) == [old.id()] and ids(last) == [new.id()]
    assert sorted(ids(both)) == sorted([old.id(), new.id()])
    old.meanwhile(saves(both, n=2), both)  # moves to the newer secret, with its entry
    assert ids(first) == [old.id(both)]  # listed there, too, while a restart rolls
    assert {login.note for login in last.logins('joe')} == {'new', 'old'}
    third = logged_in(first)
    assert both.revoke('joe') == 3 and not place.records() and not place.records(b'l')
    assert alive(old, new, third, session=both) == [False] * 3


@sealed_stores
def test_owner_damaged_list_is_logged_reads_as_empty_and_begins_anew(place, caplog):
    session = place()
    visitor = logged_in(session)
    (name, record), = place.records(b'l').items()
    place.write(name, record[:-1] + bytes([record[-1] ^ 1]))
    assert session.logins('joe') == [] and logged(caplog, 'list', level=logging.WARNING)
    assert visitor.do(lambda: session.owner) == 'joe'
    new = logged_in(session)
    assert ids(session) == [new.id()]


@sealed_stores
def test_owner_list_shows_no_owner_and_its_name_needs_secret_and_cookie_name(place):
    logged_in(place(), 'joe the owner', 'Firefox')
    (name, record), = place.records(b'l').items()
    assert re.fullmatch('[0-9a-f]{64}', name)
    for plain in b'joe', b'owner', b'Firefox', next(iter(place.records())).encode():
        assert plain not in record
    for other in place(secret=NEWER), place(cookie_name='other'):
        assert other.logins('joe the owner') == [] and other.revoke('joe the owner') == 0
        logged_in(other, 'joe the owner')
    assert len(place.records(b'l')) == 3

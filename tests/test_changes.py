# flake8: noqa: F401,F811
""" Changes are found exactly: values of all kinds, made and changed at random. """

import contextlib
import json
import os
import pickle
import sys
import types

import pytest
from hypothesis import HealthCheck, given, settings, strategies

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from conftest import in_child  # noqa: E402
from harness import (  # noqa: E402
    DAY, Boom, Browser, Thing, adding, clock, known, logged, nothing_secret_is_logged, place,
    redis_url, saves, sealed_stores, session, stores)
from test_bottle_session import NAN, NOON, Size  # noqa: E402

from bottle_session import SessionBusy, SessionError, Store  # noqa: E402


settings.register_profile('here', deadline=None, max_examples=100, database=None,
                          derandomize=bool(os.environ.get('CI')),
                          suppress_health_check=list(HealthCheck))
settings.load_profile('here')

scalars = strategies.one_of(
    strategies.none(), strategies.booleans(), strategies.integers(-1, 2), strategies.just(NAN),
    strategies.sampled_from([0.0, -0.0, 1.0, '', 'a', 'ab', b'a', NOON, Size.BIG]))
hashable = strategies.one_of(scalars, strategies.tuples(scalars, scalars)).filter(
    lambda value: value == value and NAN not in (value if isinstance(value, tuple) else ()))
nested = strategies.recursive(scalars, lambda inner: strategies.one_of(
    strategies.lists(inner, max_size=4), strategies.dictionaries(hashable, inner, max_size=4),
    strategies.tuples(inner, inner), strategies.sets(hashable, max_size=4),
    strategies.builds(Thing, a=inner, b=inner)), max_leaves=12)


def strict(one, other, ordered=False):
    """ Tell whether two values are equal to their types, all the way down; `ordered`: also
        in the order of their dicts. """
    def same(a, b):
        return strict(a, b, ordered)

    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return repr(one) == repr(other)
    if isinstance(one, Thing):
        return same(vars(one), vars(other))
    if isinstance(one, dict):
        one, other = list(one.items()), list(other.items())
        if not ordered:  # a set of pairs, whose second parts need not be hashable
            return len(one) == len(other) and all(any(same(a, b) for b in other) for a in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, set):
        return len(one) == len(other) and all(any(same(a, b) for b in other) for a in one)
    return one == other


def has_sets(value):
    """ Tell whether there is a set inside an object: its order counts. """
    found = containers(value)
    return any(isinstance(one, Thing) for one in found) and any(
        isinstance(one, set) for one in found)


def containers(value):
    """ Return all that can be changed in place. """
    parts = value.values() if isinstance(value, dict) else vars(value).values() \
        if isinstance(value, Thing) else value if isinstance(value, (list, tuple)) else ()
    return [value] * isinstance(value, (list, dict, set, Thing)) + [
        found for part in parts for found in containers(part)]


def mutate(data, draw):
    """ Change something somewhere in the data, or perhaps to what it was. """
    target = draw(strategies.sampled_from(containers(data)))
    if isinstance(target, list):
        at = draw(strategies.integers(0, len(target)))
        target[at:at + draw(strategies.integers(0, 1))] = draw(strategies.lists(nested, max_size=1))
    elif isinstance(target, set):
        target.symmetric_difference_update([draw(hashable)])
    elif isinstance(target, Thing):
        target.a = draw(nested)
    else:
        key = draw(hashable)
        target.pop(key, None)
        if draw(strategies.booleans()):
            target[key] = draw(nested)


@stores('own')
@given(content=strategies.dictionaries(hashable, nested, min_size=1, max_size=4),
       steps=strategies.integers(0, 3), data=strategies.data())
def test_changes_are_found_exactly_but_for_orders(place, content, steps, data):
    session = place()
    visitor = known(session, x=0)
    visitor.do(lambda: setattr(session, 'data', content) or session.save())

    def code():
        assert strict(session.data, content)
        if data.draw(strategies.booleans()):
            session.data = pickle.loads(pickle.dumps(session.data))
        for _ in range(steps):
            mutate(session.data, data.draw)
        dirty = session.dirty
        if not strict(session.data, content):
            assert dirty, 'a change is found'
        elif all(strict(session.data[key], content[key], True) for key in content) \
                and not any(map(has_sets, content.values())):
            assert not dirty, 'what is equal, also in its order, is no change'
        assert session.save() is dirty
        return pickle.loads(pickle.dumps(session.data))

    assert strict(visitor.tab().do(code), visitor.data())


def copied(data):
    return pickle.loads(pickle.dumps(dict(data)))


def change(view, draw):
    """ Set, delete or change inside one of the keys 'a' to 'd', or one more. """
    key = draw(strategies.sampled_from('abcd'))
    if key in view and containers(view[key]) and draw(strategies.booleans()):
        mutate(view[key], draw)
    elif key in view and draw(strategies.booleans()):
        del view[key]
    else:
        view[key] = draw(nested)


@stores('own')
@given(data=strategies.data())
def test_merging_keeps_what_each_of_two_requests_changed(place, data):
    """ The later save wins where both changed a key, and nothing else is lost, also of what
        is changed after a merge, inside a value that came from the other request. """
    session, draw = place(), data.draw
    visitor = known(session, a=[1], b={'b': [2]}, c={3})

    def changed_and_saved():
        for _ in range(draw(strategies.integers(0, 2))):
            change(session, draw)
        session.save()

    def code():
        view = session.data if draw(strategies.booleans()) else session
        seen, nothing = copied(session), object()
        for _ in range(3):
            for _ in range(draw(strategies.integers(0, 2))):
                change(view, draw)
            if draw(strategies.booleans()):
                visitor.tab().do(changed_and_saved)
            mine, theirs = copied(session), visitor.data()
            if draw(strategies.booleans()):
                with session:
                    merged = True
            else:
                merged = session.save()
            stored = visitor.data()
            for key in {*seen, *mine, *theirs, *stored}:
                was, now, other, found = (one.get(key, nothing)
                                          for one in (seen, mine, theirs, stored))
                assert strict(found, other if strict(was, now, True) else now) or (
                    strict(was, now) and strict(found, now)), key  # another order
            if merged or not strict(seen, mine):  # False: the other one saved the same
                seen = copied(session)
                assert strict(seen, stored)
            else:
                assert strict(copied(session), mine)

    visitor.tab().do(code)


def a_step(session, draw, now, nests):
    """ Do something to the session, and the same to what is to be true `now`: `data` in this
        request, `stored` for others (None: no session), `base` for a block that fails. """
    key, value = draw(strategies.sampled_from('abc')), draw(nested if nests else scalars)
    step = draw(strategies.sampled_from([
        'set', 'inside', 'delete', 'pop', 'popitem', 'setdefault', 'update', 'or', 'data set',
        'data clear', 'replace', 'save', 'save', 'regenerate', 'purge', 'block', 'failing block']))
    same, view = copied({key: value}), session
    if step == 'set':
        session[key] = value
        now.data.update(same)
    elif step == 'inside' and key in now.data and containers(session[key]):
        mutate(session[key], draw)
        now.data[key] = copied(session)[key]
    elif step == 'delete' and key in now.data:
        del session[key], now.data[key]
    elif step == 'pop':
        assert strict(session.pop(key, None), now.data.pop(key, None))
    elif step == 'popitem' and now.data:
        popped, content = session.popitem()
        assert strict(content, now.data.pop(popped))
    elif step == 'setdefault':
        assert strict(session.setdefault(key, value), now.data.setdefault(key, same[key]))
    elif step == 'update':
        session.update({key: value})
        now.data.update(same)
    elif step == 'or':
        view |= {key: value}
        now.data.update(same)
    elif step == 'data set':
        session.data[key] = value
        now.data.update(same)
    elif step == 'data clear':
        session.data.clear()
        now.data.clear()
    elif step == 'replace':
        session.data = {key: value}
        now.data = same
    elif step == 'save' and session.save() or step == 'regenerate' and (
            now.data or now.stored is not None):
        if step == 'regenerate':
            session.regenerate()
        now.stored, now.base = copied(now.data), copied(now.data)
    elif step == 'purge':
        session.purge()
        now.data, now.stored, now.base = {}, None, {}
    elif step in ('block', 'failing block'):
        a_block(session, draw, now, nests, step == 'failing block')


def a_block(session, draw, now, nests, fails):
    if not now.depth:
        now.base = copied(now.data)
    now.depth += 1
    with contextlib.suppress(Boom), session:
        some_steps(session, draw, now, nests)
        if fails:
            raise Boom
    now.depth -= 1
    if not now.depth and fails:
        now.data = now.base
    elif not now.depth and (now.data or now.stored is not None):
        now.stored = copied(now.data)


def some_steps(session, draw, now, nests):
    for _ in range(draw(strategies.integers(0, 4))):
        a_step(session, draw, now, nests)
        assert strict(copied(session), now.data)
        if now.stored is None:
            assert session.dirty is bool(now.data)
        elif not strict(now.data, now.stored):
            assert session.dirty
        elif strict(now.data, now.stored, True) and not has_sets(now.data):
            assert not session.dirty


@stores('memory', 'own')
@given(data=strategies.data(), plugin=strategies.booleans())
def test_a_session_is_a_dict_that_is_kept(place, data, plugin):
    """ Whatever a visitor's requests do, a dict beside it says what must be there. """
    session, memory = place(), place.kind == 'memory'
    visitor = Browser(session, plugin=plugin)
    now = types.SimpleNamespace(stored=None, depth=0)
    for ending in data.draw(strategies.lists(strategies.sampled_from(['answer', 'crash']),
                                             max_size=4)):
        now.data = copied(now.stored or {})

        def code():
            some_steps(session, data.draw, now, not memory)
            if ending == 'crash':
                raise Boom

        with contextlib.suppress(Boom):
            visitor.do(code)
        if ending == 'answer' and (plugin or memory) and (now.data or now.stored is not None):
            now.stored = now.data
        assert strict(visitor.data(), now.stored or {})


@stores('file', 'own')
def test_with_a_serializer_of_ones_own_nothing_is_pickled_to_compare_it(place):
    class Money:  # made in a function, it cannot be pickled
        def __init__(self, amount):
            self.amount = amount

    session = place(serializer=types.SimpleNamespace(
        dumps=lambda data: json.dumps(data, default=vars),
        loads=lambda text: json.loads(
            text, object_hook=lambda found: Money(**found) if 'amount' in found else found)))
    visitor = known(session, price=Money(1), seen=0)

    def raise_it():
        session['price'] = Money(5)

    def look():
        assert session['price'].amount == 1 and not session.dirty
        session['seen'] += 1
        Browser(session, visitor.cookies, plugin=True).do(raise_it)
        assert session.save()

    visitor.do(look)
    assert visitor.do(lambda: (session['price'].amount, session['seen'])) == (5, 1)


class Row:
    """ Tells how often it was pickled. """

    pickled = 0

    def __reduce__(self):
        Row.pickled += 1
        return Row, ()


@stores('memory', 'own')
def test_what_is_in_many_places_at_once_is_not_compared_in_each_of_them(place):
    def nested():
        rows = [Row()]
        for _ in range(25):
            rows = [rows, rows]
        return rows

    session, Row.pickled = place(), 0
    visitor = known(session, rows=nested())

    def code():
        session['rows'] = nested()
        session.save()
        session['rows'].append(1)
        assert place.kind == 'memory' or session.save()

    visitor.do(code)
    assert Row.pickled < 1_000_000 and len(visitor.data()['rows']) == 3


@stores('file', 'own')
def test_data_that_cannot_be_stored_together_are_an_error_and_not_stored(place):
    class Sorting:
        loads = json.loads

        def dumps(data):
            return json.dumps(data, sort_keys=True)

    session = place(serializer=Sorting)
    visitor = known(session, a=1)
    with pytest.raises(SessionError, match="cannot be stored: '<' not supported"):
        visitor.do(lambda: session.data.update({1: 2}) or session.save())
    assert visitor.data() == {'a': 1}


@pytest.mark.parametrize('method, arguments', [('load', 1), ('create', 3), ('replace', 4), ('remove', 1),
                                                ('lock', 1), ('unlock', 2), ('sweep', 1)])
def test_a_store_that_lacks_a_method_says_so(method, arguments):
    with pytest.raises(NotImplementedError):
        getattr(Store(), method)(*range(arguments))


# What the head says

@pytest.mark.parametrize('act', ['save', 'regenerate'])
def test_a_session_that_another_request_kept_alive_is_saved(place, clock, act):
    session = place(days=1)
    visitor = known(session, a=1)
    clock.tick(0.9 * DAY)

    def code():
        session['b'] = 2
        visitor.meanwhile(lambda: session['a'])  # records its use
        clock.tick(0.5 * DAY)
        getattr(session, act)()

    visitor.do(code)
    assert visitor.data() == {'a': 1, 'b': 2}


def test_what_was_saved_of_days_and_use_is_read_in_the_same_request(place, clock):
    session = place()
    visitor = known(session, a=1)
    began = visitor.do(lambda: session.used)
    clock.tick(5 * DAY)

    def code():
        session.days, session.permanent = 5, False
        assert session.save()
        session.days = 7
        session.days = 5
        assert not session.dirty
        return session.days, session.permanent, (session.used - began).days

    assert visitor.do(code) == (5, False, 5)


@sealed_stores
def test_days_that_nobody_saved_are_not_stored_with_the_use_and_a_warning_says_so(
        place, clock, caplog):
    session = place()
    visitor = known(session, a=1)
    clock.tick(5 * DAY)
    visitor.do(lambda: setattr(session, 'days', 5))
    assert visitor.told() and logged(caplog, 'did not save')
    assert visitor.do(lambda: session.days) == 30


def test_a_block_keeps_no_lock_of_another_cookie_that_names_no_session(place, clock):
    session = place(days=1)
    ids = [known(session, n=1).cookies['bsession']]
    name, = place.records()
    clock.tick(2 * DAY)
    ids.append(known(session, n=2).cookies['bsession'])
    visitor = Browser(session)

    def code():
        with session:
            lock = place.store().lock(name)
            assert lock is None or place.store().unlock(name, lock[0]) is None
            session['n'] += 1

    visitor.do(code, HTTP_COOKIE='; '.join('bsession=' + id for id in ids))
    assert Browser(session, {'bsession': ids[1]}).data() == {'n': 3}


@stores('file')
@pytest.mark.skipif(sys.platform != 'linux', reason='needs limits of the memory')
def test_a_session_for_which_there_is_no_memory_is_an_error_and_no_log_out(session):
    import resource
    visitor = known(session, film=os.urandom(60_000_000))

    def read(*megabytes):
        with open('/proc/self/statm') as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        for spare in megabytes:
            resource.setrlimit(resource.RLIMIT_AS, (size + spare * 1_000_000, -1))
            status = visitor.get(code=lambda: str('film' in session)).status
            assert status == 503 or visitor.last.body == 'True'
            yield status

    statuses = in_child(lambda: [*read(*range(0, 300, 20), 4000)])
    assert 503 in statuses and statuses[-1] == 200


def test_a_block_that_is_left_in_another_request_is_an_error_and_harms_no_other_block(place):
    session = place(lock_timeout=0.1)
    visitor = known(session, n=0)

    def chunks():
        with session:
            yield

    dropped = chunks()
    visitor.do(lambda: next(dropped))

    def code():
        with pytest.raises(RuntimeError, match='only be used in a request'):
            dropped.close()
        with session:
            session['n'] = 1
            with pytest.raises(SessionBusy):
                visitor.meanwhile(adding(session))

    visitor.do(code)
    assert visitor.data() == {'n': 1}


def test_the_plugin_takes_a_route_that_does_not_tell_its_arguments(session):
    visitor = Browser(session, plugin=True)
    visitor.app.route('/dict', callback=dict)
    assert visitor.get('/dict').status == 200


@stores('own')
@pytest.mark.parametrize('value, other', [((1, 2), [9]), ([(1, 2)], [9])])
def test_what_another_serializer_changes_is_changed_once(place, value, other):
    session = place(serializer=json)
    visitor = known(session, a=1)

    def code():
        session['t'] = value
        session.save()
        visitor.meanwhile(saves(session, t=other))
        session['x'] = 1
        session.save()

    visitor.do(code)
    assert visitor.data() == {'a': 1, 't': other, 'x': 1}

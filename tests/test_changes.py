# flake8: noqa: F401,F811
""" Changes are found exactly: values of all kinds, made and changed at random. """

import os
import pickle
import sys

from hypothesis import HealthCheck, given, settings, strategies

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from harness import Thing, known, nothing_secret_is_logged, place, redis_url, stores  # noqa: E402
from test_bottle_session import NAN, NOON, Size  # noqa: E402

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
        elif all(strict(session.data[key], content[key], True) for key in content):
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
            if merged:
                seen = copied(session)
                assert strict(seen, stored)
            else:
                assert strict(copied(session), mine)

    visitor.tab().do(code)

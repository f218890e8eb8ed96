# flake8: noqa: F401,F811
""" How requests end where something went wrong in them, and what users do beside the beaten
    track: crashes of generators and in hooks, mounts, clocks that stand still, copies. """

import contextlib
import copy
import datetime
import io
import logging
import os
import pickle
import re
import sys
import threading
from wsgiref.handlers import SimpleHandler

import bottle
import pytest
from bottle import HTTPResponse, redirect, request, response

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from harness import (  # noqa: E402
    DAY, SECRET, Boom, Browser, adding, cases, clock, elsewhere, held, known, logged,
    nothing_secret_is_logged, place, raises, redis_url, saves, session, stores)

from bottle_session import Session, SessionError, StoreError  # noqa: E402

three_stores = stores('memory', 'file', 'own')
sealed_two = stores('file', 'own')
JOE = {'user': 'joe', 'cart': [1]}


# Crashes

def half_done(session):
    """ Change the session as far as a route gets before it crashes. """
    session.update(cart=[1, 2], half='done')
    raise Boom()


def apps(how, session, plugin):
    """ Return an app, the path of its generator that crashes before its first chunk, and
        the app that has this route. The plugin is on the 'outer' one, or on the 'inner'. """
    outer, inner = bottle.Bottle(), bottle.Bottle()
    if plugin:
        (outer if plugin == 'outer' else inner).install(session)

    @inner.route('/crash')
    def crash():
        half_done(session)
        yield 'text'

    if how == 'plain':
        return inner, '/crash', inner
    if how == 'merged':
        outer.merge(inner)
        return outer, '/crash', inner
    outer.mount('/c/' if how == 'mounted' else '/c', inner)
    return outer, '/c/crash', inner


HANDLERS = {  # what an @error(500) does
    'there is none': None, 'string': lambda: 'sorry', 'generator': lambda: iter(['sorry']),
    'response 200': lambda: HTTPResponse('sorry', 200), 'redirect': lambda: redirect('/sorry'),
    'raises': lambda: raises(Boom()),
}


@three_stores
@cases('how', ['plain', 'merged', 'mounted', 'mounted by WSGI'])
@cases('handler', list(HANDLERS))
def test_a_generator_that_crashes_before_its_first_chunk_stores_nothing(place, how, handler):
    for plugin in 'outer', 'inner', None:
        session = place()
        app, path, inner = apps(how, session, plugin)
        for each in {app, inner} if HANDLERS[handler] else ():
            each.error(500)(lambda error: HANDLERS[handler]())
        for cookie, stored in (session.issue_cookie(JOE), JOE), ({}, {}):
            before = place.everything()
            visitor = Browser(session, cookie, app=app)
            visitor.get(path)
            assert not visitor.told() and visitor.data() == stored, plugin
            assert place.everything() == before, plugin


@three_stores
def test_a_generator_that_crashes_after_its_first_chunk_stores_nothing(place):
    session = place()
    visitor = known(session, **JOE).tab(plugin=True)

    def chunks():
        yield 'text'
        half_done(session)

    with pytest.raises(Boom):
        visitor.get(code=chunks)
    assert visitor.data() == JOE


@three_stores
def test_an_error_handler_that_crashes_stores_nothing_of_itself_or_of_the_route(place):
    session = place()
    visitor = known(session, **JOE).tab(plugin=True)

    @visitor.app.error(404)
    def handler(error):
        half_done(session)

    assert visitor.get(code=lambda: session.update(n=1) or bottle.abort(404)).status == 500
    assert visitor.data() == JOE


@sealed_two
def test_a_save_that_fails_at_the_end_closes_the_body_that_is_not_sent(session):
    visitor, closed = known(session, **JOE).tab(plugin=True), []

    def chunks():
        try:
            session['bad'] = iter(chunks())
            yield 'chunk'
        finally:
            closed.append(True)

    answer = visitor.get(code=chunks)
    assert answer.status == 500 and 'chunk' not in answer.body and closed == [True]
    assert visitor.get(method='HEAD', code=chunks).body == ''
    visitor.app.catchall = False  # then the server gets the error
    with pytest.raises(SessionError, match='bad.*generator'):
        visitor.get(code=lambda: session.update(bad=iter(chunks())))
    assert visitor.data() == JOE


@three_stores
@cases('how', ['plain', 'merged', 'mounted', 'mounted by WSGI'])
@cases('way', ['save', 'with', 'plugin'])
def test_an_error_handler_stores_what_it_changed_and_nothing_of_a_generator(place, how, way):
    session = place()
    app, path, inner = apps(how, session, 'outer' if way == 'plugin' else None)

    @inner.error(500)
    @app.error(500)
    def handler(error):
        if way == 'with':
            adding(session, 'crashes')()
        else:
            session['crashes'] = 1
            session.save()
        return 'sorry'

    visitor = Browser(session, session.issue_cookie(JOE), app=app)
    assert visitor.get(path).status == 500
    assert visitor.data() == {**JOE, 'crashes': 1}


@three_stores
def test_a_sub_request_with_a_copied_environ_works_also_in_an_error_handler(session):
    visitor, inner, said = known(session, **JOE), bottle.Bottle(), []

    @inner.route('/inner')
    def save():
        session['inner'] = 1
        said.append(session.save())

    @visitor.app.error(500)
    def handler(error):
        environ = {**request.environ, 'PATH_INFO': '/inner'}
        return list(inner(environ, lambda status, headers, exc_info=None: said.append(status)))

    visitor.get(code=lambda: half_done(session))
    assert said == [True, '200 OK'] and visitor.data() == {**JOE, 'inner': 1}


def save_in_except(session):
    try:
        raise KeyError('of the hook')
    except KeyError:
        session.save()


HOOKS = {'regenerate': Session.regenerate, 'login': lambda session: session.login('joe'),
         'save in except': save_in_except}


@three_stores
@cases('hook', list(HOOKS))
def test_a_hook_stores_nothing_of_a_route_that_crashed(session, hook):
    visitor = known(session, **JOE)
    visitor.app.add_hook('after_request', lambda: HOOKS[hook](session))
    assert visitor.get(code=lambda: half_done(session)).status == 500
    assert visitor.data() == JOE


@three_stores
def test_a_sub_request_to_another_app_saves_also_in_the_hook_of_a_crash(session):
    visitor, stranger, said = known(session, **JOE), Browser(session), []
    visitor.app.add_hook(
        'after_request', lambda: said.append(stranger.do(saves(session, user='ann'))))
    assert visitor.get(code=lambda: half_done(session)).status == 500
    assert said == [True] and stranger.data() == {'user': 'ann'} and visitor.data() == JOE


@three_stores
def test_the_cookie_is_on_the_page_that_follows_headers_which_the_server_refused(session):
    visitor, out, errors = known(session, **JOE), io.BytesIO(), io.StringIO()

    def code():
        session.regenerate()
        response.set_header('Connection', 'close')  # is the server's own business

    handler = SimpleHandler(io.BytesIO(), out, errors, visitor.environ(code=code))
    handler.log_exception = raises  # nothing gets as far as that
    handler.run(visitor.app)
    assert b'500 ' in out.getvalue().split(b'\r\n')[0]
    cookie, = re.findall('bsession=([^;]+)', out.getvalue().decode())
    assert visitor.data() == {} and Browser(session, {'bsession': cookie}).data() == JOE


# What is saved, when, and what is said of it

def test_reading_never_waits_for_a_with_also_if_the_use_is_due(place, clock, caplog):
    session = place(lock_timeout=30)
    visitor = known(session, **JOE)
    with held(visitor):  # which ends with an error if the reader waits for it
        clock.tick(2 * DAY)
        assert visitor.do(lambda: session['user']) == 'joe' and not visitor.told()
    assert not logged(caplog, level=logging.WARNING)
    assert logged(caplog, 'use could not be recorded', level=logging.INFO)
    visitor.data()
    clock.tick(29 * DAY)
    assert visitor.data() == JOE, 'a later request records the use'


@sealed_two
def test_a_generator_that_saves_after_its_first_chunk_is_not_warned_about(session, caplog):
    visitor = known(session, **JOE)

    def stream():
        session['n'] = 1
        yield 'a'
        session.save()
        yield 'b'

    assert visitor.get(code=stream).body == 'ab' and visitor.data() == {**JOE, 'n': 1}
    assert not logged(caplog, level=logging.WARNING)


@sealed_two
def test_between_two_chunks_no_request_runs_and_at_the_end_changes_are_warned_about(
        session, caplog):
    visitor = known(session, **JOE)

    def stream():
        for session['n'] in range(3):
            yield b'a'

    chunks = visitor.app(visitor.environ(code=stream), lambda *_: None)
    for _ in chunks:
        with pytest.raises(RuntimeError, match='only be used in a request'):
            session.connect()
    chunks.close()
    assert logged(caplog, 'did not save') and visitor.data() == JOE


@sealed_two
@cases('options, stored', [('apply', True), ('skip', False)])
def test_options_of_a_mount_say_whether_the_plugin_saves(session, options, stored):
    outer, inner = bottle.Bottle(), bottle.Bottle()
    if options == 'skip':
        outer.install(session)
    inner.route('/')(lambda: session.update(n=1))
    outer.mount('/c/', inner, **{options: [session]})
    visitor = Browser(session, app=outer)
    assert visitor.get('/c/').status == 200
    assert visitor.told() is stored and visitor.data() == ({'n': 1} if stored else {})


@three_stores
def test_purge_keeps_the_dict_also_if_it_is_empty(session):
    visitor = Browser(session)

    def code():
        data = session.data
        session.purge()
        data['a'] = 1
        data.clear()
        session.purge()
        assert session.data is data
        data['b'] = 2
        return session.save()

    assert visitor.do(code) is True and visitor.data() == {'b': 2}


class Alike:
    """ Each one pickles like all the others. """

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        return Alike, (0,)


@stores('memory')
def test_memory_stores_a_new_object_that_pickles_like_the_old_one(session):
    visitor = known(session, handle=Alike(1))
    assert visitor.do(saves(session, handle=Alike(2)))
    assert visitor.do(lambda: session['handle'].number) == 2


@stores('memory')
def test_memory_warns_of_no_value_that_only_one_of_two_requests_touched(session, caplog):
    visitor, lock = known(session, n=0, lock=threading.Lock()), threading.Lock()

    def code():
        session['lock'] = lock
        visitor.meanwhile(saves(session, n=5))
        return session.save()

    assert visitor.do(code) and visitor.do(session.copy) == {'n': 5, 'lock': lock}
    assert not logged(caplog, level=logging.WARNING)


@three_stores
def test_what_a_with_that_is_never_left_did_not_save_is_logged(session, caplog):
    visitor = known(session, **JOE)

    @visitor.app.route('/cart/<id>')
    def cart(id):
        contextlib.ExitStack().enter_context(session)
        session['lost'] = id

    assert visitor.get('/cart/7').status == 200 and visitor.data() == JOE
    assert logged(caplog, '/cart/<id>', 'save', level=logging.WARNING)


FAILURES = {  # what fails, what a request does, what the log says before the reason
    'use': ('replace', lambda session: session.copy(), 'could not be recorded'),
    'lock': ('unlock', lambda session: adding(session)(), 'could not be released'),
    'surplus': ('remove', lambda session: session.login('joe'), 'log-ins'),
}


@three_stores
@cases('failing', list(FAILURES))
def test_the_log_names_a_reason_also_where_the_error_has_no_words(place, clock, caplog, failing):
    method, use, words = FAILURES[failing]
    session = place(watched=True, max_logins=1)
    visitor = Browser(session)
    visitor.do(lambda: session.login('joe'))
    clock.tick(2 * DAY)
    session.store.at(method, 1, lambda: raises(StoreError()))
    (Browser(session) if failing == 'surplus' else visitor).do(lambda: use(session))
    said, = logged(caplog, words, level=logging.WARNING)
    assert re.search(r': \w[^:]+$', said)


# The object

@three_stores
def test_update_takes_every_name_as_dict_does(session):
    visitor = Browser(session)
    visitor.do(lambda: (session.update({'a': 1}, self=2, other=3), session.save()))
    assert visitor.data() == {'a': 1, 'self': 2, 'other': 3}


class Users(Session):
    """ As a user may write it. """

    kind = 'of a class'

    @property
    def user(self):
        return self.get('user')

    @user.setter
    def user(self, name):
        self['user'] = name

    @property
    def is_known(self):
        return 'user' in self


@three_stores
def test_a_subclass_may_have_properties_and_no_other_attribute_can_be_set(place):
    session = Users(SECRET, mode=place.store())
    visitor = Browser(session)

    def code():
        session.user = 'joe'
        for name in 'age', 'is_known', 'kind':
            with pytest.raises(AttributeError):
                setattr(session, name, 5)
        return session.save()

    assert visitor.do(code) and visitor.data() == {'user': 'joe'}
    assert visitor.do(lambda: (session.user, session.is_known)) == ('joe', True)


COPIES = {'copy': copy.copy, 'deepcopy': copy.deepcopy, 'pickle': pickle.dumps,
          'inside a value': lambda session: copy.deepcopy({'a': [session]})}


@cases('name', list(COPIES))
def test_a_copy_of_the_object_is_an_error_that_says_what_copies_the_data(name):
    session = Session(SECRET)
    for call in (lambda code: code()), Browser(session).do:
        with pytest.raises(TypeError, match=r'session\.copy\(\)'):
            call(lambda: COPIES[name](session))


@three_stores
@cases('value', [5, 1700000000.0, None, 'now'])
def test_a_clock_that_cannot_be_called_is_refused(session, value):
    with pytest.raises(TypeError, match='clock'):
        session.clock = value
    assert known(session, **JOE).data() == JOE


@cases('start', [1_500_000_000.0, 4_000_000_000.0], ids=['behind', 'ahead'])
def test_a_clock_far_from_the_machines_decides_what_lives(place, start):
    session, now = place(days=1), [start]
    session.clock = lambda: now[0]
    visitor = known(session, n=1)
    visitor.do(saves(session, n=2))
    visitor.do(adding(session))
    visitor.do(lambda: session.login('joe'))
    others = [known(session, n=n) for n in range(40)]  # each request may clean
    assert session.sweep() == 0 and visitor.data() == {'n': 3}
    assert [other.data() for other in others] == [{'n': n} for n in range(40)]
    assert [login.here for login in visitor.do(session.logins)] == [True]
    now[0] += DAY / 2
    assert visitor.data() == {'n': 3}
    now[0] += DAY * 0.9
    swept = session.sweep()
    assert swept == (0 if place.url else 40) and visitor.data() == {'n': 3}  # redis does it
    now[0] += 2 * DAY
    assert visitor.data() == {} and [other.data() for other in others] == [{}] * 40


# explain()

EXPLAINED = [  # options, path, what the request has, what explain() says (else: nothing wrong)
    ({'domain': 'example.com'}, '/', ('backend:8080', 'www.example.com'), None),
    ({'domain': 'example.com'}, '/', ('www.example.com', 'other.org'), 'other.org'),
    ({'path': '/app/'}, '/app', ('localhost', ''), '/app/'),
    ({'path': '/app/'}, '/app/x', ('localhost', ''), None),
    ({'path': '/app/'}, '/app/', ('localhost', ''), None),
    ({'path': '/app'}, '/app', ('localhost', ''), None),
]


@cases('options, path, hosts, words', EXPLAINED)
def test_explain_knows_where_the_browser_sends_the_cookie(options, path, hosts, words):
    session = Session(SECRET, **options)
    app = bottle.Bottle()
    app.route('/<rest:path>')(lambda rest: session.explain())
    app.route('/')(session.explain)
    text = Browser(session, app=app).get(path, HTTP_HOST=hosts[0],
                                         HTTP_X_FORWARDED_HOST=hosts[1]).body
    assert ('cannot send' in text) is bool(words) and (words or '') in text


@three_stores
def test_explain_says_that_the_cookie_header_is_too_long(session):
    visitor = known(session, **JOE)
    visitor.cookies = {'other': 17000 * 'x', **visitor.cookies}
    text = visitor.do(session.explain)
    assert '16 KB' in text and re.search('too long|longer', text)
    visitor.cookies['other'] = 'x'
    assert '16 KB' not in visitor.do(session.explain)


@three_stores
def test_what_was_compared_before_a_purge_says_nothing_of_the_session_after_it(place):
    session = place()
    visitor = Browser(session)

    def code():
        session['cart'] = [1, 2]
        session.save()
        session['cart'].append(3)
        assert session['cart'] == [1, 2, 3] and session.dirty is (place.kind != 'memory')
        session.purge()
        session['cart'] = [9]
        assert session.save()
        session['cart'] = [1, 2, 3]
        assert session.dirty and session.save()

    visitor.do(code)
    assert visitor.data() == {'cart': [1, 2, 3]}


class Zone(datetime.tzinfo):
    """ The pitfall of tzinfo: unless it says otherwise, it loads without arguments. """

    def __init__(self, name):
        self.name = name


@sealed_two
def test_a_time_whose_zone_does_not_load_back_is_not_stored(session):
    visitor = known(session, **JOE)
    with pytest.raises(SessionError, match='when.*datetime'):
        visitor.do(saves(session, when=datetime.datetime(2026, 1, 2, tzinfo=Zone('x'))))
    good = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))
    visitor.do(saves(session, when=good))
    assert visitor.data() == {**JOE, 'when': good}


@three_stores
@cases('first', ['session', 'data'])
def test_a_key_that_came_by_session_data_is_changed_by_either_way(session, first):
    visitor = known(session, **JOE)

    def code():
        session.data['n'] = 1
        if first == 'data':
            session.data['n'] = 2
        session['n'] = 2
        session.update(n=2, m=3)
        del session['m']
        assert session.save()

    visitor.do(code)
    assert visitor.data() == {**JOE, 'n': 2}


@three_stores
def test_a_request_whose_session_ended_elsewhere_sends_no_cookie_of_an_earlier_save(place, clock):
    session = place()
    visitor = known(session, **JOE)
    clock.tick(2 * DAY)  # so that the first save tells the cookie again
    newer = visitor.tab()

    def code():
        session['a'] = 1
        assert session.save()
        elsewhere(newer.do, session.regenerate)
        session['b'] = 2
        assert not session.save()

    visitor.do(code)
    assert not visitor.told() and newer.data() == {**JOE, 'a': 1}


class Closed:
    def __getstate__(self):
        raise ValueError('I/O operation on closed file.')


@three_stores
def test_a_value_that_cannot_be_compared_counts_as_a_change(place):
    session = place()
    visitor = known(session, values=[1])
    if place.kind == 'memory':
        visitor.do(saves(session, values=[Closed()]))
        assert type(visitor.data()['values'][0]) is Closed
    else:
        with pytest.raises(SessionError, match='values.*list.*closed file'):
            visitor.do(saves(session, values=[Closed()]))
        assert visitor.data() == {'values': [1]}

        def code():  # a change, also where another request's is found first
            session['values'] = [Closed()]
            elsewhere(visitor.tab().do, saves(session, values=[2]))
            with pytest.raises(SessionError, match='values.*list.*closed file'), session:
                pass
            session['values'] = [3]
            with session:  # the lock is free again
                pass

        visitor.do(code)
        assert visitor.data() == {'values': [3]}


@three_stores
@cases('answer', ['another status', 'a redirect', 'a save'])
def test_a_log_in_that_failed_is_not_stored_under_the_old_id_whatever_the_error_page_says(
        place, answer):
    session = place(watched=True)
    app = bottle.Bottle()
    app.install(session)
    visitor = Browser(session, app=app)

    @app.route('/start')
    def start():
        session['cart'] = 1

    @app.route('/login')
    def login():
        session['user'] = 'joe'
        session.store.failing = {'create'}
        session.login('joe')

    @app.error(503)
    def error(failure):
        session.store.failing = set()
        if answer == 'another status':
            response.status = 200
        elif answer == 'a redirect':
            return HTTPResponse(status=302, Location='/')
        else:
            session['tried'] = True
            session.save()
        return 'later'

    visitor.get('/start')
    visitor.get('/login')
    assert visitor.data() == ({'cart': 1, 'tried': True} if answer == 'a save' else {'cart': 1})


class Handle:
    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        raise AssertionError('The memory mode pickles nothing.')


@stores('memory')
def test_memory_mode_compares_objects_by_identity_wherever_they_are(session):
    first, second = Handle(1), Handle(2)
    cycle, again, deep, deeper = [], [], [], []
    cycle.append(cycle)
    again.append(again)
    for _ in range(5000):
        deep, deeper = [deep], [deeper]
    visitor = known(session, bare=first, list=[first], dict={'a': (first,)}, plain=[{1}, {'a': 1}],
                    cycle=cycle, deep=deep)
    same = {'bare': first, 'list': [first], 'dict': {'a': (first,)}, 'plain': [{1}, {'a': 1}],
            'cycle': again, 'deep': deep}
    assert not visitor.do(saves(session, **same))
    for change in ({'bare': second}, {'list': [second]}, {'dict': {'a': (second,)}},
                   {'plain': [{True}, {'a': 1}]}, {'deep': deeper}):
        assert visitor.do(saves(session, **change)), list(change)
    assert visitor.data()['list'][0] is visitor.data()['dict']['a'][0] is second


@three_stores
def test_a_key_that_changed_its_type_is_changed_once(session):
    visitor = Browser(session)
    visitor.do(lambda: session.update({1: 'a'}) or session.save())

    def code():
        session[True] = session.pop(1)
        assert session.save() and not session.dirty and not session.save()

    visitor.do(code)
    assert [type(key) for key in visitor.data()] == [bool]


@three_stores
def test_a_failed_block_undoes_nothing_that_was_set_before_it_in_an_ended_session(session):
    visitor = known(session, a=1)

    def code():
        session['b'] = 2
        visitor.meanwhile(session.purge)
        assert session.save() is False
        session['c'] = 3
        with pytest.raises(Boom), session:
            session['d'] = 4
            raise Boom()
        return session.copy()

    assert visitor.do(code) == {'a': 1, 'b': 2, 'c': 3}

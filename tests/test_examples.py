""" The examples: each page without a browser, production/ with its servers, and the store
    of custom_store.py on SQLite and on PostgreSQL. """

import gc
import glob
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from datetime import datetime, timedelta, timezone

import bottle
import pytest

import bottle_session
from bottle_session import Session
from conftest import (HERE, SECRET, Server, Visitor, free_port, gunicorn, in_child, missing,
                      package, together, until)
from visits import cookie_of, counting, reading, saving, within

EXAMPLES = sorted(os.path.basename(path)[:-3] for path in
                  glob.glob(os.path.join(HERE, 'examples', '*.py')))
LONGEST = {'account': 130, 'custom_store': 100}  # lines


def load(name):
    """ Import an example, as often as we like. """
    path = os.path.join(HERE, 'examples', *name.split('/')) + '.py'
    spec = importlib.util.spec_from_file_location('example', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(tmp_path, monkeypatch):
    """ A function that imports an example and returns a client of its app, which sends what
        a browser sends with the forms of this site. """
    webtest, loaded = package('webtest'), []
    scrypt = hashlib.scrypt  # a third of a second each, where the browser tests it
    monkeypatch.setattr(hashlib, 'scrypt', lambda *args, **cost: scrypt(*args, **{**cost, 'n': 2}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(bottle.BaseTemplate.defaults, 'session', None)  # plugin.py sets it

    def start(name, **environ):
        for key, value in environ.items():
            monkeypatch.setenv(key, value)
        if name == 'custom_store':
            package('sqlalchemy')
        module = load(name)
        loaded.append(module)
        client = webtest.TestApp(module.app, {'HTTP_ORIGIN': 'http://localhost:80'})
        client.module = module
        return client

    yield start
    for module in loaded:
        if hasattr(module.session.store, 'engine'):
            module.session.store.engine.dispose()


@pytest.mark.parametrize('name', EXAMPLES)
def test_examples_serve_decent_pages_with_nothing_from_elsewhere(example, name):
    client = example(name, DATABASE_URL='sqlite:///sessions.db')
    with open(client.module.__file__, encoding='utf-8') as file:
        source = file.read()
    assert client.module.__doc__ and "if __name__ == '__main__':" in source
    assert 20 <= len(source.splitlines()) <= LONGEST.get(name, 80)
    for _ in 'first', 'second':
        page = client.get('/').text
        assert re.match('(?i)<!doctype html>', page) and '<title>' in page
        assert 'name="viewport"' in page and '<html lang="en">' in page
        assert not re.search(r'''(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//''', page)


def test_examples_counter_counts_this_browsers_visits(example):
    client = example('counter')
    assert [re.findall(r'<b>(\d+)</b>', client.get('/').text) for _ in (1, 2, 3)] == \
        [['1'], ['2'], ['3']]
    again = example('counter')  # the app was started again
    again.cookiejar = client.cookiejar
    assert '<b>4</b>' in again.get('/').text
    client.reset()
    assert '<b>1</b>' in client.get('/').text


def test_examples_hooks_remember_the_way(example):
    client = example('hooks')
    for room in 'kitchen', 'garden':
        client.get('/' + room)
    assert re.findall('<li>(.*)', client.get('/').text) == ['kitchen', 'garden', 'hall']
    client.get('/nowhere', status=404)


def test_examples_plugin_keeps_and_forgets_a_name(example):
    client = example('plugin')
    form = client.get('/').forms[0]
    form['name'] = 'Joe <b>'
    page = form.submit().follow()
    assert 'Hello, Joe &lt;b&gt;!' in page and 'Names so far: Joe &lt;b&gt;.' in page
    assert client.get('/time').headers.get('Vary') is None
    assert 'Names so far' not in page.forms[1].submit().follow()
    assert not client.cookies


def test_examples_shop_adds_up(example):
    client = example('shop')
    form = client.get('/').forms[0]
    for item in 'apples', 'bread', 'apples':
        page = form.submit('item', value=item).follow()
    assert '2 &times; apples' in page and '1 &times; bread' in page
    client.post('/add', {'item': 'gold'}, status=404)
    client.post('/note', {'note': '<script>'})
    assert '&lt;script&gt;' in client.get('/').text


# login.py and account.py

def fill_in(form, **fields):
    """ Send the form with these fields and return the page that follows. """
    for name, value in fields.items():
        form[name] = value
    return form.submit().follow()


def log_in(client, **fields):
    form = client.get('/').forms[0]
    return fill_in(form, **{'name': 'joe', 'password': 'open sesame', **fields})


def with_cookie(client, id):
    """ Return the page that the holder of this id sees. """
    client.reset()
    client.set_cookie('bsession', id)
    return client.get('/')


@pytest.mark.parametrize('name', ['login', 'account'])
def test_examples_log_in_and_out(example, name):
    client = example(name)
    assert client.get('/').headers['Cache-Control'] == 'no-store'
    assert not client.cookies  # who only looks costs no session
    for user, password in ('joe', 'guess'), ('j\xf6', 'open sesame \u2603'), ('', ''):
        page = log_in(client, name=user, password=password)
        assert 'Wrong name or password.' in page and 'Hello' not in page
    planted = client.cookies['bsession']
    page = log_in(client)
    assert 'Hello, joe' in page and 'You are logged in.' in page
    assert 'You are logged in.' not in client.get('/')
    valid = client.cookies['bsession']
    assert 'Hello' not in with_cookie(client, planted)
    page = with_cookie(client, valid).forms[0].submit('id').follow()
    assert 'You are logged out.' in page and 'Hello' not in page
    assert 'Hello' not in with_cookie(client, valid)


@pytest.mark.parametrize('name, paths', [
    ('login', ['/login', '/logout']), ('account', ['/login', '/logout', '/password'])])
def test_examples_take_only_forms_of_their_own(example, name, paths):
    client = example(name)
    client.post('/login', {'name': 'joe', 'password': 'open sesame'},
                headers={'Origin': 'http://evil.example'}, expect_errors=True)
    assert not client.cookies
    page = log_in(client)
    before = page.forms[0]['csrf'].value
    log_in_again = {'name': 'joe', 'password': 'open sesame'}
    client.post('/login', log_in_again, status=303)  # of a page that is older
    for path in paths:
        for csrf in '', 'guess', before, '\u2603':
            for origin in 'http://evil.example', 'null', 'http://evil.example/localhost:80':
                client.post(path, {**log_in_again, 'csrf': csrf}, headers={'Origin': origin},
                            status=403)
    assert 'Hello, joe' in client.get('/')


@pytest.mark.parametrize('name', ['login', 'account'])
@pytest.mark.parametrize('had_session', [True, False])
def test_examples_a_second_click_on_log_in_is_logged_in_too(example, name, had_session):
    client = example(name)
    form = client.get('/').forms[0]
    if had_session:
        form = log_in(client, password='guess').forms[0]
    id = client.cookies.get('bsession')
    for click in 'first', 'second':  # whose answer the browser does not wait for
        client.reset()
        if had_session:
            client.set_cookie('bsession', id)
        page = fill_in(form, name='joe', password='open sesame')
        assert 'Hello, joe' in page and 'You are logged in.' in page
    assert 'Hello, joe' in client.get('/')


def test_examples_two_clicks_at_once_are_both_logged_in(example):
    client = example('login')
    form = log_in(client, password='guess').forms[0]
    id = client.cookies['bsession']
    clicks = [package('webtest').TestApp(client.module.app, client.extra_environ)
              for _ in range(2)]

    def click(one):
        one.set_cookie('bsession', id)
        one.post('/login', {**dict(form.submit_fields()), 'name': 'joe',
                            'password': 'open sesame'}, status=303)
        return 'Hello, joe' in one.get('/')

    assert together(click, clicks) == [True, True]


def test_examples_account_shows_devices_as_people_call_them(example):
    device = example('account').module.device
    webkit = 'AppleWebKit/537.36 (KHTML, like Gecko) '
    for agent, name in [
            ('(X11; Linux x86_64) ' + webkit + 'Chrome/142.0 Safari/537.36', 'Chrome on Linux'),
            ('(Linux; Android 10; K) ' + webkit + 'Chrome/142.0 Mobile', 'Chrome on Android'),
            ('(Windows NT 10.0) ' + webkit + 'Chrome/142.0 Edg/142.0', 'Edge on Windows'),
            ('(Windows NT 10.0) ' + webkit + 'Chrome/142.0 OPR/124.0', 'Opera on Windows'),
            ('(Windows NT 10.0; rv:145.0) Gecko/20100101 Firefox/145.0', 'Firefox on Windows'),
            ('(Macintosh; Intel Mac OS X 10_15_7) ' + webkit + 'Version/26.0 Safari/605.1.15',
             'Safari on Mac'),
            ('(iPhone; CPU iPhone OS 18_7 like Mac OS X) ' + webkit + 'Version/26.0 Safari/604.1',
             'Safari on iPhone'),
            ('(iPhone; CPU iPhone OS 18_7 like Mac OS X) ' + webkit + 'CriOS/142.0 Safari/604.1',
             'Chrome on iPhone'),
            ('(iPad; CPU OS 18_7 like Mac OS X) ' + webkit + 'FxiOS/145.0 Safari/605.1.15',
             'Firefox on iPad'),
            ('curl/8.5.0', 'A program on some device'), ('', 'A program on some device')]:
        assert device('Mozilla/5.0 ' + agent) == name


def test_examples_account_remembers_for_90_days_or_half_a_day(example):
    client = example('account')
    session, ids = client.module.session, {}
    for remember in True, False:
        client.reset()
        log_in(client, remember=remember)
        ids[remember] = client.cookies['bsession']
    for days, short, remembered in [
            (0.4, True, True), (0.85, True, True), (2, False, True), (80, False, True),
            (169, False, True), (260, False, False)]:  # days without use are what counts
        session.clock = lambda: time.time() + days * 86400
        page = with_cookie(client, ids[False])
        assert ('Hello, joe' in page) is short
        if short:
            assert re.findall('Last use: (.*)</small>', page.text) == [
                'now', 'less than %d hours ago' % (days * 24 + 1)]
        assert ('Hello, joe' in with_cookie(client, ids[True])) is remembered
    session.clock = time.time
    long_ago = datetime.now(timezone.utc) - timedelta(days=3, hours=1)
    assert client.module.ago(long_ago) == 'less than 4 days ago'


def test_examples_account_ends_only_ones_own_log_ins(example):
    client = example('account')
    module = client.module
    module.USERS['ann'] = module.hashed('her password', os.urandom(16))
    log_in(client, name='ann', password='her password')
    hers = client.cookies['bsession']
    client.reset()
    page = log_in(client)
    id, = (login.id for login in module.session.logins('ann'))
    for other in id, 'unknown', '':
        page = client.post('/logout', {'csrf': page.forms[0]['csrf'].value, 'id': other}).follow()
        assert 'Hello, joe' in page
    for old, new in ('her password', 'a better one'), ('open sesame', 'short'), ('', ''):
        page = fill_in(page.forms[1], old=old, new=new)
        assert 'Nothing is changed.' in page
    page = fill_in(page.forms[1], old='open sesame', new='a better one')
    assert 'Your password is changed' in page
    assert 'Hello, ann' in with_cookie(client, hers)


# production/

def test_examples_production_runs_behind_a_proxy(tmp_path, redis):
    place = os.path.join(HERE, 'examples', 'production')
    server = Server(gunicorn('-c', os.path.join(place, 'gunicorn.conf.py'), '--chdir', place,
                             '-w', '2'), tmp_path, REDIS_URL=redis.url,
                    SESSION_SECRETS='new' * 20 + ' ' + 'old' * 20)
    try:
        visitor, answers = Visitor(server), []
        for _ in range(8):
            answers.append(visitor.get('/', headers={'X-Forwarded-Proto': 'https'}))
        assert [re.findall(r'<b>(\d+)</b>', answer.body) for answer in answers] == [
            [str(number)] for number in range(1, 9)]
        told, = answers[0].told
        assert told.startswith('__Host-session=') and '; Secure' in told
        assert '; Path=/;' in told and 'Domain' not in told
        assert visitor.get('/health').body == 'ok\n'
    finally:
        server.stop()


def test_examples_production_changes_its_secret_as_its_readme_says(example, redis):
    webtest = package('webtest')
    old, new = 'old' * 20, 'new' * 20
    with open(os.path.join(HERE, 'examples', 'production', 'README.rst')) as file:
        steps = re.findall('SESSION_SECRETS="([A-Z ]+)"', file.read())
    assert steps == ['OLD NEW', 'NEW OLD', 'NEW']
    cookie, count = None, 0
    for before, after in zip(['OLD'] + steps, steps):
        for step in before, after, before, after:  # a restart takes a while: both serve
            secrets = step.replace('OLD', old).replace('NEW', new)
            client = example('production/app', SESSION_SECRETS=secrets, REDIS_URL=redis.url)
            plain = webtest.TestApp(client.app, {'wsgi.url_scheme': 'https'})
            answer = plain.get('/', headers={'Cookie': cookie} if cookie else {})
            count += 1
            assert '<b>%d</b>' % count in answer
            if 'Set-Cookie' in answer.headers:
                cookie = answer.headers['Set-Cookie'].split(';')[0]


@pytest.mark.parametrize('secrets', ['', 'short', 'new' * 20 + ' short'])
def test_examples_production_does_not_start_without_good_secrets(example, secrets):
    with pytest.raises(SystemExit, match='python -m bottle_session secret'):
        example('production/app', SESSION_SECRETS=secrets)


# The store of custom_store.py

@pytest.fixture(scope='module')
def postgres():
    """ A PostgreSQL server of our own: its process, with its address in `url`. """
    package('pg8000')
    found = sorted(glob.glob('/usr/lib/postgresql/*/bin/initdb'), reverse=True)
    initdb = shutil.which('initdb') or found and found[0] or missing(
        'a PostgreSQL server to start: apt-get install postgresql')
    user = {'user': 65534, 'group': 65534, 'extra_groups': []} if os.geteuid() == 0 else {}
    place, port = tempfile.mkdtemp(prefix='bsession'), free_port()
    if user:
        os.chown(place, 65534, 65534)
    log = os.path.join(place, 'log')
    try:
        with open(log, 'wb') as out:
            subprocess.run([initdb, '-D', place + '/data', '-U', 'joe', '-A', 'trust', '-N'],
                           stdout=out, stderr=out, cwd=place, check=True, **user)
            server = subprocess.Popen(
                [os.path.join(os.path.dirname(initdb), 'postgres'), '-D', place + '/data',
                 '-k', place, '-p', str(port), '-c', 'listen_addresses=127.0.0.1',
                 '-c', 'fsync=off'], stdout=out, stderr=out, cwd=place, **user)
        try:
            until(lambda: 'ready to accept' in text_of(log))
            server.url = 'postgresql+pg8000://joe@127.0.0.1:%d/postgres' % port
            yield server
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait()
    finally:
        shutil.rmtree(place)


def text_of(path):
    with open(path) as file:
        return file.read()


@pytest.fixture(params=['sqlite', 'postgres'])
def make_store(request, tmp_path, monkeypatch):
    """ A function that makes the example's store, again and again on the same database. """
    package('sqlalchemy')
    url = 'sqlite:///%s/sessions.db' % tmp_path
    if request.param == 'postgres':
        url = request.getfixturevalue('postgres').url
    monkeypatch.setenv('DATABASE_URL', url)
    module = load('custom_store')
    made = [module.session.store]

    def make():
        made.append(module.SQLStore(url))
        return made[-1]

    yield make
    for store in made:
        store.engine.dispose()


def test_own_store_keeps_the_contract_of_stores(make_store):
    bottle_session.check_store(make_store)


def test_own_store_loses_nothing_under_concurrent_requests(make_store):
    session = Session(SECRET, mode=make_store())
    cookie = cookie_of(saving(session, None, n=0))
    answers = together(lambda number: counting(session, cookie) if number % 2 else saving(
        session, cookie, **{'key%d' % number: number}), range(60), 4)
    assert {answer.code for answer in answers} == {200}
    assert reading(session, cookie) == {'n': 30, **{'key%d' % n: n for n in range(0, 60, 2)}}


def test_own_store_is_shared_by_processes(make_store):
    cookie = cookie_of(saving(Session(SECRET, mode=make_store()), None, n=0))

    def count():
        session = Session(SECRET, mode=make_store())
        return [counting(session, cookie).code for _ in range(15)]

    assert together(lambda _: in_child(count), range(2)) == [[200] * 15] * 2
    assert reading(Session(SECRET, mode=make_store()), cookie) == {'n': 30}


def test_own_store_ends_what_is_over(make_store):
    session = Session(SECRET, mode=make_store(), days=1)
    owner = SECRET + str(time.time())  # PostgreSQL serves all tests
    cookies = [cookie_of(within(lambda: session.login(owner))) for _ in range(3)]
    assert len(session.logins(owner)) == 3
    within(session.purge, cookies[0])
    session.clock = lambda: time.time() - 2 * 86400
    expired = cookie_of(saving(session, None, n=1))
    session.clock = time.time
    assert session.sweep() == 1  # neither the list nor what is alive
    assert reading(session, expired) == {}
    assert len(session.logins(owner)) == 2 and session.revoke(owner) == 2
    assert [within(lambda: session.owner, cookie).value for cookie in cookies] == [None] * 3
    assert session.logins(owner) == []


def test_own_store_lists_every_log_in_that_a_race_with_revoke_leaves(make_store):
    session = Session(SECRET, mode=make_store())
    owner = 'joe' + str(time.time())

    def act(number):
        if number % 5 == 4:
            return session.revoke(owner)
        return cookie_of(within(lambda: session.login(owner)))

    cookies = [cookie for cookie in together(act, range(40), 4) if isinstance(cookie, dict)]
    living = {within(lambda: session.id, cookie).value for cookie in cookies} - {None}
    assert {login.id for login in session.logins(owner)} == living
    assert session.revoke(owner) == len(living)


@pytest.mark.filterwarnings(  # pg8000 does not close the socket on which it waited in vain
    'ignore::pytest.PytestUnraisableExceptionWarning')
def test_own_store_that_cannot_be_used_is_503(make_store, request, tmp_path):
    session = Session(SECRET, mode=make_store())
    cookie = cookie_of(saving(session, None, n=1))
    if 'postgres' in session.store.engine.name:
        session.store.engine.dispose()
        server = request.getfixturevalue('postgres')
        server.send_signal(signal.SIGSTOP)  # takes no connection, and does not refuse one
        try:
            assert within(session.copy, cookie).code == saving(session, cookie, n=2).code == 503
        finally:
            server.send_signal(signal.SIGCONT)
        gc.collect()  # those sockets, while their warnings are filtered
    else:
        writer = sqlite3.connect(str(tmp_path / 'sessions.db'))
        writer.execute('BEGIN IMMEDIATE')
        assert saving(session, cookie, n=2).code == 503
        assert reading(session, cookie) == {'n': 1}
        writer.close()
    answer = saving(session, cookie, n=3)
    assert answer.code == 200 and reading(session, cookie) == {'n': 3}

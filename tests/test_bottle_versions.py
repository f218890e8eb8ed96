""" The canary: whether Bottle still calls what the library wraps. It sings on the oldest and
    the newest 0.13, and on master where BOTTLE_MASTER has the path of its bottle.py. """

import os
import shutil
import subprocess
import sys

import pytest
from conftest import HERE, missing, run

CANARY = r'''
import io, sys
import bottle
from bottle import HTTPResponse, abort, redirect, static_file
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator
from bottle_session import Session

session = Session('x' * 32, **(
    {'mode': 'file', 'sessions_dir': sys.argv[2]} if sys.argv[1] == 'file' else {}))
CONSTANT = HTTPResponse('constant')


def ask(app, path, cookie='', method='GET'):
    """ Return (status, values of our cookie, body). """
    environ = {'PATH_INFO': path, 'REQUEST_METHOD': method, 'SCRIPT_NAME': '', 'QUERY_STRING': '',
               'wsgi.errors': io.StringIO(), 'SERVER_PROTOCOL': 'HTTP/1.1'}
    if cookie:
        environ['HTTP_COOKIE'] = 'bsession=' + cookie
    setup_testing_defaults(environ)
    started = []

    def start_response(status, headers, exc_info=None):
        started[:] = [(int(status[:3]), headers)]
        return lambda chunk: None

    body = validator(app)(environ, start_response)
    try:
        text = b''.join(body).decode()
    finally:
        body.close()
    (status, headers), = started
    lines = [value for name, value in headers if name == 'Set-Cookie']
    return status, [line.split(';')[0][9:] for line in lines if line.startswith('bsession=')], text


def store():
    session['user'] = 'joe'
    session.save()


def generator():
    store()
    yield 'one'
    yield 'two'


def failing_generator():
    store()
    raise ValueError('before the first chunk')
    yield


#: What a route does after it stored the session, and the status that comes.
ENDINGS = {
    'str': (lambda: 'text', 200),
    'dict': (lambda: {'a': 1}, 200),
    'nothing': (lambda: None, 200),
    'redirect': (lambda: redirect('/read'), 303),
    'abort': (lambda: abort(404, 'gone'), 404),
    'abort500': (lambda: abort(500, 'an answer'), 500),
    'raised': (lambda: throw(HTTPResponse('text')), 200),
    'returned': (lambda: HTTPResponse('text'), 200),
    'constant': (lambda: CONSTANT, 200),
    'file': (lambda: static_file('bottle_session.py', sys.argv[3]), 200),
    'nofile': (lambda: static_file('no such file', sys.argv[3]), 404),
    'crash': (lambda: {}['no such key'], 500),
    'error401': (lambda: abort(401), 200),  # its handler returns a response
    'error402': (lambda: abort(402), 402),  # returns a str
    'error403': (lambda: abort(403), 500),  # raises, which Bottle answers itself
}


def throw(error):
    raise error


def make_app(plugin):
    app = bottle.Bottle()
    if plugin:
        app.install(session)
    for name, (ending, _) in ENDINGS.items():
        app.route('/' + name, ['GET', 'HEAD'],
                  callback=lambda ending=ending: [store(), ending()][1])
    app.route('/generator', callback=generator)
    app.route('/failing', callback=failing_generator)
    app.route('/read', callback=lambda: str(session.get('user')))
    app.error(401)(lambda error: HTTPResponse('signed in?', 200))
    app.error(402)(lambda error: 'pay')
    app.error(403)(lambda error: throw(HTTPResponse('never')))

    @app.route('/unsaved')
    def unsaved():
        session['user'] = 'half'
        raise ValueError('and nothing was saved')

    @app.route('/later')
    def later():
        session['user'] = 'by plugin'
        redirect('/read')

    return app


def check(app, prefix=''):
    """ The cookie arrives once, whichever way the route ends, and is good. """
    paths = {**{name: status for name, (_, status) in ENDINGS.items()}, 'generator': 200,
             'failing': 500}
    for name, expected in paths.items():
        for method in ('GET', 'HEAD') if name in ENDINGS else ('GET',):
            status, cookies, text = ask(app, prefix + '/' + name, method=method)
            # Which error handlers run for an app within another is Bottle's affair.
            assert status == expected or prefix and 'error' in name, (prefix, name, status)
            assert len(cookies) == 1, (prefix, name, method, status, cookies)
            assert ask(app, prefix + '/read', cookies[0])[1:] == ([], 'joe'), (prefix, name)
    assert ask(app, prefix + '/unsaved')[:2] == (500, [])
    known = ask(app, prefix + '/str')[1][0]
    assert ask(app, prefix + '/unsaved', known)[:2] == (500, [])
    assert ask(app, prefix + '/read', known)[2] == 'joe'  # the crash stored nothing
    assert ask(app, prefix + '/read')[1:] == ([], 'None')  # and one's own is nobody else's


class Middleware:
    def __init__(self, wsgi):
        self.wsgi = wsgi

    def __call__(self, environ, start_response):
        return self.wsgi(environ, start_response)


for plugin in False, True:
    check(make_app(plugin))

    parent = bottle.Bottle()
    if plugin:
        parent.install(session)
    parent.mount('/mounted/', make_app(False))
    check(parent, '/mounted')
    other = bottle.Bottle()
    other.mount('/wsgi/', Middleware(make_app(plugin)))  # a mount of any WSGI application
    check(other, '/wsgi')
    merged = make_app(False)
    target = make_app(plugin)
    target.merge([bottle.Route(target, '/merged' + route.rule, route.method, route.callback)
                  for route in merged.routes])
    check(target, '/merged')
    child = bottle.Bottle()
    child.route('/child', callback=lambda: [store(), 'text'][1])
    target.merge(child)
    assert len(ask(target, '/child')[1]) == 1

    app = make_app(False)
    app.wsgi = Middleware(app.wsgi)
    if plugin:
        app.install(session)
    check(app)
    app = make_app(plugin)
    app.wsgi = Middleware(app.wsgi)
    check(app)

cookie, = ask(app, '/later')[1]  # the plugin saved, by whichever ending
assert ask(app, '/read', cookie)[2] == 'by plugin'
print(bottle.__version__, bottle.__file__)
'''


def install(version, directory):
    """ Install this Bottle there, or skip. """
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-compile',
         '--disable-pip-version-check', '--retries', '1', '--target', directory,
         'bottle' + version], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        missing('Bottle %s from an index that pip reaches (%s)'
                % (version, done.stdout.strip().splitlines()[-1]))


@pytest.mark.parametrize('mode', ['memory', 'file'])
@pytest.mark.parametrize('version', ['==0.13.0', '==0.13.*', 'master'])
def test_each_ending_of_a_route_takes_the_cookie_along(bottles, version, mode, tmp_path):
    place = bottles(version)
    done = run(CANARY, mode, str(tmp_path / 'sessions'), HERE,
               env={'PYTHONPATH': os.pathsep.join((place, HERE))})
    assert done.returncode == 0, done.stdout
    found, _, file = done.stdout.splitlines()[-1].partition(' ')
    assert file.startswith(place)
    assert found.startswith('0.13') or not version.startswith('==')


@pytest.fixture(scope='module')
def bottles(tmp_path_factory):
    """ A function that returns the directory which has this version of Bottle. """
    places = {}

    def get(version):
        if version not in places:
            place = str(tmp_path_factory.mktemp('bottle'))
            if version == 'master':
                if not os.environ.get('BOTTLE_MASTER'):
                    pytest.skip('needs Bottle to come: set BOTTLE_MASTER to the path of the '
                                'bottle.py of its master branch')
                shutil.copy(os.environ['BOTTLE_MASTER'], os.path.join(place, 'bottle.py'))
            else:
                install(version, place)
            places[version] = place
        return places[version]

    return get


def test_an_older_bottle_is_refused_at_import_by_version_and_file(bottles):
    place = bottles('==0.12.25')
    if run('import bottle', env={'PYTHONPATH': place}).returncode:
        pytest.skip('this Python is too new for Bottle 0.12')
    done = run('import bottle_session', env={'PYTHONPATH': os.pathsep.join((place, HERE))})
    assert done.returncode == 1
    said = done.stdout.splitlines()[-1]
    assert said.startswith('ImportError: ') and '0.13' in said and '0.12.25' in said
    assert os.path.join(place, 'bottle.py') in said

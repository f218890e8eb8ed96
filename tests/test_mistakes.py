""" The twenty most natural mistakes: what is said, where, and that it names the remedy. Each
    row runs in an interpreter of its own, as a beginner's script would. """

import os

import pytest
from conftest import HERE, run


def output_of(script, *arguments, at, path=()):
    """ Return all that a script prints which runs in the directory `at`. """
    path = os.pathsep.join([*map(str, path), HERE])
    return run(script, *arguments, cwd=str(at), env={'PYTHONPATH': path}).stdout


# What all scripts begin with: an app that answers '/', and what a browser and the logs get.
BEGIN = '''
import logging, os, sys, warnings
warnings.simplefilter('always')
logging.basicConfig(format='%(levelname)s %(message)s', stream=sys.stdout)
logging.captureWarnings(True)
import bottle, bottle_session
from bottle_session import Session
from io import StringIO
from wsgiref.util import setup_testing_defaults

SECRET = 'a secret of more than sixteen bytes'
app = bottle.Bottle()

def visit(route, **environ):
    app.route('/', callback=route)
    environ['wsgi.errors'], started = StringIO(), []
    setup_testing_defaults(environ)
    body = app(environ, lambda status, *_: started.append(status[:3]))
    print('\\n' + started[0], b''.join(body).decode(), environ['wsgi.errors'].getvalue())
'''

# mistake: (the rest of the script, what is said, what names the remedy)
MISTAKES = {
    'a mode that is none': (
        "Session(SECRET, mode='files')", "ValueError: mode='files'", "'file'"),
    'the mode as the second argument': (
        "Session(SECRET, 'file')", "UserWarning: sessions_dir='file' is not used", "mode='file'"),
    'no days': (
        'Session(SECRET, days=0)', 'ValueError: days=0', 'greater than 0'),
    'no secret': (
        'Session()', "missing 1 required positional argument: 'secret'", 'secret'),
    'None as the secret': (
        "Session(os.environ.get('SESSION_SECRET_OF_NOBODY'))", 'TypeError: secret must be a str',
        'python -m bottle_session secret'),
    'a short secret': (
        "Session('your-secret')", 'UserWarning: secret is shorter than 16 bytes',
        'python -m bottle_session secret'),
    'a function as a value': (
        "session = Session(SECRET, mode='file')\n"
        "visit(lambda: session.update(price=lambda: 5) or session.save())",
        "SessionError: session['price'] holds a value of type function", 'Keep plain values'),
    'use at import': (
        "session = Session(SECRET)\nsession['user'] = 'joe'",
        'RuntimeError: The session can only be used in a request', 'call this from a route'),
    'use in a thread of the route': (
        "import threading\nsession = Session(SECRET)\n"
        "def use(): print(session['user'])\n"
        "def route():\n    thread = threading.Thread(target=use)\n"
        "    thread.start()\n    thread.join()\n"
        "visit(route)",
        'RuntimeError: The session can only be used in a request', 'on their thread'),
    'no save': (
        "session = Session(SECRET, mode='file')\nvisit(lambda: session.update(user='joe'))",
        'WARNING / changed the session and did not save that', 'call session.save()'),
    'a change after the save': (
        "session = Session(SECRET, mode='file')\n"
        "visit(lambda: session.update(a=1) or session.save() and session.update(b=2))",
        'WARNING / changed the session and did not save that', 'after the last change'),
    'an attribute instead of a key': (
        "session = Session(SECRET)\nsession.user = 'joe'",
        'AttributeError: session.user cannot be set', "session['user'] = ..."),
    'an owner as an attribute': (
        "session = Session(SECRET)\nsession.owner = 'joe'",
        'AttributeError: session.owner cannot be set', 'session.login(owner)'),
    'redis that does not run': (
        "session = Session(SECRET, mode='redis://localhost:1/0')\nvisit(lambda: session.get('n'))",
        'redis: INFO failed', 'start the server, or check host and port'),
    'a directory that is a file': (
        "open('sessions', 'w')\nSession(SECRET, mode='file')", 'is not a directory',
        'sessions_dir'),
    'a Session in the route': (
        "visit(lambda: Session(SECRET) and 'ok')",
        'UserWarning: a Session was made while a request runs', 'at the top level of the module'),
    'json and a datetime': (
        "import datetime, json\nsession = Session(SECRET, mode='file', serializer=json)\n"
        "visit(lambda: session.update(at=datetime.datetime(2026, 1, 1)) or session.save())",
        "SessionError: session['at'] holds a value of type datetime", 'Keep plain values'),
    'a hundred megabytes': (
        "session = Session(SECRET, mode='file')\n"
        "visit(lambda: session.update(film=bytes(10 ** 8)) or session.save())",
        'SessionError: The session is too big', 'Keep big things elsewhere'),
    'two objects with one cookie': (
        "one, two = Session(SECRET), Session(SECRET)\nvisit(lambda: one.get('n') or two.get('n'))",
        "RuntimeError: Two Session objects with the cookie 'bsession'", 'another cookie_name'),
    'a secure cookie over http': (
        "session = Session(SECRET, secure=True)\nvisit(session.explain)",
        'the browser sent no cookie of ours', 'it is Secure, and this page came by http'),
    'memory mode in several processes': (
        "session = Session(SECRET)\n"
        "visit(lambda: session.get('n') or 'ok', **{'wsgi.multiprocess': True})",
        "WARNING mode='memory' under a server with several processes", "mode='file'"),
}


@pytest.mark.parametrize('mistake', list(MISTAKES))
def test_mistake_is_said_at_once_with_its_remedy(mistake, tmp_path):
    script, said, remedy = MISTAKES[mistake]
    output = output_of(BEGIN + script, at=tmp_path)
    assert said in output and remedy in output, output
    assert 'a secret of more' not in output.replace(script, ''), 'no message shows the secret'


def test_mistake_a_directory_of_root_is_said_with_owner_and_remedy(tmp_path):
    if os.geteuid():
        pytest.skip('needs root, to make a directory that is not ours')
    os.chmod(tmp_path, 0o755)
    output = output_of(BEGIN + '''
session = Session(SECRET, sys.argv[1], mode='file')
os.setgid(65534); os.setuid(65534)
visit(lambda: session.update(n=1) or session.save())
''', str(tmp_path / 'sessions'), at='/')
    assert 'belongs to user 0, and this process runs as user 65534' in output, output
    assert 'chown' in output and '\n503 ' in output


def test_mistake_a_package_that_is_missing_is_said_with_its_install_command(tmp_path):
    for name, use in ('cryptography', "Session(SECRET, mode='file')"), (
            'redis', "Session(SECRET, mode='redis')"):
        (tmp_path / (name + '.py')).write_text('raise ImportError("no such module")')
        output = output_of(BEGIN + use, at=tmp_path, path=[tmp_path])
        (tmp_path / (name + '.py')).unlink()
        assert 'ImportError' in output and 'pip install' in output and name in output, output


def test_mistake_an_old_bottle_beside_the_app_is_said_with_version_and_file(tmp_path):
    (tmp_path / 'bottle.py').write_text("__version__ = '0.12.25'\nHTTPError = HTTPResponse = 1")
    output = output_of('import bottle_session', at=tmp_path, path=[tmp_path])
    assert '0.12.25' in output and str(tmp_path / 'bottle.py') in output, output
    assert 'pip install --upgrade bottle' in output


def test_mistake_return_session_gives_the_keys_as_the_readme_says(tmp_path):
    output = output_of(BEGIN + "session = Session(SECRET)\n"
                       "visit(lambda: session.update(one=1, two=2) or session)", at=tmp_path)
    assert '\n200 onetwo' in output, output
    with open(os.path.join(HERE, 'README.rst'), encoding='utf-8') as file:
        assert '`return session` gives only the keys' in file.read()

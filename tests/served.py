""" The app that the tests serve, see `serve` in conftest.py. """

import os
import sys
import time

import bottle

import bottle_session

app = bottle.Bottle()
session = bottle_session.Session(os.environ['SECRET'], mode=os.environ['MODE'], **(
    {'sessions_dir': os.environ['PLACE'] + '/sessions'} if os.environ['MODE'] == 'file' else {}))


@app.route('/')
@app.route('/pid')
def pid():
    return str(os.getpid())


@app.route('/count')
def count():
    with session:
        session['n'] = session.get('n', 0) + 1
        return str(session['n'])


@app.route('/put/<key>/<value>')
def put(key, value):
    session[key] = value
    session.save()
    return 'kept'


@app.route('/get')
def get():
    return dict(session.data)


@app.route('/login/<user>')
def login(user):
    session['user'] = user
    session.regenerate()
    bottle.redirect('/get')


@app.route('/logout')
def logout():
    session.purge()
    bottle.redirect('/get')


@app.route('/slow/save/<token>')
def slow_save(token):
    user = session['user']
    wait(token)
    session['late'] = user
    return str(session.save())


@app.route('/slow/with/<token>')
def slow_with(token):
    with session:
        user = session['user']
        wait(token)
        session['late'] = user
    return str(bool(session.id))


def wait(token):
    """ Tell the test that we are here, and wait until it says to go on. """
    open(os.path.join(os.environ['PLACE'], token + '.started'), 'w').close()
    while not os.path.exists(os.path.join(os.environ['PLACE'], token + '.go')):
        time.sleep(0.005)


def main(kind, host, port):
    if kind == 'waitress':
        import waitress
        waitress.serve(app, host=host, port=int(port), threads=8, _quiet=True)
        return
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

    class Threading(ThreadingMixIn, WSGIServer):
        daemon_threads = True
        request_queue_size = 100

    class Quiet(WSGIRequestHandler):
        def log_message(self, *args):
            pass

    make_server(host, int(port), app, Threading, Quiet).serve_forever()


if __name__ == '__main__':
    main(*sys.argv[1:])

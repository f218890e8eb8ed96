""" The counter as it goes to production; README.rst in this directory tells how to start it. """

import os

import bottle
import bottle_session

SECRETS = os.environ.get('SESSION_SECRETS', '').split()
if not SECRETS or min(map(len, SECRETS)) < 32:
    raise SystemExit('Set SESSION_SECRETS to what "python -m bottle_session secret" prints. '
                     'README.rst here tells how to change it later.')

app = bottle.Bottle()
session = bottle_session.Session(
    SECRETS,  # the first one seals, the others still open
    mode=os.environ.get('REDIS_URL', 'redis://localhost:6379/0'),
    cookie_name='__Host-session', secure=True,  # https only, and never from a neighbour's host
    days=14, max_days=90)
app.install(session)

PAGE = '''<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Visit {{visits}}</title>
<style>
  body { font: 18px/1.5 system-ui, sans-serif; max-width: 30rem; margin: 12vh auto;
         padding: 0 1rem; color: #223; text-align: center }
  b { display: block; font-size: 7rem; line-height: 1.3; color: #15795c }
</style>
<p>You were here <b>{{visits}}</b> {{'time' if visits == 1 else 'times'}}.
<p><small>Answered by process {{pid}}; all of them share the sessions.</small>'''


@app.get('/')
def counter():
    with session:
        session['visits'] = session.get('visits', 0) + 1
    return bottle.template(PAGE, visits=session['visits'], pid=os.getpid())


@app.get('/health')
def health():  # never asks redis: it does not use the session
    return 'ok\n'

""" The session as a plugin, which connects and saves by itself: http://localhost:8080 """

import os
import time

import bottle
import bottle_session

SECRET = os.environ.get('SESSION_SECRET', 'for trying this example only')

app = bottle.Bottle()
session = bottle_session.Session(SECRET, mode='file')
app.install(session)
bottle.BaseTemplate.defaults['session'] = session  # {{session['name']}} works in all templates

PAGE = '''<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>A plugin</title>
<style>
  body { font: 17px/1.5 system-ui, sans-serif; max-width: 30rem; margin: 12vh auto;
         padding: 0 1rem; color: #223 }
  input, button { font: inherit; padding: .3rem .7rem; margin: .15rem 0 }
  button { border: 0; border-radius: 4px; color: #fff; background: #15795c; cursor: pointer }
  a { color: #15795c }
</style>
<h1>Hello{{', ' + session['name'] if 'name' in session else ''}}!</h1>
<form method="post" action="/name">
<p><label>Your name <input name="name" value="{{session.get('name', '')}}" required></label>
<button>Keep it</button>
</form>
% if session:
<form method="post" action="/forget">
<p>Names so far: {{', '.join(session['names'])}}. <button>Forget me</button>
</form>
% end
<p><small><a href="/time">What time is it?</a> That route uses no session.</small>'''


@app.get('/')
def home():
    return bottle.template(PAGE)


@app.post('/name')
def name(session):  # the plugin passes the session to this argument
    session['name'] = bottle.request.forms.name[:40]
    session.setdefault('names', []).append(session['name'])
    bottle.redirect('/', 303)  # saved all the same: a redirect is an answer, not a crash


@app.post('/forget')
def forget(session):
    session.purge()
    bottle.redirect('/', 303)


@app.get('/time', skip=[session])  # the plugin leaves this route alone
def now():
    bottle.response.content_type = 'text/plain; charset=UTF-8'
    return time.strftime('It is %H:%M:%S.\n')


if __name__ == '__main__':
    app.run(host='localhost', port=8080)
